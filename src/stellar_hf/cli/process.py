# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""How a command's process behaves: the cores that it takes, and how it ends on an error."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

# What the launchers of Accelerate and PyTorch leave in the environment of the processes that they start.
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


@contextmanager
def errors_in_a_sentence(after_interrupt: str = "") -> Iterator[None]:
    """
    Ends the process with what went wrong, without a traceback unless --log_level=debug is among its arguments.

    Args:
        after_interrupt: A sentence on how to go on, for Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted. {after_interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        if "--log_level=debug" in " ".join(sys.argv).replace("--log_level debug", "--log_level=debug").split():
            raise
        sys.exit(f"error: {_sentence(error)}")


def use_all_cores(args: TrainingArguments) -> None:
    """Gives PyTorch the cores of a CPU, of which launchers leave a process one unless OMP_NUM_THREADS is set."""
    if args.device.type != "cpu" or not any(name in os.environ for name in _LAUNCHED) or _cores_are_chosen():
        return
    cores = psutil.cpu_count(logical=False) or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _cores_are_chosen() -> bool:
    """Whether somebody set OMP_NUM_THREADS for the launcher, which sets it to 1 for its processes otherwise."""
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return True
    try:
        return "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ()
    except psutil.Error:  # a launcher of another user
        return False


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Original Traceback" in str(error) or isinstance(error, StrictDataclassError):
        # From a worker process, or from the check of a type: what happened is in the last line.
        return re.sub(r"^\w+Error: ", "", lines[-1])
    return " ".join(lines) or type(error).__name__
