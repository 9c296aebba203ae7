# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The prior over tokens and localization, and images drawn from it through the pipeline."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline, StellarTokenPrior

SIZES = {
    "num_sparse_tokens": 4,
    "token_size": 32,
    "grid_size": (4, 4),
    "num_classes": 2,
    "class_names": ["cat", "dog"],
    "localization_patch_size": 2,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "localization_channels": 8,
}


def make_prior(seed=0, **overrides) -> StellarTokenPrior:
    """With random weights everywhere, so that no part of it is silent."""
    torch.manual_seed(seed)
    prior = StellarTokenPrior(**{**SIZES, **overrides}).eval()
    for weight in prior.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return prior


def random_factors(batch_size, seed=0, num_tokens=4, token_size=32, num_patches=16):
    generator = torch.Generator().manual_seed(seed)
    tokens = 3 * torch.randn(batch_size, num_tokens, token_size, generator=generator) + 1
    logits = 2 * torch.randn(batch_size, num_patches, num_tokens, generator=generator)
    return tokens, logits.softmax(dim=-1)


@pytest.fixture(scope="module")
def prior():
    prior = make_prior()
    prior.set_statistics(*random_factors(64, seed=1))
    return prior


@pytest.fixture(scope="module")
def pipe(prior, tiny_config):
    torch.manual_seed(0)
    pipe = StellarPipeline(
        image_processor=StellarImageProcessorPil(),
        model=StellarForImageReconstruction(tiny_config()).eval(),
        prior=prior,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The prior -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 3))
def test_unpacking_undoes_packing(prior, seed, batch_size):
    tokens, localization = random_factors(batch_size, seed)
    unpacked_tokens, unpacked_localization = prior.unpack(prior.pack(tokens, localization))
    torch.testing.assert_close(unpacked_tokens, tokens, rtol=1e-4, atol=1e-4)
    # Shares below exp(-6) come back as that.
    assert (unpacked_localization - localization).abs().max() < 4 * np.exp(-6)
    torch.testing.assert_close(unpacked_localization.sum(-1), torch.ones(batch_size, 16))


def test_latents_of_the_measured_images_are_standardized(prior):
    latents = prior.pack(*random_factors(64, seed=1))
    assert latents.shape == (64, 4 * 32 + 16 * 4)
    tokens, logits = prior.split(latents)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(4, 32), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.std(0), torch.ones(4, 32), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits.mean((0, 1)), torch.zeros(4), rtol=0, atol=1e-4)
    assert 0.95 < logits.std() < 1.05


def test_zero_shares_of_the_localization_are_finite(prior):
    tokens, _ = random_factors(1)
    one_hot = torch.eye(4)[torch.arange(16) % 4][None]
    _, localization = prior.unpack(prior.pack(tokens, one_hot))
    assert torch.equal(localization.argmax(-1), one_hot.argmax(-1)) and localization.amax(-1).min() > 0.99


def test_a_new_prior_predicts_the_mean_so_its_flow_ends_there():
    torch.manual_seed(0)
    prior = StellarTokenPrior(**SIZES)
    sample = torch.randn(2, prior.latent_size)
    torch.testing.assert_close(prior(sample, 500.0).sample, sample / 0.5)
    torch.testing.assert_close(prior(sample, 1.0).sample, sample / 0.05)


def test_class_noise_level_and_every_element_matter_everywhere(prior):
    sample = torch.randn(1, prior.latent_size, generator=seeded())

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
    sample = torch.randn(3, prior.latent_size, generator=seeded())
    prior(sample, torch.tensor([100.0, 500.0, 900.0]), torch.tensor([0, 1, 2])).sample.square().mean().backward()
    without = [name for name, weight in prior.named_parameters() if weight.grad is None or not weight.grad.any()]
    prior.zero_grad()
    assert without == []


def test_oblong_grids():
    prior = make_prior(grid_size=(2, 6))
    tokens, localization = random_factors(2, num_patches=12)
    prior.set_statistics(tokens, localization)
    latents = prior.pack(tokens, localization)
    assert prior(latents, 300.0).sample.shape == latents.shape


def test_saved_prior_is_the_same(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    loaded = StellarTokenPrior.from_pretrained(tmp_path)
    assert loaded.config.class_names == ["cat", "dog"]
    sample = torch.randn(2, prior.latent_size, generator=seeded())
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
        ({"num_classes": -1, "class_names": None}, "num_classes is -1"),
    ],
)
def test_impossible_sizes_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        StellarTokenPrior(**{**SIZES, **overrides})


def test_wrong_shapes_are_named(prior):
    tokens, localization = random_factors(2)
    with pytest.raises(ValueError, match=r"sample has shape \(2, 3\)"):
        prior(torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"class_labels has shape \(1,\)"):
        prior(torch.zeros(2, prior.latent_size), 1.0, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"localization \(2, 9, 4\)"):
        prior.pack(tokens, localization[:, :9])
    with pytest.raises(ValueError, match="need two"):
        prior.set_statistics(tokens[:1], localization[:1])


# Drawing -------------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_drawn_tokens(pipe):
    tokens, localization = pipe.sample_tokens(["cat", "dog", None], generator=seeded(), num_inference_steps=3)
    assert tokens.shape == (3, 4, 32) and localization.shape == (3, 16, 4)
    torch.testing.assert_close(localization.sum(-1), torch.ones(3, 16))
    images = pipe.generate(["cat", "dog", None], generator=seeded(), num_inference_steps=3, output_type="pt").images
    decoded = pipe(sparse_tokens=tokens, localization=localization, output_type="pt").images
    assert torch.equal(images, decoded)


def test_sampling_solves_the_flow_with_guidance(pipe, prior):
    num_steps, scale = 4, 3.0
    latents = torch.randn(2, prior.latent_size, generator=seeded())
    labels, any_class = torch.tensor([1, 0]), torch.tensor([2, 2])
    with torch.no_grad():
        for sigma in (1.0, 0.75, 0.5, 0.25):
            guided, free = (prior(latents, 1000 * sigma, which).sample for which in (labels, any_class))
            latents = latents - (free + scale * (guided - free)) / num_steps
    drawn = pipe.sample_tokens([1, 0], num_steps, scale, seeded())
    for tensor, expected in zip(drawn, prior.unpack(latents), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


def test_without_guidance_the_prior_is_called_once(pipe, prior):
    calls = []
    hook = prior.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    pipe.sample_tokens([0, 1], 3, guidance_scale=1.0, generator=seeded())
    pipe.sample_tokens([0, 1], 3, guidance_scale=2.0, generator=seeded())
    pipe.sample_tokens([None, None], 3, guidance_scale=2.0, generator=seeded())  # nothing to be guided to
    hook.remove()
    assert calls == [2, 2, 2, 4, 4, 4, 2, 2, 2]


def test_a_name_is_its_number_and_labels_may_be_a_tensor(pipe):
    by_name, _ = pipe.sample_tokens("dog", 2, generator=seeded())
    for same in (1, [1], ["dog"], torch.tensor([1]), torch.tensor(1), np.array([1]), np.int64(1)):
        assert torch.equal(pipe.sample_tokens(same, 2, generator=seeded())[0], by_name)
    assert not torch.equal(pipe.sample_tokens("cat", 2, generator=seeded())[0], by_name)
    assert not torch.equal(pipe.sample_tokens(None, 2, generator=seeded())[0], by_name)


def test_a_generator_for_each_image_makes_it_independent_of_the_batch(pipe):
    batch = pipe.generate([0, 1], 3, generator=[seeded(1), seeded(2)], output_type="pt").images
    single = pipe.generate(1, 3, generator=seeded(2), output_type="pt").images
    torch.testing.assert_close(batch[1:], single, rtol=0, atol=1e-4)
    assert not torch.allclose(batch[0], batch[1], atol=1e-3)


def test_output_types_and_sizes(pipe):
    (image,) = pipe.generate("cat", 2, generator=seeded(), height=40, width=50).images
    assert image.size == (50, 40)
    array = pipe.generate("cat", 2, generator=seeded(), height=40, width=50, output_type="np").images
    np.testing.assert_allclose(np.asarray(image) / 255, array[0], atol=0.51 / 255)
    (from_tuple,) = pipe.generate("cat", 2, generator=seeded(), output_type="np", return_dict=False)
    assert from_tuple.shape == (1, 32, 32, 3)


def test_callback_sees_every_step_and_may_change_the_latents(pipe, prior):
    seen = []

    def replace(pipeline, step, timestep, tensors):
        seen.append((pipeline is pipe, step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    tokens, localization = pipe.sample_tokens([0], 3, generator=seeded(), callback_on_step_end=replace)
    timesteps = np.linspace(1000, 1000 / 3, 3)
    assert [entry[:2] for entry in seen] == [(True, 0), (True, 1), (True, 2)]
    np.testing.assert_allclose([entry[2] for entry in seen], timesteps, rtol=1e-5)
    assert {entry[3] for entry in seen} == {(1, prior.latent_size)} and pipe.num_timesteps == 3
    expected = prior.unpack(torch.zeros(1, prior.latent_size))
    torch.testing.assert_close((tokens, localization), expected)


def test_callback_may_stop_and_change_the_guidance(pipe):
    seen = []

    def stop(pipeline, step, timestep, tensors):
        seen.append(step)
        pipeline._interrupt = step == 1  # and nothing is returned

    pipe.sample_tokens([0], 5, generator=seeded(), callback_on_step_end=stop)
    assert seen == [0, 1]

    def no_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return tensors

    calls = []
    hook = pipe.prior.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    pipe.sample_tokens([0], 3, generator=seeded(), callback_on_step_end=no_guidance)
    hook.remove()
    assert calls == [2, 1, 1] and pipe.guidance_scale == 1.0


def test_saved_pipeline_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    expected = pipe.generate([0, 1], 3, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(loaded.generate([0, 1], 3, generator=seeded(), output_type="pt").images, expected)


def test_another_pipeline_shares_the_prior(pipe):
    other = StellarPipeline.from_pipe(pipe)
    assert other.prior is pipe.prior and isinstance(other.scheduler, FlowMatchEulerDiscreteScheduler)
    assert set(pipe.components) == {"image_processor", "model", "vq_model", "prior", "scheduler"}


@pytest.mark.skipif(
    not torch.accelerator.is_available() and Version(diffusers.__version__) < Version("0.41"),
    reason="Diffusers 0.40 offloads groups from accelerators alone",
)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_to_disk_changes_nothing(pipe, tmp_path, offload_type):
    """Needs no accelerator: weights that are offloaded hold garbage until they are read again."""
    offloaded = StellarPipeline(StellarImageProcessorPil(), copy.deepcopy(pipe.model), prior=copy.deepcopy(pipe.prior))
    offloaded.set_progress_bar_config(disable=True)
    cpu = torch.device("cpu")
    offloaded.enable_group_offload(
        cpu, cpu, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    expected = pipe.generate([0, 1], 3, generator=seeded(), output_type="pt").images
    for _ in range(2):
        images = offloaded.generate([0, 1], 3, generator=seeded(), output_type="pt").images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="moves weights to an accelerator")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_an_accelerator_changes_nothing(pipe, offload):
    offloaded = StellarPipeline(StellarImageProcessorPil(), copy.deepcopy(pipe.model), prior=copy.deepcopy(pipe.prior))
    getattr(offloaded, offload)()
    expected = pipe.generate([0, 1], 3, generator=seeded(), output_type="pt").images
    for _ in range(2):
        images = offloaded.generate([0, 1], 3, generator=seeded(), output_type="pt").images
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(pipe, tmp_path, dtype):
    expected, _ = pipe.sample_tokens([0, 1], 3, generator=seeded())
    pipe.save_pretrained(tmp_path)
    half = StellarPipeline.from_pretrained(tmp_path, dtype=dtype)
    tokens, localization = half.sample_tokens([0, 1], 3, generator=seeded())
    assert tokens.dtype == localization.dtype == dtype
    assert (tokens.float() - expected).abs().mean() < 0.03 * expected.abs().mean()
    assert np.isfinite(half.generate([0, 1], 3, generator=seeded(), output_type="np").images).all()


def test_codes_are_sampled_too(tiny_config, prior):
    torch.manual_seed(0)
    model = StellarForImageReconstruction(tiny_config(reconstruction_target="codes")).eval()
    pipe = StellarPipeline(image_processor=StellarImageProcessorPil(), model=model, prior=prior)
    pipe.set_progress_bar_config(disable=True)

    def codes(temperature, seed):
        return pipe.generate(
            [0], 2, generator=seeded(seed), temperature=temperature, output_type="latent", return_dict=False
        )[0]

    assert codes(0.0, 1).shape == (1, 16) and torch.equal(codes(5.0, 1), codes(5.0, 1))
    assert not torch.equal(codes(5.0, 1), codes(0.0, 1))


def test_progress_bar_counts_the_steps(prior, tiny_config, capsys):
    pipe = StellarPipeline(
        StellarImageProcessorPil(), StellarForImageReconstruction(tiny_config()).eval(), prior=prior
    )
    pipe.generate([0], 7)
    assert "7/7" in capsys.readouterr().err


def test_impossible_wishes_are_refused_in_a_sentence(pipe, prior, tiny_config):
    model = pipe.model
    with pytest.raises(ValueError, match="has no prior.*train_prior"):
        StellarPipeline(StellarImageProcessorPil(), model).generate([0])
    with pytest.raises(ValueError, match="no class 'bird'.*cat, dog.*None"):
        pipe.generate("bird")
    for label in (2, -1, 0.5):
        with pytest.raises(ValueError, match=f"no class {label}"):
            pipe.generate([label])
    with pytest.raises(ValueError, match="class_labels is empty"):
        pipe.generate([])
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        pipe.generate([0], 0)
    with pytest.raises(ValueError, match="'noise'.*latents"):
        pipe.generate([0], callback_on_step_end_tensor_inputs=["noise"])
    with pytest.raises(ValueError, match="temperature"):
        pipe.generate([0], 1, temperature=1.0)
    for generators in ([seeded()], [seeded()] * 3):
        with pytest.raises(ValueError, match=f"{len(generators)} generators for 2 images"):
            pipe.generate([0, 1], 1, generator=generators)
    other = StellarForImageReconstruction(tiny_config(num_sparse_tokens=3))
    with pytest.raises(ValueError, match="draws 4 tokens of 32 numbers, but the model has 3 of 32"):
        StellarPipeline(StellarImageProcessorPil(), other, prior=prior)
