# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The page about sharing: its lines of Python, as they stand."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "sharing.md"
BEFORE = """
import stellar_hf
from stellar_hf import StellarImageProcessorPil, StellarModel

model = StellarModel.from_pretrained(stellar_hf.DEMO_MODEL)
processor = StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL)
"""


def test_what_is_pushed_with_code_loads_without_the_package(hub, run_python):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text().replace("owner/", "tester/"), re.DOTALL)
    push, register, load = blocks
    run_python(BEFORE + register + push)
    assert "modeling_stellar.py" in hub.files("tester/name")
    load = load.replace("AutoImageProcessor, ", "").partition("processor =")[0]  # not in each Transformers
    assert run_python(load + "print(type(model).__name__)", with_package=False) == "StellarModel\n"
