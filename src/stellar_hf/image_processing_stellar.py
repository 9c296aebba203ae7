# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Image processor of STELLAR on torchvision."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import TorchvisionBackend

# Diffusers loads a pipeline's image processor only if the module that defines it exposes this name.
from transformers.image_processing_utils import ImageProcessingMixin  # noqa: F401
from transformers.image_utils import SizeDict
from transformers.utils import requires_backends

from .image_processing_pil_stellar import StellarImageProcessorMixin


class StellarImageProcessor(StellarImageProcessorMixin, TorchvisionBackend):
    """Prepares images for STELLAR as `StellarImageProcessorPil` does, on torch tensors, also on an accelerator.

    Takes the same inputs and gives the same `pixel_values` up to one of 255 levels of a pixel; images of equal size
    are processed together, on the device that a call names with `device`. Each backend loads what the other saved.

    Raises:
        ImportError: If torchvision is not installed.
    """

    def __init__(self, **kwargs):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def center_crop(self, image: Tensor, size: SizeDict, **kwargs) -> Tensor:
        """Crops (..., H, W); the odd pixel of an edge that must grow comes first, where the PIL backend has it."""
        missing_height = max(size.height - image.shape[-2], 0)
        missing_width = max(size.width - image.shape[-1], 0)
        left, top = (missing_width + 1) // 2, (missing_height + 1) // 2
        padded = F.pad(image, (left, missing_width - left, top, missing_height - top))
        return super().center_crop(padded, size, **kwargs)


__all__ = ["StellarImageProcessor"]
