# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The script runs as its documentation says, on what is embedded and on images of a user."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stellar_hf.cli.__main__ import main
from stellar_hf.cli.edit import BALL, CONE
from stellar_hf.cli.inputs import SCENE, SCENE_SIZE
from stellar_hf.data import load_tabletop_scenes
from stellar_hf.data.photo_mosaics import photograph


@pytest.fixture
def run_script(run_example):
    """Runs the script with arguments."""
    return partial(run_example, "edit")


def files(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_a_scene_and_a_photograph_by_default(run_script, capsys):
    run_script()
    names = {f"{edit}.png" for edit in ("move", "scale", "erase", "exchange", "swap", "interpolate", "transfer")}
    assert files("edits") == names
    assert {Path(line).name for line in capsys.readouterr().out.split()} == names


def test_the_default_boxes_are_around_objects_of_the_default_scene():
    mask = np.asarray(load_tabletop_scenes("validation", SCENE + 1, SCENE_SIZE)[SCENE]["mask"])
    for box, slot in ((CONE, 1), (BALL, 4)):
        rows, columns = np.nonzero(mask == slot)
        tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box == tight + [-3, -3, 3, 3]).all()


def test_the_command_says_which_tokens_it_edits(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    photograph("flower").resize((60, 40)).save(tmp_path / "small.png")
    main(["edit", "--images", f"{tmp_path}/small.png", "--tokens", "0", "2", f"--output_dir={tmp_path}"])
    concept, written = capsys.readouterr().out.split("\n\n")
    assert "token 0, 2 of 8" in concept and "--box" in concept
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


def test_two_places_of_an_image_are_exchanged(run_script):
    halves = Image.new("RGB", (64, 64), (200, 30, 30))
    halves.paste((30, 30, 200), (32, 0, 64, 64))
    halves.save("halves.png")
    run_script("--images", "halves.png", "--box", *"0 0 32 64".split(), "--exchange_box", *"32 0 64 64".split())
    assert files("edits") == {"move.png", "scale.png", "erase.png", "exchange.png"}
    with Image.open("edits/exchange.png") as figure:
        pixels = np.asarray(figure.convert("RGB")).astype(int)
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 3
    row = pixels[height * 3 // 5]
    # The middles of the halves: of the image, of what is decoded, and of that after the exchange.
    is_red = [[row[column * width + width * side // 4] @ (1, 0, -1) > 0 for side in (1, 3)] for column in range(3)]
    assert is_red == [[True, False], [True, False], [False, True]]


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
        (["--tokens", "8"], "from 0 to 7"),
        (["--tokens", *"0 1 2 3 4 5 6 7".split()], "all 8 tokens"),
        (["--tokens", "1", "--box", "0", "0", "9", "9"], "leave one of them out"),
        (["--box", "9", "9", "5", "5"], "inside of 128x128 pixels"),
        (["--box", *"0 0 120 100 9 9 700 9".split()], "9, 9, 700, 9.* inside of 128x128 pixels"),
        (["--box", "0", "0", "9"], "has 3 numbers"),
        (["--images", "photo.png", "--box", *"0 0 9 9 0 0 9 9".split()], "has 8 numbers"),
        (
            ["--box", "0", "0", "9", "9"],
            r"No token stands mostly in the box. Shares .* 0: \d+ %, .*7: \d+ %. Take a larger box, or name tokens",
        ),
        (["--exchange_box", "0", "0", "9"], "--exchange_box has 3 numbers"),
        (["--tokens", "1", "--exchange_box", "0", "0", "128", "128"], "all 8 tokens"),
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
