"""What does a sequence.json of the custom layout say? Its model, and what has to hold between its parts.

docs/custom_data.md explains the file by example. Frames of reference: the lidar frame is x forward, y left, z up; a camera
frame is x right, y down, z forward (out of the lens); the world is any frame that stands still. Metres, seconds, radians;
pixels have integer centres: (0, 0) is the centre of the top-left pixel. Matrices are lists of rows.
"""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, PlainValidator, PositiveFloat, PositiveInt, model_validator

from simipu3d.config import PartConfig, parse_block
from simipu3d.data.readers.files import MAX_PIXELS, parse_json, plain_name, text_of
from simipu3d.errors import UserError
from simipu3d.geometry.camera import check_distortion
from simipu3d.geometry.rigid import LAST_ROW, check_rigid

MANUAL = "docs/custom_data.md shows the layout"


def _numbers(value: Any, *shapes: tuple[int, ...]) -> NDArray[np.float64]:
    """A list of numbers, or of rows of numbers, as an array of one of the shapes."""
    wanted = " or ".join(" x ".join(map(str, shape)) for shape in shapes)
    form = "as a list" if len(shapes[0]) == 1 else "as a list of rows"
    try:
        array = np.array(value)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"must be {wanted} numbers, {form}")
    if array.shape not in shapes:
        raise ValueError(f"must be {wanted} numbers, is {' x '.join(map(str, array.shape)) or 'one number'}")
    if not np.isfinite(array).all():
        raise ValueError("must be finite")
    return array.astype(np.float64)


def _rigid(value: Any) -> NDArray[np.float64]:
    """A (4, 4) rotation and shift."""
    matrix = _numbers(value, (4, 4))
    if wrong := check_rigid(matrix):
        raise ValueError(wrong)
    return matrix


def _projection(value: Any) -> NDArray[np.float64]:
    """(3, 4) from a (3, 3) or a (3, 4)."""
    matrix = _numbers(value, (3, 3), (3, 4))
    if not (matrix[0, 0] > 0 and matrix[1, 1] > 0):
        raise ValueError(f"focal lengths must be positive, are {matrix[0, 0]:g} and {matrix[1, 1]:g}")
    if np.abs(matrix[2, :3] - (0, 0, 1)).max() > LAST_ROW:
        # A transposed matrix would project into the image too, and depth would be no metres.
        raise ValueError(
            f"its last row must begin with 0, 0, 1, is {matrix[2].tolist()}; rows, not columns, are listed"
        )
    return np.column_stack([matrix, np.zeros(3)]) if matrix.shape == (3, 3) else matrix


def _distortion(value: Any) -> NDArray[np.float64]:
    """(5,) of a lens."""
    numbers = _numbers(value, (5,))
    if wrong := check_distortion(numbers):
        raise ValueError(wrong)
    return numbers


def _below_the_sequence(name: str) -> str:
    normal = str(PurePosixPath(name))  # ./scans//0.bin is scans/0.bin
    if not name or not plain_name(normal):
        raise ValueError(f"a file's path is relative to the sequence's folder and stays inside it, got {name[:80]!r}")
    return normal


def _decodable(size: tuple[int, int]) -> tuple[int, int]:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"is {size[0]} x {size[1]}, and at most {MAX_PIXELS / 1e6:.0f} million pixels are read")
    return size


Rigid = Annotated[NDArray[np.float64], PlainValidator(_rigid)]
Projection = Annotated[NDArray[np.float64], PlainValidator(_projection)]
Distortion = Annotated[NDArray[np.float64], PlainValidator(_distortion)]
File = Annotated[str, AfterValidator(_below_the_sequence)]
Vector = tuple[float, float, float]


class PointFormat(PartConfig):
    """The `points` block: what a scan's file holds."""

    columns: tuple[str, ...] = ("x", "y", "z", "intensity")
    """Names of the columns, x, y and z first. A column called intensity is divided by `intensity_scale`."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of .bin files, which are rows of little-endian numbers; a .npy file says it itself."""
    metres_per_unit: PositiveFloat = 1.0
    """Multiplies x, y and z of the files; 0.001 for millimetres."""
    intensity_scale: PositiveFloat = 1.0
    """Divides the intensity, which must then lie in [0, 1]; 255 for bytes."""

    @model_validator(mode="after")
    def _check(self) -> "PointFormat":
        if self.columns[:3] != ("x", "y", "z") or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns must begin with x, y, z and name each once, got {list(self.columns)}")
        return self


class CameraModel(PartConfig):
    """An entry of `cameras`: what does not change within a sequence."""

    name: str = Field(min_length=1)
    """Which camera; frames and `data.cameras` name it so."""
    image_size: Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_decodable)]
    """Height and width of its images, pixels; other images are refused."""
    image_from_camera: Projection
    """3 x 3 intrinsic matrix, or 3 x 4 projection."""
    distortion: Distortion | None = None
    """k1, k2, p1, p2, k3 as OpenCV has them; null for undistorted images."""
    camera_from_lidar: Rigid | None = None
    """4 x 4. Used for every image that has no `world_from_camera` of its own; the car then counts as standing still
    between scan and exposure."""


class ImageModel(PartConfig):
    """An entry of a frame's `images`; a frame may have fewer images than there are cameras."""

    camera: str
    """Name of the camera."""
    file: File
    """Any image file that Pillow reads, relative to the sequence's folder."""
    timestamp: float | None = None
    """Seconds, of the exposure."""
    world_from_camera: Rigid | None = None
    """4 x 4, where the camera was at the exposure. With the frame's `world_from_lidar` it takes the place of
    `camera_from_lidar`, so that the way of the car between scan and exposure is accounted for."""
    depth: File | None = None
    """Metres along the optical axis, of the image's size, 0 where unknown: a .npy of floats, or a 16-bit PNG, divided by
    `depth_scale`. Ground truth."""
    pixel_class: File | None = None
    """Index into `class_names` of every pixel, 255 where unknown: a .npy of uint8 or an 8-bit PNG. Ground truth."""
    pixel_instance: File | None = None
    """Number of the object of every pixel, 0 for none: a .npy of whole numbers or an 8- or 16-bit PNG. Ground truth."""


class BoxModel(PartConfig):
    """An entry of a frame's `boxes`. Pre-training never looks at them."""

    name: str
    """Class."""
    center: Vector
    """Geometric centre in the lidar frame, metres."""
    size: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Length, width, height, metres."""
    yaw: float
    """Counter-clockwise from +x seen from above, radians."""
    velocity: tuple[float, float] | None = None
    """Along x and y of the lidar frame, metres a second."""
    num_points: int | None = Field(default=None, ge=0)
    """Lidar points inside."""
    attribute: str | None = None
    """Like parked or moving."""
    id: str | None = None
    """Name of the object, the same in every frame of the sequence."""
    difficulty: int | None = None
    """In your own meaning."""
    image_boxes: dict[str, tuple[float, float, float, float]] = Field(default_factory=dict)
    """Camera -> u_min, v_min, u_max, v_max, pixels."""


class FrameModel(PartConfig):
    """An entry of `frames`."""

    id: str = Field(min_length=1)
    """Unique in the sequence."""
    timestamp: float | None = None
    """Seconds, of the scan (the time that its points are corrected to)."""
    points: File | None = None
    """The scan: .bin or .npy, relative to the sequence's folder. null: none, for methods of images alone."""
    images: tuple[ImageModel, ...] = ()
    """One a camera at most. []: none, for methods of points alone."""
    world_from_lidar: Rigid | None = None
    """4 x 4, where the lidar was at `timestamp`."""
    boxes: tuple[BoxModel, ...] | None = None
    """null where nobody labelled the frame, [] where there is nothing in it."""
    point_class: File | None = None
    """Index into `class_names` of every row of the scan, 255 where unknown: .npy or .bin of uint8. Ground truth."""
    point_instance: File | None = None
    """Number of the object of every row of the scan, 0 for none: .npy of whole numbers or .bin of int32. Ground truth."""


class SequenceModel(PartConfig):
    """A whole sequence.json."""

    version: Literal[1]
    """Of the layout."""
    points: PointFormat = PointFormat()
    """What the scans hold."""
    cameras: tuple[CameraModel, ...] = ()
    """The rig; frames say which of them have an image."""
    class_names: tuple[str, ...] = Field(default=(), max_length=255)
    """What `pixel_class` and `point_class` index; the same in every sequence that has some."""
    depth_scale: PositiveFloat = 256.0
    """Divides the numbers of a depth PNG, which gives metres. Default: KITTI's."""
    frames: tuple[FrameModel, ...]
    """In the order of time."""

    @model_validator(mode="after")
    def _check(self) -> "SequenceModel":
        if not self.frames:
            raise ValueError("frames: is empty; a sequence needs a frame")
        names = [camera.name for camera in self.cameras]
        if len(set(names)) < len(names):
            raise ValueError(f"cameras: two have one name: {', '.join(names)}")
        has_static = {camera.name: camera.camera_from_lidar is not None for camera in self.cameras}
        known: set[str] = set()
        before: FrameModel | None = None
        for frame in self.frames:
            if frame.id in known:
                raise ValueError(f"frames: two have the id {frame.id!r}")
            known.add(frame.id)
            _check_images(frame, has_static)
            self._check_classes(frame)
            if (frame.timestamp is None) != (self.frames[0].timestamp is None):
                raise ValueError(f"frames: {frame.id}: either every frame has a timestamp or none has")
            if before is not None and frame.timestamp is not None and frame.timestamp <= before.timestamp:
                raise ValueError(
                    f"frames: timestamps out of order: {frame.id} at {frame.timestamp} follows {before.id} at "
                    f"{before.timestamp}"
                )
            before = frame
        return self

    def _check_classes(self, frame: FrameModel) -> None:
        has_classes = frame.point_class is not None or any(image.pixel_class is not None for image in frame.images)
        if has_classes and not self.class_names:
            raise ValueError(f"frames: {frame.id}: has classes, so class_names is needed")


def _check_images(frame: FrameModel, has_static: dict[str, bool]) -> None:
    """Raise `ValueError` unless every image of a frame has a camera of its own, and a way from the lidar to it.

    A frame without scan and boxes needs no such way: its lidar frame is the camera's, turned.
    """
    names = [image.camera for image in frame.images]
    if len(set(names)) < len(names):
        raise ValueError(f"frames: {frame.id}: two images of one camera; it has {', '.join(names)}")
    if frame.points is None and not names:
        raise ValueError(f"frames: {frame.id}: has neither points nor images")
    for key in ("point_class", "point_instance"):
        if frame.points is None and getattr(frame, key) is not None:
            raise ValueError(f"frames: {frame.id}: has {key} and no points")
    for camera in (camera for box in frame.boxes or () for camera in box.image_boxes):
        if camera not in has_static:
            raise ValueError(f"frames: {frame.id}: a box has image_boxes of {camera!r}, which is no camera")
    needs_way = frame.points is not None or bool(frame.boxes)
    for image in frame.images:
        if image.camera not in has_static:
            raise ValueError(
                f"frames: {frame.id}: there is no camera {image.camera!r}; cameras are {', '.join(has_static) or 'none'}"
            )
        if image.world_from_camera is not None and frame.world_from_lidar is None:
            raise ValueError(f"frames: {frame.id}: {image.camera} has world_from_camera, so world_from_lidar is needed")
        if needs_way and image.world_from_camera is None and not has_static[image.camera]:
            raise ValueError(
                f"frames: {frame.id}: {image.camera} has neither world_from_camera here nor camera_from_lidar in cameras"
            )


def read_sequence(path: Path) -> SequenceModel:
    """Read and check a sequence.json.

    Raises:
        UserError: one line that names the file, the place in it and what must stand there.
    """
    try:
        raw = parse_json(text_of(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold one JSON object, holds {type(raw).__name__}; {MANUAL}")
    if raw.get("version") != 1 or isinstance(raw["version"], bool):
        raise UserError(f"{path}: version: must be 1, is {repr(raw.get('version'))[:60]}; {MANUAL}")
    try:
        return parse_block("", SequenceModel, raw)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(': ')}; {MANUAL}") from error
