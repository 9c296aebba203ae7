# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Transformers' common tests of a configuration and of models, on ours."""

import copy
import unittest
from unittest.mock import patch

import pytest
import torch
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from stellar_hf import (
    StellarBackbone,
    StellarConfig,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarModel,
)
from stellar_hf.modeling_stellar import StellarEmbeddings

MISSING = "Transformers' common tests are not in the cache, and their download failed"
common = pytest.importorskip("transformers_tests.test_modeling_common", reason=MISSING)
configuration_common = pytest.importorskip("transformers_tests.test_configuration_common", reason=MISSING)

# The common tests know the kind of a model by its name in Transformers' own tables of Auto classes.
KINDS = {
    "MODEL_MAPPING_NAMES": "StellarModel",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": "StellarForPreTraining",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "StellarForImageClassification",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": "StellarForSemanticSegmentation",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": "StellarBackbone",
}


class StellarModelTester:
    """Sizes of a tiny model, and inputs for it; what the common tests ask a model tester for."""

    batch_size = 3
    is_training = True
    num_channels = 3
    image_size = 16
    patch_size = 8
    num_patches = 4
    num_sparse_tokens = 3
    seq_length = 1 + num_patches + num_sparse_tokens
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def get_config(self) -> StellarConfig:
        return StellarConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_sparse_tokens=self.num_sparse_tokens,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=29,
            reconstruction_target="pixels",
            num_prototypes=12,
            prototype_dim=8,
            projection_hidden_size=20,
            mask_ratio=0.5,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[StellarConfig, dict[str, torch.Tensor]]:
        pixel_values = torch.randn(self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": pixel_values}

    def views(self) -> dict[str, torch.Tensor]:
        """Two global views to be masked and two smaller local ones of each image, always the same."""
        generator = torch.Generator().manual_seed(0)
        image = (self.num_channels, self.image_size, self.image_size)
        patch = (self.num_channels, self.patch_size, self.patch_size)
        return {
            "global_pixel_values": torch.randn(self.batch_size, 2, *image, generator=generator),
            "local_pixel_values": torch.randn(self.batch_size, 2, *patch, generator=generator),
            "noise": torch.rand(self.batch_size * 2, self.num_patches, generator=generator),
        }


def without_random_weights(config: StellarConfig) -> StellarConfig:
    config = copy.deepcopy(config)
    config.initializer_range = 1e-10
    return config


class StellarModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        StellarModel,
        StellarForPreTraining,
        StellarForImageClassification,
        StellarForSemanticSegmentation,
        StellarForImageReconstruction,
        StellarBackbone,
    )
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = StellarModelTester()
        for table, name in KINDS.items():
            names = patch.dict(getattr(modeling_auto, table), {StellarConfig.model_type: name})
            names.start()
            self.addCleanup(names.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is StellarForPreTraining:
            inputs.update(self.model_tester.views())
        return inputs

    def test_model_get_set_embeddings(self):
        """The input embeddings of a model of images make its sequence; they are no table of tokens."""
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), StellarEmbeddings)
            self.assertIsNone(model.get_output_embeddings())

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # The common test looks for the `weight` of a table of tokens and skips a model without one.
        weight = property(lambda embeddings: embeddings.patch_embeddings.projection.weight)
        with patch.object(StellarEmbeddings, "weight", weight, create=True):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        # Without views: each of them runs the layers once more, and up to some version the common test takes more than
        # one run of a layer for a recomputation.
        with patch.object(self.model_tester, "views", dict):
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def test_init_weights_can_init_buffers(self):
        # The common test wants the same buffers twice, and random ones with a scale of zero; the Fourier matrix has
        # no scale, so the zeros are drawn here. Memory that nothing initializes is NaN.
        deterministic = torch.are_deterministic_algorithms_enabled()
        self.addCleanup(torch.use_deterministic_algorithms, deterministic)
        torch.use_deterministic_algorithms(True)
        with patch.object(init, "normal_", lambda tensor, *args, **kwargs: init.zeros_(tensor)):
            super().test_init_weights_can_init_buffers()

    def test_can_load_ignoring_mismatched_shapes(self):
        # The common helper takes every field with "_std" in its name for a spread of weights, `image_std` too.
        with patch.object(common, "_config_zero_init", without_random_weights):
            super().test_can_load_ignoring_mismatched_shapes()

    @unittest.skip("Images come in as pixels: there are no tokens to embed.")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("Images come in as pixels: there are no tokens to embed.")
    def test_inputs_embeds_matches_input_ids(self):
        pass

    @unittest.skip("The MLPs are not chunked: the images' sequences are short.")
    def test_feed_forward_chunking(self):
        pass

    def test_config(self):
        tester = configuration_common.ConfigTester(
            self, StellarConfig, has_text_modality=False, hidden_size=36, num_sparse_tokens=5
        )
        tester.run_common_tests()
