# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
How time and memory of a pre-training step grow with batch, views, tokens, prototypes and image size.

A small model, so that what grows can be seen beside its weights. Exponents are slopes of least squares in logarithms
over all values: 1 is in proportion, 2 is quadratic. Memory is that of tensors in a step, gradients included, without
weights, optimizer state and images.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace

from .counters import count_operations, peak_bytes
from .harness import Options, Row, progress, time_in_turns
from .pretraining_step import VARIANTS, PreTrainingStep, Setting

BASE = Setting(
    batch_size=4,
    global_views=2,
    local_views=2,
    config={
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "decoder_hidden_size": 128,
        "decoder_intermediate_size": 512,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "projection_hidden_size": 512,
        "prototype_dim": 64,
        "num_prototypes": 4096,
        "image_size": 224,
    },
)
SMALL = replace(BASE, batch_size=1, config={**BASE.config, "num_hidden_layers": 1, "image_size": 112})
CUDA_BATCH_SCALE = 16  # so that the card is busy
VALUES = {
    "batch_size": (2, 4, 8, 16),  # on a CPU
    "views": (1, 2, 4, 8),  # global ones, and as many local ones
    "num_sparse_tokens": (8, 16, 32, 64),
    "num_prototypes": (4096, 8192, 16384, 32768),
    "image_size": (112, 224, 448),
}
MEASURED = ("train_step_time", "train_tflop", "train_peak_memory")


def run(options: Options) -> list[Row]:
    rows = []
    scale = 1 if options.on_cpu else CUDA_BATCH_SCALE
    base = SMALL if options.quick else replace(BASE, batch_size=scale * BASE.batch_size)
    for axis, values in list(VALUES.items())[: 2 if options.quick else None]:
        if axis == "batch_size":
            values = tuple(scale * value for value in values)
        values = values[:2] if options.quick else values
        progress(f"{axis}: {', '.join(map(str, values))}")
        measured = [measure(axis, value, setting_of(base, axis, value), options) for value in values]
        for index in range(len(VARIANTS)):
            own = [variants[index] for variants in measured]
            exponents = {f"{name}_exponent": exponent((row["value"], row[name]) for row in own) for name in MEASURED}
            rows += [{**row, **(exponents if row is own[-1] else {})} for row in own]
    return rows


def setting_of(base: Setting, axis: str, value: int) -> Setting:
    if axis == "batch_size":
        return replace(base, batch_size=value)
    if axis == "views":
        return replace(base, global_views=value, local_views=value)
    return replace(base, config={**base.config, axis: value})


def measure(axis: str, value: int, setting: Setting, options: Options) -> list[Row]:
    """A row of each variant."""
    step = PreTrainingStep(setting, options.device)
    steps = {variant: step.named()[variant] for variant in VARIANTS}  # nothing is compiled for each size
    timings = time_in_turns(steps, options.device, turns=1 if options.quick else 5)
    rows = []
    for variant in VARIANTS:
        step.optimizer.zero_grad()
        memory = peak_bytes(lambda variant=variant: step.backward(variant), options.device)
        operations = count_operations(lambda variant=variant: step.backward(variant))
        rows.append(
            {
                "model": variant,
                "axis": axis,
                "value": value,
                "train_batch_size": setting.batch_size,
                "train_samples_per_sec": setting.batch_size / timings[variant].median,
                "train_step_time": 1000 * timings[variant].median,
                "train_step_time_spread": timings[variant].spread,
                "train_tflop": operations / 1e12,
                "train_peak_memory": memory / 2**20,
            }
        )
    return rows


def exponent(points: Iterable[tuple[float, float]]) -> float:
    x, y = zip(*((math.log(value), math.log(measured)) for value, measured in points), strict=True)
    return statistics.linear_regression(x, y).slope
