# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A model that fits a person's images and machine, where nothing else is asked for."""

import os
from typing import Any

import datasets
import numpy as np

from .. import StellarTrainingArguments
from ..data import images_to_tensor, undecoded

NUM_LOOKED_AT = 32


def fit_to_images(
    model_config: dict[str, Any],
    images: datasets.Dataset | datasets.IterableDataset,
    training_args: StellarTrainingArguments,
) -> dict[str, Any]:
    """
    Halves the model's images, and its patches with them, until they are no larger than most of the images given; and
    says in two lines what was chosen, and how to choose otherwise.

    Args:
        model_config: Fields of `StellarConfig` for this machine, with `image_size` and `patch_size`.
        images: To train on; some of them are looked at.
        training_args: Of the training.

    Returns:
        The fields, with the sizes that fit.

    Raises:
        ValueError: If none of the images that are looked at can be read.
    """
    sides = short_sides(images, training_args.image_column)
    median = int(np.median(sides))
    size, patch_size = model_config["image_size"], model_config["patch_size"]
    while size > median and size > 32 and patch_size % 2 == 0:
        size, patch_size = size // 2, patch_size // 2
    if int(os.environ.get("RANK", 0)) == 0:
        machine = f"a {training_args.device.type.upper()}" if training_args.device.type == "cpu" else "a GPU"
        length = f"{training_args.max_steps:,} steps" if training_args.max_steps > 0 else "its epochs"
        print(
            f"Chosen for {machine} and images of about {median} pixels (short side, {len(sides)} looked at): a small "
            f"model of {size}x{size} pixels with patches of {patch_size}, {length} of "
            f"{training_args.train_batch_size} images.\n"
            "To choose otherwise, name a recipe and change it: stellar-hf pretrain own_images --model_config "
            f"'{{\"image_size\": {2 * size}}}' --max_steps 5000 …, or take one of examples/recipes/."
        )
    return {**model_config, "image_size": size, "patch_size": patch_size}


def short_sides(images: datasets.Dataset | datasets.IterableDataset, image_column: str) -> list[int]:
    """
    Short sides in pixels of some of the images: a random sample, or the first ones of a stream.

    Raises:
        ValueError: If none of these can be read.
    """
    if isinstance(images, datasets.IterableDataset):
        sample = images.take(NUM_LOOKED_AT)
    else:
        rows = np.random.default_rng(0).permutation(len(images))[:NUM_LOOKED_AT]
        sample = images.select(rows)
    sides, error = [], None
    for row in undecoded(sample, image_column):
        try:
            sides.append(min(images_to_tensor([row[image_column]])[0].shape[1:]))
        except ValueError as broken:  # the training names it
            error = broken
    if not sides:
        raise ValueError(f"None of {NUM_LOOKED_AT} images that were looked at can be read: {error}")
    return sides
