# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Conversion of released checkpoints, STELLAR's and its tokenizer's, to `save_pretrained` folders."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert_maskgit_vq import convert_vq_checkpoint, convert_vq_state_dict
    from .convert_stellar_to_hf import convert_checkpoint, convert_state_dict, infer_config

_MODULES = {
    "convert_checkpoint": "convert_stellar_to_hf",
    "convert_state_dict": "convert_stellar_to_hf",
    "convert_vq_checkpoint": "convert_maskgit_vq",
    "convert_vq_state_dict": "convert_maskgit_vq",
    "infer_config": "convert_stellar_to_hf",
}

__all__ = [
    "convert_checkpoint",
    "convert_state_dict",
    "convert_vq_checkpoint",
    "convert_vq_state_dict",
    "infer_config",
]


# Not imported up here: `python -m` would then run a module that is imported already.
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
