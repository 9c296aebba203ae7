# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Antialiased bicubic resampling of a different crop of each image; on accelerators as two products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resampling_weights(start: Tensor, length: Tensor, input_size: int, output_size: int) -> Tensor:
    """Matrices that cut an interval out of a line of pixels and resize it.

    Keys' cubic convolution kernel (a = -0.5), widened by the factor of reduction; pixels outside of the interval never
    contribute. Equal to `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` of the cut interval.

    Args:
        start: First pixel of each interval, integers of shape (...).
        length: Number of pixels of each interval, at least 1, integers of shape (...).
        input_size: Number of pixels of the whole line; `start + length` must not exceed it.
        output_size: Number of pixels of the result.

    Returns:
        float32 tensor of shape (..., output_size, input_size) whose rows sum to one.
    """
    start, length = start.float()[..., None, None], length.float()[..., None, None]
    scale = length / output_size
    inputs = torch.arange(input_size, device=start.device) + 0.5 - start
    centers = (torch.arange(output_size, device=start.device)[:, None] + 0.5) * scale
    distance = (inputs - centers).abs() / scale.clamp(min=1.0)
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far)
    weights = weights.masked_fill_((distance >= 2) | (inputs < 0) | (inputs > length), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def crop_and_resize(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """Cuts one box out of each image and resizes it to a square by antialiased bicubic resampling.

    Args:
        images: (B, 3, H, W); float32 in [0, 1], or, on a CPU, uint8 in the memory format channels last. Crops of uint8
            take a quarter of the time; as in Pillow, they are rounded and cut off at [0, 255] after either direction.
        boxes: Integers of shape (B, 4): top, left, height, width of each box in pixels, inside of the image.
        size: Height and width of the result in pixels.
        flip: bool tensor of shape (B,): which results are mirrored horizontally.

    Returns:
        float32 tensor of shape (B, 3, size, size), cut off at [0, 1], which bicubic resampling may leave.
    """
    if images.device.type != "cpu":
        return _crop_and_resize_at_once(images, boxes, size, flip).clamp_(0, 1)
    crops = images.new_empty(len(images), images.shape[1], size, size)
    for index, ((top, left, height, width), mirrored) in enumerate(zip(boxes.tolist(), flip.tolist(), strict=True)):
        box = images[index : index + 1, :, top : top + height, left : left + width]
        crop = F.interpolate(box, size=(size, size), mode="bicubic", antialias=True)
        crops[index] = crop[0].flip(-1) if mirrored else crop[0]
    return crops.float().div_(255) if crops.dtype == torch.uint8 else crops.clamp_(0, 1)


def _crop_and_resize_at_once(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """The same in two matrix products for the whole batch: on an accelerator many small kernels would take longer."""
    batch, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.unbind(-1)
    rows = resampling_weights(top, box_height, height, size)
    columns = resampling_weights(left, box_width, width, size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    # Channels stand beside the columns, so that one matrix of a sample serves all of them without being repeated.
    lines = torch.bmm(rows, images.transpose(1, 2).reshape(batch, height, channels * width))
    crops = torch.bmm(lines.view(batch, size * channels, width), columns.transpose(1, 2))
    return crops.view(batch, size, channels, size).transpose(1, 2).contiguous()
