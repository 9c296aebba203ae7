# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Photo mosaics: small scenes with known regions, made of photographs that are installed with scikit-image and
scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import datasets

_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cell": ("skimage", "data/cell.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "text": ("skimage", "data/text.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
PHOTOGRAPH_NAMES: tuple[str, ...] = tuple(_FILES)

_SPLITS = ("train", "test")
_BLOCK_SIZE = 112
_MIN_CROP_SIZE = 48
# In shares of a photograph's short side: 112 of 512 pixels, with at least 16 of 512 between neighbours.
_BLOCK_SHARE = 112 / 512
_GAP_SHARE = 16 / 512
_SHAPE_AREA = (0.12, 0.4)
_MIN_REGION_AREA = 0.08
_MIN_SHAPE_INSIDE = 0.85
# Scenes are drawn in batches of this size, each with its own generator: scene i is the same whatever `num_scenes` is.
_BATCH_SIZE = 256


class BlockBox(NamedTuple):
    """A square of pixels of one photograph, in the photograph's own pixels."""

    top: int
    left: int
    size: int


def photograph(name: str) -> Image.Image:
    """Reads one of the photographs of `PHOTOGRAPH_NAMES` from the installed packages.

    Raises:
        ImportError: If scikit-image or scikit-learn is not installed.
    """
    package, file = _FILES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The embedded scenes are made of photographs of scikit-image and scikit-learn, but {package!r} is not "
            "installed: pip install scikit-image scikit-learn"
        )
    with Image.open(Path(spec.submodule_search_locations[0], file)) as image:
        return image.convert("RGB")


def block_boxes(split: str, width: int, height: int, splits: tuple[str, ...] = _SPLITS) -> list[BlockBox]:
    """The blocks of a split in a photograph: one colour of a checkerboard with gaps between its squares.

    Args:
        split: One of the splits.
        width: Width of the photograph in pixels.
        height: Height of the photograph in pixels.
        splits: All splits, each of which is a colour of the board. Those of the photo mosaics by default.

    Returns:
        Boxes, row by row. Blocks of two splits share no pixel and lie at least 1/32 of the short side apart.
    """
    short_side = min(width, height)
    size, gap = round(short_side * _BLOCK_SHARE), round(short_side * _GAP_SHARE)

    def starts(length: int) -> list[int]:
        count = (length + gap) // (size + gap)
        return [i * (length - size) // (count - 1) for i in range(count)]

    color = splits.index(split)
    return [
        BlockBox(top, left, size)
        for row, top in enumerate(starts(height))
        for column, left in enumerate(starts(width))
        if (row + column) % len(splits) == color
    ]


def photograph_blocks(split: str, splits: tuple[str, ...] = _SPLITS) -> tuple[np.ndarray, np.ndarray]:
    """All blocks of a split, each cut out *before* it is resized: (blocks, 112, 112, 3) uint8, photograph by
    photograph; number of blocks of each photograph, (19,) int64."""
    blocks, counts = [], []
    for name in PHOTOGRAPH_NAMES:
        image = photograph(name)
        boxes = block_boxes(split, *image.size, splits)
        counts.append(len(boxes))
        for top, left, size in boxes:
            block = image.crop((left, top, left + size, top + size))
            blocks.append(np.asarray(block.resize((_BLOCK_SIZE, _BLOCK_SIZE), Image.Resampling.BICUBIC)))
    return np.stack(blocks), np.array(counts)


@functools.cache
def _load_blocks(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks as (block, row, channel, column) float32 in [0, 255]; number of blocks of each photograph."""
    blocks, counts = photograph_blocks(split)
    return blocks.transpose(0, 1, 3, 2).astype(np.float32, order="C"), counts


def load_photo_mosaics(
    split: str, num_scenes: int = 20000, image_size: int = 32, num_regions: int = 2, seed: int = 0
) -> datasets.Dataset:
    """Makes scenes of real photographs whose regions are known.

    A scene is a random square crop of one photograph with `num_regions - 1` smooth shapes (superellipses) that show
    crops of other photographs. The two splits use disjoint blocks of every photograph: no pixel of the test split is
    seen in training, yet every part of a photograph is represented in both. The result is a function of the arguments
    alone; scene i does not depend on `num_scenes`.

    Args:
        split: "train" or "test".
        num_scenes: Number of scenes.
        image_size: Height and width of a scene in pixels, at least 8.
        num_regions: Regions of a scene, 1 to 4. With one region a scene is a plain crop.
        seed: Seed of all random draws, not negative.

    Returns:
        A dataset with the columns `image` (PIL, RGB), `label` (class of the foreground, region 1; of the only region
        if there is one), `labels` (classes of all regions in the order of their ids, background first) and `mask`
        (image_size x image_size uint8 region ids, 0 is the background). Each region covers at least 8 % of its scene.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: If scikit-image or scikit-learn is not installed.
    """
    _check_arguments(split, num_scenes, image_size, num_regions, seed)
    images: list[bytes] = []
    labels, masks = [], []
    for first in range(0, num_scenes, _BATCH_SIZE):
        rng = np.random.default_rng([seed, _SPLITS.index(split), num_regions, first // _BATCH_SIZE])
        count = min(_BATCH_SIZE, num_scenes - first)
        batch_images, batch_labels, batch_masks = _draw_scenes(rng, split, image_size, num_regions, count)
        images.extend(_encode(image) for image in batch_images)
        labels.append(batch_labels)
        masks.append(batch_masks)
    return _to_dataset(images, np.concatenate(labels), np.concatenate(masks), split)


def _check_arguments(split: str, num_scenes: int, image_size: int, num_regions: int, seed: int) -> None:
    if split not in _SPLITS:
        raise ValueError(f"The photo mosaics have the splits 'train' and 'test', not {split!r}.")
    if num_scenes < 1:
        raise ValueError(f"num_scenes is {num_scenes}, but at least 1 scene is needed.")
    if image_size < 8:
        raise ValueError(f"image_size is {image_size}, but regions need scenes of at least 8 pixels a side.")
    if not 1 <= num_regions <= 4:
        raise ValueError(f"num_regions is {num_regions}, but a scene has 1 to 4 regions.")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but it must not be negative.")


def _draw_scenes(
    rng: np.random.Generator, split: str, image_size: int, num_regions: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a whole batch and renders its first `count` scenes: images (count, S, S, 3), labels, masks."""
    labels = rng.random((_BATCH_SIZE, len(PHOTOGRAPH_NAMES))).argsort(-1)[:, :num_regions]
    _, counts = _load_blocks(split)
    first_block = np.cumsum(counts) - counts
    block = first_block[labels] + rng.integers(counts[labels])
    size = rng.integers(_MIN_CROP_SIZE, _BLOCK_SIZE, size=labels.shape, endpoint=True)
    top = rng.integers(_BLOCK_SIZE - size, endpoint=True)
    left = rng.integers(_BLOCK_SIZE - size, endpoint=True)
    flip = rng.random(labels.shape) < 0.5
    masks = _draw_masks(rng, image_size, num_regions)[:count]

    images = np.zeros((count, image_size, image_size, 3), dtype=np.uint8)
    for region in range(num_regions):
        choice = np.s_[:count, region]
        crops = _render_crops(split, block[choice], top[choice], left[choice], size[choice], flip[choice], image_size)
        np.copyto(images, crops, where=(masks == region)[..., None])
    return images, labels[:count], masks


def _render_crops(
    split: str,
    block: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    size: np.ndarray,
    flip: np.ndarray,
    image_size: int,
) -> np.ndarray:
    """Cuts and resizes one crop per entry: (entries, S, S, 3) uint8."""
    import torch

    from .resampling import resampling_weights

    def weights(start: np.ndarray) -> torch.Tensor:
        matrices = resampling_weights(torch.from_numpy(start), torch.from_numpy(size), _BLOCK_SIZE, image_size)
        # Whole 1/4096 times bytes: float32 holds all sums exactly, so pixels are the same on any processor.
        return matrices.mul_(4096).round_().div_(4096)

    blocks, _ = _load_blocks(split)
    pixels = torch.from_numpy(blocks[block]).flatten(2)
    rows = torch.bmm(weights(top), pixels).round_().view(len(block), image_size * 3, _BLOCK_SIZE)
    crops = torch.bmm(rows, weights(left).transpose(1, 2)).round_().clamp_(0, 255).byte()
    images = crops.view(len(block), image_size, 3, image_size).permute(0, 1, 3, 2).numpy()
    return np.where(flip[:, None, None, None], images[:, :, ::-1], images)


def _draw_masks(rng: np.random.Generator, image_size: int, num_regions: int) -> np.ndarray:
    """Region ids of a whole batch, (batch, S, S) uint8; scenes that lack a large enough region are drawn again."""
    masks = np.zeros((_BATCH_SIZE, image_size, image_size), dtype=np.uint8)
    pending = np.arange(_BATCH_SIZE) if num_regions > 1 else np.arange(0)
    while len(pending):
        drawn = np.zeros((len(pending), image_size, image_size), dtype=np.uint8)
        accepted = np.ones(len(pending), dtype=bool)
        for region in range(1, num_regions):
            shape, mostly_inside = _draw_superellipses(rng, len(pending), image_size)
            drawn[shape] = region
            accepted &= mostly_inside
        for region in range(num_regions):
            accepted &= (drawn == region).mean((1, 2)) >= _MIN_REGION_AREA
        masks[pending[accepted]] = drawn[accepted]
        pending = pending[~accepted]
    return masks


def _draw_superellipses(rng: np.random.Generator, count: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rotated superellipses: (count, S, S) bool, and whether each lies mostly inside of the scene, (count,)."""
    from scipy.special import gamma

    exponent, aspect, angle, area, x, y = rng.random((6, count, 1, 1), dtype=np.float32)
    exponent = 2 + 2 * exponent
    aspect = 2 ** (1.4 * aspect - 0.7)
    angle = np.pi * angle
    area = _SHAPE_AREA[0] + (_SHAPE_AREA[1] - _SHAPE_AREA[0]) * area
    unit_area = 4 * gamma(1 + 1 / exponent) ** 2 / gamma(1 + 2 / exponent)
    half_height = np.sqrt(area / aspect / unit_area)
    half_width = aspect * half_height

    center = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    dx, dy = center[None, None, :] - (0.15 + 0.7 * x), center[None, :, None] - (0.15 + 0.7 * y)
    u = np.abs(np.cos(angle) * dx + np.sin(angle) * dy) / half_width
    v = np.abs(np.cos(angle) * dy - np.sin(angle) * dx) / half_height
    shapes = u**exponent + v**exponent <= 1
    inside = shapes.mean((1, 2))
    return shapes, (inside >= _MIN_SHAPE_INSIDE * area[:, 0, 0]) & (inside >= _SHAPE_AREA[0])


def _encode(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _to_dataset(images: list[bytes], labels: np.ndarray, masks: np.ndarray, split: str) -> datasets.Dataset:
    import datasets

    classes = datasets.ClassLabel(names=list(PHOTOGRAPH_NAMES))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": classes,
            "labels": datasets.List(classes),
            "mask": datasets.Array2D(shape=masks.shape[1:], dtype="uint8"),
        }
    )
    columns = {
        "image": [{"bytes": image, "path": None} for image in images],
        "label": labels[:, min(1, labels.shape[1] - 1)],
        "labels": labels,
        "mask": masks,
    }
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
