# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Draws a first figure with the packaged demo model, without any training.

    stellar-hf demo                                             # embedded scenes that the model has never seen
    stellar-hf demo --images cat.jpg dog.png

Each row shows an image, what is decoded of its 8 tokens, which token takes which patch, and the map of each token. The
model is small, and was trained on rendered tabletop scenes: photographs come out roughly.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers.utils import logging

from .. import DEMO_MODEL, StellarForImageReconstruction
from ..data import load_tabletop_scenes
from ..data.images import read_image
from ..features import load_processor
from ..visualization import plot_reconstructions
from .parser import CommandParser
from .process import errors_in_a_sentence

# Of the validation split: clear ones among the first. The figure of README.md shows some of them, too.
SCENES = (0, 1, 5, 11, 17, 18, 20, 22)


@dataclass
class DemoArguments:
    """Which images, and where the figure goes."""

    images: list[str] = field(
        default_factory=list, metadata={"help": "Image files; embedded tabletop scenes by default."}
    )
    output_dir: str = field(default="stellar-demo-figure", metadata={"help": "Where the figure is written."})


def main() -> None:
    with errors_in_a_sentence():
        (args,) = CommandParser(DemoArguments, description=__doc__).parse(sys.argv[1:])
        run(args)


def run(args: DemoArguments) -> None:
    logging.disable_progress_bar()  # of loading the model
    images = [read_image(file) for file in args.images] or embedded_scenes()
    # The model alone: the pipeline would import Diffusers, which takes longer than the drawing.
    model = StellarForImageReconstruction.from_pretrained(DEMO_MODEL)
    side = model.config.image_size
    squares = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    inputs = load_processor(DEMO_MODEL)(squares, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, return_loss=False)
    path = Path(args.output_dir, "demo.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = plot_reconstructions(squares, output.reconstruction.clamp(0, 1), output.localization)
    figure.savefig(path, dpi=200)
    _, num_tokens, token_size = output.sparse_tokens.shape
    print(
        f"{path}\n\n"
        f"Each row: an image; its reconstruction from {num_tokens} tokens of {token_size} numbers (what) "
        f"and a map of {output.localization.shape[1]} patches (where);\nwhich token takes which patch; and the map "
        "of each token, bright where it is.\n\n"
        "Next: stellar-hf reconstruct --images cat.jpg, stellar-hf edit, or stellar-hf pretrain --train_dir photos."
    )


def embedded_scenes() -> list[Image.Image]:
    """Tabletop scenes in the model's size, of which the demo model's training has seen no part."""
    return load_tabletop_scenes("validation", max(SCENES) + 1, image_size=128).select(SCENES)["image"][:]


if __name__ == "__main__":
    main()
