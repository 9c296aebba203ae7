# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Checkpoints that are complete or not there, and from which a run goes on bit for bit."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import CONFIG_NAME

from ..configuration_stellar import OBJECTIVE_FIELDS, StellarConfig
from .callbacks import GracefulInterruptCallback, ProcessSeedCallback
from .data import with_uninterrupted_workers

# Inside the output folder, so that a rename suffices; the Trainer pushes nothing whose name starts so.
_STAGING = "_saving"
_REPLACED = "replaced-"


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
    """

    _staging: Path | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_means = LogMeans()
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

    def last_checkpoint(self) -> str | None:
        """
        Folder of the newest complete checkpoint in `args.output_dir`, None if there is none. Call it on all processes:
        what a killed run left of an incomplete one is removed.
        """
        output_dir = str(self.args.output_dir)
        if self.args.should_save:
            _tidy(Path(output_dir))
        self.accelerator.wait_for_everyone()
        return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None

    def remove_checkpoints(self) -> None:
        """Removes all checkpoints in `args.output_dir`, for a run that starts anew. Call it on all processes."""
        if self.args.should_save:
            for folder in Path(str(self.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()

    def is_finished(self, checkpoint: str) -> bool:
        """
        Whether a checkpoint, a folder, has all steps that the arguments ask for.

        Raises:
            ValueError: If it is missing, damaged, or of another architecture.
        """
        self.check_resumable(checkpoint)
        max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        return _load_state(checkpoint).global_step >= max_steps

    def load_finished(self, checkpoint: str) -> None:
        """
        Takes model and state from the last checkpoint of a finished run; with `load_best_model_at_end`, the model
        from the best one.
        """
        self.state = _load_state(checkpoint)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self.load_weights(best or checkpoint)

    def check_resumable(self, checkpoint: str | Path) -> None:
        """
        Checks that the training can go on from a checkpoint.

        Raises:
            ValueError: If it is missing, damaged, or of another architecture.
        """
        check_checkpoint(checkpoint, getattr(self.accelerator.unwrap_model(self.model), "config", None))

    def load_weights(self, checkpoint: str | Path) -> None:
        """Takes the weights from a checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As in `Trainer`; Ctrl-C and SIGTERM finish the step and save a checkpoint.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the newest one in `args.output_dir`.

        Raises:
            ValueError: If the checkpoint to resume from is missing, damaged, or of another architecture.
            OSError: If a checkpoint cannot be written (`CheckpointWriteError`), or a worker of the data loader was
                killed; the last complete checkpoint is intact.
        """
        newest = self.last_checkpoint()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest
            if newest is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        self.log_means = LogMeans()
        if resume_from_checkpoint:
            self.check_resumable(resume_from_checkpoint)
            means = self._log_means_file(resume_from_checkpoint)
            if means.exists():  # not where the number of processes has grown
                # Not straight to the device: PyTorch knows no cpu:0 here, as Accelerate names it.
                state = torch.load(means, map_location="cpu", weights_only=True)
                self.log_means.load_state_dict(state, self.args.device)
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
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

    # The Trainer has no public hook for where and how it writes a checkpoint. These three names are in all supported
    # versions: the folder that holds the checkpoint, its writing, and the push of a written one.

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = Path(str(self.args.output_dir), _STAGING, name)
        try:
            with self._explain_failed_write(f"{name} in {run_dir}"):
                self._staging = staged.parent
                super()._save_checkpoint(model, trial)  # which finds nothing to rotate beside the staged one
                torch.save(self.log_means.state_dict(), self._log_means_file(staged))
                self._keep_best_checkpoint(run_dir, staged)
                self._publish(staged, run_dir / name)
        except BaseException:
            if self.args.should_save:
                _tidy(staged.parents[1])
            raise
        finally:
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)

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
        """Renames a checkpoint once all processes have written their part of it."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _replace(staged, checkpoint)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save and self.is_local_process_zero():
            with suppress(FileNotFoundError):  # there only where each machine has a disk of its own
                _replace(staged, checkpoint)

    def _log_means_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint, f"log_means_{self.args.process_index}.pth")

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
            free = _free_megabytes(str(self.args.output_dir))
            # Only Python names a full disk; PyTorch and safetensors say what came of it.
            is_full = free < 1 or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            cause = "the disk is full" if is_full else " ".join(str(error).split())
            raise CheckpointWriteError(
                f"{what} could not be written: {cause} ({free:,.1f} MB free). {self._how_to_go_on()}"
            ) from error

    def _how_to_go_on(self) -> str:
        output_dir = str(self.args.output_dir)
        last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        if last is None:
            return "There is no earlier checkpoint to resume from."
        return f"{last} is intact: resume from it when the cause is removed."


class CheckpointWriteError(OSError):
    """A checkpoint or model could not be written; the message says which, how much is free, and what is intact."""


def check_checkpoint(checkpoint: str | Path, config: StellarConfig | None) -> None:
    """
    Checks that a run can go on from a checkpoint.

    Args:
        checkpoint: Folder that a Trainer wrote.
        config: Of the model that is to go on; None for a model of another kind, which is not compared.

    Raises:
        ValueError: If the folder is missing, lacks a file, has a damaged one, or holds a model of another
            architecture; the message names the file or the fields.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {folder}.")
    _load_state(folder)
    for file in sorted(folder.iterdir()):
        if not _is_whole(file):
            raise ValueError(
                f"The checkpoint {folder} is damaged: {file.name} is incomplete. Delete the folder to go on from an "
                "earlier one."
            )
    # DeepSpeed keeps optimizer and schedule in a folder of its own.
    if not (folder / SCHEDULER_NAME).exists() and not any(folder.glob("global_step*")):
        raise ValueError(
            f"The checkpoint {folder} has no {SCHEDULER_NAME}: with save_only_model it holds a model, to start a new "
            "training from, but not the state of a training to resume."
        )
    if config is not None and (folder / CONFIG_NAME).exists():  # FSDP writes none beside a sharded model
        _check_architecture(folder, config)


def _check_architecture(folder: Path, config: StellarConfig) -> None:
    saved = StellarConfig.from_pretrained(folder)
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


def _architecture_fields() -> list[str]:
    """Names of what makes a model another one: neither the objective's, nor what every config has for bookkeeping."""
    own = StellarConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() - OBJECTIVE_FIELDS
    return [name for name in StellarConfig.__dataclass_fields__ if name in own and not name.startswith("_")]


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _load_state(checkpoint: str | Path) -> TrainerState:
    file = Path(checkpoint, TRAINER_STATE_NAME)
    try:
        return TrainerState.load_from_json(str(file))
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} is no checkpoint of a training: it has no {TRAINER_STATE_NAME}.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"The checkpoint {checkpoint} is damaged: {TRAINER_STATE_NAME} is not readable.") from error


def _is_whole(file: Path) -> bool:
    """Whether a file of weights or states has its end, as far as its format tells."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except SafetensorError:
            return False
    return file.suffix not in (".pt", ".pth", ".bin") or not file.is_file() or is_zipfile(file)


def _replace(staged: Path, checkpoint: Path) -> None:
    """Gives a complete folder its name, in place of an earlier one of the same step."""
    _sync(staged)
    replaced = staged.with_name(_REPLACED + staged.name)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        checkpoint.rename(replaced)
    staged.rename(checkpoint)
    _sync_one(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    with suppress(OSError):
        staged.parent.rmdir()


def _tidy(output_dir: Path) -> None:
    """Removes what a killed run was writing; a checkpoint that it was just replacing gets its name back."""
    staging = output_dir / _STAGING
    for replaced in staging.glob(f"{_REPLACED}*"):
        checkpoint = output_dir / replaced.name.removeprefix(_REPLACED)
        if not checkpoint.exists():
            replaced.rename(checkpoint)
    shutil.rmtree(staging, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Has everything on disk before the rename: a file system may order the two otherwise when power fails."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt":
        return  # Windows syncs nothing that is open for reading, and opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_megabytes(folder: str) -> float:
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return shutil.disk_usage(folder).free / 2**20
