# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Folders that carry their code load, with equal outputs, where the package is not installed."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.utils import is_torchvision_available

import stellar_hf
from stellar_hf import StellarConfig, StellarForPreTraining
from stellar_hf.hub_stellar import AUTO_MAP
from stellar_hf.image_processing_pil_stellar import StellarImageProcessorMixin


@pytest.fixture
def shared_folder(loaded):
    """Saved by one process with the package; loaded, run and saved again by one without it."""
    return loaded / "shared"


def assert_equal(outputs, expected):
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(outputs[name], value) if torch.is_tensor(value) else outputs[name] == value, name


def test_without_the_package_outputs_are_equal_bit_for_bit(shared_folder, in_folder):
    assert_equal(
        torch.load(shared_folder / f"{in_folder}_inputs_again.pt"),
        torch.load(shared_folder / "inputs.pt"),
    )
    # Drawn anew in each forward are the views' masks alone, and there are none.
    assert_equal(torch.load(shared_folder / f"{in_folder}_again.pt"), torch.load(shared_folder / f"{in_folder}.pt"))


def test_one_registered_class_carries_the_code_of_every_auto_class(shared_folder, in_folder):
    for folder in (shared_folder / in_folder, shared_folder / f"{in_folder} again"):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == AUTO_MAP
        for reference in auto_map.values():
            module, class_name = reference.split(".")
            assert f"class {class_name}(" in (folder / f"{module}.py").read_text()


def test_without_the_package_every_auto_class_loads_a_pre_training_folder(loaded):
    kinds = json.loads((loaded / "kinds.json").read_text())
    assert kinds.keys() == {"AutoConfig", "AutoModel", "AutoModelForPreTraining"}
    assert all(kind == AUTO_MAP[name].split(".")[1] for name, kind in kinds.items())


def test_with_the_package_its_own_classes_load_the_folder_without_a_question(shared_folder, load_processor):
    model = transformers.AutoModel.from_pretrained(shared_folder / "StellarModel")
    assert type(model) is stellar_hf.StellarModel
    processor = load_processor(shared_folder / "StellarModel")
    assert isinstance(processor, StellarImageProcessorMixin)


def test_auto_map_names_what_the_auto_classes_load():
    """A class that is registered with an Auto class is missing where the package is, unless it is in AUTO_MAP."""
    assert AUTO_MAP["AutoConfig"].split(".")[1] == AutoConfig.for_model("stellar").__class__.__name__
    registered = {}
    for name in dir(transformers.models.auto):
        mapping = getattr(getattr(transformers.models.auto, name), "_model_mapping", ())
        if name.startswith("Auto") and StellarConfig in mapping:
            registered[name] = mapping[StellarConfig].__name__
    in_map = {name: reference.split(".")[1] for name, reference in AUTO_MAP.items() if name != "AutoConfig"}
    assert in_map == registered


def test_folder_without_code_does_not_promise_it(shared_folder, tmp_path, tiny_config):
    """Also of a model that came from a folder with code."""
    StellarForPreTraining(tiny_config()).save_pretrained(tmp_path / "new")
    loaded = StellarForPreTraining.from_pretrained(shared_folder / "StellarForPreTraining")
    loaded.save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "new", tmp_path / "again"):
        assert list(folder.glob("*.py")) == []
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.skipif(not is_torchvision_available(), reason="there is no torchvision")
def test_without_the_package_the_torchvision_processor_loads_in_both_backends(run_python, photograph, tmp_path):
    """Also when what was loaded has saved it again."""
    save = """
    import numpy as np
    from stellar_hf import StellarImageProcessor

    processor = StellarImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.register_for_auto_class()
    processor.save_pretrained(sys.argv[1])
    np.save(f"{sys.argv[1]}/pixels.npy", processor(np.load(sys.argv[2]), return_tensors="np").pixel_values)
    """
    load = """
    import numpy as np

    from transformers import AutoImageProcessor

    folder, image, backend = sys.argv[1], np.load(sys.argv[2]), sys.argv[3]
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend=backend)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    print(type(processor).__name__)
    pixels = processor(image, return_tensors="np").pixel_values
    # The other backend may differ by one of the 255 levels, divided by a standard deviation of 0.224 or more.
    tolerance = 0 if backend == "torchvision" else 1 / 255 / 0.224 + 1e-6
    np.testing.assert_allclose(pixels, np.load(f"{folder}/pixels.npy"), rtol=0, atol=tolerance)
    if backend == "torchvision":
        processor.save_pretrained(folder)
    """
    image = tmp_path / "image.npy"
    np.save(image, photograph)
    run_python(save, tmp_path / "processor", image)
    for backend, name in (("torchvision", "StellarImageProcessor"), ("pil", "StellarImageProcessorPil")):
        output = run_python(load, tmp_path / "processor", image, backend, with_package=False)
        assert output == f"{name}\n"
