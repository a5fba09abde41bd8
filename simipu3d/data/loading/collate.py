"""How do samples become a Batch? Ragged points and boxes are concatenated, images padded to the largest of the batch.

A batch gives what its frames give one by one: nothing here depends on a frame's neighbours but the padding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from simipu3d.contracts.batch import Batch, ImageView, PointView
from simipu3d.contracts.method import Needs
from simipu3d.contracts.truth import UNLABELLED, BoxTruth, Truth
from simipu3d.data.loading.augment import Sample
from simipu3d.data.loading.augment_images import ImageSample
from simipu3d.data.loading.augment_points import PointSample

PIXEL_PADDING = {
    "depth": (torch.float32, 0),
    "pixel_class": (torch.uint8, UNLABELLED),
    "pixel_instance": (torch.int32, 0),
}
"""Type of every map of truth, and what stands in its padding."""
POINT_DTYPES = {"point_class": torch.uint8, "point_instance": torch.int32}


@dataclass(frozen=True)
class NoSample:
    """Stands where no frame could be used; `bad_frames` are the messages."""

    bad_frames: tuple[str, ...]


@dataclass(frozen=True)
class Collate:
    """Puts samples into one Batch.

    Attributes:
        needs: which views and truth every sample has.
        num_columns: 3 + F of every frame's points.
    """

    needs: Needs
    num_columns: int

    def __call__(self, samples: Sequence[Sample | NoSample]) -> Batch:
        """A `NoSample` adds no frame, only its messages to `bad_frames`: the batch is then smaller than asked for, and empty
        (B = 0) where every sample is one. `BadFrameLimit.add` turns the messages into the error that stops the run.
        """
        good = [sample for sample in samples if isinstance(sample, Sample)]
        views = [[sample.views[number] for sample in good] for number in range(self.needs.point_views)]
        images = [[sample.images[number] for sample in good] for number in range(self.needs.image_views)]
        return Batch(
            views=tuple(_point_view(own, self.num_columns) for own in views),
            images=tuple(_image_view(own) for own in images),
            frame_ids=tuple(sample.frame_id for sample in good),
            truth=self._truth(good, views, images) if self.needs.truth else None,
            bad_frames=tuple(chain.from_iterable(sample.bad_frames for sample in samples)),
        )

    def _truth(
        self,
        samples: list[Sample],
        views: list[list[PointSample]],
        images: list[list[tuple[ImageSample, ...]]],
    ) -> Truth:
        kinds: dict[str, Any] = {}
        for kind in self.needs.truth:
            if kind == "boxes":
                kinds[kind] = _boxes([sample.boxes for sample in samples])
            elif kind in POINT_DTYPES:
                kinds[kind] = tuple(_labels((getattr(view, kind) for view in own), POINT_DTYPES[kind]) for own in views)
            else:
                kinds[kind] = tuple(_maps(list(chain.from_iterable(own)), kind) for own in images)
        return Truth(**kinds)


def _point_view(views: Sequence[PointSample], num_columns: int) -> PointView:
    return PointView(
        points=torch.cat([view.points for view in views]) if views else torch.zeros(0, num_columns),
        batch_index=_batch_index(len(view.points) for view in views),
        source_index=_labels((view.source_index for view in views), torch.int64),
        augmented_from_lidar=_stack([view.augmented_from_lidar for view in views], (4, 4)),
    )


def _image_view(frames: Sequence[tuple[ImageSample, ...]]) -> ImageView:
    samples = list(chain.from_iterable(frames))
    images = torch.zeros(len(samples), 3, *_padded_size(samples), dtype=torch.uint8)
    for image, sample in zip(images, samples, strict=True):
        image[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
    return ImageView(
        images=images,
        image_size=_sizes([sample.move.size for sample in samples]),
        own_padded_size=_sizes([sample.padded_size for sample in samples]),
        batch_index=_batch_index(len(own) for own in frames),
        camera_index=torch.tensor([camera for own in frames for camera in range(len(own))], dtype=torch.int64),
        camera_names=tuple(sample.camera for sample in samples),
        augmented_from_image=_stack([sample.augmented_from_image for sample in samples], (3, 3)),
        image_from_camera=_stack([sample.image_from_camera for sample in samples], (3, 4)),
        camera_from_lidar=_stack([sample.camera_from_lidar for sample in samples], (4, 4)),
        distortion=_stack([sample.distortion for sample in samples], (5,)),
        raw_size=_sizes([sample.move.raw_size for sample in samples]),
    )


def _maps(samples: list[ImageSample], kind: str) -> Tensor:
    """(I, H, W) of one kind of truth, padded like the images."""
    dtype, padding = PIXEL_PADDING[kind]
    padded = torch.full((len(samples), *_padded_size(samples)), padding, dtype=dtype)
    for own, sample in zip(padded, samples, strict=True):
        own[: sample.move.size[0], : sample.move.size[1]] = getattr(sample, kind)
    return padded


def _boxes(frames: Sequence[BoxTruth]) -> BoxTruth:
    return BoxTruth(
        center=_rows([boxes.center for boxes in frames], (3,)),
        size=_rows([boxes.size for boxes in frames], (3,)),
        yaw=_rows([boxes.yaw for boxes in frames], ()),
        velocity=_rows([boxes.velocity for boxes in frames], (2,)),
        batch_index=_batch_index(len(boxes) for boxes in frames),
        source_index=_labels((boxes.source_index for boxes in frames), torch.int64),
        num_points=_labels((boxes.num_points for boxes in frames), torch.int64),
        difficulty=_labels((boxes.difficulty for boxes in frames), torch.int64),
        names=tuple(chain.from_iterable(boxes.names for boxes in frames)),
        attributes=tuple(chain.from_iterable(boxes.attributes for boxes in frames)),
    )


def _padded_size(samples: Sequence[ImageSample]) -> tuple[int, int]:
    """Height and width that all images of a batch are padded to."""
    height = max((sample.padded_size[0] for sample in samples), default=0)
    return height, max((sample.padded_size[1] for sample in samples), default=0)


def _batch_index(lengths: Iterable[int]) -> Tensor:
    """(sum of lengths,) int64: which frame a row belongs to."""
    counts = torch.tensor(list(lengths), dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def _labels(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *tensors])


def _rows(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.zeros(0, *shape, dtype=torch.float64), *tensors])


def _stack(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.zeros(0, *shape, dtype=torch.float64)


def _sizes(sizes: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
