# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from stellar_hf.data import StellarCollator, StellarViews, images_to_tensor

VIEWS = StellarViews(num_global_views=3, num_local_views=2, global_size=24, local_size=12)


def picture(mode="RGB", size=(30, 20), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_images_of_any_mode_become_rgb(mode):
    image = picture(mode)
    (tensor,) = images_to_tensor([image])
    assert tensor.shape == (3, 20, 30) and tensor.dtype == torch.uint8
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_arrays_files_and_undecoded_images(tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    forms = [
        image,
        np.asarray(image),
        Image.open(tmp_path / "image.png"),
        {"bytes": encoded(image, format="PNG"), "path": None},
        {"bytes": None, "path": str(tmp_path / "image.png")},
    ]
    first, *others = images_to_tensor(forms)
    assert all(torch.equal(first, other) for other in others)
    gray = np.asarray(picture("L"))
    assert torch.equal(*images_to_tensor([gray, gray[:, :, None]]))


def test_orientation_of_exif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture()
    (tensor,) = images_to_tensor([{"bytes": encoded(image, format="PNG", exif=exif), "path": None}])
    assert torch.equal(tensor, images_to_tensor([image.rotate(-90, expand=True)])[0])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_become_8(dtype):
    pixels = np.array([[0, 257, 65535]], dtype=dtype)
    (tensor,) = images_to_tensor([Image.fromarray(pixels)])
    assert tensor[:, 0].tolist() == [[0, 1, 255]] * 3


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_corrupt_file_is_named(tmp_path, format, share):
    file = tmp_path / "broken.img"
    data = encoded(picture(size=(90, 80)), format=format)
    file.write_bytes(data[: int(share * len(data))])
    for image in ({"bytes": None, "path": str(file)}, {"bytes": file.read_bytes(), "path": "broken.img"}):
        with pytest.raises(ValueError, match=r"broken.img cannot be read"):
            images_to_tensor([picture(), image])


def test_file_that_is_no_image_is_named():
    with pytest.raises(ValueError, match=r"^notes.txt cannot be read: unknown format"):
        images_to_tensor([{"bytes": b"no image at all", "path": "notes.txt"}])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "a NoneType"),
        (b"bytes", "a bytes"),
        ({"bytes": b"", "path": None}, "it is empty"),
        ({"bytes": 5, "path": "a.png"}, "a.png cannot be read"),
        ({}, "an empty dict"),
        ("missing.png", "missing.png cannot be read: .*No such file"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (Image.new("RGB", (0, 4)), "no pixels: it is 0 wide and 4 high"),
        (np.zeros((4, 4, 3)), "a float64 array"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (Image.new("F", (4, 4)), "floating-point pixels"),
    ],
)
def test_things_that_are_no_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        images_to_tensor([image])


def test_collator_pads_images_of_different_sizes():
    images = [picture(size=(30, 20)), picture("L", size=(16, 40)), picture("RGBA", size=(20, 20))]
    batch = StellarCollator("picture")([{"picture": image, "label": 1} for image in images])
    assert batch.keys() == {"images", "image_sizes"}
    assert batch["images"].shape == (3, 3, 40, 30) and batch["images"].dtype == torch.uint8
    assert batch["image_sizes"].tolist() == [[20, 30], [40, 16], [20, 20]]
    for padded, tensor in zip(batch["images"], images_to_tensor(images), strict=True):
        height, width = tensor.shape[1:]
        assert torch.equal(padded[:, :height, :width], tensor)
        assert not padded[:, height:].any() and not padded[:, :, width:].any()


def test_collator_that_makes_the_views():
    examples = [{"image": picture(mode, seed=seed)} for seed, mode in enumerate(("RGB", "L", "P", "RGBA"))]
    torch.manual_seed(0)
    batch = StellarCollator(views=VIEWS)(examples)
    tensors = torch.stack(images_to_tensor([example["image"] for example in examples]))
    expected = VIEWS(tensors, generator=torch.Generator().manual_seed(0))
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (133, 100)), ((90, 60), (90, 60)), ((1000, 100), (300, 30)), ((100, 900), (33, 300))],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_large_images_are_reduced_once(size, expected, format):
    gradient = np.linspace(0, 255, size[0], dtype=np.uint8)[None, :, None].repeat(size[1], 0).repeat(3, 2)
    file = {"bytes": encoded(Image.fromarray(gradient), format=format), "path": None}
    (tensor,) = images_to_tensor([file], decode_size=100)
    assert tuple(tensor.shape[1:]) == expected[::-1]
    smooth = torch.linspace(0, 255, expected[0])
    assert (tensor.float() - smooth).abs().max() < 6


def test_reducing_leaves_the_image_of_the_caller_alone():
    image = Image.open(io.BytesIO(encoded(picture(size=(400, 300)), format="JPEG")))
    images_to_tensor([image], decode_size=50)
    assert image.size == (400, 300)


def test_unreadable_images_are_replaced_and_reported(tmp_path):
    (tmp_path / "notes.jpg").write_text("no image at all")
    good, other = picture(seed=1), picture(seed=2)
    broken = {"bytes": None, "path": str(tmp_path / "notes.jpg")}
    batch = StellarCollator()([{"image": image} for image in (good, broken, {"bytes": b"", "path": None}, other)])
    expected = images_to_tensor([good, other])
    assert torch.equal(batch["images"][0], expected[0]) and torch.equal(batch["images"][3], expected[1])
    assert all(any(torch.equal(image, right) for right in expected) for image in batch["images"])
    first, second = batch["unreadable"]
    assert first == f"{tmp_path / 'notes.jpg'} cannot be read: unknown format." and "Image 2 of the batch" in second


def test_unreadable_images_are_left_out_where_that_is_asked_for():
    good, broken = {"image": picture()}, {"image": {"bytes": b"", "path": "notes.txt"}}
    collator = StellarCollator(leave_out_unreadable=True)
    batch = collator([broken, good, broken])
    assert torch.equal(batch["images"], images_to_tensor([good["image"]])[0][None])
    assert (batch["num_readable"], len(batch["unreadable"])) == (1, 2)
    nothing = collator([broken])
    assert nothing["num_readable"] == 0 and not nothing["images"].any() and len(nothing["unreadable"]) == 1
    assert "num_readable" not in collator([good])


def test_batch_without_a_readable_image_is_refused():
    with pytest.raises(ValueError, match=r"None of the 2 images .* notes.txt cannot be read"):
        StellarCollator()([{"image": {"bytes": b"nothing", "path": "notes.txt"}}] * 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([{"img": picture(), "label": 0}], "no column 'image', only 'img', 'label'"),
        ([], "an empty list"),
        (None, "a NoneType"),
        ({"image": picture()}, "a dict"),
        ([None], "An example is a NoneType"),
    ],
)
def test_what_is_no_batch_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        StellarCollator()(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_size": -4}, "decode_size is -4"),
        ({"decode_size": 0}, "decode_size is 0"),
        ({"decode_size": 2.5}, "decode_size is 2.5"),
        ({"background": "white"}, "background is 'white'"),
        ({"views": "global"}, "views is a str"),
    ],
)
def test_impossible_settings_of_the_collator_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StellarCollator(**settings)


@pytest.mark.parametrize(("images", "decode_size"), [(None, None), (picture(), None), ([picture()], 0)])
def test_impossible_arguments_of_the_reader_are_refused(images, decode_size):
    with pytest.raises(ValueError, match="but"):
        images_to_tensor(images, decode_size)


def test_workers_of_a_data_loader_draw_differently():
    examples = [{"image": picture()}] * 4
    loader = DataLoader(examples, batch_size=2, num_workers=2, collate_fn=StellarCollator(views=VIEWS))
    first, second = (batch["global_pixel_values"] for batch in loader)
    assert first.shape == (2, 3, 3, 24, 24)
    assert not torch.equal(first, second)


def test_collator_can_be_sent_to_another_process():
    collator = StellarCollator("picture", 64, VIEWS)
    assert pickle.loads(pickle.dumps(collator)) == collator
