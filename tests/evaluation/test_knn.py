# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Exact neighbours in a bank of any size, on one process and on two, and classes that data sets number differently."""

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from stellar_hf.evaluation import class_names, knn_accuracies, knn_accuracy, match_classes, nearest_neighbours


def noisy(rows: int, width: int, seed: int, num_classes: int = 5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (rows,), generator=generator)
    centers = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    return centers[labels] + 1.5 * torch.randn(rows, width, generator=generator), labels


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(30, 200),
    queries=st.integers(1, 40),
    k=st.integers(1, 30),
    chunk_size=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_neighbours_are_those_of_scikit_learn(rows, queries, k, chunk_size, seed):
    bank, wanted = noisy(rows, 12, seed)[0], noisy(queries, 12, seed + 1)[0]
    similarities, neighbours = nearest_neighbours(bank, wanted, k, chunk_size=chunk_size)
    reference = NearestNeighbors(n_neighbors=k, metric="cosine").fit(bank.double())
    distances, indices = reference.kneighbors(wanted.double())
    np.testing.assert_allclose(1 - similarities.numpy(), distances, atol=1e-6)
    np.testing.assert_array_equal(neighbours.numpy(), indices)


def test_of_equal_rows_the_first_ones_are_taken_in_order():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-0.0, -1.0]])
    bank = rows.repeat(6, 1)
    query = torch.tensor([[3.0, 0.0], [0.0, -2.0]])
    expected = [[0, 4, 8, 12, 16, 20, 1, 3, 5], [3, 7, 11, 15, 19, 23, 0, 2, 4]]
    for chunk_size in (1, 2, 3, 7, 24, 100):
        similarities, neighbours = nearest_neighbours(bank, query, 9, chunk_size=chunk_size)
        assert neighbours.tolist() == expected
        assert similarities.tolist() == [[1.0] * 6 + [0.0] * 3] * 2


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_accuracy_is_that_of_scikit_learn_for_several_k_at_once(temperature):
    (bank, bank_labels), (queries, labels) = noisy(300, 12, 0), noisy(211, 12, 1)
    found = knn_accuracies(bank, bank_labels, queries, labels, ks=(1, 20, 300), temperature=temperature, chunk_size=64)
    for k, accuracy in found.items():
        classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda x: np.exp((1 - x) / temperature))
        expected = classifier.fit(bank.double(), bank_labels).score(queries.double(), labels)
        assert 0.3 < expected < 1 and accuracy == pytest.approx(expected, abs=1e-9)
        assert knn_accuracy(bank, bank_labels, queries, labels, k=k, temperature=temperature) == accuracy


def search(accelerator):
    bank, queries = noisy(70, 24, 0)[0].repeat(3, 1), noisy(33, 24, 1)[0]  # ties in other chunks
    return [nearest_neighbours(bank, queries, k, chunk_size=16, accelerator=accelerator) for k in (5, 100)]


def test_two_processes_find_exactly_what_one_finds(two_processes):
    expected = search(None)
    for found in two_processes(search):
        for (similarities, rows), (expected_similarities, expected_rows) in zip(found, expected, strict=True):
            assert torch.equal(rows, expected_rows) and torch.equal(similarities, expected_similarities)


def test_impossible_searches_are_refused():
    bank = torch.randn(6, 3)
    with pytest.raises(ValueError, match="k is 7 with 6 rows"):
        nearest_neighbours(bank, bank, 7)
    with pytest.raises(ValueError, match=r"queries \(6, 2\)"):
        nearest_neighbours(bank, bank[:, :2], 1)
    with pytest.raises(ValueError, match="The bank|bank is a ndarray"):
        nearest_neighbours(bank.numpy(), bank, 1)


def test_classes_are_matched_by_name_where_both_data_sets_know_names():
    matched = match_classes([0, 1, -1, 1], [0, 1, 2, None], ["cat", "dog"], ["bird", "cat", "dog"])
    assert matched.classes == ["cat", "dog"] and matched.unknown == ["bird"]
    assert matched.train_labels.tolist() == [0, 1, -1, 1] and matched.test_labels.tolist() == [-1, 0, 1, -1]
    # Without names numbers count, and a label may be a name itself.
    assert match_classes([5, 2], [2, 7]).test_labels.tolist() == [1, 2]
    assert match_classes(["a", None], ["b", "a"]).test_labels.tolist() == [1, 0]


def test_names_of_the_classes_of_a_data_set():
    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"]), "other": datasets.Value("int8")})
    dataset = datasets.Dataset.from_dict({"label": [1], "other": [0]}, features=features)
    assert class_names(dataset) == ["cat", "dog"]
    assert class_names(dataset, "other") is None and class_names([1]) is None
