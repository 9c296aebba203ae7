# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What stands where on a table: shapes, materials and places of the tabletop scenes, drawn at random.

Lengths are in widths of the image; x points right, y away from the viewer, z up; the ground is z = 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .photo_mosaics import PHOTOGRAPH_NAMES
from .ray_tracing import SHAPE_NAMES

_ELEVATION = math.radians(36)  # of the camera above the ground
SIN, COS = math.sin(_ELEVATION), math.cos(_ELEVATION)  # ground and height are foreshortened by these
_SIZES = (0.22, 0.4)
_SINGLE_SIZES = (0.42, 0.64)
MARGIN = 0.02  # between an object and the border of the image
GAP = 0.01  # between the footprints of objects
# Radius of a solid in diameters of the ball of the same volume.
RADII = dict(sphere=0.5, cube=(math.pi / 48) ** (1 / 3), cylinder=(1 / 12) ** (1 / 3), cone=(1 / 4) ** (1 / 3))
_LIGHT_AZIMUTHS = (math.radians(200), math.radians(340))  # behind the viewer, from left to right
# Random places that are tried at once for an object.
_NUM_CANDIDATES = 8


class Scenes(NamedTuple):
    """A batch of n scenes with room for m objects each. Float32 and int64 arrays."""

    exists: np.ndarray  # (n, m) bool
    shape: np.ndarray  # (n, m)
    material: np.ndarray  # (n, m)
    block: np.ndarray  # (n, m), of the material
    position: np.ndarray  # (n, m, 2), of the center on the ground
    size: np.ndarray  # (n, m)
    rotation: np.ndarray  # (n, m)
    texture: np.ndarray  # (n, m, 3): length of a block, and where the texture begins, in blocks
    ground: np.ndarray  # (n,)
    ground_block: np.ndarray  # (n,)
    ground_texture: np.ndarray  # (n, 4): the same of the ground, and its angle
    light: np.ndarray  # (n,): azimuth

    def select(self, index: slice) -> Scenes:
        return Scenes(*(field[index] for field in self))


def draw_scenes(
    rng: np.random.Generator, num_scenes: int, num_blocks: np.ndarray, max_objects: int, num_objects: int | None
) -> Scenes:
    """Draws scenes.

    Args:
        rng: Of all draws.
        num_scenes: Number n of scenes.
        num_blocks: (19,) number of blocks of each photograph.
        max_objects: Most objects m of a scene.
        num_objects: Objects of each scene; 2 to `max_objects` without it.

    Returns:
        The scenes, with `block` and `ground_block` numbered photograph by photograph.
    """
    first_block = np.cumsum(num_blocks) - num_blocks
    n, m = num_scenes, max_objects

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, shape).astype(np.float32)

    count = rng.integers(2, m, size=n, endpoint=True) if num_objects is None else np.full(n, num_objects)
    exists = np.arange(m) < count[:, None]
    shape = rng.integers(len(SHAPE_NAMES), size=(n, m))
    material = rng.integers(len(PHOTOGRAPH_NAMES), size=(n, m))
    ground = rng.integers(len(PHOTOGRAPH_NAMES), size=n)
    size = uniform(*(_SINGLE_SIZES if num_objects == 1 else _SIZES), n, m)
    rotation = uniform(0, 2 * math.pi, n, m)
    return Scenes(
        exists=exists,
        shape=shape,
        material=material,
        block=first_block[material] + rng.integers(num_blocks[material]),
        position=_draw_positions(rng, exists, shape, size, rotation),
        size=size,
        rotation=rotation,
        texture=np.stack([uniform(0.5, 0.9, n, m), uniform(0, 2, n, m), uniform(0, 2, n, m)], axis=-1),
        ground=ground,
        ground_block=first_block[ground] + rng.integers(num_blocks[ground]),
        ground_texture=np.stack(
            [uniform(0.6, 1.1, n), uniform(0, 2, n), uniform(0, 2, n), uniform(0, 2 * math.pi, n)], axis=-1
        ),
        light=uniform(*_LIGHT_AZIMUTHS, n),
    )


def _draw_positions(
    rng: np.random.Generator, exists: np.ndarray, shape: np.ndarray, size: np.ndarray, rotation: np.ndarray
) -> np.ndarray:
    """Places objects on the ground, (n, m, 2) float32: whole in the image, apart, and no center hidden.

    One object after the other takes the first of some random places that fits. A scene without any begins again.
    """
    across, up, down = extents_of(shape, size, rotation)
    radius = radius_of(shape, size)
    footprint = footprint_of(shape, size)
    lowest = np.stack([MARGIN + across, MARGIN + up], axis=-1)
    highest = 1 - np.stack([MARGIN + across, MARGIN + down], axis=-1)
    image, ground = np.zeros((2, *exists.shape, 2))
    counts, num_placed = exists.sum(1), np.zeros(len(exists), dtype=int)
    slots = np.arange(exists.shape[1])
    while len(pending := (num_placed < counts).nonzero()[0]):
        own = (pending, num_placed[pending])
        # Arrays over (pending scenes, candidates, other objects).
        candidates = (
            lowest[own][:, None] + rng.random((len(pending), _NUM_CANDIDATES, 2)) * (highest - lowest)[own][:, None]
        )
        places = _to_ground(candidates, radius[own][:, None])
        distance = np.linalg.norm(places[:, :, None] - ground[pending, None], axis=-1)
        apart = distance >= footprint[own][:, None, None] + footprint[pending, None] + GAP
        right, below = np.moveaxis(candidates[:, :, None] - image[pending, None], -1, 0)
        behind = places[:, :, None, 1] > ground[pending, None, :, 1]
        hidden = behind & _in_box(right, below, *(extent[pending, None] for extent in (across, up, down)))
        hides = ~behind & _in_box(-right, -below, *(extent[own][:, None, None] for extent in (across, up, down)))
        placed = slots < num_placed[pending, None, None]
        fits = (~placed | (apart & ~hidden & ~hides)).all(-1)
        first, found = fits.argmax(1), fits.any(1)
        index = np.arange(len(pending))
        image[own], ground[own] = candidates[index, first], places[index, first]
        num_placed[pending] = np.where(found, num_placed[pending] + 1, 0)
    return ground.astype(np.float32)


def _in_box(right: np.ndarray, below: np.ndarray, across: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Whether a point that lies so far right of and below a center is in the box around it."""
    return (np.abs(right) < across) & (below > -up) & (below < down)


def radius_of(shape: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Radius of the unit solid, which is half the object's height."""
    return np.array([RADII[name] for name in SHAPE_NAMES], dtype=np.float32)[shape] * size


def footprint_of(shape: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Radius of the circle around an object's place on the ground."""
    radius = radius_of(shape, size)
    return np.where(shape == SHAPE_NAMES.index("cube"), math.sqrt(2) * radius, radius)


def extents_of(shape: np.ndarray, size: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far an object reaches in the image: sideways, up and down from its center."""
    radius = radius_of(shape, size)
    name = np.array(SHAPE_NAMES)[shape]
    turned = np.where(name == "cube", np.abs(np.cos(rotation)) + np.abs(np.sin(rotation)), 1).astype(np.float32)
    across = radius * turned
    down = np.where(name == "sphere", radius, across * SIN + radius * COS).astype(np.float32)
    up = np.where(name == "cone", radius * COS, down).astype(np.float32)
    return across, up, down


def _to_ground(image: np.ndarray, height: np.ndarray) -> np.ndarray:
    """From (x, y) in the image to the place (x, y) on the ground of a center at that height."""
    return np.stack([image[..., 0] - 0.5, (0.5 - image[..., 1] - height * COS) / SIN], axis=-1)


def to_image(ground: np.ndarray, height: np.ndarray) -> np.ndarray:
    """From the place (x, y) of a center on the ground, at that height, to (x, y) in the image."""
    return np.stack([0.5 + ground[..., 0], 0.5 - ground[..., 1] * SIN - height * COS], axis=-1)
