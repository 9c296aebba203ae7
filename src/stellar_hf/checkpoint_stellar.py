# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Checkpoints of others: how they are downloaded and read, and what must be true of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def listed(names: Iterable[str]) -> str:
    """Names in order, for a message."""
    return ", ".join(sorted(names))


def read_tensors(path: Path, instead: str) -> Any:
    """
    What a file of weights holds: a state dict, or for a pickle whatever was saved.

    Args:
        path: A `.safetensors` file, or one that `torch.save` wrote, which is loaded as mere tensors.
        instead: What to do where that fails, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another format, or holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): {instead}.") from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle is a program of random steps, which ends in any error
        raise ValueError(f"{path} cannot be loaded as mere tensors, or is damaged: {instead}.") from error


def check_state_dict(state_dict: Any, what: str) -> None:
    """Raises a `ValueError` that begins with `what` unless it is a mapping of names to floating point tensors."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{what} is a {type(state_dict).__name__}, but must map names to tensors.")
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{what} maps {key!r} to a {type(tensor).__name__}, but must map names to tensors: take the state "
                "dict alone."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{what} has a tensor {key} of {tensor.dtype}, but weights must be floating point.")


def shape_of(state_dict: Mapping[str, Tensor], key: str, num_dims: Sequence[int], what: str) -> torch.Size:
    """The shape of a tensor that tells sizes; a `ValueError` if the state dict, which is of `what`, lacks it."""
    if key not in state_dict:
        raise ValueError(f"This is not a checkpoint of {what}, or not a whole one: it has no tensor {key}.")
    shape = state_dict[key].shape
    if len(shape) not in num_dims:
        raise ValueError(
            f"This is not a checkpoint of {what}: {key} has shape {tuple(shape)}, but must have "
            f"{' or '.join(map(str, num_dims))} dimensions."
        )
    return shape


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


# Arguments of a download, which loading a released checkpoint takes as `from_pretrained` does.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


def download(repository: str, file: str, revision: str, instead: str, **hub_arguments: Any) -> Path:
    """
    A file of the Hub in the local cache. A commit that is there is neither downloaded again nor asked for.

    Args:
        repository: As owner/name.
        file: Its path in the repository.
        revision: Commit, tag or branch.
        instead: What to do where it cannot be had, for the message.
        **hub_arguments: Those of `HUB_ARGUMENTS`.

    Raises:
        OSError: If it cannot be had, in a sentence.
    """
    try:
        return Path(hf_hub_download(repository, file, revision=revision, **hub_arguments))
    except RevisionNotFoundError as error:
        raise OSError(f"{repository} has no revision {revision!r}: take a commit, tag or branch of it.") from error
    except OSError as error:
        raise OSError(
            f"{file} of {repository} cannot be downloaded ({type(error).__name__}): check the connection, or "
            f"{instead}."
        ) from error
