# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Whatever happens to a training, its last checkpoint is whole, and the same command goes on from it bit for bit."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from transformers.trainer_utils import get_last_checkpoint

SCRIPT = str(Path(__file__).with_name("run_with_fault.py"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(forking_python):
    """Starts a training in processes of its own."""
    every = []

    def start(folder, fault=None, num_processes=1, **settings):
        folder.mkdir(exist_ok=True)
        launched = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [forking_python, SCRIPT, str(folder), json.dumps({**settings, "fault": fault})]
        processes = []
        for rank in map(str, range(num_processes)):
            environment = {**launched, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "1"}
            environment = {**os.environ, **(environment if num_processes > 1 else {})}
            processes.append(subprocess.Popen(command, env=environment))
        every.extend(processes)
        return processes

    yield start
    for process in every:
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def train(start):
    """Runs a training to its end and returns the exit status, negative for a signal, and what it said."""

    def train(folder, fault=None, num_processes=1, **settings):
        processes = start(folder, fault, num_processes, **settings)
        statuses = [process.wait(timeout=200) for process in processes]
        return statuses[0] if num_processes == 1 else statuses, (folder / "said_0.txt").read_text()

    return train


def last_step(folder):
    last = get_last_checkpoint(folder / "run") if (folder / "run").is_dir() else None
    return int(last.rpartition("-")[2]) if last else None


def assert_same_checkpoints(folder, expected, step):
    """Weights, teacher, optimizer, schedule, random state, logged curve: every file but that of the arguments."""
    checkpoints = [each / "run" / f"checkpoint-{step}" for each in (folder, expected)]
    names = [{file.name for file in checkpoint.iterdir()} for checkpoint in checkpoints]
    assert names[0] == names[1] >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    states = [json.loads((checkpoint / "trainer_state.json").read_text()) for checkpoint in checkpoints]
    for log in (log for state in states for log in state["log_history"]):
        for name in ("images_per_second", "memory_gib"):
            log.pop(name, None)
    assert states[0] == states[1]
    assert {"loss", "masked_loss", "learning_rate", "grad_norm"} <= states[0]["log_history"][-1].keys()
    # The first holds the arguments; the last two the speed, and a checksum of it.
    for name in names[0] - {"training_args.bin", "trainer_state.json", "checksums.json"}:
        assert checkpoints[0].joinpath(name).read_bytes() == checkpoints[1].joinpath(name).read_bytes(), name


# Kill ----------------------------------------------------------------------------------------------------------------


# An epoch has 4 steps, of 2, 2, 2 and 1 forwards.
SETTINGS = {"max_steps": 10, "logging_steps": 3, "save_steps": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, said = train(folder, **SETTINGS)
    assert status == 0, said
    return folder


def test_killed_run_goes_on_bit_for_bit(train, uninterrupted, tmp_path):
    """With and without workers, which outlive a kill for a while; with only one checkpoint, which outlives it, too."""
    for fault, step, num_workers in (
        (["kill", 1], None, 0),
        (["kill", 5], 4, 2),  # whose checkpoint is of the end of an epoch
        (["kill in save", 6], 4, 0),
        (["kill", 7], 6, 2),
    ):
        settings = {**SETTINGS, "dataloader_num_workers": num_workers, "save_total_limit": 1}
        status, said = train(tmp_path, fault, **settings)
        assert (status, last_step(tmp_path)) == (-signal.SIGKILL, step), (fault, said)
        assert (tmp_path / "run" / "_saving").exists() == (fault[0] == "kill in save")
        assert len(list((tmp_path / "run").glob("checkpoint-*"))) == (step is not None)
    assert train(tmp_path, **settings)[0] == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-10"]
    assert_same_checkpoints(tmp_path, uninterrupted, 10)
    # What is logged at the end covers the whole run, too.
    results = [json.loads((folder / "said_0.txt").read_text()) for folder in (tmp_path, uninterrupted)]
    assert results[0]["train_loss"] == results[1]["train_loss"]


def test_interrupted_run_goes_on_bit_for_bit(train, uninterrupted, tmp_path):
    """At a step that is neither logged nor saved, and at the end of an epoch."""
    for fault, step in ((["interrupt", 5], 5), (["terminate", 8], 8)):
        status, said = train(tmp_path, fault, **SETTINGS)
        assert (status, last_step(tmp_path)) == ({5: 130, 8: 143}[step], step), said
    assert train(tmp_path, **SETTINGS)[0] == 0
    assert_same_checkpoints(tmp_path, uninterrupted, 10)


def test_epochs_that_are_interrupted_are_logged_and_saved_once(train, tmp_path):
    settings = {"num_train_epochs": 2, "logging_strategy": "epoch", "save_strategy": "epoch"}
    assert train(tmp_path / "whole", **settings)[0] == 0
    for fault in (["interrupt", 3], ["interrupt", 7], ["kill in save", 14]):
        train(tmp_path / "broken", fault, **settings)
    assert train(tmp_path / "broken", **settings)[0] == 0
    assert_same_checkpoints(tmp_path / "broken", tmp_path / "whole", 14)


# Two trainings in one folder -----------------------------------------------------------------------------------------


def test_a_second_training_in_the_same_folder_is_refused_until_the_first_has_ended(start, train, tmp_path):
    (first,) = start(tmp_path, max_steps=100000, save_strategy="no", dataloader_num_workers=1)
    while not list((tmp_path / "run").glob("_training.lock")):
        assert first.poll() is None
        time.sleep(0.05)
    status, said = train(tmp_path, max_steps=1)
    assert status == 1 and f"Another training is running in {tmp_path}/run (process " in said
    first.kill()
    first.wait()
    assert train(tmp_path, max_steps=1)[0] == 0


# Full disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Makes a folder a file system of its own, of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if sys.platform != "linux" or shutil.which("mount") is None or subprocess.run(command).returncode != 0:
            pytest.skip("a small file system can be mounted by root on Linux alone")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)])


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95], ids=["in the model", "in the optimizer", "near the end"])
def test_full_disk_leaves_the_last_checkpoint(train, uninterrupted, small_disk, tmp_path, share):
    size = sum(file.stat().st_size for file in (uninterrupted / "run" / "checkpoint-10").iterdir())
    disk = small_disk(int((1 + share) * size) // 4096 * 4096)
    status, said = train(disk, **SETTINGS, save_total_limit=1)
    # As much as one checkpoint and a share of the next one has room.
    assert status == 1
    assert f"checkpoint-4 in {disk}/run could not be written: the disk is full (0." in said
    assert f"{disk}/run/checkpoint-2 is intact: resume from it" in said
    assert [path.name for path in (disk / "run").iterdir()] == ["checkpoint-2"]
    if share == 0.95:
        shutil.copytree(disk / "run", tmp_path / "larger" / "run")
        assert train(tmp_path / "larger", **SETTINGS)[0] == 0
        assert_same_checkpoints(tmp_path / "larger", uninterrupted, 10)


def test_full_disk_leaves_the_results_as_they_were(build_trainer, small_disk):
    disk = small_disk(2**20)
    trainer = build_trainer(disk)
    trainer.save_metrics("train", {"train_loss": 1.5})
    with suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for write in (lambda: trainer.save_metrics("test", {"test_psnr": 20.0}), trainer.save_state):
        with pytest.raises(OSError, match="could not be written: the disk is full"):
            write()
    assert {path.name for path in disk.iterdir()} == {"all_results.json", "train_results.json", "filling"}
    assert json.loads((disk / "all_results.json").read_text()) == {"train_loss": 1.5}


# Data loader ---------------------------------------------------------------------------------------------------------


def test_killed_worker_is_named_and_the_run_goes_on(train, uninterrupted, tmp_path):
    settings = {**SETTINGS, "dataloader_num_workers": 2}
    status, said = train(tmp_path, ["kill worker", 3], **settings)
    assert status == 1
    assert said.startswith("A worker of the data loader was killed") and "dataloader_num_workers" in said
    assert f"{tmp_path}/run/checkpoint-2 is intact" in said
    assert train(tmp_path, **settings)[0] == 0
    assert_same_checkpoints(tmp_path, uninterrupted, 10)


# Two processes -------------------------------------------------------------------------------------------------------


ON_TWO = {"max_steps": 8, "logging_steps": 3, "save_steps": 2}


resumes_on_two = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="earlier Trainers load no optimizer where several processes train on the CPU",
)


@pytest.fixture(scope="module")
def uninterrupted_on_two(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert train(folder, num_processes=2, **ON_TWO)[0] == [0, 0]
    return folder


@resumes_on_two
@pytest.mark.parametrize(
    ("fault", "step"),
    [(["interrupt", 3, 1], 4), (["kill", 5, 1], 4), (["kill in save", 4, 0], 2)],
    ids=["interrupt of one", "kill of one", "kill in save"],
)
def test_fault_of_one_process_ends_all_and_the_run_goes_on(train, uninterrupted_on_two, tmp_path, fault, step):
    statuses, said = train(tmp_path, fault, num_processes=2, **ON_TWO)
    assert 0 not in statuses
    assert last_step(tmp_path) == step, said
    assert train(tmp_path, num_processes=2, **ON_TWO)[0] == [0, 0]
    assert_same_checkpoints(tmp_path, uninterrupted_on_two, 8)


@resumes_on_two
def test_a_file_that_one_process_lacks_ends_all(train, uninterrupted_on_two, tmp_path):
    shutil.copytree(uninterrupted_on_two / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    for name in ("checksums.json", "rng_state_1.pth"):
        (tmp_path / "run" / "checkpoint-4" / name).unlink()
    statuses, said = train(tmp_path, num_processes=2, **ON_TWO)
    assert statuses == [1, 1] and "checkpoint-4 is damaged: rng_state_1.pth is missing" in said


def test_ctrl_c_in_the_terminal_of_a_launcher_saves_one_checkpoint(forking_python, tmp_path):
    """The launcher gets it as well, and passes it on to the processes, which have got it already."""
    settings = {"max_steps": 100000, "save_strategy": "no", "logging_steps": 1}
    command = [forking_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    output = tmp_path / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [*command, SCRIPT, str(tmp_path), json.dumps(settings)],
            env={**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHON_EXEC": forking_python},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while "'loss'" not in output.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=120)
    finally:
        process.kill()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == int(checkpoint.name.removeprefix("checkpoint-"))
    assert torch.load(checkpoint / "rng_state_1.pth", weights_only=False)
