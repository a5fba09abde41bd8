"""How does ground truth follow the views of a frame?

Boxes are moved by the matrix of a point view, maps by the move of their image, labels of points go with their points. A
kind that a method needs and a frame lacks makes that frame a bad one. Shapes: N raw points, n points of a view.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.contracts.frame import Camera, Frame, TruthKind
from simipu3d.contracts.truth import UNLABELLED, BoxTruth
from simipu3d.data.loading.augment_images import ImageMove, ImageSample
from simipu3d.data.loading.augment_points import PointSample
from simipu3d.errors import BadFrameError
from simipu3d.geometry.boxes import move_boxes
from simipu3d.geometry.camera import inside_image, move_pixels, project_points

Kinds = tuple[TruthKind, ...]
POINT_KINDS = {"point_class": np.uint8, "point_instance": np.int32}
PIXEL_KINDS = {"pixel_class": np.uint8, "pixel_instance": np.int32}


def with_point_truth(view: PointSample, frame: Frame, kinds: Kinds) -> PointSample:
    """The view with the labels of its points that `kinds` asks for, by `source_index`.

    Raises:
        BadFrameError: the frame has no such labels, or not one for each point.
    """
    changes = {}
    for kind, dtype in POINT_KINDS.items():
        if kind in kinds:
            labels = _present(getattr(frame, kind), kind, f"frame {frame.frame_id}")
            _check_shape(labels.shape, (len(frame.points),), kind, f"frame {frame.frame_id}")
            changes[kind] = torch.from_numpy(labels[view.source_index.numpy()].astype(dtype))
    return replace(view, **changes)


def with_image_truth(sample: ImageSample, frame: Frame, camera: Camera, kinds: Kinds) -> ImageSample:
    """The image with the maps that `kinds` asks for. Labels and the camera's own depth take the nearest pixel's value.

    Where the camera has no depth map, depth comes from the projected points, see `render_depth`.

    Raises:
        BadFrameError: the camera has no such map, or one of another size than its image.
    """
    where = f"frame {frame.frame_id}, camera {camera.name}"
    changes: dict[str, Any] = {}
    if "depth" in kinds:
        if camera.depth is None:
            changes["depth"] = torch.from_numpy(render_depth(frame.points[:, :3], camera, sample.move))
        else:
            changes["depth"] = _moved_map(camera.depth, sample.move, np.float32, "depth", where)
    for kind, dtype in PIXEL_KINDS.items():
        if kind in kinds:
            values = _present(getattr(camera, kind), kind, where)
            changes[kind] = _moved_map(values, sample.move, dtype, kind, where)
    return replace(sample, **changes)


def render_depth(xyz: NDArray[np.float32], camera: Camera, move: ImageMove) -> NDArray[np.float32]:
    """Depth of the projected points in an augmented image, at its own resolution.

    Every point that the camera sees writes its depth into the pixel that its moved projection rounds to; the nearest point
    wins. Points that something nearer hides from the camera, but not from the lidar, stay where no nearer point falls into
    the same pixel.

    Args:
        xyz: (N, 3) raw points in the lidar frame, metres.
        camera: with the calibration of the original image.
        move: of its pixels.

    Returns:
        (h, w) metres along the optical axis, 0 where no point falls.
    """
    pixels, depth, visible = project_points(
        torch.from_numpy(xyz),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera.camera_from_lidar),
        move.raw_size,
        distortion=None if camera.distortion is None else torch.from_numpy(camera.distortion),
    )
    pixels = move_pixels(move.matrix(), pixels[visible])
    inside = inside_image(pixels, move.size)
    height, width = move.size
    columns, rows = np.floor(pixels[inside].numpy() + 0.5).astype(np.int64).T
    nearest = np.full(height * width, np.inf, dtype=np.float32)
    # Half a pixel more than a number just below W - 0.5 may round to W.
    places = np.minimum(rows, height - 1) * width + np.minimum(columns, width - 1)
    np.minimum.at(nearest, places, depth[visible][inside].numpy().astype(np.float32))
    return np.where(np.isinf(nearest), np.float32(0), nearest).reshape(height, width)


def moved_boxes(frame: Frame, augmented_from_lidar: Tensor) -> BoxTruth:
    """The frame's boxes, moved; `batch_index` is 0.

    Raises:
        BadFrameError: the frame has no boxes (None; an empty list is fine).
    """
    boxes = _present(frame.boxes, "boxes", f"frame {frame.frame_id}")
    number = len(boxes)
    unknown = np.full((number, 2), np.nan)
    velocity = unknown if boxes.velocity is None else boxes.velocity
    moved = move_boxes(boxes.center, boxes.size, boxes.yaw, velocity, augmented_from_lidar.numpy())
    center, size, yaw, velocity = (torch.from_numpy(np.ascontiguousarray(part)) for part in moved)
    return BoxTruth(
        center=center.reshape(number, 3),
        size=size.reshape(number, 3),
        yaw=yaw,
        velocity=velocity.reshape(number, 2),
        batch_index=torch.zeros(number, dtype=torch.int64),
        source_index=torch.arange(number),
        num_points=_counts(boxes.num_points, number),
        difficulty=_counts(boxes.difficulty, number),
        names=tuple(boxes.names),
        attributes=("",) * number if boxes.attributes is None else tuple(boxes.attributes),
    )


def _counts(values: NDArray[np.int64] | None, number: int) -> Tensor:
    """(number,) int64, -1 where there are none."""
    if values is None:
        return torch.full((number,), -1, dtype=torch.int64)
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _moved_map(values: NDArray, move: ImageMove, dtype: type, kind: str, where: str) -> Tensor:
    _check_shape(values.shape, move.raw_size, kind, where)
    unknown = UNLABELLED if kind == "pixel_class" else 0
    return torch.from_numpy(np.ascontiguousarray(move.move_map(values, unknown).astype(dtype)))


def _present(value, kind: str, where: str):
    if value is None:
        raise BadFrameError(
            f"{where}: has no {kind}, which the method needs; take it off the split, or set data.on_bad_frame=skip"
        )
    return value


def _check_shape(shape: tuple[int, ...], expected: tuple[int, ...], kind: str, where: str) -> None:
    if shape != expected:
        found, right = (" x ".join(map(str, one)) for one in (shape, expected))
        raise BadFrameError(
            f"{where}: its {kind} has {found} values, expected {right}; mend it, or leave the frame out"
        )
