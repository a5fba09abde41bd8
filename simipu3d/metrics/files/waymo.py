"""Waymo's `Objects` files: one serialized message that holds the labels or predictions of many frames.

Read and written without TensorFlow and without Waymo's package. What compute_detection_metrics_main takes, and what a
submission holds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError, Message

from simipu3d.data.readers.waymo_protos import message_class
from simipu3d.errors import UserError
from simipu3d.metrics.files.scores import Scores, Table, kept, read_bytes, shown
from simipu3d.metrics.waymo import LEVELS, TYPES, FrameObjects, Precision, overall, waymo_ap

BOX_FIELDS = ("center_x", "center_y", "center_z", "length", "width", "height", "heading")


class FrameName(NamedTuple):
    """What a frame is called: the segment, the time in microseconds, and the camera (0 for boxes in space)."""

    segment: str
    timestamp: int
    camera: int = 0


def score(truth: Path, predictions: Path) -> Scores:
    """Score one `Objects` file against another.

    Raises:
        UserError: a file is missing, damaged or cut short, an object lacks what it must have, or no frame is in both.
    """
    names: dict[FrameName, int] = {}
    labels = read_objects(truth, names, needs_score=False)
    num_frames = len(names)
    if not (labels.num_points > 0).any():
        raise UserError(f"{truth}: no label has num_lidar_points_in_box above 0, and others are not scored")
    found = read_objects(predictions, names, needs_score=True)
    seen = np.intersect1d(labels.frame, found.frame)
    if len(found) and not len(seen):
        raise UserError(
            f"{predictions}: none of its {len(np.unique(found.frame))} frames is among the {num_frames} of {truth} "
            f"(context_name and frame_timestamp_micros; first: {next(iter(names))})"
        )
    cells = waymo_ap(labels, found)
    without = num_frames - len(seen)
    title = f"Waymo 3D detection, {num_frames} labelled frames" + (
        f", {without} without predictions" if without else ""
    )
    values = {
        "frames": num_frames,
        "frames_without_predictions": without,
        "overall": {
            f"LEVEL_{level}": dict(zip(("ap", "aph"), map(kept, overall(cells, level)), strict=True))
            for level in LEVELS
        },
        "breakdowns": {
            cell.name: {"ap": kept(cell.ap), "aph": kept(cell.aph), "num_objects": cell.num_objects} for cell in cells
        },
    }
    return Scores([_table(title, cells)], values)


def _table(title: str, cells: list[Precision]) -> Table:
    rows = []
    for easy, hard in zip(cells[::2], cells[1::2], strict=True):
        span = "" if easy.range is None else f" {easy.range[0]:.0f} m to {easy.range[1]:.0f} m"
        numbers = (shown(100 * value) for value in (easy.ap, easy.aph, hard.ap, hard.aph))
        if hard.num_objects:
            rows.append((TYPES[easy.kind] + span, *numbers, f"{easy.num_objects}/{hard.num_objects}"))
    means = [100 * value for level in LEVELS for value in overall(cells, level)]
    rows.append(("mean of vehicle, pedestrian, cyclist", *(shown(value) for value in means), ""))
    return Table(title, ("what", "L1 mAP", "L1 mAPH", "L2 mAP", "L2 mAPH", "labels L1/L2"), rows)


def read_objects(path: Path, names: dict[FrameName, int], *, needs_score: bool) -> FrameObjects:
    """All objects of a file; labels of unknown type are left out.

    Args:
        path: the serialized message.
        names: numbers of the frames; those that are new are added.
        needs_score: refuse an object that has no score.

    Raises:
        UserError: the file is no such message or is cut short, or an object lacks a box or a score, or has a type that is
            none, or a box or score that is NaN or infinite.
    """
    try:
        message = message_class("Objects").FromString(read_bytes(path))
    except DecodeError as error:
        raise UserError(f"{path}: is no Objects message, or is cut in the middle ({error})") from error
    objects = [each for each in message.objects if needs_score or each.object.type != 0]
    if not objects and not needs_score:
        raise UserError(f"{path}: holds no object")
    rows = np.array([_numbers(path, at, each, needs_score) for at, each in enumerate(objects)], dtype=np.float64)
    rows = rows.reshape(-1, len(BOX_FIELDS) + 1)
    frames = [names.setdefault(_frame_name(each), len(names)) for each in objects]
    labels = [each.object for each in objects]
    return FrameObjects(
        frame=np.array(frames, dtype=np.int64),
        boxes=rows[:, : len(BOX_FIELDS)],
        kind=np.array([label.type for label in labels], dtype=np.int64),
        score=rows[:, -1],
        num_points=np.array([label.num_lidar_points_in_box for label in labels], dtype=np.int64),
        difficulty=np.array([label.detection_difficulty_level for label in labels], dtype=np.int64),
        in_no_label_zone=np.array([each.overlap_with_nlz for each in objects], dtype=bool),
    )


def _frame_name(each: Message) -> FrameName:
    return FrameName(each.context_name.decode("utf-8", "replace"), each.frame_timestamp_micros, each.camera_name)


def _numbers(path: Path, place: int, each: Message, needs_score: bool) -> list[float]:
    """The box and the score of one object."""
    where = f"{path}: object {place} of frame {'/'.join(map(str, _frame_name(each)[:2]))}"
    if not each.object.HasField("box"):
        raise UserError(f"{where} has no box")
    if each.object.type not in TYPES:
        known = ", ".join(f"{kind} {name}" for kind, name in TYPES.items())
        raise UserError(f"{where}: unknown type {each.object.type}; there are {known}")
    if needs_score and not each.HasField("score"):
        raise UserError(f"{where} has no score; a prediction needs one in [0, 1]")
    values = [getattr(each.object.box, name) for name in BOX_FIELDS]
    values.append(each.score if each.HasField("score") else 1.0)
    if not np.isfinite(values).all():
        raise UserError(f"{where}: its box or score holds NaN or infinity")
    if min(values[3:6]) < 0:
        raise UserError(f"{where}: its box has a size below 0")
    return values


def write_objects(path: Path, frames: Sequence[FrameName], objects: FrameObjects, *, with_score: bool = True) -> None:
    """Write an `Objects` file.

    Args:
        path: the file.
        frames: names of the frames; `objects.frame` are indices into them.
        objects: labels or predictions.
        with_score: predictions; labels get their points and difficulties instead.
    """
    message = message_class("Objects")()
    for row in range(len(objects)):
        frame = frames[int(objects.frame[row])]
        each = message.objects.add(context_name=frame.segment.encode(), frame_timestamp_micros=frame.timestamp)
        if frame.camera:
            each.camera_name = frame.camera
        for name, value in zip(BOX_FIELDS, objects.boxes[row].tolist(), strict=True):
            setattr(each.object.box, name, value)
        each.object.type = int(objects.kind[row])
        if with_score:
            each.score = float(objects.score[row])
            each.overlap_with_nlz = bool(objects.in_no_label_zone[row])
        else:
            each.object.num_lidar_points_in_box = int(objects.num_points[row])
            each.object.detection_difficulty_level = int(objects.difficulty[row])
    path.write_bytes(message.SerializeToString())
