# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What is pushed arrives, byte by byte, and loads from the Hub with and without the package."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from stellar_hf import StellarModel

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
HAND_WRITTEN = "---\nlicense: mit\n---\n\n# A card that a person wrote\n"

PUSH = """
import json
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi

import stellar_hf
from stellar_hf import (
    StellarConfig,
    StellarForPreTraining,
    StellarImageProcessorPil,
    StellarModel,
    StellarTrainer,
    StellarTrainingArguments,
)

folder, config, hand_written = Path(sys.argv[1]), StellarConfig(**json.loads(sys.argv[2])), sys.argv[3].encode()
heads = json.loads(sys.argv[4])
processor = StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

# Without code, into a repository with a card of a person.
plain = StellarModel(config)
HfApi().create_repo("tester/plain")
HfApi().upload_file(path_or_fileobj=hand_written, path_in_repo="README.md", repo_id="tester/plain")
plain.push_to_hub("tester/plain")
plain.save_pretrained(folder / "plain")

# With code; twice, and the processor first.
for shared_class, auto_class in (
    (StellarModel, "AutoModel"),
    (StellarForPreTraining, "AutoModelForPreTraining"),
    (StellarImageProcessorPil, "AutoImageProcessor"),
):
    shared_class.register_for_auto_class(auto_class)
model = StellarModel(config).eval()
processor.push_to_hub("features")
model.push_to_hub("features", tags=["first"])
model.push_to_hub("features", tags=["second"], commit_message="Second")
model.push_to_hub("features", revision="draft", tags=["third"])
model.save_pretrained(folder / "features")
processor.save_pretrained(folder / "features")

image = np.load(folder / "image.npy")
inputs = processor(image, return_tensors="pt")
with torch.no_grad():
    torch.save(dict(model(**inputs)), folder / "features.pt")

# Heads, while they are saved, in folders that hold more; the second time over a card that a processor's push touched.
for name, auto_class in heads.items():
    model_class = getattr(stellar_hf, name)
    model_class.register_for_auto_class(auto_class)
    (folder / name).mkdir()
    (folder / name / "notes.txt").write_text("of the folder alone")
    processor.save_pretrained(str(folder / name), push_to_hub=True, repo_id=f"tester/{name}")
    model_class(config).save_pretrained(folder / name, push_to_hub=True, tags="first", commit_message="While saving")
    processor.push_to_hub(name)
    model = model_class.from_pretrained(folder / name).eval()
    model.save_pretrained(folder / name, push_to_hub=True, tags="second")
    # From the file, as the other process: where a tensor lies in memory can decide the last bit of a product.
    model = model_class.from_pretrained(folder / name).eval()
    with torch.no_grad():
        torch.save(dict(model(**inputs)), folder / f"{name}.pt")

# A training that pushes its checkpoints.
arguments = StellarTrainingArguments(
    str(folder / "run"),
    push_to_hub=True,
    hub_model_id="tester/trained",
    hub_strategy="checkpoint",
    max_steps=2,
    save_steps=2,
    per_device_train_batch_size=2,
    num_global_views=1,
    num_local_views=0,
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
)
trainer = StellarTrainer(
    StellarForPreTraining(config), arguments, train_dataset=[{"image": image}] * 4, processing_class=processor
)
trainer.train()
trainer.save_model()
trainer.save_metrics("test", {"test_knn_accuracy": 0.75, "test_runtime": 3.0})
trainer.push_to_hub(dataset="photo mosaics", blocking=True)
model = trainer.model.eval()
with torch.no_grad():
    torch.save(dict(model(**inputs, return_loss=False)), folder / "trained.pt")
"""

# Heads with the Auto class that they are registered for.
HEADS = {
    "StellarForImageClassification": "AutoModelForImageClassification",
    "StellarForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "StellarForImageReconstruction": "AutoModelForImageToImage",
    "StellarBackbone": "AutoBackbone",
}

LOADED = {"features": "AutoModel", "trained": "AutoModelForPreTraining", **HEADS}

LOAD = """
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download

folder, auto_classes = Path(sys.argv[1]), json.loads(sys.argv[2])
image = np.load(folder / "image.npy")
for name, auto_class in auto_classes.items():
    repo_id = f"tester/{name}"
    model = getattr(transformers.models.auto, auto_class).from_pretrained(repo_id, trust_remote_code=True).eval()
    processor = load_processor(repo_id)
    for loaded in (model, processor):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    inputs = processor(image, return_tensors="pt")
    arguments = {"return_loss": False} if name == "trained" else {}
    with torch.no_grad():
        torch.save(dict(model(**inputs, **arguments)), folder / f"{name}_again.pt")
    snapshot_download(repo_id, local_dir=folder / f"{name}_downloaded")
assert "stellar_hf" not in sys.modules
"""


@pytest.fixture(scope="module")
def pushed(hub, run_python, tiny_config, photograph, tmp_path_factory):
    """Folder of what one process saved beside pushing it."""
    folder = tmp_path_factory.mktemp("pushed")
    np.save(folder / "image.npy", photograph)
    run_python(PUSH, folder, tiny_config().to_json_string(), HAND_WRITTEN, json.dumps(HEADS), hub=hub)
    return folder


@pytest.fixture(scope="module")
def loaded(pushed, hub, run_python):
    """The same folder after a process without the package has loaded what was pushed."""
    run_python(LOAD, pushed, json.dumps(LOADED), hub=hub, with_package=False)
    return pushed


def card(hub, repo_id, revision="main"):
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def test_pushed_files_are_the_saved_files(hub, pushed):
    files = hub.files("tester/features")
    saved = {path.name: path.read_bytes() for path in (pushed / "features").iterdir()}
    assert {"modeling_stellar.py", "image_processing_pil_stellar.py", "model.safetensors"} <= saved.keys()
    assert files.keys() - {".gitattributes", "README.md"} == saved.keys()
    for name, content in saved.items():
        assert files[name] == content, name
    assert "tester/features/model.safetensors" in hub.uploads_through_lfs
    assert "Second" in hub.messages["tester/features"]


@pytest.mark.parametrize("name", ["features", "trained"])
def test_downloaded_files_are_the_pushed_files(hub, loaded, name):
    folder = loaded / f"{name}_downloaded"
    files = hub.files(f"tester/{name}")
    downloaded = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }
    assert downloaded == files


@pytest.mark.parametrize("name", LOADED)
def test_without_the_package_the_hub_s_model_gives_equal_outputs(loaded, name):
    expected, outputs = torch.load(loaded / f"{name}.pt"), torch.load(loaded / f"{name}_again.pt")
    assert outputs.keys() == expected.keys()
    for key, value in expected.items():
        if key == "feature_maps":
            assert all(map(torch.equal, outputs[key], value))
        else:
            assert torch.equal(outputs[key], value) if torch.is_tensor(value) else outputs[key] == value, key


def test_with_the_package_the_hub_s_model_needs_no_trust(pushed, hub, run_python):
    code = """
    import stellar_hf
    import torch
    from transformers import AutoBackbone, AutoModel

    assert type(AutoBackbone.from_pretrained("tester/StellarBackbone")) is stellar_hf.StellarBackbone
    for name in ("plain", "features", "trained"):
        model = AutoModel.from_pretrained(f"tester/{name}")
        assert type(model) is stellar_hf.StellarModel, type(model)
        if name != "trained":
            saved = stellar_hf.StellarModel.from_pretrained(f"{sys.argv[1]}/{name}")
            for key, weight in saved.state_dict().items():
                assert torch.equal(model.state_dict()[key], weight), key
    """
    run_python(code, pushed, hub=hub)


def test_with_the_package_the_hub_s_processor_needs_no_trust(pushed, hub, run_python, auto_image_processor):
    code = """
    import stellar_hf
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained("tester/features")
    assert type(processor).__module__.startswith("stellar_hf."), type(processor)
    """
    run_python(code, hub=hub)


def test_model_card_of_a_pushed_model(hub, pushed):
    pushed_card = card(hub, "tester/features")
    assert pushed_card.data.library_name == "transformers"
    assert pushed_card.data.license == "apache-2.0"
    assert pushed_card.data.pipeline_tag == "image-feature-extraction"
    assert 'AutoModel.from_pretrained("tester/features", trust_remote_code=True)' in pushed_card.text
    assert "import stellar_hf" not in pushed_card.text
    assert "| Sparse tokens | 4 |" in pushed_card.text


def test_model_card_is_brought_up_to_date(hub, pushed):
    """The form that Transformers left with the processor is replaced, and so is our own card of an earlier push."""
    assert card(hub, "tester/features").data.tags == ["stellar", "self-supervised", "second"]
    assert card(hub, "tester/features", "draft").data.tags == ["stellar", "self-supervised", "third"]


@pytest.mark.parametrize("name", HEADS)
def test_saving_can_push_what_it_writes_with_the_same_model_card(hub, pushed, name):
    files, saved = hub.files(f"tester/{name}"), {path.name: path for path in (pushed / name).iterdir()}
    assert "While saving" in hub.messages[f"tester/{name}"]
    assert files.keys() - {".gitattributes"} == saved.keys() - {"notes.txt"}
    for path in files.keys() - {".gitattributes"}:
        assert files[path] == saved[path].read_bytes(), path
    pushed_card = card(hub, f"tester/{name}")
    assert pushed_card.data.tags == ["stellar", "self-supervised", "second"]
    assert f"| Class | `{name}` |" in pushed_card.text
    assert f'from_pretrained("tester/{name}", trust_remote_code=True)' in pushed_card.text


def test_misspelled_arguments_of_a_push_are_refused(tiny_config, tmp_path):
    """Else a repository could become public."""
    model = StellarModel(tiny_config())
    with pytest.raises(TypeError, match="privat"):
        model.push_to_hub("tester/secret", privat=True)
    with pytest.raises(TypeError, match="privat"):
        model.save_pretrained(tmp_path, push_to_hub=True, privat=True)


def test_card_that_a_person_wrote_stays(hub, pushed):
    assert hub.files("tester/plain")["README.md"].decode() == HAND_WRITTEN
    assert "model.safetensors" in hub.files("tester/plain")


def test_model_card_of_a_training(hub, pushed):
    trained_card = card(hub, "tester/trained")
    (result,) = trained_card.data.eval_results
    assert (result.metric_name, result.metric_type, result.metric_value) == ("test_knn_accuracy", "accuracy", 0.75)
    assert result.dataset_name == "photo mosaics"
    assert trained_card.data.metrics == ["accuracy"]
    assert "| Steps | 2 |" in trained_card.text
    assert 'from_pretrained("tester/trained", trust_remote_code=True)' in trained_card.text


def test_every_state_that_a_training_pushed_has_the_code_it_names(hub, pushed):
    assert "Training in progress, step 2" in hub.messages["tester/trained"]
    states = [files for files in hub.commits["tester/trained"].values() if "config.json" in files]
    for files in states:
        for reference in json.loads(files["config.json"])["auto_map"].values():
            assert f"{reference.split('.')[0]}.py" in files


def test_pushed_checkpoint_is_complete(hub, pushed):
    files = hub.files("tester/trained")
    checkpoint = pushed / "run" / "checkpoint-2"
    for file in checkpoint.iterdir():
        assert files[f"last-checkpoint/{file.name}"] == file.read_bytes(), file.name
    assert not any(name.startswith("_") for state in hub.commits["tester/trained"].values() for name in state)


def test_pretrain_script_pushes(hub, run_python, tmp_path, tiny_config):
    config = tiny_config(hidden_size=16, num_hidden_layers=1).to_diff_dict()
    fields = {name: value for name, value in config.items() if name not in ("transformers_version", "model_type")}
    code = """
    import runpy

    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    """
    arguments = [SCRIPT, "--output_dir", tmp_path / "out", "--model_config", json.dumps(fields)]
    arguments += ["--push_to_hub", "--hub_model_id", "tester/mosaics", "--max_steps=2", "--num_train_scenes=8"]
    arguments += ["--num_eval_scenes=16", "--per_device_train_batch_size=4", "--use_cpu", "--disable_tqdm=true"]
    run_python(code, *arguments, hub=hub)

    files = hub.files("tester/mosaics")
    assert {"config.json", "model.safetensors", "modeling_stellar.py", "preprocessor_config.json"} <= files.keys()
    results = json.loads(files["all_results.json"])
    shown = {result.metric_name: result.metric_value for result in card(hub, "tester/mosaics").data.eval_results}
    assert shown["test_knn_accuracy"] == results["test_knn_accuracy"]
    assert not any(name.startswith(("untrained", "raw_pixels")) for name in shown)
