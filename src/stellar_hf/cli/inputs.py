# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What commands on images read: the images themselves, and the pipeline that encodes and decodes them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor

from .. import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline
from ..data.photo_mosaics import photograph


def read_images(files: Sequence[str]) -> dict[str, Image.Image]:
    """
    Reads images upright and in RGB.

    Args:
        files: Image files; scikit-learn's two photographs if there are none.

    Returns:
        The images by the names of their files without suffix.

    Raises:
        ValueError: If a file cannot be read, or two have the same name.
    """
    if not files:
        return {name: photograph(name) for name in ("china", "flower")}
    images: dict[str, Image.Image] = {}
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


def load_pipeline(
    model_name_or_path: str, pipeline_name_or_path: str | None = None, device: torch.device | str | None = None
) -> StellarPipeline:
    """
    Loads a pipeline, or makes one of a model that reconstructs pixels.

    Args:
        model_name_or_path: The model: a folder, or owner/name on the Hub.
        pipeline_name_or_path: In place of the model, a pipeline.
        device: By default the GPU, where there is one.
    """
    if pipeline_name_or_path:
        pipe = StellarPipeline.from_pretrained(pipeline_name_or_path)
    else:
        pipe = StellarPipeline(
            image_processor=_load_image_processor(model_name_or_path),
            model=StellarForImageReconstruction.from_pretrained(model_name_or_path),
        )
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _load_image_processor(name: str):
    try:
        return AutoImageProcessor.from_pretrained(name)
    except ImportError:  # Transformers 5.17 has no AutoImageProcessor without torchvision
        return StellarImageProcessorPil.from_pretrained(name)
