# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Pre-trains STELLAR.

    accelerate launch examples/pretrain.py                          # embedded photographs, minutes on a CPU
    accelerate launch examples/pretrain.py recipe.yaml              # values from a YAML or JSON file
    accelerate launch examples/pretrain.py --train_dir photos --output_dir out \
        --model_config '{"image_size": 64, "patch_size": 8, "num_sparse_tokens": 8}' --local_size 32

Flags go before the values of a recipe, a recipe before the defaults; a recipe's model_config is overridden field by
field. Without a recipe and without images of your own, the recipe photo_mosaics is taken. One process needs
no launcher: python examples/pretrain.py does the same. An error is told in a sentence; --log_level=debug shows where
it came from.

The same command goes on from the newest checkpoint in the output folder, however the run ended; Ctrl-C and SIGTERM
save one before they end it. A finished run is only measured again. --overwrite_output_dir starts anew.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import yaml
from PIL import Image, ImageOps
from transformers import AutoConfig, HfArgumentParser, set_seed
from transformers.utils import logging

import stellar_hf
from stellar_hf import (
    StellarConfig,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarImageProcessorPil,
    StellarTrainer,
    StellarTrainingArguments,
)
from stellar_hf.cli.process import errors_in_a_sentence, use_all_cores
from stellar_hf.cli.resuming import announce, find_checkpoint, train_or_load
from stellar_hf.data import StellarCollator, images_to_tensor, load_images, load_photo_mosaics, undecoded
from stellar_hf.evaluation import evaluate_stellar, format_results_table, psnr, raw_pixel_baseline
from stellar_hf.training import default_processor
from stellar_hf.training.evaluation import sample_rows
from stellar_hf.visualization import plot_reconstructions

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "photo_mosaics.yaml"


@dataclass
class ModelArguments:
    """Which model to train, and whether to begin again."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Weights to start from, a folder or owner/name on the Hub: STELLAR, or a ViT, ViT-MAE or DINOv2 "
            "(for the encoder alone)."
        },
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of StellarConfig, as JSON: '{\"num_sparse_tokens\": 8}'. Overrides a checkpoint's."},
    )
    vq_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer whose codes are reconstructed instead of pixels, as in the paper: a folder that "
            "stellar_hf.conversion.convert_maskgit_vq wrote."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the checkpoints in output_dir and start anew, instead of going on from the newest."},
    )

    def __post_init__(self):
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except json.JSONDecodeError as error:
                raise ValueError(f"model_config is {self.model_config}, which is not JSON: {error}.") from error
        self.model_config = {} if self.model_config is None else self.model_config
        if not isinstance(self.model_config, dict):
            raise ValueError(f"model_config is {self.model_config}, but must be names with values.")
        check_names("model_config", self.model_config, known=StellarConfig().to_dict())


@dataclass
class DataArguments:
    """Which images to train on; the embedded photo mosaics by default."""

    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images, searched with its subfolders; or folder or pattern of shards (WebDataset, "
            "Parquet, Arrow)."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or its local folder."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Whether to read shards and Hub data sets while training, over and over; needs max_steps."},
    )
    shuffle_buffer: int = field(
        default=10000, metadata={"help": "Images of a stream that are held to draw the next one from."}
    )
    eval_dir: str | None = field(
        default=None,
        metadata={"help": "As train_dir, images to measure on while training (--eval_strategy steps --eval_steps …)."},
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of dataset_name to measure on while training."}
    )
    num_train_scenes: int = field(default=20000, metadata={"help": "Photo mosaics to train on."})
    num_eval_scenes: int = field(
        default=2000, metadata={"help": "Photo mosaics and crops of the test split to evaluate on."}
    )

    @property
    def is_embedded(self) -> bool:
        return self.train_dir is None and self.dataset_name is None

    def __post_init__(self):
        if self.train_dir is not None and self.dataset_name is not None:
            raise ValueError("Both train_dir and dataset_name are given: choose one source of images.")
        if self.eval_split is not None and self.dataset_name is None:
            raise ValueError("eval_split is for a dataset_name: for a train_dir, give eval_dir.")
        if self.streaming and self.is_embedded:
            raise ValueError("streaming is for shards and data sets on the Hub: give train_dir or dataset_name.")


def main() -> None:
    with errors_in_a_sentence():
        run(*parse_arguments(sys.argv[1:]))


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, StellarTrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, StellarTrainingArguments))
    known = vars(parser.parse_known_args([])[0])
    has_recipe = bool(argv) and argv[0].endswith((".yaml", ".yml", ".json"))
    path, argv = (argv[0], argv[1:]) if has_recipe else (DEFAULT_RECIPE, argv)
    flags, _ = parser.parse_known_args(argv)
    own_images = flags.train_dir or flags.dataset_name
    recipe = read_recipe(path, known) if has_recipe or not own_images else {}
    if own_images:  # instead of the recipe's
        recipe = {name: value for name, value in recipe.items() if name not in ("train_dir", "dataset_name")}
    if flags.model_name_or_path and not has_recipe:
        recipe.pop("model_config", None)
    config = ModelArguments(model_config=recipe.pop("model_config", None)).model_config
    model_args, data_args, training_args = parser.parse_args_into_dataclasses([*as_flags(recipe), *argv])
    model_args.model_config = {**config, **model_args.model_config}
    return model_args, data_args, training_args


def read_recipe(path: str | Path, known: dict) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe {path} holds no 'name: value' pairs.")
    check_names(f"The recipe {path}", values, known)
    return values


def check_names(where: str, values: dict, known: dict) -> None:
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where} sets {', '.join(unknown)}, which does not exist.")


def as_flags(values: dict) -> Iterator[str]:
    """The values of a recipe as the command line would give them, so that both are checked alike."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif value is not None:
            yield f"--{name}={json.dumps(value) if isinstance(value, bool | dict) else value}"


def run(model_args: ModelArguments, data_args: DataArguments, training_args: StellarTrainingArguments) -> None:
    logging.disable_progress_bar()  # of loading and saving models; the training's stays
    use_all_cores(training_args)
    set_seed(training_args.seed)
    if training_args.push_to_hub:
        # The code goes along, so that the model loads where stellar_hf is not installed.
        StellarForPreTraining.register_for_auto_class("AutoModelForPreTraining")
        StellarImageProcessorPil.register_for_auto_class()
    model = build_model(model_args)
    vq_model = load_vq_model(model_args)
    processor = default_processor(model)
    images = open_images(data_args, model.config.image_size, training_args)
    train_dataset = images
    if data_args.streaming:
        train_dataset = images.repeat(None).shuffle(seed=training_args.seed, buffer_size=data_args.shuffle_buffer)
    trainer = StellarTrainer(
        model,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=open_eval_images(data_args, model.config.image_size, training_args),
        processing_class=processor,
        vq_model=vq_model,
    )
    is_main_process = trainer.is_world_process_zero()
    if is_main_process:
        print(describe(model, "streamed" if data_args.streaming else f"{len(images):,}"))
    checkpoint = find_checkpoint(trainer, model_args.overwrite_output_dir)
    is_finished = announce(trainer, checkpoint)
    evaluation = None
    if data_args.is_embedded and is_main_process:
        evaluation = MosaicEvaluation(
            data_args.num_eval_scenes, model.config.image_size, show_progress=not training_args.disable_tqdm
        )
        evaluation.add_untrained(model)

    train_or_load(trainer, checkpoint, is_finished)
    trainer.save_model()
    trainer.save_state()
    if evaluation is not None:
        trainer.save_metrics("test", evaluation.add_trained(model))
        print(f"\nTest split of the photo mosaics\n\n{evaluation.table()}\n")
    card = model_card_arguments(data_args)
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if is_main_process:
        save_pipeline(training_args.output_dir, processor, vq_model)
        shown = images if evaluation is None else evaluation.data["scenes"]
        few = shown.take(8) if data_args.streaming else shown.select(sample_rows(shown, 8, training_args.label_column))
        few_images = read_images(few, training_args.image_column)
        show_reconstructions(training_args.output_dir, few_images, training_args.device)
        print(how_to_load(training_args.output_dir))


def build_model(args: ModelArguments) -> StellarForPreTraining:
    target = "pixels" if args.vq_model_name_or_path is None else "codes"
    fields = {"reconstruction_target": target, **args.model_config}
    if args.model_name_or_path is None:
        model = StellarForPreTraining(StellarConfig(**fields))
    elif AutoConfig.from_pretrained(args.model_name_or_path).model_type != StellarConfig.model_type:
        model = StellarForPreTraining.from_vit_pretrained(args.model_name_or_path, **fields)
    else:
        try:
            model = StellarForPreTraining.from_pretrained(args.model_name_or_path, **args.model_config)
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {args.model_name_or_path} do not fit model_config {args.model_config}."
            ) from error
    if model.config.reconstruction_target != target:
        raise ValueError(
            f'The model has reconstruction_target="{model.config.reconstruction_target}": "codes" need the tokenizer '
            "that makes them, vq_model_name_or_path, and pixels need none."
        )
    return model


def load_vq_model(args: ModelArguments) -> "stellar_hf.MaskGitVQModel | None":
    if args.vq_model_name_or_path is None:
        return None
    # By its package, so that a training of pixels does not import Diffusers.
    return stellar_hf.MaskGitVQModel.from_pretrained(args.vq_model_name_or_path)


def open_images(args: DataArguments, image_size: int, training_args: StellarTrainingArguments):
    if args.is_embedded:
        return load_photo_mosaics("train", args.num_train_scenes, image_size)
    source = args.train_dir or args.dataset_name
    if args.train_dir is not None and "*" not in source and not Path(source).exists():
        raise ValueError(f"train_dir is {source}, which does not exist.")
    images = load_images(source, args.dataset_split, args.streaming, training_args.image_column)
    if args.streaming and training_args.max_steps <= 0:
        raise ValueError("A stream has no end: set max_steps.")
    return images


def open_eval_images(args: DataArguments, image_size: int, training_args: StellarTrainingArguments):
    given = args.eval_dir or args.eval_split
    if training_args.eval_strategy == "no":
        if given:
            raise ValueError(f"Images to measure on are given, {given}, but not when: add --eval_strategy epoch.")
        return None
    if args.is_embedded:
        return load_photo_mosaics("test", args.num_eval_scenes, image_size)
    if given is None:
        raise ValueError("There are no images to measure on: give eval_dir, or eval_split of dataset_name.")
    source, split = (args.eval_dir, "train") if args.eval_dir else (args.dataset_name, args.eval_split)
    return load_images(source, split, image_column=training_args.image_column)


class MosaicEvaluation:
    """The rows of the final table, measured on the test split of the photo mosaics."""

    def __init__(self, num_scenes: int, image_size: int, show_progress: bool):
        def mosaics(split: str, count: int, num_regions: int) -> datasets.Dataset:
            # Neighbours and probes take other scenes of the training split than the training does.
            return load_photo_mosaics(split, count, image_size, num_regions, seed=1)

        self.data = {
            "crops_train": mosaics("train", 2 * num_scenes, 1),
            "crops_test": mosaics("test", num_scenes, 1),
            "scenes_train": mosaics("train", 2 * num_scenes, 2),
            "scenes": mosaics("test", num_scenes, 2),
        }
        self.show_progress = show_progress
        self.rows = {"raw pixels": raw_pixel_baseline(self.data["crops_train"], self.data["crops_test"])}

    def measure(self, model: StellarForPreTraining) -> dict[str, float]:
        return evaluate_stellar(model, **self.data, show_progress=self.show_progress)

    def add_untrained(self, model: StellarForPreTraining) -> None:
        self.rows["before training"] = self.measure(model)

    def add_trained(self, model: StellarForPreTraining) -> dict[str, float]:
        """Measures the trained model; returns the figures of all rows under the names of `all_results.json`."""
        self.rows["after training"] = self.measure(model)
        prefixes = {"raw pixels": "raw_pixels_", "before training": "untrained_", "after training": ""}
        figures = {
            f"{prefix}test_{name}": value for row, prefix in prefixes.items() for name, value in self.rows[row].items()
        }
        if model.config.image_size == StellarConfig.from_pretrained(stellar_hf.DEMO_MODEL).image_size:
            # As they were measured on 2000 scenes: measuring this larger model takes longer than a small training.
            demo = json.loads(Path(stellar_hf.DEMO_MODEL, "all_results.json").read_text())
            self.rows["demo model"] = {name.removeprefix("test_"): value for name, value in demo.items()}
        return figures

    def table(self) -> str:
        return format_results_table(self.rows)


def read_images(rows: datasets.Dataset | datasets.IterableDataset, image_column: str) -> list[torch.Tensor]:
    batch = StellarCollator(image_column)(list(undecoded(rows, image_column)))
    return [
        image[:, :height, :width]
        for image, (height, width) in zip(batch["images"], batch["image_sizes"].tolist(), strict=True)
    ]


def model_card_arguments(args: DataArguments) -> dict[str, str]:
    if args.is_embedded:
        return {"dataset": "photo mosaics"}
    if args.dataset_name is not None and not Path(args.dataset_name).exists():
        return {"dataset_tags": args.dataset_name}
    return {}  # a folder of the person who trains says nothing to others


def describe(model: StellarForPreTraining, num_images: str) -> str:
    config = model.config
    return (
        f"STELLAR with {model.num_parameters():,} parameters and {config.num_sparse_tokens} sparse tokens, "
        f"{num_images} images at {config.image_size}x{config.image_size} pixels\n"
    )


def save_pipeline(
    folder: str, processor: StellarImageProcessorPil, vq_model: "stellar_hf.MaskGitVQModel | None"
) -> None:
    model = StellarForImageReconstruction.from_pretrained(folder)
    # By its package, which imports Diffusers now and not when the training starts.
    pipe = stellar_hf.StellarPipeline(image_processor=processor, model=model, vq_model=vq_model)
    pipe.save_pretrained(Path(folder, "pipeline"))


def show_reconstructions(folder: str, images: list[torch.Tensor], device: torch.device) -> None:
    """Draws images and what the pipeline in the folder makes of their tokens."""
    from diffusers.utils import logging as diffusers_logging  # here, since a training of pixels does not need it

    diffusers_logging.disable_progress_bar()
    pipe = stellar_hf.StellarPipeline.from_pretrained(Path(folder, "pipeline")).to(device)
    side = pipe.model.config.image_size
    squares = [ImageOps.fit(Image.fromarray(image.permute(1, 2, 0).numpy()), (side, side)) for image in images]
    tokens, localization = pipe.encode(squares)
    reconstructions = pipe(sparse_tokens=tokens, localization=localization, height=side, width=side).images
    path = Path(folder, "reconstructions.png")
    plot_reconstructions(squares, reconstructions, localization).savefig(path, dpi=150)
    found, expected = (torch.stack(images_to_tensor(group)) / 255 for group in (reconstructions, squares))
    print(
        f"{len(squares)} images through the pipeline, PSNR {psnr(found, expected).mean():.1f} dB, "
        f"with token maps: {path}\n"
    )


def how_to_load(folder: str) -> str:
    pipeline = Path(folder, "pipeline")
    return (
        f"Model and image processor: {folder}\n\n"
        "    import stellar_hf\n"
        "    from transformers import AutoImageProcessor, AutoModel\n\n"
        f'    model = AutoModel.from_pretrained("{folder}")\n'
        f'    processor = AutoImageProcessor.from_pretrained("{folder}")\n'
        f"\nFrom images to tokens and back: {pipeline}\n\n"
        f'    pipe = stellar_hf.StellarPipeline.from_pretrained("{pipeline}")\n'
        "    tokens, localization = pipe.encode(image)\n"
        "    pipe(sparse_tokens=tokens, localization=localization).images\n"
    )


if __name__ == "__main__":
    main()
