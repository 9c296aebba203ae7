# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The script runs as its documentation says, on the embedded images and on images of a user."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stellar_hf.data.photo_mosaics import photograph


@pytest.fixture
def run_script(run_example):
    """Runs the script with arguments."""
    return partial(run_example, "reconstruct")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_a_scene_and_a_photograph_by_default(run_script, tmp_path, capsys):
    run_script()
    decibels = re.findall(r"from 8 tokens .* PSNR ([\d.]+) dB", capsys.readouterr().out)
    assert len(decibels) == 2 and all(float(value) > 14 for value in decibels)
    for name in ("scene", "flower"):
        assert pixels(tmp_path / "reconstructions" / f"{name}.png").shape == (128, 128, 3)
        height, width, _ = pixels(tmp_path / "reconstructions" / f"{name}-tokens.png").shape
        assert width > 3 * height  # a row of panels


def test_images_of_a_user_upright_through_a_saved_pipeline(run_script, tmp_path, capsys):
    image = photograph("flower").resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.convert("L").save(tmp_path / "gray.png")
    files = [tmp_path / "turned.jpg", tmp_path / "gray.png"]
    run_script("--images", *files, "--output_dir=first", "--save_pipeline=pipeline")
    run_script("--images", *files, "--output_dir=second", "--pipeline_name_or_path=pipeline")
    for name, size in (("turned.png", (60, 40)), ("gray.png", (40, 60))):
        assert pixels(Path("first", name)).shape == (*size, 3)
        np.testing.assert_allclose(pixels(Path("first", name)), pixels(Path("second", name)), atol=1)
    run_script("--images", files[1], "--grid_size", 10, 15, "--output_dir=third")
    assert "a map of 150 patches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "missing.png"], "missing.png"),
        (["--images", "text.png"], "text.png cannot be read"),
        (["--images", "a/x.png", "b/x.png"], "Two images are named x"),
        (["--grid_size", "4"], r"grid_size is \(4,\)"),
        (["--pipeline_name_or_path", "a"], "model_index.json"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(run_script, tmp_path, arguments, said):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "x.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(SystemExit, match=said) as exit:
        run_script(*arguments)
    assert str(exit.value.code).startswith("error: ")
