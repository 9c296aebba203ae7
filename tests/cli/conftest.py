# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The scripts of the examples, as a user starts them."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """Runs a script, named without suffix, with arguments, in this process and a folder of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    monkeypatch.chdir(tmp_path)

    def run(name, *argv):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        script = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, script)  # its dataclass looks its own module up
        spec.loader.exec_module(script)
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        script.main()

    return run
