"""Which points lie round a centre? Ball query, plain or between two radii, and the gathering of the rows found.

A point belongs to a centre if its squared distance is 0, or at least `min_radius`² and below `radius`² (the annulus of
3DSSD, arXiv:2002.10187; with `min_radius` 0 the ball of PointNet++, arXiv:1706.02413). Points are tried in the order of
their rows and the first `num_samples` are taken, neither the nearest nor random ones; slots left over repeat the first
one found.

Shapes: N points and M centres in B scenes, concatenated; a centre sees the points of its own scene only. Metres.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from simipu3d.ops.backend import check_offsets, run_tasks, use_numba

_BLOCK = 128
_INFINITY_BITS = np.int32(0x7F800000)
_REFERENCE_PAIRS = 1 << 23
"""Centre-point pairs that the reference looks at together: bounds its memory."""


class Shell(NamedTuple):
    """One neighbourhood: between two radii in metres, and how many points it takes at most."""

    min_radius: float
    radius: float
    num_samples: int


class Neighbours(NamedTuple):
    """What one shell found.

    Attributes:
        index: (M, num_samples) int64 rows of the points; -1 in all slots of a centre that has none.
        count: (M,) int64, how many slots hold different points; the others repeat the first.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple's own methods of these names are not used
    count: Tensor  # type: ignore[assignment]


def ball_query(
    xyz: Tensor,
    offsets: Tensor,
    centres: Tensor,
    centre_offsets: Tensor,
    radius: float,
    num_samples: int,
    *,
    min_radius: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Find up to `num_samples` points round every centre.

    Args:
        xyz: (N, 3) points, metres; distances are taken in float32.
        offsets: (B + 1,) int64, first point of every scene, then N.
        centres: (M, 3) metres.
        centre_offsets: (B + 1,) int64, first centre of every scene, then M.
        radius: outer radius, metres, itself outside.
        num_samples: slots a centre has.
        min_radius: inner radius, metres, itself inside. A point exactly on the centre always counts.
        backend: auto, torch or numba.

    Returns:
        (M, num_samples) int64 rows of `xyz`; -1 in all slots of a centre without any (a centre that is one of the
        points always has one).

    Raises:
        ValueError: wrong shapes, offsets, radii or backend.
    """
    shells = [Shell(min_radius, radius, num_samples)]
    return query_shells(xyz, offsets, centres, centre_offsets, shells, backend=backend)[0].index


def query_shells(
    xyz: Tensor,
    offsets: Tensor,
    centres: Tensor,
    centre_offsets: Tensor,
    shells: Sequence[Shell],
    *,
    backend: str = "auto",
) -> list[Neighbours]:
    """`ball_query` for several shells in one pass over the points, and how many points each one found."""
    if xyz.ndim != 2 or xyz.shape[1] != 3 or centres.ndim != 2 or centres.shape[1] != 3:
        raise ValueError(f"xyz and centres must be (., 3), got {tuple(xyz.shape)} and {tuple(centres.shape)}")
    if len(offsets) != len(centre_offsets):
        raise ValueError(f"points are of {len(offsets) - 1} scenes and centres of {len(centre_offsets) - 1}")
    for shell in shells:
        if not 0 <= shell.min_radius < shell.radius or shell.num_samples < 1:
            raise ValueError(f"a shell needs 0 <= min_radius < radius and num_samples >= 1, got {shell}")
    starts = check_offsets(offsets, len(xyz), "offsets")
    centre_starts = check_offsets(centre_offsets, len(centres), "centre_offsets")
    run = _query_numba if use_numba(backend, xyz, centres) else _query_torch
    return run(xyz.detach().float(), starts, centres.detach().float(), centre_starts, shells)


def group_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` (N, C) at `index` (M, K) as (M, K, C), zeros where the index is -1. Differentiable."""
    missing = index < 0
    if len(values) == 0:
        return values.new_zeros(*index.shape, values.shape[1])
    rows = values.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, values.shape[1])
    return rows.masked_fill(missing[..., None], 0) if missing.any() else rows


def _square(radius: float) -> float:
    """Radius² as float32 arithmetic gives it, so that both backends compare with the same number."""
    return float(np.float32(radius) * np.float32(radius))


def _query_torch(
    xyz: Tensor, starts: list[int], centres: Tensor, centre_starts: list[int], shells: Sequence[Shell]
) -> list[Neighbours]:
    """Reference: every centre against every point of its scene."""
    found = [
        Neighbours(
            torch.full((len(centres), shell.num_samples), -1, dtype=torch.int64, device=xyz.device),
            torch.zeros(len(centres), dtype=torch.int64, device=xyz.device),
        )
        for shell in shells
    ]
    for (start, stop), (first, last) in zip(pairwise(starts), pairwise(centre_starts), strict=True):
        num_points = stop - start
        if num_points == 0:
            continue
        step = max(1, _REFERENCE_PAIRS // num_points)
        position = torch.arange(num_points, device=xyz.device)
        for begin in range(first, last, step):
            rows = slice(begin, min(begin + step, last))
            squares = (centres[rows, None, :] - xyz[None, start:stop, :]).square()
            squared = squares[..., 0] + squares[..., 1] + squares[..., 2]
            for shell, (index, count) in zip(shells, found, strict=True):
                inside = (squared >= _square(shell.min_radius)) & (squared < _square(shell.radius)) | (squared == 0)
                order = torch.where(inside, position, num_points)
                order = order.topk(min(shell.num_samples, num_points), dim=1, largest=False, sorted=True).values
                hit = order < num_points
                order = torch.where(hit, order + start, torch.where(hit[:, :1], order[:, :1] + start, -1))
                index[rows] = order[:, :1]
                index[rows, : order.shape[1]] = order
                count[rows] = hit.sum(dim=1)
    return found


def _query_numba(
    xyz: Tensor, starts: list[int], centres: Tensor, centre_starts: list[int], shells: Sequence[Shell]
) -> list[Neighbours]:
    columns = xyz.t().contiguous().numpy()
    centre_rows = centres.contiguous().numpy()
    low = np.array([_square(shell.min_radius) for shell in shells], dtype=np.float32)
    high = np.array([_square(shell.radius) for shell in shells], dtype=np.float32)
    slots = np.cumsum([0, *(shell.num_samples for shell in shells)])
    index = np.empty((len(centres), slots[-1]), dtype=np.int64)
    count = np.empty((len(centres), len(shells)), dtype=np.int64)
    step = max(256, -(-len(centres) // max(1, torch.get_num_threads())))

    def task(start: int, stop: int, rows: slice):
        own = np.ascontiguousarray(columns[:, start:stop])
        return lambda: _query_centres(own, start, centre_rows[rows], low, high, slots, index[rows], count[rows])

    run_tasks(
        [
            task(start, stop, slice(begin, min(begin + step, last)))
            for (start, stop), (first, last) in zip(pairwise(starts), pairwise(centre_starts), strict=True)
            for begin in range(first, last, step)
        ]
    )
    all_index, all_count = torch.from_numpy(index), torch.from_numpy(count)
    return [Neighbours(all_index[:, a:b], all_count[:, s]) for s, (a, b) in enumerate(pairwise(slots.tolist()))]


@njit(cache=True, nogil=True)
def _query_centres(columns, first_row, centres, low, high, slots, index, count):
    """Centres of one scene. Distances are taken a block at a time; most blocks hold nothing near and are left at once.
    The bits of non-negative floats are ordered like the floats, and only their minimum vectorises."""
    xs, ys, zs = columns[0], columns[1], columns[2]
    num_points = len(xs)
    num_shells = len(low)
    squared = np.empty(_BLOCK, np.float32)
    bits = squared.view(np.int32)
    limit = np.empty(1, np.float32)
    limit[0] = high.max()
    limit_bits = limit.view(np.int32)[0]
    for row in range(len(centres)):
        x, y, z = centres[row, 0], centres[row, 1], centres[row, 2]
        found = count[row]
        found[:] = 0
        open_shells = num_shells
        for start in range(0, num_points, _BLOCK):
            size = min(_BLOCK, num_points - start)
            bx, by, bz = xs[start : start + size], ys[start : start + size], zs[start : start + size]
            smallest = _INFINITY_BITS
            for i in range(size):
                squared[i] = (x - bx[i]) * (x - bx[i]) + (y - by[i]) * (y - by[i]) + (z - bz[i]) * (z - bz[i])
            for i in range(size):
                smallest = min(smallest, bits[i])
            if smallest >= limit_bits:
                continue
            for i in range(size):
                if bits[i] >= limit_bits:
                    continue
                for s in range(num_shells):
                    room = slots[s + 1] - slots[s]
                    if found[s] < room and ((low[s] <= squared[i] and squared[i] < high[s]) or squared[i] == 0):
                        index[row, slots[s] + found[s]] = first_row + start + i
                        found[s] += 1
                        if found[s] == room:
                            open_shells -= 1
            if open_shells == 0:
                break
        for s in range(num_shells):
            filler = index[row, slots[s]] if found[s] > 0 else -1
            for slot in range(slots[s] + found[s], slots[s + 1]):
                index[row, slot] = filler
