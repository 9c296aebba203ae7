# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The tasks of an evaluation, and the run that measures models on them one after the other.

    data = load_embedded_data()
    for result in evaluate_models([load_subject("owner/name")], data, tasks=["knn", "objects"]):
        print(result.task, result.metrics)

A task of a model is a step: its result is kept when it is there, and not measured again by an equal protocol.
"""

from __future__ import annotations

import datetime
import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from ..configuration_stellar import StellarConfig
from ..features import ImageFeatures, encode_images, load_processor, model_features
from ..modeling_stellar import StellarForImageReconstruction
from .baselines import BASELINES, KMeansSegments, TrainingFreeEncoder
from .classification import class_names, match_classes
from .compression import BASELINES as DESCRIPTIONS
from .compression import compression_rows
from .disentanglement import SceneObjects, shift_equivariance, what_and_where
from .knn import knn_accuracy
from .linear import linear_probe_accuracy, train_linear_probes
from .objects import object_features, object_scores, segmentations
from .presets import EvaluationData, Splits, with_paper_transform
from .protocol import (
    Result,
    ResultFile,
    as_json,
    package_versions,
    processor_protocol,
    weights_fingerprint,
)
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
from .tables import CHANCE, UNIFORM, Metric

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.get_logger(__name__)

# Above so many images, single tokens are left out, which take r times the memory of one vector.
_TOKENS_UP_TO = 50_000
_KMEANS_SEGMENTS = range(2, 9)
_SEGMENTATION_BATCH = 64  # images of a step
_RETRIEVED = (1, 5, 10)
_SHIFT, _SHIFTED_SCENES = 8, 100  # pixels, and scenes that are moved
_LEAST_AREA = 10  # visible pixels of an object that is asked for


# What is measured ----------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """What is measured: a model, or a baseline that is called as one.

    Attributes:
        name: As tables show it.
        model: Any vision encoder of Transformers, or a baseline of `stellar_hf.evaluation.baselines`.
        processor: Its image processor.
        kind: "model", "untrained" or "baseline".
        source: Folder or name on the Hub that it was loaded from; None if it was not.
    """

    name: str
    model: Any
    processor: Any
    kind: str = "model"
    source: str | None = None

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """The model and the preparation of its images, for the protocol of a result."""
        model = {"class": type(self.model).__name__, "weights": weights_fingerprint(self.model)}
        model["dtype"] = str(self.model.dtype).removeprefix("torch.")
        return {"model": model, "images": processor_protocol(self.processor)}


def load_subject(
    name_or_path: str, dtype: str = "float32", paper_transform: bool = False, device: Any = "cpu"
) -> Subject:
    """Loads a model and its image processor.

    Args:
        name_or_path: A folder, or owner/name on the Hub: STELLAR, with its decoder where it has one, or any other
            vision encoder.
        dtype: Precision of the model.
        paper_transform: Whether to prepare images as the paper does ([`with_paper_transform`]), in the size that the
            model's own processor says.
        device: Where to put it.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    model: Any = None
    if isinstance(config, StellarConfig):
        load: Any = StellarForImageReconstruction.from_pretrained
        model, info = load(name_or_path, dtype=dtype, output_loading_info=True)
        if any("decoder" in key for key in info["missing_keys"]):
            model = None  # an encoder alone
    if model is None:
        model = AutoModel.from_pretrained(name_or_path, dtype=dtype)
    processor = load_processor(name_or_path)
    processor = with_paper_transform(processor) if paper_transform else processor
    name = name_or_path.rstrip("/").split("/")[-1]
    return Subject(name, model.to(device).eval(), processor, source=name_or_path)


def untrained(subject: Subject, seed: int = 0) -> Subject:
    """The same architecture with random weights."""
    model = subject.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config).to(model.device, model.dtype).eval()
    return replace(subject, name=f"{subject.name}, untrained", model=fresh, kind="untrained", source=None)


@dataclass
class RunSettings:
    """How tasks are measured.

    Attributes:
        seed: Of probes, clusters and untrained networks.
        batch_size: Images of a forward pass.
        num_workers: Processes that read images.
        num_neighbours: k of kNN.
        linear_probe: "closed", logistic regression on features that are computed once, or "paper", the recipe with
            random crops and many learning rates.
        num_segments: Segments into which tokens and patches are grouped for `objects`; by default one for the ground
            and one for each object that an image has on average.
        knn_segmentation_images: Training images at most whose patches are neighbours in the kNN of `segmentation`, at
            equal distances; all of them by default.
        reconstruction_metrics: What `reconstruction` measures, with its networks; PSNR and SSIM by default.
        compression_images: Test images at most on which S and L are compared with other descriptions of as many bits,
            at equal distances; 0 leaves that out.
        reconstruction_probes: Of "low_rank" and "dense": fresh decoders that are trained on frozen features.
        vq_model: Tokenizer of the models that reconstruct codes.
        accelerator: Splits the images over its processes; only the main one writes.
        show_progress: Whether to show progress bars.
    """

    seed: int = 0
    batch_size: int = 64
    num_workers: int = 0
    num_neighbours: int = 20
    linear_probe: Literal["closed", "paper"] = "closed"
    num_segments: int | None = None
    knn_segmentation_images: int | None = None
    reconstruction_metrics: ReconstructionMetrics | None = None
    compression_images: int = 32
    reconstruction_probes: Sequence[Literal["low_rank", "dense"]] = ()
    vq_model: Any = None
    accelerator: Accelerator | None = None
    show_progress: bool = True
    _cache: dict[tuple, Any] = field(default_factory=dict, repr=False)

    @property
    def is_main_process(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    @property
    def loading(self) -> dict[str, Any]:
        """What every pass over images takes."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "accelerator": self.accelerator,
            "show_progress": self.show_progress and self.is_main_process,
        }

    def encode(self, subject: Subject, splits: Splits, part: str, encode: Any, columns: Sequence[str] = ()):
        """Features of the images of a part, "train" or "test"; those of the last call are kept for the next task."""
        key = (id(subject.model), id(splits), part, encode, tuple(columns))
        if key not in self._cache:
            others = [other for other in self._cache if other[:2] != key[:2] or other[3] is not encode]
            for other in others:
                del self._cache[other]
            self._cache[key] = encode_images(
                subject.model,
                getattr(splits, part),
                subject.processor,
                encode=encode,
                image_column=splits.image_column,
                columns=columns,
                description=f"{subject.name}: {splits.name}, {part}",
                **self.loading,
            )
        return self._cache[key]


Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task of an evaluation.

    Attributes:
        name: As the command takes it.
        needs: Fields of [`Splits`] that must be there.
        columns: How tables show its numbers.
        measure: Gives the numbers of a subject, by what of it they are of.
        settings: Gives the settings that belong into the protocol.
        baselines: Makes what is measured beside models, with images as a model gets them.
        missing: Why a subject cannot be measured, None if it can be.
    """

    name: str
    needs: tuple[str, ...]
    columns: Mapping[str, Metric]
    measure: Callable[[Subject, Splits, RunSettings], Metrics]
    settings: Callable[[Splits, RunSettings], dict[str, Any]]
    baselines: Callable[[Subject], list[Subject]] = lambda subject: []
    missing: Callable[[Subject], str | None] = lambda subject: None


# The run -------------------------------------------------------------------------------------------------------------


def evaluate_models(
    subjects: Iterable[Subject],
    data: EvaluationData,
    tasks: Sequence[str] | None = None,
    settings: RunSettings | None = None,
    results: ResultFile | None = None,
    baselines: bool = False,
) -> Iterator[Result]:
    """Measures models on tasks.

    Args:
        subjects: Models, each with its processor; from a generator, they need not be in memory together.
        data: What each task is measured on.
        tasks: Names of tasks; by default all that the data have columns for.
        settings: How they are measured.
        results: Where results are kept. One that is there already, by an equal protocol, is given again and not
            measured; the others are added to it by the main process.
        baselines: Whether to measure also what was never trained, and an untrained network of each model.

    Yields:
        Results, each when it is there. A model that cannot be measured on a task is named and left out.

    Raises:
        ValueError: If a task does not exist or the data lack a column for it, before anything is measured.
    """
    settings = settings or RunSettings()
    wanted = [_task(name, data) for name in tasks or data.tasks]
    chosen = [task for task in TASKS.values() if task in wanted]  # those of the same features one after the other
    beside: dict[str, tuple[Subject, list[Task]]] = {}
    for subject in subjects:
        yield from _measure_all(chosen, subject, data, settings, results)
        if baselines:
            yield from _measure_all(chosen, untrained(subject, settings.seed), data, settings, results)
        if baselines and not beside:
            beside = _baselines_of(chosen, subject)
    for baseline, own_tasks in beside.values():
        yield from _measure_all(own_tasks, baseline, data, settings, results)


def _baselines_of(tasks: Sequence[Task], subject: Subject) -> dict[str, tuple[Subject, list[Task]]]:
    """Each baseline by its name, with the tasks that it is one of; they see what a model sees."""
    found: dict[str, tuple[Subject, list[Task]]] = {}
    for task in tasks:
        for baseline in task.baselines(subject):
            found.setdefault(baseline.name, (baseline, []))[1].append(task)
    return found


def _measure_all(
    tasks: Sequence[Task],
    subject: Subject,
    data: EvaluationData,
    settings: RunSettings,
    results: ResultFile | None,
) -> Iterator[Result]:
    for task in tasks:
        reason = task.missing(subject)
        if reason is None:
            yield _measure(task, subject, data.splits[task.name], settings, results)
        elif settings.is_main_process and subject.kind == "model":
            logger.warning(f"{subject.name} {reason}: it is left out of {task.name}.")


def _measure(
    task: Task, subject: Subject, splits: Splits, settings: RunSettings, results: ResultFile | None
) -> Result:
    protocol = {
        **splits.protocol(),
        **subject.protocol,
        "settings": task.settings(splits, settings),
        "seed": settings.seed,
    }
    found = [results.find(subject.name, task.name, protocol) if results and settings.is_main_process else None]
    if settings.accelerator is not None and settings.accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    start = time.monotonic()
    result = Result(
        model=subject.name,
        kind=subject.kind,
        task=task.name,
        protocol=as_json(protocol),
        metrics=as_json(task.measure(subject, splits, settings)),
        source=subject.source,
        versions=package_versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
    )
    if results is not None and settings.is_main_process:
        results.add(result)
    return result


def _task(name: str, data: EvaluationData) -> Task:
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(TASKS)}."
        raise ValueError(f"There is no task {name!r}: {hint}")
    task = TASKS[name]
    if name not in data.splits:
        raise ValueError(f"{data.name} has nothing to measure {name} on: {_what_it_needs(task)}")
    missing = [need for need in task.needs if getattr(data.splits[name], need) is None]
    if missing:
        raise ValueError(f"{data.name} has nothing to measure {name} on: {_what_it_needs(task)}")
    return task


_NEEDS = {
    "train": "images to learn from (--train_dir, or --train_split of a data set)",
    "label_column": "a class for each image (--label_column, or a folder of images for each class)",
    "mask_column": "a mask for each image (--mask_column)",
    "object_columns": "the embedded scenes, whose objects are known (no --dataset_name, --test_dir or --preset)",
}


def _what_it_needs(task: Task) -> str:
    return f"it needs {' and '.join(_NEEDS[need] for need in task.needs)}. Leave it out of --tasks, or give that."


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

    found: Metrics = {} if _no_decoder(subject) else {"own decoder": scores("reconstruction")}
    if found and subject.kind == "model" and settings.compression_images:
        found |= _measure_compression(subject, splits, settings)
    for kind in settings.reconstruction_probes if subject.kind == "model" else ():
        if kind == "low_rank" and _no_tokens(subject):
            continue
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


def _no_decoder(subject: Subject) -> str | None:
    return None if isinstance(subject.model, StellarForImageReconstruction) else "has no decoder"


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


def _no_tokens(subject: Subject) -> str | None:
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
            missing=_no_decoder,
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
