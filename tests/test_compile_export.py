# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Attention backends, torch.compile and torch.export give what eager mode gives."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from stellar_hf import (
    StellarBackbone,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarModel,
)

HEADS = [
    StellarModel,
    StellarForImageClassification,
    StellarForSemanticSegmentation,
    StellarForImageReconstruction,
    StellarBackbone,
]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def build(tiny_config):
    """Builds a seeded model of a class, of a single layer, in evaluation mode."""

    def build(model_class, **fields):
        torch.manual_seed(0)
        return model_class(tiny_config(num_labels=5, num_hidden_layers=1, **fields)).eval()

    return build


def tensors(output) -> list[torch.Tensor]:
    values = [value for value in output.values() if not isinstance(value, int)]
    flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [value for value in flat if isinstance(value, torch.Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_attention_backends_are_equal(build, backend):
    model = build(StellarModel)
    model.set_attn_implementation("eager")
    expected = model(PIXELS)
    model.set_attn_implementation(backend)
    torch.testing.assert_close(tensors(model(PIXELS)), tensors(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None, reason="needs FlashAttention"
)
@torch.no_grad()
def test_flash_attention_is_equal(build):
    model = build(StellarModel).to("cuda", torch.bfloat16)
    expected = model(PIXELS.cuda())
    model.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(tensors(model(PIXELS.cuda())), tensors(expected), rtol=5e-2, atol=5e-2)


@torch.no_grad()
@pytest.mark.parametrize("model_class", [*HEADS, StellarForPreTraining])
def test_the_whole_forward_is_one_graph(build, model_class):
    """With the backend that runs the captured graph as it is: breaks raise, numbers are equal."""
    model = build(model_class)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(tensors(compiled(PIXELS)), tensors(model(PIXELS)))


@pytest.mark.slow
def test_compiled_kernels_and_their_gradients_are_equal(build):
    model = build(StellarForImageClassification)
    labels = torch.tensor([1, 3])
    expected = model(PIXELS, labels=labels)
    gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
    output = torch.compile(model, fullgraph=True)(PIXELS, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, list(model.parameters())), gradients, rtol=1e-3, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("model_class", [*HEADS, StellarForPreTraining])
def test_one_exported_program_takes_any_batch_height_and_width(build, model_class):
    """Of pre-training that is all but the objective, whose chunks are bound to a size of the batch."""
    model = build(model_class)
    fixed = {"return_loss": False} if model_class is StellarForPreTraining else {}
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model,
        (),
        {"pixel_values": torch.randn(3, 3, 48, 40), **fixed},
        dynamic_shapes={"pixel_values": {0: auto, 2: auto, 3: auto}, **dict.fromkeys(fixed)},
    ).module()
    for shape in ((3, 3, 48, 40), (5, 3, 64, 56), (2, 3, 32, 32)):
        pixel_values = torch.randn(shape)
        expected = tensors(model(pixel_values, **fixed))
        results = tensors(program(pixel_values=pixel_values, **fixed))
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_exporters_of_transformers_take_pretraining(build):
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    model = build(StellarForPreTraining)
    inputs = {"pixel_values": torch.randn(3, 3, 48, 40), "return_loss": False}
    exported = exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig(dynamic=True))
    if isinstance(exported, torch.export.ExportedProgram):  # as Transformers 5.17 gives it
        exported = exported.module()
    expected, result = model(PIXELS, return_loss=False), exported(pixel_values=PIXELS)
    for name in ("reconstruction", "sparse_tokens", "localization"):
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model_class"),
    [
        ("feature-extraction", StellarModel),
        ("image-classification", StellarForImageClassification),
        ("image-segmentation", StellarForSemanticSegmentation),
        ("image-reconstruction", StellarForImageReconstruction),
        ("backbone", StellarBackbone),
        ("decoder", StellarForImageReconstruction),
    ],
)
def test_exported_onnx_files_equal_the_model(build, tmp_path, monkeypatch, capsys, task, model_class):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fields = {
        "backbone": {"out_indices": [0, 1]},
        "feature-extraction": {"localization_compactness": 3.0, "localization_iterations": 2, "refine_tokens": True},
    }.get(task, {})
    build(model_class, **fields).save_pretrained(tmp_path / "model")
    script = Path(__file__).parents[1] / "examples" / "export_onnx.py"
    arguments = [script, tmp_path / "model", "--task", task, "--output", tmp_path / "model.onnx"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    runpy.run_path(str(script), run_name="__main__")
    assert "ONNX Runtime agrees" in capsys.readouterr().out and (tmp_path / "model.onnx").stat().st_size > 10_000
