# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stellar_hf import StellarConfig, StellarForPreTraining
from stellar_hf.data import load_photo_mosaics
from stellar_hf.evaluation import (
    evaluate_stellar,
    extract_features,
    format_results_table,
    psnr,
    raw_pixel_baseline,
)


def tiny_model(**options) -> StellarForPreTraining:
    torch.manual_seed(0)
    config = StellarConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_sparse_tokens=4,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        num_prototypes=16,
        prototype_dim=8,
        projection_hidden_size=16,
        **({"reconstruction_target": "pixels"} | options),
    )
    return StellarForPreTraining(config)


@pytest.fixture(scope="module")
def mosaics() -> dict[str, datasets.Dataset]:
    return {
        "crops_train": load_photo_mosaics("train", 96, num_regions=1),
        "crops_test": load_photo_mosaics("test", 64, num_regions=1),
        "scenes_train": load_photo_mosaics("train", 96, num_regions=2),
        "scenes": load_photo_mosaics("test", 64, num_regions=2),
    }


def test_evaluation_reports_every_figure_in_its_range_and_repeats(mosaics):
    model = tiny_model()
    results = evaluate_stellar(model, **mosaics, batch_size=50, show_progress=False)
    shares = (
        "knn_accuracy linear_accuracy concept_accuracy concept_coverage localization_miou localization_sharpness"
    ).split()
    assert set(results) == {*shares, "psnr"}
    assert all(0 <= results[name] <= 1 for name in shares)
    assert results["localization_sharpness"] >= 1 / 4
    assert 0 < results["psnr"] < 40
    again = evaluate_stellar(model, **mosaics, batch_size=64, show_progress=False)
    assert again == pytest.approx(results, abs=0.02)


def test_pooled_tokens_of_random_weights_already_beat_chance(mosaics):
    results = evaluate_stellar(tiny_model(), **mosaics, show_progress=False)
    assert results["knn_accuracy"] > 2 / 19
    assert results["linear_accuracy"] > 2 / 19


def test_code_models_have_no_psnr(mosaics):
    results = evaluate_stellar(tiny_model(reconstruction_target="codes"), **mosaics, show_progress=False)
    assert "psnr" not in results
    assert "knn_accuracy" in results


def test_features_are_those_of_the_normalized_images(mosaics):
    model = tiny_model(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3]).eval()
    scenes = mosaics["scenes"].select(range(5))
    features = extract_features(model, scenes, batch_size=2, reconstruct=True, show_progress=False)

    pixels = torch.stack([torch.tensor(np.array(scene["image"])) for scene in scenes]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        expected = model((pixels - mean) / std)
    torch.testing.assert_close(features.sparse_tokens, expected.sparse_tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.localization, expected.localization, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.pooled, expected.sparse_tokens.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.psnr, psnr(expected.reconstruction, pixels), atol=1e-3, rtol=1e-4)


def test_training_flags_survive_the_evaluation(mosaics):
    model = tiny_model().train()
    model.decoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    extract_features(model, mosaics["scenes"].select(range(2)), show_progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before

    wrong_size = datasets.Dataset.from_dict({"image": [Image.new("RGB", (16, 16))]}).cast_column(
        "image", datasets.Image()
    )
    with pytest.raises(ValueError):
        extract_features(model, wrong_size, show_progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_models_in_half_precision_are_evaluated(mosaics):
    model = tiny_model().to(torch.bfloat16)
    features = extract_features(model, mosaics["scenes"].select(range(4)), reconstruct=True, show_progress=False)
    assert features.sparse_tokens.dtype == features.psnr.dtype == torch.float32
    assert features.psnr.isfinite().all()


def test_images_of_another_size_are_named():
    images = [Image.new("RGB", (32, 32)), Image.new("L", (48, 40))]
    dataset = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="Image 1 of the dataset is 48x40 pixels, but 32x32 is expected"):
        extract_features(tiny_model(), dataset, show_progress=False)


def test_missing_columns_and_empty_datasets_are_named(mosaics):
    no_mask = mosaics | {"scenes": mosaics["scenes"].remove_columns("mask")}
    with pytest.raises(ValueError, match="no column 'mask'"):
        evaluate_stellar(tiny_model(), **no_mask, show_progress=False)
    with pytest.raises(ValueError, match="empty"):
        extract_features(tiny_model(), mosaics["scenes"].select([]), show_progress=False)


def test_raw_pixels_beat_chance_and_know_their_training_set(mosaics):
    crops_train, crops_test = mosaics["crops_train"], mosaics["crops_test"]
    results = raw_pixel_baseline(crops_train, crops_test)
    assert set(results) == {"knn_accuracy", "linear_accuracy"}
    assert results["knn_accuracy"] > 1 / 19
    assert raw_pixel_baseline(crops_train, crops_train)["linear_accuracy"] > 0.8


def test_table_is_aligned_and_shows_units_and_gaps():
    full = {
        "knn_accuracy": 0.8349,
        "linear_accuracy": 1.0,
        "concept_accuracy": 0.5,
        "concept_coverage": 0.25,
        "psnr": 24.26,
        "localization_miou": 0.616,
        "localization_sharpness": 0.7,
    }
    table = format_results_table({"raw pixels": {"knn_accuracy": 0.33}, "a model trained longer": full})
    lines = table.splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["kNN", "linear", "concept", "coverage", "PSNR", "localization"]
    assert lines[1].split() == ["%", "%", "%", "%", "dB", "mIoU"]
    assert lines[3].removeprefix("raw pixels").split() == ["33.0", "–", "–", "–", "–", "–"]
    assert lines[4].removeprefix("a model trained longer").split() == ["83.5", "100.0", "50.0", "25.0", "24.3", "0.62"]


def test_table_of_the_usual_rows_fits_a_terminal():
    table = format_results_table({name: {} for name in ("raw pixels", "before training", "demo model, 2 hours")})
    assert max(map(len, table.splitlines())) <= 80


def test_importing_the_package_loads_neither_torch_nor_scikit_learn():
    code = "import sys, stellar_hf.evaluation; assert not {'torch', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
