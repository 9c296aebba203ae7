# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The docstrings' notation of Transformers, as the reference shows it: types without backticks, names as links."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

REFERENCE = Path(__file__).parent / "api"


class TransformersDocstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def __init__(self) -> None:
        pages = "".join(page.read_text() for page in REFERENCE.glob("*.md"))
        self.paths = {path.rpartition(".")[2]: path for path in re.findall(r"(?m)^::: ([\w.]+)$", pages)}

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"(?m)^(\s+\**\w+) \((.*`.*)\):", self._plain_type, obj.docstring.value)
        if getattr(obj, "parameters", None):  # a signature, which shows the defaults
            text = re.sub(r"(?m)^(\s+\w+ \(.*), defaults to .*\):", r"\1):", text)
        obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\]", self._link, text)

    def _plain_type(self, match: re.Match) -> str:
        plain = re.sub(r"\[(?=`)|(?<=`)\]|[`*]", "", match[2])
        return f"{match[1]} ({plain}):"

    def _link(self, match: re.Match) -> str:
        name, dot, member = match[1].removeprefix("stellar_hf.").partition(".")
        path = self.paths.get(name)
        return f"[`{match[1]}`][{path}{dot}{member}]" if path else f"`{match[1]}`"
