# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a training measures and draws at its evaluations: kNN accuracy, PSNR, and figures of reconstructions."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..data import UnreadableImages
from ..evaluation import class_names, knn_accuracy, match_classes, tokens_and_psnr
from ..features import ImageFeatures, encode_images, model_features
from ..image_processing_pil_stellar import WHITE, StellarImageProcessorPil
from ..modeling_stellar import StellarForPreTraining

logger = logging.get_logger(__name__)

_NUM_NEIGHBOURS = 20
_NUM_DRAWN = 8


def default_processor(model: StellarForPreTraining, background: Sequence[int] = WHITE) -> StellarImageProcessorPil:
    """
    The image processor of a model that was trained on views of whole images: no margin is cut off.

    Args:
        model: The model, which gives the size and the statistics of the normalization.
        background: Red, green and blue behind transparent pixels, integers in [0, 255]; the training's.
    """
    config = model.config
    return StellarImageProcessorPil(
        size={"shortest_edge": config.image_size},
        crop_size={"height": config.image_size, "width": config.image_size},
        image_mean=config.image_mean,
        image_std=config.image_std,
        background=list(background),  # type: ignore[call-arg]  # its class attributes are settings, too
    )


class ImageEvaluation:
    """
    Measures a model on images as a user will give them: kNN accuracy of the pooled tokens, and PSNR. Images that
    cannot be read are named once and left out.

    Args:
        accelerator: Splits the images over its processes.
        processor: Image processor of the model.
        image_column: Column of the images, in a form that [`encode_images`] takes.
        label_column: Column of the classes, where there is one.
        batch_size: Images of a forward pass.
        num_workers: Workers that read them.
        num_neighbours: At most so many labelled images, spread over the data set, are compared with; 0 leaves kNN out.

    Attributes:
        knn_at_start: kNN accuracy of the model with which the training started, by the prefix of the metrics.
        unreadable: Counts and names the images that cannot be read.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        processor: Any,
        image_column: str,
        label_column: str,
        batch_size: int,
        num_workers: int,
        num_neighbours: int,
    ):
        self.accelerator = accelerator
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_neighbours = num_neighbours
        self.knn_at_start: dict[str, float] = {}
        self.unreadable = UnreadableImages(max_share=1, consequence="It is left out.")
        self._unknown_classes: set[str] = set()

    def __call__(
        self, model: StellarForPreTraining, dataset: Dataset, labelled: Dataset | None = None, prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Args:
            model: Not wrapped.
            dataset: Map-style; the images to measure on.
            labelled: Map-style; images with classes, to find the neighbours among. Where both data sets know the names
                of their classes, these are compared, and images of classes that `labelled` does not know are left out.
            prefix: Of the metrics' names, which is not added here.

        Returns:
            `psnr` in dB with the pixel head. Where both data sets have classes also `knn_accuracy`, `knn_majority`,
            which is the accuracy of always naming the most frequent class of the measured images, and `knn_at_start`,
            if the training started here.
        """
        features = self.encode(model, dataset, encode=_pooled_and_psnr)
        metrics = {"psnr": features.psnr.mean().item()} if "psnr" in features.tensors else {}
        metrics |= self._knn(model, features, dataset, labelled)
        if "knn_accuracy" in metrics and prefix in self.knn_at_start:
            metrics["knn_at_start"] = self.knn_at_start[prefix]
        return metrics

    def measure_at_start(self, model: Any, dataset: Dataset, labelled: Dataset | None, prefix: str) -> None:
        """Measures the kNN accuracy that later evaluations with this prefix report beside theirs."""
        if labelled is None or not self.num_neighbours:
            return
        metrics = self._knn(model, self.encode(model, dataset, encode=_pooled), dataset, labelled)
        if "knn_accuracy" in metrics:
            self.knn_at_start[prefix] = metrics["knn_accuracy"]

    def encode(self, model: Any, dataset: Dataset, **kwargs: Any) -> ImageFeatures:
        """[`encode_images`] with the settings of this evaluation."""
        return encode_images(
            model,
            dataset,
            self.processor,
            image_column=self.image_column,
            columns=[self.label_column],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            accelerator=self.accelerator,
            unreadable=self.unreadable,
            show_progress=False,
            **kwargs,
        )

    def _knn(
        self, model: Any, features: ImageFeatures, dataset: Dataset, labelled: Dataset | None
    ) -> dict[str, float]:
        labels = features.columns[self.label_column]
        if labelled is None or not self.num_neighbours or not _has_classes(labels):
            return {}
        count = len(labelled)  # type: ignore[arg-type]
        size = min(count, self.num_neighbours)
        bank = self.encode(model, labelled, rows=[row * count // size for row in range(size)], encode=_pooled)
        names, bank_names = (class_names(data, self.label_column) for data in (dataset, labelled))
        matched = match_classes(bank.columns[self.label_column], labels, bank_names, names)
        self._name_unknown(set(matched.unknown))
        return _knn_metrics(bank.pooler_output, matched.train_labels, features.pooler_output, matched.test_labels)

    def _name_unknown(self, classes: set[str]) -> None:
        new = sorted(classes - self._unknown_classes)
        self._unknown_classes |= classes
        if new:
            logger.warning(
                f"The training images have no class {', '.join(new)}: the kNN accuracy leaves these images out."
            )


class MeanOfReadable:
    """The mean of a loss over images some of which are left out: the Trainer's counts all batches as whole ones."""

    def __init__(self):
        self._total, self._num_images, self._num_left_out = 0.0, 0, 0

    def add(self, loss: float, num_images: int, num_left_out: int) -> None:
        """A batch: its mean loss, the number of its images, and of those that were left out beside them."""
        if num_images:
            self._total += loss * num_images
        self._num_images += num_images
        self._num_left_out += num_left_out

    def compute(self) -> float | None:
        """
        The mean over the images of all processes; None where none is left out, and the Trainer's is right.

        Raises:
            ValueError: If all images are left out.
        """
        totals = gather_object([(self._total, self._num_images, self._num_left_out)])
        total, num_images, num_left_out = map(sum, zip(*totals, strict=True))
        if not num_left_out:
            return None
        if not num_images:
            raise ValueError(f"None of the {num_left_out} images to measure on can be read.")
        return total / num_images


class KnnAtStartCallback(TrainerCallback):
    """
    Measures the kNN accuracy of the model before its first step, which later evaluations report beside theirs; a
    training that goes on takes it from its log. A model that is sharded over processes is not measured: its first
    forward pass has to be that of the training.

    Args:
        evaluation: Measures, and keeps the figures.
        datasets: Images to measure on, by the prefix of their metrics.
        labelled: Images to find the neighbours among.
    """

    def __init__(self, evaluation: ImageEvaluation, datasets: Mapping[str, Dataset], labelled: Dataset):
        self.evaluation = evaluation
        self.datasets = datasets
        self.labelled = labelled

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for log in state.log_history:
            found = {name.removesuffix("_knn_at_start"): log[name] for name in log if name.endswith("_knn_at_start")}
            self.evaluation.knn_at_start.update(found)
        is_sharded = self.evaluation.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if state.global_step > 0 or args.eval_strategy == "no" or is_sharded:
            return
        for prefix, dataset in self.datasets.items():
            self.evaluation.measure_at_start(model, dataset, self.labelled, prefix)


class FigureCallback(TrainerCallback):
    """
    Draws images, their reconstructions and token maps at every evaluation: into `figures/` of the output folder, and
    to TensorBoard and Weights & Biases where the training reports to them. Where none of the images can be read, or
    the figure cannot be written, a warning says so. Needs matplotlib and the pixel head.

    Args:
        dataset: Map-style; some of its images are drawn, as [`sample_rows`] picks them.
        evaluation: Reads and processes the images.
        callbacks: The trainer's callbacks, among which TensorBoard's is looked for.
    """

    def __init__(self, dataset: Dataset, evaluation: ImageEvaluation, callbacks: Sequence[TrainerCallback]):
        self.dataset = dataset
        self.evaluation = evaluation
        self.callbacks = callbacks

    @staticmethod
    def is_possible(model: StellarForPreTraining) -> bool:
        return model.config.reconstruction_target == "pixels" and importlib.util.find_spec("matplotlib") is not None

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        try:
            figure = self._draw(model)
            if state.is_world_process_zero:
                self._save(figure, args, state)
        except (ValueError, OSError) as error:  # no image can be read, or the disk is full
            if state.is_world_process_zero:
                logger.warning(f"There is no figure of step {state.global_step}, and the training goes on: {error}")

    def _save(self, figure: Any, args: TrainingArguments, state: TrainerState) -> None:
        path = Path(str(args.output_dir), "figures", f"step-{state.global_step:07d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_figure("eval/reconstructions", figure, state.global_step)
        if "wandb" in args.report_to:  # type: ignore[operator]  # a list by now
            import wandb

            wandb.log({"eval/reconstructions": wandb.Image(str(path)), "train/global_step": state.global_step})

    @cached_property
    def _rows(self) -> list[int]:
        # Twice as many as are drawn, since some may be unreadable.
        return sample_rows(self.dataset, 2 * _NUM_DRAWN, self.evaluation.label_column)

    def _draw(self, model: StellarForPreTraining):
        from ..visualization import plot_reconstructions

        features = self.evaluation.encode(model, self.dataset, rows=self._rows, encode=_reconstructed)
        places = {row: place for place, row in enumerate(features.index.tolist())}
        shown = [places[row] for row in self._rows if row in places][:_NUM_DRAWN]
        return plot_reconstructions(
            features.images[shown], features.reconstruction[shown], features.localization[shown], num_images=_NUM_DRAWN
        )


def sample_rows(dataset: Any, count: int, label_column: str = "label", seed: int = 0) -> list[int]:
    """
    Rows of a data set to show: drawn at random, always the same ones, from as many classes as there are.

    Args:
        dataset: Has a length. Its classes count if it is a `datasets.Dataset` with this column.
        count: Number of rows; all rows if there are fewer.
        label_column: Column of the classes.
        seed: Seed of the draw.

    Returns:
        Rows in the order of the draw: the first ones are of different classes.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    if label_column in (getattr(dataset, "column_names", None) or ()):
        labels = np.asarray(list(map(str, dataset.select_columns(label_column)[label_column][:])))[order]
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        # The first image of every class, then the second of every class, and so on.
        turns = np.empty(len(order), dtype=np.int64)
        turns[np.argsort(classes, kind="stable")] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        order = order[np.argsort(turns, kind="stable")]
    return order[:count].tolist()


def _knn_metrics(bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of features (M, d), of which those with the label -1 are left out; nothing where none are left."""
    in_bank, known = bank_labels >= 0, labels >= 0
    if not in_bank.any() or not known.any():
        return {}
    sets = (bank[in_bank], bank_labels[in_bank], features[known], labels[known])
    return {
        "knn_accuracy": knn_accuracy(*sets, k=min(_NUM_NEIGHBOURS, int(in_bank.sum()))),
        "knn_majority": labels[known].bincount().max().item() / int(known.sum()),
    }


def _has_classes(labels: Sequence[Any]) -> bool:
    return bool((match_classes([], labels).test_labels >= 0).any())


def _pooled(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    return {"pooler_output": model_features(model, pixel_values)["pooler_output"]}


def _pooled_and_psnr(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    features = tokens_and_psnr(model, pixel_values)
    return {name: features[name] for name in ("pooler_output", "psnr") if name in features}


def _reconstructed(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    output = model(pixel_values.to(model.dtype), return_loss=False)
    height, width = output.reconstruction.shape[-2:]
    images = model.denormalize(pixel_values)[..., :height, :width]
    return {"images": images, "reconstruction": output.reconstruction, "localization": output.localization}
