# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What all benchmarks share: timing in turns, the rate of matrix products, fresh processes."""

import gc
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Row = dict[str, Any]

# Freed tensors go back to the system at once, so that resident memory is memory in use; this costs time.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}


@dataclass(frozen=True)
class Options:
    """
    Where to measure, whether only to see that a benchmark runs, and the `src` folder of another checkout to compare
    with, where a benchmark does that.
    """

    device: str = "cpu"
    quick: bool = False
    baseline: Path | None = None

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"


# Time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, turn by turn."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Range of the middle half, over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    def ratio_to(self, other: "Timing") -> float:
        """Median over the turns of this variant's seconds over the other's in the same turn."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.seconds, other.seconds, strict=True))


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def time_in_turns(
    variants: dict[str, Callable[[], object]], device: str = "cpu", turns: int = 7, calls: int = 1, warm_up: int = 1
) -> dict[str, Timing]:
    """
    Seconds of a call of each variant. All are measured once a turn, in an order that shifts from turn to turn, so
    that a machine whose speed drifts hits all of them alike.

    Args:
        variants: Functions without arguments.
        device: Awaited before and after each measurement.
        turns: Measurements of each variant.
        calls: Calls of a measurement, of which the mean is taken; more than one for what takes microseconds.
        warm_up: Calls of each variant that are not measured.
    """
    for run in variants.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                variants[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(values) for name, values in seconds.items()}


def matrix_products(
    device: str, dtype: torch.dtype = torch.float32, hidden_size: int = 768, rows: int = 2048
) -> dict[str, tuple[Callable[[], object], int]]:
    """
    The encoder's linear layers on many rows, to be measured in turns with what consists of them: the products and
    their floating-point operations, by name.
    """
    products: dict[str, tuple[Callable[[], object], int]] = {}
    wide = 4 * hidden_size
    for inputs, outputs in ((hidden_size, hidden_size), (hidden_size, wide), (wide, hidden_size)):
        features = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        bias = torch.randn(outputs, device=device, dtype=dtype)
        product = torch.no_grad()(lambda values=(features, weight, bias): F.linear(*values))
        products[f"product {inputs} {outputs}"] = product, 2 * rows * inputs * outputs
    return products


def product_rates(timings: dict[str, Timing], products: dict[str, tuple[Callable[[], object], int]]) -> list[float]:
    """Floating-point operations a second of the fastest product in each turn."""
    turns = zip(*(timings[name].seconds for name in products), strict=True)
    operations = [count for _, count in products.values()]
    return [max(count / seconds for count, seconds in zip(operations, turn, strict=True)) for turn in turns]


# Processes -----------------------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable, *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Calls an importable function in a new process of Python with as many threads, and returns what it returns."""
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
            return pool.apply(function, arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process, at present or at its peak since [`reset_peak_resident`] (Linux)."""
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def reset_peak_resident() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def is_installed(package: str) -> bool:
    """Whether a package is there; if it is not, whoever waits is told that what needs it is left out."""
    if importlib.util.find_spec(package) is not None:
        return True
    progress(f"{package} is not installed: what needs it is left out")
    return False


def progress(message: str) -> None:
    """What is being measured, for whoever waits; not a part of the table."""
    print(f"... {message}", file=sys.stderr, flush=True)
