# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Adapts STELLAR to images of your own: trains it further, heads and prototypes included, and guards what it knew.

    stellar-hf adapt --model_name_or_path stellar-b16 --train_dir photos/train --eval_dir photos/test \\
        --old_train_dir imagenet/train --old_eval_dir imagenet/val --lora_rank 8
    stellar-hf adapt --train_dir photos/train --eval_dir photos/test    # the packaged demo model, on any machine
    stellar-hf adapt recipe.yaml --max_knn_drop 1                       # values from a file; flags override them

In the end a table shows the model before and after, on old and on new images: kNN accuracy where there are classes,
PSNR, and the foreground ARI of the tokens where there are masks. Where the kNN accuracy on the old images falls more
than --max_knn_drop points, the training stops, and the last checkpoint that holds is taken.

A recipe is a YAML or JSON file, or the name of a packaged one: adapt, which is taken where none is named. The same
command goes on from the newest checkpoint in the output folder. --lora_rank trains small adapters instead of all
weights (pip install peft) and merges them in the end: the result is a model folder like any other.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig, TrainerCallback
from transformers.utils import is_peft_available, logging

import stellar_hf

from .. import StellarConfig, StellarForPreTraining, StellarTrainer, StellarTrainingArguments
from ..data import load_images, load_photo_mosaics, load_tabletop_scenes
from ..evaluation import TASKS, ReconstructionMetrics, RunSettings, Splits, Subject, reconstruction_scores
from ..evaluation.evaluate import TableColumn, format_results_table
from ..released_stellar import RELEASED_REPOSITORY
from ..training import default_processor
from ..training.checkpoint_files import checkpoint_folders
from ..training.evaluation import ImageEvaluation
from .parser import CommandParser
from .pretrain import (
    DataArguments,
    ModelArguments,
    build_model,
    check_folder,
    describe,
    load_vq_model,
    open_eval_images,
    open_own_images,
    parse_with_recipe,
    prepare,
    training_images,
    write_results,
)
from .process import errors_in_a_sentence
from .resuming import announce, find_checkpoint, train_or_load

logger = logging.get_logger(__name__)

TABLETOP_SCENES = "tabletop_scenes"
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]
COLUMNS: tuple[TableColumn, ...] = (
    ("knn_accuracy", ("kNN", "%"), 100, 1),
    ("knn_majority", ("most frequent", "class, %"), 100, 1),
    ("psnr", ("PSNR", "dB"), 1, 2),
    ("foreground_ari", ("FG-ARI", "%"), 100, 1),
)


@dataclass
class AdaptedModelArguments(ModelArguments):
    """Which model to adapt, and whether to begin again."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The STELLAR to adapt: a folder, owner/name on the Hub, or a model that the authors released, "
            "such as stellar-b16, with its tokenizer; the packaged demo model by default."
        },
    )


@dataclass
class AdaptationArguments:
    """What is trained, and what must not be forgotten."""

    _argument_group_name = "adaptation"

    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train low-rank adapters of this rank on the attention's projections (PEFT), such as 8, and merge "
            "them in the end; by default all weights learn."
        },
    )
    old_train_dir: str | None = field(
        default=None,
        metadata={"help": "As train_dir, images with classes that the model knew before, to find neighbours among."},
    )
    old_eval_dir: str | None = field(
        default=None,
        metadata={
            "help": "The same, to measure on. tabletop_scenes, the default of the demo model, stands for the scenes "
            "that come with the package and crops of the photographs on them. Without old images nothing is "
            "guarded."
        },
    )
    max_knn_drop: float = field(
        default=2.0,
        metadata={"help": "Points of kNN accuracy that may be lost on the old images before the training stops."},
    )
    mask_column: str = field(
        default="mask", metadata={"help": "Column of the objects of the pixels, 0 for the ground, if there is one."}
    )

    def __post_init__(self):
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}, but must be at least 1.")
        if self.lora_rank is not None and not is_peft_available():
            raise ImportError("lora_rank needs PEFT, which is not installed: pip install peft")
        if not 0 <= self.max_knn_drop <= 100:
            raise ValueError(f"max_knn_drop is {self.max_knn_drop}, but must be in [0, 100] points.")
        if self.old_train_dir is not None and self.old_eval_dir in (None, TABLETOP_SCENES):
            raise ValueError("old_train_dir is given without old_eval_dir, the folder of images to measure on.")


@dataclass
class MeasuredImages:
    """Images to measure on, those to find neighbours among, and those whose objects are known; None where not."""

    test: datasets.Dataset
    train: datasets.Dataset | None
    scenes: datasets.Dataset | None


def main() -> None:
    with errors_in_a_sentence():
        run(*parse_arguments(sys.argv[1:]))


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    adaptation: AdaptationArguments,
    training_args: StellarTrainingArguments,
) -> None:
    prepare(model_args, data_args, training_args)
    images = open_own_images(data_args, training_args)
    model = build_model(model_args)
    vq_model = load_vq_model(model_args)
    new = MeasuredImages(
        test=open_eval_images(data_args, training_args, model.config.image_size),  # type: ignore[arg-type]
        train=images if isinstance(images, datasets.Dataset) else None,
        scenes=None,
    )
    trainer = StellarTrainer(
        model if adaptation.lora_rank is None else with_adapters(model, adaptation.lora_rank),
        training_args,
        train_dataset=training_images(images, data_args, training_args),
        eval_dataset=new.test,
        processing_class=default_processor(model, training_args.background),
        vq_model=vq_model,
    )
    old = open_old_images(model_args, data_args, adaptation, training_args, model.config.image_size)
    table = AdaptationTable(trainer, {"old": old, "new": new}, adaptation.mask_column, vq_model)
    adapt_and_measure(trainer, table, images, vq_model, model_args, data_args, adaptation)


# Arguments and inputs ------------------------------------------------------------------------------------------------


def make_parser() -> CommandParser:
    """The parser of the command's flags; a recipe stands before them."""
    return CommandParser(
        AdaptedModelArguments,
        DataArguments,
        AdaptationArguments,
        StellarTrainingArguments,
        description=__doc__,
        usage="[RECIPE] [--FLAG VALUE ...]",
    )


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataArguments, AdaptationArguments, StellarTrainingArguments]:
    """
    Reads the arguments of the command, and the recipe that they name.

    Raises:
        ValueError: On an unknown name or an impossible value among the arguments or in the recipe, or without images.
    """
    (model_args, data_args, adaptation, training_args), _, _ = parse_with_recipe(
        make_parser(), argv, lambda given: "adapt"
    )
    if data_args.is_embedded:
        raise ValueError("There are no images to adapt the model to: give train_dir or dataset_name.")
    if data_args.eval_dir is None and data_args.eval_split is None:
        raise ValueError(
            "The table needs images that are not trained on: give eval_dir, or eval_split of dataset_name."
        )
    model_args.model_name_or_path = model_args.model_name_or_path or stellar_hf.DEMO_MODEL
    if Path(model_args.model_name_or_path).resolve() == Path(str(training_args.output_dir)).resolve():
        raise ValueError("output_dir is the folder of the weights to start from: take another one.")
    if not model_args.is_released:
        kind = AutoConfig.from_pretrained(model_args.model_name_or_path).model_type
        if kind != StellarConfig.model_type:
            raise ValueError(
                f"{model_args.model_name_or_path} is a {kind}, but STELLAR is adapted: from other encoders, start "
                "with stellar-hf pretrain."
            )
    return model_args, data_args, adaptation, training_args


def with_adapters(model: StellarForPreTraining, rank: int) -> Any:
    """The model with fresh adapters on the projections of encoder, decoder and teacher; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED))


def open_old_images(
    model_args: ModelArguments,
    data_args: DataArguments,
    adaptation: AdaptationArguments,
    training_args: StellarTrainingArguments,
    image_size: int,
) -> MeasuredImages | None:
    """What the model knew before; None where nobody says so."""
    source = adaptation.old_eval_dir
    if source is None and model_args.model_name_or_path == stellar_hf.DEMO_MODEL:
        source = TABLETOP_SCENES
    if source is None:
        return None
    if source == TABLETOP_SCENES:
        count = data_args.num_eval_scenes
        return MeasuredImages(
            # The photographs that cover the scenes, which have one name each.
            test=load_photo_mosaics("test", count, image_size, num_regions=1, seed=1),
            train=load_photo_mosaics("train", 2 * count, image_size, num_regions=1, seed=1),
            scenes=load_tabletop_scenes("test", count, image_size, seed=1),
        )
    check_folder("old_eval_dir", source)
    test = load_images(source, image_column=training_args.image_column)
    if adaptation.old_train_dir is None:
        return MeasuredImages(test, train=None, scenes=None)
    check_folder("old_train_dir", adaptation.old_train_dir)
    train = load_images(adaptation.old_train_dir, image_column=training_args.image_column)
    return MeasuredImages(test, train, scenes=None)


# Measures and the guard ----------------------------------------------------------------------------------------------


class AdaptationTable:
    """
    The model before and after, on old and on new images.

    Args:
        trainer: Whose model is measured. Call all methods on all processes.
        parts: Images by their name in the table; None where there are none.
        mask_column: Column of the objects of the pixels.
        vq_model: The tokenizer of codes, if there is one.
    """

    def __init__(
        self,
        trainer: StellarTrainer,
        parts: dict[str, MeasuredImages | None],
        mask_column: str,
        vq_model: "stellar_hf.MaskGitVQModel | None",
    ):
        args = trainer.args
        self.trainer = trainer
        self.parts = {name: images for name, images in parts.items() if images is not None}
        self.mask_column = mask_column
        self.vq_model = vq_model
        self.rows: dict[str, dict[str, float]] = {}
        self.evaluation = ImageEvaluation(
            trainer.accelerator,
            processor=trainer.processing_class,
            image_column=args.image_column,
            label_column=args.label_column,
            batch_size=args.eval_batch_size,
            num_workers=args.dataloader_num_workers,
            num_neighbours=args.num_knn_images,
        )

    def measure(self, when: str) -> None:
        """Measures the trainer's model on all images; `when` names the rows."""
        for name, images in self.parts.items():
            self.rows[f"{name} images, {when}"] = self._measure(images)

    def known_old_knn(self, when: str) -> float | None:
        """The kNN accuracy on the old images as it was measured; None where it could not be."""
        return self.rows.get(f"old images, {when}", {}).get("knn_accuracy")

    def old_knn(self) -> float | None:
        """The kNN accuracy on the old images now; None where it cannot be measured."""
        if "old" not in self.parts:
            return None
        old = self.parts["old"]
        return self.evaluation(self._model, old.test, old.train).get("knn_accuracy")

    def figures(self) -> dict[str, float]:
        """All numbers under the names of `all_results.json`: `old_before_psnr`, …"""
        return {
            f"{row.replace(' images, ', '_')}_{name}": value
            for row, values in self.rows.items()
            for name, value in values.items()
        }

    def text(self) -> str:
        shown = tuple(column for column in COLUMNS if any(column[0] in values for values in self.rows.values()))
        return format_results_table(dict(sorted(self.rows.items(), key=lambda row: row[0][:3] != "old")), shown)

    @property
    def _model(self) -> Any:
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _measure(self, images: MeasuredImages) -> dict[str, float]:
        found = self.evaluation(self._model, images.test, images.train)
        if self.vq_model is not None:
            found["psnr"] = self._psnr_of_codes(images)
        scenes = images.scenes or (images.test if self.mask_column in images.test.column_names else None)
        return found if scenes is None else found | self._objects(scenes)

    def _psnr_of_codes(self, images: MeasuredImages) -> float:
        scores = reconstruction_scores(
            self._model,
            images.test,
            self.trainer.processing_class,
            ReconstructionMetrics(lpips=None, rfid=None),
            vq_model=self.vq_model,
            image_column=self.evaluation.image_column,
            batch_size=self.evaluation.batch_size,
            accelerator=self.trainer.accelerator,
            show_progress=False,
        )
        return scores["psnr"]

    def _objects(self, scenes: datasets.Dataset) -> dict[str, float]:
        image_column = self.evaluation.image_column
        splits = Splits("", None, scenes, {}, image_column=image_column, mask_column=self.mask_column)
        settings = RunSettings(
            batch_size=self.evaluation.batch_size, accelerator=self.trainer.accelerator, show_progress=False
        )
        subject = Subject("", self._model, self.trainer.processing_class)
        scores = TASKS["objects"].measure(subject, splits, settings)
        return {"foreground_ari": scores["tokens merged by L^T D"]["foreground_ari"]}


class KnnGuard(TrainerCallback):
    """
    Ends a training at the evaluation at which the kNN accuracy on the old images has fallen too far.

    Args:
        table: Measures it; the model before must have been measured.
        max_drop: Points that may be lost.
    """

    def __init__(self, table: AdaptationTable, max_drop: float):
        self.table = table
        self.max_drop = max_drop
        self.before = table.known_old_knn("before")

    def holds(self, accuracy: float | None) -> bool:
        return self.before is None or accuracy is None or 100 * (self.before - accuracy) <= self.max_drop

    def on_evaluate(self, args, state, control, **kwargs):
        accuracy = self.table.old_knn()
        if accuracy is None or self.before is None:
            return
        if state.is_world_process_zero:
            print(f"\n{state.global_step:>6}  kNN on the old images: {self._change(accuracy)}")
        if not self.holds(accuracy):
            control.should_training_stop = True
            control.should_save = False  # so that the newest checkpoint is one that holds

    def take_last_good(self, trainer: StellarTrainer, accuracy: float | None) -> None:
        """
        Takes the newest checkpoint that has not lost too much, with its state, and says so, in place of a model with
        this kNN accuracy on the old images; damaged checkpoints are named and passed over. Nothing is known then of
        what the trainer's results say of the later model. Call it on all processes.

        Raises:
            ValueError: If there is none.
        """
        reason = (
            f"kNN on the old images fell by more than {self.max_drop:g} points, {self._change(accuracy)}, at step "
            f"{trainer.state.global_step}"
        )
        for folder in reversed(checkpoint_folders(Path(str(trainer.args.output_dir)))):
            checkpoint = trainer.inspect(folder)
            if not checkpoint.is_model_whole:
                if trainer.is_world_process_zero():
                    logger.warning(f"{checkpoint.problem} It is passed over.")
                continue
            trainer.load_earlier(checkpoint)
            kept = self.table.old_knn()
            if self.holds(kept):
                if trainer.is_world_process_zero():
                    print(f"\nStopped: {reason}. Taken instead: {folder}, {self._change(kept)}.")
                return
        raise ValueError(
            f"{reason}, and no checkpoint holds: nothing is saved. Take a lower learning_rate, a lora_rank, more "
            "frequent eval_steps and save_steps, or a larger max_knn_drop."
        )

    def _change(self, accuracy: float | None) -> str:
        return f"{100 * (self.before or 0):.1f} to {100 * (accuracy or 0):.1f} %"


# Training ------------------------------------------------------------------------------------------------------------


def adapt_and_measure(
    trainer: StellarTrainer,
    table: AdaptationTable,
    images: datasets.Dataset | datasets.IterableDataset,
    vq_model: "stellar_hf.MaskGitVQModel | None",
    model_args: ModelArguments,
    data_args: DataArguments,
    adaptation: AdaptationArguments,
) -> None:
    """
    Measures, trains, or goes on, and measures again; writes model, pipeline, figure and card. Call it on all
    processes.
    """
    is_main_process = trainer.is_world_process_zero()
    if is_main_process:
        count = f"{len(images):,}" if isinstance(images, datasets.Dataset) else "streamed"
        print(describe(trainer, count))
    checkpoint = find_checkpoint(trainer, model_args.overwrite_output_dir, model_args.resume_from_newest_whole)
    is_finished = announce(trainer, checkpoint)
    table.measure("before")
    guard = KnnGuard(table, adaptation.max_knn_drop)
    if is_main_process:
        print(what_is_guarded(table, guard))
    trainer.add_callback(guard)

    train_or_load(trainer, checkpoint, is_finished)
    table.measure("after")
    accuracy = table.known_old_knn("after")
    if not guard.holds(accuracy):
        guard.take_last_good(trainer, accuracy)
        table.measure("after")
        trainer.save_metrics("eval", trainer.evaluate())
    if adaptation.lora_rank is not None:
        merge_adapters(trainer)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("adaptation", table.figures())
    if is_main_process:
        print(f"\n{table.text()}\n")
    write_results(trainer, images, vq_model, data_args, finetuned_from=base_model_of(model_args))


def what_is_guarded(table: AdaptationTable, guard: KnnGuard) -> str:
    if "old" not in table.parts:
        return "Without old images nothing guards what the model knew: give old_train_dir and old_eval_dir.\n"
    if guard.before is None:
        return (
            "No kNN accuracy of the old images guards what the model knew: it needs classes in old_train_dir and "
            "old_eval_dir.\n"
        )
    return (
        f"kNN on the old images: {100 * guard.before:.1f} %. The training stops where it falls by more than "
        f"{guard.max_drop:g} points.\n"
    )


def merge_adapters(trainer: StellarTrainer) -> None:
    """Makes the trainer's model a plain one with what the adapters learned."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    trainer.model = trainer.model_wrapped = model.merge_and_unload()


def base_model_of(args: ModelArguments) -> str | None:
    """The model's name on the Hub, for the card: a folder of one's own tells others nothing."""
    if args.is_released:
        return RELEASED_REPOSITORY
    name = str(args.model_name_or_path)
    return None if Path(name).is_dir() else name


if __name__ == "__main__":
    main()
