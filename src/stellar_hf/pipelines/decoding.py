# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""From tokens and localization to images: what the pipelines have in common."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.accelerate_utils import apply_forward_hook
from huggingface_hub import CommitInfo, snapshot_download
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

from ..hub_stellar import push_folder
from ..image_processing_pil_stellar import StellarImageProcessorPil
from ..image_processing_stellar import StellarImageProcessor
from ..modeling_stellar import StellarForImageReconstruction

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Read by `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline")`, which knows its own classes only.
_PIPELINE_FILE = "from stellar_hf import {name}  # noqa: F401\n"


class StellarDecodingPipeline(DiffusionPipeline):
    """
    A pipeline that decodes sparse tokens S and localization L, by its components `model` and `vq_model`. Subclasses
    have the components and the call.
    """

    model: StellarForImageReconstruction
    vq_model: Any

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json`, and the `pipeline.py` by which `DiffusionPipeline` finds this class."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, "pipeline.py").write_text(_PIPELINE_FILE.format(name=type(self).__name__))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs,
    ) -> None:
        """
        As in `DiffusionPipeline`. With `push_to_hub=True` the folder is pushed as by `push_to_hub`, whose arguments
        are taken, too; `repo_id` is the folder's name by default.
        """
        super().save_pretrained(
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            use_flashpack=use_flashpack,
        )
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).absolute().name)
            push_folder(save_directory, self.model, repo_id, pipeline=type(self).__name__, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> CommitInfo:
        """
        As in `DiffusionPipeline`, with a model card of what is known; one that a person wrote stays as it is. In a
        `subfolder` there is no card.
        """
        arguments: dict[str, Any] = {
            "commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr,
        }  # fmt: skip
        saving: dict[str, Any] = {"safe_serialization": safe_serialization, "variant": variant}
        if subfolder:
            # Diffusers says str, and returns what the Hub's client does.
            return super().push_to_hub(repo_id, subfolder=subfolder, **arguments, **saving)  # type: ignore[return-value]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)
            return push_folder(folder, self.model, repo_id, pipeline=type(self).__name__, **arguments)

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
        """
        What to load, by a saved configuration. Components that this pipeline does not have are left out: one folder
        serves several pipelines. Without torchvision, its image processor is replaced by PIL's.
        """
        components, _ = cls._get_signature_keys(cls)
        config_dict = {
            name: value
            for name, value in config_dict.items()
            if name in components or not isinstance(value, (list, tuple))
        }
        module, name = StellarImageProcessor.__module__, StellarImageProcessor.__name__
        if list(config_dict.get("image_processor", [])) == [module, name] and not is_torchvision_available():
            config_dict["image_processor"] = [StellarImageProcessorPil.__module__, StellarImageProcessorPil.__name__]
        return super().extract_init_dict(config_dict, **kwargs)

    def _check_output(
        self, output_type: str, height: int | None, width: int | None, temperature: float, top_k: int | None
    ) -> None:
        """Refuses arguments of a call that no images can be made with."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}.")
        if (height, width) != (None, None) and not (is_positive(height) and is_positive(width)):
            raise ValueError(
                f"height is {height!r} and width {width!r}: pass two positive numbers of pixels, or neither of them."
            )
        if self.model.config.reconstruction_target == "pixels":
            if temperature != 0 or top_k is not None:
                raise ValueError(
                    f"temperature is {temperature} and top_k {top_k}, but this model reconstructs pixels, of which "
                    "nothing is sampled: leave both out."
                )
            return
        _check_sampling(temperature, top_k, self.model.config.codebook_size)
        if self.vq_model is None and output_type != "latent":
            raise ValueError(
                "This model reconstructs codes, which only a vq_model turns into an image: pass one to the pipeline, "
                'or take the codes themselves with output_type="latent".'
            )

    def _decode(
        self,
        sparse_tokens: Tensor,
        localization: Tensor,
        grid_size: tuple[int, int],
        sampling: dict[str, Any],
    ) -> Tensor:
        device, dtype = self._execution_device, self.model.dtype
        latents = call_component(
            self.model, "decode", sparse_tokens.to(device, dtype), localization.to(device, dtype), grid_size
        )
        return sample_codes(latents, **sampling) if self.model.config.reconstruction_target == "codes" else latents

    def _pixels(self, latents: Tensor, grid_size: tuple[int, int]) -> Tensor:
        if self.model.config.reconstruction_target == "codes":
            latents = call_component(self.vq_model, "decode", codes=latents, grid_size=grid_size).sample
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
            images = [resize(image, size) for image, size in zip(images, sizes, strict=True)]
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


def check_generators(generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int) -> None:
    """
    Raises:
        ValueError: If it is anything else than None, a `torch.Generator`, or a sequence of one for each image.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            f"generator is {generator!r}, but must be a torch.Generator, or a list of one for each image: "
            "torch.Generator().manual_seed(0)."
        )
    if len(generator) != num_images:
        raise ValueError(
            f"There are {len(generator)} generators for {num_images} images: pass one for each, or one for all."
        )


def is_positive(number: Any) -> bool:
    """Whether a size or count is an integer of at least 1."""
    return isinstance(number, (int, np.integer)) and bool(number >= 1)


def _check_sampling(temperature: float, top_k: int | None, num_codes: int) -> None:
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}, but must be 0, for the likeliest codes, or positive.")
    if top_k is not None and (temperature == 0 or not is_positive(top_k) or top_k > num_codes):
        raise ValueError(
            f"top_k is {top_k!r} and temperature {temperature}, but top_k must be in [1, {num_codes}], the number of "
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
    check_generators(generator, shape[0])
    return torch.cat([_uniform(torch.Size((1, *shape[1:])), single, device) for single in generator])


@apply_forward_hook
def call_component(component: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls something else than `forward`, of a component that offloading brings to its device only for that."""
    return getattr(component, method)(*args, **kwargs)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """(C, h, w) in [0, 1] to (C, *size), antialiased; the very same where the size is the same."""
    if image.shape[-2:] == tuple(size):
        return image
    resized = F.interpolate(image[None], size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)


__all__ = ["StellarDecodingPipeline", "call_component", "check_generators", "is_positive", "resize", "sample_codes"]
