"""What does a training step get? The point views, image views and truth that its method needs, with their matrices.

Ragged data is concatenated; `batch_index` says which frame of the batch a row belongs to. Shapes: B frames, N points
of a view in the whole batch, I images in the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from simipu3d.contracts.truth import Truth

T = TypeVar("T")


def map_tensors(record: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same dataclass with every tensor in it (also inside tuples and dataclasses) changed."""
    return _mapped(record, change)


def _mapped(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(record, Tensor):
        return change(record)
    if isinstance(record, tuple) and not hasattr(record, "_fields"):
        return tuple(_mapped(item, change) for item in record)
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{f.name: _mapped(getattr(record, f.name), change) for f in fields(record)})
    return record


def move_tensors(record: T, device: torch.device | str) -> T:
    """The same dataclass with every tensor in it (also inside tuples and dataclasses) on `device`."""
    return map_tensors(record, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, eq=False)
class PointView:
    """One augmented view of B point clouds.

    Attributes:
        points: (N, 3 + F) float32; xyz is in the view's own augmented frame, metres.
        batch_index: (N,) int64, ascending.
        source_index: (N,) int64, which raw point of its frame each point was.
        augmented_from_lidar: (B, 4, 4) float64.
    """

    points: Tensor
    batch_index: Tensor
    source_index: Tensor
    augmented_from_lidar: Tensor

    @property
    def num_frames(self) -> int:
        return len(self.augmented_from_lidar)


@dataclass(frozen=True, eq=False)
class ImageView:
    """The augmented images of a batch, padded at the right and bottom to one size.

    Attributes:
        images: (I, 3, H, W) uint8 RGB, 0 in the padding. Normalisation belongs to the image encoder.
        image_size: (I, 2) int64, height and width before padding; visible means inside this.
        own_padded_size: (I, 2) int64, each image's own size rounded up to the padding multiple (only the released
        sampling grid reads it).
        batch_index: (I,) int64, the frame an image belongs to.
        camera_index: (I,) int64, position of the camera in its frame.
        camera_names: I names, the data set's own; frames may differ in how many cameras they have, and in which.
        augmented_from_image: (I, 3, 3) float64, moves a pixel of the original image into the augmented one.
        image_from_camera: (I, 3, 4) float64, for the original image.
        camera_from_lidar: (I, 4, 4) float64.
        distortion: (I, 5) float64, zeros where the camera has none.
        raw_size: (I, 2) int64, height and width of the original image.
    """

    images: Tensor
    image_size: Tensor
    own_padded_size: Tensor
    batch_index: Tensor
    camera_index: Tensor
    camera_names: tuple[str, ...]
    augmented_from_image: Tensor
    image_from_camera: Tensor
    camera_from_lidar: Tensor
    distortion: Tensor
    raw_size: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """B frames, ready for a method.

    Attributes:
        views: the point views: none, one or two.
        images: the image views: none, one or two; every one holds all images of the batch in the same order. A data set
            or frame without cameras has I = 0.
        frame_ids: B names.
        truth: the ground truth that the method asked for; None where it asked for none.
        bad_frames: one message for every frame that could not be read and was replaced by another.
    """

    views: tuple[PointView, ...]
    images: tuple[ImageView, ...]
    frame_ids: tuple[str, ...]
    truth: Truth | None = None
    bad_frames: tuple[str, ...] = ()

    @property
    def num_frames(self) -> int:
        return len(self.frame_ids)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device (Lightning calls this)."""
        return move_tensors(self, device)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where copies to a GPU overlap with work (DataLoader calls this)."""
        return map_tensors(self, Tensor.pin_memory)
