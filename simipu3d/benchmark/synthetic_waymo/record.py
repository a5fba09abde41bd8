"""What does a moment look like as one record of a Waymo v1 file? The inverse of `readers/waymo_v1`.

Written are all fields of `WaymoMoment`; what it does not hold (velocity of the vehicle, camera boxes, no-label zones) is
absent, as in a file that lacks it.
"""

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers.waymo_moment import (
    CAMERA_NAMES,
    LASER_NAMES,
    OBJECT_NAMES,
    WaymoCamera,
    WaymoLaser,
    WaymoMoment,
    WaymoReturn,
)
from simipu3d.data.readers.waymo_protos import encode_matrix, message_class

_CAMERA_NUMBERS = {name: number for number, name in CAMERA_NAMES.items()}
_LASER_NUMBERS = {name: number for number, name in LASER_NAMES.items()}
_OBJECT_NUMBERS = {name: number for number, name in OBJECT_NAMES.items()}


def moment_to_record(moment: WaymoMoment) -> bytes:
    """The bytes of a v1 Frame, to be written by `readers.tfrecord.write_records`.

    Class names, ids, velocity, number of points and difficulty of the boxes are kept, everything else of them is not;
    numbers of points and difficulties are unset where they are None, velocities also where they are NaN. A class that
    Waymo does not have is UNKNOWN.
    """
    frame = message_class("Frame")(timestamp_micros=moment.timestamp_micros)
    frame.context.name = moment.segment.encode()
    frame.pose.transform.extend(moment.world_from_vehicle.reshape(-1))
    for camera in moment.cameras:
        _add_camera(frame, camera)
    for laser in moment.lasers:
        _add_laser(frame, laser)
    if moment.boxes is not None:
        _add_boxes(frame, moment.boxes, moment.world_from_vehicle)
    return frame.SerializeToString(deterministic=True)


def _add_camera(frame: Message, camera: WaymoCamera) -> None:
    number = _CAMERA_NUMBERS[camera.name]
    height, width = camera.size
    calibration = frame.context.camera_calibrations.add(name=number, width=width, height=height)
    calibration.intrinsic.extend(camera.intrinsic)
    calibration.extrinsic.transform.extend(camera.vehicle_from_camera.reshape(-1))
    image = frame.images.add(name=number, image=camera.jpeg)
    if camera.world_from_vehicle is not None:
        image.pose.transform.extend(camera.world_from_vehicle.reshape(-1))
    if camera.pose_timestamp is not None:
        image.pose_timestamp = camera.pose_timestamp
    if camera.labels is not None:
        entry = frame.projected_lidar_labels.add(name=number)
        ids = camera.label_ids or [""] * len(camera.labels)
        for (x, y, length, width), name in zip(camera.labels, ids, strict=True):
            box = {"center_x": x, "center_y": y, "length": length, "width": width}
            entry.labels.add(box=box, id=f"{name}_{camera.name}".encode() if name else b"")


def _add_laser(frame: Message, laser: WaymoLaser) -> None:
    number = _LASER_NUMBERS[laser.name]
    lowest, highest = laser.inclination_range
    calibration = frame.context.laser_calibrations.add(
        name=number, beam_inclination_min=lowest, beam_inclination_max=highest
    )
    if laser.inclinations is not None:
        calibration.beam_inclinations.extend(laser.inclinations)
    calibration.extrinsic.transform.extend(laser.vehicle_from_laser.reshape(-1))
    entry = frame.lasers.add(name=number)
    for stored, part in zip((entry.ri_return1, entry.ri_return2), laser.returns, strict=False):
        _fill_return(stored, part)
    if laser.pixel_pose is not None:
        entry.ri_return1.range_image_pose_compressed = encode_matrix(laser.pixel_pose)


def _fill_return(stored: Message, part: WaymoReturn) -> None:
    stored.range_image_compressed = encode_matrix(part.image)
    if part.projection is not None:
        stored.camera_projection_compressed = encode_matrix(part.projection)


def _add_boxes(frame: Message, boxes: Boxes, world_from_vehicle: NDArray[np.float64]) -> None:
    for row, name in enumerate(boxes.names):
        center_x, center_y, center_z = boxes.center[row]
        length, width, height = boxes.size[row]
        label = frame.laser_labels.add(
            type=_OBJECT_NUMBERS.get(name, 0), id=boxes.ids[row].encode() if boxes.ids else b""
        )
        label.box.center_x, label.box.center_y, label.box.center_z = center_x, center_y, center_z
        label.box.length, label.box.width, label.box.height = length, width, height
        label.box.heading = boxes.yaw[row]
        if boxes.velocity is not None and np.isfinite(boxes.velocity[row]).all():
            # A label's speed lies along the axes of the world.
            speed = world_from_vehicle[:3, :2] @ boxes.velocity[row]
            label.metadata.speed_x, label.metadata.speed_y, label.metadata.speed_z = speed
        if boxes.num_points is not None:
            label.num_lidar_points_in_box = int(boxes.num_points[row])
        if boxes.difficulty is not None:
            label.detection_difficulty_level = int(boxes.difficulty[row])
