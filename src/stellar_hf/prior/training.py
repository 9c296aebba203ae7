# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Training of the prior over tokens and localization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..training.callbacks import show_loss_table
from ..training.checkpoint_files import Checkpoint
from ..training.checkpoints import CheckpointTrainer
from ..training.monitoring import NonFiniteLossGuard
from ..training.results import ResultsTrainer

if TYPE_CHECKING:
    from .modeling_token_prior import StellarTokenPrior

_MAX_DECAY = 0.9999


class TokenPriorForTraining(nn.Module):
    """
    A prior, the moving average of its weights, and its flow-matching loss.

    The decay of the average is `min(0.9999, (1 + n) / (10 + n))` after n steps: it covers the last tenth of a short
    training.

    Args:
        prior: With the statistics of the data (`set_statistics`).
        class_dropout: Share of the images that are trained without their class, which classifier-free guidance needs
            (Ho & Salimans, arXiv 2207.12598).

    Raises:
        ValueError: If `class_dropout` is not in [0, 1].
    """

    def __init__(self, prior: StellarTokenPrior, class_dropout: float = 0.1):
        super().__init__()
        if not 0 <= class_dropout <= 1:
            raise ValueError(f"class_dropout is {class_dropout}, but must be a share in [0, 1].")
        self.prior = prior
        self.class_dropout = class_dropout
        self._average = AveragedModel(prior, avg_fn=_moving_average).requires_grad_(False)

    @property
    def average(self) -> StellarTokenPrior:
        """The prior with averaged weights, which draws better than the last ones."""
        return cast("StellarTokenPrior", self._average.module)

    def forward(
        self, sparse_tokens: Tensor, localization: Tensor, class_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """
        Flow matching with noise levels of a logit-normal distribution (Esser et al., arXiv 2403.03206, section 3.1).

        Args:
            sparse_tokens: S, (B, r, d) floating point.
            localization: L, (B, N, r), rows sum to 1.
            class_labels: (B,) integers below `num_classes`; without them no image has a class.

        Returns:
            `token_loss` and `localization_loss`, mean squared errors of the velocity of either, and `loss`, their sum.
        """
        latents = self.prior.pack(sparse_tokens, localization)
        noise = torch.randn_like(latents)
        sigma = torch.randn(len(latents), device=latents.device).sigmoid()
        if class_labels is not None:
            is_dropped = torch.rand(len(latents), device=latents.device) < self.class_dropout
            class_labels = class_labels.masked_fill(is_dropped, self.prior.config.num_classes)
        noisy = torch.lerp(latents, noise, sigma[:, None])
        velocity = self.prior(noisy, self.prior.num_train_timesteps * sigma, class_labels).sample
        token_error, logit_error = self.prior.split((velocity - (noise - latents)).square())
        token_loss, localization_loss = token_error.mean(), logit_error.mean()
        return {
            "loss": token_loss + localization_loss,
            "token_loss": token_loss,
            "localization_loss": localization_loss,
        }

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """
        Recomputes the activations of each block in the backward pass; called by the `Trainer`.

        Raises:
            ValueError: If there are options, which Diffusers' models do not have.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError(
                "The prior recomputes every block, without options: leave out activation_checkpointing_kwargs and "
                "gradient_checkpointing_kwargs."
            )
        self.prior.enable_gradient_checkpointing()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The same by the name that `Trainer` calls before Transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def update_average(self) -> None:
        """Moves the average towards the weights; to be called after each optimizer step."""
        self._average.update_parameters(self.prior)


class StellarTokenPriorTrainer(ResultsTrainer, CheckpointTrainer):
    """
    `Trainer` of a [`StellarTokenPrior`]: flow matching with a moving average of the weights, checkpoints that are
    complete or not there, and that a run goes on from bit for bit on a CPU with as many threads. `average` is the
    result.

    Args:
        prior: With the statistics of the data (`set_statistics`).
        args: Training arguments.
        class_dropout: Share of the images that are trained without their class.
        **kwargs: As in `Trainer`. Rows of the `train_dataset` hold `sparse_tokens`, `localization` and, for a prior
            with classes, `class_labels`.

    Raises:
        ValueError: If `class_dropout` is not in [0, 1], or one process is to train on several GPUs. In training, if
            the loss is not finite.
    """

    def __init__(self, prior: StellarTokenPrior, args: TrainingArguments, class_dropout: float = 0.1, **kwargs):
        super().__init__(TokenPriorForTraining(prior, class_dropout), args, **kwargs)
        self.add_callback(AverageCallback())
        self._loss_guard = NonFiniteLossGuard()
        self.add_callback(self._loss_guard)
        show_loss_table(self, _COLUMNS)

    @property
    def average(self) -> StellarTokenPrior:
        """The prior with averaged weights."""
        return self._training_model.average

    @property
    def _training_model(self) -> TokenPriorForTraining:
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss; keeps both of its terms for the next log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            self._loss_guard.check(outputs, inputs, self.state, self._nan_batch_file, terms=_TERMS)
            self.log_means.add({**outputs, "loss": loss}, 1 / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def check_resumable(self, checkpoint: Checkpoint) -> None:
        """
        Checks that the training can go on from a checkpoint.

        Raises:
            ValueError: If it is missing, damaged, or of another prior.
        """
        super().check_resumable(checkpoint)
        if checkpoint.config is None:
            raise ValueError(f"The checkpoint {checkpoint} has no {CONFIG_NAME}, so is not of a prior.")
        own, saved = json.loads(self._training_model.prior.to_json_string()), checkpoint.config
        differing = [
            f"{name} is {saved.get(name)} there and {value} here"
            for name, value in own.items()
            if not name.startswith("_") and saved.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"The checkpoint {checkpoint} is of another prior: {', '.join(differing)}. Resume with its values, or "
                "train in another output_dir."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`: the weights of prior and average; with the prior's configuration."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._training_model.prior.save_config(output_dir or str(self.args.output_dir))

    def load_weights(self, checkpoint: str | Path) -> None:
        """Takes the weights from a checkpoint."""
        self._training_model.load_state_dict(load_file(Path(checkpoint, SAFE_WEIGHTS_NAME)))


class AverageCallback(TrainerCallback):
    """Moves the average of the weights once per optimizer step; not on accumulated or skipped steps."""

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            model.update_average()


_TERMS = ("token_loss", "localization_loss")
_COLUMNS = (
    ("loss", "loss", "{:.3f}"),
    ("token_loss", "tokens", "{:.3f}"),
    ("localization_loss", "maps", "{:.3f}"),
    ("learning_rate", "rate", "{:.1e}"),
)


def _moving_average(average: Tensor, weight: Tensor, num_steps: Tensor | int) -> Tensor:
    decay: Any = torch.as_tensor((1 + num_steps) / (10 + num_steps)).clamp(max=_MAX_DECAY)
    return torch.lerp(average, weight, (1 - decay).to(average))
