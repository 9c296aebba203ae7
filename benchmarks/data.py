# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Images a second, and core, from JPEGs to the paper's views, beside 17 crops of Kornia and of torchvision.

JPEGs of ImageNet's mean size; a clean, 8 global and 8 local views with colours. The references do what the authors'
pipeline does in a worker: 17 crops of each image, one after the other. Ours reads in the workers and makes the views
of a whole batch at once, on a core or on the accelerator. All but the latter runs on one thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stellar_hf.data import StellarCollator, StellarViews, images_to_tensor

from .harness import Options, Row, is_installed, progress, time_in_turns
from .images import jpeg_rows

BATCH_SIZE = 32
CUDA_BATCH_SIZE = 256
OURS = "ours, read and views"
KORNIA = "17 Kornia crops, read and views"
TORCHVISION = "17 torchvision crops, read and views"
REQUIRED_SPEED_OF_KORNIA = 3.0

Crops = Callable[[torch.Tensor], list[torch.Tensor]]


def run(options: Options) -> list[Row]:
    views = StellarViews()
    batch = jpeg_rows(2 if options.quick else BATCH_SIZE)
    read = StellarCollator(decode_size=views.decode_size)
    canvas = read(batch)
    variants: dict[str, Callable[[], object]] = {
        "ours, read": lambda: read(batch),
        "ours, views": lambda: views(**canvas),
        OURS: lambda: views(**read(batch)),
    }
    for name, package, build in ((KORNIA, "kornia", kornia_crops), (TORCHVISION, "torchvision", torchvision_crops)):
        if is_installed(package):
            variants[name] = read_and(build(views), batch)
    progress(f"on a core: {'; '.join(variants)}")
    with one_thread():
        timings = time_in_turns(variants, turns=1 if options.quick else 5)

    rows = []
    for name, timing in timings.items():
        row = row_of(name, "one core", len(batch), timing.median, timing.spread)
        if name in (OURS, KORNIA, TORCHVISION):
            for package, reference in (("kornia", KORNIA), ("torchvision", TORCHVISION)):
                row[f"train_speed_to_{package}"] = (
                    timings[reference].ratio_to(timing) if reference in timings else None
                )
        rows.append(row)
    return rows if options.on_cpu else [*rows, measure_on_accelerator(views, canvas, options)]


def shortfalls(rows: list[Row]) -> list[str]:
    speed = next(row["train_speed_to_kornia"] for row in rows if row["model"] == OURS)
    if speed is None or speed >= REQUIRED_SPEED_OF_KORNIA:
        return []
    return [f"{OURS}: {speed:.3g} times the speed of Kornia's crops, not {REQUIRED_SPEED_OF_KORNIA}"]


def measure_on_accelerator(views: StellarViews, canvas: dict[str, torch.Tensor], options: Options) -> Row:
    """Views of a large batch that comes in bytes from pinned memory, as a data loader gives it."""
    batch_size = len(canvas["images"]) if options.quick else CUDA_BATCH_SIZE
    repeats = batch_size // len(canvas["images"])
    images = canvas["images"].repeat(repeats, 1, 1, 1).pin_memory()
    sizes = canvas["image_sizes"].repeat(repeats, 1)
    name = "ours, views"
    variants = {name: lambda: views(images.to(options.device, non_blocking=True), sizes)}
    timing = time_in_turns(variants, options.device, turns=7, warm_up=3)[name]
    return row_of(name, options.device, batch_size, timing.median, timing.spread)


def row_of(name: str, place: str, batch_size: int, seconds: float, spread: float) -> Row:
    return {
        "model": name,
        "place": place,
        "train_samples_per_sec": batch_size / seconds,
        "train_step_time": 1000 * seconds,
        "train_step_time_spread": spread,
        "train_batch_size": batch_size,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# References ----------------------------------------------------------------------------------------------------------


def read_and(crops: Crops, rows: list[dict]) -> Callable[[], object]:
    return lambda: [crops(image) for row in rows for image in images_to_tensor([row["image"]])]


def kornia_crops(views: StellarViews) -> Crops:
    from kornia import augmentation

    def crop(size: int, scale: tuple[float, float]) -> torch.nn.Module:
        return augmentation.RandomResizedCrop(
            (size, size), scale, views.ratio, resample="bicubic", cropping_mode="slice"
        )

    jitter = (views.brightness, views.contrast, views.saturation, views.hue)
    colors = augmentation.AugmentationSequential(
        augmentation.ColorJitter(*jitter, p=views.jitter_probability),
        augmentation.RandomGrayscale(p=views.grayscale_probability),
        augmentation.RandomGaussianBlur((views.blur_kernel_size,) * 2, views.blur_sigma, p=views.blur_probability),
    )
    flip = augmentation.RandomHorizontalFlip(p=views.flip)
    normalize = augmentation.Normalize(torch.tensor(views.image_mean), torch.tensor(views.image_std))
    make = seventeen_crops(
        views,
        global_crop=torch.nn.Sequential(crop(views.global_size, views.global_scale), flip),
        local_crop=torch.nn.Sequential(crop(views.local_size, views.local_scale), flip),
        colors=colors,
        normalize=normalize,
    )
    return lambda image: make(image[None].float() / 255)


def torchvision_crops(views: StellarViews) -> Crops:
    from torchvision.transforms import InterpolationMode, v2

    def crop(size: int, scale: tuple[float, float]) -> torch.nn.Module:
        resized = v2.RandomResizedCrop(size, scale, views.ratio, interpolation=InterpolationMode.BICUBIC)
        return v2.Compose([resized, v2.RandomHorizontalFlip(views.flip)])

    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    blur = v2.GaussianBlur(views.blur_kernel_size, views.blur_sigma)
    colors = v2.Compose(
        [
            v2.RandomApply([jitter], views.jitter_probability),
            v2.RandomGrayscale(views.grayscale_probability),
            v2.RandomApply([blur], views.blur_probability),
        ]
    )
    return seventeen_crops(
        views,
        global_crop=crop(views.global_size, views.global_scale),
        local_crop=crop(views.local_size, views.local_scale),
        colors=colors,
        normalize=v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(views.image_mean, views.image_std)]),
    )


def seventeen_crops(
    views: StellarViews, global_crop: Callable, local_crop: Callable, colors: Callable, normalize: Callable
) -> Crops:
    def make(image: torch.Tensor) -> list[torch.Tensor]:
        clean = global_crop(image)
        crops = [clean, *(global_crop(image) for _ in range(views.num_global_views - 1))]
        crops += [local_crop(image) for _ in range(views.num_local_views)]
        return [normalize(clean), *(normalize(colors(crop)) for crop in crops)]

    return make
