"""How do samples become a Batch? Ragged points are concatenated, images padded to the largest of the batch.

A batch gives what its frames give one by one: nothing here depends on a frame's neighbours but the padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from simipu3d.contracts.batch import Batch, ImageView, PointView
from simipu3d.data.loading.augment import Sample
from simipu3d.data.loading.augment_images import ImageSample
from simipu3d.data.loading.augment_points import PointSample


@dataclass(frozen=True)
class NoSample:
    """Stands where no frame could be used; `bad_frames` are the messages."""

    bad_frames: tuple[str, ...]


def collate(samples: Sequence[Sample | NoSample]) -> Batch:
    """Put samples into one Batch.

    A `NoSample` adds no frame, only its messages to `bad_frames`: the batch is then smaller than asked for, and empty
    (B = 0) where every sample is one. `BadFrameLimit.add` turns the messages into the error that stops the run.
    """
    good = [sample for sample in samples if isinstance(sample, Sample)]
    return Batch(
        views=(_point_view([sample.views[0] for sample in good]), _point_view([sample.views[1] for sample in good])),
        images=_image_view([sample.images for sample in good]),
        frame_ids=tuple(sample.frame_id for sample in good),
        bad_frames=tuple(chain.from_iterable(sample.bad_frames for sample in samples)),
    )


def _point_view(views: Sequence[PointSample]) -> PointView:
    lengths = torch.tensor([len(view.points) for view in views], dtype=torch.int64)
    return PointView(
        points=torch.cat([view.points for view in views]) if views else torch.zeros(0, 4),
        batch_index=torch.repeat_interleave(torch.arange(len(views)), lengths),
        source_index=torch.cat([view.source_index for view in views]) if views else torch.zeros(0, dtype=torch.int64),
        augmented_from_lidar=_stack([view.augmented_from_lidar for view in views], (4, 4)),
    )


def _image_view(frames: Sequence[tuple[ImageSample, ...]]) -> ImageView:
    samples = list(chain.from_iterable(frames))
    height = max((sample.padded_size[0] for sample in samples), default=0)
    width = max((sample.padded_size[1] for sample in samples), default=0)
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    for image, sample in zip(images, samples, strict=True):
        image[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
    return ImageView(
        images=images,
        image_size=_sizes([(sample.image.shape[1], sample.image.shape[2]) for sample in samples]),
        own_padded_size=_sizes([sample.padded_size for sample in samples]),
        batch_index=torch.tensor([frame for frame, own in enumerate(frames) for _ in own], dtype=torch.int64),
        camera_index=torch.tensor([camera for own in frames for camera in range(len(own))], dtype=torch.int64),
        camera_names=tuple(sample.camera for sample in samples),
        augmented_from_image=_stack([sample.augmented_from_image for sample in samples], (3, 3)),
        image_from_camera=_stack([sample.image_from_camera for sample in samples], (3, 4)),
        camera_from_lidar=_stack([sample.camera_from_lidar for sample in samples], (4, 4)),
        distortion=_stack([sample.distortion for sample in samples], (5,)),
        raw_size=_sizes([sample.raw_size for sample in samples]),
    )


def _stack(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.zeros(0, *shape, dtype=torch.float64)


def _sizes(sizes: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
