# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Training of small networks on images that are in memory."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Sizes(NamedTuple):
    """How much is trained and tested."""

    train_scenes: int = 8000
    test_scenes: int = 256  # of each seed
    perceptual_steps: int = 300
    tokenizer_steps: int = 400
    stellar_steps: int = 350
    seeds: int = 2
    batch_size: int = 64


SMALL = Sizes(64, 4, perceptual_steps=11, tokenizer_steps=30, stellar_steps=11, seeds=1, batch_size=8)


def training_batches(num_images: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Indices of a batch for each step."""
    for _ in range(steps):
        yield torch.randint(num_images, (batch_size,))


def descent_of(module: nn.Module, steps: int, learning_rate: float) -> Callable[[Tensor], None]:
    """A function that takes a step of AdamW and of its schedule."""
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    return descend
