# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Features on disk in Python: written from any images, read back as rows and as a training's data."""

import copy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from stellar_hf import StellarImageProcessorPil, StellarModel
from stellar_hf.features import ExtractedTokens, encode_images, load_features, save_features
from stellar_hf.features.shards import write_shard

CROPS = StellarImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return StellarModel(tiny_config())


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 50 + 3 * i, 3), dtype=np.uint8)) for i in range(5)]


def test_rows_are_the_features_in_memory(model, images, tmp_path):
    rows = [{"image": image, "label": 2 * i} for i, image in enumerate(images)]
    shards = save_features(model, rows, CROPS, tmp_path, shard_size=2, batch_size=3, show_progress=False)
    assert (shards.num_images, shards.num_rows, len(shards.files)) == (5, 5, 3)
    assert "path" not in shards.columns and shards.columns["label"] == datasets.Value("int64")

    features = encode_images(model, rows, CROPS, show_progress=False)
    for folder in (tmp_path, shards.folder):
        loaded = load_features(folder).with_format("torch")
        torch.testing.assert_close(loaded["tokens"][:], features.sparse_tokens, rtol=1e-4, atol=1e-5)
        assert loaded["index"][:].tolist() == features.index.tolist() and loaded["label"][:].tolist() == [
            0,
            2,
            4,
            6,
            8,
        ]
    data = ExtractedTokens(tmp_path)
    assert (len(data), data.grid_size, data.num_classes) == (5, (4, 4), 9)
    assert data[3].keys() == {"sparse_tokens", "localization", "class_labels"}
    torch.testing.assert_close(data[3]["localization"], features.localization[3], rtol=0, atol=1e-3)


def test_files_are_named(model, images, tmp_path):
    files = [str(tmp_path / f"{index}.png") for index in range(3)]
    for file, image in zip(files, images, strict=False):
        image.save(file)
    save_features(model, files, CROPS, tmp_path, show_progress=False)
    assert load_features(tmp_path)["path"][:] == files
    assert ExtractedTokens(tmp_path)[0].keys() == {"sparse_tokens", "localization"}


def test_a_folder_of_an_earlier_version_loads_and_is_not_gone_on_with(model, images, tmp_path):
    """Its shards have no paths."""
    files = [str(tmp_path / f"{index}.png") for index in range(2)]
    for file, image in zip(files, images, strict=False):
        image.save(file)
    shards = save_features(model, files, CROPS, tmp_path, shard_size=1, show_progress=False)
    rows = load_features(tmp_path).remove_columns("path")
    columns = datasets.Features({name: kind for name, kind in shards.columns.items() if name != "path"})
    settings = {"dtype": "float32", "top_k": None, "shard_size": 1, "num_images": 2, "columns": list(columns)}
    for number, file in enumerate(shards.files):
        write_shard(file, rows.select([number]).with_format("numpy")[:], columns, settings)
    assert len(ExtractedTokens(tmp_path)) == 2
    with pytest.raises(
        ValueError, match="00000-of-00002.parquet was made with other settings .columns = .'index', 'tok"
    ):
        save_features(model, files, CROPS, tmp_path, shard_size=1, show_progress=False)


def test_a_run_that_goes_on_has_the_same_weights_processor_images_and_labels(model, images, tmp_path):
    rows = [{"image": image, "label": i, "kind": 0, "of_no_use": object()} for i, image in enumerate(images)]
    same = {"model": model, "dataset": rows, "processor": CROPS, "label_column": "label"}

    def save(**changes):
        return save_features(**{**same, **changes}, folder=tmp_path, shard_size=2, show_progress=False)

    shards = save()
    shards.files[1].unlink()
    trained = copy.deepcopy(model)
    next(trained.parameters()).data += 0.1
    for change, said in (
        ({"model": trained}, "weights = '[0-9a-f]{16}'"),
        ({"processor": StellarImageProcessorPil(background=[0, 0, 0])}, "processor = "),
        ({"dataset": [{**row, "image": images[0]} for row in rows]}, "images = '[0-9a-f]{16}'"),
        ({"dataset": [{**row, "label": 0} for row in rows]}, "images = '[0-9a-f]{16}'"),
        ({"label_column": "kind"}, "label_column = 'label'"),
    ):
        with pytest.raises(ValueError, match=f"made with other settings .{said}"):
            save(**change)
    save(dataset=[{**row, "of_no_use": object()} for row in rows])
    assert load_features(tmp_path)["label"][:] == list(range(5))


def test_an_extraction_that_is_not_finished_is_not_loaded(model, images, tmp_path):
    shards = save_features(model, images, CROPS, tmp_path, shard_size=2, show_progress=False)
    shards.files[1].unlink()
    for load in (load_features, ExtractedTokens):
        with pytest.raises(ValueError, match="There are 2 of 3 shards in .*: repeat the command stellar-hf extract"):
            load(tmp_path)


def test_impossible_arguments_are_refused_in_a_sentence(model, images, tmp_path):
    for kwargs, said in (
        ({"top_k": 5}, r"top_k is 5, but must be in \[1, 4\]"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"shard_size": "all"}, "shard_size is 'all'"),
    ):
        with pytest.raises(ValueError, match=said):
            save_features(model, images, CROPS, tmp_path, **kwargs)
    with pytest.raises(ValueError, match="no rows"):
        save_features(model, [], CROPS, tmp_path)
    other = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32))
    with pytest.raises(ValueError, match="dinov2 model, which has no sparse tokens"):
        save_features(other, images, CROPS, tmp_path)
    with pytest.raises(ValueError, match="no features in"):
        load_features(tmp_path)
