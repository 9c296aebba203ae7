# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Exports a STELLAR model to ONNX, for any batch, height and width, and checks the file in ONNX Runtime.

    pip install onnx onnxscript onnxruntime
    stellar-hf export stellar-base-16 --output stellar.onnx
    stellar-hf export my-classifier --task image-classification --output classifier.onnx

The feature extractor's outputs are last_hidden_state, pooler_output, sparse_tokens and localization; those of
image-classification and image-segmentation are logits, that of image-reconstruction is reconstruction, and the
backbone's are its feature maps by name.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import (
    StellarBackbone,
    StellarConfig,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForSemanticSegmentation,
    StellarModel,
)
from .process import errors_in_a_sentence

TASKS: dict[str, tuple[Any, list[str]]] = {
    "feature-extraction": (StellarModel, ["last_hidden_state", "pooler_output", "sparse_tokens", "localization"]),
    "image-classification": (StellarForImageClassification, ["logits"]),
    "image-segmentation": (StellarForSemanticSegmentation, ["logits"]),
    "image-reconstruction": (StellarForImageReconstruction, ["reconstruction"]),
    "backbone": (StellarBackbone, ["feature_maps"]),
}
TOLERANCE = 1e-4


class TensorOutputs(nn.Module):
    """The outputs of a model by name, as a plain tuple; a backbone's feature maps one by one."""

    config: StellarConfig
    names: list[str]

    def __init__(self, model: Any, outputs: list[str]):
        super().__init__()
        self.model, self.config, self.outputs = model, model.config, outputs
        self.names = model.out_features if outputs == ["feature_maps"] else outputs

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(pixel_values=pixel_values)
        if self.outputs == ["feature_maps"]:
            return outputs.feature_maps
        return tuple(outputs[name] for name in self.outputs)


def main() -> None:
    with errors_in_a_sentence():
        args = parse_arguments()
        model_class, outputs = TASKS[args.task]
        model = TensorOutputs(model_class.from_pretrained(args.model), outputs).eval()
        export(model, args.output)
        check(model, args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model, or owner/name on the Hub")
    parser.add_argument("--task", choices=TASKS, default="feature-extraction")
    parser.add_argument("--output", type=Path, default=Path("stellar.onnx"))
    return parser.parse_args()


def example_images(config: StellarConfig, batch_size: int, height: int, width: int) -> torch.Tensor:
    """Noise of the statistics of normalized images; sizes count patches."""
    generator = torch.Generator().manual_seed(0)
    size = (height * config.patch_size, width * config.patch_size)
    return torch.randn(batch_size, config.num_channels, *size, generator=generator)


@torch.no_grad()
def export(model: TensorOutputs, path: Path) -> None:
    """Writes the model; batch, height and width stay free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    auto = torch.export.Dim.AUTO
    torch.onnx.export(
        model,
        (example_images(model.config, 3, 5, 4),),
        str(path),
        input_names=["pixel_values"],
        output_names=model.names,
        dynamic_shapes={"pixel_values": {0: auto, 2: auto, 3: auto}},
        external_data=False,
        dynamo=True,
        verbose=False,
    )


@torch.no_grad()
def check(model: TensorOutputs, path: Path) -> None:
    """
    Compares the file, in ONNX Runtime, with the model at two sizes of images, and says how far they differ.

    Raises:
        ValueError: If an output differs by more than `TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    config = model.config
    side = config.image_size // config.patch_size
    worst = 0.0
    for batch_size, height, width in ((1, side, side), (2, 6, 3)):
        images = example_images(config, batch_size, height, width)
        results = session.run(None, {"pixel_values": images.numpy()})
        for result, expected in zip(results, model(images), strict=True):
            worst = max(worst, (torch.from_numpy(result) - expected).abs().max().item())
    if worst > TOLERANCE:
        raise ValueError(f"{path} differs from the model by {worst:.1e}, more than {TOLERANCE:.0e}.")
    size = path.stat().st_size / 1e6
    print(f"{path} ({size:.1f} MB): ONNX Runtime agrees with the model to {worst:.1e}, at two sizes of images.")


if __name__ == "__main__":
    main()
