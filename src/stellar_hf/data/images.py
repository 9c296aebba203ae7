# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Reading images of any kind, and batches of them for the workers of a data loader."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..image_processing_pil_stellar import WHITE, check_background, to_rgb
from .views import StellarViews

# Names of Pillow's formats. Others describe drawings, which programs such as Ghostscript would have to run.
_RASTER_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")

# Longer sides than this many times the decode size are reduced as well: one panorama would pad a whole batch.
_MAX_ELONGATION = 3


@dataclass
class StellarCollator:
    """Turns rows with images into one uint8 batch; a `collate_fn` for the workers of a DataLoader.

    Workers only decode and resize, and a batch crosses the bus in bytes; [`StellarViews`] makes the views of it where
    the model is. An image that cannot be read is replaced by another one of its batch, or left out, and reported.
    Nothing random is drawn unless `views` are made here.

    Attributes:
        image_column: Name of the column that holds the images, in a form that [`images_to_tensor`] takes.
        decode_size: Short sides above it are reduced to it, in pixels; `None` leaves all sizes as they are.
        views: If given, the views are made here, in the worker. Their random draws come from torch's global
            generator, which a DataLoader seeds differently in each of its workers.
        background: Red, green and blue behind transparent pixels, integers in [0, 255].
        leave_out_unreadable: Whether images that cannot be read are left out, so that no measure counts another one
            twice. The batch is then smaller; where nothing is left, it is one black image, for a model that is sharded
            over processes, which must all call it.

    Raises:
        ValueError: If a setting is of another type or out of its range.
    """

    image_column: str = "image"
    decode_size: int | None = None
    views: StellarViews | None = None
    background: Sequence[int] = WHITE
    leave_out_unreadable: bool = False

    def __post_init__(self) -> None:
        _check_decode_size(self.decode_size)
        check_background(self.background)
        if self.views is not None and not callable(self.views):
            raise ValueError(f"views is a {type(self.views).__name__}, but StellarViews are expected.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes one batch; images of different sizes may stand side by side.

        Args:
            examples: Rows of a dataset.

        Returns:
            `images`, (B, 3, H, W) uint8, each image in the upper left corner of zeros, and `image_sizes`, (B, 2)
            int64, the height and width of each; with `views` what they make of them instead. If images could not be
            read, also `unreadable`: a sentence for each; where they are left out, also `num_readable`, a number that
            may be 0.

        Raises:
            ValueError: If there is no example, the image column is missing, or no image of the batch can be read and
                they are not to be left out.
        """
        if not isinstance(examples, (list, tuple)) or not examples:
            raise ValueError(f"The batch is {_describe(examples)}, but a list of at least 1 example is expected.")
        for example in examples:
            if not isinstance(example, Mapping):
                raise ValueError(
                    f"An example is {_describe(example)}, but a row, from columns to values, is expected."
                )
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
        if unreadable:
            batch["unreadable"] = unreadable
            if self.leave_out_unreadable:
                batch["num_readable"] = len(examples) - len(unreadable)
        return batch

    def _read(self, images: list[Any]) -> tuple[list[Tensor], list[str]]:
        """The images, without those that cannot be read or with others in their place, and what is wrong with each of
        the latter."""
        tensors: list[Tensor | None] = []
        unreadable = []
        for index, image in enumerate(images):
            try:
                tensors.append(_image_to_tensor(image, index, self.decode_size, self.background))
            except ValueError as error:
                tensors.append(None)
                unreadable.append(str(error))
        readable = [tensor for tensor in tensors if tensor is not None]
        if self.leave_out_unreadable:
            return readable or [torch.zeros(3, 8, 8, dtype=torch.uint8)], unreadable
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


def images_to_tensor(
    images: Sequence[Any], decode_size: int | None = None, background: Sequence[int] = WHITE
) -> list[Tensor]:
    """Reads images as [`read_image`] does.

    Args:
        images: Files, undecoded images of a dataset, PIL images or arrays.
        decode_size: Short sides above it are reduced to it, in pixels, antialiased.
        background: Red, green and blue behind transparent pixels, integers in [0, 255].

    Returns:
        One uint8 tensor of shape (3, H, W) for each image.

    Raises:
        ValueError: If an image cannot be read or is of another type; names its file, or its place in the batch.
    """
    if not isinstance(images, Sequence):
        raise ValueError(f"images is {_describe(images)}, but a list of images is expected.")
    return [_image_to_tensor(image, index, decode_size, background) for index, image in enumerate(images)]


def _image_to_tensor(image: Any, index: int, decode_size: int | None, background: Sequence[int]) -> Tensor:
    rgb = read_image(image, decode_size, background, name=f"Image {index} of the batch")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def read_image(
    image: Any, decode_size: int | None = None, background: Sequence[int] = WHITE, name: str = "The image"
) -> Image.Image:
    """Reads an image of any kind as RGB, upright according to its EXIF orientation.

    Args:
        image: Path of a file; an undecoded image of a dataset, a mapping with `bytes` or `path`; a PIL image; or a
            uint8 array of shape (H, W) or (H, W, C) with 1, 3 or 4 channels. Gray of 16 bits is scaled to 8. Files of
            raster formats only are opened.
        decode_size: A short side above it is reduced to it, in pixels, antialiased.
        background: Red, green and blue behind transparent pixels, integers in [0, 255].
        name: What errors call an image that has no file.

    Returns:
        A new image of mode `RGB`.

    Raises:
        ValueError: If the image cannot be read or is of another type; names its file, or `name`.
    """
    _check_decode_size(decode_size)
    check_background(background)
    file = _file_of(image)
    name = os.fspath(file) if file else name
    try:
        image = _opened(image, file, decode_size)
        return _reduced(to_rgb(ImageOps.exif_transpose(image), background), decode_size)
    except UnidentifiedImageError as error:  # its own message shows a Python object in place of the file
        raise ValueError(f"{name} cannot be read: unknown format.") from error
    except Exception as error:  # decoders of broken files raise errors of any kind
        reason = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"{name} cannot be read: {reason}.") from error


def _file_of(image: Any) -> str | os.PathLike | None:
    if isinstance(image, (str, os.PathLike)):
        return image
    file = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None)
    return file if file and isinstance(file, (str, os.PathLike)) else None


def _check_decode_size(decode_size: int | None) -> None:
    if decode_size is not None and (not isinstance(decode_size, int) or decode_size < 1):
        raise ValueError(f"decode_size is {decode_size!r}, but must be a whole number, at least 1, or None.")


def _opened(image: Any, file: str | os.PathLike | None, decode_size: int | None) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        return _open(_bytes_of(image), decode_size)
    if isinstance(image, Mapping) and (file or image.get("bytes") is not None):
        return _open(image["bytes"] if image.get("bytes") is not None else _bytes_of(file), decode_size)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        return _array_to_image(image)
    if isinstance(image, Image.Image):
        return image
    raise ValueError(
        f"it is {_describe(image)}, but a file, a PIL image, or a uint8 array of shape (height, width, channels), is "
        "expected"
    )


def _bytes_of(file: Any) -> bytes:
    """Of a local file, or of one that Datasets gives a URL of."""
    if "://" in str(file):
        import fsspec

        with fsspec.open(file) as stream:
            return stream.read()
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")  # reading a pipe would wait forever
    with open(file, "rb") as stream:
        return stream.read()


def _open(data: bytes, decode_size: int | None) -> Image.Image:
    if not data:
        raise ValueError("it is empty")
    Image.init()
    image = Image.open(io.BytesIO(data), formats=[name for name in _RASTER_FORMATS if name in Image.OPEN])
    if decode_size is not None:
        image.draft("RGB", (decode_size, decode_size))  # a JPEG is then decoded at a fraction of its size
    return image


def _reduced(image: Image.Image, decode_size: int | None) -> Image.Image:
    if decode_size is None:
        return image
    scale = min(decode_size / min(image.size), _MAX_ELONGATION * decode_size / max(image.size))
    if scale >= 1:
        return image
    size = (max(round(scale * image.width), 1), max(round(scale * image.height), 1))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _array_to_image(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"it has the shape {array.shape}, but (height, width, 1, 3 or 4 channels) is expected")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    is_empty = isinstance(value, (list, tuple, Mapping)) and not value
    return f"{'an empty' if is_empty else 'a'} {type(value).__name__}"
