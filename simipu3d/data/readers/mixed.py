"""Several data sets as one, each with its share of an epoch.

An epoch is as long as all sets together. Set i gets its weight's share of the epoch's positions, m_i of them, at drawn
places. Its frames follow each other in an endless row of its own orders, and epoch e takes the draws e m_i to
(e + 1) m_i of that row: whatever the weights, all frames of a set are read equally often, up to one.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainSerializer, PlainValidator, PositiveFloat

from simipu3d.config import PartConfig, merge, parse_block, to_plain
from simipu3d.contracts.frame import Frame, FrameReader
from simipu3d.data.config import AugmentConfig, DataConfig
from simipu3d.data.loading.order import order_rng, reader_order
from simipu3d.errors import UserError
from simipu3d.registry import READERS

OUTER_KEYS = ("batch_size", "num_workers", "on_bad_frame", "max_bad_fraction", "freeze_draws")
"""Keys of `data:` that hold for all sets together and cannot be set for one."""
SET_STREAM = 2
"""First word of a spawn key: keeps the orders of the sets apart from the mixture's own (see `data.order`)."""


class MixedSet(PartConfig):
    """One entry of `data.sets`: `weight`, `augment`, and the keys of its reader's own `data:` block."""

    weight: PositiveFloat = 1.0
    """Its share of an epoch, relative to the others'."""
    augment: dict[str, Any] = Field(default_factory=dict)
    """Keys of `data.augment` that are different for this set."""
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
    own = {key: value for key, value in block.items() if key not in ("weight", "augment")}
    for key in OUTER_KEYS:
        if key in own:
            raise UserError(f"{prefix}.{key}: holds for all sets together; set data.{key} instead")
    names = [name for name in READERS.names() if name != "mixed"]
    if own.get("name") not in names:
        raise UserError(f"{prefix}.name: this key chooses the data set; there are {', '.join(names)}")
    augment = block.get("augment") or {}
    parse_block(f"{prefix}.augment", AugmentConfig, augment)
    weight = parse_block(prefix, _Weight, {"weight": block.get("weight", 1.0)}).weight
    data = READERS[own["name"]]
    return MixedSet.model_construct(weight=weight, augment=augment, data=parse_block(prefix, data.config, own))


class _Weight(PartConfig):
    weight: PositiveFloat


def _plain_sets(sets: tuple[MixedSet, ...]) -> list[dict[str, Any]]:
    """The entries as a file has them, every default filled in."""
    return [
        {
            "weight": entry.weight,
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
    """The data sets: `weight`, `augment` (keys that differ from data.augment), and each reader's own keys, like
    {name: kitti, root: /path/to/kitti, weight: 2.0}."""


@READERS.register("mixed", config=MixedConfig)
class MixedReader:
    """Frames of several data sets. Contract: `FrameReader`, with an order and augmentation of its own; frame and sequence
    ids begin with the set's name.

    Points have the columns that all sets have, in the order of the first. Classes a pixel or a point are left out unless
    all sets number them alike.

    Raises:
        UserError: a set cannot be opened, or its weight gives it no frame of an epoch.
    """

    class_names: tuple[str, ...] = ()
    point_columns: tuple[str, ...] = ("x", "y", "z", "intensity")

    def __init__(self, config: MixedConfig):
        self.config = config
        self.readers = [_open_set(config, number) for number in range(len(config.sets))]
        first, *others = (tuple(reader.point_columns) for reader in self.readers)
        self.point_columns = tuple(name for name in first if all(name in columns for columns in others))
        numberings = {tuple(reader.class_names) for reader in self.readers}
        self.class_names = numberings.pop() if len(numberings) == 1 else ()
        self._first = np.cumsum([0, *(len(reader) for reader in self.readers)])
        self._augments = [_augment_set(config, number) for number in range(len(config.sets))]
        names = [entry.data.name for entry in config.sets]
        self._labels = [
            name if names.count(name) == 1 else f"{name}-{names[:number].count(name) + 1}"
            for number, name in enumerate(names)
        ]
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

    def augment_of(self, index: int) -> AugmentConfig:
        """`data.augment` with the changes of the frame's set."""
        return self._augments[self._place(index)[0]]

    def __getitem__(self, index: int) -> Frame:
        number, own_index = self._place(index)
        reader, label = self.readers[number], self._labels[number]
        frame = reader[own_index]
        columns = [frame.point_columns.index(name) for name in self.point_columns]
        frame = replace(
            frame,
            points=frame.points if self.point_columns == frame.point_columns else frame.points[:, columns],
            point_columns=self.point_columns,
            frame_id=f"{label}:{frame.frame_id}",
            sequence_id=f"{label}:{frame.sequence_id}" if frame.sequence_id else "",
        )
        if self.class_names == tuple(reader.class_names):
            return frame
        cameras = tuple(replace(camera, pixel_class=None) for camera in frame.cameras)
        return replace(frame, cameras=cameras, point_class=None)

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


def _open_set(config: MixedConfig, number: int) -> FrameReader:
    """The reader of a set, under the bad-frame policy of all."""
    policy = {"on_bad_frame": config.on_bad_frame, "max_bad_fraction": config.max_bad_fraction}
    own = config.sets[number].data.model_copy(update=policy)
    try:
        reader = READERS[own.name].target(own)
    except UserError as error:
        message = str(error)  # names a key of the block as if it stood in data:
        key = f".{message.removeprefix('data.')}" if message.startswith("data.") else f": {message}"
        raise UserError(f"data.sets.{number}{key}") from error
    if len(reader) == 0:
        raise UserError(f"data.sets.{number}.split: split {own.split} of {own.root or own.name} has no frames")
    return reader


def _augment_set(config: MixedConfig, number: int) -> AugmentConfig:
    merged = merge(to_plain(config.augment), config.sets[number].augment)
    return parse_block(f"data.sets.{number}.augment", AugmentConfig, merged)


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
