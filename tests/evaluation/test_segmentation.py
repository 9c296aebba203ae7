# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import SwinConfig, SwinModel, ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

from stellar_hf import StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.evaluation import (
    confusion_matrix,
    dense_features,
    knn_segmentation,
    knn_segmentation_scores,
    load_label_maps,
    low_rank_features,
    mean_iou,
    segmentation_probe_scores,
    train_segmentation_probe,
)
from stellar_hf.features import ImageFeatures, encode_images


def draw(seed):
    return torch.Generator().manual_seed(seed)


# Mean IoU -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), num_classes=st.integers(2, 9), ignored=st.booleans())
def test_mean_iou_over_batches_equals_scikit_learn_and_torchmetrics_on_the_whole_set(seed, num_classes, ignored):
    generator = draw(seed)
    truth = torch.randint(num_classes, (6, 5, 4), generator=generator)
    prediction = torch.randint(num_classes, (6, 5, 4), generator=generator)
    truth[0, 0, 0], prediction[truth == 1] = 0, 0  # classes that are never right, and one pixel that counts
    if ignored:
        truth[torch.rand(truth.shape, generator=generator) < 0.4] = 255
        truth[0, 0, 0] = 0
    batches = zip(prediction.split(4), truth.split(4), strict=True)
    confusion = sum(confusion_matrix(one, other, num_classes) for one, other in batches)
    counted = truth != 255
    expected = jaccard_score(truth[counted], prediction[counted], average="macro", zero_division=0)
    assert mean_iou(confusion) == pytest.approx(expected, abs=1e-6)
    index = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=255)
    assert mean_iou(confusion) == pytest.approx(index(prediction, truth).item(), abs=1e-6)


def test_mean_iou_of_a_set_is_not_the_mean_of_its_batches():
    truth = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    prediction = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    assert mean_iou(confusion_matrix(prediction, truth, 3)) == pytest.approx((6 / 7 + 1 / 2) / 2)  # class 2 is absent


@pytest.mark.parametrize(
    ("prediction", "labels", "said"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 3), r"\(2, 2\) and labels \(2, 3\)"),
        (torch.tensor([0, 3]), torch.tensor([0, 1]), r"prediction hold classes from 0 to 3.*\[0, 3\)"),
        (torch.tensor([0, 1]), torch.tensor([-1, 1]), "labels hold classes from -1 to 1.*ignored 255"),
    ],
)
def test_confusion_matrix_rejects_what_is_no_class(prediction, labels, said):
    with pytest.raises(ValueError, match=said):
        confusion_matrix(prediction, labels, 3)


# Features and labels ------------------------------------------------------------------------------------------------


def test_low_rank_features_of_few_tokens_are_those_of_the_largest_mass():
    tokens, maps = torch.randn(3, 4, 5, generator=draw(0)), torch.rand(3, 6, 4, generator=draw(1))
    maps[:, :, 2] += 2
    one = low_rank_features(tokens, maps, 1)
    torch.testing.assert_close(one, maps[:, :, 2:3] * tokens[:, 2:3])
    torch.testing.assert_close(low_rank_features(tokens, maps, 4), maps @ tokens)
    ranks = [torch.linalg.matrix_rank(low_rank_features(tokens, maps, k)).tolist() for k in (1, 2, 3)]
    assert ranks == [[1] * 3, [2] * 3, [3] * 3]


def test_dense_features_are_the_patches_of_any_encoder(tiny_config):
    pixel_values = torch.randn(2, 3, 32, 24, generator=draw(0))
    model = StellarForPreTraining(tiny_config()).eval()
    with torch.no_grad():
        features = dense_features(model, pixel_values)
        output = model.stellar(pixel_values)
    torch.testing.assert_close(features["dense"].float(), output.last_hidden_state[:, 1:13], atol=4e-3, rtol=1e-3)
    assert features["grid_size"].tolist() == [[4, 3]] * 2
    assert features["localization"].shape == (2, 12, 4)


def test_dense_features_of_an_autoencoder_are_all_in_the_order_of_the_image():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4), add_pooling_layer=False).eval()
    autoencoder = ViTMAEModel(ViTMAEConfig(**sizes, image_size=16, patch_size=4)).eval()
    autoencoder.load_state_dict(vit.state_dict())
    pixel_values = torch.randn(2, 3, 16, 16, generator=draw(0))
    with torch.no_grad():
        features, expected = (dense_features(model, pixel_values) for model in (autoencoder, vit))
    assert set(features) == {"dense", "grid_size"} and features["dense"].shape == (2, 16, 16)
    torch.testing.assert_close(features["dense"], expected["dense"], atol=2e-3, rtol=0)


def test_dense_features_need_a_vector_for_each_patch():
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
    model = SwinModel(SwinConfig(**sizes, image_size=32, patch_size=4)).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="an encoder that merges patches has none"):
        dense_features(model, torch.randn(1, 3, 32, 32))


def test_label_maps_lie_where_their_images_do(tmp_path):
    ids = np.kron(np.arange(24).reshape(4, 6), np.ones((10, 10), int)).astype(np.uint8)  # blocks of 10 pixels
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    Image.fromarray(ids).save(tmp_path / "mask.png")
    gray = Image.fromarray(ids * 10)
    masks = [str(tmp_path / "mask.png"), str(tmp_path / "broken.png")]
    rows = datasets.Dataset.from_dict({"image": [gray, gray], "mask": masks}).cast_column("mask", datasets.Image())
    processor = StellarImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    image = processor([gray], do_normalize=False, return_tensors="pt")["pixel_values"][0, 0]
    maps = load_label_maps(rows, [0, 1], processor, show_progress=False)
    assert maps.dtype == torch.uint8 and (maps[1] == 255).all()
    middles = (slice(2, None, 5), slice(2, None, 5))  # where a bicubic image has the colour of its block
    assert torch.equal(maps[0][middles].float(), (image * 25.5).round()[middles])
    table = [255, *range(23)]
    shifted = load_label_maps(rows.select([0]), [0], processor, classes=table, show_progress=False)
    assert torch.equal(shifted[0], torch.tensor(table, dtype=torch.uint8)[maps[0].long()])
    with pytest.raises(ValueError, match="id 23, but classes has only 3 entries"):
        load_label_maps(rows.select([0]), [0], processor, classes=[0, 1, 2], show_progress=False)


def test_label_maps_of_different_sizes_need_a_processor():
    masks = [{"mask": np.zeros(size, np.uint8)} for size in ((4, 4), (4, 6))]
    with pytest.raises(ValueError, match=r"\(4, 4\), \(4, 6\).*pass the processor"):
        load_label_maps(masks, [0, 1], show_progress=False)
    with pytest.raises(ValueError, match="ids of pixels are expected"):
        load_label_maps([{"mask": np.zeros((4, 4, 3), np.uint8)}], [0], show_progress=False)


# Probes -------------------------------------------------------------------------------------------------------------


def toy(num_images, seed, num_classes=3):
    """Images of 4x4 patches in 8x8 pixels; the class of a patch is a direction of D, and of one of the tokens."""
    generator = draw(seed)
    classes = torch.randint(num_classes, (num_images, 16), generator=generator)
    directions = torch.eye(8)[:num_classes] * 3
    dense = directions[classes] + 0.3 * torch.randn(num_images, 16, 8, generator=generator)
    tokens = directions.expand(num_images, -1, -1) + 0.3 * torch.randn(num_images, num_classes, 8, generator=generator)
    localization = torch.nn.functional.one_hot(classes, num_classes).float()
    labels = classes.view(-1, 4, 4).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).to(torch.uint8)
    labels[:, 0, :] = 255
    tensors = {
        "dense": dense.half(),
        "sparse_tokens": tokens.half(),
        "localization": localization.half(),
        "grid_size": torch.tensor([[4, 4]] * num_images),
    }
    return ImageFeatures(index=torch.arange(num_images), tensors=tensors), labels


RECIPE = {"num_classes": 3, "epochs": 12, "batch_size": 16, "learning_rate": 0.02, "show_progress": False}


def test_probes_learn_what_is_linear_and_each_is_what_it_is_alone():
    train, test = toy(64, seed=0), toy(32, seed=1)
    probes = train_segmentation_probe(*train, **RECIPE)
    scores = segmentation_probe_scores(probes, *test)
    assert list(scores) == ["dense", "low_rank_1", "low_rank_2", "low_rank"]
    assert scores["dense"]["grid_miou"] > 0.95 and scores["low_rank"]["grid_miou"] > 0.95
    # Two of three tokens tell two of three classes, and that the rest is the third.
    assert 1 / 3 < scores["low_rank_1"]["grid_miou"] < scores["low_rank"]["grid_miou"]
    alone = train_segmentation_probe(*train, num_tokens=[], **RECIPE)
    assert segmentation_probe_scores(alone, *test, batch_size=5) == {"dense": scores["dense"]}


def test_probes_find_nothing_in_shuffled_labels():
    features, labels = toy(64, seed=0)
    shuffled = labels[:, 1:].flatten()[torch.randperm(labels[:, 1:].numel(), generator=draw(2))].view(64, 7, 8)
    labels = torch.cat([labels[:, :1], shuffled], dim=1)
    probes = train_segmentation_probe(features, labels, num_tokens=[], **RECIPE)
    assert segmentation_probe_scores(probes, *toy(32, seed=1))["dense"]["pixel_accuracy"] < 0.5


def test_an_ignored_image_changes_no_score():
    train, (features, labels) = toy(32, seed=0), toy(8, seed=1)
    probes = train_segmentation_probe(*train, num_tokens=[3], **RECIPE)
    some = ImageFeatures(features.index[:6], {name: tensor[:6] for name, tensor in features.tensors.items()})
    labels[6:] = 255
    assert segmentation_probe_scores(probes, features, labels) == segmentation_probe_scores(probes, some, labels[:6])


def test_probes_run_on_the_one_inference_loop(tiny_config):
    model = StellarForPreTraining(tiny_config())
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(4)]
    rows = [{"image": image, "mask": np.asarray(image)[..., 0] // 128} for image in images]
    rows[2] = {"image": b"no image", "mask": rows[2]["mask"]}
    processor = StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    features = encode_images(model, rows, processor, encode=dense_features, show_progress=False)
    labels = load_label_maps(rows, features.index, processor, show_progress=False)
    assert labels.shape == (3, 32, 32)
    probes = train_segmentation_probe(features, labels, 2, epochs=1, show_progress=False)
    assert list(segmentation_probe_scores(probes, features, labels)) == [
        "dense", "low_rank_1", "low_rank_2", "low_rank"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_tokens": [5]}, "num_tokens has 5, but there are 3"),
        ({"num_classes": 2}, r"classes from 0 to 2, but must be in \[0, 2\)"),
        ({"labels": torch.zeros(4, 9, 8)}, r"\(4, 9, 8\).*multiples of the 4x4 patches"),
        ({"labels": torch.full((4, 8, 8), 255)}, "ignored label 255"),
        ({"features": ImageFeatures()}, "encode=dense_features"),
    ],
)
def test_probes_reject_what_they_cannot_learn(change, said):
    features, labels = toy(4, seed=0)
    with pytest.raises(ValueError, match=said):
        train_segmentation_probe(**({"features": features, "labels": labels, **RECIPE} | change))


# Nearest patches ----------------------------------------------------------------------------------------------------


def test_nearest_patches_equal_scikit_learn_pixel_by_pixel():
    train, test = toy(12, seed=0), toy(5, seed=1)
    features, labels = train
    features.tensors["dense"] = (features.dense + torch.randn(features.dense.shape, generator=draw(3))).half()
    labels[:, 0] = labels[:, 1]
    labels[torch.rand(labels.shape, generator=draw(4)) < 0.3] = 0  # pixels of a patch differ
    found = knn_segmentation(features, labels, test[0], 3, num_neighbours=(1, 3))

    scaler = StandardScaler().fit(features.dense.float().flatten(0, 1))
    bank, queries = (scaler.transform(one.dense.float().flatten(0, 1)) for one in (features, test[0]))
    for k, maps in found.items():
        for row, column in ((0, 0), (1, 0), (1, 1)):
            neighbours = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
            neighbours.fit(bank, labels[:, row::2, column::2].flatten())
            assert maps[:, row::2, column::2].flatten().tolist() == neighbours.predict(queries).tolist()


def test_nearest_patches_choose_k_and_beat_chance():
    scores = knn_segmentation_scores(*toy(20, seed=0), *toy(8, seed=1), 3, num_neighbours=(1, 5))
    assert scores["miou"] > 0.9 and scores["num_neighbours"] in (1, 5)
    with pytest.raises(ValueError, match="k is 300 with 288 rows in the bank"):
        knn_segmentation_scores(*toy(20, seed=0), *toy(8, seed=1), 3, num_neighbours=(300,))
