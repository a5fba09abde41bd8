"""Sparse convolution in plain torch, on any device and in any floating dtype.

For every kernel offset: gather the source rows, multiply by that offset's matrix, add to the target rows. The gathered
rows are taken again in the backward pass instead of being kept, which would be most of the memory. No target stands
twice in an offset and the offsets follow each other, so sums have one order: results repeat bit for bit at a fixed
number of threads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simipu3d.encoders.sparse.rulebook import ConvGeometry, Pairs, torch_rulebook
from simipu3d.encoders.sparse.tensor import SparseTensor

NAME = "torch"


def convolve(x: SparseTensor, weight: Tensor, geometry: ConvGeometry) -> SparseTensor:
    """Convolve without bias.

    Args:
        x: features (V, C) of the weight's dtype.
        weight: (C', kz, ky, kx, C), the layout of spconv 2, with as many kernel axes as the grid has.
        geometry: kernel and key.

    Returns:
        the convolved tensor; its sites are sorted.
    """
    book = torch_rulebook(x, geometry, NAME)
    matrices = weight.flatten(1, -2).permute(1, 2, 0)  # (offsets, C, C')
    inverse = geometry.kind == "inverse"
    pairs = tuple((target, source) for source, target in book.pairs) if inverse else book.pairs
    sites, shape = (book.source_bzyx, book.source_shape) if inverse else (book.target_bzyx, book.target_shape)
    features = _GatherMultiplyAdd.apply(x.features, matrices, pairs, len(sites))
    return SparseTensor(features, sites, shape, x.batch_size, x.rulebooks)


class _GatherMultiplyAdd(torch.autograd.Function):
    """features (V, C), matrices (K, C, C') -> (V', C'). Half precision adds up in float32."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, matrices: Tensor, pairs: Pairs, num_targets: int) -> Tensor:
        ctx.save_for_backward(features, matrices)
        ctx.pairs = pairs
        return _gather_multiply_add(features, matrices, pairs, num_targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features, matrices = ctx.saved_tensors
        grad = grad.contiguous()
        features_grad = matrices_grad = None
        if ctx.needs_input_grad[0]:
            back = tuple((target, source) for source, target in ctx.pairs)
            features_grad = _gather_multiply_add(grad, matrices.transpose(1, 2), back, len(features))
        if ctx.needs_input_grad[1]:
            matrices_grad = torch.zeros_like(matrices)
            for offset, (source, target) in enumerate(ctx.pairs):
                if len(source):
                    matrices_grad[offset] = _take(features, source, source is target).T @ _take(
                        grad, target, source is target
                    )
        return features_grad, matrices_grad, None, None


def _take(rows: Tensor, index: Tensor, is_identity: bool) -> Tensor:
    """rows[index]; the centre of a submanifold kernel pairs every row with itself and needs no copy."""
    return rows if is_identity else rows.index_select(0, index)


def _gather_multiply_add(features: Tensor, matrices: Tensor, pairs: Pairs, num_targets: int) -> Tensor:
    sum_dtype = torch.promote_types(features.dtype, torch.float32)
    total = torch.zeros(num_targets, matrices.shape[2], dtype=sum_dtype, device=features.device)
    for matrix, (source, target) in zip(matrices, pairs, strict=True):
        if len(source):
            product = (_take(features, source, source is target) @ matrix).to(sum_dtype)
            total = total.add_(product) if source is target else total.index_add_(0, target, product)
    return total.to(features.dtype)
