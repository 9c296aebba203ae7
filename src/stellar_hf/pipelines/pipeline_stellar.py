# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Images from sparse tokens S and a localization matrix L, as a Diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

from ..image_processing_pil_stellar import StellarImageProcessorMixin, StellarImageProcessorPil
from ..image_processing_stellar import StellarImageProcessor
from ..localization_stellar import resolve_grid_size
from ..modeling_stellar import StellarForImageReconstruction
from ..prior.modeling_token_prior import StellarTokenPrior
from .editing import ConceptEditing
from .maskgit_vq_model import MaskGitVQModel

ClassLabel = int | str | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Share of what Z lost that each further step of decoding adds. All of it gives less: the decoder then sees a Z too far
# from any that it was trained on.
_CORRECTION = 0.5

# Read by `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline")`, which knows its own classes only.
_PIPELINE_FILE = "from stellar_hf import StellarPipeline  # noqa: F401\n"


class StellarPipeline(ConceptEditing, DiffusionPipeline):
    """
    Images from a few sparse tokens S (what) and a localization matrix L (where), and S and L from images.

    The *whole* image is encoded: it is stretched to the grid of patches, by default the square one that the model was
    trained with, instead of being cropped, so that images of any shape stand in one batch. Decoding undoes it: the
    image comes back in the size of the input. `grid_size` keeps the shape of elongated images, or gives large ones
    more patches.

    Between both, S and L are plain tensors: `move`, `scale`, `erase`, `swap`, `interpolate` and `transfer` edit them
    ([`ConceptEditing`]), and a prior draws them from noise ([`~StellarPipeline.generate`]).

    `from_pretrained` takes a folder or owner/name on the Hub. `DiffusionPipeline.from_pretrained` finds classes of
    Diffusers only; of a folder it makes this pipeline if it is told to read the `pipeline.py` that `save_pretrained`
    writes (which imports this package): `custom_pipeline="pipeline", trust_remote_code=True`. A pipeline on the Hub
    it takes only after `huggingface_hub.snapshot_download`.

    Args:
        image_processor ([`StellarImageProcessorPil`] or [`StellarImageProcessor`]): The model's. Its resize and crop
            are replaced by the resize to the grid; rescaling and normalization are its own.
        model ([`StellarForImageReconstruction`]): In evaluation mode, as `from_pretrained` gives it.
        vq_model ([`MaskGitVQModel`], *optional*): Decodes the codes of a model with `reconstruction_target="codes"`;
            a model that reconstructs pixels needs none.
        prior ([`StellarTokenPrior`], *optional*): Draws tokens and localization, for
            [`~StellarPipeline.generate`]; of the sizes of the model's.
        scheduler ([`FlowMatchEulerDiscreteScheduler`], *optional*): Of the prior's steps; made where there is a
            prior.

    Raises:
        ValueError: If the prior is for another number or size of tokens than the model.

    Example:

    ```python
    >>> import stellar_hf
    >>> from PIL import Image
    >>> from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline

    >>> pipe = StellarPipeline(
    ...     image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
    ...     model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
    ... )
    >>> image = Image.new("RGB", (640, 427))
    >>> pipe(image=image).images[0].size
    (640, 427)
    >>> tokens, localization = pipe.encode(image)
    >>> pipe(sparse_tokens=tokens, localization=localization).images[0].size
    (32, 32)
    ```
    """

    image_processor: Any
    model: StellarForImageReconstruction
    vq_model: Any
    prior: Any
    scheduler: Any

    model_cpu_offload_seq = "prior->model->vq_model"  # type: ignore[assignment]
    _optional_components = ["vq_model", "prior", "scheduler"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        image_processor: StellarImageProcessorMixin,
        model: StellarForImageReconstruction,
        vq_model: MaskGitVQModel | None = None,
        prior: StellarTokenPrior | None = None,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ):
        super().__init__()
        if prior is not None and scheduler is None:
            scheduler = FlowMatchEulerDiscreteScheduler()
        self.register_modules(
            image_processor=image_processor, model=model, vq_model=vq_model, prior=prior, scheduler=scheduler
        )
        if prior is not None:
            self._check_prior()

    @torch.no_grad()
    def encode(self, image: Any, grid_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """
        Encodes whole images, stretched to the grid of patches.

        Args:
            image: One or a list of PIL images, arrays (H, W, 3) or tensors (3, H, W), of any sizes; or an array
                (B, H, W, 3) or a tensor (B, 3, H, W). Arrays and tensors are uint8, or floating point in [0, 1].
                Gray and transparency are treated as by the image processor; EXIF orientation is not applied.
            grid_size: Patches (h, w) that the images get, `(h * patch_size, w * patch_size)` pixels; by default a
                square of the model's `image_size`.

        Returns:
            S, `(B, r, d)`, and L, `(B, h * w, r)`, whose rows sum to 1; in the model's dtype, on its device.

        Raises:
            ValueError: If an image has another type, shape or range, or the grid has no patch.
        """
        tokens, localization = self._encode(_to_pil_images(image), self._grid_of_images(grid_size))
        self.maybe_free_model_hooks()
        return tokens, localization

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        sparse_tokens: Tensor | None = None,
        localization: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 1,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Reconstructs images, or decodes tokens and where they are.

        Args:
            image: Images to reconstruct, as [`~StellarPipeline.encode`] takes them.
            sparse_tokens: In place of images: S, `(B, r, d)`, any number r of tokens.
            localization: With `sparse_tokens`: L, `(B, N, r)`, non-negative, rows sum to 1, patches row-major.
            grid_size: Patches (h, w). With images, those that they are encoded with; with tokens, h * w = N, by
                default a square.
            height: Height of the resulting images in pixels, with `width`. By default, each image has its input's
                size, and what is made of tokens the size that the decoder gives it.
            width: Width of the resulting images in pixels, with `height`.
            num_inference_steps: Times that is decoded. After each time but the last, the image is encoded again, and
                half of what it lacks of Z = L S is added for the next one. On photo mosaics, small models come closer
                to the image in 2 to 4 steps than in 1, and are sharper (benchmarks/README.md); released ones were not
                measured. Each step costs another encoding and decoding.
            temperature: Of the distribution from which each code is sampled; 0 takes the likeliest one. For models
                with `reconstruction_target="codes"`.
            top_k: Number of likeliest codes among which it is sampled; all by default.
            generator: Of the sampling, on any device; or one for each image, which then does not depend on the batch.
            output_type: `"pil"`; `"np"` for float32 `(B, H, W, 3)` in [0, 1]; `"pt"` for a float32 tensor
                `(B, 3, H, W)` in [0, 1], on the model's device; or `"latent"` for what comes out of the decoder,
                whatever the size asked for: int64 codes `(B, N)`, or RGB `(B, 3, h * patch_size, w * patch_size)`,
                in [0, 1] up to regression error. Of images of different sizes, `"np"` and `"pt"` make a list.
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.

        Returns:
            `ImagePipelineOutput` with `images`; or a tuple of them alone.

        Raises:
            ValueError: If there are neither or both images and tokens, shapes do not fit, an argument is impossible,
                or codes are to become images without a `vq_model`.
        """
        self._check(output_type, height, width, temperature, top_k, num_inference_steps)
        sizes: Sequence[tuple[int, int]] | None = None
        if image is not None and sparse_tokens is None and localization is None:
            images = _to_pil_images(image)
            sizes = [(image.height, image.width) for image in images]
            grid_size = self._grid_of_images(grid_size)
            sparse_tokens, localization = self._encode(images, grid_size)
        elif image is None and sparse_tokens is not None and localization is not None:
            grid_size = resolve_grid_size(localization.shape[1], grid_size)
        else:
            raise ValueError("Pass either image, or sparse_tokens and localization, to say what is to be decoded.")
        if height is not None and width is not None:
            sizes = [(height, width)] * len(sparse_tokens)

        sampling = {"temperature": temperature, "top_k": top_k, "generator": generator}
        latents = self._decode(sparse_tokens, localization, grid_size, sampling)
        if num_inference_steps > 1:
            latents = self._refine(latents, sparse_tokens, localization, grid_size, num_inference_steps, sampling)
        result: Any = latents if output_type == "latent" else self._images(latents, grid_size, sizes, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    @torch.no_grad()
    def generate(
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
            class_labels: As [`~StellarPipeline.sample_tokens`] takes them.
            num_inference_steps: Steps from noise to tokens.
            guidance_scale: Strength of classifier-free guidance; 1 for none.
            generator: Of the noise, and of sampled codes; or one for each image.
            height: As in the call of the pipeline, which decodes, with the arguments that follow up to `return_dict`.
            width: Likewise.
            temperature: Likewise.
            top_k: Likewise.
            output_type: Likewise.
            return_dict: Likewise.
            callback_on_step_end: Called after each step, as by [`~StellarPipeline.sample_tokens`].
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets.

        Returns:
            `ImagePipelineOutput` with `images`, one for each label; or a tuple of them alone.

        Raises:
            ValueError: If there is no prior, a label is unknown, or an argument is impossible.
        """
        self._check(output_type, height, width, temperature, top_k)
        tokens, localization = self.sample_tokens(
            class_labels,
            num_inference_steps,
            guidance_scale,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return self(
            sparse_tokens=tokens,
            localization=localization,
            grid_size=self.prior.config.grid_size,
            height=height,
            width=width,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
        )

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
        Draws tokens and localization from the prior.

        Args:
            class_labels: What to draw, one for each image: a class's number, its name where the prior knows names, or
                None for any class. A single one makes a batch of one.
            num_inference_steps: Steps from noise to tokens, each one call of the prior.
            guidance_scale: Strength of classifier-free guidance (Ho & Salimans, arXiv 2207.12598): 1 follows the
                prior as it was trained; more makes the class clearer and the images less diverse, for twice the work.
            generator: Of the noise, on any device; or one for each image.
            callback_on_step_end: Called after each step as `callback(pipe, step, timestep, tensors)`; may return
                tensors that go on in their place. `pipe._guidance_scale` and `pipe._interrupt` may be set in it.
            callback_on_step_end_tensor_inputs: Names of its tensors: `"latents"`, (B, latent_size), which
                `pipe.prior.unpack` makes S and L of.

        Returns:
            S, `(B, r, d)`, and L, `(B, h * w, r)`, whose rows sum to 1, over the prior's `grid_size`; in the model's
            dtype, on its device.

        Raises:
            ValueError: If there is no prior, a label is unknown, or an argument is impossible.
        """
        if self.prior is None:
            raise ValueError("This pipeline has no prior to draw from: train one with examples/train_prior.py.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, but must be at least 1.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}, but there are only "
                f"{self._callback_tensor_inputs}."
            )
        labels = self._class_labels(class_labels)
        generators: Any = generator if isinstance(generator, torch.Generator) or generator is None else list(generator)
        _check_generators(generators, len(labels))
        is_any_class = bool((labels == self.prior.config.num_classes).all())
        self._guidance_scale, self._interrupt = 1.0 if is_any_class else guidance_scale, False
        device = self._execution_device
        labels = labels.to(device)
        latents = randn_tensor((len(labels), self.prior.latent_size), generator=generators, device=device)
        # The scheduler's own last step would go from 0.001 to 0, and change nothing.
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        self._num_timesteps = num_inference_steps
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
        tokens, localization = _call(self.prior, "unpack", latents)
        self.maybe_free_model_hooks()
        return tokens.to(device, self.model.dtype), localization.to(device, self.model.dtype)

    @property
    def guidance_scale(self) -> float:
        """Of the last or running generation."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the last or running generation."""
        return self._num_timesteps

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`, and the `pipeline.py` by which `DiffusionPipeline` finds this class."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, "pipeline.py").write_text(_PIPELINE_FILE)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """
        Downloads a pipeline from the Hub to the cache; `from_pretrained` calls it.

        Args:
            pretrained_model_name: Repository, as owner/name.
            **kwargs: `cache_dir`, `force_download`, `local_files_only`, `token` and `revision`; others do not matter
                here.

        Returns:
            The folder.
        """
        # Not the base class's, which refuses components whose classes are neither in Diffusers nor on the Hub.
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return snapshot_download(pretrained_model_name, ignore_patterns=["*.bin", "*.pt", "*.ckpt"], **arguments)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """What to load, by a saved configuration: without torchvision, its image processor is replaced by PIL's."""
        module, name = StellarImageProcessor.__module__, StellarImageProcessor.__name__
        if list(config_dict["image_processor"]) == [module, name] and not is_torchvision_available():
            pil = [StellarImageProcessorPil.__module__, StellarImageProcessorPil.__name__]
            config_dict = {**config_dict, "image_processor": pil}
        return super().extract_init_dict(config_dict, **kwargs)

    def _check(
        self,
        output_type: str,
        height: int | None,
        width: int | None,
        temperature: float,
        top_k: int | None,
        num_inference_steps: int = 1,
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}.")
        if (height is None) != (width is None) or (
            height is not None and width is not None and min(height, width) < 1
        ):
            raise ValueError(
                f"height is {height} and width {width}: pass two positive numbers of pixels, or neither of them."
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, but images are decoded once at least.")
        if self.model.config.reconstruction_target == "pixels":
            if temperature != 0 or top_k is not None:
                raise ValueError(
                    f"temperature is {temperature} and top_k {top_k}, but this model reconstructs pixels, of which "
                    "nothing is sampled: leave both out."
                )
            return
        _check_sampling(temperature, top_k, self.model.config.codebook_size)
        if self.vq_model is None and (output_type != "latent" or num_inference_steps > 1):
            raise ValueError(
                "This model reconstructs codes, which only a vq_model turns into an image: pass one to the pipeline, "
                'or take the codes themselves with output_type="latent" and num_inference_steps=1.'
            )

    def _check_prior(self) -> None:
        prior, model = self.prior.config, self.model.config
        if (prior.num_sparse_tokens, prior.token_size) != (model.num_sparse_tokens, model.hidden_size):
            raise ValueError(
                f"The prior draws {prior.num_sparse_tokens} tokens of {prior.token_size} numbers, but the model has "
                f"{model.num_sparse_tokens} of {model.hidden_size}: take the prior that was trained on this model."
            )

    def _class_labels(self, class_labels: ClassLabel | Sequence[ClassLabel]) -> Tensor:
        """(B,) int64, where the number of classes stands for any class."""
        num_classes, names = self.prior.config.num_classes, self.prior.config.class_names or []
        if isinstance(class_labels, (Tensor, np.ndarray, np.generic)):
            class_labels = class_labels.tolist()
        if class_labels is None or isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("class_labels is empty: pass one for each image.")
        numbers = {None: num_classes, **{name: number for number, name in enumerate(names)}}
        numbers.update({number: number for number in range(num_classes)})
        for label in class_labels:
            if label not in numbers:
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

    def _grid_of_images(self, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        if grid_size is None:
            side = self.model.config.image_size // self.model.config.patch_size
            return side, side
        if len(grid_size) != 2 or min(grid_size) < 1:
            raise ValueError(f"grid_size is {tuple(grid_size)}, but must be the patches (rows, columns), 1 at least.")
        return grid_size[0], grid_size[1]

    def _encode(self, images: list[Image.Image], grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        height, width = (cells * self.model.config.patch_size for cells in grid_size)
        size = {"height": height, "width": width}
        inputs = self.image_processor(
            images, do_resize=True, size=size, do_center_crop=False, do_convert_rgb=True, return_tensors="pt"
        )
        outputs = _call(self.model, "stellar", inputs["pixel_values"].to(self._execution_device))
        return outputs.sparse_tokens, outputs.localization

    def _decode(
        self,
        sparse_tokens: Tensor,
        localization: Tensor,
        grid_size: tuple[int, int],
        sampling: dict[str, Any],
    ) -> Tensor:
        device, dtype = self._execution_device, self.model.dtype
        latents = _call(
            self.model, "decode", sparse_tokens.to(device, dtype), localization.to(device, dtype), grid_size
        )
        return sample_codes(latents, **sampling) if self.model.config.reconstruction_target == "codes" else latents

    def _refine(
        self,
        latents: Tensor,
        sparse_tokens: Tensor,
        localization: Tensor,
        grid_size: tuple[int, int],
        num_inference_steps: int,
        sampling: dict[str, Any],
    ) -> Tensor:
        """Decodes again from Z and what the images so far lack of it: tokens and maps of them all, side by side."""
        device, dtype = self._execution_device, self.model.dtype
        tokens, maps = [sparse_tokens.to(device, dtype)], [localization.to(device, dtype)]
        for _ in self.progress_bar(range(num_inference_steps - 1)):
            again = _call(self.model, "stellar", self._pixel_values(latents, grid_size))
            tokens.append(again.sparse_tokens)
            maps[0] = maps[0] + _CORRECTION * localization.to(device, dtype)
            maps.append(-_CORRECTION * again.localization)
            latents = self._decode(torch.cat(tokens, dim=1), torch.cat(maps, dim=2), grid_size, sampling)
        return latents

    def _pixel_values(self, latents: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Decoded images as the encoder takes them."""
        config = self.model.config
        size = (grid_size[0] * config.patch_size, grid_size[1] * config.patch_size)
        pixels = torch.stack([_resize(image, size) for image in self._pixels(latents, grid_size)])
        processor = self.image_processor
        mean, std = (
            pixels.new_tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        return (pixels - mean) / std

    def _pixels(self, latents: Tensor, grid_size: tuple[int, int]) -> Tensor:
        if self.model.config.reconstruction_target == "codes":
            latents = _call(self.vq_model, "decode", codes=latents, grid_size=grid_size).sample
        return latents.float().clamp(0, 1)

    def _images(
        self,
        latents: Tensor,
        grid_size: tuple[int, int],
        sizes: Sequence[tuple[int, int]] | None,
        output_type: str,
    ) -> Any:
        images = list(self._pixels(latents, grid_size))
        if sizes is not None:
            images = [_resize(image, size) for image, size in zip(images, sizes, strict=True)]
        if output_type == "pil":
            return [VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None]))[0] for image in images]
        batch = torch.stack(images) if len({image.shape for image in images}) == 1 else images
        if output_type == "pt":
            return batch
        arrays = [image.permute(1, 2, 0).cpu().numpy() for image in batch]
        return np.stack(arrays) if isinstance(batch, Tensor) else arrays


def sample_codes(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """
    Chooses a code for each patch.

    Args:
        logits: (B, N, codes) floating point.
        temperature: Divides the logits of the distribution that is sampled; 0 takes the largest.
        top_k: Number of largest logits among which codes are sampled; all by default.
        generator: Source of the samples, on any device; or B, one for each image.

    Returns:
        int64 codes (B, N).

    Raises:
        ValueError: If the temperature is negative, `top_k` is not in [1, codes] or given without a temperature, or
            there is another number of generators than of images.
    """
    num_codes = logits.shape[-1]
    _check_sampling(temperature, top_k, num_codes)
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, codes = logits.float().topk(top_k or num_codes, dim=-1)
    # The largest of logits with Gumbel noise is a sample of their softmax.
    noise = -(-_uniform(values.shape, generator, logits.device).log()).log()
    choice = (values / temperature + noise).argmax(dim=-1, keepdim=True)
    return codes.gather(-1, choice).squeeze(-1)


def _check_generators(generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int) -> None:
    if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != num_images:
        raise ValueError(
            f"There are {len(generator)} generators for {num_images} images: pass one for each, or one for all."
        )


def _check_sampling(temperature: float, top_k: int | None, num_codes: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, but must be 0, for the likeliest codes, or positive.")
    if top_k is not None and (temperature == 0 or not 1 <= top_k <= num_codes):
        raise ValueError(
            f"top_k is {top_k} and temperature {temperature}, but top_k must be in [1, {num_codes}], the number of "
            "codes, and needs a positive temperature, since nothing is sampled without."
        )


def _uniform(
    shape: torch.Size, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> Tensor:
    """Uniform samples that depend on the generators alone, not on the device where they are used."""
    if generator is None:
        return torch.rand(shape, device=device)
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device).to(device)
    _check_generators(generator, shape[0])
    return torch.cat([_uniform(torch.Size((1, *shape[1:])), single, device) for single in generator])


@apply_forward_hook
def _call(component: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls something else than `forward`, of a component that offloading brings to its device only for that."""
    return getattr(component, method)(*args, **kwargs)


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """(C, h, w) in [0, 1] to (C, *size), antialiased; the very same where the size is the same."""
    if image.shape[-2:] == tuple(size):
        return image
    resized = F.interpolate(image[None], size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)


def _to_pil_images(image: Any) -> list[Image.Image]:
    if isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4:
        image = list(image)
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise ValueError("There is no image in the list, but at least one is needed.")
    return [_to_pil_image(image) for image in images]


def _to_pil_image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(f"An image is a {type(image).__name__}, but a PIL image, an array or a tensor is expected.")
    shape = tuple(image.shape)
    array = image.detach().float().cpu().numpy() if isinstance(image, Tensor) and image.is_floating_point() else image
    array = np.asarray(array)
    if isinstance(image, Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"An image has shape {shape}, but arrays must be (height, width, channels) and tensors (channels, height, "
            "width), with 1, 3 or 4 channels."
        )
    if np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        array = np.uint8(array * 255 + 0.5)
    if array.dtype != np.uint8:
        raise ValueError(
            f"An image holds {array.dtype} from {array.min():.3g} to {array.max():.3g}, but uint8, or floating point "
            "in [0, 1], is expected: convert it, and leave the normalization to the pipeline."
        )
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


__all__ = ["StellarPipeline", "sample_codes"]
