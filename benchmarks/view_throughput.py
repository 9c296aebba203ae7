# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Images a second of reading JPEGs and making the views of the paper, beside one Kornia crop at a time in the workers.

The reference does what the authors' pipeline does in its workers: 17 crops of every single image (a clean, 8 global
and 8 local ones), each a Kornia augmentation of one image. Ours reads in the workers and makes the views of a batch at
once. All run on one thread of this process, so figures are a core's; with an accelerator, the views there, too.

    python benchmarks/view_throughput.py
"""

import argparse
import io
import time
from collections.abc import Callable

import torch
from kornia import augmentation
from PIL import Image

from stellar_hf.data import StellarCollator, StellarViews, images_to_tensor
from stellar_hf.data.photo_mosaics import PHOTOGRAPH_NAMES, photograph

# The mean size of ImageNet's training images.
IMAGE_SIZE = (473, 405)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)

    views = StellarViews()
    read = StellarCollator(decode_size=views.decode_size)
    rows = [{"image": {"bytes": data, "path": None}} for data in jpegs(args.num_images)]
    batches = [rows[first : first + args.batch_size] for first in range(0, len(rows), args.batch_size)]
    canvases = [read(batch) for batch in batches]

    def make_views(device: str) -> None:
        for canvas in canvases:
            views(canvas["images"].to(device), canvas["image_sizes"])
        if device != "cpu":
            torch.accelerator.synchronize()

    reference = one_crop_at_a_time(views)
    measured = {
        "read and resize, in a worker": lambda: [read(batch) for batch in batches],
        "views of a batch, on this core": lambda: make_views("cpu"),
        "17 Kornia crops of each image, in a worker": lambda: [reference(row["image"]) for row in rows],
    }
    if torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
        measured[f"views of a batch, on {device}"] = lambda: make_views(device)
    for name, run in measured.items():
        print(f"{name:<45} {args.num_images / seconds(run):8.1f} images/s")


def jpegs(count: int) -> list[bytes]:
    """Photographs of ImageNet's mean size."""
    files = []
    for index in range(count):
        image = photograph(PHOTOGRAPH_NAMES[index % len(PHOTOGRAPH_NAMES)]).resize(
            IMAGE_SIZE, Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=90)
        files.append(file.getvalue())
    return files


def one_crop_at_a_time(views: StellarViews) -> Callable[[dict], list[torch.Tensor]]:
    def crop(size: int, scale: tuple[float, float]) -> torch.nn.Module:
        return augmentation.RandomResizedCrop(
            (size, size), scale, views.ratio, resample="bicubic", cropping_mode="slice"
        )

    flip = augmentation.RandomHorizontalFlip(p=views.flip)
    colors = augmentation.AugmentationSequential(
        augmentation.ColorJitter(
            views.brightness, views.contrast, views.saturation, views.hue, p=views.jitter_probability
        ),
        augmentation.RandomGrayscale(p=views.grayscale_probability),
        augmentation.RandomGaussianBlur((views.blur_kernel_size,) * 2, views.blur_sigma, p=views.blur_probability),
    )
    normalize = augmentation.Normalize(torch.tensor(views.image_mean), torch.tensor(views.image_std))
    global_crop, local_crop = crop(views.global_size, views.global_scale), crop(views.local_size, views.local_scale)

    def make(file: dict) -> list[torch.Tensor]:
        (pixels,) = images_to_tensor([file])
        image = pixels[None].float() / 255
        clean = flip(global_crop(image))
        crops = [clean, *(flip(global_crop(image)) for _ in range(views.num_global_views - 1))]
        crops += [flip(local_crop(image)) for _ in range(views.num_local_views)]
        return [normalize(clean), *(normalize(colors(crop)) for crop in crops)]

    return make


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The best of some runs, after one that is not measured."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    main()
