"""What do nuScenes' annotations say, in our lidar frame?

An annotation is an upright box in the world frame: geometric centre, size (width, length, height), and a quaternion
that turns its length axis x; velocities follow from its neighbours in time. Inside the package a box is (length, width,
height) and yaw counter-clockwise from +x. Shapes: N annotations of all frames, K of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers.nuscenes_tables import WAY_OUT, check_pose, pose_matrix, read_rows
from simipu3d.errors import UserError

DETECTION_CLASSES = {
    "movable_object.barrier": "barrier",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}
"""The ten classes of the detection benchmark by category; other categories are in none (the benchmark's definition)."""

MAX_TIME_DIFF = 1.5
"""Neighbours farther apart than this, seconds, give no velocity; twice as far for those on both sides (devkit)."""

COLUMNS = (
    "token",
    "sample_token",
    "instance_token",
    "attribute_tokens",
    "translation",
    "size",
    "rotation",
    "prev",
    "next",
    "num_lidar_pts",
)


@dataclass(frozen=True, eq=False)
class Annotations:
    """The boxes of many frames, frame after frame.

    Attributes:
        start: (F + 1,) the rows of frame f are start[f] to start[f + 1].
        center: (N, 3) world frame, metres.
        size: (N, 3) width, length, height, metres.
        rotation: (N, 4) quaternion, world from box.
        velocity: (N, 3) world frame, metres a second; NaN where unknown.
        name: (N,) index into `class_names`.
        attribute: (N,) index into `attribute_names`.
        num_points: (N,) lidar points inside, as annotated.
        class_names, attribute_names: the words.
    """

    start: NDArray[np.int64]
    center: NDArray[np.float64]
    size: NDArray[np.float64]
    rotation: NDArray[np.float64]
    velocity: NDArray[np.float64]
    name: NDArray[np.int64]
    attribute: NDArray[np.int64]
    num_points: NDArray[np.int64]
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...]

    def boxes(self, frame: int, lidar_from_world: NDArray[np.float64]) -> Boxes:
        """The boxes of one frame in the lidar frame; `lidar_from_world` is (4, 4)."""
        rows = slice(self.start[frame], self.start[frame + 1])
        rotation = lidar_from_world[:3, :3]
        heading = [pose_matrix((0, 0, 0), quaternion)[:3, 0] for quaternion in self.rotation[rows]]
        heading = np.array(heading).reshape(-1, 3) @ rotation.T
        return Boxes(
            center=self.center[rows] @ rotation.T + lidar_from_world[:3, 3],
            size=self.size[rows][:, [1, 0, 2]],
            yaw=np.arctan2(heading[:, 1], heading[:, 0]),
            names=tuple(self.class_names[name] for name in self.name[rows]),
            velocity=(self.velocity[rows] @ rotation.T)[:, :2],
            attributes=tuple(self.attribute_names[attribute] for attribute in self.attribute[rows]),
            num_points=self.num_points[rows],
        )


def read_annotations(
    folder: Path, tokens: Sequence[str], timestamps: NDArray[np.int64], keep_others: bool
) -> Annotations | None:
    """The annotations of some samples; None where the release has none (v1.0-test).

    Args:
        folder: the release's tables.
        tokens: F sample tokens; whole scenes, for velocities need neighbours.
        timestamps: (F,) of the samples, microseconds.
        keep_others: keep boxes outside the ten detection classes, under the name of their category.

    Raises:
        UserError: a table is missing or damaged, or rows do not fit together.
    """
    path = folder / "sample_annotation.json"
    frame_of = {token: frame for frame, token in enumerate(tokens)}
    is_empty, rows = True, []
    for row in read_rows(path, COLUMNS):
        is_empty = False
        if row[1] in frame_of:
            rows.append((frame_of[row[1]], *row))
    if is_empty:
        return None
    rows.sort(key=lambda row: row[0])
    frame = np.array([row[0] for row in rows], dtype=np.int64)
    center, size, rotation = _geometry(path, rows)
    velocity = _velocities(path, rows, center, timestamps[frame] * 1e-6)
    name, class_names = _classes(folder, [row[3] for row in rows], keep_others)
    attribute, attribute_names = _attributes(folder, [row[4] for row in rows])
    kept = name >= 0
    return Annotations(
        start=np.searchsorted(frame[kept], np.arange(len(tokens) + 1)),
        center=center[kept],
        size=size[kept],
        rotation=rotation[kept],
        velocity=velocity[kept],
        name=name[kept],
        attribute=attribute[kept],
        num_points=np.array([row[10] for row in rows], dtype=np.int64)[kept],
        class_names=class_names,
        attribute_names=attribute_names,
    )


def _geometry(path: Path, rows: list[tuple[Any, ...]]) -> tuple[NDArray, NDArray, NDArray]:
    values = np.zeros((len(rows), 10))
    for index, row in enumerate(rows):
        token, translation, size, rotation = row[1], row[5], row[6], row[7]
        check_pose(path, token, translation, rotation)
        if len(size) != 3 or min(size) <= 0:
            raise UserError(f"{path}: token {token}: size {size} is no width, length and height above 0; {WAY_OUT}")
        values[index] = [*translation, *size, *rotation]
    return values[:, :3], values[:, 3:6], values[:, 6:]


def _velocities(
    path: Path, rows: list[tuple[Any, ...]], center: NDArray[np.float64], time: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(N, 3) metres a second: from the annotation of the same object before to the one after, where both or one exist.

    Source: nuScenes' development kit, `NuScenes.box_velocity`.
    """
    place = {row[1]: index for index, row in enumerate(rows)}
    ends = np.empty((2, len(rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        for side, token in enumerate((row[8], row[9])):
            if token and token not in place:
                raise UserError(
                    f"{path}: token {row[1]}: its neighbour {token} is not among the annotations of its scene; "
                    f"{WAY_OUT}, or set data.load_boxes=false"
                )
            ends[side, index] = place[token] if token else index
    first, last = ends
    here = np.arange(len(rows))
    limit = MAX_TIME_DIFF * np.where((first != here) & (last != here), 2, 1)
    span = time[last] - time[first]
    known = (span > 0) & (span <= limit)
    velocity = np.full((len(rows), 3), np.nan)
    velocity[known] = (center[last] - center[first])[known] / span[known, None]
    return velocity


def _classes(folder: Path, instances: list[str], keep_others: bool) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(N,) index into the names that come with it; -1 for a box that is dropped."""
    category_name = dict(read_rows(folder / "category.json", ("token", "name")))
    wanted = set(instances)
    class_of: dict[str, str] = {}
    for token, category in read_rows(folder / "instance.json", ("token", "category_token")):
        if token in wanted:
            if category not in category_name:
                raise UserError(
                    f"{folder / 'instance.json'}: token {token}: its category {category} is not in category.json; "
                    f"{WAY_OUT}"
                )
            name = category_name[category]
            class_of[token] = DETECTION_CLASSES.get(name, name if keep_others else "")
    absent = wanted - class_of.keys()
    if absent:
        raise UserError(
            f"{folder / 'sample_annotation.json'}: its instance {min(absent)} is not in instance.json; {WAY_OUT}"
        )
    names = tuple(sorted(set(class_of.values()) - {""}))
    index_of = {"": -1, **{name: index for index, name in enumerate(names)}}
    return np.array([index_of[class_of[instance]] for instance in instances], dtype=np.int64), names


def _attributes(folder: Path, tokens: list[list[str]]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(N,) index into the words that come with it; several attributes of one box are joined, none is "" ."""
    name_of = dict(read_rows(folder / "attribute.json", ("token", "name")))
    words: dict[str, int] = {}
    indices = []
    for own in tokens:
        for token in own:
            if token not in name_of:
                raise UserError(
                    f"{folder / 'sample_annotation.json'}: its attribute {token} is not in attribute.json; {WAY_OUT}"
                )
        indices.append(words.setdefault(", ".join(name_of[token] for token in own), len(words)))
    return np.array(indices, dtype=np.int64), tuple(words)
