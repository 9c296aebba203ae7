# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Features on disk as the rows of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .shards import load_features

if TYPE_CHECKING:
    import datasets


class ExtractedTokens(Dataset):
    """
    Rows of `sparse_tokens`, (r, d) float32, `localization`, (N, r) float32, and, where there are labels,
    `class_labels`, int64 scalars. They are read as they are needed, from the copy that `datasets` keeps in its cache.

    Args:
        folder: What [`save_features`] has written: its folder, or the `features` in it.

    Raises:
        ValueError: If there are no such features or not yet all of them, images have grids of different sizes, or
            labels are not integers of at least 0.
    """

    def __init__(self, folder: str | Path):
        rows = load_features(folder)
        if "tokens" not in rows.features or "grid_size" not in rows.features:
            raise ValueError(f"{folder} has the columns {list(rows.features)}, but no tokens and no grid_size.")
        grids = {tuple(grid) for batch in rows.select_columns("grid_size").iter(10000) for grid in batch["grid_size"]}
        if len(grids) != 1:
            raise ValueError(
                f"The images of {folder} have patch grids of {len(grids)} sizes ({sorted(grids)[:3]}, …), but one is "
                "needed: extract them with an image processor that crops."
            )
        (self.grid_size,) = grids
        labels = rows["label"][:] if "label" in rows.features else [0]
        if not all(isinstance(label, int) and label >= 0 for label in labels):
            raise ValueError(
                f"Labels of {folder} must be integers of at least 0, but there is {min(set(labels), key=str)!r}: "
                "leave out images without a class, or all labels."
            )
        self._num_labels = max(labels) + 1
        unused = [name for name in ("index", "path", "grid_size") if name in rows.features]
        self._rows: datasets.Dataset = rows.remove_columns(unused).with_format("torch")

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, None where images have no labels or these no names."""
        return getattr(self._rows.features.get("label"), "names", None)

    @property
    def num_classes(self) -> int:
        """One more than the largest label, or the number of names; 0 without labels."""
        if "label" not in self._rows.features:
            return 0
        return len(self.class_names or []) or self._num_labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index]
        result = {"sparse_tokens": row["tokens"].float(), "localization": _localization(row)}
        return {**result, "class_labels": row["label"]} if "label" in row else result


def _localization(row: dict[str, Any]) -> Tensor:
    """(N, r) float32 whose rows sum to 1, also where only the largest entries were kept, or in float16."""
    if "localization" in row:
        localization = row["localization"].float()
    else:
        values, indices = row["localization_values"].float(), row["localization_indices"].long()
        localization = torch.zeros(len(values), len(row["tokens"])).scatter_(1, indices, values)
    return localization / localization.sum(dim=-1, keepdim=True)
