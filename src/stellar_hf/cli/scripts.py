# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What the commands that train have in common: cores, going on from checkpoints, errors in a sentence."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from ..training.checkpoints import CheckpointTrainer


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """Ends the process with what went wrong, without a traceback unless --log_level=debug is among its arguments."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        if "--log_level=debug" in sys.argv:
            raise
        sys.exit(f"error: {_sentence(error)}")


def use_all_cores(args: TrainingArguments) -> None:
    """Gives PyTorch the cores of a CPU, of which the launchers leave a process one unless they are told otherwise."""
    if args.device.type == "cpu" and torch.get_num_threads() == 1:
        cores = psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def find_checkpoint(trainer: CheckpointTrainer, overwrite_output_dir: bool) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` asks for, or else the newest one in the output folder, or None.

    Args:
        trainer: Of the training that is to go on.
        overwrite_output_dir: Whether to remove all checkpoints and start anew.

    Raises:
        ValueError: If both are asked for, or a checkpoint where there is none.
    """
    asked = trainer.args.resume_from_checkpoint
    if overwrite_output_dir:
        if asked is not None:
            raise ValueError("Both overwrite_output_dir and resume_from_checkpoint are given: choose one.")
        trainer.remove_checkpoints()
        return None
    newest = trainer.last_checkpoint()
    if asked is None or str(asked).lower() == "true":
        if asked is not None and newest is None:
            raise ValueError(f"There is no checkpoint in {trainer.args.output_dir} to resume from.")
        return newest
    return None if str(asked).lower() == "false" else asked


def train_or_load(trainer: CheckpointTrainer, checkpoint: str | None, is_finished: bool) -> None:
    """
    Trains, from the start or a checkpoint; or takes the result of a training that is finished. An interrupted training
    ends the process.
    """
    if checkpoint is not None and is_finished:
        trainer.load_finished(checkpoint)
        return
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interrupted:
        if trainer.is_world_process_zero():
            last = Path(str(trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}")
            print(f"\nInterrupted. Repeat the command to go on from {last}")
        sys.exit(trainer.exit_status)
    trainer.save_metrics("train", result.metrics)


def announce(trainer: CheckpointTrainer, checkpoint: str | None) -> bool:
    """Says where a training goes on, and returns whether it is finished there. Call it on all processes."""
    if checkpoint is None:
        return False
    is_finished = trainer.is_finished(checkpoint)
    what = "The training is finished; measuring" if is_finished else "Going on from"
    if trainer.is_world_process_zero():
        print(f"{what} {checkpoint} (--overwrite_output_dir starts anew)\n")
    return is_finished


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Original Traceback" in str(error) or isinstance(error, StrictDataclassError):
        # From a worker process, or from the check of a type: what happened is in the last line.
        return re.sub(r"^\w+Error: ", "", lines[-1])
    return " ".join(lines)
