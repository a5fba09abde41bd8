"""Where does a ray meet the street?

A world is a ground plane z = 0 and P convex solids; x runs along the street, z up, metres. A solid has its own upright
frame (centre, yaw) and half sizes; its kind says what they bound:

    HEX       box whose four walls may lean: at height h above its floor it spans [-hx + back h, hx - front h]
              along x and [-hy + side h, hy - side h] along y
    CYL_Z     upright cylinder, radius hx, half height hz
    CYL_Y     lying cylinder (a wheel), radius hx, half width hy
    ELLIPSOID semi-axes hx, hy, hz
    FOLIAGE   the shell of an ellipsoid with holes: a cell of `HOLE_SIZE` metres of it is there or not, by `LEAF_COVER`
    RING      flat ring in the plane y = 0 between the radii hz and hx (a bicycle's wheel); hy is unused

Rays of one sensor share their origin, or nearly so while the vehicle drives on, so solids are listed by direction
(`index_directions`), nearest first; shadow rays share their direction, so solids are listed by where their shadow falls
(`index_shadows`). Both only spare work: the answer is that of trying every solid.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from simipu3d.data.drive_world.noise import inner, lattice

HEX, CYL_Z, CYL_Y, ELLIPSOID, FOLIAGE, RING = range(6)
FRONT, BACK, LEFT, RIGHT, TOP, BOTTOM = range(6)
"""Faces: +x, -x, +y, -y, +z, -z. Round sides are FRONT, the inner side of a FOLIAGE shell is BACK."""

GROUND, NOTHING = -1, -2
"""What a ray meets when it is no solid."""

FAR = 400.0
"""Metres along a ray; the ground ends there, half a pixel below the horizon, and the sky begins."""

HOLE_SIZE, LEAF_COVER = 0.22, 0.72

_AZIMUTH_BINS, _ELEVATION_BINS, _SHADOW_CELL, _SHADOW_HALF_WIDTH = 360, 120, 1.0, 90.0
_LOWEST, _HIGHEST = math.radians(-60.0), math.radians(60.0)


class World(NamedTuple):
    """Everything that a ray can meet at one moment.

    Attributes:
        kind: (P,) int64.
        shape: (P, 11) float64: centre x, y, z, cos yaw, sin yaw, hx, hy, hz, front, back, side (the leaning of HEX).
        look: (P, 14) float64, see `materials`.
        label: (P,) int64 class of a hit; slabs and the ground decide by place.
        street: (6,) float64, see `materials`.
        crossings: (C, 2) float64, centre and half width along x of every side street.
    """

    kind: NDArray[np.int64]
    shape: NDArray[np.float64]
    look: NDArray[np.float64]
    label: NDArray[np.int64]
    street: NDArray[np.float64]
    crossings: NDArray[np.float64]


class Directions(NamedTuple):
    """Solids by direction from one origin: those of bin b are items[starts[b]:starts[b + 1]], nearest first."""

    origin: NDArray[np.float64]
    near: NDArray[np.float64]
    starts: NDArray[np.int64]
    items: NDArray[np.int32]


class Shadows(NamedTuple):
    """Solids by the cell of the ground that their shadow may touch; `corner` is the grid's first corner, metres."""

    sun: NDArray[np.float64]
    corner: NDArray[np.float64]
    cells: NDArray[np.int64]
    starts: NDArray[np.int64]
    items: NDArray[np.int32]


def half_bounds(kind: NDArray, shape: NDArray) -> NDArray[np.float64]:
    """(P, 3) half sizes, in each solid's own frame, of a box about its centre that holds the solid."""
    bounds = shape[:, 5:8].copy()
    hexes, lying, rings = kind == HEX, kind == CYL_Y, kind == RING
    height = 2 * bounds[hexes, 2:3]
    leaning = np.abs(bounds[hexes, :1] - height * shape[hexes, 8:10]).max(axis=1)
    bounds[hexes, 0] = np.maximum(bounds[hexes, 0], leaning)
    bounds[hexes, 1] = np.maximum(bounds[hexes, 1], bounds[hexes, 1] - height[:, 0] * shape[hexes, 10])
    bounds[lying, 2] = bounds[lying, 0]
    bounds[rings, 2] = bounds[rings, 0]
    bounds[rings, 1] = 1e-3
    return bounds


def _corners(shape: NDArray, bounds: NDArray) -> NDArray[np.float64]:
    """(P, 4, 2) corners of the footprints."""
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]], dtype=np.float64)
    local = signs * bounds[:, None, :2]
    cos, sin = shape[:, 3:4], shape[:, 4:5]
    turned = np.stack([local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos], axis=-1)
    return turned + shape[:, None, :2]


def index_directions(world: World, origin: NDArray[np.float64], slack: float = 0.0) -> Directions:
    """List the solids of `world` by azimuth and elevation as seen from `origin` (3,).

    The list holds for every origin within `slack` metres of it: seen from there, a solid fills no more than one that is
    larger by `slack` on all sides fills as seen from `origin`.
    """
    bounds = half_bounds(world.kind, world.shape) + slack
    offset = origin[:2] - world.shape[:, :2]
    cos, sin = world.shape[:, 3], world.shape[:, 4]
    local = np.abs(np.stack([offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin], axis=1))
    nearest = np.hypot(*np.maximum(local - bounds[:, :2], 0.0).T)
    corners = _corners(world.shape, bounds) - origin[:2]
    farthest = np.hypot(corners[..., 0], corners[..., 1]).max(axis=1)

    middle = np.arctan2(-offset[:, 1], -offset[:, 0])
    spread = np.arctan2(corners[..., 1], corners[..., 0]) - middle[:, None]
    spread = (spread + np.pi) % (2 * np.pi) - np.pi
    around = nearest < 1e-3
    width = 2 * np.pi / _AZIMUTH_BINS
    first = np.floor((middle + spread.min(axis=1) - 1e-9) / width).astype(np.int64)
    last = np.floor((middle + spread.max(axis=1) + 1e-9) / width).astype(np.int64)
    first, last = np.where(around, 0, first), np.where(around, _AZIMUTH_BINS - 1, last)

    top = world.shape[:, 2] + bounds[:, 2] - origin[2]
    bottom = world.shape[:, 2] - bounds[:, 2] - origin[2]
    highest = np.arctan2(top, np.where(top > 0, nearest, farthest)) + 1e-9
    lowest = np.arctan2(bottom, np.where(bottom > 0, farthest, nearest)) - 1e-9
    order = np.argsort(nearest, kind="stable")
    ranges = np.stack([first, last, _elevation_bin(lowest), _elevation_bin(highest)], axis=1)
    starts, items = _fill(ranges[order], order, _AZIMUTH_BINS, _ELEVATION_BINS)
    return Directions(np.asarray(origin, dtype=np.float64), nearest, starts, items)


def _elevation_bin(elevation: NDArray) -> NDArray[np.int64]:
    scaled = (elevation - _LOWEST) / (_HIGHEST - _LOWEST) * _ELEVATION_BINS
    return np.clip(np.floor(scaled), 0, _ELEVATION_BINS - 1).astype(np.int64)


def index_shadows(world: World, sun: NDArray[np.float64], middle_x: float, half_length: float) -> Shadows:
    """List the solids by the ground that their shadow touches, for x within `half_length` of `middle_x`.

    Args:
        sun: (3,) unit vector towards the sun; its z is positive.
    """
    bounds = half_bounds(world.kind, world.shape)
    corner = np.array([middle_x - half_length, -_SHADOW_HALF_WIDTH])
    cells = np.array([math.ceil(2 * half_length / _SHADOW_CELL), math.ceil(2 * _SHADOW_HALF_WIDTH / _SHADOW_CELL)])
    footprint = _corners(world.shape, bounds)
    slide = sun[:2] / sun[2]
    heights = world.shape[:, 2:3] + bounds[:, 2:] * np.array([[-1.0, 1.0]])
    shadow = (footprint[:, None] - heights[:, :, None, None] * slide).reshape(len(footprint), 8, 2)
    low = np.floor((shadow.min(axis=1) - corner) / _SHADOW_CELL - 1e-9).astype(np.int64)
    high = np.floor((shadow.max(axis=1) - corner) / _SHADOW_CELL + 1e-9).astype(np.int64)
    inside = ((high >= 0) & (low < cells)).all(axis=1)
    low, high = np.clip(low, 0, cells - 1), np.clip(high, 0, cells - 1)
    ranges = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    order = np.flatnonzero(inside)
    starts, items = _fill(ranges[order], order, int(cells[0]), int(cells[1]))
    return Shadows(np.asarray(sun, dtype=np.float64), corner, cells, starts, items)


@njit(cache=True, nogil=True)
def _fill(ranges, order, num_i, num_j):
    """Compressed rows: bin i * num_j + j lists every order[k] whose ranges[k] (i0, i1, j0, j1) hold it; i wraps."""
    starts = np.zeros(num_i * num_j + 1, dtype=np.int64)
    for k in range(len(order)):
        for i in range(ranges[k, 0], ranges[k, 1] + 1):
            for j in range(ranges[k, 2], ranges[k, 3] + 1):
                starts[(i % num_i) * num_j + j + 1] += 1
    for b in range(num_i * num_j):
        starts[b + 1] += starts[b]
    items = np.empty(starts[-1], dtype=np.int32)
    filled = starts[:-1].copy()
    for k in range(len(order)):
        for i in range(ranges[k, 0], ranges[k, 1] + 1):
            for j in range(ranges[k, 2], ranges[k, 3] + 1):
                b = (i % num_i) * num_j + j
                items[filled[b]] = order[k]
                filled[b] += 1
    return starts, items


@inner
def _hit_hex(shape, x, y, z, dx, dy, dz):
    """Clip the ray by six half-spaces a + t b <= 0; the entry is the last of the planes crossed inwards."""
    hx, hy, hz = shape[5], shape[6], shape[7]
    front, back, side = shape[8], shape[9], shape[10]
    h = z + hz
    enter, leave, face = -np.inf, np.inf, -1
    for k in range(6):
        if k == 0:
            a, b = x + front * h - hx, dx + front * dz
        elif k == 1:
            a, b = -x + back * h - hx, -dx + back * dz
        elif k == 2:
            a, b = y + side * h - hy, dy + side * dz
        elif k == 3:
            a, b = -y + side * h - hy, -dy + side * dz
        elif k == 4:
            a, b = z - hz, dz
        else:
            a, b = -z - hz, -dz
        if b < 0.0:
            t = -a / b
            if t > enter:
                enter, face = t, k
        elif b > 0.0:
            leave = min(leave, -a / b)
        elif a > 0.0:
            return np.inf, 0
        if enter > leave:
            return np.inf, 0
    if enter <= 0.0:
        return np.inf, 0
    return enter, face


@inner
def _hit_cylinder(radius, half, x, y, z, dx, dy, dz):
    """Cylinder about the third axis; TOP and BOTTOM are its caps."""
    enter, leave, face = -np.inf, np.inf, 0
    a = dx * dx + dy * dy
    c = x * x + y * y - radius * radius
    if a > 1e-18:
        b = x * dx + y * dy
        root = b * b - a * c
        if root <= 0.0:
            return np.inf, 0
        root = math.sqrt(root)
        enter, leave = (-b - root) / a, (-b + root) / a
    elif c > 0.0:
        return np.inf, 0
    if dz != 0.0:
        t_low, t_high = (-half - z) / dz, (half - z) / dz
        cap = BOTTOM
        if t_low > t_high:
            t_low, t_high = t_high, t_low
            cap = TOP
        if t_low > enter:
            enter, face = t_low, cap
        leave = min(leave, t_high)
    elif abs(z) > half:
        return np.inf, 0
    if enter > leave or enter <= 0.0:
        return np.inf, 0
    return enter, face


@inner
def _leaf(shape, x, y, z):
    """Is there a leaf at a place of the shell, in the crown's own frame?"""
    i, j, k = math.floor(x / HOLE_SIZE), math.floor(y / HOLE_SIZE), math.floor(z / HOLE_SIZE)
    return lattice(i, j, k, math.floor(shape[5] * 1000.0)) < LEAF_COVER


@inner
def _hit_ellipsoid(shape, x, y, z, dx, dy, dz, foliage):
    hx, hy, hz = shape[5], shape[6], shape[7]
    a = (dx / hx) ** 2 + (dy / hy) ** 2 + (dz / hz) ** 2
    b = x * dx / hx**2 + y * dy / hy**2 + z * dz / hz**2
    c = (x / hx) ** 2 + (y / hy) ** 2 + (z / hz) ** 2 - 1.0
    root = b * b - a * c
    if root <= 0.0:
        return np.inf, 0
    root = math.sqrt(root)
    t = (-b - root) / a
    if t > 0.0 and (not foliage or _leaf(shape, x + t * dx, y + t * dy, z + t * dz)):
        return t, 0
    t = (-b + root) / a
    if foliage and t > 0.0 and _leaf(shape, x + t * dx, y + t * dy, z + t * dz):
        return t, 1
    return np.inf, 0


@njit
def hit_solid(kind, shape, x, y, z, dx, dy, dz):
    """First meeting of a ray from outside with one solid: (distance, face); the distance is infinite for a miss."""
    x, y, z = x - shape[0], y - shape[1], z - shape[2]
    cos, sin = shape[3], shape[4]
    x, y = cos * x + sin * y, cos * y - sin * x
    dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    if kind == HEX:
        return _hit_hex(shape, x, y, z, dx, dy, dz)
    if kind == CYL_Z:
        return _hit_cylinder(shape[5], shape[7], x, y, z, dx, dy, dz)
    if kind == CYL_Y:
        t, face = _hit_cylinder(shape[5], shape[6], x, z, y, dx, dz, dy)
        return t, face - 2 if face >= TOP else face
    if kind == RING:
        if dy == 0.0:
            return np.inf, 0
        t = -y / dy
        radius = math.hypot(x + t * dx, z + t * dz)
        if t > 0.0 and shape[7] <= radius <= shape[5]:
            return t, LEFT if dy < 0.0 else RIGHT
        return np.inf, 0
    return _hit_ellipsoid(shape, x, y, z, dx, dy, dz, kind == FOLIAGE)


@inner
def trace(world, directions, dx, dy, dz):
    """What a ray from `directions.origin` along the unit vector (dx, dy, dz) meets first.

    Returns:
        distance in metres (FAR at most, meaningless for NOTHING), solid (or GROUND, NOTHING), face.
    """
    x, y, z = directions.origin
    best, solid, side = FAR, NOTHING, 0
    if dz < 0.0 and -z / dz < FAR:
        best, solid, side = -z / dz, GROUND, TOP
    width = 2 * math.pi / _AZIMUTH_BINS
    i = math.floor(math.atan2(dy, dx) / width) % _AZIMUTH_BINS
    elevation = math.atan2(dz, math.sqrt(dx * dx + dy * dy))
    j = math.floor((elevation - _LOWEST) / (_HIGHEST - _LOWEST) * _ELEVATION_BINS)
    b = i * _ELEVATION_BINS + min(max(j, 0), _ELEVATION_BINS - 1)
    for k in range(directions.starts[b], directions.starts[b + 1]):
        item = directions.items[k]
        if directions.near[item] > best:
            break
        t, face = hit_solid(world.kind[item], world.shape[item], x, y, z, dx, dy, dz)
        if t < best:
            best, solid, side = t, item, face
    return best, solid, side


@njit
def in_shadow(world, shadows, x, y, z):
    """Does a solid stand between (x, y, z) and the sun?"""
    sx, sy, sz = shadows.sun
    i = math.floor((x - sx / sz * z - shadows.corner[0]) / _SHADOW_CELL)
    j = math.floor((y - sy / sz * z - shadows.corner[1]) / _SHADOW_CELL)
    if i < 0 or j < 0 or i >= shadows.cells[0] or j >= shadows.cells[1]:
        return False
    b = i * shadows.cells[1] + j
    for k in range(shadows.starts[b], shadows.starts[b + 1]):
        item = shadows.items[k]
        t, _ = hit_solid(world.kind[item], world.shape[item], x, y, z, sx, sy, sz)
        if t < np.inf:
            return True
    return False


@inner
def place_on_solid(shape, x, y, z):
    """A world point in a solid's own frame."""
    x, y, z = x - shape[0], y - shape[1], z - shape[2]
    return shape[3] * x + shape[4] * y, shape[3] * y - shape[4] * x, z


@inner
def normal_of(kind, shape, face, x, y, z):
    """Outward unit normal, in world axes, at a place (x, y, z) of the solid's own frame."""
    if kind == HEX:
        nx, ny, nz = 0.0, 0.0, 0.0
        if face == FRONT:
            nx, nz = 1.0, shape[8]
        elif face == BACK:
            nx, nz = -1.0, shape[9]
        elif face == LEFT:
            ny, nz = 1.0, shape[10]
        elif face == RIGHT:
            ny, nz = -1.0, shape[10]
        elif face == TOP:
            nz = 1.0
        else:
            nz = -1.0
    elif kind == CYL_Z:
        nx, ny, nz = (0.0, 0.0, 1.0) if face == TOP else (0.0, 0.0, -1.0) if face == BOTTOM else (x, y, 0.0)
    elif kind in (CYL_Y, RING):
        nx, ny, nz = (0.0, 1.0, 0.0) if face == LEFT else (0.0, -1.0, 0.0) if face == RIGHT else (x, 0.0, z)
    else:
        nx, ny, nz = x / shape[5] ** 2, y / shape[6] ** 2, z / shape[7] ** 2
        if face == BACK:
            nx, ny, nz = -nx, -ny, -nz
    scale = 1.0 / math.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx * scale, ny * scale, nz * scale
    return shape[3] * nx - shape[4] * ny, shape[4] * nx + shape[3] * ny, nz
