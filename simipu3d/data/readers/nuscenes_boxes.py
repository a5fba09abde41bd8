"""What do nuScenes' annotations say, in our lidar frame?

An annotation is an upright box in the world frame: geometric centre, size (width, length, height), and a quaternion
that turns its length axis x; velocities follow from its neighbours in time. Inside the package a box is (length, width,
height) and yaw counter-clockwise from +x. Shapes: N annotations of all frames, K of one.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers.nuscenes_rows import WAY_OUT, read_rows
from simipu3d.data.readers.nuscenes_tables import check_pose, pose_matrix
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

ANNOTATIONS = "sample_annotation.json"
"""The table of the boxes."""

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
    "visibility_token",
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
        visibility: (N,) 1 to 4: up to 40, 60, 80 and 100 % of the object are seen by the cameras; 0 where not annotated.
        instance: (N,) index into `instance_tokens`, the same for an object all through a scene.
        class_names, attribute_names, instance_tokens: the words.
    """

    start: NDArray[np.int64]
    center: NDArray[np.float64]
    size: NDArray[np.float64]
    rotation: NDArray[np.float64]
    velocity: NDArray[np.float64]
    name: NDArray[np.int64]
    attribute: NDArray[np.int64]
    num_points: NDArray[np.int64]
    visibility: NDArray[np.int64]
    instance: NDArray[np.int64]
    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...]
    instance_tokens: tuple[str, ...]

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
            visibility=self.visibility[rows],
            ids=tuple(self.instance_tokens[instance] for instance in self.instance[rows]),
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
    path = folder / ANNOTATIONS
    frame_of = {token: frame for frame, token in enumerate(tokens)}
    # Numbers go into arrays and each word is kept once: rows as Python objects would take a gigabyte.
    integers, geometry = array("q"), array("d")
    token_ids: dict[str, int] = {"": 0}
    instances: dict[str, int] = {}
    attributes: dict[tuple[str, ...], int] = {}
    is_empty = True
    for row in read_rows(path, COLUMNS):
        token, sample, instance, own, translation, size, rotation, before, after, num_points, visibility = row
        is_empty = False
        if sample not in frame_of:
            continue
        check_pose(path, token, translation, rotation)
        if len(size) != 3 or not all(type(edge) in (int, float) and 0 < edge < math.inf for edge in size):
            raise UserError(f"{path}: token {token}: size {size} is no width, length and height above 0; {WAY_OUT}")
        geometry.extend((*translation, *size, *rotation))
        integers.extend((frame_of[sample], num_points))
        integers.append(instances.setdefault(instance, len(instances)))
        integers.append(attributes.setdefault(tuple(map(str, own)), len(attributes)))
        integers.append(_visibility(path, token, visibility))
        integers.extend(token_ids.setdefault(word, len(token_ids)) for word in (token, before, after))
    if is_empty:
        return None
    rows = np.array(integers, dtype=np.int64).reshape(-1, 8)
    values = np.array(geometry, dtype=np.float64).reshape(-1, 10)
    order = np.argsort(rows[:, 0], kind="stable")
    rows, values = rows[order], values[order]
    velocity = _velocities(path, rows[:, 5:], list(token_ids), values[:, :3], timestamps[rows[:, 0]] * 1e-6)
    class_names, name_of_instance = _classes(folder, list(instances), keep_others)
    name = name_of_instance[rows[:, 2]]
    kept = name >= 0
    return Annotations(
        start=np.searchsorted(rows[kept, 0], np.arange(len(tokens) + 1)),
        center=values[kept, :3],
        size=values[kept, 3:6],
        rotation=values[kept, 6:],
        velocity=velocity[kept],
        name=name[kept],
        attribute=rows[kept, 3],
        num_points=rows[kept, 1],
        visibility=rows[kept, 4],
        instance=rows[kept, 2],
        class_names=class_names,
        attribute_names=_attributes(folder, list(attributes)),
        instance_tokens=tuple(instances),
    )


def _visibility(path: Path, token: str, word: str) -> int:
    """The level that a row of visibility.json stands for: its token is the number."""
    if word not in ("", "1", "2", "3", "4"):
        raise UserError(f"{path}: token {token}: visibility_token is {word!r}, must be 1 to 4 or empty; {WAY_OUT}")
    return int(word or 0)


def _velocities(
    path: Path,
    links: NDArray[np.int64],
    tokens: list[str],
    center: NDArray[np.float64],
    time: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(N, 3) metres a second: from the annotation of the same object before to the one after, where both or one exist.

    Args:
        path: the table, for messages.
        links: (N, 3) each annotation's own token, the one before and the one after, as index into `tokens`; 0: none.
        tokens: the words.
        center: (N, 3) metres.
        time: (N,) seconds.

    Source: nuScenes' development kit, `NuScenes.box_velocity`.
    """
    here = np.arange(len(links))
    place = np.full(len(tokens), -1, dtype=np.int64)
    place[links[:, 0]] = here
    ends = np.where(links[:, 1:] == 0, here[:, None], place[links[:, 1:]])
    if (ends < 0).any():
        row, side = (int(index) for index in np.argwhere(ends < 0)[0])
        raise UserError(
            f"{path}: token {tokens[links[row, 0]]}: its neighbour {tokens[links[row, 1 + side]]} is not among the "
            f"annotations of its scene; {WAY_OUT}"
        )
    first, last = ends.T
    limit = MAX_TIME_DIFF * np.where((first != here) & (last != here), 2, 1)
    span = time[last] - time[first]
    known = (span > 0) & (span <= limit)
    velocity = np.full((len(links), 3), np.nan)
    velocity[known] = (center[last] - center[first])[known] / span[known, None]
    return velocity


def _classes(folder: Path, instances: list[str], keep_others: bool) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of classes, and the index of each instance's among them; -1 for an object whose boxes are dropped."""
    category_name = dict(read_rows(folder / "category.json", ("token", "name")))
    class_of = dict.fromkeys(instances, "")
    for token, category in read_rows(folder / "instance.json", ("token", "category_token")):
        if token in class_of:
            if category not in category_name:
                raise UserError(
                    f"{folder / 'instance.json'}: token {token}: its category {category} is not in category.json; "
                    f"{WAY_OUT}"
                )
            class_of[token] = category_name[category]
    absent = [instance for instance, category in class_of.items() if not category]
    if absent:
        raise UserError(
            f"{folder / 'sample_annotation.json'}: its instance {absent[0]} is not in instance.json; {WAY_OUT}"
        )
    classes = [DETECTION_CLASSES.get(name, name if keep_others else None) for name in class_of.values()]
    names = tuple(sorted({name for name in classes if name is not None}))
    index_of: dict[str | None, int] = {None: -1, **{name: index for index, name in enumerate(names)}}
    return names, np.array([index_of[name] for name in classes], dtype=np.int64)


def _attributes(folder: Path, sets: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The words of each set of attribute tokens; an empty set is the empty word."""
    name_of = dict(read_rows(folder / "attribute.json", ("token", "name")))
    for token in (token for tokens in sets for token in tokens):
        if token not in name_of:
            raise UserError(
                f"{folder / 'sample_annotation.json'}: its attribute {token} is not in attribute.json; {WAY_OUT}"
            )
    return tuple(", ".join(name_of[token] for token in tokens) for tokens in sets)
