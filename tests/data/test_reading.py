# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""One reader: whatever the form of an image, training, the image processors and the pipeline see the same picture."""

import io
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline
from stellar_hf.data import StellarCollator, images_to_tensor, read_image
from stellar_hf.image_processing_pil_stellar import to_rgb

SIZE = (6, 4)  # width, height
GRAY = np.linspace(0, 255, 24).round().astype(np.uint8).reshape(4, 6)
COLORS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
CORAL = (240, 120, 80)


def reopened(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def of_16_bits(mode):
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    return Image.frombytes(mode, SIZE, (GRAY.astype(dtype) * 257).astype(dtype).tobytes())


def half_transparent(mode):
    """The upper half transparent over a hidden colour, the lower half opaque."""
    alpha = np.zeros((4, 6), np.uint8)
    alpha[2:] = 255
    pixels = GRAY if mode == "LA" else COLORS
    return Image.fromarray(np.dstack([pixels, alpha]))


def palette_image(transparency):
    """Two colours of a palette, the first one transparent."""
    image = Image.frombytes("P", SIZE, bytes([0] * 12 + [1] * 12))
    image.putpalette([255, 0, 0, 0, 0, 255])
    return reopened(image, transparency=transparency)


def as_rgb(gray):
    return np.repeat(gray[:, :, None], 3, axis=2)


def over(background, pixels):
    """Pixels whose upper half shows the background."""
    return np.concatenate([np.broadcast_to(np.uint8(background), (2, 6, 3)), pixels[2:]])


BLUE = np.broadcast_to(np.uint8([0, 0, 255]), (4, 6, 3))
OPAQUE = {
    "16 bits": lambda: (of_16_bits("I;16"), as_rgb(GRAY)),
    "16 bits, big endian": lambda: (of_16_bits("I;16B"), as_rgb(GRAY)),
    "16 bits in 32": lambda: (of_16_bits("I"), as_rgb(GRAY)),
    "8 bits in 32": lambda: (Image.fromarray(GRAY.astype(np.int32)), as_rgb(GRAY)),
    "16-bit PNG": lambda: (reopened(of_16_bits("I;16")), as_rgb(GRAY)),
    "16-bit TIFF": lambda: (reopened(of_16_bits("I;16"), "TIFF"), as_rgb(GRAY)),
    "gray": lambda: (Image.fromarray(GRAY), as_rgb(GRAY)),
    "RGB": lambda: (Image.fromarray(COLORS), COLORS),
}
TRANSPARENT = {
    "RGBA": lambda: (half_transparent("RGBA"), COLORS),
    "LA": lambda: (half_transparent("LA"), as_rgb(GRAY)),
    "premultiplied": lambda: (half_transparent("RGBA").convert("RGBa"), COLORS),
    "premultiplied gray": lambda: (half_transparent("LA").convert("La"), as_rgb(GRAY)),
    "palette, one colour": lambda: (palette_image(0), BLUE),
    "palette, a byte for each colour": lambda: (palette_image(b"\0\xff"), BLUE),
    "PA": lambda: (palette_image(b"\0\xff").convert("RGBA").convert("PA"), BLUE),
    "RGB with a transparent colour": lambda: (reopened(Image.fromarray(HIDDEN), transparency=(1, 2, 3)), COLORS),
    "16 bits with a transparent value": lambda: (with_transparent_value(), as_rgb(GRAY)),
}
HIDDEN = np.concatenate([np.broadcast_to(np.uint8([1, 2, 3]), (2, 6, 3)), COLORS[2:]])


def with_transparent_value():
    values = GRAY.astype(np.uint16) * 257
    values[:2] = 777
    return reopened(Image.fromarray(values), transparency=777)


@pytest.fixture(scope="module")
def processor():
    return StellarImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False)


@pytest.fixture(scope="module")
def pipe(tiny_config):
    torch.manual_seed(0)
    model = StellarForImageReconstruction(tiny_config()).eval()
    return StellarPipeline(image_processor=StellarImageProcessorPil(), model=model)


def seen_by_processor(processor, image, **options):
    pixels = processor(image, **options).pixel_values[0]
    return (np.asarray(pixels) * 255).round().astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("name", [*OPAQUE, *TRANSPARENT])
def test_training_processor_and_pipeline_see_the_same_picture(processor, pipe, name):
    image, pixels = {**OPAQUE, **TRANSPARENT}[name]()
    expected = over((255, 255, 255), pixels) if name in TRANSPARENT else pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tensor,) = images_to_tensor([image])
        by_processor = seen_by_processor(processor, image)
        tokens, localization = pipe.encode(image)
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), expected)
    np.testing.assert_array_equal(by_processor, expected)
    expected_tokens, expected_localization = pipe.encode(Image.fromarray(np.ascontiguousarray(expected)))
    assert torch.equal(tokens, expected_tokens) and torch.equal(localization, expected_localization)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_the_background_of_transparent_pixels_can_be_chosen(processor, pipe, tmp_path, name):
    image, pixels = TRANSPARENT[name]()
    expected = over(CORAL, pixels)
    batch = StellarCollator(background=CORAL)([{"image": image}])
    np.testing.assert_array_equal(batch["images"][0].permute(1, 2, 0).numpy(), expected)
    np.testing.assert_array_equal(seen_by_processor(processor, image, background=CORAL), expected)
    StellarImageProcessorPil(
        do_resize=False, do_center_crop=False, do_normalize=False, background=CORAL
    ).save_pretrained(tmp_path)
    saved = StellarImageProcessorPil.from_pretrained(tmp_path)
    np.testing.assert_array_equal(seen_by_processor(saved, image), expected)
    tokens, _ = StellarPipeline(image_processor=StellarImageProcessorPil(background=CORAL), model=pipe.model).encode(
        image
    )
    assert torch.equal(tokens, pipe.encode(Image.fromarray(expected))[0])


def test_settings_that_were_saved_without_a_background_mean_white(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"background"', '"other"'))
    image, pixels = TRANSPARENT["RGBA"]()
    loaded = StellarImageProcessorPil.from_pretrained(tmp_path)
    np.testing.assert_array_equal(seen_by_processor(loaded, image), over((255, 255, 255), pixels))


@pytest.mark.parametrize("as_array", [np.asarray, lambda x: torch.from_numpy(np.array(x))], ids=["numpy", "torch"])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("background", [(255, 255, 255), CORAL])
def test_arrays_with_transparency_are_the_picture_of_the_same_image(processor, as_array, channels_first, background):
    image = Image.fromarray(COLORS).resize((12, 8))
    image.putalpha(Image.fromarray(GRAY).resize((12, 8)))
    array = np.moveaxis(np.asarray(image), 2, 0) if channels_first else np.asarray(image)
    expected = seen_by_processor(processor, image, background=background)
    np.testing.assert_array_equal(seen_by_processor(processor, as_array(array), background=background), expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "L", "RGBA"])
def test_files_of_any_depth_are_upright(mode):
    image = of_16_bits(mode) if mode.startswith("I") else Image.fromarray(GRAY).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = reopened(image, "TIFF" if mode == "I;16B" else "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(rotated)), as_rgb(np.rot90(GRAY, -1)))


@pytest.mark.parametrize(
    ("image", "background", "message"),
    [
        (Image.new("F", SIZE), (0, 0, 0), "floating-point pixels"),
        (Image.new("I", SIZE, 70000), (0, 0, 0), "pixels from 0 to 70000|from 70000"),
        (Image.new("I", SIZE, -1), (0, 0, 0), "pixels from -1 to -1"),
        ("photo.png", (0, 0, 0), "is a str"),
        (Image.new("RGB", SIZE), (0, 0, 256), r"background is \(0, 0, 256\)"),
        (Image.new("RGB", SIZE), "white", "background is 'white'"),
    ],
)
def test_what_has_no_picture_is_refused(image, background, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image, background)


def test_files_that_programs_would_have_to_draw_are_refused(tmp_path):
    file = tmp_path / "drawing.png"  # a suffix says nothing about what Pillow makes of a file
    Image.fromarray(COLORS).save(file, "EPS")
    with pytest.raises(ValueError, match="drawing.png cannot be read: unknown format"):
        read_image(file)


def test_pipes_are_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.png")
    for image in (tmp_path / "photo.png", {"bytes": None, "path": str(tmp_path / "photo.png")}):
        with pytest.raises(ValueError, match="photo.png cannot be read: it is no regular file"):
            read_image(image)


def test_files_behind_urls_are_read():
    import fsspec

    with fsspec.open("memory://photos/a.png", "wb") as file:
        Image.fromarray(COLORS).save(file, "PNG")
    image = read_image({"bytes": None, "path": "memory://photos/a.png"})
    np.testing.assert_array_equal(np.asarray(image), COLORS)
