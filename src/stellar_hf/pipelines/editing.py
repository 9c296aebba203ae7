# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Editing of what (sparse tokens S, `(B, r, d)`) and where (localization L, `(B, N, r)`) an image shows, apart from each
other.

Each function takes a batch of S and L and returns S and L to decode, the rows of L being distributions again, and
leaves its inputs as they are. All are differentiable in S, L and floating point arguments. [`StellarPipeline`] has
them as methods.

A *concept* is one or several tokens of an image: an index, a sequence of indices (of the same tokens in each image),
or a bool tensor `(B, r)`, such as [`select`] finds, in which an image may have no token at all, and then stays what it
is. Tokens are numbered from 0. The tokens of a concept are edited together, so that their mixture, which paints its
inside, is kept. Where a concept arrives, it covers the other tokens. Where it leaves, its place goes to the tokens
that are around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..localization_stellar import region_shares, resolve_grid_size, token_maps
from ..loss_stellar import matching_plan

# Of the matching: enough for plans of 24 tokens to be those of a permutation.
_MATCHING_ITERATIONS = 200

# Standard deviation of the Gaussian, in patches, by which a place that is left goes to the tokens around it. With 0.5,
# 1, 2 and 4, 91, 92, 93 and 91 % of the places of erased objects look like the ground, on validation scenes of
# benchmarks/object_edits.py (spreads over draws of scenes: 2 to 4).
_REACH = 2.0
_LEAST_MASS = 1e-6


def select(
    localization: Tensor, mask: Tensor, grid_size: tuple[int, int] | None = None, threshold: float = 0.5
) -> Tensor:
    """
    The concept that stands at a place: the tokens that have at least `threshold` of their map there.

    Args:
        localization: L, `(B, N, r)`.
        mask: The place, bool `(H, W)`, for each image, or `(B, H, W)`; in pixels of any resolution.
        grid_size: Patches (h, w) with h * w = N; a square without it.
        threshold: Share of a token's map, in [0.5, 1].

    Returns:
        bool `(B, r)`; without a true value where no token stands mostly there.

    Raises:
        ValueError: If shapes, the mask's type or the threshold are impossible, or the grid is unknown.
    """
    mask = torch.as_tensor(mask)
    if mask.ndim == 2:
        mask = mask.expand(len(localization), -1, -1)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, but must be bool: true where the concept stands.")
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, but must be in [0.5, 1]: the most of a token's map.")
    share = region_shares(localization.detach(), mask.to(localization.device, torch.uint8), 2, grid_size)[:, 1]
    # The tolerance keeps a share of exactly the threshold, which float32 sums may miss by a rounding error.
    return share >= threshold - 1e-5


def erase(
    sparse_tokens: Tensor,
    localization: Tensor,
    concept: int | Sequence[int] | Tensor,
    grid_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Takes a concept away. Its place goes to the other tokens, most of it to those that are around it.

    Args:
        sparse_tokens: S, `(B, r, d)`.
        localization: L, `(B, N, r)`; rows sum to 1.
        concept: Index, indices, or bool `(B, r)`.
        grid_size: Patches (h, w) with h * w = N; a square without it.

    Returns:
        S as it was, and L, `(B, N, r)`, with maps of the concept that are 0.

    Raises:
        ValueError: If shapes do not fit, there is no such token, the concept has all tokens of an image, or the grid
            is unknown.
    """
    concept = _concept(sparse_tokens, localization, concept)
    grid_size = resolve_grid_size(localization.shape[1], grid_size)
    return sparse_tokens, _others(localization, concept, 0.0, grid_size)


def move(
    sparse_tokens: Tensor,
    localization: Tensor,
    concept: int | Sequence[int] | Tensor,
    rows: float | Tensor = 0.0,
    columns: float | Tensor = 0.0,
    grid_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Moves a concept; what leaves the image is gone.

    Args:
        sparse_tokens: S, `(B, r, d)`.
        localization: L, `(B, N, r)`; rows sum to 1.
        concept: Index, indices, or bool `(B, r)`.
        rows: Patches downwards; a number, also a fraction, or one for each image, `(B,)`.
        columns: Patches to the right; a number, or one for each image, `(B,)`.
        grid_size: Patches (h, w) with h * w = N; a square without it.

    Returns:
        S as it was, and L, `(B, N, r)`.

    Raises:
        ValueError: If shapes do not fit, there is no such token, the concept has all tokens of an image, or the
            grid is unknown.
    """
    concept = _concept(sparse_tokens, localization, concept)
    grid_size = resolve_grid_size(localization.shape[1], grid_size)
    row, column = _cells(localization, grid_size)
    rows, columns = (_per_image(value, name, localization) for value, name in ((rows, "rows"), (columns, "columns")))
    moved = _sample(localization * concept, row - rows, column - columns, grid_size)
    return sparse_tokens, _cover(moved, localization, concept, grid_size)


def scale(
    sparse_tokens: Tensor,
    localization: Tensor,
    concept: int | Sequence[int] | Tensor,
    factor: float | Tensor,
    grid_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Makes a concept larger or smaller about the centre of mass of its maps.

    Args:
        sparse_tokens: S, `(B, r, d)`.
        localization: L, `(B, N, r)`; rows sum to 1.
        concept: Index, indices, or bool `(B, r)`.
        factor: Of height and width, > 0; a number or one for each image, `(B,)`.
        grid_size: Patches (h, w) with h * w = N; a square without it.

    Returns:
        S as it was, and L, `(B, N, r)`.

    Raises:
        ValueError: If shapes do not fit, there is no such token, the concept has all tokens of an image, a factor
            is not positive, or the grid is unknown.
    """
    concept = _concept(sparse_tokens, localization, concept)
    grid_size = resolve_grid_size(localization.shape[1], grid_size)
    factor = _per_image(factor, "factor", localization)
    if not (factor > 0).all():
        raise ValueError(f"factor is {factor.flatten().tolist()}, but must be positive: 2 doubles a side.")
    maps = localization * concept
    mass = maps.float().sum(dim=2)
    total = mass.sum(dim=1, keepdim=True).clamp_min(1e-6)
    row, column = _cells(localization, grid_size)
    center_row = (mass * row).sum(dim=1, keepdim=True) / total
    center_column = (mass * column).sum(dim=1, keepdim=True) / total
    row, column = center_row + (row - center_row) / factor, center_column + (column - center_column) / factor
    return sparse_tokens, _cover(_sample(maps, row, column, grid_size), localization, concept, grid_size)


def swap(
    sparse_tokens: Tensor,
    localization: Tensor,
    concept: int | Sequence[int] | Tensor,
    other_sparse_tokens: Tensor,
    other_localization: Tensor,
    other_concept: int | Sequence[int] | Tensor,
    grid_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Exchanges concepts between images: each leaves its image and comes, with its tokens and its maps, into the
    other one.

    Concepts may have different numbers of tokens: both results have the tokens of both images, with maps that are
    0 for those which are not there. A concept comes to where it was in its own image; [`move`] and
    [`scale`] bring it elsewhere.

    Args:
        sparse_tokens: S of the images, `(B, r, d)`.
        localization: L of the images, `(B, N, r)`; rows sum to 1.
        concept: Index, indices, or bool `(B, r)`.
        other_sparse_tokens: S of the other images, `(B, s, d)`.
        other_localization: L of the other images, `(B, N, s)`, over the same grid.
        other_concept: Index, indices, or bool `(B, s)`.
        grid_size: Patches (h, w) with h * w = N, of both; a square without it.

    Returns:
        S, `(B, r + s, d)`, and L, `(B, N, r + s)`, of the images with the other concept; then S, `(B, s + r, d)`,
        and L, `(B, N, s + r)`, of the other images with the concept.

    Raises:
        ValueError: If shapes do not fit, there is no such token, a concept has all tokens of an image, or the grid is
            unknown.
    """
    concept = _concept(sparse_tokens, localization, concept)
    other_concept = _concept(other_sparse_tokens, other_localization, other_concept)
    _check_same(localization.shape[:2], other_localization.shape[:2], "images and patches of localization")
    _check_same(sparse_tokens.shape[2:], other_sparse_tokens.shape[2:], "channels of sparse_tokens")
    grid_size = resolve_grid_size(localization.shape[1], grid_size)
    arriving, leaving = other_localization * other_concept, localization * concept
    rest = _others(localization, concept, arriving.sum(dim=2, keepdim=True), grid_size)
    other_rest = _others(other_localization, other_concept, leaving.sum(dim=2, keepdim=True), grid_size)
    return (
        torch.cat([sparse_tokens, other_sparse_tokens], dim=1),
        torch.cat([rest, arriving], dim=2),
        torch.cat([other_sparse_tokens, sparse_tokens], dim=1),
        torch.cat([other_rest, leaving], dim=2),
    )


def exchange(
    sparse_tokens: Tensor,
    localization: Tensor,
    concept: int | Sequence[int] | Tensor,
    other_concept: int | Sequence[int] | Tensor,
) -> tuple[Tensor, Tensor]:
    """
    Exchanges what two concepts of an image show: each place is painted with the tokens of the other concept, in the
    proportions that these have in the image. Of single tokens, it exchanges their rows of S.

    Args:
        sparse_tokens: S, `(B, r, d)`.
        localization: L, `(B, N, r)`; rows sum to 1.
        concept: Index, indices, or bool `(B, r)`.
        other_concept: Index, indices, or bool `(B, r)`, of other tokens. An image that lacks one of both stays what
            it is.

    Returns:
        S as it was, and L, `(B, N, r)`.

    Raises:
        ValueError: If shapes do not fit, there is no such token, or both concepts have a token in common.
    """
    concept = _concept(sparse_tokens, localization, concept)
    other_concept = _concept(sparse_tokens, localization, other_concept)
    if (concept & other_concept).any():
        shared = (concept & other_concept).any(dim=0).nonzero()[:, 1].tolist()
        raise ValueError(f"Both concepts have the tokens {shared}, but only different tokens can be exchanged.")
    has_both = concept.any(dim=2, keepdim=True) & other_concept.any(dim=2, keepdim=True)
    concept, other_concept = concept & has_both, other_concept & has_both
    place, other_place = localization * concept, localization * other_concept
    painted = other_place.sum(dim=2, keepdim=True) * _proportions(place, concept)
    other_painted = place.sum(dim=2, keepdim=True) * _proportions(other_place, other_concept)
    rest = localization * ~(concept | other_concept)
    return sparse_tokens, rest + painted + other_painted


def interpolate(
    sparse_tokens: Tensor,
    localization: Tensor,
    other_sparse_tokens: Tensor,
    other_localization: Tensor,
    weight: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """
    Images between images: each token and its map go in a straight line to the token, and its map, that it is
    matched to, one to one, by optimal transport.

    Args:
        sparse_tokens: S of the images at weight 0, `(B, r, d)`.
        localization: L of the images at weight 0, `(B, N, r)`; rows sum to 1.
        other_sparse_tokens: S of the images at weight 1, `(B, r, d)`.
        other_localization: L of the images at weight 1, `(B, N, r)`, over the same grid.
        weight: In [0, 1]; a number or one for each image, `(B,)`.

    Returns:
        S, `(B, r, d)`, and L, `(B, N, r)`; at weight 1, those of the other image in the order of the matching.

    Raises:
        ValueError: If shapes do not fit or a weight is not in [0, 1].
    """
    _check_factors(sparse_tokens, localization)
    _check_factors(other_sparse_tokens, other_localization)
    _check_same(sparse_tokens.shape, other_sparse_tokens.shape, "shapes of sparse_tokens")
    _check_same(localization.shape, other_localization.shape, "shapes of localization")
    weight = _per_image(weight, "weight", localization)
    if not ((weight >= 0) & (weight <= 1)).all():
        raise ValueError(f"weight is {weight.flatten().tolist()}, but must be in [0, 1], from image to other image.")
    weight = weight.unsqueeze(2).to(localization.dtype)
    match = _match_one_to_one(sparse_tokens, other_sparse_tokens)
    other_tokens = torch.take_along_dim(other_sparse_tokens, match.unsqueeze(2), dim=1)
    other_maps = torch.take_along_dim(other_localization, match.unsqueeze(1), dim=2)
    return (
        (1 - weight) * sparse_tokens + weight * other_tokens,
        (1 - weight) * localization + weight * other_maps,
    )


def transfer(sparse_tokens: Tensor, localization: Tensor, other_sparse_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """
    Paints images with the tokens of others: what is there becomes that of the other image, where it is stays. Each
    token gives way to the one that it is matched to, one to one, by optimal transport.

    Args:
        sparse_tokens: S, `(B, r, d)`.
        localization: L, `(B, N, r)`.
        other_sparse_tokens: S of the images whose tokens are taken, `(B, r, d)`.

    Returns:
        The other S, `(B, r, d)`, in the order of the matching, and L as it was.

    Raises:
        ValueError: If shapes do not fit.
    """
    _check_factors(sparse_tokens, localization)
    _check_floats("other_sparse_tokens", other_sparse_tokens)
    _check_same(sparse_tokens.shape, other_sparse_tokens.shape, "shapes of sparse_tokens")
    match = _match_one_to_one(sparse_tokens, other_sparse_tokens)
    return torch.take_along_dim(other_sparse_tokens, match.unsqueeze(2), dim=1), localization


# Maps ----------------------------------------------------------------------------------------------------------------


def _others(localization: Tensor, concept: Tensor, covered: Tensor | float, grid_size: tuple[int, int]) -> Tensor:
    """
    The maps (B, N, r) of the other tokens where a concept, instead of its own mass, takes `covered` (B, N, 1).

    They shrink where it takes more. Where it takes less, its place goes to them in the proportion that they have
    around it: inside of a concept, their own is that of rounding errors.
    """
    others = localization * ~concept
    mass = others.sum(dim=2, keepdim=True)
    refill = _around(others, grid_size) + _LEAST_MASS * (~concept).to(others.dtype)
    freed = (localization * concept).sum(dim=2, keepdim=True) - covered
    shrink = ((mass + freed) / mass.clamp_min(_LEAST_MASS)).clamp(0, 1)
    return others * shrink + freed.clamp_min(0) * refill / refill.sum(dim=2, keepdim=True)


def _around(maps: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Means of maps (B, N, r) around each patch, weighted by a Gaussian of its distance."""
    rows, columns = (_gaussian(length, maps) for length in grid_size)
    means = rows @ token_maps(maps, grid_size) @ columns.T
    return means.flatten(2).transpose(1, 2).to(maps.dtype)


def _gaussian(length: int, maps: Tensor) -> Tensor:
    """Weights (length, length) float32 of the patches of a row for each of them, which sum to 1."""
    places = torch.arange(length, device=maps.device).float()
    return (-((places[:, None] - places) ** 2) / (2 * _REACH**2)).softmax(dim=1)


def _proportions(maps: Tensor, tokens: Tensor) -> Tensor:
    """What each of some tokens, bool (B, 1, r), has of their mass in the image: (B, 1, r), which sums to 1, or 0."""
    in_image = maps.sum(dim=1, keepdim=True) + _LEAST_MASS * tokens.to(maps.dtype)
    return in_image / in_image.sum(dim=2, keepdim=True).clamp_min(_LEAST_MASS)


def _cover(maps: Tensor, localization: Tensor, concept: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """L with the concept's maps (B, N, r), 0 for other tokens, in place of those that it had."""
    return maps + _others(localization, concept, maps.sum(dim=2, keepdim=True), grid_size)


def _cells(localization: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (1, N) float32 each: in half precision they would be wrong by parts of a patch."""
    index = torch.arange(localization.shape[1], device=localization.device).unsqueeze(0)
    return (index // grid_size[1]).float(), (index % grid_size[1]).float()


def _sample(maps: Tensor, row: Tensor, column: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Maps (B, N, r) at rows and columns (B, N), in patches, bilinearly; 0 outside of the image."""
    height, width = grid_size
    x, y = (column + 0.5) * 2 / width - 1, (row + 0.5) * 2 / height - 1
    places = torch.stack([x, y], dim=2).expand(len(maps), -1, -1).unflatten(1, grid_size)
    sampled = F.grid_sample(
        token_maps(maps, grid_size), places, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return sampled.flatten(2).transpose(1, 2).to(maps.dtype)


# Matching ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _match_one_to_one(tokens: Tensor, others: Tensor) -> Tensor:
    """Permutation (B, r) int64 into the others: the one on which the transport plan has the most mass."""
    from scipy.optimize import linear_sum_assignment

    plans = matching_plan(tokens, others, num_iterations=_MATCHING_ITERATIONS).cpu().numpy()
    matches = [linear_sum_assignment(plan, maximize=True)[1] for plan in plans]
    return torch.tensor(np.stack(matches), device=tokens.device)


# Checks --------------------------------------------------------------------------------------------------------------


def _concept(sparse_tokens: Tensor, localization: Tensor, concept: int | Sequence[int] | Tensor) -> Tensor:
    """The concept as bool (B, 1, r)."""
    _check_factors(sparse_tokens, localization)
    batch_size, num_tokens = sparse_tokens.shape[:2]
    concept = _as_tensor(concept, "concept", localization)
    if concept.dtype == torch.bool:
        if concept.shape != (batch_size, num_tokens):
            raise ValueError(
                f"concept has shape {tuple(concept.shape)}, but a bool tensor must say of each of {num_tokens} tokens "
                f"of {batch_size} images whether it belongs to it: {(batch_size, num_tokens)}."
            )
        chosen = concept
    else:
        indices = concept.flatten().tolist()
        if not all(isinstance(index, int) and 0 <= index < num_tokens for index in indices):
            raise ValueError(f"concept is {indices}, but tokens have whole numbers from 0 to {num_tokens - 1}.")
        chosen = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=localization.device)
        chosen[:, indices] = True
    if chosen.all(dim=1).any():
        raise ValueError(
            f"concept has all {num_tokens} tokens of an image, but one at least must stay to fill its place."
        )
    return chosen.unsqueeze(1)


def _check_factors(sparse_tokens: Tensor, localization: Tensor) -> None:
    _check_floats("sparse_tokens", sparse_tokens)
    _check_floats("localization", localization)
    if not (
        sparse_tokens.ndim == localization.ndim == 3
        and sparse_tokens.shape[:2] == (len(localization), localization.shape[2])
    ):
        raise ValueError(
            f"sparse_tokens have shape {tuple(sparse_tokens.shape)} and localization {tuple(localization.shape)}, but "
            "(batch, tokens, channels) and (batch, patches, tokens) are expected."
        )


def _check_floats(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {what}, but must be a floating point tensor.")


def _check_same(first: tuple[int, ...], second: tuple[int, ...], what: str) -> None:
    if first != second:
        raise ValueError(f"{what} are {tuple(first)} here and {tuple(second)} there, but must be the same.")


def _per_image(value: float | Tensor, name: str, localization: Tensor) -> Tensor:
    """A number for each image, (B, 1) float32."""
    numbers = _as_tensor(value, name, localization).float()
    if numbers.shape not in ((), (len(localization),)):
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)}, but must be a number, or one for each of {len(localization)} "
            "images."
        )
    if not numbers.isfinite().all():
        raise ValueError(f"{name} is {numbers.tolist()}, but must be finite.")
    return numbers.expand(len(localization)).unsqueeze(1)


def _as_tensor(value: Any, name: str, localization: Tensor) -> Tensor:
    try:
        return torch.as_tensor(value, device=localization.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is {value!r}, but must be a number, numbers or a tensor.") from error


__all__ = ["erase", "exchange", "interpolate", "move", "scale", "select", "swap", "transfer"]
