# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The script runs as its documentation says, on the packaged photographs and on images of a user."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stellar_hf.cli.__main__ import main
from stellar_hf.data.photo_mosaics import photograph


@pytest.fixture
def run_script(run_example):
    """Runs the script with arguments."""
    return partial(run_example, "edit")


def files(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_photographs_by_default(run_script, capsys):
    run_script()
    names = {"move.png", "scale.png", "erase.png", "swap.png", "interpolate.png", "transfer.png"}
    assert files("edits") == names
    assert {Path(line).name for line in capsys.readouterr().out.split()} == names


def test_the_command_says_which_tokens_it_edits(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    photograph("flower").resize((60, 40)).save(tmp_path / "small.png")
    main(["edit", "--images", f"{tmp_path}/small.png", "--tokens", "0", "2", f"--output_dir={tmp_path}"])
    concept, written = capsys.readouterr().out.split("\n\n")
    assert "token 0, 2 of 6" in concept and "--box" in concept
    assert len(written.splitlines()) == 3


def test_one_image_of_a_user_with_chosen_tokens(run_script):
    photograph("flower").resize((60, 40)).save("small.png")
    arguments = ("--images", "small.png", "--tokens", 0, 2)
    run_script(*arguments, "--output_dir=still", "--move", 0, 0)
    run_script(*arguments, "--output_dir=moved", "--move", -4, 2.5)
    assert files("still") == files("moved") == {"move.png", "scale.png", "erase.png"}
    still, moved = (np.asarray(Image.open(Path(folder, "move.png"))).astype(int) for folder in ("still", "moved"))
    assert np.abs(still - moved).max() > 50
    np.testing.assert_array_equal(Image.open("still/erase.png"), Image.open("moved/erase.png"))


def test_the_photograph_itself_is_beside_what_is_decoded_of_it(run_script):
    photo = photograph("flower").resize((60, 40))
    photo.paste((255, 0, 255), (20, 10, 40, 30))
    photo.save("marked.png")
    run_script("--images", "marked.png", "--tokens", 0)
    with Image.open("edits/move.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    magenta = (pixels == (255, 0, 255)).all(axis=2)
    third = magenta.shape[1] // 3
    assert magenta[:, :third].any() and not magenta[:, third:].any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "6"], "from 0 to 5"),
        (["--tokens", "0", "1", "2", "3", "4", "5"], "all 6 tokens"),
        (["--tokens", "1", "--box", "0", "0", "9", "9"], "leave one of them out"),
        (["--box", "9", "9", "5", "5"], "inside of 640x427 pixels"),
        (["--box", *"0 0 600 400 9 9 700 9".split()], "9, 9, 700, 9.* inside of 640x427 pixels"),
        (["--box", "0", "0", "9"], "has 3 numbers"),
        (["--images", "photo.png", "--box", *"0 0 9 9 0 0 9 9".split()], "has 8 numbers"),
        (
            ["--box", "0", "0", "80", "60"],
            r"No token stands mostly in the box. Shares .* 0: \d+ %, .*5: \d+ %.*--tokens \d$",
        ),
        (["--move", "1"], "--move has 1 numbers"),
        (["--factor", "0"], "factor"),
        (["--images", "missing.png"], "missing.png"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(run_script, arguments, said):
    photograph("flower").resize((60, 40)).save("photo.png")
    with pytest.raises(SystemExit, match=said) as exit:
        run_script(*arguments)
    assert str(exit.value.code).startswith("error: ")
