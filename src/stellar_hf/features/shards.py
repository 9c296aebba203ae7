# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Features on disk: Parquet shards of tokens and localization, written so that a killed run goes on, and read back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from ..data import UnreadableImages
from ..hub_stellar import written_aside
from .checks import check_integer
from .encoding import ImageFeatures, batches_of, encode_batches, image_of, image_rows, model_features, path_of
from .fingerprints import data_fingerprint, processor_protocol, weights_fingerprint

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator
    from transformers import PreTrainedModel

_SETTINGS_KEY = b"stellar_hf"
_NUM_SHARDS = re.compile(r"-of-(\d+)\.parquet$")


@dataclass
class FeatureShards:
    """Shards that are complete.

    Attributes:
        folder: Where they lie.
        files: Parquet files, in the order of the images.
        num_images: Images of the data set.
        num_rows: Images that could be read: rows of all shards.
        columns: Types of the columns.
    """

    folder: Path
    files: list[Path]
    num_images: int
    num_rows: int
    columns: datasets.Features


def save_features(
    model: PreTrainedModel,
    dataset: Any,
    processor: Callable[..., Mapping[str, Tensor]],
    folder: str | os.PathLike,
    *,
    top_k: int | None = None,
    shard_size: int = 1000,
    settings: Mapping[str, Any] | None = None,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    max_unreadable_share: float = 0.01,
    show_progress: bool = True,
) -> FeatureShards:
    """Writes the tokens S and the localization L (STELLAR, arXiv 2602.01905) of images to `folder/features`.

    Columns are `index`, the row of the data set; `path`, where the first image has a file; `tokens`, (r, d) float32,
    or float16 of a model in float16; `grid_size`, rows and columns of patches; `localization`, (N, r) float16, or with
    `top_k` the `localization_values` and `localization_indices`, (N, k) float16 and int16, of each row's largest
    entries; and `label`, where the data set has labels. Rows are in the order of the images. An image that cannot be
    read is named in the log and has no row.

    A shard is written aside and renamed when it is whole: after a crash the same call makes what is missing, also with
    another number of processes, of which each makes every so many shards.

    Args:
        model: STELLAR model on its device.
        dataset: Images, as in [`encode_images`].
        processor: The model's image processor.
        folder: Where the features are written.
        top_k: Entries of each row of L to keep; all by default.
        shard_size: Images of a shard: what a killed process loses at most.
        settings: Names with values that JSON knows, which all shards of a folder must have in common, such as the
            model's name; kept in each shard, beside the hashes of weights and images, the processor's settings, and
            what else the features depend on.
        image_column: Column of the images.
        label_column: Column that is kept as `label`, where there is one.
        batch_size: Images of a forward pass, at most.
        num_workers: Processes that read images, for each process.
        accelerator: Shares the shards out among its processes.
        max_unreadable_share: Share of the images that a process has seen, or of 1000, that may be unreadable.
        show_progress: Whether to show a progress bar.

    Returns:
        What the folder holds; [`load_features`] reads it.

    Raises:
        ValueError: If the model has no sparse tokens, a number is out of range, the folder holds shards that were
            made with other settings, or too many images cannot be read, or all.
    """
    if not hasattr(model.config, "num_sparse_tokens"):
        raise ValueError(f"The model is a {model.config.model_type} model, which has no sparse tokens.")
    check_integer("shard_size", shard_size)
    num_tokens = model.config.num_sparse_tokens
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= num_tokens):
        raise ValueError(f"top_k is {top_k}, but must be in [1, {num_tokens}], the model's sparse tokens.")
    if len(dataset) == 0:
        raise ValueError("The data set has no rows: at least one image is needed.")

    columns = _columns(model, dataset, image_column, label_column, top_k)
    shards = plan_shards(Path(folder, "features"), len(dataset), shard_size)
    all_settings = {
        **(settings or {}),
        "dtype": str(model.dtype).removeprefix("torch."),
        "top_k": top_k,
        "shard_size": shard_size,
        "num_images": len(dataset),
        "columns": list(columns),
        "label_column": label_column if "label" in columns else None,
        "weights": weights_fingerprint(model),
        "processor": processor_protocol(processor),
        "images": data_fingerprint(dataset, image_column, [label_column]),
    }
    own = _own_shards(shards, all_settings, accelerator)
    stream = encode_batches(
        model,
        dataset,
        processor,
        [batch for rows in own.values() for batch in batches_of(rows, batch_size)],
        encode=partial(_stored, top_k=top_k),
        image_column=image_column,
        columns=[label_column] if "label" in columns else [],
        num_workers=num_workers,
        unreadable=UnreadableImages(max_unreadable_share, consequence="It is left out."),
    )
    shows = show_progress and bool(own) and (accelerator is None or accelerator.is_main_process)
    with tqdm(total=sum(map(len, own.values())), unit=" images", disable=not shows) as progress:
        for path, rows in own.items():
            features = _next_rows(stream, len(rows), progress)
            write_shard(path, _as_table(features, columns, label_column), columns, all_settings)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return _inspect(shards, len(dataset), columns)


def load_features(folder: str | os.PathLike, **kwargs: Any) -> datasets.Dataset:
    """
    Reads what [`save_features`] wrote.

    Args:
        folder: Its folder, or the `features` in it.
        **kwargs: Of `datasets.load_dataset`, such as `streaming` and `columns`.

    Returns:
        The rows, in the order of the images.

    Raises:
        ValueError: If there are no features, or not yet all of them.
    """
    import datasets

    shards = Path(folder, "features") if Path(folder, "features").is_dir() else Path(folder)
    files = sorted(str(file) for file in shards.glob("*.parquet"))
    if not files:
        raise ValueError(f"There are no features in {folder}: write them with stellar-hf extract.")
    named = _NUM_SHARDS.search(files[0])
    if named and int(named[1]) != len(files):
        raise ValueError(
            f"There are {len(files)} of {int(named[1])} shards in {shards}: repeat the command stellar-hf extract, "
            "which makes the others."
        )
    return datasets.load_dataset("parquet", data_files=files, split="train", **kwargs)


# The folder ----------------------------------------------------------------------------------------------------------


def plan_shards(folder: Path, num_images: int, shard_size: int) -> dict[Path, range]:
    """The images of every shard. The folder holds nothing else, so that `datasets` can load it."""
    starts = range(0, num_images, shard_size)
    return {
        folder / f"features-{number:05d}-of-{len(starts):05d}.parquet": range(num_images)[start : start + shard_size]
        for number, start in enumerate(starts)
    }


def prepare_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or checks that what it holds is a part of this very run."""

    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.parquet")):
        found = shard_settings(path)
        different = [f"{name} = {found.get(name)!r}" for name in settings if found.get(name) != settings[name]]
        if different:
            raise ValueError(
                f"{path} was made with other settings ({', '.join(different)}): take another output_dir, or remove "
                "the folder."
            )


def shard_settings(path: str | os.PathLike) -> dict[str, Any]:
    """What a shard of [`save_features`] was made with; nothing of a Parquet file of others."""
    import pyarrow.parquet as pq

    return json.loads((pq.read_schema(path).metadata or {}).get(_SETTINGS_KEY, "{}"))


def write_shard(path: Path, table: dict[str, list], columns: datasets.Features, settings: Mapping[str, Any]) -> None:
    """Writes a shard aside and renames it, so that one that is there is whole."""
    import datasets
    import pyarrow.parquet as pq

    rows = datasets.Dataset.from_dict(table, features=columns).data.table
    rows = rows.replace_schema_metadata({**rows.schema.metadata, _SETTINGS_KEY: json.dumps(settings)})
    with written_aside(path, prefix=".") as aside:
        with pq.ParquetWriter(aside, rows.schema, compression="zstd", use_dictionary=False) as writer:
            if rows.num_rows:  # `datasets` loads a file without groups of rows, but not one with an empty group
                writer.write_table(rows)


def _own_shards(
    shards: dict[Path, range], settings: Mapping[str, Any], accelerator: Accelerator | None
) -> dict[Path, range]:
    """The shards that are missing and that this process is to make."""
    if accelerator is None or accelerator.is_main_process:
        prepare_folder(next(iter(shards)).parent, settings)
    left = [path for path in shards if not path.exists()]
    if accelerator is None:
        return {path: shards[path] for path in left}
    # One process looks what is left, since the others' shards may appear while a second one looks.
    (left,) = broadcast_object_list([left])
    return {path: shards[path] for path in left[accelerator.process_index :: accelerator.num_processes]}


def _inspect(shards: Mapping[Path, range], num_images: int, columns: datasets.Features) -> FeatureShards:
    import pyarrow.parquet as pq

    files = list(shards)
    num_rows = sum(pq.read_metadata(path).num_rows for path in files)
    if num_rows == 0:
        raise ValueError(f"None of the {num_images} images can be read.")
    return FeatureShards(files[0].parent, files, num_images, num_rows, columns)


# Rows ----------------------------------------------------------------------------------------------------------------


def _columns(
    model: PreTrainedModel, dataset: Any, image_column: str, label_column: str, top_k: int | None
) -> datasets.Features:
    import datasets

    num_tokens = model.config.num_sparse_tokens
    tokens_dtype = "float16" if model.dtype == torch.float16 else "float32"
    types: dict[str, Any] = {"index": datasets.Value("int64")}
    first = image_rows(dataset, image_column)[0]
    if path_of(image_of(first, image_column)) is not None:
        types["path"] = datasets.Value("string")
    types["tokens"] = datasets.Array2D((num_tokens, model.config.hidden_size), tokens_dtype)
    types["grid_size"] = datasets.List(datasets.Value("int32"), length=2)
    if top_k is None:
        types["localization"] = datasets.Array2D((None, num_tokens), "float16")
    else:
        types["localization_values"] = datasets.Array2D((None, top_k), "float16")
        types["localization_indices"] = datasets.Array2D((None, top_k), "int16")
    label = (getattr(dataset, "features", None) or {}).get(label_column)
    if label is None and isinstance(dataset[0], Mapping) and label_column in dataset[0]:
        label = datasets.Value("string" if isinstance(dataset[0][label_column], str) else "int64")
    return datasets.Features(types if label is None else {**types, "label": label})


def _stored(model: Any, pixel_values: Tensor, top_k: int | None) -> dict[str, Tensor]:
    """The call of the model that gives the columns of tensors, reduced where the model is."""
    features = model_features(model, pixel_values)
    stored = {"tokens": features["sparse_tokens"], "grid_size": features["grid_size"]}
    if top_k is None:
        return {**stored, "localization": features["localization"].half()}
    largest = features["localization"].topk(top_k)
    return {**stored, "localization_values": largest.values.half(), "localization_indices": largest.indices.short()}


def _next_rows(stream: Iterator[ImageFeatures], num_rows: int, progress: tqdm) -> ImageFeatures:
    """The features of the next rows of the stream, which has no batch of two shards."""
    parts, count = [], 0
    while count < num_rows:
        part = next(stream)
        parts.append(part)
        size = len(part) + len(part.unreadable)
        count += size
        progress.update(size)
    return ImageFeatures.concatenate(parts)


def _as_table(features: ImageFeatures, columns: Sequence[str], label_column: str) -> dict[str, list]:
    values: dict[str, list] = {name: [row.numpy() for row in rows] for name, rows in features.tensors.items()}
    values["index"] = features.index.tolist()
    values["path"] = features.paths
    values["label"] = features.columns.get(label_column, [])
    return {name: values.get(name, []) for name in columns}
