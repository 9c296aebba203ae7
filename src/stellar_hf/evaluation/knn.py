# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Exact nearest neighbours by cosine in a bank of any size, and the weighted kNN classifier on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.checks import check_integer, check_tensors
from ..loss_stellar import without_autocast

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOW_BITS = 0xFFFFFFFF
_LEAST_KEY = torch.iinfo(torch.int64).min


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 2048,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour classifier that self-supervised learning reports.

    Each of the `k` training rows of largest cosine similarity votes for its class with weight
    `exp(similarity / temperature)` (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", arXiv 1805.01978, section 3.4). Of classes with equally many votes the lowest wins.

    Args:
        train_features: (n, d) floating point, of any scale.
        train_labels: (n,) integers >= 0.
        test_features: (m, d) floating point.
        test_labels: (m,) integers >= 0.
        k: Number of neighbours, at most n.
        temperature: Temperature of the votes, > 0.
        chunk_size, device, accelerator: As in [`nearest_neighbours`], which also says how much memory is needed.

    Returns:
        The share of correctly classified test rows, in [0, 1].

    Raises:
        ValueError: If shapes or types disagree, a set is empty or not finite, or `k`, `temperature` or `chunk_size` is
            impossible.
    """
    check_integer("k", k)
    accuracies = knn_accuracies(
        train_features,
        train_labels,
        test_features,
        test_labels,
        ks=(k,),
        temperature=temperature,
        chunk_size=chunk_size,
        device=device,
        accelerator=accelerator,
    )
    return accuracies[k]


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chunk_size: int = 2048,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
) -> dict[int, float]:
    """[`knn_accuracy`] for several numbers of neighbours, which are looked for once.

    Args:
        ks: Numbers of neighbours, at most n each. The rest as in [`knn_accuracy`].

    Returns:
        The accuracy of each.

    Raises:
        ValueError: As in [`knn_accuracy`].
    """
    check_features(train_features, train_labels, test_features, test_labels)
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}, but must be a finite number > 0; the usual value is 0.07.")
    for k in ks:
        check_integer("k", k)
        if k > len(train_features):
            raise ValueError(
                f"k is {k} with {len(train_features)} training rows: choose k between 1 and the number of training "
                "rows."
            )
    similarities, neighbours = nearest_neighbours(
        train_features, test_features, max(ks), chunk_size=chunk_size, device=device, accelerator=accelerator
    )
    votes = train_labels.cpu()[neighbours]
    labels = test_labels.cpu()
    return {k: float((vote(similarities[:, :k], votes[:, :k], temperature) == labels).double().mean()) for k in ks}


def vote(similarities: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """The class that neighbours elect, each with weight `exp(similarity / temperature)`.

    Args:
        similarities: (m, k) floating point.
        labels: (m, k) integers >= 0; the class of each neighbour.
        temperature: > 0.

    Returns:
        (m,) int64; of classes with equally many votes the lowest.
    """
    # Shifting by the largest similarity scales a row's votes alike and keeps small temperatures finite.
    shifted = similarities.double() - similarities.double().amax(dim=1, keepdim=True)
    weights, labels = (shifted / temperature).exp(), labels.long()
    num_classes = int(labels.max()) + 1
    rows_at_once = max(1, 2**24 // num_classes)
    elected = []
    for weight, label in zip(weights.split(rows_at_once), labels.split(rows_at_once), strict=True):
        votes = weight.new_zeros(len(weight), num_classes)
        elected.append(votes.scatter_add_(1, label, weight).argmax(dim=1))
    return torch.cat(elected)


@torch.no_grad()
def nearest_neighbours(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    chunk_size: int = 2048,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of a bank that are most like each query: exact, by cosine similarity in float32.

    Chunks of the bank pass by, and each query keeps the best `k` rows so far. The memory on the device is that of the
    queries, `4 m d` bytes, of the best rows, `8 m k` bytes, and, with c for `chunk_size`, `8 c d` bytes of a chunk and
    about `24 c min(c, m)` bytes of similarities; the bank stays where it is, whatever its size. `python -m benchmarks
    knn` measures it.

    Args:
        bank: (n, d) floating point, of any scale; n < 2^32.
        queries: (m, d) floating point, of any scale.
        k: Number of neighbours, at most n.
        chunk_size: Rows of the bank, and queries, that are compared at once.
        device: Where to compute; by default the accelerator's device, or the queries' without an accelerator.
        accelerator: Shares out the chunks of the bank over its processes, each of which has the whole bank and all
            queries, and gets all neighbours. They are the same, bit for bit, on any number of processes.

    Returns:
        Similarities (m, k) float32 in [-1, 1], largest first, and rows of the bank (m, k) int64, both on the CPU. Of
        equal similarities the row that comes first in the bank is first.

    Raises:
        ValueError: If shapes or types disagree, or `k` or `chunk_size` is impossible.
    """
    _check_bank(bank, queries, k, chunk_size)
    if device is None:
        device = queries.device if accelerator is None else accelerator.device
    process, num_processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    queries = _unit_rows(queries, device)
    best = torch.full((len(queries), k), _LEAST_KEY, device=device)
    # Chunks are shared out, not rows: a chunk is multiplied in one piece on any number of processes, so that its
    # similarities are the same to the last bit.
    for start in range(process * chunk_size, len(bank), num_processes * chunk_size):
        chunk = _unit_rows(bank[start : start + chunk_size], device)
        for query, kept in zip(queries.split(chunk_size), best.split(chunk_size), strict=True):
            with without_autocast(query):
                _keep_best(kept, query @ chunk.T, start)
    if accelerator is not None and num_processes > 1:
        best = accelerator.gather(best).view(num_processes, len(queries), k).transpose(0, 1).flatten(1)
    best = best.sort(dim=1, descending=True).values[:, :k]
    return _from_keys(best.cpu())


def check_features(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    """`ValueError` for features and labels that no classifier could be trained on or measured with."""
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
        if not all(torch.isfinite(part).all() for part in features.split(2**16)):
            raise ValueError(f"{name}_features hold NaN or infinite values: check the model that produced them.")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.min() < 0:
            raise ValueError(f"{name}_labels must be integers >= 0, but are {labels.dtype} from {labels.min()}.")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train_features have {train_features.shape[1]} columns and test_features {test_features.shape[1]}: "
            "both must come from the same model."
        )


def _check_bank(bank: Tensor, queries: Tensor, k: int, chunk_size: int) -> None:
    check_tensors(bank=bank, queries=queries)
    check_integer("k", k)
    check_integer("chunk_size", chunk_size)
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or len(queries) == 0:
        raise ValueError(
            f"The bank has shape {tuple(bank.shape)} and the queries {tuple(queries.shape)}, but (rows, channels) "
            "with the same channels and at least one query are expected."
        )
    if k > len(bank) or len(bank) > _LOW_BITS:
        raise ValueError(f"k is {k} with {len(bank)} rows in the bank: choose k between 1 and the number of rows.")


def _unit_rows(features: Tensor, device: torch.device | str) -> Tensor:
    return F.normalize(features.to(device, non_blocking=True).float(), dim=-1)


def _keep_best(kept: Tensor, similarities: Tensor, start: int) -> None:
    """Updates the keys (m, k) with the similarities (m, c) to the rows of the bank from `start` on."""
    least = _from_keys(kept.amin(dim=1))[0]
    # As the bank passes by, fewer and fewer queries find something better; a later row must be better, not equal.
    (found,) = ((similarities.amax(dim=1) > least) | (kept.amin(dim=1) == _LEAST_KEY)).nonzero(as_tuple=True)
    if len(found) == 0:
        return
    keys = _to_keys(similarities[found], start)
    keys = keys.topk(min(kept.shape[1], keys.shape[1]), dim=1, sorted=False).values
    kept[found] = torch.cat([kept[found], keys], dim=1).topk(kept.shape[1], dim=1, sorted=False).values


# Keys are unique integers that sort as (similarity, first row first) does: so no result depends on the order in which
# `topk` takes equals, nor on the order in which chunks come.


def _to_keys(similarities: Tensor, start: int) -> Tensor:
    """int64 keys of similarities (m, c) to the rows of the bank from `start` on."""
    bits = (similarities + 0.0).view(torch.int32)  # -0.0 and 0.0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers
    rows = torch.arange(start, start + similarities.shape[1], device=similarities.device)
    return ordered.long().bitwise_left_shift_(32).bitwise_or_(_LOW_BITS - rows)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities, float32, and rows of the bank, int64, of keys."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW_BITS - (keys & _LOW_BITS)
