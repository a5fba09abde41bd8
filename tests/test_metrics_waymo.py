"""Waymo's mAP and mAPH: perfect, empty, by hand, against a slow loop, and a file cut in the middle."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from simipu3d.data.readers.tfrecord import read_record
from simipu3d.data.readers.waymo_protos import message_class
from simipu3d.errors import UserError
from simipu3d.metrics.files.waymo import FrameName, read_objects, score, write_objects
from simipu3d.metrics.waymo import RANGES, FrameObjects, average_precision, overall, waymo_ap
from simipu3d.ops.rotated_iou import iou_3d


def random_sets(seed: int, num_frames: int = 4, per_frame: int = 40):
    """Labels in crowds, and doubled, shifted, turned labels as detections."""
    rng = np.random.default_rng(seed)
    num = num_frames * per_frame
    bearing, distance = rng.uniform(-np.pi, np.pi, num), rng.uniform(0, 70, num)
    x, y = distance * np.cos(bearing), distance * np.sin(bearing)
    size, heading = rng.uniform(1, 5, (num, 3)), rng.uniform(-4, 4, num)
    boxes = np.column_stack([x, y, rng.uniform(0, 2, num), size, heading])
    truth = FrameObjects(
        frame=rng.integers(0, num_frames, num) * 7,
        boxes=boxes,
        kind=rng.choice([1, 2, 3, 4], num, p=[0.4, 0.3, 0.1, 0.2]),
        score=np.ones(num),
        num_points=rng.integers(0, 25, num),
        difficulty=rng.choice([0, 0, 0, 1, 2], num),
        in_no_label_zone=np.zeros(num, dtype=bool),
    )
    rows = rng.choice(num, int(1.6 * num))
    guess = truth.take(rows)
    moved = guess.boxes + rng.normal(0, 0.12, guess.boxes.shape) * (1, 1, 1, 1, 1, 1, 0.5)
    moved[:, 3:6] = np.abs(moved[:, 3:6])
    moved[:, 6] += np.pi * (rng.random(len(rows)) < 0.1)
    found = replace(
        guess,
        boxes=moved,
        kind=np.where(rng.random(len(rows)) < 0.05, rng.choice([1, 2, 3, 4], len(rows)), guess.kind),
        score=rng.random(len(rows)),
        in_no_label_zone=rng.random(len(rows)) < 0.1,
    )
    return truth, found


def slow_area(precision, recall):
    """The curve point by point: highest precision at or above each recall, steps of 0.05 in gaps, trapezoids."""
    best = {0.0: 1.0}
    for p, r in zip(precision, recall, strict=True):
        best[r] = max(p, best.get(r, 0))
    recalls = sorted(best)
    points = []
    for k, r in enumerate(recalls):
        own = max(best[other] for other in recalls[k:])
        points.append([r, own])
        if k + 1 < len(recalls):
            after = max(best[other] for other in recalls[k + 1 :])
            steps = [recalls[k + 1] - 0.05 * n for n in range(1, 21)]
            points += [[s, after] for s in sorted(steps) if s - r > 1e-6 and recalls[k + 1] - r > 0.05 + 1e-6]
    if len(points) > 1:
        points[0][1] = points[1][1]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def slow_ap(truth, found, kind, span, level):
    """One break-down by the definition, with SciPy's assignment of each whole frame."""
    low, high = span or (0, np.inf)

    def chosen(objects, is_truth):
        away = np.sqrt((objects.boxes[:, :3] ** 2).sum(axis=1))
        keep = (objects.kind == kind) & (away >= low) & (away < high)
        return np.flatnonzero(keep & (objects.num_points > 0) if is_truth else keep)

    labels, guesses = chosen(truth, True), chosen(found, False)
    minimum, precision, weighted, recall = {1: 0.7}.get(kind, 0.5), [], [], []
    hard = {t: truth.difficulty[t] or (2 if truth.num_points[t] <= 5 else 1) for t in labels}
    tables = {}
    for frame in set(truth.frame) | set(found.frame):
        rows, columns = [p for p in guesses if found.frame[p] == frame], [t for t in labels if truth.frame[t] == frame]
        tables[frame] = (
            rows,
            columns,
            iou_3d(*(torch.from_numpy(b) for b in (found.boxes[rows], truth.boxes[columns]))).numpy(),
        )
    for number in range(101):
        hits = accuracy = wrong = missed = 0
        for rows, columns, iou in tables.values():
            active = [k for k, p in enumerate(rows) if np.float32(found.score[p]) >= np.float32(number * 0.01)]
            allowed = np.where(iou[active] >= minimum, iou[active], 0)
            right = [(active[a], b) for a, b in zip(*linear_sum_assignment(-allowed), strict=True) if allowed[a, b] > 0]
            hits += len(right)
            for a, b in right:
                turn = abs(found.boxes[rows[a], 6] - truth.boxes[columns[b], 6]) % (2 * np.pi)
                accuracy += 1 - min(turn, 2 * np.pi - turn) / np.pi
            alone = set(active) - {a for a, _ in right}
            wrong += sum(not found.in_no_label_zone[rows[a]] for a in alone)
            taken = {b for _, b in right}
            missed += sum(hard[t] <= level for k, t in enumerate(columns) if k not in taken)
        recall.append(hits / (hits + missed) if hits + missed else 0.0)
        empty = hits + wrong == 0
        precision.append(1.0 if recall[-1] == 0 else 0.0 if empty else hits / (hits + wrong))
        weighted.append(1.0 if recall[-1] == 0 else 0.0 if empty else accuracy / (hits + wrong))
    if not len(labels):
        return np.nan, np.nan
    return slow_area(precision, recall), slow_area(weighted, recall)


@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_the_slow_loop(seed):
    truth, found = random_sets(seed)
    cells = waymo_ap(truth, found)
    assert len(cells) == 4 * 2 + 4 * 3 * 2
    for cell in cells:
        expected = slow_ap(truth, found, cell.kind, cell.range, cell.level)
        assert (cell.ap, cell.aph) == pytest.approx(expected, abs=1e-6, nan_ok=True), cell.name
    assert 0.1 < overall(cells, 2)[1] < overall(cells, 2)[0] < 0.95
    assert cells[0].ap != cells[1].ap, "the levels differ"


def label(x=10.0, score=1.0, kind=1, points=20, heading=0.0, frame=0, **changes) -> FrameObjects:
    one = {
        "frame": np.array([frame]),
        "boxes": np.array([[x, 0.0, 1.0, 4.0, 2.0, 1.5, heading]]),
        "kind": np.array([kind]),
        "score": np.array([score]),
        "num_points": np.array([points]),
        "difficulty": np.array([0]),
        "in_no_label_zone": np.array([False]),
    }
    return FrameObjects(**one | {name: np.array([value]) for name, value in changes.items()})


def together(*parts: FrameObjects) -> FrameObjects:
    return FrameObjects(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def vehicle(truth, found, level=2):
    return next(cell for cell in waymo_ap(truth, found) if (cell.kind, cell.range, cell.level) == (1, None, level))


def test_by_hand():
    cell = vehicle(label(), label(score=0.9, heading=np.pi / 2, boxes=[10.0, 0, 1, 2, 4, 1.5, np.pi / 2]))
    assert (cell.ap, cell.aph) == pytest.approx((1, 0.5))
    # Two labels, one found: recall is 1/2, and nothing above it counts.
    assert vehicle(together(label(), label(40.0)), label(score=0.3)).ap == pytest.approx(0.5)
    # A surer false detection: precision 1/2 from recall 1 down to 0.
    wrong = label(20.0, score=0.8)
    assert vehicle(label(), together(label(score=0.3), wrong)).ap == pytest.approx(0.5)
    assert vehicle(
        label(), together(label(score=0.3), label(20.0, score=0.8, in_no_label_zone=True))
    ).ap == pytest.approx(1)
    # A hard label is missed: level 1 does not mind. It is found: both levels count it.
    both = together(label(), label(40.0, points=5))
    assert [vehicle(both, label(score=0.3), level).ap for level in (1, 2)] == pytest.approx([1, 0.5])
    assert [vehicle(both, label(40.0, score=0.3), level).ap for level in (1, 2)] == pytest.approx([0.5, 0.5])
    assert vehicle(together(label(), label(40.0, points=0)), label(score=0.3)).ap == pytest.approx(1)
    assert vehicle(label(), label(score=0.3, frame=1)).ap == 0
    assert vehicle(label(), label(score=0.3, kind=2)).ap == 0
    assert vehicle(label(), label(boxes=[10.0, 0, 1, 4, 2, 1.5 * 0.7, 0])).ap == pytest.approx(1), "0.7 is enough"
    assert vehicle(label(), label(boxes=[10.0, 0, 1, 4, 2, 1.5 * 0.69, 0])).ap == 0
    border = label(boxes=[30.0, 0, 0, 4, 2, 1.5, 0])
    counts = {cell.range: cell.num_objects for cell in waymo_ap(border, border) if (cell.kind, cell.level) == (1, 2)}
    assert counts == {None: 1, RANGES[0]: 0, RANGES[1]: 1, RANGES[2]: 0}


def test_the_largest_sum_is_matched():
    """The middle detection fits the left label best; to take it would leave the left detection without one."""
    truth = together(label(0.0), label(0.6))
    found = together(label(-0.4, score=0.5), label(0.2, score=0.9))
    cell = vehicle(truth, found)
    assert cell.ap == pytest.approx(1)
    matched = [waymo_ap(truth, found.take([row]))[1].ap for row in (0, 1)]
    assert matched == pytest.approx([0.5, 0.5])


def test_steps_in_gaps_of_recall():
    """From recall 1 the precision 0.5 reaches down to 0.45 in steps; from there it slopes to 1 at recall 0.4."""
    area = average_precision(np.array([0.5, 1.0]), np.array([1.0, 0.4]))
    assert area == pytest.approx(0.55 * 0.5 + 0.05 * 0.75 + 0.4, abs=1e-6)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        recall = np.sort(rng.choice([rng.random(8), np.round(rng.random(8), 1)])).astype(np.float32).astype(np.float64)
        precision = rng.random(8)
        assert average_precision(precision, recall) == pytest.approx(slow_area(precision, recall), abs=1e-5)


def test_perfect_empty_and_wrong_input():
    truth, _ = random_sets(3)
    rng = np.random.default_rng(0)
    cells = waymo_ap(
        truth, replace(truth.take(truth.num_points > 0), score=rng.uniform(0.02, 1, (truth.num_points > 0).sum()))
    )
    assert [cell.ap for cell in cells] == pytest.approx([1] * len(cells))
    assert [cell.aph for cell in cells] == pytest.approx([1] * len(cells))
    assert {cell.range for cell in cells} == {None, *RANGES}
    nothing = truth.take([])
    assert {cell.ap for cell in waymo_ap(truth, nothing)} == {0.0}
    assert np.isnan(overall(waymo_ap(nothing, nothing), 1)).all()
    assert vehicle(label(), label(boxes=[10.0, 0, 1, 0, 2, 1.5, 0])).ap == 0
    for wrong in (label(x=np.nan), label(score=np.nan), label(kind=0), label(boxes=[10.0, 0, 1, -1, 2, 1, 0])):
        with pytest.raises(ValueError, match="predictions: "):
            waymo_ap(label(), wrong)


def test_files(tmp_path):
    truth, found = random_sets(1)
    names = [FrameName(f"segment-{number // 2}", number) for number in range(22)]
    write_objects(tmp_path / "gt.bin", names, truth, with_score=False)
    write_objects(tmp_path / "pred.bin", names, found)
    values = score(tmp_path / "gt.bin", tmp_path / "pred.bin").values
    for cell in waymo_ap(truth, found):
        own = values["breakdowns"][cell.name]
        assert (own["ap"], own["aph"]) == pytest.approx((cell.ap, cell.aph), abs=1e-6)
    assert "RANGE_TYPE_VEHICLE_[50, +inf)_LEVEL_1" in values["breakdowns"]
    whole = (tmp_path / "pred.bin").read_bytes()
    for length in (1, len(whole) // 2 + 5, len(whole) - 3):  # a cut between two objects leaves a sound file
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.bin: is no Objects message, or is cut"):
            score(tmp_path / "gt.bin", tmp_path / "cut.bin")
    back = read_objects(tmp_path / "pred.bin", {}, needs_score=True)
    assert np.array_equal(back.boxes, found.boxes)
    assert np.array_equal(back.in_no_label_zone, found.in_no_label_zone)


def test_real_labels_as_predictions(samples, tmp_path):
    """The labels of a real frame, written as truth and as predictions."""
    record = read_record(samples / "waymo_v1" / "pvps_data_one_frame.tfrecord", 0, 0)
    labels = [
        each for each in message_class("Frame").FromString(record).laser_labels if each.num_lidar_points_in_box > 0
    ]
    truth, found = message_class("Objects")(), message_class("Objects")()
    for place, each in enumerate(labels):
        truth.objects.add(object=each, context_name=b"s", frame_timestamp_micros=1)
        found.objects.add(object=each, context_name=b"s", frame_timestamp_micros=1, score=(place + 1) / len(labels))
    for name, message in (("gt", truth), ("pred", found)):
        (tmp_path / name).write_bytes(message.SerializeToString())
    values = score(tmp_path / "gt", tmp_path / "pred").values
    present = [each for each in values["breakdowns"].values() if each["num_objects"]]
    assert len(present) >= 6
    for each in present:
        assert (each["ap"], each["aph"]) == pytest.approx((1, 1))
