"""Which input site meets which output site under which kernel offset?

A rulebook lists these pairs once a level; every layer with the same indice key uses it again. Convolution is
cross-correlation, as in torch: out[o] = sum over k of weight[k] in[o * stride - padding + k].
Kernel offsets are counted in (z, y, x) order, x fastest; a grid may have any number of axes.

Source of the scheme: Graham et al., arXiv:1711.10275.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from simipu3d.encoders.sparse.tensor import Cells, SparseTensor, find_rows, linear_key, split_key

Pairs = tuple[tuple[Tensor, Tensor], ...]
"""For every kernel offset: rows of the source, rows of the target, (P,) int64 each; no target twice in one offset."""


@dataclass(frozen=True)
class ConvGeometry:
    """Everything about a sparse convolution except its channels; numbers an axis are in the order (z, y, x).

    Attributes:
        kind: `submanifold` keeps the sites (odd kernel, stride 1); `strided` activates every cell that its kernel
            reaches; `inverse` goes back from the targets to the sources of the strided one with the same key.
        indice_key: layers with the same key on the same sites share one rulebook.
    """

    kind: Literal["submanifold", "strided", "inverse"]
    kernel_size: Cells
    stride: Cells
    padding: Cells
    indice_key: str

    def __post_init__(self) -> None:
        if self.kind == "submanifold" and any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"a submanifold kernel has a centre, so its size is odd, got {self.kernel_size}")

    def output_shape(self, shape: Cells) -> Cells:
        """Cells along every axis after a strided convolution."""
        sizes = zip(shape, self.kernel_size, self.stride, self.padding, strict=True)
        cells = tuple((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in sizes)
        if min(cells) < 1:
            raise ValueError(f"kernel {self.kernel_size}, padding {self.padding} leaves nothing of a {shape} grid")
        return cells


@dataclass(frozen=True, eq=False)
class Rulebook:
    """The pairs of one convolution, with the sites on both sides.

    Attributes:
        geometry: what it was built for, never an inverse one.
        source_bzyx, target_bzyx: (V, 1 + D), (V', 1 + D) sites; one tensor for a submanifold convolution.
        source_shape, target_shape: the grids.
        pairs: in the form of the backend that built it.
    """

    geometry: ConvGeometry
    source_bzyx: Tensor
    source_shape: Cells
    target_bzyx: Tensor
    target_shape: Cells
    pairs: Any


def cached_rulebook(x: SparseTensor, geometry: ConvGeometry, backend: str) -> Rulebook | None:
    """The rulebook that a layer may use again, None where it has to be built.

    Raises:
        ValueError: the indice key stands for other sites or another kernel, or there is nothing to invert.
    """
    book = x.rulebooks.get((backend, geometry.indice_key))
    if book is None:
        if geometry.kind == "inverse":
            raise ValueError(f"no convolution has run under {geometry.indice_key!r}, so there is nothing to invert")
        return None
    if geometry.kind == "inverse":
        fits = book.geometry.kind == "strided" and book.geometry.kernel_size == geometry.kernel_size
        fits = fits and book.target_bzyx is x.voxel_bzyx
    else:
        fits = book.geometry == geometry and book.source_bzyx is x.voxel_bzyx
    if not fits:
        raise ValueError(
            f"indice key {geometry.indice_key!r} was used for {book.geometry} on other sites or with another kernel; "
            "give this layer a key of its own"
        )
    return book


def torch_rulebook(x: SparseTensor, geometry: ConvGeometry, backend: str) -> Rulebook:
    """The rulebook of a layer in our own form (`Pairs`), from the tensor's cache or built and kept there."""
    book = cached_rulebook(x, geometry, backend)
    if book is None:
        build: Callable[[SparseTensor, ConvGeometry], Rulebook]
        build = _submanifold_rulebook if geometry.kind == "submanifold" else _strided_rulebook
        book = x.rulebooks[backend, geometry.indice_key] = build(x, geometry)
    return book


def _submanifold_rulebook(x: SparseTensor, geometry: ConvGeometry) -> Rulebook:
    """Look every neighbour up in the sorted keys. The second half of the kernel mirrors the first."""
    radius = [size // 2 for size in geometry.kernel_size]
    # With a rim of `radius` empty cells a neighbour outside the grid has a key of its own, and it is nobody's.
    shape = tuple(size + 2 * r for size, r in zip(x.spatial_shape, radius, strict=True))
    keys = linear_key(x.voxel_bzyx + torch.tensor([0, *radius], device=x.voxel_bzyx.device), shape)
    assert bool((keys[1:] > keys[:-1]).all()), "sites must be unique and sorted by batch, z, y, x"
    half = prod(geometry.kernel_size) // 2
    axis_steps = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    steps = [
        sum(offset * step for offset, step in zip(offsets, axis_steps, strict=True))
        for offsets in product(*(range(-r, r + 1) for r in radius))
    ]
    wanted = keys + torch.tensor(steps[:half], dtype=torch.int64, device=keys.device)[:, None]
    rows, found = find_rows(keys, wanted)
    first = _split_by_offset(found, rows[found])
    all_rows = torch.arange(len(x), device=keys.device)
    mirrored = [(target, source) for source, target in reversed(first)]
    pairs = (*first, (all_rows, all_rows), *mirrored)
    return Rulebook(geometry, x.voxel_bzyx, x.spatial_shape, x.voxel_bzyx, x.spatial_shape, pairs)


def _strided_rulebook(x: SparseTensor, geometry: ConvGeometry) -> Rulebook:
    """Every cell that a kernel offset reaches from an active site becomes a target."""
    shape = geometry.output_shape(x.spatial_shape)
    # Both grow by one kernel axis a turn, to (kz, ky, kx, V) in the end.
    key, reached = x.voxel_bzyx[:, 0], torch.ones(len(x), dtype=torch.bool, device=x.voxel_bzyx.device)
    for axis, size in enumerate(shape):
        offsets = torch.arange(geometry.kernel_size[axis], device=key.device)[:, None]
        start = x.voxel_bzyx[:, axis + 1] + geometry.padding[axis] - offsets  # target * stride
        target = torch.div(start, geometry.stride[axis], rounding_mode="floor")
        key = key.unsqueeze(-2) * size + target
        reached = reached.unsqueeze(-2) & (start % geometry.stride[axis] == 0) & (target >= 0) & (target < size)
    key, reached = key.flatten(0, -2), reached.flatten(0, -2)  # (kernel offsets, V)
    target_keys, target_rows = torch.unique(key[reached], sorted=True, return_inverse=True)
    pairs = tuple((source, target) for target, source in _split_by_offset(reached, target_rows))
    return Rulebook(geometry, x.voxel_bzyx, x.spatial_shape, split_key(target_keys, shape), shape, pairs)


def _split_by_offset(hit: Tensor, partner: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(K, V) hits and the (P,) partners of their True entries to, for every offset, (partners, rows)."""
    counts = hit.sum(dim=1).tolist()
    rows = hit.nonzero()[:, 1]
    return list(zip(partner.split(counts), rows.split(counts), strict=True))
