# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The paper's linear probe: many heads on one frozen encoder, chosen on held-out images of the training set."""

import copy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stellar_hf import StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.evaluation import train_linear_probes
from stellar_hf.evaluation.linear import LinearHeads, RandomCrops

CROPS = StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
SETTINGS = {"num_epochs": 3, "train_batch_size": 12, "batch_size": 5, "learning_rates": (1e-4, 1e-1, 1e-2)}


def coloured(count, seed, names=("red", "green", "blue")):
    """Noisy images of several sizes, whose class is their colour."""
    rng = np.random.default_rng(seed)
    labels = [int(label) for label in rng.permutation(np.arange(count) % len(names))]
    images = []
    for index, label in enumerate(labels):
        pixels = rng.normal(COLOURS[names[label]], 40, (36 + index % 3, 40, 3))
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return StellarForPreTraining(tiny_config())


@pytest.fixture(scope="module")
def train_set():
    return coloured(50, seed=0)


@pytest.fixture(scope="module")
def probes(model, train_set):
    return probe(None, model, train_set)


def probe(accelerator, model, train_set, **settings):
    return train_linear_probes(
        model,
        CROPS,
        train_set,
        coloured(30, seed=1, names=("blue", "red", "green")),
        representations=("sparse_mean", "patch_mean"),
        accelerator=accelerator,
        show_progress=False,
        **{**SETTINGS, **settings},
    )


def assert_same(found, expected):
    for name, other in expected.items():
        assert found[name].accuracy == other.accuracy
        assert found[name].held_out_accuracies == other.held_out_accuracies
        for key, weight in other.head.state_dict().items():
            assert torch.equal(found[name].head.state_dict()[key], weight), (name, key)


def test_probes_tell_the_classes_apart_whatever_numbers_the_data_sets_give_them(probes, model):
    for found in probes.values():
        assert found.accuracy > 0.9 and set(found.classes) == set(COLOURS)
        assert found.held_out_accuracies[found.learning_rate] == max(found.held_out_accuracies.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_processes_train_exactly_what_one_trains(probes, model, train_set, two_processes):
    for found in two_processes(probe, model, train_set):
        assert_same(found, probes)


def test_an_interrupted_training_goes_on(probes, model, train_set, tmp_path):
    file = tmp_path / "probes.pt"
    probe(None, model, train_set, num_epochs=2, checkpoint=file)
    assert_same(probe(None, model, train_set, checkpoint=file), probes)


def test_a_broken_image_changes_no_other_crop(train_set, caplog, model):
    rows = [{"image": row["image"], "label": row["label"]} for row in train_set]
    broken = copy.copy(rows)
    broken[7] = {"image": {"bytes": b"no image", "path": None}, "label": 0}
    crops, of_broken = (RandomCrops(data, CROPS, "image", "label", (0.2, 1), 0) for data in (rows, broken))
    for row in (6, 8):
        assert np.array_equal(np.asarray(crops[row]["image"]), np.asarray(of_broken[row]["image"]))
    first = np.asarray(crops[0]["image"])
    crops.epoch = 1
    assert first.shape == (32, 32, 3) and not np.array_equal(first, np.asarray(crops[0]["image"]))
    found = train_linear_probes(model, CROPS, broken, rows[:9], show_progress=False, **{**SETTINGS, "num_epochs": 1})
    assert set(found["sparse_mean"].classes) == {0, 1, 2}
    assert caplog.text.count("cannot be read") == 1


def test_crops_show_transparency_as_the_processor_does():
    clear = [{"image": Image.new("RGBA", (40, 36), (255, 0, 0, 0)), "label": 0}]
    processor = StellarImageProcessorPil(**{**CROPS.to_dict(), "background": [0, 20, 40]})
    crop = RandomCrops(clear, processor, "image", "label", (0.2, 1), 0)[0]["image"]
    assert crop.getcolors() == [(32 * 32, (0, 20, 40))]


def test_heads_train_as_each_would_alone():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    rates = (1e-3, 1e-1)
    heads = LinearHeads(6, 3, rates, weight_decay=0.1, seed=0)
    alone = [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)) for _ in rates]
    for head, rate, start in zip(alone, rates, heads.heads, strict=True):
        head.load_state_dict(start.state_dict())
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), labels).backward()
            optimizer.step()
    for _ in range(5):
        heads.step(features, labels)
    for found, expected in zip(heads.heads, alone, strict=True):
        for key, weight in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], weight, rtol=1e-4, atol=1e-5)
    expected = [(head(features).argmax(1) == labels).float().mean().item() for head in alone]
    assert heads.accuracies(features, labels) == pytest.approx(expected)


def test_impossible_settings_are_refused(model, train_set):
    for change, said in (
        ({"held_out_share": 1.0}, "held_out_share 1.0"),
        ({"learning_rates": ()}, "learning_rates"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"label_column": "class"}, "no column 'class'"),
        ({"crop_scale": (0.5, 0.2)}, "global_scale"),
    ):
        with pytest.raises(ValueError, match=said):
            probe(None, model, train_set, **change)
    with pytest.raises(ValueError, match="no representation 'register'.*sparse_mean"):
        train_linear_probes(model, CROPS, train_set, train_set, representations=["register"], show_progress=False)
    one_class = train_set.filter(lambda row: row["label"] == 0)
    with pytest.raises(ValueError, match="needs two or more"):
        train_linear_probes(model, CROPS, one_class, train_set, show_progress=False)
