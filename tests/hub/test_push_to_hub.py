# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What is pushed arrives, byte by byte, and loads from the Hub with and without the package."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from stellar_hf import DEMO_MODEL, StellarConfig, StellarModel, StellarPipeline


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


def test_without_the_package_the_hub_s_model_gives_equal_outputs(loaded, on_hub):
    expected, outputs = torch.load(loaded / f"{on_hub}.pt"), torch.load(loaded / f"{on_hub}_again.pt")
    assert outputs.keys() == expected.keys()
    for key, value in expected.items():
        if key == "feature_maps":
            assert all(map(torch.equal, outputs[key], value))
        else:
            assert torch.equal(outputs[key], value) if torch.is_tensor(value) else outputs[key] == value, key


def test_with_the_package_what_is_on_the_hub_needs_no_trust(pushed, hub, run_python):
    """A pipeline also loads, downloaded, by Diffusers' own class."""
    code = """
    import stellar_hf
    import torch
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    from PIL import Image
    from transformers import AutoBackbone, AutoImageProcessor, AutoModel

    assert type(AutoBackbone.from_pretrained("tester/StellarBackbone")) is stellar_hf.StellarBackbone
    for name in ("plain", "features", "trained"):
        model = AutoModel.from_pretrained(f"tester/{name}")
        assert type(model) is stellar_hf.StellarModel, type(model)
        if name != "trained":
            saved = stellar_hf.StellarModel.from_pretrained(f"{sys.argv[1]}/{name}")
            for key, weight in saved.state_dict().items():
                assert torch.equal(model.state_dict()[key], weight), key

    try:
        processor = AutoImageProcessor.from_pretrained("tester/features")
        assert type(processor).__module__.startswith("stellar_hf."), type(processor)
    except ImportError:  # Transformers 5.17 has no AutoImageProcessor without torchvision
        pass

    pipes = [
        stellar_hf.StellarPipeline.from_pretrained("tester/pipeline"),
        DiffusionPipeline.from_pretrained(
            snapshot_download("tester/pipeline"), custom_pipeline="pipeline", trust_remote_code=True
        ),
    ]
    expected = stellar_hf.StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL).state_dict()
    for pipe in pipes:
        assert type(pipe) is stellar_hf.StellarPipeline
        weights = pipe.model.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
        assert pipe(image=Image.new("RGB", (50, 40))).images[0].size == (50, 40)
    """
    run_python(code, pushed)


def test_pushed_pipeline_is_complete(hub, pushed):
    files = {"model_index.json", "pipeline.py", "model/model.safetensors"}
    assert {"README.md", *files} <= set(hub.files("tester/pipeline"))
    assert hub.messages["tester/pipeline"][-2:] == ["Upload StellarPipeline", "While saving"]
    in_subfolder = {name.removeprefix("pipeline/") for name in hub.files("tester/plain") if "pipeline/" in name}
    assert files <= in_subfolder and "README.md" not in in_subfolder


def test_model_card_of_a_pushed_pipeline(hub, pushed, run_python):
    """What it says of loading runs: the pipeline, and the encoder alone."""
    pushed_card = card(hub, "tester/pipeline")
    assert pushed_card.content == (pushed / "pipeline" / "README.md").read_text()
    assert (pushed_card.data.library_name, pushed_card.data.pipeline_tag) == ("diffusers", "image-to-image")
    assert pushed_card.data.tags[-1] == "second" and "| Pipeline | `StellarPipeline` |" in pushed_card.text
    encoder, pipeline = re.findall(r"```python\n(.*?)```", pushed_card.text, re.DOTALL)
    photograph = 'from PIL import Image\nImage.new("RGB", (50, 40)).save("photograph.jpg")\n'
    encoder = encoder.replace("AutoImageProcessor, ", "").partition("processor =")[0]  # not in each Transformers
    shapes = "print(type(model).__name__, *tokens.shape, *localization.shape)"
    config = StellarConfig.from_pretrained(DEMO_MODEL)
    num_tokens, width = config.num_sparse_tokens, config.hidden_size
    printed = run_python(photograph + encoder + pipeline + shapes)
    assert printed == f"StellarModel 1 {num_tokens} {width} 1 256 {num_tokens}\n"


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


def test_saving_can_push_what_it_writes_with_the_same_model_card(hub, pushed, head):
    files, saved = hub.files(f"tester/{head}"), {path.name: path for path in (pushed / head).iterdir()}
    assert "While saving" in hub.messages[f"tester/{head}"]
    assert files.keys() - {".gitattributes"} == saved.keys() - {"notes.txt"}
    for path in files.keys() - {".gitattributes"}:
        assert files[path] == saved[path].read_bytes(), path
    pushed_card = card(hub, f"tester/{head}")
    assert pushed_card.data.tags == ["stellar", "self-supervised", "second"]
    assert f"| Class | `{head}` |" in pushed_card.text
    assert f'from_pretrained("tester/{head}", trust_remote_code=True)' in pushed_card.text


def test_misspelled_arguments_of_a_push_are_refused(pushed, tiny_config, tmp_path):
    """Else a repository could become public."""
    model = StellarModel(tiny_config())
    with pytest.raises(TypeError, match="privat"):
        model.push_to_hub("tester/secret", privat=True)
    with pytest.raises(TypeError, match="privat"):
        model.save_pretrained(tmp_path, push_to_hub=True, privat=True)
    pipe = StellarPipeline.from_pretrained(pushed / "pipeline")
    with pytest.raises(TypeError, match="privat"):
        pipe.save_pretrained(tmp_path / "pipeline", push_to_hub=True, privat=True)


def test_card_that_a_person_wrote_stays(hub, pushed, hand_written):
    assert hub.files("tester/plain")["README.md"].decode() == hand_written
    assert "model.safetensors" in hub.files("tester/plain")


def test_model_card_of_a_training(hub, pushed):
    trained_card = card(hub, "tester/trained")
    (result,) = trained_card.data.eval_results
    assert (result.metric_name, result.metric_type, result.metric_value) == ("test_knn_accuracy", "accuracy", 0.75)
    assert result.dataset_name == "tabletop scenes"
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


def test_pretrain_script_pushes(hub, pushed):
    files = hub.files("tester/scenes")
    assert {"config.json", "model.safetensors", "modeling_stellar.py", "preprocessor_config.json"} <= files.keys()
    assert {"pipeline/model_index.json", "pipeline/model/model.safetensors", "reconstructions.png"} <= files.keys()
    results = json.loads(files["all_results.json"])
    shown = {result.metric_name: result.metric_value for result in card(hub, "tester/scenes").data.eval_results}
    assert shown.keys() == {"test_own_material_knn", "test_mean_best_overlap"}  # no row but the trained model's
    assert shown["test_own_material_knn"] == results["test_own_material_knn"]
