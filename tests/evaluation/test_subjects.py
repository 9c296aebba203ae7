# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Features that a run keeps for its next task are those of the model that it measures."""

import datasets
import pytest
from PIL import Image

from stellar_hf import StellarImageProcessorPil
from stellar_hf.evaluation import RawPixels, RunSettings, Subject
from stellar_hf.evaluation.presets import Splits
from stellar_hf.features import model_features

GRAY = [Image.new("RGB", (8, 8), (128, 128, 128))]
AS_IT_IS = StellarImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[1.0] * 3)


@pytest.fixture
def splits():
    images = datasets.Dataset.from_dict({"image": GRAY}, features=datasets.Features(image=datasets.Image()))
    return Splits("gray", train=None, test=images, source={})


def test_features_are_not_those_of_a_model_that_was_there_before(splits):
    """In whose place in memory the next one may lie."""
    settings = RunSettings(show_progress=False)

    def first_number(mean):
        subject = Subject("raw pixels", RawPixels((mean,) * 3, (1.0,) * 3), AS_IT_IS, kind="baseline")
        features = settings.encode(subject, splits, "test", model_features)
        assert settings.encode(subject, splits, "test", model_features) is features
        return features.pooler_output[0, 0].item()

    means = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [first_number(mean) for mean in means] == pytest.approx([mean - 0.5 for mean in means], abs=0.01)
