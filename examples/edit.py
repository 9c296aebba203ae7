# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Edits what and where in images, by functions on tokens and maps. As a command: stellar-hf edit.

    python examples/edit.py                                     # demo model, an embedded scene and a photograph
    python examples/edit.py --images cat.jpg dog.png --box 120 80 300 260 --move -3 5 --factor 0.5
    python examples/edit.py --images cats.jpg --box 20 80 150 260 --exchange_box 180 80 300 260
    python examples/edit.py --images cat.jpg --tokens 0 2

Writes move.png, scale.png and erase.png, with --exchange_box exchange.png, and with a second image swap.png,
interpolate.png and transfer.png.
"""

import sys
from functools import partial

from stellar_hf.cli.edit import (
    EditArguments,
    find_concept,
    find_exchanged,
    highlight,
    parse_arguments,
    read_pair,
    save_figure,
    swap_columns,
)
from stellar_hf.cli.inputs import load_pipeline
from stellar_hf.cli.process import errors_in_a_sentence


def edit(args: EditArguments) -> None:
    images = read_pair(args.images)
    pipe = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path)  # a StellarPipeline

    # What is in each image, S (B, r, d), and where, L (B, N, r); and which tokens are meant, bool (B, r).
    tokens, maps = pipe.encode(list(images.values()))
    concept = find_concept(maps, args, images)
    draw = partial(save_figure, pipe, images, args.output_dir)

    # Each edit takes S and L, and gives S and L to decode.
    name, *other_names = images
    first = tokens[:1], maps[:1]
    rows, columns = args.move
    edits = {
        "move": pipe.move(*first, concept[:1], rows, columns),
        "scale": pipe.scale(*first, concept[:1], args.factor),
        "erase": pipe.erase(*first, concept[:1]),
    }
    for title, edited in edits.items():
        draw(title, {name: first, title: edited}, highlight(concept[:1]))
    exchanged = find_exchanged(maps[:1], args, images[name].size)
    if exchanged is not None:
        edited = pipe.exchange(*first, concept[:1], exchanged)
        draw("exchange", {name: first, "exchange": edited}, highlight(concept[:1] | exchanged))

    for other_name in other_names:
        other = tokens[1:], maps[1:]
        swapped = pipe.swap(*first, concept[:1], *other, concept[1:])
        draw("swap", swap_columns([name, other_name], first, other, swapped), highlight(concept))
        between = {f"weight {weight}": pipe.interpolate(*first, *other, weight) for weight in (0.25, 0.5, 0.75)}
        draw("interpolate", {name: first, **between, other_name: other})
        painted = {
            f"{name}, tokens of {other_name}": pipe.transfer(*first, tokens[1:]),
            f"{other_name}, tokens of {name}": pipe.transfer(*other, tokens[:1]),
        }
        draw("transfer", {name: first, other_name: other, **painted})


def main() -> None:
    with errors_in_a_sentence():
        edit(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
