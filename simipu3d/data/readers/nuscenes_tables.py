"""What do nuScenes' tables say about the key frames of some scenes, without holding what is not asked for?

A release is a folder of JSON tables whose rows name each other by tokens. v1.0-trainval has 2.6 million rows each in
sample_data and ego_pose; they are read row after row, and only those of the chosen scenes and sensors stay, as arrays
(which worker processes share). Rows that do not fit together are reported at once, with the file and the token.

Poses and calibrations are a translation (metres) and a quaternion (w, x, y, z): ego_pose is ego to world at a record's
own time, calibrated_sensor is sensor to ego. Timestamps are integer microseconds. Shapes: F key frames, R records,
S sensors.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simipu3d.data.readers.files import plain_name
from simipu3d.data.readers.nuscenes_rows import WAY_OUT, read_rows
from simipu3d.errors import UserError

LIDAR = "LIDAR_TOP"
MAX_OFFSET = 500_000
"""A camera's key frame is at most this far from its sample's time, microseconds; key frames are as far apart."""
FARTHEST = 1e9
"""No place on Earth is so far from another, metres; differences of such numbers would be no metres any more."""

SENSOR_COLUMNS = ("token", "sensor_token", "translation", "rotation", "camera_intrinsic")
SAMPLE_COLUMNS = ("token", "timestamp", "next", "scene_token")
RECORD_COLUMNS = (
    *("token", "sample_token", "ego_pose_token", "calibrated_sensor_token"),
    *("timestamp", "is_key_frame", "height", "width", "filename", "prev"),
)


def pose_matrix(translation: Sequence[float] | NDArray, quaternion: Sequence[float] | NDArray) -> NDArray[np.float64]:
    """(4, 4) target_from_source of a translation and a quaternion (w, x, y, z) of any length but zero.

    Source: the rotation matrix of a unit quaternion, Hartley & Zisserman, Multiple View Geometry, appendix 4.
    """
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = translation
    return matrix


def check_pose(path: Path, token: str, translation: Any, quaternion: Any) -> None:
    """Raise `UserError` unless a row's pose is three finite numbers and a unit quaternion."""
    try:
        values = np.array([*translation, *quaternion], dtype=np.float64)
    except (TypeError, ValueError):
        values = np.zeros(0)
    finite = values.shape == (7,) and bool(np.isfinite(values).all()) and np.abs(values).max() < FARTHEST
    if not finite or abs(np.linalg.norm(values[3:]) - 1) > 1e-3:
        raise UserError(
            f"{path}: token {token}: translation {str(translation)[:90]} and rotation {str(quaternion)[:120]} are no three "
            f"numbers and a unit quaternion; {WAY_OUT}"
        )


def _check_timestamp(path: Path, token: str, timestamp: Any) -> None:
    if type(timestamp) is not int:  # one beyond int64 was read as a float
        raise UserError(f"{path}: token {token}: timestamp {timestamp!r} is no integer of microseconds; {WAY_OUT}")


class Sensor(NamedTuple):
    """A row of calibrated_sensor.

    Attributes:
        channel: LIDAR_TOP, CAM_FRONT, ...
        ego_from_sensor: (4, 4).
        image_from_camera: (3, 4) pixels from metres; None for the lidar.
    """

    channel: str
    ego_from_sensor: NDArray[np.float64]
    image_from_camera: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class KeyFrames:
    """The key frames of some scenes, and the records (files) that belong to them.

    Attributes:
        scene_names: names of the scenes, in the order asked for.
        scene: (F,) index into `scene_names`; within a scene in the order of time.
        token: F sample tokens.
        timestamp: (F,) of the samples.
        lidar: (F,) the record of the lidar's key frame.
        cameras: (F, C) the records of the cameras' key frames.
        file_name: (R,) bytes, relative to the data set's root.
        record_timestamp: (R,).
        image_size: (R, 2) height and width; 0 for the lidar.
        sensor: (R,) index into `sensors`.
        pose: (R, 7) translation and quaternion, world from ego at the record's own time.
        previous: (R,) record of the lidar scan before, -1 for the first of a scene or where sweeps are not asked for.
        sensors: the calibrations.
    """

    scene_names: tuple[str, ...]
    scene: NDArray[np.int64]
    token: tuple[str, ...]
    timestamp: NDArray[np.int64]
    lidar: NDArray[np.int64]
    cameras: NDArray[np.int64]
    file_name: NDArray[np.bytes_]
    record_timestamp: NDArray[np.int64]
    image_size: NDArray[np.int64]
    sensor: NDArray[np.int64]
    pose: NDArray[np.float64]
    previous: NDArray[np.int64]
    sensors: tuple[Sensor, ...]

    def world_from_ego(self, record: int) -> NDArray[np.float64]:
        """(4, 4) at the record's own time."""
        return pose_matrix(self.pose[record, :3], self.pose[record, 3:])

    def world_from_sensor(self, record: int) -> NDArray[np.float64]:
        """(4, 4) at the record's own time."""
        return self.world_from_ego(record) @ self.sensors[self.sensor[record]].ego_from_sensor


def read_scenes(folder: Path) -> dict[str, tuple[str, str]]:
    """Name of each scene -> its token and the token of its first sample."""
    columns = ("name", "token", "first_sample_token")
    return {name: (token, first) for name, token, first in read_rows(folder / "scene.json", columns)}


def read_key_frames(folder: Path, scene_names: Sequence[str], cameras: Sequence[str], with_sweeps: bool) -> KeyFrames:
    """The key frames of the named scenes.

    Args:
        folder: the release's tables.
        scene_names: which scenes; they must stand in scene.json.
        cameras: channels of the cameras.
        with_sweeps: read the lidar scans between the key frames too.

    Raises:
        UserError: a table is missing or damaged, or rows do not fit together.
    """
    scenes = read_scenes(folder)
    samples = _read_samples(folder / "sample.json", [(name, *scenes[name]) for name in scene_names])
    sensors, sensor_index = _read_sensors(folder, (LIDAR, *cameras))
    if not samples:
        raise UserError(f"{folder / 'sample.json'}: holds no sample of the chosen scenes; {WAY_OUT}")
    frame_of = {token: frame for frame, (token, _, _) in enumerate(samples)}
    rows = _read_records(folder / "sample_data.json", frame_of, sensors, sensor_index, with_sweeps)
    record_of = {row.token: record for record, row in enumerate(rows)}
    timestamp = np.array([time for _, time, _ in samples], dtype=np.int64)
    table = _key_table(folder / "sample_data.json", rows, [token for token, _, _ in samples], (LIDAR, *cameras))
    record_timestamp = np.array([row.timestamp for row in rows], dtype=np.int64)
    late = np.abs(record_timestamp[table] - timestamp[:, None]) > MAX_OFFSET
    if late.any():
        frame, column = (int(index) for index in np.argwhere(late)[0])
        row = rows[table[frame, column]]
        raise UserError(
            f"{folder / 'sample_data.json'}: token {row.token}: timestamp {row.timestamp} is "
            f"{abs(row.timestamp - int(timestamp[frame])) / 1e6:.1f} s off that of its sample "
            f"{samples[frame][0]}; timestamps are microseconds; {WAY_OUT}"
        )
    return KeyFrames(
        scene_names=tuple(scene_names),
        scene=np.array([scene for _, _, scene in samples], dtype=np.int64),
        token=tuple(token for token, _, _ in samples),
        timestamp=timestamp,
        lidar=table[:, 0],
        cameras=table[:, 1:],
        file_name=np.array([row.file_name.encode() for row in rows], dtype=np.bytes_),
        record_timestamp=record_timestamp,
        image_size=np.array([row.image_size for row in rows], dtype=np.int64).reshape(-1, 2),
        sensor=np.array([row.sensor for row in rows], dtype=np.int64),
        pose=_read_poses(folder / "ego_pose.json", rows),
        previous=_link_sweeps(folder / "sample_data.json", rows, record_of, with_sweeps),
        sensors=tuple(sensors),
    )


def _read_samples(path: Path, scenes: list[tuple[str, str, str]]) -> list[tuple[str, int, int]]:
    """(token, timestamp, scene) of the samples, scene after scene, each along its chain of `next`."""
    known = {token for _, token, _ in scenes}
    rows = {
        token: (timestamp, following, scene)
        for token, timestamp, following, scene in read_rows(path, SAMPLE_COLUMNS)
        if scene in known
    }
    samples: list[tuple[str, int, int]] = []
    for index, (name, _, token) in enumerate(scenes):
        before = 0
        while token:
            if token not in rows:
                raise UserError(f"{path}: {name}: its sample {token} is not in the table; {WAY_OUT}")
            timestamp, following, _ = rows[token]
            _check_timestamp(path, token, timestamp)
            if timestamp <= before:
                raise UserError(
                    f"{path}: {name}: timestamps out of order: sample {token} at {timestamp} follows one at {before}; "
                    f"{WAY_OUT}"
                )
            samples.append((token, timestamp, index))
            before, token = timestamp, following
    return samples


def _read_sensors(folder: Path, channels: Collection[str]) -> tuple[list[Sensor], dict[str, int]]:
    """The calibrations of some channels, and token -> index of each; -1 for other channels."""
    channel_of = dict(read_rows(folder / "sensor.json", ("token", "channel")))
    absent = [channel for channel in channels if channel not in channel_of.values()]
    if absent:
        raise UserError(
            f"{folder / 'sensor.json'}: has no sensor {', '.join(absent)}, but {', '.join(sorted(channel_of.values()))}"
            "; leave it out of data.cameras"
        )
    path = folder / "calibrated_sensor.json"
    sensors: list[Sensor] = []
    index_of: dict[str, int] = {}
    for token, sensor_token, translation, rotation, intrinsic in read_rows(path, SENSOR_COLUMNS):
        if sensor_token not in channel_of:
            raise UserError(f"{path}: token {token}: its sensor {sensor_token} is not in sensor.json; {WAY_OUT}")
        channel = channel_of[sensor_token]
        if channel not in channels:
            index_of[token] = -1
            continue
        check_pose(path, token, translation, rotation)
        index_of[token] = len(sensors)
        projection = None if channel == LIDAR else _projection(path, token, intrinsic)
        sensors.append(Sensor(channel, pose_matrix(translation, rotation), projection))
    return sensors, index_of


def _projection(path: Path, token: str, intrinsic: Any) -> NDArray[np.float64]:
    try:
        matrix = np.array(intrinsic, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise UserError(f"{path}: token {token}: camera_intrinsic {intrinsic} is no 3 x 3 matrix; {WAY_OUT}")
    return np.concatenate([matrix, np.zeros((3, 1))], axis=1)


class _Record(NamedTuple):
    token: str
    frame: int
    channel: str
    sensor: int
    pose_token: str
    timestamp: int
    is_key_frame: bool
    image_size: tuple[int, int]
    file_name: str
    previous_token: str


def _read_records(
    path: Path, frame_of: dict[str, int], sensors: list[Sensor], sensor_index: dict[str, int], with_sweeps: bool
) -> list[_Record]:
    records = []
    for row in read_rows(path, RECORD_COLUMNS):
        token, sample, pose, sensor_token, timestamp, is_key_frame, height, width, file_name, previous = row
        if sample not in frame_of:
            continue
        if sensor_token not in sensor_index:
            raise UserError(
                f"{path}: token {token} ({file_name}): its calibration {sensor_token} is not in "
                f"calibrated_sensor.json; {WAY_OUT}"
            )
        sensor = sensor_index[sensor_token]
        if sensor < 0:
            continue
        channel = sensors[sensor].channel
        _check_timestamp(path, token, timestamp)
        if not plain_name(file_name):
            raise UserError(
                f"{path}: token {token}: filename {file_name[:80]!r} leads out of data.root, or cannot be a file's name; {WAY_OUT}"
            )
        if is_key_frame or (with_sweeps and channel == LIDAR):
            frame, size = frame_of[sample], (height or 0, width or 0)
            records.append(
                _Record(token, frame, channel, sensor, pose, timestamp, is_key_frame, size, file_name, previous)
            )
    return records


def _key_table(path: Path, rows: list[_Record], tokens: list[str], channels: Sequence[str]) -> NDArray[np.int64]:
    """(F, C) the record of each sample's key frame for each channel."""
    column = {channel: index for index, channel in enumerate(channels)}
    table = np.full((len(tokens), len(channels)), -1, dtype=np.int64)
    for record, row in enumerate(rows):
        if row.is_key_frame:
            table[row.frame, column[row.channel]] = record
    if (table < 0).any():
        frame, channel = (int(index) for index in np.argwhere(table < 0)[0])
        raise UserError(
            f"{path}: sample {tokens[frame]} has no key frame of {channels[channel]}; {WAY_OUT}, or leave the camera "
            "out of data.cameras"
        )
    return table


def _link_sweeps(path: Path, rows: list[_Record], record_of: dict[str, int], with_sweeps: bool) -> NDArray[np.int64]:
    """(R,) the lidar record before each."""
    previous = np.full(len(rows), -1, dtype=np.int64)
    if not with_sweeps:
        return previous
    for record, row in enumerate(rows):
        if row.channel != LIDAR or not row.previous_token:
            continue
        before = record_of.get(row.previous_token, -1)
        if before < 0:
            raise UserError(
                f"{path}: token {row.token} ({row.file_name}): the scan before it, {row.previous_token}, is not in the "
                f"table; {WAY_OUT}, or set data.num_sweeps=1"
            )
        if rows[before].timestamp >= row.timestamp:
            raise UserError(
                f"{path}: timestamps out of order: token {row.token} ({row.file_name}) at {row.timestamp} follows one "
                f"at {rows[before].timestamp}; {WAY_OUT}, or set data.num_sweeps=1"
            )
        previous[record] = before
    return previous


def _read_poses(path: Path, rows: list[_Record]) -> NDArray[np.float64]:
    """(R, 7) translation and quaternion of each record's own ego pose."""
    place: dict[str, list[int]] = {}
    for record, row in enumerate(rows):
        place.setdefault(row.pose_token, []).append(record)
    poses = np.zeros((len(rows), 7))
    for token, translation, rotation in read_rows(path, ("token", "translation", "rotation")):
        if token in place:
            check_pose(path, token, translation, rotation)
            poses[place.pop(token)] = [*translation, *rotation]
    if place:
        token, records = next(iter(place.items()))
        raise UserError(f"{path}: has no pose {token}, which {rows[records[0]].file_name} names; {WAY_OUT}")
    return poses
