# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Whether edits of objects do what they say: erase, move and exchange, on tabletop scenes with true masks.

The demo model, and beside it k-means segments painted in their mean colours, whose maps the same functions edit. The
concept of an object is what `select` finds in its true mask. Colours are means of RGB in [0, 1] over a place; those of
objects and ground are of the original picture. A law asks about objects whose two colours differ by `CONTRAST`.
Spreads are standard deviations over draws of scenes. Values of `editing._REACH` are compared on validation.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

import stellar_hf
from stellar_hf import StellarConfig
from stellar_hf.data import images_to_tensor
from stellar_hf.evaluation.baselines import KMeansSegments
from stellar_hf.localization_stellar import means_under_maps, token_maps
from stellar_hf.pipelines import editing

from .harness import Options, Row, is_installed, progress

PACKAGES = ("datasets", "diffusers", "skimage", "sklearn")
NUM_DRAWS, NUM_SCENES = 3, 60
SIZE = 64  # pixels a side of the scenes
SHIFT = 16  # pixels, to the side with more room
MIN_AREA = 100  # visible pixels of an object
CONTRAST = 0.15
REACHES = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Objects:
    """P objects that tokens stand for, `found` of all objects, each with its scene."""

    found: float
    scene: Tensor  # (P,), its number
    image: Tensor  # (P, 3, SIZE, SIZE) in [0, 1]
    place: Tensor  # (P, SIZE, SIZE), mask of the object
    around: Tensor  # (P, SIZE, SIZE), mask of the ground near to it
    factors: tuple[Tensor, Tensor]  # S (P, r, d) and L (P, N, r) of the scene
    concept: Tensor  # (P, r)
    decode: Callable[[Tensor, Tensor], Tensor]


def run(options: Options) -> list[Row]:
    if not all([is_installed(package) for package in PACKAGES]):
        return []
    logging.disable_progress_bar()
    num_draws, num_scenes = (2, 12) if options.quick else (NUM_DRAWS, NUM_SCENES)
    progress(f"validation: {num_draws} draws of {num_scenes} scenes")
    draws = [by_tokens(*read_scenes("validation", seed, num_scenes, options.device)) for seed in range(num_draws)]
    chosen, rows = editing._REACH, []
    for reach in REACHES:
        editing._REACH = reach
        rows += rows_of(f"demo, validation, reach {reach:g}", [erase_laws(objects) for objects in draws])
    editing._REACH = chosen

    progress(f"test: {num_draws} draws of {num_scenes} scenes")
    scenes = [read_scenes("test", seed, num_scenes, options.device) for seed in range(num_draws)]
    for name, describe in (("demo", by_tokens), ("k-means", by_segments)):
        rows += rows_of(name, [all_laws(describe(*draw)) for draw in scenes])
    return rows


def rows_of(model: str, draws: list[dict[str, float]]) -> list[Row]:
    values = {law: [laws[law] for laws in draws] for law in draws[0]}
    return [
        {"model": model, "law": law, "value": statistics.mean(each), "value_spread": statistics.stdev(each)}
        for law, each in values.items()
    ]


# Objects -------------------------------------------------------------------------------------------------------------


def read_scenes(split: str, seed: int, num_scenes: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, SIZE, SIZE) in [0, 1] and masks (B, SIZE, SIZE) int64."""
    from stellar_hf.data import load_tabletop_scenes

    data = load_tabletop_scenes(split, num_scenes, SIZE, seed=seed)
    images, masks = torch.stack(images_to_tensor(data["image"][:])), torch.tensor(np.array(data["mask"]))
    return images.to(device) / 255, masks.to(device).long()


def by_tokens(images: Tensor, masks: Tensor) -> Objects:
    """As the demo model describes them."""
    from stellar_hf.cli.inputs import load_pipeline

    pipe = load_pipeline(stellar_hf.DEMO_MODEL, device=images.device)
    tokens, maps = pipe.encode(list(images))

    def decode(tokens: Tensor, maps: Tensor) -> Tensor:
        return pipe(sparse_tokens=tokens, localization=maps, height=SIZE, width=SIZE, output_type="pt").images

    return find_objects(images, masks, tokens, maps, decode)


def by_segments(images: Tensor, masks: Tensor) -> Objects:
    """As k-means does: maps are shares of segments in the demo model's patches, and tokens mean colours."""
    config = StellarConfig.from_pretrained(stellar_hf.DEMO_MODEL)
    grid_size = (config.image_size // config.patch_size,) * 2
    segments = KMeansSegments(config.num_sparse_tokens).to(images.device)(images)["localization"].float()
    colours = means_under_maps(segments, images.flatten(2).transpose(1, 2))
    shares = F.adaptive_avg_pool2d(token_maps(segments), grid_size)

    def paint(tokens: Tensor, maps: Tensor) -> Tensor:
        return F.interpolate(token_maps(maps @ tokens), size=(SIZE, SIZE), mode="bilinear")

    return find_objects(images, masks, colours, shares.flatten(2).transpose(1, 2), paint)


def find_objects(images: Tensor, masks: Tensor, tokens: Tensor, maps: Tensor, decode: Callable) -> Objects:
    scene, number = (F.one_hot(masks).sum(dim=(1, 2)) >= MIN_AREA)[:, 1:].nonzero().T
    place = masks[scene] == number.view(-1, 1, 1) + 1
    concept = editing.select(maps[scene], place)
    found = concept.any(dim=1)
    scene, place, concept = scene[found], place[found], concept[found]
    around, factors = grown(place) & (masks[scene] == 0), (tokens[scene], maps[scene])
    return Objects(found.float().mean().item(), scene, images[scene], place, around, factors, concept, decode)


# Laws ----------------------------------------------------------------------------------------------------------------


def erase_laws(objects: Objects) -> dict[str, float]:
    own, ground = colour(objects.image, objects.place), colour(objects.image, objects.around)
    erased = objects.decode(*editing.erase(*objects.factors, objects.concept))
    return {"erased: the place looks like the ground": share_nearer(colour(erased, objects.place), ground, own)}


def all_laws(objects: Objects) -> dict[str, float]:
    image, place, factors, concept = objects.image, objects.place, objects.factors, objects.concept
    own, ground = colour(image, place), colour(image, objects.around)
    unedited = objects.decode(*factors)
    erased = objects.decode(*editing.erase(*factors, concept))

    to_right = place[:, :, : SIZE // 2].sum(dim=(1, 2)) > place.sum(dim=(1, 2)) / 2
    patches = torch.where(to_right, SHIFT, -SHIFT) * factors[1].shape[1] ** 0.5 / SIZE
    moved = objects.decode(*editing.move(*factors, concept, 0, patches))
    target = torch.where(to_right[:, None, None], place.roll(SHIFT, 2), place.roll(-SHIFT, 2))
    arrived, there = target & ~place, colour(image, target & ~place)

    is_pair = (objects.scene[:, None] == objects.scene) & ~(concept[:, None] & concept).any(dim=2)
    first, second = is_pair.nonzero().T
    pairs = (factors[0][first], factors[1][first], concept[first], concept[second])
    exchanged = objects.decode(*editing.exchange(*pairs))
    painted = colour(exchanged, place[first])
    rest, rest_of_pair = ~grown(place), ~grown(place[first] | place[second])
    return {
        "objects that tokens stand for": objects.found,
        "decoded: the place looks like the ground": share_nearer(colour(unedited, place), ground, own),
        "erased: the place looks like the ground": share_nearer(colour(erased, place), ground, own),
        "erased: PSNR of the rest": psnr(erased, unedited, rest),
        "moved: the new place looks like the object": share_nearer(colour(moved, arrived), own, there),
        "moved: the old place looks like the ground": share_nearer(colour(moved, place & ~target), ground, own),
        "moved: IoU of its mask and what changed": overlap(moved, erased, target, differ(own, there)),
        "decoded: IoU of its mask and what erasing changes": overlap(unedited, erased, place, differ(own, ground)),
        "exchanged: the place looks like the other object": share_nearer(painted, own[second], own[first]),
        "exchanged: PSNR of the rest": psnr(exchanged, unedited[first], rest_of_pair),
    }


def colour(images: Tensor, place: Tensor) -> Tensor:
    """Mean (B, 3) of images (B, 3, H, W) over a place, bool (B, H, W); NaN where that is empty."""
    return (images * place[:, None]).sum(dim=(2, 3)) / place.sum(dim=(1, 2))[:, None]


def differ(colours: Tensor, others: Tensor) -> Tensor:
    return (colours - others).norm(dim=1) > CONTRAST


def share_nearer(colours: Tensor, expected: Tensor, other: Tensor) -> float:
    """How often colours (B, 3) are nearer to what is expected than to another one, where these differ."""
    nearer = (colours - expected).norm(dim=1) < (colours - other).norm(dim=1)
    return nearer[differ(expected, other)].float().mean().item()


def overlap(images: Tensor, others: Tensor, expected: Tensor, asked: Tensor) -> float:
    """Mean intersection over union of expected places and of those where images are not like others."""
    changed = differ(images, others)
    iou = (changed & expected).sum(dim=(1, 2)) / (changed | expected).sum(dim=(1, 2))
    return iou[asked].mean().item()


def psnr(images: Tensor, others: Tensor, place: Tensor) -> float:
    """Of the mean square over a place in all images."""
    return -10 * (images - others).square().mean(dim=1)[place].mean().log10().item()


def grown(place: Tensor, radius: int = 6) -> Tensor:
    return F.max_pool2d(place.float(), 2 * radius + 1, stride=1, padding=radius) > 0
