# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The console script `stellar-hf`, which is also `python -m stellar_hf.cli`.

    stellar-hf COMMAND [ARGUMENTS]
    stellar-hf COMMAND --help

A command is the function `main` of a module, imported when it is called: a list of the commands needs no PyTorch.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "draw a first figure with the packaged model, without any training",
    "reconstruct": "encode images into a few tokens, decode them again, and draw both",
    "edit": "move, scale, erase, exchange, swap and mix what tokens stand for",
    "extract": "write tokens, localization and labels of any images to Parquet shards",
    "pretrain": "pre-train STELLAR, on embedded scenes or on images of your own",
    "adapt": "train a released model, or your own, further on your images, and guard what it knew",
    "train-prior": "train a prior, by which a pipeline draws new images",
    "evaluate": "measure models by the protocols of the paper, beside baselines that were never trained",
    "convert": "turn the authors' checkpoints into folders for from_pretrained",
    "export": "write a model to ONNX, and check the file",
}

_HEAD = """\
usage: stellar-hf COMMAND [ARGUMENTS]

STELLAR turns an image into a few tokens (what is there) and a map of each (where it is).
"""
_FOOT = """
Start with: stellar-hf demo. The arguments of a command: stellar-hf COMMAND --help"""


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs the command that the first argument names.

    Args:
        argv: The command and its arguments; those of the process by default.

    Raises:
        SystemExit: With 2 and a sentence on stderr if there is no such command, or as the command itself ends.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name in COMMANDS:
        sys.argv = [f"stellar-hf {name}", *arguments]  # as a command reads them that is started alone
        importlib.import_module(f"stellar_hf.cli.{name.replace('-', '_')}").main()
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}."
        print(f"error: stellar-hf has no command {name}: {hint}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}   {summary}" for name, summary in COMMANDS.items()]
    return "\n".join([_HEAD, *lines, _FOOT])


if __name__ == "__main__":
    main()
