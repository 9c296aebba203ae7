# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The one loop from images to features: any images, any model, broken files, several processes."""

import copy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from stellar_hf import StellarForPreTraining, StellarImageProcessorPil
from stellar_hf.data import UnreadableImages, load_images
from stellar_hf.features import ImageFeatures, encode_batches, encode_images, evaluation_mode, load_processor

CROPS = StellarImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
WHOLE = StellarImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False)


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return StellarForPreTraining(tiny_config())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of seven images of two classes and five sizes, and a broken one between them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(8):
        path = folder / "cat dog".split()[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + 9 * (index // 2), 60, 3), dtype=np.uint8)).save(path)
    (folder / "cat" / "4.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def images(photos):
    return load_images(photos)


def outputs_of(model, photos, processor, names):
    """What the model says of each image by itself."""
    with torch.no_grad(), evaluation_mode(model):
        for name in names:
            with Image.open(photos / name) as image:
                yield model.stellar(**processor(image.convert("RGB"), return_tensors="pt"))


def assert_equal(features, expected):
    assert features.index.tolist() == expected.index.tolist() and features.tensors.keys() == expected.tensors.keys()
    for name, tensor in features.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_are_the_models_own_outputs_and_a_broken_image_has_none(model, images, photos, num_workers, caplog):
    features = encode_images(model, images, CROPS, columns=["label"], batch_size=3, num_workers=num_workers)
    names = ["cat/0.png", "cat/2.png", "cat/6.png", "dog/1.png", "dog/3.png", "dog/5.png", "dog/7.png"]
    assert features.index.tolist() == [0, 1, 3, 4, 5, 6, 7] and len(features) == 7
    assert features.paths == [str(photos / name) for name in names]
    assert features.columns == {"label": [0, 0, 0, 1, 1, 1, 1]}
    assert list(features.unreadable) == [2] and caplog.text.count("4.png cannot be read") == 1
    for row, output in enumerate(outputs_of(model, photos, CROPS, names)):
        torch.testing.assert_close(features.sparse_tokens[row], output.sparse_tokens[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.localization[row], output.localization[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.pooler_output[row], output.pooler_output[0], rtol=1e-4, atol=1e-5)
    assert features.grid_size.tolist() == [[4, 4]] * 7


def test_images_may_stay_in_different_sizes(model, images, photos):
    features = encode_images(model, images, WHOLE, show_progress=False)
    names = [path.removeprefix(f"{photos}/") for path in features.paths]
    assert isinstance(features.localization, list) and features.sparse_tokens.shape == (7, 4, 32)
    assert len({tuple(grid) for grid in features.grid_size.tolist()}) > 2
    for row, output in enumerate(outputs_of(model, photos, WHOLE, names)):
        torch.testing.assert_close(features.localization[row], output.localization[0], rtol=1e-4, atol=1e-5)


def test_transparent_images_are_composited_on_the_background_of_the_processor(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8))
    coral = [240, 120, 80]
    processor = StellarImageProcessorPil(size={"shortest_edge": 36}, do_center_crop=False, background=coral)
    composited = Image.alpha_composite(Image.new("RGBA", image.size, (*coral, 255)), image).convert("RGB")
    found, expected = (encode_images(model, [each], processor) for each in (image, composited))
    assert_equal(found, expected)
    assert not torch.equal(found.pooler_output, encode_images(model, [composited], CROPS).pooler_output)


def test_all_kinds_of_images_give_the_same(model, images, photos):
    """A data set that decodes, one that does not, rows, files, PIL images and arrays."""
    rows = [0, 1, 3, 4]
    files = [images.cast_column("image", datasets.Image(decode=False))[row]["image"]["path"] for row in rows]
    opened = [Image.open(file) for file in files]
    expected = encode_images(model, images.select(rows), CROPS, show_progress=False)
    kinds = (
        images.select(rows).cast_column("image", datasets.Image(decode=False)),
        [{"image": image} for image in opened],
        [{"path": file, "bytes": None} for file in files],
        files,
        opened,
        [np.asarray(image) for image in opened],
    )
    for kind in kinds:
        assert_equal(encode_images(model, kind, CROPS, show_progress=False), expected)
    assert encode_images(model, files, CROPS, show_progress=False).paths == files
    picture = images.rename_column("image", "picture")
    assert_equal(
        encode_images(model, picture, CROPS, image_column="picture", rows=rows[::-1], show_progress=False),
        encode_images(model, images, CROPS, rows=rows, show_progress=False),
    )


def test_other_encoders_and_other_calls_of_a_model(images):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    model = Dinov2Model(config)
    features = encode_images(model, images, CROPS, show_progress=False)
    assert features.tensors.keys() == {"pooler_output"} and features.pooler_output.shape == (7, 16)

    def patches(model, pixel_values):
        return {"patches": model(pixel_values).last_hidden_state[:, 1:]}

    features = encode_images(model, images, CROPS, encode=patches, show_progress=False)
    assert features.patches.shape == (7, 16, 16)
    with pytest.raises(AttributeError, match="sparse_tokens"):
        features.sparse_tokens  # noqa: B018
    probe = torch.nn.Linear(16, 2)
    probe(features.patches).sum().backward()  # features take part in a training


def test_flags_random_numbers_and_gradients_are_left_alone(model, images):
    model = copy.deepcopy(model).train()
    model.decoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    features = encode_images(model, images, CROPS, show_progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state) and not features.sparse_tokens.requires_grad
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize(("dtype", "found"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_lower_precision(model, images, dtype, found):
    expected = encode_images(model, images, CROPS, show_progress=False)
    features = encode_images(copy.deepcopy(model).to(dtype), images, CROPS, show_progress=False)
    assert features.sparse_tokens.dtype == features.localization.dtype == found
    cosines = torch.cosine_similarity(features.sparse_tokens.float(), expected.sparse_tokens, dim=-1)
    assert cosines.min() > 0.99


def test_streams_hold_a_place_for_every_batch(model, images):
    parts = list(encode_batches(model, images, CROPS, [[0, 1], [2], [3]]))
    assert [part.index.tolist() for part in parts] == [[0, 1], [], [3]] and list(parts[1].unreadable) == [2]
    whole = ImageFeatures.concatenate([parts[2], parts[0], parts[1], parts[0]])
    assert_equal(whole, encode_images(model, images, CROPS, rows=range(4), show_progress=False))


def test_impossible_inputs_are_refused_in_a_sentence(model, images, photos):
    for kwargs, said in (
        ({"rows": [2]}, "None of the 1 images can be read. .*4.png"),
        ({"rows": []}, "no rows"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"unreadable": UnreadableImages(max_share=0)}, "could not be read"),
    ):
        with pytest.raises(ValueError, match=said):
            encode_images(model, images, CROPS, show_progress=False, **kwargs)
    with pytest.raises(ValueError, match="IterableDataset, which has no length"):
        encode_images(model, images.to_iterable_dataset(), CROPS)
    with pytest.raises(ValueError, match="no column 'image', only .'photo'"):
        encode_images(model, [{"photo": 1}], CROPS, show_progress=False)
    with pytest.raises(ValueError, match="Image 1 of the data set .* a Tensor"):
        encode_images(model, [images[0]["image"], torch.zeros(3)], CROPS, unreadable=UnreadableImages(0))


def test_processor_by_name(tmp_path):
    CROPS.save_pretrained(tmp_path)
    assert load_processor(tmp_path).to_dict()["size"] == CROPS.to_dict()["size"]


def encode_in_one_of_two(accelerator, model, photos):
    """What a process gets, and how often its model was called."""
    calls = []
    model.stellar.register_forward_hook(lambda *args: calls.append(len(calls)))
    options = {"columns": ["label"], "batch_size": 1, "accelerator": accelerator, "show_progress": False}
    return encode_images(model, load_images(photos), CROPS, **options), len(calls)


def test_processes_give_what_one_gives_in_equally_many_steps(two_processes, model, images, photos):
    """Steps are equally many also where a process has nothing but a broken image."""
    expected = encode_images(model, images, CROPS, columns=["label"], show_progress=False)
    for features, calls in two_processes(encode_in_one_of_two, model, photos):
        assert_equal(features, expected)
        assert features.columns == expected.columns and list(features.unreadable) == [2] and calls == 4
