# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Images a second of the pipeline and its parts, and what the pipeline costs beyond them.

ViT-B/16 that reconstructs codes of 224x224 images, with the tokenizer in its full size, and the packaged demo model,
which reconstructs pixels; weights do not matter here and are random. What `pipe(image=...)` takes is set beside the
sum of what it calls: processor, encoder, decoder, tokenizer. Both are measured in turns, so that other work on the
machine slows both alike. The exit status is 1 if, with ViT-B/16 and the first of the batch sizes, the median of the
pipeline exceeds that of the sum by more than 5 %.

    python benchmarks/pipeline_throughput.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from PIL import Image

import stellar_hf
from stellar_hf import (
    MaskGitVQModel,
    StellarConfig,
    StellarForImageReconstruction,
    StellarImageProcessorPil,
    StellarPipeline,
)
from stellar_hf.data.photo_mosaics import PHOTOGRAPH_NAMES, photograph

ALLOWED_EXCESS = 0.05
PARTS = ("processor", "encode", "decode", "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=9, help="Measurements of which the median is taken.")
    parser.add_argument("--num_threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)

    print(f"{'images/s':<22} batch " + "".join(f"{name:>11}" for name in (*PARTS, "pipeline")) + "     excess")
    excess = {}
    for name, pipe in {"ViT-B/16, codes, 224": base_pipeline(), "demo, pixels, 32": demo_pipeline()}.items():
        for batch_size in args.batch_sizes:
            images = photographs(batch_size, pipe.model.config.image_size)
            seconds = measure(pipe, images, args.repeats)
            excess[name, batch_size] = seconds["pipeline"] / seconds["sum"] - 1
            rates = "".join(
                f"{batch_size / seconds[part]:11.1f}" if part in seconds else f"{'–':>11}"
                for part in (*PARTS, "pipeline")
            )
            print(f"{name:<22} {batch_size:5d} {rates} {excess[name, batch_size]:9.1%}", flush=True)
    if excess["ViT-B/16, codes, 224", args.batch_sizes[0]] > ALLOWED_EXCESS:
        sys.exit(f"The pipeline takes over {ALLOWED_EXCESS:.0%} longer than its parts.")


def base_pipeline() -> StellarPipeline:
    return StellarPipeline(
        image_processor=StellarImageProcessorPil(),
        model=StellarForImageReconstruction(StellarConfig()).eval(),
        vq_model=MaskGitVQModel().eval(),
    )


def demo_pipeline() -> StellarPipeline:
    return StellarPipeline(
        image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
        model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
    )


def photographs(count: int, size: int) -> list[Image.Image]:
    return [
        photograph(PHOTOGRAPH_NAMES[index % len(PHOTOGRAPH_NAMES)]).convert("RGB").resize((size, size))
        for index in range(count)
    ]


def measure(pipe: StellarPipeline, images: list[Image.Image], repeats: int) -> dict[str, float]:
    """Median seconds of each part, of their sum and of the pipeline."""
    measured: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        seconds = seconds_of_parts(pipe, images)
        seconds["sum"] = sum(seconds.values())
        seconds["pipeline"] = timed(lambda: pipe(image=images))[1]
        if repeat > 0:  # the first one warms up
            for name, value in seconds.items():
                measured.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in measured.items()}


@torch.no_grad()
def seconds_of_parts(pipe: StellarPipeline, images: list[Image.Image]) -> dict[str, float]:
    """What the pipeline does, called by hand; images have the model's size already."""
    seconds = {}
    model = pipe.model
    inputs, seconds["processor"] = timed(
        lambda: pipe.image_processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")
    )
    encoded, seconds["encode"] = timed(lambda: model.stellar(inputs["pixel_values"]))
    side = model.config.image_size // model.config.patch_size
    decoded, seconds["decode"] = timed(lambda: model.decode(encoded.sparse_tokens, encoded.localization, (side, side)))
    if pipe.vq_model is not None:
        seconds["tokenizer"] = timed(lambda: pipe.vq_model.decode(decoded.argmax(dim=-1)))[1]
    return seconds


def timed(run: Callable[[], object]) -> tuple:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
