# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Encoders that start from a plain ViT compute what the ViT computes."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from stellar_hf import (
    StellarBackbone,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarModel,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
PRETRAINING = {
    "reconstruction_target": "pixels",
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "num_prototypes": 8,
    "prototype_dim": 8,
}


def scramble(model):
    """Gives every weight, biases and layer scales too, a value that tells where it came from."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a tiny ViT of a kind; returns its folder and the model whose features count."""

    def checkpoint(kind, **fields):
        if kind == "vit":
            model = scramble(ViTModel(ViTConfig(**SIZES, **fields)))
        elif kind == "vit_mae":
            model = scramble(ViTMAEForPreTraining(ViTMAEConfig(**SIZES, mask_ratio=0.0, **fields)))
        else:
            model = scramble(Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, **fields)))
        model.save_pretrained(tmp_path / kind)
        return tmp_path / kind, model

    return checkpoint


def encode_without_sparse_tokens(model: StellarModel, pixel_values: torch.Tensor) -> torch.Tensor:
    hidden_states = model.embeddings(pixel_values, model.embeddings.grid_size(pixel_values))[
        :, : -model.config.num_sparse_tokens
    ]
    for layer in model.layers:
        hidden_states = layer(hidden_states)
    return model.layernorm(hidden_states)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_encoder_equals_the_vit(checkpoint, kind):
    folder, vit = checkpoint(kind)
    model, report = StellarModel.from_vit_pretrained(folder, num_sparse_tokens=3, output_loading_info=True)
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = vit(pixel_values).last_hidden_state
    torch.testing.assert_close(encode_without_sparse_tokens(model, pixel_values), expected, rtol=1e-4, atol=1e-4)
    assert model(pixel_values).sparse_tokens.shape == (2, 3, 32)
    assert set(report["missing_keys"]) == {
        "embeddings.sparse_tokens",
        *(f"localization.{side}_projection.{part}" for side in ("dense", "sparse") for part in ("weight", "bias")),
    }
    unused = {"vit": {"pooler.dense.weight", "pooler.dense.bias"}, "dinov2": {"embeddings.mask_token"}}
    assert set(report["unexpected_keys"]) == unused[kind]
    assert set(report["loaded_keys"]) | set(report["missing_keys"]) == set(model.state_dict())


@torch.no_grad()
def test_pretraining_starts_from_an_mae_and_its_teacher_too(checkpoint):
    folder, mae = checkpoint("vit_mae")
    model = StellarForPreTraining.from_vit_pretrained(folder, use_teacher=True, **PRETRAINING)
    pixel_values = torch.randn(2, 3, 16, 16)
    # With ratio 0 an MAE still shuffles its patches: put them back.
    output = mae.vit(pixel_values, noise=torch.arange(16.0).expand(2, -1))
    expected = output.last_hidden_state
    torch.testing.assert_close(
        encode_without_sparse_tokens(model.stellar, pixel_values), expected, rtol=1e-4, atol=1e-4
    )
    for teacher_weight, weight in model.teacher_and_student_weights():
        assert torch.equal(teacher_weight, weight)


@torch.no_grad()
@pytest.mark.parametrize(
    "model_class",
    [StellarForImageClassification, StellarForSemanticSegmentation, StellarForImageReconstruction, StellarBackbone],
)
def test_heads_start_from_a_vit(checkpoint, model_class):
    folder, vit = checkpoint("dinov2")
    model, report = model_class.from_vit_pretrained(folder, num_labels=5, output_loading_info=True, **PRETRAINING)
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = vit(pixel_values).last_hidden_state
    encoded = encode_without_sparse_tokens(model.base_model, pixel_values)
    torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-4)
    assert set(report["loaded_keys"]) | set(report["missing_keys"]) == set(model.state_dict())
    new = {name.removeprefix("stellar.").split(".")[0] for name in report["missing_keys"]}
    assert new <= {"embeddings", "localization", "norm", "classifier", "decoder"}


@torch.no_grad()
def test_another_image_size_interpolates_the_positions(checkpoint):
    folder, vit = checkpoint("vit")
    model = StellarModel.from_vit_pretrained(folder, image_size=24)
    pixel_values = torch.randn(1, 3, 24, 24)
    expected = vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encode_without_sparse_tokens(model, pixel_values), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_plain_vit_is_refused(checkpoint):
    folder, _ = checkpoint("dinov2", use_swiglu_ffn=True)
    with pytest.raises(ValueError, match=r"\(dinov2\) is no plain ViT.*mlp"):
        StellarModel.from_vit_pretrained(folder)
