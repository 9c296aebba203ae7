# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The figure of an object that moves."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "moving_object.py"


@pytest.mark.slow
def test_the_demo_model_is_drawn_beside_an_untrained_one(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    output = tmp_path / "moving.png"
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--num_frames", "3", "--output", str(output)])
    script.main()
    trained, untrained = capsys.readouterr().out.splitlines()
    assert trained.startswith("demo: cosine") and untrained.startswith("demo, untrained: cosine")
    with Image.open(output) as figure:
        assert min(figure.size) > 400
