"""What does a Waymo download hold for one moment of a drive, whichever of its two formats it came in?

A source (`waymo_v2`, `waymo_v1`) reads files into a `WaymoMoment`, `waymo.py` turns that into a Frame. Frames of
reference, all Waymo's own: the vehicle frame is x forward, y left, z up, its origin in the middle of the rear axle; a
camera frame is x out of the lens, y left, z up; metres. Pixels are edge-based here: (0, 0) is the corner of the top-left
pixel.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes

CAMERA_NAMES = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}
LASER_NAMES = {1: "TOP", 2: "FRONT", 3: "SIDE_LEFT", 4: "SIDE_RIGHT", 5: "REAR"}
OBJECT_NAMES = {0: "UNKNOWN", 1: "VEHICLE", 2: "PEDESTRIAN", 3: "SIGN", 4: "CYCLIST"}


@dataclass(frozen=True, eq=False)
class WaymoReturn:
    """One return of one lidar.

    Attributes:
        image: (H, W, 4) float32: range in metres (not above 0: no return), intensity as it was measured (unbounded),
            elongation, no-label-zone flag (1 inside one, else -1). Row 0 is the highest beam.
        projection: (H, W, 6) int32: camera, x, y of the first and of a second camera that sees the point (camera 0:
            none), or None where it was not read.
    """

    image: NDArray[np.float32]
    projection: NDArray[np.int32] | None = None


@dataclass(frozen=True, eq=False)
class WaymoLaser:
    """One lidar at one moment.

    Attributes:
        name: from `LASER_NAMES`.
        vehicle_from_laser: (4, 4) float64.
        inclinations: (H,) float64 radians, lowest beam first, as Waymo stores them, or None: then they are the centres
            of H equal cells between `inclination_range`.
        inclination_range: smallest and largest inclination, radians.
        returns: the returns that were asked for, first return first.
        pixel_pose: (H, W, 6) float32 roll, pitch, yaw (radians), x, y, z (metres): world from vehicle at the time each
            pixel was measured, or None (every lidar but TOP).
    """

    name: str
    vehicle_from_laser: NDArray[np.float64]
    inclinations: NDArray[np.float64] | None
    inclination_range: tuple[float, float]
    returns: tuple[WaymoReturn, ...]
    pixel_pose: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class WaymoCamera:
    """One image.

    Attributes:
        name: from `CAMERA_NAMES`.
        jpeg: the file's bytes; b"" where they were not asked for.
        intrinsic: (9,) float64 f_u, f_v, c_u, c_v, k1, k2, p1, p2, k3, edge-based pixels.
        vehicle_from_camera: (4, 4) float64, Waymo's camera axes.
        size: height and width that the calibration is for, pixels.
        world_from_vehicle: (4, 4) float64 at the time of the exposure, or None where the files do not say it.
        pose_timestamp: seconds, of that pose, or None.
        labels: (K, 4) float64 projected lidar boxes of this camera: centre x, y, size x, y, edge-based pixels; or None.
        label_ids: K ids, those of the 3D boxes they are projections of; None without labels.
    """

    name: str
    jpeg: bytes
    intrinsic: NDArray[np.float64]
    vehicle_from_camera: NDArray[np.float64]
    size: tuple[int, int]
    world_from_vehicle: NDArray[np.float64] | None = None
    pose_timestamp: float | None = None
    labels: NDArray[np.float64] | None = None
    label_ids: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class WaymoMoment:
    """One frame of a segment.

    Attributes:
        source: the file that it came from, for messages; * stands for the component where each has a file of its own.
        segment: context name.
        timestamp_micros: of the frame.
        world_from_vehicle: (4, 4) float64 at that time.
        lasers, cameras: those that were asked for and that the files hold.
        boxes: 3D boxes in the vehicle frame, or None where none were asked for.
    """

    source: str
    segment: str
    timestamp_micros: int
    world_from_vehicle: NDArray[np.float64]
    lasers: tuple[WaymoLaser, ...]
    cameras: tuple[WaymoCamera, ...]
    boxes: Boxes | None = None


@dataclass(frozen=True)
class WaymoRequest:
    """What a source reads; everything else stays on disk.

    Attributes:
        cameras, lasers: names from `CAMERA_NAMES` and `LASER_NAMES`.
        returns: 1 (first only) or 2.
        boxes: read lidar_box?
        projected_boxes: read projected_lidar_box, where the download has it?
        projections: read the stored lidar-to-camera projection? Only checks do.
        pixels: read the images themselves, or calibration and pose of the cameras alone?
    """

    cameras: tuple[str, ...]
    lasers: tuple[str, ...]
    returns: int = 1
    boxes: bool = True
    projected_boxes: bool = False
    projections: bool = False
    pixels: bool = True


class WaymoSource(Protocol):
    """The frames of some segments in one of the formats; built as `cls(root, segments, request)`.

    `BadFrameError` for a frame, `UserError` for a whole download, each naming file, segment and way out.
    """

    @classmethod
    def list_segments(cls, root: Path) -> tuple[str, ...]:
        """The segments whose files lie below a folder, sorted."""
        ...

    @classmethod
    def has_boxes(cls, root: Path) -> bool:
        """Do the files below a folder hold 3D boxes, as far as that is known without opening one?"""
        ...

    moments: tuple[tuple[str, int], ...]
    """(segment, position of the frame in it), in the order of the segments and of time."""

    def read(self, index: int, request: WaymoRequest | None = None) -> WaymoMoment:
        """The moment at a position of `moments`; `request` instead of the source's own, where given."""
        ...
