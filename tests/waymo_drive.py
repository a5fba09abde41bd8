"""Small made-up Waymo downloads in format v2: a car drives 10 m/s in a curve; its five lidars measure random ranges.

Formulae are written out pixel by pixel with plain numbers, so nothing is shared with the reader.
"""

import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from simipu3d.data.readers.waymo_moment import CAMERA_NAMES, LASER_NAMES

SEGMENTS = ("1005_000_020_000", "1100_020_040_000", "9001_040_060_000")
NUM_FRAMES = 4
STEP = 100_000
"""Microseconds between frames."""
SIZES = {1: (40, 60), 2: (40, 60), 3: (40, 60), 4: (28, 60), 5: (28, 60)}
"""Height and width of each camera's image."""
BEARINGS = {1: 0.0, 2: 0.8, 3: -0.8, 4: 1.6, 5: -1.6}
LASER_YAWS = {1: 0.6, 2: 0.1, 3: 1.5, 4: -1.5, 5: 3.1}
EXPOSURES = {1: 51_000, 2: 41_000, 3: 61_000, 4: 31_000, 5: 71_000}
"""Microseconds from a frame's time stamp to each camera's exposure."""
SPEED = (3.0, -4.0, 0.5)
"""Of every object, along the world's axes."""


def times(segment: str) -> list[int]:
    start = 1_550_000_000_000_000 + SEGMENTS.index(segment) * 100_000_000
    return [start + frame * STEP for frame in range(NUM_FRAMES)]


def rotation(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """(3, 3) Rz(yaw) Ry(pitch) Rx(roll)."""
    about_x = [[1, 0, 0], [0, math.cos(roll), -math.sin(roll)], [0, math.sin(roll), math.cos(roll)]]
    about_y = [[math.cos(pitch), 0, math.sin(pitch)], [0, 1, 0], [-math.sin(pitch), 0, math.cos(pitch)]]
    about_z = [[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]]
    return np.array(about_z) @ np.array(about_y) @ np.array(about_x)


def pose(angles_and_place) -> np.ndarray:
    """(4, 4) of roll, pitch, yaw, x, y, z."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(*angles_and_place[:3])
    matrix[:3, 3] = angles_and_place[3:]
    return matrix


def vehicle_state(time: float) -> list[float]:
    """Roll, pitch, yaw, x, y, z of the car in the world at a time in microseconds."""
    seconds = time % 100_000_000 * 1e-6
    yaw = 0.8 + 0.4 * seconds
    return [0.02, -0.01 + 0.05 * seconds, yaw, -600 + 25 * math.sin(yaw), 1500 - 25 * math.cos(yaw), 3.0]


def laser_pose(laser: int) -> np.ndarray:
    """Vehicle from laser."""
    return pose([0.01 * laser, -0.02, LASER_YAWS[laser], 1.4 if laser == 1 else 3.0, 0.1 * laser, 2.1 - 0.3 * laser])


def camera_pose(camera: int) -> np.ndarray:
    """Vehicle from camera, Waymo's axes."""
    return pose([0.01, 0.02 * camera, BEARINGS[camera], 1.5, 0.1 * camera, 2.1])


def intrinsic(camera: int) -> list[float]:
    height, width = SIZES[camera]
    return [45.0, 46.0, width / 2 + 1.3, height / 2 - 0.7, 0.04, -0.08, 0.001, -0.0015, 0.002 * camera]


def range_shape(laser: int) -> tuple[int, int]:
    return (8, 24) if laser == 1 else (5, 12)


def beams(laser: int) -> tuple[list[float] | None, float, float]:
    """Inclinations, lowest first, or None, and their limits."""
    if laser == 1:
        return [-0.3, -0.21, -0.14, -0.09, -0.05, -0.02, 0.0, 0.04], -0.31, 0.045
    return None, -0.6, 0.3


def pixel_time(time: int, column: int, num_columns: int) -> float:
    """The scan lasts a tenth of a second about the frame's time stamp."""
    return time + (column / num_columns - 0.5) * STEP


def pixel_states(laser: int, time: int) -> np.ndarray:
    """(H, W, 6) where the car was at each pixel's time."""
    height, width = range_shape(laser)
    states = [vehicle_state(pixel_time(time, column, width)) for column in range(width)]
    return np.broadcast_to(np.array(states), (height, width, 6)).astype(np.float32)


def slow_point(ranges, row, column, inclinations, limits, vehicle_from_laser, state=None, world_from_vehicle=None):
    """One pixel's point in the vehicle frame, by the data set's formulae."""
    height, width = ranges.shape
    if inclinations is None:
        cell = height - 1 - row
        inclination = limits[0] + (cell + 0.5) * (limits[1] - limits[0]) / height
    else:
        inclination = inclinations[height - 1 - row]
    azimuth = ((width - column - 0.5) / width * 2 - 1) * math.pi
    azimuth -= math.atan2(vehicle_from_laser[1][0], vehicle_from_laser[0][0])
    distance = float(ranges[row, column])
    x = distance * math.cos(inclination) * math.cos(azimuth)
    y = distance * math.cos(inclination) * math.sin(azimuth)
    point = np.array(vehicle_from_laser) @ [x, y, distance * math.sin(inclination), 1.0]
    if state is not None:
        point = np.linalg.inv(world_from_vehicle) @ pose([float(value) for value in state]) @ point
    return point[:3]


def slow_pixel(camera: int, time: int, xyz) -> tuple[float, float] | None:
    """Edge-based pixel of a point of the vehicle frame, through the world to the exposure; None where it is not seen."""
    world = pose(vehicle_state(time)) @ [*xyz, 1.0]
    x, y, z, _ = np.linalg.inv(pose(vehicle_state(time + EXPOSURES[camera])) @ camera_pose(camera)) @ world
    if x < 0.6:
        return None
    f_u, f_v, c_u, c_v, k1, k2, p1, p2, k3 = intrinsic(camera)
    a, b = -y / x, -z / x
    r2 = a * a + b * b
    if r2 > 1:
        return None
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = f_u * (a * radial + 2 * p1 * a * b + p2 * (r2 + 2 * a * a)) + c_u
    v = f_v * (b * radial + p1 * (r2 + 2 * b * b) + 2 * p2 * a * b) + c_v
    height, width = SIZES[camera]
    return (u, v) if 0 <= u < width and 0 <= v < height else None


def range_image(segment: str, time: int, laser: int, number: int) -> np.ndarray:
    """(H, W, 4) of return `number` at random; about a third of the pixels have none, a tenth are in no-label zones."""
    rng = np.random.default_rng([time % 1_000_000_007, SEGMENTS.index(segment), laser, number])
    height, width = range_shape(laser)
    ranges = rng.uniform(2, 60, (height, width)) * (rng.random((height, width)) > 0.3)
    intensity = rng.uniform(0, 1, (height, width)) ** 8 * 20000
    flag = np.where(rng.random((height, width)) < 0.1, 1.0, -1.0)
    return np.stack([ranges, intensity, rng.uniform(0, 1.5, (height, width)), flag], axis=2).astype(np.float32)


def slow_points(segment: str, time: int, laser: int, number: int) -> np.ndarray:
    """(H, W, 3) points of a range image; zero where there is no return."""
    image = range_image(segment, time, laser, number)
    inclinations, *limits = beams(laser)
    states = pixel_states(laser, time)
    points = np.zeros((*image.shape[:2], 3))
    for row, column in np.argwhere(image[..., 0] > 0).tolist():
        posed = (states[row, column], pose(vehicle_state(time))) if laser == 1 else ()
        points[row, column] = slow_point(
            image[..., 0], row, column, inclinations, limits, laser_pose(laser).tolist(), *posed
        )
    return points


def stored_projection(segment: str, time: int, laser: int, number: int) -> np.ndarray:
    """(H, W, 6) the first two cameras that see each point, and the pixels that hold it."""
    points = slow_points(segment, time, laser, number)
    stored = np.zeros((*points.shape[:2], 6), dtype=np.int32)
    for row, column in np.argwhere(points.any(axis=2)).tolist():
        seen = [(camera, slow_pixel(camera, time, points[row, column])) for camera in CAMERA_NAMES]
        values = [[camera, math.floor(pixel[0]), math.floor(pixel[1])] for camera, pixel in seen if pixel is not None]
        for number, value in enumerate(values[:2]):
            stored[row, column, 3 * number : 3 * number + 3] = value
    return stored


def objects(frame: int) -> list[dict]:
    """Labels of a frame: none in the first, one more in each that follows."""
    return [
        {
            "box.center": (10.0 + frame, 2.0 * number, 0.5),
            "box.size": (4.5, 1.8 + number, 1.5),
            "box.heading": 0.3 * number - 1,
            "speed": SPEED,
            "type": (1, 2, 4, 3)[number],
            "num_lidar_points_in_box": (5, 6, 300, 2)[number],
            "difficulty_level.detection": (None, None, 2, 1)[number],
        }
        for number in range(frame)
    ]


MATRIX = pa.list_(pa.float64(), 16)
FLOATS, INTS = pa.list_(pa.float32()), pa.list_(pa.int32())


def rows(segment: str) -> dict[str, list[dict]]:
    """The rows of every component of a segment, by column."""
    tables: dict[str, list[dict]] = {}

    def add(component: str, name: str, keys: dict, values: dict) -> None:
        row = {"key.segment_context_name": segment, **{f"key.{key}": value for key, value in keys.items()}}
        tables.setdefault(component, []).append({**row, **{f"[{name}].{key}": value for key, value in values.items()}})

    for laser in LASER_NAMES:
        values, low, high = beams(laser)
        inclination = {f"beam_inclination.{k}": v for k, v in (("min", low), ("max", high), ("values", values))}
        extrinsic = {"extrinsic.transform": laser_pose(laser).ravel().tolist()}
        add("lidar_calibration", "LiDARCalibrationComponent", {"laser_name": laser}, {**extrinsic, **inclination})
    for camera in CAMERA_NAMES:
        names = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
        known = {f"intrinsic.{name}": value for name, value in zip(names, intrinsic(camera), strict=True)}
        known["extrinsic.transform"] = camera_pose(camera).ravel().tolist()
        known["height"], known["width"] = SIZES[camera]
        add("camera_calibration", "CameraCalibrationComponent", {"camera_name": camera}, known)
    for frame, time in enumerate(times(segment)):
        at = {"frame_timestamp_micros": time}
        transform = pose(vehicle_state(time)).ravel().tolist()
        add("vehicle_pose", "VehiclePoseComponent", at, {"world_from_vehicle.transform": transform})
        for camera in CAMERA_NAMES:
            shot = time + EXPOSURES[camera]
            values = {"image": jpeg(camera, frame), "pose.transform": pose(vehicle_state(shot)).ravel().tolist()}
            keys = {**at, "camera_name": camera}
            add("camera_image", "CameraImageComponent", keys, {**values, "pose_timestamp": shot * 1e-6})
        for laser in LASER_NAMES:
            keys = {**at, "laser_name": laser}
            images = {number: range_image(segment, time, laser, number) for number in (1, 2)}
            add("lidar", "LiDARComponent", keys, tensors(images))
            stored = {number: stored_projection(segment, time, laser, number) for number in (1, 2)}
            add("lidar_camera_projection", "LiDARCameraProjectionComponent", keys, tensors(stored))
            if laser == 1:
                add("lidar_pose", "LiDARPoseComponent", keys, tensors({1: pixel_states(laser, time)}))
        for number, label in enumerate(objects(frame)):
            flat = {}
            for key, value in label.items():
                named = zip("xyz", value, strict=True) if isinstance(value, tuple) else None
                flat.update({f"{key}.{axis}": part for axis, part in named} if named else {key: value})
            add("lidar_box", "LiDARBoxComponent", {**at, "laser_object_id": f"object-{number}"}, flat)
    return tables


def tensors(images: dict[int, np.ndarray]) -> dict:
    values = {f"range_image_return{number}.values": image.ravel() for number, image in images.items()}
    return values | {f"range_image_return{number}.shape": list(image.shape) for number, image in images.items()}


def jpeg(camera: int, frame: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZES[camera][::-1], (40 * camera, 50 * frame, 90)).save(file, "JPEG")
    return file.getvalue()


def column_type(component: str, name: str) -> pa.DataType | None:
    """The type of a column where its values do not say it."""
    if name.endswith("transform"):
        return MATRIX
    if name.endswith("beam_inclination.values"):
        return pa.list_(pa.float64())
    if name.endswith(".values"):
        return INTS if component == "lidar_camera_projection" else FLOATS
    if name.endswith(".shape"):
        return INTS
    return pa.int8() if name in ("key.camera_name", "key.laser_name") else None


def write_table(path: Path, component: str, table: list[dict], row_group_size: int) -> None:
    columns = {name: pa.array([row[name] for row in table], column_type(component, name)) for name in table[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, compression="snappy")


def write_download(root: Path, segments=SEGMENTS, row_group_size: int = 7) -> Path:
    """Write the components of some segments; a row group boundary may fall between the sensors of one frame."""
    for segment in segments:
        for component, table in rows(segment).items():
            write_table(root / component / f"{segment}.parquet", component, table, row_group_size)
    return root
