# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The released tokenizer becomes a folder of Diffusers; every key counts, and wrong input gets one sentence."""

import pickle

import pytest
import torch
from huggingface_hub import constants

from stellar_hf import MaskGitVQModel
from stellar_hf.conversion import convert_vq_checkpoint, convert_vq_state_dict
from stellar_hf.conversion.convert_maskgit_vq import main

KEY_PAIRS = {
    "encoder.conv_in.weight": "encoder.conv_in.weight",
    "encoder.down.2.block.0.nin_shortcut.weight": "encoder.down_blocks.2.resnets.0.conv_shortcut.weight",
    "encoder.mid.1.norm2.bias": "encoder.mid_block.resnets.1.norm2.bias",
    "encoder.norm_out.weight": "encoder.conv_norm_out.weight",
    "decoder.up.0.block.1.conv2.weight": "decoder.up_blocks.4.resnets.1.conv2.weight",
    "decoder.up.4.upsample_conv.bias": "decoder.upsamplers.0.conv.bias",
    "decoder.up.1.upsample_conv.weight": "decoder.upsamplers.3.conv.weight",
    "quantize.embedding.weight": "quantize.embedding.weight",
}


def test_every_key_is_converted(golden_vq_weights):
    converted = convert_vq_state_dict(golden_vq_weights)
    assert len(converted) == len(golden_vq_weights)
    for key, new_key in KEY_PAIRS.items():
        assert torch.equal(converted[new_key], golden_vq_weights[key])


def test_sizes_are_read_from_shapes(golden_vq_weights):
    config = convert_vq_checkpoint(golden_vq_weights).config
    assert tuple(config.block_out_channels) == (32, 32, 64, 64, 128)
    assert (config.layers_per_block, config.latent_channels, config.num_vq_embeddings) == (2, 16, 1024)
    assert (config.in_channels, config.out_channels) == (3, 3)


@pytest.mark.parametrize(
    "key",
    [
        "fc.weight",
        "encoder.quant_conv.weight",
        "encoder.down.0.attn.0.weight",
        "encoder.down.0.block.0.conv3.weight",
        "encoder.up.0.block.0.conv1.weight",
        "encoder.up.1.upsample_conv.weight",
        "decoder.up.5.upsample_conv.bias",
        "decoder.conv_in.weight_g",
        "decoder.mid.0.conv1",
    ],
)
def test_unknown_keys_are_an_error_that_lists_them(golden_vq_weights, key):
    with pytest.raises(ValueError, match=f"1 keys that MaskGIT-VQGAN does not have: {key}"):
        convert_vq_checkpoint(golden_vq_weights | {key: torch.zeros(1)})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("decoder.up.2.upsample_conv.bias", "lacks weights for 1 keys: decoder.upsamplers.2.conv.bias"),
        ("encoder.down.2.block.0.nin_shortcut.weight", "lacks weights for 1 keys: encoder.down_blocks.2"),
        ("quantize.embedding.weight", "has no tensor quantize.embedding.weight"),
    ],
)
def test_missing_keys_are_an_error_that_lists_them(golden_vq_weights, key, message):
    with pytest.raises(ValueError, match=message):
        convert_vq_checkpoint({name: tensor for name, tensor in golden_vq_weights.items() if name != key})


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("encoder.mid.2.norm1.bias", (128,), "no place for 1 weights: encoder.mid_block.resnets.2.norm1.bias"),
        ("decoder.conv_out.bias", (4,), r"decoder.conv_out.bias is \(4,\) instead of \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(golden_vq_weights, key, shape, message):
    with pytest.raises(ValueError, match=message):
        convert_vq_checkpoint(golden_vq_weights | {key: torch.zeros(shape)})


# Command line --------------------------------------------------------------------------------------------------------


def test_converted_folder_loads(tmp_path, golden_vq_weights, capsys):
    torch.save(golden_vq_weights, tmp_path / "released.bin")
    folder = tmp_path / "converted"
    main(["--checkpoint", str(tmp_path / "released.bin"), "--output", str(folder)])
    printed = capsys.readouterr().out
    assert f"MaskGitVQModel.from_pretrained('{folder}')" in printed and "1024 codes of 16 channels" in printed

    expected = convert_vq_checkpoint(golden_vq_weights).state_dict()
    loaded = MaskGitVQModel.from_pretrained(folder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


class _Pickled:
    """Stands for code that a pickle may carry."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "missing.bin", "--output", "out"], "no file missing.bin"),
        (["--checkpoint", "text.bin", "--output", "out"], "cannot be loaded as mere tensors"),
        (["--checkpoint", "objects.bin", "--output", "out"], "cannot be loaded as mere tensors"),
        (["--checkpoint", "damaged.bin", "--output", "out"], "cannot be loaded as mere tensors, or is damaged"),
        (["--checkpoint", "empty.bin", "--output", "out"], "it has no tensor encoder.conv_in.weight"),
        (["--checkpoint", "flat.bin", "--output", "out"], "encoder.conv_in.weight has shape (3,), but must have 4"),
        (["--checkpoint", "nested.bin", "--output", "out"], "nested.bin maps 'state_dict' to a dict"),
        (["--checkpoint", "other.bin", "--output", "out"], "not a checkpoint of MaskGIT-VQGAN"),
        (["--checkpoint", "other.bin", "--output", "full"], "full exists and is not an empty folder"),
        (["--checkpoint", "other.bin"], "--output"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "text.bin").write_text("not tensors")
    torch.save({"fc.weight": torch.zeros(1), "extra": _Pickled()}, tmp_path / "objects.bin")
    (tmp_path / "damaged.bin").write_bytes(pickle.dumps({})[:-1] + b"h\xff.")  # ends in a KeyError
    torch.save({}, tmp_path / "empty.bin")
    torch.save({"encoder.conv_in.weight": torch.zeros(3)}, tmp_path / "flat.bin")
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "nested.bin")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.bin")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in last_line and message in last_line
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_explained(tmp_path, monkeypatch, capsys):
    """Without a connection or a cached file the released model fails clearly."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    message = "maskgit-vqgan-imagenet-f16-256.bin of fun-research/TiTok cannot be downloaded"
    assert message in capsys.readouterr().err
