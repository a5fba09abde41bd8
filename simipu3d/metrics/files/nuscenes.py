"""nuScenes' submissions, and the truth from a release's tables or from a boxes file of the same format.

A submission is JSON: `meta` (which sensors were used) and `results`, which has a list of boxes under every sample token of
the split: translation (global), size (width, length, height), rotation (quaternion w, x, y, z), velocity (2),
detection_name, detection_score, attribute_name. A boxes file of truth has num_pts for a score, and may have `ego_poses`:
sample token -> x, y of the ego vehicle, without which class ranges are not applied.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simipu3d.data.readers.nuscenes_boxes import DETECTION_CLASSES, read_annotations
from simipu3d.data.readers.nuscenes_rows import read_rows
from simipu3d.data.readers.nuscenes_splits import SPLITS
from simipu3d.data.readers.nuscenes_tables import pose_matrix, read_key_frames, read_scenes
from simipu3d.errors import UserError
from simipu3d.metrics.files.scores import Scores, Table, kept, read_bytes, shown
from simipu3d.metrics.nuscenes import (
    ATTRIBUTES,
    CLASS_RANGE,
    DISTANCES,
    ERRORS,
    MAX_BOXES_PER_SAMPLE,
    DetectionScore,
    SampleBoxes,
    nuscenes_score,
)

RACK = "static_object.bicycle_rack"
WIDTHS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
MODALITIES = ("use_camera", "use_lidar", "use_radar", "use_map", "use_external")


class Truth(NamedTuple):
    """Sample tokens, labels, and what the filters need where it is known."""

    tokens: list[str]
    boxes: SampleBoxes
    ego_xy: NDArray[np.float64] | None
    racks: SampleBoxes | None


def score(truth: Path, predictions: Path, split: str | None = None) -> Scores:
    """Score a submission.

    Args:
        truth: folder of a release's tables (v1.0-trainval, v1.0-mini), or a boxes file.
        predictions: the submission.
        split: train, val, mini_train, mini_val, test; None takes all scenes of the tables, or all samples of the file.

    Raises:
        UserError: a file is missing or damaged, or samples are absent.
    """
    labels = read_tables(truth, split) if truth.is_dir() else read_boxes_file(truth)
    found = read_submission(predictions, labels.tokens)
    try:
        result = nuscenes_score(labels.boxes, found, labels.ego_xy, labels.racks)
    except ValueError as error:
        raise UserError(f"{predictions if 'predictions' in str(error) else truth}: {error}") from error
    title = f"nuScenes detection, {len(labels.tokens)} samples"
    if labels.ego_xy is None:
        title += " (class ranges not applied: the boxes file has no ego_poses)"
    classes = [
        {"name": each.name, "num_objects": each.num_objects, "ap": {str(at): value for at, value in each.ap.items()}}
        | {"errors": {name: kept(value) for name, value in each.errors.items()}}
        for each in result.classes
    ]
    values = {"samples": len(labels.tokens), "nds": result.nds, "mean_ap": result.mean_ap, "errors": result.errors}
    return Scores([_summary(title, result), _by_class(result)], values | {"classes": classes})


def _summary(title: str, result: DetectionScore) -> Table:
    errors = (shown(result.errors[name], 4) for name in ERRORS)
    columns = ("what", "NDS", "mAP", *(f"m{name}" for name in ("ATE", "ASE", "AOE", "AVE", "AAE")))
    return Table(title, columns, [("all classes", shown(result.nds, 4), shown(result.mean_ap, 4), *errors)])


def _by_class(result: DetectionScore) -> Table:
    rows = []
    for each in result.classes:
        numbers = [float(np.mean(list(each.ap.values()))), *each.ap.values(), *each.errors.values()]
        rows.append((each.name, str(each.num_objects), *(shown(value, 4) for value in numbers)))
    columns = ("class", "objects", "AP", *(f"AP {at} m" for at in DISTANCES), "ATE", "ASE", "AOE", "AVE", "AAE")
    return Table("by class", columns, rows)


def read_tables(folder: Path, split: str | None) -> Truth:
    """The truth of a split, or of all scenes of a release."""
    if not (folder / "scene.json").is_file():
        inner = sorted(path.parent for path in folder.glob("*/scene.json"))
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise UserError(f"{folder}: holds no table scene.json{hint}")
    present = read_scenes(folder)
    if split is not None and split not in SPLITS:
        raise UserError(f"--split {split}: there are {', '.join(SPLITS)}")
    names = [name for name in (present if split is None else SPLITS[split]) if name in present]
    if not names:
        raise UserError(f"{folder}: holds no scene of split {split}; name the release that the split belongs to")
    frames = read_key_frames(folder, names, (), with_sweeps=False)
    found = read_annotations(folder, frames.token, frames.timestamp, keep_others=True)
    if found is None:
        raise UserError(f"{folder}: has no annotations, so nothing can be scored on it")
    sample = np.repeat(np.arange(len(frames.token)), np.diff(found.start))
    words = np.array(found.class_names or ("",))[found.name]
    heading = [pose_matrix((0, 0, 0), rotation)[:2, 0] for rotation in found.rotation]
    forward = np.array(heading, dtype=np.float64).reshape(-1, 2)
    boxes = SampleBoxes(
        sample=sample,
        center=found.center,
        size=found.size,
        yaw=np.arctan2(forward[:, 1], forward[:, 0]),
        velocity=found.velocity[:, :2],
        names=words,
        attributes=np.array(found.attribute_names or ("",))[found.attribute],
        score=np.zeros(len(sample)),
        num_points=found.num_points + _radar_points(folder, frames.token),
    )
    is_scored = np.isin(words, sorted(set(DETECTION_CLASSES.values())))
    ego_xy = frames.pose[frames.lidar][:, :2]
    return Truth(list(frames.token), boxes.take(is_scored), ego_xy, boxes.take(words == RACK))


def _radar_points(folder: Path, tokens: Sequence[str]) -> NDArray[np.int64]:
    """(N,) in the order of `read_annotations`: frame after frame, each in the order of the table."""
    frame_of = {token: frame for frame, token in enumerate(tokens)}
    rows = read_rows(folder / "sample_annotation.json", ("sample_token", "num_radar_pts"))
    own = [(frame_of[sample], number) for sample, number in rows if sample in frame_of]
    values = np.array(own, dtype=np.int64).reshape(-1, 2)
    return values[np.argsort(values[:, 0], kind="stable"), 1]


def read_boxes_file(path: Path) -> Truth:
    """Truth in the format of a submission, without scores."""
    content = _read_json(path)
    tokens = list(content["results"])
    boxes = _read_results(path, content["results"], {token: at for at, token in enumerate(tokens)}, needs_score=False)
    poses = content.get("ego_poses")
    if poses is None:
        return Truth(tokens, boxes, None, None)
    try:
        ego_xy = np.array([[float(value) for value in poses[token][:2]] for token in tokens]).reshape(-1, 2)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: ego_poses must have two or three numbers under every sample token ({error!r})"
        ) from error
    return Truth(tokens, boxes, ego_xy, None)


def read_submission(path: Path, tokens: Sequence[str]) -> SampleBoxes:
    """The boxes of a submission, which must have an entry for each of the tokens and for no other."""
    results = _read_json(path)["results"]
    absent = [token for token in tokens if token not in results]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of {len(tokens)} samples are missing (first: {absent[0]}); a sample without "
            "detections has an empty list"
        )
    index_of = {token: at for at, token in enumerate(tokens)}
    foreign = [token for token in results if token not in index_of]
    if foreign:
        raise UserError(
            f"{path}: {len(foreign)} samples are not among the {len(tokens)} scored ones (first: {foreign[0]}); "
            "--split names what the submission was made for"
        )
    return _read_results(path, results, index_of, needs_score=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON file or is cut short ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise UserError(f"{path}: has no mapping `results` of sample tokens to boxes")
    return content


def _read_results(
    path: Path, results: Mapping[str, Any], index_of: Mapping[str, int], *, needs_score: bool
) -> SampleBoxes:
    """In the order of the file, on which the official evaluation's order of equal scores depends."""
    samples, names, attributes, rows = [], [], [], []
    for token, own in results.items():
        if not isinstance(own, list):
            raise UserError(f"{path}: sample {token}: must be a list of boxes, got {json.dumps(own)[:40]}")
        if needs_score and len(own) > MAX_BOXES_PER_SAMPLE:
            raise UserError(f"{path}: sample {token} has {len(own)} boxes; the benchmark allows {MAX_BOXES_PER_SAMPLE}")
        for number, box in enumerate(own):
            where = f"{path}: sample {token}, box {number}"
            if not isinstance(box, dict):
                raise UserError(f"{where}: is no mapping, but {json.dumps(box)[:40]}")
            rows.append(_numbers(where, box, needs_score))
            names.append(_word(where, box, "detection_name", tuple(CLASS_RANGE)))
            attributes.append(_word(where, box, "attribute_name", ("", *ATTRIBUTES)))
            samples.append(index_of[token])
    table = np.array(rows, dtype=np.float64).reshape(-1, 14)
    w, x, y, z = table[:, 6:10].T
    return SampleBoxes(
        sample=np.array(samples, dtype=np.int64),
        center=table[:, :3],
        size=table[:, 3:6],
        # Where the length axis points, seen from above; any length of the quaternion will do.
        yaw=np.arctan2(2 * (x * y + w * z), w * w + x * x - y * y - z * z),
        velocity=table[:, 10:12],
        names=np.array(names, dtype=np.str_),
        attributes=np.array(attributes, dtype=np.str_),
        score=table[:, 12],
        num_points=table[:, 13].astype(np.int64),
    )


def _numbers(where: str, box: Mapping[str, Any], needs_score: bool) -> list[float]:
    """Translation, size, rotation, velocity, score, points."""
    values: list[float] = []
    for name, width in WIDTHS.items():
        own = _floats(box.get(name))
        if len(own) != width:
            raise UserError(f"{where}: {name} must be {width} numbers, got {json.dumps(box.get(name))[:60]}")
        values += own
    if not np.isfinite(values[:10]).all():
        raise UserError(f"{where}: translation, size or rotation holds NaN or infinity")
    if min(values[3:6]) <= 0:
        raise UserError(f"{where}: size must be above 0, got {values[3:6]}")
    if not any(values[6:10]):
        raise UserError(f"{where}: rotation is no quaternion: all four numbers are 0")
    sure = _floats([box.get("detection_score", None if needs_score else 0.0)])
    if not sure or not np.isfinite(sure[0]):
        given = json.dumps(box.get("detection_score"))[:40]
        raise UserError(f"{where}: a prediction needs a detection_score that is a number, got {given}")
    points = box.get("num_pts", -1)
    if type(points) is not int:
        raise UserError(f"{where}: num_pts must be an integer, got {json.dumps(points)[:40]}")
    return [*values, sure[0], points]


def _floats(own: Any) -> list[float]:
    """The numbers of a list; none where it is no list of numbers."""
    if not isinstance(own, list) or not all(type(value) in (int, float) for value in own):
        return []
    try:
        return [float(value) for value in own]
    except OverflowError:
        return []


def _word(where: str, box: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    word = box.get(name)
    if word not in allowed:
        raise UserError(f"{where}: {name} is {json.dumps(word)[:60]}; there are {', '.join(filter(None, allowed))}")
    return word


def write_submission(
    path: Path,
    tokens: Sequence[str],
    boxes: SampleBoxes,
    modalities: Sequence[str] = (),
    ego_xy: NDArray[np.float64] | None = None,
) -> None:
    """Write what the benchmark's server takes, or with `ego_xy` a boxes file of truth.

    Args:
        path: the JSON file.
        tokens: S sample tokens; all of them get an entry.
        boxes: of these samples.
        modalities: those of `MODALITIES` that the detector used.
        ego_xy: (S, 2) where the ego vehicle is.
    """
    results: dict[str, list[dict[str, Any]]] = {token: [] for token in tokens}
    for row in range(len(boxes)):
        token, half = tokens[int(boxes.sample[row])], boxes.yaw[row] / 2
        results[token].append(
            {
                "sample_token": token,
                "translation": boxes.center[row].tolist(),
                "size": boxes.size[row].tolist(),
                "rotation": [float(np.cos(half)), 0.0, 0.0, float(np.sin(half))],
                "velocity": boxes.velocity[row].tolist(),
                "detection_name": str(boxes.names[row]),
                "detection_score": float(boxes.score[row]),
                "attribute_name": str(boxes.attributes[row]),
                "num_pts": int(boxes.num_points[row]),
            }
        )
    content: dict[str, Any] = {"meta": {name: name in modalities for name in MODALITIES}, "results": results}
    if ego_xy is not None:
        content["ego_poses"] = {token: place.tolist() for token, place in zip(tokens, ego_xy, strict=True)}
    path.write_text(json.dumps(content))
