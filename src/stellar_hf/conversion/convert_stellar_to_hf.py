# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Converts a released STELLAR checkpoint to a folder that the Auto classes load:

    python -m stellar_hf.conversion.convert_stellar_to_hf stellar-b16 --output stellar-base-16
    python -m stellar_hf.conversion.convert_stellar_to_hf stellar-b16 --output stellar-base-16 --push_to_hub owner/name
    python -m stellar_hf.conversion.convert_stellar_to_hf --checkpoint last.ckpt --config overrides.json --output out

Every key is either converted, or known to be unused, or an error ([`stellar_hf.released_stellar`]).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageOps
from torch import Tensor

from ..hub_stellar import FIGURE_NAME, push_folder
from ..image_processing_pil_stellar import StellarImageProcessorPil, image_processor_of
from ..modeling_stellar import StellarForImageReconstruction, StellarForPreTraining
from ..released_stellar import (
    RELEASED_NAMES,
    RELEASED_REPOSITORY,
    UNUSED_KEYS,
    convert_state_dict,
    convert_weights,
    infer_config,
    read_checkpoint,
    read_released,
    without_prefix,
)
from ..visualization import token_overlay
from .command import check_output, run_command

if TYPE_CHECKING:
    from ..pipelines import MaskGitVQModel, StellarPipeline

MODULE = "stellar_hf.conversion.convert_stellar_to_hf"

_FIGURE_PHOTOGRAPHS = ("chelsea", "coffee", "flower")
_FIGURE_SIDE = 200


def convert_checkpoint(
    checkpoint: str | Path | Mapping[str, Tensor], config_overrides: Mapping[str, Any] | None = None
) -> StellarForPreTraining:
    """
    Builds a model from a released checkpoint.

    Args:
        checkpoint: A `.safetensors` or Lightning `.ckpt` file, or a released state dict; keys may carry Lightning's
            prefix `model.`.
        config_overrides: Fields of [`StellarConfig`] that the shapes do not tell: heads, image size, temperatures.
            With `use_teacher=False` a teacher in the checkpoint is left out; with `use_teacher=True` a teacher that is
            not in the checkpoint starts as a copy of the model.

    Returns:
        The model in evaluation mode, float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, is not a STELLAR checkpoint, has keys too many or too few, or
            contradicts `config_overrides`.
    """
    state_dict = read_checkpoint(Path(checkpoint)) if isinstance(checkpoint, (str, Path)) else checkpoint
    config, weights = convert_weights(state_dict, StellarForPreTraining, **(config_overrides or {}))
    model = StellarForPreTraining(config)
    model.load_state_dict(weights)
    return model.eval()


# Command line --------------------------------------------------------------------------------------------------------


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Converts a released STELLAR checkpoint to a folder for AutoModel.from_pretrained.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("name", nargs="?", choices=RELEASED_NAMES, help=f"released model, from {RELEASED_REPOSITORY}")
    source.add_argument("--checkpoint", type=Path, help="a .safetensors or Lightning .ckpt file instead")
    parser.add_argument("--config", type=Path, help="JSON file of StellarConfig fields that shapes do not tell")
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder")
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="also write OUTPUT-pipeline for StellarPipeline.from_pretrained, with the tokenizer of codes",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="push the folder, which then holds the code, the pipeline and a model card, too",
    )
    parser.add_argument("--vq_checkpoint", type=Path, help="a local copy of the tokenizer instead of the Hub's")
    return parser


def _overrides(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        overrides = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file ({error}).") from error
    if not isinstance(overrides, dict):
        raise ValueError(
            f"{path} holds a {type(overrides).__name__}, but must hold an object of StellarConfig fields."
        )
    return overrides


def _convert(arguments: argparse.Namespace) -> None:
    folder, repo_id = arguments.output, arguments.push_to_hub
    pipeline_folder = folder if repo_id else folder.with_name(f"{folder.name}-pipeline")
    has_pipeline = arguments.pipeline or repo_id
    for output in (folder, *([pipeline_folder] if has_pipeline else [])):
        check_output(output)
    if repo_id:
        _check_push(repo_id)
    overrides = _overrides(arguments.config)
    checkpoint = arguments.checkpoint
    state_dict = without_prefix(read_checkpoint(checkpoint) if checkpoint else read_released(arguments.name))
    model = convert_checkpoint(state_dict, overrides)
    processor = image_processor_of(model.config)
    # Before anything is written: it may fail.
    needs_tokenizer = has_pipeline and model.config.reconstruction_target == "codes"
    vq_model = _vq_model(arguments.vq_checkpoint) if needs_tokenizer else None

    if repo_id:
        # The code goes along, so that the model loads where stellar_hf is not installed.
        StellarForPreTraining.register_for_auto_class("AutoModelForPreTraining")
        StellarImageProcessorPil.register_for_auto_class()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _print_summary(folder, model, state_dict)
    if has_pipeline:
        pipe = _write_pipeline(pipeline_folder, folder, vq_model)
    if repo_id:
        _draw_reconstructions(folder, pipe)
        url = push_folder(folder, model, repo_id, released=arguments.name).repo_url
        print(f"Pushed it to {url}, with a model card.")


def _check_push(repo_id: str) -> None:
    """Before the work that would be pushed: a `ValueError` unless the name is possible and the Hub knows the user."""
    validate_repo_id(repo_id)
    try:
        HfApi().whoami()
    except Exception as error:  # those of a failed connection have no class in common with the Hub's
        raise ValueError(
            f"The Hub cannot be asked who pushes to {repo_id} ({type(error).__name__}): check the connection, and log "
            "in with hf auth login, or set HF_TOKEN."
        ) from error


# Diffusers and Datasets take seconds to import, which the conversion of a model alone does not need.


def _vq_model(checkpoint: Path | None) -> MaskGitVQModel:
    from .convert_maskgit_vq import convert_vq_checkpoint, download_released

    return convert_vq_checkpoint(checkpoint or download_released())


def _write_pipeline(folder: Path, model_folder: Path, vq_model: MaskGitVQModel | None) -> StellarPipeline:
    from ..pipelines import StellarPipeline

    model = StellarForImageReconstruction.from_pretrained(model_folder)
    pipe = StellarPipeline(image_processor=image_processor_of(model.config), model=model, vq_model=vq_model)
    pipe.save_pretrained(folder)
    print(
        f"Wrote {folder}. Load it with: from stellar_hf import StellarPipeline; "
        f"pipe = StellarPipeline.from_pretrained({str(folder)!r})"
    )
    return pipe


def _draw_reconstructions(folder: Path, pipe: StellarPipeline) -> None:
    """Draws photographs, what the pipeline makes of their tokens, and where the tokens are, for the model card."""
    from ..data.photo_mosaics import photograph

    side = _FIGURE_SIDE
    try:
        images = [ImageOps.fit(photograph(name), (side, side)) for name in _FIGURE_PHOTOGRAPHS]
    except ImportError as error:
        print(f"The model card has no figure: {error}")
        return
    tokens, localization = pipe.encode(images)
    decoded: Any = pipe(sparse_tokens=tokens, localization=localization, height=side, width=side)
    overlays = [token_overlay(image, maps) for image, maps in zip(images, localization, strict=True)]
    figure = Image.new("RGB", (3 * side, len(images) * side))
    for row, panels in enumerate(zip(images, decoded.images, overlays, strict=True)):
        for column, panel in enumerate(panels):
            figure.paste(panel, (column * side, row * side))
    figure.save(folder / FIGURE_NAME)


def _print_summary(output: Path, model: StellarForPreTraining, state_dict: Mapping[str, Tensor]) -> None:
    config = model.config
    unused = sorted({f"{match[0]}*" for key in state_dict if (match := UNUSED_KEYS.match(key))})
    if not config.use_teacher and any(key.startswith("teacher_") for key in state_dict):
        unused.append("teacher_*")
    print(
        f"Wrote {output}: {model.num_parameters():,} parameters, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, patches of {config.patch_size} pixels, {config.num_sparse_tokens} sparse tokens, "
        f"reconstruction of {config.reconstruction_target}, {'an EMA' if config.use_teacher else 'no'} teacher.\n"
        f"Left out as unused: {', '.join(unused) or 'nothing'}.\n"
        "Load it with: import stellar_hf; from transformers import AutoModel; "
        f"model = AutoModel.from_pretrained({str(output)!r})"
    )


def main(argv: Sequence[str] | None = None, prog: str = f"python -m {MODULE}") -> None:
    """
    Runs the command line; a wrong input ends it with one sentence on stderr and exit code 2.

    Args:
        argv: Arguments; those of the process by default.
        prog: What the command is called in its messages.
    """
    run_command(_parser(prog), _convert, argv)


__all__ = ["convert_checkpoint", "convert_state_dict", "infer_config", "main"]


if __name__ == "__main__":
    main()
