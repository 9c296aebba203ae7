# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A training that leaves the encoder as it is."""

import torch

from stellar_hf import StellarForImageReconstruction


def test_a_decoder_learns_the_maps_of_use_while_the_encoder_is_frozen(make_trainer):
    fields = {"refine_tokens": True, "localization_compactness": 3.0, "localization_noise": 1.0}
    trainer = make_trainer(config=fields, freeze_encoder=True)
    model = trainer.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda model, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True)
    trainer.train()
    inputs, output = seen[0]
    in_use = StellarForImageReconstruction(model.config).eval()
    in_use.load_state_dict({name: before[name] for name in in_use.state_dict()})
    expected = in_use(inputs["pixel_values"], return_loss=False)
    torch.testing.assert_close(output.localization, expected.localization)
    torch.testing.assert_close(output.reconstruction, expected.reconstruction)
    changed = {name.split(".")[0] for name, weight in model.state_dict().items() if not weight.equal(before[name])}
    assert changed == {"decoder", "clustering_head", "cls_clustering_head", "stellar"}
    of_encoder = {name for name in before if name.startswith("stellar.")}
    moved = {name for name in of_encoder if not model.state_dict()[name].equal(before[name])}
    assert moved and all(name.startswith("stellar.token_refinement.") for name in moved)
