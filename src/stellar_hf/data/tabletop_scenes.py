# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Tabletop scenes: solids of known shape, material and place on a plane, ray traced, with nothing to download.

The idea, solids whose textures do not give them away, is CLEVRTex's (Karazija et al. 2021).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import multiprocessing
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import photo_mosaics, ray_tracing, tabletop_layout, tabletop_rendering
from .photo_mosaics import PHOTOGRAPH_NAMES
from .ray_tracing import SHAPE_NAMES
from .tabletop_layout import Scenes, draw_scenes, radius_of, to_image
from .tabletop_rendering import TABLETOP_SPLITS, load_textures, render

if TYPE_CHECKING:
    import datasets

# Scenes are drawn in batches of this size, each with its own generator: scene i is the same whatever `num_scenes` is.
_BATCH_SIZE = 256


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
    check_arguments(split, num_scenes, image_size, max_objects, seed, num_objects)
    import datasets

    arguments = {
        "split": split,
        "num_scenes": num_scenes,
        "image_size": image_size,
        "max_objects": max_objects,
        "seed": seed,
        "num_objects": num_objects,
    }
    features = scene_features(image_size, max_objects, labelled=num_objects == 1)
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


def check_arguments(
    split: str, num_scenes: int, image_size: int, max_objects: int, seed: int, num_objects: int | None
) -> None:
    """Raises ValueError if an argument of [`load_tabletop_scenes`] is out of its range."""
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


def scene_features(image_size: int, max_objects: int, labelled: bool) -> datasets.Features:
    """Types of the columns; with `label` if the scenes are labelled."""
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
    modules = (photo_mosaics, ray_tracing, tabletop_layout, tabletop_rendering)
    code = [Path(file).read_bytes() for file in (__file__, *(str(module.__file__) for module in modules))]
    photographs = [importlib.metadata.version(package) for package in ("scikit-image", "scikit-learn")]
    return hashlib.sha256(repr((code, photographs, arguments)).encode()).hexdigest()[:16]


class _Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """The columns of the data set, a batch of scenes at a time."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        load_textures(arguments["split"])  # before workers start, so that they share them

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
    num_blocks = load_textures(split)
    scenes = draw_scenes(np.random.default_rng(key), _BATCH_SIZE, num_blocks, max_objects, num_objects)
    scenes = scenes.select(slice(0, num_scenes - index * _BATCH_SIZE))
    return scene_columns(scenes, split, image_size, labelled=num_objects == 1)


def scene_columns(scenes: Scenes, split: str, image_size: int, labelled: bool) -> dict[str, Any]:
    """Renders scenes; their columns, as [`load_tabletop_scenes`] gives them."""
    images, masks = render(scenes, split, image_size)
    exists = scenes.exists
    position = to_image(scenes.position, radius_of(scenes.shape, scenes.size))
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
