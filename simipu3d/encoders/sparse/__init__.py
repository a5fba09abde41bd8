"""Sparse convolution on voxel grids: layers, and two backends (spconv, torch) behind them."""

from simipu3d.encoders.sparse.backends import SparseBackend
from simipu3d.encoders.sparse.layers import (
    SiteBatchNorm,
    SparseConv3d,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
)
from simipu3d.encoders.sparse.tensor import SparseTensor

__all__ = [
    "SiteBatchNorm",
    "SparseBackend",
    "SparseConv3d",
    "SparseInverseConv3d",
    "SparseModule",
    "SparseSequential",
    "SparseTensor",
    "SubMConv3d",
]
