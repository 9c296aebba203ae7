# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a pre-training leaves besides the model: the table of the embedded benchmark, the pipeline and its figure."""

import copy
import math
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, ImageOps

import stellar_hf

from .. import StellarForImageReconstruction, StellarForPreTraining, StellarTrainer
from ..data import StellarCollator, images_to_tensor, load_tabletop_scenes, undecoded
from ..evaluation import KMeansSegments, evaluate_scenes, format_results_table, psnr, representation_size
from ..evaluation.compression import patch_means
from ..evaluation.evaluate import SCENE_COLUMNS
from ..hub_stellar import FIGURE_NAME
from ..training.evaluation import sample_rows
from ..visualization import plot_reconstructions

NUM_SHOWN = 8

# Begins the names of a row's figures in all_results.json.
_PREFIXES = {
    "chance": "chance_",
    "k-means": "kmeans_",
    "patch means": "patch_means_",
    "untrained": "untrained_",
    "before": "before_",
    "trained": "",
}
# What the token of an object should not say: another object's material, and a place.
_NOT_TO_BE_TOLD = ("other_material_knn", "token_position_r2")
_LEGEND = """
FG-ARI, mBO, found  whether each object has a token of its own; found: overlap above 0.5
material, shape     what the token of an object tells of it (nearest neighbours; linear)
other's             what it tells of another object's material; chance is best
place               how well the object's place is told from its token S (0 is best), and
                    from its map L (1 is best)
PSNR                how exact the reconstruction is
k-means             pixels of an image by colour and place, as many segments as tokens
patch means         as many numbers as S and L have
"""


class SceneEvaluation:
    """
    The rows of the final table, measured on the test split of the tabletop scenes.

    Args:
        num_scenes: Scenes to measure on; twice as many of the training split are there to learn from.
        scene_size: Height and width of the scenes in pixels, which the processor may enlarge.
        model: The model before its training.
        processor: Its image processor.
        row: What the model is called at that time: "untrained", or "before" if it was trained earlier.
        show_progress: Whether to show progress bars.
    """

    def __init__(
        self,
        num_scenes: int,
        scene_size: int,
        model: StellarForPreTraining,
        processor: Any,
        row: str,
        show_progress: bool,
    ):
        # Neighbours and probes take other scenes of the training split than the training does.
        self.train = load_tabletop_scenes("train", 2 * num_scenes, scene_size, seed=1)
        self.test = load_tabletop_scenes("test", num_scenes, scene_size, seed=1)
        self.processor = processor
        self.show_progress = show_progress
        segments = KMeansSegments(model.config.num_sparse_tokens, processor.image_mean, processor.image_std)
        # Enlarged images have the same segments, and take longer.
        in_their_size = resized(processor, scene_size)
        kmeans = self._measure("k-means", segments.to(model.device), in_their_size)
        chance = {
            f"{name.removesuffix('_chance')}_{probe}": value
            for name, value in kmeans.items()
            if name.endswith("_chance")
            for probe in ("knn", "linear")
        }
        self.rows = {"chance": chance, "k-means": kmeans, "patch means": self._measure_patch_means(model)}
        self.rows[row] = self._measure(row, model)

    def add_trained(self, model: StellarForPreTraining) -> dict[str, float]:
        """Measures the trained model; returns the figures of all rows under the names of `all_results.json`."""
        self.rows["trained"] = self._measure("trained", model)
        return {
            f"{_PREFIXES[row]}test_{name}": values[name]
            for row, values in self.rows.items()
            for name, *_ in SCENE_COLUMNS
            if name in values
        }

    def table(self) -> str:
        """The table, what its columns are, and what the other rows are as good at as the trained model."""
        lines = [format_results_table(self.rows), _LEGEND]
        as_good = {row: ", ".join(self._as_good(row)) for row in self.rows if row != "trained"}
        if any(as_good.values()):
            lines.append("As good as trained, or better:")
            lines += [f"  {row}: {columns}" for row, columns in as_good.items() if columns]
        return "\n".join(lines)

    def _as_good(self, row: str) -> list[str]:
        values, trained = self.rows[row], self.rows["trained"]
        return [
            "place from L" if name == "map_position_r2" else title
            for name, (title, _), *_ in SCENE_COLUMNS
            if name not in _NOT_TO_BE_TOLD and name in values and values[name] >= trained.get(name, math.inf)
        ]

    def _measure(self, row: str, model: Any, processor: Any = None) -> dict[str, float]:
        return evaluate_scenes(
            model,
            processor or self.processor,
            self.train,
            self.test,
            description=row,
            show_progress=self.show_progress,
        )

    def _measure_patch_means(self, model: StellarForPreTraining) -> dict[str, float]:
        """The PSNR of as many mean colours as S and L have numbers."""
        config = model.config
        num_patches = (config.image_size // config.patch_size) ** 2
        numbers, _ = representation_size(num_patches, config.num_sparse_tokens, config.hidden_size)
        pixel_values = self.processor(self.test["image"][:], return_tensors="pt")["pixel_values"]
        images = model.denormalize(pixel_values).clamp(0, 1)
        means = torch.stack([patch_means(image, 8 * numbers) for image in images])  # type: ignore[misc]  # never None
        return {"psnr": psnr(means, images).mean().item()}


def resized(processor: Any, size: int) -> Any:
    """A copy of an image processor that prepares images of another size."""
    processor = copy.deepcopy(processor)
    processor.size, processor.crop_size = {"shortest_edge": size}, {"height": size, "width": size}
    return processor


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
