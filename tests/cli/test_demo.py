# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The command that draws a first figure."""

import sys

import pytest
from PIL import Image

from stellar_hf.cli.__main__ import main
from stellar_hf.data.photo_mosaics import photograph


@pytest.fixture
def run_demo(monkeypatch, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pytest"])
        main(["demo", f"--output_dir={tmp_path / 'out'}", *map(str, arguments)])
        with Image.open(tmp_path / "out" / "demo.png") as figure:
            return figure.size

    return run


def test_embedded_scenes_are_drawn_and_the_figure_is_explained(run_demo, tmp_path, capsys):
    width, height = run_demo()
    assert width > height > 500
    output = capsys.readouterr().out
    assert str(tmp_path / "out" / "demo.png") in output and "reconstruction from 8 tokens of" in output


def test_photographs_of_a_user_are_drawn(run_demo, tmp_path):
    photograph("flower").save(tmp_path / "flower.jpg")
    width, height = run_demo("--images", tmp_path / "flower.jpg")
    assert width > 3 * height  # one row
