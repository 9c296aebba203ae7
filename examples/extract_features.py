# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Writes tokens S, localization L and labels of any image set to Parquet shards. As a command: stellar-hf extract.

    python examples/extract_features.py                         # demo model, tabletop scenes
    accelerate launch examples/extract_features.py --model_name_or_path stellar-base-16 \
        --image_dir photos --output_dir features --dataloader_num_workers 8 --dtype bfloat16 --top_k 4
    python examples/extract_features.py --faiss_index           # also an index over all tokens, and a query of it

A command that was killed goes on when it is repeated, also with another number of processes.
"""

import sys

from transformers import AutoModel

from stellar_hf.cli.extract import (
    ExtractionArguments,
    open_images,
    parse_arguments,
    patient_accelerator,
    report,
    report_index,
)
from stellar_hf.cli.process import errors_in_a_sentence
from stellar_hf.features import load_processor, save_features


def extract(args: ExtractionArguments) -> None:
    accelerator = patient_accelerator()  # an Accelerator, whose processes share the shards out
    with accelerator.main_process_first():
        images = open_images(args)  # as load_images("photos"): any data set with a column of images
        model = AutoModel.from_pretrained(args.model_name_or_path, dtype=args.dtype)
        processor = load_processor(args.model_name_or_path)

    # In memory instead: features = encode_images(model, images, processor); features.sparse_tokens
    shards = save_features(
        model.to(accelerator.device),
        images,
        processor,
        args.output_dir,
        top_k=args.top_k,
        shard_size=args.shard_size,
        settings=args.settings,
        image_column=args.image_column,
        label_column=args.label_column or "label",
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
        accelerator=accelerator,
        max_unreadable_share=args.max_unreadable_share,
    )
    if accelerator.is_main_process:
        report(shards)
        if args.faiss_index:
            report_index(args.output_dir)  # index_features, nearest_tokens
    accelerator.end_training()


def main() -> None:
    with errors_in_a_sentence(after_interrupt="Repeat the command to go on: whole shards are kept."):
        extract(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
