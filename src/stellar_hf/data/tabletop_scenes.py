# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Tabletop scenes: solids of known shape, material and place on a plane, ray traced, with nothing to download.

The idea, solids whose textures do not give them away, is CLEVRTex's (Karazija et al. 2021).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import photo_mosaics, ray_tracing
from .photo_mosaics import PHOTOGRAPH_NAMES, photograph_blocks
from .ray_tracing import SHAPE_NAMES, ray_entry, surface_normal, texture_coordinates

if TYPE_CHECKING:
    import datasets

TABLETOP_SPLITS: tuple[str, ...] = ("train", "validation", "test")

# Lengths are in widths of the image; x points right, y away from the viewer, z up; the ground is z = 0.
_ELEVATION = math.radians(36)  # of the camera above the ground
_SIN, _COS = math.sin(_ELEVATION), math.cos(_ELEVATION)
_SIZES = (0.22, 0.4)
_SINGLE_SIZES = (0.42, 0.64)
_MARGIN = 0.02
_GAP = 0.01
# Radius of a solid in diameters of the ball of the same volume.
_RADII = dict(sphere=0.5, cube=(math.pi / 48) ** (1 / 3), cylinder=(1 / 12) ** (1 / 3), cone=(1 / 4) ** (1 / 3))

_LIGHT_ELEVATION = math.radians(48)
_LIGHT_AZIMUTHS = (math.radians(200), math.radians(340))  # behind the viewer, from left to right
_LIGHT_RADIUS = 0.13  # tangent of the angle at which half of the light is seen
_SUN, _SKY = 0.88, 0.42
_BLACK = 0.02  # what a black surface reflects; without it, black solids would show no light and no shade

# A pixel is the mean of 3 x 3 rays. The fifth goes through its center and decides the mask.
_GRID = 3
_NUM_RAYS = _GRID * _GRID
_CENTER_RAY = _NUM_RAYS // 2

# Scenes are drawn in batches of this size, each with its own generator: scene i is the same whatever `num_scenes` is.
_BATCH_SIZE = 256
_RENDERED_AT_ONCE = 32
# Random places that are tried at once for an object.
_NUM_CANDIDATES = 8


def load_tabletop_scenes(
    split: str,
    num_scenes: int = 20000,
    image_size: int = 64,
    max_objects: int = 4,
    seed: int = 0,
    num_objects: int | None = None,
) -> datasets.Dataset:
    """Makes scenes of solids on a plane, of which everything is known.

    A scene shows 2 to `max_objects` spheres, cubes, cylinders and cones under a tilted orthographic camera, with one
    light and soft shadows. Each object and the ground are covered with a block of a photograph, drawn independently of
    all else: shape is not in the texture, and now and then an object lies on a ground of its own material. Objects
    stand apart on the ground and hide parts of others behind them, but never the center of one. The splits use
    disjoint blocks of every photograph, with gaps between: no pixel of one is seen in another.

    The result is a function of the arguments alone; scene i does not depend on `num_scenes`. It is rendered once and
    kept in the cache of Datasets (`HF_DATASETS_CACHE`).

    Args:
        split: "train", "validation" or "test". Choose on validation; test is for the figures that are reported.
        num_scenes: Number of scenes.
        image_size: Height and width of a scene in pixels, at least 16.
        max_objects: Most objects of a scene, 2 to 4.
        seed: Seed of all random draws, not negative.
        num_objects: If given, each scene has this many objects, 1 to `max_objects`. A single object is larger.

    Returns:
        A dataset with the columns

        - `image`: PIL, RGB;
        - `mask`: (image_size, image_size) uint8, which object is seen at each pixel's center: 1 to `max_objects` in
          the order of the lists, 0 is the ground;
        - `ground`: class of the ground's material, a photograph;
        - `label`: class of the object's material, only with `num_objects=1`;

        and lists of length `max_objects`, -1 where there is no object:

        - `shape`: class, one of sphere, cube, cylinder, cone;
        - `material`: class, one of `PHOTOGRAPH_NAMES`;
        - `position`: (x, y) of the object's center in the image, in [0, 1] from the left and from the top;
        - `size`: diameter of the ball of the same volume, in widths of the image;
        - `rotation`: angle about the vertical axis in [0, 2 pi), counter-clockwise seen from above;
        - `area`: number of visible pixels, those of `mask`.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: If scikit-image or scikit-learn is not installed.
    """
    _check_arguments(split, num_scenes, image_size, max_objects, seed, num_objects)
    import datasets

    arguments = {
        "split": split,
        "num_scenes": num_scenes,
        "image_size": image_size,
        "max_objects": max_objects,
        "seed": seed,
        "num_objects": num_objects,
    }
    features = _features(image_size, max_objects, labelled=num_objects == 1)
    fingerprint = _fingerprint(arguments)
    file = Path(datasets.config.HF_DATASETS_CACHE, "tabletop_scenes", f"{split}-{fingerprint}.arrow")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Of processes that ask at once, one renders and the others wait.
        with FileLock(f"{file}.lock"):
            if not file.exists():
                _write_scenes(file, features, arguments)
    table = datasets.table.MemoryMappedTable.from_file(str(file))
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info=info, split=datasets.NamedSplit(split), fingerprint=fingerprint)


def _write_scenes(file: Path, features: datasets.Features, arguments: dict[str, Any]) -> None:
    """Renders all scenes into an Arrow file, which is there only once it is complete."""
    import datasets

    incomplete = file.with_suffix(".incomplete")
    bar = tqdm(
        total=arguments["num_scenes"],
        desc=f"Rendering {arguments['split']} scenes",
        unit=" scenes",
        leave=False,
        disable=datasets.are_progress_bars_disabled(),
    )
    try:
        with (
            pyarrow.OSFile(str(incomplete), "wb") as sink,
            pyarrow.ipc.new_stream(sink, features.arrow_schema) as writer,
            bar as progress,
        ):
            for columns in _Batches(arguments).in_processes():
                writer.write_table(datasets.Dataset.from_dict(columns, features=features).with_format("arrow")[:])
                progress.update(len(columns["image"]))
        incomplete.replace(file)
    finally:
        incomplete.unlink(missing_ok=True)


def _check_arguments(
    split: str, num_scenes: int, image_size: int, max_objects: int, seed: int, num_objects: int | None
) -> None:
    if split not in TABLETOP_SPLITS:
        raise ValueError(f"The tabletop scenes have the splits 'train', 'validation' and 'test', not {split!r}.")
    if num_scenes < 1:
        raise ValueError(f"num_scenes is {num_scenes}, but at least 1 scene is needed.")
    if image_size < 16:
        raise ValueError(f"image_size is {image_size}, but objects need scenes of at least 16 pixels a side.")
    if not 2 <= max_objects <= 4:
        raise ValueError(f"max_objects is {max_objects}, but scenes have room for 2 to 4 objects.")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but it must not be negative.")
    if num_objects is not None and not 1 <= num_objects <= max_objects:
        raise ValueError(f"num_objects is {num_objects}, but must be 1 to max_objects, {max_objects}, or None.")


def _features(image_size: int, max_objects: int, labelled: bool) -> datasets.Features:
    from datasets import Array2D, ClassLabel, Features, Image, List, Value

    shapes, materials = ClassLabel(names=list(SHAPE_NAMES)), ClassLabel(names=list(PHOTOGRAPH_NAMES))
    features = {
        "image": Image(),
        "mask": Array2D(shape=(image_size, image_size), dtype="uint8"),
        "ground": materials,
        "shape": List(shapes, length=max_objects),
        "material": List(materials, length=max_objects),
        "position": Array2D(shape=(max_objects, 2), dtype="float32"),
        "size": List(Value("float32"), length=max_objects),
        "rotation": List(Value("float32"), length=max_objects),
        "area": List(Value("int32"), length=max_objects),
    }
    return Features(features | {"label": materials} if labelled else features)


def _fingerprint(arguments: dict[str, Any]) -> str:
    """Names the cached scenes by all that they depend on: arguments, photographs, this code."""
    code = [Path(file).read_bytes() for file in (__file__, photo_mosaics.__file__, ray_tracing.__file__)]
    photographs = [importlib.metadata.version(package) for package in ("scikit-image", "scikit-learn")]
    return hashlib.sha256(repr((code, photographs, arguments)).encode()).hexdigest()[:16]


class _Scenes(NamedTuple):
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

    def select(self, index: slice) -> _Scenes:
        return _Scenes(*(field[index] for field in self))


class _Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """The columns of the data set, a batch of scenes at a time."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        # Read before workers start, so that they share them.
        _textures(arguments["split"]), _ground_textures(arguments["split"])

    def __len__(self) -> int:
        return -(-self.arguments["num_scenes"] // _BATCH_SIZE)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _batch_columns(index, **self.arguments)

    def in_processes(self) -> Iterable[dict[str, Any]]:
        """All batches in order, from as many processes as torch has threads, where processes can be forked."""
        workers = min(torch.get_num_threads(), len(self))
        if workers == 1 or sys.platform != "linux" or multiprocessing.current_process().daemon:
            return (self[index] for index in range(len(self)))
        return DataLoader(
            self, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch, multiprocessing_context="fork"
        )


def _batch_columns(
    index: int,
    split: str,
    num_scenes: int,
    image_size: int,
    max_objects: int,
    seed: int,
    num_objects: int | None,
) -> dict[str, Any]:
    key = [seed, TABLETOP_SPLITS.index(split), max_objects, num_objects or 0, index]
    scenes = _draw_scenes(np.random.default_rng(key), split, max_objects, num_objects)
    scenes = scenes.select(slice(0, num_scenes - index * _BATCH_SIZE))
    with _one_thread():
        # In parts that fit into a processor's cache.
        starts = range(0, len(scenes.exists), _RENDERED_AT_ONCE)
        parts = [_render(scenes.select(slice(i, i + _RENDERED_AT_ONCE)), split, image_size) for i in starts]
    images, masks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _to_columns(scenes, images, masks, labelled=num_objects == 1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The operations of a renderer are many and small: threads would mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _draw_scenes(rng: np.random.Generator, split: str, max_objects: int, num_objects: int | None) -> _Scenes:
    counts = _textures(split)[1].numpy()
    first_block = np.cumsum(counts) - counts
    n, m = _BATCH_SIZE, max_objects

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, shape).astype(np.float32)

    count = rng.integers(2, m, size=n, endpoint=True) if num_objects is None else np.full(n, num_objects)
    exists = np.arange(m) < count[:, None]
    shape = rng.integers(len(SHAPE_NAMES), size=(n, m))
    material = rng.integers(len(PHOTOGRAPH_NAMES), size=(n, m))
    ground = rng.integers(len(PHOTOGRAPH_NAMES), size=n)
    size = uniform(*(_SINGLE_SIZES if num_objects == 1 else _SIZES), n, m)
    rotation = uniform(0, 2 * math.pi, n, m)
    return _Scenes(
        exists=exists,
        shape=shape,
        material=material,
        block=first_block[material] + rng.integers(counts[material]),
        position=_draw_positions(rng, exists, shape, size, rotation),
        size=size,
        rotation=rotation,
        texture=np.stack([uniform(0.5, 0.9, n, m), uniform(0, 2, n, m), uniform(0, 2, n, m)], axis=-1),
        ground=ground,
        ground_block=first_block[ground] + rng.integers(counts[ground]),
        ground_texture=np.stack(
            [uniform(0.6, 1.1, n), uniform(0, 2, n), uniform(0, 2, n), uniform(0, 2 * math.pi, n)], axis=-1
        ),
        light=uniform(*_LIGHT_AZIMUTHS, n),
    )


def _radius(shape: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Radius of the unit solid, which is half the object's height."""
    return np.array([_RADII[name] for name in SHAPE_NAMES], dtype=np.float32)[shape] * size


def _extents(shape: np.ndarray, size: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far an object reaches in the image: sideways, up and down from its center."""
    radius = _radius(shape, size)
    name = np.array(SHAPE_NAMES)[shape]
    turned = np.where(name == "cube", np.abs(np.cos(rotation)) + np.abs(np.sin(rotation)), 1).astype(np.float32)
    across = radius * turned
    down = np.where(name == "sphere", radius, across * _SIN + radius * _COS).astype(np.float32)
    up = np.where(name == "cone", radius * _COS, down).astype(np.float32)
    return across, up, down


def _draw_positions(
    rng: np.random.Generator, exists: np.ndarray, shape: np.ndarray, size: np.ndarray, rotation: np.ndarray
) -> np.ndarray:
    """Places objects on the ground, (n, m, 2) float32: whole in the image, apart, and no center hidden.

    One object after the other takes the first of some random places that fits. A scene without any begins again.
    """
    across, up, down = _extents(shape, size, rotation)
    radius = _radius(shape, size)
    footprint = np.where(shape == SHAPE_NAMES.index("cube"), math.sqrt(2) * radius, radius)
    lowest = np.stack([_MARGIN + across, _MARGIN + up], axis=-1)
    highest = 1 - np.stack([_MARGIN + across, _MARGIN + down], axis=-1)
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
        apart = distance >= footprint[own][:, None, None] + footprint[pending, None] + _GAP
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


def _to_ground(image: np.ndarray, height: np.ndarray) -> np.ndarray:
    """From (x, y) in the image to the place (x, y) on the ground of a center at that height."""
    return np.stack([image[..., 0] - 0.5, (0.5 - image[..., 1] - height * _COS) / _SIN], axis=-1)


def _to_image(ground: np.ndarray, height: np.ndarray) -> np.ndarray:
    """The inverse of `_to_ground`."""
    return np.stack([0.5 + ground[..., 0], 0.5 - ground[..., 1] * _SIN - height * _COS], axis=-1)


@functools.cache
def _textures(split: str) -> tuple[Tensor, Tensor]:
    """Blocks of a split below each other, (1, 3, blocks * 112, 112) float32 in [0, 1], linear in light; number of
    blocks of each photograph, (19,) int64."""
    blocks, counts = photograph_blocks(split, TABLETOP_SPLITS)
    textures = torch.from_numpy(blocks).flatten(0, 1).permute(2, 0, 1)[None].float().div(255)
    # Squares stand for the sRGB curve: their inverse, a root, is rounded alike everywhere.
    textures = _BLACK + (1 - _BLACK) * textures.square()
    return textures.contiguous(memory_format=torch.channels_last), torch.from_numpy(counts)


@functools.cache
def _ground_textures(split: str) -> Tensor:
    """The blocks at half the resolution, (blocks, 3, 56, 56)."""
    textures, counts = _textures(split)
    return (
        F.avg_pool2d(textures, 2).view(3, int(counts.sum()), -1, textures.shape[-1] // 2).transpose(0, 1).contiguous()
    )


class _Objects(NamedTuple):
    """Objects of a batch of scenes, one after the other."""

    scene: Tensor  # (k,)
    slot: Tensor  # (k,)
    shape: Tensor  # (k,)
    block: Tensor  # (k,)
    center: Tensor  # (3, k)
    radius: Tensor  # (k,): how many times larger than the unit solid
    rotation: Tensor  # (k,)
    texture: Tensor  # (3, k)
    light: Tensor  # (3, k)

    def select(self, index: Tensor) -> _Objects:
        return _Objects(*(field.index_select(-1, index) for field in self))

    def to_own_frame(self, vector: Tensor) -> Tensor:
        """Turns vectors (3, ..., k) into the frame of their object."""
        cosine, sine = self.rotation.cos(), self.rotation.sin()
        x, y, z = vector
        return torch.stack(torch.broadcast_tensors(x * cosine + y * sine, y * cosine - x * sine, z))


def _gather_objects(scenes: _Scenes) -> _Objects:
    scene, slot = scenes.exists.nonzero()
    radius = _radius(scenes.shape, scenes.size)[scene, slot]
    x, y = scenes.position[scene, slot].T
    azimuth = scenes.light[scene]
    horizontal, vertical = math.cos(_LIGHT_ELEVATION), math.sin(_LIGHT_ELEVATION)
    fields = (
        scene,
        slot,
        scenes.shape[scene, slot],
        scenes.block[scene, slot],
        np.stack([x, y, radius]),
        radius,
        scenes.rotation[scene, slot],
        scenes.texture[scene, slot].T,
        np.stack([horizontal * np.cos(azimuth), horizontal * np.sin(azimuth), np.full_like(azimuth, vertical)]),
    )
    return _Objects(*(torch.from_numpy(np.ascontiguousarray(field)) for field in fields))


class _Pixels(NamedTuple):
    """Pixels in boxes of objects, one box after the other."""

    object: Tensor  # (p,): index of the object
    key: Tensor  # (p,): scene, row and column in one number
    column: Tensor  # (p,)
    row: Tensor  # (p,)

    def select(self, index: Tensor) -> _Pixels:
        return _Pixels(*(field.index_select(0, index) for field in self))


def _pixels_in_boxes(
    objects: _Objects, left: Tensor, right: Tensor, top: Tensor, bottom: Tensor, size: int
) -> _Pixels:
    """All pixels of boxes (k,) in image coordinates, clipped to the image."""
    left, top = ((edge * size).floor().long().clamp(0, size) for edge in (left, top))
    right, bottom = ((edge * size).ceil().long().clamp(0, size) for edge in (right, bottom))
    width = right - left
    counts = width * (bottom - top)
    index = torch.repeat_interleave(counts)
    offset = torch.arange(len(index)) - (counts.cumsum(0) - counts).index_select(0, index)
    width = width.index_select(0, index)
    down = offset // width
    row, column = top.index_select(0, index) + down, left.index_select(0, index) + offset - down * width
    return _Pixels(index, (objects.scene.index_select(0, index) * size + row) * size + column, column, row)


def _ray_origins(objects: _Objects, pixels: _Pixels, size: int, above: tuple[float, float, float]) -> Tensor:
    """Where the rays of pixels begin, (3, rays, p), in the frames of the unit solids. They lie on the plane through
    the image's center that is spanned by the direction to the right and the one above."""
    ray = torch.arange(_NUM_RAYS)[:, None]
    u = (pixels.column + (ray % _GRID + 0.5) / _GRID) / size - 0.5
    v = 0.5 - (pixels.row + (ray // _GRID + 0.5) / _GRID) / size
    right = objects.to_own_frame(torch.tensor([[1.0], [0.0], [0.0]])) / objects.radius
    up = objects.to_own_frame(torch.tensor(above)[:, None]) / objects.radius
    center = objects.to_own_frame(objects.center) / objects.radius
    right, up, center = (field.index_select(1, pixels.object)[:, None] for field in (right, up, center))
    return right * u + up * v - center


def _render(scenes: _Scenes, split: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, S, S, 3) and masks (n, S, S), uint8."""
    num_scenes = len(scenes.exists)
    num_pixels = num_scenes * image_size * image_size
    objects = _gather_objects(scenes)
    groups = [objects.select((objects.shape == i).nonzero()[:, 0]) for i in range(len(SHAPE_NAMES))]
    traced = [_trace(name, group, image_size) for name, group in zip(SHAPE_NAMES, groups, strict=True)]
    nearest = torch.full((_NUM_RAYS, num_pixels), torch.inf)
    for pixels, depth in traced:
        nearest.scatter_reduce_(1, pixels.key.expand_as(depth), depth, "amin")

    free = (nearest == torch.inf).sum(0)  # rays that meet the ground
    shadow = _shadows(groups, free, image_size)
    colors = _ground(scenes, shadow, split, image_size) * (free / _NUM_RAYS)
    mask = torch.zeros(num_pixels, dtype=torch.uint8)
    for name, group, (pixels, depth) in zip(SHAPE_NAMES, groups, traced, strict=True):
        visible = depth.isfinite() & (depth <= nearest.index_select(1, pixels.key))
        seen = visible.any(0).nonzero()[:, 0]
        pixels, depth, visible = pixels.select(seen), depth.index_select(1, seen), visible.index_select(1, seen)
        for channel, color in zip(colors, _shade(name, group, pixels, depth, visible, split, image_size), strict=True):
            channel.index_add_(0, pixels.key, color)
        center = visible[_CENTER_RAY]
        mask[pixels.key[center]] = (group.slot[pixels.object[center]] + 1).to(torch.uint8)
    images = colors.clamp(0, 1).sqrt().mul(255).round().byte()
    images = images.view(3, num_scenes, image_size, image_size).permute(1, 2, 3, 0).contiguous()
    return images.numpy(), mask.view(num_scenes, image_size, image_size).numpy()


def _trace(name: str, objects: _Objects, image_size: int) -> tuple[_Pixels, Tensor]:
    """Rays of the camera to objects of one shape: pixels in the objects' boxes, and the depth at which each of their
    rays enters, (rays, p), infinite where it misses."""
    x, y, z = objects.center
    middle_x, middle_y = 0.5 + x, 0.5 - y * _SIN - z * _COS
    size = objects.radius / _RADII[name]
    extents = _extents(objects.shape.numpy(), size.numpy(), objects.rotation.numpy())
    across, up, down = (torch.from_numpy(extent) for extent in extents)
    pixels = _pixels_in_boxes(
        objects, middle_x - across, middle_x + across, middle_y - up, middle_y + down, image_size
    )
    origin, direction = _camera_rays(objects, pixels, image_size)
    return pixels, ray_entry(name, origin, direction[:, None]) * objects.radius.index_select(0, pixels.object)


def _camera_rays(objects: _Objects, pixels: _Pixels, image_size: int) -> tuple[Tensor, Tensor]:
    """Origins (3, rays, p) and directions (3, p) in the frames of the unit solids."""
    direction = objects.to_own_frame(torch.tensor([[0.0], [_COS], [-_SIN]])).index_select(1, pixels.object)
    return _ray_origins(objects, pixels, image_size, above=(0.0, _SIN, _COS)), direction


def _shade(
    name: str, objects: _Objects, pixels: _Pixels, depth: Tensor, visible: Tensor, split: str, image_size: int
) -> Tensor:
    """What visible rays of one shape add to the colors of their pixels, (3, p)."""
    origin, direction = _camera_rays(objects, pixels, image_size)
    light = objects.to_own_frame(objects.light).index_select(1, pixels.object)
    objects = objects.select(pixels.object)
    # Other rays meet some place as well: their brightness is 0.
    distance = torch.where(visible, depth / objects.radius, 0)
    point = (origin + distance * direction[:, None]).clamp(-1, 1)
    normal = surface_normal(name, point)
    sun = (normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]).clamp_min(0)
    height = 0.5 + 0.5 * point[2]
    sky = (0.6 + 0.4 * normal[2]) * (0.55 + 0.45 * height * (2 - height))
    brightness = torch.where(visible, _SUN * sun + _SKY * sky, 0) / _NUM_RAYS

    u, v = texture_coordinates(name, point, direction, objects.rotation)
    length, start_u, start_v = objects.texture
    scale = objects.radius / length
    textures, _ = _textures(split)
    rows, columns = textures.shape[2:]
    row = objects.block * columns + _mirror(v * scale + start_v) * (columns - 1)
    column = _mirror(u * scale + start_u) * (columns - 1)
    # grid_sample's coordinates run from -1 to 1 over the outer edges of all blocks.
    grid = torch.stack([(2 * column + 1) / columns - 1, (2 * row + 1) / rows - 1], dim=-1)
    albedo = F.grid_sample(textures.expand(_NUM_RAYS, -1, -1, -1), grid[:, None], align_corners=False)
    return (albedo[:, :, 0] * brightness[:, None]).sum(0)


def _mirror(x: Tensor) -> Tensor:
    """Folds the line into [0, 1], to and fro."""
    return 1 - (x - 2 * (x / 2).floor() - 1).abs()


def _ground(scenes: _Scenes, shadow: Tensor, split: str, image_size: int) -> Tensor:
    """Colors of the ground, linear in light: (3, pixels)."""
    brightness = _SUN * math.sin(_LIGHT_ELEVATION) * (1 - shadow) + _SKY * _visible_sky(scenes, image_size)
    # Two samples to each pixel's height: the ground is foreshortened.
    u = (torch.arange(image_size) + 0.5) / image_size - 0.5
    v = (0.5 - (torch.arange(2 * image_size) + 0.5) / (2 * image_size))[:, None] / _SIN
    length, start_u, start_v, angle = torch.from_numpy(scenes.ground_texture).T[..., None, None]
    cosine, sine = angle.cos() / length, angle.sin() / length
    grid = torch.stack([u * cosine - v * sine + start_u, -(u * sine + v * cosine + start_v)], dim=-1)
    blocks = _ground_textures(split).index_select(0, torch.from_numpy(scenes.ground_block))
    # Blocks are mirrored beyond their edges. grid_sample's coordinates run from -1 to 1 over one of them.
    albedo = F.grid_sample(blocks, 2 * grid - 1, padding_mode="reflection", align_corners=False)
    albedo = (albedo[:, :, ::2] + albedo[:, :, 1::2]) / 2
    return albedo.transpose(0, 1).reshape(3, -1) * brightness


def _shadows(groups: list[_Objects], free: Tensor, image_size: int) -> Tensor:
    """Share of the light that objects keep from each pixel of the ground: (pixels,) in [0, 1].

    Each of a pixel's rays looks at another part of the light, so that shadows are sharp at an object's foot and grow
    softer with height.
    """
    blocked = torch.zeros(_NUM_RAYS, len(free), dtype=torch.bool)
    for name, objects in zip(SHAPE_NAMES, groups, strict=True):
        pixels = _shadow_pixels(objects, image_size)
        pixels = pixels.select(free.index_select(0, pixels.key).nonzero()[:, 0])
        origin = _ray_origins(objects, pixels, image_size, above=(0.0, 1 / _SIN, 0.0))
        directions = objects.to_own_frame(_light_directions(objects.light)).index_select(2, pixels.object)
        ray, pixel = (ray_entry(name, origin, directions) < torch.inf).nonzero(as_tuple=True)
        blocked[ray, pixels.key.index_select(0, pixel)] = True
    return blocked.sum(0) / _NUM_RAYS


def _light_directions(light: Tensor) -> Tensor:
    """Directions (3, rays, k) to a square grid of points of the light around its center (3, k)."""
    x, y, z = light
    horizontal = (x * x + y * y).sqrt()
    side = torch.stack([-y / horizontal, x / horizontal, torch.zeros_like(z)])
    rise = torch.stack([-x * z / horizontal, -y * z / horizontal, horizontal])
    # In another order than the pixel's grid, so that place in the pixel and place in the light are unrelated.
    ray = torch.arange(_NUM_RAYS) * 4 % _NUM_RAYS
    a, b = ((index - (_GRID - 1) / 2) * (2 / _GRID * _LIGHT_RADIUS) for index in (ray % _GRID, ray // _GRID))
    direction = light[:, None] + a[:, None] * side[:, None] + b[:, None] * rise[:, None]
    length = (direction[0] * direction[0] + direction[1] * direction[1] + direction[2] * direction[2]).sqrt()
    return direction / length


def _shadow_pixels(objects: _Objects, image_size: int) -> _Pixels:
    """Pixels of the boxes around footprints and the shadows of tops."""
    x, y, _ = objects.center
    cube = objects.shape == SHAPE_NAMES.index("cube")
    reach = torch.where(cube, math.sqrt(2) * objects.radius, objects.radius)
    length = 2 * objects.radius / math.tan(_LIGHT_ELEVATION) / math.cos(_LIGHT_ELEVATION)
    shadow_x, shadow_y = x - objects.light[0] * length, y - objects.light[1] * length
    soft = 4 * _LIGHT_RADIUS * objects.radius
    return _pixels_in_boxes(
        objects,
        0.5 + torch.minimum(x - reach, shadow_x - reach - soft),
        0.5 + torch.maximum(x + reach, shadow_x + reach + soft),
        0.5 - torch.maximum(y + reach, shadow_y + reach + soft) * _SIN,
        0.5 - torch.minimum(y - reach, shadow_y - reach - soft) * _SIN,
        image_size,
    )


def _visible_sky(scenes: _Scenes, image_size: int) -> Tensor:
    """Share of the sky that each pixel of the ground sees: (pixels,) in [0, 1].

    Objects count as balls of their volume: a ball of radius r at distance d hides (r / d)^2 of a sky that is weighted
    by the cosine, times the cosine of its own direction, r / d.
    """
    center = (torch.arange(image_size) + 0.5) / image_size - 0.5
    x, y = center, -center[:, None] / _SIN
    sky = torch.ones(len(scenes.exists), image_size, image_size)
    for slot in range(scenes.exists.shape[1]):
        radius, place_x, place_y = (
            torch.from_numpy(field)[:, None, None]
            for field in (scenes.size[:, slot] / 2 * scenes.exists[:, slot], *scenes.position[:, slot].T)
        )
        dx, dy = x - place_x, y - place_y
        square = dx * dx + dy * dy + radius * radius
        sky = sky * (1 - radius * radius * radius / (square * square.sqrt()).clamp_min(1e-6))
    return sky.flatten()


def _to_columns(scenes: _Scenes, images: np.ndarray, masks: np.ndarray, labelled: bool) -> dict[str, Any]:
    exists = scenes.exists
    position = _to_image(scenes.position, _radius(scenes.shape, scenes.size))
    area = np.stack([(masks == slot + 1).sum((1, 2)) for slot in range(exists.shape[1])], axis=1)
    columns = {
        "image": [{"bytes": _encode(image), "path": None} for image in images],
        "mask": masks,
        "ground": scenes.ground,
        "shape": np.where(exists, scenes.shape, -1),
        "material": np.where(exists, scenes.material, -1),
        "position": np.where(exists[..., None], position, -1).astype(np.float32),
        "size": np.where(exists, scenes.size, -1),
        "rotation": np.where(exists, scenes.rotation, -1),
        "area": np.where(exists, area, -1),
    }
    return columns | {"label": scenes.material[:, 0]} if labelled else columns


def _encode(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return file.getvalue()
