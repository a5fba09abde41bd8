"""Which points of a scan does a reader keep? A box in the lidar frame, and what the images show."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from simipu3d.contracts.frame import Camera
from simipu3d.data.config import check_range
from simipu3d.geometry.camera import project_points

PointRange = tuple[float, float, float, float, float, float]
"""x, y, z minimum, then x, y, z maximum, metres, in the lidar frame."""

FRUSTUM_DEPTH = (0.001, 100.0)
"""Nearest and farthest depth of the frustum filter, metres: what made the released code's reduced clouds
(mmdetection3d)."""


def check_point_range(point_range: PointRange | None) -> None:
    """Raise `ValueError` when a range runs backwards along an axis."""
    if point_range is not None:
        for axis in range(3):
            check_range("point_range along " + "xyz"[axis], point_range[axis], point_range[axis + 3])


def in_range(points: NDArray[np.float32], point_range: PointRange) -> NDArray[np.bool_]:
    """(N,) bool: is the point strictly inside the range?"""
    low, high = np.array(point_range, dtype=np.float32).reshape(2, 3)
    return ((points[:, :3] > low) & (points[:, :3] < high)).all(axis=1)


def in_frustum(points: NDArray[np.float32], cameras: Sequence[Camera]) -> NDArray[np.bool_]:
    """(N,) bool: does the point fall into one of the images, at a depth within `FRUSTUM_DEPTH`?

    The image is taken as [0, W) x [0, H), half a pixel off from what the package calls visible, because so the reduced
    clouds of the released code were made. What a loss may use is decided later and exactly.
    """
    xyz = torch.from_numpy(points[:, :3])
    near, far = FRUSTUM_DEPTH
    seen = torch.zeros(len(xyz), dtype=torch.bool)
    for camera in cameras:
        height, width = camera.image.shape[:2]
        pixels, depth, _ = project_points(
            xyz,
            torch.from_numpy(camera.image_from_camera),
            torch.from_numpy(camera.camera_from_lidar),
            (height, width),
            distortion=None if camera.distortion is None else torch.from_numpy(camera.distortion),
            min_depth=near,
        )
        u, v = pixels.unbind(dim=1)
        seen |= (depth > near) & (depth < far) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return seen.numpy()
