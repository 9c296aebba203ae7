# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The script that extracts features as a user runs it: any images, killed and repeated, several processes, errors."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from stellar_hf import StellarImageProcessorPil, StellarModel
from stellar_hf.cli.__main__ import main as stellar_hf_command

SCRIPT = Path(__file__).parents[2] / "examples" / "extract_features.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "1",
}


@pytest.fixture(scope="module")
def script():
    """The script as a module, for what needs no process of its own."""
    spec = importlib.util.spec_from_file_location("extract_features", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["extract_features"] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_script(script, monkeypatch):
    """Runs the script with arguments, in this process."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
        script.main()

    return run


@pytest.fixture
def error_of(run_script):
    """Runs the script with arguments that it must refuse, and returns what it says."""

    def error(*argv):
        with pytest.raises(SystemExit) as exit:
            run_script(*argv)
        assert str(exit.value.code).startswith("error: ")
        return exit.value.code

    return error


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of ten images of two classes, of all sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(10):
        path = folder / ("dog" if index % 3 == 0 else "cat") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + 9 * index, 90 - 5 * index, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def save_model(tiny_config, tmp_path_factory):
    """Saves a tiny model with an image processor of some settings."""

    def save(**settings):
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        StellarModel(tiny_config()).save_pretrained(folder)
        StellarImageProcessorPil(**settings).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def model_folder(save_model):
    return save_model(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def arguments(model_folder, photos):
    """Of a small run, without an output folder: three shards, with batches that do not divide them."""
    return [
        f"--model_name_or_path={model_folder}",
        f"--image_dir={photos}",
        "--shard_size=4",
        "--batch_size=3",
    ]


def load(folder):
    """The features as the script's output says."""
    return datasets.load_dataset("parquet", data_dir=str(folder / "features"), split="train")


def shards_of(folder):
    return sorted((folder / "features").glob("*.parquet"))


def outputs_of(model_folder, photos):
    """What the model says of each image by itself."""
    model, processor = (
        StellarModel.from_pretrained(model_folder),
        StellarImageProcessorPil.from_pretrained(model_folder),
    )
    with torch.no_grad():
        for path in sorted(photos.glob("*/*")):
            yield model(**processor(Image.open(path), return_tensors="pt"))


def assert_equal_features(first, second):
    assert first.features == second.features and len(first) == len(second)
    assert first["path"][:] == second["path"][:]
    for row, other in zip(first.with_format("numpy"), second.with_format("numpy"), strict=True):
        for name in set(first.features) - {"path"}:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_are_the_models_own_outputs(
    run_script, arguments, model_folder, photos, tmp_path, capsys, num_workers
):
    run_script(*arguments, f"--output_dir={tmp_path / 'out'}", f"--dataloader_num_workers={num_workers}")
    output = capsys.readouterr().out
    assert "Features of 10 images in 3 shards:" in output
    assert f'load_dataset("parquet", data_dir="{tmp_path / "out" / "features"}", split="train")' in output

    features = load(tmp_path / "out")
    assert features["index"][:] == list(range(10))
    assert features["path"][:] == sorted(map(str, photos.glob("*/*")))
    assert features.features["label"].names == ["cat", "dog"]
    assert features["label"][:] == [0] * 6 + [1] * 4
    assert features.features["localization"].dtype == "float16"
    for row, output in zip(features.with_format("torch"), outputs_of(model_folder, photos), strict=True):
        torch.testing.assert_close(row["tokens"], output.sparse_tokens[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(row["localization"], output.localization[0], rtol=0, atol=1e-3)
        assert row["grid_size"].tolist() == [4, 4]


def test_images_may_stay_in_different_sizes(run_script, save_model, photos, tmp_path):
    model_folder = save_model(size={"shortest_edge": 24}, do_center_crop=False)
    run_script(f"--model_name_or_path={model_folder}", f"--image_dir={photos}", f"--output_dir={tmp_path / 'out'}")
    grids = set()
    features = load(tmp_path / "out").with_format("torch")
    for row, output in zip(features, outputs_of(model_folder, photos), strict=True):
        assert torch.equal(row["grid_size"].long(), output.grid_size[0])
        torch.testing.assert_close(row["localization"], output.localization[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(row["tokens"], output.sparse_tokens[0], rtol=0, atol=1e-5)
        grids.add(tuple(row["grid_size"].tolist()))
    assert len(grids) > 2


def test_top_k_keeps_the_largest_entries_of_each_row(run_script, arguments, model_folder, photos, tmp_path):
    run_script(*arguments, "--top_k=2", f"--output_dir={tmp_path / 'out'}")
    features = load(tmp_path / "out")
    assert "localization" not in features.features
    for row, output in zip(features.with_format("torch"), outputs_of(model_folder, photos), strict=True):
        values, indices = row["localization_values"], row["localization_indices"]
        expected = output.localization[0].topk(2).values
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(output.localization[0].gather(1, indices), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "float32"), ("float16", "float16")])
def test_lower_precision(run_script, arguments, model_folder, photos, tmp_path, dtype, stored):
    run_script(*arguments, f"--dtype={dtype}", f"--output_dir={tmp_path / 'out'}")
    features = load(tmp_path / "out")
    assert features.features["tokens"].dtype == stored
    for row, output in zip(features.with_format("torch"), outputs_of(model_folder, photos), strict=True):
        similarity = torch.cosine_similarity(row["tokens"], output.sparse_tokens[0], dim=-1)
        assert similarity.min() > 0.99
        assert not torch.equal(row["tokens"], output.sparse_tokens[0])


def test_other_columns_and_images_without_names(run_script, arguments, model_folder, photos, tmp_path, caplog):
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.glob("cat/*"))]
    images[3]["bytes"] = b"no image"
    columns = {"picture": images, "id": [f"photo {index}" for index in range(len(images))]}
    types = datasets.Features(picture=datasets.Image(), id=datasets.Value("string"))
    datasets.DatasetDict(test=datasets.Dataset.from_dict(columns, features=types)).save_to_disk(tmp_path / "data")
    run_script(
        f"--model_name_or_path={model_folder}",
        *(f"--dataset_name={tmp_path / 'data'}", "--dataset_split=test", "--label_column=id"),
        f"--output_dir={tmp_path / 'out'}",
    )
    features = load(tmp_path / "out")
    assert features["label"][:] == [f"photo {index}" for index in (0, 1, 2, 4, 5)]
    assert "path" not in features.features
    assert "Image 3 of the data set cannot be read" in caplog.text


# Interruptions and processes -----------------------------------------------------------------------------------------


def test_only_missing_shards_are_made(run_script, arguments, tmp_path):
    run_script(*arguments, f"--output_dir={tmp_path / 'out'}")
    whole = load(tmp_path / "out")
    first, second, third = shards_of(tmp_path / "out")
    second.rename(second.with_name(f".{second.name}.unfinished"))  # as a killed run leaves it
    times = [path.stat().st_mtime_ns for path in (first, third)]
    run_script(*arguments, f"--output_dir={tmp_path / 'out'}")
    assert [path.stat().st_mtime_ns for path in (first, third)] == times
    assert sorted((tmp_path / "out" / "features").iterdir()) == [first, second, third]
    assert_equal_features(load(tmp_path / "out"), whole)


@pytest.mark.slow
def test_killed_and_repeated_equals_uninterrupted(run_script, forking_python, arguments, tmp_path):
    arguments = [*arguments, "--shard_size=1"]
    command = [forking_python, str(SCRIPT), *arguments, f"--output_dir={tmp_path / 'killed'}"]
    with (tmp_path / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors)
        while process.poll() is None and len(shards_of(tmp_path / "killed")) < 3:
            time.sleep(0.001)
        process.kill()
        process.communicate()  # until nobody can write any more
    assert process.returncode == -signal.SIGKILL, (tmp_path / "stderr.txt").read_text()
    assert 3 <= len(shards_of(tmp_path / "killed")) < 10
    for name in ("killed", "whole"):
        run_script(*arguments, f"--output_dir={tmp_path / name}")
    assert_equal_features(load(tmp_path / "killed"), load(tmp_path / "whole"))


def test_after_ctrl_c_the_command_says_how_to_go_on(arguments, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(StellarModel, "forward", interrupt)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(SystemExit) as exit:
        stellar_hf_command(["extract", *arguments, f"--output_dir={tmp_path}"])
    assert exit.value.code == 130
    assert "Interrupted. Repeat the command to go on" in capsys.readouterr().err


@pytest.mark.slow
def test_launched_processes_write_what_one_process_writes(run_script, forking_python, arguments, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [forking_python, *launcher, str(SCRIPT), *arguments, f"--output_dir={tmp_path / 'launched'}"]
    process = subprocess.run(
        command, env={**ENVIRONMENT, "PYTHON_EXEC": forking_python}, capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Features of 10 images in 3 shards") == 1
    run_script(*arguments, f"--output_dir={tmp_path / 'one'}")
    assert_equal_features(load(tmp_path / "launched"), load(tmp_path / "one"))


def test_the_command_writes_what_the_example_writes(run_script, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # which the command sets
    run_script(*arguments, f"--output_dir={tmp_path / 'example'}")
    stellar_hf_command(["extract", *arguments, f"--output_dir={tmp_path / 'command'}"])
    assert_equal_features(load(tmp_path / "command"), load(tmp_path / "example"))


def test_shards_of_another_run_are_not_mixed_in(run_script, error_of, arguments, tmp_path):
    out = f"--output_dir={tmp_path / 'out'}"
    run_script(*arguments, out)
    message = error_of(*arguments, "--dtype=float16", out)
    assert "features-00000-of-00003.parquet" in message and "dtype = 'float32'" in message
    assert "shard_size = 4" in error_of(*arguments, "--shard_size=5", out)
    assert len(load(tmp_path / "out")) == 10


# Images that cannot be read ------------------------------------------------------------------------------------------


@pytest.fixture
def broken_photos(photos, tmp_path):
    """Five images, of which the second and the third cannot be read."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for index, path in enumerate(sorted(photos.glob("*/*"))[:5]):
        content = b"no image" if index in (1, 2) else path.read_bytes()
        (folder / f"{index}.png").write_bytes(content)
    return folder


def test_unreadable_images_are_named_left_out_and_counted(
    run_script, model_folder, broken_photos, tmp_path, capsys, caplog
):
    """Also where nothing is left of a shard."""
    arguments = [f"--model_name_or_path={model_folder}", f"--image_dir={broken_photos}", "--shard_size=1"]
    run_script(*arguments, f"--output_dir={tmp_path / 'out'}")
    assert "Features of 3 images in 5 shards, without 2 that cannot be read" in capsys.readouterr().out
    assert load(tmp_path / "out")["index"][:] == [0, 3, 4]
    for name in ("1.png", "2.png"):
        assert caplog.text.count(f"{broken_photos / name} cannot be read: unknown format. It is left out.") == 1


def test_too_many_unreadable_images_stop_the_run(error_of, model_folder, broken_photos, tmp_path):
    arguments = [f"--model_name_or_path={model_folder}", f"--image_dir={broken_photos}"]
    message = error_of(*arguments, "--max_unreadable_share=0.001", f"--output_dir={tmp_path / 'out'}")
    assert "2 of 5 images could not be read" in message and "max_unreadable_share = 0.001" in message
    assert shards_of(tmp_path / "out") == []


# Index ---------------------------------------------------------------------------------------------------------------


def test_index_finds_every_token(run_script, arguments, photos, tmp_path, capsys):
    faiss = pytest.importorskip("faiss")
    from stellar_hf.evaluation import nearest_tokens

    run_script(*arguments, "--faiss_index", f"--output_dir={tmp_path / 'out'}")
    output = capsys.readouterr().out
    assert "Index of 40 tokens" in output and output.count("→") == 4
    files = sorted(map(str, photos.glob("*/*")))
    assert f"for those of {files[0]}:" in output and any(f"→  {file} token" in output for file in files[1:])
    tokens = load(tmp_path / "out").with_format("numpy")["tokens"][:]
    index = faiss.read_index(str(tmp_path / "out" / "tokens.faiss"))
    matches = nearest_tokens(index, tokens.reshape(40, -1), num_sparse_tokens=4, k=1)
    np.testing.assert_allclose(matches.similarities, 1, atol=1e-5)
    np.testing.assert_array_equal(4 * matches.images[:, 0] + matches.slots[:, 0], np.arange(40))


def test_index_without_faiss_is_refused_before_the_work(error_of, arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install faiss-cpu" in error_of(*arguments, "--faiss_index", f"--output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments_of_error", "said"),
    [
        (["--top_k=5"], "top_k is 5, but must be in [1, 4]"),
        (["--label_column=species"], "label_column 'species'"),
        (["--dataset_name=imagenet-1k"], "choose one source of images"),
        (["--batch_size=0"], "batch_size is 0"),
        (["--image_dir=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(error_of, arguments, tmp_path, arguments_of_error, said):
    assert said in error_of(*arguments, *arguments_of_error, f"--output_dir={tmp_path / 'out'}")


def test_other_models_are_refused(error_of, arguments, tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    StellarImageProcessorPil().save_pretrained(tmp_path / "vit")
    message = error_of(*arguments, f"--model_name_or_path={tmp_path / 'vit'}", f"--output_dir={tmp_path / 'out'}")
    assert "vit model, which has no sparse tokens" in message
