# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Transformers' common tests of image processors, on ours."""

import unittest

import pytest
import torch
from transformers import AutoImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from stellar_hf import StellarConfig

common = pytest.importorskip(
    "transformers_tests.test_image_processing_common",
    reason="Transformers' common tests are not in the cache, and their download failed",
)

try:
    HAS_AUTO_CLASS = callable(AutoImageProcessor.from_pretrained)
except ImportError:
    HAS_AUTO_CLASS = False


class StellarImageProcessingTester:
    """Settings of a small image processor, and images for it; what the common tests ask a tester for."""

    batch_size = 3
    num_channels = 3
    settings = {
        "do_resize": True,
        "size": {"shortest_edge": 20},
        "do_center_crop": True,
        "crop_size": {"height": 18, "width": 16},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "do_convert_rgb": True,
    }

    def prepare_image_processor_dict(self) -> dict:
        return dict(self.settings)

    def prepare_image_inputs(self, num_channels=None, **kwargs) -> list:
        return common.prepare_image_inputs(
            batch_size=self.batch_size,
            num_channels=num_channels or self.num_channels,
            min_resolution=12,
            max_resolution=48,
            **kwargs,
        )

    def prepare_processor_inputs(self, **kwargs) -> dict:
        return {"images": self.prepare_image_inputs(**kwargs)}

    def expected_output_image_shape(self, images: list) -> tuple[int, int, int]:
        crop_size = self.settings["crop_size"]
        return self.num_channels, crop_size["height"], crop_size["width"]

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict, dict]:
        shape = {"num_labels": 5, "height": 4, "width": 3}
        logits = torch.randn(self.batch_size, *shape.values(), generator=torch.Generator().manual_seed(0))
        return {"outputs": SemanticSegmenterOutput(logits=logits)}, shape


class StellarImageProcessingTest(
    common.ImageProcessingTestMixin, common.PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    # The common tests find the classes by the name of the folder, or test none.
    image_processing_classes = dict(IMAGE_PROCESSOR_MAPPING[StellarConfig])
    image_processor_dict = StellarImageProcessingTester.settings
    test_cast_dtype = True

    def setUp(self):
        self.image_processor_tester = StellarImageProcessingTester()

    def test_there_are_classes_to_test(self):
        self.assertIn("pil", self.image_processing_classes)

    def test_call_numpy_4_channels(self):
        # Transformers 5.17 asks for four channels without saying so; ours makes RGB of them.
        self.image_processor_dict = {**self.image_processor_dict, "do_convert_rgb": False}
        super().test_call_numpy_4_channels()

    @unittest.skipUnless(HAS_AUTO_CLASS, "This version of Transformers has no AutoImageProcessor without torchvision.")
    def test_image_processor_save_load_with_autoimageprocessor(self):
        super().test_image_processor_save_load_with_autoimageprocessor()

    @unittest.skipUnless(is_torchvision_available(), "There is no torchvision here; the PIL image processor serves.")
    def test_new_models_require_torchvision_backend(self):
        super().test_new_models_require_torchvision_backend()
