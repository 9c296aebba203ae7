# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A distance of images as LPIPS has it, by a small classifier of photographs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_hf.data import PHOTOGRAPH_NAMES, images_to_tensor, load_photo_mosaics

from .descent import Sizes, descent_of, training_batches
from .images import IMAGE_SIZE


class PerceptualNetwork(nn.Module):
    """A small classifier of photographs, whose features compare images as LPIPS does, without learned weights."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, outer, kernel_size=3, padding=1, stride=1 if inner == 3 else 2),
                nn.BatchNorm2d(outer),
                nn.ReLU(),
                nn.Conv2d(outer, outer, kernel_size=3, padding=1),
                nn.BatchNorm2d(outer),
                nn.ReLU(),
            )
            for inner, outer in zip(widths[:-1], widths[1:], strict=True)
        )
        self.classifier = nn.Linear(widths[-1], len(PHOTOGRAPH_NAMES))

    def features(self, images: Tensor) -> list[Tensor]:
        features = [2 * images - 1]
        for block in self.blocks:
            features.append(block(features[-1]))
        return features[1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images)[-1].mean(dim=(2, 3)))

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """(B,): squared distance of features of unit length, mean over positions, summed over the blocks."""
        pairs = zip(self.features(images), self.features(others), strict=True)
        return sum((F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in pairs)


def trained_perceptual_network(sizes: Sizes, device: str) -> PerceptualNetwork:
    torch.manual_seed(0)
    network = PerceptualNetwork().to(device)
    crops = load_photo_mosaics("train", sizes.train_scenes, IMAGE_SIZE, num_regions=1)
    images = torch.stack(images_to_tensor(crops["image"])).to(device)
    labels = torch.tensor(crops["label"], device=device)
    descend = descent_of(network, sizes.perceptual_steps, learning_rate=3e-3)
    for batch in training_batches(len(images), sizes.batch_size, sizes.perceptual_steps):
        descend(F.cross_entropy(network(images[batch].float() / 255), labels[batch]))
    return network.eval().requires_grad_(False)
