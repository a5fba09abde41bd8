"""Which cell of a grid does each point fall into, and what is the mean point of a cell?

Cells and ranges as in OpenPCDet: a grid of round((max - min) / size) cells an axis, cell = floor((p - min) / size) in
float32, points outside the grid belong to none. All points of a cell count; there is no limit on points or voxels.

Shapes: N points of B scenes, V occupied cells, F further columns. Metres.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from simipu3d.ops.backend import use_numba


def grid_size(voxel_size: Sequence[float], point_range: Sequence[float]) -> tuple[int, int, int]:
    """Cells along x, y, z.

    Args:
        voxel_size: edges along x, y, z, metres.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max, metres.

    Raises:
        ValueError: not 3 and 6 numbers, edges that are not positive, or an axis without a cell.
    """
    if len(voxel_size) != 3 or len(point_range) != 6 or min(voxel_size) <= 0:
        raise ValueError(f"need 3 positive edges and 6 bounds, got {tuple(voxel_size)} and {tuple(point_range)}")
    low, high = point_range[:3], point_range[3:]
    x, y, z = (round((b - a) / edge) for a, b, edge in zip(low, high, voxel_size, strict=True))
    if min(x, y, z) < 1:
        raise ValueError(f"a voxel of {tuple(voxel_size)} m leaves an axis of {tuple(point_range)} without a cell")
    return x, y, z


def voxelize(
    points: Tensor,
    batch_index: Tensor,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort points into cells and average them.

    Args:
        points: (N, 3 + F) float32, x, y, z first, finite.
        batch_index: (N,) int64, scene of every point, in any order.
        voxel_size: edges along x, y, z, metres.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max, metres.
        backend: auto, torch or numba.

    Returns:
        voxel_bzyx: (V, 4) int64 occupied cells as (scene, z, y, x), in rising order.
        features: (V, 3 + F) mean of all columns of a cell's points, summed in float64; in the type of `points`.
        point_to_voxel: (N,) int64 row of each point's voxel, -1 outside the grid.

    Raises:
        ValueError: wrong shapes, voxel size, range or backend.
    """
    cells_x, cells_y, cells_z = grid_size(voxel_size, point_range)
    if points.ndim != 2 or points.shape[1] < 3 or batch_index.shape != points.shape[:1]:
        raise ValueError(
            f"points must be (N, 3 + F) with N scenes, got {tuple(points.shape)}, {tuple(batch_index.shape)}"
        )
    xyz = points[:, :3].detach().float()
    cell = torch.floor((xyz - xyz.new_tensor(point_range[:3])) / xyz.new_tensor(voxel_size))
    inside = ((cell >= 0) & (cell < cell.new_tensor([cells_x, cells_y, cells_z]))).all(dim=1)
    x, y, z = cell[inside].long().unbind(1)
    key = ((batch_index[inside] * cells_z + z) * cells_y + y) * cells_x + x
    run = _average_numba if use_numba(backend, points, batch_index) else _average_torch
    keys, means, voxel_of_inside = run(key, points.detach()[inside].double())
    point_to_voxel = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    point_to_voxel[inside] = voxel_of_inside
    zyx: list[Tensor] = []
    for cells in (cells_x, cells_y, cells_z):
        zyx.insert(0, keys % cells)
        keys = keys.div(cells, rounding_mode="floor")
    return torch.stack([keys, *zyx], dim=1), means.to(points.dtype), point_to_voxel


def _average_torch(key: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys, voxel = torch.unique(key, sorted=True, return_inverse=True)
    sums = columns.new_zeros(len(keys), columns.shape[1]).index_add_(0, voxel, columns)
    counts = torch.bincount(voxel, minlength=len(keys))
    return keys, sums / counts[:, None], voxel


def _average_numba(key: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = key.numpy()
    order = np.argsort(keys, kind="stable")
    voxel = np.empty(len(keys), dtype=np.int64)
    means = np.zeros(columns.shape)
    unique = np.empty(len(keys), dtype=np.int64)
    num = _average_sorted(keys, order, columns.contiguous().numpy(), voxel, unique, means)
    return torch.from_numpy(unique[:num].copy()), torch.from_numpy(means[:num].copy()), torch.from_numpy(voxel)


@njit(cache=True, nogil=True)
def _average_sorted(keys, order, columns, voxel, unique, means):
    """Points of one cell stand together in `order`, in the order of their rows: the sums round as index_add_'s do."""
    num = 0
    count = 0
    for place in range(len(order)):
        row = order[place]
        if place == 0 or keys[row] != unique[num - 1]:
            if num > 0:
                means[num - 1] /= count
            unique[num] = keys[row]
            num += 1
            count = 0
        voxel[row] = num - 1
        count += 1
        for column in range(columns.shape[1]):
            means[num - 1, column] += columns[row, column]
    if num > 0:
        means[num - 1] /= count
    return num
