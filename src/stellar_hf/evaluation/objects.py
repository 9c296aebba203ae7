# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Whether segments are objects: measures of segmentations, and segmentations from maps and features.

Every measure is of regions and not of tokens, and is given for each image, so that means and spreads follow. Masks
hold ids of objects; 0 is the ground, which is no object. What is not defined (an image without objects) is NaN: take
`nanmean`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features import encoder_of
from ..features.checks import check_integer, check_tensors
from ..localization_stellar import means_under_maps, pixel_labels
from .clustering import average_linkage, kmeans

_CHUNK_SIZE = 256  # images whose maps are held at the resolution of pixels at once


# Measures ------------------------------------------------------------------------------------------------------------


def object_scores(segmentation: Tensor, mask: Tensor, min_area: int = 1) -> dict[str, Tensor]:
    """All measures of this module at once.

    Args:
        segmentation: (B, H, W) integers >= 0, the segment of each pixel. Names of segments have no meaning.
        mask: (B, H, W) integers >= 0, the object of each pixel; 0 is the ground.
        min_area: Least number of visible pixels of an object. Smaller ones are not asked for, and their pixels count
            in neither Rand index; segments keep theirs.

    Returns:
        `ari`, `foreground_ari`, `mean_best_overlap`, `object_recall` and `corloc`, each (B,) float32.

    Raises:
        ValueError: If shapes disagree, values are not integers >= 0, or `min_area` is less than 1.
    """
    table = contingency_table(segmentation, mask, min_area)
    overlaps = _best_overlaps(table, min_area)
    return {
        "ari": _rand_index(_without_small(table, min_area)),
        "foreground_ari": _rand_index(_without_small(table, min_area)[:, :, 1:]),
        "mean_best_overlap": overlaps.nanmean(dim=1),
        "object_recall": _share_above(overlaps, 0.5),
        "corloc": corloc(segmentation, mask, min_area),
    }


def adjusted_rand_index(segmentation: Tensor, mask: Tensor, min_area: int = 1) -> Tensor:
    """Adjusted Rand index (Hubert and Arabie, 1985) of all pixels, the ground included: 1 for equal partitions, about
    0 for a random one.

    Args:
        segmentation: (B, H, W) integers, as all arguments in [`object_scores`].
        mask: (B, H, W) integers.
        min_area: Least number of pixels of an object; pixels of smaller ones are left out.

    Returns:
        (B,) float32 in [-0.5, 1].

    Raises:
        ValueError: As [`object_scores`].
    """
    return _rand_index(_without_small(contingency_table(segmentation, mask, min_area), min_area))


def foreground_ari(segmentation: Tensor, mask: Tensor, min_area: int = 1) -> Tensor:
    """Adjusted Rand index of the pixels of objects alone (FG-ARI, Greff et al., arXiv 1903.00450, section 4).

    It asks whether objects are told apart and not where they end: segments may cover the ground as they like. Of an
    image with one object it is 1 where one segment holds all of it, and otherwise 0.

    Args:
        segmentation: (B, H, W) integers, as all arguments in [`object_scores`].
        mask: (B, H, W) integers.
        min_area: Least number of pixels of an object; pixels of smaller ones are left out.

    Returns:
        (B,) float32 in [-0.5, 1], NaN without objects.

    Raises:
        ValueError: As [`object_scores`].
    """
    return _rand_index(_without_small(contingency_table(segmentation, mask, min_area), min_area)[:, :, 1:])


def object_overlaps(segmentation: Tensor, mask: Tensor, min_area: int = 1) -> Tensor:
    """Intersection over union of each object and the segment that overlaps best with it.

    Args:
        segmentation: (B, H, W) integers, as all arguments in [`object_scores`].
        mask: (B, H, W) integers.
        min_area: Least number of pixels of an object.

    Returns:
        (B, G) float32 in [0, 1] for the objects 1 to G, the largest id of all images; NaN where one is not there.

    Raises:
        ValueError: As [`object_scores`].
    """
    return _best_overlaps(contingency_table(segmentation, mask, min_area), min_area)


def mean_best_overlap(segmentation: Tensor, mask: Tensor, min_area: int = 1) -> Tensor:
    """Mean of [`object_overlaps`] over the objects of each image (mBO over instances, Pont-Tuset et al. 2017; Seitzer
    et al., arXiv 2209.14860). One segment may serve several objects.

    Args:
        segmentation: (B, H, W) integers, as all arguments in [`object_scores`].
        mask: (B, H, W) integers.
        min_area: Least number of pixels of an object.

    Returns:
        (B,) float32 in [0, 1], NaN without objects.

    Raises:
        ValueError: As [`object_scores`].
    """
    return object_overlaps(segmentation, mask, min_area).nanmean(dim=1)


def object_recall(segmentation: Tensor, mask: Tensor, min_area: int = 1, threshold: float = 0.5) -> Tensor:
    """Share of the objects of each image that are found: some segment overlaps with them by more than `threshold`.

    Args:
        segmentation: (B, H, W) integers, as all arguments in [`object_scores`].
        mask: (B, H, W) integers.
        min_area: Least number of pixels of an object.
        threshold: Intersection over union, in [0, 1).

    Returns:
        (B,) float32 in [0, 1], NaN without objects.

    Raises:
        ValueError: As [`object_scores`], or if the threshold is out of its range.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}, but must be in [0, 1): it is an intersection over union.")
    return _share_above(object_overlaps(segmentation, mask, min_area), threshold)


def corloc(segmentation: Tensor, mask: Tensor, min_area: int = 1) -> Tensor:
    """Correct localization (Deselaers et al., 2010): whether the bounding box of some segment fits that of some
    object, by an intersection over union of more than 0.5. It is lenient: one object of an image is enough.

    Args:
        segmentation: (B, H, W) integers, as all arguments in [`object_scores`].
        mask: (B, H, W) integers.
        min_area: Least number of pixels of an object.

    Returns:
        (B,) float32, 0 or 1, NaN without objects.

    Raises:
        ValueError: As [`object_scores`].
    """
    areas = contingency_table(segmentation, mask, min_area).sum(dim=1)[:, 1:]
    is_object = areas >= min_area  # (B, G)
    overlaps = _box_overlaps(_boxes(segmentation), _boxes(mask)[:, 1:])  # (B, segments, G)
    is_found = ((overlaps > 0.5) & is_object.unsqueeze(1)).flatten(1).any(dim=1)
    return torch.where(is_object.any(dim=1), is_found.float(), torch.nan)


# Segmentations -------------------------------------------------------------------------------------------------------


def object_features(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The call of a model for [`encode_images`] that keeps all that segmentations and [`what_and_where`] need.

    Args:
        model: A STELLAR model, with heads or without, or a baseline of `stellar_hf.evaluation.baselines`.
        pixel_values: (B, 3, H, W) float32.

    Returns:
        `sparse_tokens` (B, r, d), `localization` (B, N, r), `grid_size` (B, 2) int64 and, of a model,
        `dense_features` (B, N, d): in float16, since they are many.

    Raises:
        ValueError: If the model has no localization.
    """
    encoder = encoder_of(model)
    output = encoder(pixel_values.to(encoder.dtype))
    if output.get("localization") is None:
        raise ValueError(f"{type(model).__name__} has no localization, but a STELLAR model or a baseline is expected.")
    features = {name: output[name] for name in ("sparse_tokens", "localization", "grid_size")}
    if output.get("last_hidden_state") is not None:
        features["dense_features"] = encoder.split(output["last_hidden_state"])[1].half()
    return features


def segmentations(
    features: Mapping[str, Tensor], size: Sequence[int], num_segments: int, seed: int = 0
) -> dict[str, Tensor]:
    """The segmentations that a model's maps and features give.

    Args:
        features: Tensors of [`object_features`]: `localization` (M, N, r), `grid_size` (M, 2), and the others if they
            are there.
        size: Height and width (H, W) of the masks.
        num_segments: Groups of merged tokens and clusters of dense features; with fewer tokens or patches, as many as
            there are.
        seed: Of the clusters.

    Returns:
        (M, H, W) uint8 each: `localization`, the token whose upsampled map is largest; with `dense_features` also
        `merged_tokens`, the same for the groups of [`merge_tokens`], and `dense_kmeans`, k-means of D.

    Raises:
        ValueError: If shapes disagree, grids differ, or there are more than 256 tokens.
    """
    check_integer("num_segments", num_segments)
    check_tensors(localization=features["localization"])
    parts = []
    for start in range(0, len(features["localization"]), _CHUNK_SIZE):
        chunk = {name: tensor[start : start + _CHUNK_SIZE] for name, tensor in features.items()}
        grid_size = chunk.get("grid_size")
        maps = _maps(chunk, num_segments, seed)
        parts.append({name: _as_bytes(pixel_labels(each, size, grid_size)) for name, each in maps.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pooled_features(weights: Tensor, dense_features: Tensor) -> Tensor:
    """Dense features under maps: their mean with the weights of each map (L^T D for the localization matrix L).

    Args:
        weights: (B, N, r) floating point >= 0, such as L.
        dense_features: D, (B, N, d).

    Returns:
        (B, r, d) float32; zero where a map has no mass.

    Raises:
        ValueError: If shapes disagree.
    """
    check_tensors(weights=weights, dense_features=dense_features)
    if weights.ndim != 3 or dense_features.ndim != 3 or weights.shape[:2] != dense_features.shape[:2]:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} and dense_features {tuple(dense_features.shape)}, but "
            "(B, N, r) and (B, N, d) with the same B and N are expected."
        )
    return means_under_maps(weights.float(), dense_features.float())


def merge_tokens(localization: Tensor, dense_features: Tensor, num_groups: int) -> Tensor:
    """Groups of tokens that lie on the same thing, without any training.

    A token is described by the dense features under its map ([`pooled_features`]); groups are those of average linkage
    by cosine distance.

    Args:
        localization: L, (B, N, r); rows sum to 1.
        dense_features: D, (B, N, d).
        num_groups: From 1 to r.

    Returns:
        (B, r) int64, the group of each token, from 0 to `num_groups - 1`.

    Raises:
        ValueError: If shapes disagree or there are fewer tokens than groups.
    """
    descriptors = F.normalize(pooled_features(localization, dense_features).double(), dim=2)
    return average_linkage(1 - descriptors @ descriptors.transpose(1, 2), num_groups)


def merged_localization(localization: Tensor, groups: Tensor) -> Tensor:
    """Maps of groups of tokens: the sums of their maps.

    Args:
        localization: L, (B, N, r); rows sum to 1.
        groups: (B, r) int64, as [`merge_tokens`] gives them.

    Returns:
        (B, N, groups) float32; rows sum to 1.
    """
    return localization.float() @ F.one_hot(groups, int(groups.max()) + 1).float()


def dense_clusters(dense_features: Tensor, num_segments: int, seed: int = 0) -> Tensor:
    """k-means of the dense features of each image (five starts), as maps.

    Args:
        dense_features: D, (B, N, d).
        num_segments: Clusters; with fewer patches as many as there are.
        seed: Seed of the starts.

    Returns:
        (B, N, k) float32 of 0 and 1, as a localization that has decided.
    """
    num_clusters = min(num_segments, dense_features.shape[1])
    labels = kmeans(dense_features.float(), num_clusters, seed=seed).labels
    return F.one_hot(labels, num_clusters).float()


# Parts ---------------------------------------------------------------------------------------------------------------


def contingency_table(segmentation: Tensor, mask: Tensor, min_area: int) -> Tensor:
    """(B, segments, 1 + G) float64: pixels that each segment has of each object; of the ground in column 0."""
    check_tensors(segmentation=segmentation, mask=mask)
    check_integer("min_area", min_area)
    if segmentation.ndim != 3 or segmentation.shape != mask.shape or mask.numel() == 0:
        raise ValueError(
            f"segmentation has shape {tuple(segmentation.shape)} and mask {tuple(mask.shape)}, but both must be "
            "(B, H, W) with at least one pixel: upsample the segmentation to the size of the mask."
        )
    for name, ids in (("segmentation", segmentation), ("mask", mask)):
        if ids.is_floating_point() or ids.is_complex() or ids.min() < 0:
            raise ValueError(f"{name} must hold integers >= 0, but is {ids.dtype} from {ids.min().item()}.")
    num_segments, num_ids = int(segmentation.max()) + 1, int(mask.max()) + 1
    image = torch.arange(len(mask), device=mask.device).view(-1, 1, 1)
    cell = (image * num_segments + segmentation) * num_ids + mask
    counts = torch.bincount(cell.flatten(), minlength=len(mask) * num_segments * num_ids)
    return counts.view(len(mask), num_segments, num_ids).double()


def _without_small(table: Tensor, min_area: int) -> Tensor:
    is_counted = table.sum(dim=1, keepdim=True) >= min_area
    is_counted[:, :, 0] = True  # the ground
    return table * is_counted


def _rand_index(table: Tensor) -> Tensor:
    """(B,) float32 from contingency tables, by counts of ordered pairs of pixels; NaN without pixels."""
    total = table.sum(dim=(1, 2))
    same_both = table.square().sum(dim=(1, 2)) - total
    only_segment = table.sum(dim=2).square().sum(dim=1) - total - same_both
    only_object = table.sum(dim=1).square().sum(dim=1) - total - same_both
    neither = total * (total - 1) - same_both - only_segment - only_object
    scale = (same_both + only_segment) * (only_segment + neither) + (same_both + only_object) * (only_object + neither)
    index = 2 * (same_both * neither - only_segment * only_object) / scale
    index = torch.where(only_segment + only_object == 0, 1.0, index)
    return torch.where(total > 0, index, torch.nan).float()


def _best_overlaps(table: Tensor, min_area: int) -> Tensor:
    """(B, G) float32, NaN where an object is not there."""
    areas = table.sum(dim=1)[:, 1:]
    best = segment_overlaps(table).amax(dim=1)
    return torch.where(areas >= min_area, best, torch.nan).float()


def segment_overlaps(table: Tensor) -> Tensor:
    """(B, segments, G) intersection over union of segments and objects."""
    intersection = table[:, :, 1:]
    union = table.sum(dim=2, keepdim=True) + intersection.sum(dim=1, keepdim=True) - intersection
    return intersection / union.clamp(min=1)


def _share_above(overlaps: Tensor, threshold: float) -> Tensor:
    return torch.where(overlaps.isnan(), torch.nan, (overlaps > threshold).float()).nanmean(dim=1)


def _boxes(ids: Tensor) -> Tensor:
    """(B, ids, 4) float32 bounding boxes (top, left, bottom, right), ends excluded; no area where an id is absent."""
    ids = ids.long()
    height, width = ids.shape[1:]
    num_ids = int(ids.max()) + 1
    rows = torch.zeros(len(ids), num_ids, height, device=ids.device)
    columns = torch.zeros(len(ids), num_ids, width, device=ids.device)
    image = torch.arange(len(ids), device=ids.device).view(-1, 1, 1)
    rows[image, ids, torch.arange(height, device=ids.device).view(-1, 1)] = 1
    columns[image, ids, torch.arange(width, device=ids.device)] = 1
    top, left = rows.argmax(dim=2), columns.argmax(dim=2)
    bottom, right = height - rows.flip(2).argmax(dim=2), width - columns.flip(2).argmax(dim=2)
    boxes = torch.stack([top, left, bottom, right], dim=2).float()
    return boxes * rows.any(dim=2, keepdim=True)


def _box_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """(B, P, G) intersection over union of boxes (B, P, 4) and (B, G, 4)."""
    first, second = first.unsqueeze(2), second.unsqueeze(1)
    corner = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    intersection = corner.clamp(min=0).prod(dim=3)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=3) for boxes in (first, second)]
    return intersection / (sum(areas) - intersection).clamp(min=1)


def _maps(features: Mapping[str, Tensor], num_segments: int, seed: int) -> dict[str, Tensor]:
    """(B, N, segments) maps of each of the [`segmentations`]."""
    localization, dense_features = features["localization"], features.get("dense_features")
    if dense_features is None:
        return {"localization": localization}
    groups = merge_tokens(localization, dense_features, min(num_segments, localization.shape[2]))
    return {
        "localization": localization,
        "merged_tokens": merged_localization(localization, groups),
        "dense_kmeans": dense_clusters(dense_features, num_segments, seed),
    }


def _as_bytes(labels: Tensor) -> Tensor:
    if labels.max() > 255:
        raise ValueError(f"A segmentation has {int(labels.max()) + 1} segments, but at most 256 are expected.")
    return labels.byte()
