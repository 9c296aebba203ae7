# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Where tokens look: the region that a token covers, and overlap with the foreground."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..localization_stellar import region_shares, resolve_grid_size


def concept_labels(
    localization: Tensor,
    mask: Tensor,
    num_regions: int,
    threshold: float = 0.8,
    grid_size: tuple[int, int] | None = None,
) -> Tensor:
    """Region that each token stands for: the one that holds at least `threshold` of the token's map.

    A token's map is its column of the localization matrix L (STELLAR, arXiv 2602.01905), normalized to mass 1. A
    patch that several regions share gives each of them its part, by area.

    Args:
        localization: (B, N, r) floating point >= 0; rows sum to 1. Patches are row-major.
        mask: (B, H, W) integers; region of each pixel, from 0 to `num_regions - 1`.
        num_regions: Number of regions.
        threshold: Least share of the token's mass, in (0, 1].
        grid_size: (rows, columns) of the patches; a square grid without it.

    Returns:
        (B, r) int64; region id, or -1 where no region holds enough of the map.

    Raises:
        ValueError: If shapes disagree, a region id or the threshold is out of range, or the grid is unknown.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, but must be in (0, 1]: it is a share of a token's map.")
    shares = region_shares(localization, mask, num_regions, grid_size)
    share, region = shares.max(dim=1)
    # The tolerance keeps a share of exactly the threshold, which float32 sums may miss by a rounding error.
    return torch.where(share >= threshold - 1e-5, region, -1)


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
    batch_size, num_patches, num_tokens = localization.shape
    rows, columns = resolve_grid_size(num_patches, grid_size)
    maps = localization.float().transpose(1, 2).reshape(batch_size, num_tokens, rows, columns)
    maps = F.interpolate(maps, size=foreground_mask.shape[1:], mode="bilinear", align_corners=False)
    pixels = F.one_hot(maps.argmax(dim=1), num_tokens).flatten(1, 2).float()  # (B, H * W, r)
    foreground = foreground_mask.bool().float().flatten(1)
    intersection = (foreground.unsqueeze(1) @ pixels).squeeze(1)  # (B, r)
    union = pixels.sum(dim=1) + foreground.sum(dim=1, keepdim=True) - intersection
    return (intersection / union.clamp(min=1)).amax(dim=1)


def _check_localization(localization: Tensor, mask: Tensor) -> None:
    if localization.ndim != 3 or mask.ndim != 3 or len(localization) != len(mask) or len(mask) == 0:
        raise ValueError(
            f"localization has shape {tuple(localization.shape)} and the mask {tuple(mask.shape)}, "
            "but (B, N, r) and (B, H, W) with the same B >= 1 are expected."
        )
