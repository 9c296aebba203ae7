# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Images to a few sparse tokens and back, with a pipeline of Diffusers. As a command: stellar-hf reconstruct.

    python examples/reconstruct.py                              # demo model, a tabletop scene and a photograph
    python examples/reconstruct.py --images cat.jpg dog.png --grid_size 16 24
    python examples/reconstruct.py --pipeline_name_or_path stellar-base-16-pipeline --images cat.jpg
"""

import sys

from stellar_hf.cli.inputs import load_pipeline, read_images
from stellar_hf.cli.process import errors_in_a_sentence
from stellar_hf.cli.reconstruct import ReconstructionArguments, parse_arguments, save_reconstruction


def reconstruct(args: ReconstructionArguments) -> None:
    images = read_images(args.images)
    pipe = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path)  # a StellarPipeline
    if args.save_pipeline:
        pipe.save_pretrained(args.save_pipeline)

    for name, image in images.items():
        # What is in the image, (1, r, d), and where, (1, N, r): edit them, mix them, or keep them instead of pixels.
        tokens, localization = pipe.encode(image, grid_size=args.grid_size)
        output = pipe(
            sparse_tokens=tokens,
            localization=localization,
            grid_size=args.grid_size,
            height=image.height,
            width=image.width,
        )
        save_reconstruction(args, name, image, output.images[0], tokens, localization)


def main() -> None:
    with errors_in_a_sentence():
        reconstruct(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
