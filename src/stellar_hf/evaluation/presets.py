# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The data of an evaluation: the paper's data sets by name, images of one's own, and the embedded tabletop scenes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import PHOTOGRAPH_NAMES, load_images, load_tabletop_scenes
from ..data.ray_tracing import SHAPE_NAMES
from ..features.fingerprints import data_fingerprint
from ..image_processing_pil_stellar import StellarImageProcessorPil
from .protocol import hub_revision

if TYPE_CHECKING:
    import datasets

IGNORED = 255
_CLASSIFICATION_TASKS = ("knn", "linear", "retrieval", "reconstruction")
_SEGMENTATION_TASKS = ("segmentation", "reconstruction")
_SINGLE_OBJECT_TASKS = ("knn", "linear", "retrieval")
_SCENE_TASKS = ("segmentation", "reconstruction", "objects", "disentanglement")

# The paper evaluates after short side 256, centre crop 224; other crops keep the ratio.
_SHORT_SIDE_OF_CROP = 256 / 224


@dataclass(frozen=True)
class Preset:
    """A data set of the paper as it is on the Hub.

    Attributes:
        title: As tables call it.
        dataset_id: On the Hub; None where it has no copy that can be loaded by name.
        train_split: Split of the neighbours and probes.
        test_split: Labelled split to measure on: the paper's validation set, where the test set has no labels.
        label_column: Class of each image; None if there is none.
        mask_column: Class of each pixel; None if there is none.
        read_mask: Makes (H, W) uint8 classes of a mask, 255 where there is none.
        num_classes: Number of classes.
        tasks: Tasks that it has the columns for.
        config: Of the data set, where it has several.
        revision: Branch of the data set, where its main one does not hold the images.
        image_column: Column of the images.
    """

    title: str
    dataset_id: str | None
    train_split: str
    test_split: str
    num_classes: int
    tasks: tuple[str, ...]
    label_column: str | None = None
    mask_column: str | None = None
    read_mask: Callable[[Any], np.ndarray] | None = None
    config: str | None = None
    revision: str | None = None
    image_column: str = "image"


@dataclass
class Splits:
    """Images to learn from, and images to measure on.

    Attributes:
        name: Of the data set, as tables call it.
        train: Neighbours, and training set of the probes: a `datasets.Dataset`; None if there is none.
        test: Images to measure on.
        source: Names of the folders or splits they come from, for the protocol.
        dataset_id: On the Hub; None if it is not there.
        image_column: Column of the images.
        label_column: Class of each image; None if there is none.
        mask_column: Object or class of each pixel; None if there is none.
        read_classes: Makes (H, W) uint8 classes of pixels of a row, 255 where there is none; None if there are none.
        num_classes: Number of classes of images or pixels; None if it is not known.
        object_columns: Columns of what is known of each object, lists with -1 where there is none; None if nothing is.
    """

    name: str
    train: datasets.Dataset | None
    test: datasets.Dataset
    source: Mapping[str, Any]
    dataset_id: str | None = None
    image_column: str = "image"
    label_column: str | None = None
    mask_column: str | None = None
    read_classes: Callable[[Mapping[str, Any]], np.ndarray] | None = None
    num_classes: int | None = None
    object_columns: tuple[str, ...] | None = None
    _protocol: dict[str, Any] | None = field(default=None, repr=False)

    def protocol(self) -> dict[str, Any]:
        """The data set, numbers of images and fingerprints, for the protocol of a result."""
        if self._protocol is None:
            parts = {"train": self.train, "test": self.test}
            self._protocol = {"data": self.name, **self.source}
            for name, part in parts.items():
                if part is not None:
                    self._protocol[f"{name}_images"] = len(part)
                    self._protocol[f"{name}_fingerprint"] = data_fingerprint(part, self.image_column)
            if self.dataset_id:
                self._protocol["dataset_id"] = self.dataset_id
            if self.dataset_id and (revision := hub_revision(self.test)):
                self._protocol["dataset_revision"] = revision
        return self._protocol


@dataclass
class EvaluationData:
    """What each task is measured on.

    Attributes:
        name: Of the data, as tables call it.
        splits: Data of each task that there are columns for, by its name.
        preset: Name of the preset, if it is one.
    """

    name: str
    splits: dict[str, Splits]
    preset: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.splits)


# Masks ---------------------------------------------------------------------------------------------------------------


def read_class_ids(mask: Any) -> np.ndarray:
    """(H, W) uint8 of a mask whose values are classes, 255 where there is none."""
    array = np.asarray(mask)
    if array.ndim == 3 and array.shape[2] in (3, 4) and (array[..., 1:3] == array[..., :1]).all():
        array = array[..., 0]  # gray, saved as colours
    if array.ndim != 2:
        raise ValueError(
            f"A mask has shape {array.shape}, but (height, width) is expected: the class of each pixel, not colours."
        )
    return array.astype(np.uint8)


def read_ade20k_mask(mask: Any) -> np.ndarray:
    """(H, W) uint8, 0 to 149, of the annotation of SceneParse150, where 0 is no class and 1 the first one."""
    return read_class_ids(mask) - np.uint8(1)  # 0 becomes 255


def read_voc_mask(mask: Any) -> np.ndarray:
    """(H, W) uint8, 0 to 20, of the annotation of PASCAL VOC, as numbers or in the colours of its palette."""
    array = np.asarray(mask)
    if array.ndim == 2:
        return array.astype(np.uint8)
    colours = array[..., :3].astype(np.int64) @ np.array([65536, 256, 1])
    classes = np.full(colours.shape, IGNORED, dtype=np.uint8)
    for number, colour in enumerate(voc_palette(21).astype(np.int64) @ np.array([65536, 256, 1])):
        classes[colours == colour] = number
    return classes


def voc_palette(num_colours: int) -> np.ndarray:
    """(num_colours, 3) uint8, the colours by which PASCAL VOC draws its classes: the bits of the number, by turns in
    red, green and blue from the highest bit down."""
    number = np.arange(num_colours)[:, None, None]
    channel, place = np.arange(3)[:, None], np.arange(8)
    bits = (number >> (3 * place + channel)) & 1  # (n, 3, 8)
    return (bits << (7 - place)).sum(-1).astype(np.uint8)


# Label ids of the 19 classes of Cityscapes that count, in the order of their train ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def read_cityscapes_mask(mask: Any) -> np.ndarray:
    """(H, W) uint8, 0 to 18, of the label ids of Cityscapes.

    Raises:
        ValueError: If a value is no label id.
    """
    ids = read_class_ids(mask)
    if (largest := int(np.where(ids == IGNORED, 0, ids).max())) > max(_CITYSCAPES_IDS):
        raise ValueError(f"A mask of Cityscapes has the value {largest}, but label ids from 0 to 33 are expected.")
    classes = np.full(256, IGNORED, dtype=np.uint8)
    classes[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
    return classes[ids]


PRESETS: dict[str, Preset] = {
    "imagenet-1k": Preset(
        "ImageNet-1k", "ILSVRC/imagenet-1k", "train", "validation", 1000, _CLASSIFICATION_TASKS, label_column="label"
    ),
    "food101": Preset(
        "Food-101", "ethz/food101", "train", "validation", 101, _CLASSIFICATION_TASKS, label_column="label"
    ),
    "oxford-iiit-pet": Preset(
        "Oxford-IIIT Pet", "timm/oxford-iiit-pet", "train", "test", 37, _CLASSIFICATION_TASKS, label_column="label"
    ),
    "places365": Preset("Places365", None, "train", "validation", 365, _CLASSIFICATION_TASKS, label_column="label"),
    "ade20k": Preset(
        "ADE20K",
        "zhoubolei/scene_parse_150",
        "train",
        "validation",
        150,
        _SEGMENTATION_TASKS,
        mask_column="annotation",
        read_mask=read_ade20k_mask,
        config="scene_parsing",
        revision="refs/convert/parquet",  # of the main branch, datasets 5 would have to run a script
    ),
    "voc2012": Preset(
        "PASCAL VOC 2012",
        "nateraw/pascal-voc-2012",
        "train",
        "val",
        21,
        _SEGMENTATION_TASKS,
        mask_column="mask",
        read_mask=read_voc_mask,
    ),
    "cityscapes": Preset(
        "Cityscapes",
        "Chris1/cityscapes",
        "train",
        "validation",
        19,
        _SEGMENTATION_TASKS,
        mask_column="semantic_segmentation",
        read_mask=read_cityscapes_mask,
    ),
}


# Data ----------------------------------------------------------------------------------------------------------------


def load_embedded_data(
    num_scenes: int = 300, split: str = "test", seed: int = 0, tasks: Sequence[str] | None = None
) -> EvaluationData:
    """Makes the embedded tabletop scenes: classification of the material on scenes of one object, everything else on
    scenes of two to four.

    Args:
        num_scenes: Scenes to measure on; twice as many of the split "train" are there to learn from.
        split: "test" for figures that are reported, "validation" for decisions.
        seed: Of the scenes.
        tasks: Names of the tasks to make scenes for, all by default.

    Returns:
        The data of these tasks.

    Raises:
        ValueError: If an argument is impossible.
        ImportError: If scikit-image or scikit-learn is missing.
    """

    def scenes(name: str, num_objects: int | None, **fields: Any) -> Splits:
        return Splits(
            name=name,
            test=load_tabletop_scenes(split, num_scenes, seed=seed, num_objects=num_objects),
            train=load_tabletop_scenes("train", 2 * num_scenes, seed=seed, num_objects=num_objects),
            source={"train_split": "train", "test_split": split},
            **fields,
        )

    wanted = _SINGLE_OBJECT_TASKS + _SCENE_TASKS if tasks is None else tasks
    splits: dict[str, Splits] = {}
    if single_tasks := [task for task in _SINGLE_OBJECT_TASKS if task in wanted]:
        single = scenes("tabletop scenes of one object", 1, label_column="label", num_classes=len(PHOTOGRAPH_NAMES))
        splits |= dict.fromkeys(single_tasks, single)
    if scene_tasks := [task for task in _SCENE_TASKS if task in wanted]:
        several = scenes(
            "tabletop scenes",
            None,
            mask_column="mask",
            read_classes=_shape_of_pixels,
            num_classes=1 + len(SHAPE_NAMES),
            object_columns=("shape", "material", "position", "area"),
        )
        splits |= dict.fromkeys(scene_tasks, several)
    return EvaluationData("The tabletop scenes", splits)


def _shape_of_pixels(row: Mapping[str, Any]) -> np.ndarray:
    """(H, W) uint8: 0 for the ground, and one more than the class of the shape that is seen at a pixel."""
    shapes = np.asarray([-1, *row["shape"]]) + 1
    return shapes[np.asarray(row["mask"])].astype(np.uint8)


def load_preset(
    name: str,
    dataset_name: str | None = None,
    train_dir: str | os.PathLike | None = None,
    test_dir: str | os.PathLike | None = None,
    max_train_images: int | None = None,
    max_test_images: int | None = None,
) -> EvaluationData:
    """Opens one of the paper's data sets.

    Args:
        name: One of `PRESETS`.
        dataset_name: In place of the preset's data set on the Hub, another copy with the same columns, there or in a
            folder.
        train_dir: In place of the training split, a folder: of images in a folder for each class, or of shards or a
            saved data set with the same columns.
        test_dir: The same of the images to measure on.
        max_train_images: Take at most so many, at equal distances.
        max_test_images: The same of the images to measure on.

    Returns:
        The data of the preset's tasks.

    Raises:
        ValueError: If there is no such preset, only one folder is given, a column is missing, or the Hub has no copy.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}, only {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    if (train_dir is None) != (test_dir is None):
        raise ValueError("Only one of train_dir and test_dir is given, but a preset needs both, or none of them.")
    if train_dir is not None and test_dir is not None:
        parts = [load_images(folder, image_column=preset.image_column) for folder in (train_dir, test_dir)]
        source = {"train": _base_name(train_dir), "test": _base_name(test_dir)}
        dataset_id = None
    else:
        dataset_id = dataset_name or preset.dataset_id
        if dataset_id is None:
            raise ValueError(
                f"{preset.title} has no copy on the Hub that this preset could name. Download it from its authors and "
                "give --train_dir and --test_dir, with the images of each class in a folder of their own, or "
                "--dataset_name, a copy with the columns image and label."
            )
        splits = (preset.train_split, preset.test_split)
        of_preset = dataset_id == preset.dataset_id
        parts = [_load(dataset_id, preset if of_preset else None, split, preset.image_column) for split in splits]
        source = {"train_split": splits[0], "test_split": splits[1]}
        dataset_id = None if os.path.exists(dataset_id) else dataset_id
    for part in parts:
        _require(part, preset.title, preset.image_column, preset.label_column, preset.mask_column)
    mask_column, read_mask = str(preset.mask_column), preset.read_mask
    whole = Splits(
        name=preset.title,
        train=_evenly(parts[0], max_train_images),
        test=_evenly(parts[1], max_test_images),
        source=source,
        dataset_id=dataset_id,
        image_column=preset.image_column,
        label_column=preset.label_column,
        mask_column=preset.mask_column,
        read_classes=None if read_mask is None else (lambda row: read_mask(row[mask_column])),
        num_classes=preset.num_classes,
    )
    return EvaluationData(preset.title, dict.fromkeys(preset.tasks, whole), preset=name)


def load_own_images(
    test: str | os.PathLike,
    train: str | os.PathLike | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
    mask_column: str = "mask",
    max_train_images: int | None = None,
    max_test_images: int | None = None,
) -> EvaluationData:
    """Opens images of any origin, as [`stellar_hf.data.load_images`] takes them.

    Args:
        test: Folder, shards or data set on the Hub to measure on.
        train: The same to find neighbours in and to train probes on; without it there is no kNN and no probe.
        train_split: Split of a data set that has several.
        test_split: The split to measure on.
        image_column: Column of the images.
        label_column: Column of the classes, if there is one.
        mask_column: Column of the masks, if there is one: for `segmentation` the class of each pixel, 255 where there
            is none, and for `objects` the object, 0 for the ground.
        max_train_images: Take at most so many, at equal distances.
        max_test_images: The same of the images to measure on.

    Returns:
        The data of the tasks that there are columns for.

    Raises:
        ValueError: If there are no images.
    """
    test_part = _evenly(load_images(test, test_split, image_column=image_column), max_test_images)
    train_part = None
    if train is not None:
        train_part = _evenly(load_images(train, train_split, image_column=image_column), max_train_images)
    source = {"test": _base_name(test), "test_split": test_split}
    if train is not None:
        source |= {"train": _base_name(train), "train_split": train_split}
    columns = set(test_part.column_names)
    has_labels, has_masks = label_column in columns, mask_column in columns
    is_on_hub = not os.path.exists(test) and os.fspath(test).count("/") == 1 and "*" not in os.fspath(test)
    splits = Splits(
        name=_base_name(test),
        train=train_part,
        test=test_part,
        source=source,
        dataset_id=os.fspath(test) if is_on_hub else None,
        image_column=image_column,
        label_column=label_column if has_labels else None,
        mask_column=mask_column if has_masks else None,
        read_classes=(lambda row: read_class_ids(row[mask_column])) if has_masks else None,
    )
    tasks = ["reconstruction"]
    if has_labels:
        tasks += ["retrieval"] + (["knn", "linear"] if train_part is not None else [])
    if has_masks:
        tasks += ["objects"] + (["segmentation"] if train_part is not None else [])
    return EvaluationData(splits.name, dict.fromkeys(tasks, splits))


def with_paper_transform(processor: Any) -> StellarImageProcessorPil:
    """A processor that prepares images as the paper does for its evaluations: the short side to 8/7 of the crop
    (256 of 224), bicubic and antialiased, then the centre crop; with the size and statistics of another processor.

    Args:
        processor: Of a model: its crop, or else its size, says how many pixels the model takes.

    Raises:
        ValueError: If it does not say how many pixels the model takes.
    """
    side = _side(processor)
    return StellarImageProcessorPil(
        size={"shortest_edge": round(side * _SHORT_SIDE_OF_CROP)},
        crop_size={"height": side, "width": side},
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )


def _side(processor: Any) -> int:
    sizes = [getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None]
    for size in [*sizes, getattr(processor, "size", None)]:
        values = dict(size or {})
        if values.get("height"):
            return int(values["height"])
        if values.get("shortest_edge"):
            return int(values["shortest_edge"])
    raise ValueError(
        f"The image processor, a {type(processor).__name__}, has neither a crop_size nor a size, so it is not known "
        "how many pixels the model takes: pass a processor that says so."
    )


def _load(dataset_id: str, preset: Preset | None, split: str, image_column: str) -> datasets.Dataset:
    import datasets

    if preset is None or os.path.exists(dataset_id):
        return load_images(dataset_id, split, image_column=image_column)
    return datasets.load_dataset(dataset_id, preset.config, split=split, revision=preset.revision)


def _require(dataset: Any, title: str, *columns: str | None) -> None:
    missing = [name for name in columns if name is not None and name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{title} needs the column {missing[0]!r}, but this copy has only {dataset.column_names}: rename it, or "
            "sort the images into a folder for each class."
        )


def _base_name(source: str | os.PathLike) -> str:
    """A folder or data set without what is around it: nobody else has that."""
    return os.path.basename(os.path.abspath(source))


def _evenly(dataset: Any, count: int | None) -> Any:
    """At most so many rows, at equal distances: folders are sorted by class."""
    if count is None or count >= len(dataset):
        return dataset
    return dataset.select([number * len(dataset) // count for number in range(count)])
