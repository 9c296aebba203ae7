# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""How the commands that train go on from a checkpoint."""

import sys
from pathlib import Path

from ..training.checkpoints import CheckpointTrainer


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
