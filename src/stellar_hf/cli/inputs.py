# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What commands on images read: the images themselves, and the pipeline that encodes and decodes them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from .. import StellarForImageReconstruction, StellarPipeline
from ..data import load_tabletop_scenes
from ..data.images import read_image
from ..data.photo_mosaics import photograph
from ..features import load_processor

# Of the validation split, with clear objects, whose boxes the edits take, in the pixels of the demo model.
SCENE, SCENE_SIZE = 20, 128


def read_images(files: Sequence[str]) -> dict[str, Image.Image]:
    """
    Reads images upright and in RGB.

    Args:
        files: Image files; a tabletop scene and a photograph if there are none.

    Returns:
        The images by the names of their files without suffix.

    Raises:
        ValueError: If a file cannot be read, or two have the same name.
    """
    if not files:
        scene = load_tabletop_scenes("validation", SCENE + 1, SCENE_SIZE)[SCENE]["image"]
        return {"scene": scene, "flower": ImageOps.fit(photograph("flower"), scene.size)}
    images: dict[str, Image.Image] = {}
    for file in files:
        name = Path(file).stem
        if name in images:
            raise ValueError(
                f"Two images are named {name}, but their results are written under their names: copy one."
            )
        images[name] = read_image(file)
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
            image_processor=load_processor(model_name_or_path),
            model=StellarForImageReconstruction.from_pretrained(model_name_or_path),
        )
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
