# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A small MaskGIT-VQ tokenizer, and a small STELLAR that reconstructs its codes, trained on photo mosaics."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import stellar_hf
from stellar_hf import MaskGitVQModel, StellarForImageReconstruction
from stellar_hf.initialization_stellar import resized_positions

from .descent import Sizes, descent_of, training_batches
from .images import GRID, IMAGE_SIZE, PATCH_SIZE, scenes

NUM_CODES = 512
# About the variance of the images' pixels: with it, errors of images and of latents have the same scale.
PIXEL_VARIANCE = 0.06


class Encoded(NamedTuple):
    """Images as STELLAR sees them: S, L and the logits of codes."""

    tokens: Tensor
    localization: Tensor
    logits: Tensor


class Models(NamedTuple):
    stellar: StellarForImageReconstruction
    tokenizer: MaskGitVQModel

    def encode(self, images: Tensor) -> Encoded:
        output = self.stellar(normalized(self.stellar, images), return_loss=False)
        return Encoded(output.sparse_tokens, output.localization, output.reconstruction)

    def logits(self, tokens: Tensor, localization: Tensor) -> Tensor:
        return self.stellar.decode(tokens, localization, GRID)

    def images(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decode(codes=codes, grid_size=GRID).sample

    def mean_images(self, logits: Tensor) -> Tensor:
        """Of the mean of the codes under their distribution, which is no code."""
        latents = logits.softmax(-1) @ self.tokenizer.quantize.embedding.weight
        return self.tokenizer.decode(latents=latents.transpose(1, 2).unflatten(2, GRID)).sample


def trained_models(seed: int, sizes: Sizes, device: str) -> Models:
    images = scenes("train", sizes.train_scenes).to(device)
    tokenizer = trained_tokenizer(images, seed, sizes)
    return Models(trained_stellar(images, tokenizer, seed, sizes), tokenizer)


def trained_tokenizer(images: Tensor, seed: int, sizes: Sizes) -> MaskGitVQModel:
    torch.manual_seed(seed)
    tokenizer = MaskGitVQModel(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=32,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    ).to(images.device)
    steps = sizes.tokenizer_steps
    descend = descent_of(tokenizer, steps, learning_rate=2e-3)
    used = torch.zeros(NUM_CODES, dtype=torch.bool, device=images.device)
    for step, batch in enumerate(training_batches(len(images), sizes.batch_size, steps)):
        pixels = images[batch].float() / 255
        latents = tokenizer.encoder(pixels)
        if step < 0.1 * steps:  # an autoencoder first, whose latents then give the codes
            descend(F.mse_loss(tokenizer.decoder(latents), pixels) / PIXEL_VARIANCE)
            continue
        if step < 0.8 * steps and step % 20 == 0:
            replace_codes(tokenizer, ~used, latents)
            used.zero_()
        codes = tokenizer.quantize(latents.permute(0, 2, 3, 1))
        used[codes] = True
        descend(tokenizer_loss(tokenizer, pixels, latents, codes))
    return tokenizer.eval()


def tokenizer_loss(tokenizer: MaskGitVQModel, pixels: Tensor, latents: Tensor, codes: Tensor) -> Tensor:
    """Of reconstruction, codebook and commitment, with the straight-through gradient."""
    quantized = tokenizer.quantize.embedding(codes).permute(0, 3, 1, 2)
    decoded = tokenizer.decoder(latents + (quantized - latents).detach())
    commitment = F.mse_loss(quantized, latents.detach()) + 0.25 * F.mse_loss(latents, quantized.detach())
    return F.mse_loss(decoded, pixels) / PIXEL_VARIANCE + commitment


@torch.no_grad()
def replace_codes(tokenizer: MaskGitVQModel, unused: Tensor, latents: Tensor) -> None:
    """Puts random latents in place of codes that no patch chose."""
    candidates = latents.permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.randperm(len(candidates))[: int(unused.sum())].to(latents.device)
    tokenizer.quantize.embedding.weight[unused] = candidates[chosen]


def trained_stellar(
    images: Tensor, tokenizer: MaskGitVQModel, seed: int, sizes: Sizes
) -> StellarForImageReconstruction:
    torch.manual_seed(seed)
    codes = codes_of(tokenizer, images)
    model = stellar_of_demo().train().to(images.device)
    descend = descent_of(model, sizes.stellar_steps, learning_rate=1e-3)
    for batch in training_batches(len(images), sizes.batch_size, sizes.stellar_steps):
        pixel_values = normalized(model, images[batch].float() / 255)
        descend(model(pixel_values, code_labels=codes[batch]).loss)
    return model.eval()


@torch.no_grad()
def stellar_of_demo() -> StellarForImageReconstruction:
    """The demo model on patches of this size, which it at first sees as it saw its own, with a head of codes."""
    demo = StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL)
    model = StellarForImageReconstruction.from_pretrained(
        stellar_hf.DEMO_MODEL,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        reconstruction_target="codes",
        codebook_size=NUM_CODES,
        localization_noise=0.0,  # as in the released models
        ignore_mismatched_sizes=True,
    )
    old, new = demo.stellar.embeddings, model.stellar.embeddings
    kernel = old.patch_embeddings.projection.weight
    size_ratio = demo.config.patch_size / PATCH_SIZE
    new.patch_embeddings.projection.weight.copy_(F.adaptive_avg_pool2d(kernel, PATCH_SIZE) * size_ratio**2)
    positions = old.position_embeddings
    new.position_embeddings.copy_(torch.cat([positions[:, :1], resized_positions(positions[:, 1:], GRID)], dim=1))
    return model


def normalized(model: StellarForImageReconstruction, images: Tensor) -> Tensor:
    mean, std = (
        images.new_tensor(values).view(3, 1, 1) for values in (model.config.image_mean, model.config.image_std)
    )
    return (images - mean) / std


@torch.no_grad()
def codes_of(tokenizer: MaskGitVQModel, images: Tensor) -> Tensor:
    return torch.cat([tokenizer.encode(batch.float() / 255).codes for batch in images.split(256)])
