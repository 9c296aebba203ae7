# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What happens around a training step: the EMA teacher, the log a person reads, Ctrl-C, and the way to the Hub."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_in_notebook

from .schedules import teacher_momentum


class TeacherCallback(TrainerCallback):
    """
    Moves the EMA teacher once per optimizer step; not on accumulated or skipped steps (STELLAR, EMA teacher).

    Raises:
        ValueError: When training begins, if the teacher's weights are too coarse for a moving average, or in parts
            that DeepSpeed's ZeRO-3 keeps out of reach.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        dtype = next(model.teacher.parameters()).dtype
        if torch.finfo(dtype).bits < 32:
            raise ValueError(
                f"The EMA teacher's weights are {dtype}, too coarse for its small steps: load the model in float32. "
                "With DeepSpeed, ask for mixed precision by torch_autocast in its configuration, not by bf16 or fp16."
            )
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed's ZeRO-3 hides the weights from the EMA teacher, which would never move: take ZeRO-1 or 2, "
                "or FSDP."
            )

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # A step that the gradient scaler skipped also arrives here. Only Accelerate's optimizer knows of such.
        if not getattr(optimizer, "step_was_skipped", False):
            model.update_teacher(teacher_momentum(args, state))


class ProcessSeedCallback(TrainerCallback):
    """
    Gives every process its own random draws, of views and masks or of noise; the order of the data is drawn before,
    and is common.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            set_seed(args.seed + args.process_index)


class GracefulInterruptCallback(TrainerCallback):
    """
    The first Ctrl-C, or SIGTERM as clusters send it before they take a machine away, finishes the step or the
    evaluation, saves a checkpoint and ends the training, on all processes when one of them gets it; a second one ends
    it at once.

    After training, `signal_number` is the signal that ended it so, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    # A launcher passes on the Ctrl-C that the terminal has sent to all processes already; a person is not that quick.
    SECONDS_OF_ONE_INTERRUPT = 1.0

    def __init__(self):
        self.signal_number: int | None = None
        self._is_training = False
        self._received = 0  # by this process
        self._agreement: torch.Tensor | None = None
        self._previous_handlers: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.signal_number, self._received, self._agreement = None, 0, None
        self._is_training = True
        self._process_id = os.getpid()
        # Python delivers signals to the main thread alone.
        if not self._previous_handlers and threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_if(self._agreed(args), control)
        if state.global_step >= state.max_steps:
            self._stop_if(self._agreed(args), control)  # no further step would hear of a signal in this one

    def on_evaluate(self, args, state, control, **kwargs):
        if self._is_training:
            # An evaluation is long, and may be the last that happens; so what this process agrees on is waited for.
            self._agreed(args)
            self._stop_if(self._agreed(args), control)

    def _stop_if(self, received: int, control) -> None:
        if received:
            self.signal_number = received
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.signal_number is not None and control.should_training_stop and state.epoch % 1 > 0:
            # The epoch has not ended: a log or checkpoint of its end would make the resumed run another one.
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        # The last checkpoint is written, if there is any: a signal that came meanwhile is told by the exit status.
        self._agreed(args)
        self.signal_number = self._agreed(args) or self.signal_number
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Gives the signals back to who had them before training; also needed where training ends with an error."""
        self._is_training = False
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _agreed(self, args: TrainingArguments) -> int:
        """
        The signal that any process had received when this was asked last: one that stopped alone would leave the
        others waiting for its gradients. One question late, since the answer to this one would have to be waited for.
        """
        if args.world_size == 1:
            return self._received
        known = 0 if self._agreement is None else int(self._agreement)
        self._agreement = torch.tensor(self._received, device=args.device)
        torch.distributed.all_reduce(self._agreement, op=torch.distributed.ReduceOp.MAX)
        return known

    def _handle(self, signal_number, frame):
        if os.getpid() != self._process_id:
            return  # a data loader's worker, forked while this handler was installed
        if not self._received:
            self._received, self._time = signal_number, time.monotonic()
            # Not through a stream or a logger: the signal may have come in the middle of a write to the same one.
            os.write(2, b"\nInterrupted: saving a checkpoint after this step (Ctrl-C again to stop without).\n")
        elif time.monotonic() - self._time > self.SECONDS_OF_ONE_INTERRUPT:
            self.restore_handlers()
            signal.raise_signal(signal_number)


class PushCodeCallback(TrainerCallback):
    """
    Adds the code of a checkpoint that carries it to what is pushed to the Hub while training.

    The Trainer copies a checkpoint's weights and config.json alone, and the latter names the code.
    """

    def on_push_begin(self, args, state, control, **kwargs):
        for file in Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}").glob("*.py"):
            shutil.copy(file, args.output_dir)


# Ends of the names of what an evaluation logs, and a table has no room for.
_NOT_SHOWN = ("epoch", "runtime", "per_second")


def shown_values(logs: Mapping[str, Any]) -> dict[str, str]:
    """What a table shows of a log, as text: numbers in four digits, and whatever else a person logs as it is."""
    return {
        name: f"{value:.4g}" if isinstance(value, int | float) else str(value)
        for name, value in logs.items()
        if not name.endswith(_NOT_SHOWN)
    }


class LossTableCallback(ProgressCallback):
    """
    The Trainer's progress bar, with each log of the training as a row of a table.

    Args:
        columns: Name in the log, title and format of each column; a log of training is one that has all of them.
    """

    def __init__(self, columns: Sequence[tuple[str, str, str]], **kwargs):
        super().__init__(**kwargs)
        self.columns = columns

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._has_title = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        if all(name in logs for name, _, _ in self.columns):
            if not self._has_title:
                self.training_bar.write(self._row("step", [title for _, title, _ in self.columns]))
                self._has_title = True
            cells = [form.format(logs[key]) for key, _, form in self.columns]
            self.training_bar.write(self._row(str(state.global_step), cells))
        elif "train_runtime" in logs:
            speed = f"{logs['train_runtime']:.0f} s, {logs['train_samples_per_second']:.0f} images a second"
            self.training_bar.write(f"\n{state.global_step} of {state.max_steps} steps done ({speed})")
        else:
            values = [f"{name} {value}" for name, value in shown_values(logs).items()]
            self.training_bar.write(f"{state.global_step:>6}  {'  '.join(values)}")

    @staticmethod
    def _row(step: str, cells: list[str]) -> str:
        return f"{step:>6}" + "".join(f"{cell:>9}" for cell in cells)


def show_loss_table(trainer: Trainer, columns: Sequence[tuple[str, str, str]]) -> None:
    """
    Puts a table in the place of the Trainer's progress bar, if it shows one: of text, or of HTML in a notebook.

    Args:
        trainer: Whose logs are shown.
        columns: As in [`LossTableCallback`]; a notebook has room for the whole names in the log.
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossTableCallback(columns))
    elif is_in_notebook():
        from .notebook import NotebookLossTableCallback, NotebookProgressCallback  # which need IPython

        if trainer.pop_callback(NotebookProgressCallback) is not None:
            trainer.add_callback(NotebookLossTableCallback(columns))


# Of the joint objective: a table of 100 columns of text.
OBJECTIVE_COLUMNS = (
    ("loss", "loss", "{:.3f}"),
    ("reconstruction_loss", "reconstr", "{:.3f}"),
    ("koleo_loss", "koleo", "{:.3f}"),
    ("clustering_loss", "cluster", "{:.3f}"),
    ("cls_clustering_loss", "cls clus", "{:.3f}"),
    ("masked_loss", "masked", "{:.3f}"),
    ("cls_view_loss", "cls view", "{:.3f}"),
    ("slot_information", "slot inf", "{:.2f}"),
    ("localization_sharpness", "sharp L", "{:.2f}"),
    ("images_per_second", "images/s", "{:.0f}"),
)
