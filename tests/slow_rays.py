"""A slow ray caster for drive_world: every surface of every solid, kept where the meeting lies on the solid."""

import numpy as np

from simipu3d.data.drive_world import raycast
from simipu3d.data.drive_world.noise import lattice


def inside(kind, shape, p):
    """Is p (3,), in the solid's own frame, in or on it?"""
    (hx, hy, hz), (front, back, side), h = shape[5:8], shape[8:11], p[2] + shape[7]
    e = 1e-7
    if kind == raycast.HEX:
        along = -hx + back * h - e <= p[0] <= hx - front * h + e
        return along and abs(p[1]) <= hy - side * h + e and abs(p[2]) <= hz + e
    if kind == raycast.CYL_Z:
        return np.hypot(p[0], p[1]) <= hx + e and abs(p[2]) <= hz + e
    if kind == raycast.CYL_Y:
        return np.hypot(p[0], p[2]) <= hx + e and abs(p[1]) <= hy + e
    if kind == raycast.RING:
        return hz - e <= np.hypot(p[0], p[2]) <= hx + e and abs(p[1]) <= e
    return ((p / shape[5:8]) ** 2).sum() <= 1 + e


def meetings(kind, shape, o, d):
    """All t at which the ray o + t d crosses a surface of the solid, extended without end."""
    (hx, hy, hz), (front, back, side) = shape[5:8], shape[8:11]
    if kind == raycast.RING:
        planes, quadric = [((0, 1, 0), 0)], None
    elif kind == raycast.HEX:
        planes = [((1, 0, front), hx - front * hz), ((-1, 0, back), hx - back * hz), ((0, 1, side), hy - side * hz)]
        planes += [((0, -1, side), hy - side * hz), ((0, 0, 1), hz), ((0, 0, -1), hz)]
        quadric = None
    elif kind == raycast.CYL_Z:
        planes, quadric = [((0, 0, 1), hz), ((0, 0, 1), -hz)], (hx**-2, hx**-2, 0)
    elif kind == raycast.CYL_Y:
        planes, quadric = [((0, 1, 0), hy), ((0, 1, 0), -hy)], (hx**-2, 0, hx**-2)
    else:
        planes, quadric = [], (hx**-2, hy**-2, hz**-2)
    found = [(level - np.dot(normal, o)) / np.dot(normal, d) for normal, level in planes if np.dot(normal, d) != 0]
    if quadric is not None:
        q = np.array(quadric)
        roots = np.roots([(q * d * d).sum(), 2 * (q * o * d).sum(), (q * o * o).sum() - 1])
        found += list(roots.real[np.abs(roots.imag) < 1e-12])
    return found


def slow_cast(world, origin, direction):
    """Distance and solid that a ray meets first."""
    best, solid = raycast.FAR, raycast.NOTHING
    if direction[2] < 0 and -origin[2] / direction[2] < best:
        best, solid = -origin[2] / direction[2], raycast.GROUND
    for index, (kind, shape) in enumerate(zip(world.kind, world.shape, strict=True)):
        turn = np.array([[shape[3], shape[4], 0], [-shape[4], shape[3], 0], [0, 0, 1]])
        o, d = turn @ (origin - shape[:3]), turn @ direction
        reach = np.linalg.norm(raycast.half_bounds(world.kind[[index]], world.shape[[index]]))
        if np.linalg.norm(o - (o @ d) * d) > 1.01 * reach:
            continue
        for t in meetings(kind, shape, o, d):
            p = o + t * d
            if not 0 < t < best or not inside(kind, shape, p):
                continue
            if kind == raycast.FOLIAGE:
                cell = np.floor(p / raycast.HOLE_SIZE).astype(int)
                if lattice(*(int(c) for c in cell), int(np.floor(shape[5] * 1000))) >= raycast.LEAF_COVER:
                    continue
            best, solid = t, index
    return best, solid
