"""Which token of the second view is the twin of each token of the first?

Both sets are compared in the lidar frame, metres, after every view's own augmentation has been undone.

A rule of `ASSIGNMENTS` is called once a frame as `fn(xyz_a, xyz_b, source_a, source_b)`: (n, 3) and (m, 3) float64 on the
CPU, metres, and (n,) and (m,) int64, the raw point that a token sits on or -1. It returns (P, 2) int64 rows of both,
ascending in the first; of an empty set none.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import PointTokens
from simipu3d.geometry.transforms import transform_points_each
from simipu3d.ops.assignment import greedy, hungarian, mutual_nearest, nearest
from simipu3d.registry import ASSIGNMENTS

for _rule in (hungarian, greedy, nearest, mutual_nearest):
    ASSIGNMENTS.register(_rule.__name__)(_rule)


class TokenPairs(NamedTuple):
    """P matched pairs of a batch.

    Attributes:
        first, second: (P,) int64 rows of the tokens of the two views, ascending in `first`.
        distance: (P,) metres between them in the lidar frame.
    """

    first: Tensor
    second: Tensor
    distance: Tensor


def lidar_xyz(tokens: PointTokens, view: PointView) -> Tensor:
    """(M, 3) float64: tokens taken back from their view's augmented frame into the lidar frame, metres."""
    lidar_from_augmented = torch.linalg.inv(view.augmented_from_lidar)
    return transform_points_each(lidar_from_augmented, tokens.xyz, tokens.batch_index)


@torch.no_grad()
def match_tokens(
    tokens: tuple[PointTokens, PointTokens],
    xyz: tuple[Tensor, Tensor],
    num_frames: int,
    *,
    assignment: str,
    max_distance: float | None = None,
) -> TokenPairs:
    """Match the tokens of every frame of a batch.

    Args:
        tokens: of the two views.
        xyz: (M, 3) of both, in the lidar frame, metres.
        num_frames: frames in the batch.
        assignment: a name in `ASSIGNMENTS`: `hungarian` is the exact minimum of the summed Euclidean distance.
        max_distance: pairs farther apart, metres, are dropped after the assignment; None keeps all.

    Returns:
        The pairs; none for a frame in which either view has no token.

    Source: SimIPU, section "Matching Algorithm", Eq. 3.
    """
    assign = ASSIGNMENTS[assignment].target
    a, b = (points.detach().cpu() for points in xyz)
    source_a, source_b = (each.source_index.cpu() for each in tokens)
    index_a, index_b = (each.batch_index.cpu() for each in tokens)
    found = []
    for frame in range(num_frames):
        rows_a, rows_b = (index_a == frame).nonzero().squeeze(1), (index_b == frame).nonzero().squeeze(1)
        pairs = assign(a[rows_a], b[rows_b], source_a[rows_a], source_b[rows_b])
        if pairs.shape != (len(pairs), 2) or pairs.dtype != torch.int64:
            raise ValueError(
                f"the assignment {assignment!r} must return (P, 2) int64 rows, got {tuple(pairs.shape)} {pairs.dtype}"
            )
        found.append(torch.stack([rows_a[pairs[:, 0]], rows_b[pairs[:, 1]]], dim=1))
    pairs = torch.cat(found) if found else torch.zeros((0, 2), dtype=torch.int64)
    distance = (a[pairs[:, 0]] - b[pairs[:, 1]]).norm(dim=1)
    if max_distance is not None:
        pairs, distance = pairs[distance <= max_distance], distance[distance <= max_distance]
    pairs, distance = pairs.to(xyz[0].device), distance.to(xyz[0].device)
    return TokenPairs(pairs[:, 0], pairs[:, 1], distance)
