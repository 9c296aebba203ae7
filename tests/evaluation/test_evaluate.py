# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stellar_hf import StellarConfig, StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.data import load_photo_mosaics
from stellar_hf.evaluation import (
    evaluate_stellar,
    format_results_table,
    psnr,
    raw_pixel_baseline,
    tokens_and_psnr,
)
from stellar_hf.features import encode_images


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


def test_a_broken_image_is_left_out_of_every_figure(mosaics, caplog):
    """The results are those of the data sets without it."""
    broken = {}
    for name, dataset in mosaics.items():
        rows = dataset.cast_column("image", datasets.Image(decode=False)).to_list()
        rows.insert(2, {**rows[0], "image": {"bytes": b"no image", "path": f"{name}.png"}})
        broken[name] = datasets.Dataset.from_list(rows, features=dataset.features)
    model = tiny_model()
    expected = evaluate_stellar(model, **mosaics, show_progress=False)
    assert evaluate_stellar(model, **broken, show_progress=False) == pytest.approx(expected, abs=1e-5)
    for name in broken:
        assert caplog.text.count(f"{name}.png cannot be read") == 1


def test_psnr_is_that_of_the_reconstruction(mosaics):
    """Also in half precision, where the image that it is compared with stays exact."""
    scenes = mosaics["scenes"].select(range(4))
    pixels = torch.stack([torch.tensor(np.array(scene["image"])) for scene in scenes]).permute(0, 3, 1, 2) / 255
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics.values())
    processor = StellarImageProcessorPil(do_resize=False, do_center_crop=False, **statistics)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(**statistics).eval().to(dtype)
        with torch.no_grad():
            expected = model(((pixels - mean) / std).to(dtype), return_loss=False)
        features = encode_images(model, scenes, processor, encode=tokens_and_psnr, show_progress=False)
        torch.testing.assert_close(features.psnr, psnr(expected.reconstruction.float(), pixels), atol=1e-3, rtol=1e-4)


def test_images_of_another_size_are_refused(mosaics):
    images = [Image.new("RGB", (32, 32)), Image.new("L", (48, 40))]
    dataset = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="is 48x40 pixels, but 32x32 is expected"):
        evaluate_stellar(tiny_model(), **{**mosaics, "scenes": dataset}, show_progress=False)


def test_missing_columns_and_empty_datasets_are_named(mosaics):
    no_mask = mosaics | {"scenes": mosaics["scenes"].remove_columns("mask")}
    with pytest.raises(ValueError, match="no column 'mask'"):
        evaluate_stellar(tiny_model(), **no_mask, show_progress=False)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_stellar(tiny_model(), **{**mosaics, "scenes": mosaics["scenes"].select([])}, show_progress=False)


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
