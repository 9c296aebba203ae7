# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
An app in the browser: the tokens of a picture light up, are switched off, moved, scaled and swapped, and the
reconstruction follows.

    python examples/app.py                                      # the packaged demo model
    python examples/app.py --model_name_or_path out             # a model that reconstructs pixels
    python examples/app.py --pipeline_name_or_path stellar-prior/pipeline    # a pipeline; with a prior it also draws

It is also the app.py of a Hugging Face Space, whose README.md is examples/app.md. See docs/app.md.
"""

import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.utils import logging

from stellar_hf import DEMO_MODEL, StellarPipeline, StellarTokenPriorPipeline
from stellar_hf.cli.inputs import load_pipeline
from stellar_hf.cli.parser import CommandParser
from stellar_hf.cli.process import errors_in_a_sentence
from stellar_hf.data import load_tabletop_scenes
from stellar_hf.data.images import read_image
from stellar_hf.localization_stellar import token_maps
from stellar_hf.visualization import token_overlay, token_palette

# Longer side of the pictures that are shown, in pixels.
SIDE = 384
HEIGHT = 340  # of their panels
# Of the validation split: the first one, with four objects, and the second one are shown at the start.
SCENES = (20, 1, 9, 5, 13, 12, 22, 11)
ANY_CLASS = "anything"

# S, (1, r, d), and L, (1, N, r), of an image.
Factors = tuple[Tensor, Tensor]

HINT = (
    "Point at the tokens to light them up. Click one, or press its button, to choose it. Then move it, scale it, or "
    "swap it with tokens of the second picture, which are chosen in the same way."
)


@dataclass
class AppArguments:
    """Which model."""

    model_name_or_path: str = field(
        default=DEMO_MODEL,
        metadata={"help": "STELLAR model that reconstructs pixels: a folder, or owner/name on the Hub."},
    )
    pipeline_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "In place of the model, a pipeline: a folder, or owner/name on the Hub. A prior in it draws."
        },
    )


@dataclass(frozen=True)
class Scene:
    """
    A picture as it is shown, and what is edited of it.

    Attributes:
        picture: RGB, `SIDE` pixels on its longer side.
        tokens: S, (1, r, d).
        maps: L, (1, N, r).
    """

    picture: Image.Image
    tokens: Tensor
    maps: Tensor


@dataclass(frozen=True)
class Edit:
    """
    What happens to a scene; nothing by default.

    Attributes:
        off: Tokens that are switched off, numbered from 0.
        chosen: Tokens that are moved and scaled, or swapped.
        right: Patches to the right.
        down: Patches downwards.
        size: Factor of height and width.
        other: A second scene.
        other_chosen: If any, they come in the place of the chosen ones, which go to the second scene; then these are
            moved and scaled.
    """

    off: Sequence[int] = ()
    chosen: Sequence[int] = ()
    right: float = 0
    down: float = 0
    size: float = 1
    other: Scene | None = None
    other_chosen: Sequence[int] = ()


def main() -> None:
    with errors_in_a_sentence():
        (args,) = CommandParser(AppArguments, description=__doc__).parse(sys.argv[1:])
        options = launch_options()
        logging.disable_progress_bar()  # of loading the model
        Page(*load_pipelines(args)).build().launch(**options)


def load_pipelines(args: AppArguments) -> tuple[StellarPipeline, StellarTokenPriorPipeline | None]:
    """The pipeline that encodes, edits and decodes; and, where its folder has a prior, the one that draws."""
    name = args.pipeline_name_or_path
    if not name or "prior" not in StellarPipeline.load_config(name):
        return load_pipeline(args.model_name_or_path, name), None
    prior_pipe = StellarTokenPriorPipeline.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    prior_pipe.set_progress_bar_config(disable=True)
    return StellarPipeline.from_pipe(prior_pipe), prior_pipe


# Pictures to pictures ------------------------------------------------------------------------------------------------


def encode(pipe: StellarPipeline, image: Image.Image) -> Scene:
    """The scene of an RGB image of any size."""
    tokens, maps = pipe.encode(image)
    return Scene(ImageOps.contain(image, (SIDE, SIDE)), tokens, maps)


def open_scene(pipe: StellarPipeline, path: str, name: str) -> Scene:
    """
    The scene of an image file.

    Raises:
        ValueError: In a sentence with the file's name, if it cannot be read.
    """
    return encode(pipe, read_image({"bytes": Path(path).read_bytes()}, name=name))


def draw_scene(pipe: StellarPipeline, prior_pipe: StellarTokenPriorPipeline, label: int | str | None) -> Scene:
    """A scene from noise, of a class by its name or number, or of any."""
    tokens, maps = prior_pipe.sample_tokens([label])
    return Scene(decode(pipe, tokens, maps, (SIDE, SIDE)), tokens, maps)


def classes_of(prior_pipe: StellarTokenPriorPipeline) -> dict[str, int | None]:
    """What can be drawn, by what it is called."""
    config = prior_pipe.prior.config
    names = config.class_names or [f"class {number}" for number in range(config.num_classes)]
    return {ANY_CLASS: None, **{name: number for number, name in enumerate(names)}}


def reconstruct(pipe: StellarPipeline, scene: Scene, edit: Edit) -> tuple[Image.Image, Image.Image | None]:
    """The picture after an edit, and the second one, if there is one. Errors are those of `apply`."""
    factors, other_factors = apply(pipe, scene, edit)
    picture = decode(pipe, *factors, scene.picture.size)
    if edit.other is None or other_factors is None:
        return picture, None
    return picture, decode(pipe, *other_factors, edit.other.picture.size)


def apply(pipe: StellarPipeline, scene: Scene, edit: Edit) -> tuple[Factors, Factors | None]:
    """
    What there is to decode after an edit: of the scene, without the tokens that are off; and of the other scene, if
    there is one.

    Raises:
        ValueError: In plain words, if no token would be left to fill a picture.
    """
    on = [token for token in range(scene.maps.shape[2]) if token not in edit.off]
    if not on:
        raise ValueError("All tokens are switched off. Switch one on to see a picture.")
    concept = _members(on, edit.chosen)
    if concept.all():
        raise ValueError("All tokens that are on are chosen, but one must stay to fill their place. Take one out.")
    tokens, maps = pipe.erase(scene.tokens, scene.maps, list(edit.off))
    # Out altogether: erased ones would come back in a place that others leave.
    tokens, maps = tokens[:, on], maps[:, :, on]

    other = edit.other
    swapped = None if other is None else (other.tokens, other.maps)
    if other is not None and edit.other_chosen:
        arriving = _members(range(other.maps.shape[2]), edit.other_chosen)
        if arriving.all():
            raise ValueError("All tokens of the second picture are chosen, but one must stay there. Take one out.")
        swapped = pipe.swap(tokens, maps, concept, other.tokens, other.maps, arriving)[2:]
        # Placed before it arrives: what it covers would not come back.
        placed = _place(pipe, other.tokens, other.maps, arriving, edit)
        return pipe.swap(tokens, maps, concept, *placed, arriving)[:2], swapped
    return _place(pipe, tokens, maps, concept, edit), swapped


def _place(pipe: StellarPipeline, tokens: Tensor, maps: Tensor, concept: Tensor, edit: Edit) -> Factors:
    tokens, maps = pipe.scale(tokens, maps, concept, edit.size)
    return pipe.move(tokens, maps, concept, edit.down, edit.right)


def decode(pipe: StellarPipeline, tokens: Tensor, maps: Tensor, size: tuple[int, int]) -> Image.Image:
    """The image of S, (1, r, d), and L, (1, N, r), in a size (width, height)."""
    width, height = size
    output: Any = pipe(sparse_tokens=tokens, localization=maps, width=width, height=height)
    return output.images[0]


def describe(edit: Edit) -> str:
    """In a sentence, what is chosen and where it goes."""
    chosen, arriving = _listed(edit.chosen), _listed(edit.other_chosen)
    if arriving and chosen:
        return f"Swapped: {arriving} of the second picture for {chosen}. The sliders move and scale what came."
    if arriving:
        return f"From the second picture came {arriving}. The sliders move and scale what came."
    return f"Chosen: {chosen}. The sliders move and scale what is chosen." if chosen else HINT


def _listed(tokens: Sequence[int]) -> str:
    numbers = ", ".join(str(token) for token in sorted(tokens))
    return f"token{'s' if len(tokens) > 1 else ''} {numbers}" if tokens else ""


def _members(tokens: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """Which of the tokens are chosen, bool (1, number of tokens)."""
    return torch.tensor([[token in chosen for token in tokens]])


def embedded_scenes() -> list[Image.Image]:
    """Scenes of clear objects, of which the demo model's training has seen no part."""
    return load_tabletop_scenes("validation", max(SCENES) + 1, image_size=128).select(SCENES)["image"][:]


# The picture whose tokens light up -----------------------------------------------------------------------------------

# A layer for each token: all tokens in colour, cut out by the token's map. Below them, the picture in dark gray.
TOKENS_HTML = """
<div class="panel">
  <div class="stage ${masks.length ? '' : 'empty'}" style="--ratio: ${ratio}; --colored: url(${colored})">
    ${masks.length ? '' : 'no picture yet'}
    <img src="${gray}" alt="" ${masks.length ? '' : 'hidden'}>
    ${masks.map((mask, token) => {
      const on = lit === null ? !value.length || value.includes(token) : lit === token;
      return `<div class="layer" style="mask-image: url(${mask}); opacity: ${on ? 1 : 0}"></div>`;
    }).join("")}
  </div>
</div>
<div class="buttons" role="group" aria-label="${label}">
  ${palette.map((color, token) => `<button type="button" data-token="${token}" style="--color: ${color}"
    aria-pressed="${value.includes(token)}" aria-label="Token ${token}" ${masks.length ? '' : 'disabled'}
    >${token}</button>`).join("")}
</div>
"""

TOKENS_CSS = """
.panel { height: HEIGHTpx; display: flex; align-items: center; justify-content: center; }
.stage { position: relative; width: min(100%, calc(var(--ratio) * HEIGHTpx)); aspect-ratio: var(--ratio);
  border-radius: 4px; overflow: hidden; cursor: pointer; }
.stage.empty { display: flex; align-items: center; justify-content: center; cursor: default;
  color: var(--body-text-color-subdued); }
.stage img, .layer { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; }
.layer { background: var(--colored) 0 0 / 100% 100%; mask-size: 100% 100%; transition: opacity 0.12s; }
.buttons { display: flex; flex-wrap: wrap; gap: 6px; justify-content: center; padding-top: 10px; }
.buttons button { min-width: 38px; padding: 4px 8px; border-radius: 6px; border: 1px solid var(--border-color-primary);
  border-bottom: 4px solid var(--color); background: var(--button-secondary-background-fill);
  color: var(--body-text-color); font-variant-numeric: tabular-nums; cursor: pointer; }
.buttons button[aria-pressed=true] { background: var(--color); color: #111; border-color: var(--color);
  font-weight: 700; }
.buttons button:focus-visible { outline: 2px solid var(--body-text-color); outline-offset: 2px; }
.buttons button:disabled { opacity: 0.4; cursor: default; }
""".replace("HEIGHT", str(HEIGHT - 70))

TOKENS_JS = """
const tokenAt = (event) => {
  const button = event.target.closest("button");
  if (button) return button.disabled ? null : Number(button.dataset.token);
  const stage = event.target.closest(".stage");
  if (!stage || !props.places.length) return null;
  const box = stage.getBoundingClientRect();
  const cell = (offset, length) =>
    Math.max(0, Math.min(props.side - 1, Math.floor(offset / length * props.side)));
  const row = cell(event.clientY - box.top, box.height), column = cell(event.clientX - box.left, box.width);
  return props.places[row * props.side + column];
};
const light = (token) => { if (props.lit !== token) props.lit = token; };
element.addEventListener("pointermove", (event) => light(tokenAt(event)));
element.addEventListener("pointerleave", () => light(null));
element.addEventListener("focusin", (event) => light(tokenAt(event)));
element.addEventListener("focusout", () => light(null));
element.addEventListener("click", (event) => {
  const token = tokenAt(event);
  if (token === null) return;
  const chosen = props.value;
  props.value = chosen.includes(token) ? chosen.filter((other) => other !== token) : [...chosen, token];
  trigger("input");
});
"""


def token_picture(scene: Scene | None, num_tokens: int) -> dict[str, Any]:
    """
    What `TOKENS_HTML` shows of a scene, or that there is none yet: its pictures in gray and in the tokens' colours,
    where each token is, and which token has most of each patch.
    """
    palette = token_palette(num_tokens)
    colors = ["#" + bytes(np.uint8(color * 255 + 0.5)).hex() for color in palette]
    shown: dict[str, Any] = {"palette": colors, "lit": None}
    if scene is None:
        return {**shown, "gray": "", "colored": "", "masks": [], "places": [], "side": 0, "ratio": 1}
    maps = scene.maps[0]
    gray = token_overlay(scene.picture, maps, palette=np.full_like(palette, 0.12), strength=0.75)
    alphas = np.uint8(token_maps(scene.maps)[0].cpu().numpy() * 255 + 0.5)
    return {
        **shown,
        "gray": _data_uri(gray, "JPEG"),
        "colored": _data_uri(token_overlay(scene.picture, maps), "JPEG"),
        "masks": [_data_uri(_mask(alpha), "PNG") for alpha in alphas],
        "places": maps.argmax(dim=1).tolist(),
        "side": alphas.shape[1],
        "ratio": scene.picture.width / scene.picture.height,
    }


def _mask(alpha: np.ndarray) -> Image.Image:
    """White of an opacity (H, W) uint8."""
    return Image.fromarray(np.stack([np.full_like(alpha, 255), alpha], axis=2), "LA")


def _data_uri(image: Image.Image, file_format: str) -> str:
    stream = io.BytesIO()
    image.save(stream, file_format)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


# The page ------------------------------------------------------------------------------------------------------------

# The label of a gallery would cover its first picture.
CSS = ".examples .grid-wrap { overflow: auto hidden; padding-top: 24px; }"
STATUS_HTML = '<p role="status">${value}</p>'
STATUS_CSS = "p { min-height: 3em; line-height: 1.5; margin: 0; color: var(--body-text-color); }"  # two lines


def import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The app needs Gradio: pip install "gradio>=6.31"') from error
    return gradio


def launch_options() -> dict[str, Any]:
    """What the page looks like, with the fonts of the system, so that none is fetched."""
    theme = import_gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return {"theme": theme, "css": CSS, "ssr_mode": False, "max_file_size": "50mb", "footer_links": ["settings"]}


class Page:
    """
    The page: its components, and what happens on its events, as methods that give new values by component.

    Args:
        pipe: Encodes, edits and decodes.
        prior_pipe: Draws, if there is one.
    """

    def __init__(self, pipe: StellarPipeline, prior_pipe: StellarTokenPriorPipeline | None = None):
        self.gradio = import_gradio()
        self.pipe, self.prior_pipe = pipe, prior_pipe
        self.num_tokens = pipe.model.config.num_sparse_tokens
        self.examples = [encode(pipe, image) for image in embedded_scenes()]

    def build(self) -> Any:
        """The app, `gradio.Blocks`."""
        gradio, (first, second) = self.gradio, self.examples[:2]
        # Pictures that were shown are deleted after an hour, and Gradio sends no statistics.
        options = {"delete_cache": (3600, 3600), "analytics_enabled": False}
        with gradio.Blocks(title="STELLAR: what and where", **options) as app:
            gradio.Markdown(
                f"# What and where\nA picture is {self.num_tokens} tokens, *what* is there, and a map of each token, "
                "*where* it is. Edit both, and the picture follows."
            )
            self.scene, self.other = gradio.State(first), gradio.State(second)
            self.file, self.tokens, self.result = self._build_panels(first, ("Picture", "Tokens", "Reconstruction"))
            self.status = gradio.HTML(HINT, html_template=STATUS_HTML, css_template=STATUS_CSS)
            self._build_controls()
            self._build_sources()
            self.other_file, self.other_tokens, self.other_result = self._build_panels(
                second, ("Second picture", "Tokens of the second picture", "Reconstruction of the second picture")
            )
            self._connect()
        return app

    def _build_panels(self, scene: Scene, labels: tuple[str, str, str]) -> tuple[Any, Any, Any]:
        """A scene's file, its tokens and its reconstruction, side by side where there is space."""
        gradio = self.gradio
        with gradio.Row(equal_height=True):
            with gradio.Column(min_width=280):
                file = gradio.Image(scene.picture, label=labels[0], height=HEIGHT, sources=["upload"], buttons=[])
                # Path and name of the file as it came: what is wrong with it is said by this app.
                file.preprocess = lambda payload: payload and (payload.path, payload.orig_name or "The file")
            with gradio.Column(min_width=280):
                tokens = gradio.HTML(
                    [],
                    label=labels[1],
                    show_label=True,
                    container=True,
                    apply_default_css=False,
                    html_template=TOKENS_HTML,
                    css_template=TOKENS_CSS,
                    js_on_load=TOKENS_JS,
                    **token_picture(scene, self.num_tokens),
                )
            with gradio.Column(min_width=280):
                reconstruction = gradio.Image(
                    reconstruct(self.pipe, scene, Edit())[0],
                    label=labels[2],
                    height=HEIGHT,
                    interactive=False,
                    format="jpeg",
                    buttons=["download"],
                )
        return file, tokens, reconstruction

    def _build_controls(self) -> None:
        gradio, config = self.gradio, self.pipe.model.config
        side, tokens = config.image_size // config.patch_size, list(range(self.num_tokens))
        with gradio.Row(equal_height=True):
            choices = [(str(token), token) for token in tokens]
            self.on = gradio.CheckboxGroup(choices, value=tokens, label="Tokens that are on", scale=2, min_width=280)
            self.right = gradio.Slider(-side, side, 0, step=1, label="Move right", buttons=[])
            self.down = gradio.Slider(-side, side, 0, step=1, label="Move down", buttons=[])
            self.size = gradio.Slider(0.25, 3, 1, step=0.05, label="Scale", buttons=[])

    def _build_sources(self) -> None:
        gradio = self.gradio
        with gradio.Row(equal_height=True):
            self.gallery = gradio.Gallery(
                [scene.picture for scene in self.examples],
                label="Pictures to start with",
                columns=len(self.examples),
                height=160,
                allow_preview=False,
                interactive=False,
                buttons=[],
                scale=3,
                min_width=280,
                elem_classes="examples",
            )
            with gradio.Column(min_width=200):
                self.undo = gradio.Button("Undo all edits")
                if self.prior_pipe is not None:
                    with gradio.Group():
                        self.label = gradio.Dropdown(list(classes_of(self.prior_pipe)), value=ANY_CLASS, label="Draw")
                        self.draw = gradio.Button("Draw a new picture")

    def _connect(self) -> None:
        scenes = [self.scene, self.other]
        edits = [self.on, self.tokens, self.other_tokens, self.right, self.down, self.size]
        results = [self.result, self.other_result, self.status]
        everything = [*scenes, self.file, self.other_file, *edits, *results]
        # While a slider is dragged, what comes last is shown, without the veil of a progress bar.
        quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        for control in edits:
            control.input(self.follow, [*scenes, *edits], results, **quick)
        self.undo.click(self.show, scenes, everything, **quick)
        self.file.input(self.open_first, [self.file, *scenes], everything, **quick)
        self.other_file.input(self.open_second, [self.other_file, *scenes], everything, **quick)
        self.gallery.select(self._show_example(), self.other, everything, **quick)
        if self.prior_pipe is not None:
            self.draw.click(self.show_drawn, [self.label, self.other], everything, **quick)

    def follow(self, scene, other, on, chosen, other_chosen, right, down, size) -> dict[Any, Any]:
        """After an edit: both reconstructions; or, where it is impossible, the reason, and nothing else."""
        off = [token for token in range(self.num_tokens) if token not in on]
        edit = Edit(off, chosen, right, down, size, other, other_chosen)
        try:
            picture, other_picture = reconstruct(self.pipe, scene, edit)
        except ValueError as error:
            return {self.status: str(error)}
        return {self.result: picture, self.other_result: other_picture, self.status: describe(edit)}

    def show(self, scene: Scene, other: Scene | None) -> dict[Any, Any]:
        """Scenes without any edit."""
        gradio = self.gradio
        picture, other_picture = reconstruct(self.pipe, scene, Edit(other=other))
        return {
            self.scene: scene,
            self.other: other,
            self.file: scene.picture,
            self.other_file: other and other.picture,
            self.on: list(range(self.num_tokens)),
            self.tokens: gradio.HTML([], **token_picture(scene, self.num_tokens)),
            self.other_tokens: gradio.HTML([], **token_picture(other, self.num_tokens)),
            **{self.right: 0, self.down: 0, self.size: 1},
            self.result: picture,
            self.other_result: other_picture,
            self.status: HINT,
        }

    def open_first(self, file: tuple[str, str] | None, scene: Scene, other: Scene | None) -> dict[Any, Any]:
        if file is None:  # taken out, to make room for another one
            return {}
        try:
            return self.show(open_scene(self.pipe, *file), other)
        except ValueError as error:
            return {self.file: scene.picture, self.status: str(error)}

    def open_second(self, file: tuple[str, str] | None, scene: Scene, other: Scene | None) -> dict[Any, Any]:
        try:
            return self.show(scene, file and open_scene(self.pipe, *file))
        except ValueError as error:
            return {self.other_file: other and other.picture, self.status: str(error)}

    def show_drawn(self, name: str, other: Scene | None) -> dict[Any, Any]:
        label = classes_of(self.prior_pipe)[name]
        return self.show(draw_scene(self.pipe, self.prior_pipe, label), other)

    def _show_example(self) -> Any:
        # Gradio tells by the annotation which argument is the event.
        def show_example(event: self.gradio.SelectData, other: Scene | None) -> dict[Any, Any]:
            return self.show(self.examples[event.index], other)

        return show_example


if __name__ == "__main__":
    main()
