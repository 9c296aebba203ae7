# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Image processor of STELLAR on PIL and NumPy, and for all backends the way back to the original image's pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

# Diffusers loads a pipeline's image processor only if the module that defines it exposes this name.
from transformers.image_processing_utils import ImageProcessingMixin  # noqa: F401
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import ModelOutput

from .localization_stellar import token_maps

if TYPE_CHECKING:
    from .configuration_stellar import StellarConfig

WHITE = (255, 255, 255)


def to_rgb(image: Image.Image, background: Sequence[int] = WHITE) -> Image.Image:
    """
    An image of any mode as 8-bit RGB: the one conversion that image processors, training and pipelines share.

    16-bit gray is scaled to 8 bits. Mode `I`, of 32 bits, is taken for 8-bit gray if no value is above 255, and for
    16-bit gray otherwise. Transparent pixels, of an alpha channel or a palette, are composited on the background. The
    orientation in EXIF is not applied.

    Args:
        image: PIL image of any mode but `F`.
        background: Red, green and blue behind transparent pixels, integers in [0, 255].

    Returns:
        A new image of mode `RGB` and the same size.

    Raises:
        ValueError: If the image is none, has no pixels, or holds floating-point ones or integers of more than 16 bits,
            whose range is not known; or if the background is no colour.
    """
    check_background(background)
    if not isinstance(image, Image.Image):
        raise ValueError(f"The image is a {type(image).__name__}, but a PIL image is expected.")
    if 0 in image.size:
        raise ValueError(f"The image has no pixels: it is {image.width} wide and {image.height} high.")
    if image.mode == "F":
        raise ValueError(
            "The image has floating-point pixels, whose range is not known: convert it to 8 bits a channel."
        )
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # premultiplied; Pillow converts it to LA alone
        image = image.convert("LA")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def check_background(background: Sequence[int]) -> None:
    """`ValueError` for what is no colour of three integers in [0, 255]."""
    is_color = isinstance(background, (tuple, list)) and len(background) == 3
    if not is_color or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
        raise ValueError(
            f"background is {background!r}, but red, green and blue are expected, three integers in [0, 255]."
        )


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits as mode `L`, or `LA` if one of its values stands for transparency."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(
            f"The image has pixels from {low} to {high}, but gray of 8 bits, up to 255, or of 16, up to 65535, is "
            "expected: convert it."
        )
    is_8_bits = image.mode == "I" and high <= 255
    gray = Image.fromarray((values if is_8_bits else values // 257).astype(np.uint8))
    transparency = image.info.get("transparency")
    if isinstance(transparency, int):
        gray.putalpha(Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8)))
    return gray


class StellarImageProcessorKwargs(ImagesKwargs, total=False):
    """
    What a call of the processors takes besides the settings of every image processor.

    Attributes:
        background: Red, green and blue behind transparent pixels, integers in [0, 255].
    """

    background: list[int] | tuple[int, int, int] | None


class StellarImageProcessorMixin:
    """What the processors of all backends share: the default settings, the conversion to RGB, and outputs in the
    original image's frame."""

    valid_kwargs = StellarImageProcessorKwargs
    background = list(WHITE)
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(
        self,
        image: Image.Image | np.ndarray | Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        background: Sequence[int] | None = None,
        **kwargs,
    ) -> np.ndarray | Tensor:
        """
        Brings one image into the backend's form, channels first; with `do_convert_rgb` by [`to_rgb`].

        Args:
            image: PIL image, array or tensor.
            do_convert_rgb: Whether PIL images, and arrays of 1 or 4 channels of uint8, become RGB.
            input_data_format: Place of the channels in arrays; found by their number where it is `None`.
            background: Red, green and blue behind transparent pixels; white where it is `None`.
            **kwargs: Of the backend.

        Returns:
            Array or tensor of shape (C, H, W), C = 3 with `do_convert_rgb`.

        Raises:
            ValueError: If the image has no pixels, another number of channels, or pixels that [`to_rgb`] refuses.
        """
        if do_convert_rgb:
            background = WHITE if background is None else background
            if isinstance(image, Image.Image):
                image, input_data_format = to_rgb(image, background), None
            elif image.ndim == 3 and str(image.dtype).endswith("uint8"):
                image, input_data_format = _array_to_rgb(image, input_data_format, background)
        pixels = super().process_image(  # type: ignore[misc]
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **kwargs
        )
        if 0 in pixels.shape or (do_convert_rgb and pixels.shape[0] != 3):
            raise ValueError(
                f"An image has {pixels.shape[0]} channels and {pixels.shape[1]}x{pixels.shape[2]} pixels, but 1, 3 or "
                "4 channels and at least one pixel are expected."
            )
        return pixels

    def _preprocess(self, images: list, **kwargs):
        if not images:
            raise ValueError("There is no image in the batch, but at least one is needed.")
        _check_settings(kwargs, num_channels=images[0].shape[0])
        return super()._preprocess(images, **kwargs)  # type: ignore[misc]

    def post_process_localization(
        self, outputs: ModelOutput, target_sizes: Sequence[tuple[int, int]] | Tensor | None = None
    ) -> list[Tensor]:
        """Turns the localization matrix L (STELLAR, arXiv 2602.01905) into one map per token over the original image.

        A pixel inside the centre crop takes the bilinear mixture (`align_corners=False`) of the patches around it, so
        that the r maps sum to 1 there; what the crop cut away is 0. Resize and crop are undone with the settings of
        this processor, not with those of a single call.

        Args:
            outputs: Model output with `localization` of shape (B, N, r) and optionally `grid_size`, the patch grid
                with h * w = N as int64 (B, 2) or (h, w); without it the grid is taken to be square. The grid is taken
                to tile the whole processed image.
            target_sizes: Height and width in pixels of each original image, B pairs or an integer tensor of shape
                (B, 2). `None` leaves the maps on the patch grid of the processed image.

        Returns:
            B float32 tensors of shape (r, H, W) with values in [0, 1], or (r, h, w) without `target_sizes`.

        Raises:
            ValueError: If `outputs` has no localization, the grid does not hold N patches, `target_sizes` are not B
                pairs of positive numbers, or `size` is neither a shortest edge nor a height and width.
        """
        grids = _localization_on_grid(outputs)
        if target_sizes is None:
            return list(grids)
        sizes = _checked_target_sizes(target_sizes, len(grids))
        return [
            self._localization_on_image(maps, height, width)
            for maps, (height, width) in zip(grids, sizes, strict=True)
        ]

    def post_process_semantic_segmentation(
        self,
        outputs: ModelOutput,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
        ignore_index: int | None = None,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turns the logits of semantic segmentation into one map of classes per original image.

        A pixel inside the centre crop takes the largest of the bilinearly mixed logits around it
        (`align_corners=False`). The model has not seen what the crop cut away: a pixel there takes the class of the
        nearest pixel that was seen, or `ignore_index` if one is given. A processor with
        `do_center_crop=False, size={"height": 224, "width": 224}`, with the size of the model's training, shows the
        model the whole image instead. Resize and crop are undone with the settings of this processor, not with those
        of a single call.

        Args:
            outputs: Model output with `logits` of shape (B, num_labels, h, w). They are taken to tile the whole
                processed image.
            target_sizes: Height and width in pixels of each original image, B pairs or an integer tensor of shape
                (B, 2). `None` leaves the maps in the resolution of the logits.
            return_segmentation_scores: Whether to return the mixed logits with the map that is their largest.
            ignore_index: Label of the pixels outside of the crop, no class of the model: for a measure that leaves
                them out, as the 255 of many annotations. The image-segmentation pipeline needs a class everywhere.

        Returns:
            B int64 tensors of shape (H, W), or (h, w) without `target_sizes`. With `return_segmentation_scores` each
            is the `segmentation` of an output that also has `segmentation_scores`, a float32 tensor of shape
            (num_labels, H, W), or (num_labels, h, w): the logits; with an `ignore_index`, 0 for every class outside
            of the crop.

        Raises:
            ValueError: If `outputs` has no logits of four dimensions, `target_sizes` are not B pairs of positive
                numbers, `size` is neither a shortest edge nor a height and width, or `ignore_index` is one of the
                model's classes.
        """
        logits = _checked_logits(outputs)
        if ignore_index is not None and 0 <= ignore_index < logits.shape[1]:
            raise ValueError(
                f"ignore_index is {ignore_index}, a class of the {logits.shape[1]} that the logits have: pass a "
                "label that is none, such as -100."
            )
        sizes = [None] * len(logits) if target_sizes is None else _checked_target_sizes(target_sizes, len(logits))
        results: list = []
        for image_logits, size in zip(logits, sizes, strict=True):
            result = self._segmentation_on_image(image_logits, size, ignore_index)
            results.append(result if return_segmentation_scores else result.segmentation)
        return results

    def _localization_on_image(self, maps: Tensor, height: int, width: int) -> Tensor:
        sampled, in_crop = self._sampled_on_image(maps, height, width)
        return sampled * in_crop

    def _segmentation_on_image(
        self, logits: Tensor, size: list[int] | None, ignore_index: int | None
    ) -> SemanticSegmentationPostProcessorOutput:
        if size is None:
            return _segmentation(logits.argmax(dim=0), logits)
        scores, in_crop = self._sampled_on_image(logits, *size)
        classes = scores.argmax(dim=0)
        if ignore_index is None:
            return _segmentation(classes, scores)
        return _segmentation(classes.masked_fill(~in_crop, ignore_index), scores.masked_fill(~in_crop, 0))

    def _sampled_on_image(self, maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Samples (C, h, w) maps of the processed image at every pixel of the original one.

        Returns:
            The mixtures, (C, height, width), which outside of the crop repeat its border, and where the crop is, a
            bool tensor of shape (height, width).
        """
        resized_height, resized_width = self._resized_size(height, width)
        crop_height, crop_width = resized_height, resized_width
        if self.do_center_crop:
            crop_height, crop_width = self.crop_size["height"], self.crop_size["width"]
        y = _pixel_positions_in_crop(height, resized_height, crop_height).to(maps.device)
        x = _pixel_positions_in_crop(width, resized_width, crop_width).to(maps.device)
        positions = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
        sampled = F.grid_sample(maps[None], positions[None], padding_mode="border", align_corners=False)[0]
        return sampled, (positions.abs() <= 1).all(dim=-1)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if not self.do_resize:
            return height, width
        if "height" in self.size and "width" in self.size:
            return self.size["height"], self.size["width"]
        if "shortest_edge" not in self.size or "longest_edge" in self.size:
            raise ValueError(
                f"Maps can be placed for a size of shortest_edge or of height and width, but the processor has "
                f"{dict(self.size)}: leave target_sizes out and resize the maps yourself."
            )
        return get_resize_output_image_size(
            np.broadcast_to(np.uint8(0), (height, width, 1)),
            size=self.size["shortest_edge"],
            default_to_square=False,
            input_data_format=ChannelDimension.LAST,
        )


class StellarImageProcessorPil(StellarImageProcessorMixin, PilBackend):  # type: ignore[misc]
    """Prepares images for STELLAR: shortest edge to 256 (bicubic, antialiased), centre crop 224, ImageNet statistics.

    Takes PIL images of any mode but `F`, NumPy arrays or torch tensors with values in [0, 255], one or a list of any
    sizes, channels first or last, and returns `pixel_values` of shape (B, 3, 224, 224), float32. Arrays need a channel
    axis; those of uint8 have 1, 3 or 4 channels. Gray of 16 bits is scaled to 8; transparency is composited on
    `background`, a setting that is saved, white by default ([`to_rgb`]). EXIF orientation is not applied. Settings are
    saved under the name `StellarImageProcessor`, which all backends share.
    """


def image_processor_of(config: StellarConfig) -> StellarImageProcessorPil:
    """The image processor of a model: the shortest edge to 8/7 of `config.image_size`, the centre crop to 1."""
    side = config.image_size
    return StellarImageProcessorPil(
        size={"shortest_edge": round(side * 256 / 224)},
        crop_size={"height": side, "width": side},
        image_mean=config.image_mean,
        image_std=config.image_std,
    )


def _check_settings(settings: dict[str, Any], num_channels: int) -> None:
    """`ValueError` for settings that would give pixels that are no numbers, or none."""

    def are_numbers(values) -> bool:
        values = values if isinstance(values, (tuple, list)) else [values]
        return len(values) in (1, num_channels) and all(
            isinstance(v, (int, float)) and math.isfinite(v) for v in values
        )

    mean, std, factor, size = (
        settings.get(name) for name in ("image_mean", "image_std", "rescale_factor", "crop_size")
    )
    if settings.get("do_normalize") and not (are_numbers(mean) and are_numbers(std) and np.all(np.asarray(std) > 0)):
        raise ValueError(
            f"image_mean is {mean} and image_std {std}, but finite means and positive standard deviations are "
            f"expected, one for each of {num_channels} channels."
        )
    if settings.get("do_rescale") and (not are_numbers(factor) or isinstance(factor, (tuple, list))):
        raise ValueError(f"rescale_factor is {factor!r}, but a finite number is expected.")
    if settings.get("do_center_crop") and size and min(size["height"] or 0, size["width"] or 0) < 1:
        raise ValueError(f"crop_size is {dict(size)}, but a height and a width of at least 1 are expected.")


def _array_to_rgb(
    array: np.ndarray | Tensor, channels: str | ChannelDimension | None, background: Sequence[int]
) -> tuple[np.ndarray | Tensor, ChannelDimension]:
    """A uint8 array of 1, 3 or 4 channels with 3, on its device, and where they are; those of 3 stay as they are."""
    channels = ChannelDimension(channels or infer_channel_dimension_format(array, (1, 3, 4)))  # type: ignore[arg-type]
    axis = 0 if channels == ChannelDimension.FIRST else 2
    if array.shape[axis] not in (1, 4):
        return array, channels
    pixels = np.moveaxis(array.cpu().numpy() if isinstance(array, Tensor) else array, axis, 2)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    rgb = np.moveaxis(np.array(to_rgb(image, background)), 2, 0)
    return (torch.from_numpy(rgb).to(array.device) if isinstance(array, Tensor) else rgb), ChannelDimension.FIRST


def _localization_on_grid(outputs: ModelOutput) -> Tensor:
    """Reshapes localization (B, N, r) to float32 maps (B, r, h, w)."""
    localization = getattr(outputs, "localization", None)
    if localization is None or localization.ndim != 3:
        came = None if localization is None else tuple(localization.shape)
        raise ValueError(
            f"outputs.localization must have shape (batch, patches, tokens), got {came}: "
            "pass the output of a STELLAR model."
        )
    return token_maps(localization, getattr(outputs, "grid_size", None))


def _checked_logits(outputs: ModelOutput) -> Tensor:
    logits = getattr(outputs, "logits", None)
    if logits is None or logits.ndim != 4:
        came = None if logits is None else tuple(logits.shape)
        raise ValueError(
            f"outputs.logits must have shape (batch, num_labels, height, width), got {came}: "
            "pass the output of a model for semantic segmentation."
        )
    return logits.float()


def _segmentation(classes: Tensor, scores: Tensor) -> SemanticSegmentationPostProcessorOutput:
    return SemanticSegmentationPostProcessorOutput({"segmentation": classes, "segmentation_scores": scores})


def _checked_target_sizes(target_sizes: Sequence[tuple[int, int]] | Tensor, batch_size: int) -> list[list[int]]:
    sizes = torch.as_tensor(target_sizes)
    if sizes.shape != (batch_size, 2) or sizes.is_floating_point() or (sizes < 1).any():
        raise ValueError(
            f"target_sizes must be {batch_size} pairs of a positive height and width in pixels, one for each image, "
            f"got {sizes.tolist()}."
        )
    return sizes.tolist()


def _pixel_positions_in_crop(original: int, resized: int, crop: int) -> Tensor:
    """Centres of an edge's original pixels in the frame of the crop, where its borders are -1 and 1."""
    offset = (resized - crop) // 2  # negative where the processor pads
    centres = (torch.arange(original, dtype=torch.float64) + 0.5) * resized / original
    return ((centres - offset) / crop * 2 - 1).float()


__all__ = [
    "StellarImageProcessorKwargs",
    "StellarImageProcessorMixin",
    "StellarImageProcessorPil",
    "image_processor_of",
    "to_rgb",
]
