"""Small made-up nuScenes releases: a car drives in a curve past landmarks that stand still.

Every scan holds the same landmarks, seen from where the lidar is at its own time; one object moves. Quaternions are
multiplied here by Hamilton's rule, so nothing is shared with the reader.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from simipu3d.data.readers.nuscenes import CAMERAS

SIZE = (90, 160)
SCENES = ("scene-0103", "scene-0916")
NUM_FRAMES, NUM_BETWEEN = 3, 2
STEP = 500_000
"""Microseconds between key frames."""
INTRINSIC = [[110.0, 0.0, 80.3], [0.0, 110.0, 44.1], [0.0, 0.0, 1.0]]
OBJECT_SPEED = np.array([3.0, -4.0, 0.5])


def multiply(a, b):
    """Hamilton's product of two quaternions (w, x, y, z)."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return np.array(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
    )


def turn(quaternion, vector):
    """A vector turned by a unit quaternion: q v q*."""
    conjugate = np.array(quaternion) * [1, -1, -1, -1]
    return multiply(multiply(quaternion, [0, *vector]), conjugate)[1:]


def forth(pose, point):
    """From the pose's own frame."""
    return turn(pose["rotation"], point) + pose["translation"]


def back(pose, point):
    """Into the pose's own frame."""
    return turn(np.array(pose["rotation"]) * [1, -1, -1, -1], np.array(point) - pose["translation"])


def about(axis, angle):
    """The quaternion of a turn by `angle` about an axis."""
    return np.array([np.cos(angle / 2), *(np.sin(angle / 2) * np.array(axis, dtype=float) / np.linalg.norm(axis))])


def ego_pose(time: int) -> dict:
    """Where the car is: 10 m/s along a curve, slightly tilted."""
    seconds = time % 100_000_000 * 1e-6
    yaw = 0.8 + 0.4 * seconds
    rotation = multiply(about((0, 0, 1), yaw), about((1, 2, 0), 0.02))
    position = [600 + 25 * np.sin(yaw), 1500 - 25 * np.cos(yaw), 0.0]
    return {"rotation": rotation.tolist(), "translation": position}


def sensor_pose(channel: str) -> dict:
    """Where a sensor is on the car: the lidar looks along y, a camera along z, all a little crooked."""
    if channel == "LIDAR_TOP":
        rotation = multiply(about((0, 0, 1), -np.pi / 2), about((1, 0, 0), 0.01))
        return {"rotation": rotation.tolist(), "translation": [0.9, 0.0, 1.8]}
    bearing = {"FRONT_LEFT": 55, "FRONT": 0, "FRONT_RIGHT": -55, "BACK_LEFT": 110, "BACK": 180, "BACK_RIGHT": -110}
    yaw = np.radians(bearing[channel.removeprefix("CAM_")])
    upright = multiply(about((0, 0, 1), -np.pi / 2), about((1, 0, 0), -np.pi / 2))
    rotation = multiply(multiply(about((0, 0, 1), yaw), about((0, 1, 0), 0.02)), upright)
    return {"rotation": rotation.tolist(), "translation": [1.5 * np.cos(yaw), 0.5 * np.sin(yaw), 1.5]}


def landmarks(scene: int) -> np.ndarray:
    """(60, 3) world."""
    rng = np.random.default_rng(scene)
    bearing, distance = rng.uniform(-np.pi, np.pi, 60), rng.uniform(45, 60, 60)
    return np.stack(
        [600 + distance * np.cos(bearing), 1500 + distance * np.sin(bearing), rng.uniform(0, 4, 60)], axis=1
    )


def object_at(time: int) -> np.ndarray:
    """Centre of the object that moves, world."""
    return np.array([620.0, 1530, 1]) + OBJECT_SPEED * (time % 100_000_000) * 1e-6


def camera_time(time: int, channel: str) -> int:
    """Cameras fire one after the other, up to 50 ms before the scan's time stamp."""
    return time - 8_000 * (1 + CAMERAS.index(channel))


def write_release(root: Path, version: str = "v1.0-mini") -> Path:
    """The files and tables of two scenes of three key frames each, with two scans between neighbours."""
    tables = {name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation")}
    channels = ("LIDAR_TOP", "RADAR_FRONT", *CAMERAS)
    tables["sensor"] = [{"token": f"s-{name}", "channel": name, "modality": "any"} for name in channels]
    tables["calibrated_sensor"] = [
        {
            "token": f"c-{name}",
            "sensor_token": f"s-{name}",
            "camera_intrinsic": INTRINSIC if name in CAMERAS else [],
            **sensor_pose(name if name in CAMERAS else "LIDAR_TOP"),
        }
        for name in channels
    ]
    tables["category"] = [
        {"token": "k-car", "name": "vehicle.car"},
        {"token": "k-animal", "name": "animal"},
    ]
    tables["attribute"] = [{"token": "a-moving", "name": "vehicle.moving"}]
    for scene, name in enumerate(SCENES):
        _add_scene(root, tables, scene, name)
    (root / version).mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows, indent=0))
    return root


def _add_scene(root: Path, tables: dict, scene: int, name: str) -> None:
    start = 1_500_000_000_000_000 + scene * 100_000_000
    tokens = [f"{name}-{frame}" for frame in range(NUM_FRAMES)]
    tables["scene"].append({"name": name, "token": name, "first_sample_token": tokens[0]})
    for kind, category in enumerate(("k-car", "k-animal")):
        tables["instance"].append({"token": f"{name}-i{kind}", "category_token": category})
    scans, previous = [], ""
    for scan in range((NUM_FRAMES - 1) * (NUM_BETWEEN + 1) + 1):
        time = start + scan * STEP // (NUM_BETWEEN + 1)
        frame, between = divmod(scan, NUM_BETWEEN + 1)
        scans.append((time, frame if between == 0 else frame + 1, between == 0))
    for time, frame, is_key in scans:
        previous = _add_record(root, tables, "LIDAR_TOP", time, tokens[frame], is_key, previous, scene)
        if not is_key:
            continue
        _add_record(root, tables, "RADAR_FRONT", time, tokens[frame], True, "", scene)
        for channel in CAMERAS:
            _add_record(root, tables, channel, camera_time(time, channel), tokens[frame], True, "", scene)
        following = tokens[frame + 1] if frame + 1 < NUM_FRAMES else ""
        tables["sample"].append({"token": tokens[frame], "timestamp": time, "next": following, "scene_token": name})
        for kind in range(2):
            tables["sample_annotation"].append(
                {
                    "token": f"{name}-{frame}-b{kind}",
                    "sample_token": tokens[frame],
                    "instance_token": f"{name}-i{kind}",
                    "attribute_tokens": ["a-moving"] if kind == 0 else [],
                    "translation": (object_at(time) + 5 * kind).tolist(),
                    "size": [1.8, 4.5, 1.5],
                    "rotation": about((0, 0, 1), 0.3 + frame).tolist(),
                    "prev": f"{name}-{frame - 1}-b{kind}" if frame else "",
                    "next": f"{name}-{frame + 1}-b{kind}" if frame + 1 < NUM_FRAMES else "",
                    "num_lidar_pts": 7 + frame,
                    "visibility_token": str(frame + 1) if kind == 0 else "",
                }
            )


def _add_record(root, tables, channel, time, sample, is_key, previous, scene) -> str:
    token = f"{channel}-{time}"
    folder = f"{'samples' if is_key else 'sweeps'}/{channel}"
    suffix = "jpg" if channel in CAMERAS else "pcd.bin"
    height, width = SIZE if channel in CAMERAS else (0, 0)
    tables["ego_pose"].append({"token": f"p-{token}", "timestamp": time, **ego_pose(time)})
    tables["sample_data"].append(
        {
            "token": token,
            "sample_token": sample,
            "ego_pose_token": f"p-{token}",
            "calibrated_sensor_token": f"c-{channel}",
            "timestamp": time,
            "is_key_frame": is_key,
            "height": height,
            "width": width,
            "filename": f"{folder}/{token}.{suffix}",
            "prev": previous,
        }
    )
    (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / folder / f"{token}.{suffix}"
    if channel in CAMERAS:
        Image.fromarray(np.random.default_rng(time).integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(path)
    elif channel == "LIDAR_TOP":
        pose, lidar = ego_pose(time), sensor_pose(channel)
        seen = [back(lidar, back(pose, point)) for point in landmarks(scene)]
        own_car = [0.5, -0.9, -1.0]
        rows = [[*point, 51 * (index % 6), index % 32] for index, point in enumerate([own_car, *seen])]
        np.array(rows, dtype="<f4").tofile(path)
    return token
