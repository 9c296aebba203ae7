# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Converts the released MaskGIT-VQGAN, the tokenizer of STELLAR's codes, to a folder that `MaskGitVQModel` loads:

    python -m stellar_hf.conversion.convert_maskgit_vq --output maskgit-vq
    python -m stellar_hf.conversion.convert_maskgit_vq --checkpoint maskgit-vqgan-imagenet-f16-256.bin --output out

Every key is converted, or an error ([`stellar_hf.pipelines.released_maskgit_vq`]).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..pipelines.maskgit_vq_model import MaskGitVQModel
from ..pipelines.released_maskgit_vq import (
    RELEASED_FILE,
    RELEASED_REPOSITORY,
    convert_vq_state_dict,
    download_released,
    load_checkpoint,
)
from .command import check_output, run_command

MODULE = "stellar_hf.conversion.convert_maskgit_vq"


def convert_vq_checkpoint(checkpoint: str | Path | Mapping[str, Tensor]) -> MaskGitVQModel:
    """
    Builds the tokenizer from its released checkpoint.

    Args:
        checkpoint: The released file, a pickled state dict that is loaded as mere tensors, or the state dict.

    Returns:
        The model in evaluation mode, float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, is not a checkpoint of MaskGIT-VQGAN, or has keys too many or too few.
    """
    return load_checkpoint(MaskGitVQModel, checkpoint)


# Command line --------------------------------------------------------------------------------------------------------


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Converts the released MaskGIT-VQGAN to a folder for MaskGitVQModel.from_pretrained.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help=f"a local copy of {RELEASED_FILE}; by default that of {RELEASED_REPOSITORY}"
    )
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder")
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    checkpoint = arguments.checkpoint or download_released()
    model = convert_vq_checkpoint(checkpoint)
    model.save_pretrained(arguments.output)
    print(
        f"Wrote {arguments.output}: {model.num_parameters():,} parameters, {model.config.num_vq_embeddings} codes of "
        f"{model.config.latent_channels} channels for {model.downsample_factor}x{model.downsample_factor} pixels.\n"
        "Load it with: from stellar_hf import MaskGitVQModel; "
        f"vq_model = MaskGitVQModel.from_pretrained({str(arguments.output)!r})"
    )


def main(argv: Sequence[str] | None = None, prog: str = f"python -m {MODULE}") -> None:
    """
    Runs the command line; a wrong input ends it with one sentence on stderr and exit code 2.

    Args:
        argv: Arguments; those of the process by default.
        prog: What the command is called in its messages.
    """
    run_command(_parser(prog), _convert, argv)


__all__ = ["convert_vq_checkpoint", "convert_vq_state_dict", "main"]


if __name__ == "__main__":
    main()
