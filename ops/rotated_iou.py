"""How much do turned boxes overlap, which of them stay after suppression, and which points lie inside?

A box is a row (x, y, z, length, width, height, yaw): geometric centre and size in metres, yaw in radians counter-clockwise
from +x seen from +z; it stands upright. Overlaps are exact up to rounding: one rectangle is clipped by the other in that
one's own frame, in float64, so that boxes far from the origin lose nothing. No function here has a gradient.

Shapes: N and M boxes, P points.
"""

from typing import TypeVar

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.ops.backend import run_tasks, use_numba

BOX_COLUMNS = ("x", "y", "z", "length", "width", "height", "yaw")

_REFERENCE_PAIRS = 1 << 17
"""Pairs of boxes that the reference clips together, and pairs of box and point that it tests: bounds its memory."""

_ROUNDING = 1e-12
"""The reference sums large terms: a share of the smaller rectangle below this is no overlap."""

Array = TypeVar("Array", Tensor, NDArray)


def bev_iou(boxes_a: Tensor, boxes_b: Tensor, *, aligned: bool = False, backend: str = "auto") -> Tensor:
    """Intersection over union of the boxes' rectangles seen from above.

    Boxes that only touch, or of no area, overlap by 0.

    Args:
        boxes_a: (N, 7) rows of `BOX_COLUMNS`. N may be 0.
        boxes_b: (M, 7).
        aligned: compare row i with row i only; N and M must be equal.
        backend: auto, torch or numba.

    Returns:
        (N, M), or (N,) where aligned, in [0, 1], in the dtype and on the device of `boxes_a`.

    Raises:
        ValueError: a wrong shape or backend, NaN or infinity, or a size below 0.

    Source: clipping of Sutherland & Hodgman, "Reentrant polygon clipping", 1974.
    """
    return _iou(boxes_a, boxes_b, aligned, backend, with_height=False)


def iou_3d(boxes_a: Tensor, boxes_b: Tensor, *, aligned: bool = False, backend: str = "auto") -> Tensor:
    """Intersection over union of the boxes' volumes: the overlap from above times the overlap in height.

    Arguments, result and errors as in `bev_iou`.
    """
    return _iou(boxes_a, boxes_b, aligned, backend, with_height=True)


def rotated_nms(boxes: Tensor, scores: Tensor, max_iou: float, *, backend: str = "auto") -> Tensor:
    """Drop every box whose `bev_iou` with a kept box of higher score is above `max_iou`.

    Args:
        boxes: (N, 7) rows of `BOX_COLUMNS`. N may be 0.
        scores: (N,) higher is better; of equal ones the lower row goes first.
        max_iou: largest overlap that two kept boxes may have.
        backend: auto, torch or numba.

    Returns:
        (K,) int64 rows that are kept, best first, on the device of `boxes`.

    Raises:
        ValueError: as in `bev_iou`, another number of scores than of boxes, or a score that is NaN.
    """
    if scores.shape != (len(boxes),) or scores.isnan().any():
        raise ValueError(f"{len(boxes)} boxes need as many scores that are numbers, got {tuple(scores.shape)}")
    rows = _checked(boxes, "boxes")
    order = torch.sort(scores.detach(), descending=True, stable=True).indices
    if use_numba(backend, boxes):
        own = np.ones(len(rows), dtype=np.bool_)
        _suppress(np.ascontiguousarray(rows[order].numpy()), float(max_iou), own)
        return order[torch.from_numpy(own)]
    order = order.to(rows.device)
    is_over = _iou(rows[order], rows[order], False, "torch", with_height=False) > max_iou
    kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for row in range(len(rows)):
        if kept[row]:
            kept[row + 1 :] &= ~is_over[row, row + 1 :]
    return order[kept]


def points_in_boxes(xyz: Array, center: Array, size: Array, yaw: Array, *, backend: str = "auto") -> Array:
    """Is point n inside box k? Faces count as inside; a point that is NaN is in no box.

    Args:
        xyz: (P, 3) points in the frame of the boxes, metres.
        center: (N, 3) geometric centres, metres.
        size: (N, 3) length, width, height, metres.
        yaw: (N,) radians.
        backend: auto, torch or numba.

    Returns:
        (N, P) bool: an array where `xyz` is one, else a tensor on its device.

    Raises:
        ValueError: as in `bev_iou`.
    """
    points = torch.as_tensor(xyz).detach().double()
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"xyz must be (P, 3), got {tuple(points.shape)}")
    widths = ((center, 3), (size, 3), (yaw, 1))
    columns = [torch.as_tensor(own).detach().double().reshape(-1, width) for own, width in widths]
    boxes = _checked(torch.cat(columns, dim=1), "boxes")
    if use_numba(backend, points, boxes):
        inside = np.zeros((len(boxes), len(points)), dtype=np.bool_)
        _find_points(np.ascontiguousarray(points.numpy()), np.ascontiguousarray(boxes.numpy()), inside)
        found = torch.from_numpy(inside)
    else:
        step = max(1, _REFERENCE_PAIRS // max(1, len(points)))
        found_in: list[Tensor] = [_points_inside(points, boxes[row : row + step]) for row in range(0, len(boxes), step)]
        found = torch.cat([points.new_zeros((0, len(points)), dtype=torch.bool), *found_in])
    return found.numpy() if isinstance(xyz, np.ndarray) else found


def _checked(boxes: Tensor, name: str) -> Tensor:
    """(N, 7) float64 rows that a box can have."""
    if boxes.ndim != 2 or boxes.shape[1] != len(BOX_COLUMNS):
        raise ValueError(f"{name} must be (n, 7) rows of {', '.join(BOX_COLUMNS)}, got {tuple(boxes.shape)}")
    rows = boxes.detach().double()
    wrong = ~torch.isfinite(rows).all(dim=1) | (rows[:, 3:6] < 0).any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{name}: row {row} holds NaN, infinity or a size below 0: {rows[row].tolist()}")
    return rows


def _iou(boxes_a: Tensor, boxes_b: Tensor, aligned: bool, backend: str, *, with_height: bool) -> Tensor:
    a, b = _checked(boxes_a, "boxes_a"), _checked(boxes_b, "boxes_b")
    if aligned and len(a) != len(b):
        raise ValueError(f"aligned boxes must be equally many, got {len(a)} and {len(b)}")
    if use_numba(backend, boxes_a, boxes_b):
        iou = torch.from_numpy(_run_kernel(a, b, aligned, with_height))
    elif aligned:
        iou = _reference_iou(a, b, with_height)
    else:
        step = max(1, _REFERENCE_PAIRS // max(1, len(b)))
        parts = [a.new_zeros((0, len(b)))]
        for row in range(0, len(a), step):
            own = a[row : row + step]
            left, right = own.repeat_interleave(len(b), dim=0), b.repeat(len(own), 1)
            parts.append(_reference_iou(left, right, with_height).view(len(own), len(b)))
        iou = torch.cat(parts)
    return iou.to(boxes_a.dtype if boxes_a.is_floating_point() else torch.float64)


def _reference_iou(a: Tensor, b: Tensor, with_height: bool) -> Tensor:
    """(N,) of aligned rows."""
    volume_a, volume_b = a[:, 3] * a[:, 4], b[:, 3] * b[:, 4]
    smaller = torch.minimum(volume_a, volume_b)
    overlap = torch.minimum(_clipped_area(a, b), smaller)
    overlap = torch.where(overlap > _ROUNDING * smaller, overlap, 0.0)
    if with_height:
        rise = b[:, 2] - a[:, 2]
        top, bottom = torch.minimum(a[:, 5] / 2, rise + b[:, 5] / 2), torch.maximum(-a[:, 5] / 2, rise - b[:, 5] / 2)
        overlap = overlap * (top - bottom).clamp(min=0)
        volume_a, volume_b = volume_a * a[:, 5], volume_b * b[:, 5]
    union = volume_a + volume_b - overlap
    return torch.where(union > 0, overlap / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0).clamp(0, 1)


def _clipped_area(a: Tensor, b: Tensor) -> Tensor:
    """(N,) area of rectangle b inside rectangle a, in the frame of a.

    Where an edge of the outline crosses a line x = +-l/2, a corner is put in; then every x is clamped between the lines.
    What lay outside runs along a line, to and fro, and encloses nothing; so the enclosed area is that of the clipped
    outline. The same for y.
    """
    offset, turn = b[:, :2] - a[:, :2], b[:, 6] - a[:, 6]
    cos, sin = torch.cos(a[:, 6]), torch.sin(a[:, 6])
    place = torch.stack([offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin], dim=1)
    signs = a.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    local = signs * (b[:, None, 3:5] / 2)
    cos, sin = torch.cos(turn)[:, None], torch.sin(turn)[:, None]
    outline = torch.stack([local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos], dim=2)
    outline = outline + place[:, None]
    for axis in (0, 1):
        limit = a[:, None, 3 + axis] / 2
        along = outline.roll(-1, dims=1) - outline
        slope = along[..., axis]
        safe = torch.where(slope == 0, 1.0, slope)
        shares = torch.stack([(-limit - outline[..., axis]) / safe, (limit - outline[..., axis]) / safe], dim=2)
        shares = torch.where(slope[..., None] == 0, 0.0, shares).clamp(0, 1).sort(dim=2).values
        crossings = outline[:, :, None] + shares[..., None] * along[:, :, None]
        outline = torch.cat([outline[:, :, None], crossings], dim=2).flatten(1, 2)
        clamped = torch.minimum(torch.maximum(outline[..., axis], -limit), limit)
        outline = torch.stack([clamped, outline[..., 1]] if axis == 0 else [outline[..., 0], clamped], dim=2)
    x, y = outline.unbind(dim=2)
    return ((x * y.roll(-1, dims=1) - x.roll(-1, dims=1) * y).sum(dim=1) / 2).clamp(min=0)


def _points_inside(points: Tensor, boxes: Tensor) -> Tensor:
    offset = points[None] - boxes[:, None, :3]
    cos, sin = torch.cos(boxes[:, 6:]), torch.sin(boxes[:, 6:])
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    half = boxes[:, None, 3:6] / 2
    inside = torch.stack([along, across, offset[..., 2]], dim=2).abs() <= half
    return inside.all(dim=2)


def _run_kernel(a: Tensor, b: Tensor, aligned: bool, with_height: bool) -> NDArray[np.float64]:
    rows, columns = np.ascontiguousarray(a.numpy()), np.ascontiguousarray(b.numpy())
    iou = np.zeros((len(rows), 1 if aligned else len(columns)))
    step = max(64, -(-len(rows) // max(1, torch.get_num_threads())))

    def task(start: int):
        part = slice(start, start + step)
        others = columns[part] if aligned else columns
        return lambda: _fill_iou(rows[part], others, aligned, with_height, iou[part])

    run_tasks([task(start) for start in range(0, len(rows), step)])
    return iou[:, 0] if aligned else iou


@njit(cache=True, nogil=True)
def _fill_iou(rows, columns, aligned, with_height, iou):
    outline, spare = np.empty((16, 2)), np.empty((16, 2))
    for row in range(len(rows)):
        first, last = (row, row + 1) if aligned else (0, len(columns))
        for column in range(first, last):
            iou[row, column - first] = _pair_iou(rows[row], columns[column], with_height, outline, spare)


@njit(cache=True, nogil=True)
def _pair_iou(a, b, with_height, outline, spare):
    """`outline` and `spare` are room for the corners of the clipped rectangle."""
    area_a, area_b = a[3] * a[4], b[3] * b[4]
    dx, dy = b[0] - a[0], b[1] - a[1]
    reach = 0.5 * (np.hypot(a[3], a[4]) + np.hypot(b[3], b[4]))
    if area_a <= 0 or area_b <= 0 or dx * dx + dy * dy >= reach * reach:
        return 0.0
    rise = 1.0
    if with_height:
        dz = b[2] - a[2]
        rise = min(0.5 * a[5], dz + 0.5 * b[5]) - max(-0.5 * a[5], dz - 0.5 * b[5])
        if rise <= 0:
            return 0.0
        area_a, area_b = area_a * a[5], area_b * b[5]
    overlap = min(_overlap_area(a, b, dx, dy, outline, spare), a[3] * a[4], b[3] * b[4]) * rise
    union = area_a + area_b - overlap
    return min(1.0, overlap / union) if union > 0 else 0.0


@njit(cache=True, nogil=True)
def _overlap_area(a, b, dx, dy, outline, spare):
    cos, sin = np.cos(a[6]), np.sin(a[6])
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    cos, sin = np.cos(b[6] - a[6]), np.sin(b[6] - a[6])
    for corner in range(4):
        along = 0.5 * b[3] if corner == 0 or corner == 3 else -0.5 * b[3]
        across = 0.5 * b[4] if corner < 2 else -0.5 * b[4]
        outline[corner, 0] = x + along * cos - across * sin
        outline[corner, 1] = y + along * sin + across * cos
    number = 4
    for side in range(4):
        axis, sign = side // 2, 1.0 - 2.0 * (side % 2)
        number = _clip(outline, number, axis, sign, 0.5 * a[3 + axis], spare)
        outline, spare = spare, outline
        if number < 3:
            return 0.0
    area = 0.0
    for i in range(1, number - 1):
        ux, uy = outline[i, 0] - outline[0, 0], outline[i, 1] - outline[0, 1]
        vx, vy = outline[i + 1, 0] - outline[0, 0], outline[i + 1, 1] - outline[0, 1]
        area += ux * vy - uy * vx
    return max(0.0, 0.5 * area)


@njit(cache=True, nogil=True)
def _clip(outline, number, axis, sign, limit, clipped):
    """Keep the part of a convex outline where sign * coordinate <= limit; returns its number of corners."""
    kept = 0
    for i in range(number):
        following = i + 1 if i + 1 < number else 0
        here, there = sign * outline[i, axis], sign * outline[following, axis]
        if here <= limit:
            clipped[kept] = outline[i]
            kept += 1
        if (here <= limit) != (there <= limit):
            share = (limit - here) / (there - here)
            for column in range(2):
                clipped[kept, column] = outline[i, column] + share * (outline[following, column] - outline[i, column])
            clipped[kept, axis] = sign * limit
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def _suppress(boxes, max_iou, kept):
    outline, spare = np.empty((16, 2)), np.empty((16, 2))
    for row in range(len(boxes)):
        if kept[row]:
            for other in range(row + 1, len(boxes)):
                if kept[other] and _pair_iou(boxes[row], boxes[other], False, outline, spare) > max_iou:
                    kept[other] = False


@njit(cache=True, nogil=True)
def _find_points(points, boxes, inside):
    for k in range(len(boxes)):
        cos, sin = np.cos(boxes[k, 6]), np.sin(boxes[k, 6])
        half_x, half_y, half_z = 0.5 * boxes[k, 3], 0.5 * boxes[k, 4], 0.5 * boxes[k, 5]
        for n in range(len(points)):
            dx, dy = points[n, 0] - boxes[k, 0], points[n, 1] - boxes[k, 1]
            inside[k, n] = (
                abs(points[n, 2] - boxes[k, 2]) <= half_z
                and abs(dx * cos + dy * sin) <= half_x
                and abs(dy * cos - dx * sin) <= half_y
            )
