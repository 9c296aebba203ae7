# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The Trainer of the joint alignment and reconstruction objective."""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import DistributedType
from datasets import ClassLabel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..data import StellarViews, UnreadableImages, undecoded
from ..features import evaluation_mode
from ..hub_stellar import write_model_card
from ..modeling_stellar import LOSS_TERMS, StellarForPreTraining
from .arguments import StellarTrainingArguments
from .callbacks import OBJECTIVE_COLUMNS, PushCodeCallback, TeacherCallback, show_loss_table
from .checkpoint_files import Checkpoint
from .checkpoints import CheckpointTrainer
from .data import (
    check_column,
    check_not_empty,
    has_column,
    images_alone,
    not_divided_again,
    shares_shards,
    undivided,
    without_unreadable,
)
from .evaluation import FigureCallback, ImageEvaluation, KnnAtStartCallback, MeanOfReadable, default_processor
from .monitoring import (
    CollapseCallback,
    NonFiniteLossGuard,
    ThroughputCallback,
    largest_token_share,
    memory_gib,
    teacher_distance,
)
from .private_names import forget_preparation
from .results import ResultsTrainer
from .schedules import ScheduleCallback, objective_settings, scale_learning_rates_by_depth

if TYPE_CHECKING:
    from peft import PeftModel

    from ..pipelines import MaskGitVQModel

DIAGNOSTICS = (
    "prototype_entropy",
    "slot_information",
    "token_diversity",
    "localization_sharpness",
    "matched_fraction",
)

# Norms and biases, and what is learned for a place in the sequence: positions and tokens.
_NO_DECAY = re.compile(r"bias$|layernorm|position_embeddings$|cls_token$|sparse_tokens$")


class StellarTrainer(ResultsTrainer, CheckpointTrainer):
    """
    `Trainer` for [`StellarForPreTraining`]: makes the views, logs every term of the objective, moves the EMA teacher
    once per optimizer step, finishes the step and saves a checkpoint on Ctrl-C and SIGTERM, and writes checkpoints
    that are complete or not there, and that a run goes on from bit for bit on a CPU with as many threads.

    Args:
        model: The model to pre-train, with or without adapters of PEFT.
        args: Training arguments, with the settings of the views.
        data_collator: Turns examples into the inputs of `forward`, or into `images` and `image_sizes` as
            [`StellarCollator`] does, of which the trainer makes views; by default that one, as `args` say.
        vq_model: The frozen tokenizer whose codes a model with `reconstruction_target="codes"` reconstructs. Such a
            model needs it, unless a data collator gives `code_labels`.
        train_dataset: Images, in the column `args.image_column`.
        eval_dataset: Images for the objective's value (`eval_loss`), with the same random draws every time; those that
            cannot be read are named and left out. If it is map-style, whole images give the PSNR of their
            reconstruction (`eval_psnr`), a figure, and, where it and the training data have classes in
            `args.label_column`, the kNN accuracy (`eval_knn_accuracy`), beside that of naming the most frequent class
            (`eval_knn_majority`) and that of the model before its first step (`eval_knn_at_start`).
        callbacks: Further callbacks.
        **kwargs: As in `Trainer`.

    Raises:
        ValueError: If the model or the arguments are of another class, the teacher has other adapters than the
            student, the data set lacks the image column or has no rows, the views are impossible, a model that
            reconstructs codes has neither a tokenizer nor a data collator, one with `standardize_projections` gets a
            single image in a forward, or one process is to train on several GPUs.
    """

    # More than the base class knows, as __init__ checks.
    args: StellarTrainingArguments
    model: StellarForPreTraining

    def __init__(
        self,
        model: "StellarForPreTraining | PeftModel",
        args: StellarTrainingArguments,
        data_collator: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        vq_model: "MaskGitVQModel | None" = None,
        **kwargs,
    ):
        _check_model_and_args(model, args)
        base_model = _without_adapters(model)
        for dataset in (train_dataset, eval_dataset):
            check_not_empty(dataset)
            if data_collator is None:
                check_column(dataset, args.image_column)
        if data_collator is None and base_model.config.reconstruction_target == "codes" and vq_model is None:
            raise ValueError(
                "The model reconstructs the codes of a tokenizer: pass vq_model, or a data_collator of your own that "
                'gives code_labels, or train a model with reconstruction_target="pixels".'
            )
        _freeze(base_model, args)

        train_dataset = undecoded(train_dataset, args.image_column)
        self._described_dataset = train_dataset  # with its labels, which training has no use for
        if data_collator is None:
            data_collator = args.collator(args.views(base_model.config))
            train_dataset = images_alone(train_dataset, args.image_column)
        self._shares_shards = shares_shards(train_dataset, args)
        if self._shares_shards:
            train_dataset = train_dataset.of_process(args.process_index, args.world_size)  # type: ignore[union-attr]
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=undivided(undecoded(eval_dataset, args.image_column), args.world_size),
            callbacks=callbacks,
            **kwargs,
        )

        self._vq_model = vq_model
        if vq_model is not None:
            vq_model.to(args.device).eval().requires_grad_(False)  # type: ignore[arg-type]
        self._unreadable = UnreadableImages(args.max_unreadable_share)
        self._mean_loss = MeanOfReadable()
        self._frozen: list[nn.Module] = []
        self._evaluation = ImageEvaluation(
            self.accelerator,
            processor=self.processing_class or default_processor(base_model, args.background),
            image_column=args.image_column,
            label_column=args.label_column,
            batch_size=args.eval_batch_size,
            num_workers=args.dataloader_num_workers,
            num_neighbours=args.num_knn_images,
        )
        self._throughput = ThroughputCallback()
        self._loss_guard = NonFiniteLossGuard()
        self._add_callbacks(base_model, eval_dataset)

    def _add_callbacks(self, model: StellarForPreTraining, eval_dataset: Any) -> None:
        """
        Adds what happens around the steps and the evaluations; an event calls it in this order, after the Trainer's
        own callbacks and the user's.
        """
        for callback in (PushCodeCallback(), self._loss_guard, CollapseCallback(), ScheduleCallback()):
            self.add_callback(callback)
        if model.teacher is not None:
            self.add_callback(TeacherCallback())
        self._add_evaluations(model, eval_dataset)
        # After those that measure and draw: its clock starts again when they are done.
        self.add_callback(self._throughput)
        show_loss_table(self, OBJECTIVE_COLUMNS)

    def _add_evaluations(self, model: StellarForPreTraining, eval_dataset: Any) -> None:
        """Adds what evaluations draw of whole images, and what is measured before the first step."""
        shown: Any = next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else self.eval_dataset
        if not has_column(shown, self.args.image_column):
            return
        if FigureCallback.is_possible(model):
            self.add_callback(FigureCallback(shown, self._evaluation, self.callback_handler.callbacks))
        if (labelled := self._labelled_images()) is not None:
            measured: Any = {"eval": self.eval_dataset}
            if isinstance(self.eval_dataset, dict):
                measured = {f"eval_{name}": part for name, part in self.eval_dataset.items()}
            measured = {name: part for name, part in measured.items() if has_column(part, self.args.image_column)}
            self.add_callback(KnnAtStartCallback(self._evaluation, measured, labelled))

    @property
    def _base_model(self) -> StellarForPreTraining:
        """The model without adapters and without what distributes it."""
        return _without_adapters(self.accelerator.unwrap_model(self.model))

    @cached_property
    def _views(self) -> StellarViews:
        return self.args.views(self._base_model.config)

    def train(self, resume_from_checkpoint: str | Path | bool | Checkpoint | None = None, *args, **kwargs):
        """
        As in [`CheckpointTrainer`]; the figures of the last evaluation are saved in `all_results.json`. Modules whose
        weights are all frozen, and which are in evaluation mode in a model that is not, stay in it.
        """
        # A model that was just loaded is in evaluation mode as a whole, which says nothing of what was frozen.
        modules = self.model.modules() if self.model.training else ()
        self._frozen = [module for module in modules if _is_frozen_in_evaluation_mode(module)]
        if self.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            forget_preparation(self.model)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        metrics = {name: value for name, value in self.known_metrics().items() if name.startswith("eval_")}
        if metrics and not self.interrupted:
            self.save_metrics("eval", metrics)
        return result

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in `Trainer`; a stream ends for all processes before the first step for which one has too few batches."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not has_length(self.train_dataset) and not self._all_have(len(batches) == num_batches):
            self.control.should_epoch_stop = True
            batches = []
        return batches, num_items

    def _all_have(self, here: bool) -> bool:
        """Whether `here` is true on all processes, asked without waiting for the accelerator."""
        if self.args.world_size == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._host_group)
        return bool(flag)

    @cached_property
    def _host_group(self) -> dist.ProcessGroup:
        return dist.new_group(backend="gloo")

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights with weight decay: all but norms, biases, positions and tokens."""
        return [name for name, _ in model.named_parameters() if not _NO_DECAY.search(name)]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the estimate of Transformers takes every pixel for a token."""
        return 0

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; of an [`EndlessStream`], each process reads other shards, where these come out even."""
        dataloader = super().get_train_dataloader()
        return not_divided_again(dataloader) if self._shares_shards else dataloader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As in `Trainer`; images that cannot be read are left out."""
        return without_unreadable(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As in `Trainer`; images that cannot be read are left out."""
        return without_unreadable(super().get_test_dataloader(test_dataset))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        As in `Trainer`, with the same views and masks every time; training goes on as if nothing had been drawn, and
        modules that were frozen in evaluation mode stay so.

        Of whole images, also the PSNR, and the kNN accuracy where they have classes. Images that cannot be read are
        named and count in none of the measures.

        Raises:
            ValueError: If no image can be read.
        """
        self._mean_loss = MeanOfReadable()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), evaluation_mode(self._base_model):
            torch.manual_seed(self.args.seed + self.args.process_index)
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            results: Any = output.metrics
            if (loss := self._mean_loss.compute()) is not None:
                results[f"{metric_key_prefix}_loss"] = loss
            if has_column(dataloader.dataset, self.args.image_column):
                metrics = self._evaluation(
                    self._base_model, dataloader.dataset, self._labelled_images(), metric_key_prefix
                )
                results.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """As in `Trainer`; names the images that are left out, and keeps the loss with the number of the others."""
        inputs = dict(inputs)
        reasons = inputs.pop("unreadable", [])
        num_images = inputs.pop("num_readable", len(next(iter(inputs.values()))))
        self._evaluation.unreadable.count(reasons, num_images + len(reasons))
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None:
            self._mean_loss.add(loss.item(), num_images, len(reasons))
        return loss, logits, labels

    def _labelled_images(self) -> Dataset | None:
        columns = (self.args.image_column, self.args.label_column)
        dataset = self._described_dataset
        return dataset if all(has_column(dataset, column) for column in columns) else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with `layer_decay`; an optimizer that was given is left alone."""
        is_ours = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_ours and self.args.layer_decay < 1:
            num_layers = self.model.config.num_hidden_layers
            scale_learning_rates_by_depth(optimizer, model or self.model, self.args.layer_decay, num_layers)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The objective at this step of its schedules, of views that are made here unless the batch has them; keeps every
        term for the next log.
        """
        if model.training:
            for module in self._frozen:
                module.eval()  # which the Trainer wakes with the whole model at each step
        inputs = self._with_views(inputs, self._unreadable if model.training else self._evaluation.unreadable)
        settings = objective_settings(self.args, self.model.config, self.state, inputs) if model.training else {}
        loss, outputs = super().compute_loss(model, {**inputs, **settings}, return_outputs=True)
        if model.training:
            self._loss_guard.check(outputs, inputs, self.state, self._nan_batch_file)
            self._throughput.num_images += len(outputs["sparse_tokens"])
            # The Trainer's own weights of the forwards of a step, so that the logged terms add up to the logged loss.
            share = 1 / self.current_gradient_accumulation_steps
            values = {name: outputs[name] for name in (*LOSS_TERMS, *DIAGNOSTICS) if name in outputs}
            values["largest_token_share"] = largest_token_share(outputs["localization"])
            self.log_means.add({"loss": loss, **values}, share)
        return (loss, outputs) if return_outputs else loss

    def _with_views(self, inputs: dict[str, Any], unreadable: UnreadableImages) -> dict[str, Any]:
        inputs = dict(inputs)
        reasons = inputs.pop("unreadable", [])
        unreadable.count(reasons, num_images=len(next(iter(inputs.values()))))
        if "images" in inputs:
            inputs.update(self._views(inputs.pop("images"), inputs.pop("image_sizes", None)))
        if self._vq_model is not None and "code_labels" not in inputs:
            clean_view = self._base_model.denormalize(inputs["pixel_values"])
            inputs["code_labels"] = self._vq_model.patch_codes(clean_view, self._base_model.config.patch_size)
        return inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`CheckpointTrainer`], with the teacher's distance, speed and memory."""
        if "loss" in logs:
            if self._base_model.teacher is not None:
                logs["teacher_distance"] = teacher_distance(self._base_model)
            logs["images_per_second"] = self._throughput.images_per_second() * self.args.world_size
            logs["memory_gib"] = memory_gib(self.args.device)
        super().log(logs, start_time)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = "apache-2.0",
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes README.md into the output folder: the model, its training, its data and the figures that are known of
        this model. One that a person wrote, there or on the Hub, stays as it is.

        Arguments are those of `Trainer`: `dataset` is a name to read, `dataset_tags` are ids on the Hub; without
        either the card says how many images of how many classes there were. `tasks` and `dataset_args` have no place
        in this card.

        Raises:
            CheckpointWriteError: If it cannot be written; the card that was there is then as it was.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        with self._explain_failed_write(f"The model card in {args.output_dir}"):
            write_model_card(
                str(args.output_dir),
                self._base_model,
                name=model_name,
                repo_id=self.hub_model_id,
                revision=args.hub_revision,
                token=args.hub_token,
                license=license or "apache-2.0",
                language=language,
                tags=_as_list(tags),
                base_model=finetuned_from,
                dataset=", ".join(_as_list(dataset)),
                dataset_ids=_as_list(dataset_tags),
                data=self._describe_train_dataset(),
                metrics=self.known_metrics(),
                baselines=self.known_baselines(),
                training={
                    "Steps": self.state.global_step,
                    "Images of a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                    "Views of an image": f"{args.num_global_views} global, {args.num_local_views} local",
                    "Peak learning rate": args.learning_rate,
                    "Weight decay": args.weight_decay,
                    "Seed": args.seed,
                    "Processes": f"{args.world_size}, on {_describe_hardware(args.device)}",
                    **self._describe_time(),
                },
            )

    def _describe_time(self) -> dict[str, str]:
        """How long the training took since it was started last; nothing before it has ended."""
        seconds = [log["train_runtime"] for log in self.state.log_history if "train_runtime" in log]
        return {"Time since the last start": f"{seconds[-1] / 60:.3g} minutes"} if seconds else {}

    def _describe_train_dataset(self) -> str | None:
        """How many images of how many classes: a folder of one's own has no name that says anything to others."""
        if self._described_dataset is None:
            return None
        if not has_length(self._described_dataset):
            return "a stream of images"
        labels = (getattr(self._described_dataset, "features", None) or {}).get(self.args.label_column)
        classes = f" of {labels.num_classes} classes" if isinstance(labels, ClassLabel) else ""
        return f"{len(self._described_dataset):,} images{classes}"  # type: ignore[arg-type]


def _describe_hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _without_adapters(model: Any) -> Any:
    """The model in a wrapper of PEFT, which need not be installed; others as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_model_and_args(model: Any, args: Any) -> None:
    base_model = _without_adapters(model)
    if not isinstance(base_model, StellarForPreTraining):
        raise ValueError(f"StellarTrainer trains a StellarForPreTraining, not a {type(model).__name__}.")
    if not isinstance(args, StellarTrainingArguments):
        raise ValueError(f"StellarTrainer takes StellarTrainingArguments, not {type(args).__name__}.")
    if base_model.teacher is not None:
        base_model.teacher_and_student_weights()  # refuses adapters that the teacher cannot follow
    if base_model.config.standardize_projections and args.train_batch_size * args.world_size == 1:
        raise ValueError(
            "per_device_train_batch_size is 1, but standardize_projections needs two images or more in a forward: one "
            "CLS less its own mean is 0, and learns nothing. Take a larger batch; accumulated gradients do not count."
        )


def _freeze(model: StellarForPreTraining, args: StellarTrainingArguments) -> None:
    """Takes the gradients of what is not trained: the teacher and, with `freeze_encoder`, the encoder."""
    if args.freeze_encoder:
        # Decoder, heads and token refinement train; the rest is in evaluation mode, as where it is used.
        encoder = model.train().stellar
        encoder.eval().requires_grad_(False)
        if encoder.token_refinement is not None:
            encoder.token_refinement.requires_grad_(True)
    if model.teacher is not None:
        model.teacher.requires_grad_(False)  # adapters came with gradients, and DDP looks before train()


def _is_frozen_in_evaluation_mode(module: nn.Module) -> bool:
    weights = list(module.parameters())
    return not module.training and bool(weights) and not any(weight.requires_grad for weight in weights)


def _as_list(values: str | list[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or [])
