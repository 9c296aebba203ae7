# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Checkpoints that are complete or not there, and from which a run goes on bit for bit."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..configuration_stellar import OBJECTIVE_FIELDS, StellarConfig
from ..hub_stellar import replace_text
from . import checkpoint_files as files
from .callbacks import GracefulInterruptCallback, ProcessSeedCallback
from .checkpoint_files import Checkpoint
from .data import with_uninterrupted_workers

logger = logging.get_logger(__name__)


class LogMeans:
    """
    Means, over the steps since the last log, of what every forward gives, and of the loss over the whole run.

    Part of a checkpoint: where the steps between two logs are interrupted, the next log still covers all of them.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._num_steps = 0.0
        self._logged_loss = 0.0
        self._logged_steps = 0.0

    def add(self, values: dict[str, torch.Tensor], share: float) -> None:
        """
        Adds the values of one forward.

        Args:
            values: Scalars by name, always of the same names; `loss` is one of them.
            share: Of the forward in its optimizer step: 1 / accumulated forwards.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + share * value.detach()
        self._num_steps += share

    def pop(self, accelerator) -> dict[str, float]:
        """Means over steps and processes since the last call; empty if there was no forward since."""
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / self._num_steps
        logs = dict(zip(self._sums, accelerator.reduce(means, reduction="mean").tolist(), strict=True))
        self._logged_loss += logs["loss"] * self._num_steps
        self._logged_steps += self._num_steps
        self._sums, self._num_steps = {}, 0.0
        return logs

    def mean_loss(self, default: float) -> float:
        """The mean loss over all logged steps of the run, those before a resume included."""
        return self._logged_loss / self._logged_steps if self._logged_steps else default

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        vars(self).update(state)
        self._sums = {name: value.to(device) for name, value in self._sums.items()}


class CheckpointTrainer(Trainer):
    """
    `Trainer` whose checkpoints are written aside and renamed when they are complete, so that a run that is killed at
    any moment, or whose disk is full, leaves the last good one as it was; which checks what it goes on from; and whose
    training ends with a checkpoint on Ctrl-C or SIGTERM.

    Raises:
        ValueError: If one process is to train on several GPUs, which needs a process for each.
    """

    _staging: Path | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, but trains on one: the Trainer would split each batch "
                "among copies of the model, each with an objective of its own. Start a process for each GPU "
                f"(accelerate launch --num_processes {self.args.n_gpu} …), or name one (CUDA_VISIBLE_DEVICES=0)."
            )
        self.log_means = LogMeans()
        self._lock = files.FolderLock(self._output_dir)
        self._interrupt = GracefulInterruptCallback()
        self.add_callback(self._interrupt)
        self.add_callback(ProcessSeedCallback())

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; the order of the data is one for all processes, whatever each of them has drawn before."""
        if self.args.data_seed is None:
            self.args.data_seed = self.args.seed
        super().create_accelerator_and_postprocess()

    @property
    def interrupted(self) -> bool:
        """Whether the last training was ended by Ctrl-C or SIGTERM, after saving a checkpoint."""
        return self._interrupt.signal_number is not None

    @property
    def exit_status(self) -> int:
        """What a script should exit with after training: 130 after Ctrl-C, 143 after SIGTERM, else 0."""
        return 0 if self._interrupt.signal_number is None else 128 + self._interrupt.signal_number

    # Which checkpoint ------------------------------------------------------------------------------------------------

    def last_checkpoint(self) -> Checkpoint | None:
        """
        The newest checkpoint in `args.output_dir`, None if there is none; whole or not, as its `problem` says. Call it
        on all processes: what a killed run left of an incomplete one is removed.

        Raises:
            ValueError: If another training is running in the folder.
        """
        with self._sole_training():
            self._tidy()
        folders = files.checkpoint_folders(self._output_dir)
        return self.inspect(folders[-1]) if folders else None

    def last_whole_checkpoint(self) -> Checkpoint | None:
        """As `last_checkpoint`, but the newest one that the training can go on from; the damaged ones are named."""
        with self._sole_training():
            self._tidy()
        for folder in reversed(files.checkpoint_folders(self._output_dir)):
            checkpoint = self.inspect(folder)
            if checkpoint.problem is None:
                return checkpoint
            if self.is_world_process_zero():
                logger.warning(f"{checkpoint.problem} It is passed over.")
        return None

    def remove_checkpoints(self) -> None:
        """
        Removes all checkpoints in `args.output_dir`, for a run that starts anew: folders `checkpoint-<step>` with a
        Trainer's state, and nothing else. Call it on all processes.

        Raises:
            ValueError: If another training is running in the folder.
        """
        with self._sole_training():
            if self.args.should_save:
                for folder in files.checkpoint_folders(self._output_dir):
                    files.remove(folder)
            self.accelerator.wait_for_everyone()

    def inspect(self, folder: str | Path) -> Checkpoint:
        """What a folder holds, read by one process of each machine. Call it on all processes."""
        found = self._gathered(files.inspect(folder) if self.is_local_process_zero() else None)
        return next((checkpoint for checkpoint in found if checkpoint.problem), found[0])

    def check_resumable(self, checkpoint: Checkpoint) -> None:
        """
        Checks that the training can go on from a checkpoint. Call it on all processes.

        Raises:
            ValueError: If it is missing, damaged, or of another architecture; the message names the file or the
                fields, and an older checkpoint that is whole.
        """
        if checkpoint.problem is not None:
            raise ValueError(f"{checkpoint.problem} {_advice(checkpoint.folder)}")
        self._check_files_of_processes(checkpoint)
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if config is not None and checkpoint.config is not None:
            _check_architecture(checkpoint.folder, StellarConfig.from_dict(checkpoint.config), config)

    def _check_files_of_processes(self, checkpoint: Checkpoint) -> None:
        world_size = self.args.world_size
        if checkpoint.num_processes != world_size:
            if self.is_world_process_zero():
                logger.warning(
                    f"{checkpoint} is of a training on {checkpoint.num_processes} process(es), which goes on with "
                    f"{world_size}: with other random draws, so not bit for bit."
                )
            return
        lacking = self._gathered(checkpoint.lacks(self.args.process_index, world_size))
        if lacking:
            raise ValueError(
                f"The checkpoint {checkpoint} is damaged: {lacking[0]} is missing. {_advice(checkpoint.folder)}"
            )

    # Going on from it ------------------------------------------------------------------------------------------------

    def is_finished(self, checkpoint: Checkpoint) -> bool:
        """
        Whether a checkpoint has all steps that the arguments ask for. Call it on all processes.

        Raises:
            ValueError: If it is missing, damaged, or of another architecture.
        """
        self.check_resumable(checkpoint)
        max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        return checkpoint.state.global_step >= max_steps

    def load_finished(self, checkpoint: Checkpoint) -> None:
        """
        Takes model and state from the last checkpoint of a finished run; with `load_best_model_at_end`, the model
        from the best one. Call it on all processes.

        Raises:
            ValueError: If the best checkpoint is missing or damaged.
        """
        self._take_state(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            checkpoint = self.inspect(self.state.best_model_checkpoint)
            if checkpoint.problem is not None:
                raise ValueError(checkpoint.problem)
        self.load_weights(checkpoint.folder)

    def load_earlier(self, checkpoint: Checkpoint) -> None:
        """
        Takes model and state from an earlier checkpoint in place of those that the training has come to. Call it on
        all processes.
        """
        self._take_state(checkpoint)
        # With load_best_model_at_end, what is known of the best model would be taken for this one's.
        self.state.best_global_step, self.state.best_model_checkpoint = self.state.global_step, str(checkpoint)
        self.load_weights(checkpoint.folder)

    def _take_state(self, checkpoint: Checkpoint) -> None:
        self.state = checkpoint.state
        # The file is the first process's.
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()

    def load_weights(self, checkpoint: str | Path) -> None:
        """Takes the weights, or those of the adapters, from a checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model"):  # of PEFT
            model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        else:
            model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())

    def train(self, resume_from_checkpoint: str | Path | bool | Checkpoint | None = None, *args, **kwargs):
        """
        As in `Trainer`; Ctrl-C and SIGTERM finish the step and save a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint or its folder, or True for the newest one in `args.output_dir`.

        Raises:
            ValueError: If the checkpoint to resume from is missing, damaged, or of another architecture, or another
                training is running in `args.output_dir`.
            OSError: If a checkpoint cannot be written (`CheckpointWriteError`), or a worker of the data loader was
                killed; the last complete checkpoint is intact.
        """
        with self._sole_training():
            self._tidy()
            checkpoint = self._to_resume(resume_from_checkpoint)
            self.log_means = LogMeans()
            if checkpoint is not None:
                self.check_resumable(checkpoint)
                self._load_log_means(checkpoint)
            try:
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ChildProcessError(
                    "A worker of the data loader was killed, most often by the system for want of memory: take fewer "
                    f"dataloader_num_workers or a smaller per_device_train_batch_size ({str(error).strip(' .')}). "
                    f"{self._how_to_go_on()}"
                ) from error
            finally:
                self._interrupt.restore_handlers()

    def _to_resume(self, asked: str | Path | bool | Checkpoint | None) -> Checkpoint | None:
        if asked is True:
            newest = self.last_checkpoint()
            if newest is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
            return newest
        if not asked:
            return None
        return asked if isinstance(asked, Checkpoint) else self.inspect(asked)

    def _load_log_means(self, checkpoint: Checkpoint) -> None:
        file = checkpoint.folder / files.log_means_name(self.args.process_index)
        if file.exists():  # not where the number of processes has grown
            # Not straight to the device: PyTorch knows no cpu:0 here, as Accelerate names it.
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.log_means.load_state_dict(state, self.args.device)

    def _tidy(self) -> None:
        if self.args.should_save:
            files.tidy(self._output_dir)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _sole_training(self) -> Iterator[None]:
        """Keeps other trainings out of `args.output_dir`; the first process has the lock for all."""
        is_first = self.is_world_process_zero()
        holders = self._gathered(self._lock.acquire() if is_first else None)
        if holders:
            raise ValueError(
                f"Another training is running in {self.args.output_dir} ({holders[0]}): wait for its end, or take "
                "another output_dir."
            )
        try:
            yield
        finally:
            if is_first:
                self._lock.release()

    def _gathered(self, value: Any) -> list[Any]:
        """What the processes have, all of it on each of them, without None."""
        values = [value] if self.args.world_size == 1 else gather_object([value])
        return [each for each in values if each is not None]

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    # While it trains -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; its workers outlive a Ctrl-C or SIGTERM, so that the step can be finished."""
        return with_uninterrupted_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As in `Trainer`; its workers outlive a Ctrl-C or SIGTERM, too."""
        return with_uninterrupted_workers(super().get_eval_dataloader(eval_dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log to a log of the training loss; the last one covers the whole run."""
        if "loss" in logs:
            logs.update(self.log_means.pop(self.accelerator))
        elif "train_loss" in logs:  # the Trainer's own covers what was trained since the last resume
            self.log_means.pop(self.accelerator)
            logs["train_loss"] = self.log_means.mean_loss(default=logs["train_loss"])
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; where the disk is full, the error says what was being written."""
        if _internal_call:  # within a checkpoint, which says so itself
            return super().save_model(output_dir, _internal_call)
        with self._explain_failed_write(f"The model in {output_dir or self.args.output_dir}"):
            super().save_model(output_dir)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """
        As in `Trainer`: `<split>_results.json`, and with `combined` also `all_results.json`; each whole or as it was.

        Raises:
            CheckpointWriteError: If one cannot be written.
        """
        if not self.is_world_process_zero():
            return
        with self._explain_failed_write(f"The results in {self._output_dir}"):
            _write_json(self._output_dir / f"{split}_results.json", metrics)
            if combined:
                file = self._output_dir / "all_results.json"
                earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
                _write_json(file, {**earlier, **metrics})

    def save_state(self) -> None:
        """
        As in `Trainer`; `trainer_state.json` is whole or as it was.

        Raises:
            CheckpointWriteError: If it cannot be written.
        """
        if not self.is_world_process_zero():
            return
        file = self._output_dir / TRAINER_STATE_NAME
        with self._explain_failed_write(str(file)):
            _write_json(file, asdict(self.state))

    # The Trainer has no public hook for when, where and how it writes a checkpoint. These four names are in all
    # supported versions: whether a model is the best one, the folder that holds the checkpoint, its writing, and the
    # push of a written one. `private_names.py` beside this file lists them with the others, and its test says when
    # one of them changes.

    def _determine_best_metric(self, metrics, trial):
        # With save_strategy="best" this alone decides whether a checkpoint is saved, also on Ctrl-C and SIGTERM.
        return super()._determine_best_metric(metrics, trial) or self.interrupted

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = self._output_dir / files.STAGING / name
        try:
            with self._explain_failed_write(f"{name} in {run_dir}"):
                self._staging = staged.parent
                super()._save_checkpoint(model, trial)  # which finds nothing to rotate beside the staged one
                torch.save(self.log_means.state_dict(), staged / files.log_means_name(self.args.process_index))
                self._keep_best_checkpoint(run_dir, staged)
                self._publish(staged, run_dir / name)
        except BaseException:
            if self.args.should_save:
                files.tidy(self._output_dir)
            raise
        finally:
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = [run_dir / name, *([Path(best)] if best else [])]
            files.rotate(run_dir, self.args.save_total_limit, keep)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _keep_best_checkpoint(self, run_dir: Path, staged: Path) -> None:
        """The Trainer looked for the best checkpoint beside the staged one, and may have taken that for it."""
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.is_dir() or best.name == staged.name):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _publish(self, staged: Path, checkpoint: Path) -> None:
        """Gives a checkpoint its name once all processes have written their part of it."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            files.publish(staged, checkpoint, self.args.world_size)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save and self.is_local_process_zero():
            with suppress(FileNotFoundError):  # there only where each machine has a disk of its own
                files.publish(staged, checkpoint, self.args.world_size)

    @property
    def _nan_batch_file(self) -> Path:
        process = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(str(self.args.output_dir), f"nan_batch{process}.safetensors")

    @contextmanager
    def _explain_failed_write(self, what: str) -> Iterator[None]:
        try:
            yield
        except CheckpointWriteError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch's and safetensors' are no OSErrors
            free = files.free_megabytes(self._output_dir)
            # Only Python names a full disk; PyTorch and safetensors say what came of it.
            is_full = free < 1 or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            cause = "the disk is full" if is_full else " ".join(str(error).split())
            raise CheckpointWriteError(
                f"{what} could not be written: {cause} ({free:,.1f} MB free). {self._how_to_go_on()}"
            ) from error

    def _how_to_go_on(self) -> str:
        folders = files.checkpoint_folders(self._output_dir)
        if not folders:
            return "There is no earlier checkpoint to resume from."
        return f"{folders[-1]} is intact: resume from it when the cause is removed."


class CheckpointWriteError(OSError):
    """A file of a training could not be written; the message says which, how much is free, and what is intact."""


def _advice(damaged: Path) -> str:
    earlier = [folder for folder in files.checkpoint_folders(damaged.parent) if folder != damaged]
    whole = files.newest_whole(earlier)
    if whole is None:
        return "No other checkpoint beside it is whole."
    return f"{whole} is whole: resume from it (--resume_from_newest_whole), or delete the damaged one."


def _check_architecture(folder: Path, saved: StellarConfig, config: StellarConfig) -> None:
    differing = [
        f"{name} is {getattr(saved, name)} there and {getattr(config, name)} here"
        for name in _architecture_fields()
        if _comparable(getattr(saved, name)) != _comparable(getattr(config, name))
    ]
    if differing:
        raise ValueError(
            f"The checkpoint {folder} is of another model: {', '.join(differing)}. Resume with its values, or train "
            "in another output_dir."
        )


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _architecture_fields() -> list[str]:
    """Names of what makes a model another one: neither the objective's, nor what every config has for bookkeeping."""
    own = StellarConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() - OBJECTIVE_FIELDS
    return [name for name in StellarConfig.__dataclass_fields__ if name in own and not name.startswith("_")]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    replace_text(file, json.dumps(content, indent=4, sort_keys=True))
