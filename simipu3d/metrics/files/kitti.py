"""KITTI's label files: one text file a frame, one object a line.

A line holds: type, truncation, occlusion, alpha, 2D box (4), height, width, length, x, y, z of the bottom centre in the
rectified camera frame, rotation_y, and in results a score.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simipu3d.errors import UserError
from simipu3d.metrics.files.scores import Scores, Table, kept, read_text, same_frames, shown
from simipu3d.metrics.kitti import (
    DIFFICULTIES,
    LOOSE,
    NUM_SAMPLES,
    STRICT,
    CameraObjects,
    Precision,
    kitti_ap,
    mean_over_classes,
)

CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare")
NUM_COLUMNS = 15
WIDTHS: dict[str, int | tuple[int, int]] = {
    "truncation": 0,
    "occlusion": 1,
    "alpha": 2,
    "image_box": (3, 7),
    "size": (7, 10),
    "bottom_center": (10, 13),
}
METRICS = {"2d": "2D box", "aos": "orientation", "bev": "bird's eye view", "3d": "3D box"}


def score(truth: Path, predictions: Path, frames: Path | None = None) -> Scores:
    """Score a folder of results against a folder of labels.

    Args:
        truth: folder of label files (training/label_2).
        predictions: folder of result files, of 16 columns; an empty file is a frame without detections.
        frames: a list of the frames to score, such as ImageSets/val.txt; None takes every file.

    Raises:
        UserError: a file is missing or damaged, or a frame is absent.
    """
    names = same_frames(truth, predictions, ".txt", frames)
    labels = read_folder(truth, needs_score=False, names=names)
    found = read_folder(predictions, needs_score=True, names=names)
    tables: list[Table] = []
    values: dict[str, Any] = {"frames": len(names)}
    for title, key, thresholds in (("strict", "strict", STRICT), ("loose", "loose", LOOSE)):
        cells = kitti_ap(list(labels.values()), list(found.values()), thresholds)
        tables.append(_table(f"KITTI AP, {title} overlaps, {len(names)} frames", cells, thresholds))
        values[key] = [cell._asdict() | {"r11": kept(cell.r11), "r40": kept(cell.r40)} for cell in cells]
        values[f"{key}_overall"] = {
            metric: {
                level: dict(zip(("r11", "r40"), map(kept, mean_over_classes(cells, metric, level)), strict=True))
                for level in DIFFICULTIES
            }
            for metric in METRICS
        }
    return Scores(tables, values)


def _table(title: str, cells: list[Precision], thresholds: Mapping[str, tuple[float, float, float]]) -> Table:
    by_place = {(cell.class_name, cell.metric, cell.difficulty): cell for cell in cells}
    rows = []
    for class_name in thresholds:
        for metric, words in METRICS.items():
            own = [by_place[class_name, metric, level] for level in DIFFICULTIES]
            few = "*" if any(0 < cell.num_objects < NUM_SAMPLES for cell in own) else ""
            rates = [*(shown(cell.r11) for cell in own), *(shown(cell.r40) for cell in own)]
            counts = "/".join(str(cell.num_objects) for cell in own)
            rows.append((f"{class_name} {words}", f"{own[0].min_overlap:.2f}", *rates, counts + few))
    for metric, words in METRICS.items():
        means = [mean_over_classes(cells, metric, level) for level in DIFFICULTIES]
        rows.append(
            (f"overall {words}", "", *(shown(mean[0]) for mean in means), *(shown(mean[1]) for mean in means), "")
        )
    if any(row[-1].endswith("*") for row in rows):
        title += f" (*: fewer than {NUM_SAMPLES} objects count, so 100 cannot be reached)"
    columns = (*(f"R11 {level}" for level in DIFFICULTIES), *(f"R40 {level}" for level in DIFFICULTIES))
    return Table(title, ("what", "overlap", *columns, "objects"), rows)


def read_folder(folder: Path, *, needs_score: bool, names: Iterable[str] | None = None) -> dict[str, CameraObjects]:
    """Frame name -> its objects, in the order of `names` (None: all files, sorted).

    Raises:
        UserError: as in `read_objects`.
    """
    wanted = sorted(path.stem for path in folder.glob("*.txt")) if names is None else names
    return {name: read_objects(folder / f"{name}.txt", needs_score=needs_score) for name in wanted}


def read_objects(path: Path, *, needs_score: bool) -> CameraObjects:
    """The objects of one file, DontCare regions among them. A label file may have scores; they are read as such.

    Raises:
        UserError: the file is missing, or a line has another number of columns, a word that is no finite number, or a
            class that KITTI does not have.
    """
    names, rows = [], []
    wanted = "16 (the last is the score)" if needs_score else "15"
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{path}: line {number}"
        if needs_score and len(words) == NUM_COLUMNS:
            raise UserError(f"{where} has no score: 15 columns, and a prediction has {wanted}")
        if len(words) not in (NUM_COLUMNS, NUM_COLUMNS + 1):
            raise UserError(f"{where} has {len(words)} columns; KITTI's format has {wanted}")
        if words[0] not in CLASSES:
            raise UserError(f"{where}: unknown class {words[0]!r}; KITTI has {', '.join(CLASSES)}")
        try:
            values = [float(word) for word in words[1:]]
        except ValueError:
            raise UserError(f"{where} holds a value that is no number: {line.strip()!r}") from None
        if not np.isfinite(values).all():
            raise UserError(f"{where} holds NaN or infinity: {line.strip()!r}")
        names.append(words[0])
        rows.append(values if len(values) == NUM_COLUMNS else [*values, 0.0])
    table = np.array(rows, dtype=np.float64).reshape(-1, NUM_COLUMNS)
    parts = {name: table[:, slice(*at) if isinstance(at, tuple) else at] for name, at in WIDTHS.items()}
    return CameraObjects(tuple(names), **parts, rotation_y=table[:, 13], score=table[:, 14])


def write_folder(folder: Path, frames: Mapping[str, CameraObjects], *, with_score: bool = True) -> None:
    """Write one file a frame, an empty one where it has no objects: what the benchmark's server takes (in a zip)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in frames.items():
        columns = np.column_stack(
            [own.truncation, own.occlusion, own.alpha, own.image_box, own.size, own.bottom_center, own.rotation_y]
            + [own.score] * with_score
        )
        lines = []
        for word, row in zip(own.names, columns.tolist(), strict=True):
            values = [f"{value:.6g}" if place == 1 else f"{value:.6f}" for place, value in enumerate(row)]
            lines.append(" ".join([word, *values]) + "\n")
        (folder / f"{name}.txt").write_text("".join(lines))
