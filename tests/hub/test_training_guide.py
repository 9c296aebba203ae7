# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The guide from a folder of photographs to a model on the Hub: its commands, as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs" / "training.md").read_text()


@pytest.mark.slow
def test_every_command_of_the_guide_runs(tmp_path, hub, monkeypatch):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    guide = GUIDE.split("## From a folder of photographs to a model on the Hub")[1].split("\n## ")[0]
    blocks = re.findall(r"```(bash|python)\n(.*?)```", guide.replace("owner/", "tester/"), re.DOTALL)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    python = ""  # blocks go on from the names of those before
    for language, code in blocks:
        if language == "python":
            python += code
            (tmp_path / "block.py").write_text(python)
            code = "python block.py"
        process = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, f"{code}\n{process.stdout}\n{process.stderr}"

    assert len(list((tmp_path / "my-stellar" / "figures").glob("*.png"))) == 3
    assert (tmp_path / "my-classifier" / "model.safetensors").is_file()
    assert list((tmp_path / "my-features" / "features").glob("*.parquet"))
    card = ModelCard(hub.files("tester/my-stellar")["README.md"].decode())
    assert "knn_accuracy" in str(card) and card.data.library_name == "transformers"
