# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The console script `stellar-hf`: its commands, how they refuse wrong arguments, the cores that they take."""

import os
import subprocess
import sys

import pytest

from stellar_hf.cli.__main__ import COMMANDS, main


def test_help_names_every_command_without_loading_torch():
    code = (
        "import sys; from stellar_hf.cli.__main__ import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers', 'datasets')))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True
    )
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.decode().splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines] == list(COMMANDS) and all(len(line) > 3 for line in lines)


@pytest.mark.parametrize(("name", "said"), [("pre-train", "did you mean pretrain?"), ("zzz", "there are demo,")])
def test_unknown_command(capsys, name, said):
    with pytest.raises(SystemExit) as exit:
        main([name])
    assert exit.value.code == 2
    assert f"has no command {name}" in (error := capsys.readouterr().err) and said in error


def test_a_command_takes_the_arguments_that_follow_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit, match="missing.png"):
        main(["reconstruct", "--images", "missing.png", f"--output_dir={tmp_path}"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "a.png"], "error: --image does not exist: did you mean --images?"),
        (["--grid-sise", "4"], "error: --grid-sise does not exist: did you mean --grid_size?"),
        (["--zzz"], "error: --zzz does not exist: --help lists all flags."),
        (["a.png"], "error: The argument 'a.png' does not belong to any flag"),
        (["--grid_size", "four"], "error: Argument --grid_size"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as exit:
        main(["reconstruct", *arguments])
    assert str(exit.value.code).startswith(said) and capsys.readouterr().err == ""
