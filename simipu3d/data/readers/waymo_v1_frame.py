"""What does one record of a Waymo v1 file say? From its bytes to a `WaymoMoment`.

Only what the request names is inflated. A camera without image bytes and a lidar without a first return count as not
there.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers.tfrecord import FRAME_WAY_OUT
from simipu3d.data.readers.waymo_boxes import vehicle_boxes
from simipu3d.data.readers.waymo_moment import (
    CAMERA_NAMES,
    LASER_NAMES,
    WaymoCamera,
    WaymoLaser,
    WaymoMoment,
    WaymoRequest,
    WaymoReturn,
    is_motion,
)
from simipu3d.data.readers.waymo_protos import DamagedMatrixError, decode_matrix, matrix_values, message_class
from simipu3d.errors import BadFrameError


class V1Frame:
    """The message of one record.

    Args:
        record: its bytes, checksums compared.
        source: file and record, for messages.

    Attributes:
        segment: name of the context.

    Raises:
        BadFrameError: the bytes are no frame of the perception data set.
    """

    def __init__(self, record: bytes, source: str):
        self.source = source
        self._frame = _parse(record, source)
        self.segment = _context_name(self._frame, source)

    def moment(self, request: WaymoRequest) -> WaymoMoment:
        """What is asked for of it; lasers and cameras in the order of the request.

        Raises:
            BadFrameError: a part that is asked for is damaged or does not fit the others.
        """
        frame, source = self._frame, self.source
        world_from_vehicle = _matrix(frame.pose, "the vehicle's pose", source)
        return WaymoMoment(
            source=source,
            segment=self.segment,
            timestamp_micros=frame.timestamp_micros,
            world_from_vehicle=world_from_vehicle,
            lasers=_lasers(frame, request, source),
            cameras=_cameras(frame, request, source),
            boxes=_boxes(frame.laser_labels, world_from_vehicle, source) if request.boxes else None,
        )


def _parse(record: bytes, source: str) -> Message:
    """The Frame message, with its context, time stamp and pose there."""
    try:
        frame = message_class("Frame").FromString(record)
    except DecodeError:
        frame = None
    missing = ["context", "timestamp_micros", "pose"]
    if frame is not None:
        missing = [name for name in missing if not frame.HasField(name)]
    if missing:
        raise BadFrameError(
            f"{source}: is whole, but is no frame of the Waymo perception data set (it has no {', '.join(missing)}); "
            "set data.root to its .tfrecord files"
        )
    return frame


def _context_name(frame: Message, source: str) -> str:
    name = frame.context.name.decode("utf-8", errors="replace")
    if not name or not name.isprintable():
        raise BadFrameError(f"{source}: its context has no usable name ({name!r}); {FRAME_WAY_OUT}")
    return name


def _by_name(messages: Iterable[Message], names: dict[int, str], what: str, source: str) -> dict[str, Message]:
    """Sensor -> its message; sensors that are not in `names` are left out."""
    found: dict[str, Message] = {}
    for message in messages:
        name = names.get(message.name)
        if name in found:
            raise BadFrameError(f"{source}: holds {what} of {name} twice; {FRAME_WAY_OUT}")
        if name is not None:
            found[name] = message
    return found


def _matrix(transform: Message, what: str, source: str) -> NDArray[np.float64]:
    """(4, 4) float64, a rigid motion."""
    values = np.array(transform.transform, dtype=np.float64)
    if len(values) != 16 or not np.isfinite(values).all():
        found = f"{len(values)} values" if len(values) != 16 else "NaN or infinity"
        raise BadFrameError(f"{source}: {what} is to be 16 finite numbers and has {found}; {FRAME_WAY_OUT}")
    if not is_motion(values.reshape(4, 4)):
        raise BadFrameError(f"{source}: {what} is no rigid motion: {values.tolist()}; {FRAME_WAY_OUT}")
    return values.reshape(4, 4)


def _cameras(frame: Message, request: WaymoRequest, source: str) -> tuple[WaymoCamera, ...]:
    images = _by_name((image for image in frame.images if image.image), CAMERA_NAMES, "an image", source)
    calibrations = _by_name(frame.context.camera_calibrations, CAMERA_NAMES, "a camera calibration", source)
    labels: dict[str, Message] = {}
    if request.projected_boxes:
        labels = _by_name(frame.projected_lidar_labels, CAMERA_NAMES, "projected lidar boxes", source)
    cameras = []
    for name in request.cameras:
        if (image := images.get(name)) is None:
            continue
        if (calibration := calibrations.get(name)) is None:
            raise BadFrameError(f"{source}: has an image of camera {name} and no calibration; {FRAME_WAY_OUT}")
        cameras.append(
            WaymoCamera(
                name=name,
                jpeg=image.image if request.pixels else b"",
                intrinsic=_intrinsic(calibration, name, source),
                vehicle_from_camera=_matrix(calibration.extrinsic, f"the extrinsic of camera {name}", source),
                size=(calibration.height, calibration.width),
                world_from_vehicle=(
                    _matrix(image.pose, f"the pose of camera {name}", source) if image.HasField("pose") else None
                ),
                pose_timestamp=image.pose_timestamp if image.HasField("pose_timestamp") else None,
                labels=_image_boxes(labels[name].labels) if name in labels else None,
                label_ids=_object_ids(labels[name].labels, name) if name in labels else None,
            )
        )
    return tuple(cameras)


def _intrinsic(calibration: Message, name: str, source: str) -> NDArray[np.float64]:
    """(9,) float64, the size of the image checked too."""
    values = np.array(calibration.intrinsic, dtype=np.float64)
    if len(values) != 9 or not np.isfinite(values).all() or min(calibration.height, calibration.width) < 1:
        raise BadFrameError(
            f"{source}: the calibration of camera {name} is to be 9 finite numbers and a size, and has {len(values)} "
            f"numbers and {calibration.height} x {calibration.width} pixels; {FRAME_WAY_OUT}"
        )
    return values


def _image_boxes(labels: Sequence[Message]) -> NDArray[np.float64]:
    """(K, 4) centre x, y, size x, y: in an image, what the format calls length lies along x, and width along y."""
    rows = [(box.center_x, box.center_y, box.length, box.width) for box in (label.box for label in labels)]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _boxes(labels: Sequence[Message], world_from_vehicle: NDArray[np.float64], source: str) -> Boxes:
    """3D boxes; a speed that is not given is NaN."""
    rows = [
        (box.center_x, box.center_y, box.center_z, box.length, box.width, box.height, box.heading)
        for box in (label.box for label in labels)
    ]
    geometry = np.array(rows, dtype=np.float64).reshape(-1, 7)
    if not np.isfinite(geometry).all():
        raise BadFrameError(f"{source}: a 3D box has no finite centre, size or heading; {FRAME_WAY_OUT}")
    speeds = [[_speed(label.metadata, axis) for axis in ("speed_x", "speed_y", "speed_z")] for label in labels]
    integers = [(label.type, label.num_lidar_points_in_box, label.detection_difficulty_level) for label in labels]
    kind, num_points, difficulty = np.array(integers, dtype=np.int64).reshape(-1, 3).T
    return vehicle_boxes(
        center=geometry[:, :3],
        size=geometry[:, 3:6],
        heading=geometry[:, 6],
        object_type=kind,
        speed=np.array(speeds, dtype=np.float64).reshape(-1, 3),
        num_points=num_points,
        difficulty=difficulty,
        ids=_object_ids(labels),
        world_from_vehicle=world_from_vehicle,
    )


def _object_ids(labels: Sequence[Message], camera: str = "") -> tuple[str, ...]:
    """The objects' names; a projected box has its camera's name behind that of its 3D box."""
    ids = (label.id.decode("utf-8", errors="replace") for label in labels)
    return tuple(name.removesuffix(f"_{camera}") if camera else name for name in ids)


def _speed(metadata: Message, axis: str) -> float:
    return getattr(metadata, axis) if metadata.HasField(axis) else np.nan


def _lasers(frame: Message, request: WaymoRequest, source: str) -> tuple[WaymoLaser, ...]:
    with_points = (laser for laser in frame.lasers if _holds_range(laser.ri_return1))
    lasers = _by_name(with_points, LASER_NAMES, "range images", source)
    calibrations = _by_name(frame.context.laser_calibrations, LASER_NAMES, "a lidar calibration", source)
    found = []
    for name in request.lasers:
        if name not in lasers:
            continue
        what = f"{source}: lidar {name}"
        if name not in calibrations:
            raise BadFrameError(f"{what}: has a range image and no calibration; {FRAME_WAY_OUT}")
        found.append(_laser(name, lasers[name], calibrations[name], request, what))
        _check_sizes(found[-1], what)
    return tuple(found)


def _laser(name: str, laser: Message, calibration: Message, request: WaymoRequest, what: str) -> WaymoLaser:
    stored = (laser.ri_return1, laser.ri_return2)[: request.returns]
    returns = tuple(
        _return(image, request.projections, f"{what}, return {place}") for place, image in enumerate(stored, start=1)
    )
    compressed_pose, pose = laser.ri_return1.range_image_pose_compressed, None
    if compressed_pose:
        pose = _image(compressed_pose, np.float32, 6, f"{what}, pose image")
    elif name == LASER_NAMES[1]:
        raise BadFrameError(f"{what}: has no pose image, and without it its points are smeared; {FRAME_WAY_OUT}")
    inclinations = np.array(calibration.beam_inclinations, dtype=np.float64)
    inclination_range = (calibration.beam_inclination_min, calibration.beam_inclination_max)
    bounded = calibration.HasField("beam_inclination_min") and calibration.HasField("beam_inclination_max")
    if len(inclinations) == 0 and not bounded:
        raise BadFrameError(f"{what}: has neither beam inclinations nor their range; {FRAME_WAY_OUT}")
    if not np.isfinite([*inclinations, *inclination_range]).all():
        raise BadFrameError(f"{what}: has beam inclinations that are NaN or infinite; {FRAME_WAY_OUT}")
    return WaymoLaser(
        name=name,
        vehicle_from_laser=_matrix(calibration.extrinsic, "the extrinsic", what),
        inclinations=inclinations if len(inclinations) else None,
        inclination_range=inclination_range,
        returns=returns,
        pixel_pose=pose,
    )


def _holds_range(image: Message) -> bool:
    return bool(image.range_image_compressed) or image.HasField("range_image")


def _return(stored: Message, with_projection: bool, what: str) -> WaymoReturn:
    if not _holds_range(stored):
        raise BadFrameError(f"{what}: has no range image; set data.returns=1, or {FRAME_WAY_OUT}")
    if stored.range_image_compressed:
        image = _image(stored.range_image_compressed, np.float32, 4, what)
    else:
        try:
            image = matrix_values(stored.range_image, np.float32, 4)
        except DamagedMatrixError as error:
            raise BadFrameError(f"{what}: {error}; {FRAME_WAY_OUT}") from None
    projection = None
    if with_projection:
        if not stored.camera_projection_compressed:
            raise BadFrameError(f"{what}: has no camera projection; {FRAME_WAY_OUT}")
        projection = _image(stored.camera_projection_compressed, np.int32, 6, f"{what}, camera projection")
    return WaymoReturn(image, projection)


def _image(compressed: bytes, dtype: type[np.float32] | type[np.int32], num_channels: int, what: str) -> NDArray:
    try:
        return decode_matrix(compressed, dtype, num_channels)
    except DamagedMatrixError as error:
        raise BadFrameError(f"{what}: {error}; {FRAME_WAY_OUT}") from None


def _check_sizes(laser: WaymoLaser, what: str) -> None:
    """All images of a lidar have the same rows and columns, and as many rows as it has beams."""
    size = laser.returns[0].image.shape[:2]
    others: list[tuple[str, NDArray | None]] = [("pose image", laser.pixel_pose)]
    for place, part in enumerate(laser.returns, start=1):
        others += [(f"return {place}", part.image), (f"camera projection of return {place}", part.projection)]
    for part_name, image in others:
        if image is not None and image.shape[:2] != size:
            raise BadFrameError(
                f"{what}: its {part_name} is {image.shape[0]} x {image.shape[1]}, and its first range image "
                f"{size[0]} x {size[1]}; {FRAME_WAY_OUT}"
            )
    if laser.inclinations is not None and len(laser.inclinations) != size[0]:
        raise BadFrameError(
            f"{what}: has {len(laser.inclinations)} beam inclinations and {size[0]} rows; {FRAME_WAY_OUT}"
        )
