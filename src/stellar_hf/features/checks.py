# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Arguments that are no tensors or no numbers, refused in a sentence."""

from numbers import Integral
from typing import Any

from torch import Tensor


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """`ValueError` for what is not an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}.")


def check_tensors(**values: Any) -> None:
    """`ValueError` for what is not a tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, but a tensor is expected.")
