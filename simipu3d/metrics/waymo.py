"""What is a set of detections worth on Waymo's 3D detection benchmark? mAP and mAPH at levels 1 and 2, by type and range.

Definition: `compute_detection_metrics_main` of the Waymo Open Dataset (metrics/{detection_metrics,matcher,metrics_utils,
breakdown_generator,iou}.cc, protos/metrics.proto), which needs TensorFlow's build and has had no wheel since 2024. In short:
at each of 101 score cut-offs the predictions of a frame are matched to its labels so that the sum of their 3D IoUs is
largest (scores have no part in it); precision and recall follow, then the area under their curve. mAPH weighs each true
positive by how well its heading fits. Level 1 spares misses of hard labels, nothing else: true positives of hard labels
count at both levels.

Boxes are rows of `rotated_iou.BOX_COLUMNS` in the vehicle frame (x forward, y left, z up), metres, radians. Shapes: K objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from simipu3d.ops.rotated_iou import iou_3d

TYPES = {1: "VEHICLE", 2: "PEDESTRIAN", 3: "SIGN", 4: "CYCLIST"}
MIN_IOU = {1: 0.7, 2: 0.5, 3: 0.5, 4: 0.5}
"""A match needs at least so much 3D IoU, by type."""
OVERALL_TYPES = (1, 2, 4)
LEVELS = (1, 2)
RANGES = ((0.0, 30.0), (30.0, 50.0), (50.0, np.inf))
"""Metres from the vehicle's origin to the centre of a box, in space."""
HARD_POINTS = 5
"""A label of at most so many points is of level 2 where nobody set a difficulty."""
CUT_OFFS = np.append(np.arange(100) * 0.01, 1.0).astype(np.float32)
"""A prediction counts at a cut-off if its score is at least that; single precision, as in the original."""
MAX_RECALL_STEP = 0.05
SIZE_LIMITS = (1e-2, 1e6)
"""A box with an edge that is not between these overlaps with nothing."""
IOU_STEPS = 1e6
"""The sums that the matching compares are of whole millionths of IoU."""


@dataclass(frozen=True, eq=False)
class FrameObjects:
    """Objects of many frames.

    Attributes:
        frame: (K,) int64, any numbers; equal ones belong together.
        boxes: (K, 7).
        kind: (K,) int64 keys of `TYPES`.
        score: (K,) in [0, 1]; ones for labels.
        num_points: (K,) int64 lidar points inside, of labels.
        difficulty: (K,) int64 1 or 2, or 0 where it is not set, of labels.
        in_no_label_zone: (K,) bool, of predictions: not wrong where it fits no label.
    """

    frame: NDArray[np.int64]
    boxes: NDArray[np.float64]
    kind: NDArray[np.int64]
    score: NDArray[np.float64]
    num_points: NDArray[np.int64]
    difficulty: NDArray[np.int64]
    in_no_label_zone: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.frame)

    def take(self, rows: NDArray | slice) -> "FrameObjects":
        """Some of the objects, by index, mask or slice."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class Precision(NamedTuple):
    """One break-down.

    Attributes:
        kind: key of `TYPES`.
        range: nearest and farthest distance, metres, or None for all.
        level: 1 or 2.
        ap, aph: in [0, 1]; NaN where the break-down has no label at all (the original says 0).
        num_objects: labels of at most this level.
    """

    kind: int
    range: tuple[float, float] | None
    level: int
    ap: float
    aph: float
    num_objects: int

    @property
    def name(self) -> str:
        """As the original prints it."""
        if self.range is None:
            return f"OBJECT_TYPE_TYPE_{TYPES[self.kind]}_LEVEL_{self.level}"
        far = f"{self.range[1]:.0f}" if np.isfinite(self.range[1]) else "+inf"
        return f"RANGE_TYPE_{TYPES[self.kind]}_[{self.range[0]:.0f}, {far})_LEVEL_{self.level}"


def waymo_ap(truth: FrameObjects, predictions: FrameObjects) -> list[Precision]:
    """All official break-downs: by type, then by type and range, each at both levels.

    Labels without a lidar point are dropped. In a break-down by range, labels and predictions are sorted in by their own
    distance.

    Raises:
        ValueError: boxes or scores that are NaN or infinite, a size below 0, or an unknown type.
    """
    for what, objects in (("truth", truth), ("predictions", predictions)):
        _check(what, objects)
    truth = truth.take(truth.num_points > 0)
    hard = np.where(truth.num_points <= HARD_POINTS, 2, 1)
    truth = replace(truth, difficulty=np.where(truth.difficulty > 0, truth.difficulty, hard))
    counts: dict[tuple[int, int], NDArray[np.float64]] = {}
    for kind, labels, found, iou in _groups(truth, predictions):
        match = np.where(iou >= np.float32(MIN_IOU[kind]), np.floor(iou * IOU_STEPS + 0.5), 0).astype(np.int64)
        turn = np.abs((found.boxes[:, None, 6] - labels.boxes[None, :, 6] + np.pi) % (2 * np.pi) - np.pi)
        accuracy = np.clip(1 - turn / np.pi, 0, 1)
        near = [_range_index(objects) for objects in (labels, found)]
        for place in (-1, *range(len(RANGES))):
            rows, columns = ((own == place) | (place < 0) for own in near[::-1])
            own = counts.setdefault((kind, place), np.zeros((len(CUT_OFFS), 4)))
            table = np.ix_(rows, columns)
            score, spared = found.score[rows].astype(np.float32), found.in_no_label_zone[rows]
            _count(match[table], accuracy[table], score, spared, labels.difficulty[columns], CUT_OFFS, own)
    shards = [(kind, place) for place in (-1,) for kind in TYPES] + [(k, p) for k in TYPES for p in range(len(RANGES))]
    place_of = _range_index(truth)
    cells = []
    for kind, place in shards:
        levels = truth.difficulty[(truth.kind == kind) & ((place_of == place) | (place < 0))]
        own = counts.get((kind, place), np.zeros((len(CUT_OFFS), 4)))
        for level in LEVELS:
            missed = (levels <= level).sum() - own[:, 3 if level == 1 else 0]
            ap, aph = _areas(own, missed) if len(levels) else (np.nan, np.nan)
            span = None if place < 0 else RANGES[place]
            cells.append(Precision(kind, span, level, ap, aph, int((levels <= level).sum())))
    return cells


def overall(cells: list[Precision], level: int) -> tuple[float, float]:
    """mAP and mAPH as the mean over vehicles, pedestrians and cyclists, those of them that have labels; NaN for none."""
    own = [cell for cell in cells if cell.range is None and cell.level == level and cell.kind in OVERALL_TYPES]
    values = [(cell.ap, cell.aph) for cell in own if not np.isnan(cell.ap)]
    ap, aph = np.mean(values, axis=0) if values else (np.nan, np.nan)
    return float(ap), float(aph)


def average_precision(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """Area under precision over recall.

    Of equal recalls the highest precision counts. From high recall to low the precision never falls; where recalls are
    more than 0.05 apart, the precision at the higher one reaches down in steps of 0.05 and the last stretch is a slope.
    At recall 0 the precision is that of the lowest recall above.

    Args:
        precision, recall: (T,) at the score cut-offs.
    """
    best = {0.0: 1.0}
    for at, value in zip(recall.astype(np.float32).tolist(), precision.tolist(), strict=True):
        best[at] = max(best.get(at, 0.0), value)
    points: list[tuple[float, float]] = []
    last, highest = 0.0, 0.0
    for at in sorted(best, reverse=True):
        while last - at > MAX_RECALL_STEP + 1e-6:
            last -= MAX_RECALL_STEP
            points.append((last, highest))
        highest = max(highest, best[at])
        points.append((at, highest))
        last = at
    if len(points) > 1:
        points[-1] = (points[-1][0], points[-2][1])
    curve = np.array(points)
    return float(-(np.diff(curve[:, 0]) * (curve[1:, 1] + curve[:-1, 1]) / 2).sum())


def _check(what: str, objects: FrameObjects) -> None:
    for name in ("boxes", "score"):
        if not np.isfinite(getattr(objects, name)).all():
            raise ValueError(f"{what}: {name} holds NaN or infinity")
    if (objects.boxes[:, 3:6] < 0).any():
        raise ValueError(f"{what}: a box has a size below 0")
    unknown = sorted(set(objects.kind.tolist()) - set(TYPES))
    if unknown:
        raise ValueError(
            f"{what}: unknown type {unknown[0]}; there are {', '.join(f'{k} {v}' for k, v in TYPES.items())}"
        )


def _range_index(objects: FrameObjects) -> NDArray[np.int64]:
    distance = np.linalg.norm(objects.boxes[:, :3], axis=1)
    return np.searchsorted([far for _, far in RANGES], distance, side="right")


def _groups(
    truth: FrameObjects, predictions: FrameObjects
) -> Iterator[tuple[int, FrameObjects, FrameObjects, NDArray[np.float32]]]:
    """(type, labels, predictions, their 3D IoU) of every frame and type that has predictions."""
    frames = np.unique(np.concatenate([truth.frame, predictions.frame]))
    sides = []
    for objects in (truth, predictions):
        key = np.searchsorted(frames, objects.frame) * (max(TYPES) + 1) + objects.kind
        order = np.argsort(key, kind="stable")
        sides.append((objects.take(order), key[order]))
    (labels, label_key), (found, found_key) = sides
    for key in np.unique(found_key):
        own, other = (slice(*np.searchsorted(keys, (key, key + 1))) for keys in (label_key, found_key))
        part, guess = labels.take(own), found.take(other)
        boxes = []
        for objects in (guess, part):
            is_sound = ((objects.boxes[:, 3:6] > SIZE_LIMITS[0]) & (objects.boxes[:, 3:6] < SIZE_LIMITS[1])).all(axis=1)
            rows = objects.boxes.copy()
            rows[~is_sound, 3:6] = 0.0
            boxes.append(torch.from_numpy(rows))
        yield int(key % (max(TYPES) + 1)), part, guess, iou_3d(*boxes).numpy().astype(np.float32)


def _areas(counts: NDArray[np.float64], missed: NDArray[np.float64]) -> tuple[float, float]:
    """AP and APH of the counts at the cut-offs; precision is 1 where nothing is recalled."""
    hits, accurate, wrong = counts[:, 0], counts[:, 1], counts[:, 2]
    recall = np.divide(hits, hits + missed, out=np.zeros_like(hits), where=hits + missed > 0)
    areas = []
    for right in (hits, accurate):
        precision = np.divide(right, hits + wrong, out=np.zeros_like(hits), where=hits + wrong > 0)
        areas.append(average_precision(np.where(recall == 0, 1.0, precision), recall))
    return areas[0], areas[1]


@njit(cache=True, nogil=True)
def _count(match, accuracy, score, is_spared, level, cut_offs, counts):
    """Add one frame's true positives, summed heading accuracy, false positives, and true positives of level 1, at each
    cut-off. `match` (n, m) holds what a pair adds to the sum, 0 where it may not be matched.

    Predictions and labels that are joined by chains of pairs are solved apart from all others: the largest sum of the
    frame is that of its parts."""
    num_found, num_truth = match.shape
    part = np.full(num_found, -1)
    truth_part = np.full(num_truth, -1)
    partner = np.full(num_found, -1)
    for first in range(num_found):
        if part[first] >= 0:
            continue
        # Collect the part of `first`.
        rows, columns = [first], [0 for _ in range(0)]
        part[first] = first
        place = 0
        while place < len(rows):
            for t in range(num_truth):
                if match[rows[place], t] > 0 and truth_part[t] < 0:
                    truth_part[t] = first
                    columns.append(t)
                    for p in range(num_found):
                        if match[p, t] > 0 and part[p] < 0:
                            part[p] = first
                            rows.append(p)
            place += 1
        before = -1
        for cut in range(len(cut_offs)):
            active = [p for p in rows if score[p] >= cut_offs[cut]]
            if len(active) == 0:
                break
            if len(active) != before:
                before = len(active)
                _solve(match, active, columns, partner)
            for p in active:
                t = partner[p]
                if t >= 0:
                    counts[cut, 0] += 1
                    counts[cut, 1] += accuracy[p, t]
                    if level[t] == 1:
                        counts[cut, 3] += 1
                elif not is_spared[p]:
                    counts[cut, 2] += 1


@njit(cache=True, nogil=True)
def _solve(match, rows, columns, partner):
    """Set the column of each row so that the sum of `match` is largest; -1 where that adds nothing.

    Source: the Hungarian method with potentials, row by row along shortest augmenting paths (Jonker & Volgenant, 1987)."""
    for p in rows:
        partner[p] = -1
    if len(columns) == 0:
        return
    if len(rows) == 1:
        for t in columns:
            if match[rows[0], t] > 0 and (partner[rows[0]] < 0 or match[rows[0], t] > match[rows[0], partner[rows[0]]]):
                partner[rows[0]] = t
        return
    # A column of its own for every row, worth nothing: to stay alone.
    num, wide = len(rows), len(columns) + len(rows)
    cost = np.zeros((num, wide), dtype=np.int64)
    for i in range(num):
        for j in range(len(columns)):
            cost[i, j] = -match[rows[i], columns[j]]
    of_row, of_column = np.zeros(num + 1, dtype=np.int64), np.zeros(wide + 1, dtype=np.int64)
    row_at = np.full(wide + 1, -1)
    previous = np.zeros(wide + 1, dtype=np.int64)
    for i in range(num):
        row_at[wide] = i
        at = wide
        least = np.full(wide + 1, np.iinfo(np.int64).max // 4)
        is_done = np.zeros(wide + 1, dtype=np.bool_)
        while True:
            is_done[at] = True
            row, step, following = row_at[at], np.iinfo(np.int64).max // 4, -1
            for j in range(wide):
                if is_done[j]:
                    continue
                reduced = cost[row, j] - of_row[row] - of_column[j]
                if reduced < least[j]:
                    least[j], previous[j] = reduced, at
                if least[j] < step:
                    step, following = least[j], j
            for j in range(wide + 1):
                if is_done[j]:
                    of_row[row_at[j]] += step
                    of_column[j] -= step
                else:
                    least[j] -= step
            at = following
            if row_at[at] < 0:
                break
        while at != wide:
            row_at[at] = row_at[previous[at]]
            at = previous[at]
    for j in range(len(columns)):
        if row_at[j] >= 0 and match[rows[row_at[j]], columns[j]] > 0:
            partner[rows[row_at[j]]] = columns[j]
