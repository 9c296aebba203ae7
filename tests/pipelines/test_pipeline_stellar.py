# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The pipeline from images to tokens and back, on the demo model and on tiny ones."""

import inspect
import json
import subprocess

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

import stellar_hf
from stellar_hf import StellarConfig, StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline
from stellar_hf.data import images_to_tensor, load_tabletop_scenes
from stellar_hf.data.photo_mosaics import photograph
from stellar_hf.evaluation import psnr
from stellar_hf.pipelines import MaskGitVQModel
from stellar_hf.pipelines.decoding import sample_codes

DEMO_CONFIG = StellarConfig.from_pretrained(stellar_hf.DEMO_MODEL)
R, WIDTH = DEMO_CONFIG.num_sparse_tokens, DEMO_CONFIG.hidden_size
SIZES = [(48, 70), (30, 30), (101, 33)]  # height, width: none a multiple of the demo model's patches


def demo_pipeline() -> StellarPipeline:
    return StellarPipeline(
        image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
        model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
        vq_model=None,
    )


@pytest.fixture(scope="module")
def pipe():
    return demo_pipeline()


@pytest.fixture(scope="module")
def code_pipe(tiny_config):
    torch.manual_seed(0)
    return StellarPipeline(
        image_processor=StellarImageProcessorPil(),
        model=StellarForImageReconstruction(tiny_config(reconstruction_target="codes")).eval(),
    )


@pytest.fixture(scope="module")
def images():
    names = ("flower", "coffee", "chelsea")
    return [photograph(name).convert("RGB").resize(size[::-1]) for name, size in zip(names, SIZES, strict=True)]


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def similarity(image: Image.Image, other: Image.Image) -> torch.Tensor:
    return psnr(as_tensor(image)[None], as_tensor(other)[None])


# Images --------------------------------------------------------------------------------------------------------------


def test_images_come_back_whole_and_in_their_size(pipe, images):
    reconstructions = pipe(image=images).images
    assert [image.size for image in reconstructions] == [image.size for image in images]
    for image, reconstruction in zip(images, reconstructions, strict=True):
        assert similarity(reconstruction, image) > 15
        if image.width != image.height:
            side = min(image.size)
            centre = ImageOps.fit(image, (side, side)).resize(image.size)
            assert similarity(reconstruction, image) > similarity(reconstruction, centre) + 1.5


def test_batch_equals_single_images(pipe, images):
    batch = pipe(image=images, output_type="pt").images
    for image, reconstruction in zip(images, batch, strict=True):
        (single,) = pipe(image=image, output_type="pt").images
        torch.testing.assert_close(single, reconstruction, rtol=0, atol=1e-4)


def test_encoding_and_decoding_equal_the_call_with_an_image(pipe, images):
    image = images[0]
    tokens, localization = pipe.encode(image)
    assert tokens.shape == (1, R, WIDTH) and localization.shape == (1, 256, R)
    torch.testing.assert_close(localization.sum(-1), torch.ones(1, 256))
    decoded = pipe(sparse_tokens=tokens, localization=localization, height=image.height, width=image.width)
    assert decoded.images[0].tobytes() == pipe(image=image).images[0].tobytes()
    assert pipe(sparse_tokens=tokens, localization=localization).images[0].size == (128, 128)


def test_grid_of_another_shape(pipe, images):
    tokens, localization = pipe.encode(images, grid_size=(12, 20))
    assert tokens.shape == (3, R, WIDTH) and localization.shape == (3, 240, R)
    decoded = pipe(sparse_tokens=tokens, localization=localization, grid_size=(12, 20)).images
    assert [image.size for image in decoded] == [(160, 96)] * 3
    (called,) = pipe(image=images[0], grid_size=(12, 20), output_type="latent").images
    torch.testing.assert_close(as_tensor(decoded[0]), called.clamp(0, 1), rtol=0, atol=0.51 / 255)


def test_output_types_hold_the_same_pixels(pipe, images):
    (pil,) = pipe(image=images[0]).images
    tensor = pipe(image=images[0], output_type="pt").images
    array = pipe(image=images[0], output_type="np").images
    assert tensor.shape == (1, 3, 48, 70) and array.shape == (1, 48, 70, 3)
    assert 0 <= tensor.min() and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(as_tensor(pil), tensor[0], rtol=0, atol=0.51 / 255)
    latent = pipe(image=images[0], output_type="latent").images
    expected = pipe.model.decode(*pipe.encode(images[0]), (16, 16))
    torch.testing.assert_close(latent, expected)


def test_images_of_different_sizes_make_a_list_unless_one_is_asked_for(pipe, images):
    assert [image.shape for image in pipe(image=images, output_type="pt").images] == [(3, *size) for size in SIZES]
    assert [image.shape for image in pipe(image=images, output_type="np").images] == [(*size, 3) for size in SIZES]
    assert pipe(image=images, height=20, width=40, output_type="pt").images.shape == (3, 3, 20, 40)


def test_tuple_holds_what_the_output_holds(pipe, images):
    (from_tuple,) = pipe(image=images[0], output_type="pt", return_dict=False)
    torch.testing.assert_close(from_tuple, pipe(image=images[0], output_type="pt").images)


def test_images_of_all_types_are_encoded_alike(pipe, images):
    image = images[0]
    array, tensor = np.asarray(image), as_tensor(image)
    tokens, _ = pipe.encode(image)
    for same in (array, array / 255, [array], array[None], tensor, tensor.mul(255).round().byte(), tensor[None]):
        torch.testing.assert_close(pipe.encode(same)[0], tokens)
    gray = image.convert("L")
    from_gray, _ = pipe.encode(gray)
    torch.testing.assert_close(pipe.encode(np.asarray(gray)[:, :, None])[0], from_gray)
    torch.testing.assert_close(pipe.encode(gray.convert("RGB"))[0], from_gray)


def test_output_is_an_input(pipe, images):
    output = pipe(image=images[0], output_type="pt").images
    again = pipe(image=output, output_type="pt").images
    assert psnr(again, output) > 25


# Saving and loading --------------------------------------------------------------------------------------------------


def test_saved_pipeline_makes_the_same_images(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path)
    assert loaded.vq_model is None
    assert loaded.image_processor.to_dict() == pipe.image_processor.to_dict()
    torch.testing.assert_close(
        loaded(image=images[0], output_type="pt").images,
        pipe(image=images[0], output_type="pt").images,
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "2MB"}])
def test_variants_and_shards(pipe, images, tmp_path, options):
    pipe.save_pretrained(tmp_path, **options)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    loaded = StellarPipeline.from_pretrained(tmp_path, variant=options.get("variant"))
    expected = pipe(image=images[0], output_type="latent").images
    torch.testing.assert_close(loaded(image=images[0], output_type="latent").images, expected, rtol=0, atol=1e-5)


def test_plain_diffusion_pipeline_loads_through_the_saved_file(pipe, forking_python, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StellarPipeline" and index["vq_model"] == [None, None]
    # In a process in which nothing of the package is imported yet.
    code = f"""
        from diffusers import DiffusionPipeline
        try:
            DiffusionPipeline.from_pretrained({str(tmp_path)!r})
        except AttributeError as error:
            print(error)
        pipe = DiffusionPipeline.from_pretrained(
            {str(tmp_path)!r}, custom_pipeline="pipeline", trust_remote_code=True
        )
        print(type(pipe).__module__, type(pipe).__name__, pipe.model.num_parameters())
    """
    process = subprocess.run([forking_python, "-c", inspect.cleandoc("\n" + code)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "has no attribute StellarPipeline" in process.stdout
    expected = f"stellar_hf.pipelines.pipeline_stellar StellarPipeline {pipe.model.num_parameters()}"
    assert process.stdout.splitlines()[-1] == expected


def test_components_make_another_pipeline(pipe, images):
    other = StellarPipeline(**pipe.components)
    assert set(pipe.components) == {"image_processor", "model", "vq_model"}
    assert other.model is pipe.model
    assert other(image=images[0]).images[0].tobytes() == pipe(image=images[0]).images[0].tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, images, tmp_path, dtype):
    expected = pipe(image=images[0], output_type="pt").images
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    tokens, localization = loaded.encode(images[0])
    assert tokens.dtype == localization.dtype == dtype
    output = loaded(image=images[0], output_type="pt").images
    assert output.dtype == torch.float32
    assert psnr(output, expected) > 35
    # Tokens that were edited in float32 are decoded, too.
    loaded(sparse_tokens=tokens.float(), localization=localization.float())
    assert loaded.to(torch.float32).dtype == torch.float32


def test_hooks_of_the_model_run_before_its_weights_are_used(images):
    """As those do that bring an offloaded model to its device, also where it is not called by `forward`."""

    class Hook(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    pipe, hook = demo_pipeline(), Hook()
    add_hook_to_module(pipe.model, hook)
    tokens, localization = pipe.encode(images[0])
    assert hook.calls == 1
    pipe(sparse_tokens=tokens, localization=localization)
    assert hook.calls == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloads to and from an accelerator")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_changes_nothing(pipe, images, tmp_path, offload):
    pipe.save_pretrained(tmp_path)
    loaded = StellarPipeline.from_pretrained(tmp_path)
    getattr(loaded, offload)()
    expected = pipe(image=images[0], output_type="pt").images
    for _ in range(2):
        torch.testing.assert_close(loaded(image=images[0], output_type="pt").images.cpu(), expected, rtol=0, atol=1e-3)
    tokens, localization = pipe.encode(images[0])
    output = loaded(sparse_tokens=tokens, localization=localization, height=48, width=70, output_type="pt").images
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=1e-3)


# Codes ---------------------------------------------------------------------------------------------------------------


def logits(batch: int = 2, patches: int = 40, codes: int = 16) -> torch.Tensor:
    return torch.randn(batch, patches, codes, generator=torch.Generator().manual_seed(0))


def test_without_temperature_the_likeliest_codes_are_taken():
    torch.testing.assert_close(sample_codes(logits()), logits().argmax(-1))
    torch.testing.assert_close(sample_codes(logits(), temperature=3.0, top_k=1), logits().argmax(-1))
    torch.testing.assert_close(sample_codes(logits(), temperature=1e-6), logits().argmax(-1))


def test_samples_follow_the_distribution():
    scores = torch.tensor([2.0, 0.0, 1.0, -1.0])
    many = scores.expand(1, 40_000, 4)
    for temperature, top_k, expected in (
        (1.0, None, scores.softmax(0)),
        (2.0, None, (scores / 2).softmax(0)),
        (1.0, 2, torch.tensor([2.0, -torch.inf, 1.0, -torch.inf]).softmax(0)),
    ):
        codes = sample_codes(many, temperature, top_k, torch.Generator().manual_seed(1))
        shares = codes.flatten().bincount(minlength=4) / codes.numel()
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.012)


def test_generators_decide_the_samples():
    scores_of_both = logits()

    def sample(*seeds, scores=scores_of_both):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample_codes(scores, 1.0, None, generators if len(generators) > 1 else generators[0])

    torch.testing.assert_close(sample(5), sample(5))
    assert not torch.equal(sample(5), sample(6))
    torch.testing.assert_close(sample(5, 6)[:1], sample(5, scores=scores_of_both[:1]))
    torch.testing.assert_close(sample(5, 6)[1:], sample(6, scores=scores_of_both[1:]))
    same = scores_of_both[:1].expand(2, -1, -1)
    assert not torch.equal(*sample(5, scores=same))


def test_codes_of_a_model_with_code_targets(code_pipe, images):
    codes = code_pipe(image=images, output_type="latent").images
    assert codes.shape == (3, 16) and codes.dtype == torch.int64
    tokens, localization = code_pipe.encode(images)
    torch.testing.assert_close(codes, code_pipe.model.decode(tokens, localization, (4, 4)).argmax(-1))

    def sampled(seed):
        generator = torch.Generator().manual_seed(seed)
        return code_pipe(
            sparse_tokens=tokens,
            localization=localization,
            temperature=1.0,
            top_k=8,
            generator=generator,
            output_type="latent",
        ).images

    torch.testing.assert_close(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vq_pipe(code_pipe):
    """With codes half as large as patches, so that images are resized for the encoder."""
    torch.manual_seed(0)
    config = code_pipe.model.config
    levels = config.patch_size.bit_length() - 1
    vq_model = MaskGitVQModel(
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=config.codebook_size,
        norm_num_groups=4,
    )
    assert vq_model.downsample_factor == config.patch_size // 2
    return StellarPipeline(code_pipe.image_processor, code_pipe.model, vq_model.eval())


def test_a_second_step_comes_closer_to_the_image(pipe):
    scenes = torch.stack(images_to_tensor(load_tabletop_scenes("test", 32, seed=1)["image"])) / 255

    def closeness(steps):
        return psnr(pipe(image=scenes, num_inference_steps=steps, output_type="pt").images, scenes).mean()

    assert closeness(2) > closeness(1)


def test_further_steps_add_half_of_what_the_image_lacks(pipe, images):
    tokens, localization = pipe.encode(images[0])
    first = pipe(image=images[0], output_type="latent").images
    again_tokens, again_localization = pipe.encode(first.clamp(0, 1))
    z, lost = localization @ tokens, localization @ tokens - again_localization @ again_tokens
    expected = pipe.model.decode(z + lost / 2, torch.eye(256)[None], (16, 16))
    second = pipe(image=images[0], num_inference_steps=2, output_type="latent").images
    # The image was rounded to bytes for the encoding above, after which patches between two tokens may change sides.
    change = (second - first).abs().mean()
    assert change > 0.005 and (second - expected).abs().mean() < 0.4 * change


def test_steps_of_codes_are_sampled_for_each_image_alone(vq_pipe, images):
    def sampled(images, seeds, steps=3):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return vq_pipe(
            image=images, num_inference_steps=steps, temperature=1.0, generator=generators, output_type="latent"
        ).images

    codes = sampled(images, [0, 1, 2])
    torch.testing.assert_close(sampled(images[1], [1])[0], codes[1])
    assert not torch.equal(sampled(images, [0, 1, 2], steps=1), codes)
    sizes = [image.size for image in vq_pipe(image=images, num_inference_steps=2).images]
    assert sizes == [image.size for image in images]


def test_steps_show_a_progress_bar_unless_there_is_one_alone(pipe, images, capsys):
    pipe(image=images[0])
    assert capsys.readouterr().err == ""
    pipe(image=images[0], num_inference_steps=3)
    assert "2/2" in capsys.readouterr().err


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "Pass either image, or sparse_tokens and localization"),
        ({"sparse_tokens": torch.zeros(1, R, WIDTH)}, "Pass either image"),
        ({"image": Image.new("RGB", (8, 8)), "localization": torch.zeros(1, 4, R)}, "Pass either image"),
        ({"sparse_tokens": torch.zeros(1, R, WIDTH), "localization": torch.zeros(1, 6, R)}, "pass grid_size"),
        (
            {"sparse_tokens": torch.zeros(1, R, 64), "localization": torch.zeros(1, 4, R)},
            f"tokens, {WIDTH}",
        ),
        ({"image": Image.new("RGB", (8, 8)), "grid_size": (0, 4)}, "grid_size is"),
        ({"image": Image.new("RGB", (8, 8)), "height": 4}, "height is 4 and width None"),
        ({"image": Image.new("RGB", (8, 8)), "output_type": "png"}, "output_type is 'png'"),
        ({"image": Image.new("RGB", (8, 8)), "temperature": 1.0}, "reconstructs pixels"),
        ({"image": Image.new("RGB", (8, 8)), "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"image": []}, "no image in the list"),
        ({"image": "photo.png"}, "An image is a str"),
        ({"image": torch.randn(3, 8, 8) * 3}, r"floating point in \[0, 1\]"),
        ({"image": np.zeros((3, 8, 8), dtype=np.uint8)}, r"shape \(3, 8, 8\)"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(pipe, arguments, said):
    with pytest.raises(ValueError, match=said):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "pass one to the pipeline"),
        ({"num_inference_steps": 2, "output_type": "latent"}, "num_inference_steps=1"),
        ({"temperature": -1.0, "output_type": "latent"}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_k": 17, "output_type": "latent"}, r"top_k must be in \[1, 16\]"),
        ({"top_k": 4, "output_type": "latent"}, "needs a positive temperature"),
        ({"temperature": 1.0, "generator": [torch.Generator()] * 2, "output_type": "latent"}, "2 generators for 1"),
    ],
)
def test_impossible_sampling_is_refused_in_a_sentence(code_pipe, images, arguments, said):
    with pytest.raises(ValueError, match=said):
        code_pipe(image=images[0], **arguments)


def test_call_has_the_arguments_that_diffusers_expects():
    arguments = inspect.signature(StellarPipeline.__call__).parameters
    expected = {"image", "height", "width", "num_inference_steps", "generator", "output_type", "return_dict"}
    assert expected <= set(arguments)
    assert issubclass(StellarPipeline, DiffusionPipeline)
