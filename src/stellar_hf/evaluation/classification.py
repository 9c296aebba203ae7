# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Classes of images and of single tokens: what two data sets call the same, and kNN of tokens (concepts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..features.checks import check_integer, check_tensors
from .knn import knn_accuracy

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


def concept_accuracy(
    train_tokens: Tensor,
    train_concepts: Tensor,
    test_tokens: Tensor,
    test_concepts: Tensor,
    k: int = 20,
) -> dict[str, float]:
    """How many single tokens stand for one region and tell, by kNN, what it shows.

    Tokens that cover no region count as wrong: over the labelled tokens alone, a model with few of them, all easy,
    would look best. With fewer than `k` labelled training tokens all of them vote.

    Args:
        train_tokens: (B, r, d) floating point.
        train_concepts: (B, r) integers; class of the region that the token covers, -1 where it covers none.
        test_tokens: (C, r, d) floating point.
        test_concepts: (C, r) integers, the same of the test tokens.
        k: Number of neighbours.

    Returns:
        In [0, 1]: `concept_coverage`, the share of test tokens with a label, and `concept_accuracy`, the share of test
        tokens that have a label and are classified correctly. Their ratio is the accuracy of the labelled tokens.

    Raises:
        ValueError: If tokens and concepts disagree in shape or a set is empty.
    """
    check_integer("k", k)
    check_tensors(
        train_tokens=train_tokens,
        train_concepts=train_concepts,
        test_tokens=test_tokens,
        test_concepts=test_concepts,
    )
    for name, tokens, concepts in (
        ("train", train_tokens, train_concepts),
        ("test", test_tokens, test_concepts),
    ):
        if tokens.ndim != 3 or tokens.shape[:2] != concepts.shape or len(tokens) == 0:
            raise ValueError(
                f"{name}_tokens have shape {tuple(tokens.shape)} and {name}_concepts {tuple(concepts.shape)}, "
                "but (B, r, d) and (B, r) with B >= 1 are expected."
            )
    in_train, in_test = train_concepts >= 0, test_concepts >= 0
    num_train = int(in_train.sum())
    coverage = float(in_test.float().mean())
    accuracy = 0.0
    if num_train and in_test.any():
        accuracy = knn_accuracy(
            train_tokens[in_train],
            train_concepts[in_train],
            test_tokens[in_test],
            test_concepts[in_test],
            k=min(k, num_train),
        )
    return {"concept_accuracy": accuracy * coverage, "concept_coverage": coverage}
