# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Images a second of the pipeline: decode, encode and decode, edit, generate; and what it costs beyond its parts.

ViT-B/16 that reconstructs codes of 224x224 images, with the tokenizer in its full size, and the packaged demo model,
which reconstructs pixels; the weights of the former, and of the priors, are random. `infer_time_to_parts` sets what
`pipe(image=...)` takes beside what it calls, by hand: processor, encoder, decoder, tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers.utils import logging

import stellar_hf
from stellar_hf import StellarConfig, StellarForImageReconstruction, StellarImageProcessorPil

from .harness import Options, Row, is_installed, progress, time_in_turns
from .images import photographs

if TYPE_CHECKING:
    from stellar_hf import StellarPipeline

BASE = "ViT-B/16, codes"
WHOLE = "encode and decode"
BATCH_SIZES = (1, 4)
CUDA_BATCH_SIZES = (1, 64)
ALLOWED_TIME_TO_PARTS = 1.05


def run(options: Options) -> list[Row]:
    if not is_installed("diffusers"):
        return []
    from diffusers.utils import logging as diffusers_logging

    for library in (logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    rows = []
    for name, build in {"demo, pixels": demo_pipeline, BASE: base_pipeline}.items():
        if options.quick and name == BASE:
            continue
        for dtype in (torch.float32,) if options.on_cpu else (torch.float32, torch.bfloat16):
            pipe = build().to(options.device, dtype)
            pipe.set_progress_bar_config(disable=True)
            for batch_size in (1,) if options.quick else BATCH_SIZES if options.on_cpu else CUDA_BATCH_SIZES:
                progress(f"{name}, {dtype}, batch {batch_size}")
                rows += measure(name, pipe, batch_size, options)
    return rows


def shortfalls(rows: list[Row]) -> list[str]:
    return [
        f"{row['model']}, batch 1, {row['dtype']}: {row['infer_time_to_parts']:.3f} times its parts"
        for row in rows
        if row["model"].startswith(BASE) and row["infer_batch_size"] == 1
        if row["infer_time_to_parts"] is not None and row["infer_time_to_parts"] > ALLOWED_TIME_TO_PARTS
    ]


def base_pipeline() -> StellarPipeline:
    from stellar_hf import MaskGitVQModel, StellarPipeline

    model, vq_model = StellarForImageReconstruction(StellarConfig()).eval(), MaskGitVQModel().eval()
    return StellarPipeline(image_processor=StellarImageProcessorPil(), model=model, vq_model=vq_model)


def demo_pipeline() -> StellarPipeline:
    from stellar_hf import StellarPipeline

    return StellarPipeline(
        image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
        model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
    )


def measure(name: str, pipe: StellarPipeline, batch_size: int, options: Options) -> list[Row]:
    size = pipe.model.config.image_size
    images = photographs(batch_size, (size, size))
    variants = {**tasks(pipe, images), **parts(pipe, images)}
    turns = 1 if options.quick else 2 if options.on_cpu and batch_size > 1 else 5
    timings = time_in_turns(variants, options.device, turns=turns)
    rows = []
    for variant, timing in timings.items():
        rows.append(
            {
                "model": f"{name}: {variant}",
                "dtype": str(pipe.model.dtype).removeprefix("torch."),
                "infer_samples_per_sec": batch_size / timing.median,
                "infer_step_time": 1000 * timing.median,
                "infer_step_time_spread": timing.spread,
                "infer_batch_size": batch_size,
                "infer_img_size": size,
                "infer_time_to_parts": timing.ratio_to(timings["all parts"]) if variant == WHOLE else None,
            }
        )
    return rows


def tasks(pipe: StellarPipeline, images: list[Image.Image]) -> dict[str, Callable[[], object]]:
    """What users ask of pipelines; all give PIL images."""
    from stellar_hf import StellarTokenPriorPipeline

    tokens, localization = pipe.encode(images)
    prior_pipe = StellarTokenPriorPipeline.from_pipe(pipe, prior=prior_for(pipe))
    prior_pipe.set_progress_bar_config(disable=True)

    def edit() -> object:
        encoded = pipe.encode(images)
        moved, where = pipe.move(*encoded, concept=0, columns=2)
        return pipe(sparse_tokens=moved, localization=where)

    return {
        "decode": lambda: pipe(sparse_tokens=tokens, localization=localization),
        WHOLE: lambda: pipe(image=images),
        "edit": edit,
        "generate, 25 steps": lambda: prior_pipe([None] * len(images)),
    }


def prior_for(pipe: StellarPipeline) -> torch.nn.Module:
    from stellar_hf import StellarTokenPrior

    config = pipe.model.config
    side = config.image_size // config.patch_size
    prior = StellarTokenPrior(config.num_sparse_tokens, config.hidden_size, (side, side))
    return prior.eval().to(pipe.device, pipe.model.dtype)


def parts(pipe: StellarPipeline, images: list[Image.Image]) -> dict[str, Callable[[], object]]:
    """What `pipe(image=images)` calls, by hand and without checks; images have the model's size already."""
    model = pipe.model
    side = model.config.image_size // model.config.patch_size

    def process() -> torch.Tensor:
        inputs = pipe.image_processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")
        return inputs["pixel_values"].to(pipe.device, model.dtype)

    @torch.no_grad()
    def encode(pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model.stellar(pixel_values)
        return output.sparse_tokens, output.localization

    @torch.no_grad()
    def decode(tokens: torch.Tensor, localization: torch.Tensor) -> torch.Tensor:
        latents = model.decode(tokens, localization, (side, side))
        return latents if pipe.vq_model is None else latents.argmax(dim=-1)

    @torch.no_grad()
    def tokenize(latents: torch.Tensor) -> torch.Tensor:
        return pipe.vq_model.decode(codes=latents, grid_size=(side, side)).sample

    pixel_values = process()
    encoded = encode(pixel_values)
    latents = decode(*encoded)
    separate: dict[str, Callable[[], object]] = {
        "processor": process,
        "encoder": lambda: encode(pixel_values),
        "decoder": lambda: decode(*encoded),
    }
    if pipe.vq_model is None:
        return {**separate, "all parts": lambda: decode(*encode(process()))}
    separate["tokenizer"] = lambda: tokenize(latents)
    return {**separate, "all parts": lambda: tokenize(decode(*encode(process())))}
