# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Model card and `all_results.json` tell the figures of their own model, whatever was in the folder before."""

import errno
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard

EARLIER = {"test_linear_accuracy": 0.99, "train_loss": 1.0}


@pytest.fixture
def folder(tmp_path):
    """The output folder, with the figures of an earlier model."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "all_results.json").write_text(json.dumps(EARLIER))
    return tmp_path / "run"


def results(folder: Path):
    return json.loads((folder / "all_results.json").read_text())


def card(trainer) -> ModelCard:
    trainer.create_model_card(dataset="noise")
    return ModelCard.load(Path(trainer.args.output_dir, "README.md"))


def shown(trainer):
    return {result.metric_name: result.metric_value for result in card(trainer).data.eval_results or []}


def test_figures_of_an_earlier_model_are_not_those_of_a_training(folder, make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert shown(trainer) == {}
    trainer.save_metrics("test", {"test_knn_accuracy": 0.5, "test_runtime": 1.0})
    trainer.save_metrics("train", {"train_loss": 2.0})
    assert results(folder) == {"test_knn_accuracy": 0.5, "test_runtime": 1.0, "train_loss": 2.0}
    assert shown(trainer) == {"test_knn_accuracy": 0.5}


def test_figures_of_an_earlier_model_are_not_those_of_a_measured_one(folder, make_trainer):
    trainer = make_trainer()
    assert shown(trainer) == {}
    trainer.save_metrics("test", {"test_knn_accuracy": 0.5})
    assert results(folder) == {"test_knn_accuracy": 0.5}
    assert shown(trainer) == {"test_knn_accuracy": 0.5}


def test_figures_of_a_finished_training_are_kept_when_it_is_loaded(folder, make_trainer):
    arguments = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(**arguments)
    trainer.train()
    trainer.save_metrics("train", {"train_loss": 2.0})
    trainer.save_metrics("test", {"test_knn_accuracy": 0.5})

    again = make_trainer(**arguments)
    again.load_finished(again.last_checkpoint())
    assert shown(again) == {"test_knn_accuracy": 0.5}
    again.save_metrics("test", {"test_knn_accuracy": 0.6})
    assert results(folder) == {"train_loss": 2.0, "test_knn_accuracy": 0.6}


def test_a_training_that_ended_before_its_figures_takes_no_earlier_ones(folder, make_trainer):
    arguments = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**arguments).train()
    again = make_trainer(**arguments)
    again.load_finished(again.last_checkpoint())
    assert shown(again) == {}


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"test_psnr": '])
def test_an_unreadable_file_of_results_ends_no_run(folder, make_trainer, content):
    trainer = make_trainer()
    trainer.save_metrics("test", {"test_knn_accuracy": 0.5})
    (folder / "all_results.json").write_text(content)
    assert shown(trainer) == {}
    trainer.save_metrics("test", {"test_knn_accuracy": 0.6})
    assert results(folder) == {"test_knn_accuracy": 0.6}


def test_figures_are_those_of_the_best_model_where_that_is_loaded(make_trainer):
    trainer = make_trainer()
    trainer.state.log_history = [{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_loss": 3.0}]
    assert trainer.known_metrics() == {"eval_loss": 3.0}
    trainer.args.load_best_model_at_end, trainer.state.best_global_step = True, 1
    assert trainer.known_metrics() == {"eval_loss": 1.0}


def test_figures_of_baselines_are_told_apart_from_the_models(make_trainer):
    trainer = make_trainer()
    own, others = {"test_psnr": 20.0}, {"kmeans_test_psnr": 9.0, "patch_means_test_psnr": 25.0, "train_loss": 1.0}
    trainer.save_metrics("test", own | others)
    assert trainer.known_metrics() == own
    assert trainer.known_baselines() == {"kmeans": {"test_psnr": 9.0}, "patch_means": {"test_psnr": 25.0}}


def test_a_model_is_evaluated_if_that_was_at_its_last_step_or_its_best(make_trainer):
    trainer = make_trainer()
    trainer.state.global_step = 3
    trainer.state.log_history = [{"step": step, "eval_loss": 1.0, "eval_runtime": 0.1} for step in (1, 2)]
    trainer.state.log_history.append({"step": 3, "loss": 1.0})
    assert not trainer.is_evaluated()
    trainer.args.load_best_model_at_end, trainer.state.best_global_step = True, 1
    assert trainer.is_evaluated()
    trainer.args.load_best_model_at_end, trainer.state.global_step = False, 2
    assert trainer.is_evaluated()


def test_card_says_how_many_own_images_there_were_and_not_where(make_trainer, tmp_path):
    images = list(np.zeros((4, 40, 40, 3), dtype=np.uint8))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    own_images = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features)
    trainer = make_trainer(train_dataset=own_images)
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "\nData: 4 images of 2 classes.\n" in text
    assert str(tmp_path) not in text


def test_full_disk_while_the_card_is_written(make_trainer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="The model card in .* could not be written: the disk is full"):
        trainer.create_model_card()
    assert list((tmp_path / "run").glob("*README*")) == []
