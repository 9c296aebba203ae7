# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Training of the prior: its loss, its average, what it learns, and going on from a checkpoint."""

import json

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from stellar_hf import StellarForImageReconstruction, StellarTokenPrior, StellarTokenPriorPipeline
from stellar_hf.prior import StellarTokenPriorTrainer, TokenPriorForTraining

NUM_TOKENS, TOKEN_SIZE, NUM_PATCHES = 4, 32, 16


def make_prior(**overrides) -> StellarTokenPrior:
    torch.manual_seed(0)
    sizes = {
        "num_sparse_tokens": NUM_TOKENS,
        "token_size": TOKEN_SIZE,
        "grid_size": (4, 4),
        "num_classes": 2,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "localization_channels": 8,
    }
    return StellarTokenPrior(**{**sizes, **overrides})


def two_kinds_of_images(num_images=64) -> list[dict[str, torch.Tensor]]:
    """Class 0 has positive tokens and its first token on the left; class 1 negative ones and it on the right."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.arange(NUM_PATCHES) % 4
    rows = []
    for index in range(num_images):
        label = index % 2
        tokens = 0.1 * torch.randn(NUM_TOKENS, TOKEN_SIZE, generator=generator) + (1 - 2 * label)
        logits = 0.1 * torch.randn(NUM_PATCHES, NUM_TOKENS, generator=generator)
        logits[:, 0] += 4 * ((columns < 2) == (label == 0))
        rows.append({"sparse_tokens": tokens, "localization": logits.softmax(-1), "class_labels": torch.tensor(label)})
    return rows


DATA = two_kinds_of_images()


def as_batch(rows):
    return torch.utils.data.default_collate(rows)


def with_statistics(prior):
    batch = as_batch(DATA)
    prior.set_statistics(batch["sparse_tokens"], batch["localization"])
    return prior


@pytest.fixture
def make_trainer(tmp_path):
    def make(prior=None, callbacks=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        prior = with_statistics(make_prior()) if prior is None else prior
        args = TrainingArguments(**{**defaults, **arguments})
        return StellarTokenPriorTrainer(prior, args, train_dataset=DATA, callbacks=callbacks)

    return make


def test_loss_is_zero_where_the_prior_knows_the_image_and_its_terms_are_of_tokens_and_maps():
    """A new prior predicts the mean, which images of one kind alone all are."""
    model = TokenPriorForTraining(make_prior(), class_dropout=0.0)
    batch = as_batch(DATA[:1] * 64)
    known = {**batch, "sparse_tokens": 0 * batch["sparse_tokens"], "localization": 0 * batch["localization"] + 0.25}
    losses = model(**known)
    assert losses["loss"] < 1e-3  # noise below a share of 0.05 stays
    far = model(**{**known, "sparse_tokens": known["sparse_tokens"] + 1})
    assert far["token_loss"] > 1 and far["localization_loss"] < 1e-3
    assert far["loss"] == far["token_loss"] + far["localization_loss"]
    far = model(**{**known, "localization": batch["localization"]})
    assert far["token_loss"] < 1e-3 and far["localization_loss"] > 1


@pytest.mark.parametrize(("dropout", "trained"), [(0.0, [0, 1]), (1.0, [2])])
def test_dropped_classes_train_the_one_for_any_class(dropout, trained):
    model = TokenPriorForTraining(with_statistics(make_prior()), class_dropout=dropout)
    torch.nn.init.normal_(model.prior.token_head.weight)
    torch.nn.init.normal_(model.prior.norm.linear.weight, std=0.1)
    model(**as_batch(DATA[:8]))["loss"].backward()
    assert model.prior.class_embedding.weight.grad.abs().amax(1).nonzero().flatten().tolist() == trained


def test_average_is_that_of_the_last_tenth_of_the_steps():
    model = TokenPriorForTraining(make_prior())
    weight, average = model.prior.token_embedding.bias, model.average.token_embedding.bias
    for step in range(200):
        torch.nn.init.constant_(weight, float(step))
        model.update_average()
    assert 170 < average.min() == average.max() < 190
    assert not any(weight.requires_grad for weight in model.average.parameters())


def test_training_learns_what_the_classes_are(make_trainer, tiny_config):
    trainer = make_trainer(max_steps=150, learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=10)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.2 * losses[0]
    model = StellarForImageReconstruction(tiny_config()).eval()
    pipe = StellarTokenPriorPipeline(trainer.average.eval(), model)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(16) % 2
    generator = torch.Generator().manual_seed(0)
    tokens, localization = pipe.sample_tokens(labels, 20, 2.0, generator)
    assert ((tokens.mean((1, 2)) < 0) == (labels == 1)).float().mean() > 0.9
    maps = localization[:, :, 0].unflatten(1, (4, 4))
    is_left = maps[:, :, :2].mean((1, 2)) > maps[:, :, 2:].mean((1, 2))
    assert (is_left == (labels == 0)).float().mean() > 0.9


def test_every_log_has_both_terms(make_trainer):
    trainer = make_trainer(logging_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4, 6]
    for log in logs:
        assert log["token_loss"] + log["localization_loss"] == pytest.approx(log["loss"], rel=1e-5)


def test_resumed_training_is_the_uninterrupted_one(make_trainer, tmp_path):
    whole = make_trainer(save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "whole"))
    whole.train()
    # Nothing of the first trainer is left; the draws of noise and classes go on, too.
    torch.manual_seed(99)
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), prior=with_statistics(make_prior()))
    torch.rand(7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]


def test_finished_training_gives_its_result_again(make_trainer, tmp_path):
    first = make_trainer(save_strategy="steps", save_steps=3)
    first.train()
    again = make_trainer(prior=make_prior())
    checkpoint = again.last_checkpoint()
    assert again.is_finished(checkpoint) and not make_trainer(max_steps=7).is_finished(checkpoint)
    again.load_finished(checkpoint)
    for name, weight in first.average.state_dict().items():
        assert torch.equal(weight, again.average.state_dict()[name]), name


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "class_names"])
def test_checkpoint_of_another_prior_is_refused(make_trainer, field):
    """The last two have the same weights, and another meaning."""
    values = {"hidden_size": 48, "num_attention_heads": 2, "class_names": ["cat", "dog"]}
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    other = make_trainer(prior=with_statistics(make_prior(**{field: values[field]})))
    with pytest.raises(ValueError, match=f"checkpoint-2 is of another prior: {field} is .* there and"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="another prior"):
        other.is_finished(other.last_checkpoint())


def test_checkpoint_of_another_kind_is_refused(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    (tmp_path / "run" / "checkpoint-2" / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing"):
        make_trainer().train(resume_from_checkpoint=True)


def test_loss_that_is_not_finite_ends_the_training(make_trainer, tmp_path):
    prior = with_statistics(make_prior())
    torch.nn.init.constant_(prior.token_head.bias, float("nan"))
    with pytest.raises(ValueError, match="at step 1, .* because of token_loss = nan.*nan_batch.safetensors"):
        make_trainer(prior=prior).train()
    assert (tmp_path / "run" / "nan_batch.safetensors").is_file()


def test_evaluation_measures_the_loss(make_trainer):
    trainer = make_trainer()
    trainer.eval_dataset = DATA
    assert 0 < trainer.evaluate()["eval_loss"] < 100


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_gradient_checkpointing_trains_the_same(make_trainer):
    results = []
    for is_checkpointed in (False, True):
        trainer = make_trainer(
            max_steps=2, gradient_checkpointing=is_checkpointed, prior=with_statistics(make_prior())
        )
        trainer.train()
        assert trainer.model.prior.is_gradient_checkpointing == is_checkpointed
        results.append(trainer.model.prior.state_dict())
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="leave out activation_checkpointing_kwargs"):
        TokenPriorForTraining(make_prior()).activation_checkpointing_enable({"use_reentrant": True})


def test_interrupted_training_saves_a_checkpoint(make_trainer, tmp_path):
    import signal

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(callbacks=[Interrupt()])
    trainer.train()
    assert trainer.interrupted and trainer.exit_status == 130
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_one_process_on_several_gpus_is_refused(make_trainer):
    args = make_trainer().args
    args._n_gpu = 2  # as the Trainer itself sets it
    with pytest.raises(ValueError, match="sees 2 GPUs, but trains on one"):
        StellarTokenPriorTrainer(make_prior(), args, train_dataset=DATA)


def test_impossible_dropout_is_named():
    with pytest.raises(ValueError, match="class_dropout is 1.5"):
        TokenPriorForTraining(make_prior(), class_dropout=1.5)
