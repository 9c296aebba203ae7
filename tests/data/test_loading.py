# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Data sets of images from folders and shards."""

import io
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from stellar_hf.data import load_images


def pixels(value):
    return np.full((8, 10, 3), value, dtype=np.uint8)


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(value)).save(path)


def values(dataset):
    return sorted(int(np.asarray(row["image"])[0, 0, 0]) for row in dataset)


@pytest.fixture
def shards(tmp_path):
    """A folder of three WebDataset shards with four images each, of the values 0 to 11."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for value in range(4 * shard, 4 * shard + 4):
                file = io.BytesIO()
                Image.fromarray(pixels(value)).save(file, format="PNG")
                for name, content in ((f"{value}.png", file.getvalue()), (f"{value}.cls", str(value % 2).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_folder_of_images_with_subfolders(tmp_path):
    for value, name in enumerate(("a.png", "b/c.PNG", "b/d/e.jpg")):
        write_image(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = load_images(tmp_path)
    assert values(dataset) == [0, 1, 2] and dataset.column_names == ["image"]


def test_folders_of_classes(tmp_path):
    for value, name in enumerate(("dog/a.png", "cat/b.png", "cat/c.png")):
        write_image(tmp_path / name, value)
    dataset = load_images(tmp_path)
    assert dataset.features["label"].names == ["cat", "dog"]
    assert {int(np.asarray(row["image"])[0, 0, 0]): row["label"] for row in dataset} == {0: 1, 1: 0, 2: 0}


@pytest.mark.parametrize("pattern", ["", "/*.tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards(shards, pattern, streaming):
    dataset = load_images(f"{shards}{pattern}", streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset) == streaming
    assert values(dataset) == list(range(12)) and "cls" in dataset.column_names


def test_parquet_and_saved_data_sets(shards, tmp_path):
    dataset = load_images(shards)
    (tmp_path / "parquet").mkdir()
    dataset.rename_column("image", "picture").to_parquet(tmp_path / "parquet" / "0.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "splits")
    for source, split in (
        ("parquet", "train"),
        ("parquet/0.parquet", "train"),
        ("saved", "train"),
        ("splits", "test"),
    ):
        for streaming in (False, True):
            assert values(load_images(tmp_path / source, split, streaming)) == list(range(12)), source


def test_an_endless_shuffled_stream_shows_every_image_once_in_a_pass(shards):
    stream = load_images(shards, streaming=True).repeat(None).shuffle(seed=0, buffer_size=1)
    rows = stream.take(36)
    assert values(rows) == sorted(3 * list(range(12)))


def test_what_cannot_be_opened_is_said_in_a_sentence(shards, tmp_path):
    write_image(tmp_path / "photos" / "a.png")
    with pytest.raises(ValueError, match="leave out streaming"):
        load_images(tmp_path / "photos", streaming=True)
    write_image(shards / "a.png")
    with pytest.raises(ValueError, match=r"several kinds, \.png \.tar"):
        load_images(shards)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"photo": "a.png"}\n')
    with pytest.raises(ValueError, match=r"texts.* no column 'image', only \['photo'\]"):
        load_images(tmp_path / "texts")
