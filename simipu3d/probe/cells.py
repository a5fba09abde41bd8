"""Which pixels belong to a cell of a feature map, and what does a map of cells say about every pixel?

A cell (i, j) sits on pixel (offset + stride * j, offset + stride * i) and owns the stride x stride pixels round it.
Shapes: I images of H x W pixels, Hf x Wf cells.
"""

import numpy as np
from numpy.typing import NDArray


def cell_of_pixel(num_pixels: int, num_cells: int, stride: int, offset: float) -> NDArray[np.int64]:
    """(num_pixels,) cell of every pixel along one axis; -1 for the margin that no footprint covers."""
    cell = np.floor((np.arange(num_pixels) - offset) / stride + 0.5).astype(np.int64)
    return np.where((cell >= 0) & (cell < num_cells), cell, -1)


def cell_means(
    values: NDArray[np.floating], known: NDArray[np.bool_], cells: tuple[int, int], stride: int, offset: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Mean of the known pixels in every footprint.

    Args:
        values: (I, H, W).
        known: (I, H, W) which pixels count.
        cells: (Hf, Wf).
        stride, offset: of the feature map, pixels.

    Returns:
        means: (I, Hf, Wf), 0 where no pixel is known.
        any_known: (I, Hf, Wf).
    """
    membership = [
        (cell_of_pixel(size, count, stride, offset)[None] == np.arange(count)[:, None]).astype(np.float64)
        for size, count in zip(values.shape[1:], cells, strict=True)
    ]
    kept = np.where(known, values, 0.0)
    sums = membership[0] @ kept @ membership[1].T
    counts = membership[0] @ known.astype(np.float64) @ membership[1].T
    return sums / np.maximum(counts, 1), counts > 0


def upsample(cells: NDArray[np.floating], size: tuple[int, int], stride: int, offset: float) -> NDArray[np.float64]:
    """Bilinear interpolation of a map at every pixel; beyond the outermost cells their value is kept.

    Args:
        cells: (..., Hf, Wf).
        size: (H, W) pixels.
        stride, offset: of the map, pixels.

    Returns:
        (..., H, W).
    """
    rows, columns = (
        _interpolation(pixels, count, stride, offset) for pixels, count in zip(size, cells.shape[-2:], strict=True)
    )
    return rows @ cells @ columns.T


def _interpolation(num_pixels: int, num_cells: int, stride: int, offset: float) -> NDArray[np.float64]:
    """(num_pixels, num_cells) weights of linear interpolation along one axis."""
    place = np.clip((np.arange(num_pixels) - offset) / stride, 0, num_cells - 1)
    return np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(num_cells)[None]))
