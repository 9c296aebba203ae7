# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The pages about the pipeline: their blocks of Python, as they stand, and what they say that these give."""

import re
from pathlib import Path
from typing import Any

import stellar_hf
from stellar_hf import (
    StellarForImageReconstruction,
    StellarImageProcessorPil,
    StellarTokenPrior,
    StellarTokenPriorPipeline,
)

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: str) -> dict[str, Any]:
    """What the names of a page are when all its blocks have run, from top to bottom."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(block, names)
    return names


def test_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("pipeline.md")
    assert (tmp_path / "stellar-pipeline" / "model_index.json").is_file()
    assert type(names["same"]) is names["StellarPipeline"]
    for group in ("reconstructions", "decoded", "sampled", "large", "refined"):
        assert [image.size for image in names[group]] == [(240, 160)] * 2, group
    assert names["wide"].size == (240, 160)
    assert names["batch"].shape == (2, 3, 160, 240)
    assert names["codes"].shape == (2, 16)
    # Shapes that the page states in comments.
    tokens, localization = names["pipe"].encode(names["images"])
    num_tokens, width = names["pipe"].model.config.num_sparse_tokens, names["pipe"].model.config.hidden_size
    assert (tuple(tokens.shape), tuple(localization.shape)) == ((2, num_tokens, width), (2, 256, num_tokens))
    shapes = tuple(names["tokens"].shape), tuple(names["localization"].shape)
    assert shapes == ((1, num_tokens, width), (1, 216, num_tokens))


def test_editing():
    names = run_blocks("editing.md")
    for edit in ("moved", "larger", "erased", "exchanged", "between", "painted"):
        tokens, maps = names[edit]
        assert tokens.shape == (1, 8, 96) and maps.shape == (1, 256, 8), edit
    assert names["cone"].any() and names["ball"].any() and names["scene_tokens"].shape == (1, 16, 96)


def test_generation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL)
    num_tokens, width = model.config.num_sparse_tokens, model.config.hidden_size
    prior = StellarTokenPrior(
        num_sparse_tokens=num_tokens,
        token_size=width,
        grid_size=(model.config.image_size // model.config.patch_size,) * 2,
        num_classes=3,
        class_names=["2 objects", "3 objects", "4 objects"],
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        localization_channels=8,
    )
    pipe = StellarTokenPriorPipeline(prior, model, image_processor=StellarImageProcessorPil())
    pipe.save_pretrained("stellar-prior/pipeline")
    names = run_blocks("generation.md")
    assert [image.size for image in names["images"]] == [(128, 128)] * 3
    assert names["tokens"].shape == (4, num_tokens, width)
    assert [image.size for image in names["edited"]] == [(model.config.image_size,) * 2] * 4
