# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Changes of the colours of images, each by a strength of its own: jitter, grayscale and blur."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Of red, green and blue in the luminance of ITU-R BT.601.
_LUMINANCE = (0.299, 0.587, 0.114)


class ColorChanges(NamedTuple):
    """What happens to the colours of B images; every field has the shape (B,).

    Attributes:
        jittered: bool; whether brightness, contrast, saturation and hue change.
        gray: bool; whether the colours are lost.
        blurred: bool; whether the image is blurred.
        brightness: Factor of all values.
        contrast: Factor of the distance to the image's mean luminance.
        saturation: Factor of the distance to the pixel's luminance.
        hue: Turns of the colour circle.
        sigma: Standard deviation of the blur in pixels, positive.
    """

    jittered: Tensor
    gray: Tensor
    blurred: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    sigma: Tensor

    def of(self, part: slice) -> ColorChanges:
        """The changes of some of the images."""
        return ColorChanges(*(values[part] for values in self))


def change_colors_(images: Tensor, changes: ColorChanges, kernel_size: int) -> Tensor:
    """Changes the colours of some images in place, each change those that are drawn for it alone.

    Args:
        images: Floating-point tensor of shape (B, 3, H, W) with values in [0, 1].
        changes: What changes, on any device.
        kernel_size: Side of the blur's kernel in pixels, odd and below twice the images' sides.

    Returns:
        `images`, in [0, 1].
    """

    def change_(chosen: Tensor, change: Callable[..., Tensor], *strengths: Tensor) -> None:
        rows = chosen.nonzero().squeeze(1)
        if len(rows):
            there = rows.to(images.device)
            strengths = tuple(strength[rows].to(images.device) for strength in strengths)
            images.index_copy_(0, there, change(images.index_select(0, there), *strengths))

    change_(changes.jittered, jitter, changes.brightness, changes.contrast, changes.saturation, changes.hue)
    change_(changes.gray, to_gray)
    change_(changes.blurred, partial(gaussian_blur, kernel_size=kernel_size), changes.sigma)
    return images


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, each clipped to [0, 1], by strengths (B,)."""
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in (brightness, contrast, saturation))
    images = (images * brightness).clamp_(0, 1)
    mean = luminance(images).mean((-2, -1), keepdim=True)
    images.mul_(contrast).add_(mean.mul_(1 - contrast)).clamp_(0, 1)
    torch.lerp(luminance(images), images, saturation, out=images).clamp_(0, 1)
    return turn_hue(images, hue)


def luminance(images: Tensor) -> Tensor:
    """(B, 1, H, W) of (B, 3, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])


def to_gray(images: Tensor) -> Tensor:
    """The luminance as all three channels."""
    return luminance(images).expand_as(images)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the colour circle of HSV by `turns` (B,); saturation and value stay.

    As a function of the hue, a channel is a trapezoid between the pixel's lowest and highest channel, with ramps of a
    sixth of a turn. Moved by less than that, it is a sum of the three channels, which is linear on both ramps, cut off
    at the lowest and the highest. A whole sixth exchanges the channels, and mirrors them between these two.
    """
    sixths = -6 * turns
    whole = sixths.floor()
    rest = 1 - 2 * (sixths - whole)
    sign = 1 - 2 * (whole % 2)
    channel = torch.arange(3, device=images.device)
    steps = (channel - channel[:, None] - 2 * whole.long()[:, None, None]) % 3
    weights = torch.stack([torch.ones_like(rest), -rest, -torch.ones_like(rest)], dim=1) * sign[:, None]
    weights = weights[:, None].expand(-1, 3, -1).gather(2, steps)
    lowest, highest = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    turned = torch.bmm(weights, images.flatten(2)).view_as(images)
    turned.addcmul_(lowest + highest, ((1 + sign * rest) / 2).view(-1, 1, 1, 1))
    return torch.minimum(torch.maximum(turned, lowest, out=turned), highest, out=turned)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blurs images by kernels of `sigma` (B,) pixels, rows and columns one after the other; reflects at the rim."""
    reach = kernel_size // 2
    distance = torch.arange(-reach, reach + 1, device=images.device)
    kernel = (-(distance**2) / (2 * sigma.square()[:, None])).softmax(1)[..., None, None, None]
    for dim, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        size = images.shape[dim]
        padded = F.pad(images, padding, mode="reflect")
        # Sums of shifted images: no convolution is fast for few channels with a kernel each.
        images = padded.narrow(dim, 0, size) * kernel[:, 0]
        for shift in range(1, kernel_size):
            images.addcmul_(padded.narrow(dim, shift, size), kernel[:, shift])
    return images
