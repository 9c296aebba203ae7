# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a training measures and draws at its evaluations: kNN accuracy, PSNR, and figures of reconstructions."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..data import images_to_tensor
from ..evaluation import knn_accuracy, psnr
from ..image_processing_pil_stellar import StellarImageProcessorPil
from ..modeling_stellar import StellarForPreTraining

_UNKNOWN = -1
_NUM_NEIGHBOURS = 20
_NUM_DRAWN = 8


@dataclass
class WholeImages:
    """Rows of a data set as whole images, processed as a user's will be; a `collate_fn` for workers.

    Attributes:
        processor: Image processor of the model.
        image_column: Column of the images, in a form that [`images_to_tensor`] takes.
        label_column: Column of the classes, where there is one.
    """

    processor: Any
    image_column: str
    label_column: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, H, W) and `labels` (B,): the class, or -1 of a row that has none or is unreadable."""
        images, labels = [], []
        for row in rows:
            try:
                (image,) = images_to_tensor([row[self.image_column]])
                labels.append(row.get(self.label_column, _UNKNOWN))
            except ValueError:
                image = torch.zeros(3, 8, 8, dtype=torch.uint8)
                labels.append(_UNKNOWN)
            images.append(image)
        return {
            "pixel_values": self.processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor(labels),
        }


def default_processor(model: StellarForPreTraining) -> StellarImageProcessorPil:
    """The image processor of a model that was trained on views of whole images: no margin is cut off."""
    config = model.config
    return StellarImageProcessorPil(
        size={"shortest_edge": config.image_size},
        crop_size={"height": config.image_size, "width": config.image_size},
        image_mean=config.image_mean,
        image_std=config.image_std,
    )


class ImageEvaluation:
    """
    Measures a model on images as a user will give them: kNN accuracy of the pooled tokens, and PSNR.

    Args:
        accelerator: Splits the images over its processes.
        collator: Processes the images.
        batch_size: Images of a forward pass.
        num_workers: Workers that read them.
        num_neighbours: At most so many labelled images, spread over the data set, are compared with; 0 leaves kNN out.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        collator: WholeImages,
        batch_size: int,
        num_workers: int,
        num_neighbours: int,
    ):
        self.accelerator = accelerator
        self.collator = collator
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_neighbours = num_neighbours

    def __call__(
        self, model: StellarForPreTraining, dataset: Dataset, labelled: Dataset | None = None
    ) -> dict[str, float]:
        """
        Args:
            model: In evaluation mode.
            dataset: Map-style; the images to measure on.
            labelled: Map-style; images with classes, to find the neighbours among.

        Returns:
            `psnr` in dB with the pixel head, and `knn_accuracy` where both data sets have classes.
        """
        features, labels, ratios = self._measure(model, dataset, range(len(dataset)))  # type: ignore[arg-type]
        metrics = {"psnr": ratios.mean().item()} if ratios is not None else {}
        known = labels != _UNKNOWN
        if labelled is not None and self.num_neighbours and known.any():
            count = len(labelled)  # type: ignore[arg-type]
            size = min(count, self.num_neighbours)
            bank, bank_labels, _ = self._measure(model, labelled, [row * count // size for row in range(size)])
            in_bank = bank_labels != _UNKNOWN
            if in_bank.any():
                sets = (bank[in_bank], bank_labels[in_bank], features[known], labels[known])
                metrics["knn_accuracy"] = knn_accuracy(*sets, k=min(_NUM_NEIGHBOURS, int(in_bank.sum())))
        return metrics

    @torch.no_grad()
    def _measure(
        self, model: StellarForPreTraining, dataset: Dataset, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pooled tokens (M, d), labels (M,) and, with the pixel head, PSNR (M,) of rows of a data set."""
        state = self.accelerator.state
        # The same number of rows for every process, as collectives want it; what is double is cut off again.
        share = -(-len(rows) // state.num_processes)
        own = [rows[i % len(rows)] for i in range(state.process_index * share, (state.process_index + 1) * share)]
        loader = DataLoader(
            Subset(dataset, own), self.batch_size, num_workers=self.num_workers, collate_fn=self.collator
        )
        features, labels, ratios = [], [], []
        for batch in loader:
            pixel_values = batch["pixel_values"].to(self.accelerator.device)
            output = model(pixel_values, return_loss=False)
            features.append(output.sparse_tokens.float().mean(dim=1))
            labels.append(batch["labels"].to(self.accelerator.device))
            if model.config.reconstruction_target == "pixels":
                height, width = output.reconstruction.shape[-2:]
                target = model.denormalize(pixel_values)[..., :height, :width].clamp(0, 1)
                ratios.append(psnr(output.reconstruction.float(), target))

        def gather(parts: list[Tensor]) -> Tensor:
            return self.accelerator.gather(torch.cat(parts))[: len(rows)]

        return gather(features), gather(labels), gather(ratios) if ratios else None


class FigureCallback(TrainerCallback):
    """
    Draws images, their reconstructions and token maps at every evaluation: into `figures/` of the output folder, and
    to TensorBoard and Weights & Biases where the training reports to them. Needs matplotlib and the pixel head.

    Args:
        dataset: Map-style; its first images are drawn.
        collator: Processes the images.
        callbacks: The trainer's callbacks, among which TensorBoard's is looked for.
    """

    def __init__(self, dataset: Dataset, collator: WholeImages, callbacks: Sequence[TrainerCallback]):
        self.dataset = dataset
        self.collator = collator
        self.callbacks = callbacks

    @staticmethod
    def is_possible(model: StellarForPreTraining) -> bool:
        return model.config.reconstruction_target == "pixels" and importlib.util.find_spec("matplotlib") is not None

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        figure = self._draw(model)
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir, "figures", f"step-{state.global_step:07d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_figure("eval/reconstructions", figure, state.global_step)
        if "wandb" in args.report_to:
            import wandb

            wandb.log({"eval/reconstructions": wandb.Image(str(path)), "train/global_step": state.global_step})

    @torch.no_grad()
    def _draw(self, model: StellarForPreTraining):
        from ..visualization import plot_reconstructions

        training = model.training
        rows = [self.dataset[index] for index in range(min(_NUM_DRAWN, len(self.dataset)))]  # type: ignore[arg-type]
        pixel_values = self.collator(rows)["pixel_values"].to(model.device)
        output = model.eval()(pixel_values, return_loss=False)
        model.train(training)
        height, width = output.reconstruction.shape[-2:]
        images = model.denormalize(pixel_values)[..., :height, :width]
        return plot_reconstructions(images, output.reconstruction, output.localization)
