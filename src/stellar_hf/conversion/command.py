# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What the command of every conversion asks of its output folder, and how it ends."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path


def check_output(folder: Path) -> None:
    """Raises a `FileExistsError` unless the folder is new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another --output.")


def run_command(parser: ArgumentParser, convert: Callable[[Namespace], None], argv: Sequence[str] | None) -> None:
    """Runs a conversion with the parsed arguments; a wrong input ends it with one sentence on stderr, exit code 2."""
    arguments = parser.parse_args(argv)
    try:
        convert(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
