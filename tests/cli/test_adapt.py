# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Adaptation by the command line: the guide, the guard of what the model knew, and what is refused."""

import io
import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining

from stellar_hf import DEMO_MODEL
from stellar_hf.cli.__main__ import main as stellar_hf_command
from stellar_hf.cli.adapt import main, make_parser, parse_arguments
from stellar_hf.cli.pretrain import value_types
from stellar_hf.cli.recipes import read_recipe
from stellar_hf.data import load_photo_mosaics
from stellar_hf.evaluation import knn_accuracy
from stellar_hf.features import load_processor

REPOSITORY = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (REPOSITORY / "docs" / "adaptation.md").read_text(), re.DOTALL)
SMALL = [
    "--train_dir=film/train", "--eval_dir=film/test", "--num_eval_scenes=20", "--per_device_train_batch_size=8",
    "--num_global_views=1", "--num_local_views=0", "--use_cpu",
]  # fmt: skip


def follow(language, code):
    """Runs a block of the guide in this process, whose imports are there; gives its output."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        if language == "python":
            exec(code, {})
        else:
            program, *arguments = shlex.split(code.replace("\\\n", " "))
            assert program == "stellar-hf"
            stellar_hf_command(arguments)
    return printed.getvalue()


def knn_of_crops(count):
    """
    kNN accuracy of the demo model on crops of the photographs that cover its scenes, by plain means. Of 20 crops it is
    0.2, which no bound tells from chance; of 100 it is about 0.5.
    """
    model, processor = AutoModel.from_pretrained(DEMO_MODEL).eval(), load_processor(DEMO_MODEL)
    sets = []
    for split, size in (("train", 2 * count), ("test", count)):
        crops = load_photo_mosaics(split, size, model.config.image_size, num_regions=1, seed=1)
        with torch.no_grad():
            sets.append(model(processor(crops["image"][:], return_tensors="pt")["pixel_values"]).pooler_output)
        sets.append(torch.tensor(crops["label"][:]))
    return knn_accuracy(*sets)


@pytest.fixture
def adapt(guide, monkeypatch, capsys):
    """Runs the command in the folder of the guide; gives its output."""
    monkeypatch.chdir(guide[0])

    def run_here(*flags):
        monkeypatch.setattr(sys, "argv", ["adapt", *SMALL, *flags])
        main()
        return capsys.readouterr().out

    return run_here


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The folder in which the guide was followed, and what its commands printed."""
    folder = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pytest"])
        printed = [follow(language, code) for language, code in BLOCKS]
    return folder, printed


@pytest.mark.slow
def test_the_guide_adapts_all_weights_or_adapters_alone(guide):
    folder, printed = guide
    before = load_file(Path(DEMO_MODEL, "model.safetensors"))
    old_knn = knn_of_crops(20)
    for name, text in zip(("adapted", "adapted-lora"), (printed[1], printed[2]), strict=True):
        for row in ("old images, before", "old images, after", "new images, before", "new images, after"):
            assert row in text
        figures = json.loads((folder / name / "all_results.json").read_text())
        # Measured: 25.5 dB and 0.50.
        assert figures["old_before_psnr"] > 19 and figures["old_before_foreground_ari"] > 0.3
        assert figures["old_before_knn_accuracy"] == old_knn and 0 < figures["old_after_foreground_ari"] < 1
        assert figures["new_after_psnr"] != figures["new_before_psnr"]
        weights = load_file(folder / name / "model.safetensors")
        assert weights.keys() == before.keys()  # a plain model
        changed = {key for key in weights if not torch.equal(weights[key], before[key])}
        is_projection = {key for key in weights if re.search(r"\.[qkvo]_proj\.weight$", key)}
        assert changed == is_projection if name == "adapted-lora" else len(changed) > len(is_projection)
        AutoModelForPreTraining.from_pretrained(folder / name)


@pytest.mark.slow
def test_a_finished_run_is_measured_again(guide, adapt):
    weights = guide[0] / "adapted-lora" / "model.safetensors"
    before = weights.read_bytes()
    printed = adapt("--output_dir=adapted-lora", "--lora_rank=8", "--max_steps=4", "--max_knn_drop=100")
    assert "The training is finished" in printed
    assert weights.read_bytes() == before


@pytest.mark.slow
def test_a_rate_that_is_too_high_stops_with_a_sentence(adapt):
    """The last whole checkpoint that holds is taken, with what is known of it; without one, nothing is saved."""
    flags = ["--eval_steps=2", "--save_steps=2", "--learning_rate=0.3"]
    # Two steps of a warm-up over a million change nothing that counts; then the rate is what it is.
    adapt(*flags, "--output_dir=kept", "--max_steps=2", "--warmup_steps=1000000")
    held = load_file("kept/model.safetensors")
    shutil.copytree("kept/checkpoint-2", "kept/checkpoint-3")
    Path("kept/checkpoint-3/model.safetensors").write_bytes(b"damaged")
    going_on = ["--output_dir=kept", "--resume_from_newest_whole"]
    printed = adapt(*flags, *going_on, "--max_steps=8", "--warmup_steps=3")
    assert "Stopped: kNN on the old images fell by more than 2 points" in printed
    assert "Taken instead: kept/checkpoint-2" in printed
    kept = load_file("kept/model.safetensors")
    assert all(torch.equal(weight, held[name]) for name, weight in kept.items())
    figures = json.loads(Path("kept/all_results.json").read_text())
    assert figures["eval_psnr"] == pytest.approx(figures["new_after_psnr"]) and "train_loss" not in figures
    assert json.loads(Path("kept/trainer_state.json").read_text())["global_step"] == 2
    card = Path("kept/README.md").read_text()
    assert "| Steps | 2 |" in card and f"| eval_psnr | {figures['eval_psnr']:.4g} |" in card

    with pytest.raises(SystemExit) as stopped:
        adapt(*flags, "--output_dir=nothing", "--max_steps=4")
    told = str(stopped.value)  # which Python prints, with the status 1
    assert "error: kNN on the old images fell by more than 2 points" in told
    assert "no checkpoint holds: nothing is saved" in told
    assert not Path("nothing", "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no images to adapt the model to: give train_dir"),
        (["--train_dir=photos"], "images that are not trained on: give eval_dir"),
        (["--train_dir=a", "--eval_dir=b", "--lora_rank=0"], "lora_rank is 0"),
        (["--train_dir=a", "--eval_dir=b", "--max_knn_drop=-1"], "max_knn_drop is -1.0"),
        (["--train_dir=a", "--eval_dir=b", "--old_train_dir=c"], "without old_eval_dir"),
        (["--train_dir=a", "--eval_dir=b", f"--output_dir={DEMO_MODEL}"], "take another one"),
    ],
)
def test_what_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([*flags, "--use_cpu"])


def test_the_recipe_of_a_released_model_holds_what_the_command_takes():
    path = REPOSITORY / "examples" / "recipes" / "adapt.yaml"
    recipe = read_recipe(path, value_types(make_parser()))
    model_args, data_args, adaptation, training_args = parse_arguments([str(path), "--use_cpu"])
    assert model_args.is_released and model_args.reconstruction_target == "codes"
    assert adaptation.lora_rank == recipe["lora_rank"] and data_args.train_dir == recipe["train_dir"]
    assert training_args.save_steps == training_args.eval_steps == 100
