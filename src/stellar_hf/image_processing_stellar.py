# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Image processor of STELLAR on torchvision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import TorchvisionBackend

# Diffusers loads a pipeline's image processor only if the module that defines it exposes this name.
from transformers.image_processing_utils import ImageProcessingMixin  # noqa: F401
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.utils import requires_backends

from .image_processing_pil_stellar import StellarImageProcessorMixin

# What Transformers calls this class in the `auto_map` of a folder that carries the code.
_REFERENCE = "image_processing_stellar.StellarImageProcessor"


class StellarImageProcessor(StellarImageProcessorMixin, TorchvisionBackend):  # type: ignore[misc]
    """Prepares images for STELLAR as `StellarImageProcessorPil` does, on torch tensors, also on an accelerator.

    Takes the same inputs. From 8-bit images it makes the same `pixel_values`, up to one of the 255 levels of a pixel.
    Images of equal size are processed together, on the device that a call names with `device`. Each backend loads
    what the other saved.

    Raises:
        ImportError: If torchvision is not installed.
    """

    def __init__(self, **kwargs):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def to_dict(self) -> dict:
        """The settings. Where they come with this code, they name that of the PIL backend too.

        So the Auto class takes the latter where torchvision is missing, or where it is asked to.
        """
        settings = super().to_dict()
        if settings.get("auto_map", {}).get("AutoImageProcessor") == _REFERENCE:
            backends = ["image_processing_pil_stellar.StellarImageProcessorPil", _REFERENCE]
            settings["auto_map"] = {**settings["auto_map"], "AutoImageProcessor": backends}
        return settings

    # The base classes' signatures differ from each other.
    def resize(self, image: Tensor, size: SizeDict, resample=None, **kwargs) -> Tensor:  # type: ignore[override]
        """Resizes (..., H, W); bicubic as PIL does it: one axis after the other, each rounded and clipped to 8 bits.

        The 8-bit kernel that torchvision calls has coarser weights, which cost up to two levels at high contrast.
        """
        if resample != PILImageResampling.BICUBIC or image.dtype != torch.uint8:
            return super().resize(image, size, resample=resample, **kwargs)
        height, width = super().resize(image.to("meta", torch.float32), size).shape[-2:]
        for step in (SizeDict(height=image.shape[-2], width=width), SizeDict(height=height, width=width)):
            image = super().resize(image.float(), step, resample=resample, **kwargs).round().clamp(0, 255)
        return image.to(torch.uint8)

    def center_crop(self, image: Tensor, size: SizeDict, **kwargs) -> Tensor:  # type: ignore[override]
        """Crops (..., H, W); the odd pixel of an edge that must grow comes first, where the PIL backend has it."""
        missing_height = max(size["height"] - image.shape[-2], 0)
        missing_width = max(size["width"] - image.shape[-1], 0)
        left, top = (missing_width + 1) // 2, (missing_height + 1) // 2
        padded = F.pad(image, (left, missing_width - left, top, missing_height - top))
        return super().center_crop(padded, size, **kwargs)


__all__ = ["StellarImageProcessor"]
