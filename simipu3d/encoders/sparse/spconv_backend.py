"""Sparse convolution by spconv 2 with our weights, rows in our order. Meant for CUDA, right on a CPU too.

spconv's layer is only a recipe here: it is built without memory and called with our weight in place of its own. It puts
the sites of a strided convolution in an order of its own; they are sorted again, and an inverse one undoes that.

On a CPU spconv 2.3.8 needs care: its scatter-add races between threads, and its backward asks for a CUDA stream. Both
passes run on one thread there, with that question answered.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from simipu3d.encoders.sparse import torch_backend
from simipu3d.encoders.sparse.rulebook import ConvGeometry, Rulebook, cached_rulebook
from simipu3d.encoders.sparse.tensor import SparseTensor, linear_key, split_key

NAME = "spconv"


class _SpconvPairs(NamedTuple):
    """spconv's own rulebook, and which of its target rows each of our sorted ones is (None: the same order)."""

    indice_data: Any
    order: Tensor | None


def convolve(x: SparseTensor, weight: Tensor, geometry: ConvGeometry) -> SparseTensor:
    """Convolve without bias; arguments and result as of `torch_backend.convolve`.

    That one also does what has no site, and all 1x1 kernels: spconv reads the weight of such a layer as (in, out), the
    other way round than any other.
    """
    if len(x) == 0 or prod(geometry.kernel_size) == 1:
        return torch_backend.convolve(x, weight, geometry)
    import spconv.pytorch as spconv

    book = cached_rulebook(x, geometry, NAME)
    # Contiguous, because spconv reads the indices as if they were: columns of a transposed tensor give wrong sites.
    features, indices, known = x.features, x.voxel_bzyx.int().contiguous(), {}
    if geometry.kind == "inverse":
        assert book is not None
        data, order = book.pairs
        features, indices = features.index_select(0, torch.argsort(order)), data.out_indices
        known = {geometry.indice_key: data}
    elif geometry.kind == "submanifold" and book is not None:
        known = {geometry.indice_key: book.pairs.indice_data}
    recipe = _recipe(geometry, weight.shape[-1], weight.shape[0])
    outputs = []

    def call(features: Tensor, weight: Tensor) -> Tensor:
        tensor = spconv.SparseConvTensor(features, indices, list(x.spatial_shape), x.batch_size, indice_dict=known)
        outputs.append(functional_call(recipe, {"weight": weight}, (tensor,)))
        return outputs[-1].features

    # spconv knows no bfloat16; under autocast its own casts would make that float16, whose gradients need a scaler.
    dtype = torch.float32 if features.dtype == torch.bfloat16 else features.dtype
    with torch.autocast(features.device.type, enabled=False):
        arguments = features.to(dtype).contiguous(), weight.to(dtype).contiguous()
        result = call(*arguments) if features.is_cuda else _OnOneThread.apply(*arguments, call)
    result = result.to(x.features.dtype)
    if geometry.kind == "inverse":
        assert book is not None
        return SparseTensor(result, book.source_bzyx, book.source_shape, x.batch_size, x.rulebooks)
    book = _keep_rulebook(x, geometry, outputs[-1], book)
    if book.pairs.order is not None:
        result = result.index_select(0, book.pairs.order)
    return SparseTensor(result, book.target_bzyx, book.target_shape, x.batch_size, x.rulebooks)


def _keep_rulebook(x: SparseTensor, geometry: ConvGeometry, output: Any, book: Rulebook | None) -> Rulebook:
    """File what spconv found under the layer's key. A strided layer that runs again keeps its first run's sites."""
    if geometry.kind == "submanifold":
        if book is not None:
            return book
        sites, shape, order = x.voxel_bzyx, x.spatial_shape, None
    else:
        shape = geometry.output_shape(x.spatial_shape)
        keys, order = torch.sort(linear_key(output.indices.long(), shape))
        sites = split_key(keys, shape) if book is None else book.target_bzyx
    pairs = _SpconvPairs(output.indice_dict[geometry.indice_key], order)
    book = Rulebook(geometry, x.voxel_bzyx, x.spatial_shape, sites, shape, pairs)
    x.rulebooks[NAME, geometry.indice_key] = book
    return book


@cache
def _recipe(geometry: ConvGeometry, in_channels: int, out_channels: int) -> nn.Module:
    """spconv's layer of that geometry, without weights. Always in training mode: the other has no gradient on CUDA."""
    from spconv.pytorch.conv import SparseConvolution

    with torch.device("meta"):  # no memory, and no draw from the random generators
        return SparseConvolution(
            len(geometry.kernel_size),
            in_channels,
            out_channels,
            list(geometry.kernel_size),
            list(geometry.stride),
            list(geometry.padding),
            bias=False,
            subm=geometry.kind == "submanifold",
            inverse=geometry.kind == "inverse",
            indice_key=geometry.indice_key,
        ).requires_grad_(False)


@contextmanager
def _cpu_guard() -> Iterator[None]:
    """One thread, no autocast (the backward pass may run under it, too), and stream 0 for whoever asks for one."""
    from spconv.pytorch import ops

    num_threads, get_current_stream = torch.get_num_threads(), ops.get_current_stream
    torch.set_num_threads(1)
    ops.get_current_stream = lambda: 0
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        ops.get_current_stream = get_current_stream
        torch.set_num_threads(num_threads)


class _OnOneThread(torch.autograd.Function):
    """call(features, weight), with forward and backward inside `_cpu_guard`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        inputs = [
            t.detach().requires_grad_(n) for t, n in zip((features, weight), ctx.needs_input_grad[:2], strict=True)
        ]
        with torch.enable_grad(), _cpu_guard():
            output = call(*inputs)
        ctx.inner = inputs, output
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, output = ctx.inner
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        with _cpu_guard():
            grads = iter(torch.autograd.grad(output, wanted, grad.contiguous(), retain_graph=True))
        features_grad, weight_grad = (next(grads) if tensor.requires_grad else None for tensor in inputs)
        return features_grad, weight_grad, None
