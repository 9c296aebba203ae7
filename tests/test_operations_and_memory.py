# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Floating-point operations and bytes of tensors, which are the same on every run: a step of pre-training and the
features take what the arithmetic needs, and less than the plain formulation of `benchmarks/plain_objective.py`.
"""

import pytest
import torch

from benchmarks.counters import count_operations, peak_bytes
from benchmarks.pretraining_step import VARIANTS, PreTrainingStep, Setting, compare_gradients
from stellar_hf import StellarConfig, StellarModel

# The encoder decides.
ENCODER = Setting(
    batch_size=8,
    global_views=4,
    local_views=4,
    local_size=32,
    config={
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_sparse_tokens": 4,
        "num_prototypes": 64,
        "prototype_dim": 32,
        "projection_hidden_size": 64,
        "decoder_hidden_size": 32,
        "decoder_intermediate_size": 64,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 1,
    },
)
# The prototypes decide: the logits of all masked tokens are 64 MiB, far more than all else.
PROTOTYPES = Setting(
    batch_size=4,
    global_views=8,
    local_views=2,
    local_size=16,
    config={
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_prototypes": 32768,
        "prototype_dim": 8,
        "projection_hidden_size": 16,
        "decoder_hidden_size": 16,
        "decoder_intermediate_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 1,
    },
)
# A linear layer's backward pass takes two products where its forward takes one; attention's five for two.
LINEAR, ATTENTION = 3, 3.5


def layer_operations(
    width: int, intermediate: int, length: int, queries: int | None = None, linear: float = 1, attention: float = 1
) -> float:
    """Of a Transformer layer of which `queries` of `length` positions are needed."""
    queries = length if queries is None else queries
    keys_and_values = 2 * length * width**2
    rows = 2 * queries * width**2 + 2 * queries * width * intermediate
    return 2 * (linear * (keys_and_values + rows) + attention * 2 * queries * length * width)


def objective_operations(setting: Setting) -> float:
    """
    Of forward and backward. The last layer is computed for the rows that the objective reads: all of the clean view,
    CLS and sparse tokens of masked views, CLS of local ones.
    """
    config, batch = setting.model_config(), setting.batch_size
    width, tokens, pixels = config.hidden_size, config.num_sparse_tokens, 3 * config.patch_size**2
    patches = (config.image_size // config.patch_size) ** 2
    kept = int(patches * (1 - config.mask_ratio))
    local = (setting.local_size // config.patch_size) ** 2
    num_global, num_local = batch * setting.global_views, batch * setting.local_views

    total = 0.0
    for views, count, rows in ((batch, patches, None), (num_global, kept, 1 + tokens), (num_local, local, 1)):
        length = 1 + count + tokens
        layer = (width, config.intermediate_size, length)
        last = layer_operations(*layer, rows, LINEAR, ATTENTION)
        others = layer_operations(*layer, None, LINEAR, ATTENTION)
        total += views * ((config.num_hidden_layers - 1) * others + last)
        total += views * 2 * 2 * count * pixels * width  # without gradient of the images

    inner = config.decoder_hidden_size
    total += batch * LINEAR * 2 * ((patches + tokens) * width**2 + 2 * patches * tokens * width)  # L, Z
    decoder = layer_operations(inner, config.decoder_intermediate_size, patches, None, LINEAR, ATTENTION)
    total += batch * config.decoder_num_hidden_layers * decoder
    total += batch * LINEAR * 2 * patches * inner * (width + pixels)

    predictions = batch * (tokens + 1) + num_global * (tokens + 1) + num_local
    head = width * config.projection_hidden_size + config.projection_hidden_size * config.prototype_dim
    total += predictions * LINEAR * 2 * head
    every_prototype = 2 * config.num_prototypes * config.prototype_dim
    total += LINEAR * predictions * every_prototype
    # Targets: their logits, their mean prototypes and the gradient of those.
    return total + 3 * batch * (tokens + 1) * every_prototype


@pytest.fixture(scope="module", params=[ENCODER, PROTOTYPES], ids=["encoder", "prototypes"])
def measured(request):
    """A setting; operations and bytes of each variant's forward and backward; the difference of their gradients."""
    step = PreTrainingStep(request.param)
    memory = {}
    for variant in VARIANTS:
        step.optimizer.zero_grad()
        memory[variant] = peak_bytes(lambda variant=variant: step.backward(variant))
    difference, operations = compare_gradients(step)
    return request.param, operations, memory, difference


def test_a_step_takes_the_operations_of_its_arithmetic(measured):
    setting, operations, _, _ = measured
    assert operations["ours"] <= 1.002 * objective_operations(setting)


def test_a_step_takes_fewer_operations_and_bytes_than_the_plain_formulation(measured):
    setting, operations, memory, _ = measured
    if setting is ENCODER:
        assert operations["ours"] <= 0.75 * operations["plain"]
    assert memory["ours"] <= (0.62 if setting is ENCODER else 0.13) * memory["plain"]


def test_gradients_are_those_of_the_plain_formulation(measured):
    *_, difference = measured
    assert difference < 1e-4


def test_logits_of_all_masked_tokens_never_exist_at_once():
    step = PreTrainingStep(PROTOTYPES)
    config = step.model.config
    masked_tokens = PROTOTYPES.batch_size * PROTOTYPES.global_views * config.num_sparse_tokens
    assert peak_bytes(lambda: step.backward("ours")) < masked_tokens * config.num_prototypes * 4


def test_features_take_the_operations_and_bytes_of_their_arithmetic():
    config: StellarConfig = ENCODER.model_config()
    width, tokens, images = config.hidden_size, config.num_sparse_tokens, 3
    patches = (config.image_size // config.patch_size) ** 2
    length = 1 + patches + tokens
    model = StellarModel(config).eval()
    extract = torch.no_grad()(lambda: model(torch.ones(images, 3, config.image_size, config.image_size)))

    embedding = 2 * patches * 3 * config.patch_size**2 * width
    layers = config.num_hidden_layers * layer_operations(width, config.intermediate_size, length)
    localization = 2 * ((patches + tokens) * width**2 + patches * tokens * width)
    assert count_operations(extract) == images * (embedding + layers + localization)

    # At most in an MLP: what it reads, its two wide tensors, and the residual stream of this and the last block.
    pixels = images * 3 * config.image_size**2 * 4
    tensors = 2 * config.intermediate_size + 4 * width
    assert peak_bytes(extract) <= pixels + images * length * tensors * 4
