"""How are point views drawn from one scan?

Augmentation is a matrix: a view carries `augmented_from_lidar`, and its inverse takes every point back. Shapes: N raw
points, n points of a view.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.data.config import PointAugmentConfig
from simipu3d.geometry.transforms import about, rotation_z, scaling, transform_points, translation

ORIGIN = (0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class PointSample:
    """One view of one frame.

    Attributes:
        points: (n, 3 + F) float32; xyz is in the augmented frame, metres.
        source_index: (n,) int64, which raw point of the frame each one was.
        augmented_from_lidar: (4, 4) float64.
        point_class: (n,) uint8, or None where it is not needed.
        point_instance: (n,) int32, or None where it is not needed.
    """

    points: Tensor
    source_index: Tensor
    augmented_from_lidar: Tensor
    point_class: Tensor | None = None
    point_instance: Tensor | None = None


def draw_transform(config: PointAugmentConfig, rng: np.random.Generator, mirrored: bool | None = None) -> Tensor:
    """(4, 4) float64: rotate about `rotation_centre`, scale about `scale_centre`, shift, mirror y -> -y, in this order.
    `mirrored` takes the place of a coin of this view's own. A centre that is still null is the origin
    (`PointAugmentConfig.centred` knows better ones).

    Source: SimIPU's released code has this order; the paper (arXiv:2112.04680, section 3) names rotation, translation
    and scaling.
    """
    angle = math.radians(rng.uniform(*config.rotation_deg))
    factor = rng.uniform(*config.scale)
    shift = rng.standard_normal(3) * np.array(config.translation_std)
    own_coin = rng.random() < config.flip_probability
    mirror = -1.0 if (own_coin if mirrored is None else mirrored) else 1.0
    rotate = about(config.rotation_centre or ORIGIN, rotation_z(angle))
    scale = about(config.scale_centre or ORIGIN, scaling((factor, factor, factor)))
    return scaling((1.0, mirror, 1.0)) @ translation(tuple(shift.tolist())) @ scale @ rotate


def draw_indices(
    num_raw: int, config: PointAugmentConfig, rng: np.random.Generator, num_views: int = 2
) -> list[NDArray[np.int64]]:
    """Rows of the raw points for every view; where there are not enough, as `too_few` says."""
    count = num_raw if config.num_points is None else config.num_points
    repeat = count > num_raw and config.too_few == "repeat"
    count = count if repeat else min(num_raw, count)
    drawn = [rng.choice(num_raw, count, replace=repeat)]
    for _ in range(num_views - 1):
        drawn.append(drawn[0] if config.point_draw == "shared" else rng.choice(num_raw, count, replace=repeat))
    return [rng.permutation(index) if config.shuffle else np.sort(index) for index in drawn]


def make_view(points: NDArray[np.float32], index: NDArray[np.int64], augmented_from_lidar: Tensor) -> PointSample:
    """The chosen rows of (N, 3 + F) raw points, moved; a row's other columns stay as they are."""
    source_index = torch.from_numpy(index)
    chosen = torch.from_numpy(points).index_select(0, source_index)
    chosen[:, :3] = transform_points(augmented_from_lidar, chosen[:, :3])
    return PointSample(chosen, source_index, augmented_from_lidar)


def whole_view(points: NDArray[np.float32]) -> PointSample:
    """All points, unmoved, in the reader's order."""
    return make_view(points, np.arange(len(points)), torch.eye(4, dtype=torch.float64))


def draw_point_views(
    points: NDArray[np.float32],
    config: PointAugmentConfig,
    rng: np.random.Generator,
    num_views: int = 2,
    mirrored: bool | None = None,
) -> tuple[PointSample, ...]:
    """One or two views of one scan. The last is always moved, and `mirrored` is its coin; the first of two keeps the lidar
    frame with `augment_first_view: false`."""
    indices = draw_indices(len(points), config, rng, num_views)
    transforms = [torch.eye(4, dtype=torch.float64) for _ in range(num_views - 1)]
    if config.augment_first_view:
        transforms = [draw_transform(config, rng) for _ in transforms]
    transforms.append(draw_transform(config, rng, mirrored))
    return tuple(make_view(points, index, matrix) for index, matrix in zip(indices, transforms, strict=True))
