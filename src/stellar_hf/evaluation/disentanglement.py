# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What and where: whether the token of an object says what it is, and only its map says where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.checks import check_integer, check_tensors
from ..localization_stellar import pixel_labels, resolve_grid_size, token_maps
from .knn import knn_accuracy
from .linear import linear_probe_accuracy
from .objects import contingency_table, pooled_features, segment_overlaps

if TYPE_CHECKING:
    import datasets

_CHUNK_SIZE = 256  # images whose maps are held at the resolution of pixels at once
_HELD_OUT_SHARE = 0.2
_PENALTIES = torch.logspace(-3, 6, 19, dtype=torch.float64)


@dataclass
class SceneObjects:
    """What is known of the objects of M scenes, each with room for G of them.

    Attributes:
        mask: (M, H, W) integers, the object of each pixel: 1 to G, 0 is the ground.
        classes: (M, G) int64 by name, such as "material" and "shape"; -1 where there is no object.
        position: (M, G, 2) float32, (x, y) of each object's center in the image, in [0, 1] from the left and the top.
    """

    mask: Tensor
    classes: dict[str, Tensor]
    position: Tensor

    @classmethod
    def from_dataset(
        cls, dataset: datasets.Dataset, index: Tensor | None = None, classes: tuple[str, ...] = ("material", "shape")
    ) -> SceneObjects:
        """The objects of a data set such as [`load_tabletop_scenes`].

        Args:
            dataset: With columns `mask`, `position` and those of `classes`.
            index: Rows to take, as `features.index` gives them; all by default.
            classes: Columns of classes.

        Raises:
            ValueError: If a column is missing.
        """
        wanted = ["mask", "position", *classes]
        missing = [name for name in wanted if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The data set has no columns {missing}, only {dataset.column_names}: rename or add them."
            )
        rows = dataset.select_columns(wanted).with_format("numpy")[:]
        columns = {name: torch.from_numpy(np.stack(list(rows[name]))) for name in wanted}
        if index is not None:
            columns = {name: column[index] for name, column in columns.items()}
        return cls(columns["mask"], {name: columns[name].long() for name in classes}, columns["position"].float())


def what_and_where(
    train_features: Mapping[str, Tensor],
    train_objects: SceneObjects,
    test_features: Mapping[str, Tensor],
    test_objects: SceneObjects,
    min_area: int = 1,
    num_neighbours: int = 20,
) -> dict[str, dict[str, float]]:
    """What the tokens of objects say of them, and of what they should not speak.

    The token of an object is the one whose segment (the pixels where its upsampled map is the largest) overlaps best
    with it. Classes are told by kNN and by a linear probe, of the object itself (it should be told) and of the largest
    other object of the scene (it should not). Positions are told by ridge regression, whose penalty is chosen on the
    last fifth of the training scenes: from a token they should not be told, and from its map they should. Nothing is
    chosen on the test part.

    Args:
        train_features: Tensors of [`object_features`] for M scenes: `sparse_tokens` (M, r, d), `localization`
            (M, N, r), `grid_size` (M, 2) and, if there are, `dense_features` (M, N, e).
        train_objects: The objects of the same scenes.
        test_features: The same of other scenes.
        test_objects: The objects of these.
        min_area: Least number of visible pixels of an object; smaller ones are left out.
        num_neighbours: Neighbours of kNN; all with fewer objects.

    Returns:
        Measures by their source: `sparse_tokens`, the token S of the object; with dense features also
        `pooled_features`, L^T D of that token, and `masked_features`, D under the true mask, an upper bound. Each
        has, for each name of the classes, `own_<name>_knn`, `own_<name>_linear`, `other_<name>_knn` and
        `other_<name>_linear`, accuracies in [0, 1], and `position_r2`, the coefficient of determination, mean of x and
        y, at most 1. `localization` has `position_r2`, told from the centroid of the token's map. `chance` has
        `own_<name>` and `other_<name>`, the accuracy of always naming the most frequent class of the training part.
        What is told of other objects is left out where no scene has two.

    Raises:
        ValueError: If shapes disagree, a part has no object, or training has fewer than two scenes or one class alone.
    """
    check_integer("num_neighbours", num_neighbours)
    train = _object_table("train", train_features, train_objects, min_area)
    test = _object_table("test", test_features, test_objects, min_area)
    results: dict[str, dict[str, float]] = {
        source: _told(train, test, source, num_neighbours) for source in train.descriptors
    }
    results["localization"] = {
        "position_r2": ridge_r2(train.centroid, train.position, test.centroid, test.position, train.scene)
    }
    results["chance"] = {
        name: (test.classes[name][1] == train.classes[name][1].mode().values).float().mean().item()
        for name in train.classes.keys() & test.classes.keys()
    }
    return results


def ridge_r2(
    train_features: Tensor,
    train_targets: Tensor,
    test_features: Tensor,
    test_targets: Tensor,
    train_groups: Tensor | None = None,
) -> float:
    """How well ridge regression tells targets: R², the mean over the targets.

    Features are standardized by the training rows. The penalty is the best of 10^-3 to 10^6 on the last fifth of the
    training rows, in a fit to the others; then all training rows are fitted.

    Args:
        train_features: (n, d) floating point.
        train_targets: (n, t) floating point.
        test_features: (m, d) floating point.
        test_targets: (m, t) floating point.
        train_groups: (n,) ascending integers: rows of one group, such as one scene, are held out together.

    Returns:
        The mean of `1 - residual / variance` over the targets, at most 1; 0 is no better than the mean of the test
        targets.

    Raises:
        ValueError: If shapes disagree or the training rows are fewer than two groups.
    """
    for name, features, targets in (("train", train_features, train_targets), ("test", test_features, test_targets)):
        check_tensors(**{f"{name}_features": features, f"{name}_targets": targets})
        if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets) or len(features) == 0:
            raise ValueError(
                f"{name}_features have shape {tuple(features.shape)} and {name}_targets {tuple(targets.shape)}, but "
                "(rows, features) and (rows, targets) are expected."
            )
    groups = torch.arange(len(train_features)) if train_groups is None else train_groups
    names = groups.unique()
    if len(names) < 2:
        raise ValueError("The training rows are of one group, but two or more are needed to hold one out.")
    is_fitted = groups < names[-max(1, round(_HELD_OUT_SHARE * len(names)))]
    train_features, train_targets = train_features.double(), train_targets.double()
    predictions = _ridge(
        train_features[is_fitted], train_targets[is_fitted], train_features[~is_fitted], _PENALTIES
    )  # (penalties, rows, targets)
    errors = (predictions - train_targets[~is_fitted]).square().sum(dim=(1, 2))
    best = _PENALTIES[errors.argmin()].view(1)
    (predicted,) = _ridge(train_features, train_targets, test_features.double(), best)
    return _r2(predicted, test_targets.double())


def shift_equivariance(
    before: Mapping[str, Tensor],
    before_mask: Tensor,
    after: Mapping[str, Tensor],
    after_mask: Tensor,
    object_ids: Tensor,
    shifts: Tensor,
) -> dict[str, Tensor]:
    """How a token stays and its map moves when an object is shifted.

    The token of the object is the one whose segment overlaps best with it, before and after by itself: a model may
    describe the object with another slot.

    Args:
        before: Tensors of [`object_features`] for M scenes: `sparse_tokens`, `localization`, `grid_size`.
        before_mask: (M, H, W) integers, the object of each pixel; 0 is the ground.
        after: The same of the scenes with one object shifted.
        after_mask: (M, H, W) integers, the same of the moved scenes.
        object_ids: (M,) integers, the object of each scene that is shifted.
        shifts: (M, 2) integers, pixels to the right and down.

    Returns:
        (M,) float32 each, NaN where the object is not visible before or after: `token_cosine`, of the object's token
        before and after; `other_cosine`, of its token before and the mean direction of all other tokens after, beside
        which the first has to be high; `same_slot`, 1 where both are the same of the r tokens; `map_iou`, of the
        segment before, moved by the shift, and the segment after; `unmoved_map_iou`, without the move, which should be
        lower.

    Raises:
        ValueError: If shapes disagree.
    """
    check_tensors(before_mask=before_mask, after_mask=after_mask, object_ids=object_ids, shifts=shifts)
    count = len(before["localization"])
    if not len(after["localization"]) == len(before_mask) == len(after_mask) == len(object_ids) == count:
        raise ValueError("before, after, their masks and object_ids must have as many rows as each other.")
    if shifts.shape != (count, 2) or shifts.is_floating_point():
        raise ValueError(
            f"shifts are {shifts.dtype} of shape {tuple(shifts.shape)}, but integers (M, 2) are expected."
        )
    parts = []
    for start in range(0, count, _CHUNK_SIZE):
        part = slice(start, start + _CHUNK_SIZE)
        first, second = (
            _object_side({name: tensor[part] for name, tensor in features.items()}, mask[part], object_ids[part])
            for features, mask in ((before, before_mask), (after, after_mask))
        )
        parts.append(_compare(first, second, shifts[part]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def follow_object(features: Mapping[str, Tensor], mask: Tensor, object_id: int = 1) -> dict[str, Tensor]:
    """What stands for an object in each of several pictures of it, such as those of [`load_moving_object`].

    The token of the object is chosen in each picture by itself, as in [`shift_equivariance`].

    Args:
        features: Tensors of [`object_features`] for M pictures: `sparse_tokens`, `localization`, `grid_size`.
        mask: (M, H, W) integers, the object of each pixel; 0 is the ground.
        object_id: The object, visible in each picture.

    Returns:
        `slot` (M,) int64, which of the r tokens it is; `token_cosine` (M,), of this token and the first picture's;
        `other_cosine` (M,), the mean cosine of the other tokens and the first picture's, beside which the first has
        to be high; `maps` (M, h, w), the token's map; and `centroid` (M, 2), the mean (x, y) of the map, in [0, 1].

    Raises:
        ValueError: If shapes disagree, or the object is not visible in a picture.
    """
    check_tensors(mask=mask)
    if len(features["localization"]) != len(mask):
        raise ValueError(f"There are features of {len(features['localization'])} pictures, but {len(mask)} masks.")
    object_ids = torch.full((len(mask),), object_id)
    side = _object_side(features, mask, object_ids)
    if not side.is_visible.all():
        raise ValueError(
            f"Object {object_id} has no pixel in the mask of picture {int(side.is_visible.long().argmin())}."
        )
    pictures = torch.arange(len(mask))
    cosines = side.tokens @ side.tokens[0, side.slot[0]]  # (M, r)
    own_cosine = cosines[pictures, side.slot]
    localization, grid_size = features["localization"].float(), features["grid_size"]
    return {
        "slot": side.slot,
        "token_cosine": own_cosine,
        "other_cosine": (cosines.sum(dim=1) - own_cosine) / max(1, cosines.shape[1] - 1),
        "maps": token_maps(localization, grid_size)[pictures, side.slot],
        "centroid": _centroids(localization, grid_size, pictures, side.slot),
    }


# What and where ------------------------------------------------------------------------------------------------------


@dataclass
class _ObjectTable:
    """The n objects of all scenes of a part, one after the other."""

    scene: Tensor  # (n,)
    descriptors: dict[str, Tensor]  # (n, d) by source
    centroid: Tensor  # (n, 2), of the token's map
    position: Tensor  # (n, 2)
    classes: dict[str, tuple[Tensor, Tensor]]  # rows and their classes, by "own_<name>" and "other_<name>"


def _object_table(part: str, features: Mapping[str, Tensor], objects: SceneObjects, min_area: int) -> _ObjectTable:
    num_scenes, num_slots = objects.position.shape[:2]
    if not len(features["localization"]) == len(features["sparse_tokens"]) == len(objects.mask) == num_scenes:
        raise ValueError(
            f"{part}_features are of {len(features['localization'])} scenes and {part}_objects of {num_scenes}: take "
            "the rows of features.index."
        )
    if objects.mask.max() > num_slots:
        raise ValueError(f"{part}_objects have ids to {objects.mask.max()}, but positions of {num_slots} objects.")
    table = torch.cat(
        [
            _token_table(maps, mask, grid, num_slots, min_area)
            for maps, mask, grid in zip(
                features["localization"].split(_CHUNK_SIZE),
                objects.mask.split(_CHUNK_SIZE),
                features["grid_size"].split(_CHUNK_SIZE),
                strict=True,
            )
        ]
    )  # (M, r, 1 + G)
    areas = table.sum(dim=1)[:, 1:]
    scene, slot = (areas >= min_area).nonzero(as_tuple=True)
    if len(scene) == 0:
        raise ValueError(f"{part}_objects have no object of at least {min_area} visible pixels.")
    token = segment_overlaps(table).argmax(dim=1)[scene, slot]
    descriptors = {"sparse_tokens": features["sparse_tokens"].float()[scene, token]}
    if "dense_features" in features:
        pooled, masked = _dense_descriptors(features, objects.mask, num_slots)
        descriptors["pooled_features"] = pooled[scene, token]
        descriptors["masked_features"] = masked[scene, slot]
    return _ObjectTable(
        scene=scene,
        descriptors=descriptors,
        centroid=_centroids(features["localization"], features["grid_size"], scene, token),
        position=objects.position[scene, slot],
        classes=_own_and_other_classes(objects.classes, areas, min_area, scene, slot),
    )


def _token_table(localization: Tensor, mask: Tensor, grid_size: Tensor, num_slots: int, min_area: int) -> Tensor:
    """Contingency tables of tokens and objects, (B, r, 1 + G), also where the last of them are nowhere."""
    segments = pixel_labels(localization, mask.shape[1:], grid_size)
    table = contingency_table(segments, mask, min_area)
    num_tokens = localization.shape[2]
    return F.pad(table, (0, 1 + num_slots - table.shape[2], 0, num_tokens - table.shape[1]))


def _dense_descriptors(features: Mapping[str, Tensor], mask: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Dense features under maps, (M, r, d), and under the masks of objects, (M, G, d)."""
    pooled, masked = [], []
    for start in range(0, len(mask), _CHUNK_SIZE):
        part = slice(start, start + _CHUNK_SIZE)
        localization, dense = features["localization"][part], features["dense_features"][part]
        rows, columns = resolve_grid_size(localization.shape[1], features["grid_size"][part])
        is_object = F.one_hot(mask[part].long(), num_slots + 1)[..., 1:].permute(0, 3, 1, 2).float()
        shares = F.adaptive_avg_pool2d(is_object, (rows, columns)).flatten(2).transpose(1, 2)  # (B, N, G)
        pooled.append(pooled_features(localization, dense))
        masked.append(pooled_features(shares, dense))
    return torch.cat(pooled), torch.cat(masked)


def _centroids(localization: Tensor, grid_size: Tensor, scene: Tensor, token: Tensor) -> Tensor:
    """(n, 2) the mean (x, y) of a token's map, in [0, 1]."""
    rows, columns = resolve_grid_size(localization.shape[1], grid_size)
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], dim=1).to(localization.device)
    centroids = pooled_features(localization, places.expand(len(localization), -1, -1))
    return centroids[scene, token]


def _own_and_other_classes(
    classes: Mapping[str, Tensor], areas: Tensor, min_area: int, scene: Tensor, slot: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows (k,) of the table of objects, and the classes (k,) of these objects or of the largest other ones."""
    other_areas = torch.where(areas >= min_area, areas, 0)[scene]  # (n, G)
    other_areas[torch.arange(len(scene)), slot] = 0
    has_other, other = other_areas.amax(dim=1) > 0, other_areas.argmax(dim=1)
    every_row = torch.arange(len(scene))
    found = {}
    for name, values in classes.items():
        found[f"own_{name}"] = every_row, values[scene, slot]
        if has_other.any():
            found[f"other_{name}"] = every_row[has_other], values[scene, other][has_other]
    return found


def _told(train: _ObjectTable, test: _ObjectTable, source: str, num_neighbours: int) -> dict[str, float]:
    told = {}
    for name in sorted(train.classes.keys() & test.classes.keys(), reverse=True):  # own before other
        (train_rows, train_labels), (test_rows, test_labels) = train.classes[name], test.classes[name]
        sets = (train.descriptors[source][train_rows], train_labels, test.descriptors[source][test_rows], test_labels)
        told[f"{name}_knn"] = knn_accuracy(*sets, k=min(num_neighbours, len(train_rows)))
        told[f"{name}_linear"] = linear_probe_accuracy(*sets)
    told["position_r2"] = ridge_r2(
        train.descriptors[source], train.position, test.descriptors[source], test.position, train.scene
    )
    return told


def _ridge(train_features: Tensor, train_targets: Tensor, features: Tensor, penalties: Tensor) -> Tensor:
    """(penalties, rows, targets) predictions by closed form, one for each penalty."""
    std, mean = torch.std_mean(train_features, dim=0, unbiased=False)
    std = torch.where(std > 0, std, 1)
    train, rows, target_mean = (train_features - mean) / std, (features - mean) / std, train_targets.mean(dim=0)
    values, vectors = torch.linalg.eigh(train.T @ train)
    rotated = vectors.T @ (train.T @ (train_targets - target_mean))  # (d, targets)
    weights = vectors @ (rotated / (values.clamp(min=0)[:, None] + penalties[:, None, None]))
    return rows @ weights + target_mean


def _r2(predicted: Tensor, targets: Tensor) -> float:
    residual = (predicted - targets).square().sum(dim=0)
    total = (targets - targets.mean(dim=0)).square().sum(dim=0)
    return (1 - residual / total).mean().item()


# Shifts --------------------------------------------------------------------------------------------------------------


@dataclass
class _ObjectSide:
    """What stands for one object of each of M scenes."""

    tokens: Tensor  # (M, r, d), all tokens, of length 1
    slot: Tensor  # (M,), the object's token
    segment: Tensor  # (M, H, W) bool, the pixels of the object's token
    is_visible: Tensor  # (M,)


def _object_side(features: Mapping[str, Tensor], mask: Tensor, object_ids: Tensor) -> _ObjectSide:
    segments = pixel_labels(features["localization"], mask.shape[1:], features["grid_size"])
    is_object = mask == object_ids.view(-1, 1, 1)
    table = contingency_table(segments, is_object.long(), min_area=1)
    is_visible = is_object.flatten(1).any(dim=1)
    slot = segment_overlaps(table).squeeze(2).argmax(dim=1) if table.shape[2] > 1 else torch.zeros_like(object_ids)
    tokens = F.normalize(features["sparse_tokens"].float(), dim=2)
    return _ObjectSide(tokens, slot, segments == slot.view(-1, 1, 1), is_visible)


def _compare(before: _ObjectSide, after: _ObjectSide, shifts: Tensor) -> dict[str, Tensor]:
    rows = torch.arange(len(shifts))
    own = before.tokens[rows, before.slot]
    cosines = (after.tokens @ own.unsqueeze(2)).squeeze(2)  # (M, r)
    own_cosine = cosines[rows, after.slot]
    values = {
        "token_cosine": own_cosine,
        "other_cosine": (cosines.sum(dim=1) - own_cosine) / max(1, cosines.shape[1] - 1),
        "same_slot": (before.slot == after.slot).float(),
        "map_iou": _iou(*_moved(before.segment, after.segment, shifts)),
        "unmoved_map_iou": _iou(before.segment, after.segment),
    }
    is_visible = before.is_visible & after.is_visible
    return {name: torch.where(is_visible, value, torch.nan) for name, value in values.items()}


def _moved(before: Tensor, after: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """The segments before, moved, and those after, (M, H, W) bool: both without the pixels that come from outside."""
    height, width = before.shape[1:]
    column = torch.arange(width) - shifts[:, :1]  # (M, W), where each pixel comes from
    row = torch.arange(height) - shifts[:, 1:]
    is_inside = ((row >= 0) & (row < height)).unsqueeze(2) & ((column >= 0) & (column < width)).unsqueeze(1)
    image = torch.arange(len(before)).view(-1, 1, 1)
    moved = before[image, row.clamp(0, height - 1).unsqueeze(2), column.clamp(0, width - 1).unsqueeze(1)]
    return moved & is_inside, after & is_inside


def _iou(first: Tensor, second: Tensor) -> Tensor:
    return (first & second).sum(dim=(1, 2)) / (first | second).sum(dim=(1, 2)).clamp(min=1)
