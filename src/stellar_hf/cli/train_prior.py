# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Trains a prior over tokens and localization, by which a pipeline draws images instead of only decoding them.

    stellar-hf train-prior                                      # demo model, tabletop scenes, minutes on a CPU
    stellar-hf extract --image_dir photos --output_dir features
    stellar-hf train-prior --features_dir features --output_dir out --max_steps 20000 --bf16
    accelerate launch -m stellar_hf.cli.train_prior --features_dir features --output_dir out    # several processes

The features are those of --model_name_or_path, or of the model in --pipeline_name_or_path; classes are the labels that
are in them. The pipeline with the prior is written to OUTPUT_DIR/pipeline, samples of every class to
OUTPUT_DIR/samples.png. Without features, tabletop scenes are encoded, whose class is the number of their objects, 2 to
4, and what is drawn is measured. The same command goes on from the newest checkpoint; --overwrite_output_dir starts
anew.
"""

import copy
import sys
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

import stellar_hf

from .. import StellarPipeline, StellarTokenPrior, StellarTokenPriorPipeline
from ..data import PHOTOGRAPH_NAMES, images_to_tensor, load_tabletop_scenes
from ..data.ray_tracing import SHAPE_NAMES
from ..evaluation import format_results_table
from ..features import ExtractedTokens, encode_images
from ..features.encoding import encoder_of
from ..features.fingerprints import weights_fingerprint
from ..features.shards import shard_settings
from ..prior import (
    GENERATION_COLUMNS,
    GenerationEvaluation,
    ImageClassifier,
    StellarTokenPriorTrainer,
    draw_normal,
    other_scenes,
    train_classifier,
)
from ..visualization import plot_image_grid
from .inputs import load_pipeline
from .parser import CommandParser
from .process import errors_in_a_sentence, use_all_cores
from .resuming import announce, find_checkpoint, train_or_load

logger = logging.get_logger(__name__)

NUM_STATISTICS_IMAGES = 10000
BATCH_SIZE = 250  # of drawing and decoding
NUM_OBJECTS = (2, 3, 4)  # of a tabletop scene: its class
SCENE_SIZE = 64
MIN_COLUMNS, MAX_COLUMNS = 12, 20  # of samples.png


@dataclass
class PriorArguments:
    """What is to be drawn, and by which prior."""

    features_dir: str | None = field(
        default=None, metadata={"help": "What stellar-hf extract wrote; tabletop scenes by default."}
    )
    model_name_or_path: str = field(
        default=stellar_hf.DEMO_MODEL,
        metadata={"help": "STELLAR model that decodes: a folder, or owner/name on the Hub."},
    )
    pipeline_name_or_path: str | None = field(
        default=None, metadata={"help": "In place of the model, a pipeline, as a model of codes needs."}
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of the prior's transformer."})
    num_layers: int = field(default=4, metadata={"help": "Its blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Its attention heads."})
    localization_patch_size: int | None = field(
        default=None,
        metadata={"help": "Side of the squares of patches that it takes together; 4, 2 or 1 by default, what fits."},
    )
    localization_channels: int = field(default=32, metadata={"help": "Width of its convolutions over the grid."})
    sort_tokens: bool = field(
        default=True, metadata={"help": "Draw tokens in the order of reading, by where their maps are."}
    )
    class_dropout: float = field(default=0.1, metadata={"help": "Share of images that are trained without a class."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance of what is drawn."})
    num_inference_steps: int = field(default=25, metadata={"help": "Steps of drawing."})
    num_train_scenes: int = field(default=4000, metadata={"help": "Tabletop scenes to train on."})
    num_eval_scenes: int = field(default=500, metadata={"help": "Images to draw and to compare with as many scenes."})
    eval_split: str = field(
        default="test",
        metadata={
            "help": "Scenes to compare with: validation to choose options by.",
            "choices": ["validation", "test"],
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the checkpoints in output_dir and start anew, instead of going on from the newest."},
    )
    resume_from_newest_whole: bool = field(
        default=False,
        metadata={"help": "Pass over checkpoints that are damaged, and go on from the newest one that is whole."},
    )


@dataclass
class PriorTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the prior."""

    output_dir: str = field(default="stellar-prior", metadata={"help": "Folder of the results."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images of a step and process."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of AdamW."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Decay of AdamW's squared gradients, in [0, 1)."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW, at least 0."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."})
    warmup_steps: float = field(default=50, metadata={"help": "Warm-up, in steps or, below 1, a share of them."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two rows of the table."})
    save_steps: float = field(default=250, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})

    def __post_init__(self):
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # without an accelerator, PyTorch warns of it


class Features(NamedTuple):
    """What the prior is trained on: `rows` with `sparse_tokens`, `localization` and, with classes, `class_labels`."""

    rows: ExtractedTokens | list[dict]
    grid_size: tuple[int, int]
    num_classes: int
    class_names: list[str] | None
    scenes: datasets.Dataset | None
    """Tabletop scenes whose features these are; None if they were read from a folder."""


def main() -> None:
    with errors_in_a_sentence():
        run(*parse_arguments(sys.argv[1:]))


def parse_arguments(argv: Sequence[str]) -> tuple[PriorArguments, PriorTrainingArguments]:
    return CommandParser(PriorArguments, PriorTrainingArguments, description=__doc__).parse(argv)


def run(args: PriorArguments, training_args: PriorTrainingArguments) -> None:
    prepare(training_args)
    pipe = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path, training_args.device)
    features = read_features(pipe, args, training_args)
    sample = sample_factors(features)
    prior = StellarTokenPrior(**prior_sizes(features, args))
    prior.set_statistics(*sample)
    trainer = StellarTokenPriorTrainer(prior, training_args, args.class_dropout, train_dataset=features.rows)
    train_or_go_on(trainer, args)
    if trainer.is_world_process_zero():
        prior_pipe = StellarTokenPriorPipeline(**pipe.components, prior=trainer.average.eval())
        prior_pipe.save_pretrained(Path(training_args.output_dir, "pipeline"))
        measure_and_draw(trainer, pipe, prior_pipe, features, args)


# Training ------------------------------------------------------------------------------------------------------------


def prepare(training_args: PriorTrainingArguments) -> None:
    """Settings of the process: no progress bars of loading and saving models, all cores, the seed."""
    logging.disable_progress_bar()
    use_all_cores(training_args)
    set_seed(training_args.seed)


def read_features(pipe: StellarPipeline, args: PriorArguments, training_args: PriorTrainingArguments) -> Features:
    """
    Features from a folder, or else of tabletop scenes, which the pipeline's model encodes. Call it on all processes.

    Raises:
        ValueError: If there are none in the folder, or the pipeline's model has another number or size of tokens.
    """
    if args.features_dir is not None:
        rows = ExtractedTokens(args.features_dir)
        check_model_of(rows, pipe, args.features_dir)
        if training_args.process_index == 0:
            warn_of_other_weights(pipe, args.features_dir)
        return Features(rows, rows.grid_size, rows.num_classes, rows.class_names, scenes=None)
    config = pipe.model.config
    side = config.image_size // config.patch_size
    scenes = load_tabletop_scenes("train", args.num_train_scenes, SCENE_SIZE)
    names = [f"{number} objects" for number in NUM_OBJECTS]
    return Features(encode_scenes(pipe, scenes, training_args), (side, side), len(names), names, scenes)


def check_model_of(rows: ExtractedTokens, pipe: StellarPipeline, features_dir: str) -> None:
    """`ValueError` for features that the pipeline's model cannot decode, which else the trained prior would tell."""
    config = pipe.model.config
    found, expected = tuple(rows[0]["sparse_tokens"].shape), (config.num_sparse_tokens, config.hidden_size)
    if found != expected:
        raise ValueError(
            f"The features in {features_dir} are {found[0]} tokens of {found[1]} numbers, but the model that decodes "
            f"has {expected[0]} of {expected[1]}: give the model that they are of (model_name_or_path, or "
            "pipeline_name_or_path)."
        )


def warn_of_other_weights(pipe: StellarPipeline, features_dir: str) -> None:
    """Says so where the features are of another encoder than the pipeline's; shards of old know nothing of theirs."""
    made_with = shard_settings(next(Path(features_dir).rglob("*.parquet")))
    if "weights" not in made_with:
        return
    encoder = copy.deepcopy(encoder_of(pipe.model)).to(getattr(torch, made_with["dtype"]))
    if weights_fingerprint(encoder) != made_with["weights"]:
        logger.warning(
            f"The features in {features_dir} are of other weights, of {made_with.get('model_name_or_path')}, than "
            "the encoder of the model that decodes: it may make other images of them. Give the model that they are of "
            "(model_name_or_path, or pipeline_name_or_path)."
        )


def encode_scenes(
    pipe: StellarPipeline, scenes: datasets.Dataset, training_args: PriorTrainingArguments
) -> list[dict[str, Tensor]]:
    """Rows of all scenes, which the processes encode together."""
    features = encode_images(
        pipe.model,
        scenes,
        pipe.image_processor,
        # Not an Accelerator, which the Trainer makes, but what it knows of the processes.
        accelerator=training_args.distributed_state,  # type: ignore[arg-type]
        description="tokens",
        show_progress=not training_args.disable_tqdm,
    )
    columns = zip(features.sparse_tokens, features.localization, scene_labels(scenes)["count"], strict=True)
    names = ("sparse_tokens", "localization", "class_labels")
    return [dict(zip(names, row, strict=True)) for row in columns]


def scene_labels(scenes: datasets.Dataset) -> dict[str, Tensor]:
    """What a classifier is asked: the class of the number of objects, and of what the one that is seen most is."""
    columns = scenes.with_format("numpy")
    shape, material, area = (torch.from_numpy(np.stack(columns[name][:])) for name in ("shape", "material", "area"))
    largest = area.argmax(dim=1, keepdim=True)
    return {
        "count": (shape >= 0).sum(dim=1) - NUM_OBJECTS[0],
        "shape": shape.gather(1, largest).squeeze(1),
        "material": material.gather(1, largest).squeeze(1),
    }


def sample_factors(features: Features) -> tuple[Tensor, Tensor]:
    """S, (n, r, d), and L, (n, N, r), of up to `NUM_STATISTICS_IMAGES` random images."""
    chosen = torch.randperm(len(features.rows))[:NUM_STATISTICS_IMAGES].tolist()
    sample = default_collate([features.rows[index] for index in chosen])
    return sample["sparse_tokens"], sample["localization"]


def prior_sizes(features: Features, args: PriorArguments) -> dict[str, Any]:
    """Arguments of `StellarTokenPrior`: the sizes and classes of the features, and the options."""
    num_tokens, token_size = features.rows[0]["sparse_tokens"].shape
    patch_size = args.localization_patch_size
    if patch_size is None:
        patch_size = next(size for size in (4, 2, 1) if all(side % size == 0 for side in features.grid_size))
    return {
        "num_sparse_tokens": num_tokens,
        "token_size": token_size,
        "grid_size": features.grid_size,
        "num_classes": features.num_classes,
        "class_names": features.class_names,
        "localization_patch_size": patch_size,
        "hidden_size": args.hidden_size,
        "num_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "localization_channels": args.localization_channels,
        "sort_tokens": args.sort_tokens,
    }


def train_or_go_on(trainer: StellarTokenPriorTrainer, args: PriorArguments) -> None:
    """Trains, from the newest checkpoint where there is one, or loads the result where the training is finished."""
    if trainer.is_world_process_zero():
        prior, rows = trainer.average, cast(Sized, trainer.train_dataset)
        sizes = f"{prior.num_parameters():,} parameters, {len(rows):,} images, {prior.config.num_classes} classes"
        print(f"Prior with {sizes}\n")
    checkpoint = find_checkpoint(trainer, args.overwrite_output_dir, args.resume_from_newest_whole)
    is_finished = announce(trainer, checkpoint)
    train_or_load(trainer, checkpoint, is_finished)
    trainer.save_state()


# Results -------------------------------------------------------------------------------------------------------------


def measure_and_draw(
    trainer: StellarTokenPriorTrainer,
    pipe: StellarPipeline,
    prior_pipe: StellarTokenPriorPipeline,
    features: Features,
    args: PriorArguments,
) -> None:
    """Writes samples.png; with tabletop scenes, all_results.json and the table, too; says how to draw more."""
    folder = Path(str(trainer.args.output_dir))
    for pipeline in (pipe, prior_pipe):
        pipeline.set_progress_bar_config(disable=True)
    if features.scenes is not None:
        results = evaluate(pipe, prior_pipe, features, args, not trainer.args.disable_tqdm)
        trainer.save_metrics("test", {f"test_{name}": value for name, value in flatten(results).items()})
        print(f"\n{report(results)}\n")
    save_samples(pipe, prior_pipe, args, folder / "samples.png")
    print(how_to_draw(folder / "pipeline", prior_pipe.prior))


def evaluate(
    pipe: StellarPipeline,
    prior_pipe: StellarTokenPriorPipeline,
    features: Features,
    args: PriorArguments,
    show_progress: bool,
) -> dict[str, dict[str, float]]:
    """Rows of the table: real scenes, what their tokens keep, and what is drawn without training and by the prior."""
    train_scenes, num_images = cast(datasets.Dataset, features.scenes), args.num_eval_scenes
    scenes = load_tabletop_scenes(args.eval_split, 3 * num_images, SCENE_SIZE)
    held_out, reference = scenes.take(num_images), scenes.skip(num_images)
    counts = scene_labels(held_out)["count"]
    train = default_collate(cast(list[dict], features.rows))
    tokens, maps, train_counts = train["sparse_tokens"], train["localization"], train["class_labels"]
    reconstructed = decode(pipe, tokens, maps)
    train_images = pixels(train_scenes).to(reconstructed)
    evaluation = GenerationEvaluation(
        train_judge(train_images, reconstructed, scene_labels(train_scenes), show_progress),
        train_images,
        pixels(reference).to(reconstructed),
    )
    first = slice(num_images)
    others = tokens[other_scenes(train_counts)]
    drawn_by_normal = draw_normal(prior_pipe.prior, tokens, maps, train_counts, counts)
    images = {
        "held-out scenes": (pixels(held_out).to(reconstructed), counts),
        "their reconstructions": (reconstruct(pipe, held_out), counts),
        "copied training scenes": (reconstructed[first], train_counts[first]),
        "tokens of other scenes": (decode(pipe, others[first], maps[first]), train_counts[first]),
        "normal distribution": (decode(pipe, *drawn_by_normal), counts),
        "generated": (decode(pipe, *draw_factors(prior_pipe, counts, args, show_progress)), counts),
    }
    return {name: evaluation.measure(some, labels.to(some.device)) for name, (some, labels) in images.items()}


def train_judge(
    images: Tensor, reconstructed: Tensor, labels: dict[str, Tensor], show_progress: bool
) -> ImageClassifier:
    """A classifier of real scenes and of reconstructions, so that it judges what is seen, and not how sharp it is."""
    return train_classifier(
        torch.cat([images, reconstructed]),
        {name: label.repeat(2).to(images.device) for name, label in labels.items()},
        {"count": len(NUM_OBJECTS), "shape": len(SHAPE_NAMES), "material": len(PHOTOGRAPH_NAMES)},
        show_progress=show_progress,
    )


def draw_factors(
    prior_pipe: StellarTokenPriorPipeline, counts: Tensor, args: PriorArguments, show_progress: bool
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [
        prior_pipe.sample_tokens(part, args.num_inference_steps, args.guidance_scale, generator)
        for part in tqdm(counts.split(BATCH_SIZE), desc="generate", leave=False, disable=not show_progress)
    ]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([maps for _, maps in parts])


def decode(pipe: StellarPipeline, tokens: Tensor, maps: Tensor) -> Tensor:
    decoded = [
        pipe(sparse_tokens=what, localization=where, height=SCENE_SIZE, width=SCENE_SIZE, output_type="pt")[0]
        for what, where in zip(tokens.split(BATCH_SIZE), maps.split(BATCH_SIZE), strict=True)
    ]
    return torch.cat(decoded)


def reconstruct(pipe: StellarPipeline, scenes: datasets.Dataset) -> Tensor:
    return torch.cat([pipe(image=batch["image"], output_type="pt")[0] for batch in scenes.iter(BATCH_SIZE)])


def pixels(scenes: datasets.Dataset) -> Tensor:
    return torch.stack(images_to_tensor(scenes["image"][:])) / 255


def flatten(results: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"{row.replace(' ', '_').replace('-', '_')}_{name}": value
        for row, figures in results.items()
        for name, value in figures.items()
    }


def report(results: dict[str, dict[str, float]]) -> str:
    return (
        f"{format_results_table(results, GENERATION_COLUMNS)}\n\n"
        "A classifier of real scenes and reconstructions looks at them. Counted: it sees as many objects as there "
        "are, or were\nasked for. Sure: the probability that it gives to its answer for the largest object. Nearest: "
        "median distance to the\nnearest training scene."
    )


def save_samples(
    pipe: StellarPipeline, prior_pipe: StellarTokenPriorPipeline, args: PriorArguments, path: Path
) -> None:
    """Columns for the first classes, under real scenes where the classes are theirs; without classes, a few images."""
    config = prior_pipe.prior.config
    classes: list[int | None] = list(range(min(config.num_classes, MAX_COLUMNS))) or [None]
    num_columns = max(1, MIN_COLUMNS // len(classes))  # of each class
    labels = [label for label in classes for _ in range(num_columns)]
    rows = [("drawn" if row == 0 else "", draw(prior_pipe, args, labels, seed=row)) for row in range(5)]
    if args.features_dir is None:
        scenes = example_scenes(args.eval_split, labels)
        rows = [("real", scenes), ("decoded", pipe(image=scenes)[0]), *rows]
    names = config.class_names or [str(label) for label in range(config.num_classes)] or [""]
    titles = [name for label in range(len(classes)) for name in (names[label], *[""] * (num_columns - 1))]
    figure = plot_image_grid(rows, titles)
    figure.savefig(path, dpi=200)
    print(f"Images drawn from the prior: {path}")


def draw(
    pipe: StellarTokenPriorPipeline, args: PriorArguments, labels: Sequence[int | None], seed: int
) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    size = SCENE_SIZE if args.features_dir is None else None
    return pipe(labels, args.num_inference_steps, args.guidance_scale, generator, height=size, width=size)[0]


def example_scenes(split: str, labels: Sequence[int | None]) -> list[Image.Image]:
    """Different scenes of these classes."""
    scenes = load_tabletop_scenes(split, 60, SCENE_SIZE)
    counts = scene_labels(scenes)["count"].tolist()
    rows = {label: iter([row for row, count in enumerate(counts) if count == label]) for label in labels}
    return [scenes[next(rows[label])]["image"] for label in labels]


def how_to_draw(folder: Path, prior: StellarTokenPrior) -> str:
    names = prior.config.class_names
    label = repr(names[0]) if names else ("0" if prior.config.num_classes else "None")
    return (
        f"Pipeline with the prior: {folder}\n\n"
        "    import stellar_hf\n\n"
        f'    pipe = stellar_hf.StellarTokenPriorPipeline.from_pretrained("{folder}")\n'
        f"    pipe([{label}] * 4, guidance_scale=2.0).images\n"
        f"    tokens, localization = pipe.sample_tokens([{label}])\n"
    )


if __name__ == "__main__":
    main()
