# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_hf.evaluation import concept_labels, localization_iou


def localization_of(assignment: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Hard localization (1, N, r) from the token of each patch (rows, columns)."""
    return F.one_hot(assignment.flatten(), num_tokens).float().unsqueeze(0)


def pixels_of(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Mask (1, H, W) from one value per patch (rows, columns)."""
    return patches.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1).unsqueeze(0)


@pytest.mark.parametrize(("inside", "expected"), [(10, 1), (9, 1), (8, 1), (7, -1), (3, -1), (2, 0), (0, 0)])
def test_concept_labels_need_eighty_percent_of_the_map(inside, expected):
    # Token 0 holds ten patches of a 4x4 grid, `inside` of them in region 1.
    assignment = torch.ones(16, dtype=torch.long)
    assignment[:10] = 0
    regions = torch.zeros(16, dtype=torch.long)
    regions[:inside] = 1
    labels = concept_labels(localization_of(assignment, 2), pixels_of(regions.view(4, 4), 4), num_regions=2)
    assert labels.shape == (1, 2)
    assert labels.dtype == torch.long
    assert labels[0, 0] == expected


def test_concept_labels_weigh_patches_by_the_map():
    localization = torch.tensor([[[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.5, 0.5]]])
    mask = pixels_of(torch.tensor([[1, 0], [0, 0]]), 4)
    # Token 0 has 0.9 of its mass of 2.0 in region 1, token 1 has 1.9 of 2.0 in region 0.
    assert concept_labels(localization, mask, num_regions=2).tolist() == [[-1, 0]]
    assert concept_labels(localization, mask, num_regions=2, threshold=0.55).tolist() == [[0, 0]]


def test_concept_labels_share_a_patch_between_its_regions():
    mask = torch.zeros(1, 10, 10, dtype=torch.uint8)
    mask[:, :, :8] = 2
    one_patch = torch.ones(1, 1, 1)
    assert concept_labels(one_patch, mask, num_regions=3).item() == 2
    mask[:, 0, 0] = 1
    assert concept_labels(one_patch, mask, num_regions=3).item() == -1


def test_concept_labels_leave_tokens_without_mass_unlabelled():
    localization = torch.tensor([[[1.0, 0.0]] * 4])
    assert concept_labels(localization, torch.zeros(1, 8, 8, dtype=torch.long), num_regions=1).tolist() == [[0, -1]]


def test_concept_labels_take_grids_that_are_not_square():
    assignment = torch.tensor([[0, 0, 1], [0, 0, 1]])
    labels = concept_labels(localization_of(assignment, 2), pixels_of(assignment, 4), num_regions=2, grid_size=(2, 3))
    assert labels.tolist() == [[0, 1]]


@pytest.mark.parametrize("grid_size", [(4, 4), (2, 8)])
def test_localization_iou_is_one_where_a_token_is_the_foreground(grid_size):
    rows, columns = grid_size
    foreground = torch.zeros(rows, columns, dtype=torch.long)
    foreground[:, columns // 2 :] = 1
    background_tokens = torch.arange(rows * columns).view(rows, columns) % 2
    localization = localization_of(torch.where(foreground == 1, 2, background_tokens), 3)
    mask = pixels_of(foreground, 1) == 1
    assert localization_iou(localization, mask, grid_size).tolist() == [1.0]


def test_localization_iou_of_a_map_that_is_twice_too_large_is_one_half():
    localization = localization_of(torch.tensor([[0, 0, 1, 1]] * 4), 2)
    foreground = torch.zeros(1, 16, 16, dtype=torch.bool)
    foreground[:, :, :4] = True
    assert localization_iou(localization, foreground, (4, 4)).item() == pytest.approx(0.5)


def test_localization_iou_is_zero_without_foreground():
    localization = localization_of(torch.tensor([[0, 1], [0, 1]]), 2)
    assert localization_iou(localization, torch.zeros(1, 8, 8), (2, 2)).tolist() == [0.0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), num_tokens=st.integers(1, 6))
def test_names_of_tokens_do_not_matter(seed, num_tokens):
    generator = torch.Generator().manual_seed(seed)
    localization = torch.randn(3, 16, num_tokens, generator=generator).mul(3).softmax(-1)
    mask = torch.randint(3, (3, 8, 8), generator=generator)
    order = torch.randperm(num_tokens, generator=generator)
    overlap = localization_iou(localization, mask == 1, (4, 4))
    assert ((overlap >= 0) & (overlap <= 1)).all()
    torch.testing.assert_close(localization_iou(localization[..., order], mask == 1, (4, 4)), overlap)
    labels = concept_labels(localization, mask, num_regions=3, threshold=0.4)
    assert torch.equal(concept_labels(localization[..., order], mask, 3, threshold=0.4), labels[:, order])


def test_shapes_and_grids_are_checked():
    localization = torch.full((2, 6, 3), 1 / 3)
    mask = torch.zeros(2, 8, 12, dtype=torch.long)
    with pytest.raises(ValueError, match="6 patches and grid_size is None"):
        concept_labels(localization, mask, num_regions=2)
    with pytest.raises(ValueError, match=r"6 patches and grid_size is \(2, 2\)"):
        localization_iou(localization, mask == 1, (2, 2))
    with pytest.raises(ValueError, match=r"\(2, 6, 3\) and the mask \(1, 8, 12\)"):
        localization_iou(localization, mask[:1] == 1, (2, 3))
    with pytest.raises(ValueError, match="ids from 0 to 2, but num_regions is 2"):
        concept_labels(localization, mask.index_fill(2, torch.tensor([0]), 2), num_regions=2, grid_size=(2, 3))
    with pytest.raises(ValueError, match="threshold is 80"):
        concept_labels(localization, mask, num_regions=2, threshold=80, grid_size=(2, 3))
    with pytest.raises(ValueError, match="threshold is nan"):
        concept_labels(localization, mask, num_regions=2, threshold=float("nan"), grid_size=(2, 3))
    with pytest.raises(ValueError, match="localization is a list"):
        localization_iou([0.5], mask == 1, (2, 3))
