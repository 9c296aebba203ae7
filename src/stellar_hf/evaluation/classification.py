# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Classification of frozen features: weighted kNN, linear probe, kNN of single tokens (concepts)."""

from __future__ import annotations

import math
import warnings
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.checks import check_integer, check_tensors

# Prior variance of a class logit. With standardized features and weights of prior variance C, a logit over d
# features has variance C * d, so C = variance / d regularizes 3072 raw pixels and 64 learned features alike.
_PROBE_LOGIT_VARIANCE = 32.0
_PROBE_MAX_ITER = 200


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 512,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour classifier that self-supervised learning reports.

    Each of the `k` training rows of largest cosine similarity votes for its class with weight
    `exp(similarity / temperature)` (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", arXiv 1805.01978, section 3.4).

    Args:
        train_features: (n, d) floating point, of any scale.
        train_labels: (n,) integers >= 0.
        test_features: (m, d) floating point, on the same device.
        test_labels: (m,) integers >= 0.
        k: Number of neighbours, at most n.
        temperature: Temperature of the votes, > 0.
        chunk_size: Test rows compared at once; bounds the memory at `chunk_size * n` similarities.

    Returns:
        The share of correctly classified test rows, in [0, 1].

    Raises:
        ValueError: If shapes or types disagree, a set is empty or not finite, or `k`, `temperature` or `chunk_size` is
            impossible.
    """
    _check_features(train_features, train_labels, test_features, test_labels)
    check_integer("k", k)
    check_integer("chunk_size", chunk_size)
    if k > len(train_features):
        raise ValueError(
            f"k is {k} with {len(train_features)} training rows: choose k between 1 and the number of training rows."
        )
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}, but must be a finite number > 0; the usual value is 0.07.")

    train_features = F.normalize(train_features.float(), dim=-1)
    test_features = F.normalize(test_features.float(), dim=-1)
    num_classes = int(train_labels.max()) + 1
    correct = 0
    for features, labels in zip(test_features.split(chunk_size), test_labels.split(chunk_size), strict=True):
        similarities, neighbours = (features @ train_features.T).topk(k, dim=-1)  # (chunk, k)
        votes = features.new_zeros(len(features), num_classes)
        # Shifting by the largest similarity scales a row's votes alike and keeps small temperatures finite.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        votes.scatter_add_(1, train_labels[neighbours].long(), weights)
        correct += int((votes.argmax(-1) == labels).sum())
    return correct / len(test_features)


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
) -> float:
    """Accuracy of multinomial logistic regression on features standardized by the training rows.

    The L2 penalty is fixed on the scale of the logits (their prior variance is 32), so it is equally strong for
    any number of features, and nothing is tuned on either set. L-BFGS stops after at most 200 iterations. The
    result is deterministic.

    Args:
        train_features: (n, d) floating point.
        train_labels: (n,) integers >= 0, of two classes or more.
        test_features: (m, d) floating point.
        test_labels: (m,) integers >= 0.

    Returns:
        The share of correctly classified test rows, in [0, 1].

    Raises:
        ValueError: If shapes disagree, a set is empty or not finite, or there is only one training class.
        ImportError: If scikit-learn is missing.
    """
    _check_features(train_features, train_labels, test_features, test_labels)
    if len(train_labels.unique()) < 2:
        raise ValueError("train_labels hold a single class, but a linear probe needs two classes or more.")
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            'The linear probe needs scikit-learn; install it with: pip install "stellar_hf[train]"'
        ) from error

    regression = LogisticRegression(
        C=_PROBE_LOGIT_VARIANCE / train_features.shape[1], max_iter=_PROBE_MAX_ITER, tol=1e-3
    )
    probe = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings():
        # The iteration limit is part of the protocol: raw pixels reach it, where accuracy hardly changes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train_features.float().cpu().numpy(), train_labels.cpu().numpy())
    return float(probe.score(test_features.float().cpu().numpy(), test_labels.cpu().numpy()))


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
        test_concepts: (C, r) integers, likewise.
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


def _check_features(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    check_tensors(
        train_features=train_features, train_labels=train_labels, test_features=test_features, test_labels=test_labels
    )
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name}_features have shape {tuple(features.shape)} and {name}_labels {tuple(labels.shape)}, "
                "but (rows, features) and (rows,) are expected."
            )
        if features.numel() == 0:
            raise ValueError(f"{name}_features are empty (shape {tuple(features.shape)}): pass at least one row.")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}_features hold NaN or infinite values: check the model that produced them.")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.min() < 0:
            raise ValueError(f"{name}_labels must be integers >= 0, but are {labels.dtype} from {labels.min()}.")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train_features have {train_features.shape[1]} columns and test_features {test_features.shape[1]}: "
            "both must come from the same model."
        )
