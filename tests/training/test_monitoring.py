# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a run tells about itself, and when it warns or stops."""

import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stellar_hf import StellarConfig
from stellar_hf.cli.pretrain import ModelArguments, build_model
from stellar_hf.data import load_tabletop_scenes
from stellar_hf.loss_stellar import matched_fraction
from stellar_hf.training.monitoring import (
    NUM_LOGS,
    memory_gib,
    signs_of_collapse,
    teacher_distance,
    warning_of_random_weights,
)

MODEL_FIELDS = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size"}


def training_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


# Figures -------------------------------------------------------------------------------------------------------------


def test_matched_fraction_counts_targets_with_one_taker():
    index = torch.tensor([[0, 1, 2, 3], [2, 2, 0, 1], [1, 1, 1, 1]])
    assert matched_fraction(index).item() == pytest.approx((4 + 2 + 0) / 12)


def test_speed_and_memory_are_logged(make_trainer, at_event, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def pass_seconds(seconds):
        def pass_time(**kwargs):
            clock[0] += seconds

        return pass_time

    class SlowImages(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, row):
            clock[0] += 100
            return {"image": np.zeros((32, 32, 3), dtype=np.uint8), "label": row}

    # 2 batches of 2 images in a step of 4 seconds; what evaluations read, measure and draw does not count.
    trainer = make_trainer(
        callbacks=[at_event(on_step_begin=pass_seconds(4))],
        train_dataset=[{"image": np.full((32, 32, 3), row, dtype=np.uint8), "label": row % 2} for row in range(8)],
        gradient_accumulation_steps=2,
        max_steps=2,
        eval_dataset=SlowImages(),
        eval_strategy="steps",
        eval_steps=1,
        figures=True,
    )
    trainer.train()
    logs = training_logs(trainer)
    assert [log["images_per_second"] for log in logs] == [1.0, 1.0]
    assert all(0.01 < log["memory_gib"] < 1000 for log in logs)
    assert memory_gib(torch.device("cpu")) == pytest.approx(logs[-1]["memory_gib"], rel=0.5)


def test_distance_of_the_teacher(make_trainer):
    trainer = make_trainer({"use_teacher": True}, teacher_momentum=1.0)
    model = trainer.model
    assert teacher_distance(model) == 0.0
    with torch.no_grad():
        for _, weight in model.teacher_and_student_weights():
            weight.mul_(1.25)  # t = 0.8 s
    assert teacher_distance(model) == pytest.approx(0.2, rel=1e-4)

    trainer.train()
    assert training_logs(trainer)[-1]["teacher_distance"] == pytest.approx(teacher_distance(model), rel=1e-5)


def test_no_distance_without_a_teacher(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert "teacher_distance" not in training_logs(trainer)[0]


# NaN -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_loss_stops_the_run_before_the_weights_break(make_trainer, at_event, tmp_path, value):
    # Epochs of 5 batches, 2 of them a step, the last step has one: the first step of the second epoch breaks.
    batches = []

    def break_the_head(model, **kwargs):
        if len(batches) == 5:
            nn.init.constant_(model.decoder.head.bias, value)

    trainer = make_trainer(
        callbacks=[at_event(on_step_begin=break_the_head)],
        max_steps=9,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True)
    message = rf"is {value} at step 4, in batch 1 of epoch 2, because of reconstruction_loss = {value}\..*nan_batch"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    saved = load_file(tmp_path / "run" / "nan_batch.safetensors")
    assert saved.keys() == batches[-1].keys() == {"pixel_values", "global_pixel_values", "local_pixel_values"}
    assert all(torch.equal(tensor, batches[-1][name]) for name, tensor in saved.items())
    last_good = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in last_good.values())
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_the_batch_of_a_broken_loss_is_counted_through_a_resume(make_trainer, tmp_path):
    make_trainer(max_steps=3, save_strategy="steps", save_steps=3).train()
    trainer = make_trainer(max_steps=9)
    count = []

    def break_the_second_batch(module, args):
        count.append(1)
        if len(count) == 2:
            nn.init.constant_(module.decoder.head.bias, float("nan"))

    trainer.model.register_forward_pre_hook(break_the_second_batch)
    with pytest.raises(ValueError, match="at step 5, in batch 5 of epoch 1,"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_every_broken_term_is_named(make_trainer):
    trainer = make_trainer()
    nn.init.constant_(trainer.model.cls_clustering_head.prototypes, float("nan"))
    with pytest.raises(ValueError, match=r"because of cls_clustering_loss = nan, cls_view_loss = nan\."):
        trainer.train()


def test_a_broken_batch_whose_tensors_share_memory_is_saved(make_trainer):
    def collate(examples):
        pixels = torch.full((2, 3, 32, 32), float("nan"))
        return {"pixel_values": pixels, "global_pixel_values": pixels[:, None]}

    with pytest.raises(ValueError, match=r"loss is nan at step 1"):
        make_trainer(data_collator=collate).train()


# Collapse ------------------------------------------------------------------------------------------------------------

HEALTHY = {
    "prototype_entropy": 0.97,
    "slot_information": 0.4,
    "token_diversity": 0.2,
    "cls_clustering_loss": 5.0,
    "clustering_loss": 4.5,
    "masked_loss": 5.0,
    "localization_sharpness": 0.8,
    "largest_token_share": 0.4,
}


@pytest.mark.parametrize(
    ("logs", "weight", "sign", "remedy"),
    [
        ({"prototype_entropy": 0.05}, 1.0, "prototype_entropy", "freeze_prototypes_steps"),
        ({"slot_information": 0.99}, 1.0, "slot_information", "use_teacher"),
        ({"token_diversity": 0.001}, 1.0, "token_diversity", "koleo_weight"),
        ({"cls_clustering_loss": math.log(512) + 0.001}, 1.0, "cls_clustering_loss", "ln K = 6.24"),
        ({"cls_clustering_loss": 0.3 * math.log(512)}, 0.3, "cls_clustering_loss", "from_vit_pretrained"),
        ({"clustering_loss": math.log(512) - 0.001}, 1.0, "clustering_loss", "ln K = 6.24"),
        ({"clustering_loss": 0.3 * math.log(512)}, 0.3, "clustering_loss", "standardize_projections"),
        ({"masked_loss": math.log(512)}, 0.0, "masked_loss", "from_vit_pretrained"),
        ({"largest_token_share": 0.99}, 1.0, "largest_token_share", "reconstruction_weight"),
        ({"localization_sharpness": 0.255}, 1.0, "localization_sharpness", "localization_noise"),
    ],
)
def test_each_sign_of_collapse_is_named_with_a_remedy(tiny_config, logs, weight, sign, remedy):
    config = tiny_config(num_prototypes=512, clustering_weight=weight)
    healthy = {**HEALTHY, "cls_clustering_loss": weight * 5.0, "clustering_loss": weight * 4.5}
    signs = signs_of_collapse({**healthy, **logs}, config, num_images=64)
    assert signs.keys() == {sign} and remedy in signs[sign]


def test_healthy_logs_show_no_sign(tiny_config):
    assert signs_of_collapse(HEALTHY, tiny_config(num_prototypes=512), num_images=64) == {}
    # With one token there is no slot and no diversity to speak of; without the term, no loss.
    no_loss = {"cls_clustering_loss": 0.0, "clustering_loss": 0.0}
    one = {**HEALTHY, "slot_information": 0.0, "token_diversity": 0.0, **no_loss}
    one.update(localization_sharpness=1.0, largest_token_share=1.0)
    config = tiny_config(num_prototypes=512, num_sparse_tokens=1, clustering_weight=0.0)
    assert signs_of_collapse(one, config, num_images=64) == {}
    # Masked tokens alone may say nothing.
    masked = {**HEALTHY, "masked_loss": math.log(512)}
    assert signs_of_collapse(masked, tiny_config(num_prototypes=512), num_images=64) == {}
    # Two images of four tokens cannot use more than eight of the prototypes: an entropy of a third.
    few = {**HEALTHY, "prototype_entropy": math.log(8) / math.log(512)}
    assert signs_of_collapse(few, tiny_config(num_prototypes=512), num_images=2) == {}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "collapses" in record.getMessage()]


def test_a_collapsed_run_warns_once(make_trainer, caplog):
    # Every token is the same vector, and the heads give the same projection whatever they see.
    trainer = make_trainer({"standardize_projections": False}, max_steps=20, learning_rate=0.0)
    for head in (trainer.model.clustering_head, trainer.model.cls_clustering_head):
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.normal_(head.prototypes, std=1e-3)
    nn.init.zeros_(trainer.model.stellar.layernorm.weight)
    nn.init.ones_(trainer.model.stellar.layernorm.bias)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = warnings(caplog)
    step = 1 + NUM_LOGS  # the first tenth is quiet
    signs = (
        "all tokens of an image are alike",
        "CLS predicts every prototype alike",
        "the tokens predict every prototype alike",
        "every token takes every patch alike",
    )
    assert len(found) == len(signs)
    for message, sign in zip(found, signs, strict=True):
        assert f"collapses at step {step}:" in message and sign in message


@pytest.mark.parametrize(
    ("localization", "sharpness", "share", "sign"),
    [
        (torch.eye(4)[:1].expand(16, 4), 1.0, 1.0, "one token of an image takes all patches"),
        (torch.full((16, 4), 0.25), 0.25, 0.25, "every token takes every patch alike"),
        (torch.eye(4).repeat(4, 1), 1.0, 0.25, None),
    ],
)
def test_maps_that_say_nothing_are_recognized(make_trainer, caplog, localization, sharpness, share, sign):
    trainer = make_trainer(max_steps=4, learning_rate=0.0)
    trainer.model.stellar.localization.register_forward_hook(
        lambda module, inputs, output: localization.expand(len(output), -1, -1)
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    log = training_logs(trainer)[-1]
    assert (log["localization_sharpness"], log["largest_token_share"]) == pytest.approx((sharpness, share))
    found = [message for message in warnings(caplog) if "patch" in message]
    assert len(found) == (sign is not None) and all(sign in message for message in found)


@pytest.mark.parametrize(
    ("config", "warns"),
    [
        ({}, True),
        ({"standardize_projections": True}, False),
        ({"use_teacher": True, "mask_ratio": 0.6}, False),
        ({"target_temperature": 0.25, "prediction_temperature": 0.5}, False),
    ],
)
def test_the_papers_objective_from_random_weights_is_warned_of(config, warns):
    warning = warning_of_random_weights(StellarConfig(**config))
    assert (warning is not None) == warns
    if warns:
        assert "temperatures 0.06 and 0.12" in warning and "standardize_projections" in warning


def test_clusters_that_name_the_slot_are_recognized(make_trainer, caplog):
    trainer = make_trainer(max_steps=5, learning_rate=0.0)
    for layer in trainer.model.stellar.layers:  # tokens see nothing of the image
        nn.init.zeros_(layer.attention.o_proj.weight)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [log["slot_information"] for log in training_logs(trainer)] == pytest.approx([1.0] * 5, abs=1e-3)
    assert sum("the clusters merely name the slot" in message for message in warnings(caplog)) == 1


# With which a tiny model learns from random weights, as the recipes do.
LEARNS = {
    "num_prototypes": 64,
    "standardize_projections": True,
    "target_temperature": 0.25,
    "prediction_temperature": 0.5,
    "reconstruction_weight": 100.0,
}


@pytest.fixture
def train_on_scenes(make_trainer):
    """Trains for a second or two on scenes of solids on a table."""

    def train(config, **arguments):
        defaults = {"per_device_train_batch_size": 16, "num_global_views": 1, "num_local_views": 0}
        scenes = load_tabletop_scenes("train", 64, image_size=32).select_columns("image")
        trainer = make_trainer(config, train_dataset=scenes, **{**defaults, **arguments})
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize(
    ("config", "learning_rate", "steps", "sign"),
    [
        # The paper's objective from random weights, at a rate far too high.
        ({"num_prototypes": 64}, 1e-1, 60, "CLS predicts every prototype alike"),
        # Each patch decides for one token, and such a rate sends all of them to the same.
        ({**LEARNS, "localization_temperature": 1e-3}, 1.0, 20, "one token of an image takes all patches"),
        ({**LEARNS, "localization_temperature": 100.0}, 2e-3, 10, "every token takes every patch alike"),
    ],
    ids=["uniform predictions", "one token", "diffuse maps"],
)
def test_a_training_that_collapses_is_warned_of(train_on_scenes, caplog, config, learning_rate, steps, sign):
    with caplog.at_level(logging.WARNING):
        train_on_scenes(config, learning_rate=learning_rate, max_steps=steps)
    (message,) = [message for message in warnings(caplog) if sign in message]
    assert ", so that " in message and message.count(". ") == 1  # what was seen, what it means; what to try


def test_a_training_that_learns_is_not(train_on_scenes, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = train_on_scenes(LEARNS, learning_rate=2e-3, max_steps=40, logging_steps=5)
    first, *_, last = training_logs(trainer)
    assert last["reconstruction_loss"] < 0.5 * first["reconstruction_loss"]
    assert warnings(caplog) == []


def test_a_sign_that_passes_does_not_warn(make_trainer, at_event, caplog):
    trainer = make_trainer(max_steps=20, learning_rate=0.0)
    bias = trainer.model.stellar.layernorm.bias
    healthy = [weight.detach().clone() for weight in (trainer.model.stellar.layernorm.weight, bias)]

    def collapse_in_turns(model, **kwargs):
        norm, is_collapsed = model.stellar.layernorm, trainer.state.global_step % NUM_LOGS != 0
        with torch.no_grad():
            norm.weight.copy_(torch.zeros_like(norm.weight) if is_collapsed else healthy[0])
            norm.bias.copy_(torch.ones_like(norm.bias) if is_collapsed else healthy[1])

    trainer.add_callback(at_event(on_step_begin=collapse_in_turns))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    diversity = [log["token_diversity"] for log in training_logs(trainer)]
    assert min(diversity) < 0.01 < 0.05 < max(diversity)
    assert not [message for message in warnings(caplog) if "alike (token_diversity" in message]


def test_the_command_warns_of_random_weights(tiny_config, caplog):
    small = {name: value for name, value in tiny_config().to_diff_dict().items() if name in MODEL_FIELDS}
    for fields, warns in (({}, True), ({"standardize_projections": True}, False)):
        caplog.clear()
        build_model(ModelArguments(model_config={**small, **fields}))
        assert ("The model starts from random weights" in caplog.text) == warns
