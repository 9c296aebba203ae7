# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
A short training in a process of its own, to which something happens; the same command goes on from its checkpoint.

    python run_with_fault.py folder '{"max_steps": 10, "fault": ["kill", 5]}'

Faults, all with the step that they happen at and, optionally, the rank that they happen to (0 if not given):
`kill` after the step, `kill in save` while its checkpoint is written, `interrupt` and `terminate` before the step,
`kill worker` of the data loader. What the training ended with is written to `said_<rank>.txt` in the folder.
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from stellar_hf import StellarConfig, StellarForPreTraining, StellarTrainer, StellarTrainingArguments
from stellar_hf.data import StellarViews

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_sparse_tokens": 4,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "reconstruction_target": "pixels",
    "num_prototypes": 12,
    "prototype_dim": 8,
    "projection_hidden_size": 20,
    "use_teacher": True,
}


class Fault(TrainerCallback):
    def __init__(self, kind: str, step: int, rank: int = 0):
        self.kind, self.step = kind, step
        self.is_mine = rank == int(os.environ.get("RANK", 0))

    def happens(self, kind: str, step: int) -> bool:
        return self.is_mine and (kind, step) == (self.kind, self.step)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        # The optimizer is asked for its state once the weights are written, and before anything else is.
        optimizer.optimizer.register_state_dict_pre_hook(
            lambda _: self.happens("kill in save", state.global_step) and kill(signal.SIGKILL)
        )

    def on_step_begin(self, args, state, control, **kwargs):
        if self.happens("interrupt", state.global_step + 1):
            kill(signal.SIGINT)
        if self.happens("terminate", state.global_step + 1):
            kill(signal.SIGTERM)
        if self.happens("kill worker", state.global_step + 1):
            multiprocessing.active_children()[0].kill()

    def on_step_end(self, args, state, control, **kwargs):
        if self.happens("kill", state.global_step):
            kill(signal.SIGKILL)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def collate(examples):
    """Views that depend on nothing but the images."""
    views = StellarViews(num_global_views=2, num_local_views=1, global_size=32, local_size=16)
    images = torch.stack([torch.from_numpy(example["image"]).permute(2, 0, 1) for example in examples])
    return views(images, generator=torch.Generator().manual_seed(int(images.sum())))


def main(folder: str, arguments: str) -> None:
    arguments = json.loads(arguments)
    settings = {
        "output_dir": f"{folder}/run",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        **arguments,
    }
    fault = settings.pop("fault", None)
    num_images = settings.pop("num_images", 14)
    images = np.random.default_rng(0).integers(0, 256, (num_images, 40, 40, 3), dtype=np.uint8)
    torch.manual_seed(0)
    trainer = StellarTrainer(
        StellarForPreTraining(StellarConfig(**CONFIG)),
        StellarTrainingArguments(**settings),
        data_collator=collate,
        train_dataset=[{"image": image} for image in images],
        callbacks=[Fault(*fault)] if fault else [],
    )
    said = Path(folder, f"said_{trainer.args.process_index}.txt")
    said.write_text("")
    try:
        result = trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    except (OSError, ValueError) as error:
        said.write_text(str(error))
        sys.exit(1)
    said.write_text(json.dumps(result.metrics))
    sys.exit(trainer.exit_status)


if __name__ == "__main__":
    main(*sys.argv[1:])
