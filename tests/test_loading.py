# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Where weights are placed and how they are read: device maps, offload to disk, shards, missing weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellar_hf import (
    StellarBackbone,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarModel,
)

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = [
    StellarModel,
    StellarForPreTraining,
    StellarForImageClassification,
    StellarForSemanticSegmentation,
    StellarForImageReconstruction,
    StellarBackbone,
]
every_class = pytest.mark.parametrize("model_class", CLASSES)


@pytest.fixture
def saved(tiny_config, tmp_path):
    """Saves a seeded tiny model of a class; the model and its folder."""

    def saved(model_class, **settings):
        torch.manual_seed(0)
        model = model_class(tiny_config()).eval()
        model.save_pretrained(tmp_path / "model", **settings)
        return model, tmp_path / "model"

    return saved


def tensors(outputs) -> list[torch.Tensor]:
    """The tensors of an output, also those in tuples."""
    found = []
    for value in outputs.values():
        found += [tensor for tensor in (value if isinstance(value, tuple) else [value]) if torch.is_tensor(tensor)]
    return found


def assert_same_outputs(model, expected_model) -> None:
    settings = {"return_loss": False} if isinstance(model, StellarForPreTraining) else {}
    with torch.no_grad():
        outputs, expected = tensors(model(PIXELS, **settings)), tensors(expected_model(PIXELS, **settings))
    assert expected and all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


# Placement -----------------------------------------------------------------------------------------------------------


@every_class
def test_what_does_not_fit_into_memory_waits_on_disk(saved, tmp_path, model_class):
    model, folder = saved(model_class)
    memory = {"cpu": int(0.8 * model.get_memory_footprint())}
    loaded = model_class.from_pretrained(
        folder, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert any(weight.is_meta for weight in loaded.parameters())
    assert_same_outputs(loaded, model)


@every_class
def test_everything_can_wait_on_disk(saved, tmp_path, model_class):
    model, folder = saved(model_class)
    loaded = model_class.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert all(weight.is_meta for weight in loaded.parameters())
    assert_same_outputs(loaded, model)


def test_a_loss_with_offloaded_weights_is_refused(saved, tmp_path):
    _, folder = saved(StellarForPreTraining)
    loaded = StellarForPreTraining.from_pretrained(
        folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="pass return_loss=False, or load the model without offload"):
        loaded(PIXELS)


# Data types ----------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_full_precision(saved, model_class, dtype):
    model, folder = saved(model_class)
    loaded = model_class.from_pretrained(folder, dtype=dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    with torch.no_grad():
        outputs, expected = tensors(loaded(PIXELS)), tensors(model(PIXELS))
    for output, full in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.float(), full.float(), rtol=0.05, atol=0.05 * full.abs().max().item())


@pytest.mark.parametrize("settings", [{}, {"dtype": "auto"}], ids=["default", "auto"])
def test_the_data_type_is_the_checkpoints(saved, settings):
    model, folder = saved(StellarModel)
    model.to(torch.bfloat16).save_pretrained(folder)
    loaded = StellarModel.from_pretrained(folder, **settings)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


# Files ---------------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}, {"device_map": "auto"}], ids=str)
def test_shards_are_put_together(saved, model_class, settings):
    model, folder = saved(model_class, max_shard_size="20KB")
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 2 and shards.keys() == model.state_dict().keys()
    assert {file.name for file in folder.glob("*.safetensors")} == set(shards.values())
    loaded = model_class.from_pretrained(folder, **settings)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


# The Fourier matrix is random, and part of the checkpoint ------------------------------------------------------------


@pytest.mark.parametrize("model_class", [StellarForPreTraining, StellarForImageReconstruction])
def test_the_fourier_matrix_is_the_checkpoints_or_a_normal_one(tiny_config, tmp_path, model_class):
    model = model_class(tiny_config(decoder_hidden_size=512))
    model.save_pretrained(tmp_path)
    name = "decoder.positions.gaussian_matrix"
    loaded = model_class.from_pretrained(tmp_path, device_map="cpu").get_buffer(name)
    assert torch.equal(loaded, model.get_buffer(name))

    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    fresh, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    values = fresh.get_buffer(name)
    assert not torch.equal(values, loaded)
    assert abs(values.mean()) < 0.2 and 0.8 < values.std() < 1.2 and 2 < values.abs().max() < 6
    assert all(torch.equal(weight, weights[key]) for key, weight in fresh.state_dict().items() if key != name)
