"""What is a set of detections worth on nuScenes' detection benchmark? mAP over centre distances, five errors of the true
positives, and NDS.

Definition: Caesar et al., "nuScenes: A multimodal dataset for autonomous driving", CVPR 2020, section 3, in the settings
`detection_cvpr_2019` of nuscenes-devkit 1.2.0, whose numbers these are.

Boxes stand upright in the global frame, metres, radians. Shapes: K boxes, S samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from simipu3d.ops.rotated_iou import points_in_boxes

CLASS_RANGE: Mapping[str, float] = {
    **dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), 50.0),
    **dict.fromkeys(("pedestrian", "motorcycle", "bicycle"), 40.0),
    **dict.fromkeys(("traffic_cone", "barrier"), 30.0),
}
"""The ten classes, and how far from the ego vehicle, seen from above, each is scored, metres."""
DISTANCES = (0.5, 1.0, 2.0, 4.0)
"""A prediction is right within so many metres of the truth's centre, seen from above."""
ERROR_DISTANCE = 2.0
MIN_RECALL, MIN_PRECISION = 0.1, 0.1
MAX_BOXES_PER_SAMPLE = 500
MEAN_AP_WEIGHT = 5
NUM_RECALLS = 101

ERRORS = ("translation", "scale", "orientation", "velocity", "attribute")
"""ATE in metres, ASE = 1 - IoU of the sizes, AOE in radians, AVE in metres a second, AAE = 1 - accuracy."""
NOT_MEASURED = {"traffic_cone": ("orientation", "velocity", "attribute"), "barrier": ("velocity", "attribute")}
IN_RACKS = ("bicycle", "motorcycle")

ATTRIBUTES = (
    *("pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing"),
    *("cycle.with_rider", "cycle.without_rider"),
    *("vehicle.moving", "vehicle.parked", "vehicle.stopped"),
)


@dataclass(frozen=True, eq=False)
class SampleBoxes:
    """Boxes of S samples.

    Attributes:
        sample: (K,) int64 which sample; ascending in truth.
        center: (K, 3) geometric centre, global frame.
        size: (K, 3) width, length, height.
        yaw: (K,) of the length axis, counter-clockwise from +x.
        velocity: (K, 2) metres a second, NaN where unknown.
        names: (K,) class names.
        attributes: (K,) words, "" where there is none.
        score: (K,) higher is surer; zeros for labels.
        num_points: (K,) lidar and radar points inside; -1 where they are not counted.
    """

    sample: NDArray[np.int64]
    center: NDArray[np.float64]
    size: NDArray[np.float64]
    yaw: NDArray[np.float64]
    velocity: NDArray[np.float64]
    names: NDArray[np.str_]
    attributes: NDArray[np.str_]
    score: NDArray[np.float64]
    num_points: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, rows: NDArray) -> "SampleBoxes":
        """Some of the boxes, by index or mask."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class ClassScore(NamedTuple):
    """One class: objects that count, AP in [0, 1] by distance, and errors by `ERRORS`, NaN where not measured."""

    name: str
    num_objects: int
    ap: dict[float, float]
    errors: dict[str, float]


class DetectionScore(NamedTuple):
    """NDS, mean AP, mean errors by `ERRORS`, and the ten classes. A class without objects has AP 0 and errors 1, as in
    the official evaluation."""

    nds: float
    mean_ap: float
    errors: dict[str, float]
    classes: list[ClassScore]


def nuscenes_score(
    truth: SampleBoxes,
    predictions: SampleBoxes,
    ego_xy: NDArray[np.float64] | None = None,
    racks: SampleBoxes | None = None,
) -> DetectionScore:
    """Filter both sides as the benchmark does, and score.

    Args:
        truth, predictions: boxes of the same samples.
        ego_xy: (S, 2) where the ego vehicle is at the lidar's time; None leaves the class ranges out.
        racks: bicycle racks: bicycles and motorcycles whose centre lies in one are not scored.

    Raises:
        ValueError: boxes or scores that are NaN or infinite, sizes not above 0, an unknown class, or too many boxes in a
            sample.
    """
    sides = []
    for what, boxes in (("truth", truth), ("predictions", predictions)):
        _check(what, boxes)
        sides.append(_counted(boxes, ego_xy, racks))
    most = int(np.bincount(predictions.sample).max(initial=0))
    if most > MAX_BOXES_PER_SAMPLE:
        raise ValueError(f"predictions: {most} boxes in one sample; the benchmark allows {MAX_BOXES_PER_SAMPLE}")
    classes = [_class_score(name, *(side.take(side.names == name) for side in sides)) for name in CLASS_RANGE]
    mean_ap = float(np.mean([np.mean(list(each.ap.values())) for each in classes]))
    errors = {error: float(np.nanmean([each.errors[error] for each in classes])) for error in ERRORS}
    kept = sum(max(0.0, 1.0 - value) for value in errors.values())
    nds = (MEAN_AP_WEIGHT * mean_ap + kept) / (MEAN_AP_WEIGHT + len(ERRORS))
    return DetectionScore(nds, mean_ap, errors, classes)


def _check(what: str, boxes: SampleBoxes) -> None:
    for name in ("center", "size", "yaw", "score"):
        if not np.isfinite(getattr(boxes, name)).all():
            raise ValueError(f"{what}: {name} holds NaN or infinity")
    if (boxes.size <= 0).any():
        raise ValueError(f"{what}: size holds a number that is not above 0")
    unknown = sorted(set(boxes.names.tolist()) - set(CLASS_RANGE))
    if unknown:
        raise ValueError(f"{what}: unknown class {unknown[0]!r}; there are {', '.join(CLASS_RANGE)}")


def _counted(boxes: SampleBoxes, ego_xy: NDArray[np.float64] | None, racks: SampleBoxes | None) -> SampleBoxes:
    """The boxes within their class's range, that hold a point, outside of racks."""
    kept = boxes.num_points != 0
    if ego_xy is not None:
        distance = np.linalg.norm(boxes.center[:, :2] - ego_xy[boxes.sample], axis=1)
        kept &= distance < np.array([CLASS_RANGE[name] for name in boxes.names.tolist()]).reshape(-1)
    if racks is not None and len(racks):
        for sample in np.unique(racks.sample):
            own = racks.take(racks.sample == sample)
            rows = np.flatnonzero((boxes.sample == sample) & np.isin(boxes.names, IN_RACKS))
            inside = points_in_boxes(boxes.center[rows], own.center, own.size[:, [1, 0, 2]], own.yaw)
            kept[rows[inside.any(axis=0)]] = False
    return boxes.take(kept)


def _class_score(name: str, truth: SampleBoxes, found: SampleBoxes) -> ClassScore:
    # Of equal scores the later one goes first, as in the official evaluation.
    found = found.take(np.lexsort((np.arange(len(found)), found.score))[::-1])
    ap, errors = {}, dict.fromkeys(ERRORS, 1.0)
    for distance in DISTANCES:
        partner = _match(truth.sample, truth.center[:, :2], found.sample, found.center[:, :2], distance)
        if not (partner >= 0).any():
            ap[distance] = 0.0
            continue
        precision, confidence = _curve(partner >= 0, found.score, len(truth))
        above = np.maximum(precision[_first_recall() :] - MIN_PRECISION, 0.0)
        ap[distance] = float(above.mean()) / (1.0 - MIN_PRECISION)
        if distance == ERROR_DISTANCE:
            errors = _mean_errors(name, truth, found, partner, confidence)
    for error in NOT_MEASURED.get(name, ()):
        errors[error] = np.nan
    return ClassScore(name, len(truth), ap, errors)


def _first_recall() -> int:
    """Index of the lowest recall sample that counts, 0.11."""
    return round(100 * MIN_RECALL) + 1


def _curve(is_right: NDArray[np.bool_], score: NDArray[np.float64], num_objects: int) -> tuple[NDArray, NDArray]:
    """Precision and score at 101 recalls, 0 beyond the highest recall reached."""
    hits = np.cumsum(is_right).astype(np.float64)
    recall, wanted = hits / num_objects, np.linspace(0, 1, NUM_RECALLS)
    precision = hits / np.arange(1, len(hits) + 1)
    return np.interp(wanted, recall, precision, right=0), np.interp(wanted, recall, score, right=0)


def _mean_errors(
    name: str, truth: SampleBoxes, found: SampleBoxes, partner: NDArray[np.int64], confidence: NDArray[np.float64]
) -> dict[str, float]:
    """Each error's running mean over descending scores, taken at the scores of the 101 recalls, averaged from recall 0.11
    to the highest reached."""
    reached = np.flatnonzero(confidence)
    last = int(reached[-1]) if len(reached) else 0
    if last < _first_recall():
        return dict.fromkeys(ERRORS, 1.0)
    hits = found.take(partner >= 0)
    own = truth.take(partner[partner >= 0])
    means = {}
    for error, values in _errors(name, own, hits).items():
        known = ~np.isnan(values)
        running = np.ones(len(values))
        if known.any():
            count = np.cumsum(known)
            running = np.divide(np.nancumsum(values), count, out=np.zeros(len(values)), where=count > 0)
        at_recall = np.interp(confidence[::-1], hits.score[::-1], running[::-1])[::-1]
        means[error] = float(at_recall[_first_recall() : last + 1].mean())
    return means


def _errors(name: str, truth: SampleBoxes, found: SampleBoxes) -> dict[str, NDArray[np.float64]]:
    """Of matched boxes, row by row."""
    common = np.minimum(truth.size, found.size).prod(axis=1)
    period = np.pi if name == "barrier" else 2 * np.pi
    turn = (truth.yaw - found.yaw + period / 2) % period - period / 2
    is_other = (truth.attributes != found.attributes).astype(np.float64)
    return {
        "translation": np.linalg.norm(truth.center[:, :2] - found.center[:, :2], axis=1),
        "scale": 1 - common / (truth.size.prod(axis=1) + found.size.prod(axis=1) - common),
        "orientation": np.abs(turn),
        "velocity": np.linalg.norm(truth.velocity - found.velocity, axis=1),
        "attribute": np.where(truth.attributes == "", np.nan, is_other),
    }


def _match(
    truth_sample: NDArray, truth_xy: NDArray, found_sample: NDArray, found_xy: NDArray, distance: float
) -> NDArray[np.int64]:
    """(K,) the truth of each prediction, -1 where it is wrong; predictions come best first, each takes the nearest truth
    of its sample that is still free."""
    num_samples = int(max(truth_sample.max(initial=-1), found_sample.max(initial=-1))) + 1
    start = np.searchsorted(truth_sample, np.arange(num_samples + 1))
    partner = np.full(len(found_sample), -1, dtype=np.int64)
    _take_nearest(
        start, np.ascontiguousarray(truth_xy), found_sample, np.ascontiguousarray(found_xy), distance, partner
    )
    return partner


@njit(cache=True, nogil=True)
def _take_nearest(start, truth_xy, found_sample, found_xy, distance, partner):
    is_free = np.ones(len(truth_xy), dtype=np.bool_)
    for row in range(len(found_sample)):
        best, least = -1, np.inf
        for other in range(start[found_sample[row]], start[found_sample[row] + 1]):
            if is_free[other]:
                dx, dy = truth_xy[other, 0] - found_xy[row, 0], truth_xy[other, 1] - found_xy[row, 1]
                away = np.sqrt(dx * dx + dy * dy)
                if away < least:
                    best, least = other, away
        if best >= 0 and least < distance:
            is_free[best] = False
            partner[row] = best
