# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Figures of reconstructions, tokens and localization. Matplotlib is needed for those with axes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .localization_stellar import token_maps, upsample_maps

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BACKGROUND = np.array([21, 21, 26]) / 255  # of a token's map, where the token is not
_DARKNESS = 0.15  # share of the gray image that is still seen there


def token_palette(num_tokens: int) -> np.ndarray:
    """Distinct colours for tokens: hues at equal steps, alternately lighter and darker.

    Args:
        num_tokens: Number r of tokens.

    Returns:
        (r, 3) float64 RGB in [0, 1].
    """
    index = np.arange(num_tokens)
    hue = 2 * np.pi * (index / max(num_tokens, 1) + 0.07)
    # In OKLCH equal steps of hue look equally different, which they do not in HSV.
    lightness = np.where(index % 2, 0.84, 0.7)
    a, b = 0.14 * np.cos(hue), 0.14 * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        axis=-1,
    ).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def token_overlay(
    image: Tensor | Image.Image,
    localization: Tensor,
    grid_size: tuple[int, int] | None = None,
    palette: np.ndarray | None = None,
    strength: float = 0.6,
) -> Image.Image:
    """Paints the tokens over an image, softly mixing their colours by the localization.

    Args:
        image: (3, H, W) floating point RGB in [0, 1], or a PIL image.
        localization: (N, r) floating point; rows sum to 1. Patches are row-major.
        grid_size: (rows, columns) of the patches; a square grid without it.
        palette: (r, 3) RGB in [0, 1]; the colours of `token_palette` without it.
        strength: Share of the tokens' colours, in [0, 1]; the rest is the image in gray.

    Returns:
        An RGB image of the image's size.

    Raises:
        ValueError: If a shape or `strength` is impossible, or the grid is unknown.
    """
    (pixels,) = _to_pixels([image])
    _check_localization(localization, expected_ndim=2)
    num_tokens = localization.shape[1]
    palette = token_palette(num_tokens) if palette is None else np.asarray(palette)
    if palette.shape != (num_tokens, 3):
        raise ValueError(f"palette has shape {palette.shape}, but {num_tokens} tokens need ({num_tokens}, 3).")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, but must be in [0, 1].")
    maps = _token_maps(localization.unsqueeze(0), grid_size)
    maps = upsample_maps(maps, pixels.shape[:2])[0]
    return Image.fromarray((_blend(pixels, maps, palette, strength) * 255 + 0.5).astype(np.uint8))


def plot_reconstructions(
    images: Tensor | Sequence[Image.Image],
    reconstructions: Tensor | Sequence[Image.Image],
    localization: Tensor,
    grid_size: tuple[int, int] | None = None,
    num_images: int = 8,
) -> Figure:
    """Draws images, their reconstructions, the segmentation by tokens, and each token's map.

    A row is an image. The segmentation gives each pixel to the token whose (bilinearly upsampled) map is largest
    there. Tokens are numbered from 0, in their colours of the segmentation. Each map lights the image where it is: 1
    shows the image as it is, and 0 leaves it almost dark.

    Args:
        images: (B, 3, H, W) floating point RGB in [0, 1], or PIL images of one size.
        reconstructions: As many, of the same shape and range.
        localization: (B, N, r) floating point; rows sum to 1. Patches are row-major.
        grid_size: (rows, columns) of the patches; a square grid without it.
        num_images: Number of rows, at most; the first images are shown.

    Returns:
        A figure of its own, which knows no window and changes no global state: `figure.savefig("tokens.png")`, or the
        last expression of a notebook's cell.

    Raises:
        ValueError: If numbers or shapes disagree, or the grid is unknown.
        ImportError: If matplotlib is missing.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, but a figure needs at least 1.")
    _check_localization(localization, expected_ndim=3)
    if not len(images) == len(reconstructions) == len(localization) > 0:
        raise ValueError(
            f"There are {len(images)} images, {len(reconstructions)} reconstructions and {len(localization)} "
            "localization matrices: pass one of each per image."
        )
    image_pixels = _to_pixels(images[:num_images])
    reconstruction_pixels = _to_pixels(reconstructions[:num_images])
    maps = _token_maps(localization[:num_images], grid_size)  # (B, r, rows, columns)
    num_rows, num_tokens = maps.shape[:2]
    size = image_pixels[0].shape[:2]
    upsampled = upsample_maps(maps, size)
    winners = F.one_hot(upsampled.argmax(dim=1), num_tokens).permute(0, 3, 1, 2).float()
    palette = token_palette(num_tokens)

    # Layout in inches: cells of the images' aspect, a wider gap between the images and the maps, titles above.
    cell, gap, title = 0.9, 0.06, 0.24
    cell_height = cell * size[0] / size[1]
    lefts = [gap + column * (cell + gap) + (2 * gap if column >= 3 else 0) for column in range(3 + num_tokens)]
    height = title + num_rows * (cell_height + gap)
    figure, axes = _canvas(lefts[-1] + cell + gap, height)
    names = ["image", "reconstruction", "tokens", *map(str, range(num_tokens))]
    for left, name, color in zip(lefts, names, ["#333333"] * 3 + [*palette], strict=True):
        axes.text(left + cell / 2, height - title + gap, name, fontsize=8, color=color, ha="center")
    for row in range(num_rows):
        bottom = height - title - row * (cell_height + gap) - cell_height
        segmented = _blend(image_pixels[row], winners[row], palette, 0.6)
        lit = [_light(image_pixels[row], token_map) for token_map in upsampled[row].unsqueeze(-1).numpy()]
        panels = [image_pixels[row], reconstruction_pixels[row].clip(0, 1), segmented, *lit]
        for left, panel in zip(lefts, panels, strict=True):
            _put(axes, panel, left, bottom, cell, cell_height)
    return figure


def plot_edits(
    images: Sequence[Image.Image],
    localization: Sequence[Tensor],
    titles: Sequence[str],
    grid_size: tuple[int, int] | None = None,
    palette: np.ndarray | None = None,
) -> Figure:
    """Draws images in a row, and below each its tokens painted over it.

    Args:
        images: n PIL images of one size, for example before and after an edit.
        localization: n floating point tensors (N, r), one for each image; rows sum to 1.
        titles: n titles; long ones get several lines.
        grid_size: (rows, columns) of the patches; a square grid without it.
        palette: (r, 3) RGB in [0, 1] of the tokens, in which a concept may stand out; `token_palette` without it.

    Returns:
        A figure of its own, as from `plot_reconstructions`.

    Raises:
        ValueError: If numbers or shapes disagree, or the grid is unknown.
        ImportError: If matplotlib is missing.
    """
    Figure = _figure_class()
    if not len(images) == len(localization) == len(titles) > 0:
        raise ValueError(
            f"There are {len(images)} images, {len(localization)} localization matrices and {len(titles)} titles: "
            "pass one of each per image."
        )
    pixels = _to_pixels(images)
    overlays = [
        token_overlay(image, maps, grid_size, palette, strength=0.75)
        for image, maps in zip(images, localization, strict=True)
    ]
    titles = [textwrap.fill(title, 24) for title in titles]  # as many letters as fit above an image
    cell, title = 1.5, 0.1 + 0.14 * max(len(title.splitlines()) for title in titles)
    cell_height = cell * pixels[0].shape[0] / pixels[0].shape[1]
    figure = Figure(figsize=(cell * len(images), 2 * cell_height + title), dpi=150, facecolor="white")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, panels in enumerate(zip(pixels, overlays, strict=True)):
        axes[0, column].set_title(titles[column], fontsize=8, color="#333333", pad=4)
        for row, panel in enumerate(panels):
            axes[row, column].imshow(panel, interpolation="nearest", aspect="auto")
            axes[row, column].set_axis_off()
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.01, top=1 - title / (2 * cell_height + title), wspace=0.03, hspace=0.04
    )
    return figure


def plot_image_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], column_names: Sequence[str]) -> Figure:
    """Draws named rows of images under the names of their columns.

    Args:
        rows: Name, `""` for none, and images of each row: as many as there are column names, all of one size.
        column_names: A title for each column; `""` for none.

    Returns:
        A figure of its own, as of [`plot_reconstructions`].

    Raises:
        ValueError: If a row has another number of images, or there is none.
        ImportError: If matplotlib is missing.
    """
    if not rows or not column_names:
        raise ValueError("There is no image to draw: pass one row and one column at least.")
    for name, images in rows:
        if len(images) != len(column_names):
            raise ValueError(f"The row {name!r} has {len(images)} images for {len(column_names)} columns.")
    first = rows[0][1][0]
    cell, gap, title = 0.6, 0.04, 0.6
    margin = 0.15 + 0.055 * max(len(name) for name, _ in rows)  # inches of a letter
    cell_height = cell * first.height / first.width
    width = margin + len(column_names) * (cell + gap)
    height = title + len(rows) * (cell_height + gap)
    figure, axes = _canvas(width, height)
    for row, (row_name, images) in enumerate(rows):
        bottom = height - title - row * (cell_height + gap) - cell_height
        axes.text(margin - 0.06, bottom + cell_height / 2, row_name, fontsize=6, ha="right", va="center")
        for column, image in enumerate(images):
            _put(axes, image, margin + column * (cell + gap), bottom, cell, cell_height)
    for column, name in enumerate(column_names):
        left, bottom = margin + column * (cell + gap) + 0.1 * cell, height - title + gap
        axes.text(left, bottom, name.replace("_", " "), fontsize=6, color="#333333", rotation=35)
    return figure


def plot_results(panels: Sequence[tuple[str, Sequence[tuple[str, str, float, float]]]]) -> Figure:
    """Draws results as bars, a panel for each task, models in colour and what they are compared with in gray.

    Args:
        panels: Title and bars of each panel; a bar is a name, a kind ("model", "untrained" or "baseline"), a value and
            a standard deviation, 0 for none.

    Returns:
        A figure of its own, as of [`plot_reconstructions`].

    Raises:
        ValueError: If there is no panel.
        ImportError: If matplotlib is missing.
    """
    Figure = _figure_class()
    if not panels:
        raise ValueError("There is no panel to draw: pass the results of one task at least.")
    colors = {"model": "#3b6fb6", "untrained": "#a9bfdd", "baseline": "#b9b9b9"}
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    bar, head = 0.17, 0.55  # inches
    most_bars = max(len(bars) for _, bars in panels)
    height = num_rows * (most_bars * bar + head)
    figure = Figure(figsize=(3.4 * num_columns, height), dpi=150, facecolor="white", layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, bars) in zip(grid.flat, panels, strict=False):
        names, kinds, values, spreads = zip(*bars, strict=True) if bars else ((), (), (), ())
        places = range(len(bars))
        axes.barh(
            places, values, xerr=spreads, height=0.7, color=[colors[kind] for kind in kinds], error_kw={"lw": 0.7}
        )
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", fontsize=5, va="center")
        axes.set_yticks(places, names, fontsize=5.5)
        axes.set_ylim(most_bars - 0.4, -0.6)  # equal bars in all panels, the first on top
        axes.set_title(title, fontsize=7.5, color="#333333", loc="left")
        axes.tick_params(axis="x", labelsize=5.5, length=2)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def plot_moving_object(
    images: Tensor | Sequence[Image.Image], position: Tensor, tracks: Mapping[str, Mapping[str, Tensor]]
) -> Figure:
    """Draws an object on its way across a scene, and what models make of it: S should stay, and L should move.

    Below the pictures is a row for each model, in which the map of the object's token lights the picture as in
    [`plot_reconstructions`]. A dot marks the object's center. Then follow two curves for each model over the object's
    true x: the cosine of the object's token and the first picture's, with that of the other tokens as a dashed line,
    and the x of the map's centroid, which is right on the gray line.

    Args:
        images: M pictures: (M, 3, H, W) floating point RGB in [0, 1], or PIL images of one size.
        position: (M, 2), (x, y) of the object's center, in [0, 1] from the left and the top.
        tracks: What [`follow_object`] gives, by the name of the model.

    Returns:
        A figure of its own, as of [`plot_reconstructions`].

    Raises:
        ValueError: If numbers disagree, or there is no model.
        ImportError: If matplotlib is missing.
    """
    Figure = _figure_class()
    pixels = _to_pixels(images)
    counts = {len(track["maps"]) for track in tracks.values()}
    if counts != {len(pixels)} or len(position) != len(pixels):
        raise ValueError(
            f"There are {len(pixels)} images, {len(position)} positions and tracks of {sorted(counts)} pictures: pass "
            "as many of each, and one model at least."
        )
    maps = {
        name: upsample_maps(track["maps"].detach().cpu().float().unsqueeze(1), pixels[0].shape[:2])[:, 0]
        for name, track in tracks.items()
    }
    lit = {
        name: [_light(image, token_map[..., None]) for image, token_map in zip(pixels, some.numpy(), strict=True)]
        for name, some in maps.items()
    }
    rows = {"": pixels, **lit}

    cell, curves = 1.1, 2.4  # inches
    width, height = 0.3 + cell * len(pixels), cell * len(rows) + curves
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=(cell * len(rows), curves)))
    _draw_pictures(above.subplots(len(rows), len(pixels), squeeze=False), rows, position.detach().cpu().float())
    _draw_tracks(below.subplots(1, 2), position[:, 0].detach().cpu().float(), tracks)
    return figure


def _draw_pictures(grid: np.ndarray, rows: Mapping[str, Sequence[np.ndarray]], position: Tensor) -> None:
    """Named rows of pictures, with a dot at the place (x, y) of each column."""
    for axes_of_row, (name, pictures) in zip(grid, rows.items(), strict=True):
        axes_of_row[0].set_ylabel(name, fontsize=7, color="#333333")
        for axes, picture, (x, y) in zip(axes_of_row, pictures, position.tolist(), strict=True):
            axes.imshow(picture, extent=(0, 1, 1, 0), interpolation="nearest")
            axes.plot(x, y, ".", color="white", markeredgecolor="black", markersize=5)
            axes.set(xticks=(), yticks=())
            axes.spines[:].set_visible(False)


def _draw_tracks(both_axes: Sequence[Axes], x: Tensor, tracks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """What stays and what moves, over the object's true x: two curves for each model."""
    token_axes, place_axes = both_axes
    colors = token_palette(2 * len(tracks))[::2]  # all of one lightness
    place_axes.plot(x, x, color="#b9b9b9", lw=0.8, label="the object")
    for (name, track), color in zip(tracks.items(), colors, strict=True):
        token_axes.plot(x, track["token_cosine"].cpu(), ".-", color=color, label=name)
        token_axes.plot(x, track["other_cosine"].cpu(), "--", color=color, lw=0.8, label=f"{name}, other tokens")
        place_axes.plot(x, track["centroid"][:, 0].cpu(), ".-", color=color, label=name)
    token_axes.set_title("what: cosine of the object's token and the first picture's", fontsize=7, loc="left")
    place_axes.set_title("where: x of the map's centroid, in widths of the image", fontsize=7, loc="left")
    for axes in both_axes:
        axes.set_xlabel("x of the object, in widths of the image", fontsize=6)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=6, frameon=False)


def tabletop_grid(scenes: Dataset, num_columns: int = 4) -> Image.Image:
    """Lays tabletop scenes in a grid, each above its mask: the objects in colors, over the image in gray.

    Args:
        scenes: Rows of `load_tabletop_scenes`.
        num_columns: Scenes side by side, at least 1.

    Returns:
        An RGB image on white. Places after the last scene are empty.

    Raises:
        ValueError: If `num_columns` is less than 1.
    """
    if num_columns < 1:
        raise ValueError(f"num_columns is {num_columns}, but a grid needs at least 1.")
    rows = scenes.with_format("numpy")[:]
    size, gap = rows["mask"].shape[-1], 4
    palette = np.concatenate([np.zeros((1, 3)), token_palette(rows["shape"].shape[1])])
    num_rows = -(-len(scenes) // num_columns)
    grid = Image.new("RGB", (num_columns * (size + gap) - gap, num_rows * (2 * size + 3 * gap) - 2 * gap), "white")
    for index, (image, mask) in enumerate(zip(scenes["image"], rows["mask"], strict=True)):
        (pixels,) = _to_pixels([image])
        objects = torch.from_numpy(np.stack([mask == slot for slot in range(len(palette))])).double()
        gray, painted = (_blend(pixels, objects, palette, strength) for strength in (0, 0.6))
        painted = np.where(mask[..., None] > 0, painted, gray)
        left, top = index % num_columns * (size + gap), index // num_columns * (2 * size + 3 * gap)
        grid.paste(image, (left, top))
        grid.paste(Image.fromarray((painted * 255 + 0.5).astype(np.uint8)), (left, top + size + gap))
    return grid


class _ShownInNotebooks:
    """A figure that notebooks show, also where pyplot, which would tell them how, was not imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")  # type: ignore[attr-defined]
        return file.getvalue()


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib; install it with: pip install matplotlib") from error
    return type("ShownFigure", (_ShownInNotebooks, Figure), {})


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure and its only axes, whose coordinates are inches: axes for each image would take seconds."""
    figure = _figure_class()(figsize=(width, height), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def _put(axes: Axes, panel: np.ndarray | Image.Image, left: float, bottom: float, width: float, height: float) -> None:
    place = (left, left + width, bottom, bottom + height)
    axes.imshow(panel, interpolation="nearest", aspect="auto", extent=place)


def _blend(pixels: np.ndarray, maps: Tensor, palette: np.ndarray, strength: float) -> np.ndarray:
    """Mixes the gray image (H, W, 3) with the palette's colours weighted by maps (r, H, W)."""
    colors = np.einsum("thw,tc->hwc", maps.numpy(), palette)
    gray = pixels @ np.array([[0.299], [0.587], [0.114]])
    return ((1 - strength) * gray + strength * colors).clip(0, 1)


def _light(pixels: np.ndarray, token_map: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) under a light that is as strong as the map (H, W, 1) in [0, 1]."""
    dark = (1 - _DARKNESS) * _BACKGROUND + _DARKNESS * pixels.mean(axis=2, keepdims=True)
    return (dark + token_map * (pixels - dark)).clip(0, 1)


def _token_maps(localization: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
    return token_maps(localization.detach().cpu(), grid_size)


def _to_pixels(images: Tensor | Sequence[Tensor | Image.Image]) -> list[np.ndarray]:
    """(H, W, 3) float32 arrays in [0, 1] of one size."""
    pixels = []
    for image in images:
        if isinstance(image, Image.Image):
            array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        elif image.ndim == 3 and len(image) == 3 and image.is_floating_point():
            array = image.detach().float().cpu().permute(1, 2, 0).numpy()
        else:
            raise ValueError(
                f"An image has shape {tuple(image.shape)} and {image.dtype}, but (3, H, W) floating point in [0, 1] "
                "or a PIL image is expected."
            )
        pixels.append(array)
    if len({array.shape for array in pixels}) > 1:
        raise ValueError(
            f"Images differ in size ({sorted({array.shape[:2] for array in pixels})}): resize them first."
        )
    return pixels


def _check_localization(localization: Tensor, expected_ndim: int) -> None:
    if localization.ndim != expected_ndim:
        expected = "(N, r)" if expected_ndim == 2 else "(B, N, r)"
        raise ValueError(f"localization has shape {tuple(localization.shape)}, but {expected} is expected.")
