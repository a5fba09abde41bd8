"""How are drive_world's moments written in Waymo's own file formats?

Version 2: a folder a component, in it a parquet file a segment, one row group a moment (one in all where a component has
no time). Names and types of the columns are those of the official files. Version 1: a file of records a segment.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simipu3d.benchmark.synthetic_waymo.drive import WaymoTruth
from simipu3d.benchmark.synthetic_waymo.record import moment_to_record
from simipu3d.data.readers.tfrecord import write_records
from simipu3d.data.readers.waymo_moment import CAMERA_NAMES, LASER_NAMES, OBJECT_NAMES, WaymoMoment

Row = dict[str, Any]
Pair = tuple[WaymoMoment, WaymoTruth]

_CAMERAS = {name: number for number, name in CAMERA_NAMES.items()}
_LASERS = {name: number for number, name in LASER_NAMES.items()}
_OBJECTS = {name: number for number, name in OBJECT_NAMES.items()}

_LEFT_TO_RIGHT, _GLOBAL_SHUTTER = 2, 5
"""Numbers of `rolling_shutter_direction`."""

_SEGMENT = {"key.segment_context_name": pa.string()}
_TIME = {**_SEGMENT, "key.frame_timestamp_micros": pa.int64()}
_CAMERA, _LASER, _OBJECT = (
    {"key.camera_name": pa.int8()},
    {"key.laser_name": pa.int8()},
    {"key.laser_object_id": pa.string()},
)
_MATRIX = pa.list_(pa.float64(), 16)


def _columns(kind: str, **types: pa.DataType) -> dict[str, pa.DataType]:
    """`__` in a name stands for a dot."""
    return {f"[{kind}].{name.replace('__', '.')}": type_ for name, type_ in types.items()}


def _each(kind: str, names: str, type_: pa.DataType) -> dict[str, pa.DataType]:
    return {f"[{kind}].{name}": type_ for name in names.split()}


def _range_images(kind: str, value: pa.DataType, returns: int = 2) -> dict[str, pa.DataType]:
    return {
        f"[{kind}].range_image_return{number}.{part}": pa.list_(type_)
        for number in range(1, returns + 1)
        for part, type_ in (("values", value), ("shape", pa.int32()))
    }


SCHEMAS: dict[str, pa.Schema] = {
    tag: pa.schema(columns)
    for tag, columns in {
        "camera_image": {
            **_TIME,
            **_CAMERA,
            **_columns("CameraImageComponent", image=pa.binary(), pose__transform=_MATRIX),
            **_each(
                "CameraImageComponent",
                "velocity.linear_velocity.x velocity.linear_velocity.y velocity.linear_velocity.z",
                pa.float32(),
            ),
            **_each(
                "CameraImageComponent",
                "velocity.angular_velocity.x velocity.angular_velocity.y "
                "velocity.angular_velocity.z pose_timestamp rolling_shutter_params.shutter "
                "rolling_shutter_params.camera_trigger_time rolling_shutter_params.camera_readout_done_time",
                pa.float64(),
            ),
        },
        "camera_calibration": {
            **_SEGMENT,
            **_CAMERA,
            **_each(
                "CameraCalibrationComponent",
                "intrinsic.f_u intrinsic.f_v intrinsic.c_u intrinsic.c_v "
                "intrinsic.k1 intrinsic.k2 intrinsic.p1 intrinsic.p2 intrinsic.k3",
                pa.float64(),
            ),
            **_columns(
                "CameraCalibrationComponent",
                extrinsic__transform=_MATRIX,
                width=pa.int32(),
                height=pa.int32(),
                rolling_shutter_direction=pa.int8(),
            ),
        },
        "lidar": {**_TIME, **_LASER, **_range_images("LiDARComponent", pa.float32())},
        "lidar_calibration": {
            **_SEGMENT,
            **_LASER,
            **_columns(
                "LiDARCalibrationComponent",
                extrinsic__transform=_MATRIX,
                beam_inclination__min=pa.float64(),
                beam_inclination__max=pa.float64(),
                beam_inclination__values=pa.list_(pa.float64()),
            ),
        },
        "lidar_pose": {**_TIME, **_LASER, **_range_images("LiDARPoseComponent", pa.float32(), 1)},
        "lidar_camera_projection": {**_TIME, **_LASER, **_range_images("LiDARCameraProjectionComponent", pa.int32())},
        "vehicle_pose": {**_TIME, **_columns("VehiclePoseComponent", world_from_vehicle__transform=_MATRIX)},
        "lidar_box": {
            **_TIME,
            **_OBJECT,
            **_each(
                "LiDARBoxComponent",
                "box.center.x box.center.y box.center.z box.size.x box.size.y box.size.z box.heading",
                pa.float64(),
            ),
            **_columns(
                "LiDARBoxComponent",
                type=pa.int8(),
                num_lidar_points_in_box=pa.int64(),
                num_top_lidar_points_in_box=pa.int64(),
            ),
            **_each(
                "LiDARBoxComponent",
                "speed.x speed.y speed.z acceleration.x acceleration.y acceleration.z",
                pa.float64(),
            ),
            **_each("LiDARBoxComponent", "difficulty_level.detection difficulty_level.tracking", pa.int8()),
        },
        "projected_lidar_box": {
            **_TIME,
            **_CAMERA,
            **_OBJECT,
            **_each("ProjectedLiDARBoxComponent", "box.center.x box.center.y box.size.x box.size.y", pa.float64()),
            **_columns("ProjectedLiDARBoxComponent", type=pa.int8()),
        },
    }.items()
}
"""The components that are written, and their columns."""


def write_waymo_v2(folder: Path, segments: Mapping[str, Iterable[Pair]]) -> None:
    """Write segments as Waymo v2 components.

    Args:
        folder: becomes the folder of the components.
        segments: for every context name its moments with their truth, in the order of time; one is held at a time.
            What a `WaymoMoment` does not hold (object numbers, velocities, shutter times) is taken from the truth.

    A segment's files appear together when it is complete; nothing stays of one that failed.

    Raises:
        ValueError: a segment without moments, or a moment of another segment.
    """
    for segment, pairs in segments.items():
        with _writers(folder, segment) as write:
            count = 0
            for moment, truth in pairs:
                if moment.segment != segment:
                    raise ValueError(f"a moment of {moment.segment!r} among those of {segment!r}")
                for tag, make_rows in _ROWS.items():
                    timed = "key.frame_timestamp_micros" in SCHEMAS[tag].names
                    rows = make_rows(moment, truth) if timed or count == 0 else []
                    if rows:
                        write(tag, _with_keys(tag, moment, rows))
                count += 1
            if not count:
                raise ValueError(f"segment {segment!r} has no moments")


def write_waymo_v1(folder: Path, segments: Mapping[str, Iterable[Pair]]) -> None:
    """Write segments as Waymo v1 files, segment-<name>_with_camera_labels.tfrecord; arguments and errors as
    `write_waymo_v2`."""
    folder.mkdir(parents=True, exist_ok=True)
    for segment, pairs in segments.items():
        moments = [moment for moment, _ in pairs]
        if not moments:
            raise ValueError(f"segment {segment!r} has no moments")
        records = (moment_to_record(moment) for moment in moments)
        write_records(folder / f"segment-{segment}_with_camera_labels.tfrecord", records)


@contextmanager
def _writers(folder: Path, segment: str) -> Iterator[Callable[[str, list[Row]], None]]:
    """A function that appends a row group to a component; the files get their names when all went well."""
    paths = {tag: folder / tag / f"{segment}.parquet" for tag in SCHEMAS}
    parts = {tag: path.with_suffix(".part") for tag, path in paths.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    # A dictionary of floats or of images costs time and saves nothing.
    writers = {
        tag: pq.ParquetWriter(parts[tag], schema, use_dictionary=["key.segment_context_name"])
        for tag, schema in SCHEMAS.items()
    }
    try:
        try:
            yield lambda tag, rows: writers[tag].write_table(_table(tag, rows))
        finally:
            for writer in writers.values():
                writer.close()
        for tag, part in parts.items():
            os.replace(part, paths[tag])
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _table(tag: str, rows: list[Row]) -> pa.Table:
    """The rows as a table; a column that a row lacks is null there."""
    schema = SCHEMAS[tag]
    return pa.table([_array([row.get(name) for row in rows], schema.field(name).type) for name in schema.names], schema)


def _array(values: list[Any], type_: pa.DataType) -> pa.Array:
    """Long lists come as numpy arrays and go into the column without a Python number for each value."""
    if not pa.types.is_list(type_):
        return pa.array(values, type_)
    sizes = [0 if value is None else len(value) for value in values]
    offsets = pa.array(
        [
            None if value is None else int(end) - size
            for value, end, size in zip(values, np.cumsum(sizes), sizes, strict=True)
        ]
        + [sum(sizes)],
        pa.int32(),
    )
    flat = [np.asarray(value, dtype=type_.value_type.to_pandas_dtype()) for value in values if value is not None]
    content = np.concatenate(flat) if flat else np.zeros(0, dtype=type_.value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(offsets, pa.array(content, type_.value_type)).cast(type_)


def _with_keys(tag: str, moment: WaymoMoment, rows: list[Row]) -> list[Row]:
    """Rows whose columns carry the component's class, with the keys that all components share."""
    schema = SCHEMAS[tag]
    kind = next(name for name in schema.names if name.startswith("[")).partition(".")[0]
    shared = {
        "key.segment_context_name": moment.segment,
        "key.frame_timestamp_micros": moment.timestamp_micros,
    }
    keyed = [
        {name if name.startswith("key.") else f"{kind}.{name}": value for name, value in {**shared, **row}.items()}
        for row in rows
    ]
    return [{name: value for name, value in row.items() if name in schema.names} for row in keyed]


def _spread(prefix: str, names: str, values: Iterable[float]) -> Row:
    return {f"{prefix}{name}": float(value) for name, value in zip(names.split(), values, strict=True)}


def _image(number: int, image: np.ndarray) -> Row:
    prefix = f"range_image_return{number}"
    return {f"{prefix}.values": image.reshape(-1), f"{prefix}.shape": list(image.shape)}


def _camera_images(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    rows = []
    for camera in moment.cameras:
        picture = truth.pictures[camera.name]
        rows.append(
            {
                "key.camera_name": _CAMERAS[camera.name],
                "image": camera.jpeg,
                "pose.transform": camera.world_from_vehicle.reshape(-1),
                **_spread("velocity.linear_velocity.", "x y z", picture.velocity[:3]),
                **_spread("velocity.angular_velocity.", "x y z", picture.velocity[3:]),
                "pose_timestamp": camera.pose_timestamp,
                "rolling_shutter_params.shutter": 0.0,
                "rolling_shutter_params.camera_trigger_time": camera.pose_timestamp - picture.readout / 2,
                "rolling_shutter_params.camera_readout_done_time": camera.pose_timestamp + picture.readout / 2,
            }
        )
    return rows


def _camera_calibrations(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    return [
        {
            "key.camera_name": _CAMERAS[camera.name],
            **_spread("intrinsic.", "f_u f_v c_u c_v k1 k2 p1 p2 k3", camera.intrinsic),
            "extrinsic.transform": camera.vehicle_from_camera.reshape(-1),
            "width": camera.size[1],
            "height": camera.size[0],
            "rolling_shutter_direction": _LEFT_TO_RIGHT if truth.pictures[camera.name].readout else _GLOBAL_SHUTTER,
        }
        for camera in moment.cameras
    ]


def _lidars(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    rows = []
    for laser in moment.lasers:
        row = {"key.laser_name": _LASERS[laser.name]}
        for number, each in enumerate(laser.returns, 1):
            row.update(_image(number, each.image))
        rows.append(row)
    return rows


def _lidar_calibrations(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    return [
        {
            "key.laser_name": _LASERS[laser.name],
            "extrinsic.transform": laser.vehicle_from_laser.reshape(-1),
            "beam_inclination.min": laser.inclination_range[0],
            "beam_inclination.max": laser.inclination_range[1],
            "beam_inclination.values": laser.inclinations,
        }
        for laser in moment.lasers
    ]


def _lidar_poses(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    return [
        {"key.laser_name": _LASERS[laser.name], **_image(1, laser.pixel_pose)}
        for laser in moment.lasers
        if laser.pixel_pose is not None
    ]


def _projections(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    rows = []
    for laser in moment.lasers:
        row = {"key.laser_name": _LASERS[laser.name]}
        for number, each in enumerate(laser.returns, 1):
            if each.projection is not None:
                row.update(_image(number, each.projection))
        rows.append(row)
    return rows


def _vehicle_poses(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    return [{"world_from_vehicle.transform": moment.world_from_vehicle.reshape(-1)}]


def _lidar_boxes(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    boxes = moment.boxes
    return [
        {
            "key.laser_object_id": truth.object_ids[k],
            **_spread("box.center.", "x y z", boxes.center[k]),
            **_spread("box.size.", "x y z", boxes.size[k]),
            "box.heading": float(boxes.yaw[k]),
            "type": _OBJECTS[boxes.names[k]],
            "num_lidar_points_in_box": int(boxes.num_points[k]),
            "num_top_lidar_points_in_box": int(truth.num_top_points[k]),
            **_spread("speed.", "x y z", truth.world_velocity[k]),
            **_spread("acceleration.", "x y z", (0.0, 0.0, 0.0)),
        }
        for k in range(len(boxes))
    ]


def _projected_boxes(moment: WaymoMoment, truth: WaymoTruth) -> list[Row]:
    return [
        {
            "key.camera_name": _CAMERAS[camera.name],
            "key.laser_object_id": truth.object_ids[k],
            **_spread("box.center.", "x y", label[:2]),
            **_spread("box.size.", "x y", label[2:]),
            "type": _OBJECTS[moment.boxes.names[k]],
        }
        for camera in moment.cameras
        for label, k in zip(camera.labels, truth.pictures[camera.name].labelled, strict=True)
    ]


_ROWS: dict[str, Callable[[WaymoMoment, WaymoTruth], list[Row]]] = {
    "camera_image": _camera_images,
    "camera_calibration": _camera_calibrations,
    "lidar": _lidars,
    "lidar_calibration": _lidar_calibrations,
    "lidar_pose": _lidar_poses,
    "lidar_camera_projection": _projections,
    "vehicle_pose": _vehicle_poses,
    "lidar_box": _lidar_boxes,
    "projected_lidar_box": _projected_boxes,
}
"""What a moment gives each component; the class and the shared keys are added to the columns."""
