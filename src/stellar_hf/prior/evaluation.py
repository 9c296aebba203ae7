# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Measures of generated images: what a classifier of real ones sees in them, and how near training images are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

_NUM_CANDIDATES = 4  # of the nearest references, whose order rounding may change


class ImageClassifier(nn.Module):
    """
    A small convolutional network, the judge of generated images; [`train_classifier`] makes one.

    Args:
        num_classes: Number of classes.
        width: Channels of its first layer.
    """

    def __init__(self, num_classes: int, width: int = 24):
        super().__init__()
        self.features = nn.Sequential(
            *_layer(3, width, stride=2),
            *_layer(width, 2 * width),
            *_layer(2 * width, 4 * width, stride=2),
            *_layer(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) floating point RGB in [0, 1] to logits (B, num_classes)."""
        return self.classifier(self.features(2 * images - 1))

    @torch.no_grad()
    def judge(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: (B, 3, H, W) floating point RGB in [0, 1].
            batch_size: Images of a forward pass.

        Returns:
            Features, (B, 4 * width) float32, and the likeliest classes, (B,) int64.
        """
        features = torch.cat([self.features(2 * batch - 1) for batch in images.split(batch_size)])
        return features, self.classifier(features).argmax(dim=-1)


# As `format_results_table` takes them.
GENERATION_COLUMNS = (
    ("named", ("named", "%"), 100, 1),
    ("frechet_distance", ("Fréchet", "distance"), 1, 2),
    ("nearest_features", ("nearest", "features"), 1, 2),
    ("nearest_pixels", ("nearest", "pixels"), 1, 3),
)


class GenerationEvaluation:
    """
    Measures images by a classifier of real ones, against held-out real images and the training set.

    Args:
        classifier: Trained on real training images.
        train_images: Images that the generator was trained on, (n, 3, H, W) floating point RGB in [0, 1].
        test_images: Real images that it was not trained on, (m, 3, H, W), in the same range.
    """

    def __init__(self, classifier: ImageClassifier, train_images: Tensor, test_images: Tensor):
        self.classifier = classifier
        self._train_pixels = train_images.flatten(1)
        self._train_features, _ = classifier.judge(train_images)
        self._test_features, _ = classifier.judge(test_images)

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """
        Args:
            images: (B, 3, H, W) floating point RGB in [0, 1].
            labels: (B,) classes that the images show, or were asked to show.

        Returns:
            `named`, the share of images whose class the classifier names; `frechet_distance` of its features to those
            of the test images; and medians of the distance to the nearest training image: `nearest_features`, of the
            classifier's features, and `nearest_pixels`, the root of the mean squared difference of pixels.

        Raises:
            ValueError: If the images have another size than those of the training.
        """
        if images[0].numel() != self._train_pixels.shape[1]:
            raise ValueError(
                f"Images have shape {tuple(images.shape[1:])}, but those of the training had "
                f"{self._train_pixels.shape[1]} numbers: resize them to the same size."
            )
        features, named = self.classifier.judge(images)
        nearest_pixels = nearest_distances(images.flatten(1), self._train_pixels) / images[0].numel() ** 0.5
        return {
            "named": (named == labels).float().mean().item(),
            "frechet_distance": frechet_distance(features, self._test_features),
            "nearest_features": nearest_distances(features, self._train_features).median().item(),
            "nearest_pixels": nearest_pixels.median().item(),
        }


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    num_epochs: int = 6,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
    show_progress: bool = False,
) -> ImageClassifier:
    """
    Trains a classifier of small real images, with AdamW on one cycle of the learning rate.

    Args:
        images: (n, 3, H, W) floating point RGB in [0, 1].
        labels: (n,) integers in [0, num_classes).
        num_classes: Number of classes.
        num_epochs: Passes over the images.
        batch_size: Images of a step.
        learning_rate: Its peak.
        seed: Of weights and order; nothing else in the process is drawn differently for it.
        show_progress: Whether to show a progress bar.

    Returns:
        The classifier, in evaluation mode, on the device of the images.

    Raises:
        ValueError: If numbers of images and labels differ, or a label is out of range.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"There are {len(images)} images and {len(labels)} labels: one for each image is expected.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but must be in [0, {num_classes}).")
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        model = ImageClassifier(num_classes).to(images.device)
        batches = [batch for _ in range(num_epochs) for batch in torch.randperm(len(images)).split(batch_size)]
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches))
        for batch in tqdm(batches, desc="classifier", leave=False, disable=not show_progress):
            loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def frechet_distance(features: Tensor, other_features: Tensor) -> float:
    """
    Fréchet distance of two sets of features, as if both were normally distributed (Heusel et al., arXiv 1706.08500).

    Args:
        features: (n, d) floating point, n >= 2.
        other_features: (m, d), of other images.

    Returns:
        `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, at least 0, computed in float64.

    Raises:
        ValueError: If shapes disagree, or there are fewer than two rows.
    """
    if features.ndim != 2 or other_features.ndim != 2 or features.shape[1] != other_features.shape[1]:
        raise ValueError(
            f"The features have shapes {tuple(features.shape)} and {tuple(other_features.shape)}, but both must be "
            "(rows, features) with as many features."
        )
    if min(len(features), len(other_features)) < 2:
        raise ValueError("A covariance needs two rows of features at least.")
    features, other_features = features.double(), other_features.double()
    covariance, other_covariance = features.T.cov(), other_features.T.cov()
    # C1 C2 has the eigenvalues of C1^(1/2) C2 C1^(1/2), which are real and not negative but for rounding.
    eigenvalues = torch.linalg.eigvals(covariance @ other_covariance).real.clamp_min(0)
    means = (features.mean(dim=0) - other_features.mean(dim=0)).square().sum()
    traces = covariance.trace() + other_covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return max((means + traces).item(), 0.0)


def nearest_distances(features: Tensor, references: Tensor, chunk_size: int = 256) -> Tensor:
    """
    Euclidean distance of each row to the nearest reference: 0 for copies of references.

    Matrix products find candidates, twenty times as fast as differences, but lose half of the digits; the distances
    to these are differences.

    Args:
        features: (n, d) floating point.
        references: (m, d) floating point.
        chunk_size: Rows compared at once; bounds the memory at `chunk_size * m` distances.

    Returns:
        (n,) distances.
    """
    distances = []
    for chunk in features.split(chunk_size):
        nearest = torch.cdist(chunk, references).topk(min(_NUM_CANDIDATES, len(references)), largest=False).indices
        distances.append((chunk.unsqueeze(1) - references[nearest]).norm(dim=2).amin(dim=1))
    return torch.cat(distances)


def _layer(in_channels: int, out_channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()
