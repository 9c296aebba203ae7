# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What changes over a training, as real runs of a tiny model show it."""

import copy
import math

import pytest
import torch
from peft import LoraConfig

from stellar_hf import StellarForPreTraining

ALL_SCHEDULES = {
    "teacher_momentum": 0.5,
    "teacher_momentum_end": 1.0,
    "weight_decay": 0.1,
    "weight_decay_end": 0.5,
    "target_temperature_start": 0.03,
    "mask_ratio_start": 0.25,
    "objective_warmup_steps": 3,
    "freeze_prototypes_steps": 0.4,
    "layer_decay": 0.5,
}


def cosine(start, end, step, steps):
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def groups_by_parameter(model, optimizer):
    """The optimizer's group of each parameter, by name."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name_of[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


@pytest.fixture
def run(make_trainer, at_event):
    """Trains, and returns for each step: weight decays, rates, patches kept, temperature, student and teacher."""

    def run(resume_from_checkpoint=None, **arguments):
        steps, kept, settings = [], [], []

        def before_step(model, optimizer, **kwargs):
            groups = groups_by_parameter(model, optimizer)
            steps.append(
                {
                    "weight_decay": {name: group["weight_decay"] for name, group in groups.items()},
                    "rate": {name: group["lr"] for name, group in groups.items()},
                    "teacher_before": copy.deepcopy(model.teacher.state_dict()),
                }
            )

        def after_step(model, **kwargs):
            steps[-1]["weights"] = copy.deepcopy(model.state_dict())

        callback = at_event(on_pre_optimizer_step=before_step, on_step_end=after_step)
        trainer = make_trainer({"use_teacher": True}, **{"max_steps": 5, **arguments})
        trainer.add_callback(callback)  # after the trainer's own
        model = trainer.model
        num_other = 1 + model.config.num_sparse_tokens

        def on_layer(module, inputs):
            if len(inputs[0]) == 4:  # 2 global views of 2 images
                kept.append(inputs[0].shape[1] - num_other)

        model.stellar.layers[0].register_forward_pre_hook(on_layer)
        model.register_forward_pre_hook(lambda module, args, kwargs: settings.append(kwargs), with_kwargs=True)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        for step, num_kept, setting in zip(steps, kept, settings, strict=True):
            step["num_kept"] = num_kept
            for name in ("target_temperature", "prediction_temperature"):
                step[name] = setting.get(name)
        return trainer, steps

    return run


# Laws ----------------------------------------------------------------------------------------------------------------


def test_nothing_changes_by_default(run):
    _, steps = run()
    assert {step["num_kept"] for step in steps} == {6}  # of 16 at a ratio of 0.6
    assert {step[name] for step in steps for name in ("target_temperature", "prediction_temperature")} == {None}
    assert all(set(step["weight_decay"].values()) == {0.0, 0.04} for step in steps)
    assert all(len(set(step["rate"].values())) == 1 for step in steps)


def test_weight_decay_follows_a_cosine_where_there_is_one(run):
    _, steps = run(weight_decay=0.1, weight_decay_end=0.5)
    for index, step in enumerate(steps):
        decay = step["weight_decay"]
        assert decay["decoder.projection.weight"] == pytest.approx(cosine(0.1, 0.5, index, 5))
        assert decay["decoder.projection.bias"] == decay["stellar.embeddings.sparse_tokens"] == 0.0


def test_weight_decay_may_fall_to_zero(run):
    _, steps = run(weight_decay=0.1, weight_decay_end=0.0)
    decays = [step["weight_decay"]["decoder.projection.weight"] for step in steps]
    assert decays == pytest.approx([cosine(0.1, 0.0, index, 5) for index in range(5)])


def test_teacher_momentum_follows_a_cosine(run):
    _, steps = run(teacher_momentum=0.2, teacher_momentum_end=1.0)
    for index, step in enumerate(steps):
        momentum = cosine(0.2, 1.0, index, 5)
        for name, before in step["teacher_before"].items():
            expected = momentum * before + (1 - momentum) * step["weights"][name]
            torch.testing.assert_close(step["weights"][f"teacher.{name}"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("warmup", [4, 0.8])
def test_mask_ratio_and_temperatures_warm_up_linearly(run, warmup):
    starts = {"target_temperature_start": 0.02, "prediction_temperature_start": 0.2, "mask_ratio_start": 0.2}
    trainer, steps = run(**starts, objective_warmup_steps=warmup)
    for name, start, end in (("target_temperature", 0.02, 0.06), ("prediction_temperature", 0.2, 0.12)):
        temperatures = [step[name] for step in steps]
        assert temperatures[:4] == pytest.approx([start + (end - start) * index / 4 for index in range(4)])
        assert temperatures[4] is None
    ratios = [0.2 + 0.4 * index / 4 for index in range(5)]
    assert [step["num_kept"] for step in steps] == [int(16 * (1 - ratio)) for ratio in ratios]
    # What is saved is the model's own.
    assert trainer.model.config.mask_ratio == 0.6 and trainer.model.config.target_temperature == 0.06


def test_prototypes_stay_for_the_first_steps_and_move_then(run):
    _, steps = run(freeze_prototypes_steps=2)
    for head in ("clustering_head", "cls_clustering_head"):
        prototypes = [step["weights"][f"{head}.prototypes"] for step in steps]
        assert torch.equal(prototypes[0], steps[0]["teacher_before"][f"{head}.prototypes"])
        assert torch.equal(prototypes[0], prototypes[1])
        assert not torch.equal(prototypes[1], prototypes[2]) and not torch.equal(prototypes[2], prototypes[3])
        layers = [step["weights"][f"{head}.layers.0.weight"] for step in steps]
        assert not torch.equal(layers[0], layers[1])


def test_learning_rates_by_depth(run):
    trainer, steps = run(layer_decay=0.5)
    for step in steps:
        rates, full = step["rate"], step["rate"]["decoder.head.weight"]
        for name, rate in rates.items():
            if name.startswith("stellar.layers.1."):
                factor = 0.5
            elif name.startswith("stellar.layers.0."):
                factor = 0.25
            elif name.startswith("stellar.embeddings.") and "sparse_tokens" not in name:
                factor = 0.125
            else:
                factor = 1.0
            assert rate == pytest.approx(factor * full), name
        assert set(rates) == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        assert set(step["weight_decay"].values()) == {0.0, 0.04}
    rates = [step["rate"]["decoder.head.weight"] for step in steps]
    assert rates[0] == 1e-2 > rates[1] > rates[2]
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == pytest.approx(rates)  # the full one


def test_learning_rates_by_depth_skip_frozen_weights(make_trainer, at_event):
    rates = {}

    def keep_rates(model, optimizer, **kwargs):
        rates.update({name: group["lr"] for name, group in groups_by_parameter(model, optimizer).items()})

    trainer = make_trainer(max_steps=1, layer_decay=0.5, callbacks=[at_event(on_pre_optimizer_step=keep_rates)])
    trainer.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    adapters = {name: rate for name, rate in rates.items() if name.startswith("stellar.layers.")}
    assert len(adapters) == 4 and rates.keys() == {name for name in rates if "lora_" in name}
    for name, rate in adapters.items():
        assert rate == pytest.approx(1e-2 * (0.25 if ".layers.0." in name else 0.5)), name


def test_an_optimizer_of_ones_own_is_left_alone(make_trainer):
    trainer = make_trainer(layer_decay=0.5)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.optimizer = optimizer
    assert trainer.create_optimizer() is optimizer
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


# Resume --------------------------------------------------------------------------------------------------------------


def test_schedules_go_on_after_a_resume(run, tmp_path):
    arguments = {**ALL_SCHEDULES, "save_strategy": "steps", "save_steps": 2}
    _, whole = run(**arguments)
    _, resumed = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), **arguments)
    assert len(whole) == 5 and len(resumed) == 3
    for expected, step in zip(whole[2:], resumed, strict=True):
        for name in ("weight_decay", "rate", "num_kept", "target_temperature"):
            assert step[name] == expected[name], name


# The objective's settings --------------------------------------------------------------------------------------------


@pytest.fixture
def objective(tiny_config):
    """Loss of a tiny model on two images, given fields of the configuration and arguments of forward."""

    def objective(config, **arguments):
        torch.manual_seed(0)
        model = StellarForPreTraining(tiny_config(**config))
        images, views = torch.randn(2, 3, 32, 32), torch.randn(2, 2, 3, 32, 32)
        return model(images, views, **arguments)

    return objective


@pytest.mark.parametrize("focus", ["gaussian", "block", None])
def test_settings_of_forward_stand_for_those_of_the_configuration(objective, focus):
    temperatures = {"target_temperature": 0.2, "prediction_temperature": 0.3}
    given = objective({"mask_focus": focus}, num_kept=12, **temperatures)
    configured = objective({"mask_focus": focus, "mask_ratio": 0.25, **temperatures})
    assert given.loss == configured.loss
    default = objective({"mask_focus": focus})
    assert given.masked_loss != default.masked_loss and given.clustering_loss != default.clustering_loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_kept": 0}, r"num_kept is 0, but must be an integer in \[1, 16\]"),
        ({"num_kept": 17}, r"num_kept is 17"),
        ({"target_temperature": 0.0}, r"target_temperature is 0\.0"),
        ({"prediction_temperature": -1}, "prediction_temperature is -1"),
    ],
)
def test_impossible_settings_of_forward_are_refused(objective, arguments, message):
    with pytest.raises(ValueError, match=message):
        objective({}, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_momentum_end": 1.1}, r"teacher_momentum_end is 1\.1, but must be in \[0, 1\]"),
        ({"weight_decay_end": -0.1}, r"weight_decay_end is -0\.1"),
        ({"weight_decay": 0.0, "weight_decay_end": 0.1}, r"weight_decay is 0\.0: a schedule has to start"),
        ({"target_temperature_start": 0.0}, r"target_temperature_start is 0\.0, but must be a positive number"),
        ({"prediction_temperature_start": -0.1}, r"prediction_temperature_start is -0\.1, but must be a positive"),
        ({"mask_ratio_start": 1.0}, r"mask_ratio_start is 1\.0, but must be in \[0, 1\)"),
        ({"objective_warmup_steps": -1}, "objective_warmup_steps is -1"),
        ({"freeze_prototypes_steps": -1}, "freeze_prototypes_steps is -1"),
        ({"freeze_prototypes_steps": math.inf}, "freeze_prototypes_steps is inf"),
        ({"layer_decay": 0.0}, r"layer_decay is 0\.0, but must be in \(0, 1\]"),
        ({"layer_decay": 1.5}, r"layer_decay is 1\.5"),
    ],
)
def test_impossible_schedules_are_refused(make_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**arguments)
