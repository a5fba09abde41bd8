"""Where are the corners of a labelled box?

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
