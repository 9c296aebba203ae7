# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What every conversion asks of its input and output, and how its command ends."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def run_command(parser: ArgumentParser, convert: Callable[[Namespace], None], argv: Sequence[str] | None) -> None:
    """Runs a conversion with the parsed arguments; a wrong input ends it with one sentence on stderr, exit code 2."""
    arguments = parser.parse_args(argv)
    try:
        convert(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def download(repository: str, file: str, option: str = "--checkpoint") -> Path:
    """A file of the Hub in the local cache; an `OSError` of one sentence if it cannot be had, which names `option`."""
    try:
        return Path(hf_hub_download(repository, file))
    except OSError as error:
        raise OSError(
            f"{file} of {repository} cannot be downloaded ({type(error).__name__}): check the connection, or pass "
            f"a local copy as {option}."
        ) from error
