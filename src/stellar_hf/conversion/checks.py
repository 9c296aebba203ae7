# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What every conversion asks of its input and output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download
from torch import Tensor


def listed(names: Iterable[str]) -> str:
    """Names in order, for a message."""
    return ", ".join(sorted(names))


def check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises a `ValueError` unless both state dicts have the same keys and shapes; the message lists differences."""
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"The checkpoint lacks weights for {len(missing)} keys: {listed(missing)}.")
    if surplus := weights.keys() - expected.keys():
        raise ValueError(f"The configuration has no place for {len(surplus)} weights: {listed(surplus)}.")
    different = [
        f"{key} is {tuple(tensor.shape)} instead of {tuple(expected[key].shape)}"
        for key, tensor in weights.items()
        if tensor.shape != expected[key].shape
    ]
    if different:
        raise ValueError(f"Weights and configuration contradict each other: {listed(different)}.")


def check_output(folder: Path) -> None:
    """Raises a `FileExistsError` unless the folder is new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another --output.")


def download(repository: str, file: str) -> Path:
    """A file of the Hub in the local cache; raises an `OSError` of one sentence if it cannot be had."""
    try:
        return Path(hf_hub_download(repository, file))
    except OSError as error:
        raise OSError(
            f"{file} of {repository} cannot be downloaded ({type(error).__name__}): check the connection, or pass "
            "a local copy as --checkpoint."
        ) from error
