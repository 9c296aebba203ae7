# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What `stellar-hf pretrain --push_to_hub` pushes."""

import json

import pytest

from stellar_hf.data import load_photo_mosaics

TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_sparse_tokens": 3,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "num_prototypes": 8,
    "prototype_dim": 8,
    "projection_hidden_size": 16,
}


@pytest.mark.slow
def test_the_first_push_holds_pipeline_figure_and_results(hub, run_python, tmp_path):
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(load_photo_mosaics("train", 4, 32)["image"]):
        image.save(tmp_path / "photos" / f"{index}.png")
    flags = {
        "train_dir": tmp_path / "photos",
        "eval_dir": tmp_path / "photos",
        "model_config": json.dumps(TINY_MODEL),
        "output_dir": tmp_path / "out",
        "hub_model_id": "tester/tiny",
        "num_global_views": 1,
        "num_local_views": 0,
        "max_steps": 1,
        "save_strategy": "no",
    }
    arguments = ["pretrain", "--use_cpu", "--push_to_hub", *(f"--{name}={value}" for name, value in flags.items())]
    run_python("from stellar_hf.cli.__main__ import main; main()", *arguments)
    files = hub.files("tester/tiny")
    assert {"model.safetensors", "pipeline/model_index.json", "reconstructions.png", "README.md"} <= set(files)
    assert "eval_psnr" in json.loads(files["all_results.json"])
