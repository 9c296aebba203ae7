# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Metrics of reconstruction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..features.checks import check_tensors


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, for a peak of 1.

    Args:
        reconstruction: (B, C, H, W) floating point, clamped to [0, 1] here.
        target: (B, C, H, W) floating point in [0, 1].

    Returns:
        (B,) float32 in dB; infinite where an image is reproduced exactly.

    Raises:
        ValueError: If the shapes differ, are not four-dimensional or empty, or the target is not in [0, 1].
    """
    check_tensors(reconstruction=reconstruction, target=target)
    if reconstruction.shape != target.shape or target.ndim != 4 or target.numel() == 0:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)} and target {tuple(target.shape)}, "
            "but both must be (B, C, H, W) with at least one image."
        )
    if not target.is_floating_point() or not (target.min() >= 0 and target.max() <= 1):  # NaN is not either
        raise ValueError(
            f"target is {target.dtype} between {target.min():.3g} and {target.max():.3g}, but must be floating point "
            "in [0, 1]: pass RGB before normalization."
        )
    error = reconstruction.float().clamp(0, 1) - target.float()
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def tokens_and_psnr(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The call of a STELLAR model for [`encode_images`] that also measures how well it reconstructs pixels.

    Args:
        model: `StellarForPreTraining` or `StellarForImageReconstruction`.
        pixel_values: (B, 3, H, W) float32, normalized.

    Returns:
        `pooler_output` (B, d), `sparse_tokens` (B, r, d), `localization` (B, N, r) and, with the pixel head, `psnr`
        (B,) in dB: of the image without what its patches do not tile.
    """
    output = model(pixel_values.to(model.dtype), return_loss=False)
    features = {
        "pooler_output": output.sparse_tokens.float().mean(dim=1),
        "sparse_tokens": output.sparse_tokens,
        "localization": output.localization,
    }
    if model.config.reconstruction_target == "pixels":
        height, width = output.reconstruction.shape[-2:]
        target = model.denormalize(pixel_values)[..., :height, :width].clamp(0, 1)
        features["psnr"] = psnr(output.reconstruction.float(), target)
    return features
