# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Which checkpoints a training keeps, and which ones it refuses to go on from."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.trainer_callback import TrainerState

from stellar_hf import StellarConfig
from stellar_hf.cli.resuming import announce, find_checkpoint
from stellar_hf.configuration_stellar import OBJECTIVE_FIELDS
from stellar_hf.training.checkpoint_files import inspect

# What a training needs to go on, and what it can do without where no checksums tell that it was there.
NEEDED = {
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "log_means_0.pth",
    "trainer_state.json",
}
RESULTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "log_means_0.pth")


@pytest.fixture(scope="module")
def uninterrupted(build_trainer, tmp_path_factory):
    """Folder of a training of 3 steps, each of which is saved."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    build_trainer(folder, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A checkpoint after 2 of 3 steps, beside that after the first."""
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(uninterrupted / name, tmp_path / "run" / name)
    return tmp_path / "run" / "checkpoint-2"


@pytest.fixture
def saving_trainer(make_trainer):
    """Builds a trainer that saves every step."""
    return lambda *args, **kwargs: make_trainer(*args, **{"save_strategy": "steps", "save_steps": 1, **kwargs})


def names(folder):
    return {path.name for path in folder.iterdir()}


def message_of(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


# Keeping -------------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept_by_step(saving_trainer, checkpoint):
    """Where the clock was set back, the newest step is not the last that was modified."""
    for folder, hours in ((checkpoint.with_name("checkpoint-1"), 2), (checkpoint, 1)):
        time = folder.stat().st_mtime + 3600 * hours
        os.utime(folder, (time, time))
    best = checkpoint.with_name("checkpoint-best")
    best.mkdir()
    saving_trainer(max_steps=4, save_total_limit=2).train(str(checkpoint))
    assert names(checkpoint.parent) == {"checkpoint-3", "checkpoint-4", "checkpoint-best"}


def test_what_is_just_saved_is_kept_beside_later_steps_of_an_earlier_training(saving_trainer, checkpoint):
    saving_trainer(max_steps=1, save_total_limit=1).train()
    assert names(checkpoint.parent) == {"checkpoint-1", "checkpoint-2"}


def test_the_best_checkpoint_is_kept_and_found_again(saving_trainer, tmp_path):
    dataset = [{"image": image} for image in np.full((2, 40, 40, 3), 128, np.uint8)]
    trainer = saving_trainer(
        {"reconstruction_weight": 10.0},
        greater_is_better=True,  # so that an early one is
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
    )
    trainer.train()
    evaluations = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    best = tmp_path / "run" / f"checkpoint-{1 + int(np.argmax(evaluations))}"
    assert best.name != "checkpoint-3", "nothing is tested where the best one is the last"
    assert trainer.state.best_model_checkpoint == str(best) and best.is_dir()
    assert TrainerState.load_from_json(str(best / "trainer_state.json")).best_model_checkpoint == str(best)


def test_a_step_is_saved_again_in_place_of_the_first_time(saving_trainer, checkpoint):
    (checkpoint / "note.txt").write_text("of the first run")
    saving_trainer(max_steps=2).train()
    assert "note.txt" not in names(checkpoint) and "optimizer.pt" in names(checkpoint)
    assert names(checkpoint.parent) == {"checkpoint-1", "checkpoint-2"}


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(make_trainer, checkpoint):
    staging = checkpoint.parent / "_saving"
    (staging / "checkpoint-3").mkdir(parents=True)
    checkpoint.rename(staging / "replaced-checkpoint-2")
    found = make_trainer().last_checkpoint()
    assert str(found) == str(checkpoint) and found.problem is None and found.state.global_step == 2
    assert "model.safetensors" in names(checkpoint) and not staging.exists()


def test_starting_anew_removes_checkpoints_and_nothing_else(make_trainer, checkpoint):
    run = checkpoint.parent
    (run / "checkpoint-notes").mkdir()
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-7").mkdir()  # without a Trainer's state
    (run / "checkpoint-8").write_text("a file")
    elsewhere = run.with_name("elsewhere")
    checkpoint.rename(elsewhere)
    (run / "checkpoint-2").symlink_to(elsewhere)
    make_trainer().remove_checkpoints()
    assert names(run) == {"checkpoint-notes", "checkpoint-best", "checkpoint-7", "checkpoint-8"}
    assert inspect(elsewhere).problem is None


# Going on ------------------------------------------------------------------------------------------------------------


def test_weights_of_the_objective_may_change_on_resume(make_trainer, checkpoint):
    trainer = make_trainer({"koleo_weight": 0.5, "mask_ratio": 0.5})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3


def test_another_architecture_is_refused_by_its_fields(make_trainer, checkpoint):
    trainer = make_trainer({"num_attention_heads": 2, "num_prototypes": 14, "koleo_weight": 0.5})
    message = message_of(trainer.train, str(checkpoint))
    assert "num_attention_heads is 4 there and 2 here, num_prototypes is 12 there and 14 here. " in message
    assert str(checkpoint) in message and "koleo" not in message


def test_fields_of_the_objective_shape_no_weight():
    """So that whatever is not named is compared; what is named exists, and holds no size."""
    assert StellarConfig().to_dict().keys() >= OBJECTIVE_FIELDS
    assert not [name for name in OBJECTIVE_FIELDS if "size" in name or name.startswith("num_")]


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is incomplete"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is incomplete"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is not readable"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: [(folder / f"{name}.pt").unlink() for name in ("optimizer", "scheduler")], "is missing"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "There is no checkpoint"),
    ],
)
def test_a_checkpoint_of_an_earlier_version_is_refused_where_it_is_damaged(make_trainer, checkpoint, damage, said):
    (checkpoint / "checksums.json").unlink()
    damage(checkpoint)
    message = message_of(make_trainer().train, resume_from_checkpoint=str(checkpoint))
    assert said in message and str(checkpoint) in message
    assert f"{checkpoint.with_name('checkpoint-1')} is whole: resume from it" in message


def test_a_checkpoint_of_the_model_alone_is_told_from_a_damaged_one(make_trainer, saving_trainer, tmp_path):
    trainer = saving_trainer(max_steps=1, save_only_model=True)
    trainer.train()
    assert trainer.last_checkpoint().is_model_whole
    assert "save_only_model" in message_of(make_trainer().train, str(tmp_path / "run" / "checkpoint-1"))


def flip(file, position, bit):
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 1 << bit
    file.write_bytes(content)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_checkpoint_is_refused_by_the_file_or_goes_on_bit_for_bit(build_trainer, uninterrupted, data):
    with tempfile.TemporaryDirectory() as run:
        folder = Path(shutil.copytree(uninterrupted / "checkpoint-2", Path(run, "checkpoint-2")))
        every = sorted(names(folder))
        removed = data.draw(st.one_of(st.just(set()), st.sets(st.sampled_from(every), max_size=3)), label="removed")
        flipped = None
        for name in removed:
            (folder / name).unlink()
        if not removed:
            flipped = data.draw(st.sampled_from(every), label="flipped")
            position = data.draw(st.integers(0, 2**40), label="position")
            flip(folder / flipped, position, data.draw(st.integers(0, 7), label="bit"))
        trainer = build_trainer(run, save_strategy="steps", save_steps=3)
        try:
            trainer.train(resume_from_checkpoint=str(folder))
        except ValueError as error:
            assert any(name in str(error) for name in removed or {flipped}), error
        else:
            assert "checksums.json" in (removed or {flipped}) and not removed & NEEDED
            for name in RESULTS:
                expected = (uninterrupted / "checkpoint-3" / name).read_bytes()
                assert Path(run, "checkpoint-3", name).read_bytes() == expected, name


def test_resuming_without_a_checkpoint_is_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        make_trainer().train(resume_from_checkpoint=True)


def test_another_number_of_processes_is_named_and_goes_on(make_trainer, checkpoint, caplog):
    for name in ("rng_state.pth", "log_means_0.pth"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        for index in range(2):
            (checkpoint / f"{name.removesuffix('.pth').removesuffix('_0')}_{index}.pth").write_bytes(content)
    (checkpoint / "checksums.json").unlink()
    assert inspect(checkpoint).num_processes == 2 and inspect(checkpoint).lacks(1, 2) is None
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3
    assert "of a training on 2 process(es), which goes on with 1" in caplog.text


def test_a_finished_training_is_known_and_loaded(make_trainer, checkpoint):
    trainer = make_trainer(max_steps=2)
    found = trainer.last_checkpoint()
    assert trainer.is_finished(found) and not make_trainer(max_steps=3).is_finished(found)
    trainer.load_finished(found)
    trainer.save_model()
    folder = Path(str(trainer.args.output_dir))
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert trainer.state.global_step == json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2


# Commands ------------------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_taken_where_that_is_asked_for(make_trainer, checkpoint):
    flip(checkpoint / "optimizer.pt", 5000, 3)
    trainer = make_trainer()
    older = checkpoint.with_name("checkpoint-1")
    message = message_of(announce, trainer, find_checkpoint(trainer, False))
    assert f"{checkpoint} is damaged: optimizer.pt is not as it was written." in message
    assert f"{older} is whole: resume from it (--resume_from_newest_whole)" in message
    assert str(find_checkpoint(trainer, False, resume_from_newest_whole=True)) == str(older)
    flip(older / "optimizer.pt", 5000, 3)
    assert "None of the checkpoints" in message_of(find_checkpoint, trainer, False, resume_from_newest_whole=True)


def test_a_first_start_may_ask_for_the_newest_whole_checkpoint(make_trainer):
    assert find_checkpoint(make_trainer(), False, resume_from_newest_whole=True) is None


# Writing results -----------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_written_is_told_with_its_folder(make_trainer, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"The model in {tmp_path}/file could not be written: .*{checkpoint} is intact"):
        make_trainer().save_model(str(tmp_path / "file"))


def test_results_are_added_to_earlier_ones_and_survive_an_empty_file(make_trainer, tmp_path):
    trainer = make_trainer()
    file = tmp_path / "run" / "all_results.json"
    file.write_text("")  # of a disk that was full
    trainer.save_metrics("train", {"train_loss": 1.5})
    trainer.save_metrics("test", {"test_psnr": 20.0})
    assert json.loads(file.read_text()) == {"train_loss": 1.5, "test_psnr": 20.0}
    assert json.loads(file.with_name("test_results.json").read_text()) == {"test_psnr": 20.0}
    trainer.save_state()
    assert TrainerState.load_from_json(str(file.with_name("trainer_state.json"))).max_steps == 0
    assert names(tmp_path / "run") == {
        "all_results.json",
        "train_results.json",
        "test_results.json",
        "trainer_state.json",
    }
