# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Linear probes of frozen features."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data import UnreadableImages, read_image
from ..data.views import StellarViews, random_boxes
from ..features import ImageFeatures, encode_batches, encode_images
from ..features.checks import check_integer
from ..features.encoding import Encode, background_of, batches_of, image_of, image_rows
from ..hub_stellar import written_aside
from .classification import class_names, match_classes
from .knn import check_features
from .representations import image_representations

if TYPE_CHECKING:
    from accelerate import Accelerator

# The range of the paper's sweep.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)

# Prior variance of a class logit. With standardized features and weights of prior variance C, a logit over d
# features has variance C * d, so C = variance / d regularizes 3072 raw pixels and 64 learned features alike.
_PROBE_LOGIT_VARIANCE = 32.0
_PROBE_MAX_ITER = 200


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
) -> float:
    """Accuracy of multinomial logistic regression on features standardized by the training rows.

    The L2 penalty is fixed on the scale of the logits (their prior variance is 32), so it is equally strong for
    any number of features, and nothing is tuned on either set. L-BFGS stops after at most 200 iterations. The
    result is deterministic.

    Args:
        train_features: (n, d) floating point.
        train_labels: (n,) integers >= 0, of two classes or more.
        test_features: (m, d) floating point.
        test_labels: (m,) integers >= 0.

    Returns:
        The share of correctly classified test rows, in [0, 1].

    Raises:
        ValueError: If shapes disagree, a set is empty or not finite, or there is only one training class.
        ImportError: If scikit-learn is missing.
    """
    check_features(train_features, train_labels, test_features, test_labels)
    if len(train_labels.unique()) < 2:
        raise ValueError("train_labels hold a single class, but a linear probe needs two classes or more.")
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("The linear probe needs scikit-learn; install it with: pip install scikit-learn") from error

    regression = LogisticRegression(
        C=_PROBE_LOGIT_VARIANCE / train_features.shape[1], max_iter=_PROBE_MAX_ITER, tol=1e-3
    )
    probe = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings():
        # The iteration limit is part of the protocol: raw pixels reach it, where accuracy hardly changes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train_features.float().cpu().numpy(), train_labels.cpu().numpy())
    return float(probe.score(test_features.float().cpu().numpy(), test_labels.cpu().numpy()))


@dataclass
class LinearProbe:
    """A linear classifier on one representation of images.

    Attributes:
        head: LayerNorm and Linear, as in [`StellarForImageClassification`], on the CPU.
        classes: Name of each class that the head tells apart, or the number that the training images give it.
        learning_rate: With which it was trained: the one of the best accuracy on the held-out images.
        held_out_accuracies: Accuracy on the held-out images by learning rate, in [0, 1].
        accuracy: Accuracy on the test images, in [0, 1].
    """

    head: nn.Sequential
    classes: list[int | str]
    learning_rate: float
    held_out_accuracies: dict[float, float]
    accuracy: float


def train_linear_probes(
    model: Any,
    processor: Any,
    train_dataset: Any,
    test_dataset: Any,
    *,
    representations: Sequence[str] = ("sparse_mean",),
    encode: Encode = image_representations,
    image_column: str = "image",
    label_column: str = "label",
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_epochs: int = 30,
    train_batch_size: int = 2048,
    weight_decay: float = 1e-4,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    held_out_share: float = 0.1,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    checkpoint: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> dict[str, LinearProbe]:
    """Trains linear classifiers on a frozen encoder by the recipe of the paper (STELLAR, arXiv 2602.01905).

    LayerNorm and Linear on a representation, AdamW without a schedule, random resized crops and flips. One forward
    pass of the encoder feeds the heads of all learning rates and representations, which are computed at once and do
    not touch each other. For each representation the learning rate that does best on a part of the training images,
    held out at random and seen as the processor gives them, is chosen; only its head sees the test images.

    A crop depends on the seed, the epoch and its row alone; the result is the same, bit for bit, on any number of
    processes. Images that cannot be read, or have no class, are left out.

    Args:
        model: Any vision encoder that `encode` takes, whole on every process. It is not changed.
        processor: Its image processor, as [`load_processor`] gives it; it must give squares.
        train_dataset: Rows with images and labels, integers or names, in a form that [`encode_images`] takes.
        test_dataset: The same; classes are compared by name where both data sets know names, see [`match_classes`].
        representations: Which of those that `encode` gives.
        encode: The call of the model.
        image_column: Column of the images.
        label_column: Column of the classes.
        learning_rates: Of the heads, each > 0.
        num_epochs: Passes over the training images.
        train_batch_size: Images of a step, over all processes.
        weight_decay: Of AdamW.
        crop_scale: Least and largest share of an image that a crop takes.
        held_out_share: Share of the training images that choose the learning rate, in (0, 1).
        seed: Of the held-out images, the order, the crops and the weights.
        batch_size: Images of a forward pass, at most.
        num_workers: Processes that read images.
        accelerator: Splits the forward passes over its processes.
        checkpoint: A file, written after every epoch, from which an interrupted training with the same settings goes
            on.
        show_progress: Whether to show a progress bar.

    Returns:
        The probe of each representation, on every process.

    Raises:
        ValueError: If a setting is impossible, a representation is not among those of the model, a data set lacks a
            column, or there are fewer than two classes.
    """
    check_integer("num_epochs", num_epochs)
    check_integer("train_batch_size", train_batch_size)
    if not learning_rates or min(learning_rates) <= 0 or not 0 < held_out_share < 1:
        raise ValueError(
            f"learning_rates are {learning_rates} and held_out_share {held_out_share}, but positive rates and a share "
            "between 0 and 1 are expected."
        )
    loading: dict[str, Any] = {
        "image_column": image_column,
        "columns": [label_column],
        "num_workers": num_workers,
        "unreadable": UnreadableImages(max_share=1, consequence="It is left out."),
    }

    def encoded(dataset: Any, rows: Sequence[int] | None, description: str) -> ImageFeatures:
        return encode_images(
            model,
            dataset,
            processor,
            encode=encode,
            rows=rows,
            batch_size=batch_size,
            accelerator=accelerator,
            description=description,
            show_progress=show_progress,
            **loading,
        )

    order = np.random.default_rng(seed).permutation(len(train_dataset)).tolist()
    num_held_out = max(1, round(held_out_share * len(order)))
    held_out, rows = encoded(train_dataset, order[:num_held_out], "held out"), order[num_held_out:]
    test = encoded(test_dataset, None, "test")
    labels = _Labels(train_dataset, test_dataset, test.columns[label_column], label_column)
    if len(labels.classes) < 2:
        raise ValueError(f"The training images are of the classes {labels.classes}: a probe needs two or more.")
    for name in representations:
        if name not in test.tensors:
            raise ValueError(f"There is no representation {name!r}, only {', '.join(test.tensors)}.")

    crops = RandomCrops(train_dataset, processor, image_column, label_column, crop_scale, seed)
    heads = {
        name: LinearHeads(getattr(test, name).shape[1], len(labels.classes), learning_rates, weight_decay, seed)
        for name in representations
    }
    for head in heads.values():
        head.to(model.device)
    first_epoch = _load(checkpoint, heads)
    steps = num_epochs * -(-len(rows) // train_batch_size)
    done = first_epoch * -(-len(rows) // train_batch_size)
    shows = show_progress and (accelerator is None or accelerator.is_local_main_process)
    with tqdm(total=steps, initial=done, desc="linear probes", unit=" steps", leave=False, disable=not shows) as bar:
        for epoch in range(first_epoch, num_epochs):
            crops.epoch = epoch
            shuffled = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
            batches = [batches_of(batch, batch_size) for batch in batches_of(shuffled, train_batch_size)]
            for features in _features_of(model, crops, batches, encode, loading, accelerator):
                targets = labels.of_train(features.columns.get(label_column, []))
                for name, head in heads.items():
                    if (targets >= 0).any():
                        head.step(features.tensors[name][targets >= 0], targets[targets >= 0])
                bar.update()
            if checkpoint is not None and (accelerator is None or accelerator.is_main_process):
                _save(checkpoint, heads, epoch + 1)
    held_out_labels = labels.of_train(held_out.columns[label_column])
    return {
        name: head.best(getattr(held_out, name), held_out_labels, getattr(test, name), labels.test, labels.classes)
        for name, head in heads.items()
    }


class LinearHeads(nn.Module):
    """LayerNorm and Linear for each of several learning rates, computed and trained at once.

    Args:
        width: Channels d of the features.
        num_classes: Classes.
        learning_rates: One for each head.
        weight_decay: Of AdamW.
        seed: Of the weights, which are the same for all heads.
    """

    def __init__(self, width: int, num_classes: int, learning_rates: Sequence[float], weight_decay: float, seed: int):
        super().__init__()
        weight = 0.01 * torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed))
        self._pairs = [(nn.LayerNorm(width), nn.Linear(width, num_classes)) for _ in learning_rates]
        self.heads = nn.ModuleList(nn.Sequential(*pair) for pair in self._pairs)
        for _, linear in self._pairs:
            linear.weight.data.copy_(weight)
            linear.bias.data.zero_()
        self.learning_rates = list(learning_rates)
        groups = [
            {"params": list(head.parameters()), "lr": rate}
            for head, rate in zip(self.heads, learning_rates, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (heads, B, classes) of features (B, d)."""
        # LayerNorm's mean and deviation are the same for all heads; its scale and shift belong to the linear map.
        features = F.layer_norm(features.float(), features.shape[-1:])
        weights = torch.stack([linear.weight * norm.weight for norm, linear in self._pairs])
        biases = torch.stack([linear.bias + linear.weight @ norm.bias for norm, linear in self._pairs])
        return torch.einsum("bd,hcd->hbc", features, weights) + biases[:, None]

    def step(self, features: Tensor, labels: Tensor) -> None:
        """One step of every head on features (B, d) and their classes (B,)."""
        device = self._pairs[0][1].weight.device
        logits = self(features.to(device))
        labels = labels.to(device).expand(len(logits), -1)
        # The sum over the heads gives each the gradient of its own mean.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor) -> list[float]:
        """Accuracy of every head on features (B, d) and their classes (B,), of which negative ones are left out."""
        device = self._pairs[0][1].weight.device
        features, labels = features[labels >= 0], labels[labels >= 0]
        if len(labels) == 0:
            raise ValueError("No image has a class that the training images have: check the labels of both data sets.")
        correct = torch.zeros(len(self.heads), dtype=torch.int64, device=device)
        for part, target in zip(features.split(2048), labels.split(2048), strict=True):
            correct += (self(part.to(device)).argmax(dim=-1) == target.to(device)).sum(dim=1)
        return (correct.double() / len(labels)).tolist()

    def best(
        self, held_out: Tensor, held_out_labels: Tensor, test: Tensor, test_labels: Tensor, classes: list[int | str]
    ) -> LinearProbe:
        """The head that does best on the held-out images, the first of equals, measured on the test images."""
        accuracies = self.accuracies(held_out, held_out_labels)
        chosen = accuracies.index(max(accuracies))
        return LinearProbe(
            accuracy=self.accuracies(test, test_labels)[chosen],
            head=self.heads[chosen].cpu(),  # type: ignore[arg-type]
            classes=classes,
            learning_rate=self.learning_rates[chosen],
            held_out_accuracies=dict(zip(self.learning_rates, accuracies, strict=True)),
        )


class RandomCrops(Dataset):
    """Rows of a data set with a random resized crop in place of the image, and its processor.

    A crop is drawn by the seed, the epoch and the row: whoever reads it, in whatever batch, gets the same one. An
    image that cannot be read stays as it is.

    Args:
        dataset: Rows with images and labels.
        processor: Of the model; tells the size of the crops, the normalization, and what is behind transparent pixels.
        image_column: Column of the images.
        label_column: Column of the classes.
        scale: Least and largest share of the image's area.
        seed: At least 0.

    Attributes:
        epoch: Of the draws.
    """

    def __init__(
        self,
        dataset: Any,
        processor: Any,
        image_column: str,
        label_column: str,
        scale: tuple[float, float],
        seed: int,
    ):
        self.rows = image_rows(dataset, image_column, [label_column])
        self.image_column = image_column
        self.seed = seed
        self.epoch = 0
        example = torch.zeros(3, 64, 64, dtype=torch.uint8)
        size = processor([example], input_data_format="channels_first", return_tensors="pt")["pixel_values"].shape[-2:]
        if size[0] != size[1]:
            raise ValueError(f"The processor gives images of {size[1]}x{size[0]} pixels, but the crops are squares.")
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
        self.mean, self.std = mean, std
        self.background = background_of(processor)
        # Also checks the scale.
        self.law = StellarViews(num_local_views=0, global_size=size[0], global_scale=scale, blur_probability=0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = self.rows[row]
        image = image_of(item, self.image_column)
        try:
            picture = read_image(image, self.law.decode_size, self.background)
        except ValueError:
            return item  # the loop that reads it names it
        return {**item, self.image_column: self._crop(picture, row)}

    def _crop(self, image: Image.Image, row: int) -> Image.Image:
        generator = torch.Generator().manual_seed(_seed_of(self.seed, self.epoch, row))

        def rand(*shape: int) -> Tensor:
            return torch.rand(1, *shape, generator=generator)

        sizes = torch.tensor([[image.height, image.width]])
        ((top, left, height, width),) = random_boxes(rand, sizes, self.law.global_scale, self.law.ratio).tolist()
        size = (self.law.global_size, self.law.global_size)
        # Pillow's is the antialiased bicubic resampling of the views.
        crop = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rand() < self.law.flip else crop

    def process(self, images: Sequence[Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Normalizes crops (3, size, size), uint8, as the model's processor does, which would crop them again."""
        return {"pixel_values": (torch.stack(list(images)).float() / 255 - self.mean) / self.std}


class _Labels:
    """Classes of the images of two data sets as numbers of the classes that a probe tells apart."""

    def __init__(self, train_dataset: Any, test_dataset: Any, test_labels: Sequence[Any], label_column: str):
        self._names = class_names(train_dataset, label_column)
        every = _column(train_dataset, label_column)
        matched = match_classes(every, test_labels, self._names, class_names(test_dataset, label_column))
        numbers = matched.train_labels
        # Classes that only the test images have come last: they are wrong whatever a probe says.
        self.classes = matched.classes[: int(numbers.max()) + 1] if len(numbers) else []
        self.test = matched.test_labels
        self._number_of = dict(zip(every, numbers.tolist(), strict=True))

    def of_train(self, labels: Sequence[Any]) -> Tensor:
        """(B,) int64, -1 for no class."""
        return torch.tensor([self._number_of[label] for label in labels], dtype=torch.int64)


def _column(dataset: Any, name: str) -> list:
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        if name not in names:
            raise ValueError(f"The data set has no column {name!r}, only {names}: name that of the classes.")
        return list(dataset.select_columns(name)[name])
    return [row.get(name) for row in dataset]


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _features_of(
    model: Any,
    crops: RandomCrops,
    batches: Sequence[Sequence[Sequence[int]]],
    encode: Encode,
    loading: dict[str, Any],
    accelerator: Accelerator | None,
) -> Iterator[ImageFeatures]:
    """Features of each batch, which is given as the parts that a forward pass takes."""
    process, num_processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    # Parts are shared out as they are, so that a forward pass is of the same images on any number of processes.
    own = [parts[process::num_processes] for parts in batches]
    stream = encode_batches(
        model, crops, crops.process, [part for parts in own for part in parts], encode=encode, **loading
    )
    for parts in own:
        found = [next(stream) for _ in parts]
        yield ImageFeatures.concatenate(found if num_processes == 1 else gather_object(found))


def _save(file: str | os.PathLike, heads: dict[str, LinearHeads], epoch: int) -> None:
    state = {name: (head.state_dict(), head.optimizer.state_dict()) for name, head in heads.items()}
    with written_aside(Path(file), prefix=".") as aside:
        torch.save({"epoch": epoch, "heads": state}, aside)


def _load(file: str | os.PathLike | None, heads: dict[str, LinearHeads]) -> int:
    """Fills the heads with those of a checkpoint, if there is one; the epochs that it has seen."""
    if file is None or not Path(file).exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["heads"].keys() != heads.keys():
        raise ValueError(f"{file} holds probes of {list(state['heads'])}, not of {list(heads)}: remove it.")
    for name, head in heads.items():
        weights, optimizer = state["heads"][name]
        head.load_state_dict(weights)
        head.optimizer.load_state_dict(optimizer)
    return state["epoch"]
