# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Protocols tell what was measured: hashes of weights and data, the preparation of images; and results are kept."""

import dataclasses
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stellar_hf import StellarImageProcessorPil, StellarModel
from stellar_hf.data import load_images
from stellar_hf.evaluation import Result, ResultFile
from stellar_hf.evaluation.protocol import (
    data_fingerprint,
    hub_revision,
    package_versions,
    processor_protocol,
    weights_fingerprint,
)


@pytest.fixture
def photos(tmp_path):
    """A folder of five images of two classes."""
    for index in range(5):
        path = tmp_path / "photos" / ("dog" if index % 2 else "cat") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 50 * index, 0)).save(path)
    return tmp_path / "photos"


# Fingerprints --------------------------------------------------------------------------------------------------------


def test_weights_are_known_again_and_a_single_one_tells(tiny_config, tmp_path):
    model = StellarModel(tiny_config())
    fingerprint = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(StellarModel.from_pretrained(tmp_path)) == fingerprint and len(fingerprint) == 16
    assert weights_fingerprint(model.half()) != fingerprint
    model.float()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert weights_fingerprint(model) != fingerprint


def test_images_are_known_again_in_another_folder(photos, tmp_path):
    fingerprint = data_fingerprint(load_images(photos))
    shutil.copytree(photos, tmp_path / "elsewhere" / "copy")
    assert data_fingerprint(load_images(tmp_path / "elsewhere" / "copy")) == fingerprint

    Image.new("RGB", (8, 8), (9, 9, 9)).save(photos / "cat" / "0.png")
    assert data_fingerprint(load_images(photos)) != fingerprint


def test_labels_masks_and_lengths_tell(photos):
    images = load_images(photos)
    fingerprints = {
        data_fingerprint(images),
        data_fingerprint(images.select(range(4))),
        data_fingerprint(images.remove_columns("label")),
        data_fingerprint(images.remove_columns("label").add_column("label", [0, 0, 0, 0, 1])),
        data_fingerprint(images.add_column("mask", [np.zeros((2, 2)).tolist()] * 5)),
    }
    assert len(fingerprints) == 5


def test_revision_of_a_data_set_from_the_hub():
    sha = "0123456789abcdef0123456789abcdef01234567"
    dataset = datasets.Dataset.from_dict({"label": [0]})
    assert hub_revision(dataset) is None
    dataset.info.download_checksums = {f"hf://datasets/ethz/food101@{sha}/data/train-0.parquet": {}}
    assert hub_revision(dataset) == sha


def test_the_preparation_of_images_is_told_by_names():
    told = processor_protocol(StellarImageProcessorPil())
    assert told["resize"] == {"shortest_edge": 256} and told["crop"] == {"height": 224, "width": 224}
    assert told["resampling"] == "bicubic" and told["mean"] == [0.485, 0.456, 0.406]
    whole = processor_protocol(StellarImageProcessorPil(do_center_crop=False, do_resize=False))
    assert whole["resize"] is whole["crop"] is whole["resampling"] is None


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
