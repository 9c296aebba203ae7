# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Each term of the objective against a naive formulation in float64, and the laws that it obeys."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_hf.loss_stellar import (
    expected_prototypes,
    koleo_loss,
    localization_sharpness,
    masking_noise,
    match_tokens,
    matching_plan,
    num_kept_patches,
    prototype_cross_entropy,
    prototype_usage,
    sinkhorn_knopp,
    token_diversity,
)

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def permutation(seed: int, size: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    """Errors are relative to the largest value of the expected tensor."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=relative * expected.abs().max().item() + 1e-12
    )


# Sinkhorn-Knopp ------------------------------------------------------------------------------------------------------


def exponential_sinkhorn(logits: torch.Tensor, temperature: float, num_iterations: int, scale: float) -> torch.Tensor:
    scores = logits.double() / temperature
    assignments = torch.exp(scores - scores.amax(dim=0) + 50)
    for _ in range(num_iterations):
        assignments = assignments / assignments.sum(dim=0) ** scale
        assignments = assignments / assignments.sum(dim=1, keepdim=True)
    return assignments


@few
@given(
    seeds,
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([0.06, 0.5]),
    st.integers(1, 6),
    st.sampled_from([1.0, 0.8, 0.3]),
)
def test_sinkhorn_agrees_with_the_exponential_domain(seed, rows, columns, temperature, num_iterations, scale):
    logits = normal(seed, rows, columns).clamp(-1, 1)
    assignments = sinkhorn_knopp(logits, temperature, num_iterations, scale)
    assert assignments.dtype == torch.float32
    assert_close(assignments, exponential_sinkhorn(logits, temperature, num_iterations, scale), 1e-5)


@few
@given(seeds, dtypes, st.sampled_from([1.0, 1e4]), st.integers(1, 3), st.sampled_from([1.0, 0.5]))
def test_sinkhorn_rows_sum_to_one_even_with_outliers(seed, dtype, size, num_iterations, scale):
    logits = normal(seed, 10, 14)
    logits[1] *= size
    logits[2] -= size  # a row that no column wants
    logits[3] += size
    assignments = sinkhorn_knopp(logits.to(dtype), num_iterations=num_iterations, scale=scale)
    assert (assignments >= 0).all()
    torch.testing.assert_close(assignments.sum(dim=-1), torch.ones(10), rtol=0, atol=1e-5)


@few
@given(seeds, st.integers(2, 12), st.integers(2, 12))
def test_sinkhorn_uses_columns_equally_after_many_iterations(seed, rows, columns):
    assignments = sinkhorn_knopp(normal(seed, rows, columns).clamp(-1, 1), temperature=0.5, num_iterations=100)
    torch.testing.assert_close(assignments.sum(dim=0), torch.full((columns,), rows / columns), rtol=1e-3, atol=0)


def test_sinkhorn_scale_lets_columns_differ():
    logits = normal(0, 40, 8)
    logits[:, 0] += 1.0
    share = [sinkhorn_knopp(logits, 0.5, 20, scale)[:, 0].mean().item() for scale in (1.0, 0.5, 0.1)]
    assert share[0] == pytest.approx(1 / 8, rel=1e-3)
    assert share[0] < share[1] < share[2]


@few
@given(seeds)
def test_sinkhorn_is_equivariant_to_the_order_of_rows_and_columns(seed):
    logits, rows, columns = normal(seed, 11, 7), permutation(seed, 11), permutation(seed + 1, 7)
    torch.testing.assert_close(sinkhorn_knopp(logits[rows][:, columns]), sinkhorn_knopp(logits)[rows][:, columns])


@few
@given(seeds)
def test_sinkhorn_leading_dimensions_are_independent_problems(seed):
    logits = normal(seed, 2, 3, 6, 5)
    together = sinkhorn_knopp(logits)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], sinkhorn_knopp(logits[i, j]))


def test_sinkhorn_leaves_its_input_and_the_graph_alone():
    logits = normal(0, 6, 5).requires_grad_()
    before = logits.detach().clone()
    assert not sinkhorn_knopp(logits).requires_grad
    assert torch.equal(logits, before)


def test_sinkhorn_over_two_processes_equals_one(two_processes):
    logits = normal(0, 12, 9)
    logits[:6] *= 3  # so that neither process has the maxima and sums of all
    scales = (1.0, 0.6)

    def assignments(accelerator):
        rows = logits.chunk(2)[accelerator.process_index]
        return [sinkhorn_knopp(rows, scale=scale) for scale in scales]

    for scale, *halves in zip(scales, *two_processes(assignments), strict=True):
        torch.testing.assert_close(torch.cat(halves), sinkhorn_knopp(logits, scale=scale), rtol=1e-5, atol=1e-6)


# Matching ------------------------------------------------------------------------------------------------------------


def exponential_plan(
    predictions: torch.Tensor, targets: torch.Tensor, epsilon: float, num_iterations: int
) -> torch.Tensor:
    cost = (predictions.double()[:, :, None] - targets.double()[:, None]).norm(dim=-1)
    kernel = torch.exp(-cost / epsilon)
    column = torch.ones(cost.shape[0], 1, cost.shape[2], dtype=torch.float64)
    for _ in range(num_iterations):
        row = 1 / (kernel * column).sum(dim=2, keepdim=True)
        column = 1 / (kernel * row).sum(dim=1, keepdim=True)
    return row * kernel * column


@few
@given(seeds, st.integers(1, 3), st.integers(1, 6), st.sampled_from([0.1, 1.0]), st.integers(1, 8))
def test_plan_agrees_with_the_exponential_domain(seed, batch, tokens, epsilon, num_iterations):
    predictions, targets = normal(seed, batch, tokens, 4), normal(seed + 1, batch, tokens, 4)
    plan = matching_plan(predictions, targets, epsilon, num_iterations)
    reference = exponential_plan(predictions, targets, epsilon, num_iterations)
    assert plan.dtype == torch.float32
    assert_close(plan, reference)
    assert torch.equal(match_tokens(predictions, targets, epsilon, num_iterations), reference.argmax(dim=-1))


@few
@given(seeds, st.integers(1, 6))
def test_plan_has_mass_one_in_rows_and_columns(seed, tokens):
    plan = matching_plan(normal(seed, 2, tokens, 4), normal(seed + 1, 2, tokens, 4), epsilon=1.0, num_iterations=200)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(2, tokens), rtol=0, atol=1e-3)
    torch.testing.assert_close(plan.sum(dim=2), torch.ones(2, tokens), rtol=0, atol=1e-3)


@few
@given(seeds)
def test_plan_is_equivariant_to_the_order_of_tokens(seed):
    predictions, targets = normal(seed, 2, 6, 4), normal(seed + 1, 2, 6, 4)
    rows, columns = permutation(seed, 6), permutation(seed + 1, 6)
    plan = matching_plan(predictions[:, rows], targets[:, columns], epsilon=0.5)
    torch.testing.assert_close(
        plan, matching_plan(predictions, targets, epsilon=0.5)[:, rows][:, :, columns], rtol=1e-4, atol=1e-5
    )


@few
@given(seeds, st.integers(1, 16))
def test_shuffled_and_perturbed_copies_match_their_originals(seed, tokens):
    targets, order = normal(seed, 2, tokens, 32), permutation(seed, tokens)
    predictions = targets[:, order] + 0.01 * normal(seed + 1, 2, tokens, 32)
    assert torch.equal(match_tokens(predictions, targets), order.expand(2, tokens))


@few
@given(seeds, dtypes, st.sampled_from([1e3, 1e6]))
def test_matching_survives_huge_tokens(seed, dtype, size):
    tokens = (size * normal(seed, 2, 5, 8)).to(dtype)
    others = (size * normal(seed + 1, 2, 5, 8)).to(dtype)
    assert matching_plan(tokens, others).isfinite().all()
    assert torch.equal(match_tokens(tokens, tokens), torch.arange(5).expand(2, 5))


def test_matching_tells_close_tokens_far_from_the_origin_apart():
    targets = 100 + 0.1 * normal(0, 1, 6, 16)
    predictions = 100 + 0.1 * normal(1, 1, 6, 16)
    assert_close(matching_plan(predictions, targets), exponential_plan(predictions, targets, 0.1, 5), relative=1e-3)


def test_matching_is_exact_under_autocast_and_carries_no_gradient():
    predictions, targets = normal(0, 2, 5, 8).requires_grad_(), normal(1, 2, 5, 8)
    plan = matching_plan(predictions, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matching_plan(predictions, targets), plan)
    assert not plan.requires_grad


# KoLeo ---------------------------------------------------------------------------------------------------------------


def naive_koleo(sparse_tokens: torch.Tensor) -> torch.Tensor:
    terms = []
    for image in sparse_tokens:
        tokens = [token / token.norm() for token in image]
        for i, token in enumerate(tokens):
            others = [(token - other + 1e-8).norm() for j, other in enumerate(tokens) if j != i]
            terms.append(-torch.log(0.5 * min(others) + 1e-8))
    return torch.stack(terms).mean()


@few
@given(seeds, st.integers(1, 3), st.integers(2, 6), st.integers(3, 8))
def test_koleo_and_its_gradient_agree_with_the_definition(seed, batch, count, width):
    tokens = normal(seed, batch, count, width).requires_grad_()
    reference = tokens.detach().double().requires_grad_()
    loss, expected = koleo_loss(tokens), naive_koleo(reference)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert_close(*gradients(loss, tokens), *gradients(expected, reference), relative=1e-3)


@few
@given(seeds)
def test_koleo_gradient_agrees_with_finite_differences(seed):
    # Two tokens an image: with more, the step may change who is nearest.
    tokens, direction = normal(seed, 3, 2, 6).requires_grad_(), normal(seed + 1, 3, 2, 6)
    slope = (gradients(koleo_loss(tokens), tokens)[0] * direction).sum().item()
    with torch.no_grad():
        step = 1e-3
        difference = (koleo_loss(tokens + step * direction) - koleo_loss(tokens - step * direction)) / (2 * step)
    assert difference.item() == pytest.approx(slope, rel=0.05, abs=5e-3)


@few
@given(seeds, st.floats(1e-3, 1e3))
def test_koleo_ignores_length_and_order_of_tokens(seed, length):
    tokens = normal(seed, 2, 5, 8)
    lengths = length * torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(seed)).add(0.1)
    torch.testing.assert_close(koleo_loss((tokens * lengths)[:, permutation(seed, 5)]), koleo_loss(tokens))


def test_koleo_of_one_token_is_zero_with_zero_gradient():
    tokens = normal(0, 3, 1, 8).requires_grad_()
    loss = koleo_loss(tokens)
    assert loss.item() == 0.0
    assert gradients(loss, tokens)[0].abs().max() == 0


def test_koleo_gradient_reaches_both_tokens_of_a_pair():
    # The third token's nearest neighbour is the second, whose own is the first: all of it must reach the second.
    tokens = torch.tensor([[[1.0, 0.0], [0.95, 0.3], [0.0, 1.0]]], requires_grad=True)
    distance = (F.normalize(tokens[0, 2], dim=0) - F.normalize(tokens[0, 1], dim=0)).norm()
    pair = F.normalize(tokens[0, :2], dim=1)
    expected = -(2 * torch.log((pair[0] - pair[1]).norm() / 2) + torch.log(distance / 2)) / 3
    assert_close(gradients(koleo_loss(tokens), tokens)[0], gradients(expected, tokens)[0])


def test_koleo_looks_for_neighbours_in_the_same_image_only():
    image = normal(0, 1, 4, 8)
    assert koleo_loss(image.repeat(2, 1, 1)).item() == pytest.approx(koleo_loss(image).item())


def test_koleo_of_equal_tokens_is_finite():
    tokens = torch.ones(2, 3, 4, requires_grad=True)
    loss = koleo_loss(tokens)
    assert loss.item() > 10
    assert gradients(loss, tokens)[0].isfinite().all()


def test_koleo_computes_in_float32_under_autocast():
    tokens = normal(0, 2, 64, 16)  # so many that bfloat16 would mistake the nearest
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(tokens)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, koleo_loss(tokens))


# Cross entropies over prototypes -------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 9), st.integers(1, 20), st.integers(1, 12), st.sampled_from([0.12, 1.0]))
def test_prototype_cross_entropy_equals_the_plain_one(seed, rows, num_prototypes, chunk_size, temperature):
    projections = F.normalize(normal(seed, rows, 6), dim=-1).requires_grad_()
    prototypes = normal(seed + 1, num_prototypes, 6).requires_grad_()
    assignments = normal(seed + 2, rows, num_prototypes).mul(3).softmax(dim=-1)
    loss = prototype_cross_entropy(
        projections, expected_prototypes(assignments, prototypes), prototypes, temperature, chunk_size
    )
    plain = [tensor.detach().double().requires_grad_() for tensor in (projections, prototypes)]
    reference = F.cross_entropy(plain[0] @ plain[1].T / temperature, assignments.double())

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    # Three times the loss, so that a backward pass that ignores the incoming gradient fails.
    actual, expected = gradients(3 * loss, projections, prototypes), gradients(3 * reference, *plain)
    for gradient, reference_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference_gradient, rtol=1e-4, atol=2e-5)


def test_prototype_cross_entropy_is_a_mean_over_all_leading_dimensions():
    projections, prototypes = normal(0, 2, 3, 4, 6), normal(1, 10, 6)
    expected = expected_prototypes(normal(2, 2, 3, 4, 10).softmax(dim=-1), prototypes)
    rows = [
        prototype_cross_entropy(projections[index][None], expected[index][None], prototypes)
        for index in ((i, j, k) for i in range(2) for j in range(3) for k in range(4))
    ]
    torch.testing.assert_close(
        prototype_cross_entropy(projections, expected, prototypes, chunk_size=5), torch.stack(rows).mean()
    )


def test_expected_prototypes_pass_gradient_to_prototypes_but_not_to_assignments():
    assignments = normal(0, 2, 3, 10).softmax(dim=-1).requires_grad_()
    prototypes, weights = normal(1, 10, 6).requires_grad_(), normal(2, 2, 3, 6)
    expected = expected_prototypes(assignments, prototypes)
    torch.testing.assert_close(expected, torch.einsum("brk,kd->brd", assignments, prototypes))
    gradient, none = torch.autograd.grad((expected * weights).sum(), (prototypes, assignments), allow_unused=True)
    torch.testing.assert_close(gradient, torch.einsum("brk,brd->kd", assignments, weights))
    assert none is None


def test_prototype_cross_entropy_computes_in_float32_under_autocast():
    projections = F.normalize(normal(0, 8, 32), dim=-1).requires_grad_()
    prototypes, assignments = normal(1, 20, 32).requires_grad_(), normal(2, 8, 20).softmax(dim=-1)

    def loss() -> torch.Tensor:
        return prototype_cross_entropy(projections, expected_prototypes(assignments, prototypes), prototypes)

    reference = loss()
    reference_gradients = gradients(loss(), projections, prototypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss()
        assert torch.equal(value, reference)
        # A backward pass inside autocast is unusual, but must run; the matrix product of A W is then in bfloat16.
        inside = gradients(loss(), projections, prototypes)
    for actual, expected in zip(gradients(value, projections, prototypes), reference_gradients, strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(inside, reference_gradients, strict=True):
        assert_close(actual, expected, relative=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_joint_terms_and_all_gradients_equal_the_formulation_with_gathered_targets(seed):
    """Two views an image, matched: every target gathered to (rows, K), plain log-softmax, autograd throughout."""
    batch, views, count, width, dim, num_prototypes = 3, 2, 4, 12, 6, 30
    clean = normal(seed, batch, count, width).requires_grad_()
    noise = 0.3 * normal(seed + 1, batch, views, count, width)
    order = permutation(seed, count)
    masked = (clean.detach()[:, None, order] + noise).flatten(0, 1).requires_grad_()
    head = normal(seed + 2, width, dim).requires_grad_()
    prototypes = normal(seed + 3, num_prototypes, dim).requires_grad_()
    leaves = (clean, masked, head, prototypes)

    def project(tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(tokens @ head, dim=-1)

    with torch.no_grad():
        logits = project(clean) @ prototypes.T
        assignments = sinkhorn_knopp(logits.flatten(0, 1)).view(batch, count, num_prototypes)
        matched = match_tokens(masked, clean.repeat_interleave(views, dim=0)).unsqueeze(-1)
    assert not torch.equal(matched[0, :, 0], torch.arange(count))

    expected = expected_prototypes(assignments, prototypes)
    matched_expected = expected.repeat_interleave(views, dim=0).take_along_dim(matched, dim=1)
    ours = (
        prototype_cross_entropy(project(clean), expected, prototypes)
        + prototype_cross_entropy(project(masked), matched_expected, prototypes, chunk_size=5)
        + 0.1 * koleo_loss(masked)
    )

    gathered = assignments.repeat_interleave(views, dim=0).take_along_dim(matched, dim=1)
    plain = 0.1 * koleo_loss(masked)
    for tokens, targets in ((clean, assignments), (masked, gathered)):
        plain = plain - (targets * (project(tokens) @ prototypes.T / 0.12).log_softmax(dim=-1)).sum(dim=-1).mean()

    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for actual, reference in zip(gradients(ours, *leaves), gradients(plain, *leaves), strict=True):
        assert_close(actual, reference, relative=1e-4)


# Masking -------------------------------------------------------------------------------------------------------------

grids = st.tuples(st.integers(2, 12), st.integers(2, 12))


@few
@given(st.integers(1, 1024), st.floats(0, 0.999))
def test_kept_patches_are_the_share_that_is_not_masked_and_at_least_one(num_patches, mask_ratio):
    kept = num_kept_patches(num_patches, mask_ratio)
    assert 1 <= kept <= num_patches
    assert kept == 1 or 0 <= num_patches * (1 - mask_ratio) - kept < 1


def test_number_of_kept_patches_of_the_paper():
    assert num_kept_patches(196, 0.8) == 39
    assert num_kept_patches(196, 0.0) == 196


@few
@given(seeds, grids, st.sampled_from(["gaussian", "block", None]))
def test_masking_noise_has_its_shape_and_follows_its_generator(seed, grid, focus):
    noise, again = (masking_noise(5, grid, 3, focus, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert noise.shape == (5, grid[0] * grid[1]) and noise.dtype == torch.float32
    assert torch.equal(noise, again)
    assert not torch.equal(noise, masking_noise(5, grid, 3, focus, generator=torch.Generator().manual_seed(seed + 1)))


def test_masking_without_focus_is_uniform():
    noise = masking_noise(4000, (4, 6), 6, focus=None, generator=torch.Generator().manual_seed(0))
    assert 0 <= noise.min() and noise.max() < 1
    quantiles = noise.flatten().quantile(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), rtol=0, atol=0.01)
    kept = noise.argsort(dim=1)[:, : num_kept_patches(24, 0.75)]
    frequency = torch.bincount(kept.flatten(), minlength=24) / 4000
    torch.testing.assert_close(frequency, torch.full((24,), 0.25), rtol=0, atol=0.04)


@pytest.mark.parametrize("grid", [(14, 14), (8, 20)])
def test_gaussian_focus_keeps_patches_close_together_in_half_of_the_images(grid):
    noise = masking_noise(1000, grid, 5, focus="gaussian", generator=torch.Generator().manual_seed(0))
    # The focus lowers its cell by one, so that a focused image has a negative score there and no other image has one.
    focused = noise.amin(dim=1) < 0
    assert 0.45 < focused.float().mean() < 0.55
    kept = noise.argsort(dim=1)[:, : num_kept_patches(math.prod(grid), 0.8)]
    cells = torch.stack([kept // grid[1], kept % grid[1]], dim=-1).float()
    spread = torch.cdist(cells, cells).mean(dim=(1, 2))
    assert spread[focused].mean() < 0.85 * spread[~focused].mean()
    # Everywhere: the lowest cells reach every row and column.
    lowest = noise[focused].argmin(dim=1)
    assert set((lowest // grid[1]).tolist()) == set(range(grid[0]))
    assert set((lowest % grid[1]).tolist()) == set(range(grid[1]))


def test_gaussian_focus_is_a_gaussian_of_the_drawn_width():
    """Noise averages to 1/2, so that its mean over many images shows the mean bump; here for grids of one row."""
    noise = masking_noise(20000, (1, 16), 4, focus="gaussian", generator=torch.Generator().manual_seed(0))
    centre = torch.arange(16)
    sigma = 4 * torch.linspace(0.1, 0.5, 2001)  # of sqrt(1 * 16) cells
    bump = torch.exp(-((centre[:, None, None] - centre[None, :, None]) ** 2) / (2 * sigma**2)).mean(dim=(0, 2))
    torch.testing.assert_close(noise.mean(dim=0), 0.5 - 0.5 * bump, rtol=0, atol=0.015)


@few
@given(seeds, grids, st.sampled_from([0.25, 0.5, 0.8]))
def test_block_focus_keeps_a_whole_square(seed, grid, mask_ratio):
    kept_count = num_kept_patches(math.prod(grid), mask_ratio)
    side = min(math.isqrt(kept_count), *grid)
    noise = masking_noise(16, grid, kept_count, "block", generator=torch.Generator().manual_seed(seed))
    kept = noise.argsort(dim=1)[:, :kept_count]
    for scores, cells in zip(noise, kept, strict=True):
        block = (scores == 0).nonzero().flatten()
        if len(block) == 0:
            continue
        assert len(block) == side**2
        assert (block // grid[1]).unique().numel() == (block % grid[1]).unique().numel() == side
        assert (block // grid[1]).max() - (block // grid[1]).min() == side - 1
        assert (block % grid[1]).max() - (block % grid[1]).min() == side - 1
        assert torch.isin(block, cells).all()


def test_block_focus_falls_on_half_of_the_images_and_on_every_cell():
    noise = masking_noise(2000, (5, 9), 9, focus="block", generator=torch.Generator().manual_seed(0))
    inside = noise == 0
    assert 0.46 < inside.any(dim=1).float().mean() < 0.54
    assert inside.any(dim=0).all()


# Diagnostics of collapse ---------------------------------------------------------------------------------------------


def usage(prototypes: torch.Tensor, num_prototypes: int) -> tuple[float, float]:
    """Diagnostics of hard assignments (B, r) to prototypes."""
    entropy, information = prototype_usage(F.one_hot(prototypes, num_prototypes))
    return entropy.item(), information.item()


def test_prototype_usage_of_known_cases():
    images, slots = torch.arange(8)[:, None], torch.arange(4)[None]
    close = pytest.approx
    assert usage(torch.zeros(8, 4, dtype=torch.long), 16) == close((0, 0), abs=1e-6)  # one prototype takes all
    assert usage(slots.expand(8, 4), 16) == close((0.5, 1), abs=1e-6)  # the slot alone decides
    assert usage(images.expand(8, 4), 16) == close((0.75, 0), abs=1e-6)  # the image alone decides
    # All are different: the slot explains as much as any four groups of tokens would.
    assert usage((images * 4 + slots), 32) == close((1, math.log(4) / math.log(32)), abs=1e-6)
    assert usage((images + slots) % 8, 8) == close((1, 0), abs=1e-6)  # all are used, by every slot alike
    assert usage(images[:, :1], 8) == close((1, 0), abs=1e-6)  # a single slot
    entropy, information = prototype_usage(torch.full((8, 4, 16), 1 / 16))  # no decision at all
    assert (entropy.item(), information.item()) == close((1, 0), abs=1e-6)


@few
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_prototype_usage_is_within_its_range(seed, batch, slots, num_prototypes):
    for value in prototype_usage(normal(seed, batch, slots, num_prototypes).mul(5).softmax(dim=-1)):
        assert -1e-5 <= value.item() <= 1 + 1e-5


def test_token_diversity_of_known_cases():
    assert token_diversity(torch.ones(2, 5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert token_diversity(torch.eye(4)[None] * torch.arange(1, 5)).item() == pytest.approx(1)
    assert token_diversity(torch.tensor([[[1.0, 0.0], [-3.0, 0.0]]])).item() == pytest.approx(2)
    assert token_diversity(torch.ones(2, 1, 3)).item() == 0


@few
@given(seeds, dtypes)
def test_token_diversity_ignores_length_and_order(seed, dtype):
    tokens = normal(seed, 2, 5, 8, dtype=dtype)
    lengths = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=dtype)[:, None]
    torch.testing.assert_close(token_diversity((tokens * lengths)[:, permutation(seed, 5)]), token_diversity(tokens))


def test_localization_sharpness_is_the_mean_largest_share_of_a_patch():
    localization = torch.tensor([[[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]], [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]])
    assert localization_sharpness(localization).item() == pytest.approx((0.7 + 0.4 + 1 + 0.5) / 4)
    assert localization_sharpness(torch.full((2, 9, 4), 0.25, dtype=torch.bfloat16)) == 0.25


OFTEN, RARELY, MOSTLY = [0.75, 0.25], [0.25, 0.75], [0.9, 0.1]


@pytest.mark.parametrize(
    ("images", "entropy", "information"),
    [
        ([[OFTEN, RARELY], [OFTEN, RARELY]], 1, 1),  # the slot alone decides
        ([[OFTEN, RARELY], [RARELY, OFTEN]], 1, 0),  # the slot says nothing
        # H(5/8) = 0.6616 nats; of slots H(5/8) - (H(3/4) + H(1/2)) / 2 = 0.0338, of tokens H(5/8) - H(3/4) = 0.0992.
        ([[OFTEN, RARELY], [OFTEN, OFTEN]], 0.9544, 0.3409),
        ([[MOSTLY, MOSTLY], [MOSTLY, MOSTLY]], 0.4690, 0),  # H(0.9) / ln 2; nothing tells tokens apart
    ],
)
def test_prototype_usage_of_soft_assignments(images, entropy, information):
    values = [value.item() for value in prototype_usage(torch.tensor(images))]
    assert values == pytest.approx([entropy, information], abs=1e-4)
