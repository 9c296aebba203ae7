# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What the commands that train have in common: cores, and errors in a sentence."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments


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


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Original Traceback" in str(error) or isinstance(error, StrictDataclassError):
        # From a worker process, or from the check of a type: what happened is in the last line.
        return re.sub(r"^\w+Error: ", "", lines[-1])
    return " ".join(lines)
