# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The code of README and pages runs as it stands, and gives what they say; of other pages, beside their subjects."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from PIL import Image
from transformers.utils import is_torchvision_available

import stellar_hf
from stellar_hf import (
    StellarConfig,
    StellarForImageReconstruction,
    StellarImageProcessorPil,
    StellarModel,
    StellarPipeline,
)
from stellar_hf.cli.__main__ import main
from stellar_hf.data import load_photo_mosaics
from stellar_hf.data.photo_mosaics import photograph

REPOSITORY = Path(__file__).parents[1]
DEMO_CONFIG = StellarConfig.from_pretrained(stellar_hf.DEMO_MODEL)
R, WIDTH = DEMO_CONFIG.num_sparse_tokens, DEMO_CONFIG.hidden_size
COMMANDS = f'stellar-hf() {{ {sys.executable} -m stellar_hf.cli "$@"; }}\npython() {{ {sys.executable} "$@"; }}\n'
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

needs_auto_image_processor = pytest.mark.skipif(
    not is_torchvision_available() and Version(transformers.__version__) < Version("5.18"),
    reason="Transformers 5.17 has no AutoImageProcessor without torchvision",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader works: a photograph, and the examples of the clone."""
    monkeypatch.chdir(tmp_path)
    photograph("china").save("cat.jpg")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    return tmp_path


def run_page(page: str, languages: str = "python", section: str | None = None) -> dict[str, Any]:
    """Runs the blocks of a page, or of one of its sections, and returns the names that its Python leaves."""
    text = (REPOSITORY / page).read_text()
    if section is not None:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    names: dict[str, Any] = {}
    for language, code in re.findall(rf"```({languages})\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(code, names)
            continue
        command = ["bash", "-euo", "pipefail", "-c", COMMANDS + re.sub(r"(?m)^pip install .*\n", "", code)]
        process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert process.returncode == 0, f"{code}\n{process.stdout}\n{process.stderr}"
    return names


@needs_auto_image_processor
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_first_lines(page, folder):
    pipe = StellarPipeline(
        image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
        model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
    )
    pipe.save_pretrained("stellar-tabletop-scenes/pipeline")
    output = run_page(page)["output"]
    assert (output.sparse_tokens.shape, output.localization.shape) == (
        (1, R, WIDTH),
        (1, 256, R),
    )


@pytest.mark.slow
def test_first_figure(folder):
    run_page("docs/index.md", "bash", section="A figure of your own photograph")
    with Image.open("stellar-demo-figure/demo.png") as figure:
        assert figure.width > 1000


@needs_auto_image_processor
def test_concepts(folder):
    run_page("docs/concepts.md")
    with Image.open("tokens.png") as figure, Image.open(REPOSITORY / "docs" / "figures" / "tokens.png") as shown:
        assert figure.size == shown.size


@needs_auto_image_processor
def test_sizes(folder):
    names = run_page("docs/sizes.md")
    assert names["output"].grid_size.tolist() == [[16, 24]] and names["output"].localization.shape == (
        1,
        384,
        R,
    )
    assert names["maps"].shape == (R, names["image"].height, names["image"].width)
    assert names["maps"].sum(0).allclose(names["maps"].new_ones(()), atol=1e-5)


@pytest.mark.slow
def test_tasks(folder):
    names = run_page("docs/tasks.md")
    assert names["classifier"].num_labels == 10 and names["segmenter"].num_labels == 21
    assert len(names["vector"][0]) == WIDTH
    assert 0 < names["model"].get_nb_trainable_parameters()[0] < 100_000


@pytest.mark.slow
def test_export(folder):
    # Fewer turns of compact maps, since an export writes each of them down.
    model = StellarModel.from_pretrained(stellar_hf.DEMO_MODEL, localization_iterations=2)
    model.save_pretrained("my-stellar")
    names = run_page("docs/export.md", "bash|python")
    assert names["outputs"].keys() == {"last_hidden_state", "pooler_output", "sparse_tokens", "localization"}
    assert names["outputs"]["localization"].shape[2] == R


@pytest.mark.slow
def test_features_of_images(folder):
    for kind in ("animals", "things"):
        Path("photos", kind).mkdir(parents=True)
        for index, row in enumerate(load_photo_mosaics("test", num_scenes=12, image_size=48)):
            row["image"].save(f"photos/{kind}/{index:02}.jpg")
    Path("photos/things/broken.jpg").write_text("no image")
    names = run_page("docs/extract_features.md", "bash|python")
    assert names["matches"].images.shape == names["matches"].slots.shape == (R, 3)
    assert names["localization"].shape == (256, R) and names["localization"].count_nonzero(dim=1).max() == 2


@pytest.mark.slow
def test_evaluation(folder):
    names = run_page("docs/evaluation.md")
    assert names["results"][0].metrics["sparse mean"]["accuracy"] > 0.12


def test_tabletop_scenes(folder):
    run_page("docs/tabletop_scenes.md")
    assert Path("tabletop_scenes.png").is_file()


def test_training_in_python(folder, monkeypatch):
    """The page's lines with a small model, and one step."""
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
        "num_prototypes": 16, "num_sparse_tokens": 4,
    }  # fmt: skip
    code = (REPOSITORY / "docs" / "training.md").read_text().split("## In Python\n")[1]
    code = code.split("```python\n")[1].split("```")[0]
    code = code.replace("StellarConfig(r", "StellarConfig(**sizes, r").replace('("out", ', '("out", **few, ')
    few = {"max_steps": 1, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4}
    names = {"sizes": sizes, "few": few, "dataset": load_photo_mosaics("train", num_scenes=8)}
    exec(code, names)
    assert names["trainer"].state.global_step == 1


def commands_of_pages() -> list[tuple[str, str]]:
    """Each command of the package in README and pages, by its name, with its whole line."""
    code = []
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        fences = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text())
        code += [block for language, block in fences if language != "python"]
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    examples = {
        "pretrain": "pretrain", "extract_features": "extract", "reconstruct": "reconstruct", "edit": "edit",
        "train_prior": "train-prior", "evaluate_models": "evaluate", "export_onnx": "export",
    }  # fmt: skip
    found = []
    for line in lines:
        if match := re.search(r"(?:^|\s)(?:stellar-hf|-m stellar_hf\.cli\.) ?([a-z_-]+)(.*)", line):
            found.append((match[1].replace("_", "-"), match[2]))
        elif (match := re.search(r"examples/(\w+)\.py(.*)", line)) and match[1] in examples:
            found.append((examples[match[1]], match[2]))
    return found


@pytest.mark.slow
def test_commands_have_the_flags_that_pages_give_them(capsys, monkeypatch):
    found = commands_of_pages()
    assert {"demo", "pretrain", "adapt", "extract", "evaluate", "convert"} <= dict(found).keys()
    flags = {}
    for command in dict(found):
        monkeypatch.setattr("sys.argv", ["stellar-hf", command, "--help"])
        with pytest.raises(SystemExit):
            main()
        flags[command] = set(re.findall(r"--\w+", capsys.readouterr().out))
    unknown = {
        (command, flag)
        for command, line in found
        for flag in re.findall(r"\s(--\w+)", line.partition(" #")[0])
        if flag not in flags[command]
    }
    assert not unknown
