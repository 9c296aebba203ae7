# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""One optimizer step of pre-training, as the library takes it or plainly, on random images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from stellar_hf import StellarConfig, StellarForPreTraining
from stellar_hf.modeling_stellar import StellarLayer

from .counters import AllocatedBytes, count_operations
from .harness import reset_peak_resident, resident_bytes
from .plain_objective import plain_loss

# The variants: "ours" is the library's forward; on accelerators also with compiled layers, as Accelerate's regional
# compilation makes them.
VARIANTS = ("ours", "plain")
COMPILED = "ours, layers compiled"


def variants_on(device: str) -> tuple[str, ...]:
    return VARIANTS if torch.device(device).type == "cpu" else (*VARIANTS, COMPILED)


@dataclass(frozen=True)
class Setting:
    """Sizes of a step; by default those of the paper, with a small batch."""

    batch_size: int = 4
    global_views: int = 8
    local_views: int = 8
    local_size: int = 96
    config: dict[str, Any] = field(default_factory=dict)  # of the model, where it differs from ViT-B/16

    def model_config(self) -> StellarConfig:
        return StellarConfig(**{"reconstruction_target": "pixels", "mask_ratio": 0.75, **self.config})


class PreTrainingStep:
    """
    A model in training with its optimizer and one batch, whose steps either variant can take.

    On accelerators the forward runs in bf16 autocast, and float32 products in TF32, as with the Trainer's `bf16`; on a
    CPU all is float32.
    """

    def __init__(self, setting: Setting, device: str = "cpu"):
        torch.manual_seed(0)
        config = setting.model_config()
        self.device = torch.device(device)
        self.autocast = self.device.type != "cpu"
        with self.device:
            self.model = StellarForPreTraining(config).train()
        self.models = {variant: self.model for variant in variants_on(device)}
        if COMPILED in self.models:
            self.models[COMPILED] = with_compiled_layers(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        batch, size, local = setting.batch_size, config.image_size, setting.local_size
        inputs = {
            "pixel_values": torch.randn(batch, 3, size, size),
            "global_pixel_values": torch.randn(batch, setting.global_views, 3, size, size),
            "local_pixel_values": torch.randn(batch, setting.local_views, 3, local, local),
            "noise": torch.rand(batch * setting.global_views, (size // config.patch_size) ** 2),
        }
        self.inputs = {name: values.to(self.device) for name, values in inputs.items()}

    def backward(self, variant: str) -> float:
        """Gradients of the loss, which is returned."""
        self.optimizer.zero_grad()
        torch.set_float32_matmul_precision("high" if self.autocast else "highest")
        torch.backends.cudnn.allow_tf32 = self.autocast
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if variant == "plain":
                loss = plain_loss(self.model, **self.inputs)
            else:
                loss = self.models[variant](**self.inputs).loss
        loss.backward()
        return loss.item()

    def take(self, variant: str) -> None:
        """Forward, backward, clipping and AdamW."""
        self.backward(variant)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def named(self) -> dict[str, Callable[[], None]]:
        return {variant: lambda variant=variant: self.take(variant) for variant in self.models}


def with_compiled_layers(model: StellarForPreTraining) -> StellarForPreTraining:
    """The model, with the same weights, whose layers are compiled."""
    with torch.device("meta"):
        twin = StellarForPreTraining(model.config).train()
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    for module in twin.modules():
        if isinstance(module, StellarLayer):
            module.compile(dynamic=False)
    return twin


def compare_gradients(step: PreTrainingStep) -> tuple[float, dict[str, int]]:
    """
    The largest difference of a gradient of both variants, relative to the largest entry of its tensor, in float32; and
    the floating-point operations of each variant's forward and backward.

    Key biases are left out: a softmax ignores them, so that their gradient is zero but for rounding.
    """
    gradients, operations = {}, {}
    autocast, step.autocast = step.autocast, False
    for variant in VARIANTS:
        torch.manual_seed(1)
        operations[variant] = count_operations(lambda variant=variant: step.backward(variant))
        named = step.model.named_parameters()
        gradients[variant] = {name: weight.grad for name, weight in named if not name.endswith("k_proj.bias")}
    step.autocast = autocast
    step.optimizer.zero_grad()
    ours, plain = (gradients[variant] for variant in VARIANTS)
    return max(((ours[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in plain.items()), operations


def measure_memory(setting: Setting, variant: str, device: str) -> tuple[int, int | None]:
    """
    Peak bytes of a process that trains: weights, optimizer state, gradients, images and what a step needs, by what
    tensors hold and, on a CPU, by resident memory above that of a process that has only imported the library.
    """
    if torch.device(device).type != "cpu":
        step = PreTrainingStep(setting, device)
        for _ in range(2):
            step.take(variant)
        return torch.cuda.max_memory_allocated(device), None
    before = resident_bytes()
    with AllocatedBytes() as allocated:
        step = PreTrainingStep(setting, device)
        step.take(variant)
        allocated.reset_peak()
        reset_peak_resident()
        step.take(variant)
    return allocated.peak, resident_bytes(peak=True) - before
