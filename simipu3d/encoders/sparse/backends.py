"""Who computes a sparse convolution: spconv, or plain torch?"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from simipu3d.encoders.sparse import spconv_backend, torch_backend
from simipu3d.encoders.sparse.rulebook import ConvGeometry
from simipu3d.encoders.sparse.tensor import SparseTensor
from simipu3d.errors import UserError

logger = logging.getLogger(__name__)

SparseBackend = Literal["auto", "spconv", "torch"]
Convolve = Callable[[SparseTensor, Tensor, ConvGeometry], SparseTensor]


def check_backend(name: SparseBackend) -> None:
    """Raise `UserError` when the configuration asks for a package that is not there. `auto` and `torch` always work."""
    problem = spconv_problem(on_cuda=False) if name == "spconv" else None
    if problem:
        raise UserError(_needs_spconv(problem))


def choose_backend(name: SparseBackend, device: torch.device) -> Convolve:
    """The convolution for tensors on `device`; `auto` takes spconv on CUDA where it can, and says once what it took."""
    on_cuda = device.type == "cuda"
    if name == "torch":
        return torch_backend.convolve
    if name == "spconv":
        problem = spconv_problem(on_cuda)
        if problem:
            raise UserError(_needs_spconv(problem))
        return spconv_backend.convolve
    problem = spconv_problem(on_cuda) if on_cuda else "on a CPU spconv is right with one thread only"
    _say_once(f"sparse_backend auto: torch on {device.type} ({problem})" if problem else "sparse_backend auto: spconv")
    return torch_backend.convolve if problem else spconv_backend.convolve


@cache
def spconv_problem(on_cuda: bool) -> str | None:
    """Why spconv cannot be used, None where it can."""
    try:
        import spconv.pytorch  # noqa: F401
        from spconv.cppconstants import CPU_ONLY_BUILD
    except (ImportError, OSError) as error:
        return f"spconv cannot be imported: {error}"
    return "the installed spconv is built for CPUs only" if on_cuda and CPU_ONLY_BUILD else None


def _needs_spconv(problem: str) -> str:
    return (
        f"sparse_backend: spconv: {problem}; pip install 'simipu3d[cu126]' (without an NVIDIA GPU 'simipu3d[cpu]'), "
        "or use sparse_backend: torch"
    )


_say_once = cache(logger.info)
