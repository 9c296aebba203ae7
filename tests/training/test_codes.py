# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The codes that a tokenizer gives a training to reconstruct."""

import pytest
import torch
import torch.nn.functional as F

from stellar_hf import MaskGitVQModel
from stellar_hf.conversion.convert_maskgit_vq import convert_vq_checkpoint
from stellar_hf.training.codes import code_labels


@pytest.fixture(scope="module")
def vq_model():
    torch.manual_seed(0)
    return MaskGitVQModel(
        block_out_channels=(8, 8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
    ).eval()


def test_codes_are_those_of_the_reference(golden_tensors, golden_vq_weights):
    golden = golden_tensors("vq_codes")
    vq_model = convert_vq_checkpoint(golden_vq_weights).eval()
    assert torch.equal(code_labels(vq_model, golden["image"], patch_size=16), golden["codes"].flatten(1))


def test_other_patches_get_a_code_each(vq_model):
    images = torch.rand(2, 3, 60, 45)
    codes = code_labels(vq_model, images, patch_size=14)
    resized = F.interpolate(images[..., :56, :42], size=(64, 48), mode="bicubic", align_corners=False)
    assert codes.shape == (2, 12) and torch.equal(codes, vq_model.encode(resized).codes)


def test_trainer_makes_the_codes(make_trainer, vq_model):
    config = {"reconstruction_target": "codes", "codebook_size": 16}
    trainer = make_trainer(config, vq_model=vq_model)
    labels = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append((kwargs["code_labels"], kwargs["pixel_values"])), with_kwargs=True
    )
    weights = {name: weight.clone() for name, weight in vq_model.state_dict().items()}
    trainer.train()
    assert len(labels) == 3
    for codes, pixel_values in labels:
        assert torch.equal(codes, code_labels(vq_model, trainer.model.denormalize(pixel_values), patch_size=8))
    assert all(torch.equal(weights[name], weight) for name, weight in vq_model.state_dict().items())
