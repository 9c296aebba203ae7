# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_hf.evaluation import knn_accuracy, linear_probe_accuracy


def blobs(rows: int, seed: int, num_classes: int = 5, width: int = 16, noise: float = 0.1):
    """Separable clusters: class c lies around the c-th axis."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % num_classes
    return torch.eye(width)[labels] + noise * torch.randn(rows, width, generator=generator), labels


def reference_knn(train_features, train_labels, test_features, test_labels, k, temperature):
    correct = 0
    for row, label in zip(test_features.tolist(), test_labels.tolist(), strict=True):
        votes = []
        for other, other_label in zip(train_features.tolist(), train_labels.tolist(), strict=True):
            cosine = sum(a * b for a, b in zip(row, other, strict=True)) / math.hypot(*row) / math.hypot(*other)
            votes.append((cosine, other_label))
        scores: dict[int, float] = {}
        for cosine, other_label in sorted(votes, reverse=True)[:k]:
            scores[other_label] = scores.get(other_label, 0) + math.exp(cosine / temperature)
        correct += max(scores, key=scores.__getitem__) == label
    return correct / len(test_labels)


@pytest.mark.parametrize("classifier", [knn_accuracy, linear_probe_accuracy])
def test_classifiers_are_perfect_on_separable_blobs(classifier):
    assert classifier(*blobs(200, seed=0), *blobs(100, seed=1)) == 1.0


@pytest.mark.parametrize("classifier", [knn_accuracy, linear_probe_accuracy])
def test_classifiers_are_at_chance_on_shuffled_labels(classifier):
    features, labels = blobs(1000, seed=0)
    shuffled = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(2))]
    assert classifier(features, shuffled, *blobs(1000, seed=1)) == pytest.approx(0.2, abs=0.1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 0.37, 8.0, 1e4]))
def test_knn_ignores_the_scale_of_features_and_the_order_of_training_rows(seed, scale):
    train_features, train_labels = blobs(60, seed=seed, noise=0.8)
    test = blobs(40, seed=seed + 1, noise=0.8)
    expected = knn_accuracy(train_features, train_labels, *test, k=10)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    permuted = knn_accuracy(train_features[order], train_labels[order], *test, k=10)
    scaled = knn_accuracy(train_features * scale, train_labels, test[0] / scale, test[1], k=10)
    # One of forty votes may flip where two neighbours or two classes are equal to the last bit.
    assert permuted == pytest.approx(expected, abs=0.026)
    assert scaled == pytest.approx(expected, abs=0.026)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (7, 1.0), (30, 0.5)])
def test_knn_equals_a_plain_loop_whatever_the_chunks(k, temperature):
    train = blobs(30, seed=3, noise=0.7)
    test = blobs(23, seed=4, noise=0.7)
    expected = reference_knn(*train, *test, k, temperature)
    assert 0 < expected < 1
    for chunk_size in (1, 5, 512):
        accuracy = knn_accuracy(*train, *test, k=k, temperature=temperature, chunk_size=chunk_size)
        assert accuracy == pytest.approx(expected)


def test_knn_weighs_close_neighbours_more_than_many_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    assert knn_accuracy(train, labels, *query, k=3, temperature=0.07) == 1.0
    assert knn_accuracy(train, labels, *query, k=3, temperature=10.0) == 0.0


def test_knn_stays_finite_at_small_temperatures():
    assert knn_accuracy(*blobs(200, seed=0), *blobs(100, seed=1), temperature=1e-4) == 1.0


def test_linear_probe_is_deterministic_and_ignores_shift_and_scale_of_features():
    (train, train_labels), (test, test_labels) = blobs(300, seed=5, noise=0.8), blobs(300, seed=6, noise=0.8)
    expected = linear_probe_accuracy(train, train_labels, test, test_labels)
    assert linear_probe_accuracy(train, train_labels, test, test_labels) == expected
    scale, shift = torch.logspace(-2, 2, 16), torch.linspace(-3, 3, 16)
    moved = linear_probe_accuracy(train * scale + shift, train_labels, test * scale + shift, test_labels)
    assert moved == pytest.approx(expected, abs=0.01)


def test_linear_probe_accepts_constant_features():
    (train, train_labels), (test, test_labels) = blobs(200, seed=0), blobs(100, seed=1)
    train, test = (torch.cat([part, torch.ones(len(part), 2)], dim=1) for part in (train, test))
    assert linear_probe_accuracy(train, train_labels, test, test_labels) == 1.0


@pytest.mark.parametrize("classifier", [knn_accuracy, linear_probe_accuracy])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": torch.zeros(0, 16), "train_labels": torch.zeros(0, dtype=torch.long)}, "empty"),
        ({"test_features": torch.zeros(0, 16), "test_labels": torch.zeros(0, dtype=torch.long)}, "empty"),
        ({"test_features": torch.ones(100, 15)}, "16 columns and test_features 15"),
        ({"test_labels": torch.zeros(99, dtype=torch.long)}, r"\(100, 16\) and test_labels \(99,\)"),
        ({"train_features": torch.full((200, 16), torch.nan)}, "NaN"),
        ({"train_labels": torch.full((200,), -1)}, "integers >= 0"),
        ({"train_labels": torch.ones(200, dtype=torch.bool)}, "integers >= 0, but are torch.bool"),
        ({"train_features": torch.ones(200, 16).numpy()}, "train_features is a ndarray, but a tensor is expected"),
        ({"test_labels": [0] * 100}, "test_labels is a list"),
    ],
)
def test_classifiers_reject_impossible_inputs(classifier, change, message):
    (train_features, train_labels), (test_features, test_labels) = blobs(200, seed=0), blobs(100, seed=1)
    arguments = {
        "train_features": train_features,
        "train_labels": train_labels,
        "test_features": test_features,
        "test_labels": test_labels,
    }
    with pytest.raises(ValueError, match=message):
        classifier(**(arguments | change))


@pytest.mark.parametrize(
    "impossible",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 0},
        {"temperature": "low"},
        {"k": 0},
        {"k": 2.5},
        {"k": math.nan},
        {"k": True},
        {"chunk_size": 0},
        {"chunk_size": None},
    ],
)
def test_knn_rejects_impossible_numbers(impossible):
    ((name, value),) = impossible.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but must be"):
        knn_accuracy(*blobs(20, seed=0), *blobs(5, seed=1), **impossible)


def test_knn_rejects_more_neighbours_than_rows():
    with pytest.raises(ValueError, match="k is 20 with 10 training rows"):
        knn_accuracy(*blobs(10, seed=0), *blobs(5, seed=1))


def test_linear_probe_rejects_a_single_class():
    with pytest.raises(ValueError, match="single class"):
        linear_probe_accuracy(*blobs(10, seed=0, num_classes=1), *blobs(5, seed=1))
