# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch

from stellar_hf import StellarConfig, StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.data import load_tabletop_scenes
from stellar_hf.evaluation import (
    KMeansSegments,
    evaluate_scenes,
    format_results_table,
    psnr,
    tokens_and_psnr,
)
from stellar_hf.evaluation.evaluate import SCENE_COLUMNS
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
def scenes() -> dict[str, datasets.Dataset]:
    return {split: load_tabletop_scenes(split, 40, image_size=32) for split in ("train", "test")}


PROCESSOR = StellarImageProcessorPil(do_resize=False, do_center_crop=False)
RGB = StellarImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False)


def test_figures_of_scenes_are_in_their_ranges_and_do_not_depend_on_batches(scenes):
    model = tiny_model()
    results = evaluate_scenes(model, PROCESSOR, **scenes, show_progress=False)
    assert {name for name, *_ in SCENE_COLUMNS} <= results.keys()
    for name in results.keys() - {"psnr"}:
        least = -0.5 if name.endswith(("ari", "r2")) else 0
        assert least <= results[name] <= 1, name
    assert 0 < results["psnr"] < 40
    again = evaluate_scenes(model, PROCESSOR, **scenes, batch_size=7, show_progress=False)
    assert again == pytest.approx(results, abs=0.02)


def test_segments_by_colours_and_places_tell_objects_apart_and_where_they_are(scenes):
    """And an untrained model does not. What reconstructs no pixels has no PSNR."""
    kmeans = evaluate_scenes(KMeansSegments(8), RGB, **scenes, show_progress=False)
    untrained = evaluate_scenes(tiny_model(reconstruction_target="codes"), PROCESSOR, **scenes, show_progress=False)
    for name in ("foreground_ari", "mean_best_overlap", "object_recall", "map_position_r2"):
        assert kmeans[name] > untrained[name] + 0.1, name
    assert kmeans["map_position_r2"] > 0.5 > kmeans["token_position_r2"] + 0.3
    assert kmeans["own_material_knn"] > kmeans["own_material_chance"] == untrained["own_material_chance"]
    assert "psnr" not in kmeans and "psnr" not in untrained


def test_psnr_is_that_of_the_reconstruction(scenes):
    """Also in half precision, where the image that it is compared with stays exact."""
    few = scenes["test"].select(range(4))
    pixels = torch.stack([torch.tensor(np.array(scene["image"])) for scene in few]).permute(0, 3, 1, 2) / 255
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics.values())
    processor = StellarImageProcessorPil(do_resize=False, do_center_crop=False, **statistics)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(**statistics).eval().to(dtype)
        with torch.no_grad():
            expected = model(((pixels - mean) / std).to(dtype), return_loss=False)
        features = encode_images(model, few, processor, encode=tokens_and_psnr, show_progress=False)
        torch.testing.assert_close(features.psnr, psnr(expected.reconstruction.float(), pixels), atol=1e-3, rtol=1e-4)


def test_a_broken_scene_is_left_out_of_every_figure(scenes, caplog):
    rows = scenes["test"].cast_column("image", datasets.Image(decode=False)).to_list()
    rows.insert(2, {**rows[0], "image": {"bytes": b"no image", "path": "broken.png"}})
    broken = datasets.Dataset.from_list(rows, features=scenes["test"].features)
    model = tiny_model()
    expected = evaluate_scenes(model, PROCESSOR, **scenes, show_progress=False)
    found = evaluate_scenes(model, PROCESSOR, **{**scenes, "test": broken}, show_progress=False)
    assert found == pytest.approx(expected, abs=1e-5)
    assert caplog.text.count("broken.png cannot be read") == 1


def test_scenes_without_masks_are_named(scenes):
    no_mask = {**scenes, "test": scenes["test"].remove_columns("mask")}
    with pytest.raises(ValueError, match=r"no columns \['mask'\]"):
        evaluate_scenes(tiny_model(), PROCESSOR, **no_mask, show_progress=False)


def test_table_is_aligned_and_shows_units_and_gaps():
    columns = (
        ("knn_accuracy", ("kNN", "%"), 100, 1),
        ("linear_accuracy", ("linear", "%"), 100, 1),
        ("psnr", ("PSNR", "dB"), 1, 1),
        ("miou", ("localization", "mIoU"), 1, 2),
    )
    full = {"knn_accuracy": 0.8349, "linear_accuracy": 1.0, "psnr": 24.26, "miou": 0.616, "sharpness": 0.7}
    table = format_results_table({"raw pixels": {"knn_accuracy": 0.33}, "a model trained longer": full}, columns)
    lines = table.splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["kNN", "linear", "PSNR", "localization"]
    assert lines[1].split() == ["%", "%", "dB", "mIoU"]
    assert lines[3].removeprefix("raw pixels").split() == ["33.0", "–", "–", "–"]
    assert lines[4].removeprefix("a model trained longer").split() == ["83.5", "100.0", "24.3", "0.62"]


def test_table_of_scenes_fits_a_terminal():
    table = format_results_table({name: {} for name in ("k-means", "patch means", "untrained", "trained")})
    assert max(map(len, table.splitlines())) <= 80


def test_importing_the_package_loads_neither_torch_nor_scikit_learn():
    code = "import sys, stellar_hf.evaluation; assert not {'torch', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
