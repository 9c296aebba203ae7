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
def test_all_three_train_on_the_same_scenes_and_stay_as_they_are_when_repeated(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = ["--seeds", "0", "--max_steps", "2", "--num_train_scenes", "64", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    script.main()

    folders = [tmp_path / f"{name}-0" for name in ("untrained", "stellar", "supervised")]
    assert f"--model_name_or_path {' '.join(map(str, folders))}" in capsys.readouterr().out
    before = encoders(folders)
    for trained in before[1:]:
        assert trained.keys() == before[0].keys()
        assert all((trained[name] != weight).any() for name, weight in before[0].items() if "q_proj.weight" in name)

    script.main()  # finished trainings are not repeated
    for old, new in zip(before, encoders(folders), strict=True):
        assert all((old[name] == new[name]).all() for name in old)


def encoders(folders):
    return [AutoModel.from_pretrained(folder).state_dict() for folder in folders]
