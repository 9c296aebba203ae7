# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Data sets of images from folders and shards."""

import io
import itertools
import logging
import os
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from stellar_hf.data import EndlessStream, load_images, undecoded


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


@pytest.mark.parametrize(
    "files",
    [
        ("dog/a.png", "cat/b.png", "cat/c.png"),
        ("dog/2024/a.png", "cat/b.png", "cat/deep/er/c.png"),
        ("train/dog/a.png", "train/cat/b.png", "train/cat/deeper/c.png"),
        ("pets/train/dog/a.png", "pets/train/cat/b.png", "pets/train/cat/c.png"),
    ],
)
def test_folders_of_classes(tmp_path, caplog, files):
    for value, name in enumerate(files):
        write_image(tmp_path / name, value)
    with caplog.at_level(logging.WARNING):
        dataset = load_images(tmp_path)
    assert dataset.features["label"].names == ["cat", "dog"]
    assert {int(np.asarray(row["image"])[0, 0, 0]): row["label"] for row in dataset} == {0: 1, 1: 0, 2: 0}
    assert not caplog.records


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (("dog/a.png", "cat/b.png", "c.png"), "c.png lies in none of them"),
        (("train/dog/a.png", "train/cat/b.png", "train/c.png"), "train/c.png lies in none of them"),
        (("train/dog/a.png", "train/cat/b.png", "val/dog/c.png"), "train, val: they are splits, not classes"),
    ],
)
def test_labels_that_are_not_taken_are_missed_aloud(tmp_path, caplog, files, reason):
    for name in files:
        write_image(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        dataset = load_images(tmp_path)
    assert dataset.column_names == ["image"]
    (record,) = caplog.records
    assert record.message.startswith("No labels are taken from the folders of") and reason in record.message


def test_folders_without_classes_need_no_warning(tmp_path, caplog):
    for name in ("holiday/a.png", "holiday/b.png"):
        write_image(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert load_images(tmp_path).column_names == ["image"]
    assert not caplog.records


def test_links_in_a_circle_list_each_image_once_under_its_own_folder(tmp_path):
    for value, name in enumerate(("cat/a.png", "dog/b.png")):
        write_image(tmp_path / "photos" / name, value)
    write_image(tmp_path / "elsewhere" / "c.png", 2)
    for link, target in (("aa", "dog"), ("cat/up", ""), ("dog/cats", "cat"), ("fox", "../elsewhere")):
        (tmp_path / "photos" / link).symlink_to(tmp_path / "photos" / target)
    dataset = load_images(tmp_path / "photos")
    assert values(dataset) == [0, 1, 2]
    assert dataset.features["label"].names == ["cat", "dog", "fox"]


def test_what_is_no_file_is_left_out_and_named(tmp_path, caplog):
    write_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with caplog.at_level(logging.WARNING):
        assert values(load_images(tmp_path)) == [0]
    named = " ".join(record.message for record in caplog.records)
    assert "pipe.png is no regular file" in named and "gone.png is no regular file" in named


def test_files_whose_name_is_not_utf8_are_named(tmp_path):
    write_image(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(ValueError, match=r"not UTF-8.*caf\\xe9\.png.*Rename it"):
        load_images(tmp_path)


def test_undecoded_images_have_the_path_of_their_file(tmp_path, shards):
    write_image(tmp_path / "photos" / "a.png")
    (row,) = undecoded(load_images(tmp_path / "photos"), "image")
    assert row["image"]["path"] == str(tmp_path / "photos" / "a.png")
    first = next(iter(undecoded(load_images(shards), "image")))
    assert first["image"]["path"].endswith("0.png") and first["image"]["bytes"]


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


@pytest.mark.parametrize("share", [0.45, 0.9])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_truncated_later_shard_is_named(shards, tmp_path, kind, streaming, share):
    if kind == "parquet":
        dataset = load_images(shards)
        shards = tmp_path / "parquet"
        shards.mkdir()
        for index in range(3):
            dataset.shard(3, index).to_parquet(shards / f"{index}.parquet")
    last = shards / f"2.{kind}"
    last.write_bytes(last.read_bytes()[: int(share * len(last.read_bytes().rstrip(b"\0")))])
    with pytest.raises(ValueError, match=rf"2\.{kind} cannot be read"):
        load_images(shards, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_that_is_no_archive_is_named(shards, streaming):
    (shards / "1.tar").write_bytes(b"?" * 4096 + bytes(1024))
    with pytest.raises(ValueError, match=r"1\.tar cannot be read"):
        load_images(shards, streaming=streaming)


@pytest.fixture(params=["a flipped bit", "zeros"])
def damaged_inside(request, shards):
    """Shards, the second of which has a damaged header after its first image and label, and is whole but for it."""
    file = shards / "1.tar"
    with tarfile.open(file) as archive:
        header = archive.getmembers()[2].offset
    data = bytearray(file.read_bytes())
    data[header : header + 512] = bytes(512) if request.param == "zeros" else bytes([data[header] ^ 1]) * 512
    file.write_bytes(data)
    return shards


def test_a_damaged_header_inside_a_shard_is_refused_by_name(damaged_inside):
    for _ in range(2):  # nothing of it is kept for a second time
        with pytest.raises(ValueError, match=r"1\.tar cannot be read: what follows byte \d+ is no header.*Replace"):
            load_images(damaged_inside)


def test_a_stream_names_a_shard_that_is_damaged_inside_once_and_takes_the_others(damaged_inside, caplog):
    stream = EndlessStream(load_images(damaged_inside, streaming=True), seed=0, buffer_size=2)
    with caplog.at_level(logging.WARNING):
        rows = [int(np.asarray(row["image"])[0, 0, 0]) for row in itertools.islice(stream, 27)]
    assert np.bincount(rows, minlength=12).tolist() == [3] * 5 + [0] * 3 + [3] * 4
    assert caplog.text.count("1.tar cannot be read") == 1 and "0.tar" not in caplog.text


def test_a_parquet_file_that_is_damaged_inside_is_named(shards, tmp_path):
    (tmp_path / "parquet").mkdir()
    for index in range(3):
        load_images(shards).shard(3, index).to_parquet(tmp_path / "parquet" / f"{index}.parquet")
    file = tmp_path / "parquet" / "1.parquet"
    data = bytearray(file.read_bytes())
    data[4:60] = b"?" * 56
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"1\.parquet cannot be read"):
        load_images(tmp_path / "parquet")


def test_archives_without_an_end_mark_are_read_with_a_warning(shards, caplog):
    """Some writers leave it out."""
    last = shards / "2.tar"
    last.write_bytes(last.read_bytes().rstrip(b"\0"))
    size = last.stat().st_size
    last.write_bytes(last.read_bytes() + bytes(-size % 512))
    with caplog.at_level(logging.WARNING):
        assert values(load_images(shards, streaming=True)) == list(range(12))
    assert "2.tar lacks the zeros that end an archive" in caplog.text


@pytest.fixture
def stream():
    """12 values in 6 shards."""
    return datasets.Dataset.from_dict({"value": range(12)}).to_iterable_dataset(num_shards=6)


def taken(rows, count):
    return [row["value"] for row in itertools.islice(rows, count)]


def passes_of(order, length=12):
    return [order[start : start + length] for start in range(0, len(order), length)]


@pytest.mark.parametrize("buffer_size", [1, 4, 100])
def test_every_pass_of_an_endless_stream_shows_each_row_once_in_an_order_of_its_own(stream, buffer_size):
    passes = passes_of(taken(EndlessStream(stream, seed=0, buffer_size=buffer_size), 60))
    assert all(sorted(order) == list(range(12)) for order in passes)
    assert len({tuple(order) for order in passes}) == 5
    again, other = (taken(EndlessStream(stream, seed, buffer_size), 60) for seed in (0, 1))
    assert passes_of(again) == passes and passes_of(other) != passes


def test_shards_of_an_endless_stream_are_shuffled_in_every_pass(stream):
    """Which a buffer of one row does not do."""
    passes = passes_of(taken(EndlessStream(stream, seed=0, buffer_size=1), 60))
    assert len({order[0] // 2 for order in passes}) > 1


@pytest.mark.parametrize("seen", [0, 5, 12, 29])
def test_an_endless_stream_resumes_twice_with_the_rows_that_come_next(stream, seen):
    whole = taken(EndlessStream(stream, seed=3, buffer_size=4), 60)
    rows = EndlessStream(stream, seed=3, buffer_size=4)
    assert taken(rows, seen) == whole[:seen]
    for _ in range(2):
        resumed = EndlessStream(stream, seed=3, buffer_size=4)
        resumed.load_state_dict(rows.state_dict())
        assert taken(resumed, 7) == whole[seen : seen + 7]
        rows, seen = resumed, seen + 7


def test_a_stream_of_datasets_resumes_twice(stream):
    rows, seen = stream.shuffle(seed=0, buffer_size=1), 0
    whole = taken(rows, 12)
    for count in (3, 4, 5):
        resumed = stream.shuffle(seed=0, buffer_size=1)
        if seen:
            resumed.load_state_dict(rows.state_dict())
        assert taken(resumed, count) == whole[seen : seen + count]
        rows, seen = resumed, seen + count


def test_workers_share_the_shards_of_every_pass(stream):
    """Each worker runs ahead through its own passes; together they show all rows equally often."""
    loader = DataLoader(EndlessStream(stream, seed=0, buffer_size=2), batch_size=1, num_workers=2)
    shown = [int(batch["value"]) for batch in itertools.islice(loader, 48)]
    assert np.bincount(shown, minlength=12).tolist() == [4] * 12
    few = datasets.Dataset.from_dict({"value": [1]}).to_iterable_dataset()
    loader = DataLoader(EndlessStream(few, seed=0, buffer_size=2), batch_size=1, num_workers=2)
    assert len(list(itertools.islice(loader, 3))) == 3


def test_processes_share_the_shards_of_every_pass(stream):
    """As many to each, others in every pass, divided further among its workers."""
    whole = EndlessStream(stream, seed=0, buffer_size=2)
    parts = [whole.of_process(rank, 3) for rank in range(3)]
    shards = [[{row // 2 for row in order} for order in passes_of(taken(part, 24), 4)] for part in parts]
    for first, second, third in zip(*shards, strict=True):
        assert len(first) == len(second) == len(third) == 2 and first | second | third == set(range(6))
    assert len({tuple(sorted(part)) for part in shards[0]}) > 1
    loader = DataLoader(parts[0], batch_size=1, num_workers=2)
    shown = [int(batch["value"]) for batch in itertools.islice(loader, 4)]
    assert {row // 2 for row in shown} == shards[0][0] and len(set(shown)) == 4
    with pytest.raises(ValueError, match="6 shards cannot be shared out evenly to 4 processes"):
        whole.of_process(0, 4)


def test_an_endless_stream_of_nothing_ends():
    nothing = datasets.Dataset.from_dict({"value": [1]}).to_iterable_dataset().filter(lambda row: False)
    assert list(EndlessStream(nothing, seed=0, buffer_size=2)) == []


def test_images_of_an_endless_stream_are_left_undecoded_where_asked(shards):
    images = undecoded(EndlessStream(load_images(shards, streaming=True), seed=0, buffer_size=1), "image")
    assert isinstance(images, EndlessStream) and "image" in images.column_names
    assert next(iter(images))["image"]["bytes"]


@pytest.mark.parametrize(("seed", "buffer_size"), [(0, 0), (-1, 4)])
def test_an_endless_stream_refuses_impossible_numbers(stream, seed, buffer_size):
    with pytest.raises(ValueError, match=f"buffer_size is {buffer_size} and seed {seed}"):
        EndlessStream(stream, seed, buffer_size)


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
