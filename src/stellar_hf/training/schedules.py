# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
What changes over a training besides the learning rate.

Every value is a function of `global_step` and `max_steps` alone, so a resumed run goes on as if it had not stopped.
Step numbers start at 0.
"""

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from ..configuration_stellar import StellarConfig
from ..loss_stellar import num_kept_patches

if TYPE_CHECKING:
    from .arguments import StellarTrainingArguments


def teacher_momentum(args: "StellarTrainingArguments", state: TrainerState) -> float:
    """Momentum of the teacher's next update."""
    return _cosine(args.teacher_momentum, args.teacher_momentum_end, state)


def weight_decay(args: "StellarTrainingArguments", state: TrainerState) -> float:
    """Weight decay of the next optimizer step."""
    return _cosine(args.weight_decay, args.weight_decay_end, state)


def objective_settings(
    args: "StellarTrainingArguments", config: StellarConfig, state: TrainerState, inputs: dict[str, Any]
) -> dict[str, float]:
    """What is warmed up of the objective, by its names in the model's `forward`; empty once the warm-up is over."""
    steps = num_steps(args.objective_warmup_steps, state.max_steps)
    if state.global_step >= steps:
        return {}

    def warmed_up(start: float, end: float) -> float:
        return start + (end - start) * state.global_step / steps

    settings: dict[str, float] = {}
    for name in ("target_temperature", "prediction_temperature"):
        start = getattr(args, f"{name}_start")
        if start is not None:
            settings[name] = warmed_up(start, getattr(config, name))
    if args.mask_ratio_start is not None and "global_pixel_values" in inputs:
        height, width = (side // config.patch_size for side in inputs["global_pixel_values"].shape[-2:])
        settings["num_kept"] = num_kept_patches(height * width, warmed_up(args.mask_ratio_start, config.mask_ratio))
    return settings


def num_steps(steps_or_share: float, max_steps: int) -> int:
    """A number of steps, given as such or, below 1, as a share of all; rounded as the Trainer does for warm-ups."""
    return int(steps_or_share) if steps_or_share >= 1 else math.ceil(steps_or_share * max_steps)


def _cosine(start: float, end: float | None, state: TrainerState) -> float:
    """Half a period of a cosine, from `start` at step 0 to `end` after the last one."""
    if end is None:
        return start
    return end + (start - end) * (1 + math.cos(math.pi * state.global_step / state.max_steps)) / 2


class ScheduleCallback(TrainerCallback):
    """Sets the weight decay of a step and holds the prototypes still at the beginning."""

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.weight_decay_end is not None:
            for group in optimizer.param_groups:
                if group["weight_decay"] > 0:  # the others hold what is never decayed
                    group["weight_decay"] = weight_decay(args, state)
        if state.global_step < num_steps(args.freeze_prototypes_steps, state.max_steps):
            # Not through requires_grad: DistributedDataParallel waits for every gradient that it knew at the start.
            model.clustering_head.prototypes.grad = None
            model.cls_clustering_head.prototypes.grad = None


# Layer-wise learning-rate decay --------------------------------------------------------------------------------------

_LAYER = re.compile(r"stellar\.layers\.(\d+)\.")
# What a ViT brings along; the sparse tokens are new to it.
_EMBEDDING = re.compile(r"stellar\.embeddings\.(patch_embeddings|cls_token|position_embeddings)")


def scale_learning_rates_by_depth(
    optimizer: torch.optim.Optimizer, model: nn.Module, layer_decay: float, num_layers: int
) -> None:
    """
    Splits the optimizer's groups so that layer i of the encoder's L learns with `layer_decay ** (L - i)` of the rate
    (i from 0), the embeddings of patches and positions with `layer_decay ** (L + 1)`, and all else with the full rate.
    """
    exponents = {parameter: _exponent(name, num_layers) for name, parameter in model.named_parameters()}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for exponent in sorted({exponents[parameter] for parameter in group["params"]}):
            parameters = [parameter for parameter in group["params"] if exponents[parameter] == exponent]
            optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * layer_decay**exponent})


def _exponent(name: str, num_layers: int) -> int:
    if layer := _LAYER.search(name):
        return num_layers - int(layer[1])
    return num_layers + 1 if _EMBEDDING.search(name) else 0
