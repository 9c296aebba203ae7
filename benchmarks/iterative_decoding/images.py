# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Scenes to train with, scenes and photographs to test with."""

import torch
from PIL import Image
from torch import Tensor

from stellar_hf.data import images_to_tensor, load_photo_mosaics, load_tabletop_scenes
from stellar_hf.data.photo_mosaics import photograph

IMAGE_SIZE = 32
PATCH_SIZE = 4
GRID = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)


def scenes(split: str, count: int, seed: int = 0) -> Tensor:
    """Images (count, 3, 32, 32) uint8 of photo mosaics."""
    return torch.stack(images_to_tensor(load_photo_mosaics(split, count, IMAGE_SIZE, seed=seed)["image"]))


def tabletop_scenes(split: str, count: int) -> Tensor:
    """Images (count, 3, 64, 64) uint8 as the demo model was trained on."""
    return torch.stack(images_to_tensor(load_tabletop_scenes(split, count)["image"]))


def photograph_tiles() -> Tensor:
    """scikit-learn's two photographs in tiles (B, 3, 32, 32) uint8, as detailed as the scenes."""
    tiles = []
    for name in ("china", "flower"):
        image = photograph(name)
        (pixels,) = images_to_tensor([image.resize((256, 160), Image.Resampling.BICUBIC)])
        rows = pixels.unfold(1, IMAGE_SIZE, IMAGE_SIZE).unfold(2, IMAGE_SIZE, IMAGE_SIZE)
        tiles.append(rows.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(tiles)
