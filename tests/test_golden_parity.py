# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Agreement with the method's reference implementation, through the conversion of its checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from stellar_hf.conversion import convert_checkpoint, convert_state_dict
from stellar_hf.loss_stellar import (
    koleo_loss,
    match_tokens,
    matching_plan,
    num_kept_patches,
    sinkhorn_knopp,
)
from stellar_hf.modeling_stellar import StellarFourierPositions

CASES = ("pixels", "vq_codes", "teacher")
EVERY_CASE = [
    *("cls", "dense", "sparse", "spatial", "lowrank", "decoder", "x_hat", "masked_cls", "masked_sparse"),
    *("local_cls", "local_dense", "local_sparse", "match_plan", "match_index"),
]
OUTPUTS = {
    "pixels": [*EVERY_CASE, "cluster_logits", "cluster_assignments"],
    "vq_codes": [*EVERY_CASE, "cluster_logits", "cluster_assignments"],
    "teacher": [*EVERY_CASE, "teacher_cls", "teacher_sparse", "clean_match_index"],
}
# Released name of each loss, ours, and the weight that theirs lacks.
LOSSES = {
    "MSE": ("reconstruction_loss", 10),
    "VQ-CE": ("reconstruction_loss", 0.05),
    "koleo_loss": ("koleo_loss", 1),
    "clustering_loss": ("clustering_loss", 1),
    "cls_clustering_loss": ("cls_clustering_loss", 1),
    "mask_loss": ("masked_loss", 1),
    "cls_loss": ("cls_view_loss", 1),
    "total": ("loss", 1),
}
GRADIENTS = (
    "sparse_tokens",
    "encoder.embeddings.patch_embeddings.projection.weight",
    "encoder.encoder.layer.0.attention.attention.query.weight",
    "dense_proj.weight",
    "sparse_proj.weight",
    "decoder_proj.weight",
    "clustering_head.layer.weight",
    "cls_cluster_head.predictor.layers.0.weight",
)


def losses_of(case: str) -> list[str]:
    other_target = "MSE" if case == "vq_codes" else "VQ-CE"
    return [name for name in LOSSES if name != other_target]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Every entry within `tolerance` of the largest expected one; integers are equal."""
    assert found.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        return
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def outputs_of(model, golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything that the reference lists as `out.*`, by its name."""
    stellar, config = model.stellar, model.config
    image, global_views, local_views = (
        normalized(golden[name], config) for name in ("image", "global_views", "local_views")
    )

    def parts(prefix: str, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
        cls, dense, sparse = stellar.split(last_hidden_state)
        return {f"{prefix}cls": cls[:, None], f"{prefix}dense": dense, f"{prefix}sparse": sparse}

    decoded = []
    hook = model.decoder.layernorm.register_forward_hook(lambda *args: decoded.append(args[-1]))
    reconstruction = model(image, return_loss=False).reconstruction
    hook.remove()

    clean = stellar(image)
    kept_patches = golden["noise"].argsort(dim=1)[:, : num_kept_patches(36, config.mask_ratio)]
    outputs = {
        **parts("", clean.last_hidden_state),
        "spatial": clean.localization,
        "lowrank": clean.localization @ clean.sparse_tokens,
        "decoder": decoded[0],
        "x_hat": reconstruction,
        **parts("masked_", stellar.encode(global_views.flatten(0, 1), kept_patches)),
        **parts("local_", stellar.encode(local_views.flatten(0, 1))),
    }
    if config.use_teacher:
        outputs |= parts("teacher_", model.teacher.stellar.encode(global_views[:, 1]))
        outputs["clean_match_index"] = match_tokens(outputs["sparse"], outputs["teacher_sparse"])
        targets = outputs["teacher_sparse"]
    else:
        logits = model.clustering_head.logits(model.clustering_head(clean.sparse_tokens))
        outputs["cluster_logits"] = logits
        outputs["cluster_assignments"] = sinkhorn_knopp(logits.flatten(0, 1)).view_as(logits)
        targets = clean.sparse_tokens
    views_and_targets = outputs["masked_sparse"], targets.repeat_interleave(2, dim=0)
    outputs["match_plan"], outputs["match_index"] = matching_plan(*views_and_targets), match_tokens(*views_and_targets)
    return outputs


def normalized(images: torch.Tensor, config) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    return (images - mean) / std


@pytest.fixture(scope="module")
def references(golden_tensors, golden_weights, golden_overrides):
    """Per case: reference tensors, and what our model makes of the same inputs."""

    def run(case: str) -> SimpleNamespace:
        golden = golden_tensors(case)
        model = convert_checkpoint(golden_weights(case), golden_overrides(case))
        objective = model(
            normalized(golden["image"], model.config),
            normalized(golden["global_views"], model.config),
            normalized(golden["local_views"], model.config),
            code_labels=golden.get("codes"),
            noise=golden["noise"],
        )
        objective.loss.backward()
        with torch.no_grad():
            outputs = outputs_of(model, golden)
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        return SimpleNamespace(golden=golden, outputs=outputs, objective=objective, gradients=gradients)

    return {case: run(case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_every_reference_tensor_has_a_test(references, case):
    names = {f"out.{name}" for name in OUTPUTS[case]} | {f"grad.{name}" for name in GRADIENTS}
    names |= {f"loss.{name}" for name in losses_of(case)}
    assert names == {name for name in references[case].golden if name.startswith(("out.", "loss.", "grad."))}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in OUTPUTS[case]])
def test_outputs_equal_the_reference(references, case, name):
    tolerance = 3e-5 if name == "cluster_assignments" else 1e-5
    assert_close(references[case].outputs[name], references[case].golden[f"out.{name}"], tolerance)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in losses_of(case)])
def test_losses_equal_the_reference(references, case, name):
    our_name, weight = LOSSES[name]
    expected = references[case].golden[f"loss.{name}"].item() * weight
    assert references[case].objective[our_name].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", GRADIENTS)
def test_gradients_equal_the_reference(references, case, key):
    ((name, expected),) = convert_state_dict({key: references[case].golden[f"grad.{key}"]}).items()
    difference = references[case].gradients[name] - expected
    assert difference.norm() <= 1e-4 * expected.norm()


def test_teacher_matches_are_not_the_identity(references):
    """Otherwise the other tests could not tell a match to the teacher from no match at all."""
    index = references["teacher"].golden["out.clean_match_index"]
    assert not torch.equal(index, torch.arange(8).expand_as(index))


# Single operations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ops(golden_tensors):
    return golden_tensors("ops")


@pytest.mark.parametrize(("iterations", "scale"), [(3, 1.0), (5, 0.5)])
def test_sinkhorn_equals_the_reference(ops, iterations, scale):
    assignments = sinkhorn_knopp(ops["sinkhorn.logits"], 0.5, iterations, scale)
    assert_close(assignments, ops[f"sinkhorn.assignments.iters{iterations}.scale{scale}"])


def test_matching_equals_the_reference(ops):
    predictions, targets = ops["match.predictions"], ops["match.targets"]
    assert_close(matching_plan(predictions, targets), ops["match.plan"])
    assert_close(match_tokens(predictions, targets), ops["match.index"])


def test_koleo_and_its_gradient_equal_the_reference(ops):
    tokens = ops["koleo.tokens"].clone().requires_grad_()
    loss = koleo_loss(tokens)
    loss.backward()
    assert loss.item() == pytest.approx(ops["koleo.loss"].item(), rel=1e-5)
    assert (tokens.grad - ops["koleo.grad"]).norm() <= 1e-4 * ops["koleo.grad"].norm()


def test_fourier_positions_equal_the_reference(ops, tiny_config):
    positions = StellarFourierPositions(tiny_config(decoder_hidden_size=32))
    positions.gaussian_matrix.copy_(ops["posemb.matrix"])
    code = positions((6, 4))[0].T.unflatten(1, (6, 4))
    assert_close(code, ops["posemb.grid_6x4"])
