"""What does a reader return? One moment of a drive, with nothing specific to a data set left in it.

Frames of reference: the lidar frame is x forward, y left, z up; a camera frame is x right, y down, z forward; both in
metres. Pixels are (u, v) with integer centres: (0, 0) is the centre of the top-left pixel and an image covers
[-0.5, W - 0.5). A transform is called `target_from_source`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

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
        velocity: (K, 2) metres a second, NaN where unknown; or None.
        attributes: K strings, or None.
        num_points: (K,) lidar points inside, or None.
        difficulty: (K,) int in the data set's own meaning, or None.
        visibility: (K,) int level in the data set's own meaning (nuScenes 1 to 4), 0 where unknown; or None.
        ids: K names of the objects, the same in every frame of a sequence; or None.
        truncation: (K,) 0 to 1, KITTI's; or None.
        occlusion: (K,) int, KITTI's level; or None.
        alpha: (K,) radians, KITTI's observation angle; or None.
        image_boxes: camera's name -> (K, 4) u_min, v_min, u_max, v_max, pixels with integer centres, NaN where the
            camera has none; None where the data set has no 2D boxes.
        ignored: camera's name -> (D, 4) regions in which nothing counts (KITTI's DontCare), or None.
    """

    center: NDArray[np.float64]
    size: NDArray[np.float64]
    yaw: NDArray[np.float64]
    names: Sequence[str]
    velocity: NDArray[np.float64] | None = None
    attributes: Sequence[str] | None = None
    num_points: NDArray[np.int64] | None = None
    difficulty: NDArray[np.int64] | None = None
    visibility: NDArray[np.int64] | None = None
    ids: Sequence[str] | None = None
    truncation: NDArray[np.float64] | None = None
    occlusion: NDArray[np.int64] | None = None
    alpha: NDArray[np.float64] | None = None
    image_boxes: Mapping[str, NDArray[np.float64]] | None = None
    ignored: Mapping[str, NDArray[np.float64]] | None = None

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


TruthKind = Literal["boxes", "depth", "pixel_class", "pixel_instance", "point_class", "point_instance"]
"""The kinds of ground truth that a method can ask for. `depth` can also be made of the projected points."""


@dataclass(frozen=True)
class Wants:
    """What a reader is asked for; it opens no file for anything else.

    Attributes:
        points, images: are they needed?
        truth: kinds of ground truth.
    """

    points: bool = True
    images: bool = True
    truth: frozenset[TruthKind] = frozenset()


EVERYTHING = Wants(truth=frozenset(get_args(TruthKind)))
"""What looking at a data set asks for."""


class FrameReader:
    """Base class of all data sets: a length, and a Frame for every index below it; `BadFrameError` for one that cannot
    be read. Built as `cls(config, wants)`.

    What is not wanted is left out: `Frame.points` has no rows, `Frame.cameras` is empty, truth is None. A reader that can
    never give a kind of truth leaves it out of `gives`.
    """

    class_names: tuple[str, ...] = ()
    """What `pixel_class` and `point_class` index; empty without such ground truth."""
    point_columns: tuple[str, ...] = ("x", "y", "z", "intensity")
    """The columns that every frame's points have."""
    gives: frozenset[TruthKind] = frozenset()
    """The kinds of ground truth that this data set has in the opened split."""
    frame_ids: Sequence[str] = ()
    """Names of the frames, where they are known without reading them."""
    sequence_ids: Sequence[str] = ()
    """The drive, scene or segment of every frame, where known without reading it: few-label lists are drawn by it."""
    wants: Wants = EVERYTHING
    """What it was asked for."""

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no __len__")

    def __getitem__(self, index: int) -> Frame:
        raise TypeError(f"{type(self).__name__} has no __getitem__")

    def prepare(self) -> None:
        """What is done once before frames are read, by one process: making a cache, say."""

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.int64] | None:
        """(len,) int64, the indices of an epoch in the order they are read, a function of its arguments alone; None: a
        permutation of all (`data.loading.order.epoch_order`). An order that names a frame again adds len to its index, so
        that no draw is made twice; `reader[index + len]` is then the frame `index`."""
        return None

    def augment_of(self, index: int) -> dict[str, Any]:
        """Keys of `augment:` that are different for this frame, nested as in the file; {} where none is."""
        return {}


def check_points(points: NDArray[np.float32], source: str) -> None:
    """Raise `BadFrameError` when a scan is empty or holds NaN or infinity; `source` names the file."""
    if len(points) == 0:
        raise BadFrameError(f"{source}: holds no points; take the frame off the split, or set data.on_bad_frame=skip")
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        raise BadFrameError(
            f"{source}: {int(bad.sum())} of {len(points)} points are NaN or infinite (first: row {int(bad.argmax())}); "
            "leave such rows out with data.no_return=drop, mend the file, or set data.on_bad_frame=skip"
        )
