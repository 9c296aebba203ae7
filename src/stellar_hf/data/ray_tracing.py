# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Rays and four convex solids in closed form: where a ray enters, where the surface faces, how a texture lies on it.

All solids fit into the cube [-1, 1]^3 and stand on its floor, z = -1: the unit sphere; the cube itself; a cylinder of
radius 1; a cone with a base of radius 1 and its apex at (0, 0, 1). Points and directions are tensors (3, ...) of x, y
and z.

Only sums, products, quotients and roots are taken, which are rounded alike everywhere: results do not depend on how
torch splits a tensor between threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHAPE_NAMES: tuple[str, ...] = ("sphere", "cube", "cylinder", "cone")

_CONE_SLOPE = 0.5  # radius per height
_CONE_SINE = 0.2**0.5  # of the angle between its axis and its side


def ray_entry(shape: str, origin: Tensor, direction: Tensor) -> Tensor:
    """Where lines enter a solid.

    Args:
        shape: One of `SHAPE_NAMES`.
        origin: (3, ...) floating point.
        direction: (3, ...) floating point unit vectors that broadcast with the origins. For a cone they must be less
            steep than its side, 63.4 degrees: then a line meets one half of the double cone only.

    Returns:
        Signed distance from origin to entry along the direction, infinite where the line misses the solid.
    """
    if shape == "sphere":
        half_b = _dot(origin, direction)
        near, far = _roots(torch.ones_like(half_b), half_b, _dot(origin, origin) - 1)
    elif shape == "cube":
        near, far = _slab(origin[0], direction[0])
        for axis in (1, 2):
            near, far = _intersection((near, far), _slab(origin[axis], direction[axis]))
    elif shape in ("cylinder", "cone"):
        a = direction[0] * direction[0] + direction[1] * direction[1]
        half_b = origin[0] * direction[0] + origin[1] * direction[1]
        c = origin[0] * origin[0] + origin[1] * origin[1]
        if shape == "cylinder":
            c = c - 1
        else:
            radius, change = _CONE_SLOPE * (1 - origin[2]), -_CONE_SLOPE * direction[2]
            a, half_b, c = a - change * change, half_b - radius * change, c - radius * radius
        near, far = _intersection(_roots(a, half_b, c), _slab(origin[2], direction[2]))
    else:
        raise ValueError(f"shape is {shape!r}, but solids are {', '.join(SHAPE_NAMES)}.")
    return torch.where(near < far, near, torch.inf)


def surface_normal(shape: str, point: Tensor) -> Tensor:
    """Outward unit normals at points (3, ...) of a solid's surface, of the same shape. Floors have none: they are not
    seen from above."""
    x, y, z = point
    if shape == "sphere":
        return point
    if shape == "cube":
        magnitude = point.abs()
        return torch.where(magnitude == magnitude.amax(0), point.sign(), 0)
    zero = torch.zeros_like(z)
    radius = (x * x + y * y).sqrt().clamp_min(1e-6)
    if shape == "cylinder":
        top = _is_top(z)
        return torch.stack([torch.where(top, zero, x / radius), torch.where(top, zero, y / radius), top.to(z.dtype)])
    cosine = (1 - _CONE_SINE * _CONE_SINE) ** 0.5
    return torch.stack([cosine * x / radius, cosine * y / radius, zero + _CONE_SINE])


def texture_coordinates(shape: str, point: Tensor, direction: Tensor, turn: Tensor) -> Tensor:
    """Lays a plane around a solid, in lengths of the unit solid, so that a texture keeps its scale.

    The sides of cylinder and cone are unrolled without distortion, with the seam opposite to the viewer. A sphere is
    mapped by Lambert's azimuthal equal-area projection from its top, which has no seam. Faces of a cube are flat.

    Args:
        shape: One of `SHAPE_NAMES`.
        point: (3, ...) visible points of its surface.
        direction: (3, ...) direction of view.
        turn: (...) angle by which the solid is turned about its axis, in radians.

    Returns:
        (2, ...) coordinates.
    """
    x, y, z = point
    if shape == "sphere":
        stretch = (2 / (1 + z).clamp_min(1e-3)).sqrt()
        return torch.stack([x * stretch, y * stretch])
    if shape == "cube":
        side_x, side_y, top = surface_normal(shape, point).abs().unbind()
        # Whole numbers of an odd size part the faces: they show different places of the plane.
        return torch.stack([x * (1 - side_x) + (y + 7) * side_x, y * top + (z - 5) * (1 - top)])
    horizontal = (direction[0] * direction[0] + direction[1] * direction[1]).sqrt()
    front_x, front_y = -direction[0] / horizontal, -direction[1] / horizontal
    radius = (x * x + y * y).sqrt().clamp_min(1e-6)
    cosine, sine = (x * front_x + y * front_y) / radius, (y * front_x - x * front_y) / radius
    angle = _angle(cosine, sine)
    if shape == "cylinder":
        top = _is_top(z)
        return torch.stack([torch.where(top, x, angle - turn), torch.where(top, y, z + 5)])
    slant = (1 - z) * (_CONE_SLOPE / _CONE_SINE)
    unrolled = _CONE_SINE * angle
    square = unrolled * unrolled
    across = slant * unrolled * (1 - square / 6 + square * square / 120)
    down = slant * (1 - square / 2 + square * square / 24)
    # Turning the cone turns its unrolled side about the apex.
    cosine, sine = torch.cos(_CONE_SINE * turn), torch.sin(_CONE_SINE * turn)
    return torch.stack([across * cosine - down * sine, -(across * sine + down * cosine)])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _roots(a: Tensor, half_b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Where a t^2 + 2 half_b t + c < 0, for a > 0; an empty interval where nowhere."""
    discriminant = half_b * half_b - a * c
    root = discriminant.clamp_min(0).sqrt()
    return torch.where(discriminant > 0, (-half_b - root) / a, torch.inf), (root - half_b) / a


def _slab(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Where a coordinate of the line lies in [-1, 1]."""
    inverse = 1 / direction
    first, second = (-1 - origin) * inverse, (1 - origin) * inverse
    return torch.minimum(first, second), torch.maximum(first, second)


def _intersection(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def _is_top(z: Tensor) -> Tensor:
    return z > 1 - 1e-4


def _angle(cosine: Tensor, sine: Tensor) -> Tensor:
    """Angles in [-pi/2, pi/2] to within 0.01, of twice the half angle's tangent."""
    tangent = sine / (1 + cosine).clamp_min(1e-3)
    square = tangent * tangent
    return 2 * tangent * (15 + 4 * square) / (15 + 9 * square)
