# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import io
import sys

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from stellar_hf.localization_stellar import resolve_grid_size
from stellar_hf.visualization import (
    plot_edits,
    plot_image_grid,
    plot_moving_object,
    plot_reconstructions,
    tabletop_grid,
    token_overlay,
    token_palette,
)


def example(batch: int = 3, patches: int = 16, tokens: int = 5, size: tuple[int, int] = (32, 32)):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *size, generator=generator)
    localization = torch.randn(batch, patches, tokens, generator=generator).mul(3).softmax(-1)
    return images, 1.3 * images - 0.1, localization


def test_figure_has_a_row_per_image_and_a_column_per_token():
    figure = plot_reconstructions(*example(), num_images=2)
    (axes,) = figure.axes  # axes of its own for each panel would take a second and more for each figure
    lefts, _, bottoms, _ = zip(*(panel.get_extent() for panel in axes.images), strict=True)
    assert (len(axes.images), len(set(lefts)), len(set(bottoms))) == (2 * (3 + 5), 3 + 5, 2)
    names = ["image", "reconstruction", "tokens", "0", "1", "2", "3", "4"]
    assert [text.get_text() for text in axes.texts] == names
    for text, panel in zip(axes.texts, axes.images, strict=False):
        left, right, _, top = panel.get_extent()
        assert left < text.get_position()[0] < right and text.get_position()[1] > top
    assert not axes.axison


def test_figure_shows_images_reconstructions_and_what_each_map_lights():
    images, reconstructions, localization = example()
    images[0, :, 4::8, 4::8] = 0.9  # a pixel of each patch
    localization[0, :, 0], localization[0, :, 1] = torch.arange(16) / 15, 1 - torch.arange(16) / 15
    localization[0, :, 2:] = 0
    (axes,) = plot_reconstructions(images, reconstructions, localization).axes
    panels = [np.asarray(panel.get_array()) for panel in axes.images]
    np.testing.assert_allclose(panels[0], images[0].permute(1, 2, 0))
    np.testing.assert_allclose(panels[1], reconstructions[0].clamp(0, 1).permute(1, 2, 0))
    first, second, absent = panels[3:6]
    for token, lit in ((first, (-1, -1)), (second, (0, 0))):
        np.testing.assert_allclose(token[lit], panels[0][lit], atol=1e-6)
    assert np.all(np.diff(first[4::8, 4::8, 0].flatten()) > 0)  # brighter with every step of the map
    assert np.all(np.diff(second[4::8, 4::8, 0].flatten()) < 0)
    assert absent.max() < 0.3


def test_figure_draws_each_panel_at_its_place():
    images = torch.zeros(2, 3, 16, 32)
    images[0, 0], images[1, 2] = 1, 1  # red, and blue below it
    figure = plot_reconstructions(images, 1 - images, torch.full((2, 8, 3), 1 / 3), grid_size=(2, 4))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    drawn = Image.open(file).convert("RGB")
    for panel, color in zip(figure.axes[0].images[::6], [(255, 0, 0), (0, 0, 255)], strict=True):
        left, right, bottom, top = panel.get_extent()  # in inches from the lower left corner
        assert drawn.getpixel((int(50 * (left + right)), drawn.height - int(50 * (bottom + top)))) == color


def test_figure_saves_to_png_without_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import fails
    file = io.BytesIO()
    plot_reconstructions(*example(), num_images=1).savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_notebook_shows_a_figure_without_pyplot():
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    shown, _ = formatter.format(plot_reconstructions(*example(), num_images=1))
    assert shown["image/png"].startswith(b"\x89PNG")


def test_figure_takes_pil_images_and_grids_that_are_not_square():
    images, reconstructions, localization = example(patches=8, size=(16, 32))
    pil = [Image.fromarray(np.uint8(image.permute(1, 2, 0) * 255)) for image in images]
    figure = plot_reconstructions(pil, reconstructions, localization, grid_size=(2, 4))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    width, height = Image.open(io.BytesIO(file.getvalue())).size
    assert width > height


def test_missing_matplotlib_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_reconstructions(*example())


def test_overlay_has_the_size_of_the_image_and_the_colours_of_the_tokens():
    localization = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    palette = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    overlay = token_overlay(Image.new("RGB", (24, 16)), localization, palette=palette, strength=1.0)
    assert (overlay.size, overlay.mode) == ((24, 16), "RGB")
    assert overlay.getpixel((0, 0)) == (255, 0, 0)
    assert overlay.getpixel((23, 15)) == (0, 0, 255)


def test_overlay_without_strength_is_the_gray_image():
    image = torch.rand(3, 8, 8)
    overlay = np.asarray(token_overlay(image, torch.full((4, 2), 0.5), strength=0.0))
    assert (overlay == overlay[..., :1]).all()
    expected = np.asarray(Image.fromarray(np.uint8(image.permute(1, 2, 0) * 255 + 0.5)).convert("L"))
    np.testing.assert_allclose(overlay[..., 0], expected, atol=2)


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 16])
def test_palette_colours_are_valid_and_distinct(num_tokens):
    palette = token_palette(num_tokens)
    assert palette.shape == (num_tokens, 3)
    assert (palette >= 0).all() and (palette <= 1).all()
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert (distances[~np.eye(num_tokens, dtype=bool)] > 0.08).all()


def test_grid_of_a_square_number_of_patches_needs_no_size():
    assert resolve_grid_size(196) == (14, 14)
    assert resolve_grid_size(6, (2, 3)) == (2, 3)


def test_impossible_inputs_are_named():
    images, reconstructions, localization = example(patches=12)
    with pytest.raises(ValueError, match="12 patches and grid_size is None"):
        plot_reconstructions(images, reconstructions, localization)
    with pytest.raises(ValueError, match=r"12 patches and grid_size is \(2, 5\)"):
        token_overlay(images[0], localization[0], grid_size=(2, 5))
    with pytest.raises(ValueError, match="3 images, 2 reconstructions and 3 localization"):
        plot_reconstructions(images, reconstructions[:2], localization, grid_size=(3, 4))
    with pytest.raises(ValueError, match="floating point"):
        plot_reconstructions((images * 255).byte(), reconstructions, localization, grid_size=(3, 4))
    with pytest.raises(ValueError, match=r"\(3, 12, 5\), but \(N, r\) is expected"):
        token_overlay(images[0], localization, grid_size=(3, 4))
    with pytest.raises(ValueError, match="num_images is 0"):
        plot_reconstructions(images, reconstructions, localization, grid_size=(3, 4), num_images=0)
    with pytest.raises(ValueError, match="5 tokens need"):
        token_overlay(images[0], localization[0], grid_size=(3, 4), palette=token_palette(4))


def test_figure_of_edits_has_images_above_their_tokens():
    images, _, localization = example(batch=2, patches=8, size=(16, 32))
    pil = [Image.fromarray(np.uint8(image.permute(1, 2, 0) * 255)) for image in images]
    figure = plot_edits(pil, list(localization), ["before", "after"], grid_size=(2, 4))
    panels = [axes.images[0].get_array() for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["before", "after", "", ""]
    for column in range(2):
        np.testing.assert_allclose(panels[column], np.asarray(pil[column]) / 255, atol=1e-6)
        painted = token_overlay(pil[column], localization[column], (2, 4), strength=0.75)
        np.testing.assert_array_equal(panels[2 + column], painted)
    long = plot_edits(pil, list(localization), ["a, tokens of another photograph", "b" * 60], grid_size=(2, 4))
    assert all(len(line) < 25 for axes in long.axes for line in axes.get_title().splitlines())
    with pytest.raises(ValueError, match="1 titles"):
        plot_edits(pil, list(localization), ["before"], grid_size=(2, 4))


def test_image_grid_has_a_panel_for_each_image():
    images = [Image.new("RGB", (20, 10), (60 * column, 0, 0)) for column in range(3)]
    figure = plot_image_grid([("real", images), ("", images)], ["red_brick", "", "c"])
    (axes,) = figure.axes
    assert [panel.get_array()[0, 0, 0] for panel in axes.images] == [0, 60, 120] * 2
    assert "red brick" in [text.get_text() for text in axes.texts]
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    drawn = Image.open(file).convert("RGB")
    for panel in axes.images:  # where it says, in inches from the lower left corner
        left, right, bottom, top = panel.get_extent()
        place = int(50 * (left + right)), drawn.height - int(50 * (bottom + top))
        assert drawn.getpixel(place) == tuple(panel.get_array()[0, 0])
    with pytest.raises(ValueError, match="'real' has 3 images for 2 columns"):
        plot_image_grid([("real", images)], ["a", "b"])
    with pytest.raises(ValueError, match="no image"):
        plot_image_grid([], [])


def test_tabletop_grid_shows_each_scene_above_its_objects_in_colors():
    gray = Image.new("RGB", (16, 16), (128, 128, 128))
    mask = [[int(column < 8) for column in range(16)] for _ in range(16)]
    features = Features(
        {"image": ImageFeature(), "mask": Array2D((16, 16), "uint8"), "shape": List(Value("int64"), 2)}
    )
    rows = {"image": [gray] * 3, "mask": [mask] * 3, "shape": [[0, -1]] * 3}
    grid = np.asarray(tabletop_grid(Dataset.from_dict(rows, features=features), num_columns=2)).astype(int)
    assert grid.shape == (2 * (2 * 16 + 3 * 4) - 2 * 4, 2 * 16 + 4, 3)
    assert (grid[:16, :16] == 128).all() and (grid[:16, 20:] == 128).all()
    assert np.ptp(grid[24, 4]) > 50 and np.ptp(grid[24, 12]) == 0
    assert (grid[-16:, 20:] == 255).all()  # after the last scene
    with pytest.raises(ValueError, match="num_columns is 0"):
        tabletop_grid(Dataset.from_dict(rows, features=features), num_columns=0)


def track(num_pictures: int) -> dict[str, torch.Tensor]:
    steps = torch.linspace(0, 1, num_pictures)
    maps = torch.zeros(num_pictures, 2, 2)
    maps[:, 0, 0] = 1
    centroid = torch.stack([0.9 * steps, steps], dim=1)
    return {"maps": maps, "token_cosine": 1 - steps, "other_cosine": 0 * steps, "centroid": centroid}


def test_a_moving_object_has_a_row_of_maps_and_two_curves_for_each_model():
    images, _, _ = example(batch=4)
    position = torch.stack([torch.linspace(0.2, 0.8, 4), torch.full((4,), 0.5)], dim=1)
    figure = plot_moving_object(images, position, {"trained": track(4), "untrained": track(4)})
    grid, (cosines, places) = figure.subfigs[0].axes, figure.subfigs[1].axes
    assert [axes.get_ylabel() for axes in grid[::4]] == ["", "trained", "untrained"]
    np.testing.assert_allclose(grid[1].images[0].get_array(), images[1].permute(1, 2, 0))
    lit = grid[4].images[0].get_array()  # where the map is 1 as it is, elsewhere dark
    np.testing.assert_allclose(lit[0, 0], images[0][:, 0, 0], atol=1e-6)
    assert lit[-1, -1].max() < 0.25
    np.testing.assert_allclose(grid[5].lines[0].get_data(), [[0.4], [0.5]], atol=1e-6)
    np.testing.assert_allclose(cosines.lines[0].get_data(), [[0.2, 0.4, 0.6, 0.8], [1, 2 / 3, 1 / 3, 0]], atol=1e-6)
    np.testing.assert_allclose(places.lines[1].get_ydata(), [0, 0.3, 0.6, 0.9], atol=1e-6)
    assert [text.get_text() for text in places.get_legend().get_texts()] == ["the object", "trained", "untrained"]


@pytest.mark.parametrize(("num_positions", "tracks"), [(3, {"a": track(4)}), (4, {"a": track(3)}), (4, {})])
def test_a_moving_object_needs_as_many_of_each(num_positions, tracks):
    images, _, _ = example(batch=4)
    with pytest.raises(ValueError, match="as many of each, and one model at least"):
        plot_moving_object(images, torch.zeros(num_positions, 2), tracks)
