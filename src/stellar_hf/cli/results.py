# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a pre-training leaves besides the model: the table of the embedded benchmark, the pipeline and its figure."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, ImageOps

import stellar_hf

from .. import StellarConfig, StellarForImageReconstruction, StellarForPreTraining, StellarTrainer
from ..data import StellarCollator, images_to_tensor, load_photo_mosaics, undecoded
from ..evaluation import evaluate_stellar, format_results_table, psnr, raw_pixel_baseline
from ..hub_stellar import FIGURE_NAME
from ..training.evaluation import sample_rows
from ..visualization import plot_reconstructions

NUM_SHOWN = 8


class MosaicEvaluation:
    """The rows of the final table, measured on the test split of the photo mosaics."""

    def __init__(self, num_scenes: int, image_size: int, show_progress: bool):
        def mosaics(split: str, count: int, num_regions: int) -> datasets.Dataset:
            # Neighbours and probes take other scenes of the training split than the training does.
            return load_photo_mosaics(split, count, image_size, num_regions, seed=1)

        self.data = {
            "crops_train": mosaics("train", 2 * num_scenes, 1),
            "crops_test": mosaics("test", num_scenes, 1),
            "scenes_train": mosaics("train", 2 * num_scenes, 2),
            "scenes": mosaics("test", num_scenes, 2),
        }
        self.show_progress = show_progress
        self.rows = {"raw pixels": raw_pixel_baseline(self.data["crops_train"], self.data["crops_test"])}

    def measure(self, model: StellarForPreTraining) -> dict[str, float]:
        return evaluate_stellar(model, **self.data, show_progress=self.show_progress)

    def add_untrained(self, model: StellarForPreTraining) -> None:
        self.rows["before training"] = self.measure(model)

    def add_trained(self, model: StellarForPreTraining) -> dict[str, float]:
        """Measures the trained model; returns the figures of all rows under the names of `all_results.json`."""
        self.rows["after training"] = self.measure(model)
        prefixes = {"raw pixels": "raw_pixels_", "before training": "untrained_", "after training": ""}
        figures = {
            f"{prefix}test_{name}": value for row, prefix in prefixes.items() for name, value in self.rows[row].items()
        }
        if model.config.image_size == StellarConfig.from_pretrained(stellar_hf.DEMO_MODEL).image_size:
            # As they were measured on 2000 scenes: measuring this larger model takes longer than a small training.
            demo = json.loads(Path(stellar_hf.DEMO_MODEL, "all_results.json").read_text())
            self.rows["demo model"] = {name.removeprefix("test_"): value for name, value in demo.items()}
        return figures

    def table(self) -> str:
        return format_results_table(self.rows)


def save_pipeline(trainer: StellarTrainer, vq_model: "stellar_hf.MaskGitVQModel | None") -> None:
    """Writes the pipeline of the saved model beside it."""
    folder = str(trainer.args.output_dir)
    processor: Any = trainer.processing_class
    # By its package, which imports Diffusers now and not when the training starts.
    pipe = stellar_hf.StellarPipeline(
        image_processor=processor,
        model=StellarForImageReconstruction.from_pretrained(folder),
        vq_model=vq_model,
    )
    pipe.save_pretrained(Path(folder, "pipeline"))


def show_reconstructions(trainer: StellarTrainer, images: datasets.Dataset | datasets.IterableDataset) -> None:
    """Draws some of the images, of all classes, and what the saved pipeline makes of their tokens."""
    from diffusers.utils import logging as diffusers_logging  # here, since a training of pixels does not need it

    diffusers_logging.disable_progress_bar()
    folder, args = str(trainer.args.output_dir), trainer.args
    pipe: Any = stellar_hf.StellarPipeline.from_pretrained(Path(folder, "pipeline")).to(args.device)
    side = pipe.model.config.image_size
    shown = read_sample(images, args.image_column, args.label_column)
    squares = [ImageOps.fit(Image.fromarray(image.permute(1, 2, 0).numpy()), (side, side)) for image in shown]
    tokens, localization = pipe.encode(squares)
    reconstructions = pipe(sparse_tokens=tokens, localization=localization, height=side, width=side).images
    path = Path(folder, FIGURE_NAME)
    plot_reconstructions(squares, reconstructions, localization).savefig(path, dpi=150)
    found, expected = (torch.stack(images_to_tensor(group)) / 255 for group in (reconstructions, squares))
    print(
        f"{len(squares)} images through the pipeline, PSNR {psnr(found, expected).mean():.1f} dB, "
        f"with token maps: {path}\n"
    )


def read_sample(
    images: datasets.Dataset | datasets.IterableDataset, image_column: str, label_column: str
) -> list[torch.Tensor]:
    """A few images, of as many classes as possible, always the same ones; the first ones of a stream."""
    if isinstance(images, datasets.IterableDataset):
        few = images.take(NUM_SHOWN)
    else:
        few = images.select(sample_rows(images, NUM_SHOWN, label_column))
    batch = StellarCollator(image_column)(list(undecoded(few, image_column)))
    return [
        image[:, :height, :width]
        for image, (height, width) in zip(batch["images"], batch["image_sizes"].tolist(), strict=True)
    ]


def how_to_load(folder: str) -> str:
    pipeline = Path(folder, "pipeline")
    return (
        f"Model and image processor: {folder}\n\n"
        "    import stellar_hf\n"
        "    from transformers import AutoImageProcessor, AutoModel\n\n"
        f'    model = AutoModel.from_pretrained("{folder}")\n'
        f'    processor = AutoImageProcessor.from_pretrained("{folder}")\n'
        f"\nFrom images to tokens and back: {pipeline}\n\n"
        f'    pipe = stellar_hf.StellarPipeline.from_pretrained("{pipeline}")\n'
        "    tokens, localization = pipe.encode(image)\n"
        "    pipe(sparse_tokens=tokens, localization=localization).images\n"
    )
