# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Retrieval of tokens."""

import sys

import numpy as np
import pytest
import torch

from stellar_hf.features import build_token_index, nearest_tokens


@pytest.fixture
def tokens():
    """Of 6 images, 4 each, some much longer than others."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 10, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 5, 1]).view(6, 1, 1)


@pytest.fixture
def index(tokens):
    pytest.importorskip("faiss")
    return build_token_index(tokens.split(4))


def test_matches_are_those_of_the_largest_cosines(index, tokens):
    queries = torch.randn(7, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matches = nearest_tokens(index, queries, num_sparse_tokens=4, k=5)
    cosines = torch.cosine_similarity(queries.float()[:, None], tokens.flatten(0, 1)[None], dim=-1)
    expected = cosines.topk(5)
    np.testing.assert_array_equal(4 * matches.images + matches.slots, expected.indices)
    np.testing.assert_allclose(matches.similarities, expected.values, atol=1e-6)


def test_a_token_finds_itself_or_the_best_of_other_images(index, tokens):
    queries, images = tokens[2].half().numpy(), np.full(4, 2)
    itself = nearest_tokens(index, queries, num_sparse_tokens=4, k=1)
    assert itself.images.tolist() == [[2]] * 4 and itself.slots.ravel().tolist() == [0, 1, 2, 3]

    everything = nearest_tokens(index, queries, num_sparse_tokens=4, k=24)
    others = nearest_tokens(index, queries, num_sparse_tokens=4, k=20, exclude_images=images)
    for query in range(4):
        is_other = everything.images[query] != 2
        np.testing.assert_array_equal(others.images[query], everything.images[query][is_other])
        np.testing.assert_array_equal(others.slots[query], everything.slots[query][is_other])
    assert (np.diff(others.similarities) <= 0).all()


def test_impossible_queries_are_refused(index, tokens):
    for k, excluded in ((25, None), (21, [0] * 4)):
        with pytest.raises(ValueError, match=rf"k is {k}, .* holds 24 tokens"):
            nearest_tokens(index, tokens[0], num_sparse_tokens=4, k=k, exclude_images=excluded)
    for impossible, said in (
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"num_sparse_tokens": 0}, "num_sparse_tokens is 0"),
        ({"queries": tokens[0, :, :9]}, r"\(4, 9\), but \(queries, 10 channels\)"),
        ({"queries": [1.0]}, r"Queries have shape \(\)"),
        ({"exclude_images": [0]}, "4 queries, but 1 exclude_images"),
    ):
        with pytest.raises(ValueError, match=said):
            nearest_tokens(index, **{"queries": tokens[0], "num_sparse_tokens": 4, "k": 1, **impossible})
    with pytest.raises(ValueError, match=r"\(6, 4, 9\), but \(images, tokens, 10 channels\)"):
        build_token_index([tokens, tokens[..., :9]])
    with pytest.raises(ValueError, match=r"shape \(4, 10\)"):
        build_token_index([tokens[0]])
    with pytest.raises(ValueError, match="no tokens"):
        build_token_index([])


def test_without_faiss_the_error_says_what_to_install(tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        build_token_index([tokens])
