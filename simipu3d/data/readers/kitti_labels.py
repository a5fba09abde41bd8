"""What do KITTI's label lines say, in the lidar frame, and back?

A line holds: type, truncation, occlusion, alpha, 2D box (4), height, width, length, x, y, z of the bottom centre in the
rectified camera frame (x right, y down, z forward), rotation_y about the camera's +y, and for results a score. Inside
the package a box is its geometric centre, (length, width, height) and yaw counter-clockwise from +x, in the lidar
frame. Shapes: K boxes.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers.files import WAY_OUT, read_text
from simipu3d.errors import BadFrameError

NUM_COLUMNS = 15
"""Of a label's line; a result's line has its score behind them."""
NUM_TRACKING = 2
"""Columns that a line of KITTI tracking has before the type: frame and track."""
LABELLED_CAMERA = "image_2"
"""KITTI's 2D boxes lie in the images of the left colour camera."""
REGION = "DontCare"
"""The type of a line that marks a region of the image in which nothing is labelled."""
LEVELS = ((40.0, 0, 0.15), (25.0, 1, 0.30), (25.0, 2, 0.50))
"""Easy, moderate, hard: least height of the 2D box in pixels, largest occlusion, largest truncation (official
benchmark)."""


class CameraBoxes(NamedTuple):
    """Boxes as KITTI writes them.

    Attributes:
        bottom_center: (K, 3) rectified camera frame, metres.
        size: (K, 3) height, width, length, metres.
        rotation_y: (K,) radians in [-pi, pi); 0 points along the camera's +x, positive towards -z.
    """

    bottom_center: NDArray[np.float64]
    size: NDArray[np.float64]
    rotation_y: NDArray[np.float64]


def wrap_angle(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Radians moved into [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def to_lidar(boxes: CameraBoxes, camera_from_lidar: NDArray[np.float64]) -> Boxes:
    """Camera boxes as nameless boxes in the lidar frame.

    The heading is a direction in the camera's horizontal plane, turned by the real rotation and seen from above; with
    ideally mounted sensors yaw = -rotation_y - pi/2.
    """
    lidar_from_camera = np.linalg.inv(camera_from_lidar)
    height, width, length = boxes.size.T
    center = boxes.bottom_center - np.stack([np.zeros_like(height), height / 2, np.zeros_like(height)], axis=1)
    center = center @ lidar_from_camera[:3, :3].T + lidar_from_camera[:3, 3]
    heading = np.stack([np.cos(boxes.rotation_y), np.zeros_like(height), -np.sin(boxes.rotation_y)], axis=1)
    heading = heading @ lidar_from_camera[:3, :3].T
    yaw = np.arctan2(heading[:, 1], heading[:, 0])
    return Boxes(center=center, size=np.stack([length, width, height], axis=1), yaw=yaw, names=[""] * len(yaw))


def to_camera(boxes: Boxes, camera_from_lidar: NDArray[np.float64]) -> CameraBoxes:
    """Boxes in the lidar frame as KITTI writes them: the exact inverse of `to_lidar`."""
    rotation = camera_from_lidar[:3, :3]
    length, width, height = boxes.size.T
    bottom = boxes.center @ rotation.T + camera_from_lidar[:3, 3]
    bottom = bottom + np.stack([np.zeros_like(height), height / 2, np.zeros_like(height)], axis=1)
    cos, sin = np.cos(boxes.yaw), np.sin(boxes.yaw)
    # to_lidar drops the heading's small lidar z; here it gets back the z that puts it into the camera's horizontal
    # plane.
    rise = -(rotation[1, 0] * cos + rotation[1, 1] * sin) / rotation[1, 2]
    heading = np.stack([cos, sin, rise], axis=1) @ rotation.T
    rotation_y = wrap_angle(np.arctan2(-heading[:, 2], heading[:, 0]))
    return CameraBoxes(bottom, np.stack([height, width, length], axis=1), rotation_y)


def difficulty(
    image_box: NDArray[np.float64], occlusion: NDArray[np.float64], truncation: NDArray[np.float64]
) -> NDArray[np.int64]:
    """(K,) 0 easy, 1 moderate, 2 hard, -1 harder than the benchmark counts.

    Args:
        image_box: (K, 4) u_min, v_min, u_max, v_max, pixels.
        occlusion: (K,) 0 fully visible .. 3 unknown.
        truncation: (K,) 0 .. 1.

    Source: the benchmark's evaluation (MIN_HEIGHT, MAX_OCCLUSION, MAX_TRUNCATION).
    """
    height = image_box[:, 3] - image_box[:, 1]
    level = np.full(len(height), -1, dtype=np.int64)
    for index, (min_height, max_occlusion, max_truncation) in reversed(list(enumerate(LEVELS))):
        level[(height >= min_height) & (occlusion <= max_occlusion) & (truncation <= max_truncation)] = index
    return level


def read_labels(path: Path, camera_from_lidar: NDArray[np.float64]) -> Boxes:
    """The labelled objects of one frame in the lidar frame; DontCare regions become `ignored`.

    `image_boxes` and `ignored` are in KITTI's own pixels, whose centres are integers as ours.

    Raises:
        BadFrameError: the file cannot be read or a line of it cannot be understood.
    """
    is_empty = path.is_file() and path.stat().st_size == 0
    text = "" if is_empty else read_text(path)  # an empty label file is a frame without objects, no damage
    names, rows = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) >= NUM_COLUMNS + NUM_TRACKING and all(
            word.lstrip("-").isdigit() for word in words[:NUM_TRACKING]
        ):
            raise BadFrameError(
                f"{path}: line {number} begins with a frame and a track ({' '.join(words[:3])}), so it is a label of KITTI "
                "tracking, a file a sequence; write a file a frame, named like its scan, without these two columns"
            )
        try:
            values = [float(word) for word in words[1:]]
        except ValueError:
            raise BadFrameError(
                f"{path}: line {number} holds a value that is no number: {line[:200]!r}; {WAY_OUT}"
            ) from None
        if len(words) not in (NUM_COLUMNS, NUM_COLUMNS + 1) or not np.isfinite(values).all():
            raise BadFrameError(
                f"{path}: line {number} has {len(words)} values, expected {NUM_COLUMNS} finite ones; {WAY_OUT}"
            )
        names.append(words[0])
        rows.append(values[: NUM_COLUMNS - 1])
    table = np.array(rows, dtype=np.float64).reshape(-1, NUM_COLUMNS - 1)
    is_region = np.array([name == REGION for name in names], dtype=np.bool_)
    regions, table = table[is_region, 3:7], table[~is_region]
    truncation, occlusion, image_box = table[:, 0], table[:, 1], table[:, 3:7]
    placed = to_lidar(CameraBoxes(table[:, 10:13], table[:, 7:10], table[:, 13]), camera_from_lidar)
    return replace(
        placed,
        names=tuple(name for name in names if name != REGION),
        difficulty=difficulty(image_box, occlusion, truncation),
        truncation=truncation,
        occlusion=occlusion.astype(np.int64),
        alpha=table[:, 2],
        image_boxes={LABELLED_CAMERA: image_box},
        ignored={LABELLED_CAMERA: regions},
    )
