# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The comparison of STELLAR with the same network that is trained with labels."""

import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

import stellar_hf  # noqa: F401

SCRIPT = Path(__file__).parents[2] / "examples" / "embedded_comparison.py"


@pytest.mark.slow
def test_both_are_trained_and_measured_and_nothing_is_done_twice(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = ["--max_steps", "2", "--num_train_scenes", "64", "--num_test_scenes", "12"]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--seeds", "0", *sizes, "--output_dir", str(tmp_path)])
    script.main()

    stellar, supervised = (AutoModel.from_pretrained(tmp_path / f"{name}-0").state_dict() for name in script.NAMES)
    assert stellar.keys() == supervised.keys()
    assert all((stellar[name] != supervised[name]).any() for name in stellar if name.endswith("q_proj.weight"))
    tables = (tmp_path / "results.md").read_text()
    for row in ("**stellar**", "**supervised**", "stellar, untrained", "colour + gradient histogram", "k-means, 6"):
        assert f"| {row}" in tables

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    measured = (tmp_path / "results.json").read_text()
    script.main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
    assert (tmp_path / "results.json").read_text() == measured
