# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The page about the pipeline: its blocks of Python, as they stand, and what it says that they give."""

import re
from pathlib import Path

GUIDE = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text()


def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    for block in blocks:
        exec(block, names)

    assert (tmp_path / "stellar-pipeline" / "model_index.json").is_file()
    assert type(names["same"]) is names["StellarPipeline"]
    for group in ("reconstructions", "decoded", "sampled", "large"):
        assert [image.size for image in names[group]] == [(240, 160)] * 2, group
    assert names["wide"].size == (240, 160)
    assert names["batch"].shape == (2, 3, 160, 240)
    assert names["codes"].shape == (2, 16)
    # Shapes that the page states in comments.
    tokens, localization = names["pipe"].encode(names["images"])
    assert (tuple(tokens.shape), tuple(localization.shape)) == ((2, 6, 128), (2, 256, 6))
    assert (tuple(names["tokens"].shape), tuple(names["localization"].shape)) == ((1, 6, 128), (1, 216, 6))
