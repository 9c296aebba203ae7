# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The demo model is as good as the figures that come with it say."""

import json
from pathlib import Path

import pytest

import stellar_hf
from stellar_hf import StellarForPreTraining
from stellar_hf.data import load_tabletop_scenes
from stellar_hf.evaluation import evaluate_scenes
from stellar_hf.features import load_processor


@pytest.mark.slow
def test_demo_model_is_as_good_as_its_figures():
    """On a part of the figures' scenes, and fewer neighbours: kNN can only be bounded from below."""
    stated = json.loads(Path(stellar_hf.DEMO_MODEL, "all_results.json").read_text())
    measured = evaluate_scenes(
        StellarForPreTraining.from_pretrained(stellar_hf.DEMO_MODEL),
        load_processor(stellar_hf.DEMO_MODEL),
        train=load_tabletop_scenes("train", 160, image_size=128, seed=1),
        test=load_tabletop_scenes("test", 80, image_size=128, seed=1),
        show_progress=False,
    )
    tolerance = {
        "foreground_ari": 0.06, "mean_best_overlap": 0.05, "object_recall": 0.08, "map_position_r2": 0.06, "psnr": 0.8,
    }  # fmt: skip
    for name, difference in tolerance.items():
        assert measured[name] == pytest.approx(stated[f"test_{name}"], abs=difference), name
    material = stated["test_own_material_knn"]
    assert material - 0.12 < measured["own_material_knn"] < material + 0.06


def test_demo_model_is_small():
    assert Path(stellar_hf.DEMO_MODEL, "model.safetensors").stat().st_size < 8e6
