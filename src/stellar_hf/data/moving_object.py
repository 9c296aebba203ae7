# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A tabletop scene, again and again, in which one object moves: to see what a model takes for what, and for where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .ray_tracing import SHAPE_NAMES
from .tabletop_scenes import (
    _GAP,
    _MARGIN,
    TABLETOP_SPLITS,
    _check_arguments,
    _draw_scenes,
    _extents,
    _features,
    _radius,
    _render,
    _Scenes,
    _to_columns,
)

if TYPE_CHECKING:
    import datasets

_MAX_OBJECTS = 4


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
    _check_arguments(split, num_frames, image_size, _MAX_OBJECTS, seed, None)
    import datasets

    rng = np.random.default_rng([seed, TABLETOP_SPLITS.index(split), num_frames])
    scenes = _draw_scenes(rng, split, _MAX_OBJECTS, None)
    index = _first_is_nearest(scenes).argmax()  # of hundreds of scenes, some fit
    frames = _Scenes(*(np.repeat(field[index : index + 1], num_frames, axis=0) for field in scenes))
    across, _, _ = _extents(frames.shape, frames.size, frames.rotation)
    border = 0.5 - _MARGIN - across[0, 0]
    frames.position[:, 0, 0] = np.linspace(-border, border, num_frames)
    columns = _to_columns(frames, *_render(frames, split, image_size), labelled=False)
    return datasets.Dataset.from_dict(columns, features=_features(image_size, _MAX_OBJECTS, labelled=False))


def _first_is_nearest(scenes: _Scenes) -> np.ndarray:
    """(n,) whether the first object has a way before all others, on which it touches none."""
    radius = _radius(scenes.shape, scenes.size)
    footprint = np.where(scenes.shape == SHAPE_NAMES.index("cube"), np.sqrt(2) * radius, radius)
    distance = scenes.position[:, 1:, 1] - scenes.position[:, :1, 1]
    is_free = distance >= footprint[:, 1:] + footprint[:, :1] + _GAP
    return (is_free | ~scenes.exists[:, 1:]).all(axis=1)
