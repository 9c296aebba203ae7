# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Semantic segmentation with frozen features: the linear probe, nearest patches, and the mean IoU over a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..features import ImageFeatures
from ..features.checks import check_integer, check_tensors
from ..localization_stellar import resolve_grid_size, upsample_maps
from ..loss_stellar import dice_loss, pixel_cross_entropy
from .knn import nearest_neighbours
from .representations import encode_all_patches

logger = logging.get_logger(__name__)

_IGNORED = 255


# Features and labels ------------------------------------------------------------------------------------------------


def dense_features(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """[`patch_features`] in float16, to save memory: the call of a model for [`encode_images`].

    The float16 is kept: 2 N d bytes an image (the 20,210 of ADE20K take 6 GB with ViT-B/16 at 224 pixels).
    """
    features = patch_features(model, pixel_values)
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in features.items()}


def patch_features(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """A vector for each patch of images.

    Args:
        model: Any vision encoder of Transformers whose sequence ends with its patches, row by row (ViT, DINO, DINOv2,
            ViT-MAE), or a STELLAR model, with heads or adapters or without.
        pixel_values: (B, 3, H, W) float32.

    Returns:
        `dense` (B, N, d), D, and `grid_size` (B, 2) int64. A STELLAR model also gives `sparse_tokens` (B, r, d) and
        `localization` (B, N, r), S and L.

    Raises:
        ValueError: If the model gives fewer vectors than there are patches.
    """
    encoder, output = encode_all_patches(model, pixel_values)
    if output.get("localization") is not None:
        _, dense, sparse_tokens = encoder.split(output.last_hidden_state)
        tensors = {"dense": dense, "sparse_tokens": sparse_tokens, "localization": output.localization}
        return tensors | {"grid_size": output.grid_size}
    rows, columns = (side // encoder.config.patch_size for side in pixel_values.shape[-2:])
    hidden_states = output.last_hidden_state
    if hidden_states.ndim != 3 or hidden_states.shape[1] < rows * columns:
        raise ValueError(
            f"{type(encoder).__name__} gives {tuple(hidden_states.shape)} for images of {rows}x{columns} patches, but "
            "a vector for each patch is needed: an encoder that merges patches has none."
        )
    dense = hidden_states[:, -rows * columns :]
    return {"dense": dense, "grid_size": torch.tensor([rows, columns], device=dense.device).expand(len(dense), 2)}


def low_rank_features(sparse_tokens: Tensor, localization: Tensor, num_tokens: int | None = None) -> Tensor:
    """Z = L S, or the part of it that the tokens of largest mass carry.

    The mass of a token is the sum of its column of L. L is cut, not renormalized, so that Z of one token is that token
    times its map: a matrix of rank 1.

    Args:
        sparse_tokens: S, (B, r, d) floating point.
        localization: L, (B, N, r) floating point.
        num_tokens: How many tokens count, all r by default.

    Returns:
        (B, N, d) float32.
    """
    tokens, maps = sparse_tokens.float(), localization.float()
    if num_tokens is not None and num_tokens < tokens.shape[1]:
        largest = maps.sum(dim=1).topk(num_tokens, dim=1).indices  # (B, k)
        tokens = tokens.gather(1, largest.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        maps = maps.gather(2, largest.unsqueeze(1).expand(-1, maps.shape[1], -1))
    return maps @ tokens


def load_label_maps(
    dataset: Any,
    rows: Sequence[int] | Tensor,
    processor: Any = None,
    *,
    mask_column: str = "mask",
    classes: Sequence[int] | None = None,
    ignore_index: int = _IGNORED,
    show_progress: bool = True,
) -> Tensor:
    """The class of each pixel, in the frame that the images have after their processor.

    A mask that cannot be read is named in the log, and its pixels are ignored.

    Args:
        dataset: Rows with a mask: a PIL image of ids, with or without a palette, or an array (H, W).
        rows: Rows to take, such as the `index` of [`ImageFeatures`].
        processor: The image processor of the images, which resizes and crops the masks as it does the images, but
            with the nearest id. Without it masks are taken as they are.
        mask_column: Column of the masks.
        classes: Class of each id, `ignore_index` for ids that do not count; the ids themselves by default. For
            ADE20K, whose 0 is unlabelled: `[255, *range(150)]`.
        ignore_index: Class of pixels that do not count, in [0, 255].
        show_progress: Whether to show a progress bar.

    Returns:
        (M, H, W) uint8.

    Raises:
        ValueError: If there are no rows, masks have different sizes, or an id has no class.
    """
    table = None if classes is None else np.asarray(classes, dtype=np.uint8)
    maps: list[Tensor | None] = []
    for row in tqdm(list(map(int, rows)), desc="masks", unit=" images", leave=False, disable=not show_progress):
        try:
            mask = _read_mask(dataset[row][mask_column])
        except (OSError, SyntaxError) as error:  # Pillow raises a SyntaxError for a broken PNG
            logger.warning(f"The mask of image {row} cannot be read ({error}): its pixels are ignored.")
            maps.append(None)
        else:
            mask = mask if table is None else _mapped(mask, table, row)
            maps.append(torch.from_numpy(_processed(mask, processor)))
    sizes = {mask.shape for mask in maps if mask is not None}
    if len(sizes) != 1:
        raise ValueError(
            f"{len(maps)} masks have the sizes {sorted(map(tuple, sizes))}, but one is needed: pass the processor "
            "that resizes and crops the images."
        )
    ignored = torch.full(sizes.pop(), ignore_index, dtype=torch.uint8)
    return torch.stack([ignored if mask is None else mask for mask in maps])


def grid_labels(
    labels: Tensor, grid_size: Sequence[int], reduction: Literal["nearest", "nearest-exact"] = "nearest-exact"
) -> Tensor:
    """Labels of pixels (B, H, W) reduced to one for each patch (B, h, w), of the same type.

    Args:
        labels: (B, H, W) integers in [0, 255].
        grid_size: (h, w).
        reduction: As in `torch.nn.functional.interpolate`: "nearest-exact" takes the pixel in a patch's middle,
            "nearest" the one in its upper left corner, as the authors of STELLAR do.
    """
    return F.interpolate(labels[:, None].float(), size=tuple(grid_size), mode=reduction)[:, 0].to(labels.dtype)


def _read_mask(mask: Any) -> np.ndarray:
    ids = np.asarray(mask)
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise ValueError(
            f"A mask is {ids.dtype} of shape {ids.shape}, but ids of pixels are expected: integers (H, W), or an "
            "image with one channel."
        )
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        raise ValueError(f"A mask has ids from {ids.min()} to {ids.max()}, but they must be in [0, 255].")
    return ids.astype(np.uint8)


def _mapped(mask: np.ndarray, table: np.ndarray, row: int) -> np.ndarray:
    if mask.max() >= len(table):
        raise ValueError(
            f"The mask of image {row} has the id {mask.max()}, but classes has only {len(table)} entries: add one for "
            "each id."
        )
    return table[mask]


def _processed(mask: np.ndarray, processor: Any) -> np.ndarray:
    """A mask as its image is resized and cropped."""
    if processor is None:
        return mask
    image = Image.fromarray(np.repeat(mask[..., None], 3, axis=2))
    pixels = processor(
        [image], resample=Image.Resampling.NEAREST, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"]
    return np.asarray(pixels)[0, 0].astype(np.uint8)


# Measure ------------------------------------------------------------------------------------------------------------


def confusion_matrix(
    prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = _IGNORED
) -> Tensor:
    """Counts of pixels by true and predicted class. Those of batches are summed for those of a set.

    Args:
        prediction: Integers in [0, num_classes), of any shape.
        labels: Integers of the same shape, in [0, num_classes) or `ignore_index`.
        num_classes: Number C of classes.
        ignore_index: Label of pixels that do not count.

    Returns:
        (C, C) int64: rows are true classes, columns predicted ones.

    Raises:
        ValueError: If shapes differ or a class is out of range.
    """
    check_tensors(prediction=prediction, labels=labels)
    if prediction.shape != labels.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and labels {tuple(labels.shape)}, but they must be equal."
        )
    counted = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    truth, predicted = labels[counted].long(), prediction[counted].long()
    for name, classes in (("labels", truth), ("prediction", predicted)):
        if classes.numel() and not (classes.min() >= 0 and classes.max() < num_classes):
            raise ValueError(
                f"{name} hold classes from {classes.min()} to {classes.max()}, but must be in [0, {num_classes})"
                + (f" or the ignored {ignore_index}." if name == "labels" else ".")
            )
    return torch.bincount(truth * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (C,) float64; NaN for a class that is neither true nor predicted."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(dim=0) + confusion.sum(dim=1) - intersection)


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union of the classes that occur, in the truth or in a prediction.

    The counts are those of the whole set: a mean over batches or images would be another, larger number.

    Args:
        confusion: (C, C) counts, as [`confusion_matrix`] gives them.

    Returns:
        A number in [0, 1]; NaN if no pixel counts.
    """
    return class_iou(confusion).nanmean().item()


def _segmentation_metrics(pixels: Tensor, grid: Tensor) -> dict[str, float]:
    return {
        "miou": mean_iou(pixels),
        "pixel_accuracy": (pixels.diagonal().sum() / pixels.sum()).item(),
        "grid_miou": mean_iou(grid),
    }


# Linear probe -------------------------------------------------------------------------------------------------------


class SegmentationProbes(nn.Module):
    """
    Linear classifiers of patches on frozen features, one for each kind of features: BatchNorm and a 1x1 convolution.

    Args:
        hidden_size: Channels d.
        num_classes: Number C of classes.
        num_tokens: For each kind of features how many tokens Z is made of, None for D.
        seed: Of the initial weights, which are the same for every probe, whatever others there are.

    Attributes:
        num_tokens: As given.
        label_reduction: How labels were reduced to patches, as in [`grid_labels`].
        ignore_index: Label of pixels that do not count.
    """

    def __init__(self, hidden_size: int, num_classes: int, num_tokens: dict[str, int | None], seed: int = 0):
        super().__init__()
        self.num_classes = num_classes
        self.num_tokens = num_tokens
        self.label_reduction: Literal["nearest", "nearest-exact"] = "nearest-exact"
        self.ignore_index = _IGNORED
        self.probes = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            for name in num_tokens:
                torch.manual_seed(seed)
                self.probes[name] = nn.Sequential(nn.BatchNorm1d(hidden_size), nn.Linear(hidden_size, num_classes))

    def logits(self, batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`dense` (B, N, d), and `sparse_tokens` and `localization` where a probe needs them, to names and logits
        (B, N, C) of each probe, one after the other."""
        for name, probe in self.probes.items():
            features = _probed_features(batch, self.num_tokens[name])
            yield name, probe(features.flatten(0, 1)).unflatten(0, features.shape[:2])


def train_segmentation_probe(
    features: ImageFeatures,
    labels: Tensor,
    num_classes: int,
    *,
    num_tokens: Sequence[int] | None = None,
    epochs: int = 80,
    batch_size: int = 2048,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-4,
    label_reduction: Literal["nearest", "nearest-exact"] = "nearest-exact",
    ignore_index: int = _IGNORED,
    device: torch.device | str = "cpu",
    seed: int = 0,
    show_progress: bool = True,
) -> SegmentationProbes:
    """Trains linear probes of semantic segmentation: on D, and on Z of 1 to r tokens, all of them at once.

    The recipe is the authors' (cross entropy plus Dice, AdamW), but without random crops, so that every image is
    encoded once. Every probe ends with the weights that it would have alone. The result does not depend on the number
    of processes: each trains all probes.

        train = encode_images(model, dataset, processor, encode=dense_features)
        labels = load_label_maps(dataset, train.index, processor)
        probes = train_segmentation_probe(train, labels, num_classes=150)

    Args:
        features: What [`dense_features`] gives of the training images, all of one size.
        labels: (M, H, W) integers in [0, num_classes) or `ignore_index`, the classes of their pixels.
        num_classes: Number C of classes.
        num_tokens: Numbers of tokens, those of largest mass, that Z is made of; by default the powers of two below r,
            and r. Without S and L there is the probe on D alone.
        epochs: Passes over the images.
        batch_size: Images of a step. A few thousand steps are needed: choose it smaller, or a larger learning rate,
            for a few thousand images.
        learning_rate: Of AdamW, constant.
        weight_decay: Of AdamW.
        label_reduction: As in [`grid_labels`]; "nearest" is the authors', which moves what is learned by half a patch.
        ignore_index: Label of pixels that do not count.
        device: Where to train.
        seed: Of the initial weights and the order of images.
        show_progress: Whether to show a progress bar.

    Returns:
        Probes `dense`, `low_rank` (Z of all tokens) and `low_rank_k` (of k tokens), in evaluation mode.

    Raises:
        ValueError: If features and labels do not fit, a class is out of range, or a number is impossible.
    """
    check_integer("epochs", epochs)
    check_integer("batch_size", batch_size)
    grid_size = _check_features(features, labels)
    targets = grid_labels(labels, grid_size, label_reduction).flatten(1).long()
    _check_classes(labels, num_classes, ignore_index)
    probes = SegmentationProbes(features.dense.shape[2], num_classes, _kinds(features, num_tokens), seed).to(device)
    probes.label_reduction, probes.ignore_index = label_reduction, ignore_index
    optimizer = torch.optim.AdamW(probes.parameters(), lr=learning_rate, weight_decay=weight_decay)
    order = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc="segmentation probes", leave=False, disable=not show_progress):
        for rows in torch.randperm(len(labels), generator=order).split(batch_size):
            wanted = targets[rows].to(device)
            # One after the other, so that only one holds its activations.
            for _, logits in probes.logits(_batch(features, rows, device)):
                _segmentation_loss(logits.flatten(0, 1), wanted.flatten(), ignore_index).backward()
            optimizer.step()
            optimizer.zero_grad()
    return probes.eval()


@torch.no_grad()
def segmentation_probe_scores(
    probes: SegmentationProbes, features: ImageFeatures, labels: Tensor, *, batch_size: int = 16
) -> dict[str, dict[str, float]]:
    """Measures probes on images, over the whole set.

    Args:
        probes: What [`train_segmentation_probe`] gives.
        features: What [`dense_features`] gives of the test images.
        labels: (M, H, W) classes of their pixels.
        batch_size: Images at once, whose logits are held at the size of the labels.

    Returns:
        For each probe `miou` and `pixel_accuracy` of logits that are upsampled bilinearly to the labels' size, and
        `grid_miou` of patches, against labels that are reduced as for training.

    Raises:
        ValueError: If features and labels do not fit, or a class is out of range.
    """
    grid_size = _check_features(features, labels)
    device = next(probes.parameters()).device
    size, classes, ignored = labels.shape[1:], probes.num_classes, probes.ignore_index
    pixels = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in probes.probes}
    grid = {name: torch.zeros_like(confusion) for name, confusion in pixels.items()}
    for rows in torch.arange(len(labels)).split(batch_size):
        truth = labels[rows]
        patch_truth = grid_labels(truth, grid_size, probes.label_reduction)
        for name, logits in probes.logits(_batch(features, rows, device)):
            maps = logits.transpose(1, 2).unflatten(2, grid_size)
            grid[name] += confusion_matrix(maps.argmax(dim=1).cpu(), patch_truth, classes, ignored)
            pixels[name] += confusion_matrix(upsample_maps(maps, size).argmax(dim=1).cpu(), truth, classes, ignored)
    return {name: _segmentation_metrics(pixels[name], grid[name]) for name in pixels}


def _segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return pixel_cross_entropy(logits, labels, ignore_index) + dice_loss(logits, labels, ignore_index)


def _kinds(features: ImageFeatures, num_tokens: Sequence[int] | None) -> dict[str, int | None]:
    """The number of tokens of each probe by its name, None for D."""
    if "sparse_tokens" not in features.tensors:
        if num_tokens:
            raise ValueError(f"num_tokens is {list(num_tokens)}, but these features have no sparse tokens.")
        return {"dense": None}
    count = features.sparse_tokens.shape[1]
    if num_tokens is None:
        num_tokens = sorted({count, *(2**power for power in range(count.bit_length()) if 2**power < count)})
    for number in num_tokens:
        check_integer("num_tokens", number)
        if number > count:
            raise ValueError(f"num_tokens has {number}, but there are {count} tokens.")
    return {"dense": None} | {"low_rank" if k == count else f"low_rank_{k}": k for k in num_tokens}


def _probed_features(batch: dict[str, Tensor], num_tokens: int | None) -> Tensor:
    if num_tokens is None:
        return batch["dense"].float()
    return low_rank_features(batch["sparse_tokens"], batch["localization"], num_tokens)


def _batch(features: ImageFeatures, rows: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    names = [name for name in ("dense", "sparse_tokens", "localization") if name in features.tensors]
    return {name: features.tensors[name][rows].to(device) for name in names}


# Nearest patches ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def knn_segmentation(
    features: ImageFeatures,
    labels: Tensor,
    test_features: ImageFeatures,
    num_classes: int,
    *,
    num_neighbours: Sequence[int] = (1, 3, 10, 30),
    ignore_index: int = _IGNORED,
    device: torch.device | str = "cpu",
    chunk_size: int = 1024,
) -> dict[int, Tensor]:
    """Segmentation without training: the pixels of a patch get the classes that the nearest training patches have.

    Each pixel gets the most frequent class, at its own place in the patch, of the k training patches of largest cosine
    similarity (Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling", arXiv
    2502.08769, and its code). Features are standardized by the training patches; patches that are mostly ignored are
    left out. Here ignored pixels have no vote, there they do.

    Args:
        features: What [`dense_features`] gives of the training images; D is compared.
        labels: (M, H, W) integers in [0, num_classes) or `ignore_index`, the classes of their pixels.
        test_features: The same of B test images with patches of the same size.
        num_classes: Number C of classes.
        num_neighbours: Values of k.
        ignore_index: Label of pixels that do not count.
        device: Where to compare.
        chunk_size: Test patches that vote at once.

    Returns:
        For each k the classes of the test images' pixels, (B, H, W) int64.

    Raises:
        ValueError: If features and labels do not fit, a class is out of range, or there are fewer patches than
            neighbours.
    """
    grid_size = _check_features(features, labels)
    _check_classes(labels, num_classes, ignore_index)
    patch = tuple(pixels // patches for pixels, patches in zip(labels.shape[1:], grid_size, strict=True))
    targets = labels.where(labels != ignore_index, num_classes).long()
    targets = targets.unflatten(1, (-1, patch[0])).unflatten(3, (-1, patch[1])).transpose(2, 3)  # (M, h, w, p, p)
    targets = targets.flatten(3).flatten(0, 2)
    counts = targets.mode(dim=1).values != num_classes
    bank, targets = features.dense.float().flatten(0, 1)[counts], targets[counts].to(device)
    mean, std = bank.mean(dim=0), bank.std(dim=0).clamp(min=1e-6)
    queries = (test_features.dense.float().flatten(0, 1) - mean) / std
    _, neighbours = nearest_neighbours((bank - mean) / std, queries, max(num_neighbours), device=device)
    votes: dict[int, list[Tensor]] = {k: [] for k in num_neighbours}
    for rows in neighbours.split(chunk_size):
        for k in num_neighbours:
            votes[k].append(_most_frequent(targets[rows[:, :k].to(device)], num_classes).cpu())
    test_grid = resolve_grid_size(test_features.dense.shape[1], test_features.grid_size)
    return {k: _whole_images(torch.cat(parts), test_grid, patch) for k, parts in votes.items()}


def knn_segmentation_scores(
    features: ImageFeatures,
    labels: Tensor,
    test_features: ImageFeatures,
    test_labels: Tensor,
    num_classes: int,
    *,
    num_neighbours: Sequence[int] = (1, 3, 10, 30),
    ignore_index: int = _IGNORED,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Measures [`knn_segmentation`]; the number of neighbours is chosen on a tenth of the training images.

    The tenth that chooses is not among the neighbours, neither there nor for the test images.

    Args:
        test_labels: (B, H, W) classes of the test images' pixels.
        seed: Of the draw of the tenth. The other arguments are those of [`knn_segmentation`].

    Returns:
        `miou` and `pixel_accuracy` over the whole test set, and `num_neighbours`, the one chosen.

    Raises:
        ValueError: As in [`knn_segmentation`], or if there are fewer than two training images.
    """
    if len(labels) < 2:
        raise ValueError(
            f"There are {len(labels)} training images, but one is needed to choose k, and one to compare."
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order.tensor_split([max(len(order) // 10, 1)])

    def confusions(test: ImageFeatures, truth: Tensor, candidates: Sequence[int]) -> dict[int, Tensor]:
        predictions = knn_segmentation(
            _rows(features, kept),
            labels[kept],
            test,
            num_classes,
            num_neighbours=candidates,
            ignore_index=ignore_index,
            device=device,
        )
        return {k: confusion_matrix(maps, truth, num_classes, ignore_index) for k, maps in predictions.items()}

    chosen = num_neighbours[0]
    if len(num_neighbours) > 1:
        scores = {
            k: mean_iou(confusion)
            for k, confusion in confusions(_rows(features, held_out), labels[held_out], num_neighbours).items()
        }
        chosen = max(scores, key=scores.__getitem__)
    confusion = confusions(test_features, test_labels, [chosen])[chosen]
    accuracy = (confusion.diagonal().sum() / confusion.sum()).item()
    return {"miou": mean_iou(confusion), "pixel_accuracy": accuracy, "num_neighbours": chosen}


def _most_frequent(labels: Tensor, num_classes: int) -> Tensor:
    """Votes (q, k, pixels) of classes, or `num_classes` for none, to the most frequent class (q, pixels)."""
    counts = torch.zeros(len(labels), num_classes + 1, labels.shape[2], dtype=torch.int16, device=labels.device)
    counts.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.int16))
    return counts[:, :num_classes].argmax(dim=1)


def _whole_images(patches: Tensor, grid_size: tuple[int, int], patch: tuple[int, ...]) -> Tensor:
    """Pixels of patches (B * N, p * p), row by row, to images (B, H, W)."""
    return patches.view(-1, *grid_size, *patch).transpose(2, 3).flatten(3).flatten(1, 2)


def _rows(features: ImageFeatures, rows: Tensor) -> ImageFeatures:
    return ImageFeatures(index=features.index[rows], tensors={k: v[rows] for k, v in features.tensors.items()})


# Checks -------------------------------------------------------------------------------------------------------------


def _check_features(features: ImageFeatures, labels: Tensor) -> tuple[int, int]:
    """The grid (h, w) that patches of all images have, if labels (M, H, W) fit them."""
    check_tensors(labels=labels)
    dense = features.tensors.get("dense")
    if dense is None:
        raise ValueError("These features have no dense: call encode_images(..., encode=dense_features).")
    if not isinstance(dense, Tensor):
        raise ValueError("Images have patch grids of different sizes: take an image processor that crops.")
    grid_size = resolve_grid_size(dense.shape[1], features.grid_size)
    fits = labels.ndim == 3 and len(labels) == len(dense)
    if not fits or any(pixels % patches for pixels, patches in zip(labels.shape[1:], grid_size, strict=True)):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but ({len(dense)}, H, W) is expected, with H and W multiples "
            f"of the {grid_size[0]}x{grid_size[1]} patches: load them with the processor of the images."
        )
    return grid_size


def _check_classes(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    counted = labels[labels != ignore_index]
    if counted.numel() == 0:
        raise ValueError(f"All pixels have the ignored label {ignore_index}: nothing can be learned.")
    if counted.min() < 0 or counted.max() >= num_classes:
        raise ValueError(
            f"labels hold classes from {counted.min()} to {counted.max()}, but must be in [0, {num_classes}) or the "
            f"ignored {ignore_index}: give classes to load_label_maps, or ignore them."
        )
