# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Images a second of StellarModel beside ViTModel, Dinov2Model and timm's ViT of the same sizes.

Weights are random. STELLAR's sequences are longer by its sparse tokens, which sets a limit to its speed: 197/213 of
the ViT's for 196 patches, CLS and 16 tokens. `infer_share_of_limit` is how much of that is reached.
"""

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModel, Dinov2Config, PreTrainedConfig, ViTConfig

from stellar_hf import StellarConfig

from .counters import count_operations, peak_bytes
from .harness import Options, Row, progress, time_in_turns

IMAGE_SIZE = 224
SIZES = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "patch_size": 16},  # for --quick
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
}
CPU_BATCH_SIZES = {"tiny": 2, "base": 8, "large": 4, "huge": 2}
CUDA_BATCH_SIZE = 128
REQUIRED_SHARE_OF_LIMIT = 0.97
REQUIRED_GAIN_OF_COMPILATION = 1.1  # on a CPU
REQUIRED_SPEED_OF_TIMM = 0.95  # on an accelerator, in bf16
REFERENCE = "vit"  # the model, and
PLAIN = "sdpa"  # the setting, that speeds are compared with


def run(options: Options) -> list[Row]:
    rows = []
    for size in ("tiny",) if options.quick else ("base", "large", "huge"):
        models = build_models(size, options.device)
        settings = settings_of(size, options)
        largest = CPU_BATCH_SIZES[size] if options.on_cpu else CUDA_BATCH_SIZE
        for batch_size in dict.fromkeys((2 if options.quick else largest, 1)):
            progress(f"{size}, batch {batch_size}: {', '.join(settings)}")
            rows += measure(size, models, settings, batch_size, options)
    return rows


def shortfalls(rows: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if not row["model"].startswith("stellar") or row["infer_batch_size"] == 1:
            continue
        name = f"{row['model']}, {row['setting']}, batch {row['infer_batch_size']}"
        if row["setting"] == PLAIN and row["infer_share_of_limit"] < REQUIRED_SHARE_OF_LIMIT:
            found.append(f"{name}: {row['infer_share_of_limit']:.3f} of the limit, not {REQUIRED_SHARE_OF_LIMIT}")
        if row["setting"] == "sdpa compiled" and row["infer_speed_to_sdpa"] < REQUIRED_GAIN_OF_COMPILATION:
            found.append(f"{name}: {row['infer_speed_to_sdpa']:.3f} times sdpa, not {REQUIRED_GAIN_OF_COMPILATION}")
        timm = [r for r in rows if r["model"].startswith("timm") and same_work(r, row)]
        if "bf16" in row["setting"] and timm:
            speed = row["infer_samples_per_sec"] / timm[0]["infer_samples_per_sec"]
            if speed < REQUIRED_SPEED_OF_TIMM:
                found.append(f"{name}: {speed:.3f} of timm's speed, not {REQUIRED_SPEED_OF_TIMM}")
    return found


def same_work(row: Row, other: Row) -> bool:
    size, other_size = row["model"].split(" ")[1], other["model"].split(" ")[1]
    return (size, row["setting"], row["infer_batch_size"]) == (other_size, other["setting"], other["infer_batch_size"])


def build_models(size: str, device: str) -> dict[str, nn.Module]:
    shape = {**SIZES[size], "image_size": IMAGE_SIZE}
    wide = 4 * shape["hidden_size"]
    configs: dict[str, PreTrainedConfig] = {
        "stellar": StellarConfig(**shape, intermediate_size=wide),
        "vit": ViTConfig(**shape, intermediate_size=wide),
        "dinov2": Dinov2Config(**shape, mlp_ratio=4),
    }
    with torch.device(device):  # where drawing the weights of a huge model takes no minute
        models = {name: AutoModel.from_config(config, attn_implementation="sdpa") for name, config in configs.items()}
        if importlib.util.find_spec("timm"):
            import timm

            models["timm"] = timm.create_model(f"vit_{size}_patch{shape['patch_size']}_{IMAGE_SIZE}", num_classes=0)
    return {name: model.eval().to(device) for name, model in models.items()}


def settings_of(size: str, options: Options) -> list[str]:
    """All of them at the base size; for the sake of time, the larger ones run as they are, and in bf16 on a GPU."""
    if options.quick:
        return [PLAIN]
    if options.on_cpu:
        return [PLAIN, "eager", "sdpa compiled", "sdpa bf16"] if size == "base" else [PLAIN]
    return [PLAIN, "sdpa bf16", *(["eager", "sdpa compiled bf16"] if size == "base" else [])]


def variant(model: nn.Module, setting: str, images: torch.Tensor) -> Callable[[], object] | None:
    """A call of the model in a setting, with the same weights; None where it has no such setting."""
    if setting == "eager":
        if not hasattr(model, "config"):
            return None
        twin = AutoModel.from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
        twin.load_state_dict(model.state_dict(), assign=True)
        model = twin
    if "bf16" in setting:
        model, images = copy.deepcopy(model).to(torch.bfloat16), images.to(torch.bfloat16)
    forward = torch.compile(model, dynamic=False) if "compiled" in setting else model
    return torch.no_grad()(lambda: forward(images))


def measure(
    size: str, models: dict[str, nn.Module], settings: list[str], batch_size: int, options: Options
) -> list[Row]:
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=options.device)
    variants = {}
    for setting in settings:
        for name, model in models.items():
            call = variant(model, setting, images)
            if call is not None:
                variants[name, setting] = call
    keys = {f"{name} {setting}": (name, setting) for name, setting in variants}
    named = {key: variants[keys[key]] for key in keys}
    turns = 2 if options.quick else 7
    timings = time_in_turns(named, options.device, turns=turns, warm_up=1 if options.on_cpu else 3)
    lengths = {name: sequence_length(size, models[name]) for name in ("vit", "stellar")}
    gmacs = {
        name: count_operations(torch.no_grad()(lambda model=model: model(images[:1]))) / 2e9
        for name, model in models.items()
    }

    rows = []
    for key, (name, setting) in keys.items():
        timing = timings[key]
        speed = timings[f"{REFERENCE} {setting}"].ratio_to(timing) if f"{REFERENCE} {setting}" in timings else None
        unknown = options.on_cpu and "compiled" in setting
        rows.append(
            {
                "model": f"{name} {size}",
                "setting": setting,
                "infer_samples_per_sec": batch_size / timing.median,
                "infer_step_time": 1000 * timing.median,
                "infer_step_time_spread": timing.spread,
                "infer_batch_size": batch_size,
                "infer_img_size": IMAGE_SIZE,
                "param_count": sum(weight.numel() for weight in models[name].parameters()) / 1e6,
                "infer_gmacs": gmacs[name],
                "infer_peak_memory": None if unknown else peak_bytes(named[key], options.device) / 2**20,
                "infer_speed_to_vit": speed,
                "infer_share_of_limit": speed * lengths["stellar"] / lengths["vit"] if name == "stellar" else None,
                "infer_speed_to_sdpa": timings[f"{name} {PLAIN}"].ratio_to(timing),
            }
        )
    return rows


def sequence_length(size: str, model: nn.Module) -> int:
    patches = (IMAGE_SIZE // SIZES[size]["patch_size"]) ** 2
    return 1 + patches + getattr(model.config, "num_sparse_tokens", 0)
