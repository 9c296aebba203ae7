# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Rankings of images by vectors and by tokens, against scikit-learn, FAISS and plain loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from stellar_hf.evaluation import build_token_index, late_interaction, nearest_tokens, retrieval_scores


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(count, num_classes, seed):
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_size", [1, 7, 256])
def test_scores_of_vectors_are_those_of_scikit_learn(chunk_size):
    queries, gallery = draw(19, 6, seed=0), draw(40, 6, seed=1)
    labels, gallery_labels = labels_of(19, 5, 2), labels_of(40, 5, 3)
    scores = retrieval_scores(queries, labels, gallery, gallery_labels, ks=(1, 4), chunk_size=chunk_size)
    similarities = cosine_similarity(queries.double(), gallery.double())
    relevant = gallery_labels.numpy() == labels.numpy()[:, None]
    expected = [average_precision_score(*pair) for pair in zip(relevant, similarities, strict=True)]
    assert scores["map"] == pytest.approx(np.mean(expected), abs=1e-6)
    ranked = np.take_along_axis(relevant, np.argsort(-similarities, axis=1), axis=1)
    assert scores["recall@1"] == pytest.approx(ranked[:, 0].mean())
    assert scores["recall@4"] == pytest.approx(ranked[:, :4].any(1).mean())


def test_tokens_are_compared_by_late_interaction():
    queries, gallery = draw(5, 3, 6, seed=0), draw(9, 4, 6, seed=1)
    found = late_interaction(queries, gallery)
    for q, query in enumerate(queries):
        for g, image in enumerate(gallery):
            expected = cosine_similarity(query.double(), image.double()).max(axis=1).mean()
            assert found[q, g].item() == pytest.approx(expected, abs=1e-6)


def test_an_object_is_found_in_images_that_show_other_things_too():
    """Every image shows two objects and nothing at two tokens; the mean of the tokens does not find them as well."""
    kinds = draw(6, 16, seed=0)
    objects = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(30)])
    gallery = torch.cat([kinds[objects] + 0.2 * draw(30, 2, 16, seed=1), 2 * draw(30, 2, 16, seed=2)], dim=1)
    queries, labels = kinds[:, None] + 0.2 * draw(6, 1, 16, seed=3), torch.arange(6)
    by_tokens = retrieval_scores(queries, labels, gallery, objects, ks=(1,))
    by_means = retrieval_scores(queries.mean(1), labels, gallery.mean(1), objects, ks=(1,))
    assert by_tokens["recall@1"] == 1.0 and by_tokens["map"] > 0.95 > by_means["map"] + 0.1


def test_first_images_are_those_of_faiss():
    pytest.importorskip("faiss")
    queries, gallery, images = draw(12, 6, seed=0), draw(50, 4, 6, seed=1), torch.arange(50)
    matches = nearest_tokens(build_token_index([gallery]), queries, num_sparse_tokens=4, k=1)
    labels = torch.from_numpy(matches.images[:, 0])
    assert retrieval_scores(queries[:, None], labels, gallery, images, ks=(1,)) == {"recall@1": 1.0, "map": 1.0}


def test_a_querys_own_image_can_be_left_out(caplog):
    images = draw(20, 6)
    labels = torch.arange(20) // 2
    scores = retrieval_scores(images, labels, images, labels, ks=(1,), exclude=torch.arange(20))
    similarities = cosine_similarity(images.double())
    np.fill_diagonal(similarities, -np.inf)
    places = (np.argsort(-similarities, axis=1) == (np.arange(20) ^ 1)[:, None]).argmax(axis=1)
    assert scores["map"] == pytest.approx((1 / (places + 1)).mean()) and scores["recall@1"] == (places == 0).mean()
    alone = retrieval_scores(images[:3], torch.tensor([0, 0, 99]), images, labels, ks=(1,))
    assert alone["recall@1"] == 1.0 and "1 of 3 queries" in caplog.text


def test_impossible_retrievals_are_refused():
    images, labels = draw(4, 6), torch.arange(4)
    for change, said in (
        ({"gallery": draw(4, 2, 6)}, "the gallery"),
        ({"query_labels": labels[:3]}, "labels"),
        ({"ks": (5,)}, "k up to G"),
        ({"query_labels": labels + 9}, "No query has a relevant image"),
        ({"exclude": labels[:2]}, "exclude"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ):
        sets = {"queries": images, "query_labels": labels, "gallery": images, "gallery_labels": labels, "ks": (1,)}
        with pytest.raises(ValueError, match=said):
            retrieval_scores(**{**sets, **change})
