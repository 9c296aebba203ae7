# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Images a second of features from JPEGs, end to end, beside those of the bare model on tensors that are ready.

ViT-B/16 with random weights and JPEGs of ImageNet's mean size: `encode_images` reads, processes, encodes and collects
S, L and their mean. On an accelerator images are read by as many workers as there are cores, whose start counts.
"""

import os
import tempfile
from collections.abc import Callable

import torch

from stellar_hf import StellarConfig, StellarModel
from stellar_hf.features import encode_images, load_processor
from stellar_hf.image_processing_pil_stellar import image_processor_of

from .harness import Options, Row, progress, time_in_turns
from .images import jpeg_rows

BATCH_SIZE, NUM_IMAGES = 8, 16
CUDA_BATCH_SIZE, CUDA_NUM_IMAGES = 128, 4096
SMALL = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}
END_TO_END = "encode_images"
REQUIRED_SPEED_TO_MODEL = 0.9


def run(options: Options) -> list[Row]:
    rows = []
    for dtype in (torch.float32,) if options.on_cpu else (torch.float32, torch.bfloat16):
        model = StellarModel(StellarConfig(**(SMALL if options.quick else {}))).eval().to(options.device, dtype)
        rows += measure(model, options)
    return rows


def shortfalls(rows: list[Row]) -> list[str]:
    return [
        f"{row['model']}, {row['dtype']}: {row['infer_speed_to_model']:.3f} of the bare model's images/s, "
        f"not {REQUIRED_SPEED_TO_MODEL}"
        for row in rows
        if row["model"] == END_TO_END and row["infer_speed_to_model"] < REQUIRED_SPEED_TO_MODEL
    ]


def measure(model: StellarModel, options: Options) -> list[Row]:
    batch_size, num_images = (BATCH_SIZE, NUM_IMAGES) if options.on_cpu else (CUDA_BATCH_SIZE, CUDA_NUM_IMAGES)
    if options.quick:
        batch_size, num_images = 4, 8
    images = jpeg_rows(num_images)
    processor = processor_for(model)
    num_workers = 0 if options.on_cpu else os.cpu_count() or 1
    ready = torch.randn(batch_size, 3, 224, 224, device=options.device, dtype=model.dtype)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(num_images // batch_size):
            model(ready)

    def end_to_end() -> None:
        encode_images(model, images, processor, batch_size=batch_size, num_workers=num_workers, show_progress=False)

    progress(f"{num_images} images, {model.dtype}, {num_workers} workers")
    variants = {"the bare model": bare, END_TO_END: end_to_end}
    timings = time_in_turns(variants, options.device, turns=1 if options.quick else 3)
    return [
        {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "infer_samples_per_sec": num_images / timing.median,
            "infer_step_time": 1000 * timing.median * batch_size / num_images,
            "infer_step_time_spread": timing.spread,
            "infer_batch_size": batch_size,
            "infer_img_size": 224,
            "num_images": num_images,
            "num_workers": num_workers,
            "infer_speed_to_model": timings["the bare model"].ratio_to(timing),
        }
        for name, timing in timings.items()
    ]


def processor_for(model: StellarModel) -> Callable:
    """Saved and loaded, as users get it: that of torchvision where it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        image_processor_of(model.config).save_pretrained(folder)
        return load_processor(folder)
