# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The paper's claims as controlled experiments: what is changed, and what is not."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from stellar_hf.objective_stellar import Targets

SCRIPT = Path(__file__).parents[2] / "examples" / "paper_in_miniature.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["dense bottleneck", "no matching", "EMA teacher", "16 tokens"])
def test_variants_start_from_the_same_weights(script, name):
    stellar = script.make_model(script.VARIANTS["STELLAR"], seed=3).state_dict()
    model = script.make_model(script.VARIANTS[name], seed=3)
    weights = model.state_dict()
    others = {each for each in stellar if each not in weights or stellar[each].shape != weights[each].shape}
    allowed = {"16 tokens": ("sparse_tokens",), "dense bottleneck": ("localization",)}.get(name, ())
    assert all(any(part in each for part in allowed) for each in others)
    assert all(torch.equal(stellar[each], weights[each]) for each in stellar.keys() - others)
    for teacher, student in model.teacher_and_student_weights():
        assert torch.equal(teacher, student)


def test_dense_latent_has_as_many_values_as_s_and_l(script):
    stellar, dense = (script.make_model(script.VARIANTS[name], seed=0) for name in ("STELLAR", "dense bottleneck"))
    output = stellar(images(1), return_loss=False)
    num_values = output.sparse_tokens.numel() + output.localization.numel()
    assert dense.stellar.bottleneck[0].out_features * 64 == num_values

    output = dense.stellar(images(8))  # which the decoder reads
    features = (output.localization @ output.sparse_tokens).flatten(0, 1)  # of 512 patches
    rank = torch.linalg.matrix_rank((features - features.mean(dim=0)).double(), rtol=1e-5)
    assert rank * output.localization.shape[1] == num_values


def test_heads_of_the_dense_variant_see_the_means_of_clusters(script):
    model = script.make_model(script.VARIANTS["dense bottleneck"], seed=0)
    objective = model.objective_class(model.config, model)
    centers = torch.randn(2, 8, 96)
    patches = centers.repeat_interleave(8, dim=1)
    view = objective.project(model, torch.randn(2, 96), patches)
    distances = torch.cdist(view.tokens, centers)
    assert distances.amin(dim=1).max() < 1e-4  # each center is the mean of one cluster

    views = images(6).view(3, 2, 3, 64, 64)
    output = model(images(3), global_pixel_values=views, local_pixel_values=views[..., :32, :32])
    assert output.sparse_tokens.shape == (3, 8, 96) and output.localization.shape == (3, 64, 8)
    (output.loss - output.reconstruction_loss).backward()
    assert model.stellar.bottleneck[0].weight.grad.abs().sum() > 0


def test_without_matching_each_token_has_the_target_of_its_slot(script):
    tokens = torch.randn(2, 8, 96) * 10
    order = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    expected = torch.randn(2, 8, 64)
    targets = Targets(tokens, expected, torch.zeros(2, 64), False, torch.zeros(()), torch.zeros(()))
    found = {}
    for name in ("STELLAR", "no matching"):
        model = script.make_model(script.VARIANTS[name], seed=0)
        objective = model.objective_class(model.config, model)
        found[name], _ = objective.match(tokens[:, order].repeat_interleave(2, dim=0), targets)
    assert torch.equal(found["STELLAR"], expected[:, order].repeat_interleave(2, dim=0))
    assert torch.equal(found["no matching"], expected.repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("name", "trains_s", "trains_l"),
    [("STELLAR", True, True), ("L detached", True, False), ("alignment only", False, False)],
)
def test_what_the_reconstruction_trains(script, name, trains_s, trains_l):
    model = script.make_model(script.VARIANTS[name], seed=0)
    model(images(2), return_loss=False).reconstruction.square().sum().backward()
    gradients = {weight: each.grad is not None for weight, each in model.named_parameters()}
    assert gradients["decoder.projection.weight"]
    assert gradients["stellar.layers.0.attention.q_proj.weight"] == trains_s
    assert gradients["stellar.localization.dense_projection.weight"] == trains_l


def test_claims_hold_only_by_differences_that_are_clear(script):
    def claim(*differences):
        return script.check_claim(
            "no matching", pd.DataFrame({"image_knn": differences, "own_material_knn": differences})
        )

    assert claim(-0.05, -0.06).count("(as claimed)") == 2
    assert claim(0.05, 0.06).count("(against the claim)") == 2
    for noise in [(-0.05, 0.01), (-0.001, -0.06), (0.0, 0.0), (-0.05,)]:
        assert claim(*noise).count("(not clear)") == 2


@pytest.mark.slow
def test_variants_are_trained_measured_and_resumed(script, tmp_path, monkeypatch):
    sizes = ["--max_steps", "2", "--num_train_scenes", "64", "--num_test_scenes", "12", "--seeds", "0"]
    command = [SCRIPT.name, "--variants", "dense bottleneck", *sizes, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setitem(script.TRAINING, "save_steps", 1)
    script.main()

    table = (tmp_path / "results.md").read_text()
    assert all(row in table for row in ("| STELLAR |", "| dense bottleneck |", "- **dense bottleneck.**"))
    rows = pd.read_csv(tmp_path / "results.csv", index_col="variant")
    stellar, dense = (
        json.loads((tmp_path / name / "result.json").read_text())["result"]
        for name in ("STELLAR-0", "dense-bottleneck-0")
    )
    assert stellar.keys() == dense.keys() >= script.METRICS.keys()
    assert rows.loc["STELLAR", "psnr_mean"] == pytest.approx(stellar["psnr"])
    assert (tmp_path / "semantics_and_reconstruction.png").stat().st_size > 10_000

    # As if the first run had been killed in its second step.
    folder = tmp_path / "STELLAR-0"
    weights = load_file(folder / "model.safetensors")
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "result.json").unlink()
    finished = (tmp_path / "dense-bottleneck-0" / "result.json").stat().st_mtime_ns
    script.main()
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    assert json.loads((folder / "result.json").read_text())["result"] == stellar
    assert (tmp_path / "dense-bottleneck-0" / "result.json").stat().st_mtime_ns == finished

    monkeypatch.setattr(sys, "argv", [*command, "--num_test_scenes", "13"])
    with pytest.raises(SystemExit, match="choose another --output_dir"):
        script.main()
