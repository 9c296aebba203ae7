# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
One optimizer step of pre-training beside a plain formulation: time, operations, memory, gradients.

Forward, backward, clipping and AdamW of ViT-B/16 with 16 tokens, 8 global views masked at 0.75, 8 local views of 96
pixels, 16384 prototypes and the pixel head. `train_tflop_at_product_rate` is the time of a step times the rate of
large matrix products that is measured in the same turns: the operations that the machine could have done meanwhile.
"""

import statistics

import torch

from .harness import (
    RETURN_FREED_MEMORY,
    Options,
    Row,
    in_fresh_process,
    matrix_products,
    product_rates,
    progress,
    time_in_turns,
)
from .pretraining_step import COMPILED, PreTrainingStep, Setting, compare_gradients, measure_memory, variants_on

CUDA_BATCH_SIZE = 64
CUDA_PRODUCT_ROWS = 2**16  # on fewer, the time of a product is that of its launch
SMALL = Setting(
    batch_size=2,
    global_views=2,
    local_views=2,
    local_size=32,
    config={
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 64,
        "num_prototypes": 512,
        "decoder_num_hidden_layers": 1,
    },
)
GRADIENT_TOLERANCE = 1e-4
REQUIRED_SPEED = {"cpu": 1.3, "cuda": 2.0}
ALLOWED_MEMORY_TO_PLAIN = 0.4  # on an accelerator
ALLOWED_MEMORY = 3.4 * 2**10  # MiB, and
ALLOWED_TFLOP_AT_PRODUCT_RATE = 2.6  # on a CPU


def run(options: Options) -> list[Row]:
    setting = SMALL if options.quick else Setting() if options.on_cpu else Setting(batch_size=CUDA_BATCH_SIZE)
    progress("memory, in a fresh process for each variant")
    memory = {
        variant: in_fresh_process(measure_memory, setting, variant, options.device, environment=RETURN_FREED_MEMORY)
        for variant in variants_on(options.device)
    }
    step = PreTrainingStep(setting, options.device)
    config = step.model.config
    progress("gradients and operations")
    difference, operations = compare_gradients(step)
    progress("time, in turns")
    dtype = torch.bfloat16 if step.autocast else torch.float32
    rows_of_products = {} if options.on_cpu else {"rows": CUDA_PRODUCT_ROWS}
    products = matrix_products(options.device, dtype, config.hidden_size, **rows_of_products)
    variants = {**step.named(), **{name: product for name, (product, _) in products.items()}}
    timings = time_in_turns(variants, options.device, turns=3 if options.on_cpu else 9)
    rates = product_rates(timings, products)

    rows = []
    for variant in step.models:
        timing, (allocated, resident) = timings[variant], memory[variant]
        possible = [seconds * rate for seconds, rate in zip(timing.seconds, rates, strict=True)]
        rows.append(
            {
                "model": variant,
                "train_samples_per_sec": setting.batch_size / timing.median,
                "train_step_time": 1000 * timing.median,
                "train_step_time_spread": timing.spread,
                "train_batch_size": setting.batch_size,
                "train_img_size": config.image_size,
                "param_count": sum(weight.numel() for weight in step.model.parameters()) / 1e6,
                "train_tflop": operations.get(variant, operations["ours"]) / 1e12,
                "train_tflop_at_product_rate": statistics.median(possible) / 1e12,
                "product_gflop_per_sec": statistics.median(rates) / 1e9,
                "train_peak_memory": allocated / 2**20,
                "train_peak_resident": None if resident is None else resident / 2**20,
                "train_speed_to_plain": timings["plain"].ratio_to(timing),
                "train_memory_to_plain": allocated / memory["plain"][0],
                "train_gradient_difference": difference,
            }
        )
    return rows


def shortfalls(rows: list[Row]) -> list[str]:
    on_cpu = rows[0]["train_peak_resident"] is not None
    ours = next(row for row in rows if row["model"] == ("ours" if on_cpu else COMPILED))
    required = REQUIRED_SPEED["cpu" if on_cpu else "cuda"]
    limits = [("train_gradient_difference", GRADIENT_TOLERANCE)]
    if on_cpu:
        limits += [("train_tflop_at_product_rate", ALLOWED_TFLOP_AT_PRODUCT_RATE)]
        limits += [("train_peak_memory", ALLOWED_MEMORY), ("train_peak_resident", ALLOWED_MEMORY)]
    else:
        limits += [("train_memory_to_plain", ALLOWED_MEMORY_TO_PLAIN)]
    found = [f"{name} is {ours[name]:.3g}, over {limit:g}" for name, limit in limits if ours[name] > limit]
    if ours["train_speed_to_plain"] < required:
        found.append(f"train_speed_to_plain is {ours['train_speed_to_plain']:.3g}, under {required}")
    return found
