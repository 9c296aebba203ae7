# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Protocols tell what was measured and with what, and results are kept."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch

from stellar_hf.evaluation import Result, ResultFile
from stellar_hf.evaluation.protocol import hub_revision, package_versions


def test_revision_of_a_data_set_from_the_hub():
    sha = "0123456789abcdef0123456789abcdef01234567"
    dataset = datasets.Dataset.from_dict({"label": [0]})
    assert hub_revision(dataset) is None
    dataset.info.download_checksums = {f"hf://datasets/ethz/food101@{sha}/data/train-0.parquet": {}}
    assert hub_revision(dataset) == sha


def test_versions_of_the_packages():
    versions = package_versions()
    assert versions["torch"] == torch.__version__ and versions["datasets"] == datasets.__version__


# Results -------------------------------------------------------------------------------------------------------------


RESULT = Result("mine", "model", "knn", {"seed": 0, "sizes": (1, 2)}, {"sparse mean": {"accuracy": 0.5}})


def test_results_are_found_by_an_equal_protocol(tmp_path):
    file = ResultFile(tmp_path / "new" / "results.json")
    file.add(RESULT)
    found = file.find("mine", "knn", {"sizes": (1, 2), "seed": 0})
    assert found is not None and found.metrics["sparse mean"]["accuracy"] == 0.5
    assert file.find("mine", "knn", {"sizes": (1, 2), "seed": 1}) is None
    assert file.find("mine", "linear", RESULT.protocol) is None
    assert file.find("yours", "knn", RESULT.protocol) is None


def test_a_result_is_replaced_by_its_successor_and_no_other_is(tmp_path):
    file = ResultFile(tmp_path / "results.json")
    file.add(RESULT)
    file.add(dataclasses.replace(RESULT, task="linear"))
    file.add(dataclasses.replace(RESULT, metrics={"sparse mean": {"accuracy": np.float32(0.25)}}))
    assert [(result.task, result.metrics["sparse mean"]["accuracy"]) for result in file.read()] == [
        ("linear", 0.5),
        ("knn", 0.25),
    ]
    assert json.loads((tmp_path / "results.json").read_text())["results"]


def test_two_runs_may_write_to_a_file(tmp_path):
    first, second = (ResultFile(tmp_path / "results.json") for _ in range(2))
    first.add(RESULT)
    second.add(dataclasses.replace(RESULT, model="yours"))
    assert len(first.read()) == 2


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "results.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(ValueError, match="no file of results"):
        ResultFile(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == '{"accuracy": 0.5}'


def test_a_number_that_json_cannot_hold_is_refused_before_the_file_is_touched(tmp_path):
    file = ResultFile(tmp_path / "results.json")
    file.add(RESULT)
    with pytest.raises(TypeError, match="object"):
        file.add(dataclasses.replace(RESULT, task="linear", metrics={"x": {"y": object()}}))
    assert len(file.read()) == 1
