# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Random views of images for pre-training: crops, flips and colours as batched tensor operations, one draw a view."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .resampling import crop_and_resize

# As torchvision's RandomResizedCrop: so many boxes are drawn, and the first that fits into the image is taken.
_BOX_TRIES = 10


@dataclass(frozen=True)
class StellarViews:
    """Makes the clean, global and local views of a batch of images (STELLAR, arXiv 2602.01905).

    Every view has its own crop, flip and colours. Crops follow the law of RandomResizedCrop (area uniform in the
    scale, logarithm of the aspect ratio uniform), resized by antialiased bicubic resampling. Colours change in a fixed
    order: brightness, contrast, saturation, hue, grayscale, blur. The first global view without the change of colours
    is the clean view. Normalization is the last step, once.

    Attributes:
        num_global_views: Global views of an image, at least 1.
        num_local_views: Local views of an image; may be 0.
        global_size: Height and width of a global view in pixels.
        local_size: Height and width of a local view in pixels.
        global_scale: Range of a global view's share of the image's area, in (0, 1].
        local_scale: Range of a local view's share of the image's area, in (0, 1].
        ratio: Range of the crops' aspect ratio, width over height.
        flip: Probability of a horizontal flip.
        brightness: Factors of brightness are uniform in [1 - brightness, 1 + brightness].
        contrast: The same for contrast.
        saturation: The same for saturation.
        hue: Shifts of hue are uniform in [-hue, hue] turns of the colour circle, at most 0.5.
        jitter_probability: Probability of the four changes above, all together.
        grayscale_probability: Probability that a view loses its colours.
        blur_probability: Probability of a Gaussian blur.
        blur_kernel_size: Side of the blur's kernel in pixels, odd.
        blur_sigma: Range of the blur's standard deviation in pixels.
        image_mean: Means of the channels that normalization subtracts, for values in [0, 1].
        image_std: Standard deviations of the channels that normalization divides by.

    Raises:
        ValueError: If a setting is out of its range.
    """

    num_global_views: int = 8
    num_local_views: int = 8
    global_size: int = 224
    local_size: int = 96
    global_scale: tuple[float, float] = (0.36, 1.0)
    local_scale: tuple[float, float] = (0.06, 0.36)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_kernel_size: int = 9
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        self._check_whole(1, "num_global_views", "global_size", "local_size", "blur_kernel_size")
        self._check_whole(0, "num_local_views")
        self._check_at_most(1, "flip", "jitter_probability", "grayscale_probability", "blur_probability")
        self._check_at_most(1, "brightness", "contrast", "saturation")
        self._check_at_most(0.5, "hue")
        self._check_range(1, "global_scale", "local_scale")
        self._check_range(math.inf, "ratio", "blur_sigma")
        if self.blur_kernel_size % 2 == 0:
            raise ValueError(f"blur_kernel_size is {self.blur_kernel_size}, but it must be odd.")
        if self.blur_probability > 0:
            self._check_kernel_fits("global_size")
            if self.num_local_views:
                self._check_kernel_fits("local_size")
        mean, std = self.image_mean, self.image_std
        if not _are_numbers(mean, 3) or not _are_numbers(std, 3) or min(std) <= 0:
            raise ValueError(
                f"image_mean is {mean} and image_std {std}, but three means and three positive standard deviations "
                "are expected, one for each of red, green and blue."
            )

    @property
    def decode_size(self) -> int:
        """The short side in pixels from which no view is enlarged: the smallest crop still has the view's size."""
        aspect = min(self.ratio[0], 1 / self.ratio[1])
        crops = [(self.global_size, self.global_scale[0])]
        if self.num_local_views:
            crops.append((self.local_size, self.local_scale[0]))
        # A square image has the least area: its crop of share s has sides sqrt(s * aspect) and sqrt(s / aspect).
        return max(math.ceil(size / math.sqrt(scale * aspect)) for size, scale in crops)

    def _check_whole(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < minimum:
                raise ValueError(f"{name} is {value!r}, but it must be a whole number, at least {minimum}.")

    def _check_at_most(self, maximum: float, *names: str) -> None:
        for name in names:
            value: Any = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) <= maximum:
                raise ValueError(f"{name} is {value!r}, but it must be a number in [0, {maximum}].")

    def _check_range(self, maximum: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not _are_numbers(value, 2) or not 0 < value[0] <= value[1] <= maximum:
                limit = "" if maximum == math.inf else f" <= {maximum}"
                raise ValueError(f"{name} is {value!r}, but (low, high) with 0 < low <= high{limit} is expected.")

    def _check_kernel_fits(self, name: str) -> None:
        size = getattr(self, name)
        if size <= self.blur_kernel_size // 2:
            raise ValueError(
                f"{name} is {size}, too small for blur_kernel_size {self.blur_kernel_size}: choose an odd kernel size "
                f"below {2 * size}, or blur_probability 0."
            )

    @torch.no_grad()
    def __call__(
        self, images: Tensor, image_sizes: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Makes the views of a batch of images, on the device of the images.

        Args:
            images: Tensor of shape (B, 3, H, W), RGB; uint8 in [0, 255], or floating point in [0, 1].
            image_sizes: Height and width of each image, (B, 2) integers, where images of different sizes stand in the
                upper left corners of a batch; H and W by default.
            generator: Source of all random draws; torch's global CPU generator by default. It may live on another
                device than the images: a CPU generator gives the same views on every device.

        Returns:
            `pixel_values`, the clean view, (B, 3, global_size, global_size); `global_pixel_values`
            (B, num_global_views, 3, global_size, global_size), the first with the crop and flip of the clean view;
            and, if there are local views, `local_pixel_values` (B, num_local_views, 3, local_size, local_size).
            All are float32 and normalized.

        Raises:
            ValueError: If the images are not RGB or not in their range, such as images that are normalized already,
                or if their sizes do not fit.
            ImportError: If kornia is not installed.
        """
        images = _to_unit_range(images)
        sizes = _checked_sizes(image_sizes, images)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator is a {type(generator).__name__}, but a torch.Generator is expected.")
        with torch.autocast(images.device.type, enabled=False):
            clean_view, *global_views = self._make_views(
                images, sizes, self.num_global_views, self.global_size, self.global_scale, generator, keep_clean=True
            )
            views = {"pixel_values": clean_view, "global_pixel_values": torch.stack(global_views, dim=1)}
            if self.num_local_views:
                local_views = self._make_views(
                    images, sizes, self.num_local_views, self.local_size, self.local_scale, generator
                )
                views["local_pixel_values"] = torch.stack(local_views, dim=1)
        return views

    def _make_views(
        self,
        images: Tensor,
        sizes: Tensor,
        num_views: int,
        size: int,
        scale: tuple[float, float],
        generator: torch.Generator | None,
        keep_clean: bool = False,
    ) -> list[Tensor]:
        """Normalized views, (B, 3, size, size) each; with `keep_clean` the uncoloured first view comes before them."""
        device = generator.device if generator is not None else torch.device("cpu")
        sizes = sizes.to(device)

        def rand(*shape: int) -> Tensor:
            return torch.rand(len(images), *shape, generator=generator, device=device)

        views = []
        # One view of all images at a time bounds the memory, and adding views leaves the earlier ones as they were.
        for index in range(num_views):
            boxes = random_boxes(rand, sizes, scale, self.ratio)
            flip = rand() < self.flip
            crops = crop_and_resize(images, boxes.to(images.device), size, flip.to(images.device)).clamp_(0, 1)
            if keep_clean and index == 0:
                views.append(self._normalize(crops))
            views.append(self._normalize(self._change_colors(crops, rand)))
        return views

    def _change_colors(self, views: Tensor, rand: Callable[..., Tensor]) -> Tensor:
        """Jitter, grayscale and blur of (B, 3, S, S) views in [0, 1], each applied to the views drawn for it alone."""
        color, enhance, filters = _import_kornia()

        def choose(probability: float) -> Tensor:
            return (rand() < probability).nonzero().squeeze(1)

        def symmetric(spread: float) -> Tensor:
            return spread * (2 * rand() - 1)

        jittered, gray, blurred = (
            choose(probability)
            for probability in (self.jitter_probability, self.grayscale_probability, self.blur_probability)
        )
        brightness = 1 + symmetric(self.brightness)
        contrast = 1 + symmetric(self.contrast)
        saturation = 1 + symmetric(self.saturation)
        hue = 2 * math.pi * symmetric(self.hue)
        sigma = self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * rand()

        def pick(factors: Tensor, chosen: Tensor) -> Tensor:
            return factors[chosen].to(views.device)

        views = views.clone()
        if len(jittered):
            index = jittered.to(views.device)
            part = enhance.adjust_brightness_accumulative(views[index], pick(brightness, jittered))
            part = enhance.adjust_contrast_with_mean_subtraction(part, pick(contrast, jittered))
            part = enhance.adjust_saturation_with_gray_subtraction(part, pick(saturation, jittered))
            views[index] = enhance.adjust_hue(part, pick(hue, jittered))
        if len(gray):
            index = gray.to(views.device)
            views[index] = color.rgb_to_grayscale(views[index]).expand(-1, 3, -1, -1)
        if len(blurred):
            index = blurred.to(views.device)
            deviation = pick(sigma, blurred)[:, None].expand(-1, 2)
            views[index] = filters.gaussian_blur2d(views[index], self.blur_kernel_size, deviation)
        return views

    def _normalize(self, views: Tensor) -> Tensor:
        mean, std = (views.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return (views - mean) / std


def _are_numbers(values: Any, count: int) -> bool:
    """Whether they are so many, all finite."""
    return (
        isinstance(values, (tuple, list))
        and len(values) == count
        and all(isinstance(value, Real) and math.isfinite(value) for value in values)
    )


def _to_unit_range(images: Tensor) -> Tensor:
    """float32 images in [0, 1] of uint8 or floating-point ones."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"The images are a {type(images).__name__}, but a tensor (batch, 3, height, width) is expected: "
            "StellarCollator makes one of images of any kind."
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"The images have shape {tuple(images.shape)}, but (batch, 3, height, width) is expected.")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"The images are {images.dtype}, but uint8 or a floating-point type is expected.")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"The images' values lie in [{low.item():.4g}, {high.item():.4g}], but [0, 1] is expected: give raw "
            "images, the views normalize them."
        )
    return images.float()


def _checked_sizes(image_sizes: Tensor | None, images: Tensor) -> Tensor:
    """Heights and widths (B, 2) of the images in a batch."""
    full_size = torch.tensor(images.shape[-2:])
    if image_sizes is None:
        return full_size.expand(len(images), 2)
    if not isinstance(image_sizes, Tensor) or image_sizes.is_floating_point() or image_sizes.is_complex():
        raise ValueError(f"image_sizes are {image_sizes!r}, but a tensor of integers (batch, 2) is expected.")
    image_sizes = image_sizes.cpu()
    if image_sizes.shape != (len(images), 2) or not ((image_sizes >= 1) & (image_sizes <= full_size)).all():
        raise ValueError(
            f"image_sizes are {image_sizes.tolist()}, but a height and a width of at least 1 and at most "
            f"{tuple(full_size.tolist())} are expected for each of the {len(images)} images."
        )
    return image_sizes


def random_boxes(
    rand: Callable[..., Tensor], sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes of random crops by the law of RandomResizedCrop.

    Args:
        rand: Draws numbers (B, *shape) in [0, 1), given the shape.
        sizes: (B, 2) integers; height and width of each image.
        scale: Least and largest share of the image's area.
        ratio: Least and largest ratio of width to height.

    Returns:
        (B, 4) int64; top, left, height and width, in pixels.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * rand(_BOX_TRIES))
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * rand(_BOX_TRIES))
    heights = (area / aspect).sqrt().round().clamp(min=1)
    widths = (area * aspect).sqrt().round().clamp(min=1)
    first_fit = ((heights <= height) & (widths <= width)).int().argmax(1, keepdim=True)
    box_height = heights.gather(1, first_fit).minimum(height)
    box_width = widths.gather(1, first_fit).minimum(width)
    top = (rand(1) * (height - box_height + 1)).floor()
    left = (rand(1) * (width - box_width + 1)).floor()
    return torch.cat([top, left, box_height, box_width], dim=1).long()


def _import_kornia() -> tuple[Any, Any, Any]:
    try:
        from kornia import color, enhance, filters
    except ImportError as error:
        raise ImportError(
            'The colours of the views are changed by kornia, which is not installed: pip install "stellar_hf[train]"'
        ) from error
    return color, enhance, filters
