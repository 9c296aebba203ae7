# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Edits what and where in images: moves, scales and erases a concept, and mixes two images.

    stellar-hf edit                                             # demo model, an embedded scene and a photograph
    stellar-hf edit --images cat.jpg dog.png --box 120 80 300 260 --move -3 5 --factor 0.5
    stellar-hf edit --images cats.jpg --box 20 80 150 260 --exchange_box 180 80 300 260
    stellar-hf edit --images cat.jpg --tokens 0 2

The concept is the tokens of the first image, numbered from 0 as in the figures of stellar-hf reconstruct, or those
that stand mostly in a box of it, by default its middle. Writes move.png, scale.png and erase.png; with the box of
another concept of the image exchange.png, in which each shows what the other one showed; and with a second image
swap.png (with the concept of the second image in the same box), interpolate.png and transfer.png.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from .. import DEMO_MODEL, StellarPipeline
from ..localization_stellar import region_shares
from ..pipelines.editing import select
from ..visualization import plot_edits, token_palette
from .inputs import load_pipeline, read_images
from .parser import CommandParser
from .process import errors_in_a_sentence

# Boxes of what is edited without images, left, top, right and bottom: a cone of the scene, and the flower of the
# photograph. The cone and a ball exchange their colours.
CONE, FLOWER, BALL = (20, 29, 76, 91), (22, 16, 104, 104), (70, 44, 126, 101)

# S, (1, r, d), and L, (1, N, r), of an image.
Factors = tuple[Tensor, Tensor]


@dataclass
class EditArguments:
    """Which model, which images, which concept, and what happens to it."""

    images: list[str] = field(
        default_factory=list,
        metadata={"help": "One or two image files; an embedded scene and a photograph by default."},
    )
    tokens: list[int] = field(default_factory=list, metadata={"help": "Tokens of the concept, numbered from 0."})
    box: list[int] = field(
        default_factory=list,
        metadata={
            "help": "In place of tokens: left, top, right and bottom of the concept, in pixels; then those in the "
            "second image, brought to the size of the first one, where they are others."
        },
    )
    exchange_box: list[int] = field(
        default_factory=list,
        metadata={"help": "Box of another concept of the first image: both exchange what they show."},
    )
    move: list[float] = field(default_factory=lambda: [4, -2], metadata={"help": "Patches down and to the right."})
    factor: float = field(default=1.5, metadata={"help": "Of the concept's height and width."})
    model_name_or_path: str = field(
        default=DEMO_MODEL,
        metadata={"help": "STELLAR model that reconstructs pixels: a folder, or owner/name on the Hub."},
    )
    pipeline_name_or_path: str | None = field(
        default=None, metadata={"help": "In place of the model, a pipeline: a folder, or owner/name on the Hub."}
    )
    output_dir: str = field(default="edits", metadata={"help": "Where the figures are written."})


def main() -> None:
    with errors_in_a_sentence():
        run(parse_arguments(sys.argv[1:]))


def parse_arguments(argv: Sequence[str]) -> EditArguments:
    (args,) = CommandParser(EditArguments, description=__doc__).parse(argv)
    if len(args.images) > 2:
        raise ValueError(f"There are {len(args.images)} images, but edits are of one, or between two.")
    if len(args.move) != 2:
        raise ValueError(f"--move has {len(args.move)} numbers, but needs the patches down and to the right.")
    if args.tokens and args.box:
        raise ValueError("The concept is given by --tokens and by --box: leave one of them out.")
    return args


def run(args: EditArguments) -> None:
    logging.disable_progress_bar()  # of loading models
    images = read_pair(args.images)
    pipe = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path)
    tokens, maps = pipe.encode(list(images.values()))
    concept = find_concept(maps, args, images)
    draw = partial(save_figure, pipe, images, args.output_dir)
    print(f"{describe(concept[0])}\n")

    names, first, first_concept = list(images), (tokens[:1], maps[:1]), concept[:1]
    palette, (rows, columns) = highlight(first_concept), args.move
    draw("move", {names[0]: first, "move": pipe.move(*first, first_concept, rows, columns)}, palette)
    draw("scale", {names[0]: first, "scale": pipe.scale(*first, first_concept, args.factor)}, palette)
    draw("erase", {names[0]: first, "erase": pipe.erase(*first, first_concept)}, palette)
    other_concept = find_exchanged(maps[:1], args, images[names[0]].size)
    if other_concept is not None:
        exchanged = pipe.exchange(*first, first_concept, other_concept)
        draw("exchange", {names[0]: first, "exchange": exchanged}, highlight(first_concept | other_concept))
    if len(images) == 1:
        return

    second, second_concept = (tokens[1:], maps[1:]), concept[1:]
    swapped = pipe.swap(*first, first_concept, *second, second_concept)
    draw("swap", swap_columns(names, first, second, swapped), highlight(concept))
    between = {f"weight {weight}": pipe.interpolate(*first, *second, weight) for weight in (0.25, 0.5, 0.75)}
    draw("interpolate", {names[0]: first, **between, names[1]: second})
    painted = {
        f"{names[0]}, tokens of {names[1]}": pipe.transfer(*first, tokens[1:]),
        f"{names[1]}, tokens of {names[0]}": pipe.transfer(*second, tokens[:1]),
    }
    draw("transfer", {names[0]: first, names[1]: second, **painted})


# Inputs --------------------------------------------------------------------------------------------------------------


def read_pair(files: Sequence[str]) -> dict[str, Image.Image]:
    """One or two images by their names, the second in the size of the first."""
    images = read_images(files)
    size = next(iter(images.values())).size
    return {name: image if image.size == size else image.resize(size) for name, image in images.items()}


def find_concept(maps: Tensor, args: EditArguments, images: Mapping[str, Image.Image]) -> Tensor:
    """
    The concept in each image, by its tokens or its box.

    Args:
        maps: L of the images, (B, N, r).
        args: With tokens, a box or neither.
        images: Of one size.

    Returns:
        bool (B, r).

    Raises:
        ValueError: If there is no such token, the box is none, or no token stands mostly in it.
    """
    num_tokens = maps.shape[2]
    if args.tokens:
        if not all(0 <= token < num_tokens for token in args.tokens):
            raise ValueError(f"--tokens are {args.tokens}, but must be from 0 to {num_tokens - 1}.")
        concept = torch.zeros(len(maps), num_tokens, dtype=torch.bool, device=maps.device)
        concept[:, args.tokens] = True
        return concept
    width, height = size = next(iter(images.values())).size
    middle = [width // 6, height // 6, width - width // 6, height - height // 6]
    masks = box_masks(args.box or (middle if args.images else [*CONE, *FLOWER]), "--box", len(maps), size)
    return select_in(maps, masks, ", or name tokens with --tokens")


def find_exchanged(maps: Tensor, args: EditArguments, size: tuple[int, int]) -> Tensor | None:
    """
    The concept of the first image that is exchanged with the other one, bool (1, r), if there is one. Errors are those
    of `find_concept`.
    """
    is_embedded = not (args.images or args.tokens or args.box)
    box = args.exchange_box or (BALL if is_embedded else ())
    return select_in(maps, box_masks(box, "--exchange_box", 1, size)) if box else None


def select_in(maps: Tensor, masks: Tensor, remedy: str = "") -> Tensor:
    """Tokens that stand mostly in one place, or one for each image, bool (B, r); the first image must have some."""
    masks = masks.expand(len(maps), -1, -1).to(maps.device)
    concept = select(maps, masks)
    if not concept[0].any():
        shares = region_shares(maps[:1], masks[:1].long(), 2)[0, 1]
        listed = ", ".join(f"{token}: {100 * share:.0f} %" for token, share in enumerate(shares.tolist()))
        raise ValueError(
            f"No token stands mostly in the box. Shares of the tokens' maps that are in it: {listed}. Take a larger "
            f"box{remedy}."
        )
    return concept


def describe(concept: Tensor) -> str:
    """Which tokens are edited, bool (r,), and how to choose others."""
    chosen = ", ".join(map(str, concept.nonzero().flatten().tolist()))
    return (
        f"Concept of the first image: token {chosen} of {len(concept)}, in colour where the others are gray.\n"
        "Another one: --tokens 0 2, or --box LEFT TOP RIGHT BOTTOM in pixels."
    )


def box_masks(boxes: Sequence[int], option: str, num_images: int, size: tuple[int, int]) -> Tensor:
    """Places of one or two boxes of an option, bool (1 or 2, height, width)."""
    if len(boxes) not in (4, 8) or len(boxes) > 4 * num_images:
        often = "" if num_images == 1 else ", once or for each image"
        raise ValueError(f"{option} has {len(boxes)} numbers, but needs left, top, right and bottom{often}.")
    width, height = size
    masks = torch.zeros(len(boxes) // 4, height, width, dtype=torch.bool)
    for index, mask in enumerate(masks):
        left, top, right, bottom = box = boxes[4 * index : 4 * index + 4]
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"{option} is {list(box)}, but must be left, top, right and bottom inside of {width}x{height} pixels."
            )
        mask[top:bottom, left:right] = True
    return masks


# Figures -------------------------------------------------------------------------------------------------------------


def save_figure(
    pipe: StellarPipeline,
    images: Mapping[str, Image.Image],
    output_dir: str,
    name: str,
    columns: Mapping[str, Factors],
    palette: np.ndarray | None = None,
) -> None:
    """
    Writes a figure: the images, then what is decoded from tokens and maps, and below each its tokens.

    Args:
        pipe: Decodes.
        images: As they were, whose size the decoded ones get.
        output_dir: Folder of the figure, which is made.
        name: Of the figure.
        columns: Tokens and maps of each decoded image by its title; the name of an image if they are its own.
        palette: (r, 3) colours of the tokens.
    """
    width, height = next(iter(images.values())).size
    decoded = []
    for tokens, maps in columns.values():
        output: Any = pipe(sparse_tokens=tokens, localization=maps, width=width, height=height)
        decoded += output.images
    originals = [name for name in images if name in columns]
    maps_by_title = {title: maps[0] for title, (_, maps) in columns.items()}
    figure = plot_edits(
        [images[name] for name in originals] + decoded,
        [maps_by_title[name] for name in originals] + list(maps_by_title.values()),
        originals + [f"{title}, decoded" if title in images else title for title in columns],
        palette=palette,
    )
    path = Path(output_dir, f"{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    print(path)


def swap_columns(
    names: Sequence[str], first: Factors, second: Factors, swapped: tuple[Tensor, Tensor, Tensor, Tensor]
) -> dict[str, Factors]:
    """Both images before and after a swap, each with the tokens of both in one order, so that colours are the same."""
    first_tokens, first_maps, second_tokens, second_maps = swapped
    num_tokens = first[0].shape[1]
    tokens, empty = torch.cat([first[0], second[0]], dim=1), torch.zeros_like(first[1])
    return {
        names[0]: (tokens, torch.cat([first[1], empty], dim=2)),
        names[1]: (tokens, torch.cat([empty, second[1]], dim=2)),
        f"{names[0]}, swapped": (first_tokens, first_maps),
        f"{names[1]}, swapped": (second_tokens.roll(num_tokens, 1), second_maps.roll(num_tokens, 2)),
    }


def highlight(concept: Tensor) -> np.ndarray:
    """Colours of tokens in which only those of a concept, bool (B, r), are not gray: (B * r, 3)."""
    chosen = concept.flatten().cpu().numpy()
    return np.where(chosen[:, None], token_palette(len(chosen)), 0.2)


if __name__ == "__main__":
    main()
