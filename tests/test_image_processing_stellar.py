# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The image processors: what the model receives, and maps over the original image."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers.utils import ModelOutput

from stellar_hf import StellarImageProcessor, StellarImageProcessorPil
from stellar_hf.data.photo_mosaics import photograph

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def torchvision_works() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # the latter where it was built for another torch
        return False
    return True


NEEDS_TORCHVISION = pytest.mark.skipif(not torchvision_works(), reason="torchvision is missing or broken")
BACKENDS = [
    pytest.param(StellarImageProcessorPil, id="pil"),
    pytest.param(StellarImageProcessor, id="torchvision", marks=NEEDS_TORCHVISION),
]
every_backend = pytest.mark.parametrize("processor_class", BACKENDS)


def photo(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(mode)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(coarse[..., i]).resize((width, height), Image.Resampling.BILINEAR) for i in range(channels)
    ]
    return Image.merge(mode, bands) if channels > 1 else bands[0]


def reference(image: Image.Image, shortest_edge: int = 256, crop: int = 224) -> np.ndarray:
    """Resize, centre crop, rescale and normalize with PIL and NumPy alone: (3, crop, crop)."""
    width, height = image.size
    scale = shortest_edge / min(width, height)
    resized = image.convert("RGB").resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - crop) // 2, (resized.height - crop) // 2
    cropped = np.asarray(resized.crop((left, top, left + crop, top + crop)), dtype=np.float64)
    return ((cropped / 255 - MEAN) / STD).transpose(2, 0, 1)


def output(maps: torch.Tensor, **extra) -> ModelOutput:
    """A model output whose localization holds maps of shape (B, r, h, w)."""
    return ModelOutput(localization=maps.flatten(2).transpose(1, 2), **extra)


def one_hot_maps(height: int, width: int) -> torch.Tensor:
    """(1, h * w, h, w): token t has patch t, all of it."""
    return torch.eye(height * width).view(1, height * width, height, width)


def levels(pixel_values: np.ndarray) -> np.ndarray:
    """De-normalized pixels in [0, 1] of (B, 3, H, W)."""
    return np.asarray(pixel_values) * STD[:, None, None] + MEAN[:, None, None]


def assert_backends_agree(images, **settings) -> None:
    pil = StellarImageProcessorPil(**settings)(images, return_tensors="pt").pixel_values
    torchvision = StellarImageProcessor(**settings)(images, return_tensors="pt").pixel_values
    assert torchvision.shape == pil.shape
    assert torchvision.dtype == pil.dtype == torch.float32
    np.testing.assert_allclose(levels(torchvision), levels(pil), rtol=0, atol=1 / 255 + 1e-6)


@pytest.fixture
def processor() -> StellarImageProcessorPil:
    return StellarImageProcessorPil()


@NEEDS_TORCHVISION
@pytest.mark.parametrize("name", ["chelsea", "coffee", "motorcycle", "page", "retina", "text"])
def test_backends_agree_on_photographs(name):
    assert_backends_agree(photograph(name))


@NEEDS_TORCHVISION
@pytest.mark.parametrize("as_array", [np.asarray, lambda x: torch.from_numpy(np.array(x))], ids=["numpy", "torch"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_backends_agree_on_arrays(as_array, channels_first):
    array = np.array(photograph("chelsea"))
    assert_backends_agree(as_array(np.moveaxis(array, -1, 0).copy() if channels_first else array))


@NEEDS_TORCHVISION
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_backends_agree_on_pil_modes(mode):
    assert_backends_agree(photograph("chelsea").convert(mode))


@NEEDS_TORCHVISION
@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_backends_agree_on_arrays_of_one_or_four_channels(mode, channels_first):
    array = np.atleast_3d(np.array(photograph("chelsea").convert(mode)))
    assert_backends_agree(np.moveaxis(array, -1, 0).copy() if channels_first else array)


@NEEDS_TORCHVISION
def test_backends_agree_on_a_list_of_unequal_sizes():
    assert_backends_agree([photograph("chelsea"), np.array(photograph("coffee")), photograph("camera")])


@NEEDS_TORCHVISION
@pytest.mark.parametrize("size", [(3, 8), (5, 4), (9, 3), (12, 15), (8, 8)])
def test_backends_crop_and_pad_at_the_same_place(size):
    assert_backends_agree(photo(*size), do_resize=False, crop_size=8)
    assert_backends_agree(photo(*size), do_resize=False, crop_size=7)


@pytest.mark.parametrize("size", [(256, 320), (300, 256), (64, 96), (31, 17), (512, 512)])
def test_pixels_equal_pil_reference(processor, size):
    image = photo(*size)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 224, 224)
    assert pixel_values.dtype == torch.float32
    np.testing.assert_allclose(pixel_values[0].numpy(), reference(image), atol=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pil_modes_become_rgb(processor, mode):
    image = photo(40, 60, mode)
    if mode == "RGBA":
        image.putalpha(255)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    np.testing.assert_allclose(pixel_values[0].numpy(), reference(image), atol=1e-5)


@pytest.mark.parametrize("as_array", [np.asarray, lambda x: torch.from_numpy(np.array(x))], ids=["numpy", "torch"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_arrays_equal_pil_input(processor, as_array, channels_first):
    image = photo(40, 60)
    array = np.moveaxis(np.asarray(image), -1, 0) if channels_first else np.asarray(image)
    np.testing.assert_array_equal(processor(as_array(array)).pixel_values[0], processor(image).pixel_values[0])


@pytest.mark.parametrize("shape", [(40, 60, 1), (1, 40, 60), (40, 60, 4), (4, 40, 60)])
def test_arrays_of_one_or_four_channels_become_rgb(processor, shape):
    array = np.full(shape, 255, dtype=np.uint8)
    white = processor(Image.new("RGB", (60, 40), "white")).pixel_values[0]
    np.testing.assert_allclose(processor(array).pixel_values[0], white, atol=1e-6)


def test_list_of_unequal_sizes_equals_single_calls(processor):
    images = [photo(40, 60, seed=1), np.asarray(photo(70, 30, seed=2)), photo(50, 50, "L", seed=3)]
    batch = processor(images, return_tensors="pt").pixel_values
    assert batch.shape == (3, 3, 224, 224)
    for row, image in zip(batch, images, strict=True):
        torch.testing.assert_close(row, processor(image, return_tensors="pt").pixel_values[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        ([], {}, "no image in the batch"),
        (Image.new("RGB", (0, 5)), {}, "no pixels"),
        (np.zeros((0, 4, 3), np.uint8), {}, "at least one pixel"),
        (np.zeros((8, 9, 5), np.uint8), {}, "."),
        (Image.new("F", (4, 4)), {}, "floating-point pixels"),
        (photo(8, 8), {"background": [300, 0, 0]}, r"background is \[300, 0, 0\]"),
        (photo(8, 8), {"image_mean": float("nan")}, "image_mean is nan"),
        (photo(8, 8), {"image_std": [0.2, 0.0, 0.2]}, "image_std"),
        (photo(8, 8), {"rescale_factor": float("nan")}, "rescale_factor is nan"),
        (photo(8, 8), {"crop_size": 0}, "crop_size is {'height': 0"),
    ],
)
def test_what_gives_no_pixels_is_refused(processor, images, settings, message):
    with pytest.raises(ValueError, match=message):
        processor(images, **settings)
    with pytest.raises(ValueError, match=message):
        StellarImageProcessorPil(**settings)(images)


def test_image_smaller_than_crop_is_padded():
    processor = StellarImageProcessorPil(do_resize=False, do_normalize=False, crop_size=8)
    pixels = processor(np.full((3, 4, 6), 255, dtype=np.uint8), return_tensors="pt").pixel_values[0]
    expected = F.pad(torch.ones(3, 4, 6), (1, 1, 2, 2))
    torch.testing.assert_close(pixels, expected)


@every_backend
@pytest.mark.parametrize("backend", [None, "pil", pytest.param("torchvision", marks=NEEDS_TORCHVISION)])
def test_what_one_backend_saved_loads_in_each_without_a_word(
    tmp_path, caplog, monkeypatch, processor_class, backend, auto_image_processor
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else caplog sees none of its warnings
    processor = processor_class(size={"shortest_edge": 36}, crop_size=32, image_mean=[0.5, 0.4, 0.3])
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "StellarImageProcessor"
    )
    with caplog.at_level(logging.WARNING):
        loaded = auto_image_processor.from_pretrained(tmp_path, backend=backend)
    assert not caplog.records
    default = "torchvision" if torchvision_works() else "pil"
    expected = {"pil": StellarImageProcessorPil, "torchvision": StellarImageProcessor}[backend or default]
    assert type(loaded) is expected
    assert loaded.to_dict() == processor.to_dict()


@pytest.mark.skipif(torchvision_works(), reason="torchvision works")
def test_without_torchvision_its_processor_says_so():
    with pytest.raises(ImportError, match="(?i)torchvision"):
        StellarImageProcessor()


@every_backend
def test_diffusers_pipeline_loads_the_processor(tmp_path, processor_class):
    class OneComponentPipeline(DiffusionPipeline):
        def __init__(self, image_processor):
            super().__init__()
            self.register_modules(image_processor=image_processor)

    OneComponentPipeline(processor_class(crop_size=32)).save_pretrained(tmp_path)
    loaded = OneComponentPipeline.from_pretrained(tmp_path).image_processor
    assert type(loaded) is processor_class
    assert loaded.crop_size == {"height": 32, "width": 32}


@every_backend
@pytest.mark.parametrize("size", [(48, 72), (90, 40), (32, 32), (33, 47)])
def test_one_hot_patch_lands_where_the_processor_took_it_from(processor_class, size):
    """Paints one patch of the processed image in the original, and finds that patch's map there."""
    processor = processor_class(size={"shortest_edge": 36}, crop_size=32, resample=0)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    coordinates = np.stack([rows, columns, np.zeros_like(rows)]).astype(np.uint8)
    seen = np.asarray(processor(coordinates, do_rescale=False, do_normalize=False).pixel_values[0])
    maps = processor.post_process_localization(output(one_hot_maps(4, 4)), [size])[0]
    for token, token_map in enumerate(maps):
        row, column = divmod(token, 4)
        patch = seen[:2, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        centre = (np.indices(size).reshape(2, -1) * token_map.flatten().numpy()).sum(1) / token_map.sum().item()
        inner_edge = 0 < row < 3 and 0 < column < 3
        if inner_edge:  # bilinear mixing is symmetric only where neighbours exist on all sides
            np.testing.assert_allclose(centre, patch.mean(axis=(1, 2)), atol=0.75)
        peak = np.unravel_index(token_map.argmax().item(), size)
        assert patch[0].min() - 1 <= peak[0] <= patch[0].max() + 1
        assert patch[1].min() - 1 <= peak[1] <= patch[1].max() + 1


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(5, 80),
    width=st.integers(5, 80),
    crop=st.integers(8, 48),
    do_resize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_maps_sum_to_one_exactly_on_what_the_processor_kept(height, width, crop, do_resize, seed):
    """A pixel is in the crop if painting the image's other pixels away leaves it in the processed image."""
    processor = StellarImageProcessorPil(size={"shortest_edge": 36}, crop_size=crop, do_resize=do_resize)
    localization = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    maps = processor.post_process_localization(
        ModelOutput(localization=localization, grid_size=(4, 5)), torch.tensor([[height, width]])
    )[0]
    assert maps.shape == (3, height, width)
    assert maps.dtype == torch.float32

    scale_size = (height, width)
    if do_resize:
        scale_size = processor.resize(np.zeros((3, height, width), np.uint8), processor.size).shape[1:]
    frame = np.stack(np.broadcast_arrays(*np.ogrid[: scale_size[0], : scale_size[1]])) + 1
    kept = processor.center_crop(frame, processor.crop_size)
    total = maps.sum(0)
    for axis, positions in enumerate((total.amax(1), total.amax(0))):
        original, resized = (height, width)[axis], scale_size[axis]
        indices = kept[axis][kept[axis] > 0] - 1
        centres = (np.arange(original) + 0.5) * resized / original
        inside = (centres >= indices.min() - 1e-6) & (centres <= indices.max() + 1 + 1e-6)
        np.testing.assert_allclose(positions.numpy(), inside.astype(float), atol=1e-5)


def test_localization_in_the_resized_frame_is_the_bilinear_map_in_zeros():
    """Where the original has the resized image's size, the maps are the upsampled grid put into the crop's place."""
    processor = StellarImageProcessorPil(size={"shortest_edge": 36}, crop_size=32)
    grid = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    landscape, portrait = processor.post_process_localization(output(grid), [(36, 54), (45, 36)])
    crops = F.interpolate(grid, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(landscape, F.pad(crops[0], (11, 11, 2, 2)))
    torch.testing.assert_close(portrait, F.pad(crops[1], (2, 2, 6, 7)))


def test_without_centre_crop_the_maps_cover_the_image():
    processor = StellarImageProcessorPil(size={"height": 16, "width": 32}, do_center_crop=False)
    grid = torch.rand(1, 2, 2, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    maps = processor.post_process_localization(output(grid, grid_size=(2, 4)), [(20, 30)])[0]
    torch.testing.assert_close(maps, F.interpolate(grid, size=(20, 30), mode="bilinear", align_corners=False)[0])


def test_without_target_sizes_the_maps_stay_on_the_grid(processor):
    grid = torch.rand(2, 3, 2, 5)
    maps = processor.post_process_localization(output(grid, grid_size=torch.tensor([[2, 5]] * 2)))
    assert len(maps) == 2
    torch.testing.assert_close(torch.stack(maps), grid)


@pytest.mark.parametrize(
    ("outputs", "target_sizes", "message"),
    [
        (ModelOutput(localization=None), None, "must have shape"),
        (ModelOutput(localization=torch.rand(4, 2)), None, "must have shape"),
        (ModelOutput(localization=torch.rand(1, 6, 2)), None, "6 patches and grid_size is None"),
        (
            ModelOutput(localization=torch.rand(1, 6, 2), grid_size=(2, 2)),
            None,
            r"6 patches and grid_size is \(2, 2\)",
        ),
        (ModelOutput(localization=torch.rand(2, 4, 2)), [(8, 8)], "must be 2 pairs"),
        (ModelOutput(localization=torch.rand(1, 4, 2)), [(8, 8, 3)], "must be 1 pairs"),
        (ModelOutput(localization=torch.rand(1, 4, 2)), [(0, 8)], "must be 1 pairs"),
        (ModelOutput(localization=torch.rand(1, 4, 2)), (8, 8), "must be 1 pairs"),
    ],
)
def test_wrong_localization_arguments_raise(processor, outputs, target_sizes, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_localization(outputs, target_sizes)


def test_size_that_cannot_be_undone_raises():
    processor = StellarImageProcessorPil(size={"max_height": 8, "max_width": 8})
    with pytest.raises(ValueError, match="max_height"):
        processor.post_process_localization(output(torch.rand(1, 2, 2, 2)), [(8, 8)])


def class_output(classes: torch.Tensor, num_labels: int) -> ModelOutput:
    """A model output whose logits are largest at the given classes (B, h, w)."""
    return ModelOutput(logits=F.one_hot(classes, num_labels).movedim(-1, 1).float())


@every_backend
def test_class_maps_lie_in_the_place_of_the_crop(processor_class):
    """A picture of two classes is processed, cut into patches and comes back as it was, where the crop saw it."""
    processor = processor_class(size={"shortest_edge": 32}, crop_size=24)
    picture = torch.zeros(48, 80, dtype=torch.int64)
    picture[20:, 36:] = 1
    white = (picture * 255).to(torch.uint8).expand(3, -1, -1)
    seen = processor(white, do_normalize=False, return_tensors="pt").pixel_values[0, 0]
    outputs = class_output((seen > 0.5).long()[None], num_labels=2)
    (classes,) = processor.post_process_semantic_segmentation(outputs, [(48, 80)], ignore_index=255)
    assert classes.dtype == torch.int64
    expected = torch.full((48, 80), 255)
    # The crop keeps rows 4..28 of 32 and columns 14..38 of int(32 * 80 / 48) = 53.
    expected[6:42, 21:57] = picture[6:42, 21:57]
    wrong = classes != expected
    wrong[:, 34:38] = wrong[18:22] = False  # where the classes meet, bicubic mixing decides
    assert not wrong.any()

    # Without an ignore_index what the crop cut away has the class of the nearest pixel that was seen.
    (everywhere,) = processor.post_process_semantic_segmentation(outputs, [(48, 80)])
    rows, columns = torch.arange(48).clamp(6, 41), torch.arange(80).clamp(21, 56)
    torch.testing.assert_close(everywhere, classes[rows][:, columns])


def test_class_maps_of_whole_images_equal_upsampled_logits():
    processor = StellarImageProcessorPil(size={"height": 16, "width": 32}, do_center_crop=False)
    logits = torch.randn(2, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    maps = processor.post_process_semantic_segmentation(
        ModelOutput(logits=logits.bfloat16()), torch.tensor([[20, 30], [9, 41]])
    )
    for image_logits, classes in zip(logits.bfloat16().float(), maps, strict=True):
        upsampled = F.interpolate(image_logits[None], size=classes.shape, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(classes, upsampled.argmax(0))


def test_scores_are_the_mixed_logits_and_nothing_outside_of_the_crop():
    """In the frame of the resized image: the upsampled logits where the crop was, no preference around it."""
    processor = StellarImageProcessorPil(size={"shortest_edge": 36}, crop_size=32)
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (result,) = processor.post_process_semantic_segmentation(
        ModelOutput(logits=logits.bfloat16()), [(36, 54)], return_segmentation_scores=True, ignore_index=9
    )
    crop = F.interpolate(logits.bfloat16().float(), size=(32, 32), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(result.segmentation_scores, F.pad(crop, (11, 11, 2, 2)))
    torch.testing.assert_close(result.segmentation, F.pad(crop.argmax(0), (11, 11, 2, 2), value=9))


def test_class_maps_without_target_sizes_keep_the_resolution_of_the_logits(processor):
    classes = torch.tensor([[[0, 1, 2], [2, 1, 0]], [[1, 1, 1], [0, 0, 2]]])
    maps = processor.post_process_semantic_segmentation(class_output(classes, num_labels=3))
    torch.testing.assert_close(torch.stack(maps), classes)


def test_ignore_index_is_no_class(processor):
    outputs = ModelOutput(logits=torch.zeros(1, 300, 2, 2))
    with pytest.raises(ValueError, match="ignore_index is 255, a class of the 300"):
        processor.post_process_semantic_segmentation(outputs, [(16, 16)], ignore_index=255)
    (classes,) = processor.post_process_semantic_segmentation(outputs, [(16, 16)], ignore_index=-100)
    assert classes[0, 0] == -100
    assert classes[8, 8] == 0


@pytest.mark.parametrize(
    ("outputs", "target_sizes", "message"),
    [
        (ModelOutput(localization=torch.rand(1, 4, 2)), None, "must have shape .batch, num_labels"),
        (ModelOutput(logits=torch.rand(2, 4)), None, r"got \(2, 4\)"),
        (ModelOutput(logits=torch.rand(2, 3, 4, 4)), [(8, 8)], "must be 2 pairs"),
        (ModelOutput(logits=torch.rand(1, 3, 4, 4)), [(0, 8)], "must be 1 pairs"),
        (ModelOutput(logits=torch.rand(1, 3, 4, 4)), [(8.5, 8)], "must be 1 pairs"),
    ],
)
def test_wrong_segmentation_arguments_raise(processor, outputs, target_sizes, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_semantic_segmentation(outputs, target_sizes)
