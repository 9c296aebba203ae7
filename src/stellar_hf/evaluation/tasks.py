# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The tasks of an evaluation: how each measures a subject, on what, and what tables show of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..configuration_stellar import StellarConfig
from ..features import ImageFeatures, encode_images, model_features
from ..features.fingerprints import processor_protocol, weights_fingerprint
from ..modeling_stellar import StellarForImageReconstruction
from .baselines import BASELINES, KMeansSegments, TrainingFreeEncoder
from .classification import class_names, match_classes
from .compression import BASELINES as DESCRIPTIONS
from .compression import compression_rows
from .disentanglement import SceneObjects, shift_equivariance, what_and_where
from .knn import knn_accuracy
from .linear import linear_probe_accuracy, train_linear_probes
from .objects import object_features, object_scores, segmentations
from .presets import Splits
from .reconstruction import (
    ReconstructionMetrics,
    ReconstructionProbe,
    reconstruction_scores,
    train_reconstruction_probe,
)
from .representations import image_representations
from .retrieval import retrieval_scores
from .segmentation import (
    dense_features,
    knn_segmentation_scores,
    load_label_maps,
    segmentation_probe_scores,
    train_segmentation_probe,
)
from .subjects import Metrics, RunSettings, Subject, Task
from .tables import CHANCE, UNIFORM, Metric

# Above so many images, single tokens are left out, which take r times the memory of one vector.
_TOKENS_UP_TO = 50_000
_KMEANS_SEGMENTS = range(2, 9)
_SEGMENTATION_BATCH = 64  # images of a step
_RETRIEVED = (1, 5, 10)
_SHIFT, _SHIFTED_SCENES = 8, 100  # pixels, and scenes that are moved
_LEAST_AREA = 10  # visible pixels of an object that is asked for


# Classification ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Classified:
    """Representations (n, d) by name, and classes (n,), of both parts."""

    train: dict[str, Tensor]
    train_labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor


def representations_of(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """[`image_representations`] of a model, and `pooled` (B, d) of a baseline."""
    if isinstance(model, TrainingFreeEncoder):
        return {"pooled": model_features(model, pixel_values)["pooler_output"]}
    return image_representations(model, pixel_values)


def image_vectors(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """[`representations_of`] without single tokens."""
    found = representations_of(model, pixel_values)
    return {name: vectors for name, vectors in found.items() if not name.startswith("token_")}


def _classified(subject: Subject, splits: Splits, settings: RunSettings) -> _Classified:
    encode = representations_of if len(splits.train or ()) <= _TOKENS_UP_TO else image_vectors
    parts = [settings.encode(subject, splits, part, encode, [str(splits.label_column)]) for part in ("train", "test")]
    train_labels, test_labels = _matched_labels(parts, splits)
    return _Classified(parts[0].tensors, train_labels, parts[1].tensors, test_labels)


def _matched_labels(parts: Sequence[ImageFeatures], splits: Splits) -> tuple[Tensor, Tensor]:
    """Classes (n,) and (m,) of the training and the test images, which mean the same in both.

    Raises:
        ValueError: If an image has no class, or one that the training images do not have.
    """
    column: Any = splits.label_column
    names = [class_names(part, column) for part in (splits.train, splits.test)]
    matched = match_classes(parts[0].columns[column], parts[1].columns[column], *names)
    if matched.unknown:
        raise ValueError(
            f"Classes to measure are not among those of the training images: {', '.join(matched.unknown[:5])}. Both "
            "need the same classes, with the same names."
        )
    for name, labels in (("train", matched.train_labels), ("test", matched.test_labels)):
        if (labels < 0).any():
            raise ValueError(
                f"{int((labels < 0).sum())} of the {name} images have no class: choose a split with labels."
            )
    return matched.train_labels, matched.test_labels


def _of_each(classified: _Classified, measure: Callable[..., float]) -> Metrics:
    """The accuracy by every representation; of single tokens, their mean."""
    accuracies = {
        name: measure(classified.train[name], classified.train_labels, classified.test[name], classified.test_labels)
        for name in classified.train
    }
    tokens = [value for name, value in accuracies.items() if name.startswith("token_")]
    metrics = {
        name.replace("_", " "): {"accuracy": value}
        for name, value in accuracies.items()
        if not name.startswith("token_")
    }
    if tokens:
        metrics["one token, mean"] = {"accuracy": float(np.mean(tokens))}
    return metrics


def _measure_knn(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    classified = _classified(subject, splits, settings)
    k = min(settings.num_neighbours, len(classified.train_labels))
    return _of_each(classified, partial(knn_accuracy, k=k, accelerator=settings.accelerator))


def _measure_linear(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    if settings.linear_probe == "closed":
        return _of_each(_classified(subject, splits, settings), linear_probe_accuracy)
    names = _representation_names(subject, splits)
    probes = train_linear_probes(
        subject.model,
        subject.processor,
        splits.train,
        splits.test,
        representations=names,
        encode=representations_of,
        image_column=splits.image_column,
        label_column=str(splits.label_column),
        seed=settings.seed,
        **settings.loading,
    )
    return {
        name.replace("_", " "): {"accuracy": probe.accuracy, "learning_rate": probe.learning_rate}
        for name, probe in probes.items()
    }


def _representation_names(subject: Subject, splits: Splits) -> list[str]:
    """What the model says of images as a whole, found out by a few of them, of which one may be broken."""
    found = encode_images(
        subject.model,
        splits.test,
        subject.processor,
        encode=image_vectors,
        rows=range(min(8, len(splits.test))),
        image_column=splits.image_column,
        show_progress=False,
    )
    return list(found.tensors)


def _measure_retrieval(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    """Images of the test part ask for training images of their class; without these, for other test images."""
    if splits.train is None:
        vectors = settings.encode(subject, splits, "test", representations_of, [str(splits.label_column)])
        labels, _ = _matched_labels([vectors, vectors], replace(splits, train=splits.test))
        classified = _Classified(vectors.tensors, labels, vectors.tensors, labels)
    else:
        classified = _classified(subject, splits, settings)
    exclude = torch.arange(len(classified.test_labels)) if splits.train is None else None
    ks = [k for k in _RETRIEVED if k <= len(classified.train_labels)]

    def scores(queries: Tensor, gallery: Tensor) -> dict[str, float]:
        return retrieval_scores(
            queries, classified.test_labels, gallery, classified.train_labels, ks, exclude=exclude,
            device=subject.model.device,
        )  # fmt: skip

    tokens = [name for name in classified.test if name.startswith("token_")]
    found = {
        name.replace("_", " "): scores(classified.test[name], classified.train[name])
        for name in classified.test
        if name not in tokens
    }
    if tokens:
        queries, gallery = (
            torch.stack([part[name] for name in tokens], dim=1) for part in (classified.test, classified.train)
        )
        found["tokens, late interaction"] = scores(queries, gallery)
    return found


def _image_baselines(subject: Subject) -> list[Subject]:
    return [_baseline(name, encoder, subject) for name, encoder in BASELINES.items()]


def _baseline(name: str, encoder: Callable[..., TrainingFreeEncoder], subject: Subject) -> Subject:
    """A baseline that sees what a model sees."""
    processor = subject.processor
    model = encoder(image_mean=processor.image_mean, image_std=processor.image_std).to(subject.model.device)
    return Subject(name, model, processor, kind="baseline")


# Masks ---------------------------------------------------------------------------------------------------------------


class _ClassMasks:
    """Rows whose `mask` is (H, W) uint8 classes, made of the columns of a data set."""

    def __init__(self, splits: Splits, part: str):
        dataset = getattr(splits, part)
        self.dataset = dataset.remove_columns(splits.image_column)
        self.read_classes: Any = splits.read_classes

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"mask": self.read_classes(self.dataset[row])}


def _measure_segmentation(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    train, test = (settings.encode(subject, splits, part, dense_features) for part in ("train", "test"))
    labels, test_labels = (
        load_label_maps(_ClassMasks(splits, part), features.index, subject.processor, show_progress=False)
        for part, features in (("train", train), ("test", test))
    )
    num_classes: int = splits.num_classes or int(labels[labels != 255].max()) + 1
    device = subject.model.device
    probes = train_segmentation_probe(
        train,
        labels,
        num_classes,
        batch_size=_SEGMENTATION_BATCH,
        device=device,
        seed=settings.seed,
        show_progress=settings.show_progress and settings.is_main_process,
    )
    scores: Metrics = dict(segmentation_probe_scores(probes, test, test_labels))
    scores = {_segmentation_name(name): values for name, values in scores.items()}
    count = min(len(train), settings.knn_segmentation_images or len(train))
    rows = torch.arange(count) * len(train) // count
    neighbours = ImageFeatures(train.index[rows], {name: each[rows] for name, each in train.tensors.items()})
    scores["kNN of patches"] = knn_segmentation_scores(
        neighbours, labels[rows], test, test_labels, num_classes, device=device, seed=settings.seed
    )
    return scores


def _segmentation_name(probe: str) -> str:
    if probe == "dense":
        return "probe on D"
    count = probe.removeprefix("low_rank").lstrip("_")
    return f"probe on Z, {count} tokens" if count else "probe on Z"


def _measure_reconstruction(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    metrics = settings.reconstruction_metrics or ReconstructionMetrics(lpips=None, rfid=None)
    arguments = {"vq_model": settings.vq_model, "image_column": splits.image_column, **settings.loading}

    def scores(description: str, probe: ReconstructionProbe | None = None) -> dict[str, float]:
        return reconstruction_scores(
            subject.model,
            splits.test,
            subject.processor,
            metrics,
            probe=probe,
            description=f"{subject.name}: {description}",
            **arguments,
        )

    found: Metrics = {} if _no_decoder(subject, settings) else {"own decoder": scores("reconstruction")}
    if found and subject.kind == "model" and settings.compression_images:
        found |= _measure_compression(subject, splits, settings)
    for kind in _reconstruction_probes(subject, settings):
        probe = train_reconstruction_probe(
            subject.model,
            splits.train,
            subject.processor,
            kind=kind,
            vq_model=settings.vq_model,
            image_column=splits.image_column,
            num_workers=settings.num_workers,
            accelerator=settings.accelerator,
            seed=settings.seed,
            show_progress=settings.show_progress,
        )
        found[f"probe on {'Z' if kind == 'low_rank' else 'D'}"] = scores(f"{kind} probe", probe)
    return found


def _measure_compression(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    """What S and L cost in bits, and what others reach with as many, on some of the images."""
    count = min(settings.compression_images, len(splits.test))
    rows = compression_rows(
        subject.model,
        splits.test,
        subject.processor,
        vq_model=settings.vq_model,
        rows=[number * len(splits.test) // count for number in range(count)],
        image_column=splits.image_column,
        **settings.loading,
    )
    found: Metrics = {}
    for row in rows:
        if row["numbers"] is not None:  # of S and L; baselines with as many bits follow
            own = found[row["method"]] = {name: row[name] for name in ("psnr", "numbers", "bits", "num_images")}
        elif row["psnr"] is not None:
            own[row["method"]] = row["psnr"]
    return found


def _reconstruction_probes(subject: Subject, settings: RunSettings) -> list[Literal["low_rank", "dense"]]:
    """The probes that are wanted of a model, and that it has the features for."""
    if subject.kind != "model":
        return []
    has_tokens = _no_tokens(subject, settings) is None
    return [kind for kind in settings.reconstruction_probes if kind == "dense" or has_tokens]


def _no_decoder(subject: Subject, settings: RunSettings) -> str | None:
    if not isinstance(subject.model, StellarForImageReconstruction):
        return "has no decoder"
    if subject.model.config.reconstruction_target == "codes" and settings.vq_model is None:
        return "reconstructs codes, which need --vq_model_name_or_path"
    return None


def _no_reconstruction(subject: Subject, settings: RunSettings) -> str | None:
    return None if _reconstruction_probes(subject, settings) else _no_decoder(subject, settings)


def _measure_objects(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    features = settings.encode(subject, splits, "test", object_features)
    masks = object_masks(splits, features, subject.processor)
    num_segments = settings.num_segments or default_num_segments(masks)
    found = {}
    segmented = segmentations(features.tensors, masks.shape[1:], num_segments, settings.seed)
    if subject.kind == "model":
        segmented["uniform"] = torch.zeros_like(masks)  # one token has the largest share everywhere
    for name, segmentation in segmented.items():
        scores = object_scores(segmentation, masks, min_area=_LEAST_AREA)
        found[_SEGMENTATION_NAMES.get(name, name)] = {
            metric: values.nanmean().item() for metric, values in scores.items()
        }
    return found


_SEGMENTATION_NAMES = {
    "localization": "argmax of L",
    "merged_tokens": "tokens merged by L^T D",
    "dense_kmeans": "k-means of D",
    "uniform": UNIFORM,
}


def _measure_disentanglement(subject: Subject, splits: Splits, settings: RunSettings) -> Metrics:
    features = [settings.encode(subject, splits, part, object_features) for part in ("train", "test")]
    objects = [
        SceneObjects.from_dataset(dataset, part.index)
        for dataset, part in zip((splits.train, splits.test), features, strict=True)
    ]

    def told(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
        return what_and_where(
            tensors[0],
            objects[0],
            tensors[1],
            objects[1],
            min_area=_LEAST_AREA,
            num_neighbours=settings.num_neighbours,
        )

    found = told([part.tensors for part in features])
    chance = found.pop("chance")
    metrics: Metrics = {_SOURCES[name]: values for name, values in found.items()}
    if subject.kind == "model":
        metrics[UNIFORM] = told([_one_token(part.tensors) for part in features])["sparse_tokens"]
        metrics[CHANCE] = {f"{name}_{probe}": value for name, value in chance.items() for probe in ("knn", "linear")}
    metrics[f"scenes moved by {_SHIFT} pixels"] = _measure_shifts(subject, splits, settings, features[1])
    return metrics


def _measure_shifts(
    subject: Subject, splits: Splits, settings: RunSettings, features: ImageFeatures
) -> dict[str, float]:
    """Some scenes before and after a move to one side: the largest object's token should stay, and its map move."""
    count = min(_SHIFTED_SCENES, len(features))
    places = torch.arange(count) * len(features) // count
    rows = splits.test.select(features.index[places].tolist())
    masks = np.stack([np.asarray(mask) for mask in rows["mask"][:]])
    shifts = _SHIFT * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])[np.arange(count) % 4]
    images = [np.asarray(image) for image in rows[splits.image_column][:]]
    moved = encode_images(
        subject.model,
        [_moved(image, shift, mode="reflect") for image, shift in zip(images, shifts, strict=True)],
        subject.processor,
        encode=object_features,
        description=f"{subject.name}: moved scenes",
        **settings.loading,
    )
    moved_masks = np.stack([_moved(mask, shift, mode="constant") for mask, shift in zip(masks, shifts, strict=True)])
    after: Any = moved.tensors
    found = shift_equivariance(
        {name: each[places] for name, each in features.tensors.items()},
        torch.from_numpy(masks),
        after,
        torch.from_numpy(moved_masks),
        1 + torch.tensor(rows["area"][:]).argmax(dim=1),
        torch.from_numpy(shifts),
    )
    return {name: values.nanmean().item() for name, values in found.items()}


def _moved(pixels: np.ndarray, shift: np.ndarray, mode: Any) -> np.ndarray:
    """An image or a mask (H, W, ...) whose content moves by so many pixels to the right and down."""
    right, down = (int(step) for step in shift)
    sides = [(max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0))]
    padded = np.pad(pixels, [*sides, *[(0, 0)] * (pixels.ndim - 2)], mode=mode)
    top, left = max(-down, 0), max(-right, 0)
    return padded[top : top + pixels.shape[0], left : left + pixels.shape[1]]


def _one_token(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features of a model whose L is uniform: the mean of D is what every token says of its place."""
    dense = features["dense_features"]
    return {
        "sparse_tokens": dense.float().mean(dim=1, keepdim=True),
        "localization": torch.ones(*dense.shape[:2], 1),
        "grid_size": features["grid_size"],
    }


_SOURCES = {
    "sparse_tokens": "S",
    "pooled_features": "L^T D",
    "masked_features": "D under the true mask",
    "localization": "L, its centroid",
}


def object_masks(splits: Splits, features: ImageFeatures, processor: Any) -> Tensor:
    """The masks (M, H, W) of objects: as they are where the processor shows the model all of the image, and else in
    the frame of what it shows."""
    column = str(splits.mask_column)
    dataset = splits.test.select_columns([column])
    first = np.asarray(dataset[int(features.index[0])][column])
    shows_all = _shows_all(processor, *first.shape[:2])
    return load_label_maps(
        dataset, features.index, None if shows_all else processor, mask_column=column, show_progress=False
    )


def _shows_all(processor: Any, height: int, width: int) -> bool:
    protocol = processor_protocol(processor)
    resize, crop = protocol["resize"] or {}, protocol["crop"]
    if crop is None:
        return True
    if "shortest_edge" in resize:
        scale = resize["shortest_edge"] / min(height, width)
        return (round(height * scale), round(width * scale)) == (crop["height"], crop["width"])
    return (resize.get("height", height), resize.get("width", width)) == (crop["height"], crop["width"])


def default_num_segments(masks: Tensor) -> int:
    """One segment for the ground, and one for each object that an image has on average."""
    counts = [int((image.unique() > 0).sum()) for image in masks]
    return 1 + max(1, round(float(np.mean(counts))))


def _segment_baselines(subject: Subject) -> list[Subject]:
    def kmeans(count: int) -> Callable[..., TrainingFreeEncoder]:
        return lambda **statistics: KMeansSegments(count, **statistics)

    return [_baseline(f"k-means, {count} segments", kmeans(count), subject) for count in _KMEANS_SEGMENTS]


def _no_tokens(subject: Subject, settings: RunSettings) -> str | None:
    config = getattr(subject.model, "config", None)
    if subject.kind != "baseline" and not isinstance(config, StellarConfig):
        return "has no sparse tokens and no localization"
    return None


# The list ------------------------------------------------------------------------------------------------------------

_PERCENT: dict[str, Any] = {"factor": 100, "decimals": 1}


def _knn_settings(splits: Splits, settings: RunSettings) -> dict[str, Any]:
    return {"neighbours": settings.num_neighbours, "temperature": 0.07, "similarity": "cosine"}


def _linear_settings(splits: Splits, settings: RunSettings) -> dict[str, Any]:
    if settings.linear_probe == "closed":
        return {"probe": "multinomial logistic regression, L-BFGS, standardized features"}
    return {"probe": "LayerNorm and Linear, AdamW, random resized crops and flips", "epochs": 30, "batch": 2048}


def _segmentation_settings(splits: Splits, settings: RunSettings) -> dict[str, Any]:
    return {
        "probe": "BatchNorm and 1x1 convolution, cross entropy and Dice, AdamW 1e-4",
        "epochs": 80,
        "batch": _SEGMENTATION_BATCH,
        "kNN_images": settings.knn_segmentation_images or "all",
    }


def _reconstruction_settings(splits: Splits, settings: RunSettings) -> dict[str, Any]:
    metrics = settings.reconstruction_metrics
    networks = metrics.describe_networks() if metrics else {}
    return {
        "networks": {name: f"{each['name']} {each['sha256'][:16]}" for name, each in networks.items()} or None,
        "probes": list(settings.reconstruction_probes) or None,
        "compressed_images": min(settings.compression_images, len(splits.test)),
        "tokenizer": None if settings.vq_model is None else weights_fingerprint(settings.vq_model),
    }


def _objects_settings(splits: Splits, settings: RunSettings) -> dict[str, Any]:
    return {"segments": settings.num_segments or "1 + mean objects", "least_area": _LEAST_AREA}


def _disentanglement_settings(splits: Splits, settings: RunSettings) -> dict[str, Any]:
    return {
        "neighbours": settings.num_neighbours,
        "least_area": _LEAST_AREA,
        "position": "ridge regression",
        "moved_scenes": min(_SHIFTED_SCENES, len(splits.test)),
    }


def _retrieval_settings(splits: Splits, settings: RunSettings) -> dict[str, Any]:
    return {"gallery": "test images" if splits.train is None else "training images", "similarity": "cosine"}


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "knn",
            ("train", "label_column"),
            {"accuracy": Metric("top-1 %", **_PERCENT)},
            _measure_knn,
            _knn_settings,
            _image_baselines,
        ),
        Task(
            "linear",
            ("train", "label_column"),
            {
                "accuracy": Metric("top-1 %", **_PERCENT),
                "learning_rate": Metric("learning rate", decimals=5, higher_is_better=None),
            },
            _measure_linear,
            _linear_settings,
            _image_baselines,
        ),
        Task(
            "retrieval",
            ("label_column",),
            {
                **{f"recall@{k}": Metric(f"recall@{k} %", **_PERCENT) for k in _RETRIEVED},
                "map": Metric("mAP %", **_PERCENT),
            },
            _measure_retrieval,
            _retrieval_settings,
            _image_baselines,
        ),
        Task(
            "segmentation",
            ("train", "mask_column"),
            {"miou": Metric("mIoU %", **_PERCENT), "pixel_accuracy": Metric("pixels %", **_PERCENT)},
            _measure_segmentation,
            _segmentation_settings,
        ),
        Task(
            "reconstruction",
            (),
            {
                "psnr": Metric("PSNR dB", decimals=2, beside=tuple(DESCRIPTIONS)),
                "ssim": Metric("SSIM"),
                "lpips": Metric("LPIPS", decimals=4, higher_is_better=False),
                "rfid": Metric("rFID", decimals=2, higher_is_better=False),
                **{name: Metric(f"{name}, as many bits", decimals=2) for name in DESCRIPTIONS},
                "numbers": Metric("numbers", decimals=0, higher_is_better=None),
                "bits": Metric("bits", decimals=0, higher_is_better=None),
                "num_images": Metric("images", decimals=0, higher_is_better=None),
            },
            _measure_reconstruction,
            _reconstruction_settings,
            missing=_no_reconstruction,
        ),
        Task(
            "objects",
            ("mask_column",),
            {
                "foreground_ari": Metric("FG-ARI %", **_PERCENT),
                "ari": Metric("ARI %", **_PERCENT),
                "mean_best_overlap": Metric("mBO %", **_PERCENT),
                "object_recall": Metric("recall %", **_PERCENT),
                "corloc": Metric("CorLoc %", **_PERCENT),
            },
            _measure_objects,
            _objects_settings,
            _segment_baselines,
            _no_tokens,
        ),
        Task(
            "disentanglement",
            ("train", "mask_column", "object_columns"),
            {
                "own_material_knn": Metric("material, kNN %", **_PERCENT),
                "own_material_linear": Metric("material, linear %", **_PERCENT),
                "own_shape_linear": Metric("shape, linear %", **_PERCENT),
                "other_material_knn": Metric("other's material, kNN %", **_PERCENT, higher_is_better=None),
                "other_material_linear": Metric("other's material, linear %", **_PERCENT, higher_is_better=None),
                "position_r2": Metric("position, R²", decimals=2, higher_is_better=None),
                "token_cosine": Metric("moved: token's cosine", decimals=2, higher_is_better=None),
                "other_cosine": Metric("of other tokens", decimals=2, higher_is_better=None),
                "map_iou": Metric("moved map, IoU", decimals=2, higher_is_better=None),
                "unmoved_map_iou": Metric("unmoved map, IoU", decimals=2, higher_is_better=None),
            },
            _measure_disentanglement,
            _disentanglement_settings,
            _segment_baselines,
            _no_tokens,
        ),
    )
}

METRICS = {name: task.columns for name, task in TASKS.items()}
