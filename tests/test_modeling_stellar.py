# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What users of the models rely on: shapes, loading, attention backends, gradients, the objective and its errors."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_hf import StellarBackbone, StellarForImageClassification, StellarForPreTraining, StellarModel
from stellar_hf.localization_stellar import token_maps
from stellar_hf.loss_stellar import num_kept_patches
from stellar_hf.objective_stellar import LOSS_TERMS, StellarObjective

VARIANTS = {
    "pixels": {},
    "codes": {"reconstruction_target": "codes"},
    "teacher": {"use_teacher": True},
    "dot products": {"localization_temperature": None},
    "extensions": {"standardize_projections": True, "num_projection_layers": 3},
    "compact maps, refined tokens": {"localization_compactness": 2.0, "refine_tokens": True},
    "teacher with refined tokens": {"use_teacher": True, "refine_tokens": True},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(config, size: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two images with two global and two local views each, masking noise, and codes where the model wants them."""
    num_patches = (size // config.patch_size) ** 2
    inputs = {
        "pixel_values": images(2, 3, size, size, seed=seed),
        "global_pixel_values": images(2, 2, 3, size, size, seed=seed + 1),
        "local_pixel_values": images(2, 2, 3, 16, 16, seed=seed + 2),
        "noise": images(4, num_patches, seed=seed + 3),
    }
    if config.reconstruction_target == "codes":
        inputs["code_labels"] = torch.arange(2 * num_patches).view(2, -1) % config.codebook_size
    return inputs


def gradients_of(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.fixture
def build(tiny_config):
    """Builds a seeded tiny model of a class in evaluation mode."""

    def build(model_class, **fields):
        torch.manual_seed(0)
        return model_class(tiny_config(**fields)).eval()

    return build


# Encoder and factorization -------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(height=st.integers(8, 70), width=st.integers(8, 70))
def test_any_image_size_gives_distributions_over_tokens(tiny_config, height, width):
    torch.manual_seed(0)
    model = StellarModel(tiny_config()).eval()
    with torch.no_grad():
        output = model(images(2, 3, height, width))
    num_patches = (height // 8) * (width // 8)
    assert output.grid_size.tolist() == [[height // 8, width // 8]] * 2
    assert output.last_hidden_state.shape == (2, 1 + num_patches + 4, 32)
    assert output.localization.shape == (2, num_patches, 4)
    assert (output.localization >= 0).all()
    torch.testing.assert_close(output.localization.sum(dim=-1), torch.ones(2, num_patches))


def test_sequence_holds_cls_patches_and_sparse_tokens(build):
    model = build(StellarModel)
    output = model(images(2, 3, 32, 32))
    cls, dense, sparse = model.split(output.last_hidden_state)
    assert (cls.shape, dense.shape, sparse.shape) == ((2, 32), (2, 16, 32), (2, 4, 32))
    assert torch.equal(output.sparse_tokens, sparse)
    torch.testing.assert_close(output.pooler_output, sparse.mean(dim=1))


@pytest.mark.parametrize("temperature", [0.06, None])
def test_localization_follows_its_definition(build, temperature):
    model = build(StellarModel, localization_temperature=temperature)
    output = model(images(2, 3, 32, 32))
    _, dense, sparse = model.split(output.last_hidden_state)
    dense, sparse = model.localization.dense_projection(dense), model.localization.sparse_projection(sparse)
    if temperature is None:
        scores = torch.einsum("bnd,brd->bnr", dense, sparse) / 32**0.5
    else:
        scores = F.cosine_similarity(dense[:, :, None], sparse[:, None], dim=-1) / temperature
    torch.testing.assert_close(output.localization, scores.softmax(dim=-1), atol=1e-5, rtol=1e-4)


def test_pixels_beyond_the_last_whole_patch_are_not_seen(build):
    model, pixel_values = build(StellarModel), images(1, 3, 37, 45)
    cropped = model(pixel_values[:, :, :32, :40])
    torch.testing.assert_close(model(pixel_values).last_hidden_state, cropped.last_hidden_state)


def test_rows_of_a_batch_do_not_depend_on_each_other(build):
    model, pixel_values = build(StellarForPreTraining), images(3, 3, 32, 32)
    together = model(pixel_values, return_loss=False)
    alone = model(pixel_values[1:2], return_loss=False)
    for name in ("sparse_tokens", "localization", "reconstruction"):
        torch.testing.assert_close(together[name][1:2], alone[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_dropping_patches_before_embedding_equals_dropping_them_after(build, size):
    model, pixel_values = build(StellarModel), images(3, 3, *size)
    num_patches = (size[0] // 8) * (size[1] // 8)
    kept = images(3, num_patches).argsort(dim=1)[:, :5]

    embeddings = model.embeddings(pixel_values, (size[0] // 8, size[1] // 8))
    patches = torch.take_along_dim(embeddings[:, 1:-4], kept[..., None], dim=1)
    expected = torch.cat([embeddings[:, :1], patches, embeddings[:, -4:]], dim=1)
    for layer in model.layers:
        expected = layer(expected)
    torch.testing.assert_close(model.encode(pixel_values, kept), model.layernorm(expected), atol=1e-5, rtol=1e-4)


def test_positions_are_interpolated_bicubically(build):
    embeddings = build(StellarModel).embeddings
    stored = embeddings.position_embeddings[:, 1:]
    assert torch.equal(embeddings.patch_positions((4, 4)), stored)
    grid = stored.view(4, 4, 32).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(3, 7), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(embeddings.patch_positions((3, 7)), expected[0].permute(1, 2, 0).reshape(1, 21, 32))


@torch.no_grad()
def test_positions_of_rows_stay_positions_of_rows(build):
    embeddings = build(StellarModel).embeddings
    embeddings.position_embeddings[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    positions = embeddings.patch_positions((6, 3))[0, :, 0].view(6, 3)
    assert (positions.diff(dim=0) > 0).all()
    torch.testing.assert_close(positions, positions[:, :1].expand(6, 3))


def test_interpolation_can_be_forbidden(build):
    model = build(StellarModel)
    model(images(1, 3, 32, 32), interpolate_pos_encoding=False)
    with pytest.raises(ValueError, match="40x32 pixels.*32x32.*interpolate_pos_encoding=True"):
        model(images(1, 3, 40, 32), interpolate_pos_encoding=False)


# Outputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [StellarModel, StellarForPreTraining])
def test_hidden_states_and_attentions_are_returned_on_request(build, model_class):
    model = build(model_class, attn_implementation="eager")
    output = model(images(2, 3, 32, 32), output_hidden_states=True, output_attentions=True)
    length = 1 + 16 + 4
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, length, 32)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 4, length, length)] * 2
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 4, length))
    stellar = getattr(model, "stellar", model)
    last_hidden_state = stellar(images(2, 3, 32, 32)).last_hidden_state
    torch.testing.assert_close(stellar.layernorm(output.hidden_states[-1]), last_hidden_state)

    plain = model(images(2, 3, 32, 32))
    assert plain.hidden_states is None and plain.attentions is None


@pytest.mark.parametrize("model_class", [StellarModel, StellarForPreTraining])
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_tuple_equals_output(build, model_class, by):
    model, pixel_values = build(model_class), images(2, 3, 32, 32)
    expected = model(pixel_values).to_tuple()
    if by == "configuration":
        model.config.return_dict = False
    values = model(pixel_values, **({"return_dict": False} if by == "argument" else {}))
    assert isinstance(values, tuple) and len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other)


@every_variant
def test_eager_attention_equals_sdpa(build, fields):
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = build(StellarForPreTraining, attn_implementation=implementation, **fields)
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs.append(model(**batch(model.config)))
    for name in ("sparse_tokens", "localization", "reconstruction", "loss"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], atol=1e-6, rtol=1e-5)


# Saving and loading --------------------------------------------------------------------------------------------------


@every_variant
def test_every_tensor_survives_saving_and_loading_twice(build, tmp_path, fields):
    model = build(StellarForPreTraining, **fields)
    if model.teacher is not None:
        torch.nn.init.normal_(model.teacher.clustering_head.prototypes)  # a loaded teacher is no copy
    expected = model.state_dict()
    inputs = batch(model.config)
    loss = model(**inputs).loss
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        model, report = StellarForPreTraining.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(**inputs).loss, loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_and_can_be_asked_for(build, tmp_path, dtype):
    build(StellarForPreTraining).to(dtype).save_pretrained(tmp_path / "half")
    build(StellarForPreTraining).save_pretrained(tmp_path / "full")
    for name, asked, expected in (("half", "auto", dtype), ("full", dtype, dtype), ("half", torch.float32, None)):
        model = StellarForPreTraining.from_pretrained(tmp_path / name, dtype=asked)
        assert {weight.dtype for weight in model.state_dict().values()} == {expected or torch.float32}
    output = StellarModel.from_pretrained(tmp_path / "half", dtype=dtype)(images(1, 3, 32, 32))
    assert output.localization.dtype == dtype and output.localization.isfinite().all()


def test_bfloat16_objective_is_close_to_float32(build):
    model = build(StellarForPreTraining, use_teacher=True)
    expected = model(**batch(model.config)).loss
    loss = model.to(torch.bfloat16)(**batch(model.config)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


def test_encoder_weights_start_pretraining(build, tmp_path):
    """Whatever the checkpoint lacks gets fresh values, and the teacher starts as a copy of what was loaded."""
    encoder = build(StellarModel)
    encoder.save_pretrained(tmp_path)
    model, report = StellarForPreTraining.from_pretrained(tmp_path, use_teacher=True, output_loading_info=True)

    assert not report["unexpected_keys"]
    assert "decoder.positions.gaussian_matrix" in report["missing_keys"]
    assert not any(key.startswith(("stellar.", "teacher.")) for key in report["missing_keys"])
    assert all(torch.equal(t, encoder.state_dict()[key]) for key, t in model.stellar.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert 0.5 < model.decoder.positions.gaussian_matrix.std() < 1.5
    assert 0.5 < model.clustering_head.prototypes.std() < 1.5
    assert all(torch.equal(teacher, weight) for teacher, weight in model.teacher_and_student_weights())
    assert not any(weight.requires_grad for weight in model.teacher.parameters())


def test_fresh_weights_have_their_distributions(build):
    model = build(StellarForPreTraining, hidden_size=64, num_sparse_tokens=64)
    embeddings = model.stellar.embeddings
    assert embeddings.sparse_tokens.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.2)
    assert (model.stellar.layers[0].mlp.fc1.bias == 0).all()
    assert model.decoder.positions.gaussian_matrix.abs().sum() > 0


@pytest.mark.parametrize("use_teacher", [False, True])
def test_pretraining_folder_loads_as_encoder(build, tmp_path, use_teacher):
    pretraining = build(StellarForPreTraining, use_teacher=use_teacher)
    pretraining.save_pretrained(tmp_path)
    model, report = StellarModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(t, pretraining.stellar.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kept", [None, 5])
@pytest.mark.parametrize("needed", ["cls_and_tokens", "cls"])
def test_outputs_that_are_needed_alone_are_those_of_the_whole(build, implementation, kept, needed):
    model = build(StellarModel, attn_implementation=implementation)
    pixel_values = images(2, 3, 32, 32).requires_grad_()
    kept_patches = None if kept is None else images(2, 16).argsort(dim=1)[:, :kept]
    cls, _, tokens = model.split(model.encode(pixel_values, kept_patches))
    expected = torch.cat([cls.unsqueeze(1), tokens], dim=1) if needed == "cls_and_tokens" else cls.unsqueeze(1)
    actual = model.encode(pixel_values, kept_patches, needed=needed)

    torch.testing.assert_close(actual, expected)
    weights = images(*expected.shape, seed=1)
    inputs = [pixel_values, *model.layers.parameters()]
    for gradient, reference in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)


# Gradients -----------------------------------------------------------------------------------------------------------


@every_variant
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(build, fields):
    model = build(StellarForPreTraining, **fields).train()
    gradients = gradients_of(model, **batch(model.config))
    assert gradients.keys() == {name for name, _ in model.named_parameters() if not name.startswith("teacher.")}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_gradients_of_positions_are_the_same_every_time_with_several_threads(build):
    model = build(StellarModel)
    views = images(256, 3, 32, 32)
    kept = images(256, (32 // model.config.patch_size) ** 2, seed=1).argsort(dim=1)[:, :6]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = []
        for _ in range(4):
            output = model.embeddings(views, model.embeddings.grid_size(views), kept)
            gradients += torch.autograd.grad((output**2).sum(), [model.embeddings.position_embeddings])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(build, use_reentrant):
    model = build(StellarForPreTraining, use_teacher=True).train()
    inputs = batch(model.config)
    expected = gradients_of(model, **inputs)

    runs = []
    hook = model.stellar.layers[0].layernorm_before.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients_of(model, **inputs)
    runs_without = len(runs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    gradients = gradients_of(model, **inputs)
    hook.remove()

    assert len(runs) == 3 * runs_without  # once plainly, twice with checkpoints
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


# Objective -----------------------------------------------------------------------------------------------------------


@every_variant
def test_loss_is_the_sum_of_its_terms(build, fields):
    model = build(StellarForPreTraining, **fields)
    output = model(**batch(model.config))
    torch.testing.assert_close(output.loss, sum(output[name] for name in LOSS_TERMS))
    assert all(output[name] != 0 for name in LOSS_TERMS)


@every_variant
def test_objective_is_deterministic_for_given_noise(build, fields):
    model = build(StellarForPreTraining, **fields)
    inputs = batch(model.config)
    first, second = model(**inputs), model(**inputs)
    assert all(torch.equal(first[name], second[name]) for name in ("loss", *LOSS_TERMS))
    other = model(**{**inputs, "noise": -inputs["noise"]})
    assert not torch.equal(other.loss, first.loss)


def test_patches_of_lowest_noise_are_kept(build):
    """Pixels of dropped patches cannot change the loss, those of kept ones do."""
    model = build(StellarForPreTraining)
    inputs = batch(model.config)
    inputs["noise"] = torch.arange(16.0).expand(4, 16).clone()  # keeps the first 6 patches in row-major order
    assert num_kept_patches(16, model.config.mask_ratio) == 6
    loss = model(**inputs).loss

    def loss_with_changed_patch(row: int, column: int) -> torch.Tensor:
        views = inputs["global_pixel_values"].clone()
        views[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 3
        return model(**{**inputs, "global_pixel_values": views}).loss

    assert torch.equal(loss_with_changed_patch(1, 2), loss)
    assert not torch.equal(loss_with_changed_patch(1, 1), loss)


def test_masking_noise_is_drawn_when_it_is_not_given(build):
    model = build(StellarForPreTraining)
    inputs = batch(model.config)
    del inputs["noise"]
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("weight", "terms"),
    [
        ("reconstruction_weight", ["reconstruction_loss"]),
        ("koleo_weight", ["koleo_loss"]),
        ("clustering_weight", ["clustering_loss", "cls_clustering_loss"]),
        ("masked_weight", ["masked_loss"]),
    ],
)
def test_weights_scale_their_terms(build, weight, terms):
    outputs = {}
    for value in (1, 3):
        model = build(StellarForPreTraining, **{weight: value})
        outputs[value] = model(**batch(model.config))
    for name in set(LOSS_TERMS) - {"cls_view_loss"}:
        torch.testing.assert_close(outputs[3][name], outputs[1][name] * (3 if name in terms else 1))


def test_cls_of_masked_and_local_views_are_weighted_apart(build):
    def cls_view_loss(masked_weight: float, local_weight: float) -> float:
        model = build(StellarForPreTraining, masked_weight=masked_weight, local_weight=local_weight)
        return model(**batch(model.config)).cls_view_loss.item()

    masked, local = cls_view_loss(1, 0), cls_view_loss(0, 1)
    assert masked > 0 and local > 0
    assert cls_view_loss(2, 3) == pytest.approx(2 * masked + 3 * local, rel=1e-5)


def test_perfect_pixels_have_no_reconstruction_loss(build):
    """The target is RGB, although the model sees normalized pixels."""
    model = build(StellarForPreTraining)
    torch.nn.init.zeros_(model.decoder.head.weight)
    color = torch.tensor([0.2, 0.4, 0.9])
    model.decoder.head.bias.data.copy_(color)
    mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)
    pixel_values = ((color - mean) / std).view(1, 3, 1, 1).expand(2, 3, 35, 32)
    output = model(pixel_values)
    assert output.reconstruction.shape == (2, 3, 32, 32)  # without the rows that patches do not tile
    assert output.reconstruction_loss < 1e-10


def test_code_loss_is_the_weighted_cross_entropy(build):
    model = build(StellarForPreTraining, reconstruction_target="codes")
    inputs = batch(model.config)
    output = model(**inputs)
    expected = F.cross_entropy(output.reconstruction.transpose(1, 2), inputs["code_labels"])
    torch.testing.assert_close(output.reconstruction_loss, 0.05 * expected)


@pytest.mark.parametrize("use_teacher", [False, True])
def test_views_are_optional(build, use_teacher):
    model = build(StellarForPreTraining, use_teacher=use_teacher)
    output = model(images(2, 3, 32, 32))
    assert output.masked_loss == 0 and output.cls_view_loss == 0 and output.loss.isfinite()
    assert model(images(2, 3, 32, 32), return_loss=False).loss is None


def test_code_model_without_codes_has_a_reconstruction_but_no_loss(build):
    output = build(StellarForPreTraining, reconstruction_target="codes")(images(2, 3, 24, 32))
    assert output.loss is None
    assert output.reconstruction.shape == (2, 12, 16)


@torch.no_grad()
def test_diagnostics_tell_a_uniform_model_from_a_decided_one(build):
    model = build(StellarForPreTraining)
    model.stellar.localization.sparse_projection.weight.zero_()
    model.clustering_head.prototypes.zero_()
    output = model(**batch(model.config))
    assert output.localization_sharpness == 0.25  # each patch belongs to all four tokens alike
    assert output.prototype_entropy.item() == pytest.approx(1) and output.slot_information.item() < 1e-3

    model = build(StellarForPreTraining)
    model.stellar.localization.temperature = 1e-6
    model.clustering_head.layers[-1].weight.zero_()
    model.clustering_head.layers[-1].bias.copy_(torch.eye(8)[0])
    model.clustering_head.prototypes.copy_(100 * torch.eye(12, 8))
    output = model(**batch(model.config))
    assert output.localization_sharpness > 0.99
    assert output.prototype_entropy < 1e-6  # one prototype takes every token


@torch.no_grad()
def test_slot_information_is_that_of_the_predictions(build):
    """Projections that know their slot alone, whatever the image: told by the predictions, not by balanced targets."""
    model = build(StellarForPreTraining)
    head = model.clustering_head
    head.prototypes.copy_(torch.eye(12, 8))
    views = StellarObjective(model.config, model).project(model, torch.randn(6, 32), torch.randn(6, 4, 32))
    views.projections = torch.eye(8)[[0, 0, 1, 1]].expand(6, 4, 8)
    for temperature, entropy in ((0.01, 0.2789), (1e6, 1.0)):  # ln 2 / ln 12: two of the twelve
        targets = StellarObjective(model.config, model, prediction_temperature=temperature).targets(model, views)
        assert targets.prototype_entropy.item() == pytest.approx(entropy, abs=1e-3)
    views.projections = torch.eye(8)[[0, 1, 2, 3]].expand(6, 4, 8)
    targets = StellarObjective(model.config, model, prediction_temperature=0.01).targets(model, views)
    assert targets.slot_information.item() == pytest.approx(1)


class NextSlot(StellarObjective):
    """A variant without matching: each token is compared with the target of the slot before its own."""

    def match(self, tokens, targets):
        expected = targets.expected.roll(1, dims=1).repeat_interleave(len(tokens) // len(targets.tokens), dim=0)
        return expected, tokens.new_zeros(())


class NextSlotForPreTraining(StellarForPreTraining):
    objective_class = NextSlot


def test_a_step_of_the_objective_can_be_varied(build):
    inputs = batch(build(StellarForPreTraining).config)
    usual, varied = (build(model_class)(**inputs) for model_class in (StellarForPreTraining, NextSlotForPreTraining))
    assert varied.matched_fraction == 0 and not torch.equal(varied.masked_loss, usual.masked_loss)
    for name in set(LOSS_TERMS) - {"masked_loss"}:
        assert torch.equal(varied[name], usual[name])


@every_variant
def test_diagnostics_are_in_their_ranges(build, fields):
    model = build(StellarForPreTraining, **fields)
    output = model(**batch(model.config))
    assert 0 <= output.prototype_entropy <= 1
    assert -1e-5 <= output.slot_information <= 1
    assert 0 <= output.token_diversity <= 2
    assert 1 / 4 <= output.localization_sharpness <= 1


# Teacher -------------------------------------------------------------------------------------------------------------


def test_fresh_teacher_is_a_copy_that_shares_nothing(build):
    model = build(StellarForPreTraining, use_teacher=True)
    for teacher_weight, weight in model.teacher_and_student_weights():
        assert torch.equal(teacher_weight, weight)
        assert teacher_weight.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@torch.no_grad()
def test_teacher_moves_by_the_exponential_average(build, momentum):
    model = build(StellarForPreTraining, use_teacher=True)
    for _, weight in model.teacher_and_student_weights():
        weight.add_(torch.randn_like(weight))
    before = [(teacher.clone(), weight.clone()) for teacher, weight in model.teacher_and_student_weights()]
    model.update_teacher(momentum)
    for (teacher, weight), (old_teacher, old_weight) in zip(model.teacher_and_student_weights(), before, strict=True):
        torch.testing.assert_close(teacher, momentum * old_teacher + (1 - momentum) * old_weight)
        assert torch.equal(weight, old_weight)


def test_teacher_gives_the_targets(build):
    """Another teacher gives another loss, and it looks at the second global view alone."""
    model = build(StellarForPreTraining, use_teacher=True)
    inputs = batch(model.config)
    inputs["local_pixel_values"] = None
    seen = []
    hook = model.teacher.stellar.embeddings.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    loss = model(**inputs).loss
    hook.remove()
    assert len(seen) == 1 and torch.equal(seen[0], inputs["global_pixel_values"][:, 1])
    torch.nn.init.normal_(model.teacher.cls_clustering_head.prototypes)
    assert not torch.equal(model(**inputs).loss, loss)


def test_teacher_stays_frozen_in_training_and_after_loading(build, tmp_path):
    model = build(StellarForPreTraining, use_teacher=True, hidden_dropout_prob=0.5).train()
    model.save_pretrained(tmp_path)
    for candidate in (model, StellarForPreTraining.from_pretrained(tmp_path).train()):
        assert candidate.stellar.training and not any(module.training for module in candidate.teacher.modules())
        assert not any(weight.requires_grad for weight in candidate.teacher.parameters())
        assert all(weight.requires_grad for weight in candidate.stellar.parameters())


@pytest.mark.parametrize(
    ("use_teacher", "momentum", "message"),
    [
        (False, 0.9, "has no teacher: set use_teacher=True"),
        (True, 1.1, "momentum is 1.1"),
        (True, -1, "momentum is -1"),
    ],
)
def test_impossible_teacher_updates_are_refused(build, use_teacher, momentum, message):
    with pytest.raises(ValueError, match=message):
        build(StellarForPreTraining, use_teacher=use_teacher).update_teacher(momentum)


# Wrong input ---------------------------------------------------------------------------------------------------------

CODES = {"reconstruction_target": "codes"}


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        (
            {},
            {"pixel_values": (2, 1, 32, 32)},
            "pixel_values are a tensor of shape (2, 1, 32, 32), but must be (batch, 3, ",
        ),
        ({}, {"pixel_values": (3, 32, 32)}, "pixel_values are a tensor of shape (3, 32, 32), but must be (batch, 3, "),
        ({}, {"pixel_values": (2, 3, 7, 32)}, "7x32 pixels are smaller than one patch of 8x8"),
        ({}, {"local_pixel_values": (2, 2, 3, 4, 4)}, "4x4 pixels are smaller than one patch of 8x8"),
        ({}, {"global_pixel_values": (4, 3, 32, 32)}, "global_pixel_values are a tensor of shape (4, 3, 32, 32)"),
        ({}, {"local_pixel_values": (4, 3, 16, 16)}, "local_pixel_values are a tensor of shape (4, 3, 16, 16)"),
        (
            {},
            {"global_pixel_values": (4, 2, 3, 32, 32)},
            "global_pixel_values are a tensor of shape (4, 2, 3, 32, 32)",
        ),
        ({}, {"local_pixel_values": (3, 2, 3, 16, 16)}, "local_pixel_values are a tensor of shape (3, 2, 3, 16, 16)"),
        (
            {},
            {"noise": (4, 15)},
            "noise is a tensor of shape (4, 15), but must be (batch * global views, patches) = (4, 16)",
        ),
        ({}, {"noise": (2, 16)}, "noise is a tensor of shape (2, 16)"),
        ({}, {"pixel_values": (0, 3, 32, 32)}, "shape (0, 3, 32, 32), but must be (batch, 3, height, width), of one"),
        ({}, {"global_pixel_values": (2, 0, 3, 32, 32)}, "shape (2, 0, 3, 32, 32), but must be "),
        ({}, {"local_pixel_values": (2, 0, 3, 16, 16)}, "shape (2, 0, 3, 16, 16), but must be "),
        ({"use_teacher": True}, {"global_pixel_values": (2, 1, 3, 32, 32)}, "make at least two global views"),
        (CODES, {"code_labels": (2, 15)}, "code_labels are a tensor of shape (2, 15), but"),
        (CODES, {"code_labels": None}, "code_labels are missing"),
    ],
)
def test_wrong_inputs_are_named(build, fields, changes, message):
    model = build(StellarForPreTraining, **fields)
    changed = {name: shape and torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**{**batch(model.config), **changed})


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({}, {"pixel_values": [[0.5]]}, "pixel_values are a list, but must be (batch, 3, height, width)"),
        ({}, {"pixel_values": "cat.jpg"}, "pixel_values are a str, but must be"),
        (
            {},
            {"pixel_values": torch.zeros(2, 3, 32, 32).byte()},
            "pixel_values are torch.uint8, but must be normalized",
        ),
        ({}, {"global_pixel_values": [1, 2]}, "global_pixel_values are a list, but must be (batch, views, "),
        ({}, {"local_pixel_values": 3}, "local_pixel_values are a int, but must be (batch, views, "),
        ({}, {"noise": 0.5}, "noise is a float, but must be"),
        ({}, {"num_kept": 0}, "num_kept is 0, but must be an integer in [1, 16]"),
        ({}, {"num_kept": 2.5}, "num_kept is 2.5, but must be an integer in [1, 16]"),
        ({}, {"target_temperature": torch.nan}, "target_temperature is nan, but must be a positive number"),
        ({}, {"prediction_temperature": torch.inf}, "prediction_temperature is inf, but must be a positive number"),
        ({}, {"prediction_temperature": -1}, "prediction_temperature is -1, but must be a positive number"),
        ({}, {"target_temperature": "0.1"}, "target_temperature is '0.1', but must be a positive number"),
        (CODES, {"code_labels": [1, 2]}, "code_labels are a list, but"),
        (CODES, {"code_labels": torch.zeros(2, 16)}, "code_labels are torch.float32, but must be an int64 tensor"),
    ],
)
def test_values_of_wrong_types_are_named(build, fields, changes, message):
    model = build(StellarForPreTraining, **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**{**batch(model.config), **changes})


def test_compact_maps_gather_around_their_centers(build):
    """Maps of the same weights lie closer together with a weight of places, whatever the shape of the images."""
    pixel_values = images(4, 3, 48, 80)
    loose, compact = build(StellarModel), build(StellarModel, localization_compactness=3.0)
    compact.load_state_dict(loose.state_dict())
    spreads = []
    for model in (loose, compact):
        output = model(pixel_values)
        torch.testing.assert_close(output.localization.sum(-1), torch.ones(output.localization.shape[:2]))
        spreads.append(mean_spread(token_maps(output.localization, output.grid_size)))
    assert spreads[1] < 0.7 * spreads[0]
    torch.testing.assert_close(compact(pixel_values).sparse_tokens, loose(pixel_values).sparse_tokens)


def test_one_turn_of_compact_maps_is_a_step_of_a_mixture_model(build):
    """With a vanishing weight of places it is a step of k-means by cosine; in training there is none."""
    pixel_values = images(2, 3, 32, 32)
    plain = build(StellarModel)
    compact = build(StellarModel, localization_compactness=1e-9, localization_iterations=1)
    output = plain(pixel_values)
    dense = F.normalize(plain.localization.dense_projection(plain.split(output.last_hidden_state)[1]), dim=-1)
    means = F.normalize(output.localization.transpose(1, 2) @ dense, dim=-1)
    expected = (dense @ means.transpose(1, 2) / plain.config.localization_temperature).softmax(-1)
    torch.testing.assert_close(compact(pixel_values).localization, expected)
    assert (expected - output.localization).abs().max() > 0.01

    torch.testing.assert_close(compact.train()(pixel_values).localization, output.localization)


def test_refined_tokens_are_those_of_the_encoder_and_what_lies_under_their_maps(build):
    model = build(StellarModel, refine_tokens=True)
    torch.nn.init.normal_(model.token_refinement.projection.weight)
    output = model(images(2, 3, 32, 32))
    _, dense, tokens = model.split(output.last_hidden_state)
    maps = output.localization.transpose(1, 2)
    means = (maps / maps.sum(2, keepdim=True)) @ dense
    added = F.linear(F.layer_norm(means, means.shape[-1:]), model.token_refinement.projection.weight)
    torch.testing.assert_close(output.sparse_tokens, tokens + added, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.pooler_output, output.sparse_tokens.mean(1))


def test_heads_see_refined_tokens_where_a_model_has_them(build, tmp_path):
    """A classifier names the mean of the refined tokens, and a teacher, at first a copy, gives them as targets."""
    pretraining = build(StellarForPreTraining, refine_tokens=True, use_teacher=True)
    pixel_values = images(2, 3, 32, 32)
    expected = pretraining(pixel_values).sparse_tokens
    _, taught = pretraining.teacher.stellar.cls_and_tokens(pixel_values)
    torch.testing.assert_close(taught, expected)

    pretraining.save_pretrained(tmp_path)
    classifier, report = StellarForImageClassification.from_pretrained(
        tmp_path, num_labels=2, output_loading_info=True
    )
    assert all(key.startswith(("norm.", "classifier.")) for key in report["missing_keys"])
    torch.testing.assert_close(classifier.stellar(pixel_values).pooler_output, expected.mean(1))
    backbone = StellarBackbone.from_pretrained(tmp_path)
    assert not any("token_refinement" in name for name, _ in backbone.named_parameters())


def mean_spread(maps):
    """Mean squared distance of the mass of maps (B, r, h, w) from their centers, in patches."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in maps.shape[2:]), indexing="ij")
    mass = maps.sum((2, 3), keepdim=True)
    centers = [(maps * place).sum((2, 3), keepdim=True) / mass for place in (rows, columns)]
    distances = (rows - centers[0]) ** 2 + (columns - centers[1]) ** 2
    return ((maps * distances).sum() / maps.sum()).item()


def test_localization_noise_sways_training_alone(build):
    pixel_values = images(2, 3, 32, 32)
    quiet, noisy = build(StellarModel), build(StellarModel, localization_noise=3.0)
    noisy.load_state_dict(quiet.state_dict())
    expected = quiet(pixel_values).localization
    torch.testing.assert_close(noisy(pixel_values).localization, expected)

    noisy.train()
    draws = torch.stack([noisy(pixel_values).localization for _ in range(50)])
    torch.testing.assert_close(draws.sum(-1), torch.ones_like(draws[..., 0]))
    assert draws.std(0).min() > 0
    # Gumbel noise keeps the tokens' order of preference: the likeliest token wins most draws.
    wins = F.one_hot(draws.argmax(-1), draws.shape[-1]).sum(0).argmax(-1)
    assert (wins == expected.argmax(-1)).float().mean() > 0.5
