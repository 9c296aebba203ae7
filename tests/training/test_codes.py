# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The codes that a tokenizer gives a training to reconstruct."""

import pytest
import torch

from stellar_hf import MaskGitVQModel


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
        assert torch.equal(codes, vq_model.patch_codes(trainer.model.denormalize(pixel_values), patch_size=8))
    assert all(torch.equal(weights[name], weight) for name, weight in vq_model.state_dict().items())
