# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Images from sparse tokens S and a localization matrix L, as a Diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ..checkpoint_stellar import HUB_ARGUMENTS
from ..image_processing_pil_stellar import StellarImageProcessorMixin, image_processor_of
from ..localization_stellar import resolve_grid_size
from ..modeling_stellar import StellarForImageReconstruction
from . import editing
from .decoding import StellarDecodingPipeline, call_component, is_positive, resize
from .maskgit_vq_model import MaskGitVQModel

# Share of what Z lost that each further step of decoding adds. All of it gives less: the decoder then sees a Z too far
# from any that it was trained on.
_CORRECTION = 0.5


class StellarPipeline(StellarDecodingPipeline):
    """
    Images from a few sparse tokens S (what) and a localization matrix L (where), and S and L from images.

    The *whole* image is encoded: it is stretched to the grid of patches, by default the square one that the model was
    trained with, instead of being cropped, so that images of any shape stand in one batch. Decoding undoes it: the
    image comes back in the size of the input. `grid_size` keeps the shape of elongated images, or gives large ones
    more patches.

    Between both, S and L are plain tensors: `move`, `scale`, `erase`, `exchange`, `swap`, `interpolate` and `transfer`
    edit them ([`stellar_hf.pipelines.editing`]), and [`StellarTokenPriorPipeline`] draws them from noise.

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

    model_cpu_offload_seq = "model->vq_model"  # type: ignore[assignment]
    _optional_components = ["vq_model"]

    select = staticmethod(editing.select)
    erase = staticmethod(editing.erase)
    move = staticmethod(editing.move)
    scale = staticmethod(editing.scale)
    exchange = staticmethod(editing.exchange)
    swap = staticmethod(editing.swap)
    interpolate = staticmethod(editing.interpolate)
    transfer = staticmethod(editing.transfer)

    def __init__(
        self,
        image_processor: StellarImageProcessorMixin,
        model: StellarForImageReconstruction,
        vq_model: MaskGitVQModel | None = None,
    ):
        super().__init__()
        self.register_modules(image_processor=image_processor, model=model, vq_model=vq_model)

    @classmethod
    def from_released(cls, name: str, **kwargs: Any) -> StellarPipeline:
        """
        The pipeline of a model that the authors released, with the tokenizer of its codes.

        Args:
            name: As in `StellarForImageReconstruction.from_released`: `"stellar-b16"` and others.
            **kwargs: As there. `cache_dir`, `force_download`, `local_files_only` and `token` hold for the tokenizer,
                too, which comes from `fun-research/TiTok` ([`MaskGitVQModel.from_released`]).

        Returns:
            The pipeline, with both models in evaluation mode and in one dtype.

        Raises:
            ValueError: If there is no such model, a file is damaged or another one, or a field contradicts it.
            OSError: If a file is not in the cache and cannot be downloaded.
        """
        model = StellarForImageReconstruction.from_released(name, **kwargs)
        vq_model = None
        if model.config.reconstruction_target == "codes":
            hub_arguments = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
            vq_model = MaskGitVQModel.from_released(**hub_arguments).to(model.device, model.dtype)
        return cls(image_processor=image_processor_of(model.config), model=model, vq_model=vq_model)

    @torch.no_grad()
    def encode(self, image: Any, grid_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """
        Encodes whole images, stretched to the grid of patches.

        Args:
            image: One or a list of PIL images, arrays (H, W, 3) or tensors (3, H, W), of any sizes; or an array
                (B, H, W, 3) or a tensor (B, 3, H, W). Arrays and tensors are uint8, or floating point in [0, 1].
                Gray of 16 bits, and transparency, which is composited on the image processor's `background`, are
                treated as by the image processor; EXIF orientation is not applied.
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
                half of what it lacks of Z = L S is added for the next one. On photo mosaics, small models came closer
                to the image in 2 to 4 steps than in 1, and sharper (benchmarks/README.md); released ones were not
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
        self._check_output(output_type, height, width, temperature, top_k)
        self._check_steps(num_inference_steps)
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

    def _check_steps(self, num_inference_steps: int) -> None:
        if not is_positive(num_inference_steps):
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}, but images are decoded once at least.")
        if num_inference_steps > 1 and self.model.config.reconstruction_target == "codes" and self.vq_model is None:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but only a vq_model turns codes into an image that is "
                "encoded again: pass one to the pipeline, or take num_inference_steps=1."
            )

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
        outputs = call_component(self.model, "stellar", inputs["pixel_values"].to(self._execution_device))
        return outputs.sparse_tokens, outputs.localization

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
            again = call_component(self.model, "stellar", self._pixel_values(latents, grid_size))
            tokens.append(again.sparse_tokens)
            maps[0] = maps[0] + _CORRECTION * localization.to(device, dtype)
            maps.append(-_CORRECTION * again.localization)
            latents = self._decode(torch.cat(tokens, dim=1), torch.cat(maps, dim=2), grid_size, sampling)
        return latents

    def _pixel_values(self, latents: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Decoded images as the encoder takes them."""
        config = self.model.config
        size = (grid_size[0] * config.patch_size, grid_size[1] * config.patch_size)
        pixels = torch.stack([resize(image, size) for image in self._pixels(latents, grid_size)])
        processor = self.image_processor
        mean, std = (
            pixels.new_tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        return (pixels - mean) / std


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
    array: np.ndarray = image if isinstance(image, np.ndarray) else _to_array(image)
    if isinstance(image, Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"An image has shape {shape}, but arrays must be (height, width, channels) and tensors (channels, height, "
            "width), with 1, 3 or 4 channels."
        )
    if np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        array = (array * 255 + 0.5).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(
            f"An image holds {array.dtype} from {array.min():.3g} to {array.max():.3g}, but uint8, or floating point "
            "in [0, 1], is expected: convert it, and leave the normalization to the pipeline."
        )
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _to_array(image: Tensor) -> np.ndarray:
    """In float32 where the tensor is floating point: NumPy has no bfloat16."""
    image = image.detach().cpu()
    return (image.float() if image.is_floating_point() else image).numpy()


__all__ = ["StellarPipeline"]
