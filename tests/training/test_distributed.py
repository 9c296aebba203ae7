# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What training on several processes computes: the same as one process with all of their images."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from stellar_hf import StellarForPreTraining
from stellar_hf.modeling_stellar import LOSS_TERMS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "distributed_tasks.py"
STEPS = ("plain", "teacher", "standardized", "standardized_teacher", "accumulated")
GLOBAL_VALUES = (*LOSS_TERMS, "prototype_entropy", "slot_information", "token_diversity", "localization_sharpness")


@pytest.fixture(scope="module")
def launch(forking_python, tiny_config, tmp_path_factory):
    """Lets processes do tasks of the script; returns its folder and each task's results, one of each process."""

    def run(num_processes, *tasks, **settings):
        folder = tmp_path_factory.mktemp("processes")
        tiny_config().save_pretrained(folder)
        environment = {**os.environ, "PYTHON_EXEC": forking_python, **(settings or {"ACCELERATE_USE_CPU": "1"})}
        launcher = [forking_python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        done = subprocess.run(
            [*launcher, str(SCRIPT), str(folder), *tasks], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return folder, {
            task: [torch.load(folder / f"{task}-{rank}.pt") for rank in range(num_processes)] for task in tasks
        }

    return run


@pytest.fixture(scope="module")
def launched(launch):
    """Folder and results of all tasks on two processes; the last one changes what Accelerate knows of them."""
    tasks = (
        "draws",
        "draws_of_workers",
        "second_order",
        "ended_in_the_last_evaluation",
        "ends",
        "streamed",
        "measured",
    )
    return launch(2, *STEPS, *tasks, "prior", "sharded", "replicated_trainer", "sharded_trainer")


@pytest.fixture(scope="module")
def of_two(launched):
    return launched[1]


@pytest.fixture(scope="module")
def of_one(tiny_config, tmp_path_factory):
    """The result of a task in this process."""
    folder = tmp_path_factory.mktemp("process")
    tiny_config().save_pretrained(folder)
    tasks = runpy.run_path(str(SCRIPT))["TASKS"]
    return lambda task: tasks[task](folder)


def assert_gradients_are_close(gradients, expected):
    assert gradients.keys() == expected.keys()
    total = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).norm()
        # 1e-7 is the rounding of float32. Some are nothing else: a key's bias moves no attention, and one before a
        # standardization moves nothing.
        is_rounding = gradient.norm() < 3e-6 * total
        tolerance = 3e-6 * total if is_rounding else 1e-5 * gradient.norm() + 1e-7 * total
        assert difference <= tolerance, f"{name}: {difference / gradient.norm():.1e}"


# One step ------------------------------------------------------------------------------------------------------------


def assert_step_equals(results, expected):
    assert {result["learning_rate"] for result in results} == {expected["learning_rate"]}
    assert [result["eval_loss"] for result in results] == pytest.approx([expected["eval_loss"]] * len(results), 1e-6)
    for result in results:
        assert_gradients_are_close(result["gradients"], expected["gradients"])
    log, expected_log = results[0]["log"], expected["log"]
    assert log["loss"] == pytest.approx(expected_log["loss"], rel=1e-6)
    for name in GLOBAL_VALUES:
        assert log[name] == pytest.approx(expected_log[name], rel=1e-5), name


@pytest.mark.parametrize("task", STEPS)
def test_a_step_of_two_processes_equals_that_of_one(of_one, of_two, task):
    assert_step_equals(of_two[task], of_one(task))


# Many steps ----------------------------------------------------------------------------------------------------------


def test_student_and_teacher_are_the_same_on_all_processes_after_training(of_two):
    first, second = of_two["draws"]
    assert first["steps"] == second["steps"] == 6
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert any(
        not torch.equal(weight, first["weights"][f"teacher.{name}"]) for name, weight in first["first_teacher"].items()
    )


def test_processes_share_out_the_images_of_every_epoch(of_two):
    seen = [torch.tensor(result["seen"]).view(2, 6) for result in of_two["draws"]]
    epochs = torch.cat(seen, dim=1)
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_processes_share_out_the_images_of_a_second_training(of_two):
    first, second = of_two["second_order"]
    assert sorted(first + second) == list(range(16))


def test_processes_draw_views_and_masks_of_their_own(of_two):
    views = torch.cat([result["views"].flatten(0, 1) for result in of_two["draws"]])
    assert len(views) == 24 and len({view.numpy().tobytes() for view in views}) == 24
    first, second = (result["states"] for result in of_two["draws"])  # of which the masks are drawn next
    assert all(not torch.equal(*states) for states in zip(first, second, strict=True))


def test_workers_of_processes_draw_views_of_their_own(of_two):
    views = torch.cat(of_two["draws_of_workers"])
    assert len(views) == 8 and len({view.numpy().tobytes() for view in views}) == 8


def test_prior_draws_noise_of_its_own_on_each_process_and_stays_one(of_two):
    first, second = of_two["prior"]
    assert torch.cat([first["images"], second["images"]]).sort().values.tolist() == list(range(12))
    assert all(not torch.equal(*states) for states in zip(first["states"], second["states"], strict=True))
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


# Data that leave a process with fewer images -------------------------------------------------------------------------


def test_processes_take_equally_many_steps_whatever_their_data(of_two):
    first, second = of_two["ends"]
    assert first == second
    assert first["rows"] == {"steps": 4, "forwards": 4}  # twice 7 rows in batches of 2 and 2
    assert first["rows, accumulated"] == {"steps": 2, "forwards": 4}
    assert first["few rows"] == {"steps": 2, "forwards": 2}
    assert first["one shard"] == first["unequal shards"] == {"steps": 3, "forwards": 3}
    assert "all processes must take equally many steps" in first["uneven batches"]
    assert first["unequal shards, accumulated"] == {"steps": 2, "forwards": 4}


def test_processes_read_the_shards_of_an_endless_stream_once_and_go_on_with_the_same_images(of_two):
    whole, resumed = zip(*of_two["streamed"], strict=True)
    assert sorted(whole[0]["read"][:6] + whole[1]["read"][:6]) == list(range(12))  # of the first pass
    assert sorted(whole[0]["seen"][:6] + whole[1]["seen"][:6]) == list(range(12))
    for one, other in zip(whole, resumed, strict=True):
        assert one["seen"] == other["seen"]
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


def test_a_signal_to_one_process_in_the_last_evaluation_ends_all_of_them(of_two):
    first, second = of_two["ended_in_the_last_evaluation"]
    assert first == second and first["exit_status"] == 143 and first["checkpoint"] == "checkpoint-1"


def test_processes_measure_whole_images_as_one_does(of_one, of_two):
    expected = of_one("measured")
    assert of_two["measured"] == [pytest.approx(expected, rel=1e-5)] * 2


# FSDP2 ---------------------------------------------------------------------------------------------------------------


def test_sharded_model_has_the_loss_gradients_and_teacher_of_the_whole_one(of_two):
    for result in of_two["sharded"]:
        plain, sharded = result["plain"], result["sharded"]
        assert sharded["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert_gradients_are_close(sharded["gradients"], plain["gradients"])
        assert sharded["weights"].keys() == plain["weights"].keys()
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(sharded["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_trainer_shards_moves_the_teacher_and_saves_a_model_that_loads(launched):
    folder, results = launched
    result = results["sharded_trainer"][0]
    weights = result["weights"]
    assert set(result["sharded"]) == set(result["names"])
    assert any(not torch.equal(weight, weights[f"teacher.{name}"]) for name, weight in result["teacher_start"].items())
    for saved in (folder / "fsdp" / "model", folder / "fsdp" / "checkpoint-3"):
        model = StellarForPreTraining.from_pretrained(saved)
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_sharded_trainer_equals_ddp(of_two):
    (result, _), (expected, _) = of_two["sharded_trainer"], of_two["replicated_trainer"]
    assert not expected["sharded"]
    losses, expected_losses = ([log["loss"] for log in each["logs"]] for each in (result, expected))
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


# DeepSpeed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_deepspeed(launch):
    pytest.importorskip("deepspeed")
    return launch(2, "zero1", "zero2", "zero3", DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")


def test_zero1_equals_ddp(of_deepspeed, of_two):
    result, expected = of_deepspeed[1]["zero1"][0], of_two["replicated_trainer"][0]
    for log, expected_log in zip(result["logs"], expected["logs"], strict=True):
        for name in ("loss", *GLOBAL_VALUES):
            assert log[name] == pytest.approx(expected_log[name], rel=1e-4), name
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_zero2_of_the_example_in_mixed_precision(of_deepspeed, of_two):
    folder, results = of_deepspeed
    result, expected = results["zero2"][0], of_two["replicated_trainer"][0]
    assert result["logs"][0]["loss"] == pytest.approx(expected["logs"][0]["loss"], rel=1e-2)
    assert result["logs"][0]["loss"] != expected["logs"][0]["loss"]
    weights = result["weights"]
    assert any(not torch.equal(weight, weights[f"teacher.{name}"]) for name, weight in result["teacher_start"].items())
    model = StellarForPreTraining.from_pretrained(folder / "deepspeed" / "model")
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_zero3_with_a_teacher_is_refused(of_deepspeed):
    assert all("ZeRO-3 hides the weights from the EMA teacher" in message for message in of_deepspeed[1]["zero3"])
