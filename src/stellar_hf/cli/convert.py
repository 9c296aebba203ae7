# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Converts released checkpoints, STELLAR's or its tokenizer's, to folders for `from_pretrained`:

    stellar-hf convert stellar-b16 --output stellar-base-16
    stellar-hf convert stellar-b16 --output stellar-base-16 --push_to_hub owner/name
    stellar-hf convert --checkpoint last.ckpt --config overrides.json --output out
    stellar-hf convert maskgit-vq --output maskgit-vq
"""

import sys

from ..conversion import convert_maskgit_vq, convert_stellar_to_hf

TOKENIZER = "maskgit-vq"


def main() -> None:
    """Runs the conversion that the arguments of the process name; a wrong one ends it with a sentence, exit code 2."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] == TOKENIZER:
        convert_maskgit_vq.main(arguments[1:], prog=f"stellar-hf convert {TOKENIZER}")
    else:
        convert_stellar_to_hf.main(arguments, prog="stellar-hf convert")


if __name__ == "__main__":
    main()
