# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Results as the Hub reads them: files of `.eval_results`, and the metadata and a table of a model card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ..hub_stellar import edit_model_card, replace_text
from .protocol import Result
from .tables import Metric, build_tables, describe, format_markdown

FOLDER = ".eval_results"
_BEGIN = "<!-- Results of stellar-hf evaluate, which replaces what is between these lines -->"
_END = "<!-- End of the results of stellar-hf evaluate -->"


def write_eval_results(folder: str | os.PathLike, results: Iterable[Result]) -> list[Path]:
    """Writes the numbers of data sets on the Hub to `.eval_results/NAME.yaml`, a file for each data set.

    The Hub shows them on the model's page (https://huggingface.co/docs/hub/eval-results). It knows only data sets of
    its own: numbers of others are left out here, and stand in the model card.

    Args:
        folder: Folder of the model's repository.
        results: Of one model.

    Returns:
        The files that were written.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for result in results:
        dataset_id = result.protocol.get("dataset_id")
        if dataset_id is None:
            continue
        for variant, metric, value in _numbers(result):
            entry = EvalResultEntry(
                dataset_id=dataset_id,
                task_id=_slug(result.task, variant, metric),
                value=value,
                dataset_revision=result.protocol.get("dataset_revision"),
                date=result.date,
                notes=f"{describe(result.protocol)}. stellar_hf {result.versions.get('stellar_hf', '')}".strip(),
            )
            entries.setdefault(dataset_id, []).append(entry)
    paths = []
    for dataset_id, own in entries.items():
        path = Path(folder, FOLDER, f"{_slug(dataset_id.split('/')[-1])}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, yaml.safe_dump(eval_result_entries_to_yaml(own), sort_keys=False, allow_unicode=True))
        paths.append(path)
    return paths


def update_model_card(
    folder: str | os.PathLike, results: Sequence[Result], metrics: Mapping[str, Mapping[str, Metric]]
) -> None:
    """Puts results into a model's folder: into the metadata and a section of README.md, and `.eval_results`.

    Nothing else of the card is touched. In the metadata, a number of the same data set, split and name is replaced;
    the section stands between two comments, and is replaced as a whole.

    Args:
        folder: Folder of the model. A card is begun where there is none.
        results: Of this model.
        metrics: Columns of tables by task.
    """
    tables = format_markdown(build_tables(results, metrics))

    def edit(card: Any) -> None:
        card.data.model_name = card.data.model_name or Path(folder).absolute().name
        kept = list(card.data.eval_results or [])
        for result in results:
            for new in _model_index_entries(result):
                kept = [old for old in kept if not new.is_equal_except_value(old)] + [new]
        card.data.eval_results = kept
        card.text = _with_section(card.text, tables)

    edit_model_card(Path(folder, "README.md"), edit)
    write_eval_results(folder, results)


def _model_index_entries(result: Result) -> list[EvalResult]:
    protocol = result.protocol
    return [
        EvalResult(
            task_type="image-feature-extraction",
            dataset_type=protocol.get("dataset_id") or _slug(str(protocol["data"])),
            dataset_name=str(protocol["data"]),
            dataset_split=protocol.get("test_split"),
            dataset_revision=protocol.get("dataset_revision"),
            metric_type=metric,
            metric_name=f"{result.task}, {variant}: {metric}",
            metric_value=value,
        )
        for variant, metric, value in _numbers(result)
    ]


def _numbers(result: Result) -> list[tuple[str, str, float]]:
    """Variant, metric and value of all numbers of a result that are numbers."""
    return [
        (variant, metric, value)
        for variant, values in result.metrics.items()
        for metric, value in values.items()
        if value == value  # not NaN, which YAML on the Hub refuses
    ]


def _with_section(text: str, tables: str) -> str:
    section = f"{_BEGIN}\n## Evaluation\n\n{tables}\n{_END}"
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        return before + section + rest.partition(_END)[2]
    return f"{text.rstrip()}\n\n{section}\n"


def _slug(*parts: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "_", " ".join(map(str, parts)).lower()).strip("_")
