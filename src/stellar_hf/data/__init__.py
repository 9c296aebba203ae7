# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Embedded data set and view generation; names are imported on first use, so that this package needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .images import StellarCollator, images_to_tensor
    from .loading import load_images
    from .photo_mosaics import PHOTOGRAPH_NAMES, load_photo_mosaics
    from .tokens import ExtractedTokens
    from .unreadable import UnreadableImages
    from .views import StellarViews

__all__ = [
    "ExtractedTokens",
    "PHOTOGRAPH_NAMES",
    "StellarCollator",
    "StellarViews",
    "UnreadableImages",
    "images_to_tensor",
    "load_images",
    "load_photo_mosaics",
]

_MODULES = {
    "ExtractedTokens": "tokens",
    "PHOTOGRAPH_NAMES": "photo_mosaics",
    "StellarCollator": "images",
    "StellarViews": "views",
    "UnreadableImages": "unreadable",
    "images_to_tensor": "images",
    "load_images": "loading",
    "load_photo_mosaics": "photo_mosaics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
