# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Scenes in which one object moves."""

import numpy as np
import pytest

from stellar_hf.data import load_moving_object, load_tabletop_scenes


@pytest.mark.parametrize("seed", range(3))
def test_one_object_moves_in_equal_steps_and_all_else_stays(seed):
    scenes = load_moving_object("test", num_frames=5, seed=seed).with_format("numpy")
    columns = scenes[:]
    mask, position = columns["mask"], columns["position"]
    steps = np.diff(position, axis=0)
    assert steps[0, 0, 0] > 0.05
    np.testing.assert_allclose(steps[:, 0], np.broadcast_to(steps[0, 0], (4, 2)), atol=1e-5)
    np.testing.assert_allclose(steps[:, 0, 1], 0, atol=1e-6)
    np.testing.assert_array_equal(steps[:, 1:], 0)

    areas = (mask == 1).sum(axis=(1, 2))
    assert areas.min() > 0.85 * areas.max()  # whole in the image, and never hidden
    for frame, x in zip(mask, position[:, 0, 0], strict=True):
        assert (frame == 1).nonzero()[1].mean() / 64 == pytest.approx(x, abs=0.03)

    images = np.stack([np.asarray(image) for image in columns["image"]]).astype(int)
    assert np.abs(np.diff(images, axis=0)).max(axis=(1, 2, 3)).min() > 10
    elsewhere = (mask != 1).all(axis=0)
    np.testing.assert_array_equal(mask[:, elsewhere], np.broadcast_to(mask[0, elsewhere], (5, elsewhere.sum())))


def test_columns_are_those_of_other_scenes_and_the_seed_decides():
    scenes = load_moving_object("train", num_frames=2, image_size=16, seed=1)
    assert scenes.features == load_tabletop_scenes("train", 1, image_size=16).features
    again, other = (load_moving_object("train", num_frames=2, image_size=16, seed=seed) for seed in (1, 2))
    assert again["position"][:] == scenes["position"][:] != other["position"][:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_frames": 1}, "num_frames is 1"), ({"split": "dev"}, "not 'dev'"), ({"image_size": 8}, "at least 16")],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_moving_object(**{"split": "test", **arguments})
