# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The guide from a folder of photographs to a model on the Hub: its commands, as they stand."""

import json
import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs" / "training.md").read_text()
NOTEBOOK = """
import json, sys
names = {}
for line in sys.stdin:
    exec(json.loads(line), names)
    print("done", flush=True)
"""


@contextmanager
def notebook(python, folder):
    """Runs blocks one after the other in the same process, where each knows the names of those before it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([python, "-c", NOTEBOOK], cwd=folder, **pipes) as process:

        def run(code):
            print(json.dumps(code), file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n", code

        yield run


@pytest.mark.slow
def test_every_command_of_the_guide_runs(tmp_path, hub, hub_python):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    guide = GUIDE.split("## From a folder of photographs to a model on the Hub")[1].split("\n## ")[0]
    blocks = re.findall(r"```(bash|python)\n(.*?)```", guide.replace("owner/", "tester/"), re.DOTALL)
    # The name of the executable is python.
    environment = {**os.environ, "PATH": f"{Path(hub_python).parent}{os.pathsep}{os.environ['PATH']}"}
    with notebook(hub_python, tmp_path) as run_block:
        for language, code in blocks:
            if language == "python":
                run_block(code)
                continue
            command = ["bash", "-euo", "pipefail", "-c", code]
            process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert process.returncode == 0, f"{code}\n{process.stdout}\n{process.stderr}"

    assert len(list((tmp_path / "my-stellar" / "figures").glob("*.png"))) == 3
    assert (tmp_path / "my-classifier" / "model.safetensors").is_file()
    assert list((tmp_path / "my-features" / "features").glob("*.parquet"))
    card = ModelCard(hub.files("tester/my-stellar")["README.md"].decode())
    assert "knn_accuracy" in str(card) and card.data.library_name == "transformers"
