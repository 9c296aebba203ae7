# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Importing the package is cheap, and makes the Auto classes know STELLAR whatever was imported before."""

import os
import subprocess
import sys

import pytest
from transformers.utils import is_torchvision_available

import stellar_hf
from stellar_hf import StellarForPreTraining, StellarImageProcessorPil

LOAD = """
folder = sys.argv[1]
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining
from transformers.models.auto.modeling_auto import AutoModelForImageClassification, AutoModelForSemanticSegmentation
try:
    AutoImageProcessor.from_pretrained
except ImportError:  # Transformers 5.17 has none without torchvision
    from stellar_hf import StellarImageProcessorPil as AutoImageProcessor
classes = (AutoConfig, AutoModel, AutoModelForPreTraining, AutoImageProcessor)
heads = (AutoModelForImageClassification, AutoModelForSemanticSegmentation)
print([type(auto.from_config(AutoConfig.from_pretrained(folder))).__name__ for auto in heads])
print([type(auto.from_pretrained(folder)).__name__ for auto in classes])
"""
PROCESSOR = "StellarImageProcessor" if is_torchvision_available() else "StellarImageProcessorPil"
LOADED = (
    "['StellarForImageClassification', 'StellarForSemanticSegmentation']\n"
    f"['StellarConfig', 'StellarModel', 'StellarForPreTraining', '{PROCESSOR}']\n"
)


@pytest.fixture(scope="module")
def run(make_python):
    """Runs `code` in a process of its own, which has imported nothing of Transformers, nor what imports it."""
    libraries = ("torch._dynamo", "accelerate", "huggingface_hub.hf_api", "tokenizers", "PIL.Image", "scipy.optimize")
    with make_python(libraries, TQDM_DISABLE="1") as python:

        def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
            before = "import sys\nassert not {'transformers', 'stellar_hf'} & set(sys.modules)\n"
            process = subprocess.run([python, "-c", before + code, *arguments], capture_output=True, text=True)
            assert process.returncode == 0, process.stderr
            return process

        yield run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("model")
    StellarForPreTraining(tiny_config(use_teacher=True)).save_pretrained(folder)
    StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_importing_the_package_does_not_import_heavy_libraries():
    heavy = "{'torch', 'diffusers', 'transformers', 'datasets'}"
    code = f"import sys, stellar_hf; dir(stellar_hf); print({heavy} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "set()\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import stellar_hf",
        "from transformers import AutoConfig, AutoModel\nimport stellar_hf",
        "import stellar_hf\nfrom transformers import ViTModel",
        "import stellar_hf.modeling_stellar",
    ],
    ids=["package first", "Auto classes first", "another model between", "module of models"],
)
def test_auto_classes_resolve_whatever_the_order_of_imports(run, model_folder, imports):
    """Also a folder of pre-training loads as the plain model without a word about the weights that it leaves out."""
    process = run(imports + LOAD, model_folder)
    assert process.stdout == LOADED
    assert process.stderr == ""


def test_auto_classes_resolve_where_a_broken_torchvision_is_hidden(run, model_folder, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('built for another torch')")
    metadata = tmp_path / "torchvision-0.1.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    hide = f"sys.path.insert(0, {str(tmp_path)!r})\nsys.modules['torchvision'] = None\nimport stellar_hf"
    process = run(hide + LOAD, model_folder)
    assert process.stdout == LOADED.replace(PROCESSOR, "StellarImageProcessorPil")
    assert process.stderr == ""


def test_public_names_exist():
    assert set(stellar_hf.__all__) <= set(dir(stellar_hf))
    with pytest.raises(AttributeError, match="StellarModle"):
        stellar_hf.StellarModle  # noqa: B018
