# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Measures models: kNN, linear probe, segmentation, reconstruction, objects, what and where, retrieval.

    stellar-hf evaluate                                         # demo model, embedded tabletop scenes
    stellar-hf evaluate --model_name_or_path stellar-base-16 facebook/dinov2-base --preset imagenet-1k
    stellar-hf evaluate --model_name_or_path out --train_dir photos/train --test_dir photos/test --tasks knn linear
    accelerate launch --num_processes 8 -m stellar_hf.cli.evaluate --preset imagenet-1k --tasks knn

results.json holds every number with its protocol: crop and resampling, numbers of images, data and weights with their
hashes, seed, versions. results.md shows the numbers as tables, results.png as bars, and .eval_results/ holds those of
data sets on the Hub in its format. A task of a model that is there by an equal protocol is not measured again, so that
a command that was killed goes on when it is repeated. docs/evaluation.md tells what each row of the paper needs.
"""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoConfig
from transformers.utils import logging

from .. import DEMO_MODEL
from ..evaluation import (
    EvaluationData,
    ReconstructionMetrics,
    Result,
    ResultFile,
    RunSettings,
    Subject,
    bar_panels,
    build_tables,
    evaluate_models,
    format_markdown,
    format_models,
    load_embedded_data,
    load_own_images,
    load_preset,
    load_subject,
)
from ..evaluation.presets import PRESETS
from ..evaluation.publishing import update_model_card, write_eval_results
from ..evaluation.tasks import METRICS, TASKS
from ..hub_stellar import replace_text
from ..visualization import plot_results
from .extract import patient_accelerator
from .parser import CommandParser
from .process import errors_in_a_sentence

RESULTS_NAME = "results.json"
# Training scenes whose patches are neighbours in the segmentation by kNN, which takes minutes otherwise.
NUM_EMBEDDED_NEIGHBOURS = 100


@dataclass
class EvaluationArguments:
    """Which models, on which images, and what to measure."""

    model_name_or_path: list[str] = field(
        default_factory=lambda: [DEMO_MODEL],
        metadata={"help": "Models, each a folder or owner/name on the Hub: STELLAR, or any vision encoder."},
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": f"Of {', '.join(TASKS)}; by default all that the data have columns for."},
    )
    preset: str | None = field(
        default=None,
        metadata={"help": f"A data set of the paper, with its splits and crops: {', '.join(PRESETS)}."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or its local folder; with a preset, another copy of it."}
    )
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images, or folder or pattern of shards, to find neighbours in and to train probes on."
        },
    )
    test_dir: str | None = field(default=None, metadata={"help": "The same, to measure on."})
    train_split: str = field(default="train", metadata={"help": "Split of dataset_name to learn from."})
    test_split: str = field(
        default="test",
        metadata={
            "help": "Split of dataset_name, or of the embedded scenes ('validation' for decisions), to measure."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of their classes, if there is one."})
    mask_column: str = field(
        default="mask", metadata={"help": "Column of the classes, or objects, of their pixels, if there is one."}
    )
    max_train_images: int | None = field(default=None, metadata={"help": "Learn from at most so many images."})
    max_test_images: int | None = field(default=None, metadata={"help": "Measure at most so many images."})
    num_scenes: int = field(default=300, metadata={"help": "Embedded scenes, where no images are given."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Of scenes, probes and untrained networks; tables show mean and deviation of several."},
    )
    baselines: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to measure also what was never trained, and an untrained network of each model; by "
            "default on the embedded scenes."
        },
    )
    linear_probe: str | None = field(
        default=None,
        metadata={
            "help": "'closed', logistic regression on features that are computed once, or 'paper', random crops and "
            "many learning rates; by default the latter for presets alone."
        },
    )
    num_segments: int | None = field(
        default=None,
        metadata={"help": "Segments for objects; by default one more than an image has objects on average."},
    )
    perceptual_metrics: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to measure LPIPS and rFID, too, whose networks are downloaded; by default for presets "
            "alone."
        },
    )
    compression_images: int = field(
        default=32,
        metadata={
            "help": "Images at most on which S and L are compared with JPEG, palettes and patch means of as many "
            "bits; 0 for none."
        },
    )
    reconstruction_probes: list[str] = field(
        default_factory=list,
        metadata={"help": "Train fresh decoders on frozen features and measure these: low_rank (Z), dense (D)."},
    )
    vq_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, for models that reconstruct its codes."}
    )
    output_dir: str = field(default="stellar-evaluation", metadata={"help": "Folder of the results."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Measure again what is in output_dir."})
    update_model_card: bool = field(
        default=False,
        metadata={
            "help": "Write the results also into the model's folder: its card's metadata, a table, .eval_results."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Images of a forward pass."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images, for each process."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the models.", "choices": ["float32", "bfloat16", "float16"]},
    )

    def __post_init__(self):
        if (self.train_dir or self.test_dir) and self.dataset_name:
            raise ValueError("Both a folder and dataset_name are given: choose one source of images.")
        if self.train_dir and not self.test_dir:
            raise ValueError("train_dir is given without test_dir, the images to measure on.")
        if self.reconstruction_probes and self.test_dir and not self.train_dir:
            raise ValueError("reconstruction_probes learn from train_dir, which is not given.")
        for name in ("batch_size", "num_scenes", "max_train_images", "max_test_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        if self.linear_probe not in (None, "closed", "paper"):
            raise ValueError(f"linear_probe is {self.linear_probe!r}, but must be 'closed' or 'paper'.")
        if unknown := set(self.reconstruction_probes) - {"low_rank", "dense"}:
            raise ValueError(f"reconstruction_probes has {min(unknown)!r}, but there are only low_rank and dense.")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds are {self.seeds}, but at least one is needed, and none may be negative.")
        if self.update_model_card and (
            absent := [name for name in self.model_name_or_path if not Path(name).is_dir()]
        ):
            raise ValueError(
                f"update_model_card writes into a folder of a model, but {absent[0]} is none: download it."
            )

    @property
    def is_embedded(self) -> bool:
        return not (self.preset or self.dataset_name or self.test_dir)

    @property
    def with_baselines(self) -> bool:
        return self.is_embedded if self.baselines is None else self.baselines


def main() -> None:
    with errors_in_a_sentence():
        run(parse_arguments(sys.argv[1:]))


def parse_arguments(argv: list[str]) -> EvaluationArguments:
    (args,) = CommandParser(EvaluationArguments, description=__doc__).parse(argv)
    return args


def run(args: EvaluationArguments) -> None:
    logging.disable_progress_bar()  # of loading models
    accelerator = patient_accelerator()
    for name in args.model_name_or_path:
        AutoConfig.from_pretrained(name)  # what is not there is better known before scenes are rendered
    results = open_results(args, accelerator)
    found: list[Result] = []
    for seed in args.seeds:
        with accelerator.main_process_first():
            data = open_data(args, seed)
        found += evaluate_models(
            load_subjects(args, accelerator),
            data,
            tasks=args.tasks or None,
            settings=settings_of(args, seed, accelerator),
            results=results,
            baselines=args.with_baselines,
        )
    if accelerator.is_main_process:
        report(args, found)
    accelerator.end_training()


# Inputs --------------------------------------------------------------------------------------------------------------


def open_data(args: EvaluationArguments, seed: int = 0) -> EvaluationData:
    """The images that the arguments name; the embedded scenes of this seed where they name none."""
    limits = {"max_train_images": args.max_train_images, "max_test_images": args.max_test_images}
    if args.preset:
        return load_preset(args.preset, args.dataset_name, args.train_dir, args.test_dir, **limits)
    if args.is_embedded:
        return load_embedded_data(args.num_scenes, args.test_split, seed, args.tasks or None)
    return load_own_images(
        test=args.test_dir or str(args.dataset_name),
        train=args.train_dir or args.dataset_name,
        train_split=args.train_split,
        test_split=args.test_split,
        image_column=args.image_column,
        label_column=args.label_column,
        mask_column=args.mask_column,
        **limits,
    )


def load_subjects(args: EvaluationArguments, accelerator: Accelerator) -> Iterator[Subject]:
    """One model after the other, on the accelerator's device."""
    for path, name in distinct_names(args.model_name_or_path).items():
        with accelerator.main_process_first():
            subject = load_subject(path, args.dtype, paper_transform=bool(args.preset), device=accelerator.device)
        yield replace(subject, name=name)


def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """The name of each model in tables and folders: the end of its path, as short as tells it from the others.

    Args:
        paths: Folders, or owner/name on the Hub. One that is there twice has one name.
    """
    parts = {Path(os.path.abspath(path)).parts[1:]: path for path in paths}

    def distinct_end(own: tuple[str, ...]) -> str:
        lengths = itertools.count(1)
        length = next(count for count in lengths if sum(other[-count:] == own[-count:] for other in parts) == 1)
        return "/".join(own[-length:])

    return {path: distinct_end(own) for own, path in parts.items()}


def settings_of(args: EvaluationArguments, seed: int, accelerator: Accelerator) -> RunSettings:
    """How the arguments want tasks to be measured; networks that they need are on the accelerator's device."""
    linear_probe: Any = args.linear_probe or ("paper" if args.preset else "closed")
    probes: Any = args.reconstruction_probes
    return RunSettings(
        seed=seed,
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
        linear_probe=linear_probe,
        num_segments=args.num_segments,
        knn_segmentation_images=NUM_EMBEDDED_NEIGHBOURS if args.is_embedded else None,
        reconstruction_metrics=_reconstruction_metrics(args),
        compression_images=args.compression_images,
        reconstruction_probes=probes,
        vq_model=_load_tokenizer(args, accelerator),
        accelerator=accelerator,
    )


def _reconstruction_metrics(args: EvaluationArguments) -> ReconstructionMetrics | None:
    is_asked_for = bool(args.preset) if args.perceptual_metrics is None else args.perceptual_metrics
    is_needed = not args.tasks or "reconstruction" in args.tasks
    return ReconstructionMetrics() if is_asked_for and is_needed else None


def _load_tokenizer(args: EvaluationArguments, accelerator: Accelerator) -> Any:
    if args.vq_model_name_or_path is None:
        return None
    from .. import MaskGitVQModel  # here, since it imports Diffusers

    return MaskGitVQModel.from_pretrained(args.vq_model_name_or_path).to(accelerator.device).eval()


def open_results(args: EvaluationArguments, accelerator: Accelerator) -> ResultFile:
    """The file of results, without those of before if they are to be overwritten."""
    path = Path(args.output_dir, RESULTS_NAME)
    if args.overwrite_output_dir and accelerator.is_main_process:
        path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return ResultFile(path)


# Results -------------------------------------------------------------------------------------------------------------


def report(args: EvaluationArguments, results: list[Result]) -> None:
    """Writes and prints the tables, draws the figure, and writes the Hub's files and cards."""
    folder = Path(args.output_dir)
    tables = build_tables(results, METRICS)
    text = f"{format_markdown(tables)}\n\n{format_models(results)}"
    replace_text(folder / "results.md", text + "\n")
    plot_results(bar_panels(tables)).savefig(folder / "results.png", dpi=200, bbox_inches="tight")
    print(f"\n{text}\n\n{folder / RESULTS_NAME}, results.md, results.png")
    for path, name in distinct_names(args.model_name_or_path).items():
        own = [result for result in results if result.model == name]
        for file in write_eval_results(folder / name, own):
            print(f"For the Hub: {file}")
        if args.update_model_card:
            update_model_card(path, own, METRICS)
            print(f"Model card: {Path(path, 'README.md')}")


if __name__ == "__main__":
    main()
