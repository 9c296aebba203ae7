# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Encodes images into a few sparse tokens, decodes them again, and draws the image, its reconstruction and the tokens.

    stellar-hf reconstruct                                      # demo model, an embedded scene and a photograph
    stellar-hf reconstruct --images cat.jpg dog.png --grid_size 16 24
    stellar-hf reconstruct --pipeline_name_or_path stellar-base-16-pipeline --images cat.jpg

Each image gives NAME.png, its reconstruction in the image's size, and NAME-tokens.png, the figure. --save_pipeline
FOLDER also writes the pipeline, for StellarPipeline.from_pretrained.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from .. import DEMO_MODEL
from ..data import images_to_tensor
from ..evaluation import psnr
from ..visualization import plot_reconstructions
from .inputs import load_pipeline, read_images
from .parser import CommandParser
from .process import errors_in_a_sentence


@dataclass
class ReconstructionArguments:
    """Which model, which images, and where the results go."""

    images: list[str] = field(
        default_factory=list, metadata={"help": "Image files; an embedded scene and a photograph by default."}
    )
    model_name_or_path: str = field(
        default=DEMO_MODEL,
        metadata={"help": "STELLAR model that reconstructs pixels: a folder, or owner/name on the Hub."},
    )
    pipeline_name_or_path: str | None = field(
        default=None, metadata={"help": "In place of the model, a pipeline: a folder, or owner/name on the Hub."}
    )
    grid_size: list[int] | None = field(
        default=None,
        metadata={"help": "Rows and columns of patches that images are stretched to; by default the model's square."},
    )
    output_dir: str = field(default="reconstructions", metadata={"help": "Where the figures are written."})
    save_pipeline: str | None = field(default=None, metadata={"help": "Folder that the pipeline is written to."})


def main() -> None:
    with errors_in_a_sentence():
        run(parse_arguments(sys.argv[1:]))


def parse_arguments(argv: list[str]) -> ReconstructionArguments:
    (args,) = CommandParser(ReconstructionArguments, description=__doc__).parse(argv)
    return args


def run(args: ReconstructionArguments) -> None:
    logging.disable_progress_bar()  # of loading models
    images = read_images(args.images)
    pipe: Any = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path)
    if args.save_pipeline:
        pipe.save_pretrained(args.save_pipeline)
        print(f"Pipeline written to {args.save_pipeline}")
    for name, image in images.items():
        tokens, localization = pipe.encode(image, grid_size=args.grid_size)
        size = {"height": image.height, "width": image.width}
        output = pipe(sparse_tokens=tokens, localization=localization, grid_size=args.grid_size, **size)
        save_reconstruction(args, name, image, output.images[0], tokens, localization)


def save_reconstruction(
    args: ReconstructionArguments,
    name: str,
    image: Image.Image,
    reconstruction: Image.Image,
    tokens: Tensor,
    localization: Tensor,
) -> None:
    """
    Writes a reconstruction and its figure, and says how exact it is.

    Args:
        args: Where to write, and the grid that was asked for.
        name: Of the image, and of the files.
        image: As it was.
        reconstruction: In the image's size.
        tokens: Tensor of shape (1, r, d).
        localization: Tensor of shape (1, N, r).
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    grid_size: Any = args.grid_size
    reconstruction.save(folder / f"{name}.png")
    figure = plot_reconstructions([image], [reconstruction], localization, grid_size)
    figure.savefig(folder / f"{name}-tokens.png", dpi=300)
    found, expected = (torch.stack(images_to_tensor([picture])) / 255 for picture in (reconstruction, image))
    print(
        f"{name}: {image.width}x{image.height} pixels from {tokens.shape[1]} tokens of {tokens.shape[2]} numbers and "
        f"a map of {localization.shape[1]} patches, PSNR {psnr(found, expected).item():.1f} dB: "
        f"{folder / name}.png, {folder / name}-tokens.png"
    )


if __name__ == "__main__":
    main()
