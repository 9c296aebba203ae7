# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A tabletop scene, again and again, in which one object moves: to see what a model takes for what, and for where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .tabletop_layout import GAP, MARGIN, Scenes, draw_scenes, extents_of, footprint_of
from .tabletop_rendering import TABLETOP_SPLITS, load_textures
from .tabletop_scenes import check_arguments, scene_columns, scene_features

if TYPE_CHECKING:
    import datasets

_MAX_OBJECTS = 4
_NUM_CANDIDATES = 256  # scenes, of which some fit


def load_moving_object(split: str, num_frames: int = 8, image_size: int = 64, seed: int = 0) -> datasets.Dataset:
    """Renders a tabletop scene whose nearest object moves from the left border to the right one, in equal steps.

    Everything else stays: ground, light and the other objects, which it passes in front of and never touches. Its
    shadow moves along, and so does its texture.

    Args:
        split: "train", "validation" or "test", as of [`load_tabletop_scenes`].
        num_frames: Number of scenes, at least 2.
        image_size: Height and width of a scene in pixels, at least 16.
        seed: Seed of the scene, not negative.

    Returns:
        The scenes in order, with the columns of [`load_tabletop_scenes`]. The object that moves is the first one, 1 in
        each `mask`.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: If scikit-image or scikit-learn is not installed.
    """
    if num_frames < 2:
        raise ValueError(f"num_frames is {num_frames}, but an object moves in at least 2.")
    check_arguments(split, num_frames, image_size, _MAX_OBJECTS, seed, None)
    import datasets

    rng = np.random.default_rng([seed, TABLETOP_SPLITS.index(split), num_frames])
    scenes = draw_scenes(rng, _NUM_CANDIDATES, load_textures(split), _MAX_OBJECTS, None)
    index = _first_is_nearest(scenes).argmax()
    frames = Scenes(*(np.repeat(field[index : index + 1], num_frames, axis=0) for field in scenes))
    across, _, _ = extents_of(frames.shape, frames.size, frames.rotation)
    border = 0.5 - MARGIN - across[0, 0]
    frames.position[:, 0, 0] = np.linspace(-border, border, num_frames)
    columns = scene_columns(frames, split, image_size, labelled=False)
    return datasets.Dataset.from_dict(columns, features=scene_features(image_size, _MAX_OBJECTS, labelled=False))


def _first_is_nearest(scenes: Scenes) -> np.ndarray:
    """(n,) whether the first object has a way before all others, on which it touches none."""
    footprint = footprint_of(scenes.shape, scenes.size)
    distance = scenes.position[:, 1:, 1] - scenes.position[:, :1, 1]
    is_free = distance >= footprint[:, 1:] + footprint[:, :1] + GAP
    return (is_free | ~scenes.exists[:, 1:]).all(axis=1)
