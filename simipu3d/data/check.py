"""Is a data set whole and plausible? Frames are read one after the other, and every problem that is found is told.

Nothing here stops at the first problem: a frame that cannot be read is one of them. What a frame says about itself is
checked where it was read (a worker process), what frames say about each other at the end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from simipu3d.contracts.frame import Boxes, Camera, Frame, FrameReader
from simipu3d.data.config import DataConfig
from simipu3d.data.loading.loader import start_worker
from simipu3d.data.readers.mixed import MixedConfig
from simipu3d.errors import BadFrameError
from simipu3d.geometry.camera import project_points
from simipu3d.ops.rotated_iou import points_in_boxes

FARTHEST = 500.0
"""A point farther away than this, metres, is implausible: no lidar of a car measures so far."""
NEAREST = 1.0
"""If nearly all points lie nearer than this, metres, the unit is probably another one."""
FARTHEST_CAMERA = 30.0
"""A camera farther from its lidar than this, metres, is not on the same car: a pose is inverted, or in another unit."""
LATEST = 0.5
"""Seconds between scan and exposure beyond which an image does not belong to its scan."""
GAP = 3.0
"""Frames of a sequence that are this many times as far apart as usual have a gap between them."""
FEW = 5
"""A box that is said to hold fewer points than this may hold none: range noise carries some out of it."""
UNFILTERED: dict[str, Any] = {"point_range": None, "frustum": False, "load_interval": 1}
"""Keys of readers that take points or frames away, at the values that take none."""
SKEW = 1e-3
"""How far R R^T of a rotation R may be from the identity; calibrations are printed with few digits."""


@dataclass(frozen=True)
class CameraCheck:
    """What one camera of a frame showed: its name, image size, share of the points in it, seconds after the scan."""

    name: str
    image_size: tuple[int, int]
    seen: float
    offset: float | None


@dataclass(frozen=True)
class FrameCheck:
    """What reading one frame showed; `problems` are lines, `frame_id` is empty where it could not be read."""

    index: int
    problems: tuple[str, ...]
    frame_id: str = ""
    sequence_id: str = ""
    timestamp: float | None = None
    num_points: int = 0
    num_boxes: int = 0
    cameras: tuple[CameraCheck, ...] = ()


@dataclass
class Report:
    """What a check found: the frames in the order of the data set, and a line for every problem."""

    frames: list[FrameCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Checked(Dataset[FrameCheck]):
    def __init__(self, reader: FrameReader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> FrameCheck:
        return check_frame(self.reader, index)


def as_on_disk(config: DataConfig) -> DataConfig:
    """The same data set with nothing kept back: no filter hides points, and frames that lack a file are told one by one,
    however many they are."""
    changes: dict[str, Any] = {"max_bad_fraction": 1.0}
    changes |= {key: value for key, value in UNFILTERED.items() if key in type(config).model_fields}
    if isinstance(config, MixedConfig):
        sets = (entry.model_copy(update={"data": as_on_disk(entry.data)}) for entry in config.sets)
        changes["sets"] = tuple(sets)
    return config.model_copy(update=changes)


def spread_indices(number: int, num_frames: int) -> list[int]:
    """`number` positions spread over `num_frames`, both ends included, each once; 0 takes all."""
    if number == 0 or number >= num_frames:
        return list(range(num_frames))
    return np.unique(np.linspace(0, num_frames - 1, number).round().astype(int)).tolist()


def frame_count(word: str) -> int:
    """A number of frames as the command line gives it; `all` is 0."""
    number = 0 if word == "all" else int(word)
    if number < 0:
        raise ValueError(f"cannot read {number} frames")
    return number


def check_frames(reader: FrameReader, indices: Sequence[int], num_workers: int = 0) -> Iterator[FrameCheck]:
    """Read and check frames, in the order of `indices`, in `num_workers` processes (0: in this one)."""
    parallel = num_workers > 0
    yield from DataLoader(
        _Checked(reader),
        batch_size=None,
        sampler=list(indices),
        num_workers=num_workers,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if parallel else None,
    )


def check_frame(reader: FrameReader, index: int) -> FrameCheck:
    """Read one frame and look for what is wrong with it."""
    try:
        frame = reader[index]
    except BadFrameError as error:
        return FrameCheck(index, (str(error),))
    cameras, blind, problems = [], [], [*_point_problems(frame, reader.point_columns)]
    for camera in frame.cameras:
        wrong = _calibration_problems(camera)
        seen = 0.0 if wrong else _share_seen(camera, frame.points)
        known = camera.timestamp is not None and frame.timestamp is not None
        check = CameraCheck(
            camera.name, camera.image.shape[:2], seen, camera.timestamp - frame.timestamp if known else None
        )
        cameras.append(check)
        problems += [f"{camera.name}: {problem}" for problem in (*wrong, *_image_problems(camera, check))]
        blind += [] if seen or wrong else [camera.name]
    if len({camera.name for camera in cameras}) < len(cameras):
        problems.append(f"two cameras have one name: {', '.join(camera.name for camera in cameras)}")
    if blind:
        who = "no camera" if len(blind) == len(cameras) else f"not one of {', '.join(blind)}"
        problems.append(f"{who} sees any of its {len(frame.points)} points; check its calibration")
    if frame.world_from_lidar is not None and (wrong := _pose_problem(frame.world_from_lidar)):
        problems.append(f"world_from_lidar {wrong}")
    if frame.boxes is not None:
        problems += _box_problems(frame.boxes, frame.points)
    return FrameCheck(
        index,
        tuple(f"frame {frame.frame_id}: {problem}" for problem in problems),
        frame.frame_id,
        frame.sequence_id,
        frame.timestamp,
        len(frame.points),
        0 if frame.boxes is None else len(frame.boxes),
        tuple(cameras),
    )


def _point_problems(frame: Frame, columns: tuple[str, ...]) -> Iterator[str]:
    points = frame.points
    if frame.point_columns != columns or points.ndim != 2 or points.shape[1] != len(columns):
        yield f"its points have columns {', '.join(frame.point_columns)}, the data set's are {', '.join(columns)}"
        return
    if len(points) == 0:
        yield "holds no points"
        return
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        yield f"{int((~finite).sum())} of {len(points)} points are NaN or infinite"
    distance = np.linalg.norm(points[finite, :3].astype(np.float64), axis=1)
    far = distance > FARTHEST
    if far.any():
        yield f"{int(far.sum())} of {len(points)} points are farther than {FARTHEST:.0f} m, up to {distance.max():.0f} m"
    if len(distance) and np.percentile(distance, 99) < NEAREST:
        yield f"99 % of its {len(points)} points are nearer than {NEAREST:.0f} m; points must be in metres"
    if "intensity" in columns:
        intensity = points[finite, columns.index("intensity")]
        outside = (intensity < 0) | (intensity > 1)
        if outside.any():
            yield (
                f"the intensity of {int(outside.sum())} of {len(points)} points lies outside [0, 1] "
                f"({intensity.min():.3g} to {intensity.max():.3g})"
            )


def _pose_problem(matrix: NDArray[np.float64]) -> str:
    """Why a (4, 4) is no rigid motion; empty where it is one."""
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        return f"must be a finite 4 x 4 matrix, is {' x '.join(map(str, matrix.shape))}"
    if not np.array_equal(matrix[3], (0, 0, 0, 1)):
        return f"has the last row {matrix[3].tolist()}, not [0, 0, 0, 1]"
    rotation = matrix[:3, :3]
    skew = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if skew > SKEW:
        return f"holds no rotation: R R^T is {skew:.2g} off the identity"
    if np.linalg.det(rotation) < 0:
        return "mirrors: the determinant of its rotation is -1"
    return ""


def _calibration_problems(camera: Camera) -> list[str]:
    problems = []
    if wrong := _pose_problem(camera.camera_from_lidar):
        problems.append(f"camera_from_lidar {wrong}")
    elif (distance := np.linalg.norm(camera.camera_from_lidar[:3, 3])) > FARTHEST_CAMERA:
        problems.append(
            f"is {distance:.0f} m from the lidar by camera_from_lidar; is a pose inverted, or of another time or unit?"
        )
    matrix = camera.image_from_camera
    if matrix.shape != (3, 4) or not np.isfinite(matrix).all():
        problems.append(f"image_from_camera must be a finite 3 x 4 matrix, is {' x '.join(map(str, matrix.shape))}")
    elif not (matrix[0, 0] > 0 and matrix[1, 1] > 0):
        problems.append(f"image_from_camera has focal lengths {matrix[0, 0]:.4g} and {matrix[1, 1]:.4g}")
    elif not np.array_equal(matrix[2, :3], (0, 0, 1)):
        problems.append(f"image_from_camera has the last row {matrix[2].tolist()}, which must begin with 0, 0, 1")
    return problems


def _share_seen(camera: Camera, points: NDArray[np.float32]) -> float:
    _, _, visible = project_points(
        torch.from_numpy(points[:, :3]),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera.camera_from_lidar),
        camera.image.shape[:2],
        distortion=None if camera.distortion is None else torch.from_numpy(camera.distortion),
    )
    return float(visible.float().mean()) if len(visible) else 0.0


def _image_problems(camera: Camera, check: CameraCheck) -> Iterator[str]:
    if (camera.image == camera.image[:1, :1]).all():
        yield f"the image is all one colour, {tuple(camera.image[0, 0].tolist())}"
    if check.offset is not None and abs(check.offset) > LATEST:
        yield f"was exposed {check.offset:+.2f} s from the scan's time stamp"


def _box_problems(boxes: Boxes, points: NDArray[np.float32]) -> Iterator[str]:
    """Boxes that are no boxes, and boxes among the points that hold none."""
    if not len(boxes):
        return
    values = np.column_stack([boxes.center, boxes.size, boxes.yaw])
    sound = np.isfinite(values).all(axis=1) & (boxes.size > 0).all(axis=1)
    if not sound.all():
        yield f"{int((~sound).sum())} of {len(boxes)} boxes are not finite or have no size"
    turned = sound & (np.abs(boxes.yaw) > 2 * np.pi)
    if turned.any():
        largest = np.abs(boxes.yaw[turned]).max()
        yield f"the yaw of {int(turned.sum())} of {len(boxes)} boxes is beyond a full turn, up to {largest:.4g} radians"
    xyz = points[np.isfinite(points).all(axis=1), :3]
    if not len(xyz):
        return
    # A reader's filters take the points of far boxes away: only boxes that stand among the points count.
    expected = sound & (boxes.center >= xyz.min(axis=0)).all(axis=1) & (boxes.center <= xyz.max(axis=0)).all(axis=1)
    if boxes.num_points is not None:
        expected &= np.asarray(boxes.num_points) >= FEW
    rows = np.flatnonzero(expected)
    inside = points_in_boxes(xyz, boxes.center[rows], boxes.size[rows], boxes.yaw[rows]).any(axis=1)
    if not inside.all():
        first = rows[np.flatnonzero(~inside)[0]]
        place = ", ".join(f"{value:.1f}" for value in boxes.center[first])
        yield f"{int((~inside).sum())} of {len(boxes)} boxes hold no point (first: {boxes.names[first]} at {place} m)"


def collect(checks: Sequence[FrameCheck]) -> Report:
    """The report of some checked frames, in the order of their index: their own problems, and those between them."""
    frames = sorted(checks, key=lambda check: check.index)
    problems = [problem for check in frames for problem in check.problems]
    known: dict[str, int] = {}
    for check in frames:
        if check.frame_id and known.setdefault(check.frame_id, check.index) != check.index:
            problems.append(f"frame {check.frame_id}: index {known[check.frame_id]} and {check.index} have this one id")
    sequences: dict[str, list[FrameCheck]] = {}
    for check in frames:
        if check.frame_id and check.timestamp is not None:
            sequences.setdefault(check.sequence_id, []).append(check)
    for sequence, own in sequences.items():
        problems += _time_problems(sequence, own)
    return Report(frames, problems)


def _time_problems(sequence: str, frames: list[FrameCheck]) -> Iterator[str]:
    """Frames of a sequence that go back in time, or leave a gap.

    Only some frames may have been read: the time between neighbours is shared out over those between them.
    """
    times = np.array([check.timestamp for check in frames])
    steps = np.diff(times) / np.diff([check.index for check in frames])
    usual = np.median(steps[steps > 0]) if (steps > 0).any() else 0.0
    for before, after, step in zip(frames[:-1], frames[1:], steps, strict=True):
        where = f"sequence {sequence or '(unnamed)'}: frame {after.frame_id}"
        if step <= 0:
            yield f"{where} at {after.timestamp:.3f} s follows {before.frame_id} at {before.timestamp:.3f} s"
        elif step > GAP * usual:
            yield (
                f"{where} comes {after.timestamp - before.timestamp:.3f} s after {before.frame_id}; {usual:.3f} s are "
                "usual"
            )


def summary(report: Report) -> list[tuple[str, str]]:
    """What was read, as rows (what, value) of a table."""
    read = [check for check in report.frames if check.frame_id]
    rows = [("frames read", f"{len(read)} of {len(report.frames)}")]
    if not read:
        return rows
    rows.append(("sequences", f"{len({check.sequence_id for check in read})}"))
    rows.append(("points a frame", _spread([check.num_points for check in read], "{:.0f}")))
    rows.append(("boxes", f"{sum(check.num_boxes for check in read)}"))
    by_camera: dict[str, list[CameraCheck]] = {}
    for check in read:
        for camera in check.cameras:
            by_camera.setdefault(camera.name, []).append(camera)
    for name, cameras in by_camera.items():
        sizes = dict.fromkeys(f"{camera.image_size[0]} x {camera.image_size[1]}" for camera in cameras)
        shown = ", ".join([*sizes][:3]) + (", ..." if len(sizes) > 3 else "")
        facts = [f"{len(cameras)} images {shown}", f"sees {_spread([camera.seen for camera in cameras], '{:.1%}')}"]
        offsets = [camera.offset * 1e3 for camera in cameras if camera.offset is not None]
        facts += [f"at {_spread(offsets, '{:+.0f} ms')}"] if offsets else []
        rows.append((name, "; ".join(facts)))
    return rows


def _spread(values: Sequence[float], form: str) -> str:
    """Smallest, median and largest value; one where all are equal."""
    shown = [form.format(value) for value in (min(values), float(np.median(values)), max(values))]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} to {shown[2]} (median {shown[1]})"
