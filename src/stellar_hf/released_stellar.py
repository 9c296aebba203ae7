# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The authors' checkpoints: where the released ones are, and their keys and sizes in terms of this package.

Sizes are read from the shapes of the tensors. Every key is either converted, or known to be unused, or an error.
"""

import re
from collections.abc import Callable, Mapping
from inspect import get_annotations
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from .checkpoint_stellar import check_shapes, check_state_dict, download, listed, read_tensors, shape_of
from .configuration_stellar import StellarConfig

RELEASED_REPOSITORY = "microsoft/STELLAR"
RELEASED_REVISION = "6794be9a20fb9d3944c5bcc6003512a347fa518f"  # the commit that the authors' own code pins
RELEASED_NAMES = ("stellar-b16", "stellar-l16", "stellar-h16", "stellar-b8", "stellar-b24")
RELEASED_LICENSE = "mit"

# Table 1 of the paper, all ViT-B but the last: model, number of tokens, accuracy of the linear probe and of kNN in %,
# rFID, LPIPS.
PUBLISHED_RESULTS = (
    ("DINO, CLS", 1, 76.46, 74.69, None, None),
    ("DINO, patches", 196, 70.31, 54.41, 3.27, 0.2121),
    ("MAE", 196, 66.32, 25.82, 3.02, 0.2071),
    ("TiTok, own decoder", 32, 33.42, 7.30, 2.75, 0.3281),
    ("TiTok, own decoder", 64, 32.87, 7.29, 1.99, 0.2571),
    ("stellar-b16", 16, 73.26, 67.25, 3.06, 0.2077),
    ("STELLAR B", 196, 72.21, 64.71, 2.85, 0.2085),
    ("stellar-h16", 16, 79.10, 77.31, 2.60, 0.1729),
)

# The prefix of the authors' trainer (Lightning).
LIGHTNING_PREFIX = "model."

# Parts of the released modules that their forward pass never reaches.
UNUSED_KEYS = re.compile(r"(teacher_)?encoder\.pooler\.|decoder\.(embeddings|pooler)\.")

_LAYER_KEYS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
_ENCODERS = {"encoder.": "stellar.", "teacher_encoder.": "teacher.stellar."}
_CLUSTERING_HEADS = {
    "clustering_head": "clustering_head",
    "cls_cluster_head": "cls_clustering_head",
    "teacher_head": "teacher.clustering_head",
    "teacher_cls_head": "teacher.cls_clustering_head",
}
_KEYS = {
    "sparse_tokens": "stellar.embeddings.sparse_tokens",
    "teacher_sparse_tokens": "teacher.stellar.embeddings.sparse_tokens",
    "position_embedding.positional_encoding_gaussian_matrix": "decoder.positions.gaussian_matrix",
}
_LINEARS = {
    "dense_proj": "stellar.localization.dense_projection",
    "sparse_proj": "stellar.localization.sparse_projection",
    "decoder_proj": "decoder.projection",
    "reconstruction_head": "decoder.head",
}


# Keys ----------------------------------------------------------------------------------------------------------------


def _converted_key(key: str) -> str | None:
    """The key in `StellarForPreTraining`, or None for one that is no STELLAR key."""
    if key in _KEYS:
        return _KEYS[key]
    if match := re.fullmatch(r"(\w+)\.(weight|bias)", key):
        module, kind = match.groups()
        return f"{_LINEARS[module]}.{kind}" if module in _LINEARS else None
    if match := re.fullmatch(r"(\w+)\.layer\.weight", key):
        head = _CLUSTERING_HEADS.get(match[1])
        return head and f"{head}.prototypes"
    if match := re.fullmatch(r"(\w+)\.predictor\.layers\.(\d*[02468])\.(weight|bias)", key):
        head = _CLUSTERING_HEADS.get(match[1])
        return head and f"{head}.layers.{int(match[2]) // 2}.{match[3]}"  # activations stand at the odd places
    return _converted_vit_key(key)


def _converted_vit_key(key: str) -> str | None:
    match = re.fullmatch(r"(encoder\.|teacher_encoder\.|decoder\.)(.+)", key)
    if match is None:
        return None
    prefix, rest = _ENCODERS.get(match[1], match[1]), match[2]
    if layer := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", rest):
        module = _LAYER_KEYS.get(layer[2])
        return module and f"{prefix}layers.{layer[1]}.{module}.{layer[3]}"
    in_place = r"layernorm\.(weight|bias)"
    if match[1] in _ENCODERS:
        in_place += r"|embeddings\.(cls_token|position_embeddings|patch_embeddings\.projection\.(weight|bias))"
    return f"{prefix}{rest}" if re.fullmatch(in_place, rest) else None


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Renames released keys to those of [`StellarForPreTraining`].

    Args:
        state_dict: Released keys, or some of them, without a prefix.

    Returns:
        The same tensors under new keys, without the ones known to be unused; sparse tokens (r, d) become (1, r, d).

    Raises:
        ValueError: On keys that are neither convertible nor known to be unused; the message lists them.
    """
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        if UNUSED_KEYS.match(key):
            continue
        new_key = _converted_key(key)
        if new_key is None:
            unknown.append(key)
        else:
            converted[new_key] = tensor[None] if key.endswith("sparse_tokens") else tensor
    if unknown:
        raise ValueError(
            f"The checkpoint has {len(unknown)} keys that STELLAR does not have: {listed(unknown)}. Remove them if "
            "they belong to something else."
        )
    return converted


# Sizes ---------------------------------------------------------------------------------------------------------------


def infer_config(state_dict: Mapping[str, Tensor], **overrides: Any) -> StellarConfig:
    """
    Reads the sizes of a model from the shapes of its tensors.

    Shapes do not tell the heads, which are taken to be 64 channels wide (16 heads of 80 channels for ViT-H), nor
    anything without weights, which takes [`StellarConfig`]'s defaults, those of the released models.

    Args:
        state_dict: Released keys without a prefix.
        overrides: Fields of [`StellarConfig`] that replace inferred and default ones.

    Returns:
        The configuration.

    Raises:
        ValueError: If a tensor that tells a size is missing, or on an unknown field or an impossible value.
    """
    if unknown := set(overrides) - set(get_annotations(StellarConfig)):
        raise ValueError(f"StellarConfig has no field {listed(unknown)}: correct or remove it.")
    sizes = _inferred_sizes(state_dict)
    _check_overrides(overrides, sizes)
    fields = {**sizes, **overrides}
    fields.setdefault("num_attention_heads", _default_heads(fields["hidden_size"]))
    fields.setdefault("decoder_num_attention_heads", _default_heads(fields["decoder_hidden_size"]))
    try:
        return StellarConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check_overrides(overrides: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Before anything is built, which a size that the weights contradict may make larger than the memory."""
    told = sizes.keys() - {"use_teacher", "image_size"}
    differing = [
        f"{name} is {value!r}, but the checkpoint has {sizes[name]!r}"
        for name, value in overrides.items()
        if name in told and value != sizes[name]
    ]
    image_size, grid = overrides.get("image_size"), sizes["image_size"] // sizes["patch_size"]
    if isinstance(image_size, int) and image_size // sizes["patch_size"] != grid:
        differing.append(f"image_size is {image_size}, but the checkpoint has {grid}x{grid} patches")
    if differing:
        raise ValueError(f"The configuration contradicts the weights: {', '.join(differing)}. Leave these fields out.")


def _inferred_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    def shape(key: str, *num_dims: int) -> torch.Size:
        return shape_of(state_dict, key, num_dims, "STELLAR")

    def num_layers(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({match[1] for key in state_dict if (match := pattern.match(key))})

    patches = shape("encoder.embeddings.patch_embeddings.projection.weight", 4)
    grid = round((shape("encoder.embeddings.position_embeddings", 3)[1] - 1) ** 0.5)
    first_projection = shape("clustering_head.predictor.layers.0.weight", 2)
    prototypes = shape("clustering_head.layer.weight", 2)
    head = shape("reconstruction_head.weight", 2, 4)
    sizes = {
        "hidden_size": patches[0],
        "num_channels": patches[1],
        "patch_size": patches[2],
        "image_size": grid * patches[2],
        "num_hidden_layers": num_layers("encoder.encoder.layer."),
        "intermediate_size": shape("encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "qkv_bias": "encoder.encoder.layer.0.attention.attention.query.bias" in state_dict,
        "num_sparse_tokens": shape("sparse_tokens", 2)[0],
        "decoder_hidden_size": shape("decoder_proj.weight", 2)[0],
        "decoder_num_hidden_layers": num_layers("decoder.encoder.layer."),
        "decoder_intermediate_size": shape("decoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "reconstruction_target": "pixels" if len(head) == 4 else "codes",
        "num_prototypes": prototypes[0],
        "prototype_dim": prototypes[1],
        "num_projection_layers": num_layers("clustering_head.predictor.layers."),
        "use_teacher": any(key.startswith("teacher_") for key in state_dict),
    }
    if sizes["reconstruction_target"] == "codes":
        sizes["codebook_size"] = head[0]
    if sizes["num_projection_layers"] > 1:
        sizes["projection_hidden_size"] = first_projection[0]
    return sizes


def _default_heads(width: int) -> int:
    return 16 if width == 1280 else max(width // 64, 1)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def read_released(name: str, revision: str = RELEASED_REVISION, **hub_arguments: Any) -> Mapping[str, Tensor]:
    """
    The state dict of a released checkpoint, downloaded unless it is in the cache.

    Args:
        name: One of `RELEASED_NAMES`.
        revision: Commit, tag or branch of `RELEASED_REPOSITORY`.
        **hub_arguments: `cache_dir`, `force_download`, `local_files_only` and `token`, as in `from_pretrained`.

    Raises:
        ValueError: If there is no such model, or its file is damaged.
        OSError: If it is not in the cache and cannot be downloaded.
    """
    if name not in RELEASED_NAMES:
        raise ValueError(f"There is no released model {name!r}: take one of {', '.join(RELEASED_NAMES)}.")
    instead = "convert a local copy by stellar-hf convert --checkpoint FILE"
    path = download(RELEASED_REPOSITORY, f"{name}.safetensors", revision, instead, **hub_arguments)
    return read_tensors(path, "download it again with force_download=True")


def read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """
    The state dict of a file: one like the released ones, or a checkpoint of the authors' trainer.

    Args:
        path: A `.safetensors` or Lightning `.ckpt` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another name, or cannot be read.
    """
    if path.is_file() and path.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"{path} ends in {path.suffix!r}, but must be a .safetensors or a Lightning .ckpt file.")
    content = read_tensors(path, "download it again, or save its state_dict alone, as a safetensors file")
    if path.suffix == ".safetensors":
        return content
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict.")
    check_state_dict(content["state_dict"], f"The state_dict of {path}")
    return content["state_dict"]


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefix of the authors' trainer."""
    return {key.removeprefix(LIGHTNING_PREFIX): tensor for key, tensor in state_dict.items()}


def convert_weights(
    state_dict: Mapping[str, Tensor], model_class: Callable[[StellarConfig], nn.Module], **config_fields: Any
) -> tuple[StellarConfig, dict[str, Tensor]]:
    """
    Configuration and weights of a checkpoint, with every key accounted for.

    Args:
        state_dict: Released keys; they may carry Lightning's prefix `model.`.
        model_class: [`StellarForPreTraining`], which has a place for every weight of a checkpoint.
        **config_fields: Fields of [`StellarConfig`] that the shapes do not tell: heads, image size, temperatures.
            With `use_teacher=False` a teacher in the checkpoint is left out; with `use_teacher=True` a teacher that is
            not in the checkpoint is a copy of the model.

    Returns:
        The configuration, and the state dict of `model_class` with it.

    Raises:
        ValueError: If this is not a STELLAR checkpoint, has keys too many or too few, or contradicts `config_fields`.
    """
    check_state_dict(state_dict, "The checkpoint")
    state_dict = without_prefix(state_dict)
    config = infer_config(state_dict, **config_fields)
    weights = convert_state_dict(state_dict)
    with torch.device("meta"):  # names and shapes are all that is needed
        expected = model_class(config).state_dict()
    if not config.use_teacher:
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith("teacher.")}
    elif not any(key.startswith("teacher.") for key in weights):
        copied = (key for key in expected if key.startswith("teacher."))
        weights.update({key: weights[key.removeprefix("teacher.")] for key in copied})
    check_shapes(weights, expected)
    return config, weights
