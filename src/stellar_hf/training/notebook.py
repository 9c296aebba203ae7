# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The log of a training as a person reads it in a notebook. Needs IPython, which every notebook has."""

from collections.abc import Sequence

from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from .callbacks import shown_values


class NotebookLossTableCallback(NotebookProgressCallback):
    """
    The Trainer's progress bar in a notebook, with each log of the training, and each evaluation, in a table below it.

    Args:
        columns: As in [`LossTableCallback`]; titled by their names in the log.
    """

    def __init__(self, columns: Sequence[tuple[str, str, str]]):
        super().__init__()
        self.columns = columns

    def on_train_begin(self, args, state, control, **kwargs):
        self.training_tracker = NotebookTrainingTracker(state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_tracker is not None and all(name in logs for name, _, _ in self.columns):
            values = {name.removesuffix("_loss"): form.format(logs[name]) for name, _, form in self.columns}
            self._write_line(self.training_tracker, state.global_step, values)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.training_tracker is None:
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            return
        self.training_tracker.remove_child()
        self.prediction_bar = None
        self._write_line(self.training_tracker, state.global_step, shown_values(metrics or {}))

    @staticmethod
    def _write_line(tracker: NotebookTrainingTracker, step: int, values: dict[str, str]) -> None:
        tracker.write_line({"step": step, **{name.replace("_", " "): value for name, value in values.items()}})
        tracker.display()
