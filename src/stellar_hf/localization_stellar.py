# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Grids of patches and maps over them: sizes, upsampling, labels of pixels and tokens."""

import math


def resolve_grid_size(num_patches: int, grid_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of a patch grid.

    Args:
        num_patches: Number N of patches.
        grid_size: (rows, columns), needed where the grid is not square.

    Returns:
        (rows, columns) with `rows * columns == num_patches`.

    Raises:
        ValueError: If N is not a square number and there is no grid size, or the grid size does not have N patches.
    """
    side = math.isqrt(num_patches)
    rows, columns = grid_size or (side, side)
    if rows * columns != num_patches:
        raise ValueError(
            f"localization has {num_patches} patches and grid_size is {grid_size}: pass grid_size=(rows, columns) "
            f"with rows * columns = {num_patches}."
        )
    return rows, columns
