# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What evaluations measure and draw while a model is trained."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stellar_hf import StellarForPreTraining, StellarTrainer, StellarTrainingArguments
from stellar_hf.evaluation import psnr
from stellar_hf.training import default_processor
from stellar_hf.training.evaluation import FigureCallback, ImageEvaluation, sample_rows

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
    """Builds a trainer of a tiny model; evaluations draw figures, most of their time, where a test asks for them."""

    def make(train_dataset=None, eval_dataset=None, figures=False, **arguments):
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
        trainer = StellarTrainer(
            StellarForPreTraining(tiny_config()),
            StellarTrainingArguments(**{**defaults, **arguments}),
            train_dataset=colored_images(24, 0) if train_dataset is None else train_dataset,
            eval_dataset=colored_images(9, 1) if eval_dataset is None else eval_dataset,
        )
        if not figures:
            trainer.pop_callback(FigureCallback)
        return trainer

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


def test_maps_and_tokens_of_whole_data_sets_are_not_kept(tiny_config):
    """Which take many times the memory of what is measured."""
    kept = set()

    class Evaluation(ImageEvaluation):
        def encode(self, *args, **kwargs):
            features = super().encode(*args, **kwargs)
            kept.update(features.tensors)
            return features

    model = StellarForPreTraining(tiny_config())
    evaluation = Evaluation(Accelerator(cpu=True), default_processor(model), "image", "label", 8, 0, 24)
    train, test = colored_images(24, 0), colored_images(9, 1)
    evaluation.measure_at_start(model, test, train, "eval")
    assert evaluation(model, test, train)["knn_at_start"] == evaluation.knn_at_start["eval"] > 0.5
    assert kept == {"pooler_output", "psnr"}


def with_a_broken_row(tmp_path, count=9):
    """Rows of coloured images, the fifth of which cannot be read."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        {"image": np.asarray(image), "label": index % 3}
        for index, image in enumerate(colored_images(count, 1)["image"])
    ]
    return [*rows[:4], {"image": {"path": str(tmp_path / "broken.png"), "bytes": None}, "label": 0}, *rows[4:]]


def test_an_unreadable_image_counts_in_no_measure_and_is_named_once(make_trainer, tmp_path, caplog):
    rows = with_a_broken_row(tmp_path)
    expected = make_trainer(eval_dataset=[row for row in rows if "path" not in row["image"]]).evaluate()
    trainer = make_trainer(eval_dataset=rows, figures=True)
    for _ in range(2):
        metrics = trainer.evaluate()
        assert metrics["eval_psnr"] == pytest.approx(expected["eval_psnr"], rel=1e-6)
        assert metrics["eval_knn_accuracy"] == 1.0
    assert caplog.text.count("broken.png cannot be read") == 1


def test_the_objective_is_the_mean_over_the_images_that_can_be_read(make_trainer, tmp_path):
    """One batch has a broken image among others, another one nothing else."""
    *whole, last = [{"image": np.asarray(image)} for image in colored_images(6, 1)["image"]]
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = {"image": {"path": str(tmp_path / "broken.png"), "bytes": None}}
    trainer = make_trainer(per_device_eval_batch_size=3)
    rows = [*whole[:3], whole[3], broken, whole[4], broken, broken, broken, last]
    losses = {}

    def keep(model, args, inputs, output):
        if output.loss is not None:
            losses.setdefault(len(inputs["pixel_values"]), []).append(output.loss.item())

    trainer.model.register_forward_hook(keep, with_kwargs=True)
    found = trainer.evaluate(rows)["eval_loss"]
    assert [len(losses[size]) for size in (3, 2, 1)] == [1, 1, 2]
    expected = (3 * losses[3][0] + 2 * losses[2][0] + losses[1][1]) / 6
    assert found == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_of_nothing_that_can_be_read_is_refused(make_trainer, tmp_path):
    rows = [{"image": {"path": str(tmp_path / "gone.png"), "bytes": None}}] * 3
    with pytest.raises(ValueError, match="None of the 3 images to measure on can be read"):
        make_trainer(eval_dataset=rows).evaluate()


def test_unreadable_images_of_an_evaluation_do_not_stop_the_training(make_trainer, tmp_path):
    trainer = make_trainer(
        eval_dataset=with_a_broken_row(tmp_path),
        max_unreadable_share=0.0,
        eval_strategy="steps",
        eval_steps=2,
        figures=True,
    )
    assert trainer.train().global_step == 2


def test_an_evaluation_does_not_wake_a_frozen_encoder(make_trainer):
    trainer = make_trainer(figures=True)
    frozen = trainer.model.train().stellar.eval()
    figures = next(callback for callback in trainer.callback_handler.callbacks if "Figure" in type(callback).__name__)
    figures.on_evaluate(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert trainer.model.training and not any(module.training for module in frozen.modules())


def test_a_training_does_not_wake_a_frozen_encoder(make_trainer):
    trainer = make_trainer()
    model = trainer.model.train()
    model.stellar.requires_grad_(False).eval()
    awake = []
    model.register_forward_pre_hook(
        lambda *_: awake.append(
            (model.training, model.decoder.training, any(m.training for m in model.stellar.modules()))
        )
    )
    trainer.train()
    assert set(awake) == {(True, True, False)}


# Classes -------------------------------------------------------------------------------------------------------------


def named_images(names, colors, seed):
    """One image for each colour; the classes are those names that occur, in alphabetical order, as folders are."""
    known = sorted(set(names))
    images = colored_images(3 * len(colors), seed)["image"]
    rows = {"image": [images[color] for color in colors], "label": [known.index(name) for name in names]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=known)})
    return datasets.Dataset.from_dict(rows, features=features)


def test_classes_are_compared_by_their_names(make_trainer, caplog):
    """The folders of the evaluation lack the first class of the training, and have one that is not trained."""
    train = named_images(["blue", "green", "red"] * 6, [1, 2, 0] * 6, seed=0)
    measured = named_images(["green", "red", "red", "yellow"], [2, 0, 0, 1], seed=1)
    metrics = make_trainer(train_dataset=train, eval_dataset=measured).evaluate()
    assert metrics["eval_knn_accuracy"] == 1.0
    assert metrics["eval_knn_majority"] == pytest.approx(2 / 3)
    assert caplog.text.count("no class yellow") == 1


def test_no_class_in_common_leaves_the_knn_accuracy_out(make_trainer):
    train = named_images(["blue", "red"] * 6, [1, 0] * 6, seed=0)
    metrics = make_trainer(train_dataset=train, eval_dataset=named_images(["tree"], [2], seed=1)).evaluate()
    assert "eval_knn_accuracy" not in metrics and "eval_psnr" in metrics


def test_the_accuracy_at_the_start_stands_beside_the_later_ones(make_trainer):
    """Also where a training goes on from a checkpoint."""
    arguments = {"learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(**arguments, save_strategy="steps", save_steps=1)
    start = trainer.evaluate()["eval_knn_accuracy"]
    assert "eval_knn_at_start" not in trainer.evaluate()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_knn_accuracy" in log and log["step"] > 0]
    assert [log["eval_knn_at_start"] for log in logs] == [start, start]

    first = f"{trainer.args.output_dir}/checkpoint-1"
    resumed = make_trainer(**arguments)
    resumed.train(resume_from_checkpoint=first)
    assert resumed.state.log_history[-2]["eval_knn_at_start"] == start


# Figures and choices -------------------------------------------------------------------------------------------------


def test_shown_rows_are_of_all_classes_and_always_the_same():
    images = colored_images(30, 0).sort("label")
    rows = sample_rows(images, 6)
    labels = [images[row]["label"] for row in rows]
    assert set(labels[:3]) == set(labels[3:]) == {0, 1, 2}
    assert sample_rows(images, 6) == rows != sample_rows(images, 6, seed=1)
    assert sorted(sample_rows(images, 100)) == list(range(30))
    assert len(set(sample_rows([{"image": None}] * 30, 8))) == 8  # rows whose classes are not known


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
    make_trainer(eval_strategy="steps", eval_steps=1, report_to=["tensorboard"], figures=True).train()
    for step in (1, 2):
        with Image.open(tmp_path / "run" / "figures" / f"step-{step:07d}.png") as figure:
            assert min(figure.size) > 500
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [image.step for image in events.Images("eval/reconstructions")] == [1, 2]
    assert len(events.Scalars("eval/knn_accuracy")) == 2


def test_an_evaluation_goes_on_without_its_figure(make_trainer, tmp_path, caplog):
    """Of whose images none can be read, or for which there is no place on the disk."""
    broken = {"image": {"path": str(tmp_path / "gone.png"), "bytes": None}}
    rows = [broken] * 17
    (whole,) = set(range(17)) - set(sample_rows(rows, 16))
    rows[whole] = {"image": np.asarray(colored_images(1, 1)[0]["image"])}
    assert make_trainer(eval_dataset=rows, figures=True).evaluate()["eval_psnr"] > 0
    assert "no figure of step 0, and the training goes on: None of the 16 images can be read" in caplog.text

    (tmp_path / "run" / "figures").mkdir(parents=True)
    (tmp_path / "run" / "figures" / "step-0000000.png").symlink_to("/dev/full")
    assert make_trainer(figures=True).evaluate()["eval_psnr"] > 0
    assert "goes on: [Errno 28]" in caplog.text


def test_figures_are_sent_to_weights_and_biases(make_trainer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    make_trainer(eval_strategy="steps", eval_steps=1, report_to=["wandb"], figures=True).train()
    wandb.finish()
    assert len(list(tmp_path.rglob("media/images/eval/reconstructions_*.png"))) == 2
