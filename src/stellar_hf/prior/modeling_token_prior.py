# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A prior over sparse tokens S and localization L, from which images are drawn: a transformer with flow matching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..hub_stellar import apply_umask
from ..localization_stellar import means_under_maps, patch_positions

# Shares of a patch below exp(-6), a quarter of a percent, are invisible in the decoded image, but their logarithms,
# down to -33, would be most of the variance that the prior explains.
_MIN_LOG_SHARE = -6.0
# Below this share of noise the velocity is divided by this share instead: its error stays bounded, and what the very
# last step would still remove, a part of noise that is invisible, stays.
_MIN_SIGMA = 0.05
_NUM_GROUPS = 8


@dataclass
class StellarTokenPriorOutput(BaseOutput):
    """
    Args:
        sample: Velocity, (B, latent_size) floating point.
    """

    sample: Tensor


class StellarTokenPrior(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """
    Velocity of the flow from noise to the tokens S and the localization L of an image, given its class.

    S and the logits of L, each standardized, are one vector, `latents`: [`~StellarTokenPrior.pack`] makes it and
    [`~StellarTokenPrior.unpack`] undoes it. On the straight way `x_sigma = (1 - sigma) x + sigma noise` the velocity
    is `noise - x` (flow matching, Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003). The network predicts
    x, which lies near a low-dimensional subspace where noise does not, and the velocity is
    `(x_sigma - x) / max(sigma, 0.05)`.

    The sequence holds the r tokens and the grid's logits in squares of patches; the transformer's blocks see noise
    level and class through adaptive LayerNorm (DiT, Peebles & Xie, arXiv 2212.09748). Two residual convolutions at the
    resolution of the grid finish the logits: without them neighbouring squares do not fit together.

    Args:
        num_sparse_tokens: Number r of tokens.
        token_size: Size d of a token, the `hidden_size` of the STELLAR model.
        grid_size: Patches (h, w) of the localization.
        num_classes: Number of classes; 0 for a prior that knows none.
        class_names: A name for each class, all different, *optional*.
        localization_patch_size: Side of the squares of patches that are one element of the sequence; divides h and w.
        hidden_size: Width of the transformer, a multiple of 4 and of the heads.
        num_layers: Number of blocks.
        num_attention_heads: Number of attention heads.
        localization_channels: Width of the convolutions, a multiple of 8.
        sort_tokens: Whether tokens are drawn in the order of reading: by where their maps are, in rows from the top,
            from left to right. The decoder sees L S, which has no order; a prior has less to learn where token 1 is
            always at the top left than where it may be anywhere.

    Raises:
        ValueError: If sizes do not fit.
    """

    config: Any  # Diffusers declares a dict, but its fields are read as attributes
    # `pack` and `unpack` do not call `forward`: this part brings its weights by itself.
    _group_offload_block_modules = ["standardization"]  # type: ignore[assignment]
    _no_split_modules = ["TokenPriorBlock"]  # type: ignore[assignment]
    _repeated_blocks = ["TokenPriorBlock"]  # type: ignore[assignment]
    _supports_gradient_checkpointing = True
    # Of eight bits, norms (with the projections that scale them) and embeddings would be most of the error.
    _skip_layerwise_casting_patterns = ["norm", "embedding"]  # type: ignore[assignment]
    num_train_timesteps = 1000  # of the scheduler: t = 1000 sigma
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    @register_to_config
    def __init__(
        self,
        num_sparse_tokens: int = 16,
        token_size: int = 768,
        grid_size: tuple[int, int] = (14, 14),
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        localization_patch_size: int = 2,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        localization_channels: int = 64,
        sort_tokens: bool = False,
    ):
        super().__init__()
        self._check_sizes()
        rows, columns = (side // localization_patch_size for side in grid_size)
        square = localization_patch_size**2
        num_patches = grid_size[0] * grid_size[1]
        self.latent_size = num_sparse_tokens * token_size + num_patches * num_sparse_tokens
        self.standardization = Standardization(num_sparse_tokens, token_size)
        self.timesteps = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedding = TimestepEmbedding(256, hidden_size)
        # The last one stands for any class.
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.token_embedding = nn.Linear(token_size, hidden_size)
        self.logit_embedding = nn.Linear(square * num_sparse_tokens, hidden_size)
        slots = 0.2 * torch.randn(num_sparse_tokens, hidden_size)
        places = get_2d_sincos_pos_embed(hidden_size, (rows, columns), output_type="pt")
        self.position_embedding = nn.Parameter(torch.cat([slots, places.to(slots)]))
        self.blocks = nn.ModuleList(TokenPriorBlock(hidden_size, num_attention_heads) for _ in range(num_layers))
        self.norm = AdaLayerNormContinuous(hidden_size, hidden_size, elementwise_affine=False, eps=1e-6)
        self.token_head = nn.Linear(hidden_size, token_size)
        self.logit_head = LocalizationHead(
            hidden_size, num_sparse_tokens, localization_channels, localization_patch_size
        )
        nn.init.normal_(self.class_embedding.weight, std=0.5)
        _zero(self.token_head)

    # Pipelines of Diffusers pass on what they find in the signature.
    @cast(Any, functools.wraps(ModelMixin.save_pretrained))
    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_umask(save_directory)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> StellarTokenPriorOutput | tuple[Tensor]:
        """
        Args:
            sample: Noisy latents x_sigma, (B, latent_size) floating point.
            timestep: 1000 sigma in [0, 1000], one for all or (B,).
            class_labels: (B,) integers in [0, num_classes], where num_classes stands for any class, as None does.
            return_dict: Whether to return a `StellarTokenPriorOutput` or a tuple.

        Returns:
            The velocity, noise - x, of the shape and dtype of `sample`.

        Raises:
            ValueError: If a shape or type is wrong, or a class is out of range.
        """
        _check_floats("sample", sample)
        if sample.ndim != 2 or sample.shape[1] != self.latent_size:
            raise ValueError(f"sample has shape {tuple(sample.shape)}, but (batch, {self.latent_size}) is expected.")
        batch_size = len(sample)
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(batch_size)
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.config.num_classes, device=sample.device)
        self._check_labels(class_labels, batch_size)
        clean = self._predict_clean(sample, timestep, class_labels)
        sigma = (timestep / self.num_train_timesteps).clamp_min(_MIN_SIGMA)[:, None]
        velocity = ((sample.float() - clean.float()) / sigma).to(sample.dtype)
        return StellarTokenPriorOutput(sample=velocity) if return_dict else (velocity,)

    def pack(self, sparse_tokens: Tensor, localization: Tensor) -> Tensor:
        """
        Standardizes S and the logits of L, after sorting the tokens where the prior does.

        Args:
            sparse_tokens: S, (B, r, d).
            localization: L, (B, N, r), non-negative, rows sum to 1.

        Returns:
            Latents, (B, r * d + N * r) float32: of mean 0 and variance 1 where
            [`~StellarTokenPrior.set_statistics`] has seen the data.

        Raises:
            ValueError: If a shape is not the prior's.
        """
        self._check_factors(sparse_tokens, localization)
        sparse_tokens, localization = self._in_order(sparse_tokens.float(), localization.float())
        tokens, logits = self.standardization(sparse_tokens, _centred_logits(localization))
        return torch.cat([tokens.flatten(1), logits.flatten(1)], dim=1)

    def unpack(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """
        Undoes [`~StellarTokenPrior.pack`], up to shares of L below exp(-6) and the order of sorted tokens.

        Args:
            latents: (B, r * d + N * r) floating point.

        Returns:
            S, (B, r, d), and L, (B, N, r), whose rows sum to 1, in float32.
        """
        tokens, logits = self.standardization(*self.split(latents.float()), inverse=True)
        return tokens, logits.softmax(dim=-1)

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """
        The standardized tokens, (B, r, d), and logits, (B, N, r), of latents, (B, r * d + N * r), or of anything else
        of their shape.
        """
        num_tokens, token_size = self.config.num_sparse_tokens, self.config.token_size
        tokens, logits = latents.split([num_tokens * token_size, self.latent_size - num_tokens * token_size], dim=1)
        return tokens.unflatten(1, (num_tokens, token_size)), logits.unflatten(1, (-1, num_tokens))

    def set_statistics(self, sparse_tokens: Tensor, localization: Tensor) -> None:
        """
        Measures means and standard deviations of S and of the logits of L, by which latents are standardized.

        Args:
            sparse_tokens: S of many images, (B, r, d).
            localization: Their L, (B, N, r).

        Raises:
            ValueError: If a shape is not the prior's, there is one image only, or a number is not finite.
        """
        self._check_factors(sparse_tokens, localization)
        if len(sparse_tokens) < 2:
            raise ValueError("There is one image, but standard deviations need two at least.")
        for name, values in (("sparse_tokens", sparse_tokens), ("localization", localization)):
            num_bad = int((~values.isfinite()).flatten(1).any(dim=1).sum())
            if num_bad:
                raise ValueError(
                    f"{name} of {num_bad} of {len(values)} images hold numbers that are not finite: leave them "
                    "out, or encode them again in a higher precision."
                )
        tokens, maps = self._in_order(sparse_tokens.float(), localization.float())
        self.standardization.fit(tokens, _centred_logits(maps))

    def _in_order(self, sparse_tokens: Tensor, localization: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.sort_tokens:
            return sparse_tokens, localization
        order = reading_order(localization, self.config.grid_size).unsqueeze(2)
        maps = localization.transpose(1, 2).take_along_dim(order, dim=1).transpose(1, 2)
        return sparse_tokens.take_along_dim(order, dim=1), maps

    def _predict_clean(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        dtype = self.dtype  # and not a weight's, which layerwise casting stores in another one
        tokens, logits = self.split(sample.to(dtype))
        condition = self.timestep_embedding(self.timesteps(timestep).to(dtype)) + self.class_embedding(class_labels)
        maps = logits.transpose(1, 2).unflatten(2, self.config.grid_size)
        squares = nn.functional.unfold(
            maps, self.config.localization_patch_size, stride=self.config.localization_patch_size
        )
        hidden_states = torch.cat([self.token_embedding(tokens), self.logit_embedding(squares.transpose(1, 2))], dim=1)
        hidden_states = hidden_states + self.position_embedding
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, condition)
            else:
                hidden_states = block(hidden_states, condition)
        hidden_states = self.norm(hidden_states, condition)
        num_tokens = self.config.num_sparse_tokens
        clean_tokens = self.token_head(hidden_states[:, :num_tokens])
        clean_maps = self.logit_head(hidden_states[:, num_tokens:], maps, condition)
        return torch.cat([clean_tokens.flatten(1), clean_maps.flatten(2).transpose(1, 2).flatten(1)], dim=1)

    def _check_sizes(self) -> None:
        config = self.config
        for name in (
            "num_sparse_tokens",
            "token_size",
            "localization_patch_size",
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "localization_channels",
        ):
            if config[name] < 1:
                raise ValueError(f"{name} is {config[name]}, but must be at least 1.")
        if config.num_classes < 0:
            raise ValueError(f"num_classes is {config.num_classes}, but must not be negative.")
        if config.class_names is not None and len(config.class_names) != config.num_classes:
            raise ValueError(f"There are {len(config.class_names)} class_names for {config.num_classes} classes.")
        twice = sorted({name for name in config.class_names or [] if config.class_names.count(name) > 1})
        if twice:
            raise ValueError(f"class_names has {', '.join(map(repr, twice))} more than once: names must differ.")
        square = config.localization_patch_size
        if len(config.grid_size) != 2 or any(side < 1 or side % square for side in config.grid_size):
            raise ValueError(
                f"grid_size is {tuple(config.grid_size)}, but must be (rows, columns) that localization_patch_size, "
                f"{square}, divides."
            )
        if config.hidden_size % 4 or config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size is {config.hidden_size}, but must be a multiple of 4 and of num_attention_heads, "
                f"{config.num_attention_heads}."
            )
        if config.localization_channels % _NUM_GROUPS:
            raise ValueError(
                f"localization_channels is {config.localization_channels}, but must be a multiple of {_NUM_GROUPS}."
            )

    def _check_labels(self, class_labels: Tensor, batch_size: int) -> None:
        _check_tensor("class_labels", class_labels)
        if class_labels.shape != (batch_size,) or class_labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"class_labels is {class_labels.dtype} of shape {tuple(class_labels.shape)}, but int64 of shape "
                f"({batch_size},) is expected."
            )
        # Reading values would break the graph of a compiled or exported model.
        if torch.compiler.is_compiling() or batch_size == 0:
            return
        low, high = class_labels.aminmax()
        if low < 0 or high > self.config.num_classes:
            raise ValueError(
                f"class_labels reach from {low} to {high}, but must lie between 0 and {self.config.num_classes}, "
                "which stands for any class."
            )

    def _check_factors(self, sparse_tokens: Tensor, localization: Tensor) -> None:
        _check_floats("sparse_tokens", sparse_tokens)
        _check_floats("localization", localization)
        config = self.config
        tokens = (config.num_sparse_tokens, config.token_size)
        places = (config.grid_size[0] * config.grid_size[1], config.num_sparse_tokens)
        if sparse_tokens.shape[1:] != tokens or localization.shape != (len(sparse_tokens), *places):
            raise ValueError(
                f"sparse_tokens has shape {tuple(sparse_tokens.shape)} and localization {tuple(localization.shape)}, "
                f"but this prior is for (batch, {tokens[0]}, {tokens[1]}) and (batch, {places[0]}, {places[1]})."
            )


class Standardization(nn.Module):
    """Mean and deviation of each number of each token; mean of each token's logits, and one deviation of all."""

    token_mean: Tensor
    token_std: Tensor
    logit_mean: Tensor
    logit_std: Tensor

    def __init__(self, num_sparse_tokens: int, token_size: int):
        super().__init__()
        self.register_buffer("token_mean", torch.zeros(num_sparse_tokens, token_size))
        self.register_buffer("token_std", torch.ones(num_sparse_tokens, token_size))
        self.register_buffer("logit_mean", torch.zeros(num_sparse_tokens))
        self.register_buffer("logit_std", torch.ones(1))

    def forward(self, tokens: Tensor, logits: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """(B, r, d) and (B, N, r) float32, to mean 0 and variance 1 or back."""
        if inverse:
            return tokens * self.token_std + self.token_mean, logits * self.logit_std + self.logit_mean
        return (tokens - self.token_mean) / self.token_std, (logits - self.logit_mean) / self.logit_std

    def fit(self, tokens: Tensor, logits: Tensor) -> None:
        self.token_mean.copy_(tokens.mean(dim=0))
        self.token_std.copy_(tokens.std(dim=0).clamp_min(1e-6))
        self.logit_mean.copy_(logits.mean(dim=(0, 1)))
        self.logit_std.copy_((logits - self.logit_mean).std().clamp_min(1e-6))


class TokenPriorBlock(nn.Module):
    """A transformer block whose norms are scaled and shifted, and whose residuals are gated, by the condition."""

    def __init__(self, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.norm1 = AdaLayerNormZero(hidden_size)
        _zero(self.norm1.linear)  # a new block is the identity
        self.attention = Attention(
            query_dim=hidden_size, heads=num_attention_heads, dim_head=hidden_size // num_attention_heads, bias=True
        )
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = FeedForward(hidden_size, activation_fn="gelu-approximate")

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        """(B, sequence, hidden_size), (B, hidden_size) to (B, sequence, hidden_size)."""
        normed, attention_gate, shift, scale, mlp_gate = self.norm1(hidden_states, emb=condition)
        hidden_states = hidden_states + attention_gate[:, None] * self.attention(normed)
        normed = self.norm2(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        return hidden_states + mlp_gate[:, None] * self.mlp(normed)


class LocalizationHead(nn.Module):
    """Logits of L, from the squares' hidden states and the noisy logits, by convolutions over the grid."""

    def __init__(self, hidden_size: int, num_sparse_tokens: int, channels: int, patch_size: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(hidden_size, channels, patch_size, stride=patch_size)
        self.conv_in = nn.Conv2d(num_sparse_tokens, channels, 3, padding=1)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels=channels, temb_channels=hidden_size, groups=_NUM_GROUPS) for _ in range(2)
        )
        self.norm_out = nn.GroupNorm(_NUM_GROUPS, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, num_sparse_tokens, 3, padding=1)
        _zero(self.conv_out)

    def forward(self, hidden_states: Tensor, maps: Tensor, condition: Tensor) -> Tensor:
        """(B, squares, hidden_size), (B, r, h, w), (B, hidden_size) to (B, r, h, w)."""
        patch_size = self.upsample.stride[0]
        grid = (maps.shape[2] // patch_size, maps.shape[3] // patch_size)
        features = self.upsample(hidden_states.transpose(1, 2).unflatten(2, grid)) + self.conv_in(maps)
        for resnet in self.resnets:
            features = resnet(features, condition)
        return self.conv_out(nn.functional.silu(self.norm_out(features)))


def reading_order(localization: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """
    The tokens (B, r) int64 of L (B, N, r) as one reads: by the centers of their maps, which the vertical ones put into
    about sqrt(r) rows, and the horizontal ones in order within a row.
    """
    positions = patch_positions(grid_size, localization.device)
    vertical, horizontal = means_under_maps(localization, positions).unbind(dim=2)
    num_tokens = localization.shape[2]
    rank = vertical.argsort(dim=1).argsort(dim=1)
    row = rank * round(num_tokens**0.5) // num_tokens
    return (row + horizontal).argsort(dim=1)  # horizontal centers are less than 1


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, but must be a tensor.")


def _check_floats(name: str, value: Any) -> None:
    _check_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}, but must be floating point.")


def _centred_logits(localization: Tensor) -> Tensor:
    """(B, N, r) logarithms, of mean 0 over the tokens, which L leaves open."""
    logits = localization.float().clamp_min(1e-30).log().clamp_min(_MIN_LOG_SHARE)
    return logits - logits.mean(dim=-1, keepdim=True)


__all__ = ["StellarTokenPrior", "StellarTokenPriorOutput"]
