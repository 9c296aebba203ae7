# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Ways to decode: in one step, by MaskGIT's schedule with or without feedback, and as `StellarPipeline` does."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stellar_hf.pipelines.decoding import sample_codes

from .models import Encoded, Models

ONE_STEP = {f"one step, T = {temperature}": temperature for temperature in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)}
STEPS = (2, 4, 8)
# Share of the missing part of Z that is added in each step.
CORRECTION = 0.5

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
