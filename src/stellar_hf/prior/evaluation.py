# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Measures of generated images: what a classifier of real ones sees in them, and how near training images are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..evaluation import frechet_distance

if TYPE_CHECKING:
    from .modeling_token_prior import StellarTokenPrior

_NUM_CANDIDATES = 4  # of the nearest references, whose order rounding may change


class ImageClassifier(nn.Module):
    """
    A small convolutional network, the judge of generated images; [`train_classifier`] makes one.

    Args:
        num_classes: What it is asked, by name, such as how many objects there are; and the number of answers to each.
        width: Channels of its first layer.
    """

    def __init__(self, num_classes: Mapping[str, int], width: int = 16):
        super().__init__()
        self.num_classes = dict(num_classes)
        self.features = nn.Sequential(
            *_layer(3, width, stride=2),
            *_layer(width, 2 * width, stride=2),
            *_layer(2 * width, 4 * width, stride=2),
            *_layer(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(4 * width, sum(self.num_classes.values()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) floating point RGB in [0, 1] to logits (B, answers) of each question."""
        return self._answers(self.features(2 * images - 1))

    @torch.no_grad()
    def judge(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            images: (B, 3, H, W) floating point RGB in [0, 1].
            batch_size: Images of a forward pass.

        Returns:
            Features, (B, 4 * width) float32, and the probabilities of the answers to each question, (B, answers).
        """
        features = torch.cat([self.features(2 * batch - 1) for batch in images.split(batch_size)])
        return features, {name: logits.softmax(dim=-1) for name, logits in self._answers(features).items()}

    def _answers(self, features: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(features).split(list(self.num_classes.values()), dim=-1)
        return dict(zip(self.num_classes, logits, strict=True))


# As `format_results_table` takes them.
GENERATION_COLUMNS = (
    ("counted", ("counted", "%"), 100, 1),
    ("sure_of_shape", ("sure of", "shape, %"), 100, 1),
    ("sure_of_material", ("sure of", "material, %"), 100, 1),
    ("frechet_distance", ("Fréchet", "distance"), 1, 2),
    ("nearest_features", ("nearest", "features"), 1, 2),
    ("nearest_pixels", ("nearest", "pixels"), 1, 3),
)


class GenerationEvaluation:
    """
    Measures images of scenes by a classifier of real ones, against held-out real images and the training set.

    Args:
        classifier: Trained on real training images; it is asked for `"count"`, `"shape"` and `"material"`.
        train_images: Images that the generator was trained on, (n, 3, H, W) floating point RGB in [0, 1].
        test_images: Real images that it was not trained on, (m, 3, H, W), in the same range.
    """

    def __init__(self, classifier: ImageClassifier, train_images: Tensor, test_images: Tensor):
        self.classifier = classifier
        self._train_pixels = train_images.flatten(1)
        self._train_features, _ = classifier.judge(train_images)
        self._test_features, _ = classifier.judge(test_images)

    def measure(self, images: Tensor, counts: Tensor) -> dict[str, float]:
        """
        Args:
            images: (B, 3, H, W) floating point RGB in [0, 1].
            counts: (B,) classes of the number of objects that the images show, or were asked to show.

        Returns:
            `counted`, the share of images whose number of objects the classifier tells; `sure_of_shape` and
            `sure_of_material`, the mean probability that it gives to its answer, right or wrong: drawn images have no
            truth to compare with; `frechet_distance` of its features to those of the test images; and medians of the
            distance to the nearest training image: `nearest_features`, of the classifier's features, and
            `nearest_pixels`, the root of the mean squared difference of pixels.

        Raises:
            ValueError: If the images have another size than those of the training.
        """
        if images[0].numel() != self._train_pixels.shape[1]:
            raise ValueError(
                f"Images have shape {tuple(images.shape[1:])}, but those of the training had "
                f"{self._train_pixels.shape[1]} numbers: resize them to the same size."
            )
        features, answers = self.classifier.judge(images)
        nearest_pixels = nearest_distances(images.flatten(1), self._train_pixels) / images[0].numel() ** 0.5
        return {
            "counted": (answers["count"].argmax(dim=-1) == counts).float().mean().item(),
            "sure_of_shape": answers["shape"].amax(dim=-1).mean().item(),
            "sure_of_material": answers["material"].amax(dim=-1).mean().item(),
            "frechet_distance": frechet_distance(features, self._test_features),
            "nearest_features": nearest_distances(features, self._train_features).median().item(),
            "nearest_pixels": nearest_pixels.median().item(),
        }


def train_classifier(
    images: Tensor,
    labels: Mapping[str, Tensor],
    num_classes: Mapping[str, int],
    num_epochs: int = 6,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
    show_progress: bool = False,
) -> ImageClassifier:
    """
    Trains a classifier of small images, with AdamW on one cycle of the learning rate. Half of the images are mirrored.

    Args:
        images: (n, 3, H, W) floating point RGB in [0, 1].
        labels: The answers to each question, (n,) integers in [0, number of answers).
        num_classes: The number of answers to each question, by the same names.
        num_epochs: Passes over the images.
        batch_size: Images of a step.
        learning_rate: Its peak.
        seed: Of weights, order and mirrored images; nothing else in the process is drawn differently for it.
        show_progress: Whether to show a progress bar.

    Returns:
        The classifier, in evaluation mode, on the device of the images.

    Raises:
        ValueError: If questions or numbers of images and labels differ, or a label is out of range.
    """
    _check_labels(images, labels, num_classes)
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        model = ImageClassifier(num_classes).to(images.device)
        batches = [batch for _ in range(num_epochs) for batch in torch.randperm(len(images)).split(batch_size)]
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches))
        for batch in tqdm(batches, desc="classifier", leave=False, disable=not show_progress):
            answers = model(torch.cat([images[batch[::2]], images[batch[1::2]].flip(dims=(3,))]))
            batch = torch.cat([batch[::2], batch[1::2]])
            losses = [
                F.cross_entropy(answers[name], answer[batch], label_smoothing=0.1) for name, answer in labels.items()
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _check_labels(images: Tensor, labels: Mapping[str, Tensor], num_classes: Mapping[str, int]) -> None:
    if labels.keys() != num_classes.keys() or not labels:
        raise ValueError(f"There are labels of {list(labels)} and num_classes of {list(num_classes)}: pass the same.")
    for name, answers in labels.items():
        if len(images) != len(answers) or len(images) == 0:
            raise ValueError(
                f"There are {len(images)} images and {len(answers)} labels of {name}: one for each image is expected."
            )
        if answers.min() < 0 or answers.max() >= num_classes[name]:
            raise ValueError(
                f"Labels of {name} run from {answers.min()} to {answers.max()}, but must be in "
                f"[0, {num_classes[name]})."
            )


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


def draw_normal(
    prior: StellarTokenPrior,
    sparse_tokens: Tensor,
    localization: Tensor,
    labels: Tensor,
    wanted: Tensor,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """
    Draws without training: a normal distribution with the mean and covariance that the latents of each class have.

    Args:
        prior: Makes latents of S and L, and S and L of latents; nothing of what it learned is used.
        sparse_tokens: S of the training set, (n, r, d).
        localization: Its L, (n, N, r).
        labels: Its classes, (n,) integers; of each class that is wanted two images at least.
        wanted: (B,) classes to draw.
        seed: Of the draws; nothing else in the process is drawn differently for it.

    Returns:
        S, (B, r, d), and L, (B, N, r).
    """
    latents = prior.pack(sparse_tokens, localization)
    noise = torch.randn(len(wanted), len(latents), generator=torch.Generator().manual_seed(seed)).to(latents)
    drawn = latents.new_empty(len(wanted), latents.shape[1])
    for label in wanted.unique():
        members, rows = latents[labels == label], wanted == label
        # Sums of deviations with independent weights have their covariance.
        weights = noise[rows, : len(members)] / (len(members) - 1) ** 0.5
        drawn[rows] = members.mean(dim=0) + weights @ (members - members.mean(dim=0))
    return prior.unpack(drawn)


def other_scenes(labels: Tensor) -> Tensor:
    """For each image, with its class (n,), the next one (n,) of that class, and the first one for the last."""
    others = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        others[rows] = rows.roll(-1)
    return others


def _layer(in_channels: int, out_channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()
