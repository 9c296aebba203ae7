# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Weights and data are known again by their contents, and the preparation of images is told by names."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_hf import StellarImageProcessorPil, StellarModel
from stellar_hf.data import load_images
from stellar_hf.features.fingerprints import data_fingerprint, processor_protocol, weights_fingerprint


@pytest.fixture
def photos(tmp_path):
    """A folder of five images of two classes."""
    for index in range(5):
        path = tmp_path / "photos" / ("dog" if index % 2 else "cat") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 50 * index, 0)).save(path)
    return tmp_path / "photos"


def test_weights_are_known_again_and_a_single_one_tells(tiny_config, tmp_path):
    model = StellarModel(tiny_config())
    fingerprint = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(StellarModel.from_pretrained(tmp_path)) == fingerprint and len(fingerprint) == 16
    assert weights_fingerprint(model.half()) != fingerprint
    model.float()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert weights_fingerprint(model) != fingerprint


def test_images_are_known_again_in_another_folder(photos, tmp_path):
    fingerprint = data_fingerprint(load_images(photos))
    shutil.copytree(photos, tmp_path / "elsewhere" / "copy")
    assert data_fingerprint(load_images(tmp_path / "elsewhere" / "copy")) == fingerprint

    Image.new("RGB", (8, 8), (9, 9, 9)).save(photos / "cat" / "0.png")
    assert data_fingerprint(load_images(photos)) != fingerprint


def test_labels_masks_and_lengths_tell(photos):
    images = load_images(photos)
    fingerprints = {
        data_fingerprint(images),
        data_fingerprint(images.select(range(4))),
        data_fingerprint(images.remove_columns("label")),
        data_fingerprint(images.remove_columns("label").add_column("label", [0, 0, 0, 0, 1])),
        data_fingerprint(images.add_column("mask", [np.zeros((2, 2)).tolist()] * 5)),
    }
    assert len(fingerprints) == 5


def test_images_of_any_kind_are_known_again(photos):
    """Files, also missing and broken ones; images and arrays in memory, alone or in rows."""
    (photos / "cat" / "0.png").write_bytes((photos / "cat" / "2.png").read_bytes()[:60])
    files = [str(file) for file in sorted(photos.glob("*/*"))]
    images = [Image.open(file) for file in files]
    arrays = [np.full((8, 8, 3), value, dtype=np.uint8) for value in range(5)]
    kinds = {"files": files, "images": images, "arrays": arrays, "rows": [{"image": file} for file in files]}
    fingerprints = {name: data_fingerprint(kind) for name, kind in kinds.items()}
    assert fingerprints["files"] == fingerprints["rows"] == data_fingerprint([{"image": file} for file in files])
    assert len(set(fingerprints.values())) == 3
    Image.new("RGB", (8, 8), (9, 9, 9)).save(files[-1])
    assert data_fingerprint(files) != fingerprints["files"]
    assert data_fingerprint([*files[:-1], "gone.png"]) not in (fingerprints["files"], data_fingerprint(files))


def test_only_the_columns_count_that_are_asked_for(photos):
    images = load_images(photos)
    more = images.add_column("mask", [0] * 5)
    assert data_fingerprint(more, columns=["label"]) == data_fingerprint(images)
    rows = [{"image": row["image"], "id": object()} for row in images]
    assert data_fingerprint(rows, columns=[]) == data_fingerprint([row["image"] for row in rows])


def test_the_preparation_of_images_is_told_by_names():
    told = processor_protocol(StellarImageProcessorPil())
    assert told["resize"] == {"shortest_edge": 256} and told["crop"] == {"height": 224, "width": 224}
    assert told["resampling"] == "bicubic" and told["mean"] == [0.485, 0.456, 0.406]
    whole = processor_protocol(StellarImageProcessorPil(do_center_crop=False, do_resize=False))
    assert whole["resize"] is whole["crop"] is whole["resampling"] is None
    assert told["background"] == [255, 255, 255]
    assert processor_protocol(StellarImageProcessorPil(background=[0, 0, 9]))["background"] == [0, 0, 9]
