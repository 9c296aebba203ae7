# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Classification, segmentation, reconstruction and backbone: what they compute, learn from, load, and refuse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoBackbone, pipeline
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from stellar_hf import (
    DEMO_MODEL,
    StellarBackbone,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarImageProcessorPil,
    StellarModel,
)
from stellar_hf.loss_stellar import dice_loss

HEADS = [
    StellarForImageClassification,
    StellarForSemanticSegmentation,
    StellarForImageReconstruction,
    StellarBackbone,
]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STRIPES = torch.arange(2 * 32 * 32).view(2, 32, 32) // 256
# Neither square, nor tiled by patches, nor of the size the model was made for.
ODD_PIXELS = torch.randn(2, 3, 52, 37, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build(tiny_config):
    """Builds a seeded tiny model of a class in evaluation mode."""

    def build(model_class, **fields):
        torch.manual_seed(0)
        return model_class(tiny_config(**{"num_labels": 5, **fields})).eval()

    return build


@pytest.fixture
def pretrained(build, tmp_path):
    model = build(StellarForPreTraining, use_teacher=True)
    model.save_pretrained(tmp_path / "pretrained")
    return model, tmp_path / "pretrained"


def learn(model, steps: int = 30, **inputs) -> tuple[float, float]:
    """Loss before and after a few steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize(
    ("model_class", "fields", "labels"),
    [
        (StellarForImageClassification, {}, torch.tensor([1, 4])),
        (StellarForImageClassification, {"num_labels": 1}, torch.tensor([0.3, -1.0])),
        (StellarForImageClassification, {"num_labels": 2}, torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
        (StellarForSemanticSegmentation, {}, STRIPES % 5),
        (
            StellarForSemanticSegmentation,
            {"segmentation_features": "low_rank"},
            STRIPES % 2,
        ),
        (StellarForImageReconstruction, {}, None),
        (StellarForImageReconstruction, {"reconstruction_target": "codes"}, torch.arange(32).view(2, 16) % 16),
    ],
    ids=["classes", "regression", "multi-label", "dense", "low-rank", "pixels", "codes"],
)
def test_heads_learn_one_batch_and_leave_no_parameter_without_gradient(build, model_class, fields, labels):
    """Unused parameters would stop distributed training."""
    model = build(model_class, **fields)
    name = "code_labels" if model_class is StellarForImageReconstruction else "labels"
    inputs = {"pixel_values": PIXELS} | ({} if labels is None else {name: labels})
    before, after = learn(model, **inputs)
    assert after < 0.7 * before
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("model_class", HEADS)
def test_heads_take_the_encoder_of_a_pretrained_checkpoint(pretrained, model_class):
    source, folder = pretrained
    model, report = model_class.from_pretrained(folder, num_labels=5, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert {key.split(".")[0] for key in report["missing_keys"]} <= {"norm", "classifier"}
    encoder = model if model_class is StellarBackbone else model.stellar
    expected = source.stellar.state_dict()
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_classification_reads_the_mean_of_the_sparse_tokens(build):
    model = build(StellarForImageClassification)
    output = model(ODD_PIXELS, labels=torch.tensor([0, 3]))
    pooled = model.stellar(ODD_PIXELS).sparse_tokens.mean(dim=1)
    torch.testing.assert_close(output.logits, model.classifier(model.norm(pooled)))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 3])))


@pytest.mark.parametrize("features", ["dense", "low_rank"])
def test_segmentation_classifies_patches_in_place(build, features):
    """Logits at (row, column) come from that patch: rows and columns are not swapped."""
    model = build(StellarForSemanticSegmentation, segmentation_features=features)
    logits = model(ODD_PIXELS).logits
    assert logits.shape == (2, 5, 6, 4)
    encoder = build(StellarModel)
    encoder.load_state_dict(model.stellar.state_dict(), strict=False)
    output = encoder(ODD_PIXELS)
    patches = output.last_hidden_state[:, 1:-4] if features == "dense" else output.localization @ output.sparse_tokens
    patch = model.classifier(model.norm(patches[:, 4 * 4 + 1, :, None, None])).flatten(1)
    torch.testing.assert_close(logits[:, :, 4, 1], patch)


def test_segmentation_loss_is_cross_entropy_and_dice_of_the_pixels_that_count(build):
    model = build(StellarForSemanticSegmentation)
    labels = torch.arange(2 * 52 * 37).view(2, 52, 37) % 5
    labels[:, :20] = 255
    output = model(ODD_PIXELS, labels=labels)
    logits = F.interpolate(output.logits, size=(52, 37), mode="bilinear", align_corners=False)[:, :, 20:]
    labels = labels[:, 20:]
    one_hot = F.one_hot(labels, 5).permute(0, 3, 1, 2).double()
    probabilities = logits.double().softmax(1)
    overlaps, sizes = (probabilities * one_hot).sum(dim=(0, 2, 3)), (probabilities + one_hot).sum(dim=(0, 2, 3))
    expected = F.cross_entropy(logits.double(), labels) + (1 - (2 * overlaps + 1) / (sizes + 1)).mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)


def test_segmentation_loss_of_ignored_pixels_alone_is_zero(build):
    """A batch without labelled pixels leaves a step as it is, instead of turning all weights into NaN."""
    model = build(StellarForSemanticSegmentation).train()
    loss = model(ODD_PIXELS, labels=torch.full((2, 52, 37), 255)).loss
    loss.backward()
    assert loss == 0
    assert all((weight.grad == 0).all() for weight in model.parameters())


def test_dice_of_perfect_and_of_wrong_predictions():
    labels = torch.tensor([[[0, 0, 2], [2, 255, 2]]])
    right = 100.0 * F.one_hot(labels.where(labels < 3, 0), 3).permute(0, 3, 1, 2)
    assert dice_loss(right, labels) < 1e-6
    # Two of class 0 are taken for 1, three of class 2 for 0: no overlap, and sizes of 2 + 3, 0 + 2 and 3.
    assert dice_loss(right.roll(1, dims=1), labels).item() == pytest.approx(1 - (1 / 6 + 1 / 3 + 1 / 4) / 3)
    assert dice_loss(right, torch.full_like(labels, 255)) == 0


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [(StellarForImageClassification, {}), (StellarForSemanticSegmentation, {"segmentation_features": "low_rank"})],
)
def test_a_probe_learns_from_the_features_that_a_frozen_encoder_has_in_use(build, model_class, fields):
    beyond_the_paper = {"localization_noise": 1.0, "localization_compactness": 3.0, "refine_tokens": True}
    model = build(model_class, **fields, **beyond_the_paper)
    model.train()
    assert model.stellar.training  # fine-tuning
    model.stellar.requires_grad_(False)
    expected = model.eval().stellar(PIXELS)
    model.train()
    assert model.norm.training and not any(module.training for module in model.stellar.modules())
    torch.testing.assert_close(model.stellar(PIXELS).pooler_output, expected.pooler_output)


def test_reconstruction_is_that_of_pretraining_and_of_decoding_its_own_tokens(pretrained):
    source, folder = pretrained
    model = StellarForImageReconstruction.from_pretrained(folder)
    output = model(ODD_PIXELS)
    torch.testing.assert_close(output.reconstruction, source(ODD_PIXELS, return_loss=False).reconstruction)
    decoded = model.decode(output.sparse_tokens, output.localization, output.grid_size)
    assert torch.equal(decoded, output.reconstruction)
    image = model.denormalize(ODD_PIXELS)[..., :48, :32]
    torch.testing.assert_close(output.loss, F.mse_loss(output.reconstruction, image))


def test_decoding_follows_the_map_not_the_order_of_tokens(build):
    """S is a set: permuting the tokens together with the columns of L changes nothing."""
    model = build(StellarForImageReconstruction)
    output = model(PIXELS)
    order = torch.tensor([2, 0, 3, 1])
    decoded = model.decode(output.sparse_tokens[:, order], output.localization[:, :, order], output.grid_size)
    torch.testing.assert_close(decoded, output.reconstruction)


def test_decoding_takes_tokens_of_another_precision(build):
    """Tokens that were saved, or edited in float32."""
    model = build(StellarForImageReconstruction)
    output = model(PIXELS)
    decoded = model.to(torch.bfloat16).decode(output.sparse_tokens, output.localization)
    assert decoded.dtype == torch.bfloat16
    torch.testing.assert_close(decoded.float(), output.reconstruction, rtol=0, atol=0.05)


def test_backbone_gives_the_feature_maps_of_the_chosen_layers(build):
    model = build(StellarBackbone, out_features=["stem", "stage2"])
    output = model(ODD_PIXELS, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and model.channels == [32, 32]
    assert [tuple(maps.shape) for maps in output.feature_maps] == [(2, 32, 6, 4)] * 2
    plain = build(StellarModel)
    plain.load_state_dict(model.state_dict(), strict=False)
    patches = plain(ODD_PIXELS).last_hidden_state[:, 1:-4]
    torch.testing.assert_close(output.feature_maps[1][:, :, 5, 2], patches[:, 5 * 4 + 2])
    assert model(ODD_PIXELS).hidden_states is None


def test_backbone_is_found_and_keeps_its_choice_of_layers(build, tiny_config, tmp_path):
    assert type(AutoBackbone.from_config(tiny_config())) is StellarBackbone
    build(StellarBackbone, out_indices=[1]).save_pretrained(tmp_path)
    assert StellarBackbone.from_pretrained(tmp_path).out_features == ["stage1"]


@pytest.mark.parametrize(
    ("model_class", "inputs", "message"),
    [
        (StellarForImageClassification, {"labels": torch.tensor([0, 5])}, r"labels hold 5, but num_labels is 5"),
        (StellarForImageClassification, {"labels": torch.tensor([-1, 0])}, r"labels hold -1, but num_labels is 5"),
        (StellarForSemanticSegmentation, {"labels": torch.zeros(2, 1024).long()}, r"shape \(2, 1024\), but must be"),
        (StellarForSemanticSegmentation, {"labels": torch.zeros(1, 8, 8).long()}, r"\(1, 8, 8\), but .* 2 images"),
        (
            StellarForSemanticSegmentation,
            {"labels": torch.full((2, 8, 8), 7)},
            r"labels hold 7, .* or 255 \(ignored\)",
        ),
        *(
            (model_class, {"pixel_values": torch.zeros(2, 1, 32, 32)}, r"\(2, 1, 32, 32\), but must be \(batch, 3, he")
            for model_class in HEADS
        ),
        *((model_class, {"pixel_values": [1.0]}, r"pixel_values are a list, but must be") for model_class in HEADS),
        (StellarForImageClassification, {"labels": [0, 1]}, "labels are a list, but must be a tensor with a row for"),
        (StellarForImageClassification, {"labels": torch.zeros(3).long()}, r"shape \(3,\), but .* each of 2 images"),
        (StellarForSemanticSegmentation, {"labels": torch.zeros(2, 8, 8)}, "labels are torch.float32, but must be an"),
        (StellarForSemanticSegmentation, {"labels": [[0]]}, "labels are a list, but must be an int64 tensor"),
    ],
)
def test_wrong_inputs_are_refused_in_a_sentence(build, model_class, inputs, message):
    with pytest.raises(ValueError, match=message):
        build(model_class)(**{"pixel_values": PIXELS, **inputs})


def test_codes_of_a_wrong_shape_and_tokens_that_do_not_fit_are_refused(build):
    model = build(StellarForImageReconstruction, reconstruction_target="codes")
    with pytest.raises(ValueError, match=r"code_labels are a tensor of shape \(2, 9\), but .* \(2, 16\)"):
        model(PIXELS, code_labels=torch.zeros(2, 9).long())
    for code in (-1, 16):
        with pytest.raises(ValueError, match=f"code_labels hold {code}, but codebook_size is 16"):
            model(PIXELS, code_labels=torch.full((2, 16), code))
    tokens, localization = torch.zeros(2, 4, 32), torch.zeros(2, 16, 4)
    with pytest.raises(ValueError, match=r"localization \(2, 16, 3\), but"):
        model.decode(tokens, localization[:, :, :3], (4, 4))
    with pytest.raises(ValueError, match=r"\(2, 4, 30\)"):
        model.decode(tokens[:, :, :30], localization, (4, 4))
    with pytest.raises(ValueError, match=r"localization has 16 patches and grid_size is \(3, 4\)"):
        model.decode(tokens, localization, (3, 4))


def test_unknown_feature_maps_are_refused(tiny_config):
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names.*stage7"):
        tiny_config(out_features=["stage7"])
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names.*stage7"):
        StellarBackbone.from_pretrained(DEMO_MODEL, out_features=["stage7"])


@pytest.fixture
def image():
    return Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3))


def processor(crop: bool = True):
    return StellarImageProcessorPil(
        size={"shortest_edge": 32} if crop else {"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        do_center_crop=crop,
    )


def test_feature_extraction_pipeline(build, image):
    model = build(StellarModel)
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor())
    output = model(**processor()(image, return_tensors="pt"))
    np.testing.assert_allclose(extract(image)[0], output.last_hidden_state[0].detach(), atol=1e-5)
    np.testing.assert_allclose(extract(image, pool=True)[0], output.pooler_output[0].detach(), atol=1e-5)


def test_classification_pipeline(build, image):
    model = build(StellarForImageClassification, id2label={i: f"class {i}" for i in range(5)})
    classify = pipeline("image-classification", model=model, image_processor=processor())
    probabilities = model(**processor()(image, return_tensors="pt")).logits[0].softmax(0)
    predictions = classify(image, top_k=5)
    assert predictions[0]["label"] == f"class {probabilities.argmax()}"
    assert {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in predictions} == {
        f"class {i}": probability.item() for i, probability in enumerate(probabilities)
    }


def test_segmentation_pipeline(build, image):
    """Each pixel of the original image belongs to the mask of one class: that of its logits."""
    model = build(StellarForSemanticSegmentation, id2label={i: f"class {i}" for i in range(5)})
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        segment = pipeline("image-segmentation", model=model, image_processor=processor(crop=False))
    assert not log.out
    logits = model(**processor(crop=False)(image, return_tensors="pt")).logits
    classes = F.interpolate(logits, size=(40, 48), mode="bilinear", align_corners=False).argmax(1)[0].numpy()
    masks = {entry["label"]: np.asarray(entry["mask"]) > 0 for entry in segment(image)}
    assert set(masks) == {f"class {i}" for i in np.unique(classes)}
    for i in np.unique(classes):
        assert (masks[f"class {i}"] != (classes == i)).mean() < 0.01


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (32, 32)])
def test_segmentation_pipeline_gives_every_pixel_a_class_where_the_processor_crops(build, size):
    model = build(StellarForSemanticSegmentation, id2label={i: f"class {i}" for i in range(5)})
    segment = pipeline("image-segmentation", model=model, image_processor=processor())
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    masks = np.stack([np.asarray(entry["mask"]) // 255 for entry in segment(Image.fromarray(noise))])
    assert masks.shape[1:] == size
    assert (masks.sum(0) == 1).all()
