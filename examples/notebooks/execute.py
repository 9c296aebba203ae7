# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Runs the notebooks of this folder from top to bottom, and saves them with their outputs.

    python examples/notebooks/execute.py                        # all of them, in minutes on two CPU cores
    python examples/notebooks/execute.py examples/notebooks/1_what_is_a_token.ipynb

Needs nbclient and ipykernel.
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
MAX_WIDTH = 800  # pixels of a figure

# Bars say nothing when they are done: those of downloads and of reading files, and that of a training above its table.
PROGRESS_BAR = re.compile(r"\s*<div>(?:(?!</div>).)*<progress.*?</div>\s*", re.DOTALL)
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
# Diffusers imports it where it is installed, and it tells some CPUs of kernels that they could have.
QUIET_LIBRARIES = "import logging; logging.getLogger('bitsandbytes').setLevel('ERROR')"


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs; files that its cells write go to a folder that is removed."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=1800,  # of a cell, on a busy machine
            kernel_name="python3",
            record_timing=False,
            extra_arguments=[f"--IPKernelApp.exec_lines={QUIET_LIBRARIES}"],
            resources={"metadata": {"path": folder}},
        )
        client.execute(env={**os.environ, **QUIET})
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shrink_figure(data)
            if "text/html" in data:
                data["text/html"] = PROGRESS_BAR.sub("", data["text/html"])
    return notebook


def shrink_figure(data: dict[str, str]) -> None:
    """Makes a JPEG, no wider than `MAX_WIDTH`, of the PNG file of an output."""
    if "image/png" not in data:
        return
    image = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))).convert("RGB")
    if image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, optimize=True)
    data["image/jpeg"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        nbformat.write(execute(path), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
