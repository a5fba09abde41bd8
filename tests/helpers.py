"""A small method, small batches and small scenes that several tests share."""

import numpy as np
import torch

from simipu3d.config import merge, parse_block
from simipu3d.contracts.batch import Batch, PointView
from simipu3d.contracts.frame import Boxes, Camera, Frame
from simipu3d.contracts.method import DataInfo, Needs
from simipu3d.data.config import AugmentConfig, PointAugmentConfig
from simipu3d.data.loading.augment import augment_frame
from simipu3d.data.loading.collate import Collate
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
AUGMENT = AugmentConfig(points=PointAugmentConfig(num_points=80, rotation_centre=(10, 0, 0), scale_centre=(10, 0, 0)))
CLASS_NAMES = ("road", "car", "tree")


def street(seed: int, num_points: int = 100, size: tuple[int, int] = (64, 96)) -> Frame:
    """Random points ahead of a camera; the image is noise."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([4, -8, -2, 0], [30, 8, 2, 1], (num_points, 4)).astype(np.float32)
    height, width = size
    image_from_camera = np.array(
        [[60, 0, width / 2 - 0.5, 0], [0, 60, height / 2 - 0.5, 0], [0, 0, 1, 0]], dtype=np.float64
    )
    image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    camera = Camera(
        "front",
        image,
        image_from_camera,
        CAMERA_FROM_LIDAR,
        depth=rng.uniform(2, 40, size).astype(np.float32),
        pixel_class=rng.integers(0, len(CLASS_NAMES), size, dtype=np.uint8),
        pixel_instance=rng.integers(0, 3, size, dtype=np.int32),
    )
    boxes = Boxes(
        center=rng.uniform([8, -4, -1], [25, 4, 0], (3, 3)),
        size=rng.uniform(1, 4, (3, 3)),
        yaw=rng.uniform(-np.pi, np.pi, 3),
        names=("car", "car", "tree"),
        velocity=rng.normal(size=(3, 2)),
    )
    return Frame(
        points,
        COLUMNS,
        (camera,),
        f"{seed:06d}",
        boxes=boxes,
        point_class=rng.integers(0, len(CLASS_NAMES), num_points, dtype=np.uint8),
        point_instance=rng.integers(0, 3, num_points, dtype=np.int32),
    )


def batch_of(
    seeds: list[int],
    augment: AugmentConfig = AUGMENT,
    needs: Needs = SimIPU.NEEDS,
    *,
    evaluation: bool = False,
    **kwargs,
) -> Batch:
    """Frames of the given seeds, augmented and collated."""
    samples = [
        augment_frame(street(seed, **kwargs), augment, needs, np.random.SeedSequence(seed), evaluation=evaluation)
        for seed in seeds
    ]
    return Collate(needs, len(COLUMNS))(samples)


def small_method(**changes: dict) -> SimIPU:
    """SimIPU of a few thousand parameters; keyword arguments change keys of its blocks."""
    torch.manual_seed(0)
    return SimIPU(parse_block("", SimIPU.Config, merge(BLOCKS, changes)), DataInfo(COLUMNS, CLASS_NAMES))


def randomise_norms(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Statistics of a trained network: a lost or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.4),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return net


def make_view(*scenes: torch.Tensor) -> PointView:
    """A view of scenes (N, 4) that nothing has augmented."""
    scenes = [torch.as_tensor(scene, dtype=torch.float32).view(-1, 4) for scene in scenes]
    sizes = torch.tensor([len(scene) for scene in scenes])
    batch_index = torch.arange(len(scenes)).repeat_interleave(sizes)
    source_index = torch.cat([torch.arange(len(scene)) for scene in scenes])
    return PointView(
        torch.cat(scenes), batch_index, source_index, torch.eye(4, dtype=torch.float64).expand(len(scenes), 4, 4)
    )


def random_scene(seed: int, num: int = 400, low=(-4.0, -2.0, -2.0), high=(4.0, 4.0, 4.0)) -> torch.Tensor:
    """Points with coordinates on a grid of 1/256 m, so that sums of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(low), torch.tensor(high)
    xyz = low + (high - low) * torch.rand(num, 3, generator=generator)
    xyz = (xyz * 256).floor() / 256
    return torch.cat([xyz, torch.rand(num, 1, generator=generator)], 1)
