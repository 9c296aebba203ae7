# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Changes of colours, beside Kornia's and those of Python's colorsys."""

import colorsys
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kornia import color, enhance, filters

from stellar_hf.data.colors import ColorChanges, change_colors_, gaussian_blur, jitter, luminance, to_gray, turn_hue


def pictures(seed, count=4):
    """Images (count, 3, 12, 15) in [0, 1]; of noise, and of few levels, so that channels are equal, zero and one."""
    images = torch.rand(count, 3, 12, 15, generator=torch.Generator().manual_seed(seed))
    images[::2] = (3 * images[::2]).floor() / 2
    return images


seeds = st.integers(0, 10**6)


def strengths(low, high, count=4):
    return st.lists(st.floats(low, high, width=32), min_size=count, max_size=count).map(torch.tensor)


def close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@given(seed=seeds, turns=strengths(-1, 1))
def test_hue(seed, turns):
    images = pictures(seed)
    close(turn_hue(images, turns), enhance.adjust_hue(images, 2 * math.pi * turns))


@given(
    pixel=st.tuples(*[st.floats(0, 1, width=32)] * 3),
    turn=st.one_of(st.floats(-1, 1, width=32), st.integers(-6, 6).map(lambda sixths: sixths / 6)),
)
def test_hue_of_a_pixel(pixel, turn):
    turned = turn_hue(torch.tensor(pixel).view(1, 3, 1, 1), torch.tensor([turn])).flatten()
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    close(turned, torch.tensor(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)))


@given(seed=seeds, first=strengths(-0.5, 0.5), second=strengths(-0.5, 0.5))
def test_turns_add_up_and_leave_value_and_saturation(seed, first, second):
    images = pictures(seed)
    turned = turn_hue(images, first)
    close(turned.amax(1), images.amax(1))
    close(turned.amin(1), images.amin(1))
    close(turn_hue(turned, second), turn_hue(images, first + second))


@given(
    seed=seeds,
    brightness=strengths(0, 2),
    contrast=strengths(0, 2),
    saturation=strengths(0, 2),
    hue=strengths(-0.5, 0.5),
)
def test_jitter(seed, brightness, contrast, saturation, hue):
    images = pictures(seed)
    expected = enhance.adjust_brightness_accumulative(images, brightness)
    expected = enhance.adjust_contrast_with_mean_subtraction(expected, contrast)
    expected = enhance.adjust_saturation_with_gray_subtraction(expected, saturation)
    expected = enhance.adjust_hue(expected, 2 * math.pi * hue)
    close(jitter(images, brightness, contrast, saturation, hue), expected)
    assert torch.equal(images, pictures(seed))


def test_gray():
    images = pictures(0)
    close(luminance(images), color.rgb_to_grayscale(images))
    assert torch.equal(to_gray(images), luminance(images).repeat(1, 3, 1, 1))


@pytest.mark.parametrize("kernel_size", [1, 3, 9, 23])
@given(seed=seeds, sigma=strengths(0.125, 4))
def test_blur(kernel_size, seed, sigma):
    images = pictures(seed)
    expected = filters.gaussian_blur2d(images, kernel_size, sigma[:, None].expand(-1, 2))
    close(gaussian_blur(images, sigma, kernel_size), expected)


@given(data=st.data(), seed=seeds)
def test_each_change_is_made_to_the_images_drawn_for_it(data, seed):
    chosen = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=4, max_size=4))) for _ in range(3)]
    factors = torch.tensor([0.6, 0.8, 1.1, 1.3])
    images = pictures(seed)
    changed = change_colors_(images.clone(), ColorChanges(*chosen, *[factors] * 3, factors - 1, factors), 5)
    for index, (jittered, gray, blurred) in enumerate(torch.stack(chosen, dim=1).tolist()):
        expected, factor = images[index : index + 1], factors[index : index + 1]
        if jittered:
            expected = jitter(expected, factor, factor, factor, factor - 1)
        if gray:
            expected = to_gray(expected)
        if blurred:
            expected = gaussian_blur(expected, factor, 5)
        close(changed[index : index + 1], expected)
