"""What does a Waymo object label mean? The same for both formats: columns in, `Boxes` in the vehicle frame out.

Boxes are given in the vehicle frame of the frame's timestamp (geometric centre; size along x, y, z; heading
counter-clockwise from +x), but an object's speed is given along the axes of the world.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers.waymo_moment import OBJECT_NAMES, WaymoCamera

HARD_POINTS = 5
"""A box with at most so many lidar points is of difficulty 2 where nobody set a difficulty (Waymo's own rule)."""


def vehicle_boxes(
    center: NDArray[np.float64],
    size: NDArray[np.float64],
    heading: NDArray[np.float64],
    object_type: NDArray[np.int64],
    speed: NDArray[np.float64],
    num_points: NDArray[np.int64],
    difficulty: NDArray[np.int64],
    ids: Sequence[str],
    world_from_vehicle: NDArray[np.float64],
) -> Boxes:
    """Boxes of one frame.

    Args:
        center: (K, 3) vehicle frame, metres. K may be 0.
        size: (K, 3) along x, y, z: length, width, height.
        heading: (K,) radians.
        object_type: (K,) keys of `OBJECT_NAMES`; others become UNKNOWN.
        speed: (K, 3) along the world's axes, metres a second; NaN where it is not known.
        num_points: (K,) lidar points inside.
        difficulty: (K,) 1 or 2, or 0 where it is not set.
        ids: K, the same for an object all through a segment.
        world_from_vehicle: (4, 4) at the frame's time.
    """
    # A ground vehicle's vertical speed may be unset, and hardly turns into the horizontal.
    known = np.column_stack([speed[:, :2], np.nan_to_num(speed[:, 2])])
    hard = np.where(num_points <= HARD_POINTS, 2, 1)
    return Boxes(
        center=center,
        size=size,
        yaw=heading,
        names=tuple(OBJECT_NAMES.get(int(kind), OBJECT_NAMES[0]) for kind in object_type),
        velocity=(known @ world_from_vehicle[:3, :3])[:, :2],
        num_points=num_points,
        difficulty=np.where(difficulty > 0, difficulty, hard),
        ids=tuple(ids),
    )


def image_boxes(boxes: Boxes, cameras: Sequence[WaymoCamera]) -> dict[str, NDArray[np.float64]] | None:
    """Camera -> (K, 4) u_min, v_min, u_max, v_max of each 3D box, integer-centre pixels, NaN where the camera has none.

    They are Waymo's projections of the 3D boxes: loose, and blind to what stands in front. None where the download has none.
    """
    row_of = {name: row for row, name in enumerate(boxes.ids or ())}
    found: dict[str, NDArray[np.float64]] = {}
    for camera in cameras:
        if camera.labels is None:
            continue
        corners = np.concatenate([camera.labels[:, :2] - camera.labels[:, 2:] / 2] * 2, axis=1) - 0.5
        corners[:, 2:] += camera.labels[:, 2:]
        rows = np.array([row_of.get(name, -1) for name in camera.label_ids or ()], dtype=np.int64)
        found[camera.name] = np.full((len(boxes), 4), np.nan)
        found[camera.name][rows[rows >= 0]] = corners[rows >= 0]
    return found or None
