# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The terms of the STELLAR objective (arXiv 2602.01905) as plain functions.

Everything that decides about targets (Sinkhorn-Knopp, matching) carries no gradient. Every function computes in
float32, whatever the dtype of its inputs or an enclosing autocast says, and returns float32.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Context that computes in the operands' own dtype on the device of `tensor`."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


# Over all processes --------------------------------------------------------------------------------------------------


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduce_over_processes(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if _is_distributed():
        dist.all_reduce(tensor, op=op)
    return tensor


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs, since each depends on all tensors."""

    @staticmethod
    def forward(ctx, tensor):
        return _reduce_over_processes(tensor.clone(memory_format=torch.contiguous_format), dist.ReduceOp.SUM)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        return _reduce_over_processes(grad_output.clone(memory_format=torch.contiguous_format), dist.ReduceOp.SUM)


def _mean_over_rows(rows: torch.Tensor) -> torch.Tensor:
    """Mean (dim,) of (rows, dim) over the rows of all processes, which may have different numbers of them."""
    if not _is_distributed():
        return rows.mean(dim=0)
    sum_and_count = _SumOverProcesses.apply(F.pad(rows.sum(dim=0), (0, 1), value=rows.shape[0]))
    return sum_and_count[:-1] / sum_and_count[-1]


def standardize(features: torch.Tensor) -> torch.Tensor:
    """
    Zero mean and unit variance of each channel over the features of all processes, with gradient through both.

    All processes must call this equally often.

    Args:
        features: (..., dim), float32.

    Returns:
        (..., dim) float32.
    """
    rows = features.flatten(0, -2)
    centered = rows - _mean_over_rows(rows)
    variance = _mean_over_rows(centered**2)
    return (centered / (variance + 1e-5).sqrt()).view_as(features)


# Sinkhorn-Knopp ------------------------------------------------------------------------------------------------------


def _max_over_rows(scores: torch.Tensor) -> torch.Tensor:
    """Column-wise maximum of (..., rows, K) over the rows of all processes, as (..., 1, K)."""
    return _reduce_over_processes(scores.amax(dim=-2, keepdim=True), dist.ReduceOp.MAX)


def _logsumexp_over_rows(scores: torch.Tensor) -> torch.Tensor:
    """Column-wise log-sum-exp of (..., rows, K) over the rows of all processes, as (..., 1, K)."""
    maximum = _max_over_rows(scores)
    total = (scores - maximum).exp_().sum(dim=-2, keepdim=True)
    return maximum + _reduce_over_processes(total, dist.ReduceOp.SUM).log()


@torch.no_grad()
def sinkhorn_knopp(
    logits: torch.Tensor, temperature: float = 0.06, num_iterations: int = 3, scale: float = 1.0
) -> torch.Tensor:
    """
    Balanced soft assignment of rows to prototypes (STELLAR, online clustering of concepts), in the log domain.

    In turns, each column is divided by its sum over the rows of all processes (to the power `scale`), and each row by
    its sum. All processes must call this equally often.

    Args:
        logits: (..., rows, K), similarities of rows and prototypes. Leading dimensions are problems of their own.
        temperature: Divides the logits; > 0.
        num_iterations: Number of column-and-row normalizations; at least 1.
        scale: Power of the column sums, in (0, 1]; 1 asks for columns that are used equally.

    Returns:
        (..., rows, K) float32 assignments; rows sum to one.
    """
    with without_autocast(logits):
        scores = logits.float() / temperature
        # The shift cancels for scale = 1; a partial column normalization (scale < 1) is defined relative to it.
        scores -= _max_over_rows(scores)
        for _ in range(num_iterations):
            scores -= scale * _logsumexp_over_rows(scores)
            scores = scores.log_softmax(dim=-1)
        return scores.exp_()


# Matching ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matching_plan(
    predictions: torch.Tensor, targets: torch.Tensor, epsilon: float = 0.1, num_iterations: int = 5
) -> torch.Tensor:
    """
    Entropic optimal transport between the sparse tokens of two views (STELLAR, masked views).

    The cost is the Euclidean distance of the raw tokens; every row and column has mass one.

    Args:
        predictions: (B, r, d), tokens of one view.
        targets: (B, s, d), tokens of the view that gives the targets.
        epsilon: Entropic regularization; > 0.
        num_iterations: Log-domain iterations, rows first; at least 1.

    Returns:
        (B, r, s) float32 transport plan.
    """
    with without_autocast(predictions):
        cost = torch.cdist(
            predictions.float(), targets.float(), compute_mode="donot_use_mm_for_euclid_dist"
        )  # (B, r, s); the matrix-product mode loses half of the digits for close tokens
        score = -cost / epsilon
        # Potentials in units of epsilon.
        column = score.new_zeros(score.shape[0], 1, score.shape[2])
        for _ in range(num_iterations):
            row = -torch.logsumexp(column + score, dim=2, keepdim=True)
            column = -torch.logsumexp(row + score, dim=1, keepdim=True)
        return (row + column + score).exp()


def match_tokens(
    predictions: torch.Tensor, targets: torch.Tensor, epsilon: float = 0.1, num_iterations: int = 5
) -> torch.Tensor:
    """
    Index of the target token that each predicted token is matched to: the largest entry of its [`matching_plan`] row.

    Args and constraints as in [`matching_plan`].

    Returns:
        (B, r) int64 indices into the s targets.
    """
    return matching_plan(predictions, targets, epsilon, num_iterations).argmax(dim=-1)


def matched_fraction(index: torch.Tensor) -> torch.Tensor:
    """
    Share of tokens that are matched one-to-one: no other token of the same view takes the same target.

    Args:
        index: (B, r) int64 targets of the predicted tokens, as [`match_tokens`] gives them.

    Returns:
        Scalar float32 in [0, 1]; 1 when every matching is a permutation.
    """
    takers = (index.unsqueeze(1) == index.unsqueeze(2)).sum(dim=2)  # of each token's target
    return (takers == 1).float().mean()


# KoLeo ---------------------------------------------------------------------------------------------------------------


def koleo_loss(sparse_tokens: torch.Tensor) -> torch.Tensor:
    """
    Kozachenko-Leonenko entropy of the tokens of each image: pushes each token from its nearest neighbour.

    The mean over all tokens of `-log(0.5 * distance + 1e-8)`, where distance is the Euclidean one (1e-8 added to the
    difference) between a token and the nearest other token of the same image, both L2-normalized. The choice of the
    neighbour carries no gradient; the distance does, to both tokens.

    Args:
        sparse_tokens: (B, r, d).

    Returns:
        Scalar float32; 0 for r = 1.
    """
    with without_autocast(sparse_tokens):
        tokens = F.normalize(sparse_tokens.float(), dim=-1)
        if tokens.shape[1] == 1:
            return tokens.sum() * 0.0
        with torch.no_grad():
            itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
            similarity = (tokens @ tokens.transpose(1, 2)).masked_fill_(itself, -math.inf)
            nearest = similarity.argmax(dim=-1, keepdim=True)  # (B, r, 1)
        distance = F.pairwise_distance(tokens, torch.take_along_dim(tokens, nearest, dim=1), eps=1e-8)
        return -torch.log(0.5 * distance + 1e-8).mean()


# Cross entropies over prototypes -------------------------------------------------------------------------------------


class _PrototypeCrossEntropy(torch.autograd.Function):
    """
    The sum over rows of logsumexp(x W^T / T) - x . e / T. Its gradients are computed along with it, from the same
    logits, of which no more than a chunk of rows exists at a time.
    """

    @staticmethod
    def forward(ctx, projections, expected, prototypes, temperature, chunk_size, with_gradients):
        if with_gradients:
            grad_projections, grad_prototypes = torch.empty_like(projections), torch.zeros_like(prototypes)
        total = -(projections * expected).sum() / temperature
        logits = projections.new_empty(min(chunk_size, len(projections)), len(prototypes))
        for start in range(0, len(projections), chunk_size):
            rows = projections[start : start + chunk_size] / temperature
            # One place in memory for all chunks: exp(logits - maximum) stands where the logits were.
            chunk = torch.mm(rows, prototypes.T, out=logits[: len(rows)])
            maximum = chunk.amax(dim=-1, keepdim=True)
            sums = chunk.sub_(maximum).exp_().sum(dim=-1, keepdim=True)
            total += (maximum + sums.log()).sum()
            if with_gradients:
                grad_projections[start : start + chunk_size] = (chunk @ prototypes).div_(sums)
                grad_prototypes.addmm_(chunk.T, rows / sums)
        if with_gradients:
            grad_projections = grad_projections.sub_(expected).div_(temperature)
            ctx.save_for_backward(grad_projections, projections / -temperature, grad_prototypes)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        return (*(grad_output * gradient for gradient in ctx.saved_tensors), None, None, None)


def expected_prototypes(assignments: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """
    A W: the mean prototype under each target assignment, which stands for the assignment in
    [`prototype_cross_entropy`]. Computed once an image, with gradient to the prototypes.

    Args:
        assignments: (..., K), rows summing to one.
        prototypes: (K, dim).

    Returns:
        (..., dim) float32.
    """
    with without_autocast(prototypes):
        return assignments.detach().float() @ prototypes.float()


def prototype_cross_entropy(
    projections: torch.Tensor,
    expected: torch.Tensor,
    prototypes: torch.Tensor,
    temperature: float = 0.12,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    Mean cross entropy between target assignments A and softmax(x W^T / T), without memory of size rows x K.

    For targets that sum to one it equals `logsumexp(x W^T / T) - x . (A W) / T`. Value and gradients come from one
    pass over chunks of rows, so each product with the prototypes is computed once; second derivatives do not exist.

    Args:
        projections: (..., dim), predictions x.
        expected: (..., dim), [`expected_prototypes`] A W of each prediction's target.
        prototypes: (K, dim), W.
        temperature: T > 0.
        chunk_size: Rows whose K logits exist at a time; by default as many as take 8 MiB on a CPU, whose cache they
            should not leave, and 256 MiB elsewhere.

    Returns:
        Scalar float32: mean over all rows.
    """
    with without_autocast(projections):
        projections, expected = projections.float().flatten(0, -2), expected.float().flatten(0, -2)
        prototypes = prototypes.float()
        with_gradients = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (projections, expected, prototypes)
        )
        chunk_size = chunk_size or _rows_of_a_chunk(prototypes)
        total = _PrototypeCrossEntropy.apply(
            projections, expected, prototypes, temperature, chunk_size, with_gradients
        )
        return total / projections.shape[0]


def _rows_of_a_chunk(prototypes: torch.Tensor) -> int:
    budget = 2**23 if prototypes.device.type == "cpu" else 2**28
    return max(budget // (4 * prototypes.shape[0]), 1)


# Segmentation --------------------------------------------------------------------------------------------------------


def pixel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
    """
    Mean cross entropy of the pixels that count.

    Args and constraints as in [`dice_loss`].

    Returns:
        Scalar float32; 0, with gradients of 0, if every pixel is ignored.
    """
    counted = (labels != ignore_index).sum().clamp_min(1)
    return F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum") / counted


def dice_loss(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255, smoothing: float = 1.0
) -> torch.Tensor:
    """
    Soft Dice loss: one minus the overlap of predicted and true regions, mean over all classes (STELLAR, segmentation).

    For a class with probabilities p and true pixels y (Milletari et al., "V-Net", arXiv 1606.04797, section 3, without
    squares in the denominator): `1 - (2 sum(p y) + s) / (sum(p) + sum(y) + s)`, with sums over all pixels of the
    batch that are not ignored.

    Args:
        logits: (B, C, ...), such as (B, C, H, W).
        labels: (B, ...) int64 in [0, C) or `ignore_index`.
        ignore_index: Label of pixels that do not count.
        smoothing: s, > 0; a class that neither occurs nor is predicted has a loss of 0.

    Returns:
        Scalar float32 in [0, 1]; 0, with gradients of 0, if every pixel is ignored.
    """
    with without_autocast(logits):
        counted = (labels != ignore_index).unsqueeze(-1)
        truth = F.one_hot(labels.where(counted[..., 0], 0), logits.shape[1]) * counted
        probabilities = logits.float().softmax(dim=1).movedim(1, -1) * counted
        truth, probabilities = truth.flatten(0, -2), probabilities.flatten(0, -2)
        overlap = 2 * (probabilities * truth).sum(dim=0) + smoothing
        return 1 - (overlap / (probabilities.sum(dim=0) + truth.sum(dim=0) + smoothing)).mean()


# Masking -------------------------------------------------------------------------------------------------------------


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches that a masked view keeps: the integer part of `num_patches * (1 - mask_ratio)`, at least one."""
    return max(int(num_patches * (1 - mask_ratio)), 1)


def masking_noise(
    batch_size: int,
    grid_size: tuple[int, int],
    num_kept: int,
    focus: str | None = "gaussian",
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Random masking scores of patches: the patches of lowest score are kept (STELLAR, masked views).

    Scores are uniform in [0, 1). Half of the images, by chance, get a focus: `"gaussian"` lowers the scores by
    exp(-distance^2 / (2 sigma^2)) around a random cell, with distance in cells and sigma uniform in [0.1, 0.5] of
    sqrt(h w); `"block"` gives a random square of side int(sqrt(num_kept)) the score 0.

    Args:
        batch_size: Number B of views.
        grid_size: Patches (h, w).
        num_kept: Patches that will be kept; decides the side of the block.
        focus: `"gaussian"`, `"block"` or `None`.
        device: Where to draw.
        generator: Random generator on that device.

    Returns:
        (B, h * w) float32 scores, row-major.
    """
    height, width = grid_size

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    noise = uniform(batch_size, height, width)
    if focus is None:
        return noise.flatten(1)

    rows = torch.arange(height, device=device).view(1, height, 1)
    columns = torch.arange(width, device=device).view(1, 1, width)
    focused = uniform(batch_size, 1, 1) < 0.5
    row, column = uniform(batch_size, 1, 1), uniform(batch_size, 1, 1)
    if focus == "gaussian":
        sigma = math.sqrt(height * width) * (0.1 + 0.4 * uniform(batch_size, 1, 1))
        distance = (rows - (row * height).floor()) ** 2 + (columns - (column * width).floor()) ** 2
        noise = noise - focused * torch.exp(-distance / (2 * sigma**2))
    else:
        side = min(math.isqrt(num_kept), height, width)
        top, left = (row * (height - side + 1)).floor(), (column * (width - side + 1)).floor()
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        noise = noise.masked_fill(focused & inside, 0.0)
    return noise.flatten(1)


# Diagnostics of collapse ---------------------------------------------------------------------------------------------


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(dim=-1)


@torch.no_grad()
def prototype_usage(assignments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How many prototypes are in use, and whether they tell tokens or merely token slots apart: over the images of all
    processes, which must call this equally often.

    Args:
        assignments: (B, r, K) predicted probabilities of prototypes; rows sum to one.

    Returns:
        Two float32 scalars in [0, 1]: the entropy of the mean assignment over ln K (0: one prototype takes all), and
        the mutual information of slot and prototype over that of token and prototype (1: the slot alone decides, and
        the image does not matter; 0 for r = 1, and where assignments tell nothing apart).
    """
    assignments = assignments.float()
    num_slots, num_prototypes = assignments.shape[1:]
    slots = _mean_over_rows(assignments.flatten(1)).unflatten(0, (num_slots, num_prototypes))
    usage = _entropy(slots.mean(dim=0))
    of_slots = usage - _entropy(slots).mean()
    of_tokens = usage - _mean_over_rows(_entropy(assignments)).mean()
    # Below a thousandth of a nat the quotient would be one of rounding errors.
    return usage / math.log(max(num_prototypes, 2)), of_slots / of_tokens.clamp_min(1e-3)


@torch.no_grad()
def token_diversity(sparse_tokens: torch.Tensor) -> torch.Tensor:
    """
    Mean cosine distance (1 - cosine, in [0, 2]) between different tokens of an image; 0 when all are the same.

    Args:
        sparse_tokens: (B, r, d).

    Returns:
        Scalar float32; 0 for r = 1.
    """
    tokens = F.normalize(sparse_tokens.float(), dim=-1)
    num_tokens = tokens.shape[1]
    if num_tokens == 1:
        return tokens.new_zeros(())
    with without_autocast(tokens):
        similarity = tokens @ tokens.transpose(1, 2)
    off_diagonal = similarity.sum(dim=(1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (1 - off_diagonal / (num_tokens * (num_tokens - 1))).mean()


@torch.no_grad()
def localization_sharpness(localization: torch.Tensor) -> torch.Tensor:
    """
    Mean largest share of a patch: near 1 where each patch belongs to one token, 1 / r where it belongs to all alike.

    Args:
        localization: (B, N, r) floating point; rows sum to one.

    Returns:
        Scalar float32 in [1 / r, 1].
    """
    return localization.float().amax(dim=-1).mean()
