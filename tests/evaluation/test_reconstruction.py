# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from stellar_hf.evaluation import psnr


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
