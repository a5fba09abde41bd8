"""Several data sets as one, each with its share of an epoch.

An epoch is as long as all sets together. Set i gets its weight's share of the epoch's positions, m_i of them, at drawn
places. Its frames follow each other in an endless row of its own orders, and epoch e takes the draws e m_i to
(e + 1) m_i of that row: whatever the weights, all frames of a set are read equally often, up to one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainSerializer, PlainValidator, PositiveFloat

from simipu3d.config import PartConfig, merge, parse_block, to_plain
from simipu3d.contracts.frame import EVERYTHING, Boxes, Frame, FrameReader, Wants
from simipu3d.contracts.truth import UNLABELLED
from simipu3d.data.config import AugmentConfig, DataConfig
from simipu3d.data.loading.few_labels import few_labels
from simipu3d.data.loading.order import order_rng, reader_order
from simipu3d.data.readers.base import BaseReader
from simipu3d.errors import UserError
from simipu3d.registry import READERS

OUTER_KEYS = ("batch_size", "num_workers", "on_bad_frame", "max_bad_fraction", "freeze_draws")
"""Keys of `data:` that hold for all sets together and cannot be set for one."""
SET_STREAM = 2
"""First word of a spawn key: keeps the orders of the sets apart from the mixture's own (see `data.order`)."""


class MixedSet(PartConfig):
    """One entry of `data.sets`: `weight`, `classes`, `augment`, and the keys of its reader's own `data:` block."""

    weight: PositiveFloat = 1.0
    """Its share of an epoch, relative to the others'."""
    classes: dict[str, str] = Field(default_factory=dict)
    """What its classes of pixels, points and boxes are called in the mixture: {theirs: ours}. Default: as they are. Classes
    of one name are one class."""
    augment: dict[str, Any] = Field(default_factory=dict)
    """Keys of `augment:` that are different for this set, nested as there: {points: {...}, images: {...}}. Default: the
    centres of rotation and scaling are the middle of the set's point_range, where it has one."""
    data: DataConfig
    """The reader's own block."""


def _parse_sets(blocks: Any) -> tuple[MixedSet, ...]:
    """The plain entries of `data.sets`, validated."""
    if not isinstance(blocks, list | tuple) or not blocks:
        raise UserError(f"data.sets: expected a list of one data set or more, got {blocks!r}")
    return tuple(_parse_set(f"data.sets.{number}", block) for number, block in enumerate(blocks))


def _parse_set(prefix: str, block: Any) -> MixedSet:
    """One entry; `prefix` is its key."""
    if isinstance(block, MixedSet):
        return block
    if not isinstance(block, dict):
        raise UserError(
            f"{prefix}: expected a block of keys like {{name: kitti, root: ..., weight: 1.0}}, got {block!r}"
        )
    own = {key: value for key, value in block.items() if key not in ("weight", "classes", "augment")}
    for key in OUTER_KEYS:
        if key in own:
            raise UserError(f"{prefix}.{key}: holds for all sets together; set data.{key} instead")
    names = [name for name in READERS.names() if name != "mixed"]
    if own.get("name") not in names:
        raise UserError(f"{prefix}.name: this key chooses the data set; there are {', '.join(names)}")
    augment = block.get("augment") or {}
    parse_block(f"{prefix}.augment", AugmentConfig, augment)
    outer = parse_block(prefix, _Outer, {key: block[key] for key in ("weight", "classes") if key in block})
    data = parse_block(prefix, READERS[own["name"]].config, own)
    return MixedSet.model_construct(weight=outer.weight, classes=outer.classes, augment=augment, data=data)


class _Outer(PartConfig):
    """The keys of a set that are plain values."""

    weight: PositiveFloat = 1.0
    classes: dict[str, str] = Field(default_factory=dict)


def _plain_sets(sets: tuple[MixedSet, ...]) -> list[dict[str, Any]]:
    """The entries as a file has them, every default filled in."""
    return [
        {
            "weight": entry.weight,
            "classes": entry.classes,
            **{key: value for key, value in to_plain(entry.data).items() if key not in (*OUTER_KEYS, "augment")},
            "augment": entry.augment,
        }
        for entry in sets
    ]


class MixedConfig(DataConfig):
    """The `data:` block for `name: mixed`."""

    name: str = "mixed"
    """Which reader (`READERS`)."""
    root: None = None
    """Each set has its own."""
    split: Literal["all"] = "all"
    """Each set has its own."""
    cameras: None = None
    """Each set has its own."""
    sets: Annotated[tuple[MixedSet, ...], PlainValidator(_parse_sets), PlainSerializer(_plain_sets)]
    """The data sets: `weight`, `classes` ({theirs: ours}), `augment` (keys that differ from the top level's), and each
    reader's own keys, like {name: kitti, root: /path/to/kitti, weight: 2.0}."""


@READERS.register("mixed", config=MixedConfig)
class MixedReader(BaseReader):
    """Frames of several data sets. Contract: `FrameReader`, with an order and augmentation of its own; frame and sequence
    ids begin with the set's name.

    Points have the columns that all sets have, in the order of the first. Classes are those of all sets by name, in the order
    in which the sets name them. `gives` has what at least one set gives.

    Raises:
        UserError: a set cannot be opened, its weight gives it no frame of an epoch, or `classes` names none of its classes.
    """

    config: MixedConfig

    def __init__(self, config: MixedConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.readers = [_open_set(config, number, wants) for number in range(len(config.sets))]
        first, *others = (tuple(reader.point_columns) for reader in self.readers)
        self.point_columns = tuple(name for name in first if all(name in columns for columns in others))
        self.class_names, self._class_maps = _join_classes(config.sets, self.readers)
        self.gives = frozenset().union(*(reader.gives for reader in self.readers))
        self._first = np.cumsum([0, *(len(reader) for reader in self.readers)])
        self._augments = [_own_augment(entry) for entry in config.sets]
        names = [entry.data.name for entry in config.sets]
        self._labels = [
            name if names.count(name) == 1 else f"{name}-{names[:number].count(name) + 1}"
            for number, name in enumerate(names)
        ]
        if all(len(reader.frame_ids) == len(reader) for reader in self.readers):
            self.frame_ids = tuple(
                f"{label}:{name}"
                for label, reader in zip(self._labels, self.readers, strict=True)
                for name in reader.frame_ids
            )
        if all(len(reader.sequence_ids) == len(reader) for reader in self.readers):
            self.sequence_ids = tuple(
                f"{label}:{name}"
                for label, reader in zip(self._labels, self.readers, strict=True)
                for name in reader.sequence_ids
            )
        self.shares = _shares(config, len(self))

    def __len__(self) -> int:
        return int(self._first[-1])

    def prepare(self) -> None:
        """What the sets do once before frames are read."""
        for reader in self.readers:
            reader.prepare()

    def _place(self, index: int) -> tuple[int, int]:
        """The set of an index, and the index in it."""
        if index < 0:
            raise IndexError(f"frame {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return number, index - int(self._first[number])

    def augment_of(self, index: int) -> dict[str, Any]:
        """Keys of `augment:` that are different for the frame's set."""
        number, own_index = self._place(index)
        return merge(self.readers[number].augment_of(own_index), self._augments[number])

    def __getitem__(self, index: int) -> Frame:
        number, own_index = self._place(index)
        frame, label = self.readers[number][own_index], self._labels[number]
        columns = [frame.point_columns.index(name) for name in self.point_columns]
        return replace(
            frame,
            points=frame.points if self.point_columns == frame.point_columns else frame.points[:, columns],
            point_columns=self.point_columns,
            frame_id=f"{label}:{frame.frame_id}",
            sequence_id=f"{label}:{frame.sequence_id}" if frame.sequence_id else "",
            cameras=tuple(
                replace(camera, pixel_class=self._mapped(camera.pixel_class, number)) for camera in frame.cameras
            ),
            point_class=self._mapped(frame.point_class, number),
            boxes=_rename(frame.boxes, self.config.sets[number].classes),
        )

    def _mapped(self, classes: NDArray[np.uint8] | None, number: int) -> NDArray[np.uint8] | None:
        """A set's classes as numbers of the mixture."""
        return None if classes is None else self._class_maps[number][classes]

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """(len,) indices; the n-th time that a set is begun anew within the epoch, n len is added."""
        sets = np.repeat(np.arange(len(self.readers)), self.shares)
        order = order_rng(seed, epoch).permutation(sets)
        places = [np.flatnonzero(order == number) for number in range(len(self.readers))]
        for number, own in enumerate(places):
            order[own] = self._draws(seed, epoch, number)
        return order

    def _draws(self, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
        """(share,) the indices of one set in an epoch."""
        length, share = len(self.readers[number]), int(self.shares[number])
        own_seed = int(np.random.SeedSequence(seed, spawn_key=(SET_STREAM, number)).generate_state(1)[0])
        begin, end = epoch * share, (epoch + 1) * share
        rounds = range(begin // length, -(-end // length))
        row = [reader_order(self.readers[number], own_seed, k) + (k - rounds[0]) * len(self) for k in rounds]
        return self._first[number] + np.concatenate(row)[begin - rounds[0] * length :][:share]


def _rename(boxes: Boxes | None, classes: dict[str, str]) -> Boxes | None:
    if boxes is None or not classes:
        return boxes
    return replace(boxes, names=tuple(classes.get(name, name) for name in boxes.names))


def _join_classes(
    sets: Sequence[MixedSet], readers: Iterable[FrameReader]
) -> tuple[tuple[str, ...], list[NDArray[np.uint8]]]:
    """The class names of all sets, and for each set (256,) the number in them of each of its own numbers.

    Raises:
        UserError: there are too many, or a set has no class that its `classes` names.
    """
    joined: dict[str, int] = {}
    maps = []
    for number, (entry, reader) in enumerate(zip(sets, readers, strict=True)):
        # Names of boxes are known only when frames are read.
        unknown = [] if "boxes" in reader.gives else [name for name in entry.classes if name not in reader.class_names]
        if unknown:
            raise UserError(
                f"data.sets.{number}.classes: {entry.data.name} has no class {unknown[0]!r}; it has "
                f"{', '.join(reader.class_names) or 'none'}"
            )
        numbers = np.full(256, UNLABELLED, dtype=np.uint8)
        for own, name in enumerate(reader.class_names):
            place = joined.setdefault(entry.classes.get(name, name), len(joined))
            if place >= UNLABELLED:
                raise UserError(f"data.sets.{number}.classes: more than {UNLABELLED} classes; give some a common name")
            numbers[own] = place
        maps.append(numbers)
    return tuple(joined), maps


def _own_augment(entry: MixedSet) -> dict[str, Any]:
    """A set's own keys of `augment:`; the centres are the middle of its range where it has one and says nothing else."""
    point_range = getattr(entry.data, "point_range", None)
    if point_range is None:
        return entry.augment
    middle = [(low + high) / 2 for low, high in zip(point_range[:3], point_range[3:], strict=True)]
    return merge({"points": {"rotation_centre": middle, "scale_centre": middle}}, entry.augment)


def _open_set(config: MixedConfig, number: int, wants: Wants) -> FrameReader:
    """The reader of a set, under the bad-frame policy of all."""
    policy = {"on_bad_frame": config.on_bad_frame, "max_bad_fraction": config.max_bad_fraction}
    own = config.sets[number].data.model_copy(update=policy)
    try:
        reader = few_labels(READERS[own.name].target(own, wants), own)
    except UserError as error:
        message = str(error)  # names a key of the block as if it stood in data:
        key = f".{message.removeprefix('data.')}" if message.startswith("data.") else f": {message}"
        raise UserError(f"data.sets.{number}{key}") from error
    if len(reader) == 0:
        raise UserError(f"data.sets.{number}.split: split {own.split} of {own.root or own.name} has no frames")
    return reader


def _shares(config: MixedConfig, length: int) -> NDArray[np.int64]:
    """How many of an epoch's `length` positions each set gets; what rounding leaves goes to the largest remainders."""
    weights = np.array([entry.weight for entry in config.sets])
    exact = weights / weights.sum() * length
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(-(exact - shares), kind="stable")[: length - shares.sum()]] += 1
    for number, share in enumerate(shares):
        if share == 0:
            raise UserError(
                f"data.sets.{number}.weight: {config.sets[number].weight} of {weights.sum():g} gives it none of the {length} "
                "frames of an epoch; raise it, or take the set off"
            )
    return shares
