# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Metrics of reconstruction, and the probe that reconstructs from frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..configuration_stellar import StellarConfig
from ..features import ImageFeatures, encode_images
from ..features.checks import check_integer, check_tensors
from ..features.encoding import encode_batches
from ..features.fingerprints import weights_sha256
from ..modeling_stellar import StellarForImageReconstruction
from .segmentation import low_rank_features, patch_features

if TYPE_CHECKING:
    from accelerate import Accelerator

_SSIM_WINDOW = 11


# One image ----------------------------------------------------------------------------------------------------------


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, for a peak of 1.

    Args:
        reconstruction: (B, C, H, W) floating point, clamped to [0, 1] here.
        target: (B, C, H, W) floating point in [0, 1].

    Returns:
        (B,) float32 in dB; infinite where an image is reproduced exactly.

    Raises:
        ValueError: If the shapes differ, are not four-dimensional or empty, or the target is not in [0, 1].
    """
    _check_images(reconstruction, target)
    error = reconstruction.float().clamp(0, 1) - target.float()
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, by torchmetrics: a Gaussian window of 11 pixels (sigma 1.5), mean over
    channels and windows (Wang et al., "Image Quality Assessment", IEEE TIP 2004). Windows at the border see the image
    reflected; scikit-image leaves them out.

    Args:
        reconstruction: (B, C, H, W) floating point, clamped to [0, 1] here; at least 11 pixels high and wide.
        target: (B, C, H, W) floating point in [0, 1].

    Returns:
        (B,) float32; 1 where an image is reproduced exactly.

    Raises:
        ValueError: As in [`psnr`], or if images are too small.
        ImportError: If torchmetrics is missing.
    """
    _check_images(reconstruction, target)
    if min(target.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"Images are {target.shape[-2]}x{target.shape[-1]} pixels, but SSIM has a window of 11x11: measure larger "
            "images."
        )
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError(_missing("SSIM", "torchmetrics", "torchmetrics")) from error

    # In float64, since variances are differences of squares.
    images = reconstruction.double().clamp(0, 1), target.double()
    values = structural_similarity_index_measure(*images, data_range=1.0, reduction="none")
    return values.view(-1).float()  # type: ignore[union-attr]  # a tensor without `return_full_image`


def target_of(config: StellarConfig, pixel_values: Tensor, size: Sequence[int]) -> Tensor:
    """What a reconstruction is compared with: RGB of the pixels that the patches tile.

    A tokenizer whose codes are not as large as patches gives images of another size, as with ViT-H/14, which sees
    224x224 and reconstructs 256x256. The target is then resized as it is for the codes: bicubic, not antialiased.

    Args:
        config: `patch_size`, `image_mean` and `image_std` of the images.
        pixel_values: (B, 3, H, W), normalized.
        size: Height and width of the reconstruction.

    Returns:
        (B, 3, *size) float32 in [0, 1].
    """
    rgb = pixel_values.float()
    mean, std = (rgb.new_tensor(values).view(-1, 1, 1) for values in (config.image_mean, config.image_std))
    height, width = (side // config.patch_size * config.patch_size for side in pixel_values.shape[-2:])
    target = (rgb * std + mean)[..., :height, :width]
    if (height, width) != tuple(size):
        target = F.interpolate(target, size=tuple(size), mode="bicubic", align_corners=False)
    return target.clamp(0, 1)


def tokens_and_psnr(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The call of a STELLAR model for [`encode_images`] that also measures how well it reconstructs pixels.

    Args:
        model: `StellarForPreTraining` or `StellarForImageReconstruction`.
        pixel_values: (B, 3, H, W) float32, normalized.

    Returns:
        `pooler_output` (B, d), `sparse_tokens` (B, r, d), `localization` (B, N, r), `grid_size` (B, 2) and, with the
        pixel head, `psnr` (B,) in dB: of the image without what its patches do not tile.
    """
    output = model(pixel_values.to(model.dtype), return_loss=False)
    features = {
        "pooler_output": output.sparse_tokens.float().mean(dim=1),
        "sparse_tokens": output.sparse_tokens,
        "localization": output.localization,
        "grid_size": output.grid_size,
    }
    if model.config.reconstruction_target == "pixels":
        target = target_of(model.config, pixel_values, output.reconstruction.shape[-2:])
        features["psnr"] = psnr(output.reconstruction.float(), target)
    return features


# A set of images ----------------------------------------------------------------------------------------------------


class ReconstructionMetrics:
    """
    PSNR, SSIM, LPIPS and rFID of reconstructions, with networks of torchmetrics or of one's own.

    [`~ReconstructionMetrics.measure`] gives numbers and features of single images, in which the order of images and
    their split over processes do not matter; [`~ReconstructionMetrics.summarize`] those of a set.

    Args:
        lpips: Network of the learned perceptual similarity (Zhang et al., arXiv 1801.03924), a module of two batches
            of images (B, 3, H, W) in [-1, 1] that gives a distance for each; `"alex"` is torchmetrics', which needs
            torchvision and downloads weights. None leaves the metric out.
        rfid: Network of the Fréchet distance (Heusel et al., arXiv 1706.08500), a module of uint8 images (B, 3, H, W)
            that gives features (B, f); `"inception-2048"` is torchmetrics', which needs torch-fidelity and downloads
            weights. None leaves the metric out.

    Attributes:
        networks: The networks by the name of their metric.

    Raises:
        ImportError: If torchmetrics, or what a default network needs, is missing.

    Example:

    ```python
    >>> metrics = ReconstructionMetrics(lpips=None, rfid=None)
    >>> scores = reconstruction_scores(model, dataset, processor, metrics)
    >>> scores["psnr"], scores["ssim"]
    ```
    """

    def __init__(
        self,
        lpips: nn.Module | Literal["alex"] | None = "alex",
        rfid: nn.Module | Literal["inception-2048"] | None = "inception-2048",
    ):
        networks = {"lpips": _lpips_alex() if lpips == "alex" else lpips}
        networks["rfid"] = _inception() if rfid == "inception-2048" else rfid
        self._names = {name: value for name, value in (("lpips", lpips), ("rfid", rfid)) if isinstance(value, str)}
        self.networks = {name: network.eval() for name, network in networks.items() if isinstance(network, nn.Module)}

    def describe_networks(self) -> dict[str, dict[str, str]]:
        """`name` and `sha256`, of all weights and buffers that are saved, of the network of each metric."""
        return {
            metric: {"name": self._names.get(metric, type(network).__name__), "sha256": weights_sha256(network)}
            for metric, network in self.networks.items()
        }

    @torch.no_grad()
    def measure(self, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Measures single images; may be called in the `encode` of [`encode_images`], which gathers processes.

        Args:
            reconstruction: (B, 3, H, W) floating point, clamped to [0, 1] here.
            target: (B, 3, H, W) floating point in [0, 1].

        Returns:
            (B,) float32: `psnr` in dB, `ssim`, and `lpips` if there is a network; with one for rFID its `features` of
            the reconstructions and `target_features`, (B, f). For these images are rounded to 8 bits.

        Raises:
            ValueError: As in [`ssim`].
        """
        reconstruction, target = reconstruction.float().clamp(0, 1), target.float()
        measures = {"psnr": psnr(reconstruction, target), "ssim": ssim(reconstruction, target)}
        if "lpips" in self.networks:
            network = self.networks["lpips"].to(target.device)
            measures["lpips"] = network(2 * reconstruction - 1, 2 * target - 1).reshape(len(target))
        if "rfid" in self.networks:
            network = self.networks["rfid"].to(target.device)
            for name, images in (("features", reconstruction), ("target_features", target)):
                measures[name] = network((255 * images).round().to(torch.uint8)).flatten(1)
        return measures

    def summarize(self, measures: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of a set, computed in float64.

        Args:
            measures: What [`~ReconstructionMetrics.measure`] gives, of all images: the `tensors` of [`ImageFeatures`].

        Returns:
            Means over images: `psnr` in dB, `ssim`, `lpips`; and `rfid` between reconstructions and targets, of two
            images at least.

        Raises:
            ValueError: If there is one image, which has no Fréchet distance.
        """
        means = {name: measures[name].double().mean().item() for name in ("psnr", "ssim", "lpips") if name in measures}
        if "features" not in measures:
            return means
        return means | {"rfid": frechet_distance(measures["features"], measures["target_features"])}


def frechet_distance(features: Tensor, target_features: Tensor) -> float:
    """Fréchet distance of two sets of features, both taken for normally distributed (Heusel et al., arXiv 1706.08500).

    Args:
        features: (n, f) floating point, n >= 2.
        target_features: (m, f) floating point, m >= 2, of other images.

    Returns:
        `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of their means m and covariances C, at least 0, computed in
        float64.

    Raises:
        ValueError: If shapes disagree, or there are fewer than two rows.
    """
    if features.ndim != 2 or target_features.ndim != 2 or features.shape[1] != target_features.shape[1]:
        raise ValueError(
            f"The features have shapes {tuple(features.shape)} and {tuple(target_features.shape)}, but both must be "
            "(images, features) with as many features."
        )
    if min(len(features), len(target_features)) < 2:
        raise ValueError("The Fréchet distance compares covariances: two images at least are needed.")
    features, target_features = features.double(), target_features.double()
    covariance, target_covariance = features.T.cov(), target_features.T.cov()
    # C1 C2 has the eigenvalues of C1^(1/2) C2 C1^(1/2), which are real and not negative but for rounding.
    eigenvalues = torch.linalg.eigvals(covariance @ target_covariance).real.clamp_min(0)
    means = (features.mean(dim=0) - target_features.mean(dim=0)).square().sum()
    traces = covariance.trace() + target_covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return max((means + traces).item(), 0.0)


def reconstruction_scores(
    model: Any,
    dataset: Any,
    processor: Any,
    metrics: ReconstructionMetrics,
    *,
    probe: ReconstructionProbe | None = None,
    vq_model: Any = None,
    accelerator: Accelerator | None = None,
    description: str = "reconstruction",
    **settings: Any,
) -> dict[str, float]:
    """Measures how well a model, or a probe on its features, reconstructs images.

    Args:
        model: `StellarForImageReconstruction` or `StellarForPreTraining`; with a probe any vision encoder.
        dataset: As in [`encode_images`]; images that cannot be read are left out.
        processor: The model's image processor.
        metrics: What to measure.
        probe: Reconstructs instead of the model's own decoder.
        vq_model: The tokenizer of codes (`MaskGitVQModel`), on the model's device; needed for what reconstructs codes.
        accelerator: Splits the images over its processes; every process gets the scores of all images.
        description: Title of the progress bar.
        **settings: Further arguments of [`encode_images`]: `batch_size`, `num_workers`, `image_column`, ….

    Returns:
        What [`ReconstructionMetrics.summarize`] gives, and `num_images`.

    Raises:
        ValueError: If there is no tokenizer where one is needed, or no image can be read.
    """

    def measure(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
        return metrics.measure(*reconstruct(model, pixel_values, probe=probe, vq_model=vq_model))

    measures = encode_images(
        model, dataset, processor, encode=measure, accelerator=accelerator, description=description, **settings
    )
    return metrics.summarize(measures.tensors) | {"num_images": len(measures)}


def reconstruct(
    model: Any, pixel_values: Tensor, *, probe: ReconstructionProbe | None = None, vq_model: Any = None
) -> tuple[Tensor, Tensor]:
    """Reconstructions of images and what they are compared with, both (B, 3, H, W) float32.

    The arguments are those of [`reconstruction_scores`]; the targets those of [`target_of`].
    """
    config = model.config if probe is None else probe.config
    grid_size = _grid_size(config, pixel_values)
    if probe is None:
        output = model(pixel_values.to(model.dtype), return_loss=False).reconstruction
    else:
        output = probe(probe.frozen_features(model, pixel_values), grid_size)
    if config.reconstruction_target == "codes":
        if vq_model is None:
            raise ValueError("Codes are reconstructed, which only a tokenizer turns into an image: pass vq_model.")
        output = vq_model.decode(codes=output.argmax(dim=-1), grid_size=grid_size).sample
    return output.float().clamp(0, 1), target_of(config, pixel_values, output.shape[-2:])


# Probe --------------------------------------------------------------------------------------------------------------


class ReconstructionProbe(nn.Module):
    """
    The decoder of STELLAR on frozen features, as [`train_reconstruction_probe`] trains it.

    Args:
        config: Its decoder, `hidden_size`, `patch_size`, `reconstruction_target`, and mean and deviation of images
            count.
        kind: "low_rank" (Z = L S) or "dense" (D).
        seed: Of the initial weights.

    Attributes:
        config: As given.
        kind: As given.
        decoder: [`StellarDecoder`].
    """

    def __init__(self, config: StellarConfig, kind: Literal["low_rank", "dense"], seed: int = 0):
        super().__init__()
        self.config = config
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = StellarForImageReconstruction(config).decoder

    def forward(self, features: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Features (B, N, d) to RGB (B, 3, h * patch, w * patch), or to logits of codes (B, N, codes)."""
        # The decoder takes Z as a product L S: with every patch as its own token it is the features themselves.
        own_patch = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        return self.decoder(features, own_patch.expand(len(features), -1, -1), grid_size)

    @torch.no_grad()
    def frozen_features(self, model: Any, pixel_values: Tensor) -> Tensor:
        """The features (B, N, d) that this probe takes of images."""
        features = patch_features(model, pixel_values)
        if self.kind == "dense":
            return features["dense"].float()
        if "localization" not in features:
            raise ValueError(f"{type(model).__name__} has no low-rank features: probe its dense ones.")
        return low_rank_features(features["sparse_tokens"], features["localization"])


def train_reconstruction_probe(
    model: Any,
    dataset: Any,
    processor: Any,
    *,
    kind: Literal["low_rank", "dense"] = "low_rank",
    vq_model: Any = None,
    decoder_config: StellarConfig | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-4,
    image_column: str = "image",
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> ReconstructionProbe:
    """Trains a fresh decoder on frozen features: how much of an image these hold (STELLAR, the paper's rows B and L).

    The decoder is STELLAR's: 6 layers, 512 wide. The encoder sees every image anew in every epoch, since the features
    of a large set do not fit in memory. Images that cannot be read are left out.

    Args:
        model: Any vision encoder that [`dense_features`] takes, on any device; its weights do not change.
        dataset: As in [`encode_images`].
        processor: The model's image processor.
        kind: "low_rank" for Z = L S of a STELLAR model, "dense" for the patches D.
        vq_model: The tokenizer (`MaskGitVQModel`), on the model's device, whose codes are reconstructed; without it
            pixels are.
        decoder_config: Its `decoder_*` fields are the sizes of the decoder; by default those of a STELLAR model, and
            for other encoders those of the paper.
        epochs: Passes over the images.
        batch_size: Images of a step, of all processes together.
        learning_rate: Of AdamW, constant.
        weight_decay: Of AdamW, on all weights.
        image_column: Column of the images.
        num_workers: Processes that read images.
        accelerator: Splits every batch over its processes, which get the same probe.
        seed: Of the initial weights and the order of images.
        show_progress: Whether to show a progress bar.

    Returns:
        The probe, in evaluation mode, for [`reconstruction_scores`].

    Raises:
        ValueError: If the model lacks the features, images differ in size within a batch, or a number is impossible.
    """
    check_integer("epochs", epochs)
    check_integer("batch_size", batch_size)
    if kind not in ("low_rank", "dense"):
        raise ValueError(f"kind is {kind!r}, but must be 'low_rank' or 'dense'.")
    config = _probe_config(model.config, processor, decoder_config, vq_model)
    probe = ReconstructionProbe(config, kind, seed).to(model.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def features_and_target(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
        grid_size = _grid_size(config, pixel_values)
        target = target_of(config, pixel_values, [side * config.patch_size for side in grid_size])
        if vq_model is not None:
            target = vq_model.patch_codes(target, config.patch_size)
        features = probe.frozen_features(model, pixel_values)
        grid = torch.tensor(grid_size, device=features.device).expand(len(features), 2)
        return {"features": features, "target": target, "grid_size": grid}

    processes, index = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    order = torch.Generator().manual_seed(seed)
    shuffled = (torch.randperm(len(dataset), generator=order).split(batch_size) for _ in range(epochs))
    batches = [batch[index::processes].tolist() for epoch in shuffled for batch in epoch]
    stream = encode_batches(
        model,
        dataset,
        processor,
        batches,
        encode=features_and_target,
        image_column=image_column,
        num_workers=num_workers,
    )
    is_shown = show_progress and index == 0
    for part in tqdm(stream, f"{kind} probe", len(batches), leave=False, unit=" steps", disable=not is_shown):
        num_images = torch.tensor(float(len(part)), device=model.device)
        _loss_of_sum(probe, part).backward()
        _average_gradients(probe, num_images, accelerator)
        optimizer.step()
        optimizer.zero_grad()
    return probe.eval()


def _loss_of_sum(probe: ReconstructionProbe, part: ImageFeatures) -> Tensor:
    """The sum over images of their losses; 0, with gradients of 0, without images."""
    if len(part) == 0:
        return sum(parameter.sum() for parameter in probe.parameters()) * 0.0  # type: ignore[return-value]
    if not all(isinstance(tensor, Tensor) for tensor in part.tensors.values()):
        raise ValueError("Images of a batch have different sizes: take an image processor that crops.")
    device = next(probe.parameters()).device
    reconstruction = probe(part.features.to(device), tuple(part.grid_size[0].tolist()))
    target = part.target.to(device)
    return len(part) * probe.decoder.loss(reconstruction, image=target, code_labels=target)  # takes one of them


def _average_gradients(probe: nn.Module, num_images: Tensor, accelerator: Accelerator | None) -> None:
    """Divides gradients, of sums over images, by the number of images of all processes."""
    gradients = [parameter.grad for parameter in probe.parameters() if parameter.grad is not None]
    flat = torch.cat([num_images.view(1), *(gradient.flatten() for gradient in gradients)])
    if accelerator is not None and accelerator.num_processes > 1:
        flat = accelerator.reduce(flat, reduction="sum")
    averages = flat[1:] / flat[0].clamp(min=1)
    for gradient, average in zip(gradients, averages.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(average.view_as(gradient))


def _probe_config(config: Any, processor: Any, decoder_config: StellarConfig | None, vq_model: Any) -> StellarConfig:
    """What a probe has to know of its encoder, images and targets."""
    if decoder_config is None:
        decoder_config = config if isinstance(config, StellarConfig) else StellarConfig()
    fields = {name: value for name, value in decoder_config.to_dict().items() if name.startswith("decoder_")}
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name, None) or getattr(config, name, None)
        fields |= {} if value is None else {name: list(value)}
    if vq_model is not None:
        fields["codebook_size"] = vq_model.config.num_vq_embeddings
    return StellarConfig(
        **fields,
        hidden_size=config.hidden_size,
        patch_size=config.patch_size,
        # The smallest encoder that there is, since only the decoder is kept.
        image_size=config.patch_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=1,
        num_sparse_tokens=1,
        reconstruction_target="pixels" if vq_model is None else "codes",
    )


def _grid_size(config: StellarConfig, pixel_values: Tensor) -> tuple[int, int]:
    rows, columns = (side // config.patch_size for side in pixel_values.shape[-2:])
    return rows, columns


# Networks -----------------------------------------------------------------------------------------------------------


def _lpips_alex() -> nn.Module:
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    except ImportError as error:
        raise ImportError(
            _missing("LPIPS-Alex", "torchmetrics and torchvision", "torchmetrics torchvision", "lpips")
        ) from error


def _inception() -> nn.Module:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048).inception
    except ImportError as error:
        raise ImportError(
            _missing("rFID-2048", "torchmetrics and torch-fidelity", "torchmetrics torch-fidelity", "rfid")
        ) from error


def _missing(metric: str, packages: str, install: str, argument: str | None = None) -> str:
    hint = f" Or pass {argument}=None, or a network of your own." if argument else ""
    return f"{metric} needs {packages}; install with: pip install {install}.{hint}"


def _check_images(reconstruction: Tensor, target: Tensor) -> None:
    check_tensors(reconstruction=reconstruction, target=target)
    if reconstruction.shape != target.shape or target.ndim != 4 or target.numel() == 0:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)} and target {tuple(target.shape)}, "
            "but both must be (B, C, H, W) with at least one image."
        )
    if not target.is_floating_point() or not (target.min() >= 0 and target.max() <= 1):  # NaN is not either
        raise ValueError(
            f"target is {target.dtype} between {target.min():.3g} and {target.max():.3g}, but must be floating point "
            "in [0, 1]: pass RGB before normalization."
        )
