# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Retrieval of single concepts: the tokens of other images that are most like a token."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..hub_stellar import written_aside
from .checks import check_integer
from .shards import load_features

if TYPE_CHECKING:
    import faiss


@dataclass
class TokenMatches:
    """The nearest tokens of Q queries, best first.

    Attributes:
        images: (Q, k) int64; which image each token is of, counted in the order in which they were indexed.
        slots: (Q, k) int64 in [0, r); which of its image's tokens it is.
        similarities: (Q, k) float32; cosine, in [-1, 1].
    """

    images: np.ndarray
    slots: np.ndarray
    similarities: np.ndarray


def build_token_index(batches: Iterable[np.ndarray | Tensor]) -> faiss.Index:
    """Indexes tokens for exact search by cosine; all of them in memory, as float32.

    Args:
        batches: Sparse tokens S of images (STELLAR, arXiv 2602.01905), (B, r, d) floating point each.

    Returns:
        A FAISS index of unit vectors with inner products; `faiss.write_index` saves it. Token j of image i has the
        id `i * r + j`.

    Raises:
        ImportError: If FAISS is not installed.
        ValueError: If there is no batch, or one is of another shape.
    """
    faiss = import_faiss()
    index = None
    for batch in batches:
        shape = tuple(getattr(batch, "shape", ()))
        if len(shape) != 3 or (index is not None and shape[-1] != index.d):
            channels = "channels" if index is None else f"{index.d} channels"
            raise ValueError(f"Tokens have shape {shape}, but (images, tokens, {channels}) is expected.")
        vectors = _unit_vectors(batch.reshape(-1, shape[-1]))
        index = faiss.IndexFlatIP(vectors.shape[-1]) if index is None else index
        index.add(vectors)
    if index is None:
        raise ValueError("There are no tokens to index: pass those of at least one image.")
    return index


def index_features(folder: str | os.PathLike, show_progress: bool = True) -> faiss.Index:
    """Indexes the tokens that [`save_features`] wrote, and saves the index as `folder/tokens.faiss`.

    Args:
        folder: The folder of the features.
        show_progress: Whether to show a progress bar.

    Returns:
        The index, as [`build_token_index`] makes it: images are counted as rows of [`load_features`].

    Raises:
        ImportError: If FAISS is not installed.
        ValueError: If there are no features, or not yet all of them.
    """
    faiss = import_faiss()
    rows = load_features(folder, columns=["tokens"], streaming=True).with_format("numpy")
    batches = tqdm(rows.iter(1000), desc="index", leave=False, disable=not show_progress)
    index = build_token_index(batch["tokens"] for batch in batches)
    path = Path(folder, "tokens.faiss")
    with written_aside(path, prefix=".") as aside:
        faiss.write_index(index, str(aside))
    return index


def nearest_tokens(
    index: faiss.Index,
    queries: np.ndarray | Tensor,
    num_sparse_tokens: int,
    k: int = 5,
    exclude_images: Sequence[int] | np.ndarray | None = None,
) -> TokenMatches:
    """Finds the tokens that are most like some tokens.

    Args:
        index: From [`build_token_index`].
        queries: (Q, d) floating point of any length: cosines count.
        num_sparse_tokens: Tokens r of an indexed image.
        k: Tokens to find for each query.
        exclude_images: (Q,) an image for each query whose tokens are not wanted, as a rule the query's own.

    Returns:
        The matches of each query.

    Raises:
        ValueError: If k is less than 1, or more than the index has tokens to offer, or queries or excluded images have
            another shape.
    """
    check_integer("num_sparse_tokens", num_sparse_tokens)
    check_integer("k", k)
    shape = tuple(getattr(queries, "shape", ()))
    if len(shape) != 2 or shape[1] != index.d:
        raise ValueError(f"Queries have shape {shape}, but (queries, {index.d} channels) is expected.")
    if exclude_images is not None and len(exclude_images) != shape[0]:
        raise ValueError(f"There are {shape[0]} queries, but {len(exclude_images)} exclude_images: give each its own.")
    spare = 0 if exclude_images is None else num_sparse_tokens
    if not 1 <= k <= index.ntotal - spare:
        raise ValueError(
            f"k is {k}, but must be in [1, {index.ntotal - spare}]: the index holds {index.ntotal} tokens, {spare} of "
            "them of the image that is excluded."
        )
    similarities, ids = index.search(_unit_vectors(queries), k + spare)
    images, slots = np.divmod(ids, num_sparse_tokens)
    if exclude_images is not None:
        is_excluded = images == np.asarray(exclude_images)[:, None]
        others = np.argsort(is_excluded, axis=1, kind="stable")[:, :k]
        images, slots, similarities = (np.take_along_axis(x, others, axis=1) for x in (images, slots, similarities))
    return TokenMatches(images, slots, similarities)


def import_faiss():
    """The optional package, or an `ImportError` that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("An index of tokens needs FAISS: pip install faiss-cpu") from error
    return faiss


def _unit_vectors(vectors: np.ndarray | Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(torch.as_tensor(vectors).float().cpu(), dim=-1).numpy()
