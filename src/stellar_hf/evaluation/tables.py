# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Results as Markdown tables: a table for each task, baselines beside models, and the protocol below the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .protocol import Result

BELOW_BASELINE = "↓"
_NOTE = f"{BELOW_BASELINE}: not above the best baseline that was never trained."

# Variants of a model's result that use nothing of what it learned.
UNIFORM, CHANCE = "uniform L", "chance"
CONTROLS = (UNIFORM, CHANCE)

# Orders rows: models first, what they are compared with below.
_KINDS = ("model", "untrained", "baseline")


@dataclass(frozen=True)
class Metric:
    """How a table shows a number.

    Attributes:
        title: Head of the column, with the unit.
        factor: From the number to the unit.
        decimals: Digits after the point.
        higher_is_better: Direction; None where neither is, as for a number of bits.
        beside: Columns of the same row that hold what was never trained and has to be surpassed.
    """

    title: str
    factor: float = 1.0
    decimals: int = 3
    higher_is_better: bool | None = True
    beside: tuple[str, ...] = ()

    def text(self, value: float, spread: float | None = None) -> str:
        if math.isnan(value):
            return "–"
        number = f"{value * self.factor:.{self.decimals}f}"
        return number if spread is None else f"{number} ± {spread * self.factor:.{self.decimals}f}"


@dataclass(frozen=True)
class Row:
    """A row of a table: the numbers of one model and one thing that was measured of it.

    Attributes:
        model: Its name.
        kind: As in [`Result`].
        variant: What of the model was measured.
        values: Means over the seeds, by metric.
        spreads: Standard deviations over the seeds, by metric; empty where there is one seed.
        below: Metrics in which a model is not above the best baseline that was never trained.
    """

    model: str
    kind: str
    variant: str
    values: Mapping[str, float]
    spreads: Mapping[str, float]
    below: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Table:
    """The results of one task on one data set.

    Attributes:
        task: Name of the task.
        data: Name of the data.
        columns: Metrics by their keys, in the order of the columns.
        rows: Models first, then untrained networks, then baselines.
        protocol: What all results have in common.
        seeds: Seeds over which the rows are means.
    """

    task: str
    data: str
    columns: Mapping[str, Metric]
    rows: Sequence[Row]
    protocol: Mapping[str, Any]
    seeds: tuple[int, ...]


def build_tables(results: Iterable[Result], metrics: Mapping[str, Mapping[str, Metric]]) -> list[Table]:
    """Puts results side by side that were measured alike; those that differ in their seeds alone become one row.

    Args:
        results: Of any models and tasks.
        metrics: Columns by task; of a task that is not among them, all numbers are shown.

    Returns:
        A table for each task and data set, in the order of the results.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, _key(_shared_protocol(result))), []).append(result)
    return [_build_table(group, metrics.get(group[0].task, {})) for group in groups.values()]


def format_markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown, each with its protocol.

    Args:
        tables: As from [`build_tables`].

    Returns:
        Text without a final line break.
    """
    return "\n\n".join(_format_table(table) for table in tables)


def _build_table(results: Sequence[Result], metrics: Mapping[str, Metric]) -> Table:
    grouped: dict[tuple[str, str, str], list[Mapping[str, float]]] = {}
    for result in results:
        for variant, values in result.metrics.items():
            kind = "baseline" if variant in CONTROLS else result.kind
            grouped.setdefault((result.model, kind, variant), []).append(values)
    grouped = dict(sorted(grouped.items(), key=lambda item: _KINDS.index(item[0][1])))
    known = dict.fromkeys(name for values in grouped.values() for one in values for name in one)
    columns = {name: metrics[name] for name in metrics if name in known}
    columns = columns or {name: Metric(name.replace("_", " ")) for name in known}
    rows = [_mean_row(*key, values) for key, values in grouped.items()]
    best = {name: _best_baseline(rows, name, column) for name, column in columns.items()}
    first = results[0]
    return Table(
        task=first.task,
        data=str(first.protocol.get("data", "")),
        columns=columns,
        rows=[_marked(row, columns, best) for row in rows],
        protocol=_shared_protocol(first),
        seeds=tuple(sorted({int(result.protocol.get("seed", 0)) for result in results})),
    )


def _mean_row(model: str, kind: str, variant: str, values: Sequence[Mapping[str, float]]) -> Row:
    names = dict.fromkeys(name for one in values for name in one)
    columns = {name: [one[name] for one in values if name in one] for name in names}
    return Row(
        model=model,
        kind=kind,
        variant=variant,
        values={name: statistics.fmean(column) for name, column in columns.items()},
        # The PSNR of an exact copy is infinite, and has no deviation.
        spreads={
            name: statistics.stdev(column)
            for name, column in columns.items()
            if len(column) > 1 and all(map(math.isfinite, column))
        },
    )


def _best_baseline(rows: Sequence[Row], name: str, column: Metric) -> float | None:
    values = [row.values[name] for row in rows if row.kind == "baseline" and name in row.values]
    values = [value for value in values if not math.isnan(value)]
    if not values or column.higher_is_better is None:
        return None
    return max(values) if column.higher_is_better else min(values)


def _marked(row: Row, columns: Mapping[str, Metric], best: Mapping[str, float | None]) -> Row:
    if row.kind != "model":
        return row

    def is_below(name: str, value: float) -> bool:
        bars = [row.values[other] for other in columns[name].beside if other in row.values] if name in columns else []
        bar = max(bars) if bars else best.get(name)
        if bar is None:
            return False
        return value <= bar if columns[name].higher_is_better else value >= bar

    below = frozenset(name for name, value in row.values.items() if is_below(name, value))
    return Row(row.model, row.kind, row.variant, row.values, row.spreads, below)


def format_models(results: Iterable[Result]) -> str:
    """A list of the models that were measured: the hash of their weights, and how their images were prepared."""
    lines = {}
    for result in results:
        if result.kind == "model":
            model, images = result.protocol["model"], result.protocol["images"]
            lines[result.model] = (
                f"- **{result.model}**: {model['class']}, weights {model['weights']}, {model['dtype']}; images: "
                f"{describe({name: images[name] for name in ('resize', 'crop', 'resampling')})}"
            )
    return "\n".join(lines.values())


def bar_panels(tables: Sequence[Table]) -> list[tuple[str, list[tuple[str, str, float, float]]]]:
    """What a figure shows: of each table its first metric.

    Returns:
        For each table its title, and for each row a name, the kind as in [`Result`], the value in the unit of the
        table, and its standard deviation, 0 where it is not known.
    """
    panels = []
    for table in tables:
        name, column = next(iter(table.columns.items()))
        rows = [row for row in table.rows if name in row.values and not math.isnan(row.values[name])]
        bars = [
            (
                f"{row.model}, {row.variant}" if row.variant else row.model,
                row.kind,
                row.values[name] * column.factor,
                row.spreads.get(name, 0.0) * column.factor,
            )
            for row in rows
        ]
        panels.append((f"{table.task}: {column.title}", bars))
    return panels


def _format_table(table: Table) -> str:
    title = f"### {table.task}" + (f", {table.data}" if table.data else "")
    head = ["", "", *(column.title for column in table.columns.values())]
    lines = [title, "", _line(head), _line(["---", "---", *["---:"] * len(table.columns)])]
    previous = None
    for row in table.rows:
        name = _styled_name(row) if row.model != previous else ""
        lines.append(_line([name, row.variant, *(_cell(row, *column) for column in table.columns.items())]))
        previous = row.model
    if any(row.below for row in table.rows):
        lines += ["", _NOTE]
    return "\n".join([*lines, "", f"*{describe_protocol(table)}*"])


def _styled_name(row: Row) -> str:
    return f"**{row.model}**" if row.kind == "model" else row.model


def _cell(row: Row, name: str, column: Metric) -> str:
    if name not in row.values:
        return "–"
    text = column.text(row.values[name], row.spreads.get(name))
    return f"{text} {BELOW_BASELINE}" if name in row.below else text


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def describe_protocol(table: Table) -> str:
    """One sentence for the text below a table: images, settings, seeds."""
    spread = ": mean and standard deviation" if len(table.seeds) > 1 else ""
    seeds = f"{'seeds' if len(table.seeds) > 1 else 'seed'} {', '.join(map(str, table.seeds))}{spread}"
    shared = {name: value for name, value in table.protocol.items() if name != "data"}  # which the title tells
    return f"{describe(shared)}; {seeds}."


def describe(protocol: Mapping[str, Any]) -> str:
    """A protocol in words: names and values, one after the other."""
    return "; ".join(
        f"{name.replace('_', ' ')} {_short(value)}" for name, value in protocol.items() if value is not None
    )


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_short(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shared_protocol(result: Result) -> dict[str, Any]:
    """What results have in common that stand in one table: nothing of the model or its preparation, no seed."""
    own = ("model", "images", "seed", "train_fingerprint", "test_fingerprint", "dataset_id", "dataset_revision")
    return {name: value for name, value in result.protocol.items() if name not in own}


def _key(protocol: Mapping[str, Any]) -> str:
    return repr(sorted(protocol.items()))
