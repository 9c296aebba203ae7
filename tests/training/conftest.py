# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A trainer of a tiny model."""

from functools import partial

import numpy as np
import pytest
import torch

from stellar_hf import StellarForPreTraining, StellarTrainer, StellarTrainingArguments
from stellar_hf.training.evaluation import FigureCallback

IMAGES = [{"image": image} for image in np.random.default_rng(0).integers(0, 256, (10, 40, 40, 3), dtype=np.uint8)]


@pytest.fixture(scope="session")
def build_trainer(tiny_config):
    """
    Builds a trainer of a tiny model for 3 steps of 2 images; `config` and arguments can be overridden.

    Evaluations draw figures, which take most of their time, where a test asks for them.
    """

    def build(
        output_dir,
        config=None,
        callbacks=None,
        train_dataset=IMAGES,
        data_collator=None,
        eval_dataset=None,
        vq_model=None,
        figures=False,
        **arguments,
    ):
        torch.manual_seed(0)
        defaults = {
            "output_dir": str(output_dir),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "num_global_views": 2,
            "num_local_views": 1,
            "local_size": 16,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = StellarTrainer(
            StellarForPreTraining(tiny_config(**(config or {}))),
            StellarTrainingArguments(**{**defaults, **arguments}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            callbacks=callbacks,
            vq_model=vq_model,
        )
        if not figures:
            trainer.pop_callback(FigureCallback)
        return trainer

    return build


@pytest.fixture
def make_trainer(build_trainer, tmp_path):
    """Builds such a trainer with an output folder `run`."""
    return partial(build_trainer, tmp_path / "run")
