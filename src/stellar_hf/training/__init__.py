# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Pre-training, and training of the prior, with the Trainer of Transformers."""

from .arguments import StellarTrainingArguments
from .callbacks import GracefulInterruptCallback, PushCodeCallback, StellarProgressCallback, TeacherCallback
from .checkpoints import CheckpointTrainer, CheckpointWriteError
from .evaluation import default_processor
from .token_prior import StellarTokenPriorTrainer, TokenPriorForTraining
from .trainer import StellarTrainer

__all__ = [
    "CheckpointTrainer",
    "CheckpointWriteError",
    "GracefulInterruptCallback",
    "PushCodeCallback",
    "StellarProgressCallback",
    "StellarTokenPriorTrainer",
    "StellarTrainer",
    "StellarTrainingArguments",
    "TeacherCallback",
    "TokenPriorForTraining",
    "default_processor",
]
