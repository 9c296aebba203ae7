# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The pipeline's steps with the demo model, which reconstructs pixels."""

import math

import torch
from torch import Tensor

import stellar_hf
from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline

from ..harness import Row
from .measures import measures
from .perceptual import PerceptualNetwork


def measure_demo(perceptual: PerceptualNetwork, images: Tensor) -> list[Row]:
    """Means for images (B, 3, H, W) uint8, and differences from one step with their standard errors."""
    pipe = StellarPipeline(
        StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
        StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
    ).to(images.device)
    pipe.set_progress_bar_config(disable=True)
    originals = images.float() / 255
    measured = []
    for steps in (1, 2, 4):
        batches = originals.cpu().split(128)
        decoded = [pipe(image=batch, num_inference_steps=steps, output_type="pt").images for batch in batches]
        measured.append((steps, measures(perceptual, torch.cat(decoded), originals)))
    rows = []
    for steps, values in measured:
        row: Row = {"model": f"demo model, tabletop scenes: {steps} steps"}
        row |= {name: values[name].mean().item() for name in ("psnr", "ssim", "distance")}
        row["sharpness"] = (values["gradient"].mean() / values["original_gradient"].mean()).item()
        for name in ("psnr", "distance"):
            difference = values[name] - measured[0][1][name]
            row[f"{name}_to_one_step"] = difference.mean().item()
            row[f"{name}_to_one_step_error"] = (difference.std() / math.sqrt(len(images))).item()
        rows.append(row)
    return rows
