# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
A model as an ONNX file, for any batch, height and width. As a command: stellar-hf export.

    pip install onnx onnxscript onnxruntime
    python examples/export_onnx.py stellar-base-16 --output stellar.onnx
    python examples/export_onnx.py my-classifier --task image-classification --output classifier.onnx
"""

from stellar_hf.cli.export import TASKS, TensorOutputs, check, export, parse_arguments
from stellar_hf.cli.process import errors_in_a_sentence


def main() -> None:
    with errors_in_a_sentence():
        args = parse_arguments()
        model_class, outputs = TASKS[args.task]  # such as StellarModel, and the names of its outputs
        # ONNX knows tensors alone: a module that returns them instead of a dataclass.
        model = TensorOutputs(model_class.from_pretrained(args.model), outputs).eval()
        export(model, args.output)  # torch.onnx.export, with free axes
        check(model, args.output)  # in ONNX Runtime, at two sizes


if __name__ == "__main__":
    main()
