# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Retrieval of images by one vector or by the tokens of an object, and of single tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from ..features.checks import check_integer, check_tensors
from ..features.index import TokenMatches, build_token_index, import_faiss, nearest_tokens
from ..loss_stellar import without_autocast

logger = logging.get_logger(__name__)


@torch.no_grad()
def retrieval_scores(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    exclude: Tensor | None = None,
    chunk_size: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """How well images of the gallery that show what a query shows come first: recall@k and mean average precision.

    Vectors are compared by cosine. Tokens are compared by late interaction, [`late_interaction`]: with all tokens of
    an image as the query whole images are looked for, with the token of an object that object. Of gallery images that
    are equally similar the first one comes first.

    Args:
        queries: (Q, d) vectors or (Q, t, d) tokens, floating point.
        query_labels: (Q,) integers; the class of each query.
        gallery: (G, d) vectors or (G, r, d) tokens, of the kind of the queries.
        gallery_labels: (G,) integers, or (G, L) of the objects in each image; -1 for none.
        ks: Numbers of first images, at most G.
        exclude: (Q,) integers; an image of the gallery for each query that is left out of its ranking, as a rule the
            one that it is of; -1 for none.
        chunk_size: Queries, and images of the gallery, that are compared at once. On the device are then
            `4 t r chunk_size^2` bytes of similarities of tokens and `28 G chunk_size` bytes of rankings.
        device: Where to compute; the queries' device by default.

    Returns:
        In [0, 1]: `recall@<k>`, the share of queries with a relevant image among the first k, and `map`, the mean over
        queries of the average precision of the whole ranking, as scikit-learn's `average_precision_score` has it where
        no similarities are equal. Queries without a relevant image are left out, and counted in the log.

    Raises:
        ValueError: If shapes disagree, or no query has a relevant image.
    """
    _check_retrieval(queries, query_labels, gallery, gallery_labels, ks, exclude, chunk_size)
    device = queries.device if device is None else torch.device(device)
    gallery_labels = gallery_labels.to(device).view(len(gallery), -1)
    gains, found = [], {k: 0 for k in ks}
    for start in range(0, len(queries), chunk_size):
        part = slice(start, start + chunk_size)
        similarities = _similarities(queries[part].to(device), gallery, chunk_size)  # (q, G)
        labels = query_labels[part].to(device)
        relevant = ((gallery_labels == labels[:, None, None]) & (gallery_labels >= 0)).any(dim=-1)
        if exclude is not None:
            left_out = exclude[part].to(device)[:, None] == torch.arange(len(gallery), device=device)
            similarities, relevant = similarities.masked_fill(left_out, -torch.inf), relevant & ~left_out
        order = similarities.sort(dim=1, descending=True, stable=True).indices
        ranked = relevant.gather(1, order)
        ranked = ranked[ranked.any(dim=1)]
        gains.append(_average_precision(ranked).cpu())
        for k in ks:
            found[k] += int(ranked[:, :k].any(dim=1).sum())
    precision = torch.cat(gains)
    if len(precision) == 0:
        raise ValueError("No query has a relevant image in the gallery: check the labels of both.")
    if len(precision) < len(queries):
        logger.warning(
            f"{len(queries) - len(precision)} of {len(queries)} queries have no relevant image in the gallery. They "
            "are left out."
        )
    return {**{f"recall@{k}": found[k] / len(precision) for k in ks}, "map": float(precision.mean())}


def late_interaction(queries: Tensor, gallery: Tensor) -> Tensor:
    """Similarity of sets of tokens: the mean over a query's tokens of the largest cosine to a token of an image.

    MaxSim of Khattab and Zaharia, "ColBERT", arXiv 2004.12832, section 3.3, over the number of the query's tokens.

    Args:
        queries: (Q, t, d) floating point.
        gallery: (G, r, d) floating point, on the same device.

    Returns:
        (Q, G) float32 in [-1, 1].
    """
    queries, gallery = (F.normalize(tokens.float(), dim=-1) for tokens in (queries, gallery))
    with without_autocast(queries):
        cosines = queries.flatten(0, 1) @ gallery.flatten(0, 1).T
    return cosines.view(*queries.shape[:2], *gallery.shape[:2]).amax(dim=3).mean(dim=1)


def _similarities(queries: Tensor, gallery: Tensor, chunk_size: int) -> Tensor:
    """(Q, G) float32; a vector is a set of one token."""
    if queries.ndim == 2:
        queries, gallery = queries[:, None], gallery[:, None]
    parts = gallery.split(chunk_size)
    return torch.cat([late_interaction(queries, part.to(queries.device)) for part in parts], dim=1)


def _average_precision(ranked: Tensor) -> Tensor:
    """(Q,) float64 of rankings (Q, G) bool, true where relevant: the mean precision at the relevant places."""
    places = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    precision = ranked.cumsum(dim=1) / places
    return (precision * ranked).sum(dim=1).double() / ranked.sum(dim=1)


def _check_retrieval(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int],
    exclude: Tensor | None,
    chunk_size: int,
) -> None:
    check_tensors(queries=queries, query_labels=query_labels, gallery=gallery, gallery_labels=gallery_labels)
    check_integer("chunk_size", chunk_size)
    for k in ks:
        check_integer("k", k)
    if queries.ndim not in (2, 3) or queries.ndim != gallery.ndim or queries.shape[-1] != gallery.shape[-1]:
        raise ValueError(
            f"The queries have shape {tuple(queries.shape)} and the gallery {tuple(gallery.shape)}, but (Q, d) and "
            "(G, d), or (Q, t, d) and (G, r, d), are expected."
        )
    if query_labels.shape != queries.shape[:1] or gallery_labels.shape[:1] != gallery.shape[:1]:
        raise ValueError(
            f"There are labels {tuple(query_labels.shape)} of {len(queries)} queries and "
            f"{tuple(gallery_labels.shape)} of {len(gallery)} images, but (Q,), and (G,) or (G, L), are expected."
        )
    if gallery_labels.ndim > 2 or len(queries) == 0 or max(ks, default=1) > len(gallery):
        raise ValueError(
            f"There are {len(queries)} queries, a gallery of {len(gallery)}, labels {tuple(gallery_labels.shape)} and "
            f"ks {tuple(ks)}, but at least one query, labels (G,) or (G, L) and k up to G are expected."
        )
    if exclude is not None and exclude.shape != queries.shape[:1]:
        raise ValueError(f"exclude has shape {tuple(exclude.shape)}, but ({len(queries)},) is expected.")


__all__ = [
    "TokenMatches",
    "build_token_index",
    "import_faiss",
    "late_interaction",
    "nearest_tokens",
    "retrieval_scores",
]
