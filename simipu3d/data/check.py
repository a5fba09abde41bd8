"""Is a data set whole and plausible? Frames are read one after the other, and every problem that is found is reported.

Nothing here stops at the first problem: a frame that cannot be read is one of them. What a frame says about itself is
checked where it was read (a worker process), what frames say about each other at the end: order in time, and whether the
pictures agree with the calibration (`data.calibration_check`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from simipu3d.contracts.frame import Boxes, Camera, Frame, FrameReader
from simipu3d.data.calibration_check import (
    NUM_FRAMES,
    CalibrationCheck,
    EdgeScores,
    calibration_problem,
    edge_scores,
    judge_all,
)
from simipu3d.data.config import DataConfig
from simipu3d.data.loading.loader import start_worker
from simipu3d.data.readers.mixed import MixedConfig
from simipu3d.errors import BadFrameError
from simipu3d.geometry.camera import project_points
from simipu3d.geometry.rigid import check_rigid
from simipu3d.ops.rotated_iou import points_in_boxes

FARTHEST = 500.0
"""A point farther away than this, metres, is implausible: no lidar of a car measures so far."""
NEAREST = 1.0
"""If nearly all points lie nearer than this, metres, the unit is probably another one."""
FARTHEST_CAMERA = 8.0
"""A camera farther than this from the origin of the lidar frame, metres, is not on the same car: a pose is inverted, or in
another unit (27 cm in KITTI)."""
FEWEST_POINTS = 50
"""A scan with fewer points is no scan."""
LEAST_SEEN = 0.05
"""A camera that sees less than this share of what a camera like it would see from the lidar looks elsewhere."""
WHITE, BLACK = 0.5, 0.95
"""Shares of pure white and pure black pixels beyond which a picture is saturated; nights are dark but not black."""
NEAR_BOX = 40.0
"""Where nobody says how many points a box holds, only boxes nearer than this, metres, are expected to hold some."""
LATEST = 0.5
"""Seconds between scan and exposure beyond which an image does not belong to its scan."""
GAP = 3.0
"""Frames of a sequence that are this many times as far apart as usual have a gap between them."""
FEW = 5
"""A box that is said to hold fewer points than this may hold none: range noise carries some out of it."""
UNFILTERED: dict[str, Any] = {"point_range": None, "frustum": False, "load_interval": 1}
"""Keys of readers that take points or frames away, at the values that take none."""


@dataclass(frozen=True)
class CameraCheck:
    """What one camera of a frame showed: its name, image size, share of the points in it, seconds after the scan, and how
    its depth edges meet the picture's (None where that was not looked at)."""

    name: str
    image_size: tuple[int, int]
    seen: float
    offset: float | None
    edges: EdgeScores | None = field(default=None, compare=False)


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
    """What a check found: the frames in the order of the data set, a line for every problem, a verdict on every camera."""

    frames: list[FrameCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    calibrations: list[CalibrationCheck] = field(default_factory=list, compare=False)

    def example(self, camera: str) -> int:
        """Index of a frame in which this camera was compared with its calibration: the middle one of them."""
        shown = [frame.index for frame in self.frames for own in frame.cameras if own.name == camera and own.edges]
        return shown[len(shown) // 2]


class _Checked(Dataset[FrameCheck]):
    def __init__(self, reader: FrameReader, with_edges: set[int]):
        self.reader, self.with_edges = reader, with_edges

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> FrameCheck:
        return check_frame(self.reader, index, with_edges=index in self.with_edges)


def as_on_disk(config: DataConfig) -> DataConfig:
    """The same data set with nothing kept back: no filter hides points, and frames that lack a file are reported one by one,
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
    """Read and check frames, in the order of `indices`, in `num_workers` processes (0: in this one). The pictures of up to
    `NUM_FRAMES` of them are compared with the calibration."""
    parallel = num_workers > 0
    with_edges = {indices[position] for position in spread_indices(NUM_FRAMES, len(indices))}
    yield from DataLoader(
        _Checked(reader, with_edges),
        batch_size=None,
        sampler=list(indices),
        num_workers=num_workers,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if parallel else None,
    )


def check_frame(reader: FrameReader, index: int, with_edges: bool = True) -> FrameCheck:
    """Read one frame and look for what is wrong with it; `with_edges`: also compare its pictures with the calibration."""
    try:
        frame = reader[index]
    except BadFrameError as error:
        return FrameCheck(index, (str(error),))
    except Exception as error:  # a bug of a reader's must not hide what the other frames have to say
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return FrameCheck(
            index, (f"frame with index {index}: cannot be read, and its reader does not know why ({words})",)
        )
    cameras, blind, problems = [], [], [*_point_problems(frame, reader.point_columns)]
    usable = frame.points.ndim == 2 and np.isfinite(frame.points).all()
    for camera in frame.cameras:
        wrong = _calibration_problems(camera)
        seen = 0.0 if wrong else _share_seen(camera, frame.points)
        looks_away = not wrong and seen < LEAST_SEEN * _share_of_a_like_camera(camera, frame.points)
        check = CameraCheck(
            camera.name,
            camera.image.shape[:2],
            seen,
            None if camera.timestamp is None or frame.timestamp is None else camera.timestamp - frame.timestamp,
            edge_scores(camera, frame.points) if with_edges and usable and not wrong and seen else None,
        )
        cameras.append(check)
        problems += [f"{camera.name}: {problem}" for problem in (*wrong, *_image_problems(camera, check))]
        blind += [check] if not wrong and (not seen or looks_away) else []
    if len({camera.name for camera in cameras}) < len(cameras):
        problems.append(f"two cameras have one name: {', '.join(camera.name for camera in cameras)}")
    if blind:
        problems.append(_blind_problem(blind, len(cameras), len(frame.points)))
    if frame.world_from_lidar is not None and (pose := check_rigid(frame.world_from_lidar)):
        problems.append(f"world_from_lidar {pose}")
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


def _blind_problem(blind: Sequence[CameraCheck], num_cameras: int, num_points: int) -> str:
    names = ", ".join(check.name for check in blind)
    seen = max(check.seen for check in blind)
    who = "no camera" if len(blind) == num_cameras else f"not one of {names}"
    if seen:
        return f"{who} sees more than {seen:.1%} of its {num_points} points, next to nothing; check its calibration"
    return f"{who} sees any of its {num_points} points; check its calibration"


def _point_problems(frame: Frame, columns: tuple[str, ...]) -> Iterator[str]:
    points = frame.points
    if frame.point_columns != columns or points.ndim != 2 or points.shape[1] != len(columns):
        yield f"its points have columns {', '.join(frame.point_columns)}, the data set's are {', '.join(columns)}"
        return
    if len(points) == 0:
        yield "holds no points"
        return
    if len(points) < FEWEST_POINTS:
        yield f"holds only {len(points)} points; a scan has thousands"
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


def _calibration_problems(camera: Camera) -> list[str]:
    """What the matrices alone say."""
    if wrong := calibration_problem(camera):
        return [wrong]
    matrix = camera.camera_from_lidar
    distance = np.linalg.norm(matrix[:3, 3])
    if distance > FARTHEST_CAMERA:
        return [
            f"is {distance:.0f} m from the lidar by camera_from_lidar; is it in another unit, inverted, or of another time?"
        ]
    # The image's downward axis in the lidar frame, whose z points up; a matrix that is a camera's only when inverted.
    down, inverse_down = -matrix[1, 2], -matrix[2, 1]
    if down < 0.5 and inverse_down > 0.85:
        return [
            "camera_from_lidar turns the picture on its side and its inverse does not; is it inverted or transposed?"
        ]
    return []


def _share_seen(camera: Camera, points: NDArray[np.float32]) -> float:
    _, _, visible = project_points(
        torch.from_numpy(points[:, :3]),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera.camera_from_lidar),
        camera.image.shape[:2],
        distortion=None if camera.distortion is None else torch.from_numpy(camera.distortion),
    )
    return float(visible.float().mean()) if len(visible) else 0.0


def _share_of_a_like_camera(camera: Camera, points: NDArray[np.float32]) -> float:
    """Share of the points that a level camera of the same field of view would see from the origin, looking where it sees
    most."""
    xyz = points[:, :3].astype(np.float64)
    if not len(xyz):
        return 0.0
    (height, width), focal = camera.image.shape[:2], (camera.image_from_camera[0, 0], camera.image_from_camera[1, 1])
    half_width, half_height = np.arctan(width / 2 / focal[0]), np.arctan(height / 2 / focal[1])
    in_height = np.abs(np.arctan2(xyz[:, 2], np.hypot(xyz[:, 0], xyz[:, 1]))) < half_height
    azimuth = np.sort(np.arctan2(xyz[in_height, 1], xyz[in_height, 0]))
    around = np.concatenate([azimuth, azimuth + 2 * np.pi])
    counts = np.searchsorted(around, azimuth + 2 * half_width) - np.arange(len(azimuth))
    return counts.max(initial=0) / len(xyz)


def _image_problems(camera: Camera, check: CameraCheck) -> Iterator[str]:
    if (camera.image == camera.image[:1, :1]).all():
        yield f"the image is all one colour, {tuple(camera.image[0, 0].tolist())}"
    elif (white := (camera.image >= 254).all(axis=2).mean()) > WHITE:
        yield f"{white:.0%} of the image is pure white; is it clipped?"
    elif (black := (camera.image <= 1).all(axis=2).mean()) > BLACK:
        yield f"{black:.0%} of the image is pure black; was it scaled down?"
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
    among = sound & (boxes.center >= xyz.min(axis=0)).all(axis=1) & (boxes.center <= xyz.max(axis=0)).all(axis=1)
    if boxes.num_points is not None:
        expected = among & (np.asarray(boxes.num_points) >= FEW)
    else:
        expected = among & (np.linalg.norm(boxes.center[:, :2], axis=1) < NEAR_BOX)
        if boxes.occlusion is not None:
            expected &= np.asarray(boxes.occlusion) == 0
        if boxes.truncation is not None:
            expected &= np.asarray(boxes.truncation) < 0.5
    rows = np.flatnonzero(expected)
    inside = points_in_boxes(xyz, boxes.center[rows], boxes.size[rows], boxes.yaw[rows]).any(axis=1)
    # Without counts some boxes may be hidden behind others; that most of them are is no accident.
    if (not inside.all()) if boxes.num_points is not None else (len(rows) > 0 and inside.mean() < 0.5):
        first = rows[np.flatnonzero(~inside)[0]]
        place = ", ".join(f"{value:.1f}" for value in boxes.center[first])
        yield (
            f"{int((~inside).sum())} of {len(rows)} boxes that should hold points hold none (first: {boxes.names[first]} at "
            f"{place} m)"
        )


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
    scores: dict[str, list[EdgeScores]] = {}
    for check in frames:
        for camera in check.cameras:
            if camera.edges is not None:
                scores.setdefault(camera.name, []).append(camera.edges)
    calibrations = judge_all(scores)
    problems += [f"{check.camera}: {check.message}" for check in calibrations if check.is_problem]
    return Report(frames, problems, calibrations)


def _time_problems(sequence: str, frames: list[FrameCheck]) -> Iterator[str]:
    """Frames of a sequence that go back in time, or leave a gap.

    Only some frames may have been read: the time between neighbours is shared out over those between them.
    """
    times = np.array([check.timestamp for check in frames])
    steps = np.diff(times) / np.diff([check.index for check in frames])
    usual = np.median(steps[steps > 0]) if (steps > 0).any() else 0.0
    for before, after, (earlier, later), step in zip(frames[:-1], frames[1:], pairwise(times), steps, strict=True):
        where = f"sequence {sequence or '(unnamed)'}: frame {after.frame_id}"
        if step <= 0:
            yield f"{where} at {later:.3f} s follows {before.frame_id} at {earlier:.3f} s"
        elif step > GAP * usual:
            yield f"{where} comes {later - earlier:.3f} s after {before.frame_id}; {usual:.3f} s are usual"


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
    rows += [(f"{check.camera}, calibration", check.message) for check in report.calibrations]
    return rows


def _spread(values: Sequence[float], form: str) -> str:
    """Smallest, median and largest value; one where all are equal."""
    shown = [form.format(value) for value in (min(values), float(np.median(values)), max(values))]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} to {shown[2]} (median {shown[1]})"
