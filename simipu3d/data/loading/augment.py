"""What does one frame become? Two point views and one view of every image, drawn from one seed."""

from dataclasses import dataclass

import numpy as np

from simipu3d.contracts.frame import Frame
from simipu3d.data.config import AugmentConfig
from simipu3d.data.loading.augment_images import ImageSample, augment_image
from simipu3d.data.loading.augment_points import PointSample, draw_point_views


@dataclass(frozen=True, eq=False)
class Sample:
    """An augmented frame.

    Attributes:
        views: the two point views.
        images: one entry a camera, in the frame's order; cameras may differ in size.
        frame_id: the frame's name.
        bad_frames: a message for every frame that was to stand here and could not be used.
    """

    views: tuple[PointSample, PointSample]
    images: tuple[ImageSample, ...]
    frame_id: str
    bad_frames: tuple[str, ...] = ()


def augment_frame(
    frame: Frame, config: AugmentConfig, seeds: np.random.SeedSequence, bad_frames: tuple[str, ...] = ()
) -> Sample:
    """Draw the views of a frame; everything random in them comes from `seeds`.

    Points and images draw from streams of their own, so that a change of image settings leaves the point views alone.
    """
    point_seeds, image_seeds, joint_seeds = seeds.spawn(3)
    image_rng = np.random.default_rng(image_seeds)
    mirrored = None
    if config.joint_flip:
        mirrored = bool(np.random.default_rng(joint_seeds).random() < config.flip_probability)
    return Sample(
        views=draw_point_views(frame.points, config, np.random.default_rng(point_seeds), mirrored),
        images=tuple(augment_image(camera, config.images, image_rng, mirrored) for camera in frame.cameras),
        frame_id=frame.frame_id,
        bad_frames=bad_frames,
    )
