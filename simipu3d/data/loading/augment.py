"""What does one frame become? The views and the truth that a method needs, drawn from one seed."""

from dataclasses import dataclass

import numpy as np
import torch

from simipu3d.contracts.frame import Frame
from simipu3d.contracts.method import Needs
from simipu3d.contracts.truth import BoxTruth
from simipu3d.data.config import AugmentConfig, ImageAugmentConfig
from simipu3d.data.loading.augment_images import ImageSample, augment_image
from simipu3d.data.loading.augment_points import PointSample, draw_point_views, whole_view
from simipu3d.data.loading.truth import moved_boxes, with_image_truth, with_point_truth


@dataclass(frozen=True, eq=False)
class Sample:
    """An augmented frame.

    Attributes:
        views: the point views: none, one or two.
        images: the image views: none, one or two; each has one entry a camera, in the frame's order; cameras may differ in
            size.
        frame_id: the frame's name.
        boxes: in the frame of the first point view (the lidar frame where there is none), or None where not needed.
        bad_frames: a message for every frame that was to stand here and could not be used.
    """

    views: tuple[PointSample, ...]
    images: tuple[tuple[ImageSample, ...], ...]
    frame_id: str
    boxes: BoxTruth | None = None
    bad_frames: tuple[str, ...] = ()


def augment_frame(
    frame: Frame,
    config: AugmentConfig,
    needs: Needs,
    seeds: np.random.SeedSequence,
    bad_frames: tuple[str, ...] = (),
    *,
    evaluation: bool = False,
) -> Sample:
    """Draw the views of a frame, and move its ground truth along; everything random in them comes from `seeds`.

    Points, images, the joint mirror and the second view of the images draw from streams of their own, so that a change of
    one setting leaves the other views alone.

    Args:
        frame: as it was read.
        config: the `augment:` block; centres that are null are the origin (see `PointAugmentConfig.centred`).
        needs: what to draw.
        seeds: fresh ones: nothing has been spawned from them.
        bad_frames: messages to carry.
        evaluation: draw as little as possible. A single point view is all points, unmoved; the first image view is the
            image as it is, after a resize that leaves one size only. Of two views the second is drawn all the same, for
            comparing them is the method's task; both point views then have `num_points`, and the first stays unmoved.

    Raises:
        BadFrameError: the frame lacks ground truth that is needed.
    """
    point_seeds, image_seeds, joint_seeds, second_image_seeds = seeds.spawn(4)
    mirrored = None
    if config.joint_flip:
        mirrored = bool(np.random.default_rng(joint_seeds).random() < config.points.flip_probability)
    views: tuple[PointSample, ...] = ()
    if needs.point_views == 1 and evaluation:
        views = (whole_view(frame.points),)
    elif needs.point_views:
        points = config.points.model_copy(update={"augment_first_view": False}) if evaluation else config.points
        rng = np.random.default_rng(point_seeds)
        views = draw_point_views(frame.points, points, rng, needs.point_views, mirrored)
    images = []
    for number, stream in enumerate((image_seeds, second_image_seeds)[: needs.image_views]):
        as_it_is = evaluation and number == 0
        settings = config.images.without_draws() if as_it_is else config.images
        rng = np.random.default_rng(stream)
        images.append(_image_view(frame, settings, needs, rng, None if as_it_is else mirrored))
    boxes = None
    if "boxes" in needs.truth:
        boxes = moved_boxes(frame, views[0].augmented_from_lidar if views else torch.eye(4, dtype=torch.float64))
    return Sample(
        views=tuple(with_point_truth(view, frame, needs.truth) for view in views),
        images=tuple(images),
        frame_id=frame.frame_id,
        boxes=boxes,
        bad_frames=bad_frames,
    )


def _image_view(
    frame: Frame, config: ImageAugmentConfig, needs: Needs, rng: np.random.Generator, mirrored: bool | None
) -> tuple[ImageSample, ...]:
    """One view of every image of a frame, with its truth."""
    drawn = ((camera, augment_image(camera, config, rng, mirrored)) for camera in frame.cameras)
    return tuple(with_image_truth(sample, frame, camera, needs.truth) for camera, sample in drawn)
