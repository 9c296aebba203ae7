# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The targets of a model that reconstructs codes: what the frozen tokenizer makes of the clean view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..pipelines import MaskGitVQModel


@torch.no_grad()
def code_labels(vq_model: MaskGitVQModel, images: Tensor, patch_size: int) -> Tensor:
    """
    One code for each patch of images (STELLAR, decoder with the code head).

    Where a patch is not as large as a code, as with ViT-H/14, the images are resized so that the tokenizer's grid is
    that of the patches: bicubic, not antialiased, not clamped, which decides about codes.

    Args:
        vq_model: The frozen tokenizer.
        images: (B, 3, H, W), RGB in [0, 1]; pixels beyond the last whole patch do not count.
        patch_size: Side of a patch in pixels.

    Returns:
        (B, N) int64, row by row over the patches.
    """
    height, width = (side // patch_size for side in images.shape[-2:])
    images = images[..., : height * patch_size, : width * patch_size]
    factor = vq_model.downsample_factor
    if patch_size != factor:
        size = (height * factor, width * factor)
        images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    with torch.autocast(images.device.type, enabled=False):
        return vq_model.encode(images.to(vq_model.dtype)).codes
