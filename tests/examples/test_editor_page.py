# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The page that edits tokens in a browser: its pixels are those of PyTorch after the same edits."""

import functools
import http.server
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stellar_hf
from stellar_hf import StellarForImageReconstruction
from stellar_hf.cli.export import export, load
from stellar_hf.cli.inputs import load_pipeline
from stellar_hf.features import load_processor

PAGE = Path(__file__).parents[2] / "docs" / "editor"
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/onnxruntime-web@([\d.]+)/dist")
LEVELS = "return [...arguments[0].getContext('2d').getImageData(0, 0, arguments[0].width, arguments[0].height).data]"

pytestmark = pytest.mark.slow


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model, whose maps take fewer turns, since an export writes each of them down."""
    folder = str(tmp_path_factory.mktemp("model"))
    StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL, localization_iterations=2).save_pretrained(
        folder
    )
    load_processor(stellar_hf.DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    """The page as it is published, with ONNX Runtime Web from its npm package."""
    runtime = os.environ.get("ONNXRUNTIME_WEB")
    if not runtime:
        pytest.skip("ONNXRUNTIME_WEB does not name the folder of the npm package onnxruntime-web.")
    pytest.importorskip("onnxscript", reason="There is no onnxscript: pip install onnx onnxscript")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx"))
    script = folder / "editor.js"
    script.write_text(CDN.sub("./runtime", script.read_text()))
    (folder / "runtime").symlink_to(Path(runtime, "dist").resolve())
    export(load(model, "feature-extraction"), folder / "encoder.onnx")
    export(load(model, "decoder"), folder / "decoder.onnx")
    return folder


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="There is no selenium: pip install selenium")
    browser_path, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser_path or not driver_path:
        pytest.skip("There is no chromium, or no chromedriver: apt install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = browser_path
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1100"):
        options.add_argument(argument)
    with selenium.Chrome(options=options, service=selenium.ChromeService(driver_path)) as browser:
        yield browser


def wait(browser: Any, is_so: Callable[[], Any]) -> None:
    end = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < end, f"It did not happen in 90 seconds. {status(browser)}"
        time.sleep(0.05)


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def status(browser: Any) -> str:
    return find(browser, "#status").text


def reconstruction(browser: Any) -> np.ndarray:
    """Levels (128, 128, 3) of the canvas."""
    levels = browser.execute_script(LEVELS, find(browser, "#reconstruction"))
    return np.array(levels, dtype=np.int16).reshape(128, 128, 4)[:, :, :3]


def assert_becomes(browser: Any, expected: np.ndarray) -> None:
    """Within 2 of 255 levels, as soon as it is decoded."""
    wait(browser, lambda: np.abs(reconstruction(browser) - expected).max() <= 2)


def test_pixels_follow_the_edits_as_in_pytorch(browser, address, model):
    from selenium.webdriver import ActionChains

    pipe = load_pipeline(model)
    side = pipe.model.config.image_size // pipe.model.config.patch_size
    encoded = tokens, maps = pipe.encode(Image.open(PAGE / "scenes" / "1.png"))

    def decoded(tokens: torch.Tensor, maps: torch.Tensor) -> np.ndarray:
        return np.asarray(pipe(sparse_tokens=tokens, localization=maps).images[0], dtype=np.int16)

    browser.get(f"{address}/index.html")
    wait(browser, lambda: status(browser) == "Drag a token of the reconstruction.")
    before = decoded(tokens, maps)
    assert_becomes(browser, before)

    # By mouse: the token of the red ball, three patches to the right and one up.
    row, column = 6, 11
    dragged = int(maps[0, row * side + column].argmax())
    stage = find(browser, "#stage")
    patch = stage.size["width"] / side
    x, y = ((index + 0.5 - side / 2) * patch for index in (column, row))
    actions = ActionChains(browser).move_to_element_with_offset(stage, round(x), round(y)).click_and_hold()
    actions.move_by_offset(round(3 * patch), round(-patch)).release().perform()
    assert status(browser) == f"Token {dragged} is moved, in patches: 3.0 right, 1.0 up."
    tokens, maps = pipe.move(tokens, maps, dragged, rows=-1, columns=3)
    after = decoded(tokens, maps)
    place = np.kron((maps[0, :, dragged] > 0.5).reshape(side, side), np.ones((128 // side, 128 // side))) > 0
    assert np.abs(after - before)[place].max() > 20
    assert_becomes(browser, after)

    # By keyboard: another one, two patches down; then it is off.
    other = (dragged + 1) % maps.shape[2]
    button = find(browser, f"#tokens button[aria-label='Token {other}']")
    browser.execute_script("arguments[0].focus()", button)
    ActionChains(browser).send_keys("\ue015", "\ue015").perform()  # the arrow down
    assert status(browser) == f"Token {other} is moved, in patches: 0.0 right, 2.0 down."
    assert_becomes(browser, decoded(*pipe.move(tokens, maps, other, rows=2)))
    ActionChains(browser).send_keys(" ").perform()
    assert status(browser) == f"Token {other} is off." and button.get_attribute("aria-pressed") == "false"
    tokens, maps = pipe.move(*pipe.erase(*encoded, other), dragged, rows=-1, columns=3)
    on = [token for token in range(maps.shape[2]) if token != other]
    assert_becomes(browser, decoded(tokens[:, on], maps[:, :, on]))


def test_what_fails_gets_a_sentence(browser, address, site, tmp_path):
    wrong = tmp_path / "wrong.png"
    wrong.write_text("no image")
    browser.get(f"{address}/index.html")
    wait(browser, lambda: status(browser) == "Drag a token of the reconstruction.")
    find(browser, "#file").send_keys(str(wrong))
    wait(browser, lambda: status(browser) == "wrong.png is no picture that this browser can read.")

    (site / "decoder.onnx").rename(site / "away.onnx")
    browser.refresh()
    wait(browser, lambda: status(browser) == "decoder.onnx is not on this site.")
    (site / "away.onnx").rename(site / "decoder.onnx")
