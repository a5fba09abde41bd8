"""What does a sparse convolution of spconv or MinkowskiEngine compute from the weights as they lie in a file?

Every output looks its inputs up in a table of the whole grid. Sparse sites are (batch, a, b, c) rows in rising order, in
the order of axes that the target feeds: (z, y, x) or (x, y, z). Shapes: V sites, C channels, K kernel offsets.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Triple = tuple[int, int, int]
ONES: Triple = (1, 1, 1)


def triple(values: Iterable[int]) -> Triple:
    """Three numbers, one an axis."""
    first, second, third = values
    return first, second, third


@dataclass(frozen=True, eq=False)
class Grid:
    """Active sites: cells (V, 4) int64 in rising order, sizes along the three axes, number of scenes."""

    cells: Tensor
    shape: Triple
    batch_size: int

    def rows(self, wanted: Tensor) -> Tensor:
        """Row of each wanted cell (..., 4), -1 where it is not active or outside."""
        sizes = wanted.new_tensor((self.batch_size, *self.shape))
        table = torch.full((prod(sizes.tolist()),), -1, dtype=torch.int64)
        strides = wanted.new_tensor([prod(self.shape[axis:]) for axis in range(3)] + [1])
        table[(self.cells * strides).sum(-1)] = torch.arange(len(self.cells))
        inside = ((wanted >= 0) & (wanted < sizes)).all(-1)
        found = table[(wanted * strides).sum(-1).masked_fill(~inside, 0)]
        return found.masked_fill(~inside, -1)


@dataclass(frozen=True, eq=False)
class PeerTensor:
    """Features (V, C) on a grid; `memory` keeps the finer grids that an inverse convolution returns to."""

    features: Tensor
    grid: Grid
    memory: dict[str, Grid] = field(default_factory=dict)

    def with_features(self, features: Tensor) -> "PeerTensor":
        """Other features on the same sites."""
        return replace(self, features=features)


def gather_add(features: Tensor, rows: Tensor, matrices: Tensor) -> Tensor:
    """sum over k of features[rows[k]] @ matrices[k]; rows (K, V') are -1 where there is no input."""
    total = features.new_zeros(rows.shape[1], matrices.shape[2])
    for matrix, row in zip(matrices, rows, strict=True):
        hit = (row >= 0).nonzero().flatten()
        total.index_add_(0, hit, features.index_select(0, row.index_select(0, hit)) @ matrix)
    return total


def kernel_cells(kernel: Triple) -> Tensor:
    """(K, 3) offsets, the last axis fastest."""
    return torch.tensor(list(itertools.product(*(range(size) for size in kernel))))


class PeerConv(nn.Module):
    """spconv's SubMConv3d, SparseConv3d or SparseInverseConv3d, its `weight` in the layout of spconv 1.x or 2.x.

    Args:
        kind: submanifold, strided or inverse.
        widths: channels in and out.
        kernel, stride, padding: along the three axes.
        key: which strided layer an inverse one returns from.
        layout: spconv1 (ka, kb, kc, in, out) or spconv2 (out, ka, kb, kc, in).
        bias: whether there is one.
    """

    def __init__(
        self,
        kind: str,
        widths: tuple[int, int],
        *,
        kernel: Triple = (3, 3, 3),
        stride: Triple = ONES,
        padding: Triple = ONES,
        key: str = "",
        layout: str = "spconv2",
        bias: bool = False,
    ):
        super().__init__()
        self.kind, self.kernel, self.stride, self.padding, self.key = kind, kernel, stride, padding, key
        self.layout = layout
        shape = (widths[1], *kernel, widths[0]) if layout == "spconv2" else (*kernel, *widths)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(widths[1])) if bias else None

    def matrices(self) -> Tensor:
        """(K, in, out)."""
        if self.layout == "spconv1":
            return self.weight.flatten(0, 2)
        return self.weight.flatten(1, 3).permute(1, 2, 0)

    def forward(self, x: PeerTensor) -> PeerTensor:
        stride, offsets = torch.tensor(self.stride), kernel_cells(self.kernel)[:, None]
        if self.kind == "submanifold":
            grid, middle = x.grid, torch.tensor(self.kernel) // 2
            cells = grid.cells[:, 1:] + offsets - middle
        elif self.kind == "strided":
            x.memory[self.key] = x.grid
            grid = self._reached(x.grid)
            cells = grid.cells[:, 1:] * stride + offsets - torch.tensor(self.padding)
        else:
            grid = x.memory[self.key]
            reached = grid.cells[:, 1:] + torch.tensor(self.padding) - offsets
            outside = (reached % stride != 0).any(-1, keepdim=True)
            cells = (reached // stride).masked_fill(outside, -1)
        batch = grid.cells[None, :, :1].expand(len(offsets), -1, -1)
        rows = x.grid.rows(torch.cat([batch, cells], dim=-1))
        features = gather_add(x.features, rows, self.matrices())
        features = features if self.bias is None else features + self.bias
        return PeerTensor(features, grid, x.memory)

    def _reached(self, grid: Grid) -> Grid:
        """Every cell whose kernel meets an active site."""
        occupied = torch.zeros(grid.batch_size, *grid.shape)
        occupied[tuple(grid.cells.T)] = 1
        pads = [pad for size in reversed(self.padding) for pad in (size, size)]
        reached = F.max_pool3d(F.pad(occupied[:, None], pads), self.kernel, self.stride)[:, 0]
        return Grid(reached.nonzero(), triple(reached.shape[1:]), grid.batch_size)


class OneByOne(nn.Module):
    """spconv's SubMConv3d of size 1, which reads its (out, 1, 1, 1, in) buffer as an (in, out) matrix."""

    def __init__(self, widths: tuple[int, int], bias: bool = False):
        super().__init__()
        self.widths = widths
        self.weight = nn.Parameter(torch.zeros(widths[1], 1, 1, 1, widths[0]))
        self.bias = nn.Parameter(torch.zeros(widths[1])) if bias else None

    def forward(self, x: PeerTensor) -> PeerTensor:
        features = x.features @ self.weight.reshape(self.widths)
        return x.with_features(features if self.bias is None else features + self.bias)


class Unit(nn.Sequential):
    """Layers in a row; those that are no sparse convolution work on the features."""

    def forward(self, x: PeerTensor) -> PeerTensor:
        for layer in self:
            features_only = isinstance(layer, nn.BatchNorm1d | nn.ReLU | nn.Identity)
            x = x.with_features(layer(x.features)) if features_only else layer(x)
        return x


class Residual(nn.Module):
    """Two submanifold convolutions `conv1`, `conv2` with `bn1`, `bn2`, and a way round them: an optional projection under
    the name `proj`."""

    def __init__(
        self, widths: tuple[int, int], eps: float, layout: str, bias: bool = False, proj: nn.Module | None = None
    ):
        super().__init__()
        self.conv1 = PeerConv("submanifold", widths, layout=layout, bias=bias)
        self.bn1 = nn.BatchNorm1d(widths[1], eps=eps)
        self.conv2 = PeerConv("submanifold", (widths[1], widths[1]), layout=layout, bias=bias)
        self.bn2 = nn.BatchNorm1d(widths[1], eps=eps)
        if proj is not None:
            self.proj = proj

    def forward(self, x: PeerTensor) -> PeerTensor:
        way_round = self.proj(x).features if hasattr(self, "proj") else x.features
        inner = self.conv1(x)
        inner = self.conv2(inner.with_features(self.bn1(inner.features).relu()))
        return inner.with_features((self.bn2(inner.features) + way_round).relu())


def plant(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module under a dotted name, with containers on the way; returns it."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
    return module
