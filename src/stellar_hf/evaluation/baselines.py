# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Training-free baselines, which take the place of a model: a result below one of them shows no learning.

    baseline = KMeansSegments(num_segments=6)
    encode_images(baseline, dataset, processor)

A baseline is called as a model is and gives what a model gives, as far as it has it. What is measured of a model is so
measured of a baseline, by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.checks import check_integer
from .clustering import kmeans, nearest_centers
from .objects import pooled_features

_SEGMENT_BINS = 4  # of each colour channel: 64 colours describe a segment
_IMAGE_BINS = 5  # 125 colours describe an image
_ORIENTATIONS = 7
_MAGNITUDE_EDGES = (0.01, 0.03, 0.07, 0.15)  # gray levels in [0, 1] for a pixel; five bins
_GRADIENT_SCALES = (1, 2, 4)  # pixels that are averaged before gradients are taken


class TrainingFreeEncoder(nn.Module):
    """What takes the place of a model in [`encode_images`]: no weights, and the same for each image whatever is beside
    it.

    Args:
        image_mean: Mean of each channel with which the image processor normalizes, so that colours can be told again.
            By default pixel values are RGB in [0, 1] already.
        image_std: The standard deviations that the pixels were divided by.
    """

    dtype = torch.float32
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, image_mean: Sequence[float] = (0, 0, 0), image_std: Sequence[float] = (1, 1, 1)):
        super().__init__()
        self.register_buffer("image_mean", torch.tensor(image_mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("image_std", torch.tensor(image_std, dtype=torch.float32).view(3, 1, 1))

    @property
    def device(self) -> torch.device:
        return self.image_mean.device

    @property
    def base_model(self) -> TrainingFreeEncoder:
        return self

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """
        Args:
            pixel_values: (B, 3, H, W) float32, normalized.

        Returns:
            Tensors by name, with a row for each image.
        """
        return self.describe((pixel_values.float() * self.image_std + self.image_mean).clamp(0, 1))

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        """What `forward` gives, of RGB (B, 3, H, W) float32 in [0, 1]."""
        raise NotImplementedError


class RawPixels(TrainingFreeEncoder):
    """The pixels themselves, less middle gray: `pooler_output` (B, 3 * H * W)."""

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        return {"pooler_output": images.flatten(1) - 0.5}


class ColourGradientHistogram(TrainingFreeEncoder):
    """What colours and gradients an image has, and not where: `pooler_output` (B, 230).

    125 numbers are shares of joint colours, 5 levels a channel. The other 105 are shares of gradients of gray, by 7
    orientations (without sign) and 5 magnitudes, of the image and of its means of 2x2 and of 4x4 pixels. The square
    roots of all shares are taken, so that their cosine is the Bhattacharyya coefficient of the histograms.
    """

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        everything = torch.zeros(len(images), images[0, 0].numel(), dtype=torch.int64, device=images.device)
        histograms = [_shares(_colours(images, _IMAGE_BINS), everything, _IMAGE_BINS**3, 1)]
        gray = images.mean(dim=1, keepdim=True)
        for scale in _GRADIENT_SCALES:
            bins = _gradients(F.avg_pool2d(gray, scale))
            num_bins = _ORIENTATIONS * (len(_MAGNITUDE_EDGES) + 1)
            histograms.append(_shares(bins, everything[:, : bins.shape[1]], num_bins, 1))
        return {"pooler_output": torch.cat(histograms, dim=2).squeeze(1).sqrt()}


class KMeansSegments(TrainingFreeEncoder):
    """k-means of each image's pixels by colour and position; each segment is described by its colours alone.

    Clusters are found among every second pixel of every second row, and all pixels then given to them.

    It gives `sparse_tokens` (B, k, 64), the square roots of the shares of 4 levels a channel in each segment;
    `localization` (B, H * W, k) float16 of 0 and 1, on the grid of pixels; `grid_size` (B, 2), which is (H, W); and
    `pooler_output` (B, 64), the mean of the tokens.

    Args:
        num_segments: k, the segments of an image.
        image_mean: As in [`TrainingFreeEncoder`].
        image_std: The standard deviations that the pixels were divided by.
    """

    def __init__(
        self,
        num_segments: int,
        image_mean: Sequence[float] = (0, 0, 0),
        image_std: Sequence[float] = (1, 1, 1),
    ):
        check_integer("num_segments", num_segments)
        super().__init__(image_mean, image_std)
        self.num_segments = num_segments

    def describe(self, images: Tensor) -> dict[str, Tensor]:
        points = _colours_and_places(images)  # (B, H, W, 5)
        centers = kmeans(points[:, ::2, ::2].flatten(1, 2), self.num_segments).centers
        segments = nearest_centers(points.flatten(1, 2), centers)
        tokens = _shares(_colours(images, _SEGMENT_BINS), segments, _SEGMENT_BINS**3, self.num_segments).sqrt()
        return {
            "pooler_output": tokens.mean(dim=1),
            "sparse_tokens": tokens,
            "localization": F.one_hot(segments, self.num_segments).half(),
            "grid_size": torch.tensor(images.shape[2:], device=images.device).repeat(len(images), 1),
        }


BASELINES: dict[str, Callable[..., TrainingFreeEncoder]] = {
    "raw pixels": RawPixels,
    "colour + gradient histogram": ColourGradientHistogram,
}
"""What describes images as a whole, by the name of its row in a table. [`KMeansSegments`] describes segments, too."""


def uniform_localization(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features of a model that does not know where anything is: each patch belongs to all tokens alike.

    Args:
        features: Tensors by name, with `localization` (M, N, r).

    Returns:
        The same with a localization of 1 / r.
    """
    localization = features["localization"]
    return {**features, "localization": torch.full_like(localization, 1 / localization.shape[-1])}


def pooled_tokens(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features of a model whose tokens are replaced by the mean of the dense features under their maps (L^T D).

    Args:
        features: Tensors by name, with `localization` (M, N, r) and `dense_features` (M, N, d).

    Returns:
        The same with `sparse_tokens` (M, r, d) and `pooler_output` (M, d) of them.
    """
    tokens = pooled_features(features["localization"], features["dense_features"])
    return {**features, "sparse_tokens": tokens, "pooler_output": tokens.mean(dim=1)}


def _colours_and_places(images: Tensor) -> Tensor:
    """(B, H, W, 5): RGB, and x and y in [0, 1] along the longer side."""
    height, width = images.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = (torch.stack([x, y]) / max(height, width)).to(images)
    return torch.cat([images, places.expand(len(images), -1, -1, -1)], dim=1).permute(0, 2, 3, 1)


def _colours(images: Tensor, num_levels: int) -> Tensor:
    """(B, H * W) int64, the number of each pixel's colour among `num_levels` levels a channel."""
    levels = (images * num_levels).long().clamp(max=num_levels - 1)
    red, green, blue = levels.flatten(2).unbind(1)
    return (red * num_levels + green) * num_levels + blue


def _gradients(gray: Tensor) -> Tensor:
    """(B, H * W) int64, the number of each pixel's gradient by magnitude and orientation."""
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate").squeeze(1)
    dx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    dy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    magnitude = torch.bucketize(torch.hypot(dx, dy), gray.new_tensor(_MAGNITUDE_EDGES))
    turn = torch.atan2(dy, dx) / math.pi % 1
    orientation = (turn * _ORIENTATIONS).long().clamp(max=_ORIENTATIONS - 1)
    return (magnitude * _ORIENTATIONS + orientation).flatten(1)


def _shares(bins: Tensor, segments: Tensor, num_bins: int, num_segments: int) -> Tensor:
    """(B, segments, bins) float32: histograms of each segment's pixels, which sum to 1; 0 of a segment without any."""
    image = torch.arange(len(bins), device=bins.device).unsqueeze(1)
    cell = (image * num_segments + segments) * num_bins + bins
    counts = torch.bincount(cell.flatten(), minlength=len(bins) * num_segments * num_bins)
    counts = counts.view(len(bins), num_segments, num_bins).float()
    return counts / counts.sum(dim=2, keepdim=True).clamp(min=1)
