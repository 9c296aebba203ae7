# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Clusters of the pixels or patches of each image: k-means and average linkage, of many images at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.checks import check_integer, check_tensors


@dataclass
class Clusters:
    """k clusters of each of B sets of n points.

    Attributes:
        labels: (B, n) int64, the cluster of each point.
        centers: (B, k, d) float32.
        inertia: (B,) float32, the sum of the squared distances of points to their centers.
    """

    labels: Tensor
    centers: Tensor
    inertia: Tensor


def kmeans(
    points: Tensor, num_clusters: int, num_restarts: int = 5, max_iterations: int = 50, seed: int = 0
) -> Clusters:
    """Lloyd's k-means of each set of points by itself, from centers of k-means++ (Arthur and Vassilvitskii, 2007).

    The same random numbers serve every set: its clusters do not depend on the sets beside it. A cluster that loses all
    of its points keeps its center.

    Args:
        points: (B, n, d) floating point.
        num_clusters: k, at most n.
        num_restarts: Starts, of which the one of least inertia counts.
        max_iterations: Moves of the centers; it stops earlier once no point changes its cluster.
        seed: Seed of the draws.

    Returns:
        The clusters.

    Raises:
        ValueError: If points have another shape or are not finite, or a number is impossible.
    """
    check_tensors(points=points)
    check_integer("num_clusters", num_clusters)
    check_integer("num_restarts", num_restarts)
    check_integer("max_iterations", max_iterations)
    if points.ndim != 3 or not points.is_floating_point() or points.numel() == 0:
        raise ValueError(
            f"points are {points.dtype} of shape {tuple(points.shape)}, but (B, n, d) floats are expected."
        )
    if num_clusters > points.shape[1]:
        raise ValueError(f"num_clusters is {num_clusters} with {points.shape[1]} points: choose fewer clusters.")
    if not torch.isfinite(points).all():
        raise ValueError("points hold NaN or infinite values: check what they were computed from.")
    mean = points.float().mean(dim=1, keepdim=True)  # distances lose digits far from zero
    columns = (points - mean).transpose(1, 2).contiguous()
    draws = torch.rand(num_restarts, num_clusters, generator=torch.Generator().manual_seed(seed)).to(points.device)
    best = _lloyd(columns, _spread_centers(columns, draws[0]), max_iterations)
    for restart in draws[1:]:
        best = _better(best, _lloyd(columns, _spread_centers(columns, restart), max_iterations))
    return Clusters(best.labels, best.centers + mean, best.inertia)


def average_linkage(distances: Tensor, num_clusters: int) -> Tensor:
    """Agglomerative clusters: again and again the two of least mean distance between their members become one.

    Args:
        distances: (B, n, n) floating point, symmetric.
        num_clusters: Clusters to stop at, at most n.

    Returns:
        (B, n) int64, the cluster of each member, from 0 to `num_clusters - 1`, in the order of their first members.

    Raises:
        ValueError: If distances have another shape, or there are fewer members than clusters.
    """
    check_tensors(distances=distances)
    check_integer("num_clusters", num_clusters)
    if distances.ndim != 3 or distances.shape[1] != distances.shape[2]:
        raise ValueError(f"distances have shape {tuple(distances.shape)}, but (B, n, n) is expected.")
    batch_size, num_members, _ = distances.shape
    if num_clusters > num_members:
        raise ValueError(f"num_clusters is {num_clusters} with {num_members} members: choose fewer clusters.")
    distances = distances.double().clone()
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    sizes = distances.new_ones(batch_size, num_members)
    labels = torch.arange(num_members, device=distances.device).repeat(batch_size, 1)
    rows = torch.arange(batch_size, device=distances.device)
    for _ in range(num_members - num_clusters):
        nearest = distances.flatten(1).argmin(dim=1)
        # The first of two equal entries of a symmetric matrix lies above its diagonal.
        kept, merged = nearest // num_members, nearest % num_members
        share = (sizes[rows, kept] / (sizes[rows, kept] + sizes[rows, merged])).unsqueeze(1)
        mean = share * distances[rows, kept] + (1 - share) * distances[rows, merged]
        distances[rows, kept], distances[rows, :, kept] = mean, mean
        distances[rows, merged], distances[rows, :, merged] = torch.inf, torch.inf
        distances[rows, kept, kept] = torch.inf
        sizes[rows, kept] += sizes[rows, merged]
        labels = torch.where(labels == merged.unsqueeze(1), kept.unsqueeze(1), labels)
    is_used = F.one_hot(labels, num_members).any(dim=1)
    return (is_used.cumsum(dim=1) - 1).gather(1, labels)


def nearest_centers(points: Tensor, centers: Tensor) -> Tensor:
    """The center that is nearest to each point, the first of several.

    Args:
        points: (B, n, d) floating point.
        centers: (B, k, d) of the same type.

    Returns:
        (B, n) int64.
    """
    return _first_member(_members(points.transpose(1, 2), centers))


# Points are held as (B, d, n) from here on: with the many points innermost, each step takes a fraction of the time.


def _spread_centers(points: Tensor, draws: Tensor) -> Tensor:
    """(B, k, d): each next center is a point, drawn in proportion to its squared distance to those before it."""
    image = torch.arange(len(points), device=points.device)
    distances = torch.ones_like(points[:, 0])
    centers: list[Tensor] = []
    for draw in draws:
        mass = distances.double().cumsum(dim=1)
        # Where all points are centers already, any of them will do.
        chosen = torch.searchsorted(mass, draw * mass[:, -1:], right=True).clamp(max=points.shape[2] - 1)
        center = points[image, :, chosen.squeeze(1)]
        to_center = (points - center.unsqueeze(2)).square().sum(dim=1)
        distances = torch.minimum(distances, to_center) if centers else to_center
        centers.append(center)
    return torch.stack(centers, dim=1)


def _lloyd(points: Tensor, centers: Tensor, max_iterations: int) -> Clusters:
    """Moves centers until they stand. Sets that are done are left alone, so that the others take less time."""
    moving = torch.arange(len(points), device=points.device)
    moving_points, moving_centers = points, centers.clone()
    for _ in range(max_iterations):
        moved = _means(moving_points, moving_centers)
        has_moved = (moved != moving_centers).flatten(1).any(dim=1)
        centers[moving] = moved
        if not has_moved.any():
            break
        moving, moving_points, moving_centers = moving[has_moved], moving_points[has_moved], moved[has_moved]
    labels = _first_member(_members(points, centers))
    own_centers = centers.transpose(1, 2).gather(2, labels.unsqueeze(1).expand_as(points))
    return Clusters(labels, centers, (points - own_centers).square().sum(dim=(1, 2)))


def _means(points: Tensor, centers: Tensor) -> Tensor:
    """(B, k, d) the mean of the points that are nearest to each center; the center itself where there are none."""
    members = _members(points, centers)
    counts = members.sum(dim=2, keepdim=True)
    means = torch.bmm(members, points.transpose(1, 2)) / counts.clamp(min=1)
    return torch.where(counts > 0, means, centers)


def _members(points: Tensor, centers: Tensor) -> Tensor:
    """(B, k, n) of 0 and 1: whether no other center is nearer to the point; several if they are equally near."""
    # Squared distances, less the square of the point, which is the same for all centers.
    scores = torch.baddbmm(centers.square().sum(dim=2, keepdim=True), centers, points, alpha=-2)
    return scores.sub_(scores.amin(dim=1, keepdim=True)).eq_(0)


def _first_member(members: Tensor) -> Tensor:
    num_clusters = members.shape[1]
    order = torch.arange(num_clusters, 0, -1, device=members.device).view(1, -1, 1)
    return num_clusters - (members * order).amax(dim=1).long()


def _better(first: Clusters, second: Clusters) -> Clusters:
    is_better = second.inertia < first.inertia
    return Clusters(
        torch.where(is_better[:, None], second.labels, first.labels),
        torch.where(is_better[:, None, None], second.centers, first.centers),
        torch.where(is_better, second.inertia, first.inertia),
    )
