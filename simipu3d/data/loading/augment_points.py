"""How are two point views drawn from one scan?

Augmentation is a matrix: a view carries `augmented_from_lidar`, and its inverse takes every point back. Shapes: N raw
points, n points of a view.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.data.config import AugmentConfig
from simipu3d.geometry.transforms import about, rotation_z, scaling, transform_points, translation


@dataclass(frozen=True, eq=False)
class PointSample:
    """One view of one frame.

    Attributes:
        points: (n, 3 + F) float32; xyz is in the augmented frame, metres.
        source_index: (n,) int64, which raw point of the frame each one was.
        augmented_from_lidar: (4, 4) float64.
    """

    points: Tensor
    source_index: Tensor
    augmented_from_lidar: Tensor


def draw_transform(config: AugmentConfig, rng: np.random.Generator, mirrored: bool | None = None) -> Tensor:
    """(4, 4) float64: rotate about `rotation_centre`, scale about `scale_centre`, shift, mirror y -> -y, in this order.
    `mirrored` takes the place of a coin of this view's own.

    Source: SimIPU's released code has this order; the paper (arXiv:2112.04680, section 3) names rotation, translation
    and scaling.
    """
    angle = math.radians(rng.uniform(*config.rotation_deg))
    factor = rng.uniform(*config.scale)
    shift = rng.standard_normal(3) * np.array(config.translation_std)
    own_coin = rng.random() < config.flip_probability
    mirror = -1.0 if (own_coin if mirrored is None else mirrored) else 1.0
    rotate = about(config.rotation_centre, rotation_z(angle))
    scale = about(config.scale_centre, scaling((factor, factor, factor)))
    return scaling((1.0, mirror, 1.0)) @ translation(tuple(shift.tolist())) @ scale @ rotate


def draw_indices(
    num_raw: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the raw points for the first and the second view; where there are not enough, as `too_few` says."""
    count = num_raw if config.num_points is None else config.num_points
    repeat = count > num_raw and config.too_few == "repeat"
    count = count if repeat else min(num_raw, count)
    first = rng.choice(num_raw, count, replace=repeat)
    second = first if config.point_draw == "shared" else rng.choice(num_raw, count, replace=repeat)
    if config.shuffle:
        return rng.permutation(first), rng.permutation(second)
    return np.sort(first), np.sort(second)


def make_view(points: NDArray[np.float32], index: NDArray[np.int64], augmented_from_lidar: Tensor) -> PointSample:
    """The chosen rows of (N, 3 + F) raw points, moved; a row's other columns stay as they are."""
    source_index = torch.from_numpy(index)
    chosen = torch.from_numpy(points).index_select(0, source_index)
    chosen[:, :3] = transform_points(augmented_from_lidar, chosen[:, :3])
    return PointSample(chosen, source_index, augmented_from_lidar)


def draw_point_views(
    points: NDArray[np.float32], config: AugmentConfig, rng: np.random.Generator, mirrored: bool | None = None
) -> tuple[PointSample, PointSample]:
    """Two views of one scan; with `augment_first_view: false` the first one keeps the lidar frame."""
    first_index, second_index = draw_indices(len(points), config, rng)
    identity = torch.eye(4, dtype=torch.float64)
    first_transform = draw_transform(config, rng) if config.augment_first_view else identity
    second_transform = draw_transform(config, rng, mirrored)
    return make_view(points, first_index, first_transform), make_view(points, second_index, second_transform)
