# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What evaluations measure and draw while a model is trained."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stellar_hf import StellarForPreTraining, StellarTrainer, StellarTrainingArguments
from stellar_hf.evaluation import psnr
from stellar_hf.training import default_processor

COLORS = np.array([[220, 40, 30], [30, 60, 210], [40, 200, 50]])


def colored_images(count, seed):
    """Images of three colours with noise, the colour being the class; of different sizes."""
    rng = np.random.default_rng(seed)
    rows = {"image": [], "label": []}
    for index in range(count):
        noise = rng.integers(-20, 20, (40 + index, 50, 3))
        rows["image"].append(Image.fromarray((COLORS[index % 3] + noise).clip(0, 255).astype(np.uint8)))
        rows["label"].append(index % 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["r", "b", "g"])})
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def make_trainer(tiny_config, tmp_path):
    def make(train_dataset=None, eval_dataset=None, **arguments):
        torch.manual_seed(0)
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "num_global_views": 1,
            "num_local_views": 0,
            "disable_tqdm": True,
            "use_cpu": True,
            "save_strategy": "no",
        }
        return StellarTrainer(
            StellarForPreTraining(tiny_config()),
            StellarTrainingArguments(**{**defaults, **arguments}),
            train_dataset=colored_images(24, 0) if train_dataset is None else train_dataset,
            eval_dataset=colored_images(9, 1) if eval_dataset is None else eval_dataset,
        )

    return make


def test_knn_accuracy_and_psnr_of_whole_images(make_trainer):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    assert metrics["eval_knn_accuracy"] == 1.0  # colours survive a network with random weights

    model, images = trainer.model.eval(), colored_images(9, 1)["image"][:]
    pixel_values = default_processor(model)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values, return_loss=False)
    expected = psnr(output.reconstruction, model.denormalize(pixel_values).clamp(0, 1)).mean().item()
    assert metrics["eval_psnr"] == pytest.approx(expected, rel=1e-5)


def test_neighbours_are_those_of_the_labels(make_trainer):
    """With labels that have nothing to do with the images, neighbours know nothing."""
    wrong = colored_images(24, 0)
    wrong = wrong.remove_columns("label").add_column("label", [(2 * row + 1) % 3 for row in range(24)])
    assert make_trainer(train_dataset=wrong).evaluate()["eval_knn_accuracy"] <= 0.4


def test_images_without_classes_give_the_psnr_alone(make_trainer):
    with_classes, without = colored_images(24, 0), colored_images(24, 0).remove_columns("label")
    for arguments in (
        {"train_dataset": without},
        {"train_dataset": with_classes, "eval_dataset": without},
        {"num_knn_images": 0},
        {"train_dataset": with_classes.to_iterable_dataset().repeat(None)},
    ):
        metrics = make_trainer(**arguments).evaluate()
        assert "eval_psnr" in metrics and "eval_knn_accuracy" not in metrics


def test_few_neighbours_are_spread_over_the_training_data(make_trainer):
    # Sorted by class, the first nine rows would know two classes alone.
    sorted_rows = colored_images(24, 0).sort("label")
    assert make_trainer(train_dataset=sorted_rows, num_knn_images=9).evaluate()["eval_knn_accuracy"] == 1.0


def test_an_unreadable_image_does_not_count(make_trainer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        {"image": np.asarray(image), "label": index % 3} for index, image in enumerate(colored_images(9, 1)["image"])
    ]
    rows.insert(4, {"image": {"path": str(tmp_path / "broken.png"), "bytes": None}, "label": 0})
    assert make_trainer(eval_dataset=rows).evaluate()["eval_knn_accuracy"] == 1.0


def test_the_best_model_can_be_chosen_by_what_is_measured(make_trainer):
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="psnr",
        greater_is_better=True,
        learning_rate=1e-2,
    )
    trainer.train()
    ratios = [log["eval_psnr"] for log in trainer.state.log_history if "eval_psnr" in log]
    assert len(ratios) == 2 and trainer.state.best_metric == max(ratios)


def test_figures_are_saved_and_sent_to_tensorboard(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make_trainer(eval_strategy="steps", eval_steps=1, report_to=["tensorboard"]).train()
    for step in (1, 2):
        with Image.open(tmp_path / "run" / "figures" / f"step-{step:07d}.png") as figure:
            assert min(figure.size) > 500
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [image.step for image in events.Images("eval/reconstructions")] == [1, 2]
    assert len(events.Scalars("eval/knn_accuracy")) == 2


def test_figures_are_sent_to_weights_and_biases(make_trainer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    make_trainer(eval_strategy="steps", eval_steps=1, report_to=["wandb"]).train()
    wandb.finish()
    assert len(list(tmp_path.rglob("media/images/eval/reconstructions_*.png"))) == 2
