# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The notebooks run, and are saved with their outputs as `examples/notebooks/execute.py` writes them."""

import nbformat
import pytest

from examples.notebooks.execute import NOTEBOOKS, execute

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def is_noise(output):
    """Warnings, and widgets, which are progress bars here."""
    return output.get("name") == "stderr" or any("widget" in kind for kind in output.get("data", {}))


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_without_network_and_noise(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not [output for output in outputs_of(execute(path)) if is_noise(output)]


@each_notebook
def test_a_notebook_is_saved_whole_and_small_with_a_sentence_before_each_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in code)
    assert not [output for output in outputs_of(notebook) if is_noise(output)]
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown", cell.source
