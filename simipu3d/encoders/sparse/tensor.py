"""What flows between sparse layers? Features on the active cells of a grid.

The grid has D axes: (z, y, x) for voxels, (y, x) for pillars, batch first; what is called `..._bzyx` has as many columns
as the grid has axes, and one. Shapes: V active sites in the whole batch, C channels.
"""

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

Triple = tuple[int, int, int]
Cells = tuple[int, ...]
"""A number an axis: z, y, x or y, x."""


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features on the active sites of a batch of grids.

    Attributes:
        features: (V, C).
        voxel_bzyx: (V, 1 + D) int64, unique and sorted lexicographically, inside `spatial_shape`. The layers compare this
            tensor by identity, so what changes only the features keeps it (`with_features`).
        spatial_shape: number of cells along the D axes.
        batch_size: number of grids; a grid may hold no site.
        rulebooks: what the layers found out about neighbours, by (backend, indice key); all tensors of a pass share it.
    """

    features: Tensor
    voxel_bzyx: Tensor
    spatial_shape: Cells
    batch_size: int
    rulebooks: dict[tuple[str, str], Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.voxel_bzyx)

    def with_features(self, features: Tensor) -> "SparseTensor":
        """Other features (V, C') on the same sites."""
        return replace(self, features=features)

    def dense(self) -> Tensor:
        """(B, C, nz, ny, nx), on a grid of two axes (B, C, ny, nx); zero where no site is active."""
        channels = self.features.shape[1]
        flat = self.features.new_zeros(self.batch_size * prod(self.spatial_shape), channels)
        flat = flat.index_add(0, linear_key(self.voxel_bzyx, self.spatial_shape), self.features)
        return flat.view(self.batch_size, *self.spatial_shape, channels).movedim(-1, 1).contiguous()


def linear_key(voxel_bzyx: Tensor, spatial_shape: Cells) -> Tensor:
    """(..., 1 + D) cells to (...) int64 numbers in the same (lexicographic) order."""
    key, *columns = voxel_bzyx.unbind(-1)
    for size, column in zip(spatial_shape, columns, strict=True):
        key = key * size + column
    return key


def split_key(key: Tensor, spatial_shape: Cells) -> Tensor:
    """Undo `linear_key`: (...) numbers to (..., 1 + D) cells."""
    columns: list[Tensor] = []
    for size in reversed(spatial_shape):
        columns.insert(0, key % size)
        key = key // size
    return torch.stack([key, *columns], dim=-1)


def find_rows(sorted_keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where numbers stand in an ascending list.

    Args:
        sorted_keys: (V,) int64, ascending.
        wanted: (...) int64.

    Returns:
        rows: (...) int64; meaningless where not found.
        found: (...) bool.
    """
    if len(sorted_keys) == 0:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    rows = torch.searchsorted(sorted_keys, wanted).clamp_(max=len(sorted_keys) - 1)
    return rows, sorted_keys[rows] == wanted
