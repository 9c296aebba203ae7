# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from stellar_hf.evaluation import SceneObjects, follow_object, ridge_r2, shift_equivariance, what_and_where

GRID = 8


def squares(num_scenes: int, seed: int) -> tuple[dict[str, torch.Tensor], SceneObjects]:
    """Scenes of two 2x2 squares, the left one larger by a column, each with a token of its own; token 0 is the ground.

    A token tells the material of its object, and its map where it is; D tells the shape of what lies there.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(2, (num_scenes, 2), generator=generator)  # x and y of the corner
    top = torch.randint(7, (num_scenes, 2), generator=generator)
    corners = torch.stack([torch.stack([left[:, 0], left[:, 1] + 5], 1), top], dim=2)  # (M, 2, 2) as (x, y)
    mask = torch.zeros(num_scenes, GRID, GRID, dtype=torch.long)
    for scene in range(num_scenes):
        for slot, ((x, y), width) in enumerate(zip(corners[scene].tolist(), (3, 2), strict=True)):
            mask[scene, y : y + 2, x : x + width] = slot + 1
    material = torch.randint(4, (num_scenes, 2), generator=generator)
    shape = torch.randint(3, (num_scenes, 2), generator=generator)
    noise = 0.05 * torch.randn(num_scenes, 3, 6, generator=generator)
    tokens = torch.cat([torch.zeros(num_scenes, 1, 6), F.one_hot(material, 6).float()], dim=1) + noise
    shape_of_pixel = torch.cat([torch.full((num_scenes, 1), 3), shape], dim=1).gather(1, mask.flatten(1))
    features = {
        "sparse_tokens": tokens,
        "localization": F.one_hot(mask.flatten(1), 3).float(),
        "dense_features": F.one_hot(shape_of_pixel, 4).half(),
        "grid_size": torch.full((num_scenes, 2), GRID),
    }
    width = torch.tensor([[3, 2], [2, 2]])  # of the slots, as (x, y)
    return features, SceneObjects(mask, {"material": material, "shape": shape}, (corners + width / 2) / GRID)


@pytest.fixture(scope="module")
def told():
    return what_and_where(*squares(300, seed=0), *squares(150, seed=1))


def test_tokens_tell_what_was_put_into_them_and_no_more(told):
    tokens, chance = told["sparse_tokens"], told["chance"]
    assert tokens["own_material_knn"] == tokens["own_material_linear"] == 1
    for name in ("other_material", "own_shape", "other_shape"):
        assert abs(tokens[f"{name}_knn"] - chance[name]) < 0.12
        assert abs(tokens[f"{name}_linear"] - chance[name]) < 0.12
    assert chance["own_material"] == pytest.approx(1 / 4, abs=0.08)
    assert abs(tokens["position_r2"]) < 0.1


def test_maps_tell_positions_and_features_what_lies_under_them(told):
    assert told["localization"]["position_r2"] > 0.999
    for source in ("pooled_features", "masked_features"):
        assert told[source]["own_shape_knn"] == told[source]["own_shape_linear"] == 1
        assert abs(told[source]["other_shape_linear"] - told["chance"]["other_shape"]) < 0.12


def test_a_token_that_speaks_of_the_other_object_is_found_out():
    parts = [squares(200, seed=0), squares(100, seed=1)]
    for features, objects in parts:
        positions = torch.cat([torch.zeros(len(objects.position), 1, 2), objects.position], dim=1)
        features["sparse_tokens"] = torch.cat([features["sparse_tokens"][:, [0, 2, 1], :4], positions], dim=2)
        del features["dense_features"]
    found = what_and_where(*parts[0], *parts[1])
    assert found.keys() == {"sparse_tokens", "localization", "chance"}
    assert found["sparse_tokens"]["other_material_linear"] == 1
    assert found["sparse_tokens"]["own_material_linear"] < 0.5
    assert found["sparse_tokens"]["position_r2"] > 0.999


def test_small_objects_are_left_out_and_are_no_others():
    parts = [squares(60, seed=0), squares(30, seed=1)]
    found = what_and_where(*parts[0], *parts[1], min_area=6)  # the left one alone
    assert found["chance"].keys() == {"own_material", "own_shape"}
    assert "other_material_knn" not in found["sparse_tokens"]


@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_ridge_is_that_of_scikit_learn_with_the_penalty_chosen_on_held_out_training_rows(noise):
    generator = np.random.default_rng(0)
    features, weights = generator.normal(size=(160, 12)) * np.linspace(1, 9, 12), generator.normal(size=(12, 2))
    targets = features @ weights / 10 + noise * generator.normal(size=(160, 2))
    train, test, fitted, held_out = slice(0, 100), slice(100, 160), slice(0, 80), slice(80, 100)

    def predict(fit: slice, rows: slice, penalty: float) -> np.ndarray:
        scaler = StandardScaler().fit(features[fit])
        ridge = Ridge(alpha=penalty).fit(scaler.transform(features[fit]), targets[fit])
        return ridge.predict(scaler.transform(features[rows]))

    errors = {p: ((predict(fitted, held_out, p) - targets[held_out]) ** 2).sum() for p in np.logspace(-3, 6, 19)}
    expected = r2_score(targets[test], predict(train, test, min(errors, key=errors.get)))
    tensors = [torch.from_numpy(array) for array in (features[train], targets[train], features[test], targets[test])]
    assert ridge_r2(*tensors) == pytest.approx(expected, abs=1e-6)


def test_an_object_that_moves_with_its_map_keeps_its_token():
    features, objects = squares(40, seed=3)
    shifts = torch.tensor([[1, 0], [0, -1]]).repeat(20, 1)
    # The second object of each scene moves, and its map with it. What leaves the image comes back elsewhere.
    moved = torch.stack(
        [mask.roll(tuple(shift.flip(0).tolist()), (0, 1)) for mask, shift in zip(objects.mask, shifts, strict=True)]
    )
    after = {**features, "localization": F.one_hot(moved.flatten(1), 3).float()}
    ids = torch.full((40,), 2)
    found = shift_equivariance(features, objects.mask, after, moved, ids, shifts)
    torch.testing.assert_close(found["token_cosine"], torch.ones(40))
    assert (found["map_iou"] == 1).all() and (found["same_slot"] == 1).all()
    assert (found["unmoved_map_iou"] <= 0.5).all()
    assert (found["other_cosine"] < found["token_cosine"]).all()
    still = shift_equivariance(features, objects.mask, features, objects.mask, ids, shifts)
    assert (still["unmoved_map_iou"] == 1).all() and (still["map_iou"] <= 0.5).all()


def test_an_object_of_another_slot_is_found_and_one_that_is_gone_is_not_a_number():
    features, objects = squares(6, seed=4)
    order = [0, 2, 1]
    after = {
        **features,
        "sparse_tokens": features["sparse_tokens"][:, order],
        "localization": features["localization"][:, :, order],
    }
    ids, shifts = torch.ones(6, dtype=torch.long), torch.zeros(6, 2, dtype=torch.long)
    gone = objects.mask.clone()
    gone[3][gone[3] == 1] = 0
    found = shift_equivariance(features, objects.mask, after, gone, ids, shifts)
    assert found["same_slot"][:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(found["token_cosine"][:3], torch.ones(3))
    assert all(values.isnan().tolist() == [False, False, False, True, False, False] for values in found.values())


def test_objects_of_a_data_set():
    columns = {
        "mask": np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8) % 3,
        "shape": [[0, 1, -1], [2, 3, 1], [1, -1, -1], [0, 0, 2]],
        "position": np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 3, 2),
    }
    features = {
        "mask": datasets.Array2D((8, 8), "uint8"),
        "shape": datasets.List(datasets.ClassLabel(names=list("abcd")), length=3),
        "position": datasets.Array2D((3, 2), "float32"),
    }
    scenes = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    objects = SceneObjects.from_dataset(scenes, index=torch.tensor([0, 2, 3]), classes=("shape",))
    assert torch.equal(objects.mask, torch.from_numpy(columns["mask"][[0, 2, 3]]))
    assert torch.equal(objects.position, torch.from_numpy(columns["position"][[0, 2, 3]]))
    assert objects.classes["shape"].tolist() == [columns["shape"][row] for row in (0, 2, 3)]
    with pytest.raises(ValueError, match="no columns \\['material'\\]"):
        SceneObjects.from_dataset(scenes)


def test_parts_that_do_not_fit_are_refused():
    features, objects = squares(20, seed=0)
    fewer, _ = squares(19, seed=0)
    with pytest.raises(ValueError, match="test_features are of 19 scenes and test_objects of 20"):
        what_and_where(features, objects, fewer, objects)
    with pytest.raises(ValueError, match="no object of at least 7 visible pixels"):
        what_and_where(features, objects, features, objects, min_area=7)
    with pytest.raises(ValueError, match="one group"):
        ridge_r2(torch.ones(3, 2), torch.ones(3, 1), torch.ones(3, 2), torch.ones(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="shifts are torch.float32"):
        shift_equivariance(features, objects.mask, features, objects.mask, torch.ones(20).long(), torch.zeros(20, 2))


def test_an_object_is_followed_by_its_own_token():
    features, objects = squares(4, seed=5)
    one = {name: tensor[:1].repeat(4, *[1] * (tensor.ndim - 1)) for name, tensor in features.items()}
    mask = torch.stack([objects.mask[0].roll(step, 1) for step in (0, -1, -2, -3)])
    mask[mask == 1] = 0
    maps = torch.stack([mask == 0, mask == 1, mask == 2], dim=3).flatten(1, 2).float()
    one["localization"] = maps
    one["sparse_tokens"][3] = one["sparse_tokens"][3, [0, 2, 1]]  # the slots of the last picture are exchanged
    one["localization"][3] = one["localization"][3][:, [0, 2, 1]]
    found = follow_object(one, mask, object_id=2)
    assert found["slot"].tolist() == [2, 2, 2, 1]
    torch.testing.assert_close(found["token_cosine"], torch.ones(4))
    assert (found["other_cosine"] < 0.9).all()
    torch.testing.assert_close(found["maps"], (mask == 2).float())
    places = torch.stack([(picture == 2).nonzero().flip(1).float().add(0.5).mean(dim=0) / GRID for picture in mask])
    torch.testing.assert_close(found["centroid"], places)


def test_an_object_that_is_hidden_cannot_be_followed():
    features, objects = squares(3, seed=6)
    objects.mask[1][objects.mask[1] == 2] = 0
    with pytest.raises(ValueError, match="Object 2 has no pixel in the mask of picture 1"):
        follow_object(features, objects.mask, object_id=2)
    with pytest.raises(ValueError, match="features of 3 pictures, but 2 masks"):
        follow_object(features, objects.mask[:2])
