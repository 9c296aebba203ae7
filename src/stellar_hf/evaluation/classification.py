# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Classes of images: what two data sets call the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A class by its number, or by its name.
Class = int | str


@dataclass
class MatchedClasses:
    """The classes of two data sets, numbered alike.

    Attributes:
        train_labels: (n,) int64, -1 for no class.
        test_labels: (m,) int64, -1 for no class, and for one whose name the training images do not have.
        classes: Name of each number, or what number it has in the data sets.
        unknown: Names that only the test images have, sorted.
    """

    train_labels: Tensor
    test_labels: Tensor
    classes: list[Class]
    unknown: list[str]


def class_names(dataset: Any, label_column: str = "label") -> list[str] | None:
    """Names of a data set's classes, None where it does not tell them."""
    return getattr((getattr(dataset, "features", None) or {}).get(label_column), "names", None)


def match_classes(
    train_labels: Sequence[Any],
    test_labels: Sequence[Any],
    train_names: Sequence[str] | None = None,
    test_names: Sequence[str] | None = None,
) -> MatchedClasses:
    """Numbers the classes of two data sets alike: by name where both know names, or else by what the labels are.

    Two folders of images number their classes by the subfolders that each has; the same number is then another class.

    Args:
        train_labels: n labels: integers, or names; None or a negative number for no class.
        test_labels: The m labels of the test rows, of the same kinds.
        train_names: Name of each integer among the training labels, as [`class_names`] gives them.
        test_names: The same of the test labels.

    Returns:
        The labels of both.
    """
    if train_names is None or test_names is None:
        train_names = test_names = None
    train = [_class_of(label, train_names) for label in train_labels]
    test = [_class_of(label, test_names) for label in test_labels]
    unknown: set[Class] = set()
    if train_names is not None:
        unknown = {name for name in test if name is not None and name not in train_names}
        test = [None if name in unknown else name for name in test]
    classes = [name for name in dict.fromkeys([*train, *test]) if name is not None]
    numbers: dict[Class | None, int] = {None: -1, **{name: number for number, name in enumerate(classes)}}
    return MatchedClasses(
        train_labels=torch.tensor([numbers[name] for name in train], dtype=torch.int64),
        test_labels=torch.tensor([numbers[name] for name in test], dtype=torch.int64),
        classes=classes,
        unknown=sorted(map(str, unknown)),
    )


def _class_of(label: Any, names: Sequence[str] | None) -> Class | None:
    if label is None or isinstance(label, str):
        return label
    return None if int(label) < 0 else int(label) if names is None else names[int(label)]
