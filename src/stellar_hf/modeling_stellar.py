# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
STELLAR in PyTorch: an image as a few sparse tokens S (what) and a localization matrix L (where).

Source of the mathematics: "Learning Sparse Visual Representations via Spatial-Semantic Factorization",
arXiv 2602.01905. Shapes are written with B images, N = h * w patches, r sparse tokens, hidden size d, K prototypes.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_stellar import HUB_ARGUMENTS
from .configuration_stellar import StellarConfig
from .hub_stellar import StellarHubMixin
from .initialization_stellar import config_fields_of_vit, load_vit_into_encoder, resized_positions
from .localization_stellar import means_under_maps, patch_positions, resolve_grid_size, spatial_scores
from .loss_stellar import (
    dice_loss,
    localization_sharpness,
    pixel_cross_entropy,
    standardize,
    token_diversity,
    without_autocast,
)
from .objective_stellar import (
    LOSS_TERMS,
    ProjectedView,
    StellarObjective,
    Targets,
    check_views,
    describe,
    kept_patches,
)
from .recomputation_stellar import recomputed_in_backward
from .released_stellar import RELEASED_REPOSITORY, RELEASED_REVISION, convert_weights, read_released

logger = logging.get_logger(__name__)

# Outputs -------------------------------------------------------------------------------------------------------------


@dataclass
class StellarModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`StellarModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, 1 + N + r, d)`): CLS, patches and sparse tokens, after the
            final LayerNorm.
        pooler_output (`torch.Tensor` of shape `(B, d)`): Mean of the sparse tokens.
        sparse_tokens (`torch.Tensor` of shape `(B, r, d)`): S, what is in the image.
        localization (`torch.Tensor` of shape `(B, N, r)`): L, where it is; non-negative, rows sum to 1, patches are
            row-major over `grid_size`.
        grid_size (`torch.Tensor` of shape `(B, 2)`): int64 patches (h, w) along height and width, the same for each
            image; N = h * w.
        hidden_states (`tuple[torch.Tensor]`, with `output_hidden_states=True`): Embeddings and the output of each
            layer, each `(B, 1 + N + r, d)`, before the final LayerNorm.
        attentions (`tuple[torch.Tensor]`, with `output_attentions=True`): Attention of each layer,
            `(B, heads, 1 + N + r, 1 + N + r)`.
    """

    sparse_tokens: torch.Tensor | None = None
    localization: torch.Tensor | None = None
    grid_size: torch.Tensor | None = None


@dataclass
class StellarForPreTrainingOutput(ModelOutput):
    """
    Output of [`StellarForPreTraining`]. Losses are weighted: they add up to `loss`.

    Args:
        loss (`torch.Tensor` of shape `()`): The joint objective.
        reconstruction_loss (`torch.Tensor` of shape `()`): Mean squared error (pixels) or cross entropy (codes).
        koleo_loss (`torch.Tensor` of shape `()`): Spread of the tokens of an image, clean and masked views.
        clustering_loss (`torch.Tensor` of shape `()`): The clean view's tokens against their targets.
        cls_clustering_loss (`torch.Tensor` of shape `()`): The clean view's CLS against its target.
        masked_loss (`torch.Tensor` of shape `()`): Masked views' tokens against their matched targets.
        cls_view_loss (`torch.Tensor` of shape `()`): Masked and local views' CLS against the image's CLS target.
        reconstruction (`torch.Tensor`): RGB in [0, 1] up to regression error, `(B, 3, h * patch, w * patch)`; or code
            logits `(B, N, codebook_size)`.
        sparse_tokens (`torch.Tensor` of shape `(B, r, d)`): S.
        localization (`torch.Tensor` of shape `(B, N, r)`): L; rows sum to 1.
        grid_size (`torch.Tensor` of shape `(B, 2)`): int64 patches (h, w), as in [`StellarModelOutput`].
        prototype_entropy (`torch.Tensor` of shape `()`): Entropy of the mean prediction over ln K: 1 when all
            prototypes are used alike, 0 when one takes all.
        slot_information (`torch.Tensor` of shape `()`): Share of what the predictions tell about tokens that their
            slot alone explains: near 1 the clusters merely name the slot, whatever the image.
        token_diversity (`torch.Tensor` of shape `()`): Mean cosine distance between the tokens of an image.
        localization_sharpness (`torch.Tensor` of shape `()`): Mean largest entry of the rows of L, in [1 / r, 1].
        matched_fraction (`torch.Tensor` of shape `()`): Share of the masked views' tokens that are matched one-to-one:
            no other token of the view takes the same target. `None` without global views.
        hidden_states, attentions: As in [`StellarModelOutput`], of the clean view.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    koleo_loss: torch.Tensor | None = None
    clustering_loss: torch.Tensor | None = None
    cls_clustering_loss: torch.Tensor | None = None
    masked_loss: torch.Tensor | None = None
    cls_view_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    sparse_tokens: torch.Tensor | None = None
    localization: torch.Tensor | None = None
    grid_size: torch.Tensor | None = None
    prototype_entropy: torch.Tensor | None = None
    slot_information: torch.Tensor | None = None
    token_diversity: torch.Tensor | None = None
    localization_sharpness: torch.Tensor | None = None
    matched_fraction: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class StellarImageReconstructionOutput(ModelOutput):
    """
    Output of [`StellarForImageReconstruction`].

    Args:
        loss (`torch.Tensor` of shape `()`): Mean squared error (pixels) or cross entropy (codes), unweighted.
        reconstruction (`torch.Tensor`): RGB in [0, 1] up to regression error, `(B, 3, h * patch, w * patch)`; or code
            logits `(B, N, codebook_size)`.
        sparse_tokens (`torch.Tensor` of shape `(B, r, d)`): S.
        localization (`torch.Tensor` of shape `(B, N, r)`): L; rows sum to 1.
        grid_size (`torch.Tensor` of shape `(B, 2)`): int64 patches (h, w), as in [`StellarModelOutput`].
        hidden_states, attentions: As in [`StellarModelOutput`].
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    sparse_tokens: torch.Tensor | None = None
    localization: torch.Tensor | None = None
    grid_size: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# Transformer blocks, shared by encoder and decoder -------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    # Contiguous once, since each product of this and the backward pass would copy its strided operands again.
    query, key, value = (query * scaling).contiguous(), key.contiguous(), value.contiguous()
    scores = query @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _select(hidden_states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """(B, n, d) to the rows (k,) of each sequence, (B, k, d); all without `rows`."""
    return hidden_states if rows is None else hidden_states.index_select(1, rows)


class StellarAttention(nn.Module):
    def __init__(self, config: StellarConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False

        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All of the sequence is attended to; with `rows`, only they ask."""
        queries = _select(hidden_states, rows)
        query_states, key_states, value_states = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, queries),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, attention_weights = attention(
            self,
            query_states,
            key_states,
            value_states,
            None,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attention_output = attention_output.reshape(queries.shape).contiguous()
        return self.o_proj(attention_output), attention_weights


class StellarMLP(nn.Module):
    def __init__(self, config: StellarConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """(B, n, d) to (B, n, d); with `recompute`, the activation is not kept for the backward pass."""
        hidden_states = self.fc1(hidden_states)
        activated = self.activation(hidden_states)
        context = recomputed_in_backward(activated, self.activation, of=hidden_states, enabled=recompute)
        del hidden_states  # which only a backward pass needs
        with context:
            return self.fc2(activated)


class StellarLayer(GradientCheckpointingLayer):
    def __init__(self, config: StellarConfig, hidden_size: int, num_attention_heads: int, intermediate_size: int):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = StellarAttention(config, hidden_size, num_attention_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = StellarMLP(config, hidden_size, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # The share of elementwise work in a layer's time falls with its width: here at most some percent.
        self.recompute = hidden_size >= 256

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, n, d) to (B, n, d); with `rows` (k,), only those of each sequence are computed, (B, k, d)."""
        checkpointed = self.gradient_checkpointing and self.training  # which recomputes the whole layer
        recompute = self.recompute and not checkpointed
        normalized = _in_type_of_products(self.layernorm_before(hidden_states))
        with recomputed_in_backward(normalized, self.layernorm_before, of=hidden_states, enabled=recompute):
            attention_output, _ = self.attention(normalized, rows, **kwargs)
        hidden_states = _select(hidden_states, rows) + self.dropout(attention_output)
        normalized = _in_type_of_products(self.layernorm_after(hidden_states))
        with recomputed_in_backward(normalized, self.layernorm_after, of=hidden_states, enabled=recompute):
            mlp_output = self.mlp(normalized, recompute)
        return hidden_states + self.dropout(mlp_output)


def _in_type_of_products(hidden_states: torch.Tensor) -> torch.Tensor:
    """The cast that autocast would make, and keep, for each product that takes these."""
    device = hidden_states.device.type
    return hidden_states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden_states


# Encoder -------------------------------------------------------------------------------------------------------------


class StellarPatchEmbeddings(nn.Module):
    """(B, C, H, W) pixels to (B, N, d) patch embeddings; with `kept_patches`, only those are ever embedded."""

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor, kept_patches: torch.Tensor | None = None) -> torch.Tensor:
        if kept_patches is None:
            return self.projection(pixel_values).flatten(2).transpose(1, 2)
        # A view: no patch is copied until the kept ones are indexed.
        patches = pixel_values.unfold(2, self.patch_size, self.patch_size).unfold(3, self.patch_size, self.patch_size)
        width = patches.shape[3]
        images = torch.arange(patches.shape[0], device=patches.device)[:, None]
        kept = patches.permute(0, 2, 3, 1, 4, 5)[images, kept_patches // width, kept_patches % width]
        return F.linear(kept.flatten(2), self.projection.weight.flatten(1), self.projection.bias)


class StellarEmbeddings(nn.Module):
    """The encoder's input sequence: CLS and patches with positions, then the learned sparse tokens without."""

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.config = config
        self.position_grid = config.image_size // config.patch_size
        self.patch_embeddings = StellarPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.position_grid**2, config.hidden_size))
        self.sparse_tokens = nn.Parameter(torch.zeros(1, config.num_sparse_tokens, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def patch_positions(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (1, h * w, d) of a patch grid; bicubically interpolated if it is not the stored one."""
        positions = self.position_embeddings[:, 1:]
        # First, since an exported program is bound to the outcome of each comparison of sizes.
        if not torch.compiler.is_exporting() and grid_size == (self.position_grid, self.position_grid):
            return positions
        return resized_positions(positions, grid_size)

    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_size: tuple[int, int],
        kept_patches: torch.Tensor | None = None,
    ) -> torch.Tensor:
        positions = self.patch_positions(grid_size)
        if kept_patches is not None:
            # Not by indexing, whose gradient threads add up in any order.
            positions = F.embedding(kept_patches, positions.squeeze(0))
        patches = self.patch_embeddings(pixel_values, kept_patches) + positions

        batch_size = pixel_values.shape[0]
        cls_token = (self.cls_token + self.position_embeddings[:, :1]).expand(batch_size, -1, -1)
        sparse_tokens = self.sparse_tokens.expand(batch_size, -1, -1)
        return self.dropout(torch.cat([cls_token, patches, sparse_tokens], dim=1))

    def grid_size(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True) -> tuple[int, int]:
        """Patches (h, w) of `pixel_values`; `ValueError` on what the encoder cannot take."""
        config = self.config
        if (
            not isinstance(pixel_values, torch.Tensor)
            or pixel_values.ndim != 4
            or pixel_values.shape[1] != config.num_channels
            or pixel_values.shape[0] < 1
        ):
            raise ValueError(
                f"pixel_values are {describe(pixel_values)}, but must be (batch, {config.num_channels}, height, "
                "width), of one image at least. Convert images with the image processor."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}, but must be normalized floating point numbers: convert "
                "images with the image processor."
            )
        height, width = pixel_values.shape[-2:]
        if min(height, width) < config.patch_size:
            raise ValueError(
                f"Images of {height}x{width} pixels are smaller than one patch of {config.patch_size}x"
                f"{config.patch_size}. Enlarge them, or use a model with smaller patches."
            )
        if not interpolate_pos_encoding and (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"Images have {height}x{width} pixels, but positions are stored for {config.image_size}x"
                f"{config.image_size}. Resize them, or pass interpolate_pos_encoding=True."
            )
        return height // config.patch_size, width // config.patch_size


class StellarLocalization(nn.Module):
    """
    L = softmax over the sparse tokens of cos(W_d D + b_d, W_s S + b_s) / tau (STELLAR, factorization). With
    `config.localization_compactness` c > 0, which is not in the paper, a mixture model is fitted to each image outside
    of training, in `config.localization_iterations` turns from these maps: each token takes the mean direction of the
    projected D under its map, and the mean and the variance of its places; then the scores are the cosine with that
    direction over tau, and c log N(place; mean, variance).
    """

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.temperature = config.localization_temperature
        self.noise = config.localization_noise
        self.compactness = config.localization_compactness
        self.iterations = config.localization_iterations
        self.dense_projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.sparse_projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, dense_features: torch.Tensor, sparse_tokens: torch.Tensor, grid_size: tuple[int, int]
    ) -> torch.Tensor:
        """(B, N, d) features of the patches of a grid and (B, r, d) sparse tokens to (B, N, r); rows sum to one."""
        dense, sparse = self.dense_projection(dense_features), self.sparse_projection(sparse_tokens)
        # In float32: the temperature magnifies rounding errors of the cosine.
        with without_autocast(dense):
            dense, sparse = self._directions(dense.float()), self._directions(sparse.float())
            scores = self._scores_of_content(dense, sparse)
            if self.compactness > 0 and not self.training:
                scores = self._mixture_scores(scores, dense, patch_positions(grid_size, scores.device))
        if self.training and self.noise > 0:
            scores = scores - self.noise * torch.empty_like(scores).exponential_().log()
        return scores.softmax(dim=-1).to(dense_features.dtype)

    def _directions(self, projected: torch.Tensor) -> torch.Tensor:
        return projected if self.temperature is None else F.normalize(projected, dim=-1, eps=1e-7)

    def _scores_of_content(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """Directions (B, N, d) and (B, r, d) to (B, N, r)."""
        return dense @ sparse.transpose(1, 2) / (self.temperature or math.sqrt(dense.shape[-1]))

    def _mixture_scores(self, scores: torch.Tensor, dense: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores (B, N, r) of the tokens to those of the mixture that is fitted to directions and places (N, 2)."""
        for _ in range(self.iterations):
            maps = scores.softmax(dim=-1)
            content = self._scores_of_content(dense, self._directions(means_under_maps(maps, dense)))
            scores = content + self.compactness * spatial_scores(maps, positions)
        return scores


class StellarTokenRefinement(nn.Module):
    """
    S + W LayerNorm(L^T D / mass) + b: adds to each token the mean of the dense features under its map. Not in the
    paper, where a token reads the whole image alike.
    """

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, sparse_tokens: torch.Tensor, localization: torch.Tensor, dense_features: torch.Tensor
    ) -> torch.Tensor:
        """S (B, r, d), L (B, N, r) and D (B, N, d) to (B, r, d)."""
        return sparse_tokens + self.projection(self.layernorm(means_under_maps(localization, dense_features)))


# Decoder -------------------------------------------------------------------------------------------------------------


class StellarFourierPositions(nn.Module):
    """Fixed random Fourier code of patch positions; its Gaussian matrix is part of the checkpoint."""

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.gaussian_matrix: torch.Tensor
        self.register_buffer("gaussian_matrix", torch.zeros(2, config.decoder_hidden_size // 2))

    def forward(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """
        (1, h * w, decoder width) for a grid (h, w), row-major: with c = 2 ((j + 0.5) / w, (i + 0.5) / h) - 1 and
        a = 2 pi c G, channels are sin a_0, cos a_0, sin a_1, cos a_1, ...
        """
        height, width = grid_size
        matrix = self.gaussian_matrix.float()
        rows = (torch.arange(height, device=matrix.device) + 0.5) / height
        columns = (torch.arange(width, device=matrix.device) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        with without_autocast(matrix):
            angles = 2 * math.pi * ((2 * torch.stack([x, y], dim=-1) - 1) @ matrix)  # (h, w, channels / 2)
        code = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)
        return code.flatten(0, 1).unsqueeze(0).to(self.gaussian_matrix.dtype)


class StellarDecoder(nn.Module):
    """Reconstruction from the low-rank features Z = L S alone: RGB, or logits over the tokenizer's codes."""

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.target = config.reconstruction_target
        width = config.decoder_hidden_size
        self.projection = nn.Linear(config.hidden_size, width)
        self.positions = StellarFourierPositions(config)
        self.layers = nn.ModuleList(
            StellarLayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if self.target == "pixels":
            self.head: nn.Module = nn.ConvTranspose2d(
                width, config.num_channels, kernel_size=config.patch_size, stride=config.patch_size
            )
        else:
            self.head = nn.Linear(width, config.codebook_size)

    def forward(
        self, sparse_tokens: torch.Tensor, localization: torch.Tensor, grid_size: tuple[int, int]
    ) -> torch.Tensor:
        """S (B, r, d) and L (B, N, r) on a grid (h, w) to RGB (B, C, h * patch, w * patch) or logits (B, N, codes)."""
        low_rank_features = localization @ sparse_tokens
        hidden_states = self.projection(low_rank_features) + self.positions(grid_size)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.layernorm(hidden_states)
        if self.target == "pixels":
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, grid_size)
        return self.head(hidden_states)

    def loss(
        self, reconstruction: torch.Tensor, image: torch.Tensor, code_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Unweighted loss () of a reconstruction: to RGB `image` (B, C, H, W) in [0, 1], or to codes (B, N)."""
        if self.target == "pixels":
            height, width = reconstruction.shape[-2:]  # without the rim that patches do not tile
            return F.mse_loss(reconstruction.float(), image[..., :height, :width])
        if not isinstance(code_labels, torch.Tensor) or code_labels.shape != reconstruction.shape[:2]:
            found = "missing" if code_labels is None else describe(code_labels)
            raise ValueError(
                f"code_labels are {found}, but a model with reconstruction_target='codes' needs the tokenizer's codes "
                f"of the clean view as {tuple(reconstruction.shape[:2])}."
            )
        _check_integers(code_labels, "code_labels")
        _check_range(code_labels, reconstruction.shape[2], "code_labels", "codebook_size")
        return F.cross_entropy(reconstruction.float().flatten(0, 1), code_labels.flatten())


# Online clustering ---------------------------------------------------------------------------------------------------


class StellarClusteringHead(nn.Module):
    """MLP, L2 normalization and K prototypes; logits are the products of both."""

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.standardize = config.standardize_projections
        inner = [config.projection_hidden_size] * (config.num_projection_layers - 1)
        widths = [config.hidden_size, *inner, config.prototype_dim]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.prototypes = nn.Parameter(torch.zeros(config.num_prototypes, config.prototype_dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., d) features to (..., prototype_dim) L2-normalized float32 projections."""
        for index, layer in enumerate(self.layers):
            features = layer(features if index == 0 else F.gelu(features))
        with without_autocast(features):
            projections = features.float()
            if self.standardize:
                projections = standardize(projections)
            return F.normalize(projections, dim=-1)

    def logits(self, projections: torch.Tensor) -> torch.Tensor:
        """(..., prototype_dim) projections to (..., K) float32 similarities."""
        with without_autocast(projections):
            return projections @ self.prototypes.float().T


# Models --------------------------------------------------------------------------------------------------------------


class StellarPreTrainedModel(StellarHubMixin, PreTrainedModel):  # type: ignore[misc]
    """Weight initialization, and what the loading, checkpointing and attention machinery has to know."""

    config: StellarConfig
    base_model_prefix = "stellar"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["StellarEmbeddings", "StellarLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": StellarLayer, "attentions": StellarAttention}
    # What checkpoints of other heads hold beyond a model.
    _keys_to_ignore_on_load_unexpected = [
        r"^(decoder|clustering_head|cls_clustering_head|teacher|norm|classifier)\.",
        r"^(stellar\.)?(localization|token_refinement)\.",
    ]

    def get_input_embeddings(self) -> nn.Module:
        # Not the patches' alone: FSDP shards this module and those of `_no_split_modules`, but none inside another.
        return self.base_model.get_submodule("embeddings")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StellarEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            init.normal_(module.sparse_tokens, std=self.config.hidden_size**-0.5)
        elif isinstance(module, StellarFourierPositions):
            init.normal_(module.gaussian_matrix)
        elif isinstance(module, StellarClusteringHead):
            init.normal_(module.prototypes)

    def train(self, mode: bool = True) -> Any:
        """
        Sets training mode. An encoder whose weights are all frozen stays in evaluation mode, so that heads learn from
        the features of use: in training mode L has noise and no compactness, and refined tokens follow it.
        """
        super().train(mode)
        encoder = self.base_model
        if encoder is not self and not any(weight.requires_grad for weight in encoder.parameters()):
            encoder.eval()
        return self

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) normalized pixels to float32 RGB in [0, 1]."""
        pixel_values = pixel_values.float()
        mean = pixel_values.new_tensor(self.config.image_mean).view(-1, 1, 1)
        std = pixel_values.new_tensor(self.config.image_std).view(-1, 1, 1)
        return pixel_values * std + mean

    @classmethod
    def from_vit_pretrained(
        cls, pretrained_model_name_or_path: str, output_loading_info: bool = False, **config_fields: Any
    ) -> Any:
        """
        A new model whose encoder has the weights of a plain ViT: ViT, ViT-MAE or DINOv2 (STELLAR, initial weights).

        The sparse tokens, the localization and all heads are new, so the model has to be trained before its tokens
        mean anything. DINOv2's layer scales are multiplied into the projections that they scale. A report of what
        came from where is logged.

        Args:
            pretrained_model_name_or_path: Folder, or owner/name on the Hub, of any model that `AutoModel` loads as a
                ViT.
            output_loading_info: Whether to return the report, too.
            **config_fields: Fields of [`StellarConfig`] that the ViT does not decide, such as `num_sparse_tokens`.
                With another `image_size` than the ViT's, its position embeddings are interpolated bicubically. The
                images' mean and standard deviation are ImageNet's, unless `image_mean` and `image_std` say otherwise.

        Returns:
            The model in evaluation mode; with `output_loading_info`, also a dictionary of lists of names:
            `loaded_keys` and `missing_keys` (new) of this model, `unexpected_keys` (not used) of the ViT.

        Raises:
            ValueError: If the checkpoint is no plain ViT (gated MLPs, registers, non-square patches, ...).

        Example:

        ```python
        >>> from stellar_hf import StellarForPreTraining

        >>> model = StellarForPreTraining.from_vit_pretrained("facebook/vit-mae-base", num_sparse_tokens=16)
        ```
        """
        from transformers import AutoModel  # only here: the Auto classes import this module

        vit = AutoModel.from_pretrained(pretrained_model_name_or_path)
        model = cls(StellarConfig(**{**config_fields_of_vit(vit.config), **config_fields})).eval()
        source = f"{pretrained_model_name_or_path} ({vit.config.model_type})"
        names, unused = load_vit_into_encoder(vit, model.base_model, source)
        if getattr(model, "teacher", None) is not None:
            model.update_teacher(0.0)

        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        loaded = [prefix + name for name in names]
        fresh = [name for name in model.state_dict() if name not in loaded and not name.startswith("teacher.")]
        logger.warning(
            f"{cls.__name__} from {source}: {len(loaded)} tensors of the encoder are the checkpoint's.\n"
            f"  New, to be trained: {', '.join(fresh)}\n  Not used: {', '.join(unused) or 'none'}"
        )
        report = {"loaded_keys": loaded, "missing_keys": fresh, "unexpected_keys": unused}
        return (model, report) if output_loading_info else model

    @classmethod
    def from_released(cls, name: str, revision: str = RELEASED_REVISION, **kwargs: Any) -> Any:
        """
        A model with the weights that the authors released (`microsoft/STELLAR` on the Hub), converted from the
        downloaded file, with every key accounted for.

        [`StellarForPreTraining`] gets decoder and clustering heads, too, other classes what they have of it; a
        classifier is new. The image processor of all released models is `StellarImageProcessorPil()`.

        Args:
            name: `"stellar-b16"`, `"stellar-l16"` or `"stellar-h16"` (ViT-B/16, ViT-L/16 and ViT-H/14 with 16 sparse
                tokens), `"stellar-b8"` or `"stellar-b24"` (ViT-B/16 with 8 and 24).
            revision: Commit, tag or branch of the repository; by default the commit that the authors' own code pins.
                A commit that is in the cache needs no connection.
            **kwargs: As in `from_pretrained`: fields of [`StellarConfig`], such as `num_labels`, `dtype`,
                `device_map`, `attn_implementation`, `quantization_config`, `output_loading_info`; `cache_dir`,
                `force_download`, `local_files_only` and `token`.

        Returns:
            The model in evaluation mode; with `output_loading_info`, also the report of `from_pretrained`.

        Raises:
            ValueError: If there is no such model, its file is damaged or another one, or a field contradicts it.
            OSError: If the file is not in the cache and cannot be downloaded.

        Example:

        ```python
        >>> from stellar_hf import StellarModel

        >>> model = StellarModel.from_released("stellar-b16")
        ```
        """
        hub_arguments = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
        state_dict = read_released(name, revision, **hub_arguments)
        own_fields = {field: kwargs.pop(field) for field in inspect.get_annotations(StellarConfig) if field in kwargs}
        config, weights = convert_weights(state_dict, StellarForPreTraining, **own_fields)
        config, kwargs = StellarConfig.from_dict(config.to_dict(), return_unused_kwargs=True, **kwargs)
        loaded = cls.from_pretrained(None, config=config, state_dict=weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = RELEASED_REPOSITORY
        return loaded


class StellarModel(StellarPreTrainedModel):
    """
    The STELLAR encoder and its factorization: sparse tokens S, localization L, and the dense features they come from.

    Args:
        config ([`StellarConfig`]): Sizes and temperatures.
        add_localization (`bool`, defaults to `True`): Whether to compute L, and to refine S by it where the
            configuration says so.

    Example:

    ```python
    >>> import torch
    >>> from stellar_hf import StellarConfig, StellarModel

    >>> model = StellarModel(StellarConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4)).eval()
    >>> output = model(torch.randn(1, 3, 224, 224))
    >>> output.sparse_tokens.shape, output.localization.shape
    (torch.Size([1, 16, 48]), torch.Size([1, 196, 16]))
    ```
    """

    def __init__(self, config: StellarConfig, add_localization: bool = True):
        super().__init__(config)
        self.embeddings = StellarEmbeddings(config)
        self.layers = nn.ModuleList(
            StellarLayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.localization = StellarLocalization(config) if add_localization else None
        refines = add_localization and config.refine_tokens
        self.token_refinement = StellarTokenRefinement(config) if refines else None
        self.post_init()

    def encode(
        self,
        pixel_values: torch.Tensor,
        kept_patches: torch.Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        needed: Literal["all", "cls_and_tokens", "cls"] = "all",
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        The encoder without the factorization.

        Args:
            pixel_values: (B, C, H, W), normalized.
            kept_patches: (B, kept) int64 row-major indices of the patches to keep; the others are dropped before they
                are embedded. All by default.
            grid_size: Patches (h, w) of the images, where they are known already.
            needed: Which outputs the last layer computes: all, CLS and sparse tokens, or CLS alone.

        Returns:
            (B, 1 + N or kept + r, d): CLS, patches and sparse tokens after the final LayerNorm; (B, 1 + r, d) or
            (B, 1, d) where fewer are needed.
        """
        grid_size = grid_size or self.embeddings.grid_size(pixel_values)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, grid_size, kept_patches)
        *layers, last_layer = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, **kwargs)
        rows = self._rows(hidden_states, needed)
        return self.layernorm(last_layer(hidden_states, rows, **kwargs))

    def _rows(self, hidden_states: torch.Tensor, needed: str) -> torch.Tensor | None:
        """int64 positions (k,) in sequences (B, n, d) of the outputs that are needed; None for all."""
        if needed == "all":
            return None
        length = hidden_states.shape[1]
        num_tokens = self.config.num_sparse_tokens if needed == "cls_and_tokens" else 0
        rows = torch.arange(length - 1 - num_tokens, length, device=hidden_states.device)
        return rows.index_fill_(0, rows.new_zeros(1), 0)

    def split(self, last_hidden_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A sequence (B, 1 + N + r, d) to CLS (B, d), dense features (B, N, d) and sparse tokens (B, r, d)."""
        num_sparse = self.config.num_sparse_tokens
        return last_hidden_state[:, 0], last_hidden_state[:, 1:-num_sparse], last_hidden_state[:, -num_sparse:]

    def cls_and_tokens(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CLS (B, d) and sparse tokens (B, r, d) of images (B, C, H, W) and no more, as `forward` gives them."""
        if self.token_refinement is not None:
            outputs = self(pixel_values, return_dict=True)
            return outputs.last_hidden_state[:, 0], outputs.sparse_tokens
        cls, _, sparse_tokens = self.split(self.encode(pixel_values, needed="cls_and_tokens"))
        return cls, sparse_tokens

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StellarModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Images normalized with `config.image_mean` and
                `config.image_std`, of any height and width of at least one patch. Pixels beyond the last whole patch
                are not seen.
            interpolate_pos_encoding (`bool`, defaults to `True`): Whether other sizes than `config.image_size` are
                taken, by interpolating the position embeddings.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict` (`bool`), by default those of the
                configuration, and what the attention implementation takes.

        Returns:
            [`StellarModelOutput`]

        Raises:
            ValueError: On anything but floating point images of the right number of channels, no images, or images
                smaller than a patch.
        """
        grid_size = self.embeddings.grid_size(pixel_values, interpolate_pos_encoding)
        last_hidden_state = self.encode(pixel_values, grid_size=grid_size, **kwargs)
        _, dense_features, sparse_tokens = self.split(last_hidden_state)
        localization = None
        if self.localization is not None:
            localization = self.localization(dense_features, sparse_tokens, grid_size)
        if self.token_refinement is not None:
            sparse_tokens = self.token_refinement(sparse_tokens, localization, dense_features)
        batch_size = pixel_values.shape[:1]
        return StellarModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=sparse_tokens.mean(dim=1),
            sparse_tokens=sparse_tokens,
            localization=localization,
            grid_size=torch.stack(
                [pixel_values.new_full(batch_size, side, dtype=torch.int64) for side in grid_size], dim=1
            ),
        )


class StellarTeacher(nn.Module):
    """What the exponential moving average follows: encoder with sparse tokens, and both clustering heads."""

    def __init__(self, config: StellarConfig):
        super().__init__()
        self.stellar = StellarModel(config, add_localization=config.refine_tokens)
        self.clustering_head = StellarClusteringHead(config)
        self.cls_clustering_head = StellarClusteringHead(config)


def _without_label_names(forward: Callable) -> Callable:
    """
    Shows `forward` without its `code_labels` to those that inspect it: the Trainer takes every argument with "label"
    in its name for a label, and has no `eval_loss` for batches without it, whatever else gives a loss.
    """
    signature = inspect.signature(forward)
    shown = [parameter for name, parameter in signature.parameters.items() if name != "code_labels"]
    forward.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return forward


class StellarForPreTraining(StellarPreTrainedModel):
    """
    STELLAR with decoder, clustering heads and optional EMA teacher: the joint alignment and reconstruction objective.

    The teacher (`config.use_teacher`) starts as a copy of the model; move it with
    [`~StellarForPreTraining.update_teacher`] once per optimizer step, as [`StellarTrainer`] does.

    Adapters (PEFT) on the encoder or the clustering heads need twins in the teacher, which follow them and are saved
    with them: give `target_modules` as names, such as `["q_proj", "v_proj"]`, which match in both. Twins start with
    random values of their own, so call `update_teacher(0.0)` once after adding the adapters.
    """

    objective_class = StellarObjective
    _keys_to_ignore_on_load_missing = [r"^teacher\."]  # it then starts as a copy

    def __init__(self, config: StellarConfig):
        super().__init__(config)
        self.stellar = StellarModel(config)
        self.decoder = StellarDecoder(config)
        self.clustering_head = StellarClusteringHead(config)
        self.cls_clustering_head = StellarClusteringHead(config)
        self.teacher = StellarTeacher(config).requires_grad_(False) if config.use_teacher else None
        if config.use_teacher:
            # Steps of 1 - momentum would be lost in the rounding of half precision.
            self._keep_in_fp32_modules_strict = {"teacher"}
        self.post_init()

    @property
    def _reconstruction_weight(self) -> float:
        weight = self.config.reconstruction_weight
        if weight is not None:
            return weight
        return 10.0 if self.config.reconstruction_target == "pixels" else 0.05

    # Teacher

    def initialize_weights(self) -> None:
        """Fresh values for weights that were not loaded; a teacher that was not loaded copies the model."""
        # Not in `_init_weights`: custom classes are skipped there when they own no weight directly.
        super().initialize_weights()
        for teacher_weight, weight in self.teacher_and_student_weights():
            init.copy_(teacher_weight, weight)

    def train(self, mode: bool = True) -> "StellarForPreTraining":
        """Sets training mode; the teacher stays in evaluation mode, and without the gradient that loading gives it."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
        return self

    def teacher_and_student_weights(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Pairs of each teacher weight and the student weight that it follows; none without a teacher.

        Raises:
            ValueError: If adapters were added to the student and not to the teacher, or the other way round.
        """
        if self.teacher is None:
            return []
        student, teacher = dict(self.named_parameters()), dict(self.teacher.named_parameters())
        unpaired = [name for name in teacher if name not in student]
        if unpaired:
            raise ValueError(
                f"{len(unpaired)} weights of the teacher, such as {unpaired[0]}, have no counterpart in the student: "
                "adapters must be added to both. Give target_modules and modules_to_save as names that match "
                'in both, such as ["q_proj", "v_proj"].'
            )
        return [(weight, student[name]) for name, weight in teacher.items()]

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """
        t = m t + (1 - m) s for every teacher weight t and its student weight s.

        Args:
            momentum: m in [0, 1]; the paper takes 0.996.

        Raises:
            ValueError: If the model has no teacher, its adapters are not the student's, or `momentum` is out of range.
        """
        if self.teacher is None:
            raise ValueError("This model has no teacher: set use_teacher=True in its StellarConfig.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}, but must be in [0, 1].")
        for teacher_weight, weight in self.teacher_and_student_weights():
            teacher_weight.lerp_(weight.to(teacher_weight.dtype), 1 - momentum)

    # Objective

    @_without_label_names
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        global_pixel_values: torch.Tensor | None = None,
        local_pixel_values: torch.Tensor | None = None,
        code_labels: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        return_loss: bool = True,
        num_kept: int | None = None,
        target_temperature: float | None = None,
        prediction_temperature: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StellarForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): The clean view, normalized.
            global_pixel_values (`torch.Tensor` of shape `(B, G, C, H', W')`, *optional*): Global views, to be masked.
                Without them the objective has no masked terms.
            local_pixel_values (`torch.Tensor` of shape `(B, V, C, h, w)`, *optional*): Local views.
            code_labels (`torch.Tensor` of shape `(B, N)`, *optional*): int64 codes of the clean view under the frozen
                tokenizer; needed for the loss of a model with `reconstruction_target="codes"`. The stock `Trainer`
                keeps such a column, and gives it to `compute_metrics`, with `label_names=["code_labels"]`.
            noise (`torch.Tensor` of shape `(B * G, N)`, *optional*): Masking scores of the global views, image-major,
                lowest kept, used as they are. Drawn by [`masking_noise`] by default; without global views there is
                nothing to mask.
            interpolate_pos_encoding (`bool`, defaults to `True`): As in [`StellarModel`].
            return_loss (`bool`, defaults to `True`): Whether to compute the objective, which needs all weights in
                memory. A code model without `code_labels` and views returns no loss either, nor does an exported
                program.
            num_kept (`int`, *optional*): Patches that each masked view keeps, in [1, N]; by default what
                `config.mask_ratio` leaves. For schedules, which do not touch the configuration. A number, since a
                compiled model takes any after its second one, but would be compiled anew for each ratio.
            target_temperature (`float`, *optional*): Temperature of the Sinkhorn targets, > 0; by default
                `config.target_temperature`.
            prediction_temperature (`float`, *optional*): Temperature of the predictions, > 0; by default
                `config.prediction_temperature`.
            **kwargs: As in [`StellarModel`].

        Returns:
            [`StellarForPreTrainingOutput`]

        Raises:
            ValueError: On views, codes or noise of a wrong shape, missing codes or codes out of range, a number of
                patches or a temperature out of range, a loss with offloaded weights, or pixels that [`StellarModel`]
                refuses.
        """
        objective = self.objective_class(self.config, self, target_temperature, prediction_temperature)
        outputs = self.stellar(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        grid_size = self.stellar.embeddings.grid_size(pixel_values)
        reconstruction = self.decoder(outputs.sparse_tokens, outputs.localization, grid_size)

        terms: dict[str, torch.Tensor] = {}
        codes_missing = self.config.reconstruction_target == "codes" and code_labels is None
        has_views = global_pixel_values is not None or local_pixel_values is not None
        # Programs are exported without the objective, which is bound to a size of the batch.
        if return_loss and (has_views or not codes_missing) and not torch.compiler.is_exporting():
            self._check_weights_are_in_memory(pixel_values.device)
            self._check_views(pixel_values.shape[0], global_pixel_values, local_pixel_values)
            clean = objective.project(self, outputs.last_hidden_state[:, 0], outputs.sparse_tokens)
            targets = self._targets(objective, clean, pixel_values, global_pixel_values)
            masked = local_cls = None
            if global_pixel_values is not None:
                masked = self._encode_masked(global_pixel_values, noise, num_kept)
            if local_pixel_values is not None:
                local_cls = self.stellar.encode(local_pixel_values.flatten(0, 1), needed="cls")[:, 0]
            terms = objective.terms(clean, targets, masked, local_cls)
            loss = self.decoder.loss(reconstruction, self.denormalize(pixel_values), code_labels)
            terms["reconstruction_loss"] = self._reconstruction_weight * loss
            terms["loss"] = torch.stack([terms[name] for name in LOSS_TERMS]).sum()
        return StellarForPreTrainingOutput(
            **terms,
            reconstruction=reconstruction,
            sparse_tokens=outputs.sparse_tokens,
            localization=outputs.localization,
            grid_size=outputs.grid_size,
            token_diversity=token_diversity(outputs.sparse_tokens),
            localization_sharpness=localization_sharpness(outputs.localization),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_weights_are_in_memory(self, device: torch.device) -> None:
        # Offloaded weights are loaded for the forward of their module alone; the objective reads prototypes elsewhere.
        offloaded = [name for name, weight in self.named_parameters() if weight.device.type == "meta"]
        if offloaded and device.type != "meta":
            raise ValueError(
                f"The loss needs all weights in memory, but {len(offloaded)} of them, such as {offloaded[0]}, are "
                "offloaded: pass return_loss=False, or load the model without offload."
            )

    def _check_views(
        self,
        batch_size: int,
        global_pixel_values: torch.Tensor | None,
        local_pixel_values: torch.Tensor | None,
    ) -> None:
        check_views("global_pixel_values", global_pixel_values, batch_size)
        check_views("local_pixel_values", local_pixel_values, batch_size)
        if self.teacher is not None and global_pixel_values is not None and global_pixel_values.shape[1] < 2:
            raise ValueError(
                "With use_teacher=True the teacher sees the second global view, but global_pixel_values have shape "
                f"{tuple(global_pixel_values.shape)}: make at least two global views."
            )

    def _targets(
        self,
        objective: StellarObjective,
        clean: ProjectedView,
        pixel_values: torch.Tensor,
        global_pixel_values: torch.Tensor | None,
    ) -> Targets:
        """The targets of each image: from its clean view, or from what the teacher sees in the second global one."""
        if self.teacher is None:
            return objective.targets(self, clean)
        # Without views, as in a mere evaluation, the teacher looks at the clean one.
        view = pixel_values if global_pixel_values is None else global_pixel_values[:, 1]
        with torch.no_grad():
            seen = objective.project(self.teacher, *self.teacher.stellar.cls_and_tokens(view))
        return objective.targets(self.teacher, seen)

    def _encode_masked(
        self, global_pixel_values: torch.Tensor, noise: torch.Tensor | None, num_kept: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, G, C, H, W) global views to CLS (B * G, d) and sparse tokens (B * G, r, d) of their kept patches."""
        views = global_pixel_values.flatten(0, 1)
        grid_size = self.stellar.embeddings.grid_size(views)
        kept = kept_patches(self.config, len(views), grid_size, noise, num_kept, views.device)
        cls, _, tokens = self.stellar.split(self.stellar.encode(views, kept, grid_size, needed="cls_and_tokens"))
        return cls, tokens


# Heads ---------------------------------------------------------------------------------------------------------------


class StellarForImageClassification(StellarPreTrainedModel):
    """
    STELLAR with LayerNorm and a linear layer on the mean of the sparse tokens, as in the paper's linear probe.

    The encoder computes the localization here only where it refines the tokens: otherwise the loss would not train it.
    For a linear probe, freeze the encoder by `model.stellar.requires_grad_(False)`: it then stays in evaluation mode.

    Example:

    ```python
    >>> import torch
    >>> import stellar_hf
    >>> from transformers import AutoModelForImageClassification

    >>> model = AutoModelForImageClassification.from_pretrained(stellar_hf.DEMO_MODEL, num_labels=19)
    >>> model(torch.randn(1, 3, 128, 128)).logits.shape
    torch.Size([1, 19])
    ```
    """

    def __init__(self, config: StellarConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.stellar = StellarModel(config, add_localization=config.refine_tokens)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): As in [`StellarModel`].
            labels (`torch.Tensor`, *optional*): int64 classes `(B,)` in [0, num_labels) for cross entropy; floats
                `(B,)` with `num_labels=1` for regression; floats `(B, num_labels)` for several labels an image.
                `config.problem_type` decides where this leaves a choice.
            interpolate_pos_encoding (`bool`, defaults to `True`): As in [`StellarModel`].
            **kwargs: As in [`StellarModel`].

        Returns:
            `ImageClassifierOutput` with `logits` of shape `(B, num_labels)`, and `loss` if there are labels.

        Raises:
            ValueError: On classes out of range, or pixels that [`StellarModel`] refuses.
        """
        outputs = self.stellar(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(self.norm(outputs.pooler_output))
        loss = None
        if labels is not None:
            _check_classes(labels, pixel_values.shape[0], self.num_labels)
            loss = self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class StellarForSemanticSegmentation(StellarPreTrainedModel):
    """
    STELLAR with BatchNorm and a 1x1 convolution on its patch features, as in the paper's segmentation probe.

    `config.segmentation_features` chooses the dense features D of the encoder or the low-rank features Z = L S. For a
    probe, freeze the encoder by `model.stellar.requires_grad_(False)`: it then stays in evaluation mode.

    Example:

    ```python
    >>> import torch
    >>> import stellar_hf
    >>> from transformers import AutoModelForSemanticSegmentation

    >>> model = AutoModelForSemanticSegmentation.from_pretrained(stellar_hf.DEMO_MODEL, num_labels=19)
    >>> model(torch.randn(1, 3, 128, 128)).logits.shape[:2]
    torch.Size([1, 19])
    ```
    """

    def __init__(self, config: StellarConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        # Without a gradient of its own, the localization of dense features would be an unused parameter.
        self.stellar = StellarModel(config, add_localization=config.segmentation_features == "low_rank")
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.classifier = nn.Conv2d(config.hidden_size, self.num_labels, kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): As in [`StellarModel`].
            labels (`torch.Tensor` of shape `(B, H', W')`, *optional*): int64 class of each pixel in [0, num_labels),
                or `config.semantic_loss_ignore_index`. The logits are upsampled to this size for the loss.
            interpolate_pos_encoding (`bool`, defaults to `True`): As in [`StellarModel`].
            **kwargs: As in [`StellarModel`].

        Returns:
            `SemanticSegmenterOutput` with `logits` of shape `(B, num_labels, h, w)` on the grid of patches, and, if
            there are labels, `loss`: cross entropy plus Dice.

        Raises:
            ValueError: On labels of another shape or classes out of range, or pixels that [`StellarModel`] refuses.
        """
        outputs = self.stellar(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        if self.config.segmentation_features == "low_rank":
            features = outputs.localization @ outputs.sparse_tokens
        else:
            _, features, _ = self.stellar.split(outputs.last_hidden_state)
        grid_size = self.stellar.embeddings.grid_size(pixel_values)
        logits = self.classifier(self.norm(features.transpose(1, 2).unflatten(2, grid_size)))
        return SemanticSegmenterOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ignored = self.config.semantic_loss_ignore_index
        _check_integers(labels)
        if labels.ndim != 3 or labels.shape[0] != logits.shape[0]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but must be (batch, height, width) with one class for each "
                f"pixel of the {logits.shape[0]} images."
            )
        _check_range(labels, self.num_labels, ignored=ignored)
        logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
        return pixel_cross_entropy(logits, labels, ignored) + dice_loss(logits, labels, ignored)


class StellarForImageReconstruction(StellarPreTrainedModel):
    """
    STELLAR with its decoder: images to tokens and back, without the training objective's heads.

    Example:

    ```python
    >>> import torch
    >>> import stellar_hf
    >>> from stellar_hf import StellarForImageReconstruction

    >>> model = StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL)
    >>> output = model(torch.randn(1, 3, 128, 128))
    >>> output.reconstruction.shape
    torch.Size([1, 3, 128, 128])
    >>> edited = model.decode(output.sparse_tokens, output.localization, output.grid_size)
    ```
    """

    # Diffusers' group offloading brings weights when a module is called, and its pipelines call these two.
    _group_offload_block_modules = ["stellar", "decoder"]

    def __init__(self, config: StellarConfig):
        super().__init__(config)
        self.stellar = StellarModel(config)
        self.decoder = StellarDecoder(config)
        self.post_init()

    def decode(
        self,
        sparse_tokens: torch.Tensor,
        localization: torch.Tensor,
        grid_size: tuple[int, int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Decodes tokens and where they are; neither needs to come from an image.

        Args:
            sparse_tokens: S, (B, r, d) floating point; any number r of tokens.
            localization: L, (B, N, r), non-negative, rows sum to 1; patches are row-major over the grid.
            grid_size: Patches (h, w) with h * w = N, or those of a model's output, (B, 2); a square by default.

        Returns:
            RGB in [0, 1] up to regression error, (B, 3, h * patch, w * patch), or code logits (B, N, codebook_size),
            in the dtype of the model, to which S and L are converted.

        Raises:
            ValueError: If the shapes do not fit.
        """
        fits = sparse_tokens.ndim == localization.ndim == 3 and sparse_tokens.shape[:2] == (
            localization.shape[0],
            localization.shape[2],
        )
        if not fits or sparse_tokens.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"sparse_tokens have shape {tuple(sparse_tokens.shape)} and localization "
                f"{tuple(localization.shape)}, but (batch, tokens, {self.config.hidden_size}) and (batch, patches, "
                "tokens) are expected."
            )
        sparse_tokens, localization = sparse_tokens.to(self.dtype), localization.to(self.dtype)
        return self.decoder(sparse_tokens, localization, resolve_grid_size(localization.shape[1], grid_size))

    @_without_label_names
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        code_labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        return_loss: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StellarImageReconstructionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): As in [`StellarModel`].
            code_labels (`torch.Tensor` of shape `(B, N)`, *optional*): int64 codes of the images under the frozen
                tokenizer, for the loss of a model with `reconstruction_target="codes"`; as in
                [`StellarForPreTraining`].
            interpolate_pos_encoding (`bool`, defaults to `True`): As in [`StellarModel`].
            return_loss (`bool`, defaults to `True`): Whether to compute the loss; with codes it needs `code_labels`.
            **kwargs: As in [`StellarModel`].

        Returns:
            [`StellarImageReconstructionOutput`]

        Raises:
            ValueError: On codes of a wrong shape or out of range, or pixels that [`StellarModel`] refuses.
        """
        outputs = self.stellar(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        grid_size = self.stellar.embeddings.grid_size(pixel_values)
        reconstruction = self.decoder(outputs.sparse_tokens, outputs.localization, grid_size)
        loss = None
        if return_loss and (self.config.reconstruction_target == "pixels" or code_labels is not None):
            loss = self.decoder.loss(reconstruction, self.denormalize(pixel_values), code_labels)
        return StellarImageReconstructionOutput(
            loss=loss,
            reconstruction=reconstruction,
            sparse_tokens=outputs.sparse_tokens,
            localization=outputs.localization,
            grid_size=outputs.grid_size,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class StellarBackbone(BackboneMixin, StellarModel):  # type: ignore[misc]
    """
    The encoder as a backbone of detection and segmentation frameworks: feature maps of chosen layers.

    `out_features` (or `out_indices`) of the configuration choose among `"stem"`, the embeddings, and `"stage1"` to
    `"stage{num_hidden_layers}"`; the last one by default. `AutoBackbone.from_config(config)` and
    `AutoBackbone.from_pretrained("owner/name")` find this class. In a folder no `AutoBackbone.from_pretrained` of
    Transformers finds any model, DINOv2 included: take `StellarBackbone.from_pretrained(folder)` there.

    Example:

    ```python
    >>> import torch
    >>> import stellar_hf
    >>> from stellar_hf import StellarBackbone

    >>> model = StellarBackbone.from_pretrained(stellar_hf.DEMO_MODEL, out_features=["stage1", "stage3"])
    >>> len(model(torch.randn(1, 3, 128, 128)).feature_maps)
    2
    ```
    """

    def __init__(self, config: StellarConfig):
        super().__init__(config, add_localization=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): As in [`StellarModel`].
            interpolate_pos_encoding (`bool`, defaults to `True`): As in [`StellarModel`].
            **kwargs: As in [`StellarModel`].

        Returns:
            `BackboneOutput` with `feature_maps`: one tensor `(B, d, h, w)` for each of `out_features`, after the final
            LayerNorm, without CLS and sparse tokens.

        Raises:
            ValueError: On pixels that [`StellarModel`] refuses.
        """
        grid_size = self.embeddings.grid_size(pixel_values, interpolate_pos_encoding)
        hidden_states = self.embeddings(pixel_values.to(self.dtype), grid_size)
        stages = [hidden_states]
        for layer in self.layers:
            stages.append(layer(stages[-1], **kwargs))
        _, patches, _ = zip(*(self.split(self.layernorm(stages[index])) for index in self.out_indices), strict=True)
        return BackboneOutput(
            feature_maps=tuple(features.transpose(1, 2).unflatten(2, grid_size) for features in patches)
        )


# Labels --------------------------------------------------------------------------------------------------------------


def _check_classes(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
    """`ValueError` unless `labels` are those of so many images; which loss they mean is the configuration's matter."""
    if not isinstance(labels, torch.Tensor) or labels.shape[:1] != (batch_size,):
        raise ValueError(
            f"labels are {describe(labels)}, but must be a tensor with a row for each of {batch_size} images."
        )
    if num_labels > 1 and labels.dtype == torch.long:
        _check_range(labels, num_labels)


def _check_integers(labels: torch.Tensor, name: str = "labels") -> None:
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, torch.Tensor) else describe(labels)
        raise ValueError(f"{name} are {found}, but must be an int64 tensor.")


def _check_range(
    labels: torch.Tensor, size: int, name: str = "labels", size_name: str = "num_labels", ignored: int | None = None
) -> None:
    if torch.compiler.is_compiling():
        return  # a look at the values would break the graph
    wrong = (labels < 0) | (labels >= size)
    if ignored is not None:
        wrong &= labels != ignored
    if wrong.any():
        also = "" if ignored is None else f" or {ignored} (ignored)"
        raise ValueError(
            f"{name} hold {labels[wrong][0].item()}, but {size_name} is {size}: they must be in [0, {size}){also}. "
            f"Map them, or take a model with another {size_name}."
        )


__all__ = [
    "StellarBackbone",
    "StellarForImageClassification",
    "StellarForImageReconstruction",
    "StellarForPreTraining",
    "StellarForPreTrainingOutput",
    "StellarForSemanticSegmentation",
    "StellarImageReconstructionOutput",
    "StellarModel",
    "StellarModelOutput",
    "StellarPreTrainedModel",
]
