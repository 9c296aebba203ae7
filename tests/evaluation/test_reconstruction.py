# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import ViTConfig, ViTModel

from stellar_hf import MaskGitVQModel, StellarForImageReconstruction, StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.evaluation import (
    ReconstructionMetrics,
    frechet_distance,
    psnr,
    reconstruct,
    reconstruction_scores,
    ssim,
    tokens_and_psnr,
    train_reconstruction_probe,
)
from stellar_hf.features import encode_images


def noisy(*shape, seed=0):
    """Images, and the same with ever more noise."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator) * torch.linspace(0.01, 1, shape[0]).view(-1, 1, 1, 1)
    return (target + noise).clamp(0, 1), target


def test_psnr_equals_scikit_image_for_each_image():
    target = torch.rand(4, 3, 9, 7)
    reconstruction = (target + torch.tensor([0.01, 0.1, 0.3, 1.0]).view(4, 1, 1, 1) * torch.randn_like(target)).clamp(
        0, 1
    )
    expected = [
        peak_signal_noise_ratio(image.numpy(), other.numpy(), data_range=1)
        for image, other in zip(target, reconstruction, strict=True)
    ]
    assert psnr(reconstruction, target).tolist() == pytest.approx(expected, rel=1e-5)


def test_psnr_clamps_the_reconstruction():
    target = torch.ones(1, 3, 4, 4)
    assert psnr(target * 5, target).item() == float("inf")
    assert psnr(-target, target).item() == pytest.approx(0.0)


def test_psnr_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and target \(1, 3, 8, 8\)"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("reconstruction", "target", "said"),
    [
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4), "at least one image"),
        ([0.0], torch.zeros(1, 3, 4, 4), "reconstruction is a list"),
        (torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), torch.nan), r"in \[0, 1\]"),
    ],
)
def test_psnr_rejects_what_has_no_measure(reconstruction, target, said):
    with pytest.raises(ValueError, match=said):
        psnr(reconstruction, target)


@pytest.mark.parametrize("target", [torch.full((1, 3, 4, 4), -0.5), torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)])
def test_psnr_rejects_targets_that_are_no_rgb_in_the_unit_range(target):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        psnr(torch.zeros(1, 3, 4, 4), target)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([(11, 11), (16, 12)]))
def test_psnr_and_ssim_do_not_tell_which_of_two_images_is_the_original(seed, size):
    one, other = noisy(3, 3, *size, seed=seed)
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(one, other), metric(other, one), rtol=1e-6, atol=1e-6)
    assert ssim(one, one).tolist() == pytest.approx([1] * 3)
    assert (psnr(other, other) == torch.inf).all()


def test_ssim_equals_scikit_image_and_psnr_torchmetrics():
    reconstruction, target = noisy(4, 3, 24, 17)
    # Scikit-image has no windows at the border, torchmetrics reflects the image there.
    sides = ((0, 0), (0, 0), (5, 5), (5, 5))
    borders = [np.pad(images.double(), sides, mode="reflect") for images in (target, reconstruction)]
    expected = [
        structural_similarity(
            image,
            other,
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for image, other in zip(*borders, strict=True)
    ]
    assert ssim(reconstruction, target).tolist() == pytest.approx(expected, abs=1e-6)
    metric = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(reconstruction, target), metric(reconstruction, target), rtol=1e-6, atol=0)


def test_ssim_needs_images_of_a_window():
    with pytest.raises(ValueError, match="8x16 pixels, but SSIM has a window of 11x11"):
        ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


# A set of images ----------------------------------------------------------------------------------------------------


def with_moments(num_rows: int, mean: torch.Tensor, scale: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows whose mean and (diagonal) standard deviations are exactly these."""
    rows = torch.randn(num_rows, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = rows - rows.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(rows.T.cov())).T
    return rows @ whitening * scale + mean


def test_frechet_distance_of_known_normal_distributions():
    mean, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 0.1])
    other_mean, other_scale = torch.tensor([0.0, -2.0, 1.5]), torch.tensor([3.0, 2.0, 0.4])
    rows, other = with_moments(50, mean, scale, 0), with_moments(80, other_mean, other_scale, 1)
    # Commuting covariances: |m1 - m2|^2 + |s1 - s2|^2.
    expected = ((mean - other_mean) ** 2).sum() + ((scale - other_scale) ** 2).sum()
    assert frechet_distance(rows, other) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(other, rows) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_does_not_depend_on_the_axes():
    rows, other = (
        with_moments(60, torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), 0),
        with_moments(60, torch.ones(3), torch.tensor([3.0, 0.0, 1.0]), 1),  # of a singular covariance
    )
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    expected = frechet_distance(rows, other)
    assert frechet_distance(rows @ rotation, other @ rotation) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_is_that_of_torchmetrics():
    """Also of fewer images than features, whose covariances are singular."""
    features, targets = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0)).double()
    targets = features + 0.5 * targets.exp()
    network = nn.Identity()  # takes features in the place of images
    network.num_features = 50
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(features, real=False)
    metric.update(targets, real=True)
    assert frechet_distance(features, targets) == pytest.approx(metric.compute().item(), rel=1e-5)


def test_frechet_distance_refuses_what_has_none():
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5, 3\)"):
        frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="two images at least"):
        frechet_distance(torch.ones(1, 6), torch.ones(5, 6))


class Distance(nn.Module):
    """In the place of LPIPS: mean absolute difference of one channel's edges, in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, one, other):
        assert -1 <= one.min() < 0 and one.max() <= 1
        return (self.scale * (one - other)[:, :1]).abs().mean(dim=(1, 2, 3), keepdim=True)


class Features(nn.Module):
    """In the place of Inception: means of the corners of 8-bit images."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)[:, :2].flatten(1)


def test_metrics_of_a_set_do_not_depend_on_its_batches_and_use_the_given_networks():
    metrics = ReconstructionMetrics(lpips=Distance(), rfid=Features())
    reconstruction, target = noisy(12, 3, 16, 16)
    whole = metrics.summarize(metrics.measure(reconstruction, target))
    pairs = zip(reconstruction.split(5), target.split(5), strict=True)
    parts = [metrics.measure(*pair) for pair in pairs]
    assert metrics.summarize({name: torch.cat([part[name] for part in parts]) for name in parts[0]}) == whole
    assert whole["lpips"] == pytest.approx((reconstruction - target)[:, 0].abs().mean().item(), rel=1e-5)
    assert whole["psnr"] == pytest.approx(psnr(reconstruction, target).mean().item(), rel=1e-6)
    features, target_features = ((255 * images).round() / 255 for images in (reconstruction, target))
    corners = [nn.functional.adaptive_avg_pool2d(one, 2)[:, :2].flatten(1) for one in (features, target_features)]
    assert whole["rfid"] == pytest.approx(frechet_distance(*corners), rel=1e-4)


def test_networks_are_told_by_their_weights():
    network, same, other = Distance(), Distance(), Distance()
    other.scale.data += 1e-6
    first, second, third = (
        ReconstructionMetrics(lpips=one, rfid=None).describe_networks() for one in (network, same, other)
    )
    assert first == second and first["lpips"]["name"] == "Distance" and "rfid" not in first
    assert first["lpips"]["sha256"] != third["lpips"]["sha256"] and len(first["lpips"]["sha256"]) == 64


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="the default networks are there")
def test_default_networks_say_what_to_install():
    with pytest.raises(ImportError, match=r"LPIPS-Alex needs .* pip install torchmetrics torchvision\..*lpips=None"):
        ReconstructionMetrics(rfid=None)
    with pytest.raises(ImportError, match=r"rFID-2048 needs .* pip install torchmetrics torch-fidelity\..*rfid=None"):
        ReconstructionMetrics(lpips=None)


def flat_images(count, size=32, seed=0):
    """Images of one colour each, with a square of another one."""
    rng = np.random.default_rng(seed)
    images = np.repeat(rng.integers(0, 256, (count, 1, 3), np.uint8), size * size, axis=1).reshape(-1, size, size, 3)
    images[:, : size // 2, : size // 2] = rng.integers(0, 256, (count, 1, 1, 3), np.uint8)
    return [Image.fromarray(image) for image in images]


PROCESSOR = StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
NO_NETWORKS = {"lpips": None, "rfid": None}


def test_scores_of_a_model_leave_broken_images_out(tiny_config):
    model, images = StellarForPreTraining(tiny_config()), flat_images(5)
    metrics = ReconstructionMetrics(**NO_NETWORKS)
    scores = reconstruction_scores(model, images, PROCESSOR, metrics, show_progress=False)
    expected = encode_images(model, images, PROCESSOR, encode=tokens_and_psnr, show_progress=False).psnr
    assert scores["psnr"] == pytest.approx(expected.mean().item(), rel=1e-6) and scores["num_images"] == 5
    broken = [*images[:2], b"no image", *images[2:]]
    assert reconstruction_scores(model, broken, PROCESSOR, metrics, show_progress=False, batch_size=6) == scores


def test_scores_do_not_depend_on_the_number_of_processes(tiny_config, two_processes):
    torch.manual_seed(0)
    model, images = StellarForPreTraining(tiny_config()), flat_images(5)
    networks = {"lpips": Distance(), "rfid": Features()}

    def score(accelerator):
        metrics = ReconstructionMetrics(**networks)
        settings = {"accelerator": accelerator, "batch_size": 1, "show_progress": False}
        return reconstruction_scores(model, images, PROCESSOR, metrics, **settings)

    assert two_processes(score) == [score(None)] * 2


def test_images_are_compared_in_the_size_that_the_tokenizer_gives(tiny_config):
    """As with ViT-H/14, whose codes make larger images than the encoder sees."""
    tokenizer = make_tokenizer()
    config = tiny_config(patch_size=7, image_size=28, reconstruction_target="codes", codebook_size=12)
    model = StellarForImageReconstruction(config).eval()
    pixel_values = PROCESSOR(flat_images(2), return_tensors="pt")["pixel_values"][..., 2:31, 1:30]  # a rim of 1
    with torch.no_grad():
        reconstruction, target = reconstruct(model, pixel_values, vq_model=tokenizer)
        assert torch.equal(tokenizer.encode(target).codes, tokenizer.patch_codes(model.denormalize(pixel_values), 7))
        with pytest.raises(ValueError, match="pass vq_model"):
            reconstruct(model, pixel_values)
    assert reconstruction.shape == target.shape == (2, 3, 32, 32)


def make_tokenizer():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "latent_channels": 6}
    return MaskGitVQModel(**sizes, num_vq_embeddings=12, norm_num_groups=4, sample_size=32).eval()


# Probe --------------------------------------------------------------------------------------------------------------


PROBE = {"epochs": 30, "batch_size": 8, "learning_rate": 3e-3, "show_progress": False}


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_probe_reconstructs_more_than_the_mean_image(tiny_config, kind):
    torch.manual_seed(0)
    model, images = StellarForPreTraining(tiny_config()), flat_images(32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = train_reconstruction_probe(model, images, PROCESSOR, kind=kind, **PROBE)
    scores = reconstruction_scores(
        model, images, PROCESSOR, ReconstructionMetrics(**NO_NETWORKS), probe=probe, show_progress=False
    )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean_image = pixels.mean(dim=0, keepdim=True).expand_as(pixels)
    assert scores["psnr"] > psnr(mean_image, pixels).mean() + 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_probe_of_another_encoder_takes_the_mean_of_its_processor(tiny_config):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = StellarImageProcessorPil(**size, **half)
    images = flat_images(8)
    settings = {**PROBE, "epochs": 1, "decoder_config": tiny_config()}
    probe = train_reconstruction_probe(model, images, processor, kind="dense", **settings)
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        reconstruction, target = reconstruct(model, pixel_values, probe=probe)
    torch.testing.assert_close(target, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)
    assert reconstruction.shape == target.shape and len(probe.decoder.layers) == 1
    with pytest.raises(ValueError, match="ViTModel has no low-rank features"):
        train_reconstruction_probe(model, images, processor, **settings)


def test_probe_learns_codes(tiny_config):
    torch.manual_seed(0)
    model, images, tokenizer = StellarForPreTraining(tiny_config()), flat_images(16), make_tokenizer()
    pixel_values = PROCESSOR(images, return_tensors="pt")["pixel_values"]
    latents = tokenizer.encode(model.denormalize(pixel_values)).latents.permute(0, 2, 3, 1).flatten(0, 2)
    tokenizer.quantize.embedding.weight.data = latents[::21][:12].clone()  # otherwise one code is the nearest of all
    codes = tokenizer.patch_codes(model.denormalize(pixel_values), 8)

    def accuracy(epochs):
        settings = {**PROBE, "epochs": epochs, "vq_model": tokenizer}
        probe = train_reconstruction_probe(model.eval(), images, PROCESSOR, **settings)
        with torch.no_grad():
            logits = probe(probe.frozen_features(model, pixel_values), (4, 4))
        return (logits.argmax(dim=-1) == codes).float().mean().item()

    most_frequent = codes.flatten().bincount().max().item() / codes.numel()
    assert accuracy(30) > most_frequent + 0.1


def test_probe_is_the_same_on_two_processes_and_with_a_broken_image(tiny_config, two_processes):
    torch.manual_seed(0)
    model, images = StellarForPreTraining(tiny_config()), flat_images(6)
    rows = [*images, b"no image"]

    def weights(accelerator, rows=rows):
        probe = train_reconstruction_probe(
            model, rows, PROCESSOR, accelerator=accelerator, **{**PROBE, "epochs": 2, "batch_size": 2}
        )
        return nn.utils.parameters_to_vector(probe.parameters()).detach()

    expected = weights(None)
    for found in two_processes(weights):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    assert torch.equal(weights(None), expected)
    assert not torch.equal(weights(None, rows=[images[0]] * 7), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "sparse"}, "kind is 'sparse'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
    ],
)
def test_probe_rejects_impossible_arguments(tiny_config, change, said):
    with pytest.raises(ValueError, match=said):
        train_reconstruction_probe(StellarForPreTraining(tiny_config()), flat_images(1), PROCESSOR, **change)
