"""Sparse convolution on voxel and pillar grids: layers, and two backends (spconv, torch) behind them."""

from simipu3d.encoders.sparse.backends import SparseBackend
from simipu3d.encoders.sparse.layers import (
    SiteBatchNorm,
    SparseConv2d,
    SparseConv3d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv2d,
    SubMConv3d,
)
from simipu3d.encoders.sparse.pooling import SparseGlobalPool, SparseMaxPool
from simipu3d.encoders.sparse.tensor import SparseTensor

__all__ = [
    "SiteBatchNorm",
    "SparseBackend",
    "SparseConv2d",
    "SparseConv3d",
    "SparseGlobalPool",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseMaxPool",
    "SparseModule",
    "SparseSequential",
    "SparseTensor",
    "SubMConv2d",
    "SubMConv3d",
]
