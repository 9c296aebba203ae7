# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Images drawn from noise: tokens and localization from a prior, and their decoding, as a Diffusers pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..image_processing_pil_stellar import StellarImageProcessorMixin
from ..modeling_stellar import StellarForImageReconstruction
from ..pipelines.decoding import StellarDecodingPipeline, call_component, check_generators, is_positive
from ..pipelines.maskgit_vq_model import MaskGitVQModel
from .modeling_token_prior import StellarTokenPrior

ClassLabel = int | str | None

# Where the prior was when pipelines were saved that name it so.
_FORMER_PRIOR = ["stellar_hf.pipelines.token_prior", "StellarTokenPrior"]


class StellarTokenPriorPipeline(StellarDecodingPipeline):
    """
    Draws images: a prior makes tokens S and localization L of noise, and a STELLAR model decodes them.

    A prior that was trained for the model of a [`StellarPipeline`] joins it by
    `StellarTokenPriorPipeline.from_pipe(pipe, prior=prior)`. The way back, `StellarPipeline.from_pipe(pipe)`, or
    `StellarPipeline.from_pretrained` of the same folder, is for drawn tokens that are edited before they are decoded.

    Args:
        prior ([`StellarTokenPrior`]): Draws tokens and localization; of the sizes of the model's.
        model ([`StellarForImageReconstruction`]): Decodes them.
        vq_model ([`MaskGitVQModel`], *optional*): Decodes the codes of a model with `reconstruction_target="codes"`;
            a model that reconstructs pixels needs none.
        scheduler ([`FlowMatchEulerDiscreteScheduler`], *optional*): Of the prior's steps; made if there is none.
        image_processor ([`StellarImageProcessorPil`] or [`StellarImageProcessor`], *optional*): Not used to draw, but
            kept for the [`StellarPipeline`] that is made of this one.

    Raises:
        ValueError: If the prior is for another number or size of tokens than the model.

    Example:

    ```python
    >>> import stellar_hf
    >>> from stellar_hf import StellarForImageReconstruction, StellarTokenPrior, StellarTokenPriorPipeline

    >>> prior = StellarTokenPrior(num_sparse_tokens=6, token_size=128, grid_size=(16, 16), num_classes=2)
    >>> model = StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL)
    >>> pipe = StellarTokenPriorPipeline(prior, model)
    >>> len(pipe([0, 1, None], num_inference_steps=2).images)
    3
    ```
    """

    prior: StellarTokenPrior
    scheduler: Any
    image_processor: Any

    model_cpu_offload_seq = "prior->model->vq_model"  # type: ignore[assignment]
    _optional_components = ["vq_model", "scheduler", "image_processor"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        prior: StellarTokenPrior,
        model: StellarForImageReconstruction,
        vq_model: MaskGitVQModel | None = None,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        image_processor: StellarImageProcessorMixin | None = None,
    ):
        super().__init__()
        self.register_modules(
            prior=prior,
            model=model,
            vq_model=vq_model,
            scheduler=FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler,
            image_processor=image_processor,
        )
        self._check_prior()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draws images: tokens and localization from the prior, and their decoding.

        Args:
            class_labels: What to draw, one for each image: a class's number, its name where the prior knows names, or
                None for any class. A single one makes a batch of one.
            num_inference_steps: Steps from noise to tokens, each one call of the prior.
            guidance_scale: Strength of classifier-free guidance (Ho & Salimans, arXiv 2207.12598): 1 follows the
                prior as it was trained; more makes the class clearer and the images less diverse, for twice the work.
            generator: Of the noise, and of sampled codes, on any device; or one for each image, which then does not
                depend on the batch.
            height: Height of the images in pixels, with `width`; by default what the decoder gives.
            width: Width of the images in pixels, with `height`.
            temperature: Of the distribution from which each code is sampled; 0 takes the likeliest one. For models
                with `reconstruction_target="codes"`.
            top_k: Number of likeliest codes among which it is sampled; all by default.
            output_type: `"pil"`; `"np"` for float32 `(B, H, W, 3)` in [0, 1]; `"pt"` for a float32 tensor
                `(B, 3, H, W)` in [0, 1], on the model's device; or `"latent"` for what comes out of the decoder,
                whatever the size asked for: int64 codes `(B, N)`, or RGB `(B, 3, h * patch_size, w * patch_size)`.
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: Called after each step as `callback(pipe, step, timestep, tensors)`; may return
                tensors that go on in their place. `pipe._guidance_scale` and `pipe._interrupt` may be set in it.
            callback_on_step_end_tensor_inputs: Names of its tensors: `"latents"`, (B, latent_size), which
                `pipe.prior.unpack` makes S and L of.

        Returns:
            `ImagePipelineOutput` with `images`, one for each label; or a tuple of them alone.

        Raises:
            ValueError: If a label is unknown, an argument is impossible, or codes are to become images without a
                `vq_model`.
        """
        self._check_output(output_type, height, width, temperature, top_k)
        tokens, localization = self.sample_tokens(
            class_labels,
            num_inference_steps,
            guidance_scale,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        sampling = {"temperature": temperature, "top_k": top_k, "generator": generator}
        grid_size = tuple(self.prior.config.grid_size)
        latents = self._decode(tokens, localization, grid_size, sampling)
        sizes = None if height is None or width is None else [(height, width)] * len(tokens)
        result: Any = latents if output_type == "latent" else self._images(latents, grid_size, sizes, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    @torch.no_grad()
    def sample_tokens(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> tuple[Tensor, Tensor]:
        """
        Draws tokens and localization, and does not decode them. The arguments are those of the call.

        Returns:
            S, `(B, r, d)`, and L, `(B, h * w, r)`, whose rows sum to 1, over the prior's `grid_size`; in the model's
            dtype, on its device.

        Raises:
            ValueError: If a label is unknown, or an argument is impossible.
        """
        self._check_steps(num_inference_steps, guidance_scale, callback_on_step_end_tensor_inputs)
        labels = self._class_labels(class_labels)
        check_generators(generator, len(labels))
        generators: Any = list(generator) if isinstance(generator, (list, tuple)) else generator
        is_any_class = bool((labels == self.prior.config.num_classes).all())
        self._guidance_scale, self._interrupt = 1.0 if is_any_class else guidance_scale, False
        self._num_timesteps = num_inference_steps
        device = self._execution_device
        labels = labels.to(device)
        latents = randn_tensor((len(labels), self.prior.latent_size), generator=generators, device=device)
        # The scheduler's own last step would go from 0.001 to 0, and change nothing.
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    break
                velocity = self._velocity(latents, timestep, labels)
                latents = self.scheduler.step(velocity, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step, timestep, tensors) or {}
                    latents = changed.get("latents", latents)
                progress.update()
        tokens, localization = call_component(self.prior, "unpack", latents)
        self.maybe_free_model_hooks()
        return tokens.to(device, self.model.dtype), localization.to(device, self.model.dtype)

    @property
    def guidance_scale(self) -> float:
        """Of the last or running call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the last or running call."""
        return self._num_timesteps

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """What to load, by a saved configuration, which may name the module where the prior was formerly."""
        if list(config_dict.get("prior", [])) == _FORMER_PRIOR:
            config_dict = {**config_dict, "prior": [StellarTokenPrior.__module__, StellarTokenPrior.__name__]}
        return super().extract_init_dict(config_dict, **kwargs)

    def _check_prior(self) -> None:
        prior, model = self.prior.config, self.model.config
        if (prior.num_sparse_tokens, prior.token_size) != (model.num_sparse_tokens, model.hidden_size):
            raise ValueError(
                f"The prior draws {prior.num_sparse_tokens} tokens of {prior.token_size} numbers, but the model has "
                f"{model.num_sparse_tokens} of {model.hidden_size}: take the prior that was trained on this model."
            )

    def _check_steps(
        self, num_inference_steps: int, guidance_scale: float, callback_tensor_inputs: Sequence[str]
    ) -> None:
        if not is_positive(num_inference_steps):
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}, but must be at least 1.")
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale!r}, but must be a finite number; 1 for no guidance.")
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}, but there are only "
                f"{self._callback_tensor_inputs}."
            )

    def _class_labels(self, class_labels: ClassLabel | Sequence[ClassLabel]) -> Tensor:
        """(B,) int64, where the number of classes stands for any class."""
        num_classes, names = self.prior.config.num_classes, self.prior.config.class_names or []
        if isinstance(class_labels, (Tensor, np.ndarray, np.generic)):
            class_labels = class_labels.tolist()
        if class_labels is None or isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if not isinstance(class_labels, Sequence) or not class_labels:
            raise ValueError(f"class_labels is {class_labels!r}, but must be a class, or one for each image.")
        numbers = {None: num_classes, **{name: number for number, name in enumerate(names)}}
        numbers.update({number: number for number in range(num_classes)})
        for label in class_labels:
            if not isinstance(label, (int, str, Real, type(None))) or label not in numbers:
                known = f"a number below {num_classes}, " + (f"one of {', '.join(names)}, " if names else "")
                raise ValueError(f"There is no class {label!r}: pass {known}or None for any class.")
        return torch.tensor([numbers[label] for label in class_labels])

    def _velocity(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Of all latents, (B, latent_size) float32, guided by their classes."""
        sample = latents.to(self.prior.dtype)
        if self._guidance_scale == 1:
            return self.prior(sample, timestep, labels).sample.float()
        any_class = torch.full_like(labels, self.prior.config.num_classes)
        both = self.prior(sample.repeat(2, 1), timestep, torch.cat([labels, any_class])).sample.float()
        guided, free = both.chunk(2)
        return free + self._guidance_scale * (guided - free)


__all__ = ["StellarTokenPriorPipeline"]
