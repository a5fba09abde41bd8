"""Any reader's frames, written in the custom layout."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from simipu3d.contracts.frame import Boxes, Frame


def write_sequence(folder: Path, frames: list[Frame], suffix: str = "bin", *, posed: bool = True) -> Path:
    """A sequence of frames, with the calibration in poses (`posed`) or in the cameras; returns its sequence.json."""
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    first = frames[0]
    cameras = [
        {
            "name": camera.name,
            "image_size": list(camera.image.shape[:2]),
            "image_from_camera": camera.image_from_camera.tolist(),
            **({} if camera.distortion is None else {"distortion": camera.distortion.tolist()}),
            **({} if posed else {"camera_from_lidar": camera.camera_from_lidar.tolist()}),
        }
        for camera in first.cameras
    ]
    sequence = {
        "version": 1,
        "points": {"columns": list(first.point_columns), "intensity_scale": first.intensity_scale},
        "cameras": cameras,
        "frames": [_write_frame(folder, frame, suffix, posed) for frame in frames],
    }
    path = folder / "sequence.json"
    path.write_text(json.dumps(sequence))
    return path


def _velocity(boxes: Boxes, row: int) -> dict:
    known = boxes.velocity is not None and np.isfinite(boxes.velocity[row]).all()
    return {"velocity": boxes.velocity[row].tolist()} if known else {}


def _write_frame(folder: Path, frame: Frame, suffix: str, posed: bool) -> dict:
    name = frame.frame_id.rpartition("/")[2]
    points = frame.points.copy()
    points[:, 3] *= np.float32(frame.intensity_scale)
    scan = folder / f"scans/{name}.{suffix}"
    points.astype("<f4").tofile(scan) if suffix == "bin" else np.save(scan, points)
    entry = {"id": name, "timestamp": frame.timestamp, "points": f"scans/{scan.name}", "images": []}
    if frame.world_from_lidar is not None:
        entry["world_from_lidar"] = frame.world_from_lidar.tolist()
    for camera in frame.cameras:
        file = f"{camera.name}/{name}.png"
        (folder / camera.name).mkdir(exist_ok=True)
        Image.fromarray(camera.image).save(folder / file)
        image = {"camera": camera.name, "file": file, "timestamp": camera.timestamp}
        if posed:
            image["world_from_camera"] = (frame.world_from_lidar @ np.linalg.inv(camera.camera_from_lidar)).tolist()
        entry["images"].append(image)
    if frame.boxes is not None:
        boxes = frame.boxes
        entry["boxes"] = [
            {
                "name": boxes.names[row],
                "center": boxes.center[row].tolist(),
                "size": boxes.size[row].tolist(),
                "yaw": float(boxes.yaw[row]),
                **_velocity(boxes, row),
                **({} if boxes.num_points is None else {"num_points": int(boxes.num_points[row])}),
            }
            for row in range(len(boxes))
        ]
    return entry
