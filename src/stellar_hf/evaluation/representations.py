# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""One vector for an image, in each of the ways that a vision encoder offers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..features import encoder_of


def image_representations(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """Vectors that stand for an image, by name: a call of a model for [`encode_images`].

    Args:
        model: Any vision encoder of Transformers, with heads or adapters or without. A ViT-MAE sees all patches.
        pixel_values: (B, 3, H, W) float32.

    Returns:
        (B, d) each, in the dtype of the model. Of a STELLAR model (arXiv 2602.01905) `sparse_mean`, the mean of the
        sparse tokens S, on which the paper measures kNN and the linear probe; `token_0` to `token_<r - 1>`, each of
        them; `cls`; `patch_mean`, the mean of the dense features D; and, if it computes a localization L,
        `lowrank_mean`, the mean over the patches of Z = L S. Of any other encoder `cls`, the first token, if it has
        tokens beside its patches, and `patch_mean`, also of a feature map (B, d, h, w).

    Raises:
        ValueError: If the model's configuration does not tell how large its patches are.
    """
    encoder, output = encode_all_patches(model, pixel_values)
    if output.get("sparse_tokens") is not None:
        return _of_sparse_tokens(output)
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        return {"patch_mean": hidden.mean(dim=(2, 3))}
    num_special = hidden.shape[1] - _num_patches(encoder.config, pixel_values)
    if num_special <= 0:  # none, or a hierarchical encoder, which merges patches
        return {"patch_mean": hidden.mean(dim=1)}
    return {"cls": hidden[:, 0], "patch_mean": hidden[:, num_special:].mean(dim=1)}


def encode_all_patches(model: Any, pixel_values: Tensor) -> tuple[Any, Any]:
    """The encoder in a model, and its output for images (B, 3, H, W): a ViT-MAE drops and shuffles no patches."""
    encoder = encoder_of(model)
    with _all_patches_kept(encoder):
        return encoder, encoder(pixel_values.to(encoder.dtype), **_in_order(encoder, pixel_values))


def _of_sparse_tokens(output: Any) -> dict[str, Tensor]:
    tokens, localization = output.sparse_tokens, output.get("localization")
    hidden = output.last_hidden_state  # CLS, patches, sparse tokens
    representations = {"sparse_mean": tokens.mean(dim=1)}
    representations |= {f"token_{slot}": token for slot, token in enumerate(tokens.unbind(dim=1))}
    representations |= {"cls": hidden[:, 0], "patch_mean": hidden[:, 1 : -tokens.shape[1]].mean(dim=1)}
    if localization is not None:
        representations["lowrank_mean"] = (localization.mean(dim=1, keepdim=True) @ tokens).squeeze(1)
    return representations


def _num_patches(config: Any, pixel_values: Tensor) -> int:
    """Patches of an image, as many as the model's embedding cuts it into."""
    size = getattr(config, "patch_size", None)
    if size is None:
        raise ValueError(
            f"The configuration of a {config.model_type} model has no patch_size, so that its patches are not known "
            "among its tokens: give encode_images a call of your own."
        )
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return (pixel_values.shape[-2] // height) * (pixel_values.shape[-1] // width)


def _in_order(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """ViT-MAE sorts patches by noise, which it draws unless it is given."""
    if model.config.model_type != "vit_mae":
        return {}
    count = _num_patches(model.config, pixel_values)
    return {"noise": torch.arange(count, device=pixel_values.device).float().expand(len(pixel_values), count)}


@contextmanager
def _all_patches_kept(model: Any) -> Iterator[None]:
    """ViT-MAE drops patches in evaluation mode, too."""
    if model.config.model_type != "vit_mae":
        yield
        return
    mask_ratio = model.config.mask_ratio
    model.config.mask_ratio = 0.0
    try:
        yield
    finally:
        model.config.mask_ratio = mask_ratio
