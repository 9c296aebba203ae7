# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Reference models, rebuilt from the names and shapes of their weights, and a tiny model of our own."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def golden_weight(name: str, shape: list[int]) -> torch.Tensor:
    """The weight that a reference model has under its released name."""
    weight = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * 0.05
    prototypes = tuple(
        f"{head}.layer.weight" for head in ("clustering_head", "cls_cluster_head", "teacher_head", "teacher_cls_head")
    )
    if len(shape) == 1 and name.endswith("weight"):
        weight = 1 + weight
    if name == "position_embedding.positional_encoding_gaussian_matrix":
        weight = weight * 20
    if name.endswith(("sparse_tokens", "position_embeddings", "cls_token")):
        weight = weight * 10
    if name.endswith(prototypes):
        weight = weight * 20
    return torch.from_numpy(weight.astype(np.float32))


def golden_vq_weight(key: str, shape: list[int]) -> torch.Tensor:
    """The weight that the reference tokenizer has under its released name."""
    weight = np.random.default_rng(zlib.crc32(f"vq.{key}".encode())).standard_normal(shape) * 0.05
    if len(shape) == 1 and key.endswith("weight"):
        weight = 1 + weight
    if key == "quantize.embedding.weight":
        weight = weight * 20
    if len(shape) == 4:
        weight = weight * 20 / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(weight.astype(np.float32))


@pytest.fixture(scope="session")
def golden_tensors() -> Callable[[str], dict[str, torch.Tensor]]:
    """Reads a file of reference tensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_weights() -> Callable[[str], dict[str, torch.Tensor]]:
    """Builds the state dict of a reference model in the released layout."""
    return lambda case: {name: golden_weight(name, shape) for name, shape in CASES[case]["state_dict"].items()}


@pytest.fixture(scope="session")
def golden_vq_weights() -> dict[str, torch.Tensor]:
    """The state dict of the reference tokenizer in the released layout."""
    return {key: golden_vq_weight(key, shape) for key, shape in CASES["vq"]["state_dict"].items()}


@pytest.fixture(scope="session")
def golden_overrides() -> Callable[[str], dict[str, Any]]:
    """Configuration fields of a reference model that the shapes of its weights do not tell."""
    return lambda case: {
        "num_attention_heads": CASES[case]["config"]["heads"],
        "localization_temperature": CASES[case]["config"]["temp"],
        "mask_ratio": 0.75,
    }


@pytest.fixture(scope="session")
def auto_image_processor() -> type:
    """`AutoImageProcessor`; a test that needs it is skipped where there is none."""
    from transformers import AutoImageProcessor

    try:
        AutoImageProcessor.from_pretrained  # noqa: B018
    except ImportError:
        pytest.skip("This version of Transformers has no AutoImageProcessor without torchvision.")
    return AutoImageProcessor


@pytest.fixture(scope="session")
def load_processor() -> Callable[..., Any]:
    """Loads an image processor as a user does who has this package: by the Auto class, where there is one."""
    from transformers import AutoImageProcessor

    from stellar_hf import StellarImageProcessorPil

    try:
        return AutoImageProcessor.from_pretrained
    except ImportError:
        return StellarImageProcessorPil.from_pretrained


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Builds the configuration of a model of two small layers: 4x4 patches, 4 tokens, pixels."""
    from stellar_hf import StellarConfig

    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        "num_sparse_tokens": 4,
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "reconstruction_target": "pixels",
        "codebook_size": 16,
        "num_prototypes": 12,
        "prototype_dim": 8,
        "projection_hidden_size": 20,
        "mask_ratio": 0.6,
    }
    return lambda **overrides: StellarConfig(**{**fields, **overrides})


@pytest.fixture
def at_event():
    """Builds a callback that calls functions at events: `at_event(on_step_end=lambda model, **kwargs: ...)`."""

    class AtEvent(TrainerCallback):
        def __init__(self, **functions):
            for event, function in functions.items():
                setattr(self, event, lambda args, state, control, function=function, **kwargs: function(**kwargs))

    return AtEvent
