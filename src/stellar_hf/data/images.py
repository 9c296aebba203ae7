# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Reading images of any kind, and batches of them for the workers of a data loader."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .views import StellarViews

# Longer sides than this many times the decode size are reduced as well: one panorama would pad a whole batch.
_MAX_ELONGATION = 3


@dataclass
class StellarCollator:
    """Turns rows with images into one uint8 batch; a `collate_fn` for the workers of a DataLoader.

    Workers only decode and resize, and a batch crosses the bus in bytes; [`StellarViews`] makes the views of it where
    the model is. An image that cannot be read is replaced by another one of its batch and reported. Nothing random is
    drawn unless `views` are made here.

    Attributes:
        image_column: Name of the column that holds the images, in a form that [`images_to_tensor`] takes.
        decode_size: Short sides above it are reduced to it, in pixels; `None` leaves all sizes as they are.
        views: If given, the views are made here, in the worker. Their random draws come from torch's global
            generator, which a DataLoader seeds differently in each of its workers.
    """

    image_column: str = "image"
    decode_size: int | None = None
    views: StellarViews | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes one batch; images of different sizes may stand side by side.

        Args:
            examples: Rows of a dataset.

        Returns:
            `images`, (B, 3, H, W) uint8, each image in the upper left corner of zeros, and `image_sizes`, (B, 2)
            int64, the height and width of each; with `views` what they make of them instead. If images could not be
            read, also `unreadable`: a sentence for each.

        Raises:
            ValueError: If there is no example, the image column is missing, or no image of the batch can be read.
        """
        if not examples:
            raise ValueError("The batch has no examples, but at least 1 is needed.")
        for example in examples:
            if self.image_column not in example:
                raise ValueError(
                    f"There is no column {self.image_column!r}, only {', '.join(map(repr, example))}: "
                    "set image_column to the one that holds the images."
                )
        images, unreadable = self._read([example[self.image_column] for example in examples])
        canvas, image_sizes = pad_images(images)
        if self.views is None:
            batch: dict[str, Any] = {"images": canvas, "image_sizes": image_sizes}
        else:
            batch = dict(self.views(canvas, image_sizes))
        return {**batch, "unreadable": unreadable} if unreadable else batch

    def _read(self, images: list[Any]) -> tuple[list[Tensor], list[str]]:
        """The images, readable ones in place of those that are not, and what is wrong with each of the latter."""
        tensors: list[Tensor | None] = []
        unreadable = []
        for index, image in enumerate(images):
            try:
                tensors.append(_image_to_tensor(image, index, self.decode_size))
            except ValueError as error:
                tensors.append(None)
                unreadable.append(str(error))
        readable = [tensor for tensor in tensors if tensor is not None]
        if not readable:
            raise ValueError(f"None of the {len(images)} images of a batch can be read. {unreadable[0]}")
        return [
            readable[i % len(readable)] if tensor is None else tensor for i, tensor in enumerate(tensors)
        ], unreadable


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, h, w) of any sizes as one batch (B, 3, H, W), padded with zeros below and on the right; and (B, 2)
    int64 heights and widths."""
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = sizes.amax(0).tolist()
    canvas = images[0].new_zeros(len(images), 3, height, width)
    for image, target in zip(images, canvas, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    return canvas, sizes


def images_to_tensor(images: Sequence[Any], decode_size: int | None = None) -> list[Tensor]:
    """Reads images as RGB, upright according to their EXIF orientation.

    Args:
        images: PIL images of any integer mode, uint8 arrays of shape (H, W) or (H, W, C) with 1, 3 or 4 channels, or
            undecoded images of a dataset (dictionaries with `bytes` or `path`). 16-bit gray becomes 8-bit.
        decode_size: Short sides above it are reduced to it, in pixels, antialiased.

    Returns:
        One uint8 tensor of shape (3, H, W) for each image.

    Raises:
        ValueError: If an image cannot be decoded or is of another type; names its file, or its place in the batch.
    """
    return [_image_to_tensor(image, index, decode_size) for index, image in enumerate(images)]


def _image_to_tensor(image: Any, index: int, decode_size: int | None) -> Tensor:
    name = f"Image {index} of the batch"
    if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
        name = image.get("path") or name
        image = _decode(lambda: _open(image.get("bytes") or Path(image["path"]).read_bytes(), decode_size), name)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = _array_to_image(image, name)
    elif isinstance(image, Image.Image):
        name = getattr(image, "filename", None) or name
    else:
        raise ValueError(
            f"{name} is {_describe(image)}, but a PIL image, or a uint8 array of shape (height, width, channels), is "
            "expected."
        )
    if image.mode.startswith("F"):
        raise ValueError(
            f"{name} has floating-point pixels, whose range is not known: convert it to 8 bits a channel."
        )
    rgb = _decode(lambda: _to_rgb(image, decode_size), name)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _open(data: bytes, decode_size: int | None) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if decode_size is not None:
        image.draft("RGB", (decode_size, decode_size))  # a JPEG is then decoded at a fraction of its size
    return image


def _to_rgb(image: Image.Image, decode_size: int | None) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = ImageOps.exif_transpose(image).convert("RGB")
    if decode_size is None:
        return image
    scale = min(decode_size / min(image.size), _MAX_ELONGATION * decode_size / max(image.size))
    if scale >= 1:
        return image
    size = (max(round(scale * image.width), 1), max(round(scale * image.height), 1))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _array_to_image(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"{name} has the shape {array.shape}, but (height, width, 1, 3 or 4 channels) is expected.")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def _decode(read: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return read()
    except UnidentifiedImageError as error:  # its own message shows a Python object in place of the file
        raise ValueError(f"{name} cannot be read: unknown format.") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"
