# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Trains a prior over tokens and localization, by which a pipeline draws images instead of only decoding them.

    stellar-hf train-prior                                      # demo model, embedded photographs, minutes on a CPU
    stellar-hf extract --image_dir photos --output_dir features
    stellar-hf train-prior --features_dir features --output_dir out --max_steps 20000 --bf16
    accelerate launch -m stellar_hf.cli.train_prior --features_dir features --output_dir out    # several processes

The features are those of --model_name_or_path, or of the model in --pipeline_name_or_path; classes are the labels that
are in them. The pipeline with the prior is written to OUTPUT_DIR/pipeline, samples of every class to
OUTPUT_DIR/samples.png. Without features, crops of the embedded photographs are encoded, and the generated ones are
measured. The same command goes on from the newest checkpoint; --overwrite_output_dir starts anew.
"""

import sys
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

import stellar_hf
from stellar_hf import StellarPipeline, StellarTokenPrior, StellarTokenPriorPipeline
from stellar_hf.cli.inputs import load_pipeline
from stellar_hf.cli.parser import CommandParser
from stellar_hf.cli.process import errors_in_a_sentence, use_all_cores
from stellar_hf.cli.resuming import announce, find_checkpoint, train_or_load
from stellar_hf.data import PHOTOGRAPH_NAMES, images_to_tensor, load_photo_mosaics
from stellar_hf.evaluation import format_results_table
from stellar_hf.features import ExtractedTokens, encode_images
from stellar_hf.prior import (
    GENERATION_COLUMNS,
    GenerationEvaluation,
    StellarTokenPriorTrainer,
    train_classifier,
)
from stellar_hf.visualization import plot_image_grid

NUM_STATISTICS_IMAGES = 10000
DECODE_BATCH_SIZE = 250


@dataclass
class PriorArguments:
    """What is to be drawn, and by which prior."""

    features_dir: str | None = field(
        default=None, metadata={"help": "What stellar-hf extract wrote; crops of the embedded photographs by default."}
    )
    model_name_or_path: str = field(
        default=stellar_hf.DEMO_MODEL,
        metadata={"help": "STELLAR model that decodes: a folder, or owner/name on the Hub."},
    )
    pipeline_name_or_path: str | None = field(
        default=None, metadata={"help": "In place of the model, a pipeline, as a model of codes needs."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of the prior's transformer."})
    num_layers: int = field(default=4, metadata={"help": "Its blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Its attention heads."})
    localization_patch_size: int | None = field(
        default=None,
        metadata={"help": "Side of the squares of patches that it takes together; 4, 2 or 1 by default, what fits."},
    )
    localization_channels: int = field(default=32, metadata={"help": "Width of its convolutions over the grid."})
    class_dropout: float = field(default=0.1, metadata={"help": "Share of images that are trained without a class."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance of what is drawn."})
    num_inference_steps: int = field(default=25, metadata={"help": "Steps of drawing."})
    num_train_crops: int = field(default=16000, metadata={"help": "Crops of the embedded photographs to train on."})
    num_eval_crops: int = field(default=1000, metadata={"help": "Images to draw and to compare with as many crops."})
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
    max_steps: int = field(default=900, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a step and process."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of AdamW."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Decay of AdamW's squared gradients, in [0, 1)."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW, at least 0."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."})
    warmup_steps: float = field(default=50, metadata={"help": "Warm-up, in steps or, below 1, a share of them."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two rows of the table."})
    save_steps: float = field(default=300, metadata={"help": "Steps between two checkpoints."})
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
    crops: datasets.Dataset | None
    """Embedded photographs whose features these are; None if they were read from a folder."""


def main() -> None:
    with errors_in_a_sentence():
        run(*parse_arguments(sys.argv[1:]))


def parse_arguments(argv: Sequence[str]) -> tuple[PriorArguments, PriorTrainingArguments]:
    return CommandParser(PriorArguments, PriorTrainingArguments, description=__doc__).parse(argv)


def run(args: PriorArguments, training_args: PriorTrainingArguments) -> None:
    prepare(training_args)
    pipe = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path, training_args.device)
    features = read_features(pipe, args, not training_args.disable_tqdm)
    sample = sample_factors(features)
    prior = StellarTokenPrior(**prior_sizes(features, args))
    prior.set_statistics(*sample)
    trainer = StellarTokenPriorTrainer(prior, training_args, args.class_dropout, train_dataset=features.rows)
    train_or_go_on(trainer, args)
    if trainer.is_world_process_zero():
        prior_pipe = StellarTokenPriorPipeline.from_pipe(pipe, prior=trainer.average.eval())
        prior_pipe.save_pretrained(Path(training_args.output_dir, "pipeline"))
        measure_and_draw(trainer, pipe, prior_pipe, features, args)


# Training ------------------------------------------------------------------------------------------------------------


def prepare(training_args: PriorTrainingArguments) -> None:
    """Settings of the process: no progress bars of loading and saving models, all cores, the seed."""
    logging.disable_progress_bar()
    use_all_cores(training_args)
    set_seed(training_args.seed)


def read_features(pipe: StellarPipeline, args: PriorArguments, show_progress: bool) -> Features:
    """Features from a folder, or else of crops of the embedded photographs, which the pipeline's model encodes."""
    if args.features_dir is not None:
        rows = ExtractedTokens(args.features_dir)
        return Features(rows, rows.grid_size, rows.num_classes, rows.class_names, crops=None)
    config = pipe.model.config
    side = config.image_size // config.patch_size
    crops = load_crops("train", args.num_train_crops, config.image_size)
    return Features(
        encode_crops(pipe, crops, show_progress), (side, side), len(PHOTOGRAPH_NAMES), list(PHOTOGRAPH_NAMES), crops
    )


def load_crops(split: str, num_crops: int, image_size: int, seed: int = 0) -> datasets.Dataset:
    return load_photo_mosaics(split, num_crops, image_size, num_regions=1, seed=seed)


def encode_crops(pipe: StellarPipeline, crops: datasets.Dataset, show_progress: bool) -> list[dict]:
    features = encode_images(
        pipe.model, crops, pipe.image_processor, description="tokens", show_progress=show_progress
    )
    columns = zip(features.sparse_tokens, features.localization, torch.tensor(crops["label"][:]), strict=True)
    names = ("sparse_tokens", "localization", "class_labels")
    return [dict(zip(names, row, strict=True)) for row in columns]


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
    """Writes samples.png; with embedded photographs, all_results.json and the table, too; says how to draw more."""
    folder = Path(str(trainer.args.output_dir))
    for pipeline in (pipe, prior_pipe):
        pipeline.set_progress_bar_config(disable=True)
    if features.crops is not None:
        results = evaluate(pipe, prior_pipe, features.crops, args, not trainer.args.disable_tqdm)
        trainer.save_metrics("test", {f"test_{name}": value for name, value in flatten(results).items()})
        print(f"\n{report(results)}\n")
    save_samples(prior_pipe, args, folder / "samples.png")
    print(how_to_draw(folder / "pipeline", prior_pipe.prior))


def evaluate(
    pipe: StellarPipeline,
    prior_pipe: StellarTokenPriorPipeline,
    train: datasets.Dataset,
    args: PriorArguments,
    show_progress: bool,
) -> dict[str, dict[str, float]]:
    """Rows of the table: real crops, their reconstructions, copies of training crops, and what the prior draws."""
    size, device = pipe.model.config.image_size, pipe.model.device
    reference = load_crops("test", 2 * args.num_eval_crops, size)
    crops = load_crops("test", args.num_eval_crops, size, seed=1)
    copied = train.take(args.num_eval_crops)
    train_images = pixels(train).to(device)
    train_labels, labels, copied_labels = (
        torch.tensor(data["label"][:], device=device) for data in (train, crops, copied)
    )
    classifier = train_classifier(train_images, train_labels, len(PHOTOGRAPH_NAMES), show_progress=show_progress)
    evaluation = GenerationEvaluation(classifier, train_images, pixels(reference).to(device))
    generator = torch.Generator().manual_seed(0)
    drawn = [
        prior_pipe(
            part, args.num_inference_steps, args.guidance_scale, generator, height=size, width=size, output_type="pt"
        )[0]
        for part in tqdm(labels.split(DECODE_BATCH_SIZE), desc="generate", leave=False, disable=not show_progress)
    ]
    return {
        "held-out crops": evaluation.measure(pixels(crops).to(device), labels),
        "their reconstructions": evaluation.measure(reconstruct(pipe, crops), labels),
        "copied training crops": evaluation.measure(reconstruct(pipe, copied), copied_labels),
        "generated": evaluation.measure(torch.cat(drawn), labels),
    }


def pixels(crops: datasets.Dataset) -> torch.Tensor:
    return torch.stack(images_to_tensor(crops["image"][:])) / 255


def reconstruct(pipe: StellarPipeline, crops: datasets.Dataset) -> torch.Tensor:
    return torch.cat([pipe(image=batch["image"], output_type="pt")[0] for batch in crops.iter(DECODE_BATCH_SIZE)])


def flatten(results: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"{row.replace(' ', '_').replace('-', '_')}_{name}": value
        for row, figures in results.items()
        for name, value in figures.items()
    }


def report(results: dict[str, dict[str, float]]) -> str:
    share = results["generated"]["named"] / results["held-out crops"]["named"]
    return (
        f"{format_results_table(results, GENERATION_COLUMNS)}\n\n"
        f"A classifier of real crops names the photograph that was asked for {share:.2f} times as often as that of a "
        "held-out crop.\nNearest: median distance to the nearest training crop."
    )


def save_samples(pipe: StellarTokenPriorPipeline, args: PriorArguments, path: Path) -> None:
    """A column for each of the first classes, under a real crop where there is one; without classes, a few images."""
    config = pipe.prior.config
    classes = list(range(min(config.num_classes, 20)))
    labels: Sequence[int | None] = classes or [None] * 8
    names = config.class_names or [str(label) for label in labels]
    rows = [("drawn" if row == 0 else "", draw(pipe, args, labels, seed=row)) for row in range(5)]
    if args.features_dir is None:
        rows.insert(0, ("real", real_crops(pipe.model.config.image_size, classes)))
    figure = plot_image_grid(rows, [name if config.num_classes else "" for name in names[: len(labels)]])
    figure.savefig(path, dpi=200)
    print(f"Images drawn from the prior: {path}")


def draw(
    pipe: StellarTokenPriorPipeline, args: PriorArguments, labels: Sequence[int | None], seed: int
) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    return pipe(labels, args.num_inference_steps, args.guidance_scale, generator)[0]


def real_crops(size: int, labels: list[int]) -> list[Image.Image]:
    crops = load_crops("test", 50 * len(labels), size)
    first = [crops["label"].index(label) for label in labels]
    return [crops[index]["image"] for index in first]


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
