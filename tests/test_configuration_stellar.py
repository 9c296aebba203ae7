# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The configuration refuses impossible values by name, and survives being written and read."""

import math
import re

import pytest
from transformers import AutoConfig

from stellar_hf import StellarConfig

AT_LEAST_ONE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
    *("num_channels", "num_sparse_tokens", "decoder_hidden_size", "decoder_num_hidden_layers"),
    *("decoder_num_attention_heads", "decoder_intermediate_size", "codebook_size", "num_prototypes"),
    *("prototype_dim", "projection_hidden_size", "num_projection_layers", "sinkhorn_iterations"),
    *("matching_iterations", "localization_iterations"),
)
POSITIVE = (
    *("initializer_range", "layer_norm_eps", "localization_temperature", "target_temperature"),
    *("prediction_temperature", "matching_epsilon"),
)
NOT_NEGATIVE = (
    *("localization_noise", "reconstruction_weight", "koleo_weight", "clustering_weight", "masked_weight"),
    *("local_weight", "localization_compactness"),
)
BELOW_ONE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "mask_ratio")

IMPOSSIBLE = [
    *((name, value) for name in AT_LEAST_ONE for value in (0, -1, 10**7, 10**9)),
    *((name, value) for name in POSITIVE for value in (0, -0.1, math.inf, math.nan)),
    *((name, value) for name in NOT_NEGATIVE for value in (-0.1, math.inf, math.nan)),
    *((name, value) for name in BELOW_ONE for value in (-0.1, 1.0)),
    *(("sinkhorn_scale", value) for value in (0, 1.5)),
    *(("num_attention_heads", 7), ("decoder_num_attention_heads", 7), ("patch_size", 300)),
    *(("reconstruction_target", "latents"), ("mask_focus", "circle"), ("hidden_act", "gleu")),
    *(("image_mean", [0.5]), ("image_std", [0.5, 0.5]), ("image_std", [0.5, 0.0, 0.5])),
    *((name, [0.5, value, 0.5]) for name in ("image_mean", "image_std") for value in (math.nan, math.inf)),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_values_are_named(name, value):
    with pytest.raises(ValueError, match=re.escape(f"StellarConfig.{name} is {value!r}, but must be ")):
        StellarConfig(**{name: value})


def test_grids_that_would_fill_the_memory_are_refused():
    with pytest.raises(ValueError, match=r"image_size is 32768, but must be at most 1024 patches of 16 pixels"):
        StellarConfig(image_size=2**15)
    assert StellarConfig(image_size=2**14).image_size == 2**14


def test_odd_decoder_width_is_refused():
    with pytest.raises(ValueError, match=r"decoder_hidden_size is 27, but must be even"):
        StellarConfig(decoder_hidden_size=27, decoder_num_attention_heads=3)


@pytest.mark.parametrize("fields", [{"hidden_size": "768"}, {"use_teacher": 1}, {"image_mean": ["a", "b", "c"]}])
def test_values_of_a_wrong_type_are_refused(fields):
    (name,) = fields
    with pytest.raises(Exception, match=name):
        StellarConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"localization_temperature": None, "mask_focus": None, "mask_ratio": 0},
        {"image_mean": (0, 0, 0), "image_std": [1, 1, 1]},
        {"num_channels": 1, "image_mean": [0.5], "image_std": [0.25]},
        {"hidden_act": "relu", "patch_size": 224, "num_sparse_tokens": 1, "sinkhorn_scale": 0.5},
    ],
)
def test_unusual_but_possible_values_are_taken_and_survive(tmp_path, fields):
    config = StellarConfig(**fields)
    config.save_pretrained(tmp_path)
    for read in (StellarConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(read) is StellarConfig
        assert all(getattr(read, name) == getattr(config, name) for name in fields)


def test_json_and_subfolder_round_trips(tmp_path):
    config = StellarConfig(num_sparse_tokens=8, use_teacher=True, reconstruction_weight=2)
    config.to_json_file(tmp_path / "one.json")
    config.save_pretrained(tmp_path / "model" / "encoder")
    assert StellarConfig.from_json_file(tmp_path / "one.json").to_dict() == config.to_dict()
    read = StellarConfig.from_pretrained(tmp_path / "model", subfolder="encoder")
    assert read.to_diff_dict() == config.to_diff_dict()


def test_configurations_do_not_share_lists():
    first, second = StellarConfig(), StellarConfig()
    first.image_mean[0] = 0.0
    assert second.image_mean[0] == 0.485
