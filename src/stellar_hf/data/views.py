# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Random views of images for pre-training: crops, flips and colours as batched tensor operations, one draw a view."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
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
        self._check_at_least(1, "num_global_views", "global_size", "local_size", "blur_kernel_size")
        self._check_at_least(0, "num_local_views", "brightness", "contrast", "saturation", "hue")
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
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}, but three means and three positive "
                "standard deviations are expected, one for each of red, green and blue."
            )

    def _check_at_least(self, minimum: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least {minimum}.")

    def _check_at_most(self, maximum: float, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= maximum:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must lie in [0, {maximum}].")

    def _check_range(self, maximum: float, *names: str) -> None:
        for name in names:
            low, high = getattr(self, name)
            if not 0 < low <= high <= maximum:
                raise ValueError(
                    f"{name} is {(low, high)}, but (low, high) with 0 < low <= high <= {maximum} is expected."
                )

    def _check_kernel_fits(self, name: str) -> None:
        size = getattr(self, name)
        if size <= self.blur_kernel_size // 2:
            raise ValueError(
                f"{name} is {size}, too small for blur_kernel_size {self.blur_kernel_size}: choose an odd kernel size "
                f"below {2 * size}, or blur_probability 0."
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Makes the views of a batch of images of one size, on the device of the images.

        Args:
            images: Tensor of shape (B, 3, H, W), RGB; uint8 in [0, 255], or floating point in [0, 1].
            generator: Source of all random draws; torch's global CPU generator by default. It may live on another
                device than the images: a CPU generator gives the same views on every device.

        Returns:
            `pixel_values`, the clean view, (B, 3, global_size, global_size); `global_pixel_values`
            (B, num_global_views, 3, global_size, global_size), the first with the crop and flip of the clean view;
            and, if there are local views, `local_pixel_values` (B, num_local_views, 3, local_size, local_size).
            All are float32 and normalized.

        Raises:
            ValueError: If the images are not RGB or not in their range, such as images that are normalized already.
            ImportError: If kornia is not installed.
        """
        images = _to_unit_range(images)
        with torch.autocast(images.device.type, enabled=False):
            clean_view, *global_views = self._make_views(
                images, self.num_global_views, self.global_size, self.global_scale, generator, keep_clean=True
            )
            views = {"pixel_values": clean_view, "global_pixel_values": torch.stack(global_views, dim=1)}
            if self.num_local_views:
                local_views = self._make_views(
                    images, self.num_local_views, self.local_size, self.local_scale, generator
                )
                views["local_pixel_values"] = torch.stack(local_views, dim=1)
        return views

    def _make_views(
        self,
        images: Tensor,
        num_views: int,
        size: int,
        scale: tuple[float, float],
        generator: torch.Generator | None,
        keep_clean: bool = False,
    ) -> list[Tensor]:
        """Normalized views, (B, 3, size, size) each; with `keep_clean` the uncoloured first view comes before them."""
        device = generator.device if generator is not None else torch.device("cpu")

        def rand(*shape: int) -> Tensor:
            return torch.rand(len(images), *shape, generator=generator, device=device)

        views = []
        # One view of all images at a time bounds the memory, and adding views leaves the earlier ones as they were.
        for index in range(num_views):
            boxes = _random_boxes(rand, images.shape[-2], images.shape[-1], scale, self.ratio)
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


def _to_unit_range(images: Tensor) -> Tensor:
    """float32 images in [0, 1] of uint8 or floating-point ones."""
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


def _random_boxes(
    rand: Callable[..., Tensor], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels by the law of RandomResizedCrop."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * rand(_BOX_TRIES))
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * rand(_BOX_TRIES))
    heights = (area / aspect).sqrt().round().clamp(min=1)
    widths = (area * aspect).sqrt().round().clamp(min=1)
    first_fit = ((heights <= height) & (widths <= width)).int().argmax(1, keepdim=True)
    box_height = heights.gather(1, first_fit).squeeze(1).clamp(max=height)
    box_width = widths.gather(1, first_fit).squeeze(1).clamp(max=width)
    top = (rand() * (height - box_height + 1)).floor()
    left = (rand() * (width - box_width + 1)).floor()
    return torch.stack([top, left, box_height, box_width], dim=1).long()


def _import_kornia() -> tuple[Any, Any, Any]:
    try:
        from kornia import color, enhance, filters
    except ImportError as error:
        raise ImportError(
            'The colours of the views are changed by kornia, which is not installed: pip install "stellar_hf[train]"'
        ) from error
    return color, enhance, filters


@dataclass
class StellarViewCollator:
    """Turns examples with images into views; a `collate_fn` for DataLoader workers.

    Random draws come from torch's global generator, which a DataLoader seeds differently in each of its workers.

    Attributes:
        views: Settings of the views.
        image_column: Name of the column that holds the images, in a form that `images_to_tensor` takes.
    """

    views: StellarViews
    image_column: str = "image"

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes the views of one batch; images of different sizes may stand side by side.

        Args:
            examples: Rows of a dataset.

        Returns:
            The tensors of `StellarViews.__call__` in the order of the examples, and nothing else.

        Raises:
            ValueError: If there is no example, the image column is missing, or an image cannot be read.
        """
        if not examples:
            raise ValueError("The batch has no examples, but at least 1 is needed.")
        for example in examples:
            if self.image_column not in example:
                raise ValueError(
                    f"There is no column {self.image_column!r}, only {', '.join(map(repr, example))}: "
                    "set image_column to the one that holds the images."
                )
        images = images_to_tensor([example[self.image_column] for example in examples])
        rows_of_size: dict[torch.Size, list[int]] = {}
        for row, image in enumerate(images):
            rows_of_size.setdefault(image.shape, []).append(row)
        groups = [self.views(torch.stack([images[row] for row in rows])) for rows in rows_of_size.values()]
        position = torch.tensor([row for rows in rows_of_size.values() for row in rows]).argsort()
        return {name: torch.cat([group[name] for group in groups])[position] for name in groups[0]}


def images_to_tensor(images: Sequence[Any]) -> list[Tensor]:
    """Reads images as RGB, upright according to their EXIF orientation.

    Args:
        images: PIL images of any 8-bit mode, uint8 arrays of shape (H, W) or (H, W, C) with 1, 3 or 4 channels, or
            undecoded images of a dataset (dictionaries with `bytes` or `path`).

    Returns:
        One uint8 tensor of shape (3, H, W) for each image.

    Raises:
        ValueError: If an image cannot be decoded or is of another type; names its file, or its place in the batch.
    """
    return [_image_to_tensor(image, index) for index, image in enumerate(images)]


def _image_to_tensor(image: Any, index: int) -> Tensor:
    name = f"Image {index} of the batch"
    if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
        if image.get("path"):
            name += f" ({image['path']})"
        image = _decode(lambda: Image.open(io.BytesIO(image.get("bytes") or Path(image["path"]).read_bytes())), name)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = _array_to_image(image, name)
    elif isinstance(image, Image.Image):
        file = getattr(image, "filename", None)
        if file:
            name += f" ({file})"
    else:
        raise ValueError(
            f"{name} is {_describe(image)}, but a PIL image, or a uint8 array of shape (height, width, channels), is "
            "expected."
        )
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has the mode {image.mode!r} of more than 8 bits: convert it to 8 bits a channel.")
    rgb = _decode(lambda: ImageOps.exif_transpose(image).convert("RGB"), name)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _array_to_image(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"{name} has the shape {array.shape}, but (height, width, 1, 3 or 4 channels) is expected.")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def _decode(read: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return read()
    except UnidentifiedImageError as error:  # its own message shows a Python object in place of the file
        raise ValueError(f"{name} cannot be read: unknown format. Replace the file, or leave it out.") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Replace the file, or leave it out.") from error


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"
