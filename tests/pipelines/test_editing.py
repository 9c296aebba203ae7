# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Laws of editing: on random factorizations, and in what the demo model decodes from edited scenes."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import object_edits
from stellar_hf import StellarPipeline
from stellar_hf.loss_stellar import matching_plan
from stellar_hf.pipelines import editing

GRID = (6, 5)


def factors(seed: int = 0, batch: int = 3, tokens: int = 4, sharpness: float = 4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sparse_tokens = torch.randn(batch, tokens, 8, generator=generator, dtype=dtype)
    logits = torch.randn(batch, GRID[0] * GRID[1], tokens, generator=generator, dtype=dtype)
    return sparse_tokens, (sharpness * logits).softmax(-1)


def every_edit(tokens, maps, concept, other_tokens, other_maps, rows=1.5, columns=-2, factor=1.4, weight=0.3):
    """Result of each method that changes L, by its name."""
    swapped = editing.swap(tokens, maps, concept, other_tokens, other_maps, 1, GRID)
    return {
        "erase": editing.erase(tokens, maps, concept, GRID),
        "move": editing.move(tokens, maps, concept, rows, columns, GRID),
        "scale": editing.scale(tokens, maps, concept, factor, GRID),
        "exchange": editing.exchange(tokens, maps, 0, [1, 3]),
        "swap": swapped[:2],
        "swap, the other": swapped[2:],
        "interpolate": editing.interpolate(tokens, maps, other_tokens, other_maps, weight),
        "transfer": editing.transfer(tokens, maps, other_tokens),
    }


# Laws of S and L -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sharpness=st.sampled_from([0.5, 5.0, 200.0]),
    concept=st.sampled_from([0, [1, 3], [0, 1, 2]]),
    rows=st.floats(-8, 8),
    columns=st.floats(-8, 8),
    factor=st.floats(0.05, 8),
    weight=st.floats(0, 1),
)
def test_rows_stay_distributions(seed, sharpness, concept, rows, columns, factor, weight):
    tokens, maps = factors(seed, sharpness=sharpness)
    others = factors(seed + 1, sharpness=sharpness)
    for name, (_, edited) in every_edit(tokens, maps, concept, *others, rows, columns, factor, weight).items():
        assert (edited > -1e-5).all(), name
        torch.testing.assert_close(edited.sum(-1), torch.ones_like(edited[..., 0]), rtol=0, atol=1e-5, msg=name)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), concept=st.sampled_from([2, [0, 3]]))
def test_doing_nothing_changes_nothing(seed, concept):
    tokens, maps = factors(seed)
    for edited in (
        editing.move(tokens, maps, concept, 0, 0, GRID),
        editing.scale(tokens, maps, concept, 1, GRID),
        editing.transfer(tokens, maps, tokens),
        editing.erase(tokens, maps, torch.zeros(3, 4, dtype=torch.bool), GRID),
    ):
        torch.testing.assert_close(edited, (tokens, maps), rtol=0, atol=1e-5)
    first, first_maps, second, second_maps = editing.swap(tokens, maps, concept, tokens, maps, concept, GRID)
    torch.testing.assert_close(first_maps @ first, maps @ tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(second_maps @ second, maps @ tokens, rtol=0, atol=1e-5)


def test_interpolation_ends_in_the_images_up_to_the_order_of_tokens():
    tokens, maps = factors()
    order = torch.tensor([2, 0, 3, 1])
    other_tokens, other_maps = factors(1)
    torch.testing.assert_close(
        editing.interpolate(tokens, maps, other_tokens, other_maps, 0), (tokens, maps), rtol=0, atol=0
    )
    end_tokens, end_maps = editing.interpolate(tokens, maps, other_tokens, other_maps, 1)
    torch.testing.assert_close(end_maps @ end_tokens, other_maps @ other_tokens)
    torch.testing.assert_close(end_tokens.sort(1).values, other_tokens.sort(1).values)
    # The same image with tokens in another order: nothing moves on the way.
    for weight in (0.4, torch.tensor([0.0, 0.5, 1.0])):
        between = editing.interpolate(tokens, maps, tokens[:, order], maps[:, :, order], weight)
        torch.testing.assert_close(between, (tokens, maps))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 200), spread=st.sampled_from([0.05, 0.3, 2.0]))
@example(seed=1, spread=0.3)
def test_tokens_are_matched_by_the_permutation_with_the_most_mass_of_the_transport_plan(seed, spread):
    """Taking the largest entries one by one finds less, for example with the seed 1 and 0.3."""
    generator = torch.Generator().manual_seed(seed)
    tokens, others = spread * torch.randn(2, 1, 4, 2, generator=generator)
    maps = torch.full((1, 9, 4), 0.25)
    matched, _ = editing.transfer(tokens, maps, others)
    match = [others[0].tolist().index(token) for token in matched[0].tolist()]
    (plan,) = matching_plan(tokens, others, num_iterations=200)

    def mass(permutation):
        return sum(plan[token, other].item() for token, other in enumerate(permutation))

    assert sorted(match) == [0, 1, 2, 3]
    assert mass(match) == pytest.approx(max(map(mass, itertools.permutations(range(4)))))


def test_moved_there_and_back_away_from_the_border():
    tokens, _ = factors(batch=1, tokens=3)
    rows = torch.full((1, *GRID, 3), 1e-9, dtype=torch.float64)
    rows[..., 0] = 1
    rows[:, 2:4, 1:3] = torch.tensor([1e-9, 0.7, 0.3], dtype=torch.float64)
    maps = (rows / rows.sum(-1, keepdim=True)).flatten(1, 2)
    _, moved = editing.move(tokens, maps, [1, 2], 1, 2, GRID)
    torch.testing.assert_close(moved[0].view(*GRID, 3)[3:5, 3:5, 1:].sum().item(), 4.0, atol=1e-5, rtol=0)
    assert moved[0].view(*GRID, 3)[2, 1, 0] > 0.999
    _, back = editing.move(tokens, moved, [1, 2], -1, -2, GRID)
    torch.testing.assert_close(back, maps, rtol=0, atol=1e-5)
    _, gone = editing.move(tokens, maps, [1, 2], 20, 0, GRID)
    torch.testing.assert_close(gone, editing.erase(tokens, maps, [1, 2], GRID)[1], rtol=0, atol=1e-5)


def test_a_place_goes_to_what_is_around_it():
    rows = torch.zeros(1, 12, 12, 4)
    rows[:, :, :6, 0], rows[:, :, 6:, 1] = 1, 1
    rows[:, 4:8, 1:3], rows[:, 4:8, 9:11] = torch.tensor([0.0, 0, 1, 0]), torch.tensor([0.0, 0, 0, 1])
    _, erased = editing.erase(torch.zeros(1, 4, 2), rows.flatten(1, 2), [2, 3])
    maps = erased.view(12, 12, 4)
    assert maps[4:8, 1:3, 0].min() > 0.9 and maps[4:8, 9:11, 1].min() > 0.9


def test_scale_changes_the_area_about_the_centre():
    tokens, _ = factors(batch=1, tokens=2)
    area = torch.zeros(1, 30, 30)
    area[:, 10:16, 14:20] = 1
    maps = torch.stack([1 - area, area], dim=3).flatten(1, 2)
    for factor in (0.5, 2.0):
        scaled = editing.scale(tokens.float(), maps, 1, factor)[1][0, :, 1].view(30, 30)
        assert scaled.sum() == pytest.approx(36 * factor**2, rel=0.05)
        assert (scaled.sum(1) * torch.arange(30)).sum() / scaled.sum() == pytest.approx(12.5, abs=0.05)
        assert (scaled.sum(0) * torch.arange(30)).sum() / scaled.sum() == pytest.approx(16.5, abs=0.05)


def test_exchanged_concepts_paint_each_other_s_places():
    tokens, maps = factors()
    _, edited = editing.exchange(tokens, maps, 0, 2)
    torch.testing.assert_close(edited @ tokens, maps @ tokens[:, [2, 1, 0, 3]])
    _, edited = editing.exchange(tokens, maps, [0, 3], 2)
    torch.testing.assert_close(edited[..., [0, 3]].sum(-1), maps[..., 2])
    torch.testing.assert_close(edited[..., 1], maps[..., 1])
    in_image = maps.sum(1)
    torch.testing.assert_close(edited[..., 0] / edited[..., 3], (in_image[:, :1] / in_image[:, 3:]).expand(-1, 30))
    # An image that lacks one of both stays what it is.
    concept = torch.tensor([[True, False, False, False], [False] * 4, [True, False, False, False]])
    other_concept = torch.tensor([[False] * 4, [False, True, False, False], [False, True, False, False]])
    _, edited = editing.exchange(tokens, maps, concept, other_concept)
    torch.testing.assert_close(edited[:2], maps[:2])
    torch.testing.assert_close(edited[2], maps[2][:, [1, 0, 2, 3]])


def test_batch_equals_single_images_with_concepts_of_their_own():
    tokens, maps = factors()
    others = factors(1)
    concept = torch.tensor([[True, False, True, False], [False, False, False, False], [False, True, False, False]])
    numbers = {"rows": [1.0, 2, -1], "columns": [0.5, 0, 3], "factor": [0.5, 1, 2], "weight": [0.1, 0.5, 1]}
    batch = every_edit(tokens, maps, concept, *others, **{name: torch.tensor(n) for name, n in numbers.items()})
    for image in range(3):
        one = slice(image, image + 1)
        arguments = (tokens[one], maps[one], concept[one], others[0][one], others[1][one])
        single = every_edit(*arguments, **{name: values[image] for name, values in numbers.items()})
        for name, result in single.items():
            torch.testing.assert_close(result, tuple(part[one] for part in batch[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sharpness", [1.0, 2000.0])  # with 2000, most entries are exactly 0
def test_gradients_reach_tokens_maps_and_numbers(sharpness):
    tokens, maps = (tensor.requires_grad_() for tensor in factors(sharpness=sharpness))
    numbers = {name: torch.tensor(0.4, requires_grad=True) for name in ("rows", "columns", "factor", "weight")}
    results = every_edit(tokens, maps, [0, 2], *factors(1), **numbers)
    sum((edited @ what).square().sum() for what, edited in results.values()).backward()
    for tensor in (tokens, maps, *numbers.values()):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_where_a_concept_has_all_of_a_patch(dtype):
    tokens, maps = factors(sharpness=2000.0, dtype=torch.float32)
    tokens, maps = tokens.to(dtype), maps.to(dtype)
    for _, edited in every_edit(tokens, maps, [0, 2], *(part.to(dtype) for part in factors(1))).values():
        assert edited.dtype == dtype
        torch.testing.assert_close(edited.float().sum(-1), torch.ones(3, 30), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s, m: editing.erase(s, m, 4), "from 0 to 3"),
        (lambda s, m: editing.erase(s, m, [0, 1, 2, 3]), "all 4 tokens"),
        (lambda s, m: editing.erase(s, m, torch.ones(4, dtype=torch.bool)), "bool tensor"),
        (lambda s, m: editing.erase(s[0], m, 0), "are expected"),
        (lambda s, m: editing.move(s, m, 0, 1), "pass grid_size"),
        (lambda s, m: editing.erase(s, m, 0), "pass grid_size"),
        (lambda s, m: editing.move(s, m, 0, torch.ones(2), 0, GRID), "one for each of 3 images"),
        (lambda s, m: editing.scale(s, m, 0, 0, GRID), "must be positive"),
        (lambda s, m: editing.interpolate(s, m, s, m, 1.5), r"in \[0, 1\]"),
        (lambda s, m: editing.interpolate(s, m, s[:, :3], m[..., :3], 0.5), "must be the same"),
        (lambda s, m: editing.swap(s, m, 0, s, m[:, :5], 0), "must be the same"),
        (lambda s, m: editing.exchange(s, m, [0, 1], [1, 2]), r"the tokens \[1\], but only different tokens"),
        (lambda s, m: editing.move(s, m, 0, float("nan"), 0, GRID), "rows is nan, but must be finite"),
        (lambda s, m: editing.move(s, m, 0, 0, torch.tensor([0.0, float("inf"), 0.0]), GRID), "columns is"),
        (lambda s, m: editing.scale(s, m, 0, float("nan"), GRID), "factor is nan, but must be finite"),
        (lambda s, m: editing.interpolate(s, m, s, m, float("nan")), "weight is nan"),
        (lambda s, m: editing.erase(s, m, 0.5), r"concept is \[0.5\], but tokens have whole numbers"),
        (lambda s, m: editing.erase(s, m, [1.0, 2.0]), "whole numbers"),
        (lambda s, m: editing.erase(s, m, "flower"), "concept is 'flower', but must be a number"),
        (lambda s, m: editing.erase(s, m, None), "concept is None"),
        (lambda s, m: editing.scale(s, m, 0, "2", GRID), "factor is '2', but must be a number"),
        (lambda s, m: editing.erase(s.numpy(), m, 0), "sparse_tokens is a ndarray, but must be a floating point"),
        (lambda s, m: editing.erase(s, m.long(), 0), "localization is torch.int64, but must be a floating point"),
        (lambda s, m: editing.transfer(s, m, [1]), "other_sparse_tokens is a list"),
    ],
)
def test_impossible_edits_are_refused_in_a_sentence(edit, said):
    with pytest.raises(ValueError, match=said):
        edit(*factors())


def test_editing_needs_no_diffusers():
    code = "import sys, stellar_hf.pipelines.editing; print({'diffusers', 'transformers'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


def test_pipeline_has_the_edits_as_methods():
    assert all(getattr(StellarPipeline, name) is getattr(editing, name) for name in editing.__all__)


def test_edits_of_objects_show_in_what_the_demo_model_decodes():
    """A benchmark measures the laws that docs/editing.md tells; here a few scenes, and bounds with some room."""
    laws = object_edits.all_laws(object_edits.by_tokens(*object_edits.read_scenes("validation", 0, 24, "cpu")))
    assert laws["objects that tokens stand for"] > 0.7
    assert laws["decoded: the place looks like the ground"] < 0.2
    assert laws["erased: the place looks like the ground"] > 0.75
    assert laws["moved: the new place looks like the object"] > 0.75
    assert laws["moved: the old place looks like the ground"] > 0.75
    assert laws["moved: IoU of its mask and what changed"] > 0.5
    assert laws["exchanged: the place looks like the other object"] > 0.7
    assert min(laws[f"{edit}: PSNR of the rest"] for edit in ("erased", "exchanged")) > 27


def test_select_finds_the_tokens_of_a_place():
    maps = torch.zeros(2, 2, 4, 3)
    maps[:, :, :2, 0] = 1
    maps[:, :, 2:, 2] = 1
    maps = maps.flatten(1, 2)
    left = torch.zeros(20, 40, dtype=torch.bool)
    left[:, :20] = True
    both = torch.stack([left, ~left])
    first, last = [True, False, False], [False, False, True]
    assert editing.select(maps, left, (2, 4)).tolist() == [first, first]
    assert editing.select(maps, both, (2, 4)).tolist() == [first, last]


def test_a_mask_of_tokens_means_the_same_in_any_container():
    tokens, maps = factors(batch=1)
    num_tokens = tokens.shape[1]
    mask = [[index == 2 for index in range(num_tokens)]]
    expected = editing.erase(tokens, maps, 2, GRID)[1]
    for same in (mask, np.array(mask), torch.tensor(mask), np.int64(2), torch.tensor(2), [2], np.array([2])):
        assert torch.equal(editing.erase(tokens, maps, same, GRID)[1], expected)
    with pytest.raises(ValueError, match="bool"):
        editing.erase(tokens, maps, mask[0])


def test_half_precision_moves_by_the_same_fractions():
    """Coordinates of large grids are not whole numbers of the eight bits of bfloat16."""
    rows = columns = 40
    maps = torch.zeros(1, rows, columns, 2)
    maps[:, 28:34, 28:34, 1] = 1
    maps[..., 0] = 1 - maps[..., 1]
    maps, tokens = maps.flatten(1, 2), torch.zeros(1, 2, 3)
    for edit, argument in ((editing.move, {"rows": 0.3}), (editing.scale, {"factor": 1.3})):
        _, exact = edit(tokens, maps, 1, **argument)
        _, half = edit(tokens.bfloat16(), maps.bfloat16(), 1, **argument)
        assert half.dtype == torch.bfloat16
        assert (half.float() - exact).abs().max() < 0.01


def test_gradient_is_finite_where_a_concept_had_everything():
    maps = torch.zeros(1, 16, 3)
    maps[..., 1] = 1
    maps.requires_grad_(True)
    _, erased = editing.erase(torch.zeros(1, 3, 2), maps, 1)
    erased.square().sum().backward()
    assert torch.isfinite(maps.grad).all()


def test_place_is_a_mask_of_truth_values():
    _, maps = factors(batch=1)
    with pytest.raises(ValueError, match=r"float32.*bool"):
        editing.select(maps, torch.full((4, 4), 0.9))
    with pytest.raises(ValueError, match="threshold is 0.1"):
        editing.select(maps, torch.ones(4, 4, dtype=torch.bool), threshold=0.1)
