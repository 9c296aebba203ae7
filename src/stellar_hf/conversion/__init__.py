# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Conversion of released STELLAR checkpoints to `save_pretrained` folders."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert_stellar_to_hf import convert_checkpoint, convert_state_dict, infer_config

__all__ = ["convert_checkpoint", "convert_state_dict", "infer_config"]


# Not imported up here: `python -m` would then run a module that is imported already.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".convert_stellar_to_hf", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
