# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The classification script as a user runs it: embedded photographs, a folder of one's own, errors."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

from stellar_hf.data import load_photo_mosaics

SCRIPT = Path(__file__).parents[2] / "examples" / "image_classification.py"


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Runs the script with arguments, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--use_cpu", f"--output_dir={tmp_path / 'out'}", *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


@pytest.mark.slow
def test_linear_probe_of_the_demo_model(run_script, tmp_path, capfd):
    """Better than chance (one of 19) after a minute's fraction, with the encoder as it was."""
    sizes = [
        "--num_train_images=160",
        "--num_test_images=50",
        "--num_train_epochs=3",
        "--per_device_train_batch_size=32",
    ]
    run_script(*sizes, "--learning_rate=1e-2", "--eval_strategy=no")
    output, errors = capfd.readouterr()
    assert "Test accuracy of the linear probe" in output and "→" in output
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["test_accuracy"] > 0.2
    assert "warning" not in errors.lower()


@pytest.mark.slow
def test_fine_tuning_on_a_folder_of_classes(run_script, tmp_path, capfd):
    for split, count in (("train", 24), ("test", 8)):
        images = load_photo_mosaics(split, count, num_regions=1)
        for index, row in enumerate(images):
            folder = tmp_path / split / ("even" if row["label"] % 2 == 0 else "odd")
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
    folders = [f"--train_dir={tmp_path / 'train'}", f"--test_dir={tmp_path / 'test'}"]
    run_script(*folders, "--freeze_encoder=false", "--max_steps=2", "--per_device_train_batch_size=8")
    assert "Test accuracy of the fine-tuned model" in capfd.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "even", 1: "odd"}


def test_half_of_a_data_set_is_refused_in_a_sentence(run_script, tmp_path):
    with pytest.raises(SystemExit, match="^error: train_dir and test_dir belong together"):
        run_script(f"--train_dir={tmp_path}")
