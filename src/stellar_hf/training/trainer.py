# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The Trainer of the joint alignment and reconstruction objective."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from ..data import StellarViews
from ..hub_stellar import write_model_card
from ..modeling_stellar import LOSS_TERMS, StellarForPreTraining
from .arguments import StellarTrainingArguments
from .callbacks import (
    GracefulInterruptCallback,
    ProcessSeedCallback,
    PushCodeCallback,
    StellarProgressCallback,
    TeacherCallback,
)
from .unreadable import UnreadableImages

DIAGNOSTICS = ("prototype_entropy", "slot_information", "token_diversity", "localization_sharpness")

# Norms and biases, and what is learned for a place in the sequence: positions and tokens.
_NO_DECAY = re.compile(r"bias$|layernorm|position_embeddings$|cls_token$|sparse_tokens$")


class StellarTrainer(Trainer):
    """
    `Trainer` for [`StellarForPreTraining`]: makes the views, logs every term of the objective, moves the EMA teacher
    once per optimizer step, and finishes the step and saves a checkpoint on Ctrl-C.

    Args:
        model: The model to pre-train.
        args: Training arguments, with the settings of the views.
        data_collator: Turns examples into the inputs of `forward`, or into `images` and `image_sizes` as
            [`StellarCollator`] does, of which the trainer makes views; by default that one, as `args` say. It makes
            no codes, so a model with `reconstruction_target="codes"` needs another one.
        train_dataset: Images, in the column `args.image_column`.
        eval_dataset: Images for the objective's value (`eval_loss`), with the same random draws every time.
        callbacks: Further callbacks.
        **kwargs: As in `Trainer`.

    Raises:
        ValueError: If the model or the arguments are of another class, the data set lacks the image column or has no
            rows, the views are impossible, or a model that reconstructs codes has no data collator.
    """

    def __init__(
        self,
        model: StellarForPreTraining,
        args: StellarTrainingArguments,
        data_collator: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs,
    ):
        if not isinstance(model, StellarForPreTraining):
            raise ValueError(f"StellarTrainer trains a StellarForPreTraining, not a {type(model).__name__}.")
        if not isinstance(args, StellarTrainingArguments):
            raise ValueError(f"StellarTrainer takes StellarTrainingArguments, not {type(args).__name__}.")
        for dataset in (train_dataset, eval_dataset):
            _check_not_empty(dataset)
        if data_collator is None:
            if model.config.reconstruction_target == "codes":
                raise ValueError(
                    "The model reconstructs the codes of a tokenizer, which only a data_collator of your own can "
                    'give (as code_labels): pass one, or train a model with reconstruction_target="pixels".'
                )
            for dataset in (train_dataset, eval_dataset):
                _check_column(dataset, args.image_column)
            data_collator = args.collator(args.views(model.config))
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=_undecoded(train_dataset, args.image_column),
            eval_dataset=_undivided(_undecoded(eval_dataset, args.image_column), args.world_size),
            callbacks=callbacks,
            **kwargs,
        )
        self._unreadable = UnreadableImages(args.max_unreadable_share)
        self._sums: dict[str, torch.Tensor] = {}
        self._num_steps = 0.0
        self._interrupt = GracefulInterruptCallback()
        self.add_callback(self._interrupt)
        self.add_callback(ProcessSeedCallback())
        self.add_callback(PushCodeCallback())
        if model.teacher is not None:
            self.add_callback(TeacherCallback())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StellarProgressCallback())

    @cached_property
    def _views(self) -> StellarViews:
        args: Any = self.args  # StellarTrainingArguments, which the base class does not know
        return args.views(self.accelerator.unwrap_model(self.model).config)

    @property
    def interrupted(self) -> bool:
        """Whether the last training was ended by Ctrl-C, after saving a checkpoint."""
        return self._interrupt.interrupted

    def train(self, *args, **kwargs):
        """As in `Trainer`; Ctrl-C finishes the step and saves a checkpoint."""
        self._sums, self._num_steps = {}, 0.0
        if self.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            # Left by an evaluation, it would keep Accelerate from wrapping the model, and so from adding up gradients.
            vars(self.model).pop("_is_accelerate_prepared", None)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._interrupt.restore_handler()

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; its workers outlive a Ctrl-C, so that the step can be finished."""
        return _with_uninterrupted_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As in `Trainer`; its workers outlive a Ctrl-C, too."""
        return _with_uninterrupted_workers(super().get_eval_dataloader(eval_dataset))

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

    def evaluation_loop(self, *args, **kwargs):
        """As in `Trainer`, with the same views and masks every time; training goes on as if nothing had been drawn."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed + self.args.process_index)
            return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective, of views that are made here unless the batch has them; keeps every term for the next log."""
        inputs = self._with_views(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            # The Trainer's own weights of the forwards of a step, so that the logged terms add up to the logged loss.
            share = 1 / self.current_gradient_accumulation_steps
            for name in (*LOSS_TERMS, *DIAGNOSTICS):
                self._sums[name] = self._sums.get(name, 0.0) + share * outputs[name].detach()
            self._num_steps += share
        return (loss, outputs) if return_outputs else loss

    def _with_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        unreadable = inputs.pop("unreadable", [])
        self._unreadable.count(unreadable, num_images=len(next(iter(inputs.values()))))
        if "images" in inputs:
            inputs.update(self._views(inputs.pop("images"), inputs.pop("image_sizes", None)))
        return inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term and diagnostic since the last log to a log of the training loss."""
        if "loss" in logs and self._sums:
            means = torch.stack(list(self._sums.values())) / self._num_steps
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update(zip(self._sums, means, strict=True))
            self._sums, self._num_steps = {}, 0.0
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
        Writes README.md into the output folder: the model, its training, and the results that are known, from
        evaluations and `all_results.json`. One that a person wrote, there or on the Hub, stays as it is.

        Arguments are those of `Trainer`: `dataset` is a name to read, `dataset_tags` are ids on the Hub. `tasks` and
        `dataset_args` have no place in this card.
        """
        if not self.is_world_process_zero():
            return
        args: Any = self.args  # StellarTrainingArguments, which the base class does not know
        write_model_card(
            args.output_dir,
            self.accelerator.unwrap_model(self.model),
            name=model_name,
            repo_id=self.hub_model_id,
            revision=self.args.hub_revision,
            token=self.args.hub_token,
            license=license or "apache-2.0",
            language=language,
            tags=_as_list(tags),
            base_model=finetuned_from,
            dataset=", ".join(_as_list(dataset)),
            dataset_ids=_as_list(dataset_tags),
            metrics=self._known_metrics(),
            training={
                "Steps": self.state.global_step,
                "Images of a step": self.args.train_batch_size
                * self.args.gradient_accumulation_steps
                * self.args.world_size,
                "Views of an image": f"{args.num_global_views} global, {args.num_local_views} local",
                "Peak learning rate": self.args.learning_rate,
                "Weight decay": self.args.weight_decay,
                "Seed": self.args.seed,
            },
        )

    def _known_metrics(self) -> dict[str, float]:
        """The latest evaluation's and the test's results, without its speed."""
        results: dict[str, Any] = {}
        for log in self.state.log_history:
            results.update(log)
        file = Path(str(self.args.output_dir), "all_results.json")
        if file.exists():
            results.update(json.loads(file.read_text()))
        speed = ("_runtime", "_per_second")
        return {
            name: value
            for name, value in results.items()
            if name.startswith(("eval_", "test_")) and not name.endswith(speed) and isinstance(value, int | float)
        }


def _as_list(values: str | list[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or [])


def _check_not_empty(dataset: Any) -> None:
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("The data set has no rows: at least one image is needed.")


def _check_column(dataset: Any, column: str) -> None:
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and column not in columns:
        raise ValueError(f"The data set has no column {column!r}, only {columns}: name it with image_column.")


def _undecoded(dataset: Any, column: str) -> Any:
    """The data set with its images as files: the collator decodes them, and replaces those that are broken."""
    if isinstance(dataset, dict):
        return {name: _undecoded(part, column) for name, part in dataset.items()}
    if not is_datasets_available():
        return dataset
    import datasets

    feature = (getattr(dataset, "features", None) or {}).get(column)
    if isinstance(feature, datasets.Image) and feature.decode:
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


class _UndividedStream(IterableDataset):
    """A stream that Accelerate divides among processes batch by batch: shards may hold unequal numbers of images."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


def _undivided(dataset: Any, num_processes: int) -> Any:
    """The data set such that all processes have equally many batches of it."""
    if isinstance(dataset, dict):
        return {name: _undivided(part, num_processes) for name, part in dataset.items()}
    if num_processes > 1 and isinstance(dataset, IterableDataset) and hasattr(dataset, "shard"):
        return _UndividedStream(dataset)
    return dataset


def _with_uninterrupted_workers(dataloader: DataLoader) -> DataLoader:
    """A terminal sends Ctrl-C to the workers as well, which would end without a word before the step is done."""
    dataloader.worker_init_fn = partial(_init_worker, initialize=dataloader.worker_init_fn)
    return dataloader


def _init_worker(worker_id: int, initialize: Callable[[int], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker_id)
