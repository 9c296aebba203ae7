# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Token-to-image with Diffusers; names are imported on first use, so that this package needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .maskgit_vq_model import MaskGitVQEncoderOutput, MaskGitVQModel
    from .pipeline_stellar import StellarPipeline
    from .token_prior import StellarTokenPrior, StellarTokenPriorOutput

__all__ = [
    "MaskGitVQEncoderOutput",
    "MaskGitVQModel",
    "StellarPipeline",
    "StellarTokenPrior",
    "StellarTokenPriorOutput",
]

_MODULES = {
    "MaskGitVQEncoderOutput": "maskgit_vq_model",
    "MaskGitVQModel": "maskgit_vq_model",
    "StellarPipeline": "pipeline_stellar",
    "StellarTokenPrior": "token_prior",
    "StellarTokenPriorOutput": "token_prior",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
