"""Which location of one set is the partner of which of another?

Four rules over Euclidean distance, none with a gradient. All take two sets of one scene in one frame, metres, and give
index pairs sorted by the row of the first; ties go to the lowest row (`hungarian`: any optimum).

Shapes: n and m locations, P pairs.
"""

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from simipu3d.ops.backend import use_numba

_REFERENCE_PAIRS = 1 << 23


def hungarian(xyz_a: Tensor, xyz_b: Tensor, source_a: Tensor | None = None, source_b: Tensor | None = None) -> Tensor:
    """One-to-one pairs with the exact minimum of the summed Euclidean distance, in float64.

    Where sources are given, locations of the same source are paired first and the rest is solved without them (2 to 6
    times faster on two views of one scan). By the triangle inequality some optimum contains every such pair, **if** the
    two locations coincide: views of one scan taken back into one frame, where only the last bits differ. Give no
    sources where a point may lie elsewhere in the other set (jittered points, two scans).

    Args:
        xyz_a: (n, 3) metres.
        xyz_b: (m, 3) metres.
        source_a: (n,) int64, which raw point a location is; negative: none. Or None.
        source_b: (m,) int64, or None. Several locations may have one source; the smaller multiplicity is paired.

    Returns:
        (min(n, m), 2) int64 on the CPU.

    Raises:
        ValueError: wrong shapes, NaN or infinity, or only one set has sources.

    Source: SimIPU, arXiv:2112.04680, equation 3; Kuhn, "The Hungarian method", 1955; the solver is SciPy's.
    """
    a, b = _locations(xyz_a, xyz_b)
    pairs = _same_source(_sources(source_a, len(a)), _sources(source_b, len(b)), source_a is None, source_b is None)
    rest_a = np.setdiff1d(np.arange(len(a)), pairs[:, 0], assume_unique=True)
    rest_b = np.setdiff1d(np.arange(len(b)), pairs[:, 1], assume_unique=True)
    rows, columns = linear_sum_assignment(cdist(a[rest_a], b[rest_b]))
    return _sorted_pairs(np.concatenate([pairs, np.stack([rest_a[rows], rest_b[columns]], axis=1)]))


def greedy(
    xyz_a: Tensor,
    xyz_b: Tensor,
    source_a: Tensor | None = None,
    source_b: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Each row of the first set in turn takes the nearest row of the second that is still free.

    Args and errors as in `hungarian`; the sources make no difference.

    Returns:
        (min(n, m), 2) int64 on the CPU: the first rows of `xyz_a` where there are more of them.

    Source: SimIPU, arXiv:2112.04680, ablation of the matching.
    """
    a, b = _locations(xyz_a, xyz_b)
    num = min(len(a), len(b))
    partner = np.empty(num, dtype=np.int64)
    if use_numba(backend, xyz_a, xyz_b):
        _take_free(a, b, partner)
    else:
        free = torch.zeros(len(b), dtype=torch.float64)
        for row in range(num):
            partner[row] = int((_squared_distances(a[row : row + 1], b)[0] + free).argmin())
            free[partner[row]] = torch.inf
    return torch.from_numpy(np.stack([np.arange(num), partner], axis=1))


def nearest(
    xyz_a: Tensor,
    xyz_b: Tensor,
    source_a: Tensor | None = None,
    source_b: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Each row of the first set with the nearest row of the second, which may be taken more than once.

    Args and errors as in `hungarian`; the sources make no difference.

    Returns:
        (n, 2) int64 on the CPU; no pair where the second set is empty.
    """
    a, b = _locations(xyz_a, xyz_b)
    if len(b) == 0:
        return torch.zeros((0, 2), dtype=torch.int64)
    return torch.from_numpy(
        np.stack([np.arange(len(a)), _nearest_rows(a, b, use_numba(backend, xyz_a, xyz_b))], axis=1)
    )


def mutual_nearest(
    xyz_a: Tensor,
    xyz_b: Tensor,
    source_a: Tensor | None = None,
    source_b: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Pairs whose members are each other's nearest (`nearest` both ways).

    Args and errors as in `hungarian`; the sources make no difference.

    Returns:
        (P, 2) int64 on the CPU, P <= min(n, m).
    """
    a, b = _locations(xyz_a, xyz_b)
    if len(a) == 0 or len(b) == 0:
        return torch.zeros((0, 2), dtype=torch.int64)
    numba = use_numba(backend, xyz_a, xyz_b)
    there, back = _nearest_rows(a, b, numba), _nearest_rows(b, a, numba)
    rows = np.flatnonzero(back[there] == np.arange(len(a)))
    return torch.from_numpy(np.stack([rows, there[rows]], axis=1))


def _locations(xyz_a: Tensor, xyz_b: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    for name, xyz in (("xyz_a", xyz_a), ("xyz_b", xyz_b)):
        if xyz.ndim != 2 or xyz.shape[1] != 3:
            raise ValueError(f"{name} must be (n, 3), got {tuple(xyz.shape)}")
    a, b = (np.ascontiguousarray(xyz.detach().cpu().double().numpy()) for xyz in (xyz_a, xyz_b))
    for name, rows in (("xyz_a", a), ("xyz_b", b)):
        if not np.isfinite(rows).all():
            raise ValueError(
                f"{name} holds NaN or infinity (first in row {int((~np.isfinite(rows)).any(axis=1).argmax())})"
            )
    return a, b


def _sources(source: Tensor | None, num: int) -> NDArray[np.int64]:
    if source is None:
        return np.full(num, -1, dtype=np.int64)
    if source.shape != (num,):
        raise ValueError(f"{num} locations need as many sources, got {tuple(source.shape)}")
    return source.cpu().numpy().astype(np.int64)


def _same_source(a: NDArray[np.int64], b: NDArray[np.int64], no_a: bool, no_b: bool) -> NDArray[np.int64]:
    """(P, 2) rows of equal non-negative source; the k-th of a source in one set goes with the k-th in the other."""
    if no_a != no_b:
        raise ValueError("give the sources of both sets or of neither")
    (rows_a, key_a), (rows_b, key_b) = (_occurrences(source, max(len(a), len(b))) for source in (a, b))
    _, first, second = np.intersect1d(key_a, key_b, assume_unique=True, return_indices=True)
    return np.stack([rows_a[first], rows_b[second]], axis=1)


def _occurrences(source: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows with a source, and for each a number that is unique to (source, how often it came before)."""
    rows = np.flatnonzero(source >= 0)
    rows = rows[np.argsort(source[rows], kind="stable")]
    values = source[rows]
    return rows, values * most + np.arange(len(rows)) - np.searchsorted(values, values, side="left")


def _sorted_pairs(pairs: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(pairs[np.argsort(pairs[:, 0], kind="stable")])


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> Tensor:
    """(n, m) float64, summed in the order x, y, z as the kernels do."""
    squares = (torch.from_numpy(a)[:, None] - torch.from_numpy(b)[None]).square()
    return squares[..., 0] + squares[..., 1] + squares[..., 2]


def _nearest_rows(a: NDArray[np.float64], b: NDArray[np.float64], numba: bool) -> NDArray[np.int64]:
    if numba:
        found = np.empty(len(a), dtype=np.int64)
        _find_nearest(a, np.ascontiguousarray(b.T), found)
        return found
    step = max(1, _REFERENCE_PAIRS // len(b))
    parts = [_squared_distances(a[row : row + step], b).argmin(dim=1).numpy() for row in range(0, len(a), step)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


@njit(cache=True, nogil=True)
def _find_nearest(a, columns, found):
    squared = np.empty(columns.shape[1])
    for row in range(len(a)):
        _fill_distances(a[row], columns, squared)
        best = 0
        for column in range(1, len(squared)):
            if squared[column] < squared[best]:
                best = column
        found[row] = best


@njit(cache=True, nogil=True)
def _fill_distances(place, columns, squared):
    x, y, z = columns[0], columns[1], columns[2]
    for i in range(len(squared)):
        dx, dy, dz = place[0] - x[i], place[1] - y[i], place[2] - z[i]
        squared[i] = dx * dx + dy * dy + dz * dz


@njit(cache=True, nogil=True)
def _take_free(a, b, partner):
    columns = b.T.copy()
    squared = np.empty(len(b))
    free = np.ones(len(b), dtype=np.bool_)
    for row in range(len(partner)):
        _fill_distances(a[row], columns, squared)
        best = -1
        for column in range(len(squared)):
            if free[column] and (best < 0 or squared[column] < squared[best]):
                best = column
        free[best] = False
        partner[row] = best
