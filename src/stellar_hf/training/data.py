# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a training asks of its data sets, and how it reads them: divided evenly, by patient workers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from ..data import EndlessStream, StellarCollator
from ..data.workers import ignore_signals


def check_not_empty(dataset: Any) -> None:
    """`ValueError` for a data set without rows."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("The data set has no rows: at least one image is needed.")


def check_column(dataset: Any, column: str) -> None:
    """`ValueError` for a data set whose columns are known and lack this one."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and column not in columns:
        raise ValueError(f"The data set has no column {column!r}, only {columns}: name it with image_column.")


def has_column(dataset: Any, column: str) -> bool:
    """Whether a map-style data set has rows with this column."""
    if dataset is None or isinstance(dataset, IterableDataset):
        return False
    columns = getattr(dataset, "column_names", None) or dataset[0]
    return isinstance(columns, list | Mapping) and column in columns


def images_alone(dataset: Any, column: str) -> Any:
    """
    A map-style data set of Datasets without its other columns, which would be read with each image for nothing; with
    all of them where a transform may ask for them.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return dataset
    return dataset.select_columns([column])


def shares_shards(dataset: Any, args: TrainingArguments) -> bool:
    """Whether each process can read shards of its own of an [`EndlessStream`], as many as the others."""
    if args.world_size == 1 or not isinstance(dataset, EndlessStream):
        return False
    data_loading: Any = args.accelerator_config
    return data_loading.dispatch_batches is False and dataset.num_shards % args.world_size == 0


def not_divided_again(dataloader: DataLoader) -> DataLoader:
    """Accelerate gives a process only some batches of a stream: all of them, where it reads shards of its own."""
    batches: Any = _loader(dataloader).dataset  # an IterableDatasetShard, which takes those of one process
    batches.num_processes, batches.process_index = 1, 0
    return dataloader


class _UndividedStream(IterableDataset):
    """A stream that Accelerate divides among processes batch by batch: shards may hold unequal numbers of images."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


def undivided(dataset: Any, num_processes: int) -> Any:
    """The data set such that all processes have equally many batches of it."""
    if isinstance(dataset, dict):
        return {name: undivided(part, num_processes) for name, part in dataset.items()}
    if num_processes > 1 and isinstance(dataset, IterableDataset) and hasattr(dataset, "shard"):
        return _UndividedStream(dataset)
    return dataset


def with_uninterrupted_workers(dataloader: DataLoader) -> DataLoader:
    """Ctrl-C and SIGTERM come to the workers as well, which would end without a word before the step is done."""
    loader = _loader(dataloader)
    loader.worker_init_fn = partial(_init_worker, initialize=loader.worker_init_fn)
    return dataloader


def without_unreadable(dataloader: DataLoader) -> DataLoader:
    """A [`StellarCollator`] of the loader leaves images out that cannot be read; another collator does as it does."""
    loader = _loader(dataloader)
    if isinstance(loader.collate_fn, StellarCollator):
        loader.collate_fn = replace(loader.collate_fn, leave_out_unreadable=True)
    return dataloader


def _loader(dataloader: Any) -> DataLoader:
    """The loader that does the work: Accelerate wraps it in one that has its attributes, but does not use them."""
    return getattr(dataloader, "base_dataloader", dataloader)


def _init_worker(worker_id: int, initialize: Callable[[int], None] | None) -> None:
    ignore_signals(worker_id)
    if initialize is not None:
        initialize(worker_id)
