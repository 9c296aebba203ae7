# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The released MaskGIT-VQGAN: where it is, and its keys and sizes in terms of this package.

Sizes are read from the shapes of the tensors. Every key is converted, or an error: the released file has none unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint_stellar import check_shapes, check_state_dict, download, listed, read_tensors, shape_of

RELEASED_REPOSITORY = "fun-research/TiTok"
RELEASED_REVISION = "ab646ed225080a3acb7c78440a574d7f67f16fa7"  # the commit that STELLAR's authors name
RELEASED_FILE = "maskgit-vqgan-imagenet-f16-256.bin"

Model = TypeVar("Model", bound=nn.Module)

_BLOCK_KEYS = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_KEYS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}


# Keys ----------------------------------------------------------------------------------------------------------------


def _converted_key(key: str, num_levels: int) -> str | None:
    """The key in `MaskGitVQModel`, or None for one that is no key of MaskGIT-VQGAN."""
    if key == "quantize.embedding.weight":
        return key
    match = re.fullmatch(r"(encoder|decoder)\.(.+)\.(weight|bias)", key)
    if match is None:
        return None
    side, module, kind = match.groups()
    converted = _converted_module(side, module, num_levels)
    return converted and f"{side}.{converted}.{kind}"


def _converted_module(side: str, module: str, num_levels: int) -> str | None:
    if module in _KEYS:
        return _KEYS[module]
    if match := re.fullmatch(r"mid\.(\d+)\.(\w+)", module):
        return _converted_block(f"mid_block.resnets.{match[1]}", match[2])
    if side == "encoder" and (match := re.fullmatch(r"down\.(\d+)\.block\.(\d+)\.(\w+)", module)):
        return _converted_block(f"down_blocks.{match[1]}.resnets.{match[2]}", match[3])
    if side == "decoder" and (match := re.fullmatch(r"up\.(\d+)\.(?:block\.(\d+)\.(\w+)|upsample_conv)", module)):
        # Released levels count from the highest resolution; ours are in the order of the computation.
        level = num_levels - 1 - int(match[1])
        if level < 0:
            return None
        if match[2] is None:
            return f"upsamplers.{level}.conv"
        return _converted_block(f"up_blocks.{level}.resnets.{match[2]}", match[3])
    return None


def _converted_block(block: str, module: str) -> str | None:
    return f"{block}.{_BLOCK_KEYS[module]}" if module in _BLOCK_KEYS else None


def convert_vq_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Renames released keys to those of [`MaskGitVQModel`].

    Args:
        state_dict: All the released keys.

    Returns:
        The same tensors under new keys.

    Raises:
        ValueError: On keys that MaskGIT-VQGAN does not have; the message lists them.
    """
    num_levels = _count(state_dict, r"encoder\.down\.(\d+)\.")
    new_keys = {key: _converted_key(key, num_levels) for key in state_dict}
    if unknown := [key for key, new_key in new_keys.items() if new_key is None]:
        raise ValueError(
            f"The checkpoint has {len(unknown)} keys that MaskGIT-VQGAN does not have: {listed(unknown)}. Remove them "
            "if they belong to something else."
        )
    return {new_key: state_dict[key] for key, new_key in new_keys.items() if new_key is not None}


# Sizes ---------------------------------------------------------------------------------------------------------------


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state_dict if (match := re.match(pattern, key))})


def _inferred_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    def shape(key: str, num_dims: int = 4) -> torch.Size:
        return shape_of(state_dict, key, [num_dims], "MaskGIT-VQGAN")

    num_levels = max(1, _count(state_dict, r"encoder\.down\.(\d+)\."))
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": tuple(
            shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(num_levels)
        ),
        "layers_per_block": _count(state_dict, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shape("encoder.conv_out.weight")[0],
        "num_vq_embeddings": shape("quantize.embedding.weight", 2)[0],
    }


# Checkpoints ---------------------------------------------------------------------------------------------------------


def download_released(revision: str = RELEASED_REVISION, **hub_arguments: Any) -> Path:
    """
    The released file, in the local cache.

    Args:
        revision: Commit, tag or branch of `RELEASED_REPOSITORY`.
        **hub_arguments: `cache_dir`, `force_download`, `local_files_only` and `token`, as in `from_pretrained`.

    Raises:
        OSError: If it is not in the cache and cannot be downloaded.
    """
    instead = "convert a local copy by stellar-hf convert maskgit-vq --checkpoint FILE"
    return download(RELEASED_REPOSITORY, RELEASED_FILE, revision, instead, **hub_arguments)


def load_checkpoint(model_class: Callable[..., Model], checkpoint: str | Path | Mapping[str, Tensor]) -> Model:
    """`convert_vq_checkpoint` of `conversion/` for [`MaskGitVQModel`], which imports this file, as `model_class`."""
    if isinstance(checkpoint, (str, Path)):
        instead = f"pass {RELEASED_FILE} of {RELEASED_REPOSITORY}"
        state_dict, what = read_tensors(Path(checkpoint), instead), f"{checkpoint}"
    else:
        state_dict, what = checkpoint, "The checkpoint"
    check_state_dict(state_dict, what)
    sizes = _inferred_sizes(state_dict)
    weights = convert_vq_state_dict(state_dict)
    model = model_class(**sizes)
    check_shapes(weights, model.state_dict())
    model.load_state_dict(weights)
    return model.eval()
