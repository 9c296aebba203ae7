# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
What users of Diffusers expect of every pipeline, and of every model, with pixels and with a tokenizer's codes.

Diffusers' own common tests come with none of its distributions.
"""

import inspect
import json
import logging
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from packaging.version import Version
from PIL import Image
from transformers.utils import is_torchvision_available

from stellar_hf import (
    MaskGitVQModel,
    StellarForImageReconstruction,
    StellarImageProcessor,
    StellarImageProcessorPil,
    StellarPipeline,
)

ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
needs_accelerator = pytest.mark.skipif(ACCELERATOR is None, reason="moves weights to an accelerator")
NUM_CODES = 16


def tiny_vq_model() -> MaskGitVQModel:
    torch.manual_seed(1)
    return MaskGitVQModel(
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=6,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


@pytest.fixture(params=["pixels", "codes"])
def pipe(request, tiny_config):
    torch.manual_seed(0)
    config = tiny_config(reconstruction_target=request.param, codebook_size=NUM_CODES)
    return StellarPipeline(
        image_processor=StellarImageProcessorPil(),
        model=StellarForImageReconstruction(config).eval(),
        vq_model=tiny_vq_model() if request.param == "codes" else None,
    )


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(40, 52), (32, 32), (33, 70), (64, 20), (40, 52)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def modules(pipe: StellarPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def pixels(pipe: StellarPipeline, image: Image.Image, num_steps: int = 1) -> torch.Tensor:
    return pipe(image=image, num_inference_steps=num_steps, output_type="pt").images.float().cpu()


def sampling(pipe: StellarPipeline, *seeds: int) -> dict:
    """Arguments that sample codes, where there are any."""
    if pipe.vq_model is None:
        return {}
    return {"temperature": 1.0, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


# The call ------------------------------------------------------------------------------------------------------------


def test_every_argument_of_the_call_is_optional():
    arguments = list(inspect.signature(StellarPipeline.__call__).parameters.values())[1:]
    assert all(argument.default is not inspect.Parameter.empty for argument in arguments)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_of_all_sizes_equal_single_images(pipe, images, batch_size):
    batch = images[:batch_size]
    together = pipe(image=batch, output_type="np", **sampling(pipe, *range(batch_size))).images
    assert len(together) == batch_size
    for seed, (image, of_batch) in enumerate(zip(batch, together, strict=True)):
        alone = pipe(image=image, output_type="np", **sampling(pipe, seed)).images[0]
        np.testing.assert_allclose(of_batch, alone, rtol=0, atol=1e-4)


def test_output_is_of_diffusers_class_or_a_tuple_with_the_same(pipe, images):
    output = pipe(image=images[0], output_type="np")
    assert isinstance(output, ImagePipelineOutput)
    (from_tuple,) = pipe(image=images[0], output_type="np", return_dict=False)
    np.testing.assert_array_equal(from_tuple, output.images)


def test_call_prints_nothing(pipe, images, capfd):
    pipe(image=images[0])
    pipe.set_progress_bar_config(disable=True)
    pipe(image=images[0])
    assert capfd.readouterr() == ("", "")


def test_attention_slicing_changes_nothing(pipe, images):
    expected = pixels(pipe, images[0])
    pipe.enable_attention_slicing()
    torch.testing.assert_close(pixels(pipe, images[0]), expected, rtol=0, atol=1e-3)
    pipe.disable_attention_slicing()
    torch.testing.assert_close(pixels(pipe, images[0]), expected, rtol=0, atol=1e-3)


# Saving and loading --------------------------------------------------------------------------------------------------


def test_saving_and_loading_twice_keeps_the_images_and_names_each_component(pipe, images, tmp_path, caplog):
    expected = pixels(pipe, images[0])
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addHandler(caplog.handler)
    level = logger.level
    for folder in (tmp_path / "first", tmp_path / "second"):
        pipe.save_pretrained(folder)
        logger.setLevel(logging.INFO)
        caplog.clear()
        pipe = StellarPipeline.from_pretrained(folder)
        logger.setLevel(level)
        for name in modules(pipe):
            assert f"Loaded {name} as" in caplog.text
        assert not any(module.training for module in modules(pipe).values())
        torch.testing.assert_close(pixels(pipe, images[0]), expected, rtol=0, atol=5e-4)
    logger.removeHandler(caplog.handler)


def test_saved_index_names_the_modules_by_which_old_folders_are_found(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["model"] == ["stellar_hf.modeling_stellar", "StellarForImageReconstruction"]
    assert index["image_processor"] == ["stellar_hf.image_processing_pil_stellar", "StellarImageProcessorPil"]
    vq_model = ["stellar_hf.pipelines.maskgit_vq_model", "MaskGitVQModel"]
    assert index["vq_model"] == ([None, None] if pipe.vq_model is None else vq_model)


def test_pipeline_without_its_optional_component_stays_without(pipe, images, tmp_path):
    pipe.vq_model = None
    expected = pipe(image=images[0], output_type="latent").images
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path)
    assert loaded.vq_model is None
    torch.testing.assert_close(loaded(image=images[0], output_type="latent").images, expected, rtol=0, atol=1e-4)


def test_components_can_be_given_or_left_out_on_loading(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path, model=pipe.model, vq_model=None)
    assert loaded.model is pipe.model and loaded.vq_model is None


def test_variants_of_all_components(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    for name in modules(pipe):
        assert [file.name for file in (tmp_path / name).glob("*.fp16.safetensors")]
    with pytest.raises(OSError):
        StellarPipeline.from_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path, variant="fp16")
    torch.testing.assert_close(pixels(loaded, images[0]), pixels(pipe, images[0]), rtol=0, atol=5e-4)


def test_another_pipeline_shares_the_components(pipe, images):
    other = StellarPipeline.from_pipe(pipe)
    assert all(getattr(other, name) is module for name, module in modules(pipe).items())
    torch.testing.assert_close(pixels(other, images[0]), pixels(pipe, images[0]))
    assert StellarPipeline.from_pipe(pipe, vq_model=None).vq_model is None


@pytest.mark.skipif(not is_torchvision_available(), reason="there is no torchvision")
def test_torchvision_processor_is_saved_and_loaded_also_where_torchvision_is_missing(pipe, images, tmp_path):
    with_pil = pixels(pipe, images[0])
    pipe.image_processor = StellarImageProcessor()
    expected = pixels(pipe, images[0])
    if pipe.vq_model is None:  # codes may change by a level of a pixel
        torch.testing.assert_close(expected, with_pil, rtol=0, atol=0.02)
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is StellarImageProcessor
    torch.testing.assert_close(pixels(loaded, images[0]), expected, rtol=0, atol=5e-4)

    code = f"""if True:
        import sys
        sys.modules["torchvision"] = None
        from stellar_hf import StellarPipeline
        pipe = StellarPipeline.from_pretrained({str(tmp_path)!r})
        print(type(pipe.image_processor).__name__)
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.splitlines()[-1:] == ["StellarImageProcessorPil"], process.stderr


def test_folder_that_names_the_torchvision_processor_is_loaded_everywhere(pipe, images, tmp_path):
    """As a machine writes it that has torchvision."""
    expected = pixels(pipe, images[0])
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["image_processor"] = ["stellar_hf.image_processing_stellar", "StellarImageProcessor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = StellarPipeline.from_pretrained(tmp_path)
    there = StellarImageProcessor if is_torchvision_available() else StellarImageProcessorPil
    assert type(loaded.image_processor) is there
    if pipe.vq_model is None:
        torch.testing.assert_close(pixels(loaded, images[0]), expected, rtol=0, atol=0.02)
    loaded.save_pretrained(tmp_path / "again")
    again = StellarPipeline.from_pretrained(tmp_path / "again")
    assert type(again.image_processor) is there and again.image_processor.to_dict() == loaded.image_processor.to_dict()


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_all_components_move_to_half_precision_and_stay_close(pipe, images, dtype, tolerance):
    expected = pixels(pipe, images[0])
    assert pipe.to(dtype) is pipe and pipe.dtype == dtype
    assert {module.dtype for module in modules(pipe).values()} == {dtype}
    torch.testing.assert_close(pixels(pipe, images[0]), expected, rtol=0, atol=tolerance)
    assert pixels(pipe, images[0], num_steps=2).isfinite().all()


def test_half_precision_is_saved_and_loaded(pipe, images, tmp_path):
    pipe.to(torch.float16)
    expected = pixels(pipe, images[0])
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert {module.dtype for module in modules(loaded).values()} == {torch.float16}
    torch.testing.assert_close(pixels(loaded, images[0]), expected, rtol=0, atol=1e-2)
    # Without a dtype, whichever the libraries choose for each component, they work together.
    torch.testing.assert_close(
        pixels(StellarPipeline.from_pretrained(tmp_path), images[0]), expected, rtol=0, atol=0.1
    )


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_each_component_is_loaded_in_the_precision_asked_for(pipe, images, tmp_path, argument):
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(
        tmp_path, **{argument: {"model": torch.bfloat16, "default": torch.float16}}
    )
    expected = {"model": torch.bfloat16, "vq_model": torch.float16}
    assert {name: module.dtype for name, module in modules(loaded).items()} == {
        name: expected[name] for name in modules(pipe)
    }
    torch.testing.assert_close(pixels(loaded, images[0]), pixels(pipe, images[0]), rtol=0, atol=0.1)


# Devices -------------------------------------------------------------------------------------------------------------


def test_device_is_that_of_the_components(pipe):
    assert pipe.to("cpu") is pipe
    assert pipe.device == pipe._execution_device == torch.device("cpu")
    pipe.to("meta")
    assert {module.device.type for module in modules(pipe).values()} == {"meta"}


@needs_accelerator
def test_accelerator_gives_the_images_of_the_cpu(pipe, images):
    expected = pipe(image=images[0], output_type="pt", **sampling(pipe, 7)).images
    pipe.to(ACCELERATOR)
    assert pipe.device.type == ACCELERATOR.type
    output = pipe(image=images[0], output_type="pt", **sampling(pipe, 7)).images
    assert output.device.type == ACCELERATOR.type
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=1e-2)


def decoded(pipe: StellarPipeline, tokens: torch.Tensor, localization: torch.Tensor) -> torch.Tensor:
    return pipe(sparse_tokens=tokens, localization=localization, output_type="pt").images.float().cpu()


def assert_offloaded_pipeline_gives_the_same(pipe, image, expected, refined, tokens, localization, from_tokens, atol):
    """Twice, since weights have to leave and come back."""
    for _ in range(2):
        torch.testing.assert_close(pixels(pipe, image), expected, rtol=0, atol=atol)
        torch.testing.assert_close(pixels(pipe, image, num_steps=2), refined, rtol=0, atol=atol)
        torch.testing.assert_close(decoded(pipe, tokens, localization), from_tokens, rtol=0, atol=atol)
        torch.testing.assert_close(pipe.encode(image)[0].cpu(), tokens, rtol=0, atol=atol)


@pytest.fixture
def plain_results(pipe, images):
    """What the pipeline gives before it is offloaded, as arguments of the comparison."""
    tokens, localization = pipe.encode(images[0])
    from_images = pixels(pipe, images[0]), pixels(pipe, images[0], num_steps=2)
    return images[0], *from_images, tokens, localization, decoded(pipe, tokens, localization)


@needs_accelerator
@pytest.mark.parametrize(
    ("offload", "options"),
    [
        ("enable_model_cpu_offload", {}),
        ("enable_sequential_cpu_offload", {}),
        ("enable_group_offload", {"offload_type": "leaf_level"}),
        ("enable_group_offload", {"offload_type": "block_level", "num_blocks_per_group": 1}),
    ],
)
def test_offloading_from_an_accelerator_changes_nothing(pipe, plain_results, offload, options):
    if offload == "enable_group_offload":
        options = {**options, "onload_device": ACCELERATOR}
    getattr(pipe, offload)(**options)
    assert_offloaded_pipeline_gives_the_same(pipe, *plain_results, atol=1e-2)
    if offload == "enable_model_cpu_offload":
        assert {module.device.type for module in modules(pipe).values()} == {"cpu"}


@pytest.mark.skipif(
    ACCELERATOR is None and Version(diffusers.__version__) < Version("0.41"),
    reason="Diffusers 0.40 offloads groups from accelerators alone",
)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_to_disk_changes_nothing(pipe, plain_results, tmp_path, offload_type):
    """Needs no accelerator: weights that are offloaded hold garbage until they are read again."""
    cpu = torch.device("cpu")
    pipe.enable_group_offload(
        cpu, cpu, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert list(tmp_path.glob("*.safetensors"))
    assert_offloaded_pipeline_gives_the_same(pipe, *plain_results, atol=1e-5)


def test_sequential_offloading_changes_nothing(pipe, plain_results):
    """As an accelerator has it, but brought to the CPU: weights that are offloaded have no values at all."""
    for module in modules(pipe).values():
        cpu_offload(module, execution_device=torch.device("cpu"))
    assert pipe.model.decoder.layers[0].mlp.fc1.weight.device.type == "meta"
    assert_offloaded_pipeline_gives_the_same(pipe, *plain_results, atol=1e-5)


# The tokenizer as a model of Diffusers -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "20KB"}])
def test_variants_and_shards_of_the_tokenizer(tmp_path, options):
    model = tiny_vq_model()
    model.save_pretrained(tmp_path, **options)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    loaded = MaskGitVQModel.from_pretrained(tmp_path, variant=options.get("variant")).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_tokenizer_is_built_again_from_its_configuration(tmp_path):
    model = tiny_vq_model()
    again = MaskGitVQModel.from_config(model.config)
    assert dict(again.config) == dict(model.config)
    assert {name: weight.shape for name, weight in again.state_dict().items()} == {
        name: weight.shape for name, weight in model.state_dict().items()
    }
    model.save_config(tmp_path)
    assert MaskGitVQModel.load_config(tmp_path)["block_out_channels"] == [8, 8, 8, 16]


@torch.no_grad()
def test_weights_of_the_tokenizer_are_stored_in_eight_bits():
    """Layer-wise casting, but for the codebook and the normalizations, whose small differences matter."""
    model = tiny_vq_model()
    codes = torch.arange(NUM_CODES)[None]
    expected, codebook = model.decode(codes).sample, model.quantize.embedding.weight.clone()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.decoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model.quantize.embedding.weight, codebook)
    assert {block.norm1.weight.dtype for block in model.decoder.mid_block.resnets} == {torch.float32}
    sample = model.decode(codes).sample
    assert (sample - expected).abs().mean() < 0.05


def test_tokenizer_trains(images):
    """Every weight on the way from latents to the image gets a gradient, and a step lowers the loss."""
    model = tiny_vq_model().train()
    target = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    latents = model.encode(target).latents.detach()
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = (model.decode(latents=latents).sample - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad.abs().max() > 0 for weight in model.decoder.parameters())
        optimizer.step()
    assert losses[2] < losses[0]
