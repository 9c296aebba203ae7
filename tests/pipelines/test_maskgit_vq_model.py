# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The tokenizer agrees with its reference, and keeps what users of Diffusers' autoencoders rely on."""

import json

import pytest
import torch
from accelerate import cpu_offload
from torch.nn import functional as F

from stellar_hf import MaskGitVQModel
from stellar_hf.conversion import convert_vq_checkpoint
from stellar_hf.pipelines.maskgit_vq_model import _map_tiles

FACTOR = 4  # of the tiny model


@pytest.fixture(scope="module")
def reference(golden_vq_weights):
    return convert_vq_checkpoint(golden_vq_weights)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return MaskGitVQModel(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=6,
        num_vq_embeddings=12,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Every entry within `tolerance` of the largest expected one."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# Parity --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encoding_agrees_with_the_reference(reference, golden_tensors):
    golden = golden_tensors("vq")
    encoded = reference.encode(golden["image"])
    assert_close(encoded.latents, golden["out.latents"])
    assert torch.equal(encoded.codes, golden["out.codes"]) and encoded.codes.dtype == torch.int64
    assert encoded.grid_size == (4, 6)


# The reference's own decoded images move by 5e-5 with the number of threads.
@torch.no_grad()
def test_decoding_agrees_with_the_reference(reference, golden_tensors):
    golden = golden_tensors("vq")
    assert_close(reference.decoder(golden["out.quantized"]), golden["out.decoded"], tolerance=5e-5)

    expected = golden["out.decoded"].clamp(0, 1)
    from_codes = reference.decode(golden["out.codes"], grid_size=(4, 6)).sample
    assert_close(from_codes, expected, tolerance=5e-5)
    assert torch.equal(reference.decode(latents=golden["out.quantized"]).sample, from_codes)


@torch.no_grad()
def test_forward_agrees_with_the_reference(reference, golden_tensors):
    golden = golden_tensors("vq")
    assert torch.equal(reference.encode(golden["square"]).codes, golden["out.square_codes"])
    assert_close(reference(golden["square"]).sample, golden["out.square_decoded"], tolerance=5e-5)
    assert_close(reference.decode(golden["out.square_codes"]).sample, golden["out.square_decoded"], tolerance=5e-5)


@torch.no_grad()
def test_codes_are_the_targets_of_the_reference_model(reference, golden_tensors):
    golden = golden_tensors("vq_codes")
    assert torch.equal(reference.encode(golden["image"]).codes, golden["codes"])


def test_codes_of_patches_are_those_of_the_reference(reference, golden_tensors):
    golden = golden_tensors("vq_codes")
    assert torch.equal(reference.patch_codes(golden["image"], patch_size=16), golden["codes"].flatten(1))


def test_patches_of_other_sizes_get_a_code_each(tiny):
    batch = images(2, 3, 23, 16)
    codes = tiny.patch_codes(batch, patch_size=5)  # a grid of 4x3
    assert codes.shape == (2, 12) and codes.dtype == torch.int64
    # What is beyond the last whole patch does not count.
    assert torch.equal(codes, tiny.patch_codes(batch[..., :20, :15], patch_size=5))
    # A code per patch of 2x2 pixels is that of the image in double size.
    flat = images(2, 3, 1, 1).expand(-1, -1, 8, 8)
    assert torch.equal(tiny.patch_codes(flat, patch_size=2), tiny.encode(flat.repeat(1, 1, 2, 2)).codes)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 23, 16\), but must .* one patch of 30x30"):
        tiny.patch_codes(batch, patch_size=30)
    with pytest.raises(ValueError, match="uint8"):
        tiny.patch_codes((batch * 255).byte(), patch_size=4)


def test_the_default_configuration_is_the_released_model():
    with torch.device("meta"):
        model = MaskGitVQModel()
    assert model.downsample_factor == 16
    assert model.encoder.conv_out.weight.shape == (256, 512, 1, 1)
    assert model.decoder.conv_in.weight.shape == (512, 256, 3, 3)
    assert model.decoder.conv_out.weight.shape == (3, 128, 3, 3)
    assert model.quantize.embedding.weight.shape == (1024, 256)


# Diffusers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_saving_and_loading_keeps_every_weight_and_output(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["block_out_channels"] == [8, 8, 16]

    loaded = MaskGitVQModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == tiny.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in tiny.state_dict().items())
    assert torch.equal(loaded(images(1, 3, 16, 16)).sample, tiny(images(1, 3, 16, 16)).sample)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (12, 20), (36, 8)])
def test_any_size_of_whole_codes_comes_back(tiny, size):
    batch = images(2, 3, *size)
    encoded = tiny.encode(batch)
    height, width = size[0] // FACTOR, size[1] // FACTOR
    assert encoded.grid_size == (height, width)
    assert encoded.latents.shape == (2, 6, height, width) and encoded.codes.shape == (2, height * width)
    sample = tiny(batch).sample
    assert sample.shape == batch.shape and sample.min() >= 0 and sample.max() <= 1


@torch.no_grad()
def test_codes_are_the_nearest_row_by_row(tiny):
    encoded = tiny.encode(images(1, 3, 12, 20))
    distances = (encoded.latents[0, :, 1, 3] - tiny.quantize.embedding.weight).norm(dim=-1)
    assert encoded.codes[0, 1 * 5 + 3] == distances.argmin()

    tiny.quantize.embedding.weight[7] = encoded.latents[0, :, 2, 4]
    assert tiny.encode(images(1, 3, 12, 20)).codes[0, 2 * 5 + 4] == 7


@torch.no_grad()
def test_tuples_hold_the_same_as_outputs(tiny):
    batch = images(1, 3, 8, 8)
    encoded = tiny.encode(batch)
    latents, codes, grid_size = tiny.encode(batch, return_dict=False)
    assert torch.equal(latents, encoded.latents) and torch.equal(codes, encoded.codes) and grid_size == (2, 2)
    sample = tiny(batch).sample
    assert torch.equal(tiny(batch, return_dict=False)[0], sample)
    assert torch.equal(tiny.decode(codes, return_dict=False)[0], sample)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision(tiny, tmp_path, dtype, tolerance):
    codes = tiny.encode(images(1, 3, 16, 16)).codes
    expected = tiny.decode(codes).sample
    tiny.save_pretrained(tmp_path)
    half = MaskGitVQModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert half.dtype == dtype
    sample = half.decode(codes).sample
    assert sample.dtype == dtype and (sample - expected).abs().max() < tolerance
    encoded = half.encode(images(1, 3, 16, 16).to(dtype))
    assert encoded.latents.dtype == dtype and encoded.codes.dtype == torch.int64


@torch.no_grad()
def test_autocast_does_not_reach_the_choice_of_codes(tiny):
    """Codes so close round to the same value in bfloat16."""
    tiny.quantize.embedding.weight.copy_(1 + torch.arange(12)[:, None] / 500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tiny.quantize(tiny.quantize.embedding.weight)
    assert codes.tolist() == list(range(12))


@torch.no_grad()
def test_offloaded_weights_give_the_same(tiny):
    batch = images(1, 3, 16, 16)
    encoded, sample = tiny.encode(batch), tiny(batch).sample
    cpu_offload(tiny, execution_device=torch.device("cpu"))
    assert tiny.quantize.embedding.weight.device.type == "meta"
    assert torch.equal(tiny.encode(batch).codes, encoded.codes)
    assert torch.equal(tiny.decode(encoded.codes).sample, sample)


@torch.no_grad()
def test_compiles_without_graph_breaks(tiny):
    batch = images(1, 3, 16, 24)
    compiled = torch.compile(tiny, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch).sample, tiny(batch).sample)


def test_latents_are_differentiable(tiny):
    batch = images(1, 3, 8, 8).requires_grad_()
    tiny.decode(latents=tiny.encode(batch).latents).sample.sum().backward()
    assert batch.grad is not None and batch.grad.abs().max() > 0


def gradients(model: MaskGitVQModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    encoded = model.encode(images(1, 3, 16, 16))
    (encoded.latents.square().mean() + model.decode(encoded.codes).sample.square().mean()).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_gradient_checkpointing_recomputes_and_keeps_gradients(tiny):
    expected = gradients(tiny)
    calls = []
    tiny.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    tiny.enable_gradient_checkpointing()
    found = gradients(tiny)
    assert len(calls) == 2
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient)

    tiny.disable_gradient_checkpointing()
    gradients(tiny)
    assert len(calls) == 3


# Slices and tiles ----------------------------------------------------------------------------------------------------


def sizes_seen(module: torch.nn.Module) -> list[torch.Size]:
    """Fills with the shape of every input of the module."""
    seen: list[torch.Size] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    return seen


@torch.no_grad()
def test_slicing_takes_images_one_by_one(tiny):
    batch = images(3, 3, 16, 8)
    encoded, sample = tiny.encode(batch), tiny(batch).sample
    encoder_inputs, decoder_inputs = sizes_seen(tiny.encoder), sizes_seen(tiny.decoder)

    tiny.enable_slicing()
    torch.testing.assert_close(tiny.encode(batch).latents, encoded.latents)
    torch.testing.assert_close(tiny(batch).sample, sample)
    assert {size[0] for size in encoder_inputs + decoder_inputs} == {1}

    tiny.disable_slicing()
    tiny(batch)
    assert encoder_inputs[-1][0] == decoder_inputs[-1][0] == 3


@pytest.mark.parametrize("size", [(40, 56), (16, 60), (16, 16), (68, 20)])
@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_tiles_of_a_local_map_are_seamless(size, overlap):
    """Maps that look at single cells come out of tiles as from the whole."""
    inputs = images(2, 3, *size)
    pooled = _map_tiles(lambda x: F.avg_pool2d(x, 4), inputs, 4, overlap, 4, 1, 3)
    torch.testing.assert_close(pooled, F.avg_pool2d(inputs, 4))
    enlarged = _map_tiles(lambda x: F.interpolate(x, scale_factor=4.0), pooled, 4, overlap, 1, 4, 3)
    torch.testing.assert_close(enlarged, F.interpolate(pooled, scale_factor=4.0))


def test_tiles_blend_linearly():
    """Where two tiles overlap, the weight goes from one to the other in equal steps."""
    tile_numbers = iter([0.0, 1.0])
    blended = _map_tiles(lambda x: torch.full_like(x, next(tile_numbers)), torch.zeros(1, 1, 1, 12), 8, 4, 1, 1, 1)
    expected = torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
    torch.testing.assert_close(blended.flatten(), expected)


@torch.no_grad()
def test_images_of_one_tile_come_out_as_without_tiling(tiny):
    batch = images(1, 3, 32, 24)
    expected = tiny(batch).sample
    tiny.enable_tiling()
    assert torch.equal(tiny(batch).sample, expected)


@torch.no_grad()
def test_tiling_bounds_the_networks_and_stays_close(tiny):
    batch = images(1, 3, 80, 104)
    whole, sample = tiny.encode(batch), tiny(batch).sample
    encoder_inputs, decoder_inputs = sizes_seen(tiny.encoder), sizes_seen(tiny.decoder)

    def errors(tile: int) -> tuple[float, float]:
        tiny.enable_tiling(tile)
        latents = tiny.encode(batch).latents
        decoded = tiny.decode(whole.codes, grid_size=whole.grid_size).sample
        assert latents.shape == whole.latents.shape and decoded.shape == sample.shape
        return (
            ((latents - whole.latents).norm() / (whole.latents - whole.latents.mean()).norm()).item(),
            ((decoded - sample).norm() / (sample - sample.mean()).norm()).item(),
        )

    small, large = errors(16), errors(64)
    assert max(max(size[-2:]) for size in encoder_inputs) == 64
    assert max(max(size[-2:]) for size in decoder_inputs) == 64 // FACTOR
    assert 0 < large[0] < small[0] and 0 < large[1] < small[1]
    assert max(large) < 0.3

    tiny.disable_tiling()
    assert torch.equal(tiny(batch).sample, sample)


def test_tiling_keeps_gradients(tiny):
    tiny.enable_tiling(16)
    batch = images(1, 3, 24, 40).requires_grad_()
    tiny.encode(batch).latents.sum().backward()
    assert batch.grad is not None and batch.grad.abs().amax((0, 1)).min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_sample_min_size": 18}, "tile_sample_min_size is 18, but must be a positive multiple of 4"),
        ({"tile_sample_min_size": 0}, "tile_sample_min_size is 0"),
        ({"tile_overlap_factor": 0.6}, "tile_overlap_factor is 0.6"),
        ({"tile_overlap_factor": -0.1}, "tile_overlap_factor is -0.1"),
    ],
)
def test_impossible_tiles_are_an_error(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.enable_tiling(**arguments)
    assert not tiny.use_tiling


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\), but must be \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\), but must be \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 10), "divisible by 4: resize, crop or pad"),
        (torch.zeros(1, 3, 0, 8), r"\(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8, but must be floats"),
    ],
)
def test_wrong_images_are_an_error(tiny, batch, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(batch)


CODES = torch.zeros(1, 6, dtype=torch.int64)
LATENTS = torch.zeros(1, 6, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either codes or latents"),
        ({"codes": CODES, "latents": LATENTS}, "either codes or latents"),
        ({"codes": CODES}, r"6 codes do not fill a square: pass grid_size"),
        ({"codes": CODES, "grid_size": (2, 2)}, "6 codes do not fill a grid of 2x2"),
        ({"codes": CODES.float(), "grid_size": (2, 3)}, "torch.float32 of shape"),
        ({"codes": CODES[None], "grid_size": (2, 3)}, r"shape \(1, 1, 6\), but must be int64 of shape \(B, N\)"),
        ({"codes": CODES + 12, "grid_size": (2, 3)}, "from 12 to 12, but must lie between 0 and 11"),
        ({"codes": CODES - 1, "grid_size": (2, 3)}, "from -1 to -1"),
        ({"latents": LATENTS[:, :5]}, r"\(1, 5, 2, 3\), but must be \(B, 6, h, w\)"),
        ({"latents": LATENTS, "grid_size": (3, 2)}, r"grid of \(2, 3\), but grid_size is \(3, 2\)"),
    ],
)
def test_wrong_codes_and_latents_are_an_error(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.decode(**arguments)
