"""A data set that needs no file: random points ahead of one camera."""

import numpy as np
from pydantic import PositiveInt

from simipu3d.contracts.frame import EVERYTHING, Camera, Frame, FrameReader, Wants
from simipu3d.data.config import DataConfig
from simipu3d.errors import UserError
from simipu3d.registry import READERS

CAMERA_FROM_LIDAR = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
IMAGE_FROM_CAMERA = np.array([[60, 0, 47.5, 0], [0, 60, 31.5, 0], [0, 0, 1, 0]], dtype=np.float64)


class NoiseConfig(DataConfig):
    """The `data:` block of `acme_noise`."""

    num_frames: PositiveInt = 8
    """Frames of the data set."""


@READERS.register("acme_noise", config=NoiseConfig)
class Noise(FrameReader):
    """`num_frames` frames of points and pixels drawn at random, each the same every time."""

    def __init__(self, config: NoiseConfig, wants: Wants = EVERYTHING):
        if config.split != "train":
            raise UserError(f"data.split: acme_noise has train only, got {config.split}")
        self.num_frames, self.wants = config.num_frames, wants

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> Frame:
        rng = np.random.default_rng(index)
        num_points = 300 if self.wants.points else 0
        points = rng.uniform([4, -8, -2, 0], [30, 8, 2, 1], (num_points, 4)).astype(np.float32)
        image = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        camera = Camera("front", image, IMAGE_FROM_CAMERA, CAMERA_FROM_LIDAR)
        return Frame(points, self.point_columns, (camera,) if self.wants.images else (), f"{index:06d}")
