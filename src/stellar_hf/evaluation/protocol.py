# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What was measured, and how: the protocol that every number carries, and the file that results are kept in."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..hub_stellar import replace_text

# Packages whose code takes part in a number.
_PACKAGES = ("torch", "transformers", "datasets", "numpy", "pillow", "scikit-learn", "scipy", "torchmetrics")
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


def hub_revision(dataset: Any) -> str | None:
    """The commit of the Hub's data set that a `datasets.Dataset` was loaded from; None if it was not, or it is not
    known."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    for source in sources:
        if match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", str(source)):
            return match[1]
    return None
