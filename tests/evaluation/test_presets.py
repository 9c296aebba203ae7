# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The data of evaluations: presets, on small data sets with their columns; images of one's own; embedded scenes."""

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from stellar_hf import StellarImageProcessorPil
from stellar_hf.evaluation import PRESETS, load_own_images, load_preset, with_paper_transform
from stellar_hf.evaluation.presets import read_cityscapes_mask, read_class_ids, read_voc_mask, voc_palette

CLASSES = datasets.ClassLabel(names=["cat", "dog"])
MASKS = {"ade20k": [[0, 1], [150, 2]], "voc2012": [[0, 20], [255, 1]], "cityscapes": [[7, 33], [0, 11]]}
READ = {"ade20k": [[255, 0], [149, 1]], "voc2012": [[0, 20], [255, 1]], "cityscapes": [[0, 18], [255, 2]]}
SEGMENTED = list(MASKS)
CLASSIFIED = [name for name in PRESETS if name not in MASKS]


def image(*color):
    return Image.new("RGB", (9, 7), color)


@pytest.fixture
def copy_of(tmp_path):
    """Saves a small data set with the splits and columns of a preset's."""

    def save(name, **columns):
        preset = PRESETS[name]
        features = {preset.image_column: datasets.Image()}
        data = {preset.image_column: [image(1, 2, 3), image(200, 0, 0), image(0, 9, 9)]}
        if preset.label_column:
            features["label"], data["label"] = CLASSES, [0, 1, 0]
        else:
            masks = [Image.fromarray(np.uint8(MASKS[name]))] * 3
            features[preset.mask_column], data[preset.mask_column] = datasets.Image(), masks
        part = datasets.Dataset.from_dict(data, features=datasets.Features(features)).rename_columns(columns)
        datasets.DatasetDict({preset.train_split: part, preset.test_split: part.select([0, 1])}).save_to_disk(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize("name", CLASSIFIED)
def test_presets_of_classification(copy_of, name):
    data = load_preset(name, dataset_name=copy_of(name))
    assert set(data.tasks) == {"knn", "linear", "retrieval", "reconstruction"}
    splits = data.splits["knn"]
    assert (len(splits.train), len(splits.test)) == (3, 2) and splits.num_classes >= 37
    protocol = splits.protocol()
    assert protocol["train_split"] == PRESETS[name].train_split and protocol["test_images"] == 2
    assert protocol["train_fingerprint"] != protocol["test_fingerprint"]
    assert "dataset_id" not in protocol  # which is a folder's, and the Hub knows none


@pytest.mark.parametrize("name", SEGMENTED)
def test_presets_of_segmentation_read_their_masks(copy_of, name):
    data = load_preset(name, dataset_name=copy_of(name))
    assert set(data.tasks) == {"segmentation", "reconstruction"}
    splits = data.splits["segmentation"]
    assert splits.read_classes(splits.test[0]).tolist() == READ[name]
    counted = np.array(READ[name])
    assert counted[counted != 255].max() < splits.num_classes


def test_folders_take_the_place_of_a_preset_on_the_hub(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            image(1, 2, 3).save(tmp_path / part / name / "a.png")
    data = load_preset("places365", train_dir=tmp_path / "train", test_dir=tmp_path / "val")
    assert data.splits["knn"].train.features["label"].names == ["cat", "dog"]
    assert data.splits["knn"].protocol()["test"] == "val"  # not where it lies


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "imagenet"}, "no preset 'imagenet', only imagenet-1k"),
        ({"name": "places365"}, "Places365 has no copy on the Hub"),
        ({"name": "food101", "train_dir": "x"}, "Only one of train_dir and test_dir"),
    ],
)
def test_what_cannot_be_opened_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        load_preset(**arguments)


def test_a_copy_without_a_column_is_refused_by_its_name(copy_of):
    with pytest.raises(ValueError, match="ADE20K needs the column 'annotation', but this copy has only"):
        load_preset("ade20k", dataset_name=copy_of("ade20k", annotation="labels"))


def test_fewer_images_are_taken_at_equal_distances(copy_of):
    data = load_preset("food101", dataset_name=copy_of("food101"), max_train_images=2, max_test_images=1)
    splits = data.splits["knn"]
    assert splits.train["label"][:] == [0, 1] and len(splits.test) == 1


# Masks ---------------------------------------------------------------------------------------------------------------


def test_masks_of_voc_as_numbers_and_as_colours_are_the_same():
    numbers = np.array([[0, 1, 20], [255, 15, 7]], dtype=np.uint8)
    palette = np.full((256, 3), (224, 224, 192), dtype=np.uint8)  # which stands for no class
    palette[:21] = voc_palette(21)
    mask = Image.fromarray(numbers, mode=None)
    mask.putpalette(palette.flatten().tolist())
    assert mask.mode == "P"
    np.testing.assert_array_equal(read_voc_mask(mask), numbers)
    np.testing.assert_array_equal(read_voc_mask(mask.convert("RGB")), numbers)
    assert voc_palette(21)[[1, 2, 20]].tolist() == [[128, 0, 0], [0, 128, 0], [0, 64, 128]]


def test_impossible_masks_are_refused():
    with pytest.raises(ValueError, match="the value 99, but label ids from 0 to 33"):
        read_cityscapes_mask(np.full((2, 2), 99, dtype=np.uint8))
    with pytest.raises(ValueError, match="not colours"):
        read_class_ids(image(1, 2, 3))
    np.testing.assert_array_equal(read_class_ids(Image.new("L", (2, 1), 7).convert("RGB")), [[7, 7]])


# Own images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "with_train", "tasks"),
    [
        ([], False, {"reconstruction"}),
        (["label"], False, {"reconstruction", "retrieval"}),
        (["label"], True, {"reconstruction", "retrieval", "knn", "linear"}),
        (["mask"], False, {"reconstruction", "objects"}),
        (["mask"], True, {"reconstruction", "objects", "segmentation"}),
    ],
)
def test_own_images_have_the_tasks_that_their_columns_allow(tmp_path, columns, with_train, tasks):
    data = {"image": [image(1, 2, 3)], "label": [0], "mask": [Image.new("L", (9, 7))]}
    features = {"image": datasets.Image(), "label": CLASSES, "mask": datasets.Image()}
    names = ["image", *columns]
    dataset = datasets.Dataset.from_dict(
        {name: data[name] for name in names}, features=datasets.Features({name: features[name] for name in names})
    )
    dataset.save_to_disk(tmp_path / "test")
    found = load_own_images(tmp_path / "test", tmp_path / "test" if with_train else None)
    assert set(found.tasks) == tasks and found.name == "test"


# Preparation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "sizes"),
    [
        (StellarImageProcessorPil(), (256, 224)),
        (ViTImageProcessorPil(size={"height": 224, "width": 224}), (256, 224)),
        (StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}), (32, 28)),
    ],
)
def test_images_are_prepared_as_the_paper_does(processor, sizes):
    found = with_paper_transform(processor)
    pixels = found(Image.effect_noise((500, 300), 99).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, sizes[1], sizes[1]) and found.size["shortest_edge"] == sizes[0]
    assert list(found.image_mean) == list(processor.image_mean)


def test_a_processor_without_a_size_is_refused():
    class Nothing:
        pass

    with pytest.raises(ValueError, match="neither a crop_size nor a size"):
        with_paper_transform(Nothing())
