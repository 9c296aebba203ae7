# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Exports a STELLAR model, or its decoder, to ONNX, for any batch, height and width, and checks the file in ONNX Runtime.

    pip install onnx onnxscript onnxruntime
    stellar-hf export stellar-base-16 --output stellar.onnx
    stellar-hf export my-classifier --task image-classification --output classifier.onnx
    stellar-hf export my-stellar --task decoder --output decoder.onnx

The feature extractor's outputs are last_hidden_state, pooler_output, sparse_tokens and localization; those of
image-classification and image-segmentation are logits, that of image-reconstruction is reconstruction, and the
backbone's are its feature maps by name. The decoder takes sparse_tokens and localization, for any batch and number of
tokens, over the patches of the model's image_size, and gives the reconstruction.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import (
    StellarBackbone,
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
    "decoder": (StellarForImageReconstruction, ["reconstruction"]),
}
TOLERANCE = 1e-4


class TensorOutputs(nn.Module):
    """The outputs of a model by name, as a plain tuple; a backbone's feature maps one by one."""

    free_axes = {"pixel_values": (0, 2, 3)}
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

    def examples(self) -> list[dict[str, torch.Tensor]]:
        """Inputs of three sizes: noise of the statistics of normalized images."""
        patch_size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        return [
            {"pixel_values": noise(batch_size, self.config.num_channels, rows * patch_size, columns * patch_size)}
            for batch_size, rows, columns in ((3, 5, 4), (1, side, side), (2, 6, 3))
        ]


class Decoder(nn.Module):
    """The decoder of a model for reconstruction, over the square of patches of its image_size."""

    free_axes = {"sparse_tokens": (0, 1), "localization": (0, 2)}

    def __init__(self, model: StellarForImageReconstruction, outputs: list[str]):
        super().__init__()
        self.model, self.config, self.names = model, model.config, outputs

    def forward(self, sparse_tokens: torch.Tensor, localization: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model.decode(sparse_tokens, localization),)

    def examples(self) -> list[dict[str, torch.Tensor]]:
        """Inputs of three sizes: noise, and maps that are as sharp as those of a model."""
        num_patches = (self.config.image_size // self.config.patch_size) ** 2
        return [
            {
                "sparse_tokens": noise(batch_size, num_tokens, self.config.hidden_size),
                "localization": noise(batch_size, num_patches, num_tokens).mul(4).softmax(dim=2),
            }
            for batch_size, num_tokens in ((3, 5), (1, self.config.num_sparse_tokens), (2, 9))
        ]


def main() -> None:
    with errors_in_a_sentence():
        args = parse_arguments()
        model = load(args.model, args.task)
        export(model, args.output)
        check(model, args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model, or owner/name on the Hub")
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="feature-extraction",
        help="what the file computes, see above; feature-extraction by default",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("stellar.onnx"), help="file to write, stellar.onnx by default"
    )
    return parser.parse_args()


def load(name: str, task: str) -> TensorOutputs | Decoder:
    """The module of a task: ONNX knows tensors alone, so it takes and gives these."""
    model_class, outputs = TASKS[task]
    module = Decoder if task == "decoder" else TensorOutputs
    return module(model_class.from_pretrained(name), outputs).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def export(model: TensorOutputs | Decoder, path: Path) -> None:
    """Writes the model; its `free_axes` stay free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = model.examples()[0]
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        str(path),
        input_names=list(inputs),
        output_names=model.names,
        dynamic_shapes={name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in model.free_axes.items()},
        external_data=False,
        dynamo=True,
        verbose=False,
    )


@torch.no_grad()
def check(model: TensorOutputs | Decoder, path: Path) -> None:
    """
    Compares the file, in ONNX Runtime, with the model at two sizes of its inputs, and says how far they differ.

    Raises:
        ValueError: If an output differs by more than `TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in model.examples()[1:]:
        results = session.run(None, {name: values.numpy() for name, values in inputs.items()})
        for result, expected in zip(results, model(**inputs), strict=True):
            worst = max(worst, (torch.from_numpy(result) - expected).abs().max().item())
    if worst > TOLERANCE:
        raise ValueError(f"{path} differs from the model by {worst:.1e}, more than {TOLERANCE:.0e}.")
    size = path.stat().st_size / 1e6
    print(f"{path} ({size:.1f} MB): ONNX Runtime agrees with the model to {worst:.1e}, at two sizes of its inputs.")


if __name__ == "__main__":
    main()
