"""Which files does one frame become in a shard, and how does it come back?

    <key>.json                        calibration of every camera, names, poses
    <key>.boxes.json                  boxes, where the reader gives some (in `key.json` in sets of format 1)
    <key>.points.npy                  (N, 3 + F) float32; or points_mm.npy (N, 3) int32 millimetres and
                                      point_features.npy (N, F) float32
    <key>.<camera>.png|jpg            the image file's own bytes, or a new JPEG
    <key>.<camera>.depth.npy ...      ground truth, where the reader gives it: depth, pixel_class, pixel_instance,
    <key>.point_class.npy ...         point_class, point_instance

Everything comes back as it was, but for what `PrepareConfig` rounds.
"""

import io
import json
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveInt

from simipu3d.config import PartConfig
from simipu3d.contracts.frame import Boxes, Camera, Frame, Wants
from simipu3d.data.readers.base import CAMERA_TRUTH, POINT_TRUTH
from simipu3d.data.readers.files import decode_image, decode_npy, parse_json, unread_image
from simipu3d.errors import BadFrameError
from simipu3d.geometry.camera import check_distortion
from simipu3d.geometry.rigid import check_rigid

MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg"}
"""First bytes of the image files that are kept as they are."""
BOX_TYPES = {
    "center": (np.float64, (-1, 3)),
    "size": (np.float64, (-1, 3)),
    "yaw": (np.float64, (-1,)),
    "velocity": (np.float64, (-1, 2)),
    "num_points": (np.int64, (-1,)),
    "difficulty": (np.int64, (-1,)),
    "visibility": (np.int64, (-1,)),
    "truncation": (np.float64, (-1,)),
    "occlusion": (np.int64, (-1,)),
    "alpha": (np.float64, (-1,)),
}
"""Type and shape of the arrays of `Boxes`."""
BOX_WORDS = ("attributes", "ids")
"""Fields of `Boxes` that are texts, one a box, or None."""
BOX_REGIONS = ("image_boxes", "ignored")
"""Fields of `Boxes` that are (K, 4) a camera, or None."""
OLD_IMAGE_BOX = "image_2"
"""The camera of `image_box` in sets of format 1: KITTI alone had one."""


class PrepareConfig(PartConfig):
    """The `prepare:` block: how `tools/prepare_data.py` writes shards. Pre-training does not read it."""

    points: Literal["float32", "int32_mm"] = "float32"
    """`float32`: as the reader gives them; `int32_mm`: x, y, z rounded to whole millimetres, which compress better where
    the disk compresses. Default: nothing is lost."""
    images: Literal["keep", "jpeg"] = "keep"
    """`keep`: the files' own bytes, and lossless PNG where there was no file; `jpeg`: every image is encoded anew, which
    loses detail and halves the time of decoding a PNG. Default: nothing is lost."""
    jpeg_quality: Annotated[int, Field(ge=1, le=95)] = 92
    """With `images: jpeg`: Pillow's quality. Default: a usual one of cameras."""
    shard_megabytes: PositiveInt = 256
    """Size of a shard, about: as many frames as fill it by the size of the first ones. Default: large enough to be read in
    one go, small enough to be copied again."""
    shard_frames: PositiveInt | None = None
    """Frames in a shard, in place of shard_megabytes. Default: by size."""


def camera_stem(name: str) -> str:
    """What a camera's files are called; WebDataset takes dots for separators and reads names in lower case."""
    return re.sub(r"[^a-z0-9_-]", "_", name.lower())[:60]


def wanted(suffix: str, stems: Collection[str] | None, wants: Wants) -> bool:
    """Must a member be read, for the cameras of these stems (None: all)?"""
    stem, _, kind = suffix.partition(".")
    if suffix == "json":
        return True
    if suffix == "boxes.json":
        return "boxes" in wants.truth
    if kind == "npy":
        return wants.points and (stem not in POINT_TRUTH or stem in wants.truth)
    is_image = not kind.endswith(".npy")
    return wants.images and (stems is None or stem in stems) and (is_image or kind.removesuffix(".npy") in wants.truth)


def encode_frame(frame: Frame, config: PrepareConfig) -> list[tuple[str, bytes]]:
    """The members of a frame as (suffix, content), ground truth last.

    Raises:
        BadFrameError: it cannot be written: two cameras of one name, an infinite number, a point beyond int32.
    """
    stems = [camera_stem(camera.name) for camera in frame.cameras]
    if len(set(stems)) < len(stems):
        raise BadFrameError(f"frame {frame.frame_id}: two cameras are called alike: {', '.join(stems)}; rename one")
    images = [_encode_image(camera, config) for camera in frame.cameras]
    files = [f"{stem}.{suffix}" for stem, (suffix, _) in zip(stems, images, strict=True)]
    try:
        members = [("json", _json(_describe(frame, files)))]
        boxes = [] if frame.boxes is None else [("boxes.json", _json(_describe_boxes(frame.boxes)))]
    except ValueError as error:
        raise BadFrameError(f"frame {frame.frame_id}: its calibration or boxes hold an infinite number") from error
    members += _encode_points(frame, config)
    members += [(file, content) for file, (_, content) in zip(files, images, strict=True)]
    members += boxes
    truth = {
        f"{stem}.{kind}": getattr(camera, kind)
        for stem, camera in zip(stems, frame.cameras, strict=True)
        for kind in CAMERA_TRUTH
    }
    truth |= {kind: getattr(frame, kind) for kind in POINT_TRUTH}
    return members + [(f"{name}.npy", _npy(array)) for name, array in truth.items() if array is not None]


def _encode_image(camera: Camera, config: PrepareConfig) -> tuple[str, bytes]:
    if config.images == "keep":
        for magic, suffix in MAGIC.items():
            if camera.encoded is not None and camera.encoded.startswith(magic):
                return suffix, camera.encoded
    file = io.BytesIO()
    if config.images == "jpeg":
        Image.fromarray(camera.image).save(file, "JPEG", quality=config.jpeg_quality)
        return "jpg", file.getvalue()
    Image.fromarray(camera.image).save(file, "PNG")
    return "png", file.getvalue()


def _encode_points(frame: Frame, config: PrepareConfig) -> list[tuple[str, bytes]]:
    if config.points == "float32":
        return [("points.npy", _npy(frame.points))]
    millimetres = np.rint(frame.points[:, :3].astype(np.float64) * 1000)
    if (np.abs(millimetres) >= 2**31).any():
        raise BadFrameError(f"frame {frame.frame_id}: a point lies beyond 2,147 km; set prepare.points=float32")
    return [
        ("points_mm.npy", _npy(millimetres.astype(np.int32))),
        ("point_features.npy", _npy(np.ascontiguousarray(frame.points[:, 3:]))),
    ]


def _npy(array: NDArray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _describe(frame: Frame, files: list[str]) -> dict[str, Any]:
    """The content of a frame's JSON file."""
    return {
        "frame_id": frame.frame_id,
        "sequence_id": frame.sequence_id,
        "timestamp": frame.timestamp,
        "point_columns": list(frame.point_columns),
        "intensity_scale": frame.intensity_scale,
        "world_from_lidar": _plain(frame.world_from_lidar),
        "native_from_lidar": _plain(frame.native_from_lidar),
        "cameras": [
            {
                "name": camera.name,
                "file": file,
                "image_size": list(camera.image.shape[:2]),
                "image_from_camera": _plain(camera.image_from_camera),
                "camera_from_lidar": _plain(camera.camera_from_lidar),
                "distortion": _plain(camera.distortion),
                "timestamp": camera.timestamp,
            }
            for camera, file in zip(frame.cameras, files, strict=True)
        ],
    }


def _describe_boxes(boxes: Boxes) -> dict[str, Any]:
    """The content of a frame's JSON file of boxes; what is None is left out."""
    about: dict[str, Any] = {"names": list(boxes.names)}
    about |= {name: _plain(getattr(boxes, name)) for name in BOX_TYPES}
    about |= {name: None if getattr(boxes, name) is None else list(getattr(boxes, name)) for name in BOX_WORDS}
    for name in BOX_REGIONS:
        regions = getattr(boxes, name)
        about[name] = None if regions is None else {camera: _plain(rows) for camera, rows in regions.items()}
    return {name: value for name, value in about.items() if value is not None}


def _json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, allow_nan=False, ensure_ascii=False).encode()


def _plain(array: NDArray | None) -> list | None:
    """Nested lists; NaN, which JSON does not know, becomes null."""
    if array is None:
        return None
    array = np.asarray(array)
    unknown = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, dtype=np.bool_)
    if not unknown.any():
        return array.tolist()
    values = array.astype(object)
    values[unknown] = None
    return values.tolist()


def decode_frame(
    members: dict[str, bytes], source: str, cameras: tuple[str, ...] | None, wants: Wants, *, with_sizes: bool = False
) -> Frame:
    """A frame from the members that `wanted` chooses.

    Args:
        members: content by suffix.
        source: names the frame, for messages.
        cameras: which cameras, in which order; None: all.
        wants: what the frame holds.
        with_sizes: where images are not wanted, give the cameras all the same, black and of their images' sizes.

    Raises:
        BadFrameError: a camera is not there, an image cannot be decoded, or a member holds something else.
    """
    try:
        about = parse_json(members["json"])
        arrays = {
            name.removesuffix(".npy"): decode_npy(content, f"{source}: {name}")
            for name, content in members.items()
            if name[-4:] == ".npy"
        }
        own = {camera["name"]: camera for camera in about["cameras"]}
        chosen = (cameras or own) if wants.images or with_sizes else ()
        absent = [name for name in chosen if name not in own]
        if absent:
            raise BadFrameError(f"{source}: has no camera {absent[0]}, it has {', '.join(own) or 'none'}")
        columns = tuple(about["point_columns"])
        boxes = parse_json(members["boxes.json"]) if "boxes.json" in members else about.get("boxes")
        frame = Frame(
            points=_points(arrays) if wants.points else np.zeros((0, len(columns)), dtype=np.float32),
            point_columns=columns,
            cameras=tuple(_camera(own[name], members, arrays, source) for name in chosen),
            frame_id=about["frame_id"],
            sequence_id=about["sequence_id"],
            timestamp=about["timestamp"],
            world_from_lidar=_rigid(about["world_from_lidar"], f"{source}: world_from_lidar"),
            native_from_lidar=_needed(_rigid(about["native_from_lidar"], f"{source}: native_from_lidar"), source),
            intensity_scale=about["intensity_scale"],
            boxes=_boxes(boxes) if boxes is not None and "boxes" in wants.truth else None,
            **{kind: arrays[kind] for kind in POINT_TRUTH if kind in arrays},
        )
        _check_frame(frame)
        return frame
    except BadFrameError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadFrameError(
            f"{source}: a member does not hold what it must ({type(error).__name__}: {error})"
        ) from error


def _check_frame(frame: Frame) -> None:
    """Raise `ValueError` unless types and sizes of what came out of the files are those of a `Frame`."""
    words = (frame.frame_id, frame.sequence_id, *frame.point_columns, *(camera.name for camera in frame.cameras))
    if not all(isinstance(word, str) for word in words):
        raise ValueError("an id or a name is no text")
    numbers = (frame.timestamp, frame.intensity_scale, *(camera.timestamp for camera in frame.cameras))
    if not all(number is None or type(number) in (int, float) for number in numbers) or not frame.intensity_scale:
        raise ValueError("a time stamp or intensity_scale is no number")
    points = frame.points
    if points.dtype != np.float32 or points.ndim != 2 or points.shape[1] != len(frame.point_columns):
        raise ValueError(f"points are {points.dtype} {points.shape}, and there are {len(frame.point_columns)} columns")
    for camera in frame.cameras:
        for kind in CAMERA_TRUTH:
            values = getattr(camera, kind)
            if values is not None and values.shape != camera.image.shape[:2]:
                raise ValueError(f"{kind} of {camera.name} is {values.shape}, its image {camera.image.shape[:2]}")
    for point_kind in POINT_TRUTH:
        values = getattr(frame, point_kind)
        if values is not None and (values.shape != (len(points),) or values.dtype.kind not in "iu"):
            raise ValueError(f"{point_kind} is {values.dtype} {values.shape}, and there are {len(points)} points")


def _points(arrays: dict[str, NDArray]) -> NDArray[np.float32]:
    if "points" in arrays:
        return arrays["points"]
    return np.column_stack([(arrays["points_mm"] / 1000).astype(np.float32), arrays["point_features"]])


def _camera(about: dict[str, Any], members: dict[str, bytes], arrays: dict[str, NDArray], source: str) -> Camera:
    """A camera, black where the members lack its image because nobody asked for it."""
    stem, encoded = camera_stem(about["name"]), members.get(about["file"])
    size, place = tuple(about["image_size"]), f"{source}: {about['file']}"
    distortion = _matrix(about["distortion"], (5,))
    if distortion is not None and (wrong := check_distortion(distortion)):
        raise BadFrameError(f"{place}: distortion {wrong}")
    return Camera(
        name=about["name"],
        image=unread_image(size, place) if encoded is None else decode_image(encoded, place),
        image_from_camera=_needed(_matrix(about["image_from_camera"], (3, 4)), place),
        camera_from_lidar=_needed(_rigid(about["camera_from_lidar"], f"{place}: camera_from_lidar"), place),
        distortion=distortion,
        timestamp=about["timestamp"],
        encoded=encoded,
        **{kind: arrays[f"{stem}.{kind}"] for kind in CAMERA_TRUTH if f"{stem}.{kind}" in arrays},
    )


def _matrix(values: list | None, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    return None if values is None else np.array(values, dtype=np.float64).reshape(shape)


def _rigid(values: list | None, what: str) -> NDArray[np.float64] | None:
    matrix = _matrix(values, (4, 4))
    if matrix is not None and (wrong := check_rigid(matrix)):
        raise BadFrameError(f"{what} {wrong}")
    return matrix


def _needed(matrix: NDArray[np.float64] | None, what: str) -> NDArray[np.float64]:
    if matrix is None:
        raise BadFrameError(f"{what}: lacks a matrix that every frame has; write the shards again")
    return matrix


def _boxes(about: dict[str, Any]) -> Boxes:
    fields: dict[str, Any] = {
        name: np.array(about[name], dtype=dtype).reshape(shape)
        for name, (dtype, shape) in BOX_TYPES.items()
        if about.get(name) is not None
    }
    fields |= {name: tuple(about[name]) for name in BOX_WORDS if about.get(name) is not None}
    old = about.get("image_box")
    regions = {"image_boxes": None if old is None else {OLD_IMAGE_BOX: old}}
    regions |= {name: about[name] for name in BOX_REGIONS if about.get(name) is not None}
    for name, own in regions.items():
        if own is not None:
            fields[name] = {camera: _matrix(rows, (-1, 4)) for camera, rows in own.items()}
    boxes = Boxes(names=tuple(about["names"]), **fields)
    rows = {name: values for name, values in fields.items() if name not in BOX_REGIONS}
    rows |= {f"image_boxes of {camera}": values for camera, values in (boxes.image_boxes or {}).items()}
    wrong = [name for name, values in rows.items() if len(values) != len(boxes)]
    if wrong or not all(isinstance(word, str) for word in boxes.names):
        raise ValueError(f"{len(boxes)} boxes have other numbers of {', '.join(wrong) or 'names'}")
    return boxes
