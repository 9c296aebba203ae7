# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Images drawn from a prior, and what users of Diffusers expect of the pipeline that draws them."""

import copy
import inspect
import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from packaging.version import Version

from stellar_hf import (
    StellarForImageReconstruction,
    StellarImageProcessorPil,
    StellarPipeline,
    StellarTokenPriorPipeline,
)


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return StellarForImageReconstruction(tiny_config()).eval()


def make_pipeline(prior, model, **components) -> StellarTokenPriorPipeline:
    pipe = StellarTokenPriorPipeline(prior, model, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(prior, model):
    return make_pipeline(prior, model, image_processor=StellarImageProcessorPil())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Drawing -------------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_drawn_tokens(pipe):
    tokens, localization = pipe.sample_tokens(["cat", "dog", None], generator=seeded(), num_inference_steps=3)
    assert tokens.shape == (3, 4, 32) and localization.shape == (3, 16, 4)
    torch.testing.assert_close(localization.sum(-1), torch.ones(3, 16))
    images = pipe(["cat", "dog", None], generator=seeded(), num_inference_steps=3, output_type="pt").images
    decoded = StellarPipeline.from_pipe(pipe)(sparse_tokens=tokens, localization=localization, output_type="pt").images
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
    batch = pipe([0, 1], 3, generator=[seeded(1), seeded(2)], output_type="pt").images
    single = pipe(1, 3, generator=seeded(2), output_type="pt").images
    torch.testing.assert_close(batch[1:], single, rtol=0, atol=1e-4)
    assert not torch.allclose(batch[0], batch[1], atol=1e-3)


def test_output_types_and_sizes(pipe):
    (image,) = pipe("cat", 2, generator=seeded(), height=40, width=50).images
    assert image.size == (50, 40)
    array = pipe("cat", 2, generator=seeded(), height=40, width=50, output_type="np").images
    np.testing.assert_allclose(np.asarray(image) / 255, array[0], atol=0.51 / 255)
    (from_tuple,) = pipe("cat", 2, generator=seeded(), output_type="np", return_dict=False)
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
    loaded = StellarTokenPriorPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    expected = pipe([0, 1], 3, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(loaded([0, 1], 3, generator=seeded(), output_type="pt").images, expected)


def test_a_pipeline_of_images_and_a_prior_make_each_other(pipe, prior, model, tmp_path):
    of_images = StellarPipeline(StellarImageProcessorPil(), model)
    drawing = StellarTokenPriorPipeline.from_pipe(of_images, prior=prior)
    assert drawing.prior is prior and drawing.model is model and drawing.image_processor is of_images.image_processor
    assert isinstance(drawing.scheduler, FlowMatchEulerDiscreteScheduler)
    assert set(drawing.components) == {"image_processor", "model", "vq_model", "prior", "scheduler"}
    back = StellarPipeline.from_pipe(drawing)
    assert back.components == of_images.components
    # What is saved of either is a pipeline of its own class, which knows nothing of where it came from.
    for made in (drawing, back):
        made.save_pretrained(tmp_path / type(made).__name__)
        loaded = type(made).from_pretrained(tmp_path / type(made).__name__)
        assert set(loaded.components) == set(made.components)


def test_one_folder_serves_both_pipelines(pipe, tmp_path):
    """Of what was trained, images may be encoded and edited, too."""
    pipe.save_pretrained(tmp_path)
    of_images = StellarPipeline.from_pretrained(tmp_path)
    assert set(of_images.components) == {"image_processor", "model", "vq_model"}
    tokens, localization = pipe.sample_tokens([0], 2, generator=seeded())
    expected = pipe([0], 2, generator=seeded(), output_type="pt").images
    images = of_images(sparse_tokens=tokens, localization=localization, output_type="pt").images
    torch.testing.assert_close(images, expected)


def test_folder_saved_when_the_prior_was_a_component_of_the_pipeline_of_images(pipe, tmp_path):
    """Its index names that class, and the module where the prior was."""
    pipe.save_pretrained(tmp_path)
    index = {
        "_class_name": "StellarPipeline",
        "_diffusers_version": "0.42.1",
        "image_processor": ["stellar_hf.image_processing_pil_stellar", "StellarImageProcessorPil"],
        "model": ["stellar_hf.modeling_stellar", "StellarForImageReconstruction"],
        "prior": ["stellar_hf.pipelines.token_prior", "StellarTokenPrior"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vq_model": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = StellarTokenPriorPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    expected = pipe([0, 1], 3, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(loaded([0, 1], 3, generator=seeded(), output_type="pt").images, expected)
    assert StellarPipeline.from_pretrained(tmp_path).model.num_parameters() == pipe.model.num_parameters()


@pytest.mark.skipif(
    not torch.accelerator.is_available() and Version(diffusers.__version__) < Version("0.41"),
    reason="Diffusers 0.40 offloads groups from accelerators alone",
)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_to_disk_changes_nothing(pipe, tmp_path, offload_type):
    """Needs no accelerator: weights that are offloaded hold garbage until they are read again."""
    offloaded = make_pipeline(copy.deepcopy(pipe.prior), copy.deepcopy(pipe.model))
    cpu = torch.device("cpu")
    offloaded.enable_group_offload(
        cpu, cpu, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    expected = pipe([0, 1], 3, generator=seeded(), output_type="pt").images
    for _ in range(2):
        images = offloaded([0, 1], 3, generator=seeded(), output_type="pt").images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="moves weights to an accelerator")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_an_accelerator_changes_nothing(pipe, offload):
    offloaded = make_pipeline(copy.deepcopy(pipe.prior), copy.deepcopy(pipe.model))
    getattr(offloaded, offload)()
    expected = pipe([0, 1], 3, generator=seeded(), output_type="pt").images
    for _ in range(2):
        images = offloaded([0, 1], 3, generator=seeded(), output_type="pt").images
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(pipe, tmp_path, dtype):
    expected, _ = pipe.sample_tokens([0, 1], 3, generator=seeded())
    pipe.save_pretrained(tmp_path)
    half = StellarTokenPriorPipeline.from_pretrained(tmp_path, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    tokens, localization = half.sample_tokens([0, 1], 3, generator=seeded())
    assert tokens.dtype == localization.dtype == dtype
    assert (tokens.float() - expected).abs().mean() < 0.03 * expected.abs().mean()
    assert np.isfinite(half([0, 1], 3, generator=seeded(), output_type="np").images).all()


def test_codes_are_sampled_too(tiny_config, prior):
    torch.manual_seed(0)
    model = StellarForImageReconstruction(tiny_config(reconstruction_target="codes")).eval()
    pipe = make_pipeline(prior, model)

    def codes(temperature, seed):
        return pipe([0], 2, generator=seeded(seed), temperature=temperature, output_type="latent", return_dict=False)[
            0
        ]

    assert codes(0.0, 1).shape == (1, 16) and torch.equal(codes(5.0, 1), codes(5.0, 1))
    assert not torch.equal(codes(5.0, 1), codes(0.0, 1))


def test_progress_bar_counts_the_steps(prior, model, capsys):
    StellarTokenPriorPipeline(prior, model)([0], 7)
    assert "7/7" in capsys.readouterr().err


def test_impossible_wishes_are_refused_in_a_sentence(pipe, prior, tiny_config):
    with pytest.raises(ValueError, match="no class 'bird'.*cat, dog.*None"):
        pipe("bird")
    for label in (2, -1, 0.5):
        with pytest.raises(ValueError, match=f"no class {label}"):
            pipe([label])
    with pytest.raises(ValueError, match=r"class_labels is \[\], but"):
        pipe([])
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        pipe([0], 0)
    with pytest.raises(ValueError, match="'noise'.*latents"):
        pipe([0], callback_on_step_end_tensor_inputs=["noise"])
    with pytest.raises(ValueError, match="temperature"):
        pipe([0], 1, temperature=1.0)
    for generators in ([seeded()], [seeded()] * 3):
        with pytest.raises(ValueError, match=f"{len(generators)} generators for 2 images"):
            pipe([0, 1], 1, generator=generators)
    other = StellarForImageReconstruction(tiny_config(num_sparse_tokens=3))
    with pytest.raises(ValueError, match="draws 4 tokens of 32 numbers, but the model has 3 of 32"):
        StellarTokenPriorPipeline(prior, other)
    for scale in (float("nan"), float("inf"), "strong", None):
        with pytest.raises(ValueError, match=f"guidance_scale is {scale!r}"):
            pipe([0], 1, guidance_scale=scale)
    for generator in ("seed", 7, ["a", "b"]):
        with pytest.raises(ValueError, match="must be a torch.Generator"):
            pipe([0, 1], 1, generator=generator)
    for labels in ({"cat": 1}, 1.5, object()):
        with pytest.raises(ValueError, match="class_labels is"):
            pipe(labels)
    with pytest.raises(ValueError, match=r"There is no class \[0\]"):
        pipe([[0]])
    with pytest.raises(ValueError, match="num_inference_steps is 2.5"):
        pipe([0], 2.5)


# What users of Diffusers expect --------------------------------------------------------------------------------------


def test_every_argument_of_the_call_is_optional(pipe):
    arguments = inspect.signature(StellarTokenPriorPipeline.__call__).parameters
    assert all(argument.default is not inspect.Parameter.empty for argument in list(arguments.values())[1:])
    expected = {"class_labels", "num_inference_steps", "guidance_scale", "generator", "output_type", "return_dict"}
    assert expected <= set(arguments)
    assert len(pipe(num_inference_steps=1).images) == 1


def test_batches_equal_single_images(pipe):
    seeds = range(4)
    labels = ["cat", "dog", 1, 0]
    together = pipe(labels, 3, generator=[seeded(seed) for seed in seeds], output_type="np").images
    for seed, label, of_batch in zip(seeds, labels, together, strict=True):
        alone = pipe(label, 3, generator=seeded(seed), output_type="np").images[0]
        np.testing.assert_allclose(of_batch, alone, rtol=0, atol=1e-4)


def test_output_is_of_diffusers_class(pipe):
    assert isinstance(pipe([0], 1), ImagePipelineOutput)


def test_call_prints_nothing_but_its_progress_bar(pipe, capfd):
    pipe([0], 2)
    assert capfd.readouterr() == ("", "")


def test_saving_and_loading_twice_keeps_the_images_and_names_each_component(pipe, tmp_path, caplog):
    expected = pipe([0, 1], 2, generator=seeded(), output_type="pt").images
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addHandler(caplog.handler)
    level = logger.level
    for folder in (tmp_path / "first", tmp_path / "second"):
        pipe.save_pretrained(folder)
        logger.setLevel(logging.INFO)
        caplog.clear()
        pipe = StellarTokenPriorPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        logger.setLevel(level)
        for name in ("prior", "model", "scheduler", "image_processor"):
            assert f"Loaded {name} as" in caplog.text
        assert not pipe.prior.training and not pipe.model.training
        images = pipe([0, 1], 2, generator=seeded(), output_type="pt").images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert (tmp_path / "second" / "pipeline.py").read_text().startswith("from stellar_hf import StellarTokenPriorPipe")


def test_optional_components_may_be_missing(prior, model, tmp_path):
    pipe = make_pipeline(prior, model)
    expected = pipe([1], 2, generator=seeded(), output_type="pt").images
    pipe.save_pretrained(tmp_path)
    loaded = StellarTokenPriorPipeline.from_pretrained(tmp_path, scheduler=None)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vq_model is None and loaded.image_processor is None
    torch.testing.assert_close(loaded([1], 2, generator=seeded(), output_type="pt").images, expected)


def test_variants_of_all_components(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert list((tmp_path / "prior").glob("*.fp16.safetensors"))
    loaded = StellarTokenPriorPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(loaded.prior.token_embedding.weight, pipe.prior.token_embedding.weight)


def test_each_component_is_loaded_in_the_precision_asked_for(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    dtypes = {"prior": torch.bfloat16, "default": torch.float32}
    loaded = StellarTokenPriorPipeline.from_pretrained(tmp_path, dtype=dtypes)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.prior.dtype, loaded.model.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.sample_tokens([0], 2)[0].dtype == torch.float32


def test_device_is_that_of_the_components(pipe):
    moved = make_pipeline(copy.deepcopy(pipe.prior), copy.deepcopy(pipe.model))
    assert moved.to("cpu") is moved and moved.device == moved._execution_device == torch.device("cpu")
    moved.to("meta")
    assert {moved.prior.device.type, moved.model.device.type} == {"meta"}


def test_sequential_offloading_changes_nothing(pipe):
    """As an accelerator has it, but brought to the CPU: weights that are offloaded have no values at all."""
    expected = pipe([0, 1], 3, generator=seeded(), output_type="pt").images
    offloaded = make_pipeline(copy.deepcopy(pipe.prior), copy.deepcopy(pipe.model))
    for module in (offloaded.prior, offloaded.model):
        cpu_offload(module, execution_device=torch.device("cpu"))
    for _ in range(2):
        images = offloaded([0, 1], 3, generator=seeded(), output_type="pt").images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
