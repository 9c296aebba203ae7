# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The app: what happens to a picture, everywhere; and the page in a browser, where Gradio and Chromium are."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import stellar_hf
from stellar_hf import StellarTokenPrior, StellarTokenPriorPipeline
from stellar_hf.cli.inputs import load_pipeline

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "app.py"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("app", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["app"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["app"]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(stellar_hf.DEMO_MODEL)


@pytest.fixture(scope="module")
def prior_pipe(pipe):
    """With a prior that was not trained."""
    config = pipe.model.config
    side = config.image_size // config.patch_size
    prior = StellarTokenPrior(
        num_sparse_tokens=config.num_sparse_tokens,
        token_size=config.hidden_size,
        grid_size=(side, side),
        num_classes=2,
        class_names=["cat", "dog"],
        hidden_size=48,
        num_attention_heads=2,
        num_layers=1,
    )
    return StellarTokenPriorPipeline.from_pipe(pipe, prior=prior.eval())


@pytest.fixture(scope="module")
def scenes(app, pipe):
    """Two pictures, one of them twice as wide as high."""
    first, second = app.embedded_scenes()[:2]
    return app.encode(pipe, first), app.encode(pipe, second.resize((200, 100)))


def largest(scene):
    """The tokens of a scene, those with the largest maps first."""
    return scene.maps[0].sum(dim=0).argsort(descending=True).tolist()


def test_a_picture_comes_back_in_its_shape(app, pipe, scenes):
    for scene in scenes:
        picture, other_picture = app.reconstruct(pipe, scene, app.Edit())
        assert picture.size == scene.picture.size and max(picture.size) == app.SIDE
        assert other_picture is None
        pixels, original = (np.asarray(image, dtype=float) for image in (picture, scene.picture))
        # It shows the same: it is nearer than the mean colour.
        assert np.abs(pixels - original).mean() < 0.8 * np.abs(original.mean((0, 1)) - original).mean()


def test_what_is_off_stays_away_where_others_leave(app, pipe, scenes):
    scene = scenes[0]
    _, second, *rest = largest(scene)
    edit = app.Edit(off=rest, chosen=[second], right=100)
    (tokens, maps), _ = app.apply(pipe, scene, edit)
    assert tokens.shape[1] == maps.shape[2] == 2
    torch.testing.assert_close(maps[0].sum(dim=1), torch.ones(maps.shape[1]))
    assert maps[0].sum(dim=0).min() < 1e-3  # moved out of the picture


def test_chosen_tokens_move_and_grow(app, pipe, scenes):
    scene = scenes[0]
    concept = largest(scene)[1]
    edit = app.Edit(chosen=[concept], right=-2, down=1, size=0.5)
    (tokens, maps), _ = app.apply(pipe, scene, edit)
    expected = pipe.move(*pipe.scale(scene.tokens, scene.maps, [concept], 0.5), [concept], rows=1, columns=-2)
    torch.testing.assert_close((tokens, maps), expected)
    assert maps[0, :, concept].sum() < 0.5 * scene.maps[0, :, concept].sum()


def test_tokens_are_swapped_and_then_moved(app, pipe, scenes):
    scene, other = scenes
    leaving, arriving = largest(scene)[1], largest(other)[1]
    edit = app.Edit(chosen=[leaving], other=other, other_chosen=[arriving])
    (tokens, maps), (other_tokens, other_maps) = app.apply(pipe, scene, edit)
    num_tokens = scene.maps.shape[2]
    assert maps[0, :, leaving].sum() == 0 and other_maps[0, :, arriving].sum() == 0
    torch.testing.assert_close(maps[0, :, num_tokens + arriving], other.maps[0, :, arriving])
    torch.testing.assert_close(other_maps[0, :, num_tokens + leaving], scene.maps[0, :, leaving])

    away = app.Edit(chosen=[leaving], right=100, other=other, other_chosen=[arriving])
    (_, moved_maps), _ = app.apply(pipe, scene, away)
    assert moved_maps[0, :, num_tokens + arriving].sum() < 1e-3
    pictures = app.reconstruct(pipe, scene, edit)
    assert [picture.size for picture in pictures] == [scene.picture.size, other.picture.size]


def test_tokens_come_in_addition_where_none_is_chosen(app, pipe, scenes):
    scene, other = scenes
    edit = app.Edit(other=other, other_chosen=[largest(other)[0]])
    (_, maps), _ = app.apply(pipe, scene, edit)
    torch.testing.assert_close(maps[0].sum(dim=1), torch.ones(maps.shape[1]))
    assert "came token" in app.describe(edit)


@pytest.mark.parametrize("of", ["off", "chosen", "other_chosen"])
def test_no_picture_without_a_token_gets_a_sentence(app, pipe, scenes, of):
    scene, other = scenes
    edit = app.Edit(**{"other": other, of: range(scene.maps.shape[2])})
    with pytest.raises(ValueError, match=r"^All tokens .*\.$"):
        app.reconstruct(pipe, scene, edit)


def test_a_wrong_file_gets_a_sentence_with_its_name(app, pipe, tmp_path):
    path = tmp_path / "somewhere.png"
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"^cat\.png cannot be read: unknown format\.$"):
        app.open_scene(pipe, str(path), "cat.png")
    Image.new("L", (30, 20)).save(path)
    assert app.open_scene(pipe, str(path), "cat.png").picture.mode == "RGB"


def test_a_prior_draws_what_is_edited_like_others(app, pipe, prior_pipe):
    assert app.classes_of(prior_pipe) == {"anything": None, "cat": 0, "dog": 1}
    scene = app.draw_scene(pipe, prior_pipe, 1)
    picture, _ = app.reconstruct(pipe, scene, app.Edit(off=[0]))
    assert picture.size == scene.picture.size


def test_a_prior_is_found_in_its_folder(app, prior_pipe, tmp_path):
    prior_pipe.save_pretrained(tmp_path / "with")
    pipe, found = app.load_pipelines(app.AppArguments(pipeline_name_or_path=str(tmp_path / "with")))
    assert found is not None and pipe.model is found.model
    pipe.save_pretrained(tmp_path / "without")
    assert app.load_pipelines(app.AppArguments(pipeline_name_or_path=str(tmp_path / "without")))[1] is None
    assert app.load_pipelines(app.AppArguments())[1] is None


def test_each_patch_of_the_picture_belongs_to_a_token(app, scenes):
    scene = scenes[0]
    num_tokens = scene.maps.shape[2]
    shown = app.token_picture(scene, num_tokens)
    assert len(shown["masks"]) == len(set(shown["palette"])) == num_tokens
    assert len(shown["places"]) == shown["side"] ** 2 == scene.maps.shape[1]
    assert app.token_picture(None, num_tokens).keys() == shown.keys()


def test_without_gradio_it_says_what_to_install(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="pip install"):
        app.import_gradio()


# The Space -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The folder of a Space, made as docs/app.md says."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("examples", "src", "setup.cfg"):
        (folder / name).symlink_to(REPOSITORY / name)
    (block,) = re.findall(r"```bash\n(mkdir space.*?)```", (REPOSITORY / "docs" / "app.md").read_text(), re.DOTALL)
    subprocess.run(["bash", "-euc", block], cwd=folder, check=True)
    return folder / "space"


def test_a_space_has_its_header_and_what_it_needs(space):
    header = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and (space / header["app_file"]).is_file()
    requirements = (space / "requirements.txt").read_text().split()
    assert f"gradio>={header['sdk_version'].rpartition('.')[0]}" in requirements
    assert "scikit-image" in requirements and any(line.startswith("torch>=") for line in requirements)
    assert (space / "stellar_hf" / "demo" / "model.safetensors").is_file()


# The page in a browser -----------------------------------------------------------------------------------------------

IS_COMPLETE = """
const pictures = [...document.querySelectorAll("img:not([hidden])")];
return document.querySelector("[role=status]") && pictures.length > 8 && pictures.every((picture) => picture.complete);
"""
PLACES = """
const parts = [...document.querySelectorAll(".block, button, input, [role=status]")];
return parts.filter((part) => part.offsetParent && !part.closest(".toast-wrap")).map((part) => {
  const box = part.getBoundingClientRect();
  return [box.x + scrollX, box.y + scrollY, box.width, box.height].map(Math.round).join();
});
"""


@pytest.fixture(scope="module")
def chromium():
    """Where Chromium and its driver are; a test that needs them is skipped where one of them, or a package, is not."""
    for package in ("gradio", "selenium"):
        pytest.importorskip(package, reason=f"There is no {package}: pip install gradio selenium")
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(paths):
        pytest.skip("There is no chromium, or no chromedriver: apt install chromium chromium-driver")
    return paths


@pytest.fixture(scope="module")
def address(chromium, space, prior_pipe, tmp_path_factory):
    """The Space, running, with a pipeline that has a prior."""
    folder = tmp_path_factory.mktemp("pipeline")
    prior_pipe.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio")),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "app.py", f"--pipeline_name_or_path={folder}"]
    with subprocess.Popen(command, cwd=space, env=environment, stdout=subprocess.PIPE, text=True) as server:
        lines = []
        while not any("Running on" in line for line in lines):
            line = server.stdout.readline()
            assert line, f"The app ended: {lines}"
            lines.append(line)
        yield f"http://127.0.0.1:{port}"
        server.kill()


@pytest.fixture(params=["light", "dark"])
def page(request, chromium, address):
    """The page in Chromium, by somebody who likes it light, or dark; the console must stay free of errors."""
    from selenium import webdriver

    browser_path, driver_path = chromium
    options = webdriver.ChromeOptions()
    options.binary_location = browser_path
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path)) as browser:
        scheme = {"name": "prefers-color-scheme", "value": request.param}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(address)
        page = Page(browser, request.param)
        page.wait(lambda: browser.execute_script(IS_COMPLETE))
        yield page
        errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors


class Page:
    """What a person sees of the page, and does."""

    def __init__(self, browser: Any, scheme: str):
        self.browser, self.scheme = browser, scheme

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def wait(self, is_so: Callable[[], Any]) -> None:
        end = time.monotonic() + 90
        while not is_so():
            assert time.monotonic() < end, f"It did not happen in 90 seconds. {self.status}"
            time.sleep(0.02)

    def wait_for_change(self, what: Callable[[], Any], act: Callable[[], Any]) -> None:
        before = what()
        act()
        self.wait(lambda: what() != before)

    @property
    def status(self) -> str:
        return self.all("[role=status]")[0].text

    def result(self, index: int = 0) -> str:
        """Address of the picture in a panel of a reconstruction."""
        panels = self.browser.find_elements(
            "xpath", "//div[contains(@class, 'block')][.//button[@aria-label='Download']]"
        )
        return panels[index].find_element("css selector", "img").get_attribute("src")

    def lit(self) -> list[int]:
        """Tokens of the first picture that are lit up."""
        layers = self.all(".stage")[0].find_elements("css selector", ".layer")
        return [token for token, layer in enumerate(layers) if "opacity: 1" in layer.get_attribute("style")]

    def button(self, text: str) -> Any:
        return next(button for button in self.all("button") if button.text == text)

    def focused(self) -> str:
        return self.browser.execute_script("return document.activeElement.getAttribute('aria-label')") or ""

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def tab_to(self, label: str) -> None:
        for _ in range(60):
            if self.focused() == label:
                return
            self.press("\ue004")
        raise AssertionError(f"Tab does not reach {label}.")


@pytest.mark.slow
def test_by_mouse(page, app, tmp_path):
    from selenium.webdriver import ActionChains

    tokens = page.all(".stage")[0].find_elements("css selector", ".layer")
    assert page.lit() == list(range(len(tokens)))
    stage = page.all(".stage")[0]
    ActionChains(page.browser).move_to_element(stage).perform()
    page.wait(lambda: len(page.lit()) == 1)
    (token,) = page.lit()
    ActionChains(page.browser).click().perform()
    page.wait(lambda: page.status == f"Chosen: token {token}. The sliders move and scale what is chosen.")

    page.wait_for_change(page.result, page.all("input[type=checkbox]")[token - 1].click)
    page.wait_for_change(page.result, page.button("Undo all edits").click)
    page.wait(lambda: page.lit() == list(range(len(tokens))))

    other = tmp_path / "other.png"
    app.embedded_scenes()[5].resize((300, 200)).save(other)
    page.wait_for_change(lambda: page.result(1), lambda: page.all("input[type=file]")[-1].send_keys(str(other)))
    page.wait_for_change(lambda: (page.result(0), page.result(1)), page.all("button[data-token]")[len(tokens)].click)
    page.wait(lambda: page.status.startswith("From the second picture came token 0."))

    page.wait_for_change(page.result, page.button("Draw a new picture").click)
    page.wait_for_change(page.result, page.all("button[aria-label='Thumbnail 2 of 8']")[0].click)


@pytest.mark.slow
def test_by_keyboard(page):
    page.tab_to("Token 1")
    assert page.lit() == [1]
    page.press(" ")
    page.wait(lambda: page.status.startswith("Chosen: token 1."))
    assert page.focused() == "Token 1"
    page.tab_to("range slider for Scale")
    page.wait_for_change(page.result, lambda: page.press("\ue014"))  # the right arrow


@pytest.mark.slow
def test_a_wrong_file_gets_a_sentence_and_nothing_jumps(page, app, tmp_path):
    places, result = page.browser.execute_script(PLACES), page.result()
    wrong = tmp_path / "wrong.png"
    wrong.write_text("no image")
    page.all("input[type=file]")[0].send_keys(str(wrong))
    page.wait(lambda: page.status == "wrong.png cannot be read: unknown format.")
    assert page.result() == result
    page.wait(lambda: page.browser.execute_script(PLACES) == places)

    right = tmp_path / "right.png"
    app.embedded_scenes()[6].resize((100, 300)).save(right)
    page.wait_for_change(page.result, lambda: page.all("input[type=file]")[0].send_keys(str(right)))
    page.wait(lambda: page.browser.execute_script(PLACES) == places)


@pytest.mark.slow
def test_it_is_light_or_dark_as_people_like(page):
    script = "return getComputedStyle(document.querySelector('gradio-app')).backgroundColor"
    color = page.browser.execute_script(script)
    red = int(re.search(r"\d+", color)[0])
    assert (red > 200) if page.scheme == "light" else (red < 60)
