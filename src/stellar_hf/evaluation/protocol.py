# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What was measured, and how: the protocol that every number carries, and the file that results are kept in."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

from ..data import undecoded
from ..hub_stellar import replace_text

# Packages whose code takes part in a number.
_PACKAGES = ("torch", "transformers", "datasets", "numpy", "pillow", "scikit-learn", "scipy", "torchmetrics")
_NUM_FINGERPRINT_ROWS = 256
_FORMAT = 1


@dataclass(frozen=True)
class Result:
    """What one task says of one model.

    Attributes:
        model: Name of the model or baseline, as tables show it.
        kind: "model", "untrained" (its architecture with random weights) or "baseline" (nothing was trained).
        task: Name of the task.
        protocol: How it was measured, so that an equal protocol gives equal numbers: the model and the hash of its
            weights, the data with their fingerprint, the preparation of images, the task's settings, the seed.
        metrics: Numbers by name, by what of the model they are of: `{"sparse_mean": {"accuracy": 0.7}}`.
        source: Folder or name on the Hub of the model; None for what was not loaded.
        versions: Versions of the packages, and the machine.
        date: When it was measured, in ISO 8601.
        seconds: How long it took.
    """

    model: str
    kind: str
    task: str
    protocol: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    source: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    seconds: float = 0.0


class ResultFile:
    """The results of an evaluation in a JSON file, which is replaced as a whole whenever one is added: what a killed
    run has finished is in it. Several runs may write to it.

    Args:
        path: The file, which need not exist.

    Raises:
        ValueError: If there is a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.read()

    def read(self) -> list[Result]:
        """All results, in the order in which they were added."""
        if not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return [Result(**result) for result in content["results"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path} is no file of results that this version can read ({error}): move it away, or choose "
                "another output folder."
            ) from error

    def find(self, model: str, task: str, protocol: Mapping[str, Any]) -> Result | None:
        """The result of a model and a task that were measured by an equal protocol, if there is one."""
        wanted = as_json(protocol)
        for result in self.read():
            if (result.model, result.task) == (model, task) and result.protocol == wanted:
                return result
        return None

    def add(self, result: Result) -> None:
        """Adds a result; one of the same model, task and protocol is replaced."""
        result = dataclasses.replace(result, protocol=as_json(result.protocol), metrics=as_json(result.metrics))
        key = (result.model, result.task, result.protocol)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            results = [other for other in self.read() if (other.model, other.task, other.protocol) != key]
            content = {"format": _FORMAT, "results": [dataclasses.asdict(other) for other in [*results, result]]}
            replace_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples as lists, keys as text, numbers of NumPy and torch as Python's.

    Raises:
        TypeError: If JSON has no form for it.
    """
    return json.loads(json.dumps(value, default=_item))


def _item(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"A {type(value).__name__} does not belong into a file of results: {value!r}")


# Parts of a protocol -------------------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """The versions of Python and the packages that take part in a number, as far as they are installed."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("stellar_hf", *_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


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


def data_fingerprint(dataset: Any, image_column: str = "image") -> str:
    """The first 16 digits of a SHA-256 over the length, the columns, and the contents of 256 rows at equal distances:
    files of images as they are, wherever they lie.

    Args:
        dataset: `datasets.Dataset`.
        image_column: Column of the images.
    """
    rows = undecoded(dataset, image_column)
    digest = hashlib.sha256(f"{len(rows)} {sorted(map(str, rows.column_names))}\n".encode())
    count = min(len(rows), _NUM_FINGERPRINT_ROWS)
    for number in range(count):
        row = rows[number * len(rows) // count]
        for name in sorted(row):
            digest.update(name.encode() + b"\0")
            _digest_value(digest, row[name])
    return digest.hexdigest()[:16]


def _digest_value(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        content = value["bytes"]
        if content is None:
            file = Path(value["path"])
            content = file.read_bytes() if file.is_file() else b""
        digest.update(content)
    elif isinstance(value, Image.Image):
        digest.update(f"{value.mode} {value.size}".encode() + value.tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    else:
        digest.update(repr(value).encode())


def hub_revision(dataset: Any) -> str | None:
    """The commit of the Hub's data set that a `datasets.Dataset` was loaded from; None if it was not, or it is not
    known."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    for source in sources:
        if match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", str(source)):
            return match[1]
    return None


def processor_protocol(processor: Any) -> dict[str, Any]:
    """How an image processor prepares images: sizes in pixels, resampling by the name of Pillow's filter, mean and
    standard deviation."""
    resize = getattr(processor, "size", None) if getattr(processor, "do_resize", False) else None
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    resample = getattr(processor, "resample", None)
    return {
        "resize": _size(resize),
        "crop": _size(crop),
        "resampling": None if resize is None or resample is None else Image.Resampling(int(resample)).name.lower(),
        "mean": list(getattr(processor, "image_mean", None) or []),
        "std": list(getattr(processor, "image_std", None) or []),
    }


def _size(size: Any) -> dict[str, int] | None:
    return None if size is None else {name: value for name, value in dict(size).items() if value is not None}
