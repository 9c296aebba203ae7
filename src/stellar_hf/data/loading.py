# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Data sets of images from folders, shards and the Hub."""

from __future__ import annotations

import glob
import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers.utils import logging

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BUILDER_OF_SUFFIX = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def load_images(
    source: str | os.PathLike, split: str = "train", streaming: bool = False, image_column: str = "image"
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens images of any origin as a data set.

    Args:
        source: One of
            - a folder of images, searched with its subfolders; where every image lies in one of several folders, as in
              ImageNet, or deeper in them, their names are the classes in the column `label`. Folders that hold nothing
              but one other folder are passed over; a warning says why there are no labels;
            - a folder of shards, one shard, or a pattern such as `shards/*.tar`: WebDataset (`.tar`), Parquet, Arrow;
            - a folder that `Dataset.save_to_disk` wrote;
            - anything else that `datasets.load_dataset` takes, such as owner/name on the Hub.
        split: Split of a data set that has several; a folder of images has none.
        streaming: Whether to read shards and Hub data sets as they are needed instead of preparing them first. Of a
            tar shard only the end is checked then; [`EndlessStream`] checks the rest as it comes to it.
        image_column: What the column of images will be called, where there is only one of them.

    Returns:
        The data set; `IterableDataset` if streaming.

    Raises:
        ValueError: If there are no images, or several columns of them, `streaming` is asked of a folder of images, or
            a shard is broken or a file's name not UTF-8, which it names.
    """
    import datasets

    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ValueError(f"The source is {source!r}, but a folder, a file or a name on the Hub is expected.")
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
        dataset = _load_shards(_BUILDER_OF_SUFFIX[shards.pop()], files, split, streaming)
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


def _load_shards(builder: str, files: list[str], split: str, streaming: bool):
    import datasets

    paths = sorted(itertools.chain.from_iterable(glob.glob(file) for file in files))  # none of those behind URLs
    _check_shards(paths)
    if builder == "webdataset" and not streaming:
        # Preparing them would end a shard at a damaged header, without a word. What is prepared is not read again.
        prepared = datasets.load_dataset_builder(builder, data_files={split: files}).cache_dir
        _check_shards([] if os.path.isdir(prepared) else paths, thoroughly=True)
    try:
        return datasets.load_dataset(builder, data_files={split: files}, split=split, streaming=streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        _check_shards(paths, thoroughly=True)
        raise ValueError(f"{' '.join(files[:3])} cannot be read: {error.__cause__ or error}.") from error


def _check_shards(files: Iterable[str], thoroughly: bool = False) -> None:
    """`ValueError` that names the first broken file: Datasets does not, and fails when a run comes to it.

    Reads the ends of files, which truncated ones lack, or all of them `thoroughly`.
    """
    import pyarrow

    for file in files:
        try:
            if file.lower().endswith(".parquet"):
                _check_parquet(file, thoroughly)
            elif file.lower().endswith(".tar"):
                _check_tar(file, thoroughly)
        except (OSError, tarfile.TarError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file} cannot be read: {str(error).rstrip('.')}. Replace or remove it.") from error


def _check_parquet(file: str, thoroughly: bool) -> None:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        for group in range(table.num_row_groups if thoroughly else 0):
            table.read_row_group(group)


def _check_tar(file: str, thoroughly: bool) -> None:
    size = os.path.getsize(file)
    with open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        stream.seek(max(size - 1024, 0))
        has_end = stream.read() == bytes(1024)
        if has_end and not thoroughly:
            return
        archive.getmembers()  # reads the headers alone
        if archive.offset > size:
            raise tarfile.ReadError("unexpected end of data")
        # tarfile takes a damaged header for the end, without a word, and zeros in place of one, too.
        stream.seek(archive.offset)
        while data := stream.read(2**20):
            if data.strip(b"\0"):
                raise tarfile.ReadError(f"what follows byte {archive.offset} is no header")
        if not has_end and not thoroughly:
            logger.warning(f"{file} lacks the zeros that end an archive: if it was cut short, images are missing.")


def _files(folder: Path) -> list[str]:
    """Paths of all images and shards in a folder and its subfolders."""
    suffixes, found = (*_BUILDER_OF_SUFFIX, *IMAGE_SUFFIXES), []
    for entry in _entries(folder):
        if not entry.name.lower().endswith(suffixes):
            continue
        if not entry.is_file():
            logger.warning(f"{entry.path} is no regular file. It is left out.")
            continue
        try:
            entry.path.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The name of a file is not UTF-8, which data sets need: {os.fsencode(entry.path)!r}. Rename it."
            ) from error
        found.append(entry.path)
    return sorted(found)


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    """All files of a folder and its subfolders; each folder once, however many links lead to it."""
    seen: set[str] = set()
    folders, links = [str(folder)], list[str]()
    while folders or links:
        # Links come last, so that a folder is found by its own name.
        current = folders.pop() if folders else links.pop()
        place = os.path.realpath(current)
        if place in seen:
            continue
        seen.add(place)
        with os.scandir(current) as entries:
            for entry in entries:
                if not entry.is_dir():
                    yield entry
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)


def _image_folder(folder: Path, files: list[str], image_column: str) -> datasets.Dataset:
    import datasets

    columns: dict[str, list] = {image_column: files}
    features: dict[str, datasets.Image | datasets.ClassLabel] = {image_column: datasets.Image()}
    if (classes := _classes(folder, files)) is not None:
        names = sorted(set(classes))
        numbers = {name: number for number, name in enumerate(names)}
        columns["label"] = [numbers[name] for name in classes]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _classes(folder: Path, files: Sequence[str]) -> list[str] | None:
    """The class of each image: the folder of the first level at which there are several, if every image is in one."""
    places = [Path(file).relative_to(folder).parts for file in files]
    level = 0
    while len({place[: level + 1] for place in places}) == 1 and all(len(place) > level + 1 for place in places):
        level += 1
    names = sorted({place[level] for place in places if len(place) > level + 1})
    if not names:
        return None
    top = folder.joinpath(*places[0][:level])
    loose = [file for file, place in zip(files, places, strict=True) if len(place) == level + 1]
    if loose:
        logger.warning(
            f"No labels are taken from the folders of {top}: {loose[0]} lies in none of them. Put each image into the "
            "folder of its class to have labels."
        )
        return None
    if {name.lower() for name in names} <= _SPLIT_NAMES:
        logger.warning(
            f"No labels are taken from the folders of {top}, {', '.join(names)}: they are splits, not classes. Give "
            f"one of them, such as {top / names[0]}, to have labels."
        )
        return None
    return [place[level] for place in places]


class EndlessStream(IterableDataset):
    """
    The rows of a streaming data set, pass after pass without an end, in another order in each.

    A pass shuffles the shards, then rows in a buffer, by the seed and the number of the pass. Workers of a DataLoader
    read different shards, and so do processes where `of_process` shares them out, as [`StellarTrainer`] does. A tar
    shard that is damaged inside is named in the log, and its images before the damage are taken. What comes at a place
    depends on nothing else, so that the Trainer, which skips what it has seen, goes on with the right rows;
    `state_dict` spares it all passes but the current one.

    Args:
        stream: A `datasets.IterableDataset`.
        seed: Of the orders, at least 0.
        buffer_size: Rows that are shuffled together.

    Raises:
        ValueError: If `buffer_size` is less than 1 or the seed negative.
    """

    def __init__(self, stream: datasets.IterableDataset, seed: int, buffer_size: int):
        if not isinstance(buffer_size, int) or not isinstance(seed, int) or buffer_size < 1 or seed < 0:
            raise ValueError(
                f"buffer_size is {buffer_size} and seed {seed}, but they must be whole, at least 1 and at least 0."
            )
        self.stream = stream
        self.seed = seed
        self.buffer_size = buffer_size
        self._start = {"epoch": 0, "row": 0}
        self._state = dict(self._start)
        self._checked: set[str] = set()

    @property
    def features(self) -> Any:
        """Of the stream's columns; None where they are not known."""
        return self.stream.features

    @property
    def column_names(self) -> list[str] | None:
        """Of the stream; None where they are not known."""
        return self.stream.column_names

    def cast_column(self, column: str, feature: Any) -> EndlessStream:
        """The same rows with another feature of a column, such as `datasets.Image(decode=False)`."""
        return EndlessStream(self.stream.cast_column(column, feature), self.seed, self.buffer_size)

    @property
    def num_shards(self) -> int:
        """Of the stream, which DataLoader workers and processes share out."""
        return self.stream.num_shards

    def of_process(self, process_index: int, num_processes: int) -> EndlessStream:
        """
        What one of several processes reads: in each pass other shards, as many as every other process.

        Args:
            process_index: Number of the process, from 0.
            num_processes: Number of all processes, of which `num_shards` is a multiple.

        Raises:
            ValueError: If the shards cannot be shared out evenly.
        """
        from datasets.distributed import split_dataset_by_node

        if self.num_shards % num_processes:
            raise ValueError(f"{self.num_shards} shards cannot be shared out evenly to {num_processes} processes.")
        part = split_dataset_by_node(self.stream, process_index, num_processes)
        return EndlessStream(part, self.seed, self.buffer_size)

    def state_dict(self) -> dict[str, int]:
        """The place of the next row: the pass, and the row in it."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on at a place that `state_dict` gave; rows before it are read again from the start of its pass."""
        self._start = dict(state_dict)
        self._state = dict(state_dict)

    def __iter__(self) -> Iterator[Any]:
        first = self._start["row"]
        for epoch in itertools.count(self._start["epoch"]):
            self._state = {"epoch": epoch, "row": 0}
            # Not `set_epoch`, whose number all workers share, while they may be in different passes.
            generator = np.random.default_rng([self.seed, epoch])
            for row in self.stream.shuffle(generator=generator, buffer_size=self.buffer_size):
                self._state["row"] += 1
                self._check_shard(row.get("__url__"))
                if self._state["row"] > first:
                    yield row
            if self._state["row"] == 0:
                return  # an empty stream, or more workers than shards
            first = 0

    def _check_shard(self, file: str | None) -> None:
        """Names a local tar shard that is damaged, when its first row comes."""
        if file is None or file in self._checked:
            return
        self._checked.add(file)
        try:
            _check_shards([file] if os.path.isfile(file) else [], thoroughly=True)
        except ValueError as error:
            logger.warning(f"{error} Until then the images behind the damage are missing.")


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
