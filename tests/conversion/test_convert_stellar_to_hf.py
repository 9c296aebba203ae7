# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Released checkpoints become folders of Transformers; every key counts, and wrong input gets one sentence."""

import json
import pickle
import subprocess

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForPreTraining

import stellar_hf
from stellar_hf import StellarConfig
from stellar_hf.cli.__main__ import main as stellar_hf_command
from stellar_hf.conversion import convert_checkpoint, convert_state_dict, infer_config
from stellar_hf.conversion.convert_stellar_to_hf import main

CASES = ("pixels", "vq_codes", "teacher")
HEADS = {"num_attention_heads": 4}
UNUSED = (
    "encoder.pooler.dense.weight",
    "teacher_encoder.pooler.dense.bias",
    "decoder.pooler.dense.weight",
    "decoder.embeddings.cls_token",
    "decoder.embeddings.position_embeddings",
    "decoder.embeddings.patch_embeddings.projection.bias",
)


def released_shapes(hidden: int, layers: int, patch: int, tokens: int) -> dict[str, torch.Tensor]:
    """The tensors that tell the sizes of a released code model; on the meta device, where they hold no memory."""
    shapes = {
        "sparse_tokens": (tokens, hidden),
        "encoder.embeddings.position_embeddings": (1, 1 + (224 // patch) ** 2, hidden),
        "encoder.embeddings.patch_embeddings.projection.weight": (hidden, 3, patch, patch),
        "decoder_proj.weight": (512, hidden),
        "reconstruction_head.weight": (1024, 512),
        "clustering_head.layer.weight": (16384, 256),
        "clustering_head.predictor.layers.0.weight": (2048, hidden),
        "clustering_head.predictor.layers.2.weight": (256, 2048),
    }
    for vit, width, depth in (("encoder", hidden, layers), ("decoder", 512, 6)):
        for index in range(depth):
            shapes[f"{vit}.encoder.layer.{index}.intermediate.dense.weight"] = (4 * width, width)
            shapes[f"{vit}.encoder.layer.{index}.attention.attention.query.bias"] = (width,)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_key_is_converted_or_known_to_be_unused(golden_weights, case):
    weights = golden_weights(case)
    converted = convert_state_dict(weights)
    used = {
        key: tensor for key, tensor in weights.items() if ".pooler." not in key and "decoder.embeddings" not in key
    }
    assert len(converted) == len(used)
    for tensor, original in zip(converted.values(), used.values(), strict=True):
        assert torch.equal(tensor.flatten(), original.flatten())


@pytest.mark.parametrize("key", UNUSED)
def test_unused_keys_are_left_out(key):
    assert convert_state_dict({key: torch.zeros(1)}) == {}


@pytest.mark.parametrize(
    "key",
    [
        "fc.weight",
        "encoder.embeddings.mask_token",
        "encoder.encoder.layer.0.attention.attention.query.scale",
        "encoder.encoder.layer.0.gate.weight",
        "encoder.embeddings.position_embeddings.extra",
        "decoder.cls_token",
        "clustering_head.predictor.layers.1.weight",
        "other_head.layer.weight",
        "teacher_decoder.layernorm.weight",
    ],
)
def test_unknown_keys_are_an_error_that_lists_them(golden_weights, key):
    weights = golden_weights("pixels") | {key: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"1 keys .*: {key}"):
        convert_checkpoint(weights, HEADS)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("sparse_proj.bias", "stellar.localization.sparse_projection.bias"),
        ("cls_cluster_head.layer.weight", "cls_clustering_head.prototypes"),
        ("teacher_encoder.layernorm.bias", "teacher.stellar.layernorm.bias"),
        ("sparse_tokens", "sparse_tokens"),
    ],
)
def test_missing_keys_are_an_error_that_lists_them(golden_weights, key, named):
    weights = golden_weights("teacher")
    del weights[key]
    with pytest.raises(ValueError, match=named):
        convert_checkpoint(weights, HEADS)


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_read_from_shapes(golden_weights, case):
    config = infer_config(golden_weights(case), **HEADS)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (64, 2, 128)
    assert (config.image_size, config.patch_size, config.num_sparse_tokens) == (96, 16, 8)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (512, 1)
    assert (config.decoder_intermediate_size, config.decoder_num_attention_heads) == (2048, 8)
    assert (config.num_prototypes, config.prototype_dim) == (128, 32)
    assert (config.projection_hidden_size, config.num_projection_layers) == (2048, 2)
    assert config.reconstruction_target == ("codes" if case == "vq_codes" else "pixels")
    assert config.use_teacher == (case == "teacher")


def test_the_default_configuration_is_the_released_base_model():
    config = infer_config(released_shapes(hidden=768, layers=12, patch=16, tokens=16))
    assert config.to_dict() == StellarConfig().to_dict()


@pytest.mark.parametrize(
    ("hidden", "layers", "patch", "heads"), [(768, 12, 16, 12), (1024, 24, 16, 16), (1280, 32, 14, 16)]
)
def test_released_sizes_have_their_heads_and_image_size(hidden, layers, patch, heads):
    config = infer_config(released_shapes(hidden, layers, patch, tokens=24))
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (
        layers,
        heads,
        4 * hidden,
    )
    assert (config.image_size, config.patch_size, config.num_sparse_tokens) == (224, patch, 24)


def test_overrides_replace_what_shapes_do_not_tell(golden_weights):
    overrides = {**HEADS, "localization_temperature": None, "target_temperature": 0.05}
    config = convert_checkpoint(golden_weights("pixels"), overrides).config
    assert (config.num_attention_heads, config.localization_temperature, config.target_temperature) == (4, None, 0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_head": 4}, "no field num_head"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"num_prototypes": 64}, "num_prototypes is 64, but the checkpoint has 128"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the checkpoint has 2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but"),
        ({"image_size": 10**9}, "image_size is 1000000000, but the checkpoint has 6x6 patches"),
    ],
)
def test_wrong_overrides_are_named(golden_weights, overrides, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(golden_weights("pixels"), overrides)


def test_teacher_can_be_left_out_or_started(golden_weights):
    without = convert_checkpoint(golden_weights("teacher"), {**HEADS, "use_teacher": False})
    assert without.teacher is None

    started = convert_checkpoint(golden_weights("pixels"), {**HEADS, "use_teacher": True})
    for teacher_weight, weight in started.teacher_and_student_weights():
        assert torch.equal(teacher_weight, weight) and teacher_weight.data_ptr() != weight.data_ptr()


# Command line --------------------------------------------------------------------------------------------------------


@pytest.fixture
def overrides_file(tmp_path):
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps(HEADS))
    return str(path)


@pytest.fixture
def checkpoint_file(tmp_path, golden_weights):
    path = tmp_path / "released.safetensors"
    save_file(golden_weights("teacher"), path)
    return str(path)


def test_converted_folder_loads_through_the_auto_classes(
    tmp_path, checkpoint_file, overrides_file, capsys, load_processor
):
    folder = tmp_path / "converted"
    main(["--checkpoint", checkpoint_file, "--config", overrides_file, "--output", str(folder)])
    printed = capsys.readouterr().out
    assert "teacher_encoder.pooler.*" in printed and f"AutoModel.from_pretrained('{folder}')" in printed

    model = AutoModel.from_pretrained(folder)
    pretraining = AutoModelForPreTraining.from_pretrained(folder)
    assert isinstance(model, stellar_hf.StellarModel) and isinstance(pretraining, stellar_hf.StellarForPreTraining)
    expected = convert_checkpoint(checkpoint_file, HEADS).state_dict()
    assert expected.keys() == pretraining.state_dict().keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in pretraining.state_dict().items())
    assert all(torch.equal(tensor, expected[f"stellar.{key}"]) for key, tensor in model.state_dict().items())

    processor = load_processor(folder)
    inputs = processor(Image.new("RGB", (150, 120)), return_tensors="pt")
    assert processor.size == {"shortest_edge": 110}
    assert model(**inputs).grid_size.tolist() == [[6, 6]]


def test_pipeline_with_the_tokenizer(tmp_path, golden_weights, golden_overrides, golden_vq_weights, golden_tensors):
    save_file(golden_weights("vq_codes"), tmp_path / "released.safetensors")
    torch.save(golden_vq_weights, tmp_path / "vq.bin")
    (tmp_path / "overrides.json").write_text(json.dumps(golden_overrides("vq_codes")))
    paths = {"checkpoint": "released.safetensors", "config": "overrides.json", "vq_checkpoint": "vq.bin"}
    files = [f"--{name}={tmp_path / path}" for name, path in paths.items()]
    main([*files, f"--output={tmp_path / 'a'}", "--pipeline"])

    pipe = stellar_hf.StellarPipeline.from_pretrained(tmp_path / "a-pipeline")
    golden = golden_tensors("vq_codes")
    images = golden["image"].clamp(0, 1)
    codes = pipe(image=images, output_type="latent").images
    decoded = pipe(image=images, output_type="pt").images
    assert codes.shape == golden["codes"].flatten(1).shape and decoded.shape == images.shape
    torch.testing.assert_close(decoded, pipe.vq_model.decode(codes, grid_size=(6, 6)).sample, rtol=0, atol=1e-5)


def test_nothing_is_written_without_the_tokenizer_that_was_asked_for(tmp_path, golden_weights, capsys):
    save_file(golden_weights("vq_codes"), tmp_path / "released.safetensors")
    (tmp_path / "overrides.json").write_text(json.dumps(HEADS))
    files = [f"--checkpoint={tmp_path / 'released.safetensors'}", f"--config={tmp_path / 'overrides.json'}"]
    with pytest.raises(SystemExit):
        main([*files, "--pipeline", f"--vq_checkpoint={tmp_path / 'none.bin'}", f"--output={tmp_path / 'a'}"])
    assert "none.bin" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overrides.json", "released.safetensors"]


def test_lightning_checkpoint_equals_released_file(tmp_path, golden_weights, checkpoint_file):
    path = tmp_path / "last.ckpt"
    weights = {f"model.{key}": tensor for key, tensor in golden_weights("teacher").items()}
    torch.save({"epoch": 3, "state_dict": weights}, path)
    expected = convert_checkpoint(checkpoint_file, HEADS).state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in convert_checkpoint(path, HEADS).state_dict().items())


class _Pickled:
    """Stands for a training configuration that a Lightning checkpoint may carry."""


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory, golden_weights):
    """A folder of files that cannot be converted, and released.safetensors, which can."""
    folder = tmp_path_factory.mktemp("wrong")
    weights = golden_weights("pixels")
    save_file(weights, folder / "released.safetensors")
    (folder / "short.safetensors").write_bytes((folder / "released.safetensors").read_bytes()[:-100])
    (folder / "damaged.ckpt").write_bytes(pickle.dumps({"state_dict": {}})[:-1] + b"h\xff.")  # KeyError of the pickle
    save_file({**weights, "sparse_tokens": torch.ones(8, 64, dtype=torch.int64)}, folder / "integers.safetensors")
    save_file({**weights, "sparse_tokens": torch.ones(8)}, folder / "flat.safetensors")
    torch.save({"state_dict": {"sparse_tokens": 3}}, folder / "numbers.ckpt")
    torch.save({"state_dict": [torch.ones(2)]}, folder / "listed.ckpt")
    (folder / "text.safetensors").write_text("not tensors")
    (folder / "text.ckpt").write_text("not tensors")
    (folder / "weights.bin").write_text("")
    (folder / "list.json").write_text("[1]")
    (folder / "broken.json").write_text("{")
    (folder / "typo.json").write_text(json.dumps({**HEADS, "tokens": 8}))
    save_file({"fc.weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    torch.save({"weights": {}}, folder / "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": _Pickled()}, folder / "objects.ckpt")
    (folder / "full").mkdir()
    (folder / "full" / "precious.txt").write_text("mine")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "missing.safetensors", "--output", "out"], "no file missing.safetensors"),
        (["--checkpoint", "text.safetensors", "--output", "out"], "not a readable safetensors file"),
        (["--checkpoint", "text.ckpt", "--output", "out"], "cannot be loaded as mere tensors"),
        (["--checkpoint", "objects.ckpt", "--output", "out"], "cannot be loaded as mere tensors"),
        (["--checkpoint", "damaged.ckpt", "--output", "out"], "cannot be loaded as mere tensors, or is damaged"),
        (["--checkpoint", "short.safetensors", "--output", "out"], "not a readable safetensors file"),
        (["--checkpoint", "integers.safetensors", "--output", "out"], "sparse_tokens of torch.int64"),
        (["--checkpoint", "flat.safetensors", "--output", "out"], "sparse_tokens has shape (8,), but must have 2"),
        (["--checkpoint", "numbers.ckpt", "--output", "out"], "maps 'sparse_tokens' to a int"),
        (["--checkpoint", "listed.ckpt", "--output", "out"], "is a list, but must map names to tensors"),
        (["--checkpoint", "weights.bin", "--output", "out"], "must be a .safetensors or a Lightning .ckpt"),
        (["--checkpoint", "other.safetensors", "--output", "out"], "not a checkpoint of STELLAR"),
        (["--checkpoint", "other.ckpt", "--output", "out"], "not a Lightning checkpoint"),
        (["--checkpoint", "released.safetensors", "--config", "typo.json", "--output", "out"], "no field tokens"),
        (["--checkpoint", "released.safetensors", "--config", "list.json", "--output", "out"], "holds a list"),
        (["--checkpoint", "released.safetensors", "--config", "broken.json", "--output", "out"], "not a JSON file"),
        (["--checkpoint", "released.safetensors", "--config", "none.json", "--output", "out"], "none.json"),
        (["--checkpoint", "released.safetensors", "--output", "full"], "full exists and is not an empty folder"),
        (["stellar-x16", "--output", "out"], "stellar-b16"),
        (["--output", "out"], "--checkpoint"),
        (["stellar-b16", "--checkpoint", "released.safetensors", "--output", "out"], "not allowed"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(wrong_files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(wrong_files)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in last_line and message in last_line
    assert not (wrong_files / "out").exists()
    assert (wrong_files / "full" / "precious.txt").read_text() == "mine"


def test_module_runs_and_explains_a_failed_download(forking_python, tmp_path):
    """Without a connection or a cached file the released names fail clearly."""
    module = "stellar_hf.conversion.convert_stellar_to_hf"
    process = subprocess.run(
        [forking_python, "-m", module, "stellar-b16", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "stellar-b16.safetensors of microsoft/STELLAR cannot be downloaded" in process.stderr
    assert "Traceback" not in process.stderr and "RuntimeWarning" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stellar-b61", "--output", "out"],
            "stellar-hf convert: error: argument name: invalid choice: 'stellar-b61'",
        ),
        (["--checkpoint", "none.ckpt", "--output", "out"], "stellar-hf convert: error: There is no file none.ckpt."),
        (
            ["maskgit-vq", "--checkpoint", "none.bin", "--output", "out"],
            "stellar-hf convert maskgit-vq: error: There is no file none.bin.",
        ),
    ],
)
def test_the_console_script_converts_both(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        stellar_hf_command(["convert", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)
