# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The command that trains the prior, and the script that shows it, as a user runs them: tabletop scenes, features of own
images, resumed, refused.
"""

import io
import json
import operator
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stellar_hf import (
    DEMO_MODEL,
    StellarConfig,
    StellarForPreTraining,
    StellarImageProcessorPil,
    StellarTokenPriorPipeline,
)
from stellar_hf.cli.__main__ import main as stellar_hf_command
from stellar_hf.cli.inputs import load_pipeline
from stellar_hf.cli.train_prior import PriorTrainingArguments, encode_scenes, warn_of_other_weights
from stellar_hf.data import load_tabletop_scenes
from stellar_hf.features import ExtractedTokens
from stellar_hf.prior import GENERATION_COLUMNS

TINY = ("--hidden_size", 16, "--num_layers", 1, "--localization_channels", 8, "--num_inference_steps", 2)
QUICK = ("--max_steps", 4, "--per_device_train_batch_size", 8, "--disable_tqdm=true", "--use_cpu")
SCENES = ("--num_train_scenes", 48, "--num_eval_scenes", 12, "--save_steps", 2)


@pytest.fixture(scope="module")
def command_on_scenes(tmp_path_factory):
    """The folder in which the command has trained on tabletop scenes, and what it printed."""
    folder = tmp_path_factory.mktemp("command")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pytest"])
        printed = io.StringIO()
        with redirect_stdout(printed):
            stellar_hf_command(["train-prior", *map(str, (*TINY, *QUICK, *SCENES)), "--output_dir=out"])
    return folder / "out", printed.getvalue()


@pytest.fixture
def own_images(tmp_path):
    """Twelve images of two classes, by the names of their folders."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 0), ("light", 180)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(level, level + 60, (40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_tabletop_scenes_give_a_pipeline_that_draws_and_its_measures(command_on_scenes):
    folder, printed = command_on_scenes
    assert "held-out scenes" in printed and "generated" in printed and "as many objects as there are" in printed
    results = json.loads((folder / "all_results.json").read_text())
    rows = ("held_out_scenes", "their_reconstructions", "copied_training_scenes", "tokens_of_other_scenes")
    for row in (*rows, "normal_distribution", "generated"):
        for name, *_ in GENERATION_COLUMNS:
            assert np.isfinite(results[f"test_{row}_{name}"])
    # A copy is nearer to the training set than the same maps with the tokens of another scene.
    nearest = (results[f"test_{row}_nearest_pixels"] for row in rows[2:])
    assert operator.lt(*nearest)
    with Image.open(folder / "samples.png") as image:
        assert image.width > 1000

    pipe = StellarTokenPriorPipeline.from_pretrained(folder / "pipeline")
    assert pipe.prior.config.class_names == ["2 objects", "3 objects", "4 objects"] and pipe.prior.config.sort_tokens
    (image,) = pipe("3 objects", 2, height=48, width=64).images
    assert image.size == (64, 48)


def test_script_only_measures_again_what_the_command_has_trained(command_on_scenes, run_example, capsys):
    folder, _ = command_on_scenes
    shutil.copytree(folder, "out")
    Path("out/all_results.json").unlink()
    run_example("train_prior", *TINY, *QUICK, *SCENES, "--output_dir", "out")
    assert "The training is finished" in capsys.readouterr().out
    results, again = (json.loads(Path(path, "all_results.json").read_text()) for path in (folder, "out"))
    assert again["test_generated_nearest_pixels"] == results["test_generated_nearest_pixels"]


@pytest.mark.parametrize("options", [(), ("--top_k", 2, "--dtype", "float16")])
def test_features_of_own_images(run_example, own_images, options):
    run_example("extract_features", "--image_dir", own_images, "--output_dir", "features", *options)
    data = ExtractedTokens("features")
    assert len(data) == 12 and data.grid_size == (16, 16)
    assert data.num_classes == 2 and data.class_names == ["dark", "light"]
    row = data[11]
    config = StellarConfig.from_pretrained(DEMO_MODEL)
    assert row["sparse_tokens"].shape == (config.num_sparse_tokens, config.hidden_size)
    assert row["sparse_tokens"].dtype == torch.float32
    assert row["localization"].dtype == torch.float32 and int(row["class_labels"]) == 1
    torch.testing.assert_close(row["localization"].sum(-1), torch.ones(256))
    num_shares = (row["localization"] > 0).sum(-1).max()
    assert num_shares == 2 if options else num_shares > 2


def test_prior_of_own_images(run_example, own_images, capsys):
    options = ("--top_k", 2, "--dtype", "float16")
    run_example("extract_features", "--image_dir", own_images, "--output_dir", "features", *options)
    run_example("train_prior", *TINY, *QUICK, "--features_dir", "features", "--output_dir", "out")
    assert "12 images, 2 classes" in capsys.readouterr().out
    pipe = StellarTokenPriorPipeline.from_pretrained("out/pipeline")
    assert len(pipe(["dark", 1, None], 2).images) == 3
    assert Path("out/samples.png").is_file()


def test_features_of_another_model_are_refused_or_named_before_the_training(
    run_example, own_images, tiny_config, caplog
):
    run_example("extract_features", "--image_dir", own_images, "--output_dir", "features", "--dtype", "float16")
    StellarForPreTraining(tiny_config()).save_pretrained("other")
    StellarImageProcessorPil().save_pretrained("other")
    options = ("--features_dir", "features", "--output_dir", "out", "--model_name_or_path", "other")
    with pytest.raises(SystemExit, match="are 8 tokens of 96 numbers, but the model that decodes has 4 of 32"):
        run_example("train_prior", *TINY, *QUICK, *options)
    assert not list(Path("out").glob("checkpoint-*"))

    # The same weights are the same model, whatever its name and the precision in which it made the features.
    pipe = load_pipeline(shutil.copytree(DEMO_MODEL, "moved"))
    warn_of_other_weights(pipe, "features")
    assert "are of other weights" not in caplog.text
    torch.nn.init.zeros_(pipe.model.stellar.embeddings.sparse_tokens)
    warn_of_other_weights(pipe, "features")
    assert f"The features in features are of other weights, of {DEMO_MODEL}," in caplog.text


def test_processes_share_the_encoding_of_scenes(two_processes, tmp_path):
    """Each gets the tokens of all scenes."""
    scenes = load_tabletop_scenes("train", 5, 64).select([row % 5 for row in range(65)])  # in two batches

    def encode(accelerator):
        pipe = load_pipeline(DEMO_MODEL, device="cpu")
        sizes = []
        pipe.model.stellar.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        rows = encode_scenes(pipe, scenes, PriorTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True))
        return sizes, torch.stack([row["sparse_tokens"] for row in rows])

    (first_sizes, tokens), (second_sizes, same_tokens) = two_processes(encode)
    assert (first_sizes, second_sizes) == ([64], [1])
    assert torch.equal(tokens, same_tokens)
    expected, _ = load_pipeline(DEMO_MODEL, device="cpu").encode([scenes[row]["image"] for row in (0, 63, 64)])
    torch.testing.assert_close(tokens[[0, 63, 64]], expected, rtol=1e-4, atol=1e-4)


def test_images_without_classes(run_example, own_images, capsys):
    for number, file in enumerate(sorted(own_images.glob("*/*.png"))):
        file.rename(own_images / f"{number}.png")
    for folder in ("dark", "light"):
        (own_images / folder).rmdir()
    run_example("extract_features", "--image_dir", own_images, "--output_dir", "features")
    run_example("train_prior", *TINY, *QUICK, "--features_dir", "features", "--output_dir", "out")
    assert "12 images, 0 classes" in capsys.readouterr().out
    pipe = StellarTokenPriorPipeline.from_pretrained("out/pipeline")
    assert len(pipe([None] * 2, 2).images) == 2
    with pytest.raises(ValueError, match="no class 0"):
        pipe([0])


def test_training_goes_on_from_its_checkpoint(command_on_scenes, run_example, capsys):
    whole, _ = command_on_scenes
    # As if it had been killed after its first checkpoint.
    shutil.copytree(whole, "half")
    for name in ("checkpoint-4", "pipeline"):
        shutil.rmtree(Path("half", name))
    run_example("train_prior", *TINY, *QUICK, *SCENES, "--output_dir", "half")
    assert "Going on from" in capsys.readouterr().out
    priors = [
        StellarTokenPriorPipeline.from_pretrained(Path(folder, "pipeline")).prior.state_dict()
        for folder in (whole, "half")
    ]
    for name, weight in priors[0].items():
        assert torch.equal(weight, priors[1][name]), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--features_dir", "nowhere"), "no features in nowhere.*stellar-hf extract"),
        (("--localization_patch_size", 3, "--num_train_scenes", 8), "localization_patch_size, 3, divides"),
        (("--hidden_size", 30, "--num_train_scenes", 8), "hidden_size is 30"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(run_example, argv, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run_example("train_prior", *QUICK, *argv)


def test_grids_must_be_of_one_size(run_example, own_images):
    run_example("extract_features", "--image_dir", own_images, "--output_dir", "features")
    file = next(Path("features/features").glob("*.parquet"))
    rows = datasets.Dataset.from_parquet(str(file))
    rows = rows.map(lambda row, index: {"grid_size": [16, 16 + index % 2]}, with_indices=True)
    Path("other").mkdir()
    rows.to_parquet("other/features.parquet")
    with pytest.raises(ValueError, match="grids of 2 sizes"):
        ExtractedTokens("other")


@pytest.mark.parametrize(("labels", "said"), [([0, -1], "-1"), (["cat", "dog"], "'cat'")])
def test_labels_must_be_numbers_of_classes(run_example, tmp_path, labels, said):
    tokens, localization = np.zeros((2, 4, 8)), np.full((2, 16, 4), 0.25)
    columns = {"index": [0, 1], "tokens": tokens, "localization": localization, "label": labels}
    datasets.Dataset.from_dict({**columns, "grid_size": [[4, 4]] * 2}).to_parquet(str(tmp_path / "features.parquet"))
    with pytest.raises(ValueError, match=f"integers of at least 0, but there is {said}"):
        ExtractedTokens(tmp_path)
