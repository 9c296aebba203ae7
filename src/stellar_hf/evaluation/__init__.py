# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Evaluation of sparse tokens: kNN and linear probe, concepts, reconstruction, localization, retrieval, generation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classification import concept_accuracy, knn_accuracy, linear_probe_accuracy
    from .evaluate import (
        TokenFeatures,
        evaluate_stellar,
        extract_features,
        format_results_table,
        raw_pixel_baseline,
    )
    from .generation import (
        GENERATION_COLUMNS,
        GenerationEvaluation,
        ImageClassifier,
        frechet_distance,
        nearest_distances,
        train_classifier,
    )
    from .localization import concept_labels, localization_iou
    from .metrics import Accuracy
    from .reconstruction import psnr
    from .retrieval import TokenMatches, build_token_index, import_faiss, nearest_tokens

_MODULE_OF = {
    "Accuracy": "metrics",
    "GENERATION_COLUMNS": "generation",
    "GenerationEvaluation": "generation",
    "ImageClassifier": "generation",
    "TokenFeatures": "evaluate",
    "TokenMatches": "retrieval",
    "build_token_index": "retrieval",
    "concept_accuracy": "classification",
    "concept_labels": "localization",
    "evaluate_stellar": "evaluate",
    "extract_features": "evaluate",
    "format_results_table": "evaluate",
    "frechet_distance": "generation",
    "import_faiss": "retrieval",
    "knn_accuracy": "classification",
    "linear_probe_accuracy": "classification",
    "localization_iou": "localization",
    "nearest_distances": "generation",
    "nearest_tokens": "retrieval",
    "psnr": "reconstruction",
    "raw_pixel_baseline": "evaluate",
    "train_classifier": "generation",
}

__all__ = [
    "GENERATION_COLUMNS",
    "Accuracy",
    "GenerationEvaluation",
    "ImageClassifier",
    "TokenFeatures",
    "TokenMatches",
    "build_token_index",
    "concept_accuracy",
    "concept_labels",
    "evaluate_stellar",
    "extract_features",
    "format_results_table",
    "frechet_distance",
    "import_faiss",
    "knn_accuracy",
    "linear_probe_accuracy",
    "localization_iou",
    "nearest_distances",
    "nearest_tokens",
    "psnr",
    "raw_pixel_baseline",
    "train_classifier",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
