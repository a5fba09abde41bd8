"""Waymo's format v2: one folder a component, in it one parquet file a segment, to `WaymoMoment`s.

    root/{camera_image,camera_calibration,lidar,lidar_calibration,lidar_pose,vehicle_pose,...}/<segment>.parquet

Rows are joined on segment, timestamp and sensor; calibrations have no timestamp. When a download is opened, only
vehicle_pose's timestamps are read, and the first segment's columns and calibrations are checked; everything else is
opened when a frame needs it, and a bounded number of files stays open.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers.base import listed
from simipu3d.data.readers.parquet_rows import WAY_OUT, Kind, ParquetRows, Recent
from simipu3d.data.readers.waymo_boxes import vehicle_boxes
from simipu3d.data.readers.waymo_moment import (
    CAMERA_NAMES,
    LASER_NAMES,
    WaymoCamera,
    WaymoLaser,
    WaymoMoment,
    WaymoRequest,
    WaymoReturn,
)
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.camera import check_distortion
from simipu3d.geometry.rigid import check_rigid

SEGMENT, TIMESTAMP = "key.segment_context_name", "key.frame_timestamp_micros"
CAMERA, LASER, OBJECT = "key.camera_name", "key.laser_name", "key.laser_object_id"
KEYS = {
    "vehicle_pose": (TIMESTAMP,),
    "camera_image": (TIMESTAMP, CAMERA),
    "camera_calibration": (CAMERA,),
    "lidar": (TIMESTAMP, LASER),
    "lidar_calibration": (LASER,),
    "lidar_pose": (TIMESTAMP, LASER),
    "lidar_camera_projection": (TIMESTAMP, LASER),
    "lidar_box": (TIMESTAMP,),
    "projected_lidar_box": (TIMESTAMP, CAMERA),
}
"""The key columns of each component beside the segment's; also the components that are read at all."""

NUM_OPEN = 48
"""Files that stay open, each with its key columns: those of some six segments."""

NUM_STREAMS = 6
"""Row groups that wait half decoded: one for each component that a frame is made of."""

INTRINSICS = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
POSE = "[VehiclePoseComponent].world_from_vehicle.transform"
IMAGE, IMAGE_POSE, IMAGE_POSE_TIME = (
    f"[CameraImageComponent].{name}" for name in ("image", "pose.transform", "pose_timestamp")
)
CAMERA_EXTRINSIC, CAMERA_WIDTH, CAMERA_HEIGHT = (
    f"[CameraCalibrationComponent].{name}" for name in ("extrinsic.transform", "width", "height")
)
CAMERA_INTRINSICS = tuple(f"[CameraCalibrationComponent].intrinsic.{name}" for name in INTRINSICS)
LASER_EXTRINSIC = "[LiDARCalibrationComponent].extrinsic.transform"
INCLINATIONS, LOWEST, HIGHEST = (
    f"[LiDARCalibrationComponent].beam_inclination.{name}" for name in ("values", "min", "max")
)
BOX_COLUMNS = tuple(
    f"[LiDARBoxComponent].{name}"
    for name in (
        *(f"box.center.{axis}" for axis in "xyz"),
        *(f"box.size.{axis}" for axis in "xyz"),
        "box.heading",
        *(f"speed.{axis}" for axis in "xyz"),
        "type",
        "num_lidar_points_in_box",
        "difficulty_level.detection",
    )
)
IMAGE_BOX_COLUMNS = tuple(
    f"[ProjectedLiDARBoxComponent].box.{name}" for name in ("center.x", "center.y", "size.x", "size.y")
)


def tensor_columns(component_class: str, number: int) -> tuple[str, str]:
    """The columns that hold return `number` of a range image: values, row after row, and shape."""
    name = f"[{component_class}].range_image_return{number}"
    return f"{name}.values", f"{name}.shape"


def column_kind(name: str) -> Kind:
    """What a column holds."""
    if name in (SEGMENT, OBJECT):
        return "text"
    if name == IMAGE:
        return "bytes"
    if name.endswith(".shape"):
        return "integers"
    return "numbers" if name.endswith((".transform", ".values")) else "number"


def needed_columns(request: WaymoRequest) -> dict[str, tuple[str, ...]]:
    """The components and columns that a request reads; boxes only where the download has them."""
    columns: dict[str, tuple[str, ...]] = {"vehicle_pose": (POSE,)}
    if request.cameras:
        columns["camera_image"] = (*((IMAGE,) if request.pixels else ()), IMAGE_POSE, IMAGE_POSE_TIME)
        columns["camera_calibration"] = (*CAMERA_INTRINSICS, CAMERA_EXTRINSIC, CAMERA_WIDTH, CAMERA_HEIGHT)
    numbers = range(1, request.returns + 1)
    if request.lasers:
        columns["lidar"] = sum((tensor_columns("LiDARComponent", number) for number in numbers), ())
        columns["lidar_calibration"] = (LASER_EXTRINSIC, INCLINATIONS, LOWEST, HIGHEST)
        if LASER_NAMES[1] in request.lasers:
            columns["lidar_pose"] = tensor_columns("LiDARPoseComponent", 1)
        if request.projections:
            columns["lidar_camera_projection"] = sum(
                (tensor_columns("LiDARCameraProjectionComponent", number) for number in numbers), ()
            )
    if request.boxes:
        columns["lidar_box"] = (*BOX_COLUMNS, OBJECT)
    if request.projected_boxes and request.cameras:
        columns["projected_lidar_box"] = (*IMAGE_BOX_COLUMNS, OBJECT)
    return columns


class WaymoV2:
    """Frames of some segments in format v2. Contract: `WaymoSource`.

    Args:
        root: the folder that holds the components' folders.
        segments: their names, in the order they are wanted.
        request: what frames are read for.

    Raises:
        UserError: a component's folder or a segment's file is absent, vehicle_pose is damaged or out of order, or the
            first segment lacks a column or the calibration of a sensor.
    """

    OPTIONAL = ("lidar_box", "projected_lidar_box")
    """Components that a release may lack altogether (the test split has no labels)."""

    def __init__(self, root: Path, segments: tuple[str, ...], request: WaymoRequest):
        self.root, self.request = root, request
        self._tables, self._calibrations, self._streams = Recent(NUM_OPEN), Recent(NUM_OPEN), Recent(NUM_STREAMS)
        self._check_files(segments)
        self._timestamps = {segment: self._read_timestamps(segment) for segment in segments}
        self.moments = tuple(
            (segment, position) for segment, times in self._timestamps.items() for position in range(len(times))
        )
        for segment in segments[:1]:
            self._check_segment(segment)

    @classmethod
    def list_segments(cls, root: Path) -> tuple[str, ...]:
        """The segments that root/vehicle_pose has a file of, sorted."""
        folder = root / "vehicle_pose"
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; Waymo's format v2 has one folder a component (camera_image, lidar, "
                "vehicle_pose, ...): download vehicle_pose too, or set data.root, data.split and data.version to what "
                "is there"
            )
        names = tuple(path.stem for path in listed(folder, "*.parquet"))
        if not names:
            raise UserError(f"{folder}: holds no .parquet file; download the component vehicle_pose")
        return names

    @classmethod
    def has_boxes(cls, root: Path) -> bool:
        """Is there a component lidar_box?"""
        return (root / "lidar_box").is_dir()

    def read(self, index: int, request: WaymoRequest | None = None) -> WaymoMoment:
        """The moment at a position of `moments`."""
        request = self.request if request is None else request
        segment, position = self.moments[index]
        timestamp = int(self._timestamps[segment][position])
        columns = needed_columns(request)
        table, _ = self._rows("vehicle_pose", segment, columns["vehicle_pose"], timestamp)
        world_from_vehicle = self._matrix("vehicle_pose", segment, table[POSE][0])
        return WaymoMoment(
            source=str(self.root / "*" / f"{segment}.parquet"),
            segment=segment,
            timestamp_micros=timestamp,
            world_from_vehicle=world_from_vehicle,
            lasers=self._lasers(segment, timestamp, request, columns) if request.lasers else (),
            cameras=self._cameras(segment, timestamp, request, columns) if request.cameras else (),
            boxes=self._boxes(segment, timestamp, world_from_vehicle) if self._has("lidar_box", request) else None,
        )

    # What a moment is made of

    def _lasers(
        self, segment: str, timestamp: int, request: WaymoRequest, columns: dict[str, tuple[str, ...]]
    ) -> tuple[WaymoLaser, ...]:
        read = partial(self._by_sensor, segment=segment, timestamp=timestamp, names=request.lasers, columns=columns)
        images, poses, projections = read("lidar"), read("lidar_pose"), read("lidar_camera_projection")
        lasers = []
        for name in request.lasers:
            if name not in images:
                continue
            if name == LASER_NAMES[1] and name not in poses:
                raise self._bad("lidar_pose", segment, f"timestamp {timestamp}: has no row of laser {name}")
            if request.projections and name not in projections:
                raise self._bad("lidar_camera_projection", segment, f"timestamp {timestamp}: has no row of {name}")
            returns = []
            for number in range(1, request.returns + 1):
                image = self._tensor("lidar", segment, images[name], ("LiDARComponent", number, 4))
                projection = None
                if request.projections:
                    kind = ("LiDARCameraProjectionComponent", number, 6)
                    projection = self._tensor("lidar_camera_projection", segment, projections[name], kind)
                    projection = projection.astype(np.int32)
                returns.append(WaymoReturn(image.astype(np.float32), projection))
            pose = None
            if name in poses:
                pose = self._tensor("lidar_pose", segment, poses[name], ("LiDARPoseComponent", 1, 6))
            extrinsic, inclinations, inclination_range = self._calibration("lidar_calibration", segment, name)
            lasers.append(WaymoLaser(name, extrinsic, inclinations, inclination_range, tuple(returns), pose))
        return tuple(lasers)

    def _cameras(
        self, segment: str, timestamp: int, request: WaymoRequest, columns: dict[str, tuple[str, ...]]
    ) -> tuple[WaymoCamera, ...]:
        images = self._by_sensor("camera_image", segment, timestamp, request.cameras, columns)
        labels = self._image_boxes(segment, timestamp) if self._has("projected_lidar_box", request) else None
        cameras = []
        for name in (name for name in request.cameras if name in images):
            row = images[name]
            if request.pixels and not row[IMAGE].is_valid:
                raise self._bad("camera_image", segment, f"timestamp {timestamp}: the image of {name} is empty")
            intrinsic, extrinsic, size = self._calibration("camera_calibration", segment, name)
            pose = row[IMAGE_POSE]
            cameras.append(
                WaymoCamera(
                    name=name,
                    jpeg=row[IMAGE].as_py() if request.pixels else b"",
                    intrinsic=intrinsic,
                    vehicle_from_camera=extrinsic,
                    size=size,
                    world_from_vehicle=self._matrix("camera_image", segment, pose) if pose.is_valid else None,
                    pose_timestamp=row[IMAGE_POSE_TIME].as_py(),
                    labels=None if labels is None else labels[name][0],
                    label_ids=None if labels is None else labels[name][1],
                )
            )
        return tuple(cameras)

    def _boxes(self, segment: str, timestamp: int, world_from_vehicle: NDArray[np.float64]) -> Boxes:
        table, _ = self._rows("lidar_box", segment, (*BOX_COLUMNS, OBJECT), timestamp, at_least=0)
        values = np.stack([_numbers(table[name]) for name in BOX_COLUMNS], axis=1)
        geometry, whole = values[:, :7], np.nan_to_num(values[:, 10:]).clip(-1, 1 << 40).astype(np.int64)
        if not np.isfinite(geometry).all():
            raise self._bad("lidar_box", segment, f"timestamp {timestamp}: a box has no finite centre, size or heading")
        return vehicle_boxes(
            geometry[:, :3],
            geometry[:, 3:6],
            geometry[:, 6],
            whole[:, 0],
            values[:, 7:10],
            whole[:, 1],
            whole[:, 2],
            _words(table[OBJECT]),
            world_from_vehicle,
        )

    def _image_boxes(self, segment: str, timestamp: int) -> dict[str, tuple[NDArray[np.float64], tuple[str, ...]]]:
        """(K, 4) projected lidar boxes by camera, and their ids."""
        columns = (*IMAGE_BOX_COLUMNS, OBJECT)
        table, keys = self._rows("projected_lidar_box", segment, columns, timestamp, at_least=0)
        values, ids = np.stack([_numbers(table[name]) for name in IMAGE_BOX_COLUMNS], axis=1), _words(table[OBJECT])
        own = {name: np.flatnonzero(keys[CAMERA] == number) for number, name in CAMERA_NAMES.items()}
        return {name: (values[rows], tuple(ids[row] for row in rows)) for name, rows in own.items()}

    def _calibration(self, component: str, segment: str, name: str) -> Any:
        """What `_read_calibrations` says of one sensor."""
        known = self._calibrations.get((component, segment), partial(self._read_calibrations, component, segment))
        if name not in known:
            raise self._bad(component, segment, f"has no row of {name}, but {', '.join(known) or 'none at all'}")
        return known[name]

    def _read_calibrations(self, component: str, segment: str) -> dict[str, Any]:
        """Sensor -> calibration: (intrinsic, extrinsic, size) of a camera, (extrinsic, inclinations, smallest and
        largest) of a laser."""
        everything = WaymoRequest(tuple(CAMERA_NAMES.values()), tuple(LASER_NAMES.values()))
        table, keys = self._rows(component, segment, needed_columns(everything)[component])
        matrix = partial(self._matrix, component, segment)
        known: dict[str, Any] = {}
        if component == "camera_calibration":
            intrinsics = np.stack([_numbers(table[name]) for name in CAMERA_INTRINSICS], axis=1)
            sizes = np.stack([_numbers(table[name]) for name in (CAMERA_HEIGHT, CAMERA_WIDTH)], axis=1)
            if not np.isfinite(intrinsics).all() or not ((sizes > 0) & np.isfinite(sizes)).all():
                raise self._bad(component, segment, "an intrinsic or a size is missing")
            for wrong in map(check_distortion, intrinsics[:, 4:]):
                if wrong:
                    raise self._bad(component, segment, f"a distortion {wrong}")
            for row, number in enumerate(keys[CAMERA].tolist()):
                size = (int(sizes[row, 0]), int(sizes[row, 1]))
                known[CAMERA_NAMES.get(number, str(number))] = (
                    intrinsics[row],
                    matrix(table[CAMERA_EXTRINSIC][row]),
                    size,
                )
            return known
        for row, number in enumerate(keys[LASER].tolist()):
            values, bounds = table[INCLINATIONS][row].as_py(), (table[LOWEST][row].as_py(), table[HIGHEST][row].as_py())
            if not values and None in bounds:
                raise self._bad(component, segment, f"laser {number} has neither beam inclinations nor their range")
            known[LASER_NAMES.get(number, str(number))] = (
                matrix(table[LASER_EXTRINSIC][row]),
                np.array(values, dtype=np.float64) if values else None,
                tuple(np.nan if bound is None else float(bound) for bound in bounds),
            )
        return known

    # Tables

    def _table(self, component: str, segment: str) -> ParquetRows:
        path = self.root / component / f"{segment}.parquet"
        return self._tables.get(
            path, lambda: ParquetRows(path, (SEGMENT, segment), KEYS[component], self._streams, column_kind)
        )

    def _rows(
        self,
        component: str,
        segment: str,
        columns: tuple[str, ...],
        timestamp: int | None = None,
        sensors: Collection[int] | None = None,
        at_least: int = 1,
    ) -> tuple[pa.Table, dict[str, NDArray[np.int64]]]:
        """The rows of a moment (of the whole segment without a timestamp), and their key columns."""
        table = self._table(component, segment)
        chosen = np.full(len(table.rows), True)
        if timestamp is not None:
            chosen &= table.keys[TIMESTAMP] == timestamp
        if sensors is not None:
            chosen &= np.isin(table.keys[KEYS[component][1]], list(sensors))
        if chosen.sum() < at_least:
            when = "" if timestamp is None else f" at timestamp {timestamp}"
            raise self._bad(component, segment, f"has no row of this segment{when}")
        rows = table.read(table.rows[chosen], columns)
        return rows, {name: values[chosen] for name, values in table.keys.items()}

    def _by_sensor(
        self, component: str, segment: str, timestamp: int, names: tuple[str, ...], columns: dict[str, tuple[str, ...]]
    ) -> dict[str, dict[str, pa.Scalar]]:
        """Sensor -> column -> value, of the sensors that the file has at this time."""
        if component not in columns:
            return {}
        key = KEYS[component][1]
        known = CAMERA_NAMES if key == CAMERA else LASER_NAMES
        numbers = [number for number, name in known.items() if name in names]
        table, keys = self._rows(component, segment, columns[component], timestamp, numbers, at_least=0)
        found: dict[str, dict[str, pa.Scalar]] = {}
        for row, number in enumerate(keys[key].tolist()):
            if known[number] in found:
                raise self._bad(component, segment, f"timestamp {timestamp}: two rows of {known[number]}")
            found[known[number]] = {column: table[column][row] for column in columns[component]}
        return found

    def _tensor(
        self, component: str, segment: str, row: dict[str, pa.Scalar], kind: tuple[str, int, int]
    ) -> NDArray[Any]:
        """(H, W, C) of one return; `kind` is the component's class, the number of the return, and C."""
        name, number, channels = kind
        values, shape = (row[column] for column in tensor_columns(name, number))
        if not values.is_valid or not shape.is_valid:
            raise self._bad(component, segment, f"return {number} of a lidar is empty; set data.returns=1 if all are")
        flat, size = values.values.to_numpy(zero_copy_only=False), tuple(shape.as_py())
        if (
            len(size) != 3
            or None in size
            or size[2] != channels
            or min(size) < 1
            or size[0] * size[1] * size[2] != len(flat)
        ):
            raise self._bad(
                component,
                segment,
                f"return {number}: {len(flat)} values do not make the shape {list(size)} with {channels} channels",
            )
        return flat.reshape(size)

    def _matrix(self, component: str, segment: str, value: pa.Scalar) -> NDArray[np.float64]:
        numbers = value.as_py() if value.is_valid else []
        if len(numbers) != 16 or None in numbers or not np.isfinite(numbers).all():
            raise self._bad(component, segment, f"a transform has {len(numbers)} numbers, expected 16 finite ones")
        matrix = np.array(numbers, dtype=np.float64).reshape(4, 4)
        if wrong := check_rigid(matrix):
            raise self._bad(component, segment, f"a transform is no rigid motion: it {wrong}")
        return matrix

    def _bad(self, component: str, segment: str, what: str) -> BadFrameError:
        return BadFrameError(f"{self.root / component / segment}.parquet: {what}; {WAY_OUT}")

    # What is checked when a download is opened

    def _has(self, component: str, request: WaymoRequest) -> bool:
        return component in needed_columns(request) and (self.root / component).is_dir()

    def _needed(self) -> dict[str, tuple[str, ...]]:
        columns = needed_columns(self.request)
        return {name: columns[name] for name in columns if name not in self.OPTIONAL or (self.root / name).is_dir()}

    def _check_files(self, segments: tuple[str, ...]) -> None:
        """Compare the segments with the folders once, so that a part of the download is reported before training starts."""
        for component in self._needed():
            folder = self.root / component
            present = {path.stem for path in listed(folder, "*.parquet")} if folder.is_dir() else set()
            absent = [segment for segment in segments if segment not in present]
            if absent and component in ("lidar", "lidar_calibration", "lidar_pose") and not present:
                raise UserError(
                    f"{folder}: holds no .parquet file; download the component {component}, or, to look at images and "
                    "boxes alone, set data.lasers=[]"
                )
            if absent:
                raise UserError(
                    f"{folder / absent[0]}.parquet: no such file; {len(absent)} of {len(segments)} segments have none; "
                    f"download the whole component {component}, or list the segments you have in data.split_file"
                )

    def _read_timestamps(self, segment: str) -> NDArray[np.int64]:
        path = self.root / "vehicle_pose" / f"{segment}.parquet"
        times = ParquetRows(path, (SEGMENT, segment), KEYS["vehicle_pose"], kind_of=column_kind).keys[TIMESTAMP]
        if len(times) == 0:
            raise UserError(f"{path}: has no row of segment {segment}; download the file again")
        late = np.flatnonzero(np.diff(times) <= 0)
        if len(late):
            before, after = times[late[0] : late[0] + 2].tolist()
            raise UserError(
                f"{path}: timestamps out of order: segment {segment} has {after} after {before}; download the file "
                "again, or leave the segment out with data.split_file"
            )
        return times

    def _check_segment(self, segment: str) -> None:
        """A release that lacks a column or a sensor lacks it everywhere: one segment shows it."""
        for component, columns in self._needed().items():
            self._table(component, segment).check_columns(columns)
        for name in self.request.cameras:
            self._calibration("camera_calibration", segment, name)
        for name in self.request.lasers:
            self._calibration("lidar_calibration", segment, name)


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A column of numbers, NaN where empty."""
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)


def _words(column: pa.ChunkedArray) -> tuple[str, ...]:
    """A column of texts, empty where there is none."""
    return tuple(str(value or "") for value in column.to_pylist())
