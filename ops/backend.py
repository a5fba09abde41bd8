"""Which implementation of a kernel runs, and on how many threads?

Every kernel knows the backends `torch` (the reference, any device) and `numba` (CPU tensors); `auto` takes numba for
CPU tensors and the reference elsewhere.

The numba kernels release the GIL and are handed to plain Python threads, a scene or a range of rows each. Numba's own
parallel loops are not used: their OpenMP layer ends the process when a data worker forks after it was started.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "numba")


def use_numba(backend: str, *tensors: Tensor) -> bool:
    """Whether the numba kernel runs for these tensors.

    Raises:
        ValueError: an unknown backend, or numba asked for where a tensor is not on the CPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}")
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if backend == "numba" and not on_cpu:
        raise ValueError("backend numba runs on CPU tensors only; use auto or torch")
    return backend != "torch" and on_cpu


def run_tasks(tasks: Sequence[Callable[[], None]]) -> None:
    """Run independent tasks that release the GIL, on at most as many threads as torch uses."""
    workers = min(len(tasks), torch.get_num_threads())
    if workers <= 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


def check_offsets(offsets: Tensor, num_rows: int, name: str) -> list[int]:
    """The (B + 1,) row offsets of a ragged batch as integers.

    Raises:
        ValueError: they do not rise from 0 to the number of rows.
    """
    values = [int(value) for value in offsets.tolist()]
    if not values or values[0] != 0 or values[-1] != num_rows or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"{name} must rise from 0 to the number of rows, {num_rows}; got {values}")
    return values


def offsets_from_batch_index(batch_index: Tensor, num_scenes: int) -> Tensor:
    """(B + 1,) int64 row offsets of an ascending (N,) batch index, on its device."""
    counts = torch.bincount(batch_index, minlength=num_scenes)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def batch_index_from_offsets(offsets: Tensor) -> Tensor:
    """(N,) int64 scene of every row, from (B + 1,) row offsets, on their device."""
    scenes = torch.arange(len(offsets) - 1, device=offsets.device)
    return scenes.repeat_interleave(offsets.diff())
