# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Configuration of the STELLAR models."""

import math

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

RECONSTRUCTION_TARGETS = ("codes", "pixels")
MASK_FOCUSES = ("gaussian", "block", None)
SEGMENTATION_FEATURES = ("dense", "low_rank")

# Fields of the objective, of regularization and of fresh weights: a training may go on with other values of them. All
# other fields of StellarConfig are the model's, and stay the same from one checkpoint to the next.
OBJECTIVE_FIELDS = frozenset(
    {
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "localization_noise",
        "target_temperature",
        "prediction_temperature",
        "sinkhorn_iterations",
        "sinkhorn_scale",
        "matching_epsilon",
        "matching_iterations",
        "mask_ratio",
        "mask_focus",
        "reconstruction_weight",
        "koleo_weight",
        "clustering_weight",
        "masked_weight",
        "local_weight",
        "semantic_loss_ignore_index",
    }
)

# Bounds far beyond what any model needs: larger values are mistakes, which would fill the memory before they show.
_LARGEST_INTEGERS = {
    "hidden_size": 2**15,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**15,
    "intermediate_size": 2**18,
    "image_size": 2**15,
    "patch_size": 2**15,
    "num_channels": 2**12,
    "num_sparse_tokens": 2**15,
    "decoder_hidden_size": 2**15,
    "decoder_num_hidden_layers": 1000,
    "decoder_num_attention_heads": 2**15,
    "decoder_intermediate_size": 2**18,
    "codebook_size": 2**20,
    "num_prototypes": 2**20,
    "prototype_dim": 2**15,
    "projection_hidden_size": 2**18,
    "num_projection_layers": 1000,
    "sinkhorn_iterations": 10**4,
    "matching_iterations": 10**4,
    "localization_iterations": 10**4,
}
_LARGEST_GRID = 2**10  # patches along a side of the image whose positions are stored


@strict
class StellarConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`StellarModel`] and of every head on top of it. The defaults are the released base model with
    16 sparse tokens (STELLAR, arXiv 2602.01905): a ViT-B/16 encoder, a decoder of 6 layers that predicts codes of a
    frozen tokenizer, and 16384 prototypes.

    Args:
        hidden_size (`int`, defaults to 768): Width d of the encoder; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): Number of encoder layers.
        num_attention_heads (`int`, defaults to 12): Attention heads of an encoder layer.
        intermediate_size (`int`, defaults to 3072): Width of the encoder's MLPs.
        hidden_act (`str`, defaults to `"gelu"`): Activation of encoder and decoder MLPs.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after embeddings, attention and MLPs, in [0, 1).
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout of attention weights, in [0, 1).
        initializer_range (`float`, defaults to 0.02): Standard deviation of fresh linear weights, > 0.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of every LayerNorm.
        image_size (`int`, defaults to 224): Side in pixels for which position embeddings are stored; other sizes,
            non-square ones too, interpolate them.
        patch_size (`int`, defaults to 16): Side of a patch in pixels.
        num_channels (`int`, defaults to 3): Image channels.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value projections have biases.
        num_sparse_tokens (`int`, defaults to 16): Number r of sparse tokens.
        localization_temperature (`float` or `None`, defaults to 0.06): Temperature tau of the localization softmax
            over cosine similarities; `None` takes dot products over sqrt(d) instead.
        localization_noise (`float`, defaults to 0.0): Scale of Gumbel noise on the localization scores in training.
            Not in the paper: it makes fine mixtures of tokens useless to the decoder, which keeps L sharp in small
            models that start from random weights.
        localization_compactness (`float`, defaults to 0.0): Weight of places in maps that are compact regions. Not in
            the paper: above 0, L is fitted to each image as a mixture model of what a patch shows and where it is, in
            turns that start from the paper's L. Not in training, where L has to depend on S. It adds no parameters:
            any trained model can be given it.
        localization_iterations (`int`, defaults to 30): Turns of that fit.
        refine_tokens (`bool`, defaults to `False`): Whether S is refined by what lies under its maps: S + W
            LayerNorm(L^T D / mass) + b. Not in the paper: it makes a token speak of its own region. Masked views keep
            their tokens as they are, and so learn to predict the refined ones.
        decoder_hidden_size (`int`, defaults to 512): Width of the decoder; even and a multiple of its heads.
        decoder_num_hidden_layers (`int`, defaults to 6): Number of decoder layers.
        decoder_num_attention_heads (`int`, defaults to 8): Attention heads of a decoder layer.
        decoder_intermediate_size (`int`, defaults to 2048): Width of the decoder's MLPs.
        reconstruction_target (`str`, defaults to `"codes"`): `"codes"` (logits over a frozen tokenizer's codebook) or
            `"pixels"` (RGB in [0, 1]).
        codebook_size (`int`, defaults to 1024): Codes of the tokenizer.
        num_prototypes (`int`, defaults to 16384): Prototypes K of each clustering head.
        prototype_dim (`int`, defaults to 256): Width of a prototype.
        projection_hidden_size (`int`, defaults to 2048): Hidden width of the clustering heads' MLPs.
        num_projection_layers (`int`, defaults to 2): Linear layers of the clustering heads' MLPs.
        standardize_projections (`bool`, defaults to `False`): Whether projections are standardized over the batch (of
            all processes) before their L2 normalization. Not in the paper: it keeps small models that start from
            random weights from collapsing to a uniform assignment. A batch of one image has no other CLS to be
            standardized with, so that the CLS learns nothing of it: [`StellarTrainer`] refuses such batches.
        target_temperature (`float`, defaults to 0.06): Temperature of the Sinkhorn targets.
        prediction_temperature (`float`, defaults to 0.12): Temperature of the predictions.
        sinkhorn_iterations (`int`, defaults to 3): Sinkhorn-Knopp iterations.
        sinkhorn_scale (`float`, defaults to 1.0): Power of the column normalization, in (0, 1]; 1 asks for equally
            used prototypes.
        matching_epsilon (`float`, defaults to 0.1): Entropic regularization of the token matching.
        matching_iterations (`int`, defaults to 5): Iterations of the token matching.
        mask_ratio (`float`, defaults to 0.8): Share of patches dropped from a masked view, in [0, 1).
        mask_focus (`str` or `None`, defaults to `"gaussian"`): Which patches the focal half of the masks keeps:
            `"gaussian"` (around a random cell), `"block"` (a random square), or `None` (all masks uniform).
        use_teacher (`bool`, defaults to `False`): Whether targets come from a moving average of the model.
        reconstruction_weight (`float`, *optional*): Weight of the reconstruction; `None` takes 10 for pixels and 0.05
            for codes.
        koleo_weight (`float`, defaults to 0.1): Weight of the KoLeo terms of the clean and of the masked views.
        clustering_weight (`float`, defaults to 1.0): Weight of the clean view's own clustering terms.
        masked_weight (`float`, defaults to 1.0): Weight of the masked views' token and CLS terms.
        local_weight (`float`, defaults to 1.0): Weight of the local views' CLS term.
        image_mean (`list[float]`, defaults to ImageNet's): Channel means with which `pixel_values` are normalized.
        image_std (`list[float]`, defaults to ImageNet's): Channel standard deviations, > 0.
        segmentation_features (`str`, defaults to `"dense"`): What [`StellarForSemanticSegmentation`] classifies:
            `"dense"` (the patches D) or `"low_rank"` (Z = L S, what the sparse tokens say of each patch).
        semantic_loss_ignore_index (`int`, defaults to 255): Label of pixels that the segmentation loss leaves out.
        out_features (`list[str]`, *optional*): Feature maps of [`StellarBackbone`]: `"stem"`, `"stage1"`, ...; the
            last one by default.
        out_indices (`list[int]`, *optional*): The same by index, 0 for `"stem"`.

    Raises:
        ValueError: On an impossible value, or a size far beyond that of any model (more than 1000 layers, 2^20
            prototypes or codes, a width of 2^18, 2^15 pixels or 2^10 patches a side); the message names the field, the
            value and what is allowed.

    Example:

    ```python
    >>> from stellar_hf import StellarConfig, StellarModel

    >>> model = StellarModel(StellarConfig(num_sparse_tokens=8))
    >>> model.config.num_sparse_tokens
    8
    ```
    """

    model_type = "stellar"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    num_sparse_tokens: int = 16
    localization_temperature: float | int | None = 0.06
    localization_noise: float | int = 0.0
    localization_compactness: float | int = 0.0
    localization_iterations: int = 30
    refine_tokens: bool = False
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 6
    decoder_num_attention_heads: int = 8
    decoder_intermediate_size: int = 2048
    reconstruction_target: str = "codes"
    codebook_size: int = 1024
    num_prototypes: int = 16384
    prototype_dim: int = 256
    projection_hidden_size: int = 2048
    num_projection_layers: int = 2
    standardize_projections: bool = False
    target_temperature: float | int = 0.06
    prediction_temperature: float | int = 0.12
    sinkhorn_iterations: int = 3
    sinkhorn_scale: float | int = 1.0
    matching_epsilon: float | int = 0.1
    matching_iterations: int = 5
    mask_ratio: float | int = 0.8
    mask_focus: str | None = "gaussian"
    use_teacher: bool = False
    reconstruction_weight: float | int | None = None
    koleo_weight: float | int = 0.1
    clustering_weight: float | int = 1.0
    masked_weight: float | int = 1.0
    local_weight: float | int = 1.0
    image_mean: list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)
    segmentation_features: str = "dense"
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.image_mean = list(self.image_mean)
        self.image_std = list(self.image_std)
        # Not a `validate_*` method: the strict dataclass would wrap the ValueError in an error that is none.
        self._check_values()
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        for name, largest in _LARGEST_INTEGERS.items():
            self._check(name, 1 <= getattr(self, name) <= largest, f"an integer from 1 to {largest}")
        positive_numbers = (
            "initializer_range layer_norm_eps target_temperature prediction_temperature matching_epsilon"
        )
        for name in positive_numbers.split():
            self._check(name, 0 < getattr(self, name) < math.inf, "a positive number")
        weights = (
            "localization_noise localization_compactness koleo_weight clustering_weight masked_weight local_weight"
        )
        for name in weights.split():
            self._check(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "mask_ratio"):
            self._check(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")

        if self.hidden_act != "gelu":
            from transformers.activations import ACT2FN  # only here: it loads torch

            self._check("hidden_act", self.hidden_act in ACT2FN, "the name of an activation of Transformers")

        tau, weight = self.localization_temperature, self.reconstruction_weight
        self._check("localization_temperature", tau is None or 0 < tau < math.inf, "a positive number or None")
        self._check("reconstruction_weight", weight is None or 0 <= weight < math.inf, "a number >= 0 or None")
        self._check("sinkhorn_scale", 0 < self.sinkhorn_scale <= 1, "a number in (0, 1]")
        self._check(
            "reconstruction_target",
            self.reconstruction_target in RECONSTRUCTION_TARGETS,
            f"one of {RECONSTRUCTION_TARGETS}",
        )
        self._check("mask_focus", self.mask_focus in MASK_FOCUSES, f"one of {MASK_FOCUSES}")
        self._check(
            "segmentation_features",
            self.segmentation_features in SEGMENTATION_FEATURES,
            f"one of {SEGMENTATION_FEATURES}",
        )
        self._check("patch_size", self.patch_size <= self.image_size, f"at most image_size = {self.image_size}")
        self._check(
            "image_size",
            self.image_size // self.patch_size <= _LARGEST_GRID,
            f"at most {_LARGEST_GRID} patches of {self.patch_size} pixels",
        )
        self._check(
            "num_attention_heads",
            self.hidden_size % self.num_attention_heads == 0,
            f"a divisor of hidden_size = {self.hidden_size}",
        )
        self._check(
            "decoder_num_attention_heads",
            self.decoder_hidden_size % self.decoder_num_attention_heads == 0,
            f"a divisor of decoder_hidden_size = {self.decoder_hidden_size}",
        )
        self._check("decoder_hidden_size", self.decoder_hidden_size % 2 == 0, "even (sine and cosine channels)")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            fits = len(values) == self.num_channels and all(map(math.isfinite, values))
            self._check(name, fits, f"{self.num_channels} finite numbers")
        self._check("image_std", min(self.image_std) > 0, "positive numbers")

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"StellarConfig.{name} is {getattr(self, name)!r}, but must be {allowed}.")


__all__ = ["StellarConfig"]
