# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a model card says, and whom it belongs to."""

import errno
import os
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from stellar_hf import (
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarImageProcessorPil,
    StellarModel,
    StellarTokenPrior,
    StellarTokenPriorPipeline,
)
from stellar_hf.hub_stellar import write_model_card


@pytest.fixture
def model(tiny_config):
    return StellarModel(tiny_config())


def test_card_says_what_is_known(model, tmp_path):
    write_model_card(
        tmp_path,
        model,
        name="scenes",
        tags=["tiny"],
        base_model="owner/base",
        dataset_ids=["owner/photographs"],
        metrics={"test_knn_accuracy": 0.5, "test_mean_best_overlap": 0.25, "test_psnr": 20.0},
        training={"Steps": 3},
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["stellar", "self-supervised", "tiny"]
    assert card.data.base_model == "owner/base"
    assert card.data.datasets == ["owner/photographs"]
    assert card.data.metrics == ["accuracy", "mean_iou"]
    shown = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert shown == {"test_knn_accuracy": ("accuracy", 0.5), "test_mean_best_overlap": ("mean_iou", 0.25)}
    assert {result.dataset_type for result in card.data.eval_results} == {"owner/photographs"}
    for row in ("| Steps | 3 |", "| test_knn_accuracy | 0.5 |", f"| Parameters | {model.num_parameters():,} |"):
        assert row in card.text
    assert "import stellar_hf" in card.text and "trust_remote_code" not in card.text


def test_card_invents_nothing(model, tmp_path):
    """Without the data set that the Hub asks for, results are told in the text alone."""
    write_model_card(tmp_path, model, metrics={"eval_loss": 2.0})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets is None and card.data.base_model is None and card.data.eval_results is None
    assert "Data:" not in card.text and "## Training" not in card.text
    assert "| eval_loss | 2 |" in card.text


def test_baselines_stand_beside_the_model_in_the_text_alone(model, tmp_path):
    metrics = {"test_knn_accuracy": 0.5, "test_psnr": 20.0}
    baselines = {"kmeans": {"test_knn_accuracy": 0.375}, "untrained": {"test_knn_accuracy": 0.125, "test_psnr": 8.0}}
    write_model_card(tmp_path, model, dataset_ids=["owner/photographs"], metrics=metrics, baselines=baselines)
    card = ModelCard.load(tmp_path / "README.md")
    table = ["| | this model | kmeans | untrained |", "|---|---|---|---|"]
    table += ["| test_knn_accuracy | 0.5 | 0.375 | 0.125 |", "| test_psnr | 20 | – | 8 |"]
    assert "\n".join(table) in card.text
    assert [result.metric_value for result in card.data.eval_results] == [0.5]


@pytest.mark.parametrize(("source", "base_model"), [("owner/base", "owner/base"), ("/data/secret", None), ("", None)])
def test_base_model_is_where_the_model_was_loaded_from_on_the_hub(model, tmp_path, source, base_model):
    model.name_or_path = source
    write_model_card(tmp_path, model)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base_model
    assert "secret" not in card.content


@pytest.mark.parametrize("model_class", [StellarModel, StellarForPreTraining])
def test_usage_in_the_card_runs(tiny_config, tmp_path, monkeypatch, photograph, auto_image_processor, model_class):
    model = model_class(tiny_config())
    model.save_pretrained(tmp_path / "tiny")
    StellarImageProcessorPil(crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny")
    write_model_card(tmp_path / "tiny", model)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "tiny" / "README.md").read_text(), re.DOTALL)
    Image.fromarray(photograph).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    assert "(1, 4, 32)" in blocks[0] and names["outputs"].sparse_tokens.shape == (1, 4, 32)
    assert "(1, 16, 4)" in blocks[0] and names["outputs"].localization.shape == (1, 16, 4)
    assert len(blocks) == (1 if model_class is StellarModel else 2)
    assert len(blocks) == 1 or names["localization"].shape == (1, 16, 4)


@pytest.mark.parametrize("has_processor", [True, False])
def test_usage_in_the_card_of_a_drawing_pipeline_runs(
    tiny_config, tmp_path, monkeypatch, photograph, auto_image_processor, has_processor
):
    """Without an image processor nothing can be encoded, and the card does not say how."""
    prior = StellarTokenPrior(
        num_sparse_tokens=4,
        token_size=32,
        grid_size=(4, 4),
        num_classes=2,
        localization_patch_size=2,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=4,
        localization_channels=8,
    )
    processor = StellarImageProcessorPil(crop_size={"height": 32, "width": 32}) if has_processor else None
    model = StellarForImageReconstruction(tiny_config())
    pipe = StellarTokenPriorPipeline(prior, model, image_processor=processor)
    pipe.save_pretrained(tmp_path / "tiny")
    write_model_card(tmp_path / "tiny", model, pipeline="StellarTokenPriorPipeline")
    card = ModelCard.load(tmp_path / "tiny" / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == (3 if has_processor else 1)
    Image.fromarray(photograph).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    assert type(names["pipe"]) is StellarTokenPriorPipeline
    assert not has_processor or names["localization"].shape == (1, 16, 4)


def test_a_model_of_codes_has_no_pipeline_without_its_tokenizer(tiny_config, tmp_path):
    write_model_card(tmp_path, StellarForPreTraining(tiny_config(reconstruction_target="codes")))
    assert "pipe" not in ModelCard.load(tmp_path / "README.md").text


def test_the_metadata_has_results_only_of_metrics_that_the_hub_knows(model, tmp_path):
    write_model_card(tmp_path, model, dataset="photographs", metrics={"eval_psnr": 20.0, "eval_knn_accuracy": 0.5})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.metrics == ["accuracy"]
    assert [result.metric_name for result in card.data.eval_results] == ["eval_knn_accuracy"]
    assert "| eval_psnr | 20 |" in card.text


def test_the_card_says_what_a_user_must_know(model, tmp_path):
    write_model_card(tmp_path, model, license="mit")
    text = ModelCard.load(tmp_path / "README.md").text
    assert "pip install" in text and "## Limits" in text and "Do not use it to" in text
    assert "Weights: `mit`." in text and "arxiv.org/abs/2602.01905" in text.split("```bibtex")[1]


def test_the_card_shows_the_figure_of_the_folder(model, tmp_path):
    write_model_card(tmp_path, model)
    assert "![" not in (tmp_path / "README.md").read_text()
    Image.new("RGB", (2, 2)).save(tmp_path / "reconstructions.png")
    write_model_card(tmp_path, model)
    assert "(reconstructions.png)" in (tmp_path / "README.md").read_text()


def test_card_is_renewed_until_someone_edits_it(model, tmp_path):
    path = tmp_path / "README.md"
    write_model_card(tmp_path, model, training={"Steps": 1})
    write_model_card(tmp_path, model, training={"Steps": 2})
    assert "| Steps | 2 |" in path.read_text()

    edited = path.read_text().replace("license: apache-2.0", "license: mit")
    path.write_text(edited)
    write_model_card(tmp_path, model, training={"Steps": 3})
    assert path.read_text() == edited


def test_card_of_private_data_says_what_it_may(model, tmp_path):
    """Without a name there is no data set to give in the metadata."""
    write_model_card(tmp_path, model, data="1,200 images of 3 classes", metrics={"eval_loss": 2.0})
    card = ModelCard.load(tmp_path / "README.md")
    assert "\nData: 1,200 images of 3 classes.\n" in card.text
    assert card.data.datasets is None and card.data.eval_results is None


FORM = ModelCard.from_template(
    ModelCardData(tags=["tiny"], library_name="transformers"),
    model_description="This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model "
    "card has been automatically generated.",
)
DIFFUSERS_FORM = ModelCard.from_template(
    ModelCardData(library_name="diffusers"),
    model_description="This is the model card of a 🧨 diffusers pipeline that has been pushed on the Hub. This model "
    "card has been automatically generated.",
)


@pytest.mark.parametrize(
    "content", ["", "  \n", str(FORM), str(DIFFUSERS_FORM)], ids=["empty", "blank", "form", "Diffusers"]
)
def test_what_nobody_wrote_is_replaced(model, tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    write_model_card(tmp_path, model)
    assert "## How to load" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"# Mine\n",
        b"---\nlicense: mit\n---\n",
        str(FORM).replace("tags:", "license: mit\ntags:").encode(),
        str(FORM).replace("[More Information Needed]", "Me", 1).encode(),
        f"# Mine, above\n\n{FORM}".encode(),
        b"---\n: [broken\n---\n# Mine\n",
        "# Größe\n".encode("latin-1"),
    ],
    ids=["text", "license", "form with license", "filled form", "text before form", "broken metadata", "no UTF-8"],
)
def test_what_a_person_wrote_stays(model, tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    write_model_card(tmp_path, model)
    assert (tmp_path / "README.md").read_bytes() == content


def test_where_the_disk_is_full_the_old_card_stays(model, tmp_path, monkeypatch):
    write_model_card(tmp_path, model, training={"Steps": 1})
    before = (tmp_path / "README.md").read_text()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_model_card(tmp_path, model, training={"Steps": 2})
    assert (tmp_path / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
