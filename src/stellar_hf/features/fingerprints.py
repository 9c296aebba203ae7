# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What features are of: hashes of weights and of data, and how images are prepared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data import undecoded
from .encoding import background_of, image_of, image_rows

_NUM_FINGERPRINT_ROWS = 256


def weights_fingerprint(module: nn.Module) -> str:
    """The first 16 digits of [`weights_sha256`]."""
    return weights_sha256(module)[:16]


def weights_sha256(module: nn.Module) -> str:
    """The SHA-256, 64 hexadecimal digits, over the names, types, shapes and values of all weights and buffers that are
    saved; the same on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def data_fingerprint(dataset: Any, image_column: str = "image", columns: Sequence[str] | None = None) -> str:
    """The first 16 digits of a SHA-256 over the length, the columns, and the contents of 256 rows at equal distances:
    files of images as they are, wherever they lie.

    Args:
        dataset: Images, as in [`encode_images`].
        image_column: Column of the images.
        columns: Further columns that count; by default all.
    """
    rows = undecoded(dataset, image_column) if columns is None else image_rows(dataset, image_column, columns)
    digest = hashlib.sha256(f"{len(rows)} {sorted(map(str, getattr(rows, 'column_names', ())))}\n".encode())
    count = min(len(rows), _NUM_FINGERPRINT_ROWS)
    for number in range(count):
        row = rows[number * len(rows) // count]
        row = dict(row) if isinstance(row, Mapping) and image_column in row else {image_column: row}
        row[image_column] = image_of(row[image_column], image_column)  # the file of a path
        for name in sorted(row):
            if columns is None or name in (image_column, *columns):
                digest.update(name.encode() + b"\0")
                _digest_value(digest, row[name])
    return digest.hexdigest()[:16]


def _digest_value(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        content = value.get("bytes")
        if content is None:
            file = Path(value.get("path") or "")
            content = file.read_bytes() if file.is_file() else b""
        digest.update(content)
    elif isinstance(value, Image.Image):
        digest.update(f"{value.mode} {value.size}".encode())
        with suppress(Exception):  # decoders of broken files raise errors of any kind; who reads the image names it
            digest.update(value.tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    else:
        digest.update(repr(value).encode())


def processor_protocol(processor: Any) -> dict[str, Any]:
    """How an image processor prepares images: sizes in pixels, resampling by the name of Pillow's filter, mean and
    standard deviation, and what is behind transparent pixels."""
    resize = getattr(processor, "size", None) if getattr(processor, "do_resize", False) else None
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    resample = getattr(processor, "resample", None)
    return {
        "resize": _size(resize),
        "crop": _size(crop),
        "resampling": None if resize is None or resample is None else Image.Resampling(int(resample)).name.lower(),
        "mean": list(getattr(processor, "image_mean", None) or []),
        "std": list(getattr(processor, "image_std", None) or []),
        "background": list(background_of(processor)),
    }


def _size(size: Any) -> dict[str, int] | None:
    return None if size is None else {name: value for name, value in dict(size).items() if value is not None}
