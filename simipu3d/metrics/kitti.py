"""What is a set of detections worth on KITTI's object benchmark? AP of 2D boxes, bird's eye view and 3D boxes, and AOS.

Definition: the evaluation of KITTI's development kit (Geiger et al., "Are we ready for autonomous driving?", CVPR 2012;
orientation similarity in the same paper), with 41 recall samples: R11 averages every fourth from recall 0, R40 all but
the one at recall 0 (Simonelli et al., arXiv:1905.12365, adopted by the benchmark in 2019).

Boxes are as in the label files: the rectified camera frame (x right, y down, z forward), bottom centre, height, width,
length, metres; rotation_y about +y in radians. Shapes: K objects of a frame, P pairs of a truth and a prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from simipu3d.ops.rotated_iou import bev_iou, iou_3d

DIFFICULTIES = ("easy", "moderate", "hard")
MIN_HEIGHT = (40.0, 25.0, 25.0)
"""Pixels: truth must be higher, a detection at least as high, by difficulty."""
MAX_OCCLUSION = (0, 1, 2)
MAX_TRUNCATION = (0.15, 0.30, 0.50)
NEIGHBOURS = {"Car": "Van", "Pedestrian": "Person_sitting"}
"""The class that is neither wanted nor wrong where another one is scored."""
DONT_CARE = "DontCare"

STRICT = {"Car": (0.7, 0.7, 0.7), "Pedestrian": (0.5, 0.5, 0.5), "Cyclist": (0.5, 0.5, 0.5)}
"""Class -> overlap that a match must exceed, in 2D, bird's eye view and 3D: the benchmark's own."""
LOOSE = {"Car": (0.7, 0.5, 0.5), "Pedestrian": (0.5, 0.25, 0.25), "Cyclist": (0.5, 0.25, 0.25)}
"""The second set that toolboxes print."""

NUM_SAMPLES = 41
NO_ALPHA = -10.0
"""Observation angle of a detection that has none."""

_COUNTED, _IGNORED, _OTHER = 0, 1, -1


@dataclass(frozen=True, eq=False)
class CameraObjects:
    """The objects of one frame, labelled or detected.

    Attributes:
        names: K class names, in KITTI's spelling.
        truncation: (K,) 0 to 1.
        occlusion: (K,) 0 fully visible to 3 unknown.
        alpha: (K,) observation angle, radians; -10 where a detection has none.
        image_box: (K, 4) u_min, v_min, u_max, v_max, pixels.
        size: (K, 3) height, width, length, metres; not above 0 where there is no 3D box.
        bottom_center: (K, 3) metres.
        rotation_y: (K,) radians.
        score: (K,) higher is surer; zeros for labels.
    """

    names: tuple[str, ...]
    truncation: NDArray[np.float64]
    occlusion: NDArray[np.float64]
    alpha: NDArray[np.float64]
    image_box: NDArray[np.float64]
    size: NDArray[np.float64]
    bottom_center: NDArray[np.float64]
    rotation_y: NDArray[np.float64]
    score: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.names)


class Precision(NamedTuple):
    """One cell of the benchmark's table.

    Attributes:
        class_name, metric, difficulty: which cell; the metric is 2d, bev, 3d or aos.
        min_overlap: a match overlaps more than this.
        r11, r40: average precision (similarity for aos) in per cent. NaN where no object is counted, and for aos where a
            detection has no observation angle.
        num_objects: objects that count; with fewer than about 41, even a perfect detector stays below 100.
    """

    class_name: str
    metric: str
    difficulty: str
    min_overlap: float
    r11: float
    r40: float
    num_objects: int


def kitti_ap(
    truth: Sequence[CameraObjects],
    predictions: Sequence[CameraObjects],
    min_overlaps: Mapping[str, tuple[float, float, float]] = STRICT,
) -> list[Precision]:
    """Every cell of the benchmark's table.

    Args:
        truth: labels of F frames, DontCare regions among them.
        predictions: detections of the same frames in the same order.
        min_overlaps: the classes to score, each with its overlaps in 2D, bird's eye view and 3D.

    Returns:
        Cells by class, metric (2d, aos, bev, 3d) and difficulty.

    Raises:
        ValueError: another number of frames, or boxes or scores that are NaN or infinite.
    """
    if len(truth) != len(predictions):
        raise ValueError(f"{len(truth)} frames of truth and {len(predictions)} of predictions")
    frames = _Frames.join(truth, predictions)
    cells = []
    for class_name, thresholds in min_overlaps.items():
        for metric, overlap, min_overlap in zip(("2d", "bev", "3d"), frames.overlaps, thresholds, strict=True):
            found = [_curves(frames, overlap, min_overlap, class_name, level, metric == "2d") for level in range(3)]
            for name, curve in (("2d", 0), ("aos", 1)) if metric == "2d" else ((metric, 0),):
                for level, (curves, num_objects) in enumerate(found):
                    r11, r40 = _average(curves[curve], num_objects)
                    cells.append(Precision(class_name, name, DIFFICULTIES[level], min_overlap, r11, r40, num_objects))
    return cells


def mean_over_classes(cells: Sequence[Precision], metric: str, difficulty: str) -> tuple[float, float]:
    """R11 and R40 as the unweighted mean over the classes that have objects ("overall"); NaN where none has."""
    values = [(cell.r11, cell.r40) for cell in cells if (cell.metric, cell.difficulty) == (metric, difficulty)]
    known = [pair for pair in values if not np.isnan(pair[0])]
    r11, r40 = np.mean(known, axis=0) if known else (np.nan, np.nan)
    return float(r11), float(r40)


class _Side(NamedTuple):
    """The objects of all frames, frame after frame: rows start[f] to start[f + 1] are those of frame f."""

    start: NDArray[np.int64]
    names: NDArray[np.str_]
    image_box: NDArray[np.float64]
    boxes: NDArray[np.float64]
    alpha: NDArray[np.float64]
    truncation: NDArray[np.float64]
    occlusion: NDArray[np.float64]
    score: NDArray[np.float64]

    @classmethod
    def join(cls, frames: Sequence[CameraObjects], what: str) -> "_Side":
        def all_rows(name: str, width: int) -> NDArray[np.float64]:
            parts = [np.asarray(getattr(frame, name), dtype=np.float64).reshape(len(frame), width) for frame in frames]
            rows = np.concatenate([np.zeros((0, width)), *parts])
            if not np.isfinite(rows).all():
                raise ValueError(f"{what}: {name} holds NaN or infinity")
            return rows

        height, width, length = all_rows("size", 3).T
        x, bottom, z = all_rows("bottom_center", 3).T
        # Seen from above, in the plane (x, z), a turn about +y is clockwise; up is -y.
        upright = np.column_stack([x, z, height / 2 - bottom, length, width, height, -all_rows("rotation_y", 1)[:, 0]])
        upright[np.minimum(np.minimum(height, width), length) <= 0, 3:6] = 0.0
        return cls(
            start=np.cumsum([0, *(len(frame) for frame in frames)]).astype(np.int64),
            names=np.array([name.lower() for frame in frames for name in frame.names], dtype=np.str_),
            image_box=all_rows("image_box", 4),
            boxes=upright,
            alpha=all_rows("alpha", 1)[:, 0],
            truncation=all_rows("truncation", 1)[:, 0],
            occlusion=all_rows("occlusion", 1)[:, 0],
            score=all_rows("score", 1)[:, 0],
        )


class _Frames(NamedTuple):
    """All frames, and the pairs of a prediction and a truth of one frame: prediction after prediction, and for each the
    truth in order; frame f has those from pair_start[f]."""

    truth: _Side
    found: _Side
    pair_start: NDArray[np.int64]
    overlaps: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
    inside_dont_care: NDArray[np.float64]

    @classmethod
    def join(cls, truth: Sequence[CameraObjects], predictions: Sequence[CameraObjects]) -> "_Frames":
        labelled, found = _Side.join(truth, "truth"), _Side.join(predictions, "predictions")
        num_truth, num_found = np.diff(labelled.start), np.diff(found.start)
        frame_of = np.repeat(np.arange(len(num_found)), num_found)
        left = np.repeat(np.arange(len(frame_of)), num_truth[frame_of])
        first = np.concatenate([[0], np.cumsum(num_truth[frame_of])])
        right = np.arange(len(left)) - np.repeat(first[:-1] - labelled.start[frame_of], num_truth[frame_of])
        common, own, other = _image_overlap(found.image_box[left], labelled.image_box[right])
        boxes = torch.from_numpy(found.boxes[left]), torch.from_numpy(labelled.boxes[right])
        is_region = labelled.names[right] == DONT_CARE.lower()
        return cls(
            truth=labelled,
            found=found,
            pair_start=np.concatenate([[0], np.cumsum(num_truth * num_found)]).astype(np.int64),
            overlaps=(
                _share(common, own + other - common),
                bev_iou(*boxes, aligned=True).numpy(),
                iou_3d(*boxes, aligned=True).numpy(),
            ),
            inside_dont_care=np.where(is_region, _share(common, own), 0.0),
        )


def _image_overlap(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """(P,) common area, area of a, area of b, of axis-parallel boxes, pixels without a border of one."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    areas = [(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (a, b)]
    return np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0.0), *areas


def _share(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _curves(
    frames: _Frames, overlap: NDArray, min_overlap: float, class_name: str, level: int, is_image: bool
) -> tuple[NDArray[np.float64], int]:
    """(2, 41) precision and orientation similarity at each recall sample, made monotone, and how many objects count."""
    truth, found = frames.truth, frames.found
    is_class = truth.names == class_name.lower()
    is_hard = (
        (truth.occlusion > MAX_OCCLUSION[level])
        | (truth.truncation > MAX_TRUNCATION[level])
        | (truth.image_box[:, 3] - truth.image_box[:, 1] <= MIN_HEIGHT[level])
    )
    is_neighbour = truth.names == NEIGHBOURS.get(class_name, "").lower()
    truth_kind = np.where(is_class & ~is_hard, _COUNTED, np.where(is_class | is_neighbour, _IGNORED, _OTHER))
    is_low = np.abs(found.image_box[:, 3] - found.image_box[:, 1]) < MIN_HEIGHT[level]
    found_kind = np.where(is_low, _IGNORED, np.where(found.names == class_name.lower(), _COUNTED, _OTHER))
    num_objects = int((truth_kind == _COUNTED).sum())
    tables = (truth.start, found.start, frames.pair_start, truth_kind, found_kind, found.score, overlap)
    hits = _hit_scores(*tables, min_overlap)
    cut_offs = score_cut_offs(hits, num_objects)
    regions = frames.inside_dont_care if is_image else np.zeros(0)
    counts = _count(*tables, min_overlap, cut_offs, regions, truth.alpha, found.alpha)
    curves = np.zeros((2, NUM_SAMPLES))
    curves[0, : len(cut_offs)] = _share(counts[:, 0], counts[:, 0] + counts[:, 1])
    curves[1, : len(cut_offs)] = _share(counts[:, 2], counts[:, 0] + counts[:, 1])
    curves = np.maximum.accumulate(curves[:, ::-1], axis=1)[:, ::-1]
    if (found.alpha[found.names == class_name.lower()] == NO_ALPHA).any():
        curves[1] = np.nan
    return curves, num_objects


def _average(curve: NDArray[np.float64], num_objects: int) -> tuple[float, float]:
    if num_objects == 0:
        return np.nan, np.nan
    return 100 * float(curve[::4].mean()), 100 * float(curve[1:].mean())


def score_cut_offs(hits: NDArray[np.float64], num_objects: int) -> NDArray[np.float64]:
    """At most 41 scores, descending, of the true positives that come nearest to the recalls 0, 1/40, 2/40, ...

    Args:
        hits: scores of the true positives of the first pass.
        num_objects: objects that count.
    """
    scores, wanted, chosen = np.sort(hits)[::-1], 0.0, []
    for rank, score in enumerate(scores):
        recall, following = (rank + 1) / num_objects, (rank + 2) / num_objects
        if rank < len(scores) - 1 and following - wanted < wanted - recall:
            continue
        chosen.append(score)
        wanted += 1 / (NUM_SAMPLES - 1)
    return np.array(chosen, dtype=np.float64)


@njit(cache=True, nogil=True)
def _hit_scores(truth_start, found_start, pair_start, truth_kind, found_kind, score, overlap, min_overlap):
    """First pass: each truth takes the detection of the highest score that overlaps; the scores of the true positives."""
    hits = np.empty(len(truth_kind))
    num_hits = 0
    for frame in range(len(truth_start) - 1):
        first, num_truth = truth_start[frame], truth_start[frame + 1] - truth_start[frame]
        begin, end = found_start[frame], found_start[frame + 1]
        is_taken = np.zeros(end - begin, dtype=np.bool_)
        for t in range(num_truth):
            if truth_kind[first + t] == _OTHER:
                continue
            best = -1
            for d in range(end - begin):
                if found_kind[begin + d] == _OTHER or is_taken[d]:
                    continue
                is_over = overlap[pair_start[frame] + d * num_truth + t] > min_overlap
                if is_over and (best < 0 or score[begin + d] > score[begin + best]):
                    best = d
            if best >= 0:
                is_taken[best] = True
                if truth_kind[first + t] == _COUNTED and found_kind[begin + best] == _COUNTED:
                    hits[num_hits] = score[begin + best]
                    num_hits += 1
    return hits[:num_hits]


@njit(cache=True, nogil=True)
def _count(
    truth_start,
    found_start,
    pair_start,
    truth_kind,
    found_kind,
    score,
    overlap,
    min_overlap,
    cut_offs,
    in_region,
    truth_alpha,
    found_alpha,
):
    """Second pass: (T, 3) true positives, false positives and summed orientation similarity at each score cut-off; each
    truth takes the detection that overlaps most. (The kit lets an ignored detection take a truth for want of another;
    that only spares a miss, and misses are not counted here.)"""
    counts = np.zeros((len(cut_offs), 3))
    for frame in range(len(truth_start) - 1):
        first, num_truth = truth_start[frame], truth_start[frame + 1] - truth_start[frame]
        begin, num_found = found_start[frame], found_start[frame + 1] - found_start[frame]
        is_taken = np.empty(num_found, dtype=np.bool_)
        for place in range(len(cut_offs)):
            is_taken[:] = False
            for t in range(num_truth):
                if truth_kind[first + t] == _OTHER:
                    continue
                best, most = -1, -1.0
                for d in range(num_found):
                    if found_kind[begin + d] != _COUNTED or is_taken[d] or score[begin + d] < cut_offs[place]:
                        continue
                    own = overlap[pair_start[frame] + d * num_truth + t]
                    if own > min_overlap and own > most:
                        best, most = d, own
                if best < 0:
                    continue
                is_taken[best] = True
                if truth_kind[first + t] == _COUNTED:
                    counts[place, 0] += 1
                    counts[place, 2] += 0.5 * (1 + np.cos(truth_alpha[first + t] - found_alpha[begin + best]))
            for d in range(num_found):
                if is_taken[d] or found_kind[begin + d] != _COUNTED or score[begin + d] < cut_offs[place]:
                    continue
                is_excused = False
                if len(in_region) > 0:
                    for t in range(num_truth):
                        if in_region[pair_start[frame] + d * num_truth + t] > min_overlap:
                            is_excused = True
                if not is_excused:
                    counts[place, 1] += 1
    return counts
