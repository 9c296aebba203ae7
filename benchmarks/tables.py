# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Tables of results, printed and as CSV, and the machine that they are of."""

import csv
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from .harness import Options, Row


def describe_machine(options: Options) -> dict[str, str]:
    """Processor or accelerator, threads and versions, which stand in every row of a CSV."""
    if options.on_cpu:
        cpu_info = Path("/proc/cpuinfo")
        lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    else:
        name = torch.cuda.get_device_name(options.device)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "device": name,
        "num_threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
    }


def markdown_table(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    cells = [[_rounded(row.get(column)) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(file: Path, rows: Sequence[Row], machine: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*_columns(rows), *machine])
        writer.writeheader()
        for row in rows:
            writer.writerow({**{name: _rounded(value) for name, value in row.items()}, **machine})


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _rounded(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
