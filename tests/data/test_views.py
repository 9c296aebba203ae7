# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from stellar_hf.data import StellarViews
from stellar_hf.data.resampling import _crop_and_resize_at_once, crop_and_resize
from stellar_hf.data.views import random_boxes

VIEWS = StellarViews(num_global_views=3, num_local_views=2, global_size=24, local_size=12)
PLAIN = replace(VIEWS, jitter_probability=0, grayscale_probability=0, blur_probability=0)


@pytest.fixture
def images():
    return torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def denormalize(views, settings=VIEWS):
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
    return views * std + mean


def all_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def draw_boxes(draw, height, width):
    """Two boxes: top, left, height and width."""
    sides = [(draw(st.integers(1, height)), draw(st.integers(1, width))) for _ in range(2)]
    return [(draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w) for h, w in sides]


@pytest.mark.parametrize("crop_and_resize", [crop_and_resize, _crop_and_resize_at_once])
@given(data=st.data(), height=st.integers(1, 50), width=st.integers(1, 50), size=st.integers(1, 40))
def test_crop_and_resize_equals_antialiased_interpolation_of_the_crop(crop_and_resize, data, height, width, size):
    boxes = draw_boxes(data.draw, height, width)
    images = torch.rand(2, 3, height, width, generator=seeded(data.draw(st.integers(0, 1000))))
    crops = crop_and_resize(images, torch.tensor(boxes), size, torch.tensor([False, True])).clamp(0, 1)
    for index, (top, left, box_height, box_width) in enumerate(boxes):
        crop = images[index : index + 1, :, top : top + box_height, left : left + box_width]
        expected = interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
        expected = expected.flip(-1) if index == 1 else expected
        assert torch.allclose(crops[index], expected, atol=1e-4)


@given(data=st.data(), height=st.integers(1, 50), width=st.integers(1, 50), size=st.integers(1, 40))
def test_crops_of_bytes_are_those_of_floats_but_for_rounding(data, height, width, size):
    """Within a range that resampling does not leave: where it does, bytes are cut off twice."""
    boxes = torch.tensor(draw_boxes(data.draw, height, width))
    images = torch.randint(64, 192, (2, 3, height, width), generator=seeded(data.draw(st.integers(0, 1000))))
    flip = torch.tensor([False, True])
    crops = crop_and_resize(images.to(torch.uint8, memory_format=torch.channels_last), boxes, size, flip)
    assert crops.dtype == torch.float32
    assert torch.allclose(crops, crop_and_resize(images / 255, boxes, size, flip), rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize("size", [(40, 40), (30, 55), (64, 17)])
def test_shapes(size):
    views = VIEWS(torch.rand(2, 3, *size))
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "pixel_values": (2, 3, 24, 24),
        "global_pixel_values": (2, 3, 3, 24, 24),
        "local_pixel_values": (2, 2, 3, 12, 12),
    }
    assert all(view.dtype == torch.float32 and view.isfinite().all() for view in views.values())


def test_without_local_views_their_key_is_absent(images):
    assert replace(VIEWS, num_local_views=0)(images).keys() == {"pixel_values", "global_pixel_values"}


def test_clean_view_is_the_first_global_crop_in_its_own_colors(images):
    views = replace(VIEWS, jitter_probability=1)(images, generator=seeded())
    plain = PLAIN(images, generator=seeded())
    assert torch.equal(plain["pixel_values"], plain["global_pixel_values"][:, 0])
    assert not torch.allclose(views["pixel_values"], views["global_pixel_values"][:, 0], atol=0.1)
    # The first crop's draws come before the colours', so both settings cut the same box.
    assert torch.equal(views["pixel_values"], plain["pixel_values"])


def test_whole_image_comes_back_when_the_clean_view_is_denormalized(images):
    whole = replace(VIEWS, global_size=40, global_scale=(1, 1), ratio=(1, 1), flip=0, jitter_probability=1)
    assert torch.allclose(denormalize(whole(images)["pixel_values"]), images, atol=1e-5)
    mirrored = replace(whole, flip=1)
    assert torch.allclose(denormalize(mirrored(images)["pixel_values"]), images.flip(-1), atol=1e-5)


def test_views_stay_in_the_range_of_pixels(images):
    for view in VIEWS((images > 0.5).float(), generator=seeded()).values():
        pixels = denormalize(view)
        assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5


def test_each_view_has_its_own_crop(images):
    views = replace(PLAIN, flip=0)(images[:1].repeat(8, 1, 1, 1), generator=seeded())["global_pixel_values"].flatten(
        0, 1
    )
    assert len(views.flatten(1).unique(dim=0)) == len(views)


def test_each_view_has_its_own_colors():
    gray = torch.full((8, 3, 40, 40), 0.5)
    gray[:, 0] = 0.3
    views = replace(VIEWS, jitter_probability=1, grayscale_probability=0)(gray, generator=seeded())
    colors = denormalize(views["global_pixel_values"]).mean((-2, -1)).flatten(0, 1)
    distance = torch.cdist(colors, colors) + torch.eye(len(colors))
    assert distance.min() > 1e-4


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_factor_of_color_has_an_effect_of_its_own(images, name):
    only = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    settings = replace(VIEWS, jitter_probability=1, grayscale_probability=0, blur_probability=0)
    unchanged = replace(settings, **only)(images, generator=seeded())
    changed = replace(settings, **{**only, name: 0.4})(images, generator=seeded())
    assert torch.allclose(unchanged["global_pixel_values"][:, 0], unchanged["pixel_values"], atol=1e-4)
    assert not torch.allclose(changed["global_pixel_values"], unchanged["global_pixel_values"], atol=0.01)


def test_factors_of_brightness_fill_their_range():
    settings = replace(PLAIN, jitter_probability=1, brightness=0.4, contrast=0, saturation=0, hue=0)
    pixels = denormalize(settings(torch.full((400, 3, 32, 32), 0.5), generator=seeded())["local_pixel_values"])
    factors = pixels.mean((-3, -2, -1)) / 0.5
    assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.03


def test_hue_is_in_turns():
    red = torch.zeros(300, 3, 32, 32)
    red[:, 0] = 1
    settings = replace(PLAIN, jitter_probability=1, brightness=0, contrast=0, saturation=0, hue=1 / 6)
    colors = denormalize(settings(red, generator=seeded())["pixel_values"])
    assert torch.allclose(colors, red[:, :, :24, :24], atol=1e-4)
    colors = denormalize(settings(red, generator=seeded())["global_pixel_values"]).mean((-2, -1))
    # A sixth of a turn leads from red to yellow on one side, to magenta on the other.
    assert (colors[..., 0] > 0.99).all()
    assert colors[..., 1].max() > 0.97 and colors[..., 2].max() > 0.97


def test_grayscale_and_blur(images):
    gray = denormalize(replace(PLAIN, grayscale_probability=1)(images)["global_pixel_values"])
    assert torch.allclose(gray, gray.mean(2, keepdim=True), atol=1e-5)
    sharp = PLAIN(images, generator=seeded())["pixel_values"]
    blurred = replace(PLAIN, blur_probability=1, blur_sigma=(1.5, 2.0))(images, generator=seeded())[
        "global_pixel_values"
    ][:, 0]
    assert (blurred.diff(dim=-1).abs().mean((1, 2, 3)) < 0.5 * sharp.diff(dim=-1).abs().mean((1, 2, 3))).all()


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.3, 0.22, 0.38), (1.0, 1, 1)])
def test_probability_of_grayscale(probability, low, high):
    settings = replace(PLAIN, grayscale_probability=probability)
    views = denormalize(settings(torch.rand(150, 3, 16, 16), generator=seeded())["global_pixel_values"]).flatten(0, 1)
    is_gray = (views.amax(1) - views.amin(1)).amax((-2, -1)) < 1e-4
    assert low <= is_gray.float().mean() <= high


def test_crops_follow_the_scale():
    ramp = torch.linspace(0, 1, 101)[None, None, None, :].expand(500, 3, 101, 101)
    settings = replace(PLAIN, ratio=(1, 1), flip=0, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    for name, (low, high), size in (
        ("global_pixel_values", settings.global_scale, 24),
        ("local_pixel_values", settings.local_scale, 12),
    ):
        view = settings(ramp, generator=seeded())[name][:, :, 0]
        # The slope of the ramp between two inner pixels tells the width of the crop.
        width = (view[..., size // 2] - view[..., size // 2 - 1]).mean(-1) * 100 / 101 * size
        share = width**2
        assert low - 0.03 < share.min() < low + 0.03 and high - 0.03 < share.max() < high + 0.03
        assert abs(share.mean() - (low + high) / 2) < 0.03


COORDINATES = replace(PLAIN, image_mean=(0, 0, 0), image_std=(1, 1, 1))


def coordinates(height, width, count):
    """Images (count, 3, height, width) whose red is the row and green the column, as a share of the side."""
    rows, columns = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return torch.stack([rows, columns, torch.zeros(height, width)]).expand(count, -1, -1, -1)


def test_every_place_of_a_crop_is_equally_likely():
    """Crops of 2x2 of 4x4 pixels, which no resampling blurs, begin in each of 3x3 places; the last ones too."""
    settings = replace(
        COORDINATES, global_size=2, local_size=2, global_scale=(0.25, 0.25), ratio=(1, 1), flip=0, blur_kernel_size=1
    )
    views = settings(coordinates(4, 4, 900), generator=seeded())["pixel_values"]
    top, left = (4 * views[:, :2, 0, 0]).round().long().unbind(1)
    counts = torch.bincount(3 * top + left, minlength=9)
    assert len(counts) == 9 and (counts - 100).abs().max() < 40  # four standard deviations
    assert torch.equal((4 * views[:, 0, 1, 0]).round().long(), top + 1)


def test_the_logarithm_of_the_aspect_ratio_is_uniform():
    settings = replace(COORDINATES, global_scale=(0.25, 0.25), flip=0)
    views = settings(coordinates(240, 240, 1000), generator=seeded())["pixel_values"]
    middle = slice(8, 16)  # at the rim, the resampling bends the ramp
    height, width = (views[:, axis, middle, middle].diff(dim=1 + axis).mean((1, 2)) * 24 for axis in (0, 1))
    assert (height * width - 0.25).abs().max() < 0.01
    place = (width / height).log() / np.log(4 / 3)  # -1 to 1
    assert place.min() < -0.97 and place.max() > 0.97
    for bound in (-0.5, 0, 0.5):
        assert abs((place < bound).float().mean() - (bound + 1) / 2) < 0.06


@pytest.mark.parametrize(("flip", "low", "high"), [(0.0, 0, 0), (0.3, 0.25, 0.35), (1.0, 1, 1)])
def test_probability_of_a_flip(flip, low, high):
    views = replace(COORDINATES, flip=flip)(coordinates(40, 40, 1000), generator=seeded())
    for name in ("pixel_values", "global_pixel_values", "local_pixel_values"):
        pixels = views[name].flatten(0, -4) if views[name].ndim == 5 else views[name]
        is_flipped = pixels[:, 1, 0, -1] < pixels[:, 1, 0, 0]
        assert low <= is_flipped.float().mean() <= high
        assert (pixels[:, 0, -1, 0] > pixels[:, 0, 0, 0]).all()  # never upside down


@given(data=st.data())
def test_no_view_of_an_image_of_the_decode_size_is_enlarged(data):
    """Whatever the shape of the image: all crops have at least the pixels of the view."""
    share = data.draw(st.floats(0.04, 1))
    local_share = data.draw(st.floats(0.04, 1))
    settings = StellarViews(
        global_size=data.draw(st.integers(16, 64)),
        local_size=data.draw(st.integers(16, 64)),
        global_scale=(share, 1.0),
        local_scale=(local_share, 1.0),
        ratio=data.draw(st.sampled_from([(3 / 4, 4 / 3), (1, 1), (0.5, 1.0), (1.0, 3.0)])),
        num_local_views=data.draw(st.integers(0, 1)),
    )
    short = settings.decode_size
    long = round(short * data.draw(st.floats(1, 3)))
    size = data.draw(st.sampled_from([(short, long), (long, short)]))
    smallest = lambda *shape: torch.zeros(64, *shape)  # noqa: E731  the smallest share, the lowest aspect ratio
    highest = lambda *shape: 1 - 1e-7 - torch.zeros(64, *shape)  # noqa: E731
    seeds = seeded(data.draw(st.integers(0, 1000)))
    uniform = lambda *shape: torch.rand(64, *shape, generator=seeds)  # noqa: E731
    crops = [(settings.global_size, settings.global_scale)]
    if settings.num_local_views:
        crops.append((settings.local_size, settings.local_scale))
    for view_size, scale in crops:
        for rand in (smallest, highest, uniform):
            boxes = random_boxes(rand, torch.tensor(size).expand(64, 2), (scale[0], scale[0]), settings.ratio)
            assert boxes[:, 2:].min() >= view_size


def test_the_decode_size_is_no_larger_than_needed():
    settings = replace(StellarViews(), num_local_views=0)
    assert settings.decode_size == 432
    assert StellarViews().decode_size == 453  # for local views of 96 pixels
    source = seeded()
    smaller = torch.tensor([[425, 425]]).expand(2000, 2)
    rand = lambda *shape: torch.rand(2000, *shape, generator=source)  # noqa: E731
    boxes = random_boxes(rand, smaller, (0.36, 0.36), settings.ratio)
    assert boxes[:, 2:].min() < 224


def test_generator_decides_the_views(images):
    assert all_equal(VIEWS(images, generator=seeded(1)), VIEWS(images, generator=seeded(1)))
    assert not all_equal(VIEWS(images, generator=seeded(1)), VIEWS(images, generator=seeded(2)))
    torch.manual_seed(1)
    assert all_equal(VIEWS(images), VIEWS(images, generator=seeded(1)))


def test_bytes_and_floats_give_the_same_views_but_for_rounding():
    images = torch.rand(2, 3, 5, 5, generator=seeded())
    images = (255 * interpolate(images, size=(40, 40), mode="bilinear")).round()
    floats = VIEWS(images / 255, generator=seeded())
    for name, views in VIEWS(images.to(torch.uint8), generator=seeded()).items():
        assert (denormalize(views) - denormalize(floats[name])).abs().max() < 4 / 255


def test_views_of_a_large_batch_are_those_of_its_images():
    """A batch that is worked on in parts."""
    settings = replace(VIEWS, num_global_views=2, num_local_views=0, global_size=160)
    images = torch.rand(16, 3, 40, 40, generator=seeded())
    views = settings(images, generator=seeded())["global_pixel_values"]
    for index in (0, 7, 15):
        alone = settings(images[index].expand_as(images), generator=seeded())["global_pixel_values"]
        torch.testing.assert_close(views[index], alone[index], rtol=0, atol=1e-5)


def test_images_in_a_padded_batch_have_the_views_that_they_have_alone():
    images = [torch.rand(3, 40, 30), torch.rand(3, 25, 50)]
    canvas = torch.rand(2, 3, 40, 50)  # what lies beside an image is never seen
    for image, target in zip(images, canvas, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    together = VIEWS(canvas, torch.tensor([[40, 30], [25, 50]]), generator=seeded())
    for index, image in enumerate(images):
        alone = VIEWS(image.expand(2, -1, -1, -1), generator=seeded())
        for name, views in together.items():
            torch.testing.assert_close(views[index], alone[name][index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_sizes", [[[40, 41]], [[40, 0]], [[40, 40], [40, 40]], [40], [[40.0, 40.0]]])
def test_sizes_that_do_not_fit_are_refused(image_sizes):
    with pytest.raises(ValueError, match="image_sizes are"):
        VIEWS(torch.rand(1, 3, 40, 40), torch.tensor(image_sizes))
    with pytest.raises(ValueError, match="image_sizes are"):
        VIEWS(torch.rand(1, 3, 40, 40), image_sizes)


def test_a_number_is_no_generator(images):
    with pytest.raises(ValueError, match="generator is a int"):
        VIEWS(images, generator=5)


def test_autocast_and_gradients_leave_the_views_alone(images):
    expected = VIEWS(images, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all_equal(VIEWS(images.requires_grad_(), generator=seeded()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_cpu_generator_gives_the_same_views_on_an_accelerator(images):
    views = VIEWS(images.cuda(), generator=seeded())
    expected = VIEWS(images, generator=seeded())
    assert all(views[name].is_cuda and torch.allclose(views[name].cpu(), expected[name], atol=1e-3) for name in views)


def test_normalized_images_are_refused(images):
    with pytest.raises(ValueError, match="the views normalize them"):
        VIEWS(VIEWS(images)["pixel_values"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "a NoneType"),
        ([torch.rand(3, 20, 20)], "a list"),
        (np.zeros((1, 3, 20, 20), np.uint8), "a ndarray"),
        (torch.rand(0, 3, 20, 20), r"shape \(0, 3, 20, 20\)"),
        (torch.rand(3, 20, 20), r"shape \(3, 20, 20\)"),
        (torch.rand(2, 1, 20, 20), r"shape \(2, 1, 20, 20\)"),
        (torch.ones(2, 3, 20, 20, dtype=torch.long), "torch.int64"),
        (torch.full((2, 3, 20, 20), torch.nan), "nan"),
    ],
)
def test_images_of_another_kind_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        VIEWS(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_global_views": 0}, "num_global_views is 0"),
        ({"num_global_views": "3"}, "num_global_views is '3', but it must be a whole number"),
        ({"num_local_views": -1}, "num_local_views is -1"),
        ({"global_size": 24.5}, "global_size is 24.5"),
        ({"global_scale": 0.5}, "global_scale is 0.5"),
        ({"local_scale": ("a", "b")}, "local_scale is"),
        ({"blur_sigma": (1, float("inf"))}, "blur_sigma is"),
        ({"flip": None}, "flip is None"),
        ({"brightness": float("nan")}, "brightness is nan"),
        ({"image_mean": (float("nan"), 0, 0)}, "image_mean is"),
        ({"image_mean": None}, "image_mean is None"),
        ({"global_scale": (0.5, 1.5)}, "global_scale is"),
        ({"local_scale": (0.4, 0.1)}, "local_scale is"),
        ({"ratio": (0, 1)}, "ratio is"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"hue": 0.7}, "hue is 0.7"),
        ({"blur_kernel_size": 4}, "odd"),
        ({"local_size": 4}, "local_size is 4, too small for blur_kernel_size 9"),
        ({"image_std": (1, 0, 1)}, "image_std"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StellarViews(**settings)


def test_smallest_view_that_the_kernel_fits():
    views = replace(VIEWS, local_size=5, blur_probability=1)(torch.rand(2, 3, 20, 20))
    assert views["local_pixel_values"].isfinite().all()


def test_importing_the_package_needs_no_torch():
    code = (
        "import sys, stellar_hf.data as data; assert not {'torch', 'datasets'} & set(sys.modules); "
        "assert set(data.__all__) <= set(dir(data)); data.StellarViews()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
