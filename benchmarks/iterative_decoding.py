# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Iterative decoding of codes: MaskGIT-fashion, and as `StellarPipeline` does, beside one step.

Trains a small MaskGIT-VQ tokenizer and a small STELLAR on its codes, on photo mosaics, for each seed. Then decodes
test scenes and tiles of two photographs: in one step at several temperatures, and over a cosine schedule that keeps
the most confident codes and samples the others again. STELLAR's decoder sees Z = L S and no codes, so what has been
decided can only come back to it as an image that is encoded once more.

Everything that is finished is kept in --output_dir: started again, the benchmark goes on from there. Take another one
for other settings.

    python benchmarks/iterative_decoding.py
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from transformers.utils import logging

import stellar_hf
from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline
from stellar_hf.data import PHOTOGRAPH_NAMES, images_to_tensor, load_photo_mosaics
from stellar_hf.data.photo_mosaics import photograph
from stellar_hf.evaluation import psnr
from stellar_hf.initialization_stellar import resized_positions
from stellar_hf.pipelines import MaskGitVQModel
from stellar_hf.pipelines.decoding import sample_codes

IMAGE_SIZE = 32
PATCH_SIZE = 4
GRID = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
NUM_CODES = 512
BATCH_SIZE = 64
# About the variance of the images' pixels: with it, errors of images and of latents have the same scale.
PIXEL_VARIANCE = 0.06
ONE_STEP = {f"one step, T = {temperature}": temperature for temperature in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)}
STEPS = (2, 4, 8)
# Share of the missing part of Z that is added in each step.
CORRECTION = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("iterative-decoding"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num_train_scenes", type=int, default=8000)
    parser.add_argument("--num_test_scenes", type=int, default=256, help="of each seed")
    parser.add_argument("--perceptual_steps", type=int, default=300)
    parser.add_argument("--tokenizer_steps", type=int, default=400)
    parser.add_argument("--stellar_steps", type=int, default=350)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # no report on the layers of the demo model that are made anew
    logging.disable_progress_bar()

    perceptual = trained_perceptual_network(args)
    print_table_of_demo(perceptual, scenes("test", 2 * args.num_test_scenes))
    measured: dict[str, list[dict]] = {"photo mosaics": [], "photographs": []}
    for seed in args.seeds:
        folder = args.output_dir / f"seed-{seed}"
        tokenizer = trained_tokenizer(folder / "tokenizer", seed, args)
        models = Models(trained_stellar(folder / "stellar", tokenizer, seed, args), tokenizer)
        test_sets = {
            "photo mosaics": scenes("test", args.num_test_scenes, seed=seed),
            "photographs": photograph_tiles(),
        }
        for name, images in test_sets.items():
            file = folder / f"{name.replace(' ', '-')}.pt"
            measured[name].append(measure_all(file, models, perceptual, images, seed))
    for name, of_seeds in measured.items():
        print_table(name, of_seeds)


# Images --------------------------------------------------------------------------------------------------------------


def scenes(split: str, count: int, seed: int = 0) -> Tensor:
    """Images (count, 3, 32, 32) uint8 of photo mosaics."""
    return torch.stack(images_to_tensor(load_photo_mosaics(split, count, IMAGE_SIZE, seed=seed)["image"]))


def photograph_tiles() -> Tensor:
    """scikit-learn's two photographs in tiles (B, 3, 32, 32) uint8, as detailed as the scenes."""
    tiles = []
    for name in ("china", "flower"):
        image = photograph(name)
        (pixels,) = images_to_tensor([image.resize((256, 160), Image.Resampling.BICUBIC)])
        rows = pixels.unfold(1, IMAGE_SIZE, IMAGE_SIZE).unfold(2, IMAGE_SIZE, IMAGE_SIZE)
        tiles.append(rows.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(tiles)


def training_batches(num_images: int, steps: int, name: str) -> Iterator[Tensor]:
    """Indices of a batch for each step."""
    start = time.perf_counter()
    for step in range(1, steps + 1):
        yield torch.randint(num_images, (BATCH_SIZE,))
        if step % 100 == 0:
            print(f"{name}: step {step} of {steps}, {time.perf_counter() - start:.0f} s", flush=True)


def descent_of(module: nn.Module, steps: int, learning_rate: float) -> Callable[[Tensor], None]:
    """A function that takes a step of AdamW and of its schedule."""
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    return descend


# Perceptual distance -------------------------------------------------------------------------------------------------


class PerceptualNetwork(nn.Module):
    """A small classifier of photographs, whose features compare images as LPIPS does, without learned weights."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, outer, kernel_size=3, padding=1, stride=1 if inner == 3 else 2),
                nn.BatchNorm2d(outer),
                nn.ReLU(),
                nn.Conv2d(outer, outer, kernel_size=3, padding=1),
                nn.BatchNorm2d(outer),
                nn.ReLU(),
            )
            for inner, outer in zip(widths[:-1], widths[1:], strict=True)
        )
        self.classifier = nn.Linear(widths[-1], len(PHOTOGRAPH_NAMES))

    def features(self, images: Tensor) -> list[Tensor]:
        features = [2 * images - 1]
        for block in self.blocks:
            features.append(block(features[-1]))
        return features[1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images)[-1].mean(dim=(2, 3)))

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """(B,): squared distance of features of unit length, mean over positions, summed over the blocks."""
        pairs = zip(self.features(images), self.features(others), strict=True)
        return sum((F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in pairs)


def trained_perceptual_network(args: argparse.Namespace) -> PerceptualNetwork:
    file = args.output_dir / "perceptual.pt"
    torch.manual_seed(0)
    network = PerceptualNetwork()
    if file.exists():
        network.load_state_dict(torch.load(file))
        return network.eval()
    crops = load_photo_mosaics("train", args.num_train_scenes, IMAGE_SIZE, num_regions=1)
    images, labels = torch.stack(images_to_tensor(crops["image"])), torch.tensor(crops["label"])
    descend = descent_of(network, args.perceptual_steps, learning_rate=3e-3)
    for batch in training_batches(len(images), args.perceptual_steps, "perceptual network"):
        descend(F.cross_entropy(network(images[batch].float() / 255), labels[batch]))
    network.eval()
    test = load_photo_mosaics("test", 1000, IMAGE_SIZE, num_regions=1)
    with torch.no_grad():
        predicted = network(torch.stack(images_to_tensor(test["image"])).float() / 255).argmax(-1)
    accuracy = (predicted == torch.tensor(test["label"])).float().mean()
    print(f"perceptual network: names the photograph of {accuracy:.1%} of 1000 test crops")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), file)
    return network


# Tokenizer and STELLAR -----------------------------------------------------------------------------------------------


def trained_tokenizer(folder: Path, seed: int, args: argparse.Namespace) -> MaskGitVQModel:
    if folder.exists():
        return MaskGitVQModel.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    images = scenes("train", args.num_train_scenes)
    tokenizer = MaskGitVQModel(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=32,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )
    steps = args.tokenizer_steps
    descend = descent_of(tokenizer, steps, learning_rate=2e-3)
    used = torch.zeros(NUM_CODES, dtype=torch.bool)
    for step, batch in enumerate(training_batches(len(images), steps, "tokenizer")):
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
    tokenizer.save_pretrained(folder)
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
    chosen = torch.randperm(len(candidates))[: int(unused.sum())]
    tokenizer.quantize.embedding.weight[unused] = candidates[chosen]


def trained_stellar(
    folder: Path, tokenizer: MaskGitVQModel, seed: int, args: argparse.Namespace
) -> StellarForImageReconstruction:
    if folder.exists():
        return StellarForImageReconstruction.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    images = scenes("train", args.num_train_scenes)
    codes = codes_of(tokenizer, images)
    model = stellar_of_demo().train()
    descend = descent_of(model, args.stellar_steps, learning_rate=1e-3)
    for batch in training_batches(len(images), args.stellar_steps, "STELLAR"):
        pixel_values = normalized(model, images[batch].float() / 255)
        descend(model(pixel_values, code_labels=codes[batch]).loss)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def stellar_of_demo() -> StellarForImageReconstruction:
    """The demo model on patches twice as large, at first seen at half the resolution, with a head of codes."""
    demo = StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL)
    model = StellarForImageReconstruction.from_pretrained(
        stellar_hf.DEMO_MODEL,
        patch_size=PATCH_SIZE,
        reconstruction_target="codes",
        codebook_size=NUM_CODES,
        localization_noise=0.0,  # as in the released models
        ignore_mismatched_sizes=True,
    )
    old, new = demo.stellar.embeddings, model.stellar.embeddings
    kernel = old.patch_embeddings.projection.weight
    new.patch_embeddings.projection.weight.copy_(F.interpolate(kernel, scale_factor=2) / 4)
    positions = old.position_embeddings
    new.position_embeddings.copy_(torch.cat([positions[:, :1], resized_positions(positions[:, 1:], GRID)], dim=1))
    return model


def normalized(model: StellarForImageReconstruction, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.image_mean, model.config.image_std))
    return (images - mean) / std


@torch.no_grad()
def codes_of(tokenizer: MaskGitVQModel, images: Tensor) -> Tensor:
    return torch.cat([tokenizer.encode(batch.float() / 255).codes for batch in images.split(256)])


# Decoding ------------------------------------------------------------------------------------------------------------


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


# From what the encoder says of the image, and of the images of the codes so far, the last one last: logits of the
# codes to come, and the confidence (B, N) in the present ones, which is their probability where there is None.
Feedback = Callable[[Models, Encoded, list[Encoded]], tuple[Tensor, Tensor | None]]


def encoded_again(models: Models, first: Encoded, again: list[Encoded]) -> tuple[Tensor, None]:
    return again[-1].logits, None


def product(models: Models, first: Encoded, again: list[Encoded]) -> tuple[Tensor, None]:
    """The normalized geometric mean of both distributions."""
    return (first.logits.log_softmax(-1) + again[-1].logits.log_softmax(-1)) / 2, None


def critic(models: Models, first: Encoded, again: list[Encoded]) -> tuple[Tensor, Tensor]:
    """The first logits; a code is kept where the image of all codes has the Z that it is to have."""
    difference = first.localization @ first.tokens - again[-1].localization @ again[-1].tokens
    return first.logits, -difference.square().sum(-1)


def corrected_z(models: Models, first: Encoded, again: list[Encoded]) -> tuple[Tensor, None]:
    return models.logits(*corrected(first, again)), None


def corrected(first: Encoded, again: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Z and half of what each of the images so far lacks of it, as the product of all their tokens and maps."""
    tokens = torch.cat([first.tokens, *(one.tokens for one in again)], dim=1)
    maps = [(1 + CORRECTION * len(again)) * first.localization, *(-CORRECTION * one.localization for one in again)]
    return tokens, torch.cat(maps, dim=2)


class Method(NamedTuple):
    """`temperatures` are those of the first step and of the schedule's end; without `keep`, all codes are new ones."""

    feedback: Feedback | None
    temperatures: tuple[float, float]
    keep: bool = True


METHODS = {
    "corrected Z, all codes anew": Method(corrected_z, (0.0, 0.0), keep=False),
    "corrected Z": Method(corrected_z, (0.0, 0.0)),
    "no feedback, T = 0.5": Method(None, (0.5, 0.5)),
    "no feedback, T = 1": Method(None, (1.0, 1.0)),
    "no feedback, T = 1 to 0": Method(None, (1.0, 0.0)),
    "product": Method(product, (0.0, 0.0)),
    "critic, T = 0.5": Method(critic, (0.5, 0.5)),
    "encoded again": Method(encoded_again, (0.0, 0.0)),
}


def iterate(models: Models, first: Encoded, method: Method, steps: int, generator: torch.Generator) -> Tensor:
    """Codes (B, N): in each step all that are not kept are chosen anew, and more of the most confident are kept."""
    start, end = method.temperatures
    logits = first.logits
    again: list[Encoded] = []
    codes, confidence = _choose(logits, start, generator)
    for step in range(1, steps):
        judged = None
        if method.feedback is not None:
            again.append(models.encode(models.images(codes)))
            logits, judged = method.feedback(models, first, again)
        kept = torch.zeros_like(codes, dtype=torch.bool)
        if method.keep:
            kept_count = codes.shape[1] - int(codes.shape[1] * math.cos(math.pi / 2 * step / steps))
            kept.scatter_(1, (confidence if judged is None else judged).topk(kept_count).indices, True)
        chosen, new_confidence = _choose(logits, start + (end - start) * step / steps, generator)
        codes = torch.where(kept, codes, chosen)
        # What is kept stays kept.
        confidence = torch.where(kept, math.inf, new_confidence)
    return codes


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes, and the logarithms of their probabilities."""
    codes = sample_codes(logits, temperature, generator=generator)
    return codes, logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)


# Measurement ---------------------------------------------------------------------------------------------------------

# From the models, what the encoder says and the true codes: images and, if there are any, their codes.
Decode = Callable[[Models, Encoded, Tensor, torch.Generator], tuple[Tensor, Tensor | None]]


def variants() -> dict[str, Decode]:
    named: dict[str, Decode] = {
        "tokenizer alone": lambda models, first, truth, generator: (models.images(truth), truth),
        "mean of the codes": lambda models, first, truth, generator: (models.mean_images(first.logits), None),
    }
    for name, temperature in ONE_STEP.items():
        named[name] = decode_with(Method(None, (temperature, temperature)), steps=1)
    for steps in STEPS:
        for name, method in METHODS.items():
            named[f"{name}, {steps} steps"] = decode_with(method, steps)
    return named


def decode_with(method: Method, steps: int) -> Decode:
    def decode(models: Models, first: Encoded, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        codes = iterate(models, first, method, steps, generator)
        return models.images(codes), codes

    return decode


@torch.no_grad()
def measure_all(
    file: Path, models: Models, perceptual: PerceptualNetwork, images: Tensor, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Measures (B,) of each image under each variant; those that `file` holds are not measured again."""
    results = torch.load(file) if file.exists() else {}
    batches = (images.float() / 255).split(128)
    encoded = [models.encode(batch) for batch in batches]
    true_codes = [models.tokenizer.encode(batch).codes for batch in batches]

    for name, decode in variants().items():
        if name in results:
            continue
        generator = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        rows = []
        for batch, first, truth in zip(batches, encoded, true_codes, strict=True):
            decoded, codes = decode(models, first, truth, generator)
            right = torch.full((len(batch),), math.nan) if codes is None else (codes == truth).float().mean(1)
            rows.append(measures(perceptual, decoded, batch) | {"codes right": right})
        results[name] = {metric: torch.cat([row[metric] for row in rows]) for metric in rows[0]}
        torch.save(results, file)
        means = ", ".join(f"{metric} {values.mean():.4g}" for metric, values in results[name].items())
        print(f"{file.stem}, seed {seed}, {name}: {means} ({time.perf_counter() - start:.0f} s)", flush=True)
    return results


def measures(perceptual: PerceptualNetwork, images: Tensor, originals: Tensor) -> dict[str, Tensor]:
    similarities = [
        structural_similarity(image.numpy(), original.numpy(), channel_axis=0, data_range=1)
        for image, original in zip(images, originals, strict=True)
    ]
    return {
        "PSNR": psnr(images, originals),
        "SSIM": torch.tensor(similarities),
        "distance": perceptual.distance(images, originals),
        "gradient": gradient_magnitude(images),
        "original gradient": gradient_magnitude(originals),
    }


def gradient_magnitude(images: Tensor) -> Tensor:
    """(B,): the mean length of the brightness gradient."""
    brightness = images.mean(dim=1)
    down, right = brightness[:, 1:, :-1] - brightness[:, :-1, :-1], brightness[:, :-1, 1:] - brightness[:, :-1, :-1]
    return (down.square() + right.square()).sqrt().mean(dim=(1, 2))


# Table ---------------------------------------------------------------------------------------------------------------


def print_table(name: str, of_seeds: list[dict[str, dict[str, Tensor]]]) -> None:
    """Means over images and seeds; differences from one step at equal PSNR with standard errors, and of each seed."""
    num_images = len(of_seeds[0]["tokenizer alone"]["PSNR"])
    means = [weighted_means(results, np.full((1, num_images), 1 / num_images)) for results in of_seeds]
    resampled = [weighted_means(results, bootstrap(num_images)) for results in of_seeds]

    print(f"\n{name}, {len(of_seeds)} seeds of {num_images} images; the last columns are differences at equal PSNR\n")
    print("| | PSNR | SSIM | distance | sharpness | codes right | distance | of each seed | sharpness |")
    print("|---|---|---|---|---|---|---|---|---|")
    for variant in means[0]:
        figures = {metric: np.mean([of_seed[variant][metric] for of_seed in means]) for metric in means[0][variant]}
        columns = [
            f"{figures['PSNR']:.2f}",
            f"{figures['SSIM']:.3f}",
            f"{figures['distance']:.4f}",
            f"{figures['sharpness']:.3f}",
            "" if variant == "mean of the codes" else f"{figures['codes right']:.1%}",
        ]
        for metric in ("distance", "sharpness"):
            of_seed = [excess_at_equal_psnr(seed_means, variant, metric).item() for seed_means in means]
            samples = [excess_at_equal_psnr(seed_means, variant, metric) for seed_means in resampled]
            columns.append(f"{np.mean(of_seed):+.4f} ± {np.mean(samples, axis=0).std():.4f}")
            if metric == "distance":
                columns.append(" / ".join(f"{value:+.4f}" for value in of_seed))
        print(f"| {variant} | {' | '.join(columns)} |")


@torch.no_grad()
def print_table_of_demo(perceptual: PerceptualNetwork, images: Tensor) -> None:
    """The pipeline's steps with the demo model, of pixels: means, and differences from one step with their errors."""
    pipe = StellarPipeline(
        StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
        StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
    )
    pipe.set_progress_bar_config(disable=True)
    originals = images.float() / 255
    print(f"\ndemo model, {len(images)} photo mosaics; differences from one step\n")
    print("| steps | PSNR | SSIM | distance | sharpness | PSNR | distance |\n|---|---|---|---|---|---|---|")
    first: dict[str, Tensor] = {}
    for steps in (1, 2, 4):
        batches = originals.split(128)
        decoded = [pipe(image=batch, num_inference_steps=steps, output_type="pt").images for batch in batches]
        figures = measures(perceptual, torch.cat(decoded), originals)
        first = first or figures
        columns = [
            f"{figures['PSNR'].mean():.2f}",
            f"{figures['SSIM'].mean():.3f}",
            f"{figures['distance'].mean():.4f}",
        ]
        columns.append(f"{figures['gradient'].mean() / figures['original gradient'].mean():.3f}")
        for metric in ("PSNR", "distance"):
            difference = figures[metric] - first[metric]
            columns.append(f"{difference.mean():+.4f} ± {difference.std() / math.sqrt(len(images)):.4f}")
        print(f"| {steps} | {' | '.join(columns)} |", flush=True)


def bootstrap(num_images: int, count: int = 500) -> np.ndarray:
    """Weights (count, num_images) of the images in samples with replacement; always the same."""
    return np.random.default_rng(0).multinomial(num_images, np.full(num_images, 1 / num_images), count) / num_images


def weighted_means(results: dict[str, dict[str, Tensor]], weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Means (W,) of each measure for W weightings (W, B) of the images."""
    means = {
        variant: {metric: weights @ values.double().numpy() for metric, values in measured.items()}
        for variant, measured in results.items()
    }
    for of_variant in means.values():
        of_variant["sharpness"] = of_variant.pop("gradient") / of_variant.pop("original gradient")
    return means


def excess_at_equal_psnr(means: dict[str, dict[str, np.ndarray]], variant: str, metric: str) -> np.ndarray:
    """
    The metric (W,) of a variant minus that of one step at the temperature that gives the same PSNR.

    One step is interpolated between the measured temperatures; beyond them, the last of them counts.
    """
    one_step = {name: np.stack([means[temperature][name] for temperature in ONE_STEP]) for name in ("PSNR", metric)}
    order = one_step["PSNR"].argsort(axis=0)
    known, values = (np.take_along_axis(one_step[name], order, axis=0) for name in ("PSNR", metric))
    of_equal_psnr = [
        np.interp(*arguments) for arguments in zip(means[variant]["PSNR"], known.T, values.T, strict=True)
    ]
    return means[variant][metric] - np.array(of_equal_psnr)


if __name__ == "__main__":
    main()
