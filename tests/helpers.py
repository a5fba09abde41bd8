"""A small method and small batches that several tests share."""

import numpy as np
import torch

from simipu3d.config import merge
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import Camera, Frame
from simipu3d.data.augment import augment_frame
from simipu3d.data.collate import collate
from simipu3d.data.config import AugmentConfig, ImageAugmentConfig
from simipu3d.methods.simipu import SimIPU

COLUMNS = ("x", "y", "z", "intensity")
CAMERA_FROM_LIDAR = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
LAYER = {
    "sampler": "d_fps",
    "num_points": 24,
    "radii": [4.0],
    "num_samples": [8],
    "mlps": [[8, 16]],
    "aggregation": None,
}
BLOCKS = {
    "point_encoder": {"name": "pointnet2_msg", "neighbourhood": "ball", "layers": [LAYER]},
    "image_encoder": {
        "name": "resnet18",
        "model_args": {"channels": [8, 12, 16, 20]},
        "output_stride": 8,
        "init": "torch_default",
    },
    "matching": {},
    "contrast": {"dim": 8},
}
AUGMENT = AugmentConfig(
    num_points=80, rotation_centre=(10, 0, 0), scale_centre=(10, 0, 0), images=ImageAugmentConfig(resize=None)
)


def street(seed: int, num_points: int = 100, size: tuple[int, int] = (64, 96)) -> Frame:
    """Random points ahead of a camera; the image is noise."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([4, -8, -2, 0], [30, 8, 2, 1], (num_points, 4)).astype(np.float32)
    height, width = size
    image_from_camera = np.array(
        [[60, 0, width / 2 - 0.5, 0], [0, 60, height / 2 - 0.5, 0], [0, 0, 1, 0]], dtype=np.float64
    )
    image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Frame(points, COLUMNS, (Camera("front", image, image_from_camera, CAMERA_FROM_LIDAR),), f"{seed:06d}")


def batch_of(seeds: list[int], augment: AugmentConfig = AUGMENT, **kwargs) -> Batch:
    """Frames of the given seeds, augmented and collated."""
    samples = [augment_frame(street(seed, **kwargs), augment, np.random.SeedSequence(seed), ()) for seed in seeds]
    return collate(samples)


def small_method(**changes: dict) -> SimIPU:
    """SimIPU of a few thousand parameters; keyword arguments change keys of its blocks."""
    raw = merge(BLOCKS, changes)
    torch.manual_seed(0)
    return SimIPU(SimIPU.parse_blocks(raw), point_columns=COLUMNS)
