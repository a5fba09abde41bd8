"""What is the sum, mean or maximum of the rows that belong together?

One function in front of torch (default; faster than torch-scatter on the CPU), numba and, where it is installed and
asked for, torch-scatter. All are differentiable; torch and numba repeat bit for bit, torch-scatter's sums on CUDA do
not.

Shapes: N rows of C columns, R groups.
"""

from typing import Literal

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.ops.backend import use_numba

Reduction = Literal["sum", "mean", "max"]


def scatter_reduce(values: Tensor, index: Tensor, num_rows: int, reduce: Reduction, *, backend: str = "auto") -> Tensor:
    """Reduce rows that have the same index.

    Args:
        values: (N, C) floating point.
        index: (N,) int64 in [0, num_rows), in any order.
        num_rows: groups.
        reduce: sum, mean or max. The gradient of max goes to the lowest row that holds it.
        backend: auto (torch), torch, numba (CPU tensors) or torch_scatter.

    Returns:
        (num_rows, C); a group without rows gives 0 in all three.

    Raises:
        ValueError: wrong shapes, an index out of range (on CUDA, torch's own assertion), unknown reduce or backend.
        ImportError: torch_scatter is asked for and not installed.
    """
    if values.ndim != 2 or index.shape != values.shape[:1]:
        raise ValueError(f"values must be (N, C) and index (N,), got {tuple(values.shape)} and {tuple(index.shape)}")
    if reduce not in ("sum", "mean", "max"):
        raise ValueError(f"reduce must be sum, mean or max, got {reduce!r}")
    if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < num_rows:
        raise ValueError(f"index must lie in [0, {num_rows}), it reaches from {int(index.min())} to {int(index.max())}")
    if backend == "torch_scatter":
        return _reduce_torch_scatter(values, index, num_rows, reduce)
    numba = backend != "auto" and use_numba(backend, values, index)
    if reduce == "max":
        winner = (_winner_numba if numba else _winner_torch)(values.detach(), index, num_rows)
        return _take_winners(values, winner)
    if numba:
        total = _Sum.apply(values, index, num_rows)
    else:
        total = values.new_zeros(num_rows, values.shape[1]).index_add(0, index, values)
    if reduce == "sum":
        return total
    return total / torch.bincount(index, minlength=num_rows).clamp(min=1).to(values.dtype)[:, None]


def _take_winners(values: Tensor, winner: Tensor) -> Tensor:
    """Entries of `values` at rows `winner` (R, C), 0 where it is -1: every backend's maximum has the same gradient."""
    if len(values) == 0:
        return values.sum() + values.new_zeros(winner.shape)
    return values.gather(0, winner.clamp(min=0)).masked_fill(winner < 0, 0)


def _winner_torch(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    wide = index[:, None].expand_as(values)
    top = values.new_full((num_rows, values.shape[1]), -torch.inf).scatter_reduce(0, wide, values, "amax")
    is_top = (values == top.index_select(0, index)) | values.isnan()
    rows = torch.where(is_top, torch.arange(len(values), device=values.device)[:, None], len(values))
    none = rows.new_full(top.shape, len(values))
    winner = none.scatter_reduce(0, wide, rows, "amin")
    return torch.where(winner < len(values), winner, -1)


def _numpy_rows(values: Tensor) -> NDArray:
    """Half precision, which numba does not know, as float32."""
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).contiguous().numpy()


def _winner_numba(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    rows = _numpy_rows(values)
    winner = np.full((num_rows, values.shape[1]), -1, dtype=np.int32)
    _find_winners(rows, index.contiguous().numpy(), winner, np.zeros(winner.shape, dtype=rows.dtype))
    return torch.from_numpy(winner).long()


@njit(cache=True, nogil=True)
def _find_winners(values, index, winner, top):
    for row in range(len(values)):
        best, held, own = winner[index[row]], top[index[row]], values[row]
        for column in range(len(own)):
            # A NaN wins over numbers and keeps its place, as in torch.
            better = own[column] > held[column] or (own[column] != own[column] and held[column] == held[column])
            wins = better or best[column] < 0
            best[column] = row if wins else best[column]
            held[column] = own[column] if wins else held[column]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        rows = _numpy_rows(values.detach())
        total = np.zeros((num_rows, values.shape[1]), dtype=rows.dtype)
        _add_rows(rows, index.contiguous().numpy(), total)
        return torch.from_numpy(total).to(values.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


@njit(cache=True, nogil=True)
def _add_rows(values, index, total):
    for row in range(len(values)):
        own = total[index[row]]
        for column in range(values.shape[1]):
            own[column] += values[row, column]


def _reduce_torch_scatter(values: Tensor, index: Tensor, num_rows: int, reduce: Reduction) -> Tensor:
    try:
        import torch_scatter
    except ImportError as error:
        raise ImportError(
            "backend torch_scatter needs torch-scatter: pip install 'simipu3d[scatter]' (wheel index in the README); "
            "or use backend torch"
        ) from error
    if reduce == "max":
        winner = torch_scatter.scatter_max(values.detach(), index, dim=0, dim_size=num_rows)[1]
        return _take_winners(values, torch.where(winner < len(values), winner, -1))
    return torch_scatter.scatter(values, index, dim=0, dim_size=num_rows, reduce=reduce)
