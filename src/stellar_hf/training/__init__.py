# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Pre-training with the Trainer of Transformers."""

from .arguments import StellarTrainingArguments
from .callbacks import GracefulInterruptCallback, PushCodeCallback, StellarProgressCallback, TeacherCallback
from .checkpoints import CheckpointTrainer, CheckpointWriteError
from .evaluation import default_processor
from .trainer import StellarTrainer

__all__ = [
    "CheckpointTrainer",
    "CheckpointWriteError",
    "GracefulInterruptCallback",
    "PushCodeCallback",
    "StellarProgressCallback",
    "StellarTrainer",
    "StellarTrainingArguments",
    "TeacherCallback",
    "default_processor",
]
