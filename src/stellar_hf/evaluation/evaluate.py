# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Evaluation of a STELLAR model on labelled images and on scenes with known regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data import images_to_tensor, undecoded
from ..features import encode_images
from .classification import concept_accuracy
from .knn import knn_accuracy
from .linear import linear_probe_accuracy
from .localization import concept_labels, localization_iou
from .reconstruction import tokens_and_psnr

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

# Key of a result, two-line column title, factor to the shown unit, decimals.
TableColumn = tuple[str, tuple[str, str], float, int]
TABLE_COLUMNS: tuple[TableColumn, ...] = (
    ("knn_accuracy", ("kNN", "%"), 100, 1),
    ("linear_accuracy", ("linear", "%"), 100, 1),
    ("concept_accuracy", ("concept", "%"), 100, 1),
    ("concept_coverage", ("coverage", "%"), 100, 1),
    ("psnr", ("PSNR", "dB"), 1, 1),
    ("localization_miou", ("localization", "mIoU"), 1, 2),
)


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


def raw_pixel_baseline(crops_train: datasets.Dataset, crops_test: datasets.Dataset) -> dict[str, float]:
    """Measures what flattened pixels, less the mean image of the training crops, already know.

    Args:
        crops_train: Columns `image` and `label`; images of one size.
        crops_test: The same of the test split.

    Returns:
        `knn_accuracy` and `linear_accuracy`, measured as for a model.

    Raises:
        ValueError: If a dataset is empty or lacks a column, or images differ in size.
    """
    sets = (crops_train, crops_test)
    train, test = (_all_pixels(crops) for crops in sets)
    train_labels, test_labels = (_Columns(crops)["label"] for crops in sets)
    mean_image = train.mean(dim=0)
    return _classify((train - mean_image).flatten(1), train_labels, (test - mean_image).flatten(1), test_labels)


def format_results_table(
    rows: Mapping[str, Mapping[str, float]], columns: Sequence[TableColumn] = TABLE_COLUMNS
) -> str:
    """Formats results as an aligned text table of at most 80 columns (for row names of up to 19 characters).

    Args:
        rows: Results by row name, such as `{"before training": evaluate_stellar(...), ...}`. Keys that are not
            columns of the table are left out.
        columns: Key, title in two lines, factor and decimals of each column.

    Returns:
        The table without a final line break; missing values are shown as "–".
    """
    name_width = max((len(name) for name in rows), default=0)
    widths = [max(len("100.0"), *map(len, title)) for _, title, _, _ in columns]

    def line(name: str, cells: list[str]) -> str:
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return "   ".join([f"{name:<{name_width}}", *cells])

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


def _all_pixels(dataset: datasets.Dataset) -> Tensor:
    """(M, 3, H, W) float32 in [0, 1]."""
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: pass at least one image.")
    images = images_to_tensor(undecoded(dataset, "image")["image"][:])
    return _pixels(images, (images[0].shape[1], images[0].shape[2]))


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
