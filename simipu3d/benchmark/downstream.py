"""Rotated boxes, and the scorers of KITTI, Waymo and nuScenes.

Every row is one call on synthetic input (KITTI: the labels of `--samples`, repeated, where there are some), after a first
call on a small one that compiles the kernels; a figure is the median of its rounds. `torch.get_num_threads()` threads work
on rotated boxes; the rest runs on one. `core_seconds` is what the process used of all cores: on a machine that does other
work too, it is the figure to compare.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simipu3d.metrics.files import kitti as kitti_files
from simipu3d.metrics.files import waymo as waymo_files
from simipu3d.metrics.kitti import CameraObjects, kitti_ap
from simipu3d.metrics.nuscenes import CLASS_RANGE, SampleBoxes, nuscenes_score
from simipu3d.metrics.waymo import FrameObjects, waymo_ap
from simipu3d.ops.rotated_iou import bev_iou, iou_3d, points_in_boxes, rotated_nms

NUM_KITTI, NUM_WAYMO, NUM_NUSCENES = 3769, 200, 6019
"""Frames: KITTI's val list; what a Waymo row scores; nuScenes' val split."""


def measure(samples: Path | None, quick: bool) -> list[dict[str, Any]]:
    """All rows.

    Args:
        samples: folder with kitti_labels/training/label_2, or None.
        quick: small sizes, one round; only shows that everything runs.
    """
    rounds, share = (1, 0.02) if quick else (3, 1.0)
    rows = [*_rotated_rows(max(20, int(1000 * share)), rounds)]
    with tempfile.TemporaryDirectory(prefix="simipu3d-benchmark-") as folder:
        rows += _kitti_rows(Path(folder), samples, int(NUM_KITTI * share), rounds)
        rows += _waymo_rows(Path(folder), int(NUM_WAYMO * share), rounds)
    return [*rows, _nuscenes_row(int(NUM_NUSCENES * share), rounds)]


def _timed(case: str, amount: str, call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    seconds, of_cores = [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - start)
        of_cores.append(time.process_time() - used)
    medians = {"seconds": statistics.median(seconds), "core_seconds": statistics.median(of_cores)}
    return {"case": case, "amount": amount, **medians, "threads": torch.get_num_threads()}


def _boxes(rng: np.random.Generator, num: int, spread: float) -> np.ndarray:
    place = rng.uniform(-spread, spread, (num, 3)) * (1, 1, 0.02)
    return np.column_stack([place, rng.uniform(0.5, 5, (num, 3)), rng.uniform(-np.pi, np.pi, num)])


def _rotated_rows(num: int, rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for name, spread in (("75 m", 75.0), ("4 m, crowded", 4.0)):
        a, b = (torch.from_numpy(_boxes(rng, num, spread)) for _ in range(2))
        for function, backend, times in ((bev_iou, "numba", rounds), (iou_3d, "numba", rounds), (iou_3d, "torch", 1)):
            function(a[:2], b[:2], backend=backend)
            case = f"{function.__name__}, boxes within {name}, {backend}"
            call = functools.partial(function, a, b, backend=backend)
            rows.append(_timed(case, f"{num} x {num}", call, times))
    scores = torch.from_numpy(rng.random(num))
    rotated_nms(a[:2], scores[:2], 0.1)
    rows.append(_timed("rotated_nms, crowded, numba", f"{num}", lambda: rotated_nms(a, scores, 0.1), rounds))
    xyz, parts = rng.uniform(-4, 4, (20 * num, 3)), (a[:50, :3].numpy(), a[:50, 3:6].numpy(), a[:50, 6].numpy())
    points_in_boxes(xyz[:2], *parts)
    rows.append(_timed("points_in_boxes, numba", f"50 x {len(xyz)}", lambda: points_in_boxes(xyz, *parts), rounds))
    return rows


def _kitti_rows(folder: Path, samples: Path | None, num: int, rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    labels = None if samples is None else samples / "kitti_labels" / "training" / "label_2"
    if labels is not None and labels.is_dir():
        known = list(kitti_files.read_folder(labels, needs_score=False).values())
    else:
        known = [_kitti_frame(rng) for _ in range(200)]
    truth = [known[number % len(known)] for number in range(num)]
    found = [_perturbed(rng, frame) for frame in truth]
    names = [f"{number:06d}" for number in range(num)]
    kitti_files.write_folder(folder / "gt", dict(zip(names, truth, strict=True)), with_score=False)
    kitti_files.write_folder(folder / "pred", dict(zip(names, found, strict=True)))
    kitti_ap(truth[:1], found[:1])
    amount = f"{num} frames, {sum(map(len, truth))} labels, {sum(map(len, found))} predictions"
    return [
        _timed("KITTI AP, arrays, one set of overlaps", amount, lambda: kitti_ap(truth, found), rounds),
        _timed("KITTI AP, files, both sets", amount, lambda: kitti_files.score(folder / "gt", folder / "pred"), rounds),
    ]


def _kitti_frame(rng: np.random.Generator) -> CameraObjects:
    num = int(rng.integers(1, 12))
    corner = rng.uniform((0, 100), (1000, 200), (num, 2))
    place = np.column_stack([rng.uniform(-15, 15, num), np.full(num, 1.7), rng.uniform(5, 60, num)])
    return CameraObjects(
        names=tuple(rng.choice(["Car", "Pedestrian", "Cyclist", "Van"], num).tolist()),
        truncation=rng.choice([0.0, 0.2, 0.4], num),
        occlusion=rng.integers(0, 3, num).astype(np.float64),
        alpha=rng.uniform(-np.pi, np.pi, num),
        image_box=np.column_stack([corner, corner + rng.uniform(20, 120, (num, 2))]),
        size=rng.uniform(1.4, 4, (num, 3)),
        bottom_center=place,
        rotation_y=rng.uniform(-np.pi, np.pi, num),
        score=np.zeros(num),
    )


def _perturbed(rng: np.random.Generator, frame: CameraObjects) -> CameraObjects:
    """The labels shifted, each twice: about as many boxes as a detector keeps."""
    rows = np.repeat([k for k, name in enumerate(frame.names) if name != "DontCare"], 2).astype(np.int64)
    num = len(rows)
    return CameraObjects(
        names=tuple(frame.names[k] for k in rows),
        truncation=frame.truncation[rows],
        occlusion=frame.occlusion[rows],
        alpha=frame.alpha[rows] + rng.normal(0, 0.2, num),
        image_box=frame.image_box[rows] + rng.normal(0, 2, (num, 4)),
        size=frame.size[rows],
        bottom_center=frame.bottom_center[rows] + rng.normal(0, 0.2, (num, 3)),
        rotation_y=frame.rotation_y[rows] + rng.normal(0, 0.1, num),
        score=rng.random(num),
    )


def _waymo_rows(folder: Path, num_frames: int, rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    num = 200 * num_frames
    truth = FrameObjects(
        frame=np.repeat(np.arange(num_frames), 200),
        boxes=_boxes(rng, num, 75.0),
        kind=rng.choice([1, 2, 4], num, p=[0.6, 0.3, 0.1]),
        score=np.ones(num),
        num_points=rng.integers(1, 100, num),
        difficulty=np.zeros(num, dtype=np.int64),
        in_no_label_zone=np.zeros(num, dtype=bool),
    )
    moved = truth.boxes + rng.normal(0, 0.1, truth.boxes.shape)
    moved[:, 3:6] = np.abs(moved[:, 3:6])
    columns = ("frame", "kind", "num_points", "difficulty", "in_no_label_zone")
    found = FrameObjects(**{name: getattr(truth, name) for name in columns}, boxes=moved, score=rng.random(num))
    names = [waymo_files.FrameName("segment", number) for number in range(num_frames)]
    waymo_files.write_objects(folder / "gt.bin", names, truth, with_score=False)
    waymo_files.write_objects(folder / "pred.bin", names, found)
    waymo_ap(truth.take(truth.frame == 0), found.take(found.frame == 0))
    amount = f"{num_frames} frames, 200 labels and 200 predictions each"
    return [
        _timed("Waymo mAP/mAPH, arrays", amount, lambda: waymo_ap(truth, found), rounds),
        _timed(
            "Waymo, Objects files", amount, lambda: waymo_files.score(folder / "gt.bin", folder / "pred.bin"), rounds
        ),
    ]


def _nuscenes_row(num_samples: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def side(each: int) -> SampleBoxes:
        num = each * num_samples
        return SampleBoxes(
            sample=np.repeat(np.arange(num_samples), each),
            center=np.column_stack([rng.uniform(-55, 55, (num, 2)), np.zeros(num)]),
            size=rng.uniform(0.5, 6, (num, 3)),
            yaw=rng.uniform(-np.pi, np.pi, num),
            velocity=rng.normal(0, 3, (num, 2)),
            names=rng.choice(list(CLASS_RANGE), num),
            attributes=np.full(num, "vehicle.moving"),
            score=rng.random(num),
            num_points=np.ones(num, dtype=np.int64),
        )

    truth, found, ego_xy = side(30), side(200), np.zeros((num_samples, 2))
    nuscenes_score(truth.take(truth.sample == 0), found.take(found.sample == 0), ego_xy)
    amount = f"{num_samples} samples, {len(truth)} labels, {len(found)} predictions"
    return _timed("nuScenes NDS, arrays", amount, lambda: nuscenes_score(truth, found, ego_xy), rounds)
