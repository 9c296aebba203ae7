# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stellar_hf import StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.evaluation import compression_rows, psnr, representation_size, round_localization, tokens_and_psnr
from stellar_hf.evaluation.compression import colour_palette, jpeg, patch_means
from stellar_hf.features import encode_images


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), r=st.integers(1, 6))
def test_rounded_localization_is_the_nearest_that_few_tokens_make(seed, r):
    maps = torch.randn(2, 5, r, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    assert torch.equal(round_localization(maps, r), maps)
    previous = torch.inf
    for k in range(1, r + 1):
        rounded = round_localization(maps, k)
        torch.testing.assert_close(rounded.sum(dim=-1), torch.ones(2, 5))
        assert (rounded.count_nonzero(dim=-1) == k).all() and (rounded.argmax(-1) == maps.argmax(-1)).all()
        distance = (rounded - maps).abs().sum().item()
        assert distance <= previous + 1e-5
        previous = distance
    with pytest.raises(ValueError, match=f"num_tokens is {r + 1}, but there are {r}"):
        round_localization(maps, r + 1)


@given(st.integers(1, 300), st.integers(3, 64), st.integers(1, 64))
def test_bits_grow_with_precision_and_tokens(patches, tokens, width):
    sizes = (patches, tokens, width)
    kept = [representation_size(*sizes, 16, 8, k)[1] for k in range(1, tokens)]
    assert kept == sorted(kept)
    assert representation_size(*sizes, 16, 16)[1] < representation_size(*sizes, 32, 32)[1]
    assert representation_size(patches + 1, tokens, width)[1] > representation_size(*sizes)[1]


def test_bits_by_hand():
    # S 4x32 and L 16x(4-1) numbers; with 8 bits also two limits of each token; with one token of L its 2-bit index
    assert representation_size(16, 4, 32) == (176, 176 * 32)
    assert representation_size(16, 4, 32, 8, 8) == (184, 176 * 8 + 8 * 32)
    assert representation_size(16, 4, 32, 8, 8, 1) == (128 + 8 + 16, 128 * 8 + 8 * 32 + 16 * 2)


def smooth_image(size=48, seed=0):
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)[0]


def test_other_descriptions_get_better_with_bits():
    image = smooth_image()
    cells = [24 * side**2 for side in (8, 16, 24)]  # of equal size
    for describe, sizes in ((patch_means, cells), (colour_palette, cells), (jpeg, (8000, 16000, 32000))):
        scores = [psnr(describe(image, bits)[None], image[None]).item() for bits in sizes]
        assert scores == sorted(scores) and scores[-1] > 25, describe
        assert describe(image, 10) is None
    assert psnr(patch_means(image, 24)[None], image[None]) == pytest.approx(
        psnr(image.mean(dim=(1, 2), keepdim=True).expand_as(image)[None], image[None]).item(), abs=0.05
    )


def test_palette_of_two_colours_is_exact_in_a_bit_for_each_pixel():
    image = torch.zeros(3, 16, 16)
    image[:, torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5] = 1.0
    assert torch.equal(colour_palette(image, 16 * 16 + 2 * 24 + 8), image)


def test_jpeg_is_the_largest_file_that_fits():
    image = smooth_image()
    picture = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())
    files = []
    for quality in range(1, 96):
        files.append(io.BytesIO())
        picture.save(files[-1], "JPEG", quality=quality, optimize=True)
    bits = 8 * files[59].tell()
    best = max((file for file in files if 8 * file.tell() <= bits), key=lambda file: file.tell())
    expected = torch.from_numpy(np.array(Image.open(best))).permute(2, 0, 1) / 255
    assert psnr(jpeg(image, bits)[None], image[None]) >= psnr(expected[None], image[None]) - 0.1


def test_rows_of_a_table(tiny_config):
    torch.manual_seed(0)
    model = StellarForPreTraining(tiny_config())
    images = [Image.fromarray((255 * smooth_image(32, seed).permute(1, 2, 0)).byte().numpy()) for seed in range(3)]
    processor = StellarImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    rows = compression_rows(model, [*images, b"no image"], processor, show_progress=False)
    expected = encode_images(model, images, processor, encode=tokens_and_psnr, show_progress=False).psnr.mean().item()
    ours = [row for row in rows if row["numbers"] is not None]
    names = ["float32", "float16", "8 bits", "8 bits, top 2", "8 bits, top 1"]
    assert [row["method"] for row in ours] == [f"S and L, {name}" for name in names]
    assert ours[0]["psnr"] == pytest.approx(expected, abs=1e-4) and ours[1]["psnr"] == pytest.approx(
        expected, abs=0.05
    )
    assert ours[0]["bits"] == 32 * ours[0]["numbers"] and ours[0]["bits_per_pixel"] == ours[0]["bits"] / 32**2
    assert [row["bits"] for row in ours] == sorted((row["bits"] for row in ours), reverse=True)
    assert [row["method"] for row in rows[:4]] == ["S and L, float32", "patch means", "k-means palette", "JPEG"]
    assert all(row["num_images"] == 3 for row in rows) and len({row["bits"] for row in rows[:4]}) == 1
    assert rows[-1]["method"] == "JPEG" and rows[-1]["psnr"] is None  # its headers alone are larger
