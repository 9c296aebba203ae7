# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Means over images and seeds, and differences from one step at equal PSNR with their standard errors."""

import math

import numpy as np

from ..harness import Row
from .decoding import ONE_STEP
from .measures import Measures

Means = dict[str, np.ndarray]  # of each measure, (W,) for W weightings of the images


def compare(test_set: str, of_seeds: list[dict[str, Measures]]) -> list[Row]:
    """A row of each variant; errors are those of the bootstrap over images."""
    num_images = len(of_seeds[0]["tokenizer alone"]["psnr"])
    means = [weighted_means(results, np.full((1, num_images), 1 / num_images)) for results in of_seeds]
    resampled = [weighted_means(results, bootstrap(num_images)) for results in of_seeds]
    rows = []
    for variant in means[0]:
        row: Row = {"model": f"{test_set}: {variant}"}
        for measure in ("psnr", "ssim", "distance", "sharpness", "codes_right"):
            mean = np.mean([of_seed[variant][measure] for of_seed in means]).item()
            row[measure] = None if math.isnan(mean) else mean  # a mean of codes is no code
        for measure in ("distance", "sharpness"):
            of_seed = [excess_at_equal_psnr(seed_means, variant, measure).item() for seed_means in means]
            samples = [excess_at_equal_psnr(seed_means, variant, measure) for seed_means in resampled]
            row[f"{measure}_at_equal_psnr"] = np.mean(of_seed).item()
            row[f"{measure}_at_equal_psnr_error"] = np.mean(samples, axis=0).std().item()
            row[f"{measure}_at_equal_psnr_of_seeds"] = " / ".join(f"{value:+.4f}" for value in of_seed)
        rows.append(row)
    return rows


def bootstrap(num_images: int, count: int = 500) -> np.ndarray:
    """Weights (count, num_images) of the images in samples with replacement; always the same."""
    return np.random.default_rng(0).multinomial(num_images, np.full(num_images, 1 / num_images), count) / num_images


def weighted_means(results: dict[str, Measures], weights: np.ndarray) -> dict[str, Means]:
    """Means (W,) of each measure for W weightings (W, B) of the images."""
    means = {
        variant: {metric: weights @ values.double().numpy() for metric, values in measured.items()}
        for variant, measured in results.items()
    }
    for of_variant in means.values():
        of_variant["sharpness"] = of_variant.pop("gradient") / of_variant.pop("original_gradient")
    return means


def excess_at_equal_psnr(means: dict[str, Means], variant: str, metric: str) -> np.ndarray:
    """
    The metric (W,) of a variant minus that of one step at the temperature that gives the same PSNR.

    One step is interpolated between the measured temperatures; beyond them, the last of them counts.
    """
    one_step = {name: np.stack([means[temperature][name] for temperature in ONE_STEP]) for name in ("psnr", metric)}
    order = one_step["psnr"].argsort(axis=0)
    known, values = (np.take_along_axis(one_step[name], order, axis=0) for name in ("psnr", metric))
    of_equal_psnr = [
        np.interp(*arguments) for arguments in zip(means[variant]["psnr"], known.T, values.T, strict=True)
    ]
    return means[variant][metric] - np.array(of_equal_psnr)
