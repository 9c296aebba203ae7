# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Half precision: what must not feel it, and what trains in it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_utils import set_seed
from transformers.utils import is_torch_tf32_available

from stellar_hf import StellarForPreTraining, StellarTrainingArguments
from stellar_hf.loss_stellar import (
    expected_prototypes,
    koleo_loss,
    matching_plan,
    prototype_cross_entropy,
    sinkhorn_knopp,
    token_diversity,
)
from stellar_hf.modeling_stellar import LOSS_TERMS

HALF = [torch.bfloat16, torch.float16]
# Single values of a term may differ by what half-precision features say differently.
TERM_TOLERANCE = {"rtol": 0.05, "atol": 0.05}

DELICATE = {
    "sinkhorn": lambda x, y: sinkhorn_knopp(x, 0.06),
    "matching": lambda x, y: matching_plan(x[None], y[None]),
    "koleo": lambda x, y: koleo_loss(x[None]),
    "diversity": lambda x, y: token_diversity(x[None]),
    "expected prototypes": lambda x, y: expected_prototypes(x.softmax(dim=-1), y[: x.shape[1]]),
    "cross entropy": lambda x, y: prototype_cross_entropy(x, x.flip(0), y, chunk_size=2),
}


@pytest.mark.parametrize("autocast_dtype", HALF)
@pytest.mark.parametrize("name", DELICATE)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_autocast_changes_nothing_in_delicate_functions(name, autocast_dtype, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x, y = scale * torch.randn(6, 8, generator=generator), torch.randn(8, 8, generator=generator)
    expected = DELICATE[name](x, y)
    with torch.autocast("cpu", dtype=autocast_dtype):
        actual = DELICATE[name](x, y)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_delicate_terms_are_those_of_float32(dtype):
    torch.manual_seed(0)
    tokens, prototypes = torch.randn(3, 5, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)

    def gradients():
        expected = expected_prototypes(sinkhorn_knopp((tokens @ prototypes.T).float().flatten(0, 1)), prototypes)
        loss = koleo_loss(tokens) + prototype_cross_entropy(tokens, expected, prototypes)
        return torch.autograd.grad(loss, [tokens, prototypes])

    reference = gradients()
    with torch.autocast("cpu", dtype=dtype):
        logits_in_half = tokens @ prototypes.T
        assert logits_in_half.dtype == dtype
        half = gradients()
    # The targets alone come from half-precision logits.
    for actual, expected in zip(half, reference, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.2, atol=0.02)


def test_localization_is_a_softmax_of_float32_cosines(tiny_config):
    torch.manual_seed(0)
    localization = StellarForPreTraining(tiny_config()).eval().stellar.localization
    dense, sparse = torch.randn(2, 16, 32), torch.randn(2, 4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = [localization.dense_projection(dense).double(), localization.sparse_projection(sparse).double()]
        actual = localization(dense, sparse, (4, 4))
    dense, sparse = (torch.nn.functional.normalize(features, dim=-1) for features in projected)
    expected = (dense @ sparse.transpose(1, 2) / localization.temperature).softmax(dim=-1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_teacher_moves_in_float32(tiny_config, dtype):
    torch.manual_seed(0)
    model = StellarForPreTraining(tiny_config(use_teacher=True))
    for _, weight in model.teacher_and_student_weights():
        weight.data.add_(torch.randn_like(weight))
    reference = copy.deepcopy(model)
    reference.update_teacher(0.9996)
    with torch.autocast("cpu", dtype=dtype):
        model.update_teacher(0.9996)
    for name, weight in model.teacher.named_parameters():
        assert torch.equal(weight, reference.teacher.get_parameter(name)), name


@pytest.fixture
def losses(tiny_config, tmp_path):
    """The output of the same tiny model and batch, loaded as a type and under an autocast."""
    torch.manual_seed(0)
    StellarForPreTraining(tiny_config(use_teacher=True)).save_pretrained(tmp_path)
    inputs = {
        "pixel_values": torch.randn(4, 3, 32, 32),
        "global_pixel_values": torch.randn(4, 2, 3, 32, 32),
        "local_pixel_values": torch.randn(4, 1, 3, 16, 16),
        "noise": torch.rand(8, 16),
    }

    def losses(dtype=torch.float32, autocast=None):
        model = StellarForPreTraining.from_pretrained(tmp_path, dtype=dtype)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return model, model(**inputs)

    return losses


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("as_autocast", [True, False])
def test_every_term_in_half_precision_is_close_to_float32(losses, dtype, as_autocast):
    _, reference = losses()
    _, half = losses(autocast=dtype) if as_autocast else losses(dtype=dtype)
    for name in ("loss", *LOSS_TERMS):
        assert half[name].dtype == torch.float32, name
        torch.testing.assert_close(
            half[name], reference[name], **TERM_TOLERANCE, msg=lambda text, name=name: name + text
        )


def test_a_teacher_of_a_half_precision_model_still_moves(losses):
    """In bfloat16 a step of 1 - 0.996 would round to nothing."""
    model, output = losses(dtype=torch.bfloat16)
    output.loss.backward()
    assert {weight.dtype for weight in model.stellar.parameters()} == {torch.bfloat16}
    before = copy.deepcopy(model.teacher.state_dict())
    with torch.no_grad():
        for _, weight in model.teacher_and_student_weights():
            weight.mul_(1.1)
    model.update_teacher(0.996)
    for name, weight in model.teacher.state_dict().items():
        student = model.get_parameter(name).float()
        torch.testing.assert_close(weight, 0.996 * before[name] + 0.004 * student, rtol=1e-6, atol=1e-8)
        assert not torch.equal(weight, before[name]) or not weight.any(), name


def test_training_learns_in_bf16_as_in_float32(make_trainer):
    def reconstruction(**arguments):
        trainer = make_trainer({"reconstruction_weight": 50.0}, **arguments)
        dtypes = set()
        trainer.model.stellar.layers[0].mlp.fc1.register_forward_hook(lambda *hook: dtypes.add(hook[2].dtype))
        trainer.train()
        return dtypes, [log["reconstruction_loss"] for log in trainer.state.log_history if "loss" in log]

    arguments = {"max_steps": 25, "per_device_train_batch_size": 10, "num_global_views": 1, "num_local_views": 0}
    dtypes, half = reconstruction(bf16=True, **arguments)
    assert dtypes == {torch.bfloat16}
    set_seed(42)
    dtypes, full = reconstruction(**arguments)
    assert dtypes == {torch.float32}
    assert np.mean(full[-3:]) < 0.5 * full[0] and np.mean(half[-3:]) < 0.5 * half[0]
    assert half[0] == pytest.approx(full[0], rel=0.05)
    assert np.mean(half[-3:]) == pytest.approx(np.mean(full[-3:]), rel=0.3)


@pytest.mark.skipif(not is_torch_tf32_available(), reason="needs a GPU that has TF32")
@pytest.mark.parametrize(
    ("given", "tf32"), [({}, None), ({"bf16": True}, True), ({"bf16": True, "tf32": False}, False)]
)
def test_bf16_brings_tf32_unless_it_is_refused(given, tf32, tmp_path):
    before = torch.backends.fp32_precision
    try:
        assert StellarTrainingArguments(output_dir=str(tmp_path), **given).tf32 is tf32
    finally:
        torch.backends.fp32_precision = before  # which the arguments set for the whole process


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Trainer scales gradients of fp16 on CUDA alone")
def test_steps_that_the_scaler_skips_move_neither_student_nor_teacher(make_trainer, at_event):
    states, skipped = [], []

    def keep(model, optimizer, **kwargs):
        states.append(copy.deepcopy(model.state_dict()))
        skipped.append(optimizer.step_was_skipped)

    # The first scale of 65536 overflows; the loss is finite, so that the training goes on.
    trainer = make_trainer(
        {"use_teacher": True, "reconstruction_weight": 1e4},
        [at_event(on_optimizer_step=keep)],
        use_cpu=False,
        fp16=True,
        max_steps=20,
    )
    states.append(copy.deepcopy(trainer.model.state_dict()))
    trainer.train()
    assert any(skipped) and not all(skipped)
    for index, was_skipped in enumerate(skipped):
        before, after = states[index], states[index + 1]
        unchanged = all(torch.equal(before[name].cpu(), after[name].cpu()) for name in before)
        assert unchanged == was_skipped


def with_given_noise(examples):
    """A compiled graph draws other random numbers than eager code: here nothing is drawn."""
    images = torch.stack([torch.from_numpy(example["image"]).permute(2, 0, 1) for example in examples]) / 255
    generator = torch.Generator().manual_seed(int(1000 * images.sum()))
    return {
        "pixel_values": images[..., :32, :32],
        "global_pixel_values": images[:, None, :, -32:, -32:],
        "noise": torch.rand(len(examples), 16, generator=generator),
    }


@pytest.mark.slow
def test_compiled_training_takes_the_steps_of_eager_training(make_trainer):
    def run(**arguments):
        small = {"num_hidden_layers": 1}
        trainer = make_trainer(small, max_steps=2, learning_rate=1e-3, data_collator=with_given_noise, **arguments)
        start = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return losses, {name: weight - start[name] for name, weight in trainer.model.state_dict().items()}

    eager_losses, eager = run()
    # Graphs and gradients as compiled, in the kernels of eager code: the making of others takes minutes.
    compiled_losses, compiled = run(torch_compile=True, torch_compile_backend="aot_eager")
    assert len(compiled_losses) == 2 and compiled_losses == pytest.approx(eager_losses, rel=1e-4)
    for name, movement in eager.items():
        # Of Adam's steps of the size of the rate, those on gradients of nearly zero are decided by rounding.
        same = (compiled[name] - movement).abs() < 1e-4
        assert same.float().mean() > 0.98, name


@pytest.mark.slow
def test_schedules_compile_three_times_whatever_their_length(make_trainer):
    """One graph for the first patches kept, one for any number, and the final one."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    trainer = make_trainer(
        {"mask_ratio": 0.8, "num_hidden_layers": 1},
        max_steps=10,
        mask_ratio_start=0.1,
        target_temperature_start=0.03,
        objective_warmup_steps=8,
    )
    trainer.model.forward = torch.compile(trainer.model.forward, backend=count)
    trainer.train()
    assert len(graphs) == 3
