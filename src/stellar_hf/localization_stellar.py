# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Grids of patches and maps over them: sizes, upsampling, labels of pixels and tokens."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resolve_grid_size(num_patches: int, grid_size: Sequence[int] | Tensor | None = None) -> tuple[int, int]:
    """
    Rows and columns of a patch grid, in whichever form they are given.

    Args:
        num_patches: Number N of patches.
        grid_size: (rows, columns); or, as models return it, an int64 tensor (B, 2) with equal rows, or one row (2,) of
            it. Needed where the grid is not square.

    Returns:
        (rows, columns) with `rows * columns == num_patches`.

    Raises:
        ValueError: If N is not a square number and there is no grid size; or if the grid size is not a pair of
            positive numbers, differs within the batch, or does not have N patches.
    """
    if isinstance(grid_size, Tensor):
        grid_size = _common_row(grid_size)
    side = math.isqrt(num_patches)
    sizes = (side, side) if grid_size is None else tuple(grid_size)
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != num_patches:
        raise ValueError(
            f"localization has {num_patches} patches and grid_size is {grid_size and sizes}: pass "
            f"grid_size=(rows, columns) with rows * columns = {num_patches}."
        )
    return sizes


def region_shares(
    localization: Tensor, mask: Tensor, num_regions: int, grid_size: Sequence[int] | Tensor | None = None
) -> Tensor:
    """
    Share of each token's map that lies in each region of an image.

    A token's map is its column of the localization matrix L (STELLAR, arXiv 2602.01905), normalized to mass 1. A
    patch that several regions share gives each of them its part, by area.

    Args:
        localization: L, (B, N, r) floating point >= 0; rows sum to 1. Patches are row-major.
        mask: (B, H, W) integers; region of each pixel, from 0 to `num_regions - 1`.
        num_regions: Number of regions.
        grid_size: (rows, columns) of the patches; a square grid without it.

    Returns:
        (B, num_regions, r) float32, which sums to 1 over the regions.

    Raises:
        ValueError: If shapes disagree, a region id is out of range, or the grid is unknown.
    """
    if localization.ndim != 3 or mask.ndim != 3 or len(localization) != len(mask) or len(mask) == 0:
        raise ValueError(
            f"localization has shape {tuple(localization.shape)} and the mask {tuple(mask.shape)}, "
            "but (B, N, r) and (B, H, W) with the same B >= 1 are expected."
        )
    if mask.min() < 0 or mask.max() >= num_regions:
        raise ValueError(
            f"mask holds region ids from {mask.min()} to {mask.max()}, but num_regions is {num_regions}: "
            "ids must lie between 0 and num_regions - 1."
        )
    regions = F.one_hot(mask.long(), num_regions).permute(0, 3, 1, 2).float()
    grid_size = resolve_grid_size(localization.shape[1], grid_size)
    patch_shares = F.adaptive_avg_pool2d(regions, grid_size).flatten(2)  # (B, regions, N)
    mass = localization.float().clamp(min=0)
    return (patch_shares @ mass) / mass.sum(dim=1, keepdim=True).clamp(min=1e-12)


def _common_row(grid_size: Tensor) -> list[int]:
    rows = grid_size.reshape(1, -1) if grid_size.ndim < 2 else grid_size.unique(dim=0)
    if len(rows) != 1 or grid_size.is_floating_point():
        raise ValueError(
            f"grid_size is {grid_size.tolist()}, but must be integers (rows, columns), the same for all images of the "
            "batch: images of different sizes need calls of their own."
        )
    return rows[0].tolist()
