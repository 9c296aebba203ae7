# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Trains a classifier on STELLAR's sparse tokens: a linear probe, or the whole model.

    python examples/image_classification.py                     # linear probe of the demo model, embedded photographs
    python examples/image_classification.py --freeze_encoder false --learning_rate 3e-4   # fine-tuning
    python examples/image_classification.py --model_name_or_path stellar-base-16 \
        --train_dir photos/train --test_dir photos/test --output_dir out   # one subfolder for each class

Everything is the stock Trainer of Transformers: its flags work (python examples/image_classification.py --help).
"""

import sys
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import stellar_hf
from stellar_hf.data import load_photo_mosaics
from stellar_hf.evaluation import Accuracy
from stellar_hf.features import load_processor
from stellar_hf.image_processing_pil_stellar import to_rgb


@dataclass
class Arguments:
    """Which model and which images."""

    model_name_or_path: str = field(
        default=stellar_hf.DEMO_MODEL, metadata={"help": "STELLAR model: a folder, or owner/name on the Hub."}
    )
    freeze_encoder: bool = field(default=True, metadata={"help": "Linear probe; false trains the encoder, too."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a subfolder of images for each class."})
    test_dir: str | None = field(default=None, metadata={"help": "The same, for testing."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or its local folder."})
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    test_split: str = field(default="test", metadata={"help": "Split of the data set to test on."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    num_train_images: int = field(default=4000, metadata={"help": "Embedded photographs: crops to train on."})
    num_test_images: int = field(default=1000, metadata={"help": "Embedded photographs: crops to test on."})


@dataclass
class ClassificationArguments(TrainingArguments):
    output_dir: str = field(default="stellar-classifier", metadata={"help": "Where the model is written."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images of a step and process."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images of an evaluation step."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the training images."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to test."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: images are processed late."}
    )


def main() -> None:
    args, training_args = HfArgumentParser((Arguments, ClassificationArguments)).parse_args_into_dataclasses()
    try:
        run(args, training_args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def run(args: Arguments, training_args: TrainingArguments) -> None:
    set_seed(training_args.seed)
    data = load_images(args)
    names = data["train"].features[args.label_column].names
    processor = load_processor(args.model_name_or_path)
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    if args.freeze_encoder:
        model.stellar.requires_grad_(False)

    def to_inputs(batch: dict) -> dict:
        return {
            "pixel_values": processor(batch[args.image_column], return_tensors="pt")["pixel_values"],
            "labels": torch.tensor(batch[args.label_column]),
        }

    accuracy = Accuracy()
    trainer = Trainer(
        model,
        training_args,
        train_dataset=data["train"].with_transform(to_inputs),
        eval_dataset=data["test"].with_transform(to_inputs),
        processing_class=processor,
        compute_metrics=lambda prediction: accuracy.compute(
            predictions=prediction.predictions.argmax(-1), references=prediction.label_ids
        ),
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate(metric_key_prefix="test")
    trainer.save_metrics("test", metrics)
    if trainer.is_world_process_zero():
        kind = "linear probe" if args.freeze_encoder else "fine-tuned model"
        print(f"\nTest accuracy of the {kind}: {100 * metrics['test_accuracy']:.1f} %\n")
        show_predictions(training_args.output_dir, processor, data["test"], args)


def load_images(args: Arguments) -> datasets.DatasetDict:
    if (args.train_dir is None) != (args.test_dir is None):
        raise ValueError("train_dir and test_dir belong together: give both, or neither.")
    if args.train_dir is not None:
        files = {"train": f"{args.train_dir}/**", "test": f"{args.test_dir}/**"}
        data = datasets.load_dataset("imagefolder", data_files=files)
    elif args.dataset_name is not None:
        data = datasets.DatasetDict(
            train=datasets.load_dataset(args.dataset_name, split=args.train_split),
            test=datasets.load_dataset(args.dataset_name, split=args.test_split),
        )
    else:
        data = datasets.DatasetDict(
            train=load_photo_mosaics("train", args.num_train_images, num_regions=1),
            test=load_photo_mosaics("test", args.num_test_images, num_regions=1),
        )
    for split in data.values():
        feature = split.features.get(args.label_column)
        if args.image_column not in split.features or not isinstance(feature, datasets.ClassLabel):
            raise ValueError(
                f"The data set has the columns {list(split.features)}, but images in {args.image_column!r} and "
                f"classes in {args.label_column!r} are needed: set image_column and label_column."
            )
    return data


def show_predictions(folder: str, processor, images: datasets.Dataset, args: Arguments, count: int = 8) -> None:
    classify = pipeline("image-classification", model=folder, image_processor=processor)
    names = images.features[args.label_column].names
    for index in np.linspace(0, len(images) - 1, min(count, len(images))).astype(int):
        row = images[int(index)]
        best = classify(to_rgb(row[args.image_column]), top_k=1)[0]
        mark = "✓" if best["label"] == names[row[args.label_column]] else "✗"
        print(f"  {mark} {names[row[args.label_column]]:<20} → {best['label']:<20} {100 * best['score']:3.0f} %")
    print(f"\nModel and image processor: {folder}")


if __name__ == "__main__":
    main()
