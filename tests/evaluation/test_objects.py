# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score

from stellar_hf import StellarModel
from stellar_hf.evaluation import (
    adjusted_rand_index,
    corloc,
    foreground_ari,
    mean_best_overlap,
    merge_tokens,
    object_features,
    object_overlaps,
    object_recall,
    object_scores,
    pooled_features,
    segmentations,
)


def random_scenes(seed: int, num_segments: int = 5, num_objects: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Segmentations and masks (4, 9, 7) that agree in part."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(num_objects + 1, (4, 9, 7), generator=generator)
    noise = torch.randint(num_segments, mask.shape, generator=generator)
    agrees = torch.rand(mask.shape, generator=generator) < 0.6
    return torch.where(agrees, (mask * 2 + 1) % num_segments, noise), mask


def reference_overlaps(segmentation: np.ndarray, mask: np.ndarray, min_area: int) -> dict[int, float]:
    """Best intersection over union of each object of one image, by sets of pixels."""
    overlaps = {}
    for object_id in np.unique(mask[mask > 0]):
        own = mask == object_id
        if own.sum() >= min_area:
            segments = [segmentation == name for name in np.unique(segmentation)]
            overlaps[int(object_id)] = max((own & other).sum() / (own | other).sum() for other in segments)
    return overlaps


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), num_segments=st.integers(1, 6), num_objects=st.integers(1, 4))
def test_scores_equal_independent_ones(seed, num_segments, num_objects):
    segmentation, mask = random_scenes(seed, num_segments, num_objects)
    min_area = 14  # leaves out some objects
    scores = object_scores(segmentation, mask, min_area)
    for index, (own_segments, own_mask) in enumerate(zip(segmentation.numpy(), mask.numpy(), strict=True)):
        overlaps = reference_overlaps(own_segments, own_mask, min_area)
        counted = np.isin(own_mask, [0, *overlaps])
        foreground = np.isin(own_mask, list(overlaps))
        ari = adjusted_rand_score(own_mask[counted], own_segments[counted])
        assert scores["ari"][index].item() == pytest.approx(ari, abs=1e-6)
        if not overlaps:
            assert all(scores[name][index].isnan() for name in scores if name != "ari")
            continue
        expected = {
            "foreground_ari": adjusted_rand_score(own_mask[foreground], own_segments[foreground]),
            "mean_best_overlap": np.mean(list(overlaps.values())),
            "object_recall": np.mean([overlap > 0.5 for overlap in overlaps.values()]),
        }
        for name, value in expected.items():
            assert scores[name][index].item() == pytest.approx(value, abs=1e-6), name


def test_each_measure_alone_is_that_of_all():
    segmentation, mask = random_scenes(1)
    scores = object_scores(segmentation.byte(), mask.byte(), 12)
    torch.testing.assert_close(adjusted_rand_index(segmentation, mask, 12), scores["ari"])
    torch.testing.assert_close(foreground_ari(segmentation, mask, 12), scores["foreground_ari"], equal_nan=True)
    torch.testing.assert_close(mean_best_overlap(segmentation, mask, 12), scores["mean_best_overlap"], equal_nan=True)
    torch.testing.assert_close(object_recall(segmentation, mask, 12), scores["object_recall"], equal_nan=True)
    torch.testing.assert_close(corloc(segmentation, mask, 12), scores["corloc"], equal_nan=True)


def test_a_segmentation_of_the_objects_is_perfect_whatever_its_names_are():
    _, mask = random_scenes(2)
    for scores in (object_scores(mask, mask), object_scores(7 - 2 * mask, mask)):
        assert all((score == 1).all() for score in scores.values())


def test_one_segment_for_everything_tells_nothing_apart():
    mask = torch.zeros(1, 4, 6, dtype=torch.long)
    mask[0, :2, :3], mask[0, :2, 3:] = 1, 2
    scores = object_scores(torch.zeros_like(mask), mask)
    assert scores["ari"].item() == scores["foreground_ari"].item() == 0
    assert scores["mean_best_overlap"].item() == pytest.approx(1 / 4)  # 6 pixels of 24
    assert scores["object_recall"].item() == 0


def test_overlaps_of_a_worked_case():
    mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 3], [0, 0, 0, 0]]])
    segmentation = torch.tensor([[[4, 4, 4, 0], [4, 4, 0, 0], [0, 0, 0, 0]]])
    # Object 1 has 4 of the segment's 5 pixels, object 3 one of the other segment's 7; there is no object 2.
    overlaps = object_overlaps(segmentation, mask)
    assert overlaps[0, [0, 2]].tolist() == pytest.approx([4 / 5, 1 / 7])
    assert overlaps[0, 1].isnan()
    assert object_recall(segmentation, mask).item() == pytest.approx(1 / 2)
    assert object_recall(segmentation, mask, threshold=0.1).item() == 1
    assert mean_best_overlap(segmentation, mask, min_area=2).item() == pytest.approx(4 / 5)


@pytest.mark.parametrize(("width", "expected"), [(4, 1.0), (7, 1.0), (8, 0.0), (10, 0.0)])
def test_corloc_asks_for_a_box_that_overlaps_by_more_than_half(width, expected):
    mask = torch.zeros(1, 10, 12, dtype=torch.long)
    mask[0, 2:6, 2:6] = 1
    segmentation = torch.zeros_like(mask)
    segmentation[0, 2:6, 2 : 2 + width] = 1
    segmentation[0, 3, 3] = 0  # a hole does not change the box
    assert corloc(segmentation, mask).item() == expected


def test_images_without_objects_are_not_a_number():
    segmentation, mask = random_scenes(0)
    mask[1] = 0
    scores = object_scores(segmentation, mask)
    assert not scores["ari"].isnan().any()
    for name in ("foreground_ari", "mean_best_overlap", "object_recall", "corloc"):
        assert scores[name].isnan().tolist() == [False, True, False, False]


def scene_of_two_things() -> tuple[torch.Tensor, torch.Tensor]:
    """L (2, 16, 4), two tokens for each half of a 4x4 grid, and D (2, 16, 8), which tells the halves apart."""
    half = (torch.arange(16) % 4 >= 2).long()
    token = 2 * half + (torch.arange(16) // 8)
    localization = F.one_hot(token, 4).float().expand(2, -1, -1) * 0.9 + 0.025
    dense = F.one_hot(half, 8).float() + 0.05 * torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    return localization, dense


def test_tokens_on_the_same_thing_are_merged():
    localization, dense = scene_of_two_things()
    assert merge_tokens(localization, dense, 2).tolist() == [[0, 0, 1, 1]] * 2
    assert merge_tokens(localization, dense, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_groups_of_tokens_are_those_of_scipy():
    generator = torch.Generator().manual_seed(5)
    localization = torch.randn(6, 16, 7, generator=generator).softmax(-1)
    dense = torch.randn(6, 16, 8, generator=generator)
    descriptors = pooled_features(localization, dense).double()
    for own_descriptors, groups in zip(descriptors, merge_tokens(localization, dense, 3), strict=True):
        expected = fcluster(linkage(own_descriptors.numpy(), "average", metric="cosine"), 3, "maxclust")
        assert adjusted_rand_score(expected, groups) == 1


def test_pooled_features_are_means_under_the_maps():
    weights = torch.tensor([[[1.0, 0.0, 0.0], [3.0, 0.0, 2.0]]])
    dense = torch.tensor([[[0.0, 4.0], [8.0, 0.0]]], dtype=torch.float16)
    assert pooled_features(weights, dense).tolist() == [[[6.0, 1.0], [0.0, 0.0], [8.0, 0.0]]]


def test_segmentations_of_maps_groups_and_features():
    localization, dense = scene_of_two_things()
    features = {"localization": localization, "dense_features": dense, "grid_size": torch.tensor([[4, 4]] * 2)}
    mask = (torch.arange(8) >= 4).long().expand(2, 8, 8) + 1
    found = segmentations(features, (8, 8), num_segments=2)
    assert {name: tuple(segments.shape) for name, segments in found.items()} == {
        name: (2, 8, 8) for name in ("localization", "merged_tokens", "dense_kmeans")
    }
    scores = {name: foreground_ari(segments, mask) for name, segments in found.items()}
    assert scores["merged_tokens"].tolist() == scores["dense_kmeans"].tolist() == [1, 1]
    assert (scores["localization"] < 0.8).all()  # each half is two tokens
    assert segmentations({"localization": localization}, (8, 8), 2).keys() == {"localization"}


def test_features_of_a_model_are_its_tokens_maps_and_patches(tiny_config):
    model = StellarModel(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = object_features(model, pixel_values)
        output = model(pixel_values)
    torch.testing.assert_close(features["sparse_tokens"], output.sparse_tokens)
    torch.testing.assert_close(features["dense_features"], output.last_hidden_state[:, 1:25].half())
    found = segmentations(features, (32, 48), num_segments=3)
    assert all(segments.shape == (2, 32, 48) for segments in found.values())
    assert all(len(found["merged_tokens"][index].unique()) <= 3 for index in range(2))


@pytest.mark.parametrize(
    ("segmentation", "mask", "min_area", "message"),
    [
        (torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long(), 1, r"\(1, 4, 4\) and mask \(1, 4, 5\)"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).long(), 1, "segmentation must hold integers"),
        (torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), -1), 1, "mask must hold integers >= 0"),
        (torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4).long(), 0, "min_area is 0"),
        ([[0]], torch.zeros(1, 4, 4).long(), 1, "segmentation is a list"),
    ],
)
def test_impossible_segmentations_are_refused(segmentation, mask, min_area, message):
    with pytest.raises(ValueError, match=message):
        object_scores(segmentation, mask, min_area)


def test_a_threshold_is_a_share():
    segmentation, mask = random_scenes(0)
    with pytest.raises(ValueError, match="threshold is 50"):
        object_recall(segmentation, mask, threshold=50)
