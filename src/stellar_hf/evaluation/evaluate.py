# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Evaluation of a STELLAR model on labelled images and on scenes with known regions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .classification import concept_accuracy, knn_accuracy, linear_probe_accuracy
from .localization import concept_labels, localization_iou
from .reconstruction import psnr

if TYPE_CHECKING:
    import datasets
    from PIL import Image
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


@dataclass
class TokenFeatures:
    """What a model says about M images; float32 tensors on the CPU.

    Attributes:
        sparse_tokens: (M, r, d).
        localization: (M, N, r); rows sum to 1.
        psnr: (M,) in dB, or None where it was not asked for or the model does not reconstruct pixels.
    """

    sparse_tokens: Tensor
    localization: Tensor
    psnr: Tensor | None

    @property
    def pooled(self) -> Tensor:
        """(M, d): mean of the sparse tokens."""
        return self.sparse_tokens.mean(dim=1)


def extract_features(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    batch_size: int = 256,
    reconstruct: bool = False,
    description: str = "features",
    show_progress: bool = True,
) -> TokenFeatures:
    """Runs a model once over the images of a dataset, without gradients and in evaluation mode.

    Args:
        model: `StellarForPreTraining`, on any device; its modules' training flags are restored.
        dataset: Has a column `image` of PIL images whose sides are `model.config.image_size`.
        batch_size: Images of a forward pass.
        reconstruct: Whether to decode the images, too, and measure the PSNR; takes about twice as long.
        description: Title of the progress bar.
        show_progress: Whether to show a progress bar.

    Returns:
        Tokens, localization and, if asked for and with the pixel head, the PSNR of every image's reconstruction.

    Raises:
        ValueError: If the dataset is empty, lacks the column, or an image has another size.
    """
    config = model.config
    with_psnr = reconstruct and config.reconstruction_target == "pixels"
    size = (config.image_size, config.image_size)
    mean = torch.tensor(config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(config.image_std).view(1, 3, 1, 1)
    sparse_tokens, localization, ratios = [], [], []
    with torch.inference_mode(), _evaluation_mode(model):
        batches = _image_batches(dataset, batch_size, size)
        num_batches = -(-len(dataset) // batch_size)
        for pixels in tqdm(batches, total=num_batches, desc=description, leave=False, disable=not show_progress):
            pixel_values = ((pixels - mean) / std).to(device=model.device, dtype=model.dtype)
            output = model(pixel_values, return_loss=False) if with_psnr else model.base_model(pixel_values)
            sparse_tokens.append(output.sparse_tokens.float().cpu())
            localization.append(output.localization.float().cpu())
            if with_psnr:
                ratios.append(psnr(output.reconstruction.float().cpu(), pixels))
    return TokenFeatures(
        sparse_tokens=torch.cat(sparse_tokens),
        localization=torch.cat(localization),
        psnr=torch.cat(ratios) if ratios else None,
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
        name: extract_features(
            model,
            dataset,
            batch_size,
            reconstruct=name == "scenes",
            description=f"evaluate {name.replace('_', ' ')}",
            show_progress=show_progress,
        )
        for name, dataset in sets.items()
    }
    results = _classify(features["crops_train"].pooled, crops_train, features["crops_test"].pooled, crops_test)
    results |= concept_accuracy(
        features["scenes_train"].sparse_tokens,
        _token_classes(features["scenes_train"].localization, scenes_train),
        features["scenes"].sparse_tokens,
        _token_classes(features["scenes"].localization, scenes),
    )
    test = features["scenes"]
    if test.psnr is not None:
        results["psnr"] = test.psnr.mean().item()
    foreground = _column(scenes, "mask") == 1
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
    train = _all_pixels(crops_train)
    test = _all_pixels(crops_test)
    mean_image = train.mean(dim=0)
    return _classify((train - mean_image).flatten(1), crops_train, (test - mean_image).flatten(1), crops_test)


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
    train_features: Tensor, crops_train: datasets.Dataset, test_features: Tensor, crops_test: datasets.Dataset
) -> dict[str, float]:
    sets = (train_features, _column(crops_train, "label"), test_features, _column(crops_test, "label"))
    return {"knn_accuracy": knn_accuracy(*sets), "linear_accuracy": linear_probe_accuracy(*sets)}


def _token_classes(localization: Tensor, scenes: datasets.Dataset) -> Tensor:
    """(M, r): class of the region that each token covers, -1 where it covers none."""
    classes = _column(scenes, "labels")  # (M, regions)
    mask = _column(scenes, "mask")
    regions = _in_batches(lambda maps, mask: concept_labels(maps, mask, classes.shape[1]), localization, mask)
    return torch.where(regions >= 0, classes.gather(1, regions.clamp(min=0)), -1)


def _in_batches(function: Callable[..., Tensor], *tensors: Tensor, batch_size: int = 256) -> Tensor:
    """Bounds the memory of functions that work at the resolution of pixels."""
    batches = zip(*(tensor.split(batch_size) for tensor in tensors), strict=True)
    return torch.cat([function(*batch) for batch in batches])


def _column(dataset: datasets.Dataset, name: str) -> Tensor:
    _check_column(dataset, name)
    return torch.tensor(np.asarray(dataset.select_columns(name).with_format("numpy")[:][name]))


def _check_column(dataset: datasets.Dataset, name: str) -> None:
    if name not in dataset.column_names:
        raise ValueError(f"The dataset has no column {name!r}, only {dataset.column_names}: rename or add it.")


def _all_pixels(dataset: datasets.Dataset) -> Tensor:
    _check_column(dataset, "image")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: pass at least one image.")
    return torch.cat(list(_image_batches(dataset, 256, dataset[0]["image"].size[::-1])))


def _image_batches(dataset: datasets.Dataset, batch_size: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yields (batch, 3, H, W) float32 in [0, 1]; `size` is the (H, W) that all images must have."""
    _check_column(dataset, "image")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: pass at least one image.")
    images = dataset.select_columns("image")
    for start in range(0, len(dataset), batch_size):
        batch = images[start : start + batch_size]["image"]
        for index, image in enumerate(batch, start):
            _check_size(image, index, size)
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in batch])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _check_size(image: Image.Image, index: int, size: tuple[int, int]) -> None:
    if image.size[::-1] != size:
        raise ValueError(
            f"Image {index} of the dataset is {image.width}x{image.height} pixels, but {size[1]}x{size[0]} is "
            "expected: resize the images first."
        )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Flag by flag: `model.train()` would also wake modules that were frozen in evaluation mode.
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
