# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The pre-training objective of STELLAR written down plainly, on the modules of a model: what its speed is compared with.

Every patch is embedded before it is dropped, every token goes through every layer and the final norm, each kind of
view has a forward of its own, and the logits and targets of every token over all prototypes exist at once.
"""

import torch
import torch.nn.functional as F
from torch import nn

from stellar_hf import StellarForPreTraining, StellarModel
from stellar_hf.initialization_stellar import resized_positions
from stellar_hf.loss_stellar import koleo_loss, match_tokens, num_kept_patches

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def plain_loss(
    model: StellarForPreTraining,
    pixel_values: torch.Tensor,
    global_pixel_values: torch.Tensor,
    local_pixel_values: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The loss of `model(...)` of a model with `reconstruction_target="pixels"` and without a teacher."""
    config, encoder = model.config, model.stellar
    head, cls_head = model.clustering_head, model.cls_clustering_head
    num_kept = num_kept_patches(noise.shape[1], config.mask_ratio)
    kept = noise.argsort(dim=1)[:, :num_kept]

    clean_cls, dense, tokens = encode(encoder, pixel_values)
    masked_cls, _, masked_tokens = encode(encoder, global_pixel_values.flatten(0, 1), kept)
    local_cls, _, _ = encode(encoder, local_pixel_values.flatten(0, 1))

    grid_size = (pixel_values.shape[2] // config.patch_size, pixel_values.shape[3] // config.patch_size)
    reconstruction = decode(model.decoder, encoder.localization(dense, tokens, grid_size) @ tokens, grid_size)
    mean, std = (pixel_values.new_tensor(values).view(-1, 1, 1) for values in (config.image_mean, config.image_std))
    reconstruction_loss = F.mse_loss(reconstruction.float(), pixel_values * std + mean)

    logits = prototype_logits(head, tokens)  # (B * r, K)
    cls_logits = prototype_logits(cls_head, clean_cls)  # (B, K)
    targets, cls_targets = assign(logits, config), assign(cls_logits, config)
    views = global_pixel_values.shape[1]
    index = match_tokens(
        masked_tokens,
        tokens.detach().repeat_interleave(views, dim=0),
        config.matching_epsilon,
        config.matching_iterations,
    )
    view_targets = targets.view(len(pixel_values), -1, targets.shape[1]).repeat_interleave(views, dim=0)
    masked_targets = torch.take_along_dim(view_targets, index.unsqueeze(-1), dim=1).flatten(0, 1)  # (B * V * r, K)

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_probabilities = (logits / config.prediction_temperature).log_softmax(dim=-1)
        return -(targets * log_probabilities).sum(dim=-1).mean()

    def cls_view_loss(cls: torch.Tensor) -> torch.Tensor:
        repeated = cls_targets.repeat_interleave(len(cls) // len(cls_targets), dim=0)
        return cross_entropy(prototype_logits(cls_head, cls), repeated)

    return (
        (10.0 if config.reconstruction_weight is None else config.reconstruction_weight) * reconstruction_loss
        + config.koleo_weight * (koleo_loss(tokens) + koleo_loss(masked_tokens))
        + config.clustering_weight * cross_entropy(logits, targets)
        + config.clustering_weight * cross_entropy(cls_logits, cls_targets)
        + config.masked_weight * cross_entropy(prototype_logits(head, masked_tokens), masked_targets)
        + config.masked_weight * cls_view_loss(masked_cls)
        + config.local_weight * cls_view_loss(local_cls)
    )


def encode(encoder: StellarModel, pixel_values: torch.Tensor, kept: torch.Tensor | None = None) -> Split:
    """CLS, patches and sparse tokens of images, of which only the `kept` (B, kept) patches go on."""
    embeddings = encoder.embeddings
    projection = embeddings.patch_embeddings.projection
    patches = F.conv2d(pixel_values, projection.weight, projection.bias, stride=projection.weight.shape[-1])
    grid_size = (patches.shape[2], patches.shape[3])
    cls_position, positions = embeddings.position_embeddings[:, :1], embeddings.position_embeddings[:, 1:]
    if grid_size[0] * grid_size[1] != positions.shape[1]:
        positions = resized_positions(positions, grid_size)
    patches = patches.flatten(2).transpose(1, 2) + positions
    if kept is not None:
        patches = torch.take_along_dim(patches, kept.unsqueeze(-1), dim=1)
    cls = (embeddings.cls_token + cls_position).expand(len(patches), -1, -1)
    sparse_tokens = embeddings.sparse_tokens.expand(len(patches), -1, -1)
    sequence = torch.cat([cls, patches, sparse_tokens], dim=1)
    for layer in encoder.layers:
        sequence = transform(layer, sequence)
    sequence = encoder.layernorm(sequence)
    num_sparse = sparse_tokens.shape[1]
    return sequence[:, 0], sequence[:, 1:-num_sparse], sequence[:, -num_sparse:]


def transform(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """A layer of encoder or decoder: all positions, and autograd keeps what it will."""
    attention, mlp = layer.attention, layer.mlp
    normalized = layer.layernorm_before(hidden_states)
    query, key, value = (
        projection(normalized).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    hidden_states = hidden_states + attention.o_proj(mixed)
    return hidden_states + mlp.fc2(F.gelu(mlp.fc1(layer.layernorm_after(hidden_states))))


def decode(decoder: nn.Module, features: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Low-rank features (B, N, d) to RGB (B, C, H, W)."""
    hidden_states = decoder.projection(features) + decoder.positions(grid_size)
    for layer in decoder.layers:
        hidden_states = transform(layer, hidden_states)
    return decoder.head(decoder.layernorm(hidden_states).transpose(1, 2).unflatten(2, grid_size))


def prototype_logits(head: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """(..., d) features to (rows, K) float32 similarities with all prototypes."""
    projections = head(features)
    with torch.autocast(projections.device.type, enabled=False):
        return projections.float().flatten(0, -2) @ head.prototypes.float().T


@torch.no_grad()
def assign(logits: torch.Tensor, config) -> torch.Tensor:
    """Sinkhorn-Knopp in the log domain, over the rows of this process."""
    scores = logits / config.target_temperature
    scores = scores - scores.amax(dim=0, keepdim=True)
    for _ in range(config.sinkhorn_iterations):
        scores = scores - config.sinkhorn_scale * scores.logsumexp(dim=0, keepdim=True)
        scores = scores.log_softmax(dim=1)
    return scores.exp()
