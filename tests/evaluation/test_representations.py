# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Vectors for images from encoders of every kind: with CLS, registers, neither, or masks."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

from stellar_hf import StellarForImageClassification, StellarForPreTraining
from stellar_hf.evaluation import image_representations

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def test_representations_of_a_stellar_model_are_those_of_its_factorization(tiny_config):
    torch.manual_seed(0)
    model = StellarForPreTraining(tiny_config()).eval()
    with torch.no_grad():
        found = image_representations(model, PIXELS)
        output = model.stellar(PIXELS)
    expected = {
        "sparse_mean": output.pooler_output,
        "cls": output.last_hidden_state[:, 0],
        "patch_mean": output.last_hidden_state[:, 1:17].mean(1),
        "lowrank_mean": (output.localization @ output.sparse_tokens).mean(1),
        **{f"token_{slot}": output.sparse_tokens[:, slot] for slot in range(4)},
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_without_a_localization_there_are_no_low_rank_features(tiny_config):
    model = StellarForImageClassification(tiny_config(num_labels=3))
    assert "lowrank_mean" not in image_representations(model, PIXELS)


def other_encoder(name, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{"image_size": 32, "patch_size": 8, **overrides})
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "overrides", "num_special"),
    [
        ("vit", SMALL, 1),
        ("deit", SMALL, 2),
        ("dinov2", SMALL, 1),
        ("dinov2_with_registers", {**SMALL, "num_register_tokens": 3}, 4),
        ("dinov3_vit", {**SMALL, "num_register_tokens": 4}, 5),
        ("clip_vision_model", {**SMALL}, 1),
        ("siglip_vision_model", SMALL, 0),
        ("ijepa", SMALL, 0),
        ("swin", {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}, 0),
    ],
)
def test_other_encoders_have_a_cls_where_they_have_one(name, overrides, num_special):
    model = other_encoder(name, **overrides)
    with torch.no_grad():
        found = image_representations(model, PIXELS)
        hidden = model(PIXELS).last_hidden_state
    assert found.keys() == ({"cls", "patch_mean"} if num_special else {"patch_mean"})
    torch.testing.assert_close(found["patch_mean"], hidden[:, num_special:].mean(1))
    if num_special:
        torch.testing.assert_close(found["cls"], hidden[:, 0])


def test_a_feature_map_is_pooled():
    model = other_encoder("convnext", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
    with torch.no_grad():
        torch.testing.assert_close(
            image_representations(model, PIXELS)["patch_mean"], model(PIXELS).last_hidden_state.mean((2, 3))
        )


def test_a_masked_autoencoder_sees_the_whole_image_and_draws_nothing():
    model = other_encoder("vit_mae", **SMALL, mask_ratio=0.75)
    plain = transformers.ViTModel(
        transformers.ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False
    ).eval()
    names = plain.load_state_dict(model.state_dict(), strict=False)
    assert not names.missing_keys and not names.unexpected_keys
    state = torch.get_rng_state()
    with torch.no_grad():
        found, expected = image_representations(model, PIXELS), plain(PIXELS).last_hidden_state
    torch.testing.assert_close(found["cls"], expected[:, 0])
    torch.testing.assert_close(found["patch_mean"], expected[:, 1:].mean(1))
    assert model.config.mask_ratio == 0.75 and torch.equal(torch.get_rng_state(), state)
