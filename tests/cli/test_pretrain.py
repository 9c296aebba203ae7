# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The pre-training script as a user runs it: the main job, images of one's own, errors, Ctrl-C."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, ViTConfig, ViTModel

import stellar_hf  # noqa: F401 - makes the Auto classes know the model
from stellar_hf import MaskGitVQModel
from stellar_hf.data import images_to_tensor, load_images, load_tabletop_scenes
from stellar_hf.evaluation import psnr
from stellar_hf.training.evaluation import sample_rows

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_sparse_tokens": 3,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "num_prototypes": 8,
    "prototype_dim": 8,
    "projection_hidden_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
TINY_RUN = ["--num_global_views=1", "--num_local_views=0", "--per_device_train_batch_size=4", "--use_cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes have that are started here: with more threads, sums are rounded in another order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def pretrain():
    """The script as a module, for what needs no process of its own."""
    from stellar_hf.cli import pretrain

    return pretrain


@pytest.fixture
def run_script(pretrain, monkeypatch):
    """Runs the script with arguments, in this process."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        pretrain.main()

    return run


@pytest.fixture
def error_of(run_script, capsys):
    """Runs the script with arguments that it must refuse, and returns what it says."""

    def error(*argv):
        with pytest.raises(SystemExit) as exit:
            run_script(*argv)
        message = exit.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert "Traceback" not in message + capsys.readouterr().err
        return message

    return error


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of all sizes and modes, some in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    modes = {"a.png": "RGB", "b.png": "L", "c.PNG": "RGBA", "d.png": "P", "more/e.jpg": "RGB", "more/f.jpg": "CMYK"}
    for index, (name, mode) in enumerate(modes.items()):
        pixels = rng.integers(0, 256, (30 + 7 * index, 60 - 5 * index, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def own_images(photos, tmp_path_factory):
    """Arguments of a tiny run on the folder, without an output folder."""
    return [f"--train_dir={photos}", f"--model_config={json.dumps(TINY_MODEL)}", *TINY_RUN]


# The main job --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def main_job(forking_python, tmp_path_factory):
    """A finished short run of the main job, in a fresh interpreter, and its output folder."""
    folder = tmp_path_factory.mktemp("job") / "model"
    command = [forking_python, "-m", "accelerate.commands.launch", "-m", "stellar_hf.cli.pretrain"]
    command += ["--max_steps=2", "--logging_steps=1", "--per_device_train_batch_size=16"]
    command += ["--num_train_scenes=32", "--num_eval_scenes=24"]
    process = subprocess.run(
        [*command, f"--output_dir={folder}"], env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stderr
    return process, folder


def test_main_job_writes_all_results(main_job):
    results = json.loads((main_job[1] / "all_results.json").read_text())
    of_maps = ("foreground_ari", "mean_best_overlap", "object_recall", "map_position_r2")
    of_tokens = ("own_material_knn", "other_material_knn", "own_shape_linear", "token_position_r2")
    names = [f"{row}test_{name}" for row in ("", "untrained_", "kmeans_") for name in (*of_maps, *of_tokens)]
    names += [
        "test_psnr",
        "untrained_test_psnr",
        "patch_means_test_psnr",
        "chance_test_own_material_knn",
        "train_loss",
    ]
    assert {name: type(results.get(name)) for name in names} == dict.fromkeys(names, float)
    assert results["test_psnr"] != results["untrained_test_psnr"]
    assert results["kmeans_test_foreground_ari"] > 0.4  # colours and places, in eight segments


def test_main_job_prints_progress_and_a_table_and_nothing_alarming(main_job):
    process, folder = main_job
    lines = process.stdout.splitlines()
    assert lines[0].endswith("8 sparse tokens, 32 images in views of 64x64 pixels")
    title = next(line for line in lines if line.split()[:2] == ["step", "loss"])
    assert [line.split()[0] for line in lines[lines.index(title) + 1 :][:2]] == ["1", "2"]
    rule = lines.index("-" * 80)
    assert [line[:11].strip() for line in lines[rule + 1 : rule + 6]] == [
        "chance",
        "k-means",
        "patch means",
        "untrained",
        "trained",
    ]
    as_good = lines[lines.index("As good as trained, or better:") :]
    (kmeans,) = [line for line in as_good if line.startswith("  k-means: ")]
    assert "mBO, found" in kmeans and "PSNR" not in kmeans
    assert all(len(line) <= 100 for line in lines if str(folder) not in line)
    assert "{" not in process.stdout
    assert "2/2" in process.stderr  # the progress bar
    assert not re.search(r"warning:|warn\(|traceback", process.stderr.lower())


def test_main_job_shows_reconstructions_through_the_pipeline(main_job):
    process, folder = main_job
    (said,) = re.findall(r"^8 images through the pipeline, PSNR (\S+) dB, .*: (.*)$", process.stdout, re.M)
    assert said[1] == str(folder / "reconstructions.png")
    with Image.open(said[1]) as figure:
        assert min(figure.size) > 500
    pipe = stellar_hf.StellarPipeline.from_pretrained(folder / "pipeline")
    scenes = load_tabletop_scenes("test", 24, seed=1)
    scenes = [scene.resize((128, 128)) for scene in scenes.select(sample_rows(scenes, 8))["image"][:]]
    target = torch.stack(images_to_tensor(scenes)) / 255
    found = pipe(image=scenes, output_type="pt").images
    assert abs(psnr(found, target).mean().item() - float(said[0])) < 0.1


def test_auto_classes_load_the_folder_as_the_output_says(main_job, load_processor):
    process, folder = main_job
    assert f'AutoModel.from_pretrained("{folder}")' in process.stdout
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    inputs = load_processor(folder)(image, return_tensors="pt")
    assert AutoModel.from_pretrained(folder)(**inputs).sparse_tokens.shape[:2] == (1, 8)
    output = AutoModelForPreTraining.from_pretrained(folder)(**inputs, return_loss=False)
    assert output.reconstruction.shape == (1, 3, 128, 128)


def test_main_job_writes_a_pipeline_that_reconstructs_as_the_model_does(main_job):
    process, folder = main_job
    assert f'StellarPipeline.from_pretrained("{folder / "pipeline"}")' in process.stdout
    pipe = stellar_hf.StellarPipeline.from_pretrained(folder / "pipeline")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = pipe.image_processor(image, return_tensors="pt")
    model = AutoModelForPreTraining.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**inputs, return_loss=False).reconstruction
    torch.testing.assert_close(pipe(image=image, output_type="latent").images, expected, rtol=0, atol=1e-5)


# Images of one's own -------------------------------------------------------------------------------------------------


def test_own_images_train_a_model_whose_processor_normalizes_as_the_training_did(
    run_script, own_images, tmp_path, capsys, load_processor
):
    run_script(*own_images, "--max_steps=2", f"--output_dir={tmp_path}")
    output = capsys.readouterr().out
    assert "tabletop scenes" not in output and f'AutoModel.from_pretrained("{tmp_path}")' in output
    assert (tmp_path / "reconstructions.png").is_file()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixel_values = load_processor(tmp_path)(pixels, return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixel_values[0], expected, rtol=0, atol=1e-5)
    assert AutoModelForPreTraining.from_pretrained(tmp_path).config.num_sparse_tokens == 3


def test_a_folder_alone_trains_a_small_model_that_fits_it(run_script, photos, tmp_path, capsys):
    short = ["--max_steps=2", "--per_device_train_batch_size=2", "--use_cpu"]
    run_script(f"--train_dir={photos}", *short, f"--output_dir={tmp_path}")
    chosen, otherwise = capsys.readouterr().out.splitlines()[:2]
    # Short sides of the photos: 30 to 60 pixels.
    assert chosen.startswith("Chosen for a CPU and images of about") and "32x32 pixels with patches of 4" in chosen
    assert "stellar-hf pretrain own_images --model_config" in otherwise
    model = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert model.config.image_size == 32 and model.num_parameters() < 5e6
    assert "\nData: 6 images" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("strategy", [[], ["--eval_strategy", "no"]])
def test_images_to_measure_on_are_measured_at_the_end(run_script, own_images, photos, tmp_path, strategy):
    run_script(*own_images, f"--eval_dir={photos}", *strategy, "--max_steps=1", f"--output_dir={tmp_path}")
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_psnr"] > 0 and results["train_loss"] > 0


def test_measuring_while_training_measures_each_model_once(run_script, own_images, photos, tmp_path, monkeypatch):
    evaluate, evaluated = stellar_hf.StellarTrainer.evaluate, []

    def counted(trainer, *args, **kwargs):
        evaluated.append(trainer.state.global_step)
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(stellar_hf.StellarTrainer, "evaluate", counted)
    command = [*own_images, f"--eval_dir={photos}", "--eval_strategy=steps", "--eval_steps=1", "--save_steps=1"]
    command += ["--max_steps=2", f"--output_dir={tmp_path}"]
    run_script(*command)
    assert evaluated == [1, 2]
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
    results = json.loads((tmp_path / "all_results.json").read_text())
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    measured = [log for log in logs if "eval_psnr" in log]
    assert [log["step"] for log in measured] == [1, 2]
    assert {name: results[name] for name in ("eval_loss", "eval_psnr")}.items() <= measured[-1].items()

    (tmp_path / "all_results.json").unlink()
    run_script(*command)  # is finished, and measured again, perhaps on other images
    again = json.loads((tmp_path / "all_results.json").read_text())
    assert again["eval_psnr"] == pytest.approx(results["eval_psnr"])


def test_shards_are_streamed(run_script, photos, tmp_path, capsys):
    load_images(photos).to_parquet(tmp_path / "shards" / "0.parquet")
    run_script(
        f"--train_dir={tmp_path / 'shards'}",
        "--streaming",
        f"--model_config={json.dumps(TINY_MODEL)}",
        *TINY_RUN,
        "--max_steps=4",
        f"--output_dir={tmp_path / 'out'}",
    )  # 16 images of a stream of 6
    assert "streamed images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 4


def test_going_on_from_a_model(run_script, own_images, photos, tmp_path):
    run_script(*own_images, "--max_steps=1", f"--output_dir={tmp_path / 'first'}")
    second = [f"--model_name_or_path={tmp_path / 'first'}", '--model_config={"mask_ratio": 0.5}', "--learning_rate=0"]
    run_script(
        f"--train_dir={photos}", *TINY_RUN, *second, "--max_steps=1", "--seed=7", f"--output_dir={tmp_path / 'second'}"
    )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["mask_ratio"] == 0.5


def test_training_starts_from_the_encoder_of_a_vit(run_script, own_images, tmp_path):
    """With a learning rate of zero the encoder stays the ViT's."""
    sizes = {name: TINY_MODEL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    vit = ViTModel(ViTConfig(**sizes, intermediate_size=16, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    own_config = {name: value for name, value in TINY_MODEL.items() if name not in {*sizes, "intermediate_size"}}
    arguments = [argument for argument in own_images if not argument.startswith("--model_config")]
    arguments += [f"--model_config={json.dumps(own_config)}", "--max_steps=1", "--learning_rate=0"]
    run_script(*arguments, f"--model_name_or_path={tmp_path / 'vit'}", f"--output_dir={tmp_path / 'out'}")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.layers[0].mlp.fc1.weight, vit.state_dict()["layers.0.mlp.fc1.weight"])
    assert model.config.num_sparse_tokens == 3


def test_codes_of_a_tokenizer_are_reconstructed(run_script, own_images, tmp_path, capsys):
    sizes = {"block_out_channels": (8, 8, 8, 8, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    MaskGitVQModel(**sizes, num_vq_embeddings=16).save_pretrained(tmp_path / "vq")
    config = json.dumps({**TINY_MODEL, "codebook_size": 16})
    arguments = [*own_images, f"--model_config={config}", f"--vq_model_name_or_path={tmp_path / 'vq'}"]
    run_script(*arguments, "--max_steps=2", f"--output_dir={tmp_path / 'out'}")
    assert (tmp_path / "out" / "reconstructions.png").is_file()
    assert "6 images through the pipeline, PSNR" in capsys.readouterr().out
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    assert model.config.reconstruction_target == "codes" and model.decoder.head.out_features == 16
    pipe = stellar_hf.StellarPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipe(image=Image.new("RGB", (50, 40))).images[0].size == (50, 40)


# Recipes -------------------------------------------------------------------------------------------------------------


def test_flags_go_before_the_recipe_and_the_recipe_before_the_defaults(pretrain, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 2e-3\nmax_steps: 7\nglobal_scale: [0.5, 0.9]\nbf16: false\nload_best_model_at_end: null\n"
        "model_config: {image_size: 64, num_sparse_tokens: 4}\n"
    )
    flags = ["--max_steps=9", '--model_config={"num_sparse_tokens": 5}']
    model_args, data_args, training_args = pretrain.parse_arguments([str(recipe), *flags])
    assert (training_args.learning_rate, training_args.max_steps, training_args.weight_decay) == (2e-3, 9, 0.04)
    assert training_args.global_scale == [0.5, 0.9]
    assert model_args.model_config == {"image_size": 64, "num_sparse_tokens": 5}
    assert data_args.is_embedded

    recipe.write_text("train_dir: a\nmax_steps: 7\n")
    _, data_args, training_args = pretrain.parse_arguments([str(recipe), "--dataset_name=b"])
    assert (data_args.train_dir, data_args.dataset_name, training_args.max_steps) == (None, "b", 7)

    (tmp_path / "recipe.json").write_text(json.dumps({"max_steps": 3, "model_config": {"image_size": 48}}))
    model_args, _, training_args = pretrain.parse_arguments([str(tmp_path / "recipe.json")])
    assert (training_args.max_steps, model_args.model_config) == (3, {"image_size": 48})


def test_the_recipe_that_is_taken_where_none_is_named(pretrain, photos):
    model_args, _, training_args = pretrain.parse_arguments([])
    assert model_args.model_config["image_size"] == 128 and training_args.num_global_views == 1
    # A model that goes on keeps its own configuration.
    model_args, _, training_args = pretrain.parse_arguments(["--model_name_or_path=model"])
    assert model_args.model_config == {} and training_args.num_global_views == 1

    own_images = [f"--train-dir={photos}", "--use_cpu"]
    model_args, _, training_args = pretrain.parse_arguments(own_images)
    assert model_args.model_config["hidden_size"] == 128 and model_args.fits_images
    assert (training_args.num_global_views, training_args.max_steps) == (1, 1200)
    assert pretrain.parse_arguments([*own_images, "--num_train_epochs=3"])[2].max_steps == -1
    for chosen in ("--model_name_or_path=model", "--vq_model_name_or_path=vq", '--model_config={"patch_size": 8}'):
        model_args, _, training_args = pretrain.parse_arguments([*own_images, chosen])
        assert training_args.num_global_views == 8 and not model_args.fits_images
    model_args, _, _ = pretrain.parse_arguments(["own_images", *own_images, '--model_config={"image_size": 96}'])
    assert model_args.model_config["image_size"] == 96 and model_args.model_config["hidden_size"] == 128


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (['--model_config={"num_attention_heads": 5}'], ["num_attention_heads is 5", "divisor of hidden_size = 96"]),
        (['--model_config={"num_attention_heads": "four"}'], ["num_attention_heads", "int", "'four'"]),
        (['--model_config={"num_heads": 4}'], ["num_heads"]),
        (['--model_config={"num_attention_heads": 4'], ["not JSON", '{"num_attention_heads": 4']),
        (["--model_config=[4]"], ["[4]", "names with values"]),
        (['--model_config={"reconstruction_target": "codes"}'], ['="codes"', "vq_model_name_or_path"]),
        (
            ["--vq_model_name_or_path=/no/such/model", '--model_config={"reconstruction_target": "codes"}'],
            ["/no/such"],
        ),
        (["--model_name_or_path=/no/such/model"], ["/no/such/model"]),
        (["--train_dir=/no/such/folder"], ["/no/such/folder", "does not exist"]),
        (["--streaming"], ["streaming is for shards"]),
        (["--eval_dir=a"], ["eval_dir is for images of your own"]),
        (["--max_step=10"], ["--max_step does not exist", "did you mean --max_steps?"]),
        (["--max_steps=ten"], ["--max_steps", "ten"]),
        (["--eval_split=test"], ["eval_split is for a dataset_name"]),
        (["--train_dir=a", "--dataset_name=b"], ["train_dir", "dataset_name"]),
        (["--no_such_flag=1"], ["--no_such_flag"]),
        (["--lr_scheduler_type=zigzag"], ["zigzag"]),
        (["--teacher_momentum=2"], ["teacher_momentum is 2.0"]),
        (["--num_train_scenes=0"], ["num_scenes is 0"]),
        (["/no/such/recipe.yaml"], ["/no/such/recipe.yaml", "cannot be read"]),
    ],
)
def test_impossible_arguments(error_of, tmp_path, arguments, said):
    message = error_of(*arguments, *([] if "recipe" in arguments[0] else [f"--output_dir={tmp_path}"]))
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("max_step: 4", "max_step"),
        ("model_config: {image_sise: 4}", "image_sise"),
        ("a: [1", "cannot be read"),
    ],
)
def test_impossible_recipes(error_of, tmp_path, recipe, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert said in error_of(path)


def test_folder_without_images(error_of, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    message = error_of(f"--train_dir={tmp_path}", f"--model_config={json.dumps(TINY_MODEL)}")
    assert "no image in" in message and str(tmp_path) in message


def test_data_set_without_the_image_column(error_of, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"photo": "a.png"}\n')
    arguments = [f"--dataset_name={tmp_path / 'data'}", f"--model_config={json.dumps(TINY_MODEL)}"]
    message = error_of(*arguments, f"--output_dir={tmp_path / 'out'}")
    assert "no column 'image'" in message and "['photo']" in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_is_named(error_of, tmp_path, num_workers):
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    model = f"--model_config={json.dumps(TINY_MODEL)}"
    arguments = [f"--train_dir={tmp_path}", model, *TINY_RUN, "--max_steps=1", f"--output_dir={tmp_path / 'out'}"]
    message = error_of(*arguments, f"--dataloader_num_workers={num_workers}")
    assert message.startswith("error: None of the 1 images of a batch can be read.")
    assert f"{tmp_path / 'broken.png'} cannot be read: unknown format." in message


def test_an_error_ends_a_command_with_workers(forking_python, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    command = [forking_python, str(SCRIPT), f"--train_dir={tmp_path}", f"--model_config={json.dumps(TINY_MODEL)}"]
    command += [*TINY_RUN, "--max_steps=1", f"--output_dir={tmp_path / 'out'}", "--dataloader_num_workers=1"]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert process.returncode == 1 and "broken.png cannot be read" in process.stderr.splitlines()[-1]


def test_model_config_that_does_not_fit_the_checkpoint(error_of, run_script, own_images, tmp_path):
    run_script(*own_images, "--max_steps=1", f"--output_dir={tmp_path}")
    message = error_of(*own_images[:1], f"--model_name_or_path={tmp_path}", '--model_config={"num_sparse_tokens": 5}')
    assert str(tmp_path) in message and "num_sparse_tokens" in message


# Going on ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(pretrain, own_images, tmp_path_factory):
    """Builds, once for a number of workers, the folder of a run of six steps, and the arguments that it was given."""

    @functools.cache
    def build(num_workers):
        arguments = [*own_images, "--max_steps=6", "--save_steps=2", "--logging_steps=1", "--num_local_views=1"]
        arguments += ["--local_size=16", f"--dataloader_num_workers={num_workers}"]
        folder = tmp_path_factory.mktemp("uninterrupted")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *arguments, f"--output_dir={folder}"])
            pretrain.main()
        return folder, arguments

    return build


def assert_same_training(folder, expected):
    """The same curve and the same weights, bit for bit."""
    of_the_machine = {"images_per_second", "memory_gib"}
    states = [json.loads((each / "trainer_state.json").read_text()) for each in (folder, expected)]
    found, whole = (
        [{name: log[name] for name in log.keys() - of_the_machine} for log in state["log_history"] if "loss" in log]
        for state in states
    )
    assert [log["step"] for log in whole] == [1, 2, 3, 4, 5, 6] and found == whole
    assert_same_weights(folder, expected)


def assert_same_weights(folder, expected):
    found, whole = (load_file(each / "model.safetensors") for each in (folder, expected))
    assert found.keys() == whole.keys() and all(torch.equal(found[name], weight) for name, weight in whole.items())


def test_the_same_command_goes_on_after_a_kill_bit_for_bit_and_is_finished_after_that(
    run_script, forking_python, uninterrupted, tmp_path, capsys
):
    whole, arguments = uninterrupted(num_workers=2)
    arguments = [*arguments, f"--output_dir={tmp_path}"]
    command = [forking_python, str(SCRIPT), *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
    try:
        while not (tmp_path / "checkpoint-2").is_dir():
            assert process.poll() is None
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()  # until nobody can write any more
    shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)  # where the kill came late

    run_script(*arguments)
    assert re.search(rf"^Going on from {tmp_path}/checkpoint-[24] ", capsys.readouterr().out, re.M)
    assert_same_training(tmp_path, whole)

    (tmp_path / "model.safetensors").unlink()
    run_script(*arguments)
    output = capsys.readouterr().out
    assert f"The training is finished; measuring {tmp_path}/checkpoint-6" in output and "6 steps done" not in output
    assert_same_weights(tmp_path, whole)


def test_overwriting_starts_anew(run_script, error_of, own_images, tmp_path, capsys):
    arguments = [*own_images, f"--output_dir={tmp_path}", "--save_steps=1"]
    run_script(*arguments, "--max_steps=3")
    run_script(*arguments, "--max_steps=1", "--overwrite_output_dir", "--seed=5")
    assert "Going on" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    asked = f"--resume_from_checkpoint={tmp_path / 'checkpoint-1'}"
    assert "choose one" in error_of(*arguments, "--overwrite_output_dir", asked)


def test_a_checkpoint_of_another_model_is_refused(error_of, run_script, own_images, tmp_path):
    run_script(*own_images, "--max_steps=1", f"--output_dir={tmp_path}")
    other = json.dumps({**TINY_MODEL, "num_sparse_tokens": 5})
    message = error_of(*own_images, f"--model_config={other}", "--max_steps=2", f"--output_dir={tmp_path}")
    assert "of another model: num_sparse_tokens is 3 there and 5 here." in message


def test_a_checkpoint_that_was_asked_for(error_of, run_script, uninterrupted, tmp_path):
    whole, arguments = uninterrupted(num_workers=0)
    first = shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    asked = f"--resume_from_checkpoint={first}"
    run_script(*arguments, asked, f"--output_dir={tmp_path / 'second'}")
    assert_same_training(tmp_path / "second", whole)

    (first / "model.safetensors").write_bytes(b"")
    said = {
        asked: "model.safetensors is not as it was written",
        "--resume_from_checkpoint=/no/such": "no checkpoint /no/such",
    }
    for argument, part in said.items():
        assert part in error_of(*arguments, argument, f"--output_dir={tmp_path / 'third'}")


# Ctrl-C --------------------------------------------------------------------------------------------------------------


def test_ctrl_c_before_training(run_script, tmp_path, capsys):
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a terminal leaves it
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)  # whose reader waits

    def interrupt():
        with recipe.open("w"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(SystemExit) as exit:
            run_script(recipe)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert exit.value.code == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.slow
def test_ctrl_c_in_training_leaves_a_checkpoint_that_the_same_command_goes_on_from(
    run_script, own_images, tmp_path, capsys
):
    # At its end the process says whether it has imported Diffusers, which a training of pixels can do without.
    code = "import atexit, runpy, sys; atexit.register(lambda: print('diffusers:', 'diffusers' in sys.modules)); "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, *own_images, f"--output_dir={tmp_path}", "--logging_steps=1"]
    command += ["--max_steps=100000", "--dataloader_num_workers=1", "--save_strategy=no"]
    with (tmp_path / "stderr.txt").open("w") as errors:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            # A shell that runs this in the background ignores SIGINT, which the child would inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            while not re.match(r" +3 ", line := process.stdout.readline()):
                assert line, (tmp_path / "stderr.txt").read_text()
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    errors = (tmp_path / "stderr.txt").read_text()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "saving a checkpoint" in errors
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step >= 3 and f"Repeat the command to go on from {checkpoint}" in output
    assert "diffusers: False" in output
    assert AutoModelForPreTraining.from_pretrained(checkpoint).config.num_sparse_tokens == 3

    run_script(*own_images, f"--output_dir={tmp_path}", f"--max_steps={step + 1}")
    assert f"Going on from {checkpoint}" in capsys.readouterr().out
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == step + 1
    assert [log["step"] for log in state["log_history"][:step]] == list(range(1, step + 1))
