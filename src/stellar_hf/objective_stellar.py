# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The alignment objective of STELLAR (arXiv 2602.01905): how the terms of `loss_stellar.py` are put together in a step.

The views of an image predict its targets: balanced assignments of its sparse tokens and its CLS to prototypes. Shapes
are written with B images, V views of each, r sparse tokens, hidden size d, K prototypes of width k.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from .configuration_stellar import StellarConfig
from .loss_stellar import (
    expected_prototypes,
    koleo_loss,
    masking_noise,
    match_tokens,
    matched_fraction,
    num_kept_patches,
    prototype_cross_entropy,
    prototype_usage,
    sinkhorn_knopp,
)

# The weighted terms that add up to the loss, by their names in the output of pre-training.
LOSS_TERMS = (
    "reconstruction_loss",
    "koleo_loss",
    "clustering_loss",
    "cls_clustering_loss",
    "masked_loss",
    "cls_view_loss",
)


class ClusteringHead(Protocol):
    """What the objective needs of a head."""

    @property
    def prototypes(self) -> torch.Tensor:
        """(K, k)"""

    def __call__(self, features: torch.Tensor, /) -> torch.Tensor:
        """(..., d) features to (..., k) projections."""

    def logits(self, projections: torch.Tensor, /) -> torch.Tensor:
        """(..., k) projections to (..., K) similarities with the prototypes."""


class ClusteringHeads(Protocol):
    """A model or its teacher: one head for the sparse tokens, one for the CLS."""

    @property
    def clustering_head(self) -> ClusteringHead: ...

    @property
    def cls_clustering_head(self) -> ClusteringHead: ...


@dataclass
class ProjectedView:
    """One view of each image as the heads see it."""

    tokens: torch.Tensor  # (B, r, d)
    projections: torch.Tensor  # (B, r, k), of the tokens
    cls_projections: torch.Tensor  # (B, k)


@dataclass
class Targets:
    """What the views of an image have to predict; no gradient except through `expected` to the prototypes."""

    tokens: torch.Tensor  # (B, r, d), to match predictions against
    expected: torch.Tensor  # (B, r, k), A W of each target token
    cls_expected: torch.Tensor  # (B, k)
    from_teacher: bool  # whether the clean view's own tokens have to be matched, too
    prototype_entropy: torch.Tensor  # ()
    slot_information: torch.Tensor  # ()


class StellarObjective:
    """
    The alignment objective at one step: targets from the heads of the model or its teacher, and every view's distance
    from them. It holds no weights. Each step is a method of its own, so that a subclass can vary one of them; a model
    takes it as its `objective_class`.

    Args:
        config: Weights of the terms, and the settings of targets and matching.
        student: The model, whose heads make the predictions.
        target_temperature: Of the Sinkhorn targets, > 0; by default the configuration's.
        prediction_temperature: Of the predictions, > 0; by default the configuration's.

    Raises:
        ValueError: On a temperature that is no positive number.
    """

    def __init__(
        self,
        config: StellarConfig,
        student: ClusteringHeads,
        target_temperature: float | None = None,
        prediction_temperature: float | None = None,
    ):
        self.config = config
        self.student = student
        self.target_temperature = _temperature(config, "target_temperature", target_temperature)
        self.prediction_temperature = _temperature(config, "prediction_temperature", prediction_temperature)

    def terms(
        self,
        clean: ProjectedView,
        targets: Targets,
        masked: tuple[torch.Tensor, torch.Tensor] | None = None,
        local_cls: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Every weighted term but the reconstruction, and the diagnostics of prototypes and matching.

        Args:
            clean: The clean view of each image.
            targets: Of each image.
            masked: CLS (B * V, d) and sparse tokens (B * V, r, d) of the masked views.
            local_cls: (B * V, d), of the local views.

        Returns:
            Scalars by their names in the output of pre-training.
        """
        config, student = self.config, self.student
        diagnostics = {"prototype_entropy": targets.prototype_entropy, "slot_information": targets.slot_information}
        clean_expected = self.match(clean.tokens, targets)[0] if targets.from_teacher else targets.expected
        koleo = koleo_loss(clean.tokens)
        masked_loss = cls_view_loss = koleo.new_zeros(())
        if masked is not None:
            masked_cls, masked_tokens = masked
            koleo = koleo + koleo_loss(masked_tokens)
            projections = student.clustering_head(masked_tokens)
            expected, diagnostics["matched_fraction"] = self.match(masked_tokens, targets)
            masked_loss = self.cross_entropy(student.clustering_head, projections, expected)
            cls_view_loss = config.masked_weight * self.cls_view_loss(masked_cls, targets)
        if local_cls is not None:
            cls_view_loss = cls_view_loss + config.local_weight * self.cls_view_loss(local_cls, targets)
        clustering = self.cross_entropy(student.clustering_head, clean.projections, clean_expected)
        cls_clustering = self.cross_entropy(student.cls_clustering_head, clean.cls_projections, targets.cls_expected)
        return {
            "koleo_loss": config.koleo_weight * koleo,
            "clustering_loss": config.clustering_weight * clustering,
            "cls_clustering_loss": config.clustering_weight * cls_clustering,
            "masked_loss": config.masked_weight * masked_loss,
            "cls_view_loss": cls_view_loss,
            **diagnostics,
        }

    def project(self, heads: ClusteringHeads, cls: torch.Tensor, tokens: torch.Tensor) -> ProjectedView:
        """CLS (B, d) and sparse tokens (B, r, d) of a view through the heads of the model or its teacher."""
        return ProjectedView(tokens, heads.clustering_head(tokens), heads.cls_clustering_head(cls))

    def targets(self, source: ClusteringHeads, view: ProjectedView) -> Targets:
        """Sinkhorn targets from the heads of `source` (the model or its teacher), as mean prototypes of the model."""
        with torch.no_grad():
            logits = source.clustering_head.logits(view.projections)  # (B, r, K)
            cls_logits = source.cls_clustering_head.logits(view.cls_projections)  # (B, K)
            assignments = self.assign(logits.flatten(0, 1)).view_as(logits)
            cls_assignments = self.assign(cls_logits)
            usage, slot_information = prototype_usage((logits / self.prediction_temperature).softmax(dim=-1))
        return Targets(
            tokens=view.tokens.detach(),
            expected=expected_prototypes(assignments, self.student.clustering_head.prototypes),
            cls_expected=expected_prototypes(cls_assignments, self.student.cls_clustering_head.prototypes),
            from_teacher=source is not self.student,
            prototype_entropy=usage,
            slot_information=slot_information,
        )

    def assign(self, logits: torch.Tensor) -> torch.Tensor:
        """Balanced assignments (rows, K) of rows with these logits over the prototypes, for all processes."""
        config = self.config
        return sinkhorn_knopp(logits, self.target_temperature, config.sinkhorn_iterations, config.sinkhorn_scale)

    def match(self, tokens: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (B * V, r, k) targets of the tokens (B * V, r, d) of V views of each image, matched token by token; and the
        share () of them that are matched one-to-one.
        """
        num_views = len(tokens) // len(targets.tokens)
        index = match_tokens(
            tokens,
            targets.tokens.repeat_interleave(num_views, dim=0),
            self.config.matching_epsilon,
            self.config.matching_iterations,
        )
        expected = targets.expected.repeat_interleave(num_views, dim=0)
        return torch.take_along_dim(expected, index.unsqueeze(-1), dim=1), matched_fraction(index)

    def cls_view_loss(self, cls: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Cross entropy () of the CLS (B * V, d) of V views of each image to the CLS target of the image."""
        head = self.student.cls_clustering_head
        expected = targets.cls_expected.repeat_interleave(len(cls) // len(targets.cls_expected), dim=0)
        return self.cross_entropy(head, head(cls), expected)

    def cross_entropy(self, head: ClusteringHead, projections: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy () of projections (..., k) to targets whose mean prototypes are `expected` (..., k)."""
        return prototype_cross_entropy(projections, expected, head.prototypes, self.prediction_temperature)


def kept_patches(
    config: StellarConfig,
    num_views: int,
    grid_size: tuple[int, int],
    noise: torch.Tensor | None = None,
    num_kept: int | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """
    The patches that each masked view keeps: those of lowest noise.

    Args:
        config: Decides `num_kept` and the noise where they are not given.
        num_views: All masked views, B * V.
        grid_size: Patches (h, w) of a view.
        noise: (B * V, h * w) masking scores; drawn by [`masking_noise`] by default.
        num_kept: Patches to keep, in [1, h * w].
        device: Where to draw.

    Returns:
        (B * V, num_kept) int64 row-major indices.

    Raises:
        ValueError: On noise of another shape, or a number of patches out of range.
    """
    num_patches = math.prod(grid_size)
    if num_kept is None:
        num_kept = num_kept_patches(num_patches, config.mask_ratio)
    elif not isinstance(num_kept, int | torch.SymInt) or not 1 <= num_kept <= num_patches:
        raise ValueError(
            f"num_kept is {num_kept!r}, but must be an integer in [1, {num_patches}], the patches of a global view."
        )
    if noise is None:
        noise = masking_noise(num_views, grid_size, num_kept, config.mask_focus, device=device)
    elif not isinstance(noise, torch.Tensor) or noise.shape != (num_views, num_patches):
        raise ValueError(
            f"noise is {describe(noise)}, but must be (batch * global views, patches) = {(num_views, num_patches)}."
        )
    return noise.argsort(dim=1)[:, :num_kept]


def check_views(name: str, views: torch.Tensor | None, batch_size: int) -> None:
    """`ValueError` unless there are no views, or at least one of each image: (B, V, C, H, W)."""
    if views is None:
        return
    if not isinstance(views, torch.Tensor) or views.ndim != 5 or len(views) != batch_size or views.shape[1] < 1:
        raise ValueError(
            f"{name} are {describe(views)}, but must be (batch, views, channels, height, width) with the batch of "
            f"pixel_values, {batch_size}, and at least one view."
        )


def describe(value: object) -> str:
    """What came instead of the tensor that a forward takes."""
    return (
        f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    )


def _temperature(config: StellarConfig, name: str, given: float | None) -> float:
    if given is None:
        return getattr(config, name)
    if not isinstance(given, int | float | torch.SymFloat) or not 0 < given < math.inf:
        raise ValueError(f"{name} is {given!r}, but must be a positive number.")
    return given
