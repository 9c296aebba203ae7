# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Which checkpoints a training keeps, and which ones it refuses to go on from."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers.trainer_callback import TrainerState

from stellar_hf import StellarForPreTraining, StellarTrainer, StellarTrainingArguments

IMAGES = [{"image": image} for image in np.random.default_rng(0).integers(0, 256, (10, 40, 40, 3), dtype=np.uint8)]


@pytest.fixture
def make_trainer(tiny_config, tmp_path):
    """Builds a trainer of a tiny model for 2 steps, each of which is saved; config and arguments can be overridden."""

    def make(config=None, eval_dataset=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "num_global_views": 1,
            "num_local_views": 0,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return StellarTrainer(
            StellarForPreTraining(tiny_config(**(config or {}))),
            StellarTrainingArguments(**{**defaults, **arguments}),
            train_dataset=IMAGES,
            eval_dataset=eval_dataset,
        )

    return make


@pytest.fixture
def checkpoint(make_trainer, tmp_path):
    """A complete checkpoint after 2 of 3 steps."""
    make_trainer().train()
    return tmp_path / "run" / "checkpoint-2"


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_newest_checkpoints_are_kept(make_trainer, tmp_path):
    make_trainer(max_steps=4, save_total_limit=2).train()
    assert names(tmp_path / "run") == {"checkpoint-3", "checkpoint-4"}


def test_the_best_checkpoint_is_kept_and_found_again(make_trainer, tmp_path):
    trainer = make_trainer(
        {"reconstruction_weight": 10.0},
        greater_is_better=True,  # so that an early one is
        max_steps=4,
        eval_dataset=IMAGES[:2],
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
    )
    trainer.train()
    evaluations = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    best = tmp_path / "run" / f"checkpoint-{1 + int(np.argmax(evaluations))}"
    assert best.name != "checkpoint-4", "nothing is tested where the best one is the last"
    assert trainer.state.best_model_checkpoint == str(best) and best.is_dir()
    assert TrainerState.load_from_json(str(best / "trainer_state.json")).best_model_checkpoint == str(best)


def test_a_step_is_saved_again_in_place_of_the_first_time(make_trainer, checkpoint):
    (checkpoint / "note.txt").write_text("of the first run")
    make_trainer().train()
    assert "note.txt" not in names(checkpoint) and "optimizer.pt" in names(checkpoint)
    assert names(checkpoint.parent) == {"checkpoint-1", "checkpoint-2"}


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(make_trainer, checkpoint):
    staging = checkpoint.parent / "_saving"
    (staging / "checkpoint-3").mkdir(parents=True)
    checkpoint.rename(staging / "replaced-checkpoint-2")
    assert make_trainer().last_checkpoint() == str(checkpoint)
    assert "model.safetensors" in names(checkpoint) and not staging.exists()


def test_weights_of_the_objective_may_change_on_resume(make_trainer, checkpoint):
    trainer = make_trainer({"koleo_weight": 0.5, "mask_ratio": 0.5}, max_steps=3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3


def test_another_architecture_is_refused_by_its_fields(make_trainer, checkpoint):
    with pytest.raises(ValueError) as error:
        make_trainer({"num_attention_heads": 2, "num_prototypes": 14, "koleo_weight": 0.5}).train(str(checkpoint))
    message = str(error.value)
    assert "num_attention_heads is 4 there and 2 here, num_prototypes is 12 there and 14 here. " in message
    assert str(checkpoint) in message and "koleo" not in message


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is incomplete"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is incomplete"),
        (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth is incomplete"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is not readable"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "has no trainer_state.json"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "save_only_model"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "There is no checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(make_trainer, checkpoint, damage, said):
    damage(checkpoint)
    with pytest.raises(ValueError) as error:
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(checkpoint))
    assert said in str(error.value) and str(checkpoint) in str(error.value)


def test_resuming_without_a_checkpoint_is_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_finished_training_is_known_and_loaded(make_trainer, checkpoint):
    assert make_trainer(max_steps=2).is_finished(str(checkpoint))
    assert not make_trainer(max_steps=3).is_finished(str(checkpoint))
    trainer = make_trainer()
    trainer.load_finished(str(checkpoint))
    trainer.save_model()
    folder = Path(str(trainer.args.output_dir))
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert trainer.state.global_step == json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2


def test_a_model_that_cannot_be_written_is_told_with_its_folder(make_trainer, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"The model in {tmp_path}/file could not be written: .*{checkpoint} is intact"):
        make_trainer().save_model(str(tmp_path / "file"))
