"""What does a reader return? One moment of a drive, with nothing specific to a data set left in it.

Frames of reference: the lidar frame is x forward, y left, z up; a camera frame is x right, y down, z forward; both in
metres. Pixels are (u, v) with integer centres: (0, 0) is the centre of the top-left pixel and an image covers
[-0.5, W - 0.5). A transform is called `target_from_source`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simipu3d.errors import BadFrameError


@dataclass(frozen=True, eq=False)
class Camera:
    """One image with its calibration.

    Attributes:
        name: the data set's name of the camera.
        image: (H, W, 3) uint8, RGB.
        image_from_camera: (3, 4) float64, homogeneous pixels from metres.
        camera_from_lidar: (4, 4) float64, with the ego motion between lidar and exposure inside.
        distortion: (5,) k1, k2, p1, p2, k3 in OpenCV's meaning, or None. Applied only in
            `geometry.camera.project_points`.
        timestamp: seconds, when the image was exposed, on the clock of `Frame.timestamp`; None where the data set does
            not say.
        depth: (H, W) float32 metres along the optical axis, 0 where unknown, or None. Ground truth.
        pixel_class: (H, W) uint8 index into the reader's `class_names`, or None. Ground truth.
        pixel_instance: (H, W) int32, 0 = no object, or None. Ground truth.
        encoded: the image file's own bytes, PNG or JPEG, which decode to `image`; None where there was no such file.
            Shards keep them, so that an image is not compressed twice.
    """

    name: str
    image: NDArray[np.uint8]
    image_from_camera: NDArray[np.float64]
    camera_from_lidar: NDArray[np.float64]
    distortion: NDArray[np.float64] | None = None
    timestamp: float | None = None
    depth: NDArray[np.float32] | None = None
    pixel_class: NDArray[np.uint8] | None = None
    pixel_instance: NDArray[np.int32] | None = None
    encoded: bytes | None = None


@dataclass(frozen=True, eq=False)
class Boxes:
    """K labelled boxes in the lidar frame. Ground truth: pre-training never reads it.

    Attributes:
        center: (K, 3) geometric centre, metres.
        size: (K, 3) length, width, height, metres.
        yaw: (K,) radians, counter-clockwise from +x.
        names: K class names in the data set's own spelling.
        velocity: (K, 2) metres a second, or None.
        attributes: K strings, or None.
        num_points: (K,) lidar points inside, or None.
        difficulty: (K,) int in the data set's own meaning, or None.
        image_box: (K, 4) u_min, v_min, u_max, v_max in the first camera, pixels, or None.
    """

    center: NDArray[np.float64]
    size: NDArray[np.float64]
    yaw: NDArray[np.float64]
    names: Sequence[str]
    velocity: NDArray[np.float64] | None = None
    attributes: Sequence[str] | None = None
    num_points: NDArray[np.int64] | None = None
    difficulty: NDArray[np.int64] | None = None
    image_box: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Frame:
    """One lidar scan and the images that belong to it.

    Attributes:
        points: (N, 3 + F) float32 in the lidar frame, metres; all finite.
        point_columns: names of the columns: x, y, z, intensity (in [0, 1]), then elongation, time, ring, ...
        cameras: one entry a camera.
        frame_id: unique in the data set; what errors and pictures name.
        sequence_id, timestamp: the drive, and seconds, where the data set has them.
        world_from_lidar: (4, 4) or None.
        native_from_lidar: (4, 4), takes our axes back to the sensor's own.
        intensity_scale: what the raw intensity was divided by (1 where it was used as it is, or, where it is unbounded,
            squashed the way detectors on that data set squash it: Waymo's tanh).
        boxes, point_class, point_instance: ground truth or None; (N,) for the last two, 0 = no instance.
    """

    points: NDArray[np.float32]
    point_columns: tuple[str, ...]
    cameras: tuple[Camera, ...]
    frame_id: str
    sequence_id: str = ""
    timestamp: float | None = None
    world_from_lidar: NDArray[np.float64] | None = None
    native_from_lidar: NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    intensity_scale: float = 1.0
    boxes: Boxes | None = None
    point_class: NDArray[np.uint8] | None = None
    point_instance: NDArray[np.int32] | None = None


class FrameReader(Protocol):
    """A data set: a length, and a Frame for every index below it; `BadFrameError` for one that cannot be read.

    Two methods may be left out, for what every data set can bear:

    - `epoch_order(seed, epoch)`: (len,) int64, the indices of an epoch in the order they are read, a function of its
      arguments alone. Without it: a permutation of all (`data.order.epoch_order`). An order that names a frame again
      adds len to its index, so that no draw is made twice; `reader[index + len]` is then the frame `index`.
    - `augment_of(index)`: the `AugmentConfig` of a frame. Without it: `data.augment`.
    """

    class_names: tuple[str, ...]
    """What `pixel_class` and `point_class` index; empty without such ground truth."""
    point_columns: tuple[str, ...]
    """The columns that every frame's points have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Frame: ...

    def prepare(self) -> None:
        """What is done once before frames are read, by one process: making a cache, say."""


def check_points(points: NDArray[np.float32], source: str) -> None:
    """Raise `BadFrameError` when a scan is empty or holds NaN or infinity; `source` names the file."""
    if len(points) == 0:
        raise BadFrameError(f"{source}: holds no points; take the frame off the split, or set data.on_bad_frame=skip")
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        raise BadFrameError(
            f"{source}: {int(bad.sum())} of {len(points)} points are NaN or infinite (first: row {int(bad.argmax())}); "
            "mend the file, or set data.on_bad_frame=skip"
        )
