# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""8-bit weights by bitsandbytes, on a CPU: nearly the same outputs in a third of the memory."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BitsAndBytesConfig

import stellar_hf
from stellar_hf import (
    StellarBackbone,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarImageProcessorPil,
    StellarModel,
)
from stellar_hf.data import load_tabletop_scenes

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(scope="module")
def pixel_values():
    """Scenes that the demo model has not seen."""
    scenes = load_tabletop_scenes("test", 16, seed=1)["image"][:]
    return StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL)(scenes, return_tensors="pt").pixel_values


def load(model_class, folder=stellar_hf.DEMO_MODEL, **settings):
    torch.manual_seed(0)  # of new heads
    return model_class.from_pretrained(folder, **settings)


def similarity(output, expected) -> torch.Tensor:
    """Cosine similarity of vectors in the last dimension."""
    return F.cosine_similarity(output.float(), expected.float(), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_features_stay_and_memory_shrinks(pixel_values, dtype):
    """Of all that the encoder gives; in single and half precision."""
    plain, quantized = load(StellarModel), load(StellarModel, dtype=dtype, quantization_config=INT8)
    assert quantized.get_memory_footprint() < 0.37 * plain.get_memory_footprint()
    expected, output = plain(pixel_values), quantized(pixel_values)
    assert output.sparse_tokens.dtype == dtype
    assert similarity(output.pooler_output, expected.pooler_output).min() > 0.9998
    assert similarity(output.sparse_tokens, expected.sparse_tokens).min() > 0.9997
    assert similarity(output.last_hidden_state, expected.last_hidden_state).mean() > 0.9998
    assert similarity(output.localization, expected.localization).mean() > 0.999
    torch.testing.assert_close(output.localization.sum(dim=-1).float(), torch.ones(16, 256), rtol=0, atol=5e-3)


@torch.no_grad()
def test_quantized_weights_are_saved_and_loaded(pixel_values, tmp_path):
    model = load(StellarModel, quantization_config=INT8)
    model.save_pretrained(tmp_path)
    loaded = StellarModel.from_pretrained(tmp_path)
    weight = loaded.layers[0].attention.q_proj.weight
    assert weight.dtype == torch.int8 and torch.equal(weight, model.layers[0].attention.q_proj.weight)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.37 * load(StellarModel).get_memory_footprint()
    assert torch.equal(loaded(pixel_values[:4]).sparse_tokens, model(pixel_values[:4]).sparse_tokens)


@pytest.mark.parametrize(
    ("model_class", "output"),
    [
        (StellarForPreTraining, "reconstruction"),
        (StellarForImageClassification, "logits"),
        (StellarForSemanticSegmentation, "logits"),
        (StellarForImageReconstruction, "reconstruction"),
        (StellarBackbone, "feature_maps"),
    ],
)
@torch.no_grad()
def test_linear_layers_alone_are_quantized_in_every_head(pixel_values, model_class, output):
    """Prototypes, tokens, positions, the Fourier matrix and convolutions stay; so does a new classifier."""
    fields = {"num_labels": 3} if output == "logits" else {}
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    plain = load(model_class, **fields)
    quantized = load(model_class, quantization_config=config, **fields)
    linear = {
        f"{name}.weight"
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "classifier"
    }
    weights = dict(quantized.state_dict())
    assert {name for name, weight in weights.items() if weight.dtype == torch.int8} == linear
    assert all(torch.equal(weights[name], w) for name, w in plain.state_dict().items() if name not in linear)

    expected, found = plain(pixel_values[:4])[output], quantized(pixel_values[:4])[output]
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    assert similarity(found.flatten(), expected.flatten()) > 0.9997


def test_adapters_train_on_quantized_weights(pixel_values):
    peft = pytest.importorskip("peft")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    model = load(StellarForImageClassification, quantization_config=config, num_labels=2)
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "modules_to_save": ["classifier"]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(pixel_values[:4], labels=torch.arange(4) % 2).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert model.get_base_model().stellar.layers[0].attention.q_proj.base_layer.weight.dtype == torch.int8
