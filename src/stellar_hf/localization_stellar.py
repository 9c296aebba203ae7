# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Grids of patches and maps over them: sizes, upsampling, labels of pixels and tokens."""

import math
from collections.abc import Sequence

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


def _common_row(grid_size: Tensor) -> list[int]:
    rows = grid_size.reshape(1, -1) if grid_size.ndim < 2 else grid_size.unique(dim=0)
    if len(rows) != 1 or grid_size.is_floating_point():
        raise ValueError(
            f"grid_size is {grid_size.tolist()}, but must be integers (rows, columns), the same for all images of the "
            "batch: images of different sizes need calls of their own."
        )
    return rows[0].tolist()
