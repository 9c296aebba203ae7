# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Outputs of the models in what splits, pads, gathers and joins them by batches: pipelines, trainers, Accelerate."""

import numpy as np
import pytest
import torch
from accelerate.utils import concatenate
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Trainer, TrainingArguments, pipeline

from stellar_hf import (
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarImageProcessorPil,
    StellarModel,
    StellarTrainer,
    StellarTrainingArguments,
)
from stellar_hf.localization_stellar import resolve_grid_size

PIXELS = torch.randn(5, 3, 32, 24, generator=torch.Generator().manual_seed(0))
WITH_MAPS = [StellarModel, StellarForPreTraining, StellarForImageReconstruction]


@pytest.fixture(scope="module")
def models(tiny_config):
    """One seeded tiny model of each class, in evaluation mode."""
    torch.manual_seed(0)
    return {model_class: model_class(tiny_config()).eval() for model_class in WITH_MAPS}


def trainer_of(model, folder, compute_metrics=None, **arguments) -> Trainer:
    """The stock Trainer, with batches that do not divide the images."""
    settings = {"per_device_eval_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return Trainer(model, TrainingArguments(str(folder), **settings, **arguments), compute_metrics=compute_metrics)


@torch.no_grad()
@pytest.mark.parametrize("model_class", WITH_MAPS)
def test_every_tensor_has_the_batch_first_or_is_a_scalar(models, model_class):
    """The rule by which DataParallel gathers, the Trainer pads and pipelines take batches apart."""
    model = models[model_class]
    output = model(PIXELS, output_hidden_states=True)
    assert output.grid_size.dtype == torch.int64 and output.grid_size.tolist() == [[4, 3]] * 5
    for name, value in output.items():
        for tensor in value if isinstance(value, tuple) else (value,):
            assert isinstance(tensor, torch.Tensor), name
            assert tensor.ndim == 0 or len(tensor) == 5, name


@torch.no_grad()
def test_outputs_of_batches_are_joined(models):
    model = models[StellarModel]
    joined = concatenate([model(PIXELS[:3]), model(PIXELS[3:])])
    torch.testing.assert_close(dict(joined), dict(model(PIXELS)))


def test_feature_extraction_in_batches(models):
    processor = StellarImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)) for i in range(4)
    ]
    extract = pipeline("image-feature-extraction", model=models[StellarModel], image_processor=processor)
    for batched, single in zip(extract(images, batch_size=3), extract(images), strict=True):
        np.testing.assert_allclose(batched, single, atol=1e-5)


@pytest.mark.parametrize("model_class", [StellarForPreTraining, StellarForImageReconstruction])
def test_trainer_predicts(models, tmp_path, model_class):
    output = trainer_of(models[model_class], tmp_path).predict([{"pixel_values": image} for image in PIXELS])
    with torch.no_grad():
        expected = models[model_class](PIXELS)
    predictions = dict(zip(list(expected)[-len(output.predictions) :], output.predictions, strict=True))
    assert predictions["grid_size"].tolist() == [[4, 3]] * 5
    np.testing.assert_allclose(predictions["reconstruction"], expected.reconstruction, atol=1e-5)


@pytest.mark.parametrize("model_class", [StellarForPreTraining, StellarForImageReconstruction])
def test_trainer_reports_the_evaluation_loss(models, tmp_path, model_class):
    metrics = trainer_of(models[model_class], tmp_path).evaluate([{"pixel_values": image} for image in PIXELS])
    with torch.no_grad():
        losses = [models[model_class](batch).loss for batch in PIXELS.split(2)]
    # The Trainer counts a batch's mean once an image.
    assert metrics["eval_loss"] == pytest.approx((2 * losses[0] + 2 * losses[1] + losses[2]).item() / 5, rel=1e-5)


@pytest.mark.parametrize("model_class", [StellarForPreTraining, StellarForImageReconstruction])
def test_codes_are_given_by_name_and_by_place(tiny_config, model_class):
    model = model_class(tiny_config(reconstruction_target="codes")).eval()
    codes = torch.zeros(5, 12, dtype=torch.int64)
    views = () if model_class is StellarForImageReconstruction else (None, None)
    assert torch.equal(model(PIXELS, *views, codes).loss, model(PIXELS, code_labels=codes).loss)


@pytest.mark.parametrize("model_class", [StellarForPreTraining, StellarForImageReconstruction])
def test_trainer_computes_metrics_of_codes(tiny_config, tmp_path, model_class):
    def share_of_right_codes(prediction):
        (logits,) = (values for values in prediction.predictions if values.shape[-1:] == (16,))
        return {"accuracy": (logits.argmax(-1) == prediction.label_ids).mean()}

    torch.manual_seed(0)
    model = model_class(tiny_config(reconstruction_target="codes")).eval()
    with torch.no_grad():
        codes = model(PIXELS, return_loss=False).reconstruction.argmax(-1)
    codes[:, 0] = (codes[:, 0] + 1) % 16
    dataset = [{"pixel_values": image, "code_labels": labels} for image, labels in zip(PIXELS, codes, strict=True)]
    trainer = trainer_of(model, tmp_path, share_of_right_codes, label_names=["code_labels"])
    assert trainer.evaluate(dataset)["eval_accuracy"] == pytest.approx(11 / 12)


def test_stellar_trainer_predicts(models, tmp_path):
    photos = [{"image": Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8))} for i in range(3)]
    args = StellarTrainingArguments(
        str(tmp_path), num_global_views=2, num_local_views=0, per_device_eval_batch_size=2, report_to="none"
    )
    output = StellarTrainer(models[StellarForPreTraining], args, train_dataset=photos).predict(photos)
    assert np.isfinite(output.metrics["test_loss"])
    assert any(np.array_equal(prediction, [[4, 4]] * 3) for prediction in output.predictions)


# Grid sizes as arguments ---------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), batch_size=st.integers(1, 3))
def test_grid_sizes_are_taken_in_every_form(rows, columns, batch_size):
    pair = torch.tensor([rows, columns])
    for given_size in ((rows, columns), [rows, columns], pair, pair.expand(batch_size, 2)):
        resolved = resolve_grid_size(rows * columns, given_size)
        assert resolved == (rows, columns) and all(type(size) is int for size in resolved)


def test_without_a_grid_size_the_grid_is_square():
    assert resolve_grid_size(196) == (14, 14)
    with pytest.raises(ValueError, match="12 patches and grid_size is None: pass"):
        resolve_grid_size(12)


@pytest.mark.parametrize(
    ("grid_size", "message"),
    [
        ((2, 5), r"12 patches and grid_size is \(2, 5\): pass grid_size=\(rows, columns\) with rows \* columns = 12"),
        ((-3, -4), r"grid_size is \(-3, -4\)"),
        ((12,), r"grid_size is \(12,\)"),
        (torch.tensor([[3, 4], [4, 3]]), r"\[\[3, 4\], \[4, 3\]\], but must be .* the same for all images"),
        (torch.tensor([3.0, 4.0]), r"grid_size is \[3.0, 4.0\], but must be integers"),
        (torch.zeros(0, 2, dtype=torch.int64), r"grid_size is \[\], but must be"),
    ],
)
def test_grid_sizes_that_do_not_fit_are_refused(grid_size, message):
    with pytest.raises(ValueError, match=message):
        resolve_grid_size(12, grid_size)
