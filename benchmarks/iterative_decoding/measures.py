# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What is measured of decoded images."""

import math

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from stellar_hf.evaluation import psnr

from .decoding import variants
from .models import Models
from .perceptual import PerceptualNetwork

Measures = dict[str, Tensor]  # values (B,) on the CPU, one for each image, by name


@torch.no_grad()
def measure_variants(models: Models, perceptual: PerceptualNetwork, images: Tensor, seed: int) -> dict[str, Measures]:
    """Measures of the images (B, 3, H, W) uint8 under each variant."""
    batches = (images.float() / 255).split(128)
    encoded = [models.encode(batch) for batch in batches]
    true_codes = [models.tokenizer.encode(batch).codes for batch in batches]
    results = {}
    for name, decode in variants().items():
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for batch, first, truth in zip(batches, encoded, true_codes, strict=True):
            decoded, codes = decode(models, first, truth, generator)
            right = torch.full((len(batch),), math.nan) if codes is None else (codes == truth).float().mean(1).cpu()
            parts.append(measures(perceptual, decoded, batch) | {"codes_right": right})
        results[name] = {measure: torch.cat([part[measure] for part in parts]) for measure in parts[0]}
    return results


def measures(perceptual: PerceptualNetwork, images: Tensor, originals: Tensor) -> Measures:
    similarities = [
        structural_similarity(image.numpy(), original.numpy(), channel_axis=0, data_range=1)
        for image, original in zip(images.cpu(), originals.cpu(), strict=True)
    ]
    return {
        "psnr": psnr(images, originals).cpu(),
        "ssim": torch.tensor(similarities),
        "distance": perceptual.distance(images, originals).cpu(),
        "gradient": gradient_magnitude(images).cpu(),
        "original_gradient": gradient_magnitude(originals).cpu(),
    }


def gradient_magnitude(images: Tensor) -> Tensor:
    """(B,): the mean length of the brightness gradient."""
    brightness = images.mean(dim=1)
    down, right = brightness[:, 1:, :-1] - brightness[:, :-1, :-1], brightness[:, :-1, 1:] - brightness[:, :-1, :-1]
    return (down.square() + right.square()).sqrt().mean(dim=(1, 2))
