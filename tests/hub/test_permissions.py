# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Whoever the umask allows to read files can read saved models: safetensors alone would keep them to their owner."""

import os

import pytest

from stellar_hf import (
    MaskGitVQModel,
    StellarForImageReconstruction,
    StellarImageProcessorPil,
    StellarModel,
    StellarPipeline,
    StellarTokenPrior,
)


@pytest.fixture(params=[0o022, 0o027])
def umask(request):
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def modes(folder):
    return {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}


def test_saved_models_have_the_permissions_that_the_umask_allows(tiny_config, tmp_path, umask):
    model = StellarModel(tiny_config())
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB", variant="fp32")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert modes(tmp_path) == {0o666 & ~umask}
    assert os.umask(umask) == umask  # as it was


def test_saved_pipelines_have_the_permissions_that_the_umask_allows(tiny_config, tmp_path, umask):
    vq_model = MaskGitVQModel(block_out_channels=(32, 32), layers_per_block=1, latent_channels=8, num_vq_embeddings=16)
    StellarPipeline(
        image_processor=StellarImageProcessorPil(crop_size={"height": 32, "width": 32}),
        model=StellarForImageReconstruction(tiny_config()),
        vq_model=vq_model,
    ).save_pretrained(tmp_path)
    StellarTokenPrior(
        num_sparse_tokens=4,
        token_size=32,
        grid_size=(4, 4),
        num_classes=3,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        localization_channels=8,
    ).save_pretrained(tmp_path / "prior")
    assert {file.parent.name for file in tmp_path.rglob("*.safetensors")} == {"model", "vq_model", "prior"}
    assert modes(tmp_path) == {0o666 & ~umask}
