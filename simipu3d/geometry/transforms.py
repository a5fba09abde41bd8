"""How do points move between frames?

A transform is a (4, 4) homogeneous matrix called `target_from_source`, metres. Composition reads from right to left and
neighbours touch: `a_from_c = a_from_b @ b_from_c`. Shapes: N points, B transforms.
"""

import math

import torch
from torch import Tensor


def transform_points(target_from_source: Tensor, xyz: Tensor) -> Tensor:
    """Move points by one transform.

    Args:
        target_from_source: (4, 4) affine; its dtype decides the precision of the sum.
        xyz: (N, 3) metres. N may be 0.

    Returns:
        (N, 3) in the dtype of `xyz`.
    """
    moved = xyz.to(target_from_source.dtype) @ target_from_source[:3, :3].mT + target_from_source[:3, 3]
    return moved.to(xyz.dtype)


def transform_points_each(target_from_source: Tensor, xyz: Tensor, batch_index: Tensor) -> Tensor:
    """Move every point by the transform of its own frame.

    Args:
        target_from_source: (B, 4, 4) affine.
        xyz: (N, 3) metres.
        batch_index: (N,) int64 below B.

    Returns:
        (N, 3) in the dtype of `target_from_source`.
    """
    own = target_from_source.index_select(0, batch_index)
    return (own[:, :3, :3] @ xyz.to(own.dtype)[:, :, None]).squeeze(2) + own[:, :3, 3]


def rotation_z(angle: float) -> Tensor:
    """(4, 4) float64 rotation about +z; positive angles (radians) turn +x towards +y, counter-clockwise from above."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)


def translation(offset: tuple[float, float, float]) -> Tensor:
    """(4, 4) float64 shift by `offset` metres."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor(offset, dtype=torch.float64)
    return matrix


def scaling(factors: tuple[float, float, float]) -> Tensor:
    """(4, 4) float64 scaling of the axes; a factor of -1 mirrors."""
    return torch.diag(torch.tensor([*factors, 1.0], dtype=torch.float64))


def about(centre: tuple[float, float, float], transform: Tensor) -> Tensor:
    """`transform` carried out about `centre` (metres) instead of the origin."""
    minus = (-centre[0], -centre[1], -centre[2])
    return translation(centre) @ transform @ translation(minus)
