# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Where tokens look: overlap with the foreground."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..features.checks import check_tensors
from ..localization_stellar import concept_labels, pixel_labels


def localization_iou(localization: Tensor, foreground_mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Intersection over union of the foreground and the best-matching token's pixels, for each image.

    Token maps are upsampled bilinearly to the mask's size and each pixel is given to its largest token. The token
    whose pixels overlap best with the foreground counts; its mean over images is the localization mIoU.

    Args:
        localization: (B, N, r) floating point; rows sum to 1. Patches are row-major.
        foreground_mask: (B, H, W) bool (or 0 and 1), true on the foreground.
        grid_size: (rows, columns) of the patches.

    Returns:
        (B,) float32 in [0, 1].

    Raises:
        ValueError: If shapes disagree or the grid does not have N patches.
    """
    _check_localization(localization, foreground_mask)
    labels = pixel_labels(localization, foreground_mask.shape[1:], grid_size)
    pixels = F.one_hot(labels, localization.shape[2]).flatten(1, 2).float()  # (B, H * W, r)
    foreground = foreground_mask.bool().float().flatten(1)
    intersection = (foreground.unsqueeze(1) @ pixels).squeeze(1)  # (B, r)
    union = pixels.sum(dim=1) + foreground.sum(dim=1, keepdim=True) - intersection
    return (intersection / union.clamp(min=1)).amax(dim=1)


def _check_localization(localization: Tensor, mask: Tensor) -> None:
    check_tensors(localization=localization, foreground_mask=mask)
    if localization.ndim != 3 or mask.ndim != 3 or len(localization) != len(mask) or len(mask) == 0:
        raise ValueError(
            f"localization has shape {tuple(localization.shape)} and the mask {tuple(mask.shape)}, "
            "but (B, N, r) and (B, H, W) with the same B >= 1 are expected."
        )


__all__ = ["concept_labels", "localization_iou"]
