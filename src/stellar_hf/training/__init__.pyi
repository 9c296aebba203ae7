# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .arguments import StellarTrainingArguments as StellarTrainingArguments
from .callbacks import GracefulInterruptCallback as GracefulInterruptCallback
from .callbacks import PushCodeCallback as PushCodeCallback
from .callbacks import TeacherCallback as TeacherCallback
from .checkpoints import CheckpointTrainer as CheckpointTrainer
from .checkpoints import CheckpointWriteError as CheckpointWriteError
from .evaluation import default_processor as default_processor
from .trainer import StellarTrainer as StellarTrainer
