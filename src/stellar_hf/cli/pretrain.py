# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Pre-trains STELLAR.

    stellar-hf pretrain                                         # embedded scenes, minutes on a CPU
    stellar-hf pretrain --train_dir photos --output_dir out     # your images, with values that fit them
    stellar-hf pretrain recipe.yaml --max_steps 5000            # values from a file; flags override them
    accelerate launch --num_processes 8 -m stellar_hf.cli.pretrain recipe.yaml

A recipe is a YAML or JSON file, or the name of a packaged one: tabletop_scenes (taken without any arguments),
own_images and own_images_gpu (taken for images of your own, where neither a model nor its model_config is given).
Flags override the values of a recipe, a recipe the defaults; model_config is merged field by field. The defaults that
--help shows are those without a recipe, as where a model is given. They suit a large model that starts from a ViT.

The same command goes on from the newest checkpoint in the output folder, however the run ended; Ctrl-C and SIGTERM
save one before they end it. A finished run is only measured again. --overwrite_output_dir starts anew. An error is
told in a sentence; --log_level=debug shows where it came from.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

import datasets
import torch
from transformers import AutoConfig, set_seed
from transformers.utils import logging

import stellar_hf

from .. import (
    StellarConfig,
    StellarForPreTraining,
    StellarImageProcessorPil,
    StellarTrainer,
    StellarTrainingArguments,
)
from ..data import EndlessStream, load_images, load_tabletop_scenes
from ..released_stellar import RELEASED_NAMES
from ..training import default_processor
from ..training.monitoring import warning_of_random_weights
from .own_images import fit_to_images
from .parser import CommandParser
from .process import errors_in_a_sentence, use_all_cores
from .recipes import read_recipe
from .results import SceneEvaluation, how_to_load, save_pipeline, show_reconstructions
from .resuming import announce, find_checkpoint, train_or_load

Images: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass
class ModelArguments:
    """Which model to train, and whether to begin again."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Weights to start from, a folder or owner/name on the Hub: STELLAR, or a ViT, ViT-MAE or DINOv2 "
            "(for the encoder alone); or a model that the authors released, such as stellar-b16, with its tokenizer."
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
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of Transformers: sdpa (the default), flash_attention_2 on GPUs, or eager, which is the "
            "fastest on a CPU where a view has fewer than some hundred patches."
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
    fits_images: bool = field(default=False, init=False)  # whether the model's image size is chosen by the images

    def __post_init__(self):
        self.model_config = read_config_fields(self.model_config)

    @property
    def is_released(self) -> bool:
        """Whether the weights are named as the authors' are; a folder of that name goes before."""
        name = self.model_name_or_path
        return name in RELEASED_NAMES and not Path(str(name)).is_dir()

    @property
    def reconstruction_target(self) -> str:
        return "codes" if self.vq_model_name_or_path is not None or self.is_released else "pixels"


@dataclass
class DataArguments:
    """Which images to train on; the embedded tabletop scenes by default."""

    _argument_group_name = "images"

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
        metadata={
            "help": "As train_dir, images to measure on: at the end, and while training with --eval_strategy steps "
            "--eval_steps 1000."
        },
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of dataset_name to measure on."})
    num_train_scenes: int = field(default=20000, metadata={"help": "Embedded scenes to train on."})
    num_eval_scenes: int = field(default=2000, metadata={"help": "Embedded scenes of the test split to measure on."})

    @property
    def is_embedded(self) -> bool:
        return self.train_dir is None and self.dataset_name is None

    def __post_init__(self):
        if self.train_dir is not None and self.dataset_name is not None:
            raise ValueError("Both train_dir and dataset_name are given: choose one source of images.")
        if self.eval_split is not None and self.dataset_name is None:
            raise ValueError("eval_split is for a dataset_name: for a train_dir, give eval_dir.")
        if self.eval_dir is not None and self.is_embedded:
            raise ValueError("eval_dir is for images of your own: give train_dir or dataset_name.")
        if self.streaming and self.is_embedded:
            raise ValueError("streaming is for shards and data sets on the Hub: give train_dir or dataset_name.")


def main() -> None:
    with errors_in_a_sentence():
        run(*parse_arguments(sys.argv[1:]))


def run(model_args: ModelArguments, data_args: DataArguments, training_args: StellarTrainingArguments) -> None:
    prepare(model_args, data_args, training_args)
    model = build_model(model_args)
    vq_model = load_vq_model(model_args)
    view_size = training_args.views(model.config).global_size
    images = open_images(data_args, training_args, view_size)
    trainer = StellarTrainer(
        model,
        training_args,
        train_dataset=training_images(images, data_args, training_args),
        eval_dataset=open_eval_images(data_args, training_args, view_size),
        processing_class=default_processor(model, training_args.background),
        vq_model=vq_model,
    )
    train_and_measure(trainer, images, vq_model, model_args, data_args)


# Arguments -----------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, StellarTrainingArguments]:
    """
    Reads the arguments of the command, and the recipe that they name or that is taken without one.

    Raises:
        ValueError: On an unknown name or an impossible value among the arguments or in the recipe.
    """
    (model_args, data_args, training_args), name, is_named = parse_with_recipe(make_parser(), argv, default_recipe)
    model_args.fits_images = not is_named and name is not None and not data_args.is_embedded
    return model_args, data_args, training_args


def parse_with_recipe(
    parser: CommandParser, argv: list[str], default_recipe: Callable[[Mapping[str, Any]], str | None]
) -> tuple[tuple[Any, ...], str | None, bool]:
    """
    Reads the arguments of a command that takes a recipe before its flags.

    Args:
        parser: Of the flags, [`ModelArguments`] first.
        argv: The recipe, if one is named, and the flags.
        default_recipe: Chooses a recipe, or none, for the flags that are given where no recipe is named.

    Returns:
        The parser's dataclasses; the recipe, if there is one; and whether it was named.

    Raises:
        ValueError: On an unknown name or an impossible value among the arguments or in the recipe.
    """
    named, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    given = parser.given(argv)
    name = named or default_recipe(given)
    recipe = {} if name is None else read_recipe(name, types=value_types(parser))
    if "train_dir" in given or "dataset_name" in given:  # instead of the recipe's
        recipe = {key: value for key, value in recipe.items() if key not in ("train_dir", "dataset_name")}
    if "num_train_epochs" in given and "max_steps" not in given:
        recipe.pop("max_steps", None)  # which goes before the epochs
    if named is None and "model_name_or_path" in given:
        recipe.pop("model_config", None)
    if named is None and not has_bf16():
        recipe.pop("bf16", None)  # what nobody named has to run well on any machine
    config = read_config_fields(recipe.pop("model_config", None))
    parser.set_defaults(**recipe)
    groups = parser.parse(argv)
    groups[0].model_config = {**config, **groups[0].model_config}
    return groups, name, named is not None


def make_parser() -> CommandParser:
    """The parser of the command's flags; a recipe stands before them."""
    return CommandParser(
        ModelArguments,
        DataArguments,
        StellarTrainingArguments,
        description=__doc__,
        usage="[RECIPE] [--FLAG VALUE ...]",
    )


def default_recipe(given: Mapping[str, Any]) -> str | None:
    """The packaged recipe for what is given, or None where the model is chosen already."""
    if "train_dir" not in given and "dataset_name" not in given:
        return "tabletop_scenes"
    if given.keys() & {"model_config", "model_name_or_path", "vq_model_name_or_path"}:
        return None
    has_gpu = torch.accelerator.is_available() and not given.get("use_cpu")
    return "own_images_gpu" if has_gpu else "own_images"


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 itself; older ones only emulate it, slowly."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def value_types(parser: CommandParser) -> dict[str, Any]:
    """The types of the values that a recipe may set, by their names."""
    return {name: hint for group in parser.parsed_types for name, hint in get_type_hints(group).items()}


def read_config_fields(fields: dict | str | None) -> dict[str, Any]:
    """
    Fields of `StellarConfig` with their values, given as JSON or as a dict.

    Raises:
        ValueError: If this is no JSON, holds no names with values, or the config has no such field.
    """
    if isinstance(fields, str):
        try:
            fields = json.loads(fields)
        except json.JSONDecodeError as error:
            raise ValueError(f"model_config is {fields}, which is not JSON: {error}.") from error
    fields = {} if fields is None else fields
    if not isinstance(fields, dict):
        raise ValueError(f"model_config is {fields}, but must be names with values.")
    known = StellarConfig().to_dict()
    if unknown := [str(name) for name in fields if name not in known]:
        raise ValueError(f"model_config sets {', '.join(unknown)}, which does not exist.")
    return fields


# Inputs of the trainer -----------------------------------------------------------------------------------------------


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: StellarTrainingArguments) -> None:
    """Seed, cores, what is pushed, and sizes that fit images of one's own; before a model is made."""
    logging.disable_progress_bar()  # of loading and saving models; the training's stays
    use_all_cores(training_args)
    set_seed(training_args.seed)
    if training_args.push_to_hub:
        # The code goes along, so that the model loads where stellar_hf is not installed.
        StellarForPreTraining.register_for_auto_class("AutoModelForPreTraining")
        StellarImageProcessorPil.register_for_auto_class()
    if model_args.fits_images:
        fields = read_config_fields(model_args.model_config)
        model_args.model_config = fit_to_images(fields, open_own_images(data_args, training_args), training_args)


def build_model(args: ModelArguments) -> StellarForPreTraining:
    """
    A new model, one whose encoder is that of a ViT, or one that was trained before.

    Raises:
        ValueError: If the weights do not fit the fields that are given, or the target of the reconstruction does not
            fit the tokenizer.
    """
    target = args.reconstruction_target
    overrides = read_config_fields(args.model_config)
    fields = {"reconstruction_target": target, **overrides}
    if args.model_name_or_path is None:
        model = StellarForPreTraining(StellarConfig(**fields))
        if warning := warning_of_random_weights(model.config):
            logging.get_logger(__name__).warning(warning)
    elif args.is_released:
        model = StellarForPreTraining.from_released(args.model_name_or_path, **overrides)
    elif AutoConfig.from_pretrained(args.model_name_or_path).model_type != StellarConfig.model_type:
        model = StellarForPreTraining.from_vit_pretrained(args.model_name_or_path, **fields)
    else:
        try:
            model = StellarForPreTraining.from_pretrained(args.model_name_or_path, **overrides)
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {args.model_name_or_path} do not fit model_config {overrides}."
            ) from error
    if model.config.reconstruction_target != target:
        raise ValueError(
            f'The model has reconstruction_target="{model.config.reconstruction_target}": "codes" need the tokenizer '
            "that makes them, vq_model_name_or_path, and pixels need none."
        )
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    return model


def load_vq_model(args: ModelArguments) -> "stellar_hf.MaskGitVQModel | None":
    """The tokenizer whose codes are reconstructed, if there is one."""
    if args.vq_model_name_or_path is None:
        return stellar_hf.MaskGitVQModel.from_released() if args.is_released else None
    return stellar_hf.MaskGitVQModel.from_pretrained(args.vq_model_name_or_path)


def open_images(data_args: DataArguments, training_args: StellarTrainingArguments, image_size: int) -> Images:
    """
    Opens the images to train on; the embedded ones are made in this size, that of the global views.

    Raises:
        ValueError: If there are none, or a stream would never end.
    """
    if data_args.is_embedded:
        return load_tabletop_scenes("train", data_args.num_train_scenes, image_size)
    return open_own_images(data_args, training_args)


def open_own_images(data_args: DataArguments, training_args: StellarTrainingArguments) -> Images:
    source = data_args.train_dir or str(data_args.dataset_name)
    if data_args.train_dir is not None:
        check_folder("train_dir", data_args.train_dir)
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("A stream has no end: set max_steps.")
    return load_images(source, data_args.dataset_split, data_args.streaming, training_args.image_column)


def check_folder(name: str, folder: str) -> None:
    if "*" not in folder and not Path(folder).exists():
        raise ValueError(f"{name} is {folder}, which does not exist.")


def training_images(
    images: Images, data_args: DataArguments, training_args: StellarTrainingArguments
) -> Images | EndlessStream:
    """The images as the trainer takes them: a stream is repeated without end, and shuffled anew in each pass."""
    if not isinstance(images, datasets.IterableDataset):
        return images
    return EndlessStream(images, training_args.seed, data_args.shuffle_buffer)


def open_eval_images(
    data_args: DataArguments, training_args: StellarTrainingArguments, image_size: int
) -> Images | None:
    """
    Opens the images to measure on, or None if there are none.

    Raises:
        ValueError: If the training is to measure on images, but none are given.
    """
    measures_while_training = training_args.eval_strategy != "no"
    if data_args.is_embedded:
        if not measures_while_training:
            return None  # the table of the end is of the test split
        return load_tabletop_scenes("validation", data_args.num_eval_scenes, image_size)
    if data_args.eval_dir is not None:
        check_folder("eval_dir", data_args.eval_dir)
        return load_images(data_args.eval_dir, image_column=training_args.image_column)
    if data_args.eval_split is not None:
        return load_images(str(data_args.dataset_name), data_args.eval_split, image_column=training_args.image_column)
    if measures_while_training:
        raise ValueError(
            f"eval_strategy is {training_args.eval_strategy}, but there are no images to measure on: give eval_dir, "
            "or eval_split of dataset_name."
        )
    return None


# Training and its results --------------------------------------------------------------------------------------------


def train_and_measure(
    trainer: StellarTrainer,
    images: Images,
    vq_model: "stellar_hf.MaskGitVQModel | None",
    model_args: ModelArguments,
    data_args: DataArguments,
) -> None:
    """
    Trains, or goes on; measures; and writes model, pipeline, figure and card, which are pushed if that is asked for.
    Call it on all processes.
    """
    is_main_process = trainer.is_world_process_zero()
    if is_main_process:
        print(describe(trainer, "streamed" if data_args.streaming else f"{len(images):,}"))
    checkpoint = find_checkpoint(trainer, model_args.overwrite_output_dir, model_args.resume_from_newest_whole)
    is_finished = announce(trainer, checkpoint)
    table = start_table(trainer, model_args, data_args) if data_args.is_embedded and is_main_process else None

    train_or_load(trainer, checkpoint, is_finished)
    trainer.save_model()
    trainer.save_state()
    if table is not None:
        trainer.save_metrics("test", table.add_trained(trainer.model))
        print(f"\nTest split of the tabletop scenes\n\n{table.table()}\n")
    elif trainer.eval_dataset is not None and not data_args.is_embedded:
        if is_finished or not trainer.is_evaluated():  # a finished run may be given other images to measure on
            trainer.save_metrics("eval", trainer.evaluate())
    write_results(trainer, images if table is None else table.test, vq_model, data_args)


def write_results(
    trainer: StellarTrainer,
    images: Images,
    vq_model: "stellar_hf.MaskGitVQModel | None",
    data_args: DataArguments,
    **card: Any,
) -> None:
    """
    Writes pipeline, figure and card beside the saved model, and pushes all of it if that is asked for. Call it on all
    processes.

    Args:
        trainer: Whose model is saved.
        images: Some of them are drawn.
        vq_model: The tokenizer of codes, if there is one.
        data_args: What the model was trained on.
        **card: Further arguments of the card.
    """
    is_main_process = trainer.is_world_process_zero()
    if is_main_process:
        save_pipeline(trainer, vq_model)
        show_reconstructions(trainer, images)
    card |= model_card_arguments(data_args)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if is_main_process:
        print(how_to_load(str(trainer.args.output_dir)))


def start_table(trainer: StellarTrainer, model_args: ModelArguments, data_args: DataArguments) -> SceneEvaluation:
    """The table of the end, with the rows that are known before the training."""
    return SceneEvaluation(
        data_args.num_eval_scenes,
        trainer.args.views(trainer.model.config).global_size,
        trainer.model,
        trainer.processing_class,
        "untrained" if model_args.model_name_or_path is None else "before",
        show_progress=not trainer.args.disable_tqdm,
    )


def model_card_arguments(args: DataArguments) -> dict[str, str]:
    """What the data is called; of a folder of one's own the trainer says how many images of how many classes."""
    if args.is_embedded:
        return {"dataset": "tabletop scenes"}
    if args.dataset_name is not None and not Path(args.dataset_name).exists():
        return {"dataset_tags": args.dataset_name}
    return {}


def describe(trainer: StellarTrainer, num_images: str) -> str:
    model, size = trainer.model, trainer.args.views(trainer.model.config).global_size
    return (
        f"STELLAR with {model.num_parameters():,} parameters and {model.config.num_sparse_tokens} sparse tokens, "
        f"{num_images} images in views of {size}x{size} pixels\n"
    )


if __name__ == "__main__":
    main()
