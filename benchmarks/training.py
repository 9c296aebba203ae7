# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Steps of the main job, from reading images to the log; with --baseline, beside those of another checkout."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback

from .harness import Options, Row, is_installed, progress, time_in_turns

ROOT = Path(__file__).parents[1]
STEPS_OF_A_TURN = 10


def run(options: Options) -> list[Row]:
    if not is_installed("datasets"):
        return []
    sources = {"ours": ROOT / "src"}
    if options.baseline is not None:
        sources["baseline"] = options.baseline.resolve()
    progress("a training in a process of its own for each variant, of which one takes steps at a time")
    trainings = {name: Training(source, options) for name, source in sources.items()}
    turns = 1 if options.quick else 12
    steps = {name: training.take_steps for name, training in trainings.items()}
    # The first steps load libraries; the learning rate is still near zero in them.
    timings = time_in_turns(steps, options.device, turns=turns, warm_up=1 if options.quick else 2)
    rows = []
    for name, training in trainings.items():
        timing = timings[name]
        row: Row = {
            "model": name,
            "train_samples_per_sec": STEPS_OF_A_TURN * training.batch_size / timing.median,
            "train_step_time": 1000 * timing.median / STEPS_OF_A_TURN,
            "train_step_time_spread": timing.spread,
            "train_batch_size": training.batch_size,
            "train_loss": training.loss,
            "train_steps": training.num_steps,
        }
        if "baseline" in timings:
            row["train_speed_to_baseline"] = timings["baseline"].ratio_to(timing)
        rows.append(row)
        training.end()
    return rows


class Training:
    """A process that trains as the recipe tabletop_scenes says, some steps whenever it is asked to."""

    def __init__(self, source: Path, options: Options):
        self._folder = tempfile.TemporaryDirectory()
        flags = ["--output_dir", self._folder.name]
        if options.on_cpu:
            flags.append("--use_cpu")
        if options.quick:
            flags += ["--num_train_scenes", "512", "--per_device_train_batch_size", "8"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(torch.get_num_threads()), *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.batch_size = int(self._read())
        self.num_steps, self.loss = 0, float("nan")

    def take_steps(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.num_steps += STEPS_OF_A_TURN
        self.loss = float(self._read())

    def end(self) -> None:
        self._process.kill()  # at a milder signal it would save a checkpoint
        self._process.wait()
        self._folder.cleanup()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"A training has ended with status {self._process.wait()}: see above.")
        return line


class OnDemand(TrainerCallback):
    """Waits for a line of the standard input before every few steps, and answers with the loss of those before."""

    def __init__(self, answers):
        self.answers = answers

    def on_train_begin(self, args, state, control, **kwargs):
        print(args.train_batch_size, file=self.answers, flush=True)
        sys.stdin.readline()

    def on_log(self, args, state, control, logs=None, **kwargs):
        print(logs["loss"], file=self.answers, flush=True)
        sys.stdin.readline()


def train(num_threads: int, flags: list[str]) -> None:
    answers = sys.stdout
    sys.stdout = open(os.devnull, "w")  # for whatever else is printed
    from stellar_hf import StellarTrainer
    from stellar_hf.cli.pretrain import build_model, open_images, parse_arguments, prepare

    settings = {"save_strategy": "no", "report_to": "none", "disable_tqdm": "true", "log_level": "error"}
    settings["logging_steps"] = str(STEPS_OF_A_TURN)
    given = [part for name, value in settings.items() for part in (f"--{name}", value)]
    model_args, data_args, training_args = parse_arguments([*given, *flags])
    prepare(model_args, data_args, training_args)
    torch.set_num_threads(num_threads)
    model = build_model(model_args)
    images = open_images(data_args, training_args, training_args.views(model.config).global_size)
    StellarTrainer(model, training_args, train_dataset=images, callbacks=[OnDemand(answers)]).train()


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2:])
