# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Figures of the model that a trainer has, never of one that was in the output folder before."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.utils import logging

from .checkpoint_files import Checkpoint

RESULTS_NAME = "all_results.json"
_BASELINE = re.compile(r"(?P<baseline>\w+?)_(?P<name>(eval|test)_\w+)")

logger = logging.get_logger(__name__)


class ResultsTrainer(Trainer):
    """
    `Trainer` whose `all_results.json` begins anew with each training, and otherwise with the first figures that are
    saved; only what a finished training left, whose model `load_finished` takes, is added to. Figures of a model that
    was in the folder before stay in the files of single splits, such as `test_results.json`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._results = _Results(Path(str(self.args.output_dir), RESULTS_NAME))
        self.add_callback(self._results)

    def load_finished(self, checkpoint: Checkpoint) -> None:
        """As in [`CheckpointTrainer`]."""
        super().load_finished(checkpoint)  # type: ignore[misc]
        self._results.are_own = True

    def load_earlier(self, checkpoint: Checkpoint) -> None:
        """As in [`CheckpointTrainer`]; `all_results.json` begins anew."""
        super().load_earlier(checkpoint)  # type: ignore[misc]
        if self.is_world_process_zero():
            self._results.begin()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As in `Trainer`; an `all_results.json` of another model, or one that cannot be read, begins anew."""
        if self.is_world_process_zero() and combined and not self._results.read():
            self._results.begin()
        super().save_metrics(split, metrics, combined)

    def known_metrics(self) -> dict[str, float]:
        """Figures of evaluations and tests of this model, the latest of each name, without their speed."""
        results: dict[str, Any] = {}
        for log in _logs_of_model(self.state, self._best_step):
            results.update(log)
        results.update(self._results.read())
        speed = ("_runtime", "_per_second")
        return {
            name: value
            for name, value in results.items()
            if name.startswith(("eval_", "test_")) and not name.endswith(speed) and isinstance(value, int | float)
        }

    def known_baselines(self) -> dict[str, dict[str, float]]:
        """
        Figures that `all_results.json` has beside this model's: by what was measured, such as `kmeans` for
        `kmeans_test_psnr`, and by the figure's name, `test_psnr`.
        """
        baselines: dict[str, dict[str, float]] = {}
        for name, value in self._results.read().items():
            if match := _BASELINE.fullmatch(name):
                baselines.setdefault(match["baseline"], {})[match["name"]] = value
        return baselines

    def is_evaluated(self) -> bool:
        """Whether the logs have an evaluation of the model as the training left it: at its last step, or its best."""
        step = self._best_step or self.state.global_step
        return any("eval_runtime" in log and log.get("step") == step for log in self.state.log_history)

    @property
    def _best_step(self) -> int | None:
        return self.state.best_global_step if self.args.load_best_model_at_end else None


class _Results(TrainerCallback):
    """The file, and whether what is in it is of the trainer's own model."""

    def __init__(self, file: Path):
        self.file = file
        self.are_own = False

    def on_train_begin(self, args, state, control, **kwargs):
        # At the beginning and not when the first figures are saved: the process may end between the two, and the next
        # one would take what is there for the finished training's.
        if state.is_world_process_zero:
            self.begin()

    def begin(self) -> None:
        self.file.unlink(missing_ok=True)
        self.are_own = True

    def read(self) -> dict[str, Any]:
        if not self.are_own or not self.file.exists():
            return {}
        try:
            return dict(json.loads(self.file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            logger.warning(f"{self.file} cannot be read ({error}): its figures are left out.")
            return {}


def _logs_of_model(state: TrainerState, best_step: int | None) -> Iterable[dict[str, Any]]:
    """The logs that say something of the model: all of them, or those of the step that gave the best one."""
    return (log for log in state.log_history if not best_step or log.get("step") == best_step)
