# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Grids of patches and maps over them: sizes, upsampling, labels of pixels and tokens."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a map, as a standard deviation in units of the image's longer side: a token on one patch still reaches the next
# ones.
_LEAST_SPREAD = 0.05


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


def token_maps(localization: Tensor, grid_size: Sequence[int] | Tensor | None = None) -> Tensor:
    """
    One map for each token: the columns of L on the grid of patches.

    Args:
        localization: L, (B, N, r); rows sum to 1. Patches are row-major.
        grid_size: (rows, columns) of the patches, as in [`resolve_grid_size`]; a square grid without it.

    Returns:
        (B, r, rows, columns) float32, which sums to 1 over the tokens.

    Raises:
        ValueError: If the grid is unknown.
    """
    return localization.float().transpose(1, 2).unflatten(2, resolve_grid_size(localization.shape[1], grid_size))


def upsample_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, r, h, w) at each pixel of images of size (H, W), (B, r, H, W): the bilinear mixture of patches."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_labels(localization: Tensor, size: Sequence[int], grid_size: Sequence[int] | Tensor | None = None) -> Tensor:
    """
    The token to which each pixel of the images belongs: the one whose upsampled map is largest there.

    Args:
        localization: L, (B, N, r); rows sum to 1. Patches are row-major.
        size: Height and width (H, W) of the images.
        grid_size: (rows, columns) of the patches, as in [`resolve_grid_size`]; a square grid without it.

    Returns:
        (B, H, W) int64 indices of tokens.

    Raises:
        ValueError: If the grid is unknown.
    """
    return upsample_maps(token_maps(localization, grid_size), size).argmax(dim=1)


def patch_positions(grid_size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Centers (N, 2) of patches, row-major, as (y, x) float32 in units of the image's longer side."""
    centers = [(torch.arange(side, device=device) + 0.5) / max(grid_size) for side in grid_size]
    return torch.stack(torch.meshgrid(*centers, indexing="ij"), dim=-1).flatten(0, 1)


def means_under_maps(localization: Tensor, dense_features: Tensor) -> Tensor:
    """Means (B, r, d) of dense features D (B, N, d) with the weights of each map of L (B, N, r): L^T D / mass."""
    mass = localization.sum(dim=1).clamp(min=1e-6)
    return localization.transpose(1, 2) @ dense_features / mass.unsqueeze(2)


def spatial_scores(localization: Tensor, positions: Tensor) -> Tensor:
    """
    How well each place fits the map of each token: the logarithm of the isotropic Gaussian with the map's mean and
    variance, up to a constant. It is the E-step of a mixture model whose M-step takes these moments.

    Args:
        localization: L, (B, N, r) float32; rows sum to 1.
        positions: (N, 2), as [`patch_positions`] gives them.

    Returns:
        (B, N, r) float32.
    """
    mass = localization.sum(dim=1).clamp(min=1e-6)  # (B, r)
    mean = means_under_maps(localization, positions)  # (B, r, 2)
    distance = (positions.unsqueeze(1) - mean.unsqueeze(1)).square().sum(dim=3)  # (B, N, r), squared
    variance = (localization * distance).sum(dim=1) / (2 * mass) + _LEAST_SPREAD**2
    return -distance / (2 * variance.unsqueeze(1)) - variance.log().unsqueeze(1)


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
