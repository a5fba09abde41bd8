"""Where are the corners of a labelled box, and where does it go when its frame is moved?

Boxes are geometric centre, (length, width, height) and yaw counter-clockwise from +x, in the lidar frame, metres and
radians. Shapes: K boxes.
"""

import numpy as np
from numpy.typing import NDArray

CORNER_SIGNS = np.array(
    [[1, 1, -1], [1, -1, -1], [-1, -1, -1], [-1, 1, -1], [1, 1, 1], [1, -1, 1], [-1, -1, 1], [-1, 1, 1]],
    dtype=np.float64,
)
"""Corner i of a box is at half its size times row i: four at the bottom, four on top, front-left first."""

BOX_EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
"""Pairs of corners that an edge joins, for drawing."""


def box_corners(center: NDArray, size: NDArray, yaw: NDArray) -> NDArray[np.float64]:
    """(K, 8, 3) corners in the order of `CORNER_SIGNS`."""
    local = CORNER_SIGNS[None] * (np.asarray(size, dtype=np.float64)[:, None] / 2)
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    turned = np.stack(
        [local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos, local[..., 2]], -1
    )
    return turned + np.asarray(center, dtype=np.float64)[:, None]


def move_boxes(
    center: NDArray, size: NDArray, yaw: NDArray, velocity: NDArray | None, matrix: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """Move boxes as the points of their frame are moved. The corners of a moved box are its moved corners; a mirror orders
    them anew.

    Args:
        center, size, yaw: (K, 3), (K, 3), (K,). K may be 0.
        velocity: (K, 2) metres a second along x and y, NaN where unknown; or None.
        matrix: (4, 4) target_from_source: any product of rotations about z, mirrors, uniform scalings and shifts.

    Returns:
        center, size, yaw in [-pi, pi), velocity (None where it was None), all float64. Size follows the scale, yaw the turned
        heading. Velocity is moved like the difference of two points: turned, mirrored and scaled.

    Raises:
        ValueError: the matrix tilts boxes, shears them, or scales one axis more than another; none of it leaves a box
            that stands upright.
    """
    linear = np.asarray(matrix, dtype=np.float64)[:3, :3]
    scale = np.cbrt(np.abs(np.linalg.det(linear)))
    turn = linear / scale if scale > 0 else linear
    upright = np.allclose(np.abs(turn[2]), (0, 0, 1), atol=1e-6)
    if not (upright and np.allclose(turn @ turn.T, np.eye(3), atol=1e-6)):
        raise ValueError(
            f"boxes can be rotated about z, mirrored, scaled uniformly and shifted, not moved by {linear.tolist()}"
        )
    yaw = np.asarray(yaw, dtype=np.float64)
    heading = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1) @ linear[:2, :2].T
    turned = np.arctan2(heading[..., 1], heading[..., 0])
    moved_center = np.asarray(center, dtype=np.float64) @ linear.T + np.asarray(matrix, dtype=np.float64)[:3, 3]
    moved_velocity = None if velocity is None else np.asarray(velocity, dtype=np.float64) @ linear[:2, :2].T
    return (
        moved_center,
        np.asarray(size, dtype=np.float64) * scale,
        np.where(turned >= np.pi, -np.pi, turned),
        moved_velocity,
    )
