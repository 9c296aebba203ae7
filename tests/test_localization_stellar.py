# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Maps of tokens over patches and pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_hf.localization_stellar import (
    patch_positions,
    pixel_labels,
    region_shares,
    spatial_scores,
    token_maps,
    upsample_maps,
)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), tokens=st.integers(1, 4), seed=st.integers(0, 99))
def test_maps_hold_every_patch_and_pixels_stay_shares(rows, columns, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    localization = torch.randn(2, rows * columns, tokens, generator=generator).softmax(-1)
    maps = token_maps(localization, (rows, columns))
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(maps[:, :, row, column], localization[:, row * columns + column])
    pixels = upsample_maps(maps, (7, 11))
    assert pixels.shape == (2, tokens, 7, 11)
    torch.testing.assert_close(pixels.sum(dim=1), torch.ones(2, 7, 11))


def test_pixels_belong_to_the_token_that_is_largest_after_upsampling():
    """By hand: one row of two patches at four pixels, whose mixtures are 1, 3/4, 1/4 and 0 of the left one."""
    localization = torch.tensor([[[0.9, 0.1], [0.4, 0.6]]])
    assert pixel_labels(localization, (1, 4), (1, 2)).tolist() == [[[0, 0, 0, 1]]]  # 0.9, 0.775, 0.525, 0.4
    assert pixel_labels(localization, (1, 4), torch.tensor([[1, 2]])).tolist() == [[[0, 0, 0, 1]]]
    assert pixel_labels(localization.mT, (2, 1), (2, 1)).tolist() == [[[0], [1]]]


def test_grids_that_are_not_square_are_asked_for():
    with pytest.raises(ValueError, match="6 patches and grid_size is None: pass"):
        pixel_labels(torch.rand(1, 6, 2), (8, 8))


def test_shares_of_regions_weigh_patches_by_the_map():
    """By hand: in a row of two patches, region 1 is the first patch and a half of the second one."""
    localization = torch.tensor([[[0.9, 0.1, 0.0], [0.6, 0.4, 0.0]]])
    mask = torch.tensor([[[1, 1, 1, 0]] * 2])
    shares = region_shares(localization, mask, num_regions=2, grid_size=(1, 2))
    torch.testing.assert_close(shares[0, 1], torch.tensor([(0.9 + 0.3) / 1.5, (0.1 + 0.2) / 0.5, 0.0]))
    torch.testing.assert_close(shares[0].sum(0), torch.tensor([1.0, 1.0, 0.0]))  # the last token has no map


def test_regions_are_checked():
    localization, mask = torch.full((2, 6, 3), 1 / 3), torch.zeros(2, 8, 12, dtype=torch.long)
    with pytest.raises(ValueError, match=r"6 patches and grid_size is \(2, 2\)"):
        region_shares(localization, mask, 2, grid_size=(2, 2))
    with pytest.raises(ValueError, match=r"\(2, 6, 3\) and the mask \(1, 8, 12\)"):
        region_shares(localization, mask[:1], 2, grid_size=(2, 3))
    with pytest.raises(ValueError, match="ids from 0 to 2, but num_regions is 2"):
        region_shares(localization, mask.index_fill(2, torch.tensor([0]), 2), 2, grid_size=(2, 3))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 5), columns=st.integers(2, 5), tokens=st.integers(1, 4), seed=st.integers(0, 99))
def test_scores_of_places_are_those_of_each_map_s_gaussian(rows, columns, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    localization = torch.randn(2, rows * columns, tokens, generator=generator).mul(3).softmax(-1)
    positions = patch_positions((rows, columns))
    scores = spatial_scores(localization, positions)
    for image in range(2):
        for token in range(tokens):
            weights = localization[image, :, token] / localization[image, :, token].sum()
            mean = weights @ positions
            variance = (weights @ (positions - mean) ** 2).mean() + 0.05**2
            gaussian = torch.distributions.MultivariateNormal(mean, variance * torch.eye(2))
            difference = gaussian.log_prob(positions) - scores[image, :, token]
            torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-3, atol=1e-3)


def test_positions_have_the_scale_of_the_longer_side():
    positions = patch_positions((2, 4))
    torch.testing.assert_close(positions[:5, 0], torch.tensor([0.125, 0.125, 0.125, 0.125, 0.375]))
    torch.testing.assert_close(positions[:4, 1], torch.tensor([0.125, 0.375, 0.625, 0.875]))
