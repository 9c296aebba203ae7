# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Encodes images into a few sparse tokens, decodes them again, and draws the image, its reconstruction and the tokens.

    python examples/reconstruct.py                              # demo model, scikit-learn's two photographs
    python examples/reconstruct.py --images cat.jpg dog.png --grid_size 16 24
    python examples/reconstruct.py --pipeline_name_or_path stellar-base-16-pipeline --images cat.jpg

Each image gives NAME.png, its reconstruction in the image's size, and NAME-tokens.png, the figure. --save_pipeline
FOLDER also writes the pipeline, for StellarPipeline.from_pretrained.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor, HfArgumentParser
from transformers.utils import logging

import stellar_hf
from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline
from stellar_hf.data import images_to_tensor
from stellar_hf.data.photo_mosaics import photograph
from stellar_hf.evaluation import psnr
from stellar_hf.visualization import plot_reconstructions


@dataclass
class Arguments:
    """Which model, which images, and where the results go."""

    images: list[str] = field(
        default_factory=list, metadata={"help": "Image files; scikit-learn's two photographs by default."}
    )
    model_name_or_path: str = field(
        default=stellar_hf.DEMO_MODEL,
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
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output_dir = Path(args.output_dir)
    logging.disable_progress_bar()  # of loading models
    try:
        images = read_images(args.images)
        pipe = load_pipeline(args)
        if args.save_pipeline:
            pipe.save_pretrained(args.save_pipeline)
            print(f"Pipeline written to {args.save_pipeline}")
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            reconstruct(pipe, name, image, args.grid_size, output_dir)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


def read_images(files: list[str]) -> dict[str, Image.Image]:
    """Upright RGB images by the names of their files without suffix."""
    if not files:
        return {name: photograph(name) for name in ("china", "flower")}
    images = {}
    for file in files:
        name = Path(file).stem
        if name in images:
            raise ValueError(
                f"Two images are named {name}, but their results are written under their names: copy one."
            )
        try:
            images[name] = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"{file} cannot be read: unknown format.") from error
    return images


def load_pipeline(args: Arguments, device: torch.device | None = None) -> StellarPipeline:
    """On a device, by default the GPU, where there is one."""
    if args.pipeline_name_or_path:
        pipe = StellarPipeline.from_pretrained(args.pipeline_name_or_path)
    else:
        pipe = StellarPipeline(
            image_processor=load_image_processor(args.model_name_or_path),
            model=StellarForImageReconstruction.from_pretrained(args.model_name_or_path),
        )
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_image_processor(name: str):
    try:
        return AutoImageProcessor.from_pretrained(name)
    except ImportError:  # Transformers 5.17 has no AutoImageProcessor without torchvision
        return StellarImageProcessorPil.from_pretrained(name)


def reconstruct(
    pipe: StellarPipeline, name: str, image: Image.Image, grid_size: list[int] | None, output_dir: Path
) -> None:
    tokens, localization = pipe.encode(image, grid_size=grid_size)
    size = {"height": image.height, "width": image.width}
    output = pipe(sparse_tokens=tokens, localization=localization, grid_size=grid_size, **size)
    output.images[0].save(output_dir / f"{name}.png")
    figure = plot_reconstructions([image], output.images, localization, grid_size)
    figure.savefig(output_dir / f"{name}-tokens.png", dpi=300)
    pair = torch.stack(images_to_tensor([output.images[0], image])) / 255
    print(
        f"{name}: {image.width}x{image.height} pixels from {tokens.shape[1]} tokens of {tokens.shape[2]} numbers and "
        f"a map of {localization.shape[1]} patches, PSNR {psnr(pair[:1], pair[1:]).item():.1f} dB: "
        f"{output_dir / name}.png, {output_dir / name}-tokens.png"
    )


if __name__ == "__main__":
    main()
