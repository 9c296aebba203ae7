# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Released models load by their name, and give what the authors' implementation gives; wrong files get a sentence."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import save

from stellar_hf import (
    MaskGitVQModel,
    StellarBackbone,
    StellarConfig,
    StellarForImageClassification,
    StellarForImageReconstruction,
    StellarForPreTraining,
    StellarForSemanticSegmentation,
    StellarImageProcessorPil,
    StellarModel,
    StellarPipeline,
)
from stellar_hf.conversion import convert_checkpoint
from stellar_hf.conversion.convert_stellar_to_hf import main
from stellar_hf.hub_stellar import write_model_card
from stellar_hf.image_processing_pil_stellar import image_processor_of
from stellar_hf.pipelines.released_maskgit_vq import RELEASED_FILE
from stellar_hf.pipelines.released_maskgit_vq import RELEASED_REPOSITORY as VQ_REPOSITORY
from stellar_hf.pipelines.released_maskgit_vq import RELEASED_REVISION as VQ_REVISION
from stellar_hf.released_stellar import RELEASED_NAMES, RELEASED_REPOSITORY, RELEASED_REVISION

DOWNLOAD = """
import json
import stellar_hf

cache, names, fields = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name in names:
    try:
        stellar_hf.StellarModel.from_released(name, cache_dir=cache, **fields)
    except ValueError:  # of the file; it stays in the cache
        pass
stellar_hf.StellarPipeline.from_released("stellar-b16", cache_dir=cache, **fields)
try:
    stellar_hf.StellarModel.from_released("stellar-b16", revision="v2", cache_dir=cache)
except OSError as error:
    print(error)
"""


def without(weights, key):
    return {name: weight for name, weight in weights.items() if name != key}


@pytest.fixture(scope="module")
def fields(golden_overrides):
    return golden_overrides("vq_codes")


@pytest.fixture(scope="module")
def downloaded(hub, run_python, golden_weights, golden_vq_weights, fields, tmp_path_factory):
    """A cache with small models under the released names, downloaded by one process; and what that printed."""
    weights = golden_weights("vq_codes")
    contents = {
        "stellar-b16": save(weights),
        "stellar-l16": save(without(weights, "sparse_proj.bias")),
        "stellar-h16": save({**weights, "fc.weight": torch.zeros(2)}),
        "stellar-b8": save(weights)[:-100],
        "stellar-b24": save({"fc.weight": torch.zeros(2)}),
    }
    tokenizer = io.BytesIO()
    torch.save(golden_vq_weights, tokenizer)
    files = {f"{name}.safetensors": content for name, content in contents.items()}
    hub.serve(RELEASED_REPOSITORY, RELEASED_REVISION, files)
    hub.serve(VQ_REPOSITORY, VQ_REVISION, {RELEASED_FILE: tokenizer.getvalue()})
    cache = tmp_path_factory.mktemp("cache")
    return cache, run_python(DOWNLOAD, cache, json.dumps(RELEASED_NAMES), json.dumps(fields))


@pytest.fixture
def cache(downloaded, monkeypatch):
    """The cache, without a connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return downloaded[0]


@pytest.fixture
def pixel_values(golden_tensors):
    """The image of the golden tensors, as the models take it."""
    processor = StellarImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False)
    return processor(list(golden_tensors("vq_codes")["image"]), return_tensors="pt").pixel_values


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_class", [StellarModel, StellarForImageReconstruction, StellarForPreTraining])
def test_a_released_model_gives_what_the_authors_implementation_gives(
    cache, golden_tensors, fields, pixel_values, model_class
):
    model = model_class.from_released("stellar-b16", cache_dir=cache, **fields)
    with torch.no_grad():
        outputs = model(pixel_values)
    golden = golden_tensors("vq_codes")
    assert_close(outputs.sparse_tokens, golden["out.sparse"])
    assert_close(outputs.localization, golden["out.spatial"])
    if model_class is not StellarModel:
        assert_close(outputs.reconstruction, golden["out.x_hat"])


def test_pre_training_has_the_heads_of_the_checkpoint(cache, golden_weights, fields):
    model = StellarForPreTraining.from_released("stellar-b16", cache_dir=cache, **fields)
    expected = convert_checkpoint(golden_weights("vq_codes"), fields).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_teacher_that_is_asked_for_starts_as_a_copy(cache, fields):
    model = StellarForPreTraining.from_released("stellar-b16", cache_dir=cache, use_teacher=True, **fields)
    assert all(torch.equal(weight, copied) for weight, copied in model.teacher_and_student_weights())


@pytest.mark.parametrize("model_class", [StellarForImageClassification, StellarForSemanticSegmentation])
def test_a_classifier_is_new_and_its_encoder_the_released_one(cache, fields, model_class):
    released = StellarModel.from_released("stellar-b16", cache_dir=cache, **fields).state_dict()
    names = {0: "cat", 1: "dog", 2: "bird"}
    model = model_class.from_released("stellar-b16", cache_dir=cache, num_labels=3, id2label=names, **fields)
    assert model.config.num_labels == 3 and model.config.id2label == names and not model.training
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    for name, weight in model.stellar.state_dict().items():
        assert torch.equal(weight, released[name]), name


def test_arguments_are_those_of_from_pretrained(cache, fields, pixel_values):
    model, report = StellarBackbone.from_released(
        "stellar-b16",
        cache_dir=cache,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        out_features=["stage1", "stage2"],
        output_loading_info=True,
        **fields,
    )
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert len(model(pixel_values.bfloat16()).feature_maps) == 2
    with pytest.raises(TypeError, match="num_sparse_token"):
        StellarModel.from_released("stellar-b16", cache_dir=cache, num_sparse_token=4, **fields)


def test_the_processor_of_released_models_is_the_default_one():
    assert image_processor_of(StellarConfig()).to_dict() == StellarImageProcessorPil().to_dict()


def test_the_card_of_what_was_loaded_names_the_repository(cache, fields, tmp_path):
    model = StellarForImageClassification.from_released("stellar-b16", cache_dir=cache, num_labels=3, **fields)
    write_model_card(tmp_path, model)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "microsoft/STELLAR"


def test_nothing_is_reported_where_nothing_is_wrong(cache, fields, capfd):
    StellarModel.from_released("stellar-b16", cache_dir=cache, **fields)
    captured = capfd.readouterr()
    assert "UNEXPECTED" not in captured.out + captured.err and "MISSING" not in captured.out + captured.err


def test_a_pipeline_brings_processor_and_tokenizer(cache, golden_tensors, fields):
    pipe = StellarPipeline.from_released("stellar-b16", cache_dir=cache, **fields)
    golden = golden_tensors("vq_codes")
    assert torch.equal(pipe.vq_model.encode(golden["image"]).codes, golden["codes"])
    images = golden["image"].clamp(0, 1)
    assert pipe(image=images, output_type="latent").images.shape == golden["codes"].shape
    assert pipe(image=images, output_type="pt").images.shape == images.shape
    assert pipe.image_processor.crop_size == {"height": 96, "width": 96}


def test_a_pipeline_has_one_dtype(cache, fields):
    pipe = StellarPipeline.from_released("stellar-b16", cache_dir=cache, dtype=torch.bfloat16, **fields)
    assert pipe.model.dtype == pipe.vq_model.dtype == torch.bfloat16


def test_what_was_loaded_is_saved_and_loads_again(cache, fields, tmp_path):
    model = StellarModel.from_released("stellar-b16", cache_dir=cache, **fields)
    model.save_pretrained(tmp_path)
    again = StellarModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_the_lines_of_the_page_run(downloaded, run_python):
    page = (Path(__file__).parents[2] / "docs" / "released.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    before = 'from PIL import Image; Image.new("RGB", (60, 40)).save("cat.jpg")\n'
    after = "print(output.localization.shape[2], pipe(image=Image.open('cat.jpg')).images[0].size)"
    assert run_python(before + lines + after) == "8 (60, 40)\n"


# Conversion and push -------------------------------------------------------------------------------------------------

PUSH = """
import json
from stellar_hf.cli.__main__ import main

folder, fields = sys.argv[1], sys.argv[2]
with open(f"{folder}/fields.json", "w") as file:
    file.write(fields)
for name in ("stellar-b16", "stellar-b24"):
    main(["convert", name, "--config", f"{folder}/fields.json", "--output", f"{folder}/{name}"]
         + ["--push_to_hub", f"tester/{name}"])
"""
LOAD = """
from transformers import AutoModel

processor = load_processor("tester/stellar-b16")
model = AutoModel.from_pretrained("tester/stellar-b16", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
model.save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def pushed(hub, downloaded, run_python, golden_weights, fields, tmp_path_factory):
    """Folder of what the command converted and pushed; stellar-b24 is now a whole file, too."""
    folder = tmp_path_factory.mktemp("converted")
    files = hub.commits[RELEASED_REPOSITORY][RELEASED_REVISION]
    files["stellar-b24.safetensors"] = content = save(golden_weights("vq_codes"), metadata={"name": "stellar-b24"})
    hub.lfs[hashlib.sha256(content).hexdigest()] = content
    return folder, run_python(PUSH, folder, json.dumps(fields))


def test_the_push_of_a_conversion_holds_code_pipeline_figure_and_card(hub, pushed):
    folder, printed = pushed
    files = hub.files("tester/stellar-b16")
    whole = {"model.safetensors", "preprocessor_config.json", "modeling_stellar.py", "released_stellar.py"}
    whole |= {"model_index.json", "vq_model/diffusion_pytorch_model.safetensors", "README.md", "reconstructions.png"}
    assert whole <= files.keys()
    assert files["model.safetensors"] == (folder / "stellar-b16" / "model.safetensors").read_bytes()
    assert Image.open(io.BytesIO(files["reconstructions.png"])).size == (600, 600)
    assert "/tester/stellar-b16, with a model card." in printed


def test_the_push_loads_without_the_package(pushed, run_python, golden_weights, fields, tmp_path):
    run_python(LOAD, tmp_path, with_package=False)
    expected = convert_checkpoint(golden_weights("vq_codes"), fields).stellar.state_dict()
    loaded = StellarModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in expected.items())


def test_the_card_of_a_released_model_names_what_is_published(hub, pushed):
    card = ModelCard(hub.files("tester/stellar-b16")["README.md"].decode())
    assert (card.data.license, card.data.base_model, card.data.datasets) == (
        "mit",
        "microsoft/STELLAR",
        ["ILSVRC/imagenet-1k"],
    )
    assert card.data.metrics == ["accuracy"]
    named = {result.metric_name: (result.metric_value, result.source_url) for result in card.data.eval_results}
    paper = "https://arxiv.org/abs/2602.01905"
    assert named == {
        "linear probe accuracy, as published": (0.7326, paper),
        "kNN accuracy, as published": (0.6725, paper),
    }
    assert (
        "## Results as published" in card.text and "| stellar-b16 | 16 | 73.26 | 67.25 | 3.06 | 0.2077 |" in card.text
    )
    assert "There is no row" not in card.text and "![Images" in card.text

    other = ModelCard(hub.files("tester/stellar-b24")["README.md"].decode())
    assert other.data.eval_results is None and "There is no row of `stellar-b24`." in other.text


def test_the_lines_of_the_card_run(hub, pushed, run_python, auto_image_processor):
    blocks = hub.files("tester/stellar-b16")["README.md"].decode().split("```python\n")[1:]
    lines = "".join(block.split("```")[0] for block in blocks)
    before = 'from PIL import Image; Image.new("RGB", (60, 40)).save("photograph.jpg")\n'
    after = "print(outputs.sparse_tokens.shape, tokens.shape)"
    assert run_python(before + lines + after) == "torch.Size([1, 8, 64]) torch.Size([1, 8, 64])\n"


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("owner/name", "who pushes to owner/name (LocalTokenNotFoundError): check the connection, and log in with"),
        ("owner/name/more", "'owner/name/more'"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch, capsys, repo_id, message):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(SystemExit):
        main(["stellar-b16", "--output", str(tmp_path / "out"), "--push_to_hub", repo_id])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields_of_user", "message"),
    [
        ("stellar-b61", {}, "no released model 'stellar-b61': take one of stellar-b16, stellar-l16, stellar-h16"),
        ("stellar-l16", {}, "lacks weights for 1 keys: stellar.localization.sparse_projection.bias"),
        ("stellar-h16", {}, "1 keys that STELLAR does not have: fc.weight"),
        ("stellar-b8", {}, "stellar-b8.safetensors is not a readable safetensors file .* force_download=True"),
        ("stellar-b24", {}, "not a checkpoint of STELLAR, or not a whole one"),
        ("stellar-b16", {"num_prototypes": 64}, "num_prototypes is 64, but the checkpoint has 128"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(cache, fields, name, fields_of_user, message):
    with pytest.raises(ValueError, match=message):
        StellarModel.from_released(name, cache_dir=cache, **{**fields, **fields_of_user})


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda **kwargs: StellarModel.from_released("stellar-b16", **kwargs), "stellar-b16.safetensors of microsoft"),
        (MaskGitVQModel.from_released, "maskgit-vqgan-imagenet-f16-256.bin of fun-research/TiTok"),
    ],
)
def test_without_a_connection_and_a_cached_file_a_sentence_says_so(cache, tmp_path, load, message):
    with pytest.raises(OSError, match=f"{message}.* cannot be downloaded .*: check the connection, or convert a"):
        load(cache_dir=tmp_path)


def test_a_revision_that_does_not_exist_is_named(downloaded):
    assert downloaded[1] == "microsoft/STELLAR has no revision 'v2': take a commit, tag or branch of it.\n"
