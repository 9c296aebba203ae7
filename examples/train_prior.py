# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Trains a prior over tokens and localization, and draws from it: the Python API, with the arguments of the command
stellar-hf train-prior.

    python examples/train_prior.py                              # demo model, tabletop scenes, minutes on a CPU
    python examples/extract_features.py --image_dir photos --output_dir features
    accelerate launch --num_processes 8 examples/train_prior.py --features_dir features --output_dir out

The same command goes on from the newest checkpoint. `stellar-hf train-prior --help` tells all arguments.
"""

import sys
from pathlib import Path

from stellar_hf import StellarTokenPrior, StellarTokenPriorPipeline
from stellar_hf.cli.inputs import load_pipeline
from stellar_hf.cli.process import errors_in_a_sentence
from stellar_hf.cli.train_prior import (
    measure_and_draw,
    parse_arguments,
    prepare,
    prior_sizes,
    read_features,
    sample_factors,
    train_or_go_on,
)
from stellar_hf.prior import StellarTokenPriorTrainer


def train_prior(argv: list[str]) -> None:
    # The last are TrainingArguments of Transformers.
    args, training_args = parse_arguments(argv)
    prepare(training_args)  # cores and seed

    # A StellarPipeline, by whose model images became features, and become images again.
    pipe = load_pipeline(args.model_name_or_path, args.pipeline_name_or_path, training_args.device)

    # Rows with S (r, d), L (N, r) and class, such as ExtractedTokens("features") of what stellar-hf extract wrote.
    features = read_features(pipe, args, training_args)
    tokens, localization = sample_factors(features)  # S (n, r, d) and L (n, N, r) of some images

    # StellarTokenPrior(num_sparse_tokens=8, token_size=96, grid_size=(16, 16), class_names=["cat", "dog"], ...)
    prior = StellarTokenPrior(**prior_sizes(features, args))
    prior.set_statistics(tokens, localization)

    # trainer.train(resume_from_checkpoint=trainer.last_checkpoint()), or load what is finished.
    trainer = StellarTokenPriorTrainer(prior, training_args, args.class_dropout, train_dataset=features.rows)
    train_or_go_on(trainer, args)
    if not trainer.is_world_process_zero():
        return

    # The average of the weights draws: prior_pipe(["cat", "dog"], guidance_scale=2.0).images
    prior_pipe = StellarTokenPriorPipeline(**pipe.components, prior=trainer.average.eval())
    prior_pipe.save_pretrained(Path(training_args.output_dir, "pipeline"))
    measure_and_draw(trainer, pipe, prior_pipe, features, args)


def main() -> None:
    with errors_in_a_sentence():
        train_prior(sys.argv[1:])


if __name__ == "__main__":
    main()
