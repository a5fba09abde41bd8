"""What flows between sparse layers? Features on the active cells of a voxel grid.

Axis order is (z, y, x), batch first. Shapes: V active sites in the whole batch, C channels.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Triple = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features on the active sites of a batch of grids.

    Attributes:
        features: (V, C).
        voxel_bzyx: (V, 4) int64, unique and sorted lexicographically, inside `spatial_shape`. The layers compare this
            tensor by identity, so what changes only the features keeps it (`with_features`).
        spatial_shape: number of cells along z, y, x.
        batch_size: number of grids; a grid may hold no site.
        rulebooks: what the layers found out about neighbours, by (backend, indice key); all tensors of a pass share it.
    """

    features: Tensor
    voxel_bzyx: Tensor
    spatial_shape: Triple
    batch_size: int
    rulebooks: dict[tuple[str, str], Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.voxel_bzyx)

    def with_features(self, features: Tensor) -> "SparseTensor":
        """Other features (V, C') on the same sites."""
        return replace(self, features=features)

    def dense(self) -> Tensor:
        """(B, C, nz, ny, nx), zero where no site is active."""
        nz, ny, nx = self.spatial_shape
        channels = self.features.shape[1]
        flat = self.features.new_zeros(self.batch_size * nz * ny * nx, channels)
        flat = flat.index_add(0, linear_key(self.voxel_bzyx, self.spatial_shape), self.features)
        return flat.view(self.batch_size, nz, ny, nx, channels).permute(0, 4, 1, 2, 3).contiguous()


def linear_key(voxel_bzyx: Tensor, spatial_shape: Triple) -> Tensor:
    """(..., 4) cells to (...) int64 numbers in the same (lexicographic) order."""
    nz, ny, nx = spatial_shape
    batch, z, y, x = voxel_bzyx.unbind(-1)
    return ((batch * nz + z) * ny + y) * nx + x


def split_key(key: Tensor, spatial_shape: Triple) -> Tensor:
    """Undo `linear_key`: (...) numbers to (..., 4) cells."""
    nz, ny, nx = spatial_shape
    return torch.stack((key // (nz * ny * nx), key // (ny * nx) % nz, key // nx % ny, key % nx), dim=-1)


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
