# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a reconstruction costs: bits of S and L, and what other descriptions reach with as many bits."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.cluster.vq import kmeans2
from torch import Tensor

from ..features import encode_images
from ..features.checks import check_integer
from ..localization_stellar import resolve_grid_size
from .reconstruction import psnr, target_of

_COLOUR_BITS = 24
_PALETTE_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)

# Bits of a number of S (32 and 16 are floating point), and of L; how many tokens of L a patch keeps, None for all.
_VARIANTS: dict[str, tuple[int, int, int | None]] = {
    "float32": (32, 32, None),
    "float16": (16, 16, None),
    "8 bits": (8, 8, None),
    "8 bits, top 2": (8, 8, 2),
    "8 bits, top 1": (8, 8, 1),
}


# S and L ------------------------------------------------------------------------------------------------------------


def round_localization(localization: Tensor, num_tokens: int) -> Tensor:
    """L with only the largest entries of each row, renormalized so that rows sum to 1.

    Args:
        localization: L, (B, N, r) floating point >= 0; rows sum to 1.
        num_tokens: How many entries of a row are kept; L itself for r.

    Returns:
        (B, N, r) of the same dtype.

    Raises:
        ValueError: If `num_tokens` is not in [1, r].
    """
    check_integer("num_tokens", num_tokens)
    count = localization.shape[-1]
    if num_tokens > count:
        raise ValueError(f"num_tokens is {num_tokens}, but there are {count} tokens.")
    if num_tokens == count:
        return localization
    values, places = localization.topk(num_tokens, dim=-1)
    return torch.zeros_like(localization).scatter(-1, places, values / values.sum(dim=-1, keepdim=True))


def representation_size(
    num_patches: int,
    num_tokens: int,
    hidden_size: int,
    token_bits: int = 32,
    map_bits: int = 32,
    num_kept: int | None = None,
) -> tuple[int, int]:
    """How many numbers and bits S and L take, without entropy coding.

    Args:
        num_patches: N.
        num_tokens: r.
        hidden_size: d.
        token_bits: Of a number of S. With fewer than 16 each token also has a least and a largest value in float32.
        map_bits: Of a number of L, of which each row has one less than entries, since it sums to 1.
        num_kept: Entries of a row that are kept; then each has an index of ceil(log2 r) bits. All by default.

    Returns:
        Numbers (indices among them) and bits.
    """
    kept = num_tokens if num_kept is None else num_kept
    weights = num_patches * (kept - 1)
    indices = 0 if kept == num_tokens else num_patches * kept
    ranges = 2 * num_tokens if token_bits < 16 else 0
    values = num_tokens * hidden_size
    bits = values * token_bits + 32 * ranges + weights * map_bits + indices * math.ceil(math.log2(num_tokens))
    return values + ranges + weights + indices, bits


def _quantized_tokens(tokens: Tensor, bits: int) -> Tensor:
    """S in as many bits a number; below 16 in equal steps from the least to the largest value of each token."""
    if bits >= 16:
        return tokens.to(torch.float16 if bits == 16 else torch.float32).float()
    low, high = tokens.float().aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return ((tokens.float() - low) / step).round() * step + low


def _quantized_maps(maps: Tensor, bits: int, num_kept: int | None) -> Tensor:
    """L in as many bits a number; the largest entry of a row is what the others leave of 1."""
    maps = maps.float() if num_kept is None else round_localization(maps.float(), num_kept)
    if bits == 32:
        return maps
    rounded = maps.half().float() if bits == 16 else (maps * (2**bits - 1)).round() / (2**bits - 1)
    largest = maps.argmax(dim=-1, keepdim=True)
    rest = (rounded.sum(dim=-1, keepdim=True) - rounded.gather(-1, largest)).clamp(max=1)
    return rounded.scatter(-1, largest, 1 - rest)


# Other descriptions -------------------------------------------------------------------------------------------------


def patch_means(image: Tensor, bits: int) -> Tensor | None:
    """Means of as many rectangles as there are bits for, in 8 bits a channel, resampled bicubically.

    Args:
        image: (3, H, W) float32 in [0, 1].
        bits: At most so many.

    Returns:
        (3, H, W) in [0, 1]; None if not even one colour fits.
    """
    size = _grid_within(image, bits // _COLOUR_BITS)
    if size is None:
        return None
    means = _to_8_bits(F.adaptive_avg_pool2d(image[None], size))
    return F.interpolate(means, size=image.shape[1:], mode="bicubic", align_corners=False)[0].clamp(0, 1)


def colour_palette(image: Tensor, bits: int, seed: int = 0) -> Tensor | None:
    """Colours by k-means (24 bits each), and a map of their indices, as fine as the bits allow.

    The number of colours, a power of two up to 256, is the one of the largest PSNR; to tell it takes one byte.
    Arguments and result are those of [`patch_means`].
    """
    best, best_psnr = None, -math.inf
    for count in _PALETTE_SIZES:
        size = _grid_within(image, (bits - 8 - count * _COLOUR_BITS) // int(math.log2(count)))
        if size is None or size[0] * size[1] < count:
            continue
        pixels = F.adaptive_avg_pool2d(image[None], size)[0].permute(1, 2, 0).reshape(-1, 3).double().numpy()
        colours, indices = kmeans2(pixels, count, minit="points", rng=np.random.default_rng(seed), missing="warn")
        painted = torch.from_numpy(colours[indices]).float().view(*size, 3).permute(2, 0, 1)
        shown = F.interpolate(_to_8_bits(painted)[None], size=image.shape[1:], mode="nearest-exact")[0].clamp(0, 1)
        quality = psnr(shown[None], image[None]).item()
        if quality > best_psnr:
            best, best_psnr = shown, quality
    return best


def jpeg(image: Tensor, bits: int) -> Tensor | None:
    """A JPEG file, headers among its bits, of the largest quality in [1, 95] whose file fits.

    Arguments and result are those of [`patch_means`].
    """
    picture = Image.fromarray((255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy())
    fitting, low, high = None, 1, 95
    while low <= high:
        quality = (low + high) // 2
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        if 8 * file.tell() <= bits:
            fitting, low = file, quality + 1
        else:
            high = quality - 1
    if fitting is None:
        return None
    return torch.from_numpy(np.array(Image.open(fitting).convert("RGB"))).permute(2, 0, 1).float() / 255


BASELINES: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "patch means": patch_means,
    "k-means palette": colour_palette,
    "JPEG": jpeg,
}


def _grid_within(image: Tensor, count: int) -> tuple[int, int] | None:
    """Rows and columns, in the proportions of an image and not more than its pixels, of `count` cells at most."""
    height, width = image.shape[1:]
    if count < 1:
        return None
    rows = min(max(math.isqrt(count * height // width), 1), height)
    return rows, min(count // rows, width)


def _to_8_bits(colours: Tensor) -> Tensor:
    return (255 * colours).round() / 255


# Table --------------------------------------------------------------------------------------------------------------


def compression_rows(
    model: Any, dataset: Any, processor: Any, *, vq_model: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    """What S and L cost in several precisions and with L rounded, and what others reach with as many bits.

    Args:
        model: `StellarForImageReconstruction` or `StellarForPreTraining`.
        dataset: As in [`encode_images`]; images that cannot be read are left out. All have one processed size.
        processor: The model's image processor.
        vq_model: The tokenizer (`MaskGitVQModel`), on the model's device, of a model that reconstructs codes.
        **settings: Further arguments of [`encode_images`], such as `batch_size`, `accelerator` and `show_progress`.

    Returns:
        A row for each precision, followed by one for each baseline with as many bits: `method`; `numbers` an image
        (None for baselines); `bits` an image, at most so many for baselines; `bits_per_pixel`; the mean `psnr` in dB,
        None where a file of this size does not exist for some image; `num_images`.

    Raises:
        ValueError: If there is no tokenizer where one is needed, images differ in size, or no image can be read.
    """

    def measure(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
        return _psnr_of_all(model, pixel_values, vq_model)

    measures = encode_images(model, dataset, processor, encode=measure, description="compression", **settings)
    shapes = measures.tensors.pop("shape").unique(dim=0).tolist()  # type: ignore[union-attr]
    if len(shapes) != 1:
        raise ValueError(f"Images have {len(shapes)} sizes, but bits of one are counted: take a processor that crops.")
    rows, columns, height, width = shapes[0]
    table = []
    for name, (token_bits, map_bits, kept) in _variants(model.config).items():
        sizes = (rows * columns, model.config.num_sparse_tokens, model.config.hidden_size)
        numbers, bits = representation_size(*sizes, token_bits, map_bits, kept)
        for method in (f"S and L, {name}", *BASELINES):
            key = name if method.startswith("S and L") else f"{method}, {name}"
            mean = measures.tensors[key].double().mean().item()  # type: ignore[union-attr]
            table.append(
                {
                    "method": method,
                    "numbers": numbers if key == name else None,
                    "bits": bits,
                    "bits_per_pixel": bits / (height * width),
                    "psnr": None if math.isnan(mean) else mean,
                    "num_images": len(measures),
                }
            )
    return table


def _variants(config: Any) -> dict[str, tuple[int, int, int | None]]:
    return {name: variant for name, variant in _VARIANTS.items() if (variant[2] or 1) < config.num_sparse_tokens}


def _psnr_of_all(model: Any, pixel_values: Tensor, vq_model: Any) -> dict[str, Tensor]:
    """PSNR (B,) of S and L by the name of the variant, and of each baseline with its bits; NaN where nothing fits."""
    output = model.base_model(pixel_values.to(model.dtype))
    tokens, maps, config = output.sparse_tokens, output.localization, model.config
    grid_size = resolve_grid_size(maps.shape[1], output.grid_size)
    measures = {}
    for name, (token_bits, map_bits, kept) in _variants(config).items():
        rounded = _quantized_tokens(tokens, token_bits), _quantized_maps(maps, map_bits, kept)
        decoded = model.decoder(*(part.to(model.dtype) for part in rounded), grid_size)
        if config.reconstruction_target == "codes":
            if vq_model is None:
                raise ValueError("Codes are reconstructed, which only a tokenizer turns into an image: pass vq_model.")
            decoded = vq_model.decode(codes=decoded.argmax(dim=-1), grid_size=grid_size).sample
        target = target_of(config, pixel_values, decoded.shape[-2:])
        measures[name] = psnr(decoded.float(), target)
        _, bits = representation_size(
            maps.shape[1], config.num_sparse_tokens, config.hidden_size, token_bits, map_bits, kept
        )
        for method, describe in BASELINES.items():
            scores = [_psnr_within(describe, image, bits) for image in target.cpu()]
            measures[f"{method}, {name}"] = torch.stack(scores)
    shape = torch.tensor([*grid_size, *target.shape[-2:]])
    return measures | {"shape": shape.expand(len(target), -1)}


def _psnr_within(describe: Callable[[Tensor, int], Tensor | None], image: Tensor, bits: int) -> Tensor:
    shown = describe(image, bits)
    return torch.tensor(math.nan) if shown is None else psnr(shown[None], image[None])[0]
