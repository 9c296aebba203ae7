# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""How a training run is doing: its speed and memory, whether its representation collapses, and its end on NaN."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..configuration_stellar import StellarConfig
from ..modeling_stellar import LOSS_TERMS, StellarForPreTraining

logger = logging.get_logger(__name__)

# Figures -------------------------------------------------------------------------------------------------------------


class ThroughputCallback(TrainerCallback):
    """Images per second since the last log, evaluation or checkpoint: the time of the latter two does not count."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.num_images = 0
        self._start = time.perf_counter()

    def images_per_second(self) -> float:
        """Of this process; starts anew."""
        rate = self.num_images / (time.perf_counter() - self._start)
        self.restart()
        return rate

    def on_train_begin(self, args, state, control, **kwargs):
        self.restart()

    def on_evaluate(self, args, state, control, **kwargs):
        self.restart()

    def on_save(self, args, state, control, **kwargs):
        self.restart()


def memory_gib(device: torch.device) -> float:
    """Peak of the memory allocated on a CUDA device since the start; elsewhere the process's memory now, in GiB."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30


@torch.no_grad()
def teacher_distance(model: StellarForPreTraining) -> float:
    """|| t - s || / || s || over all teacher weights t and the student weights s that they follow; needs a teacher."""
    pairs = model.teacher_and_student_weights()
    distance = torch.stack([_square_sum(teacher_weight - weight) for teacher_weight, weight in pairs]).sum()
    norm = torch.stack([_square_sum(weight) for _, weight in pairs]).sum()
    return math.sqrt(distance / norm)


def _square_sum(weight: torch.Tensor) -> torch.Tensor:
    total = weight.float().square().sum()
    return total.full_tensor() if isinstance(total, DTensor) else total  # of all shards


def largest_token_share(localization: torch.Tensor) -> torch.Tensor:
    """
    Share of an image's patches that the token with most of them takes, as a mean over images.

    Args:
        localization: (B, N, r), rows that sum to 1.

    Returns:
        Scalar in [1 / r, 1], float32: 1 where one token takes all patches.
    """
    return localization.detach().float().mean(dim=1).amax(dim=-1).mean()


# NaN -----------------------------------------------------------------------------------------------------------------


class NonFiniteLossGuard(TrainerCallback):
    """
    Ends a training whose loss is NaN or infinite, before that loss reaches the weights.

    On an accelerator the look at the loss waits for each forward, and the device then for the first kernels of the
    backward. A later look would cost nothing, but let broken weights be saved.
    """

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        endless = args.max_steps * args.gradient_accumulation_steps  # of a stream, which is one epoch
        batches = len(train_dataloader) if has_length(train_dataloader) else endless
        self._batch = round((state.epoch or 0.0) % 1 * batches)

    def check(
        self,
        outputs: Mapping[str, torch.Tensor],
        inputs: dict[str, Any],
        state: TrainerState,
        path: Path,
        terms: Sequence[str] = LOSS_TERMS,
    ) -> None:
        """
        Counts a batch of the epoch; writes it to `path` if its loss is not finite.

        Args:
            outputs: Of the model: `loss` and its terms.
            inputs: The batch.
            state: Of the training.
            path: File of the batch.
            terms: Names of the terms.

        Raises:
            ValueError: If the loss is not finite: which terms, and where in the training.
        """
        self._batch += 1
        if outputs["loss"].isfinite():
            return
        broken = ", ".join(f"{name} = {outputs[name].item()}" for name in terms if not outputs[name].isfinite())
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Copies, since views of one tensor may share memory, which safetensors refuses.
        copies = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(copies, path)
        raise ValueError(
            f"The loss is {outputs['loss'].item()} at step {state.global_step + 1}, in batch {self._batch} of epoch "
            f"{int(state.epoch or 0) + 1}, because of {broken}. The batch is saved in {path}. If it is fine, "
            "go on from the last checkpoint with a lower learning_rate or stronger clipping (max_grad_norm), or in "
            "bf16 if this was fp16."
        )


# Collapse ------------------------------------------------------------------------------------------------------------

# At the start the diagnostics say nothing yet, and the CLS loss falls from far above ln K through it: a sign counts
# after this share of the steps, and once it has shown in that many logs in a row.
QUIET_SHARE = 0.1
NUM_LOGS = 3

# What healthy runs log is in docs/training.md, and far on the other side of each threshold.
MIN_PROTOTYPE_ENTROPY = 0.3
MAX_SLOT_INFORMATION = 0.9
MIN_TOKEN_DIVERSITY = 0.02
MAX_LARGEST_TOKEN_SHARE = 0.95
# Of the way from 1/r, where every token takes every patch alike, to 1, where each patch has one token.
MIN_SHARPNESS = 0.03
# A uniform prediction has a clustering loss of exactly ln K; this is the share of ln K by which it may miss it.
UNIFORM_LOSS_TOLERANCE = 0.01


def signs_of_collapse(logs: dict[str, float], config: StellarConfig, num_images: int) -> dict[str, str]:
    """
    What a log of the training loss says about collapse.

    Args:
        logs: The diagnostics and the weighted terms, as logged.
        config: Of the model, which tells what they are compared with.
        num_images: Images of a forward: the fewer there are, the fewer prototypes they can use.

    Returns:
        A sentence with what is seen and what it means, and one with the remedy, by the name of the value that shows
        it; nothing if all is well.
    """
    signs = {}

    uniform = math.log(config.num_prototypes)
    entropy = logs["prototype_entropy"]
    highest_entropy = min(1.0, math.log(max(num_images * config.num_sparse_tokens, 2)) / uniform)
    if entropy < MIN_PROTOTYPE_ENTROPY * highest_entropy:
        signs["prototype_entropy"] = (
            f"all predictions share a few of {config.num_prototypes} prototypes (prototype_entropy {entropy:.2f}), "
            "so that the clusters hardly tell images apart. Hold the prototypes still at first "
            "(freeze_prototypes_steps), lower the learning rate, or raise prediction_temperature."
        )
    information = logs["slot_information"]
    if information > MAX_SLOT_INFORMATION:
        signs["slot_information"] = (
            "the clusters merely name the slot of a token, whatever the image (slot_information "
            f"{information:.2f}). {_FROM_RANDOM_WEIGHTS}"
        )
    diversity = logs["token_diversity"]
    if diversity < MIN_TOKEN_DIVERSITY and config.num_sparse_tokens > 1:
        signs["token_diversity"] = (
            f"all tokens of an image are alike (token_diversity {diversity:.3f}), so that all of them say "
            "no more than one. Raise koleo_weight or reconstruction_weight."
        )
    for name, who, weight in (
        ("cls_clustering_loss", "CLS predicts", config.clustering_weight),
        ("clustering_loss", "the tokens predict", config.clustering_weight),
        # Only in its place: a masked token may well say nothing when a clean one does.
        ("masked_loss", "the masked tokens predict", 0 if config.clustering_weight else config.masked_weight),
    ):
        if weight > 0 and abs(logs[name] / weight - uniform) < UNIFORM_LOSS_TOLERANCE * uniform:
            signs[name] = (
                f"{who} every prototype alike (the {name.replace('_', ' ')} stays at ln K = {uniform:.2f}), "
                f"so that the clusters say nothing of the image. {_FROM_RANDOM_WEIGHTS}"
            )
    if config.num_sparse_tokens > 1:
        signs.update(_signs_in_localization(logs, config.num_sparse_tokens))
    return signs


def _signs_in_localization(logs: dict[str, float], num_tokens: int) -> dict[str, str]:
    share, sharpness = logs["largest_token_share"], logs["localization_sharpness"]
    if share > MAX_LARGEST_TOKEN_SHARE:
        return {
            "largest_token_share": f"one token of an image takes all patches (largest_token_share {share:.2f}), so "
            "that the others reconstruct nothing. Raise reconstruction_weight or localization_temperature, or lower "
            "the learning rate."
        }
    if sharpness - 1 / num_tokens < MIN_SHARPNESS * (1 - 1 / num_tokens):
        return {
            "localization_sharpness": "every token takes every patch alike (localization_sharpness "
            f"{sharpness:.2f}, where 1/r is {1 / num_tokens:.2f}), so that the tokens are nowhere in the image. Raise "
            "reconstruction_weight, lower localization_temperature, or set localization_noise."
        }
    return {}


_FROM_RANDOM_WEIGHTS = (
    "The objective alone does not get off the ground from random weights: start from a ViT or ViT-MAE "
    "(from_vit_pretrained), train with use_teacher and mask_ratio 0.6 first, or set standardize_projections."
)

# At the paper's temperatures or lower ones.
_MAX_TARGET_TEMPERATURE, _MAX_PREDICTION_TEMPERATURE = 0.06, 0.12


def warning_of_random_weights(config: StellarConfig) -> str | None:
    """
    What to say before a model that starts from random weights is trained: the paper's objective is for weights that
    know images (STELLAR, ablation from random weights), and leaves others worse than it found them.

    Args:
        config: Of a model that was initialized from no checkpoint.

    Returns:
        A sentence with the cause and one with the remedy; None for an objective that learns from random weights.
    """
    learns = (
        config.standardize_projections
        or config.use_teacher
        or config.target_temperature > _MAX_TARGET_TEMPERATURE
        or config.prediction_temperature > _MAX_PREDICTION_TEMPERATURE
    )
    if learns:
        return None
    return (
        f"The model starts from random weights, at the temperatures {config.target_temperature:g} and "
        f"{config.prediction_temperature:g} that are meant for pre-trained ones. {_FROM_RANDOM_WEIGHTS}"
    )


class CollapseCallback(TrainerCallback):
    """Warns, once for each cause, when the representation collapses, and says what to do."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._logs_in_a_row: dict[str, int] = {}

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        is_quiet = state.global_step < QUIET_SHARE * state.max_steps
        if is_quiet or not state.is_world_process_zero or "prototype_entropy" not in logs:
            return
        signs = signs_of_collapse(logs, model.config, args.train_batch_size)
        # What was warned of keeps its count, so that it is not warned of again.
        counts = {name: count for name, count in self._logs_in_a_row.items() if count >= NUM_LOGS}
        for name, sentences in signs.items():
            counts[name] = self._logs_in_a_row.get(name, 0) + 1
            if counts[name] == NUM_LOGS:
                logger.warning(f"The representation collapses at step {state.global_step}: {sentences}")
        self._logs_in_a_row = counts
