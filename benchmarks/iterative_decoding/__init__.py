# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Quality of decoding codes in several steps, MaskGIT-fashion and as `StellarPipeline` does, beside one step.

For each seed a small MaskGIT-VQ tokenizer and a small STELLAR of its codes are trained on photo mosaics. Then test
scenes and tiles of two photographs are decoded: in one step at several temperatures, and over a cosine schedule that
keeps the most confident codes and samples the others again. STELLAR's decoder sees Z = L S and no codes, so what has
been decided can only come back to it as an image that is encoded once more.
"""

from transformers.utils import logging

from ..harness import Options, Row, is_installed, progress

PACKAGES = ("datasets", "diffusers", "skimage", "sklearn")


def run(options: Options) -> list[Row]:
    if not all([is_installed(package) for package in PACKAGES]):
        return []
    from .comparison import compare
    from .demo import measure_demo
    from .descent import SMALL, Sizes
    from .images import photograph_tiles, scenes, tabletop_scenes
    from .measures import measure_variants
    from .models import trained_models
    from .perceptual import trained_perceptual_network

    logging.set_verbosity_error()  # no report on the layers of the demo model that are made anew
    logging.disable_progress_bar()
    sizes, device = SMALL if options.quick else Sizes(), options.device
    progress("a classifier of photographs, for the distance of images")
    perceptual = trained_perceptual_network(sizes, device)
    rows = measure_demo(perceptual, tabletop_scenes("test", 2 * sizes.test_scenes).to(device))
    measured: dict[str, list] = {"photo mosaics": [], "photographs": []}
    for seed in range(sizes.seeds):
        progress(f"seed {seed}: tokenizer and STELLAR")
        models = trained_models(seed, sizes, device)
        test_sets = {
            "photo mosaics": scenes("test", sizes.test_scenes, seed=seed),
            "photographs": photograph_tiles()[: sizes.test_scenes],
        }
        for name, images in test_sets.items():
            progress(f"seed {seed}: decoding of {name}")
            measured[name].append(measure_variants(models, perceptual, images.to(device), seed))
    for name, of_seeds in measured.items():
        rows += compare(name, of_seeds)
    return rows
