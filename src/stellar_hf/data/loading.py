# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Data sets of images from folders, shards and the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BUILDER_OF_SUFFIX = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")


def load_images(
    source: str | os.PathLike, split: str = "train", streaming: bool = False, image_column: str = "image"
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens images of any origin as a data set.

    Args:
        source: One of
            - a folder of images, searched with its subfolders; where every image lies in a folder below it, as in
              ImageNet, and there are several, their names are the classes in the column `label`;
            - a folder of shards, one shard, or a pattern such as `shards/*.tar`: WebDataset (`.tar`), Parquet, Arrow;
            - a folder that `Dataset.save_to_disk` wrote;
            - anything else that `datasets.load_dataset` takes, such as owner/name on the Hub.
        split: Split of a data set that has several; a folder of images has none.
        streaming: Whether to read shards and Hub data sets as they are needed instead of preparing them first.
        image_column: What the column of images will be called, where there is only one of them.

    Returns:
        The data set; `IterableDataset` if streaming.

    Raises:
        ValueError: If there are no images, or several columns of them, or `streaming` is asked of
            a folder of images.
    """
    import datasets

    path = Path(source)
    files = _files(path) if path.is_dir() else [str(source)]
    suffixes = {Path(file).suffix.lower() for file in files}
    if any((path / name).exists() for name in _SAVED_TO_DISK):
        dataset = datasets.load_from_disk(path)
        dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif shards := suffixes & _BUILDER_OF_SUFFIX.keys():
        if len(suffixes) > 1:
            raise ValueError(f"{source} holds files of several kinds, {' '.join(sorted(suffixes))}: choose one.")
        builder = _BUILDER_OF_SUFFIX[shards.pop()]
        dataset = datasets.load_dataset(builder, data_files={split: files}, split=split, streaming=streaming)
    elif path.is_dir() and files:
        if streaming:
            raise ValueError(f"{source} is a folder of images, which are read one by one anyway: leave out streaming.")
        return _image_folder(path, files, image_column)
    else:
        dataset = datasets.load_dataset(str(source), split=split, streaming=streaming)
    return _with_image_column(dataset, image_column, str(source))


def undecoded(dataset: Any, image_column: str) -> Any:
    """The data set with its images as files, so that whoever reads them may leave out or replace broken ones; a data
    set of another kind as it is, and a dictionary of data sets with each of them so."""
    if isinstance(dataset, dict):
        return {name: undecoded(part, image_column) for name, part in dataset.items()}
    features = getattr(dataset, "features", None)
    if not features:
        return dataset
    import datasets

    feature = features.get(image_column)
    if isinstance(feature, datasets.Image) and feature.decode:
        return dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def _files(folder: Path) -> list[str]:
    """Paths of all images and shards in a folder and its subfolders."""
    suffixes, found = (*_BUILDER_OF_SUFFIX, *IMAGE_SUFFIXES), []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(parent, name) for name in names if name.lower().endswith(suffixes)]
    return sorted(found)


def _image_folder(folder: Path, files: list[str], image_column: str) -> datasets.Dataset:
    import datasets

    columns: dict[str, list] = {image_column: files}
    features: dict[str, datasets.Image | datasets.ClassLabel] = {image_column: datasets.Image()}
    places = [Path(file).relative_to(folder).parts for file in files]
    classes = sorted({place[0] for place in places})
    if len(classes) > 1 and all(len(place) == 2 for place in places):
        index = {name: number for number, name in enumerate(classes)}
        columns["label"] = [index[place[0]] for place in places]
        features["label"] = datasets.ClassLabel(names=classes)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _with_image_column(dataset, image_column: str, source: str):
    import datasets

    features = dataset.features
    if features is None or image_column in features:
        return dataset
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise ValueError(
            f"There is no image in {source}, or it is not known where: it has no column {image_column!r}, only "
            f"{list(features)}. Name the one of the images with image_column."
        )
    return dataset.rename_column(images[0], image_column)
