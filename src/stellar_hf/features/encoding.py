# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""From images to features: the one loop that runs a vision model over a data set."""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import UnreadableImages, read_image, undecoded
from ..data.workers import ignore_signals
from ..image_processing_pil_stellar import WHITE
from .checks import check_integer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

# What a model says of images: tensors by name, one row for each image. It is given pixel values in float32.
Encode = Callable[[Any, Tensor], Mapping[str, Tensor]]

_FEATURES = ("pooler_output", "sparse_tokens", "localization", "grid_size")


@dataclass
class ImageFeatures:
    """What a model says of M images, in the order of the data set. `len(features)` is M.

    Attributes:
        index: (M,) int64; the row of the data set that each image is of. Images that cannot be read are left out.
        tensors: Tensors by name, (M, …) each, on the CPU, in float32 (float16 stays as it is); a list of M tensors
            where images have different sizes and so maps of different shapes. They are attributes, too. A STELLAR
            model gives `pooler_output` (M, d), `sparse_tokens` (M, r, d), `localization` (M, N, r) and `grid_size`
            (M, 2); any other vision encoder what it has of these, or else its `last_hidden_state`.
        columns: Further columns of the data set that were asked for, as lists of M values.
        paths: The file of each image, None where it has none.
        unreadable: What is wrong with the images that cannot be read, by their row.
    """

    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    tensors: dict[str, Tensor | list[Tensor]] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)
    paths: list[str | None] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("tensors", ()):
            return self.tensors[name]
        raise AttributeError(f"There is no {name!r} among these features, only {', '.join(self.__dict__)}.")

    def __dir__(self):
        return [*super().__dir__(), *self.tensors]

    @classmethod
    def concatenate(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """All images of several parts, each once, in the order of the data set."""
        filled = [part for part in parts if len(part)]
        unreadable = {row: reason for part in parts for row, reason in part.unreadable.items()}
        if not filled:
            return cls(unreadable=dict(sorted(unreadable.items())))
        index, places = np.unique(torch.cat([part.index for part in filled]).numpy(), return_index=True)

        def take(lists: Sequence[Any]) -> list:
            values = [value for part in lists for value in part]
            return [values[place] for place in places]

        def take_tensors(tensors: Sequence[Tensor | Sequence[Tensor]]) -> Tensor | list[Tensor]:
            shapes = {row.shape for part in tensors for row in (part[:1] if isinstance(part, Tensor) else part)}
            if len(shapes) > 1:
                return take(tensors)
            whole = [part if isinstance(part, Tensor) else torch.stack(list(part)) for part in tensors]
            return torch.cat(whole)[torch.from_numpy(places)]

        return cls(
            index=torch.from_numpy(index),
            tensors={name: take_tensors([part.tensors[name] for part in filled]) for name in filled[0].tensors},
            columns={name: take([part.columns[name] for part in filled]) for name in filled[0].columns},
            paths=take([part.paths for part in filled]),
            unreadable=dict(sorted(unreadable.items())),
        )


def encode_images(
    model: PreTrainedModel,
    dataset: Any,
    processor: Callable[..., Mapping[str, Tensor]],
    *,
    encode: Encode | None = None,
    rows: Sequence[int] | None = None,
    image_column: str = "image",
    columns: Sequence[str] = (),
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    unreadable: UnreadableImages | None = None,
    description: str = "features",
    show_progress: bool = True,
) -> ImageFeatures:
    """Runs a vision model over images, without gradients and in evaluation mode, and collects what it says.

        features = encode_images(model, dataset, processor)
        features.sparse_tokens, features.localization, features.index

    Images of any sizes may stand side by side: those of one size after processing share a forward pass. An image that
    cannot be read is named in the log and left out, so that `features.index` tells which rows the features are of.

    Args:
        model: Any vision encoder of Transformers, on any device; the training flags of its modules are restored.
        dataset: `datasets.Dataset` (whose images are read here, not by it), or anything with a length and rows: rows
            with an `image_column`, or images themselves, in a form that [`read_image`] takes, or their paths.
        processor: The model's image processor, as [`load_processor`] gives it; transparent images are composited on
            its `background`, on white where it has none.
        encode: The call of the model, if it is another than [`model_features`]: a function of the model and pixel
            values (B, 3, H, W), float32 on its device, that gives tensors by name with a row for each image.
        rows: Rows to take, all by default.
        image_column: Column of the images.
        columns: Further columns to keep; of a row that lacks one, None.
        batch_size: Images of a forward pass, at most.
        num_workers: Processes that read images.
        accelerator: Splits the images over its processes, by whole batches, so that the features are those of one
            process to the last bit; each process gets the features of all images. Without it every process does all
            of the work.
        unreadable: Counts and names images that cannot be read; by default each is named, and any number may be.
        description: Title of the progress bar.
        show_progress: Whether to show a progress bar.

    Returns:
        The features of all images that can be read.

    Raises:
        ValueError: If there are no rows or no image of them can be read, the data set has no length or lacks the
            column, or a size is less than it can be.
    """
    wanted = _all_rows(dataset) if rows is None else rows
    if len(wanted) == 0:
        raise ValueError("The data set has no rows: at least one image is needed.")
    batches = batches_of(wanted, batch_size)
    if accelerator is not None:
        batches = _share(batches, accelerator.num_processes, accelerator.process_index)
    stream = encode_batches(
        model,
        dataset,
        processor,
        batches,
        encode=encode,
        image_column=image_column,
        columns=columns,
        num_workers=num_workers,
        unreadable=unreadable,
        always_forward=accelerator is not None and accelerator.num_processes > 1,
    )
    shows = show_progress and (accelerator is None or accelerator.is_local_main_process)
    parts = []
    num_own = sum(map(len, batches))
    with tqdm(total=num_own, desc=description, unit=" images", leave=False, disable=not shows) as progress:
        for part in stream:
            parts.append(part)
            progress.update(len(part) + len(part.unreadable))
    features = ImageFeatures.concatenate(parts if accelerator is None else gather_object(parts))
    if len(features) == 0:
        reason = next(iter(features.unreadable.values()))
        raise ValueError(f"None of the {len(wanted)} images can be read. {reason}")
    return features


def encode_batches(
    model: PreTrainedModel,
    dataset: Any,
    processor: Callable[..., Mapping[str, Tensor]],
    batches: Sequence[Sequence[int]],
    *,
    encode: Encode | None = None,
    image_column: str = "image",
    columns: Sequence[str] = (),
    num_workers: int = 0,
    unreadable: UnreadableImages | None = None,
    always_forward: bool = False,
) -> Iterator[ImageFeatures]:
    """The loop of [`encode_images`] as a stream, in this process alone: nothing is held but one batch.

    Args:
        batches: Rows of every batch, in the order in which they are wanted. The rest as in [`encode_images`].
        always_forward: Whether to call the model also for a batch of which no image can be read, as a model that is
            sharded over processes wants it.

    Yields:
        The features of each batch, whose images all may have been left out.

    Raises:
        ValueError: If the data set has no length or lacks the column, or too many images cannot be read.
    """
    check_integer("num_workers", num_workers, least=0)
    encode = encode or model_features
    unreadable = unreadable or UnreadableImages(max_share=1, consequence="It is left out.")
    # A generator of its own, so that a training which is measured in between draws what it would have drawn.
    loader = DataLoader(
        _ProcessedBatches(dataset, processor, batches, image_column, columns, always_forward),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=ignore_signals,
        pin_memory=model.device.type == "cuda",
        generator=torch.Generator(),
    )
    for batch in loader:
        unreadable.count(list(batch["unreadable"].values()), batch["num_images"])
        parts = [ImageFeatures(unreadable=batch["unreadable"])]
        for group in batch["groups"]:
            tensors = _encoded(model, encode, group.pop("pixel_values"))
            if group["index"]:
                index = torch.tensor(group.pop("index"))
                parts.append(ImageFeatures(index, tensors, group["columns"], group["paths"]))
        yield ImageFeatures.concatenate(parts)


def model_features(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The call of a model that [`encode_images`] makes by default: of the encoder alone, without heads.

    Args:
        model: Any vision encoder of Transformers, with heads or adapters or without.
        pixel_values: (B, 3, H, W) float32.

    Returns:
        What it has of `pooler_output` (B, d), `sparse_tokens` (B, r, d), `localization` (B, N, r) and `grid_size`
        (B, 2) int64; `last_hidden_state` (B, tokens, d) if it has nothing of these.
    """
    encoder = encoder_of(model)
    output = encoder(pixel_values.to(encoder.dtype))
    features = {name: output[name] for name in _FEATURES if output.get(name) is not None}
    if "grid_size" in features:
        features["grid_size"] = torch.as_tensor(features["grid_size"]).expand(len(pixel_values), 2)
    return features or {"last_hidden_state": output.last_hidden_state}


def encoder_of(model: Any) -> Any:
    """The part of a vision model that takes pixels, without heads and without the wrapper of PEFT."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    base_model = model.base_model  # of DINOv3 these are layers that take no pixels
    return base_model if "pixel_values" in inspect.signature(base_model.forward).parameters else model


def batches_of(rows: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Rows in batches; the last one may be smaller."""
    check_integer("batch_size", batch_size)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in evaluation mode; then every module has the training flag that it had.

    `model.train()` would also wake modules that were frozen in evaluation mode.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def load_processor(name: str | os.PathLike) -> Any:
    """The image processor of a model: a folder, or owner/name on the Hub."""
    from transformers import AutoImageProcessor

    from ..image_processing_pil_stellar import StellarImageProcessorPil

    try:
        return AutoImageProcessor.from_pretrained(name)
    except ImportError:  # Transformers 5.17 without torchvision
        return StellarImageProcessorPil.from_pretrained(name)


# Inputs --------------------------------------------------------------------------------------------------------------


class _ProcessedBatches(Dataset):
    """Reads and processes batches of rows, where a DataLoader wants it: here or in its workers."""

    def __init__(
        self,
        dataset: Any,
        processor: Callable[..., Mapping[str, Tensor]],
        batches: Sequence[Sequence[int]],
        image_column: str,
        columns: Sequence[str],
        always_forward: bool,
    ):
        _all_rows(dataset)  # refuses streams
        self.dataset = image_rows(dataset, image_column, columns)
        self.processor = processor
        self.batches = batches
        self.image_column = image_column
        self.columns = columns
        self.always_forward = always_forward

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`groups` of images of one processed size: `pixel_values` with an `index`, `columns` and `paths`."""
        rows = list(self.batches[number])
        images: dict[int, Tensor] = {}
        unreadable: dict[int, str] = {}
        paths, columns = {}, {}
        background = background_of(self.processor)
        for row, item in zip(rows, self._read(rows), strict=True):
            image = image_of(item, self.image_column)
            paths[row] = path_of(image)
            columns[row] = [item.get(name) for name in self.columns] if isinstance(item, Mapping) else []
            try:
                rgb = read_image(image, background=background, name=f"Image {row} of the data set")
            except ValueError as error:
                unreadable[row] = str(error)
            else:
                images[row] = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
        groups = [
            {
                "pixel_values": pixel_values,
                "index": index,
                "columns": {name: [columns[row][i] for row in index] for i, name in enumerate(self.columns)},
                "paths": [paths[row] for row in index],
            }
            for index, pixel_values in self._processed(images)
        ]
        if not groups and self.always_forward:
            pixel_values = self._process([torch.zeros(3, 8, 8, dtype=torch.uint8)])
            groups = [{"pixel_values": pixel_values, "index": []}]
        return {"groups": groups, "unreadable": unreadable, "num_images": len(rows)}

    def _read(self, rows: list[int]) -> Sequence[Any]:
        read_all = getattr(self.dataset, "__getitems__", None)
        return read_all(rows) if read_all is not None else [self.dataset[row] for row in rows]

    def _processed(self, images: Mapping[int, Tensor]) -> list[tuple[list[int], Tensor]]:
        """Rows and pixel values of the images of each processed size."""
        # Images of one size are processed together, which takes a fraction of the time.
        groups = defaultdict(list)
        for row, image in images.items():
            groups[image.shape].append(row)
        processed = defaultdict(list)
        for group in groups.values():
            pixel_values = self._process([images[row] for row in group])
            processed[pixel_values.shape[1:]].append((group, pixel_values))
        return [
            ([row for group, _ in parts for row in group], torch.cat([pixel_values for _, pixel_values in parts]))
            for parts in processed.values()
        ]

    def _process(self, images: list[Tensor]) -> Tensor:
        return self.processor(images, input_data_format="channels_first", return_tensors="pt")["pixel_values"]


def _all_rows(dataset: Any) -> range:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"The data set is a {type(dataset).__name__}, which has no length or no rows that can be picked, but one "
            "that can be read in any order is needed: a list, or a datasets.Dataset without streaming."
        )
    return range(len(dataset))


def image_rows(dataset: Any, image_column: str, columns: Sequence[str] = ()) -> Any:
    """The columns that are needed, with undecoded images, where a data set tells its columns."""
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list):
        return dataset
    if image_column not in names:
        raise ValueError(f"The data set has no column {image_column!r}, only {names}: name it with image_column.")
    return undecoded(dataset.select_columns([image_column, *(set(columns) & set(names))]), image_column)


def image_of(item: Any, image_column: str) -> Any:
    """The image of a row, which may be the image itself, or its path."""
    if isinstance(item, str | os.PathLike):
        return {"path": os.fspath(item), "bytes": None}
    if not isinstance(item, Mapping) or (image_column not in item and {"bytes", "path"} & item.keys()):
        return item
    if image_column not in item:
        raise ValueError(f"The data set has no column {image_column!r}, only {list(item)}: name it with image_column.")
    return item[image_column]


def background_of(processor: Any) -> Sequence[int]:
    """Red, green and blue on which a processor's transparent images are composited, integers in [0, 255]."""
    return getattr(processor, "background", None) or WHITE


def path_of(image: Any) -> str | None:
    """The file of an image, None where it has none."""
    return (image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None)) or None


def _share(batches: Sequence[Sequence[int]], num_processes: int, process_index: int) -> list[Sequence[int]]:
    """As many batches for every process, as a model that is sharded over them wants it: some are double."""
    size = -(-len(batches) // num_processes)
    return [batches[i % len(batches)] for i in range(process_index * size, (process_index + 1) * size)]


def _unchanged(batch: Any) -> Any:
    return batch


@torch.no_grad()
def _encoded(model: Any, encode: Encode, pixel_values: Tensor) -> dict[str, Tensor | list[Tensor]]:
    with evaluation_mode(model):
        features = encode(model, pixel_values.to(model.device, non_blocking=True))
    return {name: _on_cpu(tensor) for name, tensor in features.items()}


def _on_cpu(tensor: Tensor) -> Tensor:
    is_kept = tensor.dtype == torch.float16 or not tensor.is_floating_point()
    return (tensor if is_kept else tensor.float()).cpu()
