# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
from PIL import Image

from stellar_hf.evaluation import (
    ColourGradientHistogram,
    KMeansSegments,
    RawPixels,
    foreground_ari,
    object_features,
    pooled_tokens,
    segmentations,
    uniform_localization,
)
from stellar_hf.features import encode_images


def halves(red_share: float = 0.5, size: int = 16) -> torch.Tensor:
    """(3, H, W) RGB: red on the left, blue on the right."""
    image = torch.zeros(3, size, size)
    border = round(red_share * size)
    image[0, :, :border], image[2, :, border:] = 0.9, 0.9
    return image


def stripes(vertical: bool, size: int = 16) -> torch.Tensor:
    pattern = (torch.arange(size) // 2 % 2).float().expand(3, size, size)
    return pattern if vertical else pattern.transpose(1, 2)


def test_baselines_are_encoders_of_the_one_loop():
    image = (halves() * 255).byte()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()), Image.new("RGB", (16, 16), (0, 200, 0))]
    dataset = [{"image": picture} for picture in pictures]

    def processor(images, **kwargs):
        return {"pixel_values": (torch.stack(images).float() / 255 - 0.4) / 0.2}

    for encoder in (RawPixels, ColourGradientHistogram, lambda *norm: KMeansSegments(2, *norm)):
        features = encode_images(encoder((0.4,) * 3, (0.2,) * 3), dataset, processor, show_progress=False)
        assert features.pooler_output.shape[0] == 2
        expected = encoder()(
            torch.stack([image, (torch.tensor([0, 200, 0]).byte()).view(3, 1, 1).expand(3, 16, 16)]) / 255
        )
        torch.testing.assert_close(features.pooler_output, expected["pooler_output"])


def test_raw_pixels_are_all_of_the_image():
    image = halves()
    features = RawPixels()(image.unsqueeze(0))["pooler_output"]
    torch.testing.assert_close(features.view(3, 16, 16) + 0.5, image)


def test_histogram_knows_colours_and_directions_and_not_places():
    encoder = ColourGradientHistogram()
    images = torch.stack(
        [halves(), halves().flip(2), halves(0.25), stripes(True), stripes(False), stripes(True).roll(4, 2)]
    )
    features = encoder(images)["pooler_output"]
    assert features.shape == (6, 230)
    torch.testing.assert_close(features.square().sum(1), torch.full((6,), 4.0))  # four histograms
    similarities = features @ features.T / 4
    assert similarities[0, 1] == pytest.approx(1, abs=1e-5)
    assert similarities[0, 2] < 0.995
    assert similarities[3, 5] > similarities[3, 4] + 0.2


def test_kmeans_segments_are_the_things_of_an_image_and_their_colours():
    features = object_features(KMeansSegments(2), torch.stack([halves(), halves(0.25)]))
    assert features["localization"].shape == (2, 256, 2)
    assert features["grid_size"].tolist() == [[16, 16]] * 2
    segments = segmentations(features, (16, 16), 2)
    assert segments.keys() == {"localization"}
    mask = (torch.stack([halves(), halves(0.25)])[:, 2] > 0).long() + 1
    assert foreground_ari(segments["localization"], mask).tolist() == [1, 1]
    tokens = features["sparse_tokens"]
    assert tokens.shape == (2, 2, 64)
    # One colour each: red is level 3 of the first channel, blue of the last.
    assert {tuple(image.argmax(1).sort().values.tolist()) for image in tokens} == {(3, 48)}
    torch.testing.assert_close(tokens.square().sum(2), torch.ones(2, 2))


def test_uniform_maps_and_pooled_tokens_replace_what_a_model_says():
    localization = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    features = {
        "sparse_tokens": torch.zeros(1, 2, 3),
        "localization": localization,
        "dense_features": torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]),
    }
    assert uniform_localization(features)["localization"].tolist() == [[[0.5, 0.5], [0.5, 0.5]]]
    pooled = pooled_tokens(features)
    assert torch.equal(pooled["sparse_tokens"], features["dense_features"])
    assert pooled["pooler_output"].tolist() == [[2.5, 3.5, 4.5]]
    assert features["localization"] is localization


def test_impossible_numbers_of_segments_are_refused():
    with pytest.raises(ValueError, match="num_segments is 0"):
        KMeansSegments(0)
