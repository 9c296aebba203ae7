# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Measures models by the protocols of the paper, beside baselines that were never trained. As a command: stellar-hf
evaluate.

    python examples/evaluate_models.py                                 # demo model, embedded tabletop scenes
    accelerate launch --num_processes 8 examples/evaluate_models.py --model_name_or_path stellar-base-16 \
        --preset imagenet-1k --tasks knn linear --dataloader_num_workers 8 --dtype bfloat16

A command that was killed goes on when it is repeated, also with another number of processes.
"""

import sys

from stellar_hf.cli.evaluate import (
    EvaluationArguments,
    load_subjects,
    open_data,
    open_results,
    parse_arguments,
    report,
    settings_of,
)
from stellar_hf.cli.extract import patient_accelerator
from stellar_hf.cli.process import errors_in_a_sentence
from stellar_hf.evaluation import evaluate_models


def evaluate(args: EvaluationArguments) -> None:
    accelerator = patient_accelerator()  # an Accelerator, whose processes share the images out
    results = open_results(args, accelerator)  # ResultFile("results.json"), which keeps what is finished
    measured = []
    for seed in args.seeds:
        with accelerator.main_process_first():
            data = open_data(args, seed)  # load_embedded_data(), load_preset("food101"), load_own_images("photos")

        # Each result is there as soon as its task is done: result.metrics are numbers, result.protocol is how they
        # came about. Subjects are load_subject("owner/name"), or Subject("mine", model, processor) of any encoder.
        for result in evaluate_models(
            load_subjects(args, accelerator),
            data,
            tasks=args.tasks or None,
            settings=settings_of(args, seed, accelerator),  # RunSettings(seed=0, num_neighbours=20, ...)
            results=results,
            baselines=args.with_baselines,
        ):
            measured.append(result)
    if accelerator.is_main_process:
        report(args, measured)  # format_markdown(build_tables(measured, METRICS)), a figure, files for the Hub
    accelerator.end_training()


def main() -> None:
    with errors_in_a_sentence():
        evaluate(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
