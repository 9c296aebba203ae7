# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What an evaluation measures, how, and what a task of it is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoConfig, AutoModel

from ..configuration_stellar import StellarConfig
from ..features import encode_images, load_processor
from ..features.fingerprints import processor_protocol, weights_fingerprint
from ..modeling_stellar import StellarForImageReconstruction
from .presets import Splits, with_paper_transform
from .reconstruction import ReconstructionMetrics
from .tables import Metric

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    _cached_of: tuple = field(default=(None, None, None), init=False, repr=False)
    _cache: dict[tuple, Any] = field(default_factory=dict, init=False, repr=False)

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
        # Held beside their features, so that no other object can be taken for them.
        of = (subject.model, splits, encode)
        if not all(map(operator.is_, of, self._cached_of)):
            self._cached_of, self._cache = of, {}
        key = (part, *columns)
        if key not in self._cache:
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
        missing: Why a subject cannot be measured with the settings, None if it can be.
    """

    name: str
    needs: tuple[str, ...]
    columns: Mapping[str, Metric]
    measure: Callable[[Subject, Splits, RunSettings], Metrics]
    settings: Callable[[Splits, RunSettings], dict[str, Any]]
    baselines: Callable[[Subject], list[Subject]] = lambda subject: []
    missing: Callable[[Subject, RunSettings], str | None] = lambda subject, settings: None
