# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Seconds until one can start: imports, from_pretrained of the base size beside ViTModel's, the help of stellar-hf.

Each is measured in fresh processes after Python has started, `from_pretrained` after the import of its class; the help
is a whole process. Weights are random and in the system's cache.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import ViTConfig, ViTModel
from transformers.utils import logging

from stellar_hf import StellarConfig, StellarModel

from .harness import Options, Row, Timing, progress

REFERENCES = {
    "from stellar_hf import StellarModel": "from transformers import ViTModel",
    "StellarModel.from_pretrained": "ViTModel.from_pretrained",
}
HELP = "stellar-hf --help"
ALLOWED_SECONDS_OF_HELP = 0.3
CONFIGS = {"StellarModel": StellarConfig, "ViTModel": ViTConfig}
SMALL = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}


def run(options: Options) -> list[Row]:
    logging.disable_progress_bar()  # of saving
    with tempfile.TemporaryDirectory() as folder:
        for model_class in (StellarModel, ViTModel):
            config = CONFIGS[model_class.__name__](**(SMALL if options.quick else {}))
            model_class(config).save_pretrained(Path(folder, model_class.__name__))
        starts = [
            lambda: seconds_of({"import stellar_hf": "import stellar_hf"}),
            lambda: seconds_of(imported_and_loaded("transformers", "ViTModel", folder, options.device)),
            lambda: seconds_of(imported_and_loaded("stellar_hf", "StellarModel", folder, options.device)),
            lambda: {HELP: seconds_of_help()},
        ]
        seconds: dict[str, list[float]] = {}
        for turn in range(1 if options.quick else 6):
            progress(f"turn {turn}, in fresh processes")
            for start in starts:
                taken = start()
                if turn > 0 or options.quick:  # the first one fills the system's cache
                    for name, value in taken.items():
                        seconds.setdefault(name, []).append(value)

    timings = {name: Timing(values) for name, values in seconds.items()}
    rows = []
    for name, timing in timings.items():
        reference = REFERENCES.get(name)
        rows.append(
            {
                "model": name,
                "start_time": 1000 * timing.median,
                "start_time_spread": timing.spread,
                "start_time_to_vit": timing.ratio_to(timings[reference]) if reference else None,
            }
        )
    return rows


def shortfalls(rows: list[Row]) -> list[str]:
    milliseconds = next(row["start_time"] for row in rows if row["model"] == HELP)
    if milliseconds <= 1000 * ALLOWED_SECONDS_OF_HELP:
        return []
    return [f"{HELP} takes {milliseconds:.0f} ms, over {1000 * ALLOWED_SECONDS_OF_HELP:.0f}"]


def imported_and_loaded(package: str, name: str, folder: str, device: str) -> dict[str, str]:
    return {
        f"from {package} import {name}": f"from {package} import {name}",
        "": f"import torch; torch.zeros(1, device={device!r})",  # an accelerator starts
        f"{name}.from_pretrained": f"{name}.from_pretrained({str(Path(folder, name))!r}).to({device!r})",
    }


def seconds_of(statements: dict[str, str]) -> dict[str, float]:
    """Seconds of the named ones of some statements, one after the other in a new process."""
    lines = ["import time", "times = [time.perf_counter()]"]
    for statement in statements.values():
        lines += [statement, "times.append(time.perf_counter())"]
    script = "\n".join([*lines, "print(*times)"])
    process = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    times = [float(number) for number in process.stdout.splitlines()[-1].split()]
    pairs = zip(statements, itertools.pairwise(times), strict=True)
    return {name: after - before for name, (before, after) in pairs if name}


def seconds_of_help() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stellar_hf.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began
