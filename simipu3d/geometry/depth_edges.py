"""Where does one thing stand in front of another, as a lidar sees it?

Such a depth edge lies between two neighbouring beams, one on the near thing and one past it. An image has an edge there too,
which is what a calibration is judged by. Lidar frame, metres; angles in degrees. Shapes: N points, E edges.

Source of the idea: Levinson & Thrun, Automatic Online Calibration of Cameras and Lasers, RSS 2013.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

BESIDE_DEG = (0.5, 0.15)
"""Neighbours of a scan line: at most so far apart along it (the coarsest lidars of cars) and across it (half the spacing of
the finest)."""
ABOVE_DEG = (1.6, 0.25)
"""Neighbours one above the other: at most so far apart upwards (a lidar of 32 beams has 1.33) and sideways."""
SMALLEST_STEP = 0.3
"""Metres between near and far beside each other; less may be one thing seen at a slant."""
SMALLEST_STEP_ABOVE = (1.0, 0.15)
"""Metres between near and far above each other, and share of the distance: neighbouring beams on the ground are far apart."""
LARGEST_STEP = 5.0
"""A step counts by its square root, metres, and not more than this one."""
NEIGHBOURS = 8


@dataclass(frozen=True, eq=False)
class DepthEdges:
    """Depth edges of a scan.

    Attributes:
        xyz: (E, 3) places at the distance of the near thing, in the direction halfway to its far neighbour: the edge is
            somewhere between the two.
        weight: (E,) root of the step in metres.
        upright: (E,) bool: far neighbour beside the near point (an upright edge), or above it (a level one).
    """

    xyz: NDArray[np.float64]
    weight: NDArray[np.float64]
    upright: NDArray[np.bool_]


def depth_edges(xyz: NDArray[np.floating], origin: NDArray[np.floating]) -> DepthEdges:
    """The depth edges of a scan whose order and beams are unknown.

    Args:
        xyz: (N, 3) points; N may be 0.
        origin: (3,) where they were seen from.
    """
    rays = np.asarray(xyz, dtype=np.float64) - origin
    distance = np.linalg.norm(rays, axis=1)
    rays, distance = rays[distance > 1e-3], distance[distance > 1e-3]
    if len(rays) < 2:
        return DepthEdges(np.zeros((0, 3)), np.zeros(0), np.zeros(0, dtype=np.bool_))
    units = rays / distance[:, None]
    azimuth = np.rad2deg(np.arctan2(units[:, 1], units[:, 0]))
    elevation = np.rad2deg(np.arcsin(np.clip(units[:, 2], -1, 1)))
    left, right = _neighbours(azimuth, elevation, *BESIDE_DEG)
    above, _ = _neighbours(elevation, azimuth, *ABOVE_DEG)
    places, steps, upright = [], [], []
    level_step = np.maximum(SMALLEST_STEP_ABOVE[0], SMALLEST_STEP_ABOVE[1] * distance)
    for neighbour, smallest, is_upright in (
        (left, SMALLEST_STEP, True),
        (right, SMALLEST_STEP, True),
        (above, level_step, False),
    ):
        step = np.where(neighbour >= 0, distance[neighbour] - distance, 0.0)
        near = np.flatnonzero(step > smallest)
        halfway = units[near] + units[neighbour[near]]
        halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
        places.append(halfway * distance[near, None] + origin)
        steps.append(step[near])
        upright.append(np.full(len(near), is_upright))
    weight = np.sqrt(np.minimum(np.concatenate(steps), LARGEST_STEP))
    return DepthEdges(np.concatenate(places), weight, np.concatenate(upright))


def _neighbours(
    along: NDArray[np.float64], across: NDArray[np.float64], reach: float, width: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each direction the nearest other one at a larger `along`, and at a smaller one; -1 where none is within reach.

    Directions that differ by less than a twentieth of the reach in `along` are the same beam's, or another lidar's.
    """
    places = np.column_stack([along, across * (reach / width)])
    gaps, rows = cKDTree(places).query(places, k=min(NEIGHBOURS, len(places)), distance_upper_bound=reach)
    known = np.isfinite(gaps)
    rows = np.where(known, rows, 0)
    offset = along[rows] - along[:, None]
    found = []
    for sign in (1, -1):
        candidates = np.where(known & (sign * offset > 0.05 * reach), gaps, np.inf)
        best = candidates.argmin(axis=1)[:, None]
        row = np.take_along_axis(rows, best, axis=1)[:, 0]
        found.append(np.where(np.isfinite(np.take_along_axis(candidates, best, axis=1)[:, 0]), row, -1))
    return found[0], found[1]
