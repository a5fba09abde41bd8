"""Which files does one frame become in a shard, and how does it come back?

    <key>.json                        calibration of every camera, names, poses, boxes
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
from simipu3d.contracts.frame import Boxes, Camera, Frame
from simipu3d.data.readers.files import decode_image
from simipu3d.errors import BadFrameError

MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg"}
"""First bytes of the image files that are kept as they are."""
PIXEL_TRUTH = ("depth", "pixel_class", "pixel_instance")
POINT_TRUTH = ("point_class", "point_instance")
BOX_TYPES = {
    "center": (np.float64, (-1, 3)),
    "size": (np.float64, (-1, 3)),
    "yaw": (np.float64, (-1,)),
    "velocity": (np.float64, (-1, 2)),
    "num_points": (np.int64, (-1,)),
    "difficulty": (np.int64, (-1,)),
    "image_box": (np.float64, (-1, 4)),
}
"""Type and shape of the arrays of `Boxes`."""


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


def wanted(suffix: str, stems: Collection[str] | None, ground_truth: bool) -> bool:
    """Must a member be read, for the cameras of these stems (None: all), with or without ground truth?"""
    stem, _, kind = suffix.partition(".")
    if kind == "npy":
        return ground_truth or stem not in POINT_TRUTH
    if suffix == "json":
        return True
    return (stems is None or stem in stems) and (ground_truth or not kind.endswith("npy"))


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
        about = json.dumps(_describe(frame, files), allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise BadFrameError(f"frame {frame.frame_id}: its calibration or boxes hold an infinite number") from error
    members = [("json", about), *_encode_points(frame, config)]
    members += [(file, content) for file, (_, content) in zip(files, images, strict=True)]
    truth = {
        f"{stem}.{kind}": getattr(camera, kind)
        for stem, camera in zip(stems, frame.cameras, strict=True)
        for kind in PIXEL_TRUTH
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
        "boxes": None if frame.boxes is None else _describe_boxes(frame.boxes),
    }


def _describe_boxes(boxes: Boxes) -> dict[str, Any]:
    arrays = {name: _plain(getattr(boxes, name)) for name in BOX_TYPES}
    attributes = None if boxes.attributes is None else list(boxes.attributes)
    return {"names": list(boxes.names), "attributes": attributes, **arrays}


def _plain(array: NDArray | None) -> list | None:
    """Nested lists; NaN, which JSON does not know, becomes null."""
    if array is None:
        return None
    array = np.asarray(array)
    unknown = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, dtype=np.bool_)
    return np.where(unknown, None, array.astype(object)).tolist() if unknown.any() else array.tolist()


def decode_frame(members: dict[str, bytes], source: str, cameras: tuple[str, ...] | None, ground_truth: bool) -> Frame:
    """A frame from the members that `wanted` chooses.

    Args:
        members: content by suffix.
        source: names the frame, for messages.
        cameras: which cameras, in which order; None: all.
        ground_truth: with boxes, depth, classes and instances.

    Raises:
        BadFrameError: a camera is not there, an image cannot be decoded, or a member holds something else.
    """
    try:
        about = json.loads(members["json"])
        arrays = {
            name.removesuffix(".npy"): _array(content) for name, content in members.items() if name[-4:] == ".npy"
        }
        own = {camera["name"]: camera for camera in about["cameras"]}
        absent = [name for name in cameras or () if name not in own]
        if absent:
            raise BadFrameError(f"{source}: has no camera {absent[0]}, it has {', '.join(own) or 'none'}")
        boxes = about["boxes"] if ground_truth else None
        return Frame(
            points=_points(arrays),
            point_columns=tuple(about["point_columns"]),
            cameras=tuple(_camera(own[name], members, arrays, source) for name in cameras or own),
            frame_id=about["frame_id"],
            sequence_id=about["sequence_id"],
            timestamp=about["timestamp"],
            world_from_lidar=_matrix(about["world_from_lidar"], (4, 4)),
            native_from_lidar=_matrix(about["native_from_lidar"], (4, 4)),
            intensity_scale=about["intensity_scale"],
            boxes=None if boxes is None else _boxes(boxes),
            **{kind: arrays[kind] for kind in POINT_TRUTH if kind in arrays},
        )
    except BadFrameError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise BadFrameError(
            f"{source}: a member does not hold what it must ({type(error).__name__}: {error})"
        ) from error


def _array(content: bytes) -> NDArray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def _points(arrays: dict[str, NDArray]) -> NDArray[np.float32]:
    if "points" in arrays:
        return arrays["points"]
    return np.column_stack([(arrays["points_mm"] / 1000).astype(np.float32), arrays["point_features"]])


def _camera(about: dict[str, Any], members: dict[str, bytes], arrays: dict[str, NDArray], source: str) -> Camera:
    stem, encoded = camera_stem(about["name"]), members[about["file"]]
    return Camera(
        name=about["name"],
        image=decode_image(encoded, f"{source}: {about['file']}"),
        image_from_camera=_matrix(about["image_from_camera"], (3, 4)),
        camera_from_lidar=_matrix(about["camera_from_lidar"], (4, 4)),
        distortion=_matrix(about["distortion"], (5,)),
        timestamp=about["timestamp"],
        encoded=encoded,
        **{kind: arrays[f"{stem}.{kind}"] for kind in PIXEL_TRUTH if f"{stem}.{kind}" in arrays},
    )


def _matrix(values: list | None, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    return None if values is None else np.array(values, dtype=np.float64).reshape(shape)


def _boxes(about: dict[str, Any]) -> Boxes:
    arrays = {
        name: np.array(about[name], dtype=dtype).reshape(shape)
        for name, (dtype, shape) in BOX_TYPES.items()
        if about[name] is not None
    }
    attributes = None if about["attributes"] is None else tuple(about["attributes"])
    return Boxes(names=tuple(about["names"]), attributes=attributes, **arrays)
