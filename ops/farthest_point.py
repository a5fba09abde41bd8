"""Which rows of a point set cover it best? Farthest point sampling.

Greedy rule (Eldar et al., "The farthest point strategy", 1997; PointNet++, arXiv:1706.02413): start with the first row
of the scene, then always take the row whose distance to the rows taken so far is largest. In metres it is called D-FPS;
over `[xyz, features]`, un-normalised, F-FPS; both halves one after the other, F-FPS first, FS (3DSSD,
arXiv:2002.10187).

Shapes: N rows of D columns in B scenes, concatenated; `offsets` (B + 1,) says where each begins; M rows are taken.
"""

from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

from simipu3d.ops.backend import check_offsets, run_tasks, use_numba

LANES = 16
"""Squared differences of the columns d, d + LANES, d + 2 LANES, ... are added first, then the lanes in their order. The
fixed order makes both backends round alike, while the reference needs few operations even for hundreds of columns."""
_BLOCK = 512
_INFINITY_BITS = np.int32(0x7F800000)
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)


def farthest_point_sample(coordinates: Tensor, offsets: Tensor, num: int, *, backend: str = "auto") -> Tensor:
    """Take `num` rows of every scene by farthest point sampling.

    Distances are squared differences in float32, summed in one fixed order, so the result does not depend on the
    backend. Of equally far rows the lowest is taken; rows at one place are one row to this rule, so a scene with fewer
    places than `num` repeats its first row at the end. No gradient.

    Args:
        coordinates: (N, D) finite numbers, D >= 1; used in float32.
        offsets: (B + 1,) int64, first row of every scene, then N.
        num: rows to take of every scene; a scene of fewer rows gives all of them, in the order of the rule.
        backend: auto, torch or numba.

    Returns:
        (M,) int64 rows of `coordinates`, grouped by scene, in the order they were taken; `sampled_offsets` tells where
        each scene begins.

    Raises:
        ValueError: wrong shapes, offsets or backend.
    """
    if coordinates.ndim != 2 or coordinates.shape[1] < 1:
        raise ValueError(f"coordinates must be (N, D) with D >= 1, got {tuple(coordinates.shape)}")
    if num < 0:
        raise ValueError(f"num must not be negative, got {num}")
    starts = check_offsets(offsets, len(coordinates), "offsets")
    coordinates = coordinates.detach().float()
    if use_numba(backend, coordinates):
        return _sample_numba(coordinates, starts, num)
    return _sample_torch(coordinates, starts, num)


def sampled_offsets(offsets: Tensor, num: int) -> Tensor:
    """(B + 1,) offsets of what `farthest_point_sample` returns for the same arguments."""
    taken = offsets.diff().clamp(max=num).cumsum(0)
    return torch.cat([taken.new_zeros(1), taken])


def fused_sample(
    xyz: Tensor, features: Tensor, offsets: Tensor, num: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """FS: per scene `num` rows by F-FPS, then `num` rows by D-FPS, drawn independently, so that a row can occur twice.

    Args:
        xyz: (N, 3) metres.
        features: (N, C).
        offsets: (B + 1,) int64.
        num: rows a sampler takes of every scene.
        backend: auto, torch or numba.

    Returns:
        rows (M,) int64 grouped by scene, and their offsets (B + 1,).

    Source: 3DSSD, arXiv:2002.10187, section 3.2.
    """
    both = torch.cat([xyz, features.detach().to(xyz.dtype)], dim=1)
    by_features = farthest_point_sample(both, offsets, num, backend=backend)
    by_distance = farthest_point_sample(xyz, offsets, num, backend=backend)
    taken = sampled_offsets(offsets, num)
    return _concatenate_scenes(by_features, taken, by_distance, taken)


def split_sample(
    xyz: Tensor, features: Tensor, offsets: Tensor, num: int, split: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Per scene `num` rows by F-FPS among its first `split` rows, then `num` rows by D-FPS among the others.

    Meant for rows that `fused_sample` put in order: with `split` = its `num`, each sampler sees its own half.

    Args:
        xyz: (N, 3) metres.
        features: (N, C).
        offsets: (B + 1,) int64.
        num: rows a sampler takes of every scene, at most.
        split: rows of a scene that belong to F-FPS.
        backend: auto, torch or numba.

    Returns:
        rows (M,) int64 grouped by scene, and their offsets (B + 1,).
    """
    sizes = offsets.diff()
    position = torch.arange(len(xyz), device=xyz.device) - offsets[:-1].to(xyz.device).repeat_interleave(
        sizes.to(xyz.device)
    )
    head_sizes = sizes.clamp(max=split)
    parts = []
    for rows, part_sizes, by_features in (
        ((position < split).nonzero().flatten(), head_sizes, True),
        ((position >= split).nonzero().flatten(), sizes - head_sizes, False),
    ):
        part_offsets = torch.cat([part_sizes.new_zeros(1), part_sizes.cumsum(0)])
        places = xyz.index_select(0, rows)
        if by_features:
            places = torch.cat([places, features.detach().to(xyz.dtype).index_select(0, rows)], dim=1)
        taken = farthest_point_sample(places, part_offsets, num, backend=backend)
        parts += [rows.index_select(0, taken), sampled_offsets(part_offsets, num)]
    return _concatenate_scenes(*parts)


def _concatenate_scenes(
    first: Tensor, first_offsets: Tensor, second: Tensor, second_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Two ragged lists of rows, joined scene by scene."""
    scenes = torch.arange(len(first_offsets) - 1, device=first_offsets.device)
    scene = torch.cat([scenes.repeat_interleave(first_offsets.diff()), scenes.repeat_interleave(second_offsets.diff())])
    order = scene.sort(stable=True).indices.to(first.device)
    return torch.cat([first, second]).index_select(0, order), first_offsets + second_offsets


def _sample_torch(coordinates: Tensor, starts: list[int], num: int) -> Tensor:
    """Reference: all scenes at once, padded; one short row of operations for every row that is taken."""
    device = coordinates.device
    first = torch.tensor(starts[:-1], dtype=torch.int64, device=device)
    sizes = torch.tensor(starts, dtype=torch.int64, device=device).diff()
    longest = max((stop - start for start, stop in pairwise(starts)), default=0)
    steps = min(num, longest)
    if steps == 0:
        return first.new_zeros(0)
    position = torch.arange(longest, device=device)
    real = position < sizes[:, None]
    rows = torch.where(real, first[:, None] + position, 0)
    width = -(-coordinates.shape[1] // LANES) * LANES if coordinates.shape[1] > LANES else coordinates.shape[1]
    columns = torch.nn.functional.pad(coordinates, (0, width - coordinates.shape[1]))
    columns = columns.index_select(0, rows.flatten()).view(*rows.shape, width).permute(2, 0, 1).contiguous()
    nearest = torch.where(real, torch.inf, -1.0)
    taken = torch.zeros((len(sizes), steps), dtype=torch.int64, device=device)
    for step in range(1, steps):
        here = taken[:, step - 1].view(1, -1, 1).expand(width, -1, 1)
        difference = columns - columns.gather(2, here)
        nearest = torch.minimum(nearest, _sum_lanes(difference * difference))
        taken[:, step] = nearest.argmax(dim=1)
    keep = torch.arange(steps, device=device) < sizes[:, None]
    return (first[:, None] + taken)[keep]


def _sum_lanes(squares: Tensor) -> Tensor:
    """Sum (D, ...) over its first axis in the order that LANES describes; every device rounds it alike."""
    lanes, *more = squares.split(LANES)
    for chunk in more:
        lanes = lanes + chunk
    total, *others = lanes.unbind(0)
    for lane in others:
        total = total + lane
    return total


def _sample_numba(coordinates: Tensor, starts: list[int], num: int) -> Tensor:
    columns = coordinates.t().contiguous().numpy()
    sizes = [min(num, stop - start) for start, stop in pairwise(starts)]
    ends = np.cumsum([0, *sizes])
    taken = np.empty(ends[-1], dtype=np.int64)

    def task(scene: int):
        own = np.ascontiguousarray(columns[:, starts[scene] : starts[scene + 1]])
        return lambda: _sample_scene(own, starts[scene], taken[ends[scene] : ends[scene + 1]])

    run_tasks([task(scene) for scene, size in enumerate(sizes) if size > 0])
    return torch.from_numpy(taken)


@njit(cache=True, nogil=True)
def _sample_scene(columns, first_row, taken):
    """One scene: one pass over the points for every row taken. Non-negative floats are ordered like their bits, and
    minima and maxima of integers are what the compiler can do for many points at once without reordering any sum."""
    num_points = columns.shape[1]
    nearest = np.full(num_points, _INFINITY_BITS, np.int32)
    total = np.empty(_BLOCK, np.float32)
    lane_sum = np.empty(_BLOCK, np.float32)
    bits = total.view(np.int32)
    chosen = 0
    taken[0] = first_row
    for step in range(1, len(taken)):
        best = np.int32(-1)
        best_start = 0
        for start in range(0, num_points, _BLOCK):
            size = min(_BLOCK, num_points - start)
            _squared_distances(columns, chosen, start, size, total, lane_sum)
            farthest = np.int32(-1)
            block = nearest[start : start + size]
            for i in range(size):
                block[i] = min(block[i], bits[i] & _MAGNITUDE_BITS)
                farthest = max(farthest, block[i])
            if farthest > best:
                best = farthest
                best_start = start
        chosen = best_start
        while nearest[chosen] != best:
            chosen += 1
        taken[step] = first_row + chosen


@njit(cache=True, nogil=True)
def _squared_distances(columns, chosen, start, size, total, lane_sum):
    num_columns = columns.shape[0]
    for lane in range(min(LANES, num_columns)):
        own = columns[lane, start : start + size]
        here = columns[lane, chosen]
        if num_columns <= LANES:
            if lane == 0:
                for i in range(size):
                    total[i] = (own[i] - here) * (own[i] - here)
            else:
                for i in range(size):
                    total[i] += (own[i] - here) * (own[i] - here)
            continue
        for i in range(size):
            lane_sum[i] = (own[i] - here) * (own[i] - here)
        for column in range(lane + LANES, num_columns, LANES):
            own = columns[column, start : start + size]
            here = columns[column, chosen]
            for i in range(size):
                lane_sum[i] += (own[i] - here) * (own[i] - here)
        if lane == 0:
            for i in range(size):
                total[i] = lane_sum[i]
        else:
            for i in range(size):
                total[i] += lane_sum[i]
