# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""stellar-hf evaluate: embedded scenes with baselines, presets, own images, interruptions, processes, errors."""

import json
import shutil
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import ViTConfig, ViTModel

from stellar_hf import StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.cli.__main__ import main
from stellar_hf.cli.evaluate import (
    EvaluationArguments,
    distinct_names,
    load_subjects,
    open_results,
    report,
    settings_of,
)
from stellar_hf.evaluation import (
    ResultFile,
    RunSettings,
    evaluate_models,
    load_embedded_data,
    load_own_images,
    load_preset,
)

EMBEDDED = ("knn", "linear", "reconstruction", "objects", "disentanglement", "retrieval")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Of scenes, which all tests of this file share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model_folder(tiny_config, tmp_path_factory):
    """A tiny model of 32x32 pixels with its processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    StellarForPreTraining(tiny_config()).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """Another vision encoder."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(1)
    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders `train` and `test` of images of two classes, one gray and one blue."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for part, count in (("train", 14), ("test", 8)):
        for index in range(count):
            pixels = rng.integers(0, 256, (40 + index, 60, 1), dtype=np.uint8) * np.ones(3, dtype=np.uint8)
            pixels[..., :2] //= 1 + 4 * (index % 2)
            path = folder / part / ("blue" if index % 2 else "gray") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs the command with arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def run(*arguments):
        main(["evaluate", *map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def embedded(model_folder, tmp_path_factory):
    """The folder of an evaluation on the embedded scenes, all tasks and baselines."""
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.setenv("ACCELERATE_USE_CPU", "1")
        main(["evaluate", *embedded_arguments(model_folder, folder)])
    return folder


def embedded_arguments(model_folder, output_dir):
    return [
        f"--model_name_or_path={model_folder}",
        *("--num_scenes=16", "--compression_images=2"),
        *("--tasks", *EMBEDDED),
        f"--output_dir={output_dir}",
    ]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def numbers_of(folder):
    return {(result["model"], result["task"]): result["metrics"] for result in results_of(folder)}


# Embedded scenes -----------------------------------------------------------------------------------------------------


def test_every_number_carries_its_protocol(embedded):
    results = results_of(embedded)
    assert {result["task"] for result in results} == set(EMBEDDED)
    for result in results:
        protocol = result["protocol"]
        assert protocol["test_images"] == 16 and protocol["test_split"] == "test" and protocol["seed"] == 0
        assert len(protocol["test_fingerprint"]) == len(protocol["model"]["weights"]) == 16
        assert protocol["images"]["crop"] == {"height": 32, "width": 32}
        assert protocol["images"]["resampling"] == "bicubic" and protocol["settings"] is not None
        assert result["versions"]["torch"] and result["date"] and result["metrics"]


def test_models_stand_beside_an_untrained_network_and_baselines(embedded):
    for task in EMBEDDED:
        kinds = {result["kind"] for result in results_of(embedded) if result["task"] == task}
        assert kinds == {"model", "untrained"} | ({"baseline"} if task != "reconstruction" else set()), task
    text = (embedded / "results.md").read_text()
    assert all(f"### {task}, " in text for task in EMBEDDED)
    assert "**tiny**" in text and "tiny, untrained" in text and "raw pixels" in text and "k-means, 8 segments" in text
    assert "not above the best baseline that was never trained" in text  # with random weights, surely
    with Image.open(embedded / "results.png") as figure:
        assert figure.width > figure.height > 300


def test_moved_scenes_show_whether_maps_move(embedded):
    moved = numbers_of(embedded)["k-means, 8 segments", "disentanglement"]["scenes moved by 8 pixels"]
    assert moved["map_iou"] > moved["unmoved_map_iou"] and moved["token_cosine"] > moved["other_cosine"]


def test_reconstructions_stand_beside_descriptions_of_as_many_bits(embedded):
    found = numbers_of(embedded)["tiny", "reconstruction"]
    for name, bits in (("float32", 32), ("8 bits, top 1", 8)):
        row = found[f"S and L, {name}"]
        assert row["bits"] >= 4 * 32 * bits and {"patch means", "JPEG"} & set(row) and row["num_images"] == 2


def test_again_the_same_numbers(embedded, model_folder, run, tmp_path):
    run(*embedded_arguments(model_folder, tmp_path), "--tasks", "knn", "objects", "retrieval")
    again, first = numbers_of(tmp_path), numbers_of(embedded)
    assert len(again) > 10 and again == {key: first[key] for key in again}


def test_what_is_there_is_not_measured_again(embedded, model_folder, run, tmp_path, capsys):
    shutil.copytree(embedded, tmp_path / "out")
    (tmp_path / "out" / "results.md").unlink()
    run(*embedded_arguments(model_folder, tmp_path / "out"))
    assert results_of(tmp_path / "out") == results_of(embedded)  # their dates, too
    assert (tmp_path / "out" / "results.md").read_text() == (embedded / "results.md").read_text()
    assert "### knn, " in capsys.readouterr().out


# Images --------------------------------------------------------------------------------------------------------------


def test_several_encoders_on_folders_of_images(run, model_folder, vit_folder, photos, tmp_path, caplog):
    run(
        *("--model_name_or_path", model_folder, vit_folder),
        *(f"--train_dir={photos / 'train'}", f"--test_dir={photos / 'test'}", f"--output_dir={tmp_path}"),
    )
    numbers = numbers_of(tmp_path)
    assert set(numbers) == {
        *(("tiny", task) for task in ("knn", "linear", "retrieval", "reconstruction")),
        *(("vit", task) for task in ("knn", "linear", "retrieval")),
    }
    assert set(numbers["vit", "knn"]) == {"cls", "patch mean"}
    assert {"sparse mean", "cls", "patch mean", "lowrank mean"} <= set(numbers["tiny", "knn"])
    assert all(values["accuracy"] == 1 for values in numbers["vit", "linear"].values())
    assert "vit has no decoder: it is left out of reconstruction." in caplog.text


def test_what_a_model_cannot_reconstruct_is_left_out_and_named(tiny_config, vit_folder, photos, tmp_path, caplog):
    """Codes without their tokenizer. A probe on frozen features needs no decoder: it is measured all the same."""
    StellarForPreTraining(tiny_config(reconstruction_target="codes")).save_pretrained(tmp_path / "codes")
    shutil.copy(vit_folder / "preprocessor_config.json", tmp_path / "codes")
    data = load_own_images(photos / "test", photos / "train")

    def measured(**arguments):
        args = EvaluationArguments([str(tmp_path / "codes"), str(vit_folder)], **arguments)
        accelerator = Accelerator(cpu=True)
        settings = settings_of(args, 0, accelerator)
        found = evaluate_models(load_subjects(args, accelerator), data, ["reconstruction"], settings)
        return {result.model: set(result.metrics) for result in found}

    assert measured() == {}
    assert "codes reconstructs codes, which need --vq_model_name_or_path: it is left out of reconst" in caplog.text
    assert measured(reconstruction_probes=["low_rank"]) == {"codes": {"probe on Z"}}


def test_models_of_one_name_are_told_apart(model_folder, vit_folder, photos, tmp_path):
    """Neither are they taken for seeds of one model, nor does one's file for the Hub replace the other's."""
    folders = [str(tmp_path / run / "checkpoint-9") for run in ("run1", "run2")]
    for folder, model in zip(folders, (model_folder, vit_folder), strict=True):
        shutil.copytree(model, folder)
    args = EvaluationArguments(folders, preset="food101", output_dir=str(tmp_path / "out"))
    data = load_preset("food101", None, str(photos / "train"), str(photos / "test"))
    accelerator = Accelerator(cpu=True)
    subjects, results = load_subjects(args, accelerator), open_results(args, accelerator)
    found = list(evaluate_models(subjects, data, ["knn"], results=results))
    report(args, [replace(one, protocol={**one.protocol, "dataset_id": "ethz/food101"}) for one in found])
    text = (tmp_path / "out" / "results.md").read_text()
    for name in ("run1/checkpoint-9", "run2/checkpoint-9"):
        assert f"| **{name}** |" in text and f"- **{name}**: " in text
        assert list((tmp_path / "out" / name / ".eval_results").iterdir())


def test_names_of_models_are_as_short_as_tells_them_apart():
    assert distinct_names(["/data/run/last/", "facebook/dinov2-base"]) == {
        "/data/run/last/": "last",
        "facebook/dinov2-base": "dinov2-base",
    }
    paths = ["/last", "/run1/last", "/other/run1/last", "/run2/last"]
    assert list(distinct_names(paths).values()) == ["last", "run1/last", "other/run1/last", "run2/last"]
    assert list(distinct_names(["run", "./run/"]).values()) == ["run"]


def test_presets_prepare_images_as_the_paper_does(run, model_folder, photos, tmp_path):
    run(
        f"--model_name_or_path={model_folder}",
        *("--preset=food101", "--tasks=knn", "--dtype=bfloat16", f"--output_dir={tmp_path}"),
        *(f"--train_dir={photos / 'train'}", f"--test_dir={photos / 'test'}"),
    )
    (result,) = results_of(tmp_path)
    assert result["protocol"]["images"]["resize"] == {"shortest_edge": 37}  # 32 * 256 / 224
    assert result["protocol"]["model"]["dtype"] == "bfloat16" and result["protocol"]["data"] == "Food-101"


def test_a_preset_of_segmentation(run, model_folder, tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "image": [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(4)],
        "mask": [Image.fromarray(np.uint8(np.arange(1600).reshape(40, 40) // 800)) for _ in range(4)],
    }
    part = datasets.Dataset.from_dict(
        columns, features=datasets.Features(image=datasets.Image(), mask=datasets.Image())
    )
    datasets.DatasetDict(train=part, val=part).save_to_disk(tmp_path / "voc")
    run(
        f"--model_name_or_path={model_folder}",
        *("--preset=voc2012", f"--dataset_name={tmp_path / 'voc'}", "--tasks=segmentation"),
        f"--output_dir={tmp_path / 'out'}",
    )
    found = numbers_of(tmp_path / "out")["tiny", "segmentation"]
    assert {"probe on D", "probe on Z", "probe on Z, 1 tokens", "kNN of patches"} <= set(found)
    assert all(0 <= values["miou"] <= 1 for values in found.values())


def test_a_broken_image_changes_nothing_but_its_own_row(run, vit_folder, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    first = sorted((tmp_path / "photos" / "train" / "blue").iterdir())[0]
    arguments = (
        *(f"--model_name_or_path={vit_folder}", "--tasks", "knn", "linear"),
        *(f"--train_dir={tmp_path / 'photos' / 'train'}", f"--test_dir={tmp_path / 'photos' / 'test'}"),
    )
    first.write_bytes(b"no image")
    run(*arguments, f"--output_dir={tmp_path / 'broken'}")
    first.unlink()
    run(*arguments, f"--output_dir={tmp_path / 'without'}")
    assert numbers_of(tmp_path / "broken") == numbers_of(tmp_path / "without")


def test_results_go_into_the_model_card(run, model_folder, photos, tmp_path):
    shutil.copytree(model_folder, tmp_path / "tiny")
    run(
        *(f"--model_name_or_path={tmp_path / 'tiny'}", "--tasks=knn", "--update_model_card"),
        *(f"--train_dir={photos / 'train'}", f"--test_dir={photos / 'test'}", f"--output_dir={tmp_path / 'out'}"),
    )
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "model-index" in card and "| **tiny** | sparse mean |" in card and str(tmp_path) not in card


# Interruptions and processes -----------------------------------------------------------------------------------------


def subjects(folder, accelerator=None):
    """As the command loads them."""
    return load_subjects(EvaluationArguments([str(folder)]), accelerator or Accelerator(cpu=True))


def test_a_run_that_was_killed_between_tasks_goes_on(model_folder, photos, tmp_path):
    data = load_own_images(photos / "test", photos / "train")
    file = ResultFile(tmp_path / "results.json")
    killed = evaluate_models(subjects(model_folder), data, ["knn", "linear"], results=file)
    first = next(killed)
    killed.close()
    assert [result.task for result in file.read()] == ["knn"]
    again = list(evaluate_models(subjects(model_folder), data, ["knn", "linear"], results=file))
    assert [result.task for result in again] == ["knn", "linear"] and again[0] == first
    others = RunSettings(num_neighbours=3)
    (measured,) = evaluate_models(subjects(model_folder), data, ["knn"], settings=others, results=file)
    assert measured.protocol["settings"]["neighbours"] == 3 and len(file.read()) == 3


def evaluate_with(accelerator, folder, data, output):
    """Metrics of a run, and whether this process has written a file."""
    settings = RunSettings(accelerator=accelerator, batch_size=6, compression_images=2, show_progress=False)
    file = ResultFile(output / f"results-{accelerator.process_index}.json") if accelerator else None
    tasks = [task for task in EMBEDDED if task in data.splits]
    found = list(evaluate_models(subjects(folder, accelerator), data, tasks, settings, file, baselines=True))
    return [(result.model, result.task, result.metrics) for result in found], bool(file and file.read())


def test_two_processes_measure_what_one_does_and_one_writes(two_processes, model_folder, tmp_path):
    data = load_embedded_data(16, tasks=["knn", "objects", "reconstruction"])
    alone, _ = evaluate_with(None, model_folder, data, tmp_path)
    (first, has_written), (second, has_written_too) = two_processes(evaluate_with, model_folder, data, tmp_path)
    assert first == second == alone
    assert has_written and not has_written_too


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "object"], "There is no task 'object': did you mean objects?"),
        (["--task", "knn"], "--task does not exist: did you mean --tasks?"),
        (["--preset", "imagenet"], "There is no preset 'imagenet', only imagenet-1k"),
        (["--test_dir", "photos", "--tasks", "knn"], "a class for each image (--label_column"),
        (["--test_dir", "photos", "--tasks", "objects"], "a mask for each image (--mask_column)"),
        (["--test_dir", "photos", "--tasks", "disentanglement"], "the embedded scenes, whose objects are known"),
        (["--train_dir", "photos"], "train_dir is given without test_dir"),
        (["--test_dir", "photos", "--reconstruction_probes", "dense"], "reconstruction_probes learn from train_dir"),
        (["--test_dir", "photos", "--dataset_name", "x/y"], "choose one source of images"),
        (["--test_split", "val"], "not 'val'"),
        (["--seeds", "-1"], "none may be negative"),
        (["--update_model_card", "--model_name_or_path", "x/y"], "but x/y is none"),
        (["--model_name_or_path", "/no/such/model"], "/no/such/model"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert str(exit.value.code).startswith("error: ") and said in exit.value.code
    assert not (tmp_path / "stellar-evaluation" / "results.json").exists()
