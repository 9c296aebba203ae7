# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A tiny prior for the tiny model, and factorizations of its sizes."""

import pytest
import torch

from stellar_hf import StellarTokenPrior


@pytest.fixture(scope="session")
def prior_sizes():
    return {
        "num_sparse_tokens": 4,
        "token_size": 32,
        "grid_size": (4, 4),
        "num_classes": 2,
        "class_names": ["cat", "dog"],
        "localization_patch_size": 2,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "localization_channels": 8,
    }


@pytest.fixture(scope="session")
def make_prior(prior_sizes):
    """Builds a prior with random weights everywhere, so that no part of it is silent."""

    def make(seed=0, **overrides) -> StellarTokenPrior:
        torch.manual_seed(seed)
        prior = StellarTokenPrior(**{**prior_sizes, **overrides}).eval()
        for weight in prior.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        return prior

    return make


@pytest.fixture(scope="session")
def random_factors():
    """Draws S and L."""

    def draw(batch_size, seed=0, num_tokens=4, token_size=32, num_patches=16):
        generator = torch.Generator().manual_seed(seed)
        tokens = 3 * torch.randn(batch_size, num_tokens, token_size, generator=generator) + 1
        logits = 2 * torch.randn(batch_size, num_patches, num_tokens, generator=generator)
        return tokens, logits.softmax(dim=-1)

    return draw


@pytest.fixture(scope="module")
def prior(make_prior, random_factors):
    prior = make_prior()
    prior.set_statistics(*random_factors(64, seed=1))
    return prior
