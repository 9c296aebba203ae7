# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
A model, or its decoder, as an ONNX file, for any batch, height and width. As a command: stellar-hf export.

    pip install onnx onnxscript onnxruntime
    python examples/export_onnx.py stellar-base-16 --output stellar.onnx
    python examples/export_onnx.py my-classifier --task image-classification --output classifier.onnx
    python examples/export_onnx.py my-stellar --task decoder --output decoder.onnx
"""

from stellar_hf.cli.export import check, export, load, parse_arguments
from stellar_hf.cli.process import errors_in_a_sentence


def main() -> None:
    with errors_in_a_sentence():
        args = parse_arguments()
        model = load(args.model, args.task)  # a module that takes and gives tensors alone, as ONNX does
        export(model, args.output)  # torch.onnx.export, with free axes
        check(model, args.output)  # in ONNX Runtime, at two sizes


if __name__ == "__main__":
    main()
