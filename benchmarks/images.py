# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Photographs for the benchmarks that read images."""

import io

from PIL import Image

from stellar_hf.data import PHOTOGRAPH_NAMES
from stellar_hf.data.photo_mosaics import photograph

IMAGENET_SIZE = (473, 405)  # the mean width and height of its training images


def photographs(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Photographs of one width and height."""
    several = [photograph(name).resize(size, Image.Resampling.BICUBIC) for name in PHOTOGRAPH_NAMES[:count]]
    return [several[index % len(several)] for index in range(count)]


def jpeg_rows(count: int) -> list[dict]:
    """Rows of a data set of JPEGs of ImageNet's mean size."""
    files = []
    for image in photographs(min(count, len(PHOTOGRAPH_NAMES)), IMAGENET_SIZE):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=90)
        files.append(file.getvalue())
    return [{"image": {"bytes": files[index % len(files)], "path": None}} for index in range(count)]
