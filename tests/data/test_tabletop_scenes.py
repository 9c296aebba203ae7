# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
import itertools
import math
import multiprocessing

import datasets
import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency

from stellar_hf.data import PHOTOGRAPH_NAMES, load_tabletop_scenes, tabletop_scenes
from stellar_hf.data.photo_mosaics import block_boxes, photograph
from stellar_hf.data.ray_tracing import SHAPE_NAMES, ray_entry, surface_normal, texture_coordinates

SPLITS = ("train", "validation", "test")
ELEVATION = math.radians(36)
DIRECTION = torch.tensor([0, math.cos(ELEVATION), -math.sin(ELEVATION)])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An empty cache of Datasets for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder / "tabletop_scenes"


@pytest.fixture(scope="module")
def scenes(cache):
    return load_tabletop_scenes("test", num_scenes=512).with_format("numpy")[:]


def parallel_rays(size=400):
    """A square grid of camera rays over [-2, 2]^2 of the image plane: origins (3, size * size) and a ray's area."""
    steps = (torch.arange(size) + 0.5) * 4 / size - 2
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    up = torch.tensor([0, math.sin(ELEVATION), math.cos(ELEVATION)])
    return torch.stack([u, v * up[1], v * up[2]]).flatten(1), (4 / size) ** 2


def entry_points(shape, origin, direction=DIRECTION):
    depth = ray_entry(shape, origin, direction[:, None])
    hit = depth < torch.inf
    return origin[:, hit] + depth[hit] * direction[:, None], depth, hit


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("sphere", math.pi),
        # Of each face, its area times the cosine of the view.
        ("cube", 4 * math.cos(ELEVATION) + 4 * math.sin(ELEVATION)),
        ("cylinder", math.pi * math.sin(ELEVATION) + 4 * math.cos(ELEVATION)),
    ],
)
def test_silhouettes_have_the_areas_of_geometry(shape, area):
    origin, ray_area = parallel_rays()
    _, _, hit = entry_points(shape, origin)
    assert hit.sum().item() * ray_area == pytest.approx(area, rel=4e-3)


def test_the_silhouette_of_a_cone_is_the_hull_of_its_base_and_apex():
    from scipy.spatial import ConvexHull

    angle = np.linspace(0, 2 * np.pi, 2000)
    base = np.stack([np.cos(angle), np.sin(angle) * math.sin(ELEVATION) - math.cos(ELEVATION)], axis=1)
    hull = ConvexHull(np.concatenate([base, [[0, math.cos(ELEVATION)]]])).volume  # an area, in the plane
    origin, ray_area = parallel_rays()
    assert entry_points("cone", origin)[2].sum().item() * ray_area == pytest.approx(hull, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_rays_enter_on_the_surface_with_normals_against_them(shape):
    points, _, _ = entry_points(shape, parallel_rays(100)[0])
    x, y, z = points
    distance = {
        "sphere": (points.norm(dim=0) - 1).abs(),
        "cube": (points.abs().amax(0) - 1).abs(),
        "cylinder": torch.minimum((torch.hypot(x, y) - 1).abs(), (z - 1).abs()),
        "cone": (torch.hypot(x, y) - (1 - z) / 2).abs(),
    }
    assert distance[shape].max() < 2e-3
    assert points.abs().max() < 1 + 1e-5
    normals = surface_normal(shape, points)
    assert torch.allclose(normals.norm(dim=0), torch.ones(()), atol=1e-3)
    assert (normals * DIRECTION[:, None]).sum(0).max() < 1e-2


@pytest.mark.parametrize(("turn", "faces"), [(0.0, 2), (0.4, 3), (math.pi / 4, 3)])
def test_a_cube_shows_its_top_and_the_sides_that_are_turned_to_the_camera(turn, faces):
    cosine, sine = math.cos(turn), math.sin(turn)
    turned = torch.tensor([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1.0]])
    points, _, _ = entry_points("cube", turned @ parallel_rays()[0], turned @ DIRECTION + 1e-9)
    normals, counts = surface_normal("cube", points).round().T.unique(dim=0, return_counts=True)
    assert len(normals[counts > 100]) == faces


@pytest.mark.parametrize("shape", ["cube", "cylinder", "cone"])
def test_textures_keep_lengths_on_surfaces_that_unroll(shape):
    """A small step on the surface is as long on the texture."""
    points, _, _ = entry_points(shape, parallel_rays(50)[0].double(), DIRECTION.double())
    steps = points[:, None] - points[:, :, None]
    near = (steps.norm(dim=0) < 0.12) & (steps.norm(dim=0) > 0)
    normals = surface_normal(shape, points)
    same_face = (normals[:, None] * normals[:, :, None]).sum(0) > 0.9
    turn = torch.tensor(0.7, dtype=torch.float64)
    plane = texture_coordinates(shape, points, DIRECTION.double()[:, None], turn)
    lengths = (plane[:, None] - plane[:, :, None]).norm(dim=0)
    ratio = (lengths / steps.norm(dim=0))[near & same_face]
    assert len(ratio) > 500
    assert ratio.quantile(0.01) > 0.93 and ratio.quantile(0.99) < 1.07


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="'torus'"):
        ray_entry("torus", torch.zeros(3, 1), DIRECTION[:, None])


def test_columns():
    dataset = load_tabletop_scenes("validation", num_scenes=6, image_size=32, max_objects=3)
    scene = dataset[0]
    assert str(dataset.split) == "validation" and len(dataset) == 6
    assert scene["image"].mode == "RGB" and scene["image"].size == (32, 32)
    lists = {"shape", "material", "position", "size", "rotation", "area"}
    assert set(dataset.column_names) == {"image", "mask", "ground"} | lists
    assert all(len(scene[name]) == 3 for name in lists)
    assert dataset.features["shape"].feature.names == list(SHAPE_NAMES)
    assert dataset.features["material"].feature.names == dataset.features["ground"].names == list(PHOTOGRAPH_NAMES)
    assert dataset.with_format("numpy")[:]["mask"].shape == (6, 32, 32)


def test_lists_are_filled_with_minus_one_after_the_objects(scenes):
    count = (scenes["shape"] >= 0).sum(1)
    assert set(count) == {2, 3, 4}
    exists = np.arange(4) < count[:, None]
    for name in ("shape", "material", "size", "rotation", "area", "position"):
        values = scenes[name]
        assert (values[exists] >= 0).all() and (values[~exists] == -1).all()
    assert (scenes["position"][exists] <= 1).all() and (scenes["rotation"][exists] < 2 * math.pi + 1e-6).all()


def test_areas_are_those_of_the_mask_and_every_object_is_seen(scenes):
    exists = scenes["shape"] >= 0
    areas = np.stack([(scenes["mask"] == slot).sum((1, 2)) for slot in range(1, 5)], axis=1)
    assert np.array_equal(areas[exists], scenes["area"][exists]) and (areas[~exists] == 0).all()
    assert areas[exists].min() >= 20


def test_objects_lie_at_their_positions_and_nearer_ones_hide_others():
    """A ball covers a disc of its size around its position, except where other objects hide it."""
    scenes = load_tabletop_scenes("train", num_scenes=250, seed=5).with_format("numpy")[:]
    center = (np.arange(64) + 0.5) / 64
    hidden = 0
    for shape, position, size, mask in zip(
        scenes["shape"], scenes["position"], scenes["size"], scenes["mask"], strict=True
    ):
        balls = (shape == 0).nonzero()[0]
        inside = {
            i: np.hypot(center - position[i, 0], center[:, None] - position[i, 1]) < size[i] / 2 - 0.01 for i in balls
        }
        for i in balls:
            seen = mask[inside[i]]
            assert (seen != 0).all()
            assert (seen == i + 1).mean() > 0.4
            hidden += (seen != i + 1).any()
        # Of two balls the one whose foot is lower in the image is nearer.
        for i, j in itertools.combinations(balls, 2):
            depth = position[:, 1] + size / 2 * math.cos(ELEVATION)
            front, back = (i, j) if depth[i] > depth[j] else (j, i)
            assert not (mask[inside[i] & inside[j]] == back + 1).any()
            assert (mask[inside[front] & ~inside[back]] != 0).all()
    assert hidden > 20


def test_attributes_are_independent(scenes):
    exists = scenes["shape"] >= 0
    shape, material = scenes["shape"][exists], scenes["material"][exists]
    ground = np.broadcast_to(scenes["ground"][:, None], exists.shape)[exists]
    for a, b in ((shape, material), (ground, material), (shape, ground)):
        table = np.zeros((a.max() + 1, b.max() + 1))
        np.add.at(table, (a, b), 1)
        assert chi2_contingency(table).pvalue > 1e-3
    same = (material == ground).mean()
    assert 0.5 / 19 < same < 2 / 19
    assert np.bincount(shape).min() > 0.2 * len(shape)


def test_a_single_object_is_large_and_gives_the_label():
    dataset = load_tabletop_scenes("train", num_scenes=64, num_objects=1).with_format("numpy")[:]
    assert np.array_equal(dataset["label"], dataset["material"][:, 0])
    assert (dataset["material"][:, 1:] == -1).all()
    assert dataset["area"][:, 0].min() > 0.1 * 64 * 64


def test_the_number_of_objects_can_be_fixed():
    shapes = load_tabletop_scenes("train", num_scenes=20, num_objects=4)["shape"]
    assert all(min(shape) >= 0 for shape in shapes)


@pytest.mark.parametrize("name", PHOTOGRAPH_NAMES)
def test_splits_share_no_pixel_of_a_photograph(name):
    image = photograph(name)
    gap = min(image.size) // 33
    used = np.zeros((len(SPLITS), image.height, image.width), dtype=bool)
    for own, split in zip(used, SPLITS, strict=True):
        for top, left, size in block_boxes(split, *image.size, SPLITS):
            own[max(0, top - gap // 2) : top + size + gap // 2, max(0, left - gap // 2) : left + size + gap // 2] = (
                True
            )
        assert own.any()
    assert used.sum(0).max() == 1


def digest(**arguments):
    data = load_tabletop_scenes("train", **arguments).with_format("numpy")[:]
    return [data[name].tobytes() for name in sorted(data)]


def test_scenes_do_not_depend_on_threads_or_on_their_number():
    few = load_tabletop_scenes("train", num_scenes=5, image_size=16).with_format("numpy")[:]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # two processes, for the two batches of 300 scenes
    try:
        many = load_tabletop_scenes("train", num_scenes=300, image_size=16).with_format("numpy")[:]
    finally:
        torch.set_num_threads(num_threads)
    for name in few:
        assert np.array_equal(few[name], many[name][:5]), name
    assert len(np.unique(many["size"][:, 0])) > 290  # batches differ


def test_the_seed_and_the_split_change_the_scenes():
    assert len({str(digest(num_scenes=4, seed=seed)) for seed in (0, 1, 2)}) == 3
    shapes = {split: str(load_tabletop_scenes(split, num_scenes=8)["shape"][:]) for split in SPLITS}
    assert len(set(shapes.values())) == 3


def image_bytes(barrier, results):
    barrier.wait()
    images = load_tabletop_scenes("train", num_scenes=40, seed=7)["image"]
    results.put(b"".join(image.tobytes() for image in images))


def test_two_processes_that_ask_at_once_get_the_same_scenes_from_one_rendering(monkeypatch, tmp_path):
    renderings = tmp_path / "renderings"
    write_scenes = tabletop_scenes._write_scenes

    def write_and_count(*args):
        with renderings.open("a") as file:
            file.write("once\n")
        write_scenes(*args)

    monkeypatch.setattr(tabletop_scenes, "_write_scenes", write_and_count)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=image_bytes, args=(barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=100), results.get(timeout=100)
    for process in processes:
        process.join()
    assert first == second and len(first) == 40 * 64 * 64 * 3
    assert renderings.read_text() == "once\n"


def test_an_interrupted_rendering_leaves_nothing(monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tabletop_scenes, "_encode", interrupt)
        load_tabletop_scenes("train", num_scenes=3)
    assert [file.suffix for file in tmp_path.rglob("*.*")] in ([], [".lock"])
    assert len(load_tabletop_scenes("train", num_scenes=3)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "'dev'"),
        ({"split": "train", "num_scenes": 0}, "num_scenes is 0"),
        ({"split": "train", "image_size": 8}, "image_size is 8"),
        ({"split": "train", "max_objects": 1}, "max_objects is 1"),
        ({"split": "train", "max_objects": 5}, "max_objects is 5"),
        ({"split": "train", "seed": -1}, "seed is -1"),
        ({"split": "train", "num_objects": 5}, "num_objects is 5"),
        ({"split": "train", "num_objects": 0}, "num_objects is 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_tabletop_scenes(**arguments)
