# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The encoder's first weights from a plain ViT: ViT, ViT-MAE or DINOv2."""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import PreTrainedModel

# Names in a ViT's state dict, as DINOv2 and older layouts have them, and ours.
_VIT_NAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
_UNUSED_OF_VIT = re.compile(r"^pooler\.|^embeddings\.mask_token$")
_NEW_TO_VIT = re.compile(r"^embeddings\.sparse_tokens$|^(localization|token_refinement)\.")
_POSITIONS = "embeddings.position_embeddings"


def config_fields_of_vit(config: Any) -> dict[str, Any]:
    """The fields of `StellarConfig` that a ViT's configuration decides; `ValueError` unless its sizes are square."""
    names = (
        "hidden_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps num_channels qkv_bias "
        "initializer_range hidden_dropout_prob attention_probs_dropout_prob image_size patch_size intermediate_size"
    )
    fields = {name: getattr(config, name) for name in names.split() if hasattr(config, name)}
    if "intermediate_size" not in fields and hasattr(config, "mlp_ratio"):
        fields["intermediate_size"] = int(config.hidden_size * config.mlp_ratio)
    for name in ("image_size", "patch_size"):
        value = fields.get(name)
        if isinstance(value, list | tuple) and len(set(value)) == 1:
            fields[name] = value[0]
        elif not isinstance(value, int):
            raise ValueError(f"The checkpoint's {name} is {value}, but STELLAR takes over square ones only.")
    return fields


def load_vit_into_encoder(vit: PreTrainedModel, encoder: nn.Module, source: str) -> tuple[list[str], list[str]]:
    """
    Copies the weights of a ViT to a `StellarModel`, with positions interpolated and layer scales multiplied in.

    Args:
        vit: The ViT.
        encoder: The `StellarModel`.
        source: What errors call the ViT.

    Returns:
        Names of the encoder's tensors that are the ViT's, and names of the ViT's that are not used.

    Raises:
        ValueError: If the ViT has other tensors than the encoder, or tensors of other shapes.
    """
    state_dict, expected = vit.state_dict(), encoder.state_dict()
    weights = _under_our_names(state_dict)
    _multiply_layer_scales_in(weights)
    if _POSITIONS in weights:
        weights[_POSITIONS] = _positions_for(expected[_POSITIONS].shape[1], weights[_POSITIONS])
    _check_fit(weights, expected, source)
    encoder.load_state_dict(weights, strict=False)
    return list(weights), [name for name in state_dict if _UNUSED_OF_VIT.search(name)]


def _under_our_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, weight in state_dict.items():
        if not _UNUSED_OF_VIT.search(name):
            for pattern, replacement in _VIT_NAMES:
                name = re.sub(pattern, replacement, name)
            weights[name] = weight
    return weights


def _multiply_layer_scales_in(weights: dict[str, torch.Tensor]) -> None:
    """Replaces each of DINOv2's layer scales by a factor of the projection before it."""
    for number, scaled in (("1", "attention.o_proj"), ("2", "mlp.fc2")):
        suffix = f"layer_scale{number}.lambda1"
        for name in [name for name in weights if name.endswith(suffix)]:
            scale = weights.pop(name)
            for part, factor in (("weight", scale[:, None]), ("bias", scale)):
                target = f"{name.removesuffix(suffix)}{scaled}.{part}"
                if target in weights:  # gated MLPs have others, and are refused later
                    weights[target] = factor * weights[target]


def _positions_for(num_positions: int, position_embeddings: torch.Tensor) -> torch.Tensor:
    """Position embeddings (1, 1 + n * n, d) of CLS and patches for another square grid of patches."""
    if position_embeddings.shape[1] == num_positions:
        return position_embeddings
    cls_position, positions = position_embeddings.split([1, position_embeddings.shape[1] - 1], dim=1)
    side = math.isqrt(num_positions - 1)
    return torch.cat([cls_position, resized_positions(positions, (side, side))], dim=1)


def _check_fit(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], source: str) -> None:
    old = {name: weight.shape for name, weight in expected.items() if not _NEW_TO_VIT.search(name)}
    misfits = sorted(name for name in {*weights, *old} if name not in weights or old.get(name) != weights[name].shape)
    if misfits:
        raise ValueError(
            f"{source} is no plain ViT: {', '.join(misfits[:4])} do not fit STELLAR's encoder. Take a ViT, ViT-MAE or "
            "DINOv2 checkpoint without registers and gated MLPs."
        )


def resized_positions(positions: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1, n * n, d) of patches, without CLS, interpolated bicubically to (1, h * w, d)."""
    side = math.isqrt(positions.shape[1])
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    # In float32: bicubic weights in half precision shift the positions.
    resized = F.interpolate(grid.float(), size=grid_size, mode="bicubic", align_corners=False)
    return resized.to(positions.dtype).flatten(2).transpose(1, 2)
