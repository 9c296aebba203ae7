# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The recipes: the paper's values in effect, and two steps of each on tiny models and images."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForPreTraining, ViTMAEConfig, ViTMAEModel

from stellar_hf import DEMO_MODEL, StellarConfig
from stellar_hf.cli.pretrain import make_parser, value_types
from stellar_hf.cli.recipes import PACKAGED, read_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = {path.stem: path for path in sorted((EXAMPLES / "recipes").glob("*.yaml")) if path.stem != "adapt"}
TYPES = value_types(make_parser())
FIRST_STAGE, SECOND_STAGE = "imagenet_base_16_from_scratch_1", "imagenet_base_16_from_scratch_2"
BASE, LARGE, HUGE = (f"facebook/vit-mae-{size}" for size in ("base", "large", "huge"))
TINY_ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY_HEADS = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "num_prototypes": 8,
    "prototype_dim": 8,
    "projection_hidden_size": 16,
}


@pytest.fixture(scope="module")
def pretrain():
    from stellar_hf.cli import pretrain

    return pretrain


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def run_two_steps(pretrain, photos, tmp_path, monkeypatch):
    """Runs a recipe with small sizes; returns its output folder."""

    def run(name, *arguments):
        recipe = read_recipe(RECIPES[name], TYPES)
        source = recipe.get("model_name_or_path", "")
        patch_size = 14 if source == HUGE else recipe["model_config"].get("patch_size", 16)
        sizes = {"image_size": max(4 * patch_size, 16), "patch_size": patch_size}
        config = TINY_HEADS
        if source.startswith("facebook/"):
            ViTMAEModel(ViTMAEConfig(**TINY_ENCODER, **sizes)).save_pretrained(tmp_path / "vit-mae")
            arguments = (f"--model_name_or_path={tmp_path / 'vit-mae'}", *arguments)
        elif not source:
            config = {**TINY_HEADS, **TINY_ENCODER, **sizes}
        data = "dataset_name" if "dataset_name" in recipe else "train_dir"
        shrunk = {
            "model_config": json.dumps(config),
            data: photos,
            "output_dir": tmp_path / name,
            "num_global_views": 2,
            "num_local_views": 1,
            "local_size": sizes["image_size"] // 2,
            "per_device_train_batch_size": 2,
            "dataloader_num_workers": 1,
            "max_steps": 2,
            "logging_steps": 1,
        }
        flags = [f"--{key}={value}" for key, value in shrunk.items()]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", str(RECIPES[name]), *flags, "--use_cpu", *arguments])
        pretrain.main()
        return tmp_path / name

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_read(pretrain, name):
    _, data_args, training_args = pretrain.parse_arguments([str(RECIPES[name]), "--use_cpu"])
    recipe = read_recipe(RECIPES[name], TYPES)
    assert training_args.output_dir == recipe["output_dir"]
    assert training_args.learning_rate == recipe["learning_rate"]
    assert data_args.dataset_name == recipe.get("dataset_name")


@pytest.mark.parametrize(
    ("name", "source", "epochs", "learning_rate", "tokens", "mask_ratio", "num_gpus"),
    [
        ("imagenet_base_16", BASE, 150, 1.5e-4, 16, 0.8, 8),
        ("imagenet_large_16", LARGE, 100, 5e-5, 16, 0.8, 8),
        ("imagenet_huge_14", HUGE, 50, 5e-5, 16, 0.8, 8),
        ("imagenet_base_16_8_tokens", BASE, 150, 1.5e-4, 8, 0.8, 8),
        ("imagenet_base_16_24_tokens", BASE, 150, 1.5e-4, 24, 0.8, 8),
        (FIRST_STAGE, None, 150, 1.5e-4, 16, 0.6, 8),
        (SECOND_STAGE, "stellar-imagenet-base-16-from-scratch-1", 75, 1.5e-4, 16, 0.8, 8),
        ("imagenet_base_16_single_gpu", BASE, 150, 1.5e-4, 16, 0.8, 1),
    ],
)
def test_values_of_the_paper(pretrain, name, source, epochs, learning_rate, tokens, mask_ratio, num_gpus):
    model_args, _, args = pretrain.parse_arguments([str(RECIPES[name]), "--use_cpu"])
    assert model_args.model_name_or_path == source
    assert (args.num_train_epochs, args.max_steps, args.learning_rate) == (epochs, -1, learning_rate)
    assert (args.weight_decay, args.max_grad_norm, args.bf16) == (0.04, 3.0, True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * num_gpus == 2048
    assert (args.global_scale, args.local_scale) == ([0.36, 1.0], [0.06, 0.36])

    config = StellarConfig(**model_args.model_config)
    views = args.views(config)
    assert (views.num_global_views, views.num_local_views, views.global_size, views.local_size) == (8, 8, 224, 96)
    assert (config.num_sparse_tokens, config.mask_ratio, config.mask_focus) == (tokens, mask_ratio, "gaussian")
    assert (config.num_prototypes, config.prototype_dim, config.projection_hidden_size) == (16384, 256, 2048)
    assert (config.target_temperature, config.prediction_temperature) == (0.06, 0.12)
    assert (config.localization_temperature, config.koleo_weight) == (0.06, 0.1)
    assert config.use_teacher == (name == FIRST_STAGE) and args.teacher_momentum == 0.996


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in (SECOND_STAGE, "demo")])
def test_two_steps(run_two_steps, name):
    assert_trained(run_two_steps(name), read_recipe(RECIPES[name], TYPES))


@pytest.mark.slow
def test_two_steps_from_the_first_stage(run_two_steps):
    first, second = (read_recipe(RECIPES[name], TYPES) for name in (FIRST_STAGE, SECOND_STAGE))
    assert second["model_name_or_path"] == first["output_dir"]
    folder = run_two_steps(SECOND_STAGE, f"--model_name_or_path={run_two_steps(FIRST_STAGE)}")
    assert_trained(folder, second)
    assert AutoModelForPreTraining.from_pretrained(folder).teacher is None


@pytest.mark.slow
def test_the_demo_recipe_trains_what_reads_the_encoder_of_the_main_job(pretrain, photos, tmp_path, monkeypatch):
    recipe = read_recipe(RECIPES["demo"], TYPES)
    assert recipe["model_name_or_path"] == read_recipe("tabletop_scenes", TYPES)["output_dir"]
    flags = {"model_name_or_path": DEMO_MODEL, "train_dir": photos, "output_dir": tmp_path / "out", "max_steps": 2}
    flags |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    argv = ["pretrain.py", str(RECIPES["demo"]), *(f"--{name}={value}" for name, value in flags.items()), "--use_cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    pretrain.main()
    before, after = (
        AutoModelForPreTraining.from_pretrained(folder).state_dict() for folder in (DEMO_MODEL, tmp_path / "out")
    )
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any(name.startswith("decoder.") for name in changed)
    assert all("token_refinement" in name for name in changed if name.startswith("stellar."))


def assert_trained(folder, recipe):
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert state["global_step"] == 2 and len(losses) == 2 and all(map(math.isfinite, losses))
    config = AutoModelForPreTraining.from_pretrained(folder).config
    shrunk = {"image_size", "patch_size", *TINY_ENCODER, *TINY_HEADS}
    kept = {key: value for key, value in recipe["model_config"].items() if key not in shrunk}
    assert {key: getattr(config, key) for key in kept} == kept


# How recipes are read ------------------------------------------------------------------------------------------------


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_a_recipe_replaces_values_of_its_base_one_by_one(tmp_path):
    write(tmp_path, "a.yaml", "max_steps: 3\nlocal_size: 16\nmodel_config: {image_size: 64, mask_focus: null}\n")
    write(tmp_path, "b.json", '{"base": "a.yaml", "seed": 1, "model_config": {"num_sparse_tokens": 4}}')
    recipe = write(
        tmp_path, "c.yaml", "base: b.json\nmax_steps: 5\nlocal_size: null\nmodel_config: {image_size: 32}\n"
    )
    config = {"image_size": 32, "mask_focus": None, "num_sparse_tokens": 4}
    assert read_recipe(recipe, TYPES) == {"max_steps": 5, "seed": 1, "model_config": config}


def test_a_recipe_builds_on_a_packaged_one(tmp_path):
    recipe = write(tmp_path, "a.yaml", "base: tabletop_scenes\nseed: 7\n")
    assert read_recipe(recipe, TYPES) == {**read_recipe("tabletop_scenes", TYPES), "seed": 7}


@pytest.mark.parametrize("name", [name for name in PACKAGED if name != "adapt"])  # which brings no model
def test_packaged_recipes_make_small_models_of_pixels(name):
    config = StellarConfig(**read_recipe(name, TYPES)["model_config"])
    assert config.image_size <= 128 and config.reconstruction_target == "pixels"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learning_rate: 2e-3", 2e-3),  # text, as YAML reads it
        ("learning_rate: 1", 1.0),
        ("eval_strategy: no", "no"),  # false, as YAML reads it
        ("save_strategy: epoch", "epoch"),
        ("report_to: tensorboard", "tensorboard"),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("global_scale: [1, 1]", [1.0, 1.0]),
        ("per_device_train_batch_size: 64.0", 64),
        ("gradient_checkpointing_kwargs: {use_reentrant: false}", {"use_reentrant": False}),
    ],
)
def test_values_become_what_they_are_for(tmp_path, text, value):
    assert read_recipe(write(tmp_path, "a.yaml", text), TYPES) == {text.split(":")[0]: value}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_step: 4", "max_step, which does not exist: did you mean max_steps?"),
        ("max_steps: many", "max_steps to 'many', but it must be an integer"),
        ("max_steps: 1.5", "max_steps to 1.5, but it must be an integer"),
        ("max_steps: true", "max_steps to True, but it must be an integer"),
        ("learning_rate: [1]", "learning_rate to [1], but it must be a number"),
        ("bf16: 1", "bf16 to 1, but it must be true or false"),
        ("output_dir: 3", "output_dir to 3, but it must be text"),
        ("output_dir: {a: 1}", "but it must be text"),
        ("global_scale: wide", "global_scale to 'wide', but it must be a list, each a number"),
        ("eval_strategy: sometimes", "eval_strategy to 'sometimes', but it must be one of no, steps, epoch"),
        ("model_config: 4", "model_config to 4, but it must be names with values"),
        ("base: nothing", "There is no recipe nothing"),
        ("base: 3", "sets base to 3"),
        ("base: a.yaml", "builds on itself"),
        ("base: missing.yaml", "missing.yaml cannot be read"),
        ("[1, 2]", "no 'name: value' pairs"),
        ("3: 4", "sets 3, which does not exist"),
    ],
)
def test_impossible_recipes_are_named_with_the_key_and_what_is_expected(tmp_path, text, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_recipe(write(tmp_path, "a.yaml", text), TYPES)
    assert str(tmp_path / "a.yaml") in str(error.value) or text in ("base: nothing", "base: missing.yaml")
