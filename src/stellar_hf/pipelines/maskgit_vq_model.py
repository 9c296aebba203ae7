# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""MaskGIT-VQGAN, the tokenizer whose codes STELLAR reconstructs, as a model of Diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from ..hub_stellar import apply_umask
from .released_maskgit_vq import RELEASED_REVISION, download_released, load_checkpoint


@dataclass
class MaskGitVQEncoderOutput(BaseOutput):
    """
    Output of [`MaskGitVQModel.encode`].

    Args:
        latents (`torch.Tensor` of shape `(B, latent_channels, h, w)`): The encoder's output, not yet quantized.
        codes (`torch.Tensor` of shape `(B, h * w)`): int64 indices of the nearest codes, row by row.
        grid_size (`tuple[int, int]`): `(h, w)`.
    """

    latents: Tensor
    codes: Tensor
    grid_size: tuple[int, int]


# Network -------------------------------------------------------------------------------------------------------------

# TensorFlow's "same" padding is symmetric for odd kernels of stride 1, and the network has no other convolutions.


def _group_norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class MaskGitVQResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions and a shortcut: (B, in_channels, H, W) to (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = _group_norm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = _group_norm(num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.conv_shortcut = (
            None if in_channels == out_channels else nn.Conv2d(out_channels, out_channels, kernel_size=1, bias=False)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        # Not the usual shortcut: where channels change, the released weights project the block's own output.
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(hidden_states)
        return hidden_states + residual


class MaskGitVQLevel(nn.Module):
    """Residual blocks at one resolution; the first of them may change the number of channels."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, num_groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            MaskGitVQResnetBlock(in_channels if index == 0 else out_channels, out_channels, num_groups)
            for index in range(num_layers)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        for resnet in self.resnets:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(resnet, hidden_states)
            else:
                hidden_states = resnet(hidden_states)
        return hidden_states


class MaskGitVQUpsample(nn.Module):
    """Repeats every pixel twice in both directions, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class MaskGitVQEncoder(nn.Module):
    """Images (B, in_channels, H, W) to latents (B, latent_channels, h, w)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        num_layers: int,
        num_groups: int,
    ):
        super().__init__()
        deepest = block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1, bias=False)
        self.down_blocks = nn.ModuleList(
            MaskGitVQLevel(previous, channels, num_layers, num_groups)
            for previous, channels in zip(
                (block_out_channels[0], *block_out_channels[:-1]), block_out_channels, strict=True
            )
        )
        self.mid_block = MaskGitVQLevel(deepest, deepest, num_layers, num_groups)
        self.conv_norm_out = _group_norm(num_groups, deepest)
        self.conv_out = nn.Conv2d(deepest, latent_channels, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden_states = self.conv_in(images)
        for level, block in enumerate(self.down_blocks):
            if level > 0:
                hidden_states = F.avg_pool2d(hidden_states, kernel_size=2)
            hidden_states = block(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)))


class MaskGitVQDecoder(nn.Module):
    """Quantized latents (B, latent_channels, h, w) to images (B, out_channels, H, W), not clamped."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        num_layers: int,
        num_groups: int,
    ):
        super().__init__()
        channels_of_level = tuple(reversed(block_out_channels))
        deepest = channels_of_level[0]
        self.conv_in = nn.Conv2d(latent_channels, deepest, kernel_size=3, padding=1)
        self.mid_block = MaskGitVQLevel(deepest, deepest, num_layers, num_groups)
        self.up_blocks = nn.ModuleList(
            MaskGitVQLevel(previous, channels, num_layers, num_groups)
            for previous, channels in zip((deepest, *channels_of_level[:-1]), channels_of_level, strict=True)
        )
        self.upsamplers = nn.ModuleList(MaskGitVQUpsample(channels) for channels in channels_of_level[:-1])
        self.conv_norm_out = _group_norm(num_groups, channels_of_level[-1])
        self.conv_out = nn.Conv2d(channels_of_level[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden_states = self.mid_block(self.conv_in(latents))
        for level, block in enumerate(self.up_blocks):
            if level > 0:
                hidden_states = self.upsamplers[level - 1](hidden_states)
            hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)))


class MaskGitVQQuantizer(nn.Module):
    """The codebook: `forward` finds codes of latents, `embedding` looks them up."""

    def __init__(self, num_codes: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)

    def forward(self, latents: Tensor) -> Tensor:
        """Index (...) int64 of the nearest code of each latent (..., channels), in squared Euclidean distance."""
        # All codes are looked up instead of reading the weight: hooks that bring offloaded weights then run.
        codebook = self.embedding(torch.arange(self.embedding.num_embeddings, device=latents.device))
        # In lower precision many codes would tie.
        with torch.autocast(latents.device.type, enabled=False):
            codebook, latents = codebook.float(), latents.float()
            # The squared norm of the latent is left out: it is the same for every code.
            return (codebook.square().sum(-1) - 2 * latents @ codebook.T).argmin(-1)


# Tiles ---------------------------------------------------------------------------------------------------------------


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin; the last one ends at the border, so that all have the same length."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights (length,) that rise from near 0 to 1 over `overlap` places and fall again over as many."""
    distance = torch.arange(length) + 0.5
    return (torch.minimum(distance, length - distance) / max(overlap, 1)).clamp(max=1.0)


def _map_tiles(
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    tile: int,
    overlap: int,
    cell: int,
    output_cell: int,
    output_channels: int,
) -> Tensor:
    """
    Applies a network to overlapping tiles and averages its outputs, weighted by their distance from the tile's border.

    Args:
        network: Maps (B, C, h * cell, w * cell) to (B, output_channels, h * output_cell, w * output_cell).
        inputs: (B, C, h * cell, w * cell).
        tile, overlap: Side of a tile, and how much of it the next one shares, in cells.
        cell, output_cell: Side of a cell of the latent grid in the network's input and output.
    """
    height, width = (side // cell for side in inputs.shape[-2:])
    ramps = (_ramp(min(tile, side) * output_cell, overlap * output_cell) for side in (height, width))
    weight = torch.outer(*ramps).to(inputs.device)
    weights = torch.zeros(height * output_cell, width * output_cell, device=inputs.device)
    total = weights.repeat(inputs.shape[0], output_channels, 1, 1)
    for top in _tile_starts(height, tile, overlap):
        for left in _tile_starts(width, tile, overlap):
            area, output_area = (
                (..., slice(top * side, (top + tile) * side), slice(left * side, (left + tile) * side))
                for side in (cell, output_cell)
            )
            output = network(inputs[area])
            total[output_area] += output * weight
            weights[output_area] += weight
    return (total / weights).to(output.dtype)


# Model ---------------------------------------------------------------------------------------------------------------


class MaskGitVQModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # Diffusers' own bases differ in a type
    """
    MaskGIT-VQGAN: images as a grid of discrete codes, and back. Each level but the last halves the resolution, so
    that one code of the released model stands for 16x16 pixels.

    The model is meant to stay frozen: codes are chosen without a gradient, so that none reaches the encoder through
    `forward`. `decode` of latents and the latents of `encode` are differentiable.

    Args:
        in_channels (`int`, defaults to 3): Channels of the images that are encoded.
        out_channels (`int`, defaults to 3): Channels of the images that are decoded.
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 128, 256, 256, 512)`): Channels of each level, from
            the highest resolution to the lowest; multiples of `norm_num_groups`.
        layers_per_block (`int`, defaults to 2): Residual blocks of each level, and in the middle.
        latent_channels (`int`, defaults to 256): Channels of latents and codes.
        num_vq_embeddings (`int`, defaults to 1024): Number of codes.
        norm_num_groups (`int`, defaults to 32): Groups of every group normalization.
        sample_size (`int`, defaults to 256): Side of the images of training; tiles have this side by default.
    """

    config: Any  # Diffusers declares a dict, but its fields are read as attributes
    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaskGitVQResnetBlock"]  # type: ignore[assignment]
    _skip_layerwise_casting_patterns = ["quantize", "norm"]  # type: ignore[assignment]
    # Parts that bring their own weights when they are called: `encode` and `decode` do not call `forward`.
    _group_offload_block_modules = ["encoder", "decoder", "quantize", "embedding"]  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 256,
        num_vq_embeddings: int = 1024,
        norm_num_groups: int = 32,
        sample_size: int = 256,
    ):
        super().__init__()
        self.encoder = MaskGitVQEncoder(
            in_channels, latent_channels, tuple(block_out_channels), layers_per_block, norm_num_groups
        )
        self.quantize = MaskGitVQQuantizer(num_vq_embeddings, latent_channels)
        self.decoder = MaskGitVQDecoder(
            out_channels, latent_channels, tuple(block_out_channels), layers_per_block, norm_num_groups
        )
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_released(cls, revision: str = RELEASED_REVISION, **hub_arguments: Any) -> MaskGitVQModel:
        """
        The released tokenizer, `maskgit-vqgan-imagenet-f16-256.bin` of `fun-research/TiTok` on the Hub, converted
        from the downloaded file, with every key accounted for.

        Args:
            revision: Commit, tag or branch of the repository; by default the commit that STELLAR's authors name.
            **hub_arguments: `cache_dir`, `force_download`, `local_files_only` and `token`, as in `from_pretrained`.

        Returns:
            The model in evaluation mode, float32.

        Raises:
            OSError: If the file is not in the cache and cannot be downloaded.
            ValueError: If it is damaged, or another one.
        """
        return load_checkpoint(cls, download_released(revision, **hub_arguments))

    # Pipelines of Diffusers pass on what they find in the signature.
    @cast(Any, functools.wraps(ModelMixin.save_pretrained))
    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_umask(save_directory)

    @property
    def downsample_factor(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    # Memory ----------------------------------------------------------------------------------------------------------

    def enable_slicing(self) -> None:
        """Encodes and decodes the images of a batch one by one: less memory, and the same result but for rounding."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encodes and decodes whole batches again."""
        self.use_slicing = False

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None) -> None:
        """
        Encodes and decodes images with a side above `tile_sample_min_size` in overlapping tiles, which are blended:
        memory for activations then does not grow with the image.

        The result differs from that of the whole image. Group normalization takes its statistics from a tile instead
        of the image, which shifts colours and contrast and changes codes, and convolutions see padding at the borders
        of tiles, which blending hides. Images that fit into one tile come out as without tiling.

        Args:
            tile_sample_min_size (`int`, *optional*): Side of a tile in pixels; by default as it was, which is
                `config.sample_size` at first.
            tile_overlap_factor (`float`, *optional*): Share of a tile that it has in common with the next one, from 0
                to 0.5; by default as it was, which is 0.25 at first.

        Raises:
            ValueError: If a tile is not a whole number of codes wide, or on an impossible overlap.
        """
        size = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        factor = self.tile_overlap_factor if tile_overlap_factor is None else tile_overlap_factor
        if size < 1 or size % self.downsample_factor:
            raise ValueError(
                f"tile_sample_min_size is {size}, but must be a positive multiple of {self.downsample_factor}, the "
                "side of a code in pixels."
            )
        if not 0 <= factor <= 0.5:
            raise ValueError(f"tile_overlap_factor is {factor}, but must lie between 0 and 0.5.")
        self.tile_sample_min_size = size
        self.tile_overlap_factor = factor
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encodes and decodes images as a whole again."""
        self.use_tiling = False

    # Interface -------------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, images: Tensor, return_dict: bool = True) -> MaskGitVQEncoderOutput | tuple:
        """
        Encodes images.

        Args:
            images (`torch.Tensor` of shape `(B, in_channels, H, W)`): Floats in [0, 1], RGB, not normalized, in the
                model's dtype; both sides are multiples of `downsample_factor`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`MaskGitVQEncoderOutput`], or the tuple `(latents, codes, grid_size)`.

        Raises:
            ValueError: On images of another shape or of integers.
        """
        self._check_images(images)
        latents = self._slice_by_slice(self._encode, images)
        codes = self.quantize(latents.permute(0, 2, 3, 1)).flatten(1)
        height, width = latents.shape[-2:]
        output = MaskGitVQEncoderOutput(latents=latents, codes=codes, grid_size=(height, width))
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def patch_codes(self, images: Tensor, patch_size: int) -> Tensor:
        """
        One code for each patch of images, which a model with `reconstruction_target="codes"` reconstructs (STELLAR,
        decoder with the code head).

        Where a patch is not as large as a code, as with ViT-H/14, the images are resized so that the tokenizer's grid
        is that of the patches: bicubic, not antialiased, not clamped, which decides about codes.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Floats in [0, 1], RGB, in any precision; pixels beyond the
                last whole patch do not count.
            patch_size (`int`): Side of a patch in pixels.

        Returns:
            `torch.Tensor` of shape `(B, N)`: int64, row by row over the patches.

        Raises:
            ValueError: On images of another shape, of integers, or smaller than a patch.
        """
        shape = images.shape
        height, width = (side // patch_size for side in shape[-2:])
        images = images[..., : height * patch_size, : width * patch_size]
        if not images.is_floating_point() or min(height, width) < 1:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(shape)}, but must be floats in [0, 1] with one patch of "
                f"{patch_size}x{patch_size} pixels at least."
            )
        if patch_size != self.downsample_factor:
            size = (height * self.downsample_factor, width * self.downsample_factor)
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        with torch.autocast(images.device.type, enabled=False):
            return self.encode(images.to(self.dtype)).codes

    @apply_forward_hook
    def decode(
        self,
        codes: Tensor | None = None,
        latents: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """
        Decodes codes or latents.

        Args:
            codes (`torch.Tensor` of shape `(B, h * w)`, *optional*): Integers below `config.num_vq_embeddings`, row by
                row.
            latents (`torch.Tensor` of shape `(B, latent_channels, h, w)`, *optional*): Decoded as they are: the
                decoder was trained on codes, so latents of `encode` that are not replaced by codes are off its
                distribution. Mixtures of codes are a differentiable use.
            grid_size (`tuple[int, int]`, *optional*): `(h, w)` of codes; by default a square.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`], or a tuple: `sample`, images `(B, out_channels,
            h * downsample_factor, w * downsample_factor)` clamped to [0, 1].

        Raises:
            ValueError: Unless exactly one of codes and latents is given, or if their shape, type, range or grid do
                not fit.
        """
        if codes is not None and latents is None:
            latents = self._latents_of(codes, grid_size)
        elif codes is not None or latents is None:
            raise ValueError("decode needs either codes or latents, and not both: pass one of them.")
        self._check_latents(latents, grid_size)
        sample = self._slice_by_slice(self._decode, latents).clamp(0, 1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, images: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """
        Encodes images to codes and decodes these.

        Args:
            images (`torch.Tensor` of shape `(B, in_channels, H, W)`): As for [`~MaskGitVQModel.encode`].
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`], or a tuple: `sample`, images of the shape of the
            input, clamped to [0, 1].

        Raises:
            ValueError: On images of another shape or of integers.
        """
        encoded = self.encode(images)
        return self.decode(encoded.codes, grid_size=encoded.grid_size, return_dict=return_dict)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _slice_by_slice(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if self.use_slicing and inputs.shape[0] > 1:
            return torch.cat([network(single) for single in inputs.split(1)])
        return network(inputs)

    def _encode(self, images: Tensor) -> Tensor:
        factor, channels = self.downsample_factor, self.config.latent_channels
        return self._tile_by_tile(self.encoder, images, cell=factor, output_cell=1, output_channels=channels)

    def _decode(self, latents: Tensor) -> Tensor:
        factor, channels = self.downsample_factor, self.config.out_channels
        return self._tile_by_tile(self.decoder, latents, cell=1, output_cell=factor, output_channels=channels)

    def _tile_by_tile(
        self, network: Callable[[Tensor], Tensor], inputs: Tensor, cell: int, output_cell: int, output_channels: int
    ) -> Tensor:
        tile = self.tile_sample_min_size // self.downsample_factor
        if not self.use_tiling or max(inputs.shape[-2:]) <= tile * cell:
            return network(inputs)
        overlap = int(tile * self.tile_overlap_factor)
        return _map_tiles(network, inputs, tile, overlap, cell, output_cell, output_channels)

    def _latents_of(self, codes: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
        if codes.ndim != 2 or codes.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"codes are {codes.dtype} of shape {tuple(codes.shape)}, but must be int64 of shape (B, N): the "
                "grid's codes row by row."
            )
        count = codes.shape[1]
        height, width = (isqrt(count), isqrt(count)) if grid_size is None else grid_size
        if height * width != count:
            raise ValueError(
                f"{count} codes do not fill "
                + ("a square: pass grid_size=(h, w)." if grid_size is None else f"a grid of {height}x{width}.")
            )
        self._check_range(codes)
        # Contiguous as latents of `encode` are: another layout takes other kernels, and rounds otherwise.
        return self.quantize.embedding(codes).unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()

    def _check_range(self, codes: Tensor) -> None:
        # Reading values would break the graph of a compiled or exported model.
        if torch.compiler.is_compiling() or codes.numel() == 0:
            return
        low, high = codes.aminmax()
        last = self.config.num_vq_embeddings - 1
        if low < 0 or high > last:
            raise ValueError(f"codes reach from {low} to {high}, but must lie between 0 and {last}.")

    def _check_images(self, images: Tensor) -> None:
        channels, factor = self.config.in_channels, self.downsample_factor
        fits = images.ndim == 4 and images.shape[1] == channels
        if not fits or min(images.shape[2:]) < 1 or any(side % factor for side in images.shape[2:]):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but must be (B, {channels}, H, W) with H and W divisible "
                f"by {factor}: resize, crop or pad them."
            )
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, but must be floats in [0, 1]: divide bytes by 255.")

    def _check_latents(self, latents: Tensor, grid_size: tuple[int, int] | None) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but must be (B, {channels}, h, w).")
        if grid_size is not None and tuple(latents.shape[2:]) != tuple(grid_size):
            raise ValueError(
                f"latents have a grid of {tuple(latents.shape[2:])}, but grid_size is {tuple(grid_size)}: leave "
                "grid_size out, which only codes need."
            )


__all__ = ["MaskGitVQEncoderOutput", "MaskGitVQModel"]
