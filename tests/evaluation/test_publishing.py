# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Results reach the Hub in its forms, and touch nothing of a model card but what is theirs."""

import math

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from stellar_hf import StellarModel
from stellar_hf.evaluation import METRICS, Result, update_model_card, write_eval_results
from stellar_hf.hub_stellar import write_model_card

REVISION = "0123456789abcdef0123456789abcdef01234567"


def result(value=0.5, dataset_id="ethz/food101"):
    protocol = {"data": "Food-101", "test_split": "validation", "test_images": 25250, "seed": 0}
    if dataset_id:
        protocol |= {"dataset_id": dataset_id, "dataset_revision": REVISION}
    found = {"sparse mean": {"accuracy": value}, "cls": {"accuracy": math.nan}}
    return Result("mine", "model", "knn", protocol, found, date="2026-11-24T21:00:00+00:00")


CARD = """\
---
license: mit
tags:
- mine
model-index:
- name: mine
  results:
  - task:
      type: image-classification
    dataset:
      type: cifar10
      name: CIFAR-10
    metrics:
    - type: accuracy
      value: 0.9
---
# My model

My own words, with a [link](https://example.org).
"""


def test_numbers_of_data_sets_on_the_hub_are_written_as_the_hub_reads_them(tmp_path):
    (path,) = write_eval_results(tmp_path, [result(), result(dataset_id=None)])
    assert path == tmp_path / ".eval_results" / "food101.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ethz/food101", "knn_sparse_mean_accuracy", 0.5)
    assert entry.dataset_revision == REVISION and entry.date == "2026-11-24T21:00:00+00:00"
    assert "test images 25250" in entry.notes
    assert write_eval_results(tmp_path, [result(dataset_id=None)]) == []


def test_a_card_keeps_all_that_is_not_ours(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    update_model_card(tmp_path, [result(0.4)], METRICS)
    update_model_card(tmp_path, [result(0.5)], METRICS)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.tags == ["mine"]
    found = {(entry.dataset_name, entry.metric_name): entry.metric_value for entry in card.data.eval_results}
    assert found == {("CIFAR-10", None): 0.9, ("Food-101", "knn, sparse mean: accuracy"): 0.5}
    assert "My own words, with a [link](https://example.org)." in card.text
    assert card.text.count("## Evaluation") == 1 and "| **mine** | sparse mean | 50.0 |" in card.text
    assert "40.0" not in card.text
    assert (tmp_path / ".eval_results" / "food101.yaml").exists()


def test_a_card_is_begun_where_there_is_none(tmp_path):
    update_model_card(tmp_path, [result()], METRICS)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == tmp_path.name and len(card.data.eval_results) == 1


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_card_of_ours_is_still_brought_up_to_date_and_one_of_a_person_is_still_theirs(
    tiny_config, tmp_path, is_edited
):
    model = StellarModel(tiny_config())
    write_model_card(tmp_path, model)
    if is_edited:
        with (tmp_path / "README.md").open("a") as card:
            card.write("\nMine.\n")
    update_model_card(tmp_path, [result()], METRICS)
    assert "## Evaluation" in (tmp_path / "README.md").read_text()
    write_model_card(tmp_path, model, name="Another name")
    assert ("# Another name" in (tmp_path / "README.md").read_text()) != is_edited
