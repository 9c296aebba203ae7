# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from stellar_hf.evaluation.clustering import average_linkage, kmeans, nearest_centers


def separable_sets(num_sets: int, num_clusters: int = 4) -> torch.Tensor:
    """(B, 60, 3) points in tight clusters around far corners, far from zero and different in each set."""
    generator = torch.Generator().manual_seed(3)
    corners = 5 * torch.randn(num_sets, num_clusters, 3, generator=generator) + 100
    noise = 0.1 * torch.randn(num_sets, 60, 3, generator=generator)
    return corners[:, torch.arange(60) % num_clusters] + noise


def test_kmeans_finds_what_scikit_learn_finds():
    points = separable_sets(8)
    found = kmeans(points, num_clusters=4)
    for index, own_points in enumerate(points):
        expected = KMeans(4, n_init=10, random_state=0).fit(own_points.double().numpy())
        assert adjusted_rand_score(expected.labels_, found.labels[index]) == 1
        assert found.inertia[index].item() == pytest.approx(expected.inertia_, rel=1e-3)
        order = torch.from_numpy(expected.predict(found.centers[index].double().numpy())).long()
        expected_centers = torch.from_numpy(expected.cluster_centers_)[order]
        torch.testing.assert_close(found.centers[index].double(), expected_centers, atol=1e-4, rtol=0)


def test_kmeans_of_structureless_points_is_as_tight_as_scikit_learn_makes_them():
    points = torch.rand(6, 200, 5, generator=torch.Generator().manual_seed(0))
    found = kmeans(points, 6).inertia
    expected = torch.tensor([KMeans(6, n_init=5, random_state=0).fit(own.numpy()).inertia_ for own in points])
    assert (found / expected).mean() < 1.03


def test_clusters_of_a_set_do_not_depend_on_the_sets_beside_it():
    points = torch.rand(5, 50, 3, generator=torch.Generator().manual_seed(1))
    together = kmeans(points, 3)
    for index in range(5):
        assert torch.equal(kmeans(points[index : index + 1], 3).labels[0], together.labels[index])
    assert torch.equal(nearest_centers(points, together.centers), together.labels)


def test_kmeans_of_equal_points_is_one_cluster():
    found = kmeans(torch.full((2, 10, 3), 0.3), 4)
    assert (found.labels == found.labels[:, :1]).all()
    assert found.inertia.tolist() == [0, 0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), num_members=st.integers(2, 9), data=st.data())
def test_average_linkage_is_that_of_scipy(seed, num_members, data):
    num_clusters = data.draw(st.integers(1, num_members))
    points = torch.rand(3, num_members, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = average_linkage(torch.cdist(points, points), num_clusters)
    for own_points, own_labels in zip(points, labels, strict=True):
        expected = fcluster(linkage(own_points.numpy(), "average"), num_clusters, "maxclust")
        assert adjusted_rand_score(expected, own_labels) == 1
        assert own_labels.unique().tolist() == list(range(num_clusters))
        assert own_labels[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(torch.rand(2, 5, 3), 6), "num_clusters is 6 with 5 points"),
        (lambda: kmeans(torch.rand(5, 3), 2), r"shape \(5, 3\)"),
        (lambda: kmeans(torch.full((1, 5, 3), torch.nan), 2), "NaN"),
        (lambda: kmeans(torch.rand(1, 5, 3), 0), "num_clusters is 0"),
        (lambda: average_linkage(torch.rand(2, 3, 3), 4), "num_clusters is 4 with 3 members"),
        (lambda: average_linkage(torch.rand(2, 3, 4), 2), r"shape \(2, 3, 4\)"),
    ],
)
def test_impossible_clusters_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
