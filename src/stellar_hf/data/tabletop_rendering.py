# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Images and masks of the tabletop scenes, ray traced."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .photo_mosaics import photograph_blocks
from .ray_tracing import SHAPE_NAMES, ray_entry, surface_normal, texture_coordinates
from .tabletop_layout import COS, RADII, SIN, Scenes, extents_of, radius_of

# Each takes blocks of its own of every photograph.
TABLETOP_SPLITS: tuple[str, ...] = ("train", "validation", "test")

_LIGHT_ELEVATION = math.radians(48)
_LIGHT_RADIUS = 0.13  # tangent of the angle at which half of the light is seen
_SUN, _SKY = 0.88, 0.42
_BLACK = 0.02  # what a black surface reflects; without it, black solids would show no light and no shade

# A pixel is the mean of 3 x 3 rays. The fifth goes through its center and decides the mask.
_GRID = 3
_NUM_RAYS = _GRID * _GRID
_CENTER_RAY = _NUM_RAYS // 2

_RENDERED_AT_ONCE = 32  # scenes whose arrays fit into a processor's cache


def render(scenes: Scenes, split: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders scenes.

    Args:
        scenes: n scenes.
        split: One of `TABLETOP_SPLITS`: where the blocks of the photographs are from.
        image_size: Height and width S of a scene in pixels.

    Returns:
        Images (n, S, S, 3) and masks (n, S, S), uint8.
    """
    starts = range(0, len(scenes.exists), _RENDERED_AT_ONCE)
    with _one_thread():
        parts = [_render_at_once(scenes.select(slice(i, i + _RENDERED_AT_ONCE)), split, image_size) for i in starts]
    images, masks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, masks


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The operations of a renderer are many and small: threads would mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _render_at_once(scenes: Scenes, split: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    num_scenes = len(scenes.exists)
    num_pixels = num_scenes * image_size * image_size
    objects = _gather_objects(scenes)
    groups = [objects.select((objects.shape == i).nonzero()[:, 0]) for i in range(len(SHAPE_NAMES))]
    traced = [_trace(name, group, image_size) for name, group in zip(SHAPE_NAMES, groups, strict=True)]
    nearest = torch.full((_NUM_RAYS, num_pixels), torch.inf)
    for pixels, depth in traced:
        nearest.scatter_reduce_(1, pixels.key.expand_as(depth), depth, "amin")

    free = (nearest == torch.inf).sum(0)  # rays that meet the ground
    shadow = _shadows(groups, free, image_size)
    colors = _ground(scenes, shadow, split, image_size) * (free / _NUM_RAYS)
    mask = torch.zeros(num_pixels, dtype=torch.uint8)
    for name, group, (pixels, depth) in zip(SHAPE_NAMES, groups, traced, strict=True):
        visible = depth.isfinite() & (depth <= nearest.index_select(1, pixels.key))
        seen = visible.any(0).nonzero()[:, 0]
        pixels, depth, visible = pixels.select(seen), depth.index_select(1, seen), visible.index_select(1, seen)
        for channel, color in zip(colors, _shade(name, group, pixels, depth, visible, split, image_size), strict=True):
            channel.index_add_(0, pixels.key, color)
        center = visible[_CENTER_RAY]
        mask[pixels.key[center]] = (group.slot[pixels.object[center]] + 1).to(torch.uint8)
    images = colors.clamp(0, 1).sqrt().mul(255).round().byte()
    images = images.view(3, num_scenes, image_size, image_size).permute(1, 2, 3, 0).contiguous()
    return images.numpy(), mask.view(num_scenes, image_size, image_size).numpy()


class _Objects(NamedTuple):
    """Objects of a batch of scenes, one after the other."""

    scene: Tensor  # (k,)
    slot: Tensor  # (k,)
    shape: Tensor  # (k,)
    block: Tensor  # (k,)
    center: Tensor  # (3, k)
    radius: Tensor  # (k,): how many times larger than the unit solid
    rotation: Tensor  # (k,)
    texture: Tensor  # (3, k)
    light: Tensor  # (3, k)

    def select(self, index: Tensor) -> _Objects:
        return _Objects(*(field.index_select(-1, index) for field in self))

    def to_own_frame(self, vector: Tensor) -> Tensor:
        """Turns vectors (3, ..., k) into the frame of their object."""
        cosine, sine = self.rotation.cos(), self.rotation.sin()
        x, y, z = vector
        return torch.stack(torch.broadcast_tensors(x * cosine + y * sine, y * cosine - x * sine, z))


def _gather_objects(scenes: Scenes) -> _Objects:
    scene, slot = scenes.exists.nonzero()
    radius = radius_of(scenes.shape, scenes.size)[scene, slot]
    x, y = scenes.position[scene, slot].T
    azimuth = scenes.light[scene]
    horizontal, vertical = math.cos(_LIGHT_ELEVATION), math.sin(_LIGHT_ELEVATION)
    fields = (
        scene,
        slot,
        scenes.shape[scene, slot],
        scenes.block[scene, slot],
        np.stack([x, y, radius]),
        radius,
        scenes.rotation[scene, slot],
        scenes.texture[scene, slot].T,
        np.stack([horizontal * np.cos(azimuth), horizontal * np.sin(azimuth), np.full_like(azimuth, vertical)]),
    )
    return _Objects(*(torch.from_numpy(np.ascontiguousarray(field)) for field in fields))


class _Pixels(NamedTuple):
    """Pixels in boxes of objects, one box after the other."""

    object: Tensor  # (p,): index of the object
    key: Tensor  # (p,): scene, row and column in one number
    column: Tensor  # (p,)
    row: Tensor  # (p,)

    def select(self, index: Tensor) -> _Pixels:
        return _Pixels(*(field.index_select(0, index) for field in self))


def _pixels_in_boxes(
    objects: _Objects, left: Tensor, right: Tensor, top: Tensor, bottom: Tensor, size: int
) -> _Pixels:
    """All pixels of boxes (k,) in image coordinates, clipped to the image."""
    left, top = ((edge * size).floor().long().clamp(0, size) for edge in (left, top))
    right, bottom = ((edge * size).ceil().long().clamp(0, size) for edge in (right, bottom))
    width = right - left
    counts = width * (bottom - top)
    index = torch.repeat_interleave(counts)
    offset = torch.arange(len(index)) - (counts.cumsum(0) - counts).index_select(0, index)
    width = width.index_select(0, index)
    down = offset // width
    row, column = top.index_select(0, index) + down, left.index_select(0, index) + offset - down * width
    return _Pixels(index, (objects.scene.index_select(0, index) * size + row) * size + column, column, row)


def _ray_origins(objects: _Objects, pixels: _Pixels, size: int, above: tuple[float, float, float]) -> Tensor:
    """Where the rays of pixels begin, (3, rays, p), in the frames of the unit solids. They lie on the plane through
    the image's center that is spanned by the direction to the right and the one above."""
    ray = torch.arange(_NUM_RAYS)[:, None]
    u = (pixels.column + (ray % _GRID + 0.5) / _GRID) / size - 0.5
    v = 0.5 - (pixels.row + (ray // _GRID + 0.5) / _GRID) / size
    right = objects.to_own_frame(torch.tensor([[1.0], [0.0], [0.0]])) / objects.radius
    up = objects.to_own_frame(torch.tensor(above)[:, None]) / objects.radius
    center = objects.to_own_frame(objects.center) / objects.radius
    right, up, center = (field.index_select(1, pixels.object)[:, None] for field in (right, up, center))
    return right * u + up * v - center


def _trace(name: str, objects: _Objects, image_size: int) -> tuple[_Pixels, Tensor]:
    """Rays of the camera to objects of one shape: pixels in the objects' boxes, and the depth at which each of their
    rays enters, (rays, p), infinite where it misses."""
    x, y, z = objects.center
    middle_x, middle_y = 0.5 + x, 0.5 - y * SIN - z * COS
    size = objects.radius / RADII[name]
    extents = extents_of(objects.shape.numpy(), size.numpy(), objects.rotation.numpy())
    across, up, down = (torch.from_numpy(extent) for extent in extents)
    pixels = _pixels_in_boxes(
        objects, middle_x - across, middle_x + across, middle_y - up, middle_y + down, image_size
    )
    origin, direction = _camera_rays(objects, pixels, image_size)
    return pixels, ray_entry(name, origin, direction[:, None]) * objects.radius.index_select(0, pixels.object)


def _camera_rays(objects: _Objects, pixels: _Pixels, image_size: int) -> tuple[Tensor, Tensor]:
    """Origins (3, rays, p) and directions (3, p) in the frames of the unit solids."""
    direction = objects.to_own_frame(torch.tensor([[0.0], [COS], [-SIN]])).index_select(1, pixels.object)
    return _ray_origins(objects, pixels, image_size, above=(0.0, SIN, COS)), direction


def _shade(
    name: str, objects: _Objects, pixels: _Pixels, depth: Tensor, visible: Tensor, split: str, image_size: int
) -> Tensor:
    """What visible rays of one shape add to the colors of their pixels, (3, p)."""
    origin, direction = _camera_rays(objects, pixels, image_size)
    light = objects.to_own_frame(objects.light).index_select(1, pixels.object)
    objects = objects.select(pixels.object)
    # Other rays meet some place as well: their brightness is 0.
    distance = torch.where(visible, depth / objects.radius, 0)
    point = (origin + distance * direction[:, None]).clamp(-1, 1)
    normal = surface_normal(name, point)
    sun = (normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]).clamp_min(0)
    height = 0.5 + 0.5 * point[2]
    sky = (0.6 + 0.4 * normal[2]) * (0.55 + 0.45 * height * (2 - height))
    brightness = torch.where(visible, _SUN * sun + _SKY * sky, 0) / _NUM_RAYS

    u, v = texture_coordinates(name, point, direction, objects.rotation)
    length, start_u, start_v = objects.texture
    scale = objects.radius / length
    textures, _ = _textures(split)
    rows, columns = textures.shape[2:]
    row = objects.block * columns + _mirror(v * scale + start_v) * (columns - 1)
    column = _mirror(u * scale + start_u) * (columns - 1)
    # grid_sample's coordinates run from -1 to 1 over the outer edges of all blocks.
    grid = torch.stack([(2 * column + 1) / columns - 1, (2 * row + 1) / rows - 1], dim=-1)
    albedo = F.grid_sample(textures.expand(_NUM_RAYS, -1, -1, -1), grid[:, None], align_corners=False)
    return (albedo[:, :, 0] * brightness[:, None]).sum(0)


def _mirror(x: Tensor) -> Tensor:
    """Folds the line into [0, 1], to and fro."""
    return 1 - (x - 2 * (x / 2).floor() - 1).abs()


def _ground(scenes: Scenes, shadow: Tensor, split: str, image_size: int) -> Tensor:
    """Colors of the ground, linear in light: (3, pixels)."""
    brightness = _SUN * math.sin(_LIGHT_ELEVATION) * (1 - shadow) + _SKY * _visible_sky(scenes, image_size)
    # Two samples to each pixel's height: the ground is foreshortened.
    u = (torch.arange(image_size) + 0.5) / image_size - 0.5
    v = (0.5 - (torch.arange(2 * image_size) + 0.5) / (2 * image_size))[:, None] / SIN
    length, start_u, start_v, angle = torch.from_numpy(scenes.ground_texture).T[..., None, None]
    cosine, sine = angle.cos() / length, angle.sin() / length
    grid = torch.stack([u * cosine - v * sine + start_u, -(u * sine + v * cosine + start_v)], dim=-1)
    blocks = _ground_textures(split).index_select(0, torch.from_numpy(scenes.ground_block))
    # Blocks are mirrored beyond their edges. grid_sample's coordinates run from -1 to 1 over one of them.
    albedo = F.grid_sample(blocks, 2 * grid - 1, padding_mode="reflection", align_corners=False)
    albedo = (albedo[:, :, ::2] + albedo[:, :, 1::2]) / 2
    return albedo.transpose(0, 1).reshape(3, -1) * brightness


def _shadows(groups: list[_Objects], free: Tensor, image_size: int) -> Tensor:
    """Share of the light that objects keep from each pixel of the ground: (pixels,) in [0, 1].

    Each of a pixel's rays looks at another part of the light, so that shadows are sharp at an object's foot and grow
    softer with height.
    """
    blocked = torch.zeros(_NUM_RAYS, len(free), dtype=torch.bool)
    for name, objects in zip(SHAPE_NAMES, groups, strict=True):
        pixels = _shadow_pixels(objects, image_size)
        pixels = pixels.select(free.index_select(0, pixels.key).nonzero()[:, 0])
        origin = _ray_origins(objects, pixels, image_size, above=(0.0, 1 / SIN, 0.0))
        directions = objects.to_own_frame(_light_directions(objects.light)).index_select(2, pixels.object)
        ray, pixel = (ray_entry(name, origin, directions) < torch.inf).nonzero(as_tuple=True)
        blocked[ray, pixels.key.index_select(0, pixel)] = True
    return blocked.sum(0) / _NUM_RAYS


def _light_directions(light: Tensor) -> Tensor:
    """Directions (3, rays, k) to a square grid of points of the light around its center (3, k)."""
    x, y, z = light
    horizontal = (x * x + y * y).sqrt()
    side = torch.stack([-y / horizontal, x / horizontal, torch.zeros_like(z)])
    rise = torch.stack([-x * z / horizontal, -y * z / horizontal, horizontal])
    # In another order than the pixel's grid, so that place in the pixel and place in the light are unrelated.
    ray = torch.arange(_NUM_RAYS) * 4 % _NUM_RAYS
    a, b = ((index - (_GRID - 1) / 2) * (2 / _GRID * _LIGHT_RADIUS) for index in (ray % _GRID, ray // _GRID))
    direction = light[:, None] + a[:, None] * side[:, None] + b[:, None] * rise[:, None]
    length = (direction[0] * direction[0] + direction[1] * direction[1] + direction[2] * direction[2]).sqrt()
    return direction / length


def _shadow_pixels(objects: _Objects, image_size: int) -> _Pixels:
    """Pixels of the boxes around footprints and the shadows of tops."""
    x, y, _ = objects.center
    cube = objects.shape == SHAPE_NAMES.index("cube")
    reach = torch.where(cube, math.sqrt(2) * objects.radius, objects.radius)
    length = 2 * objects.radius / math.tan(_LIGHT_ELEVATION) / math.cos(_LIGHT_ELEVATION)
    shadow_x, shadow_y = x - objects.light[0] * length, y - objects.light[1] * length
    soft = 4 * _LIGHT_RADIUS * objects.radius
    return _pixels_in_boxes(
        objects,
        0.5 + torch.minimum(x - reach, shadow_x - reach - soft),
        0.5 + torch.maximum(x + reach, shadow_x + reach + soft),
        0.5 - torch.maximum(y + reach, shadow_y + reach + soft) * SIN,
        0.5 - torch.minimum(y - reach, shadow_y - reach - soft) * SIN,
        image_size,
    )


def _visible_sky(scenes: Scenes, image_size: int) -> Tensor:
    """Share of the sky that each pixel of the ground sees: (pixels,) in [0, 1].

    Objects count as balls of their volume: a ball of radius r at distance d hides (r / d)^2 of a sky that is weighted
    by the cosine, times the cosine of its own direction, r / d.
    """
    center = (torch.arange(image_size) + 0.5) / image_size - 0.5
    x, y = center, -center[:, None] / SIN
    sky = torch.ones(len(scenes.exists), image_size, image_size)
    for slot in range(scenes.exists.shape[1]):
        radius, place_x, place_y = (
            torch.from_numpy(field)[:, None, None]
            for field in (scenes.size[:, slot] / 2 * scenes.exists[:, slot], *scenes.position[:, slot].T)
        )
        dx, dy = x - place_x, y - place_y
        square = dx * dx + dy * dy + radius * radius
        sky = sky * (1 - radius * radius * radius / (square * square.sqrt()).clamp_min(1e-6))
    return sky.flatten()


def load_textures(split: str) -> np.ndarray:
    """Reads the textures of a split, which stay in memory; number of blocks of each photograph, (19,) int64."""
    _ground_textures(split)
    return _textures(split)[1].numpy()


@functools.cache
def _textures(split: str) -> tuple[Tensor, Tensor]:
    """Blocks of a split below each other, (1, 3, blocks * 112, 112) float32 in [0, 1], linear in light; number of
    blocks of each photograph, (19,) int64."""
    blocks, counts = photograph_blocks(split, TABLETOP_SPLITS)
    textures = torch.from_numpy(blocks).flatten(0, 1).permute(2, 0, 1)[None].float().div(255)
    # Squares stand for the sRGB curve: their inverse, a root, is rounded alike everywhere.
    textures = _BLACK + (1 - _BLACK) * textures.square()
    return textures.contiguous(memory_format=torch.channels_last), torch.from_numpy(counts)


@functools.cache
def _ground_textures(split: str) -> Tensor:
    """The blocks at half the resolution, (blocks, 3, 56, 56)."""
    textures, counts = _textures(split)
    return (
        F.avg_pool2d(textures, 2).view(3, int(counts.sum()), -1, textures.shape[-1] // 2).transpose(0, 1).contiguous()
    )
