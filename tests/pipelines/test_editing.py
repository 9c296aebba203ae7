# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Laws of editing: on random factorizations, and in what the demo model decodes from edited scenes."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import stellar_hf
from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline
from stellar_hf.data import load_photo_mosaics
from stellar_hf.loss_stellar import matching_plan
from stellar_hf.pipelines import editing

NUM_SCENES = 60
GRID = (6, 5)


def factors(seed: int = 0, batch: int = 3, tokens: int = 4, sharpness: float = 4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sparse_tokens = torch.randn(batch, tokens, 8, generator=generator, dtype=dtype)
    logits = torch.randn(batch, GRID[0] * GRID[1], tokens, generator=generator, dtype=dtype)
    return sparse_tokens, (sharpness * logits).softmax(-1)


def every_edit(tokens, maps, concept, other_tokens, other_maps, rows=1.5, columns=-2, factor=1.4, weight=0.3):
    """Result of each method that changes L, by its name."""
    swapped = editing.swap(tokens, maps, concept, other_tokens, other_maps, 1)
    return {
        "erase": editing.erase(tokens, maps, concept),
        "move": editing.move(tokens, maps, concept, rows, columns, GRID),
        "scale": editing.scale(tokens, maps, concept, factor, GRID),
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
        editing.erase(tokens, maps, torch.zeros(3, 4, dtype=torch.bool)),
    ):
        torch.testing.assert_close(edited, (tokens, maps), rtol=0, atol=1e-5)
    first, first_maps, second, second_maps = editing.swap(tokens, maps, concept, tokens, maps, concept)
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
    torch.testing.assert_close(gone, editing.erase(tokens, maps, [1, 2])[1], rtol=0, atol=1e-5)


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
        (lambda s, m: editing.move(s, m, 0, torch.ones(2), 0, GRID), "one for each of 3 images"),
        (lambda s, m: editing.scale(s, m, 0, 0, GRID), "must be positive"),
        (lambda s, m: editing.interpolate(s, m, s, m, 1.5), r"in \[0, 1\]"),
        (lambda s, m: editing.interpolate(s, m, s[:, :3], m[..., :3], 0.5), "must be the same"),
        (lambda s, m: editing.swap(s, m, 0, s, m[:, :5], 0), "must be the same"),
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


def test_pipeline_has_the_edits_as_methods(pipe):
    tokens, maps = factors(dtype=torch.float32)
    assert torch.equal(pipe.erase(tokens, maps, 1)[1], editing.erase(tokens, maps, 1)[1])
    assert all(getattr(pipe, name) is getattr(editing, name) for name in editing.__all__)


# Laws of what is decoded ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return StellarPipeline(
        image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
        model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
    )


@pytest.fixture(scope="module")
def scenes(pipe):
    """S, L, masks of the foreground, and the concept that stands there."""
    data = load_photo_mosaics("test", num_scenes=NUM_SCENES)
    masks = torch.tensor(np.array(data["mask"])) == 1
    tokens, localization = pipe.encode(list(data["image"]))
    concept = pipe.select(localization, masks)
    assert concept.any(1).float().mean() > 0.9
    return tokens, localization, masks, concept


@pytest.fixture(scope="module")
def original(pipe, scenes):
    """The scenes, decoded as they are."""
    tokens, localization, _, _ = scenes
    return decode(pipe, tokens, localization)


@pytest.fixture(scope="module")
def erased(pipe, scenes):
    """The scenes, decoded without the concept."""
    tokens, localization, _, concept = scenes
    return decode(pipe, *pipe.erase(tokens, localization, concept))


def decode(pipe, tokens, localization):
    return pipe(sparse_tokens=tokens, localization=localization, output_type="pt").images


def shifted(images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(B, C, 32, 32) moved by pixels, 0 where nothing comes from."""
    return F.pad(images.float(), (32, 32, 32, 32)).roll((rows, columns), (2, 3))[:, :, 32:-32, 32:-32]


@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (-2, 3)])
def test_moving_a_map_moves_the_decoded_region(pipe, scenes, original, erased, rows, columns):
    tokens, localization, masks, concept = scenes
    moved = decode(pipe, *pipe.move(tokens, localization, concept, rows, columns))
    pixels = (2 * rows, 2 * columns)
    expected = shifted(masks[:, None], *pixels)[:, 0] > 0

    # A pixel shows the region if it is nearer to the decoded scene at that shift than to the scene without the region.
    to_region = (moved - shifted(original, *pixels)).square().sum(1)
    inside = shifted(torch.ones_like(original[:, :1]), *pixels)[:, 0] > 0
    seen = (to_region < (moved - erased).square().sum(1)) & inside
    assert overlap(seen, expected).mean() > 0.5

    # What the model itself finds there when it looks at the decoded image.
    _, found = pipe.encode(moved)
    maps = (found * pipe.select(found, expected)[:, None]).sum(2).view(-1, 1, 16, 16)
    assert overlap(F.interpolate(maps, size=(32, 32))[:, 0] > 0.5, expected).mean() > 0.65


def overlap(region: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (region & expected).sum((1, 2)) / (region | expected).sum((1, 2)).clamp_min(1)


def test_erasing_leaves_the_place_closer_to_the_background(scenes, original, erased):
    masks = scenes[2]

    def colour(images, where):
        return (images * where[:, None]).sum((2, 3)) / where.sum((1, 2))[:, None]

    background, region, place = colour(original, ~masks), colour(original, masks), colour(erased, masks)
    to_background, to_region = (place - background).norm(dim=1), (place - region).norm(dim=1)
    assert (to_background < to_region).float().mean() > 0.8
    assert to_background.mean() < 0.5 * to_region.mean()


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
    expected = editing.erase(tokens, maps, 2)[1]
    for same in (mask, np.array(mask), torch.tensor(mask), np.int64(2), torch.tensor(2), [2], np.array([2])):
        assert torch.equal(editing.erase(tokens, maps, same)[1], expected)
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
