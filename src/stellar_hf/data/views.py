# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Random views of images for pre-training: crops, flips and colours as batched tensor operations, one draw a view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .colors import ColorChanges, change_colors_
from .resampling import crop_and_resize

# As torchvision's RandomResizedCrop: so many boxes are drawn, and the first that fits into the image is taken.
_BOX_TRIES = 10

# float32 values that are worked on at a time, 2 MB: the many tensors of a large batch would leave the cache, and take
# fresh memory from the system.
_CACHED_VALUES = 2**19


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
            images: Tensor of shape (B, 3, H, W), RGB; uint8 in [0, 255], or floating point in [0, 1]. On a CPU, crops
                of uint8 are rounded to whole levels after either direction of resizing, as in Pillow; those of
                floating-point images are not, and none on accelerators.
            image_sizes: Height and width of each image, (B, 2) integers, where images of different sizes stand in the
                upper left corners of a batch; H and W by default.
            generator: Source of all random draws; torch's global CPU generator by default. It may live on another
                device than the images: a CPU generator gives the same views on every device, but for that rounding.

        Returns:
            `pixel_values`, the clean view, (B, 3, global_size, global_size); `global_pixel_values`
            (B, num_global_views, 3, global_size, global_size), the first with the crop and flip of the clean view;
            and, if there are local views, `local_pixel_values` (B, num_local_views, 3, local_size, local_size).
            All are float32 and normalized.

        Raises:
            ValueError: If the images are not RGB or not in their range, such as images that are normalized already,
                or if their sizes do not fit.
        """
        images = _checked_images(images)
        sizes = _checked_sizes(image_sizes, images)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator is a {type(generator).__name__}, but a torch.Generator is expected.")
        with torch.autocast(images.device.type, enabled=False):
            clean = _empty_views(images, 1, self.global_size)[:, 0]
            views = {"pixel_values": clean}
            views["global_pixel_values"] = _empty_views(images, self.num_global_views, self.global_size)
            self._make(views["global_pixel_values"], images, sizes, self.global_scale, generator, clean)
            if self.num_local_views:
                views["local_pixel_values"] = _empty_views(images, self.num_local_views, self.local_size)
                self._make(views["local_pixel_values"], images, sizes, self.local_scale, generator)
        return views

    def _make(
        self,
        views: Tensor,
        images: Tensor,
        sizes: Tensor,
        scale: tuple[float, float],
        generator: torch.Generator | None,
        clean_view: Tensor | None = None,
    ) -> None:
        """Fills `views` (B, V, 3, S, S), and `clean_view` (B, 3, S, S) with the first of them in its own colours."""
        device = generator.device if generator is not None else torch.device("cpu")
        sizes = sizes.to(device)

        def rand(*shape: int) -> Tensor:
            return torch.rand(len(images), *shape, generator=generator, device=device)

        mean, std = (views.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        # One view of all images after the other: adding views leaves the earlier ones as they were.
        for index, view in enumerate(views.unbind(1)):
            boxes = random_boxes(rand, sizes, scale, self.ratio).to(images.device)
            flip = (rand() < self.flip).to(images.device)
            changes = self._draw_changes(rand)
            for part in _parts(view):
                crops = crop_and_resize(images[part], boxes[part], view.shape[-1], flip[part])
                if clean_view is not None and index == 0:
                    torch.sub(crops, mean, out=clean_view[part]).div_(std)
                change_colors_(crops, changes.of(part), self.blur_kernel_size)
                torch.sub(crops, mean, out=view[part]).div_(std)

    def _draw_changes(self, rand: Callable[..., Tensor]) -> ColorChanges:
        def symmetric(spread: float) -> Tensor:
            return spread * (2 * rand() - 1)

        low, high = self.blur_sigma
        return ColorChanges(
            jittered=rand() < self.jitter_probability,
            gray=rand() < self.grayscale_probability,
            blurred=rand() < self.blur_probability,
            brightness=1 + symmetric(self.brightness),
            contrast=1 + symmetric(self.contrast),
            saturation=1 + symmetric(self.saturation),
            hue=symmetric(self.hue),
            sigma=low + (high - low) * rand(),
        )


def _empty_views(images: Tensor, num_views: int, size: int) -> Tensor:
    return torch.empty(len(images), num_views, 3, size, size, device=images.device)


def _parts(views: Tensor) -> Iterator[slice]:
    """Cuts a batch into parts that stay in a core's cache while changes pass over them; none on accelerators."""
    step = max(_CACHED_VALUES // views[0].numel(), 1) if views.device.type == "cpu" else len(views)
    return (slice(start, start + step) for start in range(0, len(views), step))


def _are_numbers(values: Any, count: int) -> bool:
    """Whether they are so many, all finite."""
    return (
        isinstance(values, (tuple, list))
        and len(values) == count
        and all(isinstance(value, Real) and math.isfinite(value) for value in values)
    )


def _checked_images(images: Tensor) -> Tensor:
    """Images as [`crop_and_resize`] takes them."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"The images are a {type(images).__name__}, but a tensor (batch, 3, height, width) is expected: "
            "StellarCollator makes one of images of any kind."
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"The images have shape {tuple(images.shape)}, but (batch, 3, height, width) is expected.")
    if images.dtype == torch.uint8:
        if images.device.type == "cpu":
            return images.contiguous(memory_format=torch.channels_last)
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
