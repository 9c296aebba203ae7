# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import hashlib
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.feature import match_template

from stellar_hf.data import PHOTOGRAPH_NAMES, load_photo_mosaics
from stellar_hf.data.photo_mosaics import block_boxes, photograph


def pixels(dataset):
    return np.stack([np.asarray(image) for image in dataset["image"]])


def masks(dataset):
    return dataset.with_format("numpy")[:]["mask"]


def test_columns():
    dataset = load_photo_mosaics("train", num_scenes=5, image_size=24, num_regions=3)
    scene = dataset[0]
    assert dataset.column_names == ["image", "label", "labels", "mask"]
    assert str(dataset.split) == "train" and len(dataset) == 5
    assert isinstance(scene["image"], Image.Image) and scene["image"].mode == "RGB" and scene["image"].size == (24, 24)
    assert len(PHOTOGRAPH_NAMES) == 19 and dataset.features["label"].names == list(PHOTOGRAPH_NAMES)
    assert masks(dataset).shape == (5, 24, 24)


@pytest.mark.parametrize("num_regions", [1, 2, 3, 4])
def test_mask_and_labels_agree(num_regions):
    dataset = load_photo_mosaics("test", num_scenes=300, num_regions=num_regions)
    shares = np.stack([(masks(dataset) == region).mean((1, 2)) for region in range(num_regions)], axis=1)
    assert np.allclose(shares.sum(1), 1)
    assert (shares >= 0.08).all()
    foreground = min(1, num_regions - 1)
    for label, labels in zip(dataset["label"], dataset["labels"], strict=True):
        assert len(set(labels)) == num_regions
        assert label == labels[foreground]


def test_foreground_of_two_regions_covers_12_to_42_percent():
    share = (masks(load_photo_mosaics("train", num_scenes=300)) == 1).mean((1, 2))
    assert share.min() >= 0.12 and share.max() <= 0.42


def test_all_photographs_are_about_equally_frequent():
    counts = np.bincount(load_photo_mosaics("train", num_scenes=1900, num_regions=1)["label"], minlength=19)
    assert counts.min() > 60 and counts.max() < 150


def test_arguments_decide_the_scenes():
    first, again, other = (load_photo_mosaics("train", num_scenes=20, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(pixels(first), pixels(again)) and np.array_equal(masks(first), masks(again))
    assert first["labels"][:] == again["labels"][:]
    assert not np.array_equal(pixels(first), pixels(other)) and not np.array_equal(masks(first), masks(other))


def test_scenes_are_the_same_in_another_process(forking_python):
    code = (
        "import hashlib\nfrom stellar_hf.data import load_photo_mosaics\n"
        "data = load_photo_mosaics('train', num_scenes=8)\n"
        "print(hashlib.sha256(b''.join(image.tobytes() for image in data['image'])).hexdigest())"
    )
    other = subprocess.run([forking_python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == hashlib.sha256(pixels(load_photo_mosaics("train", num_scenes=8)).tobytes()).hexdigest()


def test_a_scene_does_not_depend_on_the_number_of_scenes():
    few, many = (load_photo_mosaics("train", num_scenes=count, num_regions=3) for count in (5, 300))
    assert np.array_equal(pixels(few), pixels(many.select(range(5))))
    assert np.array_equal(masks(few), masks(many)[:5])


@given(st.integers(172, 3000), st.integers(172, 3000))
def test_blocks_of_the_splits_lie_apart(width, height):
    gap = min(width, height) // 33
    boxes = {split: block_boxes(split, width, height) for split in ("train", "test")}
    for top, left, size in boxes["train"]:
        for other_top, other_left, other_size in boxes["test"]:
            vertical = max(other_top - top - size, top - other_top - other_size)
            horizontal = max(other_left - left - size, left - other_left - other_size)
            assert max(vertical, horizontal) >= gap
    for top, left, size in boxes["train"] + boxes["test"]:
        assert 0 <= top <= height - size and 0 <= left <= width - size
        assert abs(size - 112 / 512 * min(width, height)) <= 0.5


@pytest.mark.parametrize("name", PHOTOGRAPH_NAMES)
def test_each_split_has_blocks_all_over_each_photograph(name):
    image = photograph(name)
    assert image.mode == "RGB"
    for split in ("train", "test"):
        boxes = block_boxes(split, *image.size)
        quadrants = {(2 * box.top >= image.height - box.size, 2 * box.left >= image.width - box.size) for box in boxes}
        assert len(boxes) >= 8 and len(quadrants) == 4


@pytest.mark.parametrize("split", ["train", "test"])
def test_crops_are_found_again_in_a_block_of_their_split(split):
    name = "astronaut"
    dataset = load_photo_mosaics(split, num_scenes=100, num_regions=1)
    scenes = pixels(dataset)[np.array(dataset["label"]) == PHOTOGRAPH_NAMES.index(name)]
    image = photograph(name)
    assert len(scenes)
    for scene in scenes:
        correlation, top, left, side = best_match(scene, image)
        assert correlation > 0.95
        assert any(
            top >= box.top - 2
            and left >= box.left - 2
            and top + side <= box.top + box.size + 2
            and left + side <= box.left + box.size + 2
            for box in block_boxes(split, *image.size)
        )


def best_match(scene, image):
    """Where the photograph shows the scene: correlation, then top, left and side in the photograph's pixels."""
    matches = []
    for side in range(48, 114, 4):
        scale = side / len(scene)
        smaller = np.asarray(image.convert("L").resize((round(image.width / scale), round(image.height / scale))))
        for candidate in (scene, scene[:, ::-1]):
            correlation = match_template(smaller, np.asarray(Image.fromarray(candidate).convert("L")))
            top, left = np.unravel_index(correlation.argmax(), correlation.shape)
            matches.append((correlation.max(), top * scale, left * scale, side))
    return max(matches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "'validation'"),
        ({"split": "train", "num_scenes": 0}, "num_scenes is 0"),
        ({"split": "train", "image_size": 4}, "image_size is 4"),
        ({"split": "train", "num_regions": 5}, "num_regions is 5"),
        ({"split": "train", "seed": -1}, "seed is -1"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_photo_mosaics(**arguments)
