# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Linear probes of frozen features."""

from __future__ import annotations

import warnings

from torch import Tensor

from .knn import check_features

# Prior variance of a class logit. With standardized features and weights of prior variance C, a logit over d
# features has variance C * d, so C = variance / d regularizes 3072 raw pixels and 64 learned features alike.
_PROBE_LOGIT_VARIANCE = 32.0
_PROBE_MAX_ITER = 200


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
    check_features(train_features, train_labels, test_features, test_labels)
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
