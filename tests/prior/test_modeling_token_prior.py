# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The prior over tokens and localization."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_hf import StellarTokenPrior


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 3))
def test_unpacking_undoes_packing(prior, seed, batch_size, random_factors):
    tokens, localization = random_factors(batch_size, seed)
    unpacked_tokens, unpacked_localization = prior.unpack(prior.pack(tokens, localization))
    torch.testing.assert_close(unpacked_tokens, tokens, rtol=1e-4, atol=1e-4)
    # Shares below exp(-6) come back as that.
    assert (unpacked_localization - localization).abs().max() < 4 * np.exp(-6)
    torch.testing.assert_close(unpacked_localization.sum(-1), torch.ones(batch_size, 16))


def test_latents_of_the_measured_images_are_standardized(prior, random_factors):
    latents = prior.pack(*random_factors(64, seed=1))
    assert latents.shape == (64, 4 * 32 + 16 * 4)
    tokens, logits = prior.split(latents)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(4, 32), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.std(0), torch.ones(4, 32), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits.mean((0, 1)), torch.zeros(4), rtol=0, atol=1e-4)
    assert 0.95 < logits.std() < 1.05


def test_zero_shares_of_the_localization_are_finite(prior, random_factors):
    tokens, _ = random_factors(1)
    one_hot = torch.eye(4)[torch.arange(16) % 4][None]
    _, localization = prior.unpack(prior.pack(tokens, one_hot))
    assert torch.equal(localization.argmax(-1), one_hot.argmax(-1)) and localization.amax(-1).min() > 0.99


def test_sorted_tokens_come_back_as_one_reads_with_their_maps(make_prior, random_factors):
    prior = make_prior(sort_tokens=True)
    tokens, _ = random_factors(1)
    # Each token on a quarter of the grid: 0 at the bottom left, 1 at the top right, 2 at the bottom right, 3 at the
    # top left.
    localization = torch.eye(4)[torch.tensor([[3, 1], [0, 2]]).repeat_interleave(2, 0).repeat_interleave(2, 1)]
    localization = localization.flatten(0, 1)[None]
    prior.set_statistics(*random_factors(8, seed=1))
    unpacked, maps = prior.unpack(prior.pack(tokens, localization))
    torch.testing.assert_close(unpacked, tokens[:, [3, 1, 0, 2]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps @ unpacked, localization @ tokens, rtol=0, atol=0.1)
    # In whichever order they come, the latents are the same: the statistics are of sorted tokens, too.
    tokens, localization = random_factors(8, seed=1)
    latents = prior.pack(tokens, localization)
    torch.testing.assert_close(prior.pack(tokens.flip(1), localization.flip(2)), latents)
    torch.testing.assert_close(prior.split(latents)[0].mean(0), torch.zeros(4, 32), rtol=0, atol=1e-5)


def test_a_new_prior_predicts_the_mean_so_its_flow_ends_there(prior_sizes):
    torch.manual_seed(0)
    prior = StellarTokenPrior(**prior_sizes)
    sample = torch.randn(2, prior.latent_size)
    torch.testing.assert_close(prior(sample, 500.0).sample, sample / 0.5)
    torch.testing.assert_close(prior(sample, 1.0).sample, sample / 0.05)


def test_class_noise_level_and_every_element_matter_everywhere(prior):
    sample = torch.randn(1, prior.latent_size, generator=torch.Generator().manual_seed(0))

    def difference(sample=sample, timestep=500.0, label=0):
        change = prior(sample, timestep, torch.tensor([label])).sample - prior(*same).sample
        tokens, logits = prior.split(change)
        return min(tokens.abs().amax((0, 2)).min(), logits.abs().amax(2).min())

    same = (sample, 500.0, torch.tensor([0]))
    assert difference() == 0
    assert difference(label=1) > 1e-6
    assert difference(timestep=400.0) > 1e-6
    for element in (0, 4 * 32, prior.latent_size - 1):  # a token's, the first patch's, the last patch's
        assert difference(sample=sample + torch.eye(prior.latent_size)[element]) > 0


def test_all_weights_get_a_gradient(prior):
    sample = torch.randn(3, prior.latent_size, generator=torch.Generator().manual_seed(0))
    prior(sample, torch.tensor([100.0, 500.0, 900.0]), torch.tensor([0, 1, 2])).sample.square().mean().backward()
    without = [name for name, weight in prior.named_parameters() if weight.grad is None or not weight.grad.any()]
    prior.zero_grad()
    assert without == []


def test_oblong_grids(make_prior, random_factors):
    prior = make_prior(grid_size=(2, 6))
    tokens, localization = random_factors(2, num_patches=12)
    prior.set_statistics(tokens, localization)
    latents = prior.pack(tokens, localization)
    assert prior(latents, 300.0).sample.shape == latents.shape


def test_saved_prior_is_the_same(prior, tmp_path, random_factors):
    prior.save_pretrained(tmp_path)
    loaded = StellarTokenPrior.from_pretrained(tmp_path)
    assert loaded.config.class_names == ["cat", "dog"]
    sample = torch.randn(2, prior.latent_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(sample, 700.0).sample, prior(sample, 700.0).sample)
    factors = random_factors(2)
    assert torch.equal(loaded.pack(*factors), prior.pack(*factors))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_sparse_tokens": 0}, "num_sparse_tokens is 0"),
        ({"grid_size": (4, 5)}, r"grid_size is \(4, 5\).* 2, divides"),
        ({"hidden_size": 30}, "hidden_size is 30"),
        ({"localization_channels": 12}, "localization_channels is 12"),
        ({"localization_channels": 0}, "localization_channels is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"class_names": ["cat"]}, "1 class_names for 2 classes"),
        ({"class_names": ["cat", "cat"]}, "class_names has 'cat' more than once"),
        ({"num_classes": -1, "class_names": None}, "num_classes is -1"),
    ],
)
def test_impossible_sizes_are_named(prior_sizes, overrides, message):
    with pytest.raises(ValueError, match=message):
        StellarTokenPrior(**{**prior_sizes, **overrides})


def test_wrong_shapes_are_named(prior, random_factors):
    tokens, localization = random_factors(2)
    with pytest.raises(ValueError, match=r"sample has shape \(2, 3\)"):
        prior(torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"class_labels is torch.int64 of shape \(1,\)"):
        prior(torch.zeros(2, prior.latent_size), 1.0, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"localization \(2, 9, 4\)"):
        prior.pack(tokens, localization[:, :9])
    with pytest.raises(ValueError, match="need two"):
        prior.set_statistics(tokens[:1], localization[:1])


def test_labels_out_of_range_are_named(prior):
    """On a GPU the embedding would end the process's use of it by an assertion."""
    sample = torch.zeros(2, prior.latent_size)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=f"class_labels reach from {min(labels)} to {max(labels)}.* 0 and 2"):
            prior(sample, 1.0, torch.tensor(labels))
    with pytest.raises(ValueError, match="class_labels is torch.float32"):
        prior(sample, 1.0, torch.tensor([0.0, 1.0]))


def test_wrong_types_are_named(prior, random_factors):
    tokens, localization = random_factors(2)
    for call, said in (
        (lambda: prior([[0.0]], 1.0), "sample is a list"),
        (lambda: prior(torch.zeros(2, prior.latent_size, dtype=torch.long), 1.0), "sample is torch.int64"),
        (lambda: prior(torch.zeros(2, prior.latent_size), 1.0, [0, 1]), "class_labels is a list"),
        (lambda: prior.pack(tokens.numpy(), localization), "sparse_tokens is a ndarray"),
        (lambda: prior.pack(tokens, None), "localization is a NoneType"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("name", ["sparse_tokens", "localization"])
def test_statistics_of_numbers_that_are_not_finite_are_refused(make_prior, random_factors, name):
    prior, factors = make_prior(), dict(zip(("sparse_tokens", "localization"), random_factors(5), strict=True))
    factors[name][2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} of 1 of 5 images"):
        prior.set_statistics(**factors)
    assert torch.equal(prior.standardization.token_mean, torch.zeros(4, 32))


# What users of Diffusers expect of a model ---------------------------------------------------------------------------


@torch.no_grad()
def test_weights_are_stored_in_eight_bits(make_prior):
    """Layerwise casting: computed in the precision that was, also where it is half."""
    for dtype in (torch.float32, torch.bfloat16):
        prior = make_prior().to(dtype)
        sample = torch.randn(2, prior.latent_size, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = prior(sample, 500.0, torch.tensor([0, 1])).sample
        prior.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        assert prior.blocks[0].mlp.net[0].proj.weight.dtype == torch.float8_e4m3fn
        found = prior(sample, 500.0, torch.tensor([0, 1])).sample
        assert found.dtype == dtype
        assert (found - expected).float().norm() < 0.1 * expected.float().norm()


def test_gradient_checkpointing_recomputes_the_blocks_and_keeps_gradients(make_prior):
    sample = torch.randn(3, make_prior().latent_size, generator=torch.Generator().manual_seed(0))

    def gradients(prior):
        calls = []
        prior.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
        prior(sample, 500.0, torch.tensor([0, 1, 2])).sample.square().mean().backward()
        return len(calls), [weight.grad for weight in prior.parameters()]

    checkpointed = make_prior()
    checkpointed.enable_gradient_checkpointing()
    num_calls, expected = gradients(make_prior())
    num_calls_checkpointed, found = gradients(checkpointed)
    assert (num_calls, num_calls_checkpointed) == (1, 2)
    torch.testing.assert_close(found, expected)


def test_repeated_blocks_are_compiled(make_prior):
    prior = make_prior()
    sample = torch.randn(2, prior.latent_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = prior(sample, 500.0).sample
        prior.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(prior(sample, 500.0).sample, expected)
    assert all(block._compiled_call_impl is not None for block in prior.blocks)
