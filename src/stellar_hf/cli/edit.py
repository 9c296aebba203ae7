# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Edits what and where in images: moves, scales and erases a concept, and mixes two images.

    python examples/edit.py                                     # demo model, scikit-learn's two photographs
    python examples/edit.py --images cat.jpg dog.png --box 120 80 300 260 --move -3 5 --factor 0.5
    python examples/edit.py --images cat.jpg --tokens 1 3

The concept is the tokens of the first image, numbered from 1 as in its figures, or those that stand mostly in a box of
it, by default its middle. Writes move.png, scale.png and erase.png, and with a second image swap.png (with the concept
of the second image in the same box), interpolate.png and transfer.png.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import HfArgumentParser
from transformers.utils import logging

import stellar_hf
from stellar_hf import StellarPipeline
from stellar_hf.cli.inputs import load_pipeline, read_images
from stellar_hf.visualization import plot_edits, token_palette

# What is below the sky in the second photograph of scikit-learn: left, top, right and bottom in its pixels.
HILL = (0, 140, 640, 427)


@dataclass
class Arguments:
    """Which model, which images, which concept, and what happens to it."""

    images: list[str] = field(
        default_factory=list,
        metadata={"help": "One or two image files; scikit-learn's two photographs by default."},
    )
    tokens: list[int] = field(default_factory=list, metadata={"help": "Tokens of the concept, from 1."})
    box: list[int] = field(
        default_factory=list,
        metadata={
            "help": "In place of tokens: left, top, right and bottom of the concept, in pixels; then those in the "
            "second image, brought to the size of the first one, where they are others."
        },
    )
    move: list[float] = field(default_factory=lambda: [0, 4], metadata={"help": "Patches down and to the right."})
    factor: float = field(default=1.5, metadata={"help": "Of the concept's height and width."})
    model_name_or_path: str = field(
        default=stellar_hf.DEMO_MODEL,
        metadata={"help": "STELLAR model that reconstructs pixels: a folder, or owner/name on the Hub."},
    )
    pipeline_name_or_path: str | None = field(
        default=None, metadata={"help": "In place of the model, a pipeline: a folder, or owner/name on the Hub."}
    )
    output_dir: str = field(default="edits", metadata={"help": "Where the figures are written."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.disable_progress_bar()  # of loading models
    try:
        edit(args)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


def edit(args: Arguments) -> None:
    images = read_images(args.images)
    if len(images) > 2:
        raise ValueError(f"There are {len(images)} images, but edits are of one, or between two.")
    if len(args.move) != 2:
        raise ValueError(f"--move has {len(args.move)} numbers, but needs the patches down and to the right.")
    # The flower is the better thing to move.
    names = list(images) if args.images else ["flower", "china"]
    pictures = [images[names[0]], *(images[name].resize(images[names[0]].size) for name in names[1:])]
    size = {"width": pictures[0].width, "height": pictures[0].height}
    pipe = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path)
    tokens, maps = pipe.encode(pictures)
    concept = find_concept(pipe, maps, args, **size)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    def draw(name: str, columns: dict[str, tuple[Tensor, Tensor]], palette: np.ndarray | None = None) -> None:
        """Writes a figure of the first image and what is decoded from tokens and maps."""
        decoded = [pipe(sparse_tokens=what, localization=where, **size).images[0] for what, where in columns.values()]
        where_to = [where[0] for _, where in columns.values()]
        figure = plot_edits(decoded, where_to, list(columns), palette=palette)
        figure.savefig(output_dir / f"{name}.png", dpi=100)
        print(output_dir / f"{name}.png")

    this, this_concept = (tokens[:1], maps[:1]), concept[:1]
    standing_out = highlight(this_concept[0])
    edits = {
        "move": pipe.move(*this, this_concept, *args.move),
        "scale": pipe.scale(*this, this_concept, args.factor),
        "erase": pipe.erase(*this, this_concept),
    }
    for name, result in edits.items():
        draw(name, {names[0]: this, name: result}, standing_out)
    if len(images) == 1:
        return
    other = (tokens[1:], maps[1:])
    *first, second_tokens, second_maps = pipe.swap(*this, this_concept, *other, concept[1:])
    num_tokens = tokens.shape[1]
    second = second_tokens.roll(num_tokens, 1), second_maps.roll(num_tokens, 2)  # the first image's tokens first
    empty = torch.zeros_like(maps[:1])
    before = (torch.cat([tokens[:1], tokens[1:]], 1), torch.cat([maps[:1], empty], 2))
    other_before = (before[0], torch.cat([empty, maps[1:]], 2))
    columns = {names[0]: before, names[1]: other_before, f"{names[0]}, swapped": first, f"{names[1]}, swapped": second}
    draw("swap", columns, highlight(concept.flatten()))
    weights = (0.0, 0.25, 0.5, 0.75, 1.0)
    draw("interpolate", {f"{weight:g}": pipe.interpolate(*this, *other, weight) for weight in weights})
    painted = {
        f"{names[0]}, tokens of {names[1]}": pipe.transfer(*this, tokens[1:]),
        f"{names[1]}, tokens of {names[0]}": pipe.transfer(*other, tokens[:1]),
    }
    draw("transfer", {names[0]: this, names[1]: other, **painted})


def find_concept(pipe: StellarPipeline, maps: Tensor, args: Arguments, width: int, height: int) -> Tensor:
    """The concept in each image, bool (B, r)."""
    num_tokens = maps.shape[2]
    if args.tokens:
        if args.box:
            raise ValueError("The concept is given by --tokens and by --box: leave one of them out.")
        if not all(1 <= token <= num_tokens for token in args.tokens):
            raise ValueError(f"--tokens are {args.tokens}, but must be from 1 to {num_tokens}.")
        concept = torch.zeros(len(maps), num_tokens, dtype=torch.bool, device=maps.device)
        concept[:, [token - 1 for token in args.tokens]] = True
        return concept
    middle = [width // 6, height // 6, width - width // 6, height - height // 6]
    boxes = args.box or (middle if args.images else [*middle, *HILL])
    masks = box_masks(boxes, len(maps), width, height)
    concept = pipe.select(maps, masks.expand(len(maps), -1, -1))
    if not concept[0].any():
        raise ValueError("No token stands mostly in the box: take a larger one, or name tokens with --tokens.")
    return concept


def box_masks(boxes: Sequence[int], num_images: int, width: int, height: int) -> Tensor:
    """Places of one or two boxes, bool (1 or 2, height, width)."""
    if len(boxes) not in (4, 8) or len(boxes) > 4 * num_images:
        raise ValueError(
            f"--box has {len(boxes)} numbers, but needs left, top, right and bottom, once or for each image."
        )
    masks = torch.zeros(len(boxes) // 4, height, width, dtype=torch.bool)
    for index, mask in enumerate(masks):
        left, top, right, bottom = box = boxes[4 * index : 4 * index + 4]
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"--box is {list(box)}, but must be left, top, right and bottom inside of {width}x{height} pixels."
            )
        mask[top:bottom, left:right] = True
    return masks


def highlight(concept: Tensor) -> np.ndarray:
    """Colours of tokens in which only those of a concept (r,) are not gray."""
    return np.where(concept.cpu().numpy()[:, None], token_palette(len(concept)), 0.2)


if __name__ == "__main__":
    main()
