# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What a model card says, and whom it belongs to."""

import errno
import os

import pytest
from huggingface_hub import ModelCard, ModelCardData

from stellar_hf import StellarModel
from stellar_hf.hub_stellar import write_model_card


@pytest.fixture
def model(tiny_config):
    return StellarModel(tiny_config())


def test_card_says_what_is_known(model, tmp_path):
    write_model_card(
        tmp_path,
        model,
        name="mosaics",
        tags=["tiny"],
        base_model="owner/base",
        dataset_ids=["owner/photographs"],
        metrics={"test_knn_accuracy": 0.5, "test_localization_miou": 0.25},
        training={"Steps": 3},
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["stellar", "self-supervised", "tiny"]
    assert card.data.base_model == "owner/base"
    assert card.data.datasets == ["owner/photographs"]
    assert card.data.metrics == ["accuracy", "mean_iou"]
    shown = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert shown == {"test_knn_accuracy": ("accuracy", 0.5), "test_localization_miou": ("mean_iou", 0.25)}
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


@pytest.mark.parametrize(("source", "base_model"), [("owner/base", "owner/base"), ("/data/secret", None), ("", None)])
def test_base_model_is_where_the_model_was_loaded_from_on_the_hub(model, tmp_path, source, base_model):
    model.name_or_path = source
    write_model_card(tmp_path, model)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base_model
    assert "secret" not in card.content


def test_usage_in_the_card_runs(model, tmp_path, monkeypatch, photograph, auto_image_processor):
    from stellar_hf import StellarImageProcessorPil

    model.save_pretrained(tmp_path / "tiny")
    StellarImageProcessorPil(crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny")
    write_model_card(tmp_path / "tiny", model)
    usage = (tmp_path / "tiny" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {"image": photograph}
    exec(usage, names)
    assert "(1, 4, 32)" in usage and names["outputs"].sparse_tokens.shape == (1, 4, 32)
    assert "(1, 16, 4)" in usage and names["outputs"].localization.shape == (1, 16, 4)


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


@pytest.mark.parametrize("content", ["", "  \n", str(FORM)], ids=["empty", "blank", "form"])
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
