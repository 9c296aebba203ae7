# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The run that measures models on tasks, one after the other.

    data = load_embedded_data()
    for result in evaluate_models([load_subject("owner/name")], data, tasks=["knn", "objects"]):
        print(result.task, result.metrics)

A task of a model is a step: its result is kept when it is there, and not measured again by an equal protocol.
"""

from __future__ import annotations

import datetime
import difflib
import time
from collections.abc import Iterable, Iterator, Sequence

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from .presets import EvaluationData, Splits
from .protocol import Result, ResultFile, as_json, package_versions
from .subjects import RunSettings, Subject, Task, untrained
from .tasks import TASKS

logger = logging.get_logger(__name__)


def evaluate_models(
    subjects: Iterable[Subject],
    data: EvaluationData,
    tasks: Sequence[str] | None = None,
    settings: RunSettings | None = None,
    results: ResultFile | None = None,
    baselines: bool = False,
) -> Iterator[Result]:
    """Measures models on tasks.

    Args:
        subjects: Models, each with its processor; from a generator, they need not be in memory together.
        data: What each task is measured on.
        tasks: Names of tasks; by default all that the data have columns for.
        settings: How they are measured.
        results: Where results are kept. One that is there already, by an equal protocol, is given again and not
            measured; the others are added to it by the main process.
        baselines: Whether to measure also what was never trained, and an untrained network of each model.

    Yields:
        Results, each when it is there. A model that cannot be measured on a task is named and left out.

    Raises:
        ValueError: If a task does not exist or the data lack a column for it, before anything is measured.
    """
    settings = settings or RunSettings()
    wanted = [_task(name, data) for name in tasks or data.tasks]
    chosen = [task for task in TASKS.values() if task in wanted]  # those of the same features one after the other
    beside: dict[str, tuple[Subject, list[Task]]] = {}
    for subject in subjects:
        yield from _measure_all(chosen, subject, data, settings, results)
        if baselines:
            yield from _measure_all(chosen, untrained(subject, settings.seed), data, settings, results)
        if baselines and not beside:
            beside = _baselines_of(chosen, subject)
    for baseline, own_tasks in beside.values():
        yield from _measure_all(own_tasks, baseline, data, settings, results)


def _baselines_of(tasks: Sequence[Task], subject: Subject) -> dict[str, tuple[Subject, list[Task]]]:
    """Each baseline by its name, with the tasks that it is one of; they see what a model sees."""
    found: dict[str, tuple[Subject, list[Task]]] = {}
    for task in tasks:
        for baseline in task.baselines(subject):
            found.setdefault(baseline.name, (baseline, []))[1].append(task)
    return found


def _measure_all(
    tasks: Sequence[Task],
    subject: Subject,
    data: EvaluationData,
    settings: RunSettings,
    results: ResultFile | None,
) -> Iterator[Result]:
    for task in tasks:
        reason = task.missing(subject, settings)
        if reason is None:
            yield _measure(task, subject, data.splits[task.name], settings, results)
        elif settings.is_main_process and subject.kind == "model":
            logger.warning(f"{subject.name} {reason}: it is left out of {task.name}.")


def _measure(
    task: Task, subject: Subject, splits: Splits, settings: RunSettings, results: ResultFile | None
) -> Result:
    protocol = {
        **splits.protocol(),
        **subject.protocol,
        "settings": task.settings(splits, settings),
        "seed": settings.seed,
    }
    found = [results.find(subject.name, task.name, protocol) if results and settings.is_main_process else None]
    if settings.accelerator is not None and settings.accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    start = time.monotonic()
    result = Result(
        model=subject.name,
        kind=subject.kind,
        task=task.name,
        protocol=as_json(protocol),
        metrics=as_json(task.measure(subject, splits, settings)),
        source=subject.source,
        versions=package_versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
    )
    if results is not None and settings.is_main_process:
        results.add(result)
    return result


def _task(name: str, data: EvaluationData) -> Task:
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(TASKS)}."
        raise ValueError(f"There is no task {name!r}: {hint}")
    task = TASKS[name]
    if name not in data.splits:
        raise ValueError(f"{data.name} has nothing to measure {name} on: {_what_it_needs(task)}")
    missing = [need for need in task.needs if getattr(data.splits[name], need) is None]
    if missing:
        raise ValueError(f"{data.name} has nothing to measure {name} on: {_what_it_needs(task)}")
    return task


_NEEDS = {
    "train": "images to learn from (--train_dir, or --train_split of a data set)",
    "label_column": "a class for each image (--label_column, or a folder of images for each class)",
    "mask_column": "a mask for each image (--mask_column)",
    "object_columns": "the embedded scenes, whose objects are known (no --dataset_name, --test_dir or --preset)",
}


def _what_it_needs(task: Task) -> str:
    return f"it needs {' and '.join(_NEEDS[need] for need in task.needs)}. Leave it out of --tasks, or give that."
