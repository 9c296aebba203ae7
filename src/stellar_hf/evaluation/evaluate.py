# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Evaluation of a STELLAR model on scenes whose objects are known, and on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..features import encode_images
from .baselines import TrainingFreeEncoder
from .classification import concept_accuracy
from .disentanglement import SceneObjects, what_and_where
from .knn import knn_accuracy
from .linear import linear_probe_accuracy
from .localization import concept_labels, localization_iou
from .objects import object_scores, segmentations
from .reconstruction import tokens_and_psnr

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

# Key of a result, two-line column title, factor to the shown unit, decimals.
TableColumn = tuple[str, tuple[str, str], float, int]
SCENE_COLUMNS: tuple[TableColumn, ...] = (
    ("foreground_ari", ("FG-ARI", "%"), 100, 1),
    ("mean_best_overlap", ("mBO", "%"), 100, 1),
    ("object_recall", ("found", "%"), 100, 1),
    ("own_material_knn", ("material", "%"), 100, 1),
    ("other_material_knn", ("other's", "%"), 100, 1),
    ("own_shape_linear", ("shape", "%"), 100, 1),
    ("token_position_r2", ("place", "S, R²"), 1, 2),
    ("map_position_r2", ("place", "L, R²"), 1, 2),
    ("psnr", ("PSNR", "dB"), 1, 1),
)


def evaluate_scenes(
    model: Any,
    processor: Any,
    train: datasets.Dataset,
    test: datasets.Dataset,
    *,
    num_neighbours: int = 20,
    min_area: int = 10,
    batch_size: int = 64,
    description: str = "evaluate",
    show_progress: bool = True,
) -> dict[str, float]:
    """Measures on scenes whose objects are known whether tokens lie on objects, and what they tell of them.

    Args:
        model: `StellarForPreTraining`, `StellarForImageReconstruction`, or a baseline with tokens and maps, such as
            `KMeansSegments`.
        processor: Its image processor, which must show it all of each image.
        train: Scenes to find neighbours in and to fit probes to, as [`load_tabletop_scenes`] makes them.
        test: Scenes to measure on.
        num_neighbours: k of kNN.
        min_area: Least number of visible pixels of an object that is asked for.
        batch_size: Images of a forward pass.
        description: Begins the titles of the progress bars.
        show_progress: Whether to show progress bars.

    Returns:
        - `foreground_ari`, `mean_best_overlap`, `object_recall`, `ari` and `corloc`: [`object_scores`] of the tokens
          whose maps are the largest, means over the test scenes;
        - `own_material_knn`, `own_shape_linear`, … and `other_material_knn`, …: what an object's token tells of the
          object itself and of the largest other one, accuracies of [`what_and_where`];
        - `token_position_r2` and `map_position_r2`: how well the object's place is told from its token S, and from the
          centroid of its map L (R²: 1 exactly, 0 not at all);
        - `own_material_chance`, …: the accuracies of always naming the most frequent class;
        - `psnr`: of the reconstructions in dB, with the pixel head.

    Raises:
        ValueError: If a dataset is empty or lacks a column, or training has fewer than two scenes.
    """
    encode = None if isinstance(model, TrainingFreeEncoder) else tokens_and_psnr
    features = [
        encode_images(
            model,
            scenes,
            processor,
            encode=encode,
            batch_size=batch_size,
            description=f"{description}, {name} scenes",
            show_progress=show_progress,
        )
        for name, scenes in (("train", train), ("test", test))
    ]
    objects = [
        SceneObjects.from_dataset(scenes, part.index) for scenes, part in zip((train, test), features, strict=True)
    ]
    known, measured = (cast("dict[str, Tensor]", part.tensors) for part in features)  # images of one size
    told = what_and_where(known, objects[0], measured, objects[1], min_area, num_neighbours)
    tokens, chance = told["sparse_tokens"], told["chance"]
    maps = {name: measured[name] for name in ("localization", "grid_size")}
    mask = objects[1].mask
    (segmentation,) = segmentations(maps, mask.shape[1:], num_segments=maps["localization"].shape[-1]).values()
    results = {name: values.nanmean().item() for name, values in object_scores(segmentation, mask, min_area).items()}
    results["token_position_r2"] = tokens.pop("position_r2")
    results["map_position_r2"] = told["localization"]["position_r2"]
    results |= tokens | {f"{name}_chance": accuracy for name, accuracy in chance.items()}
    if "psnr" in measured:
        results["psnr"] = measured["psnr"].mean().item()
    return results


def evaluate_stellar(
    model: PreTrainedModel,
    *,
    crops_train: datasets.Dataset,
    crops_test: datasets.Dataset,
    scenes_train: datasets.Dataset,
    scenes: datasets.Dataset,
    batch_size: int = 256,
    show_progress: bool = True,
) -> dict[str, float]:
    """Measures what the sparse tokens of a model know: which images, which regions, where, and how exactly.

    Args:
        model: `StellarForPreTraining`.
        crops_train: Neighbours and training set of the probe: columns `image` and `label`, such as
            `load_photo_mosaics("train", num_regions=1)`.
        crops_test: The same of the test split.
        scenes_train: Neighbours of the concepts: columns `image`, `labels` (class of each region id) and `mask`, such
            as `load_photo_mosaics("train", num_regions=2)`.
        scenes: The same of the test split; region 1 is the foreground.
        batch_size: Images of a forward pass.
        show_progress: Whether to show progress bars.

    Returns:
        `knn_accuracy` and `linear_accuracy` of the pooled sparse tokens on the crops; on the scenes
        `concept_accuracy` and `concept_coverage`, the mean `psnr` in dB (only with the pixel head),
        `localization_miou`, and `localization_sharpness`, the mean largest entry of the localization's rows.

    Raises:
        ValueError: If a dataset is empty or lacks a column, or an image does not have the model's size.
    """
    sets = {"crops_train": crops_train, "crops_test": crops_test, "scenes_train": scenes_train, "scenes": scenes}
    features = {
        name: encode_images(
            model,
            dataset,
            _OnlyNormalized(model.config),
            encode=tokens_and_psnr if name == "scenes" else None,
            batch_size=batch_size,
            description=f"evaluate {name.replace('_', ' ')}",
            show_progress=show_progress,
        )
        for name, dataset in sets.items()
    }
    columns = {name: _Columns(dataset, features[name].index) for name, dataset in sets.items()}
    results = _classify(
        features["crops_train"].pooler_output,
        columns["crops_train"]["label"],
        features["crops_test"].pooler_output,
        columns["crops_test"]["label"],
    )
    results |= concept_accuracy(
        features["scenes_train"].sparse_tokens,
        _token_classes(features["scenes_train"].localization, columns["scenes_train"]),
        features["scenes"].sparse_tokens,
        _token_classes(features["scenes"].localization, columns["scenes"]),
    )
    test = features["scenes"]
    if "psnr" in test.tensors:
        results["psnr"] = test.psnr.mean().item()
    foreground = columns["scenes"]["mask"] == 1
    side = model.config.image_size // model.config.patch_size
    overlap = _in_batches(lambda maps, mask: localization_iou(maps, mask, (side, side)), test.localization, foreground)
    results["localization_miou"] = overlap.mean().item()
    results["localization_sharpness"] = test.localization.amax(dim=-1).mean().item()
    return results


def format_results_table(
    rows: Mapping[str, Mapping[str, float]], columns: Sequence[TableColumn] = SCENE_COLUMNS
) -> str:
    """Formats results as an aligned text table.

    Args:
        rows: Results by row name, such as `{"trained": evaluate_scenes(...), ...}`. Keys that are not columns of the
            table are left out.
        columns: Key, title in two lines, factor and decimals of each column; those of [`evaluate_scenes`] by default,
            which take 80 characters with row names of up to 11.

    Returns:
        The table without a final line break; missing values are shown as "–".
    """
    name_width = max((len(name) for name in rows), default=0)
    widths = [max(len("100.0"), *map(len, title)) for _, title, _, _ in columns]

    def line(name: str, cells: list[str]) -> str:
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([f"{name:<{name_width}}", *cells])

    titles = [line("", [title[row] for _, title, _, _ in columns]) for row in (0, 1)]
    body = [
        line(
            name,
            [
                f"{results[key] * factor:.{decimals}f}" if key in results else "–"
                for key, _, factor, decimals in columns
            ],
        )
        for name, results in rows.items()
    ]
    return "\n".join([*titles, "-" * len(titles[0]), *body])


def _classify(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> dict[str, float]:
    sets = (train_features, train_labels, test_features, test_labels)
    return {"knn_accuracy": knn_accuracy(*sets), "linear_accuracy": linear_probe_accuracy(*sets)}


def _token_classes(localization: Tensor, scenes: _Columns) -> Tensor:
    """(M, r): class of the region that each token covers, -1 where it covers none."""
    classes, mask = scenes["labels"], scenes["mask"]  # (M, regions), (M, H, W)
    regions = _in_batches(lambda maps, mask: concept_labels(maps, mask, classes.shape[1]), localization, mask)
    return torch.where(regions >= 0, classes.gather(1, regions.clamp(min=0)), -1)


def _in_batches(function: Callable[..., Tensor], *tensors: Tensor, batch_size: int = 256) -> Tensor:
    """Bounds the memory of functions that work at the resolution of pixels."""
    batches = zip(*(tensor.split(batch_size) for tensor in tensors), strict=True)
    return torch.cat([function(*batch) for batch in batches])


class _Columns:
    """The columns of a dataset as tensors, of some rows or of all."""

    def __init__(self, dataset: datasets.Dataset, rows: Tensor | None = None):
        self.dataset = dataset
        self.rows = slice(None) if rows is None else rows

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.dataset.column_names:
            raise ValueError(
                f"The dataset has no column {name!r}, only {self.dataset.column_names}: rename or add it."
            )
        return torch.tensor(np.asarray(self.dataset.select_columns(name).with_format("numpy")[:][name]))[self.rows]


class _OnlyNormalized:
    """A processor of images that have the model's size: their masks would not fit if they were resized or cropped."""

    def __init__(self, config: Any):
        self.size = (config.image_size, config.image_size)
        self.mean = torch.tensor(config.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(config.image_std).view(1, 3, 1, 1)

    def __call__(self, images: Sequence[Tensor], **kwargs) -> dict[str, Tensor]:
        return {"pixel_values": (_pixels(images, self.size) - self.mean) / self.std}


def _pixels(images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """(M, 3, H, W) float32 in [0, 1]; `size` is the (H, W) that all images must have."""
    for image in images:
        height, width = image.shape[1:]
        if (height, width) != size:
            raise ValueError(
                f"An image of the dataset is {width}x{height} pixels, but {size[1]}x{size[0]} is expected: resize the "
                "images first."
            )
    return torch.stack(list(images)).float() / 255
