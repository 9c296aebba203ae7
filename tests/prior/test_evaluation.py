# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Measures of generated images, on sets whose measures are known."""

import pytest
import torch

from stellar_hf.evaluation import format_results_table
from stellar_hf.prior import (
    GENERATION_COLUMNS,
    GenerationEvaluation,
    draw_normal,
    nearest_distances,
    other_scenes,
    train_classifier,
)


def test_nearest_distances():
    references = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    rows = torch.tensor([[3.0, 4.0], [10.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(nearest_distances(rows, references, chunk_size=2), torch.tensor([5.0, 1.0, 0.0]))


def test_copies_have_no_distance_however_large_their_numbers_are():
    references = 100 + torch.rand(400, 96, generator=torch.Generator().manual_seed(0))
    assert nearest_distances(references[:300], references).max() == 0
    shifted = references + 0.25 / 96**0.5
    torch.testing.assert_close(nearest_distances(shifted, references), torch.full((400,), 0.25), rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def colours():
    """Noisy images of three colours; what is asked of them is the colour, and whether it is the first one."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.arange(300) % 3
    images = 0.3 * torch.rand(300, 3, 16, 16, generator=generator)
    images[torch.arange(300), colour] += 0.6
    return images, {"count": colour, "shape": (colour == 0).long(), "material": colour}


NUM_CLASSES = {"count": 3, "shape": 2, "material": 3}


@pytest.fixture(scope="module")
def classifier(colours):
    return train_classifier(*colours, NUM_CLASSES, num_epochs=6, batch_size=50)


def test_classifier_learns_its_answers_and_repeats_itself(colours, classifier):
    images, labels = colours
    features, answers = classifier.judge(images, batch_size=70)
    assert features.shape == (300, 64) and not classifier.training
    for name, label in labels.items():
        assert torch.equal(answers[name].argmax(1), label)
        torch.testing.assert_close(answers[name].sum(1), torch.ones(300))
    state = torch.get_rng_state()
    again = train_classifier(images, labels, NUM_CLASSES, num_epochs=6, batch_size=50)
    assert torch.equal(again.judge(images)[0], features)
    assert torch.equal(torch.get_rng_state(), state)


def test_measures_tell_copies_from_others(colours, classifier):
    images, labels = colours
    counts = labels["count"]
    train, test = images[:200], images[200:]
    evaluation = GenerationEvaluation(classifier, train, test)
    copies = evaluation.measure(train[:100], counts[:100])
    others = evaluation.measure(test, counts[200:])
    assert copies["nearest_features"] == copies["nearest_pixels"] == 0
    assert others["nearest_pixels"] > 0.05 and others["nearest_features"] > copies["nearest_features"]
    assert others["frechet_distance"] == pytest.approx(0, abs=1e-4) and others["counted"] == 1
    shifted = evaluation.measure(train[:100], (counts[:100] + 1) % 3)
    assert shifted["counted"] == 0
    # Images between two colours have no sure answer.
    between = evaluation.measure((train[:99:3] + train[1:99:3]) / 2, counts[:33])
    assert between["sure_of_material"] < copies["sure_of_material"]
    wrong = evaluation.measure(train[:100][counts[:100] == 0], counts[:100][counts[:100] == 0])
    assert wrong["frechet_distance"] > 10 * max(copies["frechet_distance"], 1e-6)


def test_distance_of_pixels_is_their_root_mean_square(colours, classifier):
    images, labels = colours
    evaluation = GenerationEvaluation(classifier, images[:1], images)
    measured = evaluation.measure(images[:2] * 0 + images[:1] + 0.25, labels["count"][:2])
    assert measured["nearest_pixels"] == pytest.approx(0.25, rel=1e-4)
    table = format_results_table({"drawn": measured}, GENERATION_COLUMNS)
    assert "Fréchet" in table and "0.250" in table.splitlines()[-1]


def test_labels_must_fit(colours):
    images, labels = colours
    with pytest.raises(ValueError, match="300 images and 299 labels of count"):
        train_classifier(images, {**labels, "count": labels["count"][1:]}, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"material run from 0 to 2.*\[0, 2\)"):
        train_classifier(images, labels, {**NUM_CLASSES, "material": 2})
    with pytest.raises(ValueError, match=r"labels of \['count', 'shape', 'material'\] and num_classes of \['count'\]"):
        train_classifier(images, labels, {"count": 3})


def test_normal_draws_have_the_moments_of_their_class(prior, random_factors):
    tokens, localization = random_factors(50)
    labels = torch.arange(50) % 2
    tokens[labels == 1] += 10
    wanted = torch.tensor([0, 1]).repeat_interleave(2000)
    drawn = prior.pack(*draw_normal(prior, tokens, localization, labels, wanted))
    latents = prior.pack(tokens, localization)
    for label in (0, 1):
        own, members = drawn[wanted == label], latents[labels == label]
        torch.testing.assert_close(own.mean(0), members.mean(0), atol=0.15, rtol=0)
        torch.testing.assert_close(own.std(0), members.std(0), atol=0.15, rtol=0)


def test_other_scenes_are_of_the_same_class():
    labels = torch.tensor([0, 1, 1, 0, 1])
    assert other_scenes(labels).tolist() == [3, 2, 4, 0, 1]
