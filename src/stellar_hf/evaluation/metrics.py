# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Metrics for `evaluate` that need no download, unlike `evaluate.load("accuracy")`."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their references.

    `compute(predictions=..., references=...)` takes integers of equal length and returns `{"accuracy": float}` in
    [0, 1]; `add_batch` collects them over batches, as in every metric of `evaluate`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their references.",
            citation="",
            inputs_description="Integers: predicted classes and true classes.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}
