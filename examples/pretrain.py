# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Pre-trains STELLAR: the Python API, with the arguments of the command stellar-hf pretrain.

    python examples/pretrain.py                                 # tabletop scenes, minutes on a CPU
    python examples/pretrain.py --train_dir photos --output_dir out
    accelerate launch --num_processes 8 examples/pretrain.py examples/recipes/imagenet_base_16.yaml

The same command goes on from the newest checkpoint. `stellar-hf pretrain --help` tells all arguments.
"""

import sys

from stellar_hf import StellarTrainer
from stellar_hf.cli.pretrain import (
    build_model,
    load_vq_model,
    open_eval_images,
    open_images,
    parse_arguments,
    prepare,
    train_and_measure,
    training_images,
)
from stellar_hf.cli.process import errors_in_a_sentence
from stellar_hf.training import default_processor


def pretrain(argv: list[str]) -> None:
    # The last are StellarTrainingArguments, which are TrainingArguments of Transformers.
    model_args, data_args, training_args = parse_arguments(argv)
    prepare(model_args, data_args, training_args)  # seed, cores, sizes that fit the images

    # StellarForPreTraining(StellarConfig(reconstruction_target="pixels", image_size=64, ...)), or one that starts from
    # weights: StellarForPreTraining.from_vit_pretrained("facebook/vit-mae-base").
    model = build_model(model_args)
    vq_model = load_vq_model(model_args)  # None: pixels are reconstructed, no codes

    # Any data set with a column of images, such as load_images("photos") or load_dataset("owner/name", split="train").
    view_size = training_args.views(model.config).global_size
    images = open_images(data_args, training_args, view_size)

    trainer = StellarTrainer(
        model,
        training_args,
        train_dataset=training_images(images, data_args, training_args),
        eval_dataset=open_eval_images(data_args, training_args, view_size),
        processing_class=default_processor(model, training_args.background),
        vq_model=vq_model,
    )

    # trainer.train(resume_from_checkpoint=trainer.last_checkpoint()) and trainer.save_model(), between two
    # measurements; then the pipeline, a figure and the model card.
    train_and_measure(trainer, images, vq_model, model_args, data_args)


def main() -> None:
    with errors_in_a_sentence():
        pretrain(sys.argv[1:])


if __name__ == "__main__":
    main()
