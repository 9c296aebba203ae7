# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Writes the tokens S, the localization L and the labels of any image set to Parquet shards.

    python examples/extract_features.py                         # demo model, embedded photographs
    accelerate launch examples/extract_features.py --model_name_or_path stellar-base-16 \
        --image_dir photos --output_dir features --dataloader_num_workers 8 --dtype bfloat16 --top_k 4
    python examples/extract_features.py --faiss_index           # also an index over all tokens, and a query of it

Each process computes every so many shards, which are written aside and renamed: a command that was killed goes on
when it is repeated, also with another number of processes. Rows are in the order of the images, whoever made them.
"""

import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, HfArgumentParser
from transformers.utils import logging

import stellar_hf
from stellar_hf.data import UnreadableImages, images_to_tensor, load_images, load_photo_mosaics
from stellar_hf.features import build_token_index, import_faiss, nearest_tokens

SETTINGS_KEY = b"stellar_hf"


@dataclass
class Arguments:
    """Which model, which images, and what to write."""

    model_name_or_path: str = field(
        default=stellar_hf.DEMO_MODEL, metadata={"help": "STELLAR model: a folder, or owner/name on the Hub."}
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
    num_scenes: int = field(default=2000, metadata={"help": "Photo mosaics, where no images of your own are given."})
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

    @property
    def source(self) -> str:
        return self.image_dir or self.dataset_name or f"{self.num_scenes} photo mosaics"


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        run(args)
    except KeyboardInterrupt:
        print("\nInterrupted. To go on, repeat the command.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def run(args: Arguments) -> None:
    if args.faiss_index:
        import_faiss()  # whose absence is better known now than after the work
    logging.disable_progress_bar()  # of loading models
    # Processes wait for the slowest one at the end, however long it takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    with accelerator.main_process_first():
        images = open_images(args)
        model = load_model(args, accelerator.device)
        processor = load_processor(args.model_name_or_path)
    features = feature_types(args, model.config, images.features.get("label"))
    shards = plan_shards(args, len(images))
    settings = settings_of(args, len(images), features)
    if accelerator.is_main_process:
        prepare_folder(shards, settings)
    # One process looks what is left, since the others' shards may appear while a second one looks.
    (left,) = broadcast_object_list([[path for path in shards if not path.exists()]])
    own = {path: shards[path] for path in left[accelerator.process_index :: accelerator.num_processes]}

    unreadable = UnreadableImages(args.max_unreadable_share, consequence="It is left out.")
    batches = iter(make_loader(args, images, processor, own))
    num_images = sum(len(rows) for rows in own.values())
    with tqdm(total=num_images, unit=" images", disable=not (own and accelerator.is_main_process)) as progress:
        for path, indices in own.items():
            rows = []
            for _ in range(0, len(indices), args.batch_size):
                batch = next(batches)
                unreadable.count(batch["unreadable"], batch["num_images"])
                rows += [row for group in batch["groups"] for row in extract(model, group, args.top_k)]
                progress.update(batch["num_images"])
            write_shard(path, sorted(rows, key=lambda row: row["index"]), features, settings)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(args, shards, len(images), features)
        if args.faiss_index:
            index_tokens(args, shards)
    accelerator.end_training()


# Inputs --------------------------------------------------------------------------------------------------------------


def open_images(args: Arguments) -> datasets.Dataset:
    """The undecoded images and, if there are labels, the column `label`."""
    if args.image_dir or args.dataset_name:
        images = load_images(args.image_dir or args.dataset_name, args.dataset_split, image_column=args.image_column)
    else:
        images = load_photo_mosaics("test", args.num_scenes)
    if len(images) == 0:
        raise ValueError(f"The data set {args.source} has no rows: at least one image is needed.")
    label_column = args.label_column or "label"
    has_labels = label_column in images.features
    if args.image_column not in images.features or (args.label_column and not has_labels):
        raise ValueError(
            f"The data set has the columns {list(images.features)}, but not the image_column {args.image_column!r} "
            f"or the label_column {label_column!r}: set them."
        )
    images = images.select_columns([args.image_column, *([label_column] if has_labels else [])])
    if has_labels and label_column != "label":
        images = images.rename_column(label_column, "label")
    if isinstance(images.features[args.image_column], datasets.Image):
        images = images.cast_column(args.image_column, datasets.Image(decode=False))
    return images


def load_model(args: Arguments, device: torch.device):
    model = AutoModel.from_pretrained(args.model_name_or_path, dtype=getattr(torch, args.dtype))
    if model.config.model_type != "stellar":
        raise ValueError(
            f"{args.model_name_or_path} is a {model.config.model_type} model, which has no sparse tokens."
        )
    if args.top_k is not None and not 1 <= args.top_k <= model.config.num_sparse_tokens:
        raise ValueError(
            f"top_k is {args.top_k}, but must be in [1, {model.config.num_sparse_tokens}], the model's sparse tokens."
        )
    return model.to(device)


def load_processor(name: str):
    try:
        return AutoImageProcessor.from_pretrained(name)
    except ImportError:  # Transformers 5.17 without torchvision
        return stellar_hf.StellarImageProcessorPil.from_pretrained(name)


class ProcessedImages(Dataset):
    """Images one by one, since the processor may leave them in different sizes."""

    def __init__(self, images: datasets.Dataset, image_column: str, processor):
        self.images, self.image_column, self.processor = images, image_column, processor

    def __getitem__(self, index: int) -> dict:
        row = self.images[index]
        image = row.pop(self.image_column)
        if isinstance(image, dict) and not image["path"]:
            image["path"] = f"Image {index} of the data set"  # for the log
        try:
            (pixels,) = images_to_tensor([image])
        except ValueError as error:
            return {"unreadable": str(error)}
        inputs = self.processor(pixels, input_data_format="channels_first", return_tensors="pt")
        return {"index": index, "pixel_values": inputs["pixel_values"][0], **row}


def collate(rows: list[dict]) -> dict:
    """Stacks the images of each size."""
    groups = defaultdict(list)
    for row in rows:
        if "pixel_values" in row:
            groups[row["pixel_values"].shape].append(row)
    return {
        "num_images": len(rows),
        "unreadable": [row["unreadable"] for row in rows if "unreadable" in row],
        "groups": [
            {"pixel_values": torch.stack([row.pop("pixel_values") for row in group]), "rows": group}
            for group in groups.values()
        ],
    }


def make_loader(args: Arguments, images: datasets.Dataset, processor, shards: dict[Path, range]) -> DataLoader:
    """Batches of all shards in turn; none has images of two."""
    size = args.batch_size
    return DataLoader(
        ProcessedImages(images, args.image_column, processor),
        batch_sampler=[rows[i : i + size] for rows in shards.values() for i in range(0, len(rows), size)],
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_interrupt,
        pin_memory=torch.cuda.is_available(),
    )


def ignore_interrupt(worker_id: int) -> None:
    # A terminal sends Ctrl-C to the workers as well; the main process ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Features ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def extract(model, group: dict, top_k: int | None) -> list[dict]:
    """One row of features for each image of a group of equal size."""
    output = model(group["pixel_values"].to(model.device, non_blocking=True))
    tokens = output.sparse_tokens
    columns = {"tokens": tokens if tokens.dtype == torch.float16 else tokens.float()}
    if top_k is None:
        columns["localization"] = output.localization.half()
    else:
        largest = output.localization.topk(top_k)
        columns["localization_values"] = largest.values.half()
        columns["localization_indices"] = largest.indices.short()
    columns = {name: column.cpu().numpy() for name, column in columns.items()}
    return [
        {**row, "grid_size": output.grid_size[i].tolist(), **{name: column[i] for name, column in columns.items()}}
        for i, row in enumerate(group["rows"])
    ]


def feature_types(args: Arguments, config, label) -> datasets.Features:
    num_tokens, tokens_dtype = config.num_sparse_tokens, "float16" if args.dtype == "float16" else "float32"
    types = {
        "index": datasets.Value("int64"),
        "tokens": datasets.Array2D((num_tokens, config.hidden_size), tokens_dtype),
        "grid_size": datasets.List(datasets.Value("int32"), length=2),
    }
    if args.top_k is None:
        types["localization"] = datasets.Array2D((None, num_tokens), "float16")
    else:
        types["localization_values"] = datasets.Array2D((None, args.top_k), "float16")
        types["localization_indices"] = datasets.Array2D((None, args.top_k), "int16")
    return datasets.Features(types if label is None else {**types, "label": label})


# Shards --------------------------------------------------------------------------------------------------------------


def shard_folder(args: Arguments) -> Path:
    return Path(args.output_dir, "features")  # which holds nothing else, so that `datasets` can load it


def plan_shards(args: Arguments, num_images: int) -> dict[Path, range]:
    """The images of every shard."""
    rows = range(num_images)
    parts = [rows[start : start + args.shard_size] for start in range(0, num_images, args.shard_size)]
    return {
        shard_folder(args) / f"features-{number:05d}-of-{len(parts):05d}.parquet": part
        for number, part in enumerate(parts)
    }


def settings_of(args: Arguments, num_images: int, features: datasets.Features) -> dict:
    """What all shards of a folder must have in common; kept in each of them."""
    names = ("model_name_or_path", "source", "dataset_split", "image_column", "dtype", "top_k", "shard_size")
    settings = {name: getattr(args, name) for name in names}
    return {**settings, "num_images": num_images, "columns": list(features)}


def prepare_folder(shards: dict[Path, range], settings: dict) -> None:
    """Makes the folder, or checks that what it holds is a part of this very run."""
    folder = next(iter(shards)).parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.parquet")):
        found = json.loads((pq.read_schema(path).metadata or {}).get(SETTINGS_KEY, "{}"))
        different = [f"{name} = {found.get(name)!r}" for name in settings if found.get(name) != settings[name]]
        if different:
            raise ValueError(
                f"{path} was made with other settings ({', '.join(different)}): take another output_dir, or remove "
                "the folder."
            )


def write_shard(path: Path, rows: list[dict], features: datasets.Features, settings: dict) -> None:
    """Writes a shard aside and renames it, so that one that is there is whole."""
    columns = {name: [row[name] for row in rows] for name in features}
    table = datasets.Dataset.from_dict(columns, features=features).data.table
    table = table.replace_schema_metadata({**table.schema.metadata, SETTINGS_KEY: json.dumps(settings)})
    aside = path.with_name(f".{path.name}.unfinished")  # `datasets` does not look at hidden files
    with aside.open("wb") as file:
        with pq.ParquetWriter(file, table.schema, compression="zstd", use_dictionary=False) as writer:
            if rows:  # `datasets` loads a file without groups of rows, but not one with an empty group
                writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


# Results -------------------------------------------------------------------------------------------------------------


def report(args: Arguments, shards: dict[Path, range], num_images: int, features: datasets.Features) -> None:
    num_rows = sum(pq.read_metadata(path).num_rows for path in shards)
    if num_rows == 0:
        raise ValueError(f"None of the {num_images} images can be read.")
    left_out = f", {num_images - num_rows:,} could not be read and are left out" if num_rows < num_images else ""
    files = "1 shard" if len(shards) == 1 else f"{len(shards):,} shards"
    print(f"\nFeatures of {num_rows:,} images in {files}{left_out}: {', '.join(features)}\n")
    print(
        "    import datasets\n\n"
        f'    features = datasets.load_dataset("parquet", data_dir="{shard_folder(args)}", split="train")\n'
        f'    features.with_format("torch")[0]["tokens"]  # {features["tokens"].shape}\n'
    )


def index_tokens(args: Arguments, shards: Iterable[Path]) -> None:
    """Writes the index, and prints what it finds for the tokens of the first image."""
    features = datasets.load_dataset(
        "parquet", data_dir=str(shard_folder(args)), columns=["index", "tokens"], split="train", streaming=True
    ).with_format("numpy")
    index = build_token_index(batch["tokens"] for batch in tqdm(features.iter(1000), desc="index", leave=False))
    path = Path(args.output_dir, "tokens.faiss")
    aside = path.with_name(f".{path.name}.unfinished")
    import_faiss().write_index(index, str(aside))
    aside.replace(path)
    print(f"Index of {index.ntotal:,} tokens: {path}\n")

    queries = next(iter(features))["tokens"]
    num_tokens = len(queries)
    if index.ntotal == num_tokens:
        return
    images = np.concatenate([pq.read_table(shard, columns=["index"])["index"].to_numpy() for shard in shards])
    k = min(3, index.ntotal - num_tokens)
    matches = nearest_tokens(index, queries, num_tokens, k, exclude_images=[0] * num_tokens)
    print(f"Nearest tokens of other images, by cosine, for those of image {images[0]}:\n")
    for query, found in enumerate(zip(matches.images, matches.slots, matches.similarities, strict=True)):
        names = [f"image {images[row]} token {slot} ({cosine:.2f})" for row, slot, cosine in zip(*found, strict=True)]
        print(f"    token {query}  →  {',  '.join(names)}")
    print(
        "\n    import faiss\n"
        "    from stellar_hf.evaluation import nearest_tokens\n\n"
        f'    index = faiss.read_index("{path}")\n'
        f'    nearest_tokens(index, features.with_format("numpy")[0]["tokens"], num_sparse_tokens={num_tokens})\n'
    )


if __name__ == "__main__":
    main()
