# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""How the commands that train go on from a checkpoint."""

import sys
from pathlib import Path

from ..training.checkpoint_files import Checkpoint
from ..training.checkpoints import CheckpointTrainer


def find_checkpoint(
    trainer: CheckpointTrainer, overwrite_output_dir: bool, resume_from_newest_whole: bool = False
) -> Checkpoint | None:
    """
    The checkpoint that `resume_from_checkpoint` asks for, or else the newest one in the output folder, or None. Call
    it on all processes.

    Args:
        trainer: Of the training that is to go on.
        overwrite_output_dir: Whether to remove all checkpoints and start anew.
        resume_from_newest_whole: Whether to pass over checkpoints that are damaged.

    Raises:
        ValueError: If more than one of the three is asked for, or a checkpoint where there is none, or another
            training is running in the output folder.
    """
    asked = trainer.args.resume_from_checkpoint
    wanted = {
        "overwrite_output_dir": overwrite_output_dir,
        "resume_from_newest_whole": resume_from_newest_whole,
        "resume_from_checkpoint": asked is not None,
    }
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    if len(names) > 1:
        raise ValueError(f"Both {' and '.join(names)} are given: choose one.")
    if overwrite_output_dir:
        trainer.remove_checkpoints()
        return None
    if asked is not None and str(asked).lower() == "false":
        return None
    if asked is not None and str(asked).lower() != "true":
        return trainer.inspect(asked)
    newest = trainer.last_checkpoint()
    if newest is None and asked is not None:
        raise ValueError(f"There is no checkpoint in {trainer.args.output_dir} to resume from.")
    if newest is None or not resume_from_newest_whole:
        return newest
    whole = trainer.last_whole_checkpoint()
    if whole is None:
        raise ValueError(f"None of the checkpoints in {trainer.args.output_dir} is whole: {newest.problem}")
    return whole


def announce(trainer: CheckpointTrainer, checkpoint: Checkpoint | None) -> bool:
    """
    Says where a training goes on, and returns whether it is finished there. Call it on all processes.

    Raises:
        ValueError: If it cannot go on from the checkpoint.
    """
    if checkpoint is None:
        return False
    is_finished = trainer.is_finished(checkpoint)
    what = "The training is finished; measuring" if is_finished else "Going on from"
    if trainer.is_world_process_zero():
        print(f"{what} {checkpoint} (--overwrite_output_dir starts anew)\n")
    return is_finished


def train_or_load(trainer: CheckpointTrainer, checkpoint: Checkpoint | None, is_finished: bool) -> None:
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
