# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What is computed again in the backward pass changes memory, and nothing else."""

import weakref

import pytest
import torch
from torch import nn

from stellar_hf.recomputation_stellar import recomputed_in_backward


class Perceptron(nn.Module):
    """Two linear layers; the activation between them is kept, or computed again."""

    def __init__(self, recompute: bool):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.activation, self.fc2 = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5)
        self.recompute = recompute
        self.activated: weakref.ref | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(features)
        activated = self.activation(hidden)
        self.activated = weakref.ref(activated)
        with recomputed_in_backward(activated, self.activation, of=hidden, enabled=self.recompute):
            return self.fc2(activated)


def features() -> torch.Tensor:
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_the_same_to_the_last_bit_and_the_output_is_let_go(autocast):
    gradients = []
    for recompute in (False, True):
        model, inputs = Perceptron(recompute), features()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(inputs)
        assert (model.activated() is None) == recompute
        gradients.append(torch.autograd.grad(output.sum(), [inputs, *model.parameters()]))
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_second_derivatives_are_right():
    model, inputs = Perceptron(recompute=True).double(), features().double().detach().requires_grad_()
    assert torch.autograd.gradgradcheck(model, inputs)


def test_backward_can_run_twice():
    model, inputs = Perceptron(recompute=True), features()
    loss = model(inputs).sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_hooks_of_the_module_see_one_computation():
    model, calls = Perceptron(recompute=True), []
    model.activation.register_forward_hook(lambda *_: calls.append(1))
    model(features()).sum().backward()
    assert len(calls) == 1


def test_transforms_of_functions_still_work():
    model, inputs = Perceptron(recompute=True), features()
    gradient = torch.func.grad(lambda rows: model(rows).sum())(inputs.detach())
    assert torch.equal(gradient, torch.autograd.grad(model(inputs).sum(), inputs)[0])


def test_without_gradients_nothing_is_done():
    model = Perceptron(recompute=True)
    with torch.no_grad():
        assert torch.equal(model(features()), Perceptron(recompute=False)(features()))
