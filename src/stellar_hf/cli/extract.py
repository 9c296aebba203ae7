# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Writes the tokens S, the localization L and the labels of any image set to Parquet shards.

    stellar-hf extract                                          # demo model, embedded scenes
    stellar-hf extract --image_dir photos --output_dir photo-features --dtype bfloat16 --top_k 4
    stellar-hf extract --faiss_index                            # also an index over all tokens, and a query of it
    accelerate launch -m stellar_hf.cli.extract --image_dir photos --dataloader_num_workers 8

Each process computes every so many shards, which are written aside and renamed: a command that was killed goes on
when it is repeated, also with another number of processes. Rows are in the order of the images, whoever made them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import datasets
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from .. import DEMO_MODEL
from ..data import load_images, load_tabletop_scenes
from ..features import (
    FeatureShards,
    import_faiss,
    index_features,
    load_features,
    load_processor,
    nearest_tokens,
    save_features,
)
from .parser import CommandParser
from .process import errors_in_a_sentence

NUM_HITS = 3


@dataclass
class ExtractionArguments:
    """Which model, which images, and what to write."""

    model_name_or_path: str = field(
        default=DEMO_MODEL, metadata={"help": "STELLAR model: a folder, or owner/name on the Hub."}
    )
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images, searched with its subfolders; or folder or pattern of shards (WebDataset, "
            "Parquet, Arrow)."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or its local folder."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column that is kept as 'label'; by default 'label', where there is one."}
    )
    num_scenes: int = field(default=2000, metadata={"help": "Tabletop scenes, where no images of your own are given."})
    output_dir: str = field(default="stellar-features", metadata={"help": "Folder of the results."})
    batch_size: int = field(default=64, metadata={"help": "Images of a forward pass."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images, for each process."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision of the model. Tokens are stored in float16 if it is that, in float32 otherwise.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Keep only so many entries of each row of L, the largest ones."}
    )
    shard_size: int = field(default=1000, metadata={"help": "Images of a shard: what a killed process loses at most."})
    max_unreadable_share: float = field(
        default=0.01,
        metadata={
            "help": "Images that cannot be read are named and left out; the run stops when they are more than this "
            "share of the images that a process has seen, or of 1000."
        },
    )
    faiss_index: bool = field(
        default=False, metadata={"help": "Whether to index all tokens for a search by cosine (needs faiss-cpu)."}
    )

    def __post_init__(self):
        if self.image_dir is not None and self.dataset_name is not None:
            raise ValueError("Both image_dir and dataset_name are given: choose one source of images.")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"dataloader_num_workers is {self.dataloader_num_workers}, but must be at least 0.")
        if self.faiss_index:
            import_faiss()  # whose absence is better known now than after the work

    @property
    def source(self) -> str:
        return self.image_dir or self.dataset_name or f"{self.num_scenes} tabletop scenes"

    @property
    def settings(self) -> dict[str, Any]:
        """What all shards of a folder must have in common, besides what the shards know themselves."""
        names = ("model_name_or_path", "source", "dataset_split", "image_column")
        return {name: getattr(self, name) for name in names}


def main() -> None:
    with errors_in_a_sentence(after_interrupt="Repeat the command to go on: whole shards are kept."):
        run(parse_arguments(sys.argv[1:]))


def parse_arguments(argv: Sequence[str]) -> ExtractionArguments:
    (args,) = CommandParser(ExtractionArguments, description=__doc__).parse(argv)
    return args


def run(args: ExtractionArguments) -> None:
    logging.disable_progress_bar()  # of loading models
    accelerator = patient_accelerator()
    with accelerator.main_process_first():
        images = open_images(args)
        model = load_model(args)
        processor = load_processor(args.model_name_or_path)
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
            report_index(args.output_dir)
    accelerator.end_training()


# Inputs --------------------------------------------------------------------------------------------------------------


def patient_accelerator() -> Accelerator:
    """Whose processes wait for the slowest one at the end, however long it takes."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


def open_images(args: ExtractionArguments) -> datasets.Dataset:
    """The images that the arguments name, with the columns that they name."""
    if source := args.image_dir or args.dataset_name:
        images = load_images(source, args.dataset_split, image_column=args.image_column)
    else:
        images = load_tabletop_scenes("test", args.num_scenes)
    missing = {args.image_column, args.label_column or args.image_column} - set(images.features)
    if missing:
        raise ValueError(
            f"The data set has the columns {list(images.features)}, but not the image_column {args.image_column!r} "
            f"or the label_column {args.label_column or 'label'!r}: set them."
        )
    return images


def load_model(args: ExtractionArguments) -> PreTrainedModel:
    return AutoModel.from_pretrained(args.model_name_or_path, dtype=args.dtype)


# Results -------------------------------------------------------------------------------------------------------------


def report(shards: FeatureShards) -> None:
    """Says what was written, and how to load it."""
    num_missing = shards.num_images - shards.num_rows
    left_out = f", without {num_missing:,} that cannot be read" if num_missing else ""
    files = "1 shard" if len(shards.files) == 1 else f"{len(shards.files):,} shards"
    print(f"\nFeatures of {shards.num_rows:,} images in {files}{left_out}: {', '.join(shards.columns)}\n")
    print(
        "    import datasets\n\n"
        f'    features = datasets.load_dataset("parquet", data_dir="{shards.folder}", split="train")\n'
        f'    features.with_format("torch")[0]["tokens"]  # {shards.columns["tokens"].shape}\n'
    )


def report_index(output_dir: str) -> None:
    """Writes an index of all tokens, and shows what it finds for those of the first image."""
    index = index_features(output_dir)
    print(f"Index of {index.ntotal:,} tokens: {output_dir}/tokens.faiss\n")
    rows = load_features(output_dir)
    queries = rows.with_format("numpy")[0]["tokens"]
    num_tokens = len(queries)
    if index.ntotal == num_tokens:
        return
    k = min(NUM_HITS, index.ntotal - num_tokens)
    matches = nearest_tokens(index, queries, num_tokens, k, exclude_images=[0] * num_tokens)

    def name(row: int) -> str:
        image = rows.select_columns([column for column in ("path", "index") if column in rows.features])[row]
        return image.get("path") or f"image {image['index']}"

    print(f"Nearest tokens of other images, by cosine, for those of {name(0)}:\n")
    for query, found in enumerate(zip(matches.images, matches.slots, matches.similarities, strict=True)):
        hits = [f"{name(int(row))} token {slot} ({cosine:.2f})" for row, slot, cosine in zip(*found, strict=True)]
        print(f"    token {query}  →  {',  '.join(hits)}")
    print(
        "\n    import faiss\n"
        "    from stellar_hf.features import nearest_tokens\n\n"
        f'    index = faiss.read_index("{output_dir}/tokens.faiss")\n'
        f'    nearest_tokens(index, features.with_format("numpy")[0]["tokens"], num_sparse_tokens={num_tokens})\n'
    )


if __name__ == "__main__":
    main()
