# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a training run computes, logs, saves and refuses."""

import copy
import json
import math
import signal
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, TrainerCallback, TrainingArguments

from stellar_hf import StellarConfig, StellarForPreTraining, StellarModel, StellarTrainer, StellarTrainingArguments
from stellar_hf.data import StellarCollator, StellarViews
from stellar_hf.modeling_stellar import LOSS_TERMS
from stellar_hf.training import GracefulInterruptCallback, default_processor

IMAGES = [{"image": image} for image in np.random.default_rng(0).integers(0, 256, (10, 40, 40, 3), dtype=np.uint8)]


class Recorder(TrainerCallback):
    """Calls functions at events: `Recorder(on_step_end=lambda model, **kwargs: ...)`."""

    def __init__(self, **functions):
        for event, function in functions.items():
            setattr(self, event, lambda args, state, control, function=function, **kwargs: function(**kwargs))


class KeepGradients(TrainerCallback):
    """Gradients of each step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def record_forwards(model):
    """Inputs, random state and losses of every forward from now on."""
    forwards = []

    def before(module, args, inputs):
        forwards.append({"inputs": inputs, "rng_state": torch.get_rng_state()})

    def after(module, args, output):
        if output.loss is None:  # an evaluation of whole images
            forwards.pop()
        else:
            forwards[-1]["losses"] = {name: output[name].item() for name in (*LOSS_TERMS, "loss")}

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)
    return forwards


def training_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


# What is logged ------------------------------------------------------------------------------------------------------


def test_logged_terms_are_means_over_steps_and_add_up_to_the_logged_loss(make_trainer):
    # 5 batches of an epoch make steps of 2, 2 and 1 forwards.
    trainer = make_trainer(gradient_accumulation_steps=2, logging_steps=3)
    forwards = record_forwards(trainer.model)
    trainer.train()
    values = [forward["losses"] for forward in forwards]
    assert len(values) == 5
    (log,) = training_logs(trainer)
    for name in (*LOSS_TERMS, "loss"):
        steps = [(values[0][name] + values[1][name]) / 2, (values[2][name] + values[3][name]) / 2, values[4][name]]
        assert log[name] == pytest.approx(sum(steps) / 3, rel=1e-5), name
    assert sum(log[name] for name in LOSS_TERMS) == pytest.approx(log["loss"], rel=1e-5)
    diagnostics = (
        "prototype_entropy",
        "slot_information",
        "token_diversity",
        "localization_sharpness",
        "matched_fraction",
    )
    assert all(0 <= log[name] <= 1 for name in diagnostics)


def test_each_log_covers_its_own_steps(make_trainer):
    trainer = make_trainer()
    forwards = record_forwards(trainer.model)
    trainer.train()
    logged = [log["masked_loss"] for log in training_logs(trainer)]
    assert logged == pytest.approx([forward["losses"]["masked_loss"] for forward in forwards], rel=1e-5)


def test_progress_is_a_table(make_trainer, capsys):
    trainer = make_trainer(disable_tqdm=False, eval_dataset=IMAGES[:2], eval_strategy="steps", eval_steps=3)
    trainer.add_callback(Recorder(on_train_begin=lambda **_: trainer.log({"note": "not a number", "share": 0.5})))
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    own, title, *rows, evaluation, summary = lines
    assert own.split() == ["0", "note", "not", "a", "number", "share", "0.5"]
    assert title.split()[:3] == ["step", "loss", "reconstr"]
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3]
    assert all(len(row) == len(title) <= 100 and all(map(math.isfinite, map(float, row.split()))) for row in rows)
    assert "eval_loss" in evaluation
    assert summary.startswith("3 of 3 steps done")
    assert not any("{" in line for line in lines)


# What a step does ----------------------------------------------------------------------------------------------------


def test_accumulation_averages_the_gradients_of_its_forwards(make_trainer):
    gradients = {}

    def keep_gradients(model, **kwargs):
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    recorder = Recorder(on_pre_optimizer_step=keep_gradients)
    trainer = make_trainer(max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0, callbacks=[recorder])
    reference = copy.deepcopy(trainer.model).train()
    forwards = record_forwards(trainer.model)
    trainer.train()
    for forward in forwards:
        torch.set_rng_state(forward["rng_state"])  # the masks are drawn in forward
        (reference(**forward["inputs"]).loss / 2).backward()
    assert len(forwards) == 2 and gradients
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_teacher_moves_once_per_optimizer_step(make_trainer):
    students = []
    recorder = Recorder(on_step_end=lambda model, **_: students.append(copy.deepcopy(model.state_dict())))
    trainer = make_trainer({"use_teacher": True}, [recorder], gradient_accumulation_steps=2, teacher_momentum=0.9)
    expected = copy.deepcopy(trainer.model.teacher.state_dict())
    start = copy.deepcopy(expected)
    trainer.train()
    for student in students:
        expected = {name: 0.9 * weight + 0.1 * student[name] for name, weight in expected.items()}
    assert len(students) == 3
    moved = dict(trainer.model.teacher.named_parameters())
    for name, weight in moved.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(weight, start[name]) for name, weight in moved.items())


def test_no_decay_on_norms_biases_positions_and_tokens(make_trainer, tmp_path):
    # A teacher that was loaded is not trained either.
    make_trainer({"use_teacher": True}).save_model(str(tmp_path / "model"))
    trainer = make_trainer({"use_teacher": True})
    trainer.model = StellarForPreTraining.from_pretrained(tmp_path / "model")
    model = trainer.model
    expected = {f"stellar.embeddings.{name}" for name in ("cls_token", "position_embeddings", "sparse_tokens")}
    expected |= {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    expected |= {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = {name for name in expected if not name.startswith("teacher.")}

    trainer.create_optimizer()
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, not_decayed = (
        {
            name_of[id(parameter)]
            for group in trainer.optimizer.param_groups
            if (group["weight_decay"] > 0) == decays
            for parameter in group["params"]
        }
        for decays in (True, False)
    )
    assert not_decayed == expected
    assert decayed == {name for name in name_of.values() if not name.startswith("teacher.")} - expected
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.04}


def test_cosine_schedule_after_a_warm_up_given_as_share(make_trainer):
    rates = []
    recorder = Recorder(on_pre_optimizer_step=lambda optimizer, **_: rates.append(optimizer.param_groups[0]["lr"]))
    make_trainer(max_steps=6, warmup_steps=0.3, callbacks=[recorder]).train()
    warm_up = [0.0, 0.5]
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx([1e-2 * factor for factor in (*warm_up, *cosine)])


def test_gradients_are_clipped_at_three(make_trainer):
    norms = []

    def keep_norm(model, **kwargs):
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())

    make_trainer({"reconstruction_weight": 1e5}, [Recorder(on_pre_optimizer_step=keep_norm)]).train()
    assert norms == pytest.approx([3.0] * 3, rel=1e-3)


# Settings ------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers(tmp_path):
    args = StellarTrainingArguments(output_dir=str(tmp_path))
    assert args.weight_decay == 0.04
    assert args.max_grad_norm == 3.0
    assert args.lr_scheduler_type == "cosine"
    assert args.teacher_momentum == 0.996
    views = args.views(StellarConfig())
    assert (views.num_global_views, views.num_local_views, views.global_size, views.local_size) == (8, 8, 224, 96)
    assert (args.global_scale, args.local_scale) == ([0.36, 1.0], [0.06, 0.36])


def test_learning_rate_follows_the_batch_unless_it_is_given(tmp_path):
    def learning_rate(**arguments):
        return StellarTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments).learning_rate

    paper = {"per_device_train_batch_size": 256, "gradient_accumulation_steps": 8}
    assert learning_rate(**paper) == 1.5e-4
    assert learning_rate(per_device_train_batch_size=128) == 1.5e-4 / 4
    assert learning_rate(per_device_train_batch_size=128, learning_rate=3e-3) == 3e-3
    assert learning_rate(learning_rate=0.0) == 0.0


@pytest.mark.parametrize(
    ("image_size", "patch_size", "local_size"), [(224, 16, 96), (224, 14, 98), (64, 8, 24), (32, 4, 12), (32, 16, 16)]
)
def test_local_views_are_to_the_image_as_in_the_paper(make_trainer, image_size, patch_size, local_size):
    trainer = make_trainer({"image_size": image_size, "patch_size": patch_size}, local_size=None)
    views = trainer.args.views(trainer.model.config)
    assert (views.global_size, views.local_size) == (image_size, local_size)


def test_a_training_on_small_views_leaves_a_model_for_larger_images(make_trainer, tmp_path):
    """Views are cut small, while positions are stored, and the processor prepares images, for the model's own size."""
    trainer = make_trainer({"image_size": 64, "patch_size": 8}, global_size=32, local_size=None, max_steps=1)
    views = trainer.args.views(trainer.model.config)
    assert (views.global_size, views.local_size) == (32, 16)
    trainer.train()
    trainer.save_model(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), default_processor(trainer.model)
    pixel_values = processor(torch.zeros(3, 80, 80, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert model(pixel_values, interpolate_pos_encoding=False).localization.shape[1] == 64


def test_the_order_of_the_images_is_that_of_the_seed(make_trainer):
    def order(**arguments):
        seen = []

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return len(IMAGES)

            def __getitem__(self, index):
                seen.append(index)
                return IMAGES[index]

        trainer = make_trainer(train_dataset=Rows(), max_steps=10, **arguments)
        seen.clear()  # the first row is asked for its columns
        trainer.train()
        return seen

    def of_seed(seed):  # of two epochs
        return [i for epoch in range(2) for i in torch.randperm(10, generator=_generator(seed + epoch)).tolist()]

    assert order(seed=3) == of_seed(3)
    assert order(seed=3, data_seed=5) == of_seed(5)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("views_on", ["accelerator", "cpu"])
def test_settings_of_the_views_reach_the_model(make_trainer, views_on):
    trainer = make_trainer(
        {"image_size": 24, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        num_global_views=3,
        num_local_views=4,
        local_size=8,
        global_scale=[0.5, 0.9],
        local_scale=[0.2, 0.4],
        jitter_probability=0.7,
        grayscale_probability=0.1,
        blur_probability=0.3,
        background=[240, 120, 80],
        views_on=views_on,
    )
    assert trainer.data_collator.background == [240, 120, 80]
    assert default_processor(trainer.model, trainer.args.background).background == [240, 120, 80]
    expected = StellarViews(
        num_global_views=3,
        num_local_views=4,
        global_size=24,
        local_size=8,
        global_scale=(0.5, 0.9),
        local_scale=(0.2, 0.4),
        jitter_probability=0.7,
        grayscale_probability=0.1,
        blur_probability=0.3,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
    )
    if views_on == "cpu":
        assert trainer.data_collator.views == expected
    forwards = record_forwards(trainer.model)
    trainer.train()
    inputs = forwards[0]["inputs"]
    assert inputs["global_pixel_values"].shape == (2, 3, 3, 24, 24)
    assert inputs["local_pixel_values"].shape == (2, 4, 3, 8, 8)


def test_workers_only_decode_by_default(make_trainer):
    batch = make_trainer().data_collator(IMAGES[:2])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "images": (torch.uint8, (2, 3, 40, 40)),
        "image_sizes": (torch.int64, (2, 2)),
    }


def test_large_images_are_read_at_the_smallest_size_that_no_view_enlarges(make_trainer):
    # Of crops at the aspect ratio 3/4: sqrt(0.25 * 3/4) of 74 pixels are a global view's 32, sqrt(0.04 * 3/4) of 93
    # a local view's 16.
    scales = {"global_scale": [0.25, 1.0], "local_scale": [0.04, 0.25]}
    assert make_trainer(**scales).data_collator.decode_size == 93
    assert make_trainer(num_local_views=0, **scales).data_collator.decode_size == 74
    assert make_trainer(decode_size=50).data_collator.decode_size == 50


def test_another_image_column(make_trainer):
    trainer = make_trainer(train_dataset=[{"photo": row["image"]} for row in IMAGES], image_column="photo")
    assert trainer.train().global_step == 3


def test_a_transform_of_the_data_set_has_all_of_its_columns(make_trainer):
    def transform(batch):
        assert batch["name"] == ["an image"] * len(batch["image"])
        return {"image": batch["image"]}

    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(row["image"]) for row in IMAGES], "name": ["an image"] * len(IMAGES)}
    )
    trainer = make_trainer(train_dataset=rows.with_transform(transform))
    assert trainer.train().global_step == 3


def test_evaluation_without_labels_gives_the_objective(make_trainer):
    metrics = make_trainer(eval_dataset=IMAGES[:4]).evaluate()
    assert math.isfinite(metrics["eval_loss"]) and metrics["eval_loss"] > 0


def test_evaluations_draw_the_same_and_leave_the_training_as_it_was(make_trainer):
    evaluated = {"eval_dataset": IMAGES[:4], "eval_strategy": "steps", "eval_steps": 1, "figures": True}
    trainer = make_trainer(learning_rate=0.0, **evaluated)
    trainer.train()
    evaluations = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3 and len(set(evaluations)) == 1
    plain = make_trainer(learning_rate=0.0)
    plain.train()
    assert [log["loss"] for log in training_logs(trainer)] == [log["loss"] for log in training_logs(plain)]


def test_evaluation_leaves_the_logged_terms_alone(make_trainer):
    trainer = make_trainer(eval_dataset=IMAGES[:4], eval_strategy="steps", eval_steps=1, logging_steps=3)
    forwards = record_forwards(trainer.model)
    trainer.train()
    # Each step's forward comes before those of the evaluation, which sees 4 images at once.
    trained = [forward["losses"]["loss"] for forward in forwards if len(forward["inputs"]["pixel_values"]) == 2]
    (log,) = training_logs(trainer)
    assert sum(log[name] for name in LOSS_TERMS) == pytest.approx(sum(trained) / 3, rel=1e-5)


def test_code_models_train_with_a_collator_that_gives_codes(make_trainer):
    views = StellarViews(num_global_views=1, num_local_views=0, global_size=32)

    def collate(examples):
        batch = StellarCollator(views=views)(examples)
        return {**batch, "code_labels": torch.zeros(len(examples), 16, dtype=torch.long)}

    trainer = make_trainer({"reconstruction_target": "codes"}, data_collator=collate, eval_dataset=IMAGES[:2])
    assert trainer.train().global_step == 3
    assert trainer.evaluate()["eval_loss"] > 0


# Images of any kind --------------------------------------------------------------------------------------------------


def test_images_of_all_sizes_in_one_batch(make_trainer):
    rng = np.random.default_rng(0)
    images = [{"image": rng.integers(0, 256, (30 + 9 * i, 70 - 6 * i, 3), dtype=np.uint8)} for i in range(6)]
    trainer = make_trainer(train_dataset=images, per_device_train_batch_size=6)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in training_logs(trainer))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_named_once_and_replaced(make_trainer, tmp_path, caplog, num_workers):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [*IMAGES[:3], {"image": {"path": str(tmp_path / "broken.png"), "bytes": None}}]
    trainer = make_trainer(train_dataset=rows, max_steps=6, dataloader_num_workers=num_workers)
    trainer.train()
    assert trainer.state.global_step == 6
    named = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(named) == 1 and str(tmp_path / "broken.png") in named[0]


def test_too_many_unreadable_images_stop_the_training(make_trainer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [*IMAGES[:1], {"image": {"path": str(tmp_path / "broken.png"), "bytes": None}}]
    trainer = make_trainer(train_dataset=rows, max_steps=100, max_unreadable_share=0.003)
    with pytest.raises(ValueError, match=r"4 of 8 images .* max_unreadable_share = 0.003 .*broken.png cannot be read"):
        trainer.train()


def test_decoded_columns_of_a_data_set_are_read_by_the_collator(make_trainer, tmp_path):
    """A data set that decodes would end the training at the first broken file."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(IMAGES[0]["image"]).save(tmp_path / "good.png")
    files = [str(tmp_path / name) for name in ("good.png", "broken.png")]
    dataset = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    for train_dataset in (dataset, dataset.to_iterable_dataset().repeat(None)):
        assert make_trainer(train_dataset=train_dataset).train().global_step == 3


def test_a_stream_ends_with_its_last_whole_step(make_trainer):
    """The rest of an epoch would be added to the first step of the next."""
    stream = datasets.IterableDataset.from_generator(lambda: iter(IMAGES[:6]))
    recorder = KeepGradients()
    trainer = make_trainer(
        train_dataset=stream, gradient_accumulation_steps=2, max_grad_norm=0, learning_rate=0.0, callbacks=[recorder]
    )
    forwards = record_forwards(trainer.model)
    reference = copy.deepcopy(trainer.model).train()
    trainer.train()
    assert trainer.state.global_step == 3 and len(forwards) == 6
    for forward in forwards[2:4]:
        torch.set_rng_state(forward["rng_state"])
        (reference(**forward["inputs"]).loss / 2).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(recorder.gradients[1][name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


# Saving and going on -------------------------------------------------------------------------------------------------


def test_saved_model_is_the_trained_one(make_trainer, tmp_path):
    trainer = make_trainer({"use_teacher": True})
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = StellarForPreTraining.from_pretrained(tmp_path / "model")
    trained = trainer.model.state_dict()
    assert loaded.state_dict().keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in loaded.state_dict().items())
    encoder = StellarModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(weight, trained[f"stellar.{name}"]) for name, weight in encoder.state_dict().items())


def same_views_for_the_same_images(examples):
    views = StellarViews(num_global_views=2, num_local_views=1, global_size=32, local_size=16)
    images = torch.stack([torch.from_numpy(example["image"]).permute(2, 0, 1) for example in examples])
    return views(images, generator=torch.Generator().manual_seed(int(images.sum())))


def test_resumed_run_ends_as_the_uninterrupted_one(make_trainer, tmp_path):
    arguments = {"data_collator": same_views_for_the_same_images, "max_steps": 4, "save_strategy": "steps"}
    whole = make_trainer({"use_teacher": True}, save_steps=2, **arguments)
    whole.train()
    resumed = make_trainer({"use_teacher": True}, save_steps=2, **arguments)
    forwards = record_forwards(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4 and len(forwards) == 2
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    optimizer = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {4}


def test_the_same_seed_gives_the_same_run(make_trainer):
    def losses(seed):
        trainer = make_trainer(seed=seed)
        trainer.train()
        return [log["loss"] for log in training_logs(trainer)]

    assert losses(1) == losses(1) != losses(2)


def test_figures_of_the_last_evaluation_are_saved(make_trainer, tmp_path):
    trainer = make_trainer(eval_dataset=IMAGES[:4], eval_strategy="steps", eval_steps=2, max_steps=4)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "eval_loss" in log]
    saved = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert saved["eval_loss"] == logged[-1]["eval_loss"] != logged[0]["eval_loss"]
    assert saved["eval_psnr"] == logged[-1]["eval_psnr"]


def test_figures_of_the_best_model_are_saved_where_it_is_kept(make_trainer, tmp_path):
    trainer = make_trainer(
        eval_dataset={"one": IMAGES[:2], "two": IMAGES[2:4]},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_one_loss",
        greater_is_better=True,  # the first, most probably; anyway another than the last
        learning_rate=0.1,
    )
    trainer.train()
    best = trainer.state.best_global_step
    logged = [log for log in trainer.state.log_history if log["step"] == best]
    saved = json.loads((tmp_path / "run" / "all_results.json").read_text())
    for name in ("eval_one_loss", "eval_two_loss"):
        assert [saved[name]] == [log[name] for log in logged if name in log]


def test_modules_in_evaluation_mode_stay_so_after_an_evaluation(make_trainer):
    trainer = make_trainer(eval_dataset=IMAGES[:2], figures=True)
    trainer.model.train()
    trainer.model.stellar.eval()
    before = {name: module.training for name, module in trainer.model.named_modules()}
    trainer.evaluate()
    assert {name: module.training for name, module in trainer.model.named_modules()} == before


# Ctrl-C --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a shell's foreground: where the tests run in its background, or under nohup, SIGINT is ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("eval_steps", [2, 3])
def test_a_signal_in_an_evaluation_ends_the_training_with_a_checkpoint(make_trainer, tmp_path, eval_steps):
    recorder = Recorder(on_prediction_step=lambda **_: signal.raise_signal(signal.SIGTERM))
    arguments = {"eval_dataset": IMAGES[:2], "eval_strategy": "steps", "eval_steps": eval_steps}
    trainer = make_trainer(callbacks=[recorder], **arguments)
    trainer.train()
    assert trainer.interrupted and trainer.exit_status == 128 + signal.SIGTERM
    assert trainer.state.global_step == eval_steps
    checkpoint = trainer.last_checkpoint()
    assert checkpoint.folder == tmp_path / "run" / f"checkpoint-{eval_steps}"
    assert trainer.is_finished(checkpoint) == (eval_steps == 3)


def test_a_signal_saves_a_checkpoint_although_only_the_best_ones_are_kept(make_trainer, tmp_path):
    def stop_at_the_second(**kwargs):
        if trainer.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    trainer = make_trainer(
        eval_dataset=IMAGES[:2],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="loss",
        learning_rate=0.0,  # so that the second evaluation is not better than the first
    )
    trainer.add_callback(Recorder(on_prediction_step=stop_at_the_second))
    trainer.train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert trainer.last_checkpoint().state.best_global_step == 1


def test_interrupt_finishes_the_step_and_saves_a_checkpoint(make_trainer, tmp_path, capfd, ctrl_c):
    handler = signal.getsignal(signal.SIGINT)
    recorder = Recorder(on_step_begin=lambda **_: signal.raise_signal(signal.SIGINT))
    trainer = make_trainer(callbacks=[recorder])
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 1
    assert "saving a checkpoint" in capfd.readouterr().err
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(weight, trainer.model.state_dict()[name]) for name, weight in saved.items())
    assert signal.getsignal(signal.SIGINT) is handler

    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and not resumed.interrupted


def test_second_interrupt_stops_at_once(make_trainer, tmp_path, ctrl_c):
    handler = signal.getsignal(signal.SIGINT)

    def interrupt_twice(**kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one, passed on by a launcher
        time.sleep(GracefulInterruptCallback.SECONDS_OF_ONE_INTERRUPT + 0.1)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Recorder(on_step_begin=interrupt_twice)]).train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_workers_of_data_loaders_ignore_what_ends_the_training(make_trainer):
    def ignored(rows):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return {"ignored": torch.tensor([handler == signal.SIG_IGN for handler in handlers])}

    trainer = make_trainer(data_collator=ignored, eval_dataset=IMAGES[:2], dataloader_num_workers=1)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert next(iter(loader))["ignored"].all()


def test_an_error_in_training_gives_back_ctrl_c(make_trainer):
    handler = signal.getsignal(signal.SIGINT)
    broken = [{"image": np.zeros((4, 4, 7), dtype=np.uint8)}]
    with pytest.raises(ValueError, match="channels"):
        make_trainer(train_dataset=broken).train()
    assert signal.getsignal(signal.SIGINT) is handler


# Refusals ------------------------------------------------------------------------------------------------------------


def test_wrong_classes_are_refused(tiny_config, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="StellarForPreTraining, not a StellarModel"):
        StellarTrainer(StellarModel(tiny_config()), make_trainer().args)
    with pytest.raises(ValueError, match="StellarTrainingArguments, not TrainingArguments"):
        StellarTrainer(StellarForPreTraining(tiny_config()), TrainingArguments(output_dir=str(tmp_path)))


def test_one_process_on_several_gpus_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.args._n_gpu = 2  # as the Trainer itself sets it
    with pytest.raises(ValueError, match="sees 2 GPUs.*accelerate launch --num_processes 2.*CUDA_VISIBLE_DEVICES=0"):
        StellarTrainer(trainer.model, trainer.args, train_dataset=IMAGES)


def test_a_teacher_too_coarse_to_move_is_refused(make_trainer):
    trainer = make_trainer({"use_teacher": True})
    trainer.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="teacher's weights are torch.bfloat16, .* load the model in float32"):
        trainer.train()


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {"train_dataset": datasets.Dataset.from_dict({"photo": [1]})}, r"no column 'image', only \['photo'\]"),
        ({}, {"train_dataset": []}, "no rows"),
        ({}, {"eval_dataset": []}, "no rows"),
        ({}, {"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({}, {"teacher_momentum": 1.5}, r"teacher_momentum is 1\.5"),
        ({}, {"max_unreadable_share": -1}, "max_unreadable_share is -1"),
        ({}, {"decode_size": -4}, "decode_size is -4, but must be at least 1"),
        ({}, {"decode_size": 0}, "decode_size is 0, but must be at least 1"),
        ({}, {"local_size": 0}, "local_size is 0, but must be at least 1"),
        ({}, {"global_size": 0}, "global_size is 0, but must be at least 1"),
        ({}, {"weight_decay": -1}, "weight_decay is -1, but must be a number of at least 0"),
        ({}, {"learning_rate": -1e-3}, r"learning_rate is -0\.001, but must be a number of at least 0"),
        ({}, {"num_knn_images": -1}, "num_knn_images is -1, but must be a number of at least 0"),
        ({}, {"learning_rate": math.nan}, "learning_rate is nan, but must be a number"),
        ({}, {"max_grad_norm": math.nan}, "max_grad_norm is nan, but must be a number"),
        ({}, {"teacher_momentum_end": math.nan}, "teacher_momentum_end is nan, but must be a number"),
        ({}, {"local_scale": [0.1, math.nan]}, r"local_scale is \[0\.1, nan\], but must be"),
        ({}, {"views_on": "gpu"}, "views_on is 'gpu'"),
        ({}, {"background": [0, 256, 0]}, "background is"),
        ({}, {"global_scale": [0.5]}, r"global_scale is \[0\.5\]"),
        ({}, {"local_scale": [0.5, 0.1]}, r"local_scale is \(0\.5, 0\.1\)"),
        ({}, {"num_global_views": 0}, "num_global_views is 0"),
        ({"reconstruction_target": "codes"}, {}, "data_collator"),
        ({"standardize_projections": True}, {"per_device_train_batch_size": 1}, "needs two images or more"),
    ],
)
def test_impossible_settings_are_refused_before_training(make_trainer, config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(config, **settings)
