"""Which frames are trained on when only some have labels?

All frames get one order, a function of the seed and the list alone: drive after drive, the drives in a drawn order, the frames of
a drive in a drawn order too. A share is the beginning of that order, so that smaller shares lie inside larger ones, and few
labels come from few drives, as they do where people label.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import Frame, FrameReader
from simipu3d.data.config import DataConfig
from simipu3d.errors import UserError

LABEL_STREAM = 2
"""First word of a spawn key: keeps this draw apart from those of `order`."""


def few_labels(reader: FrameReader, data: DataConfig) -> FrameReader:
    """The reader, or with `data.label_fraction` below 1 a part of it.

    Raises:
        UserError: the data set names frames more than once in an epoch (a mixture): its sets can have few labels, not it.
    """
    if data.label_fraction == 1:
        return reader
    order = reader.epoch_order(0, 0)
    if order is not None and len(set(order.tolist())) < len(order):
        raise UserError(
            f"data.label_fraction: {data.name} has an order of its own, with frames more than once; set it in its data.sets"
        )
    return FewLabels(reader, draw_frames(len(reader), reader.sequence_ids, data.label_fraction, data.label_seed))


def draw_frames(num_frames: int, sequence_ids: Sequence[str], fraction: float, seed: int) -> NDArray[np.int64]:
    """(n,) indices, ascending: `fraction` of the frames, rounded, at least one.

    Args:
        num_frames: of the whole list.
        sequence_ids: the drive of every frame; empty where unknown: then every frame is a drive.
        fraction: above 0, at most 1.
        seed: which frames.
    """
    if num_frames == 0:
        return np.zeros(0, dtype=np.int64)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(LABEL_STREAM,)))
    drives = {name: rank for rank, name in enumerate(dict.fromkeys(sequence_ids or range(num_frames)))}
    place = rng.permutation(len(drives))
    of_drive = np.array([place[drives[name]] for name in sequence_ids or range(num_frames)])
    order = np.lexsort((rng.permutation(num_frames), of_drive))
    return np.sort(order[: max(1, round(fraction * num_frames))])


class FewLabels(FrameReader):
    """Some frames of another reader. Contract: `FrameReader`.

    Args:
        reader: the whole data set.
        indices: (n,) which of its frames.
    """

    def __init__(self, reader: FrameReader, indices: NDArray[np.int64]):
        self.reader, self.indices = reader, indices
        self.class_names, self.point_columns = reader.class_names, reader.point_columns
        self.gives, self.wants = reader.gives, reader.wants
        self.frame_ids, self.sequence_ids = (
            tuple(names[index] for index in indices) if len(names) else ()
            for names in (reader.frame_ids, reader.sequence_ids)
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Frame:
        return self.reader[int(self.indices[index])]

    def prepare(self) -> None:
        """What the whole data set does once."""
        self.reader.prepare()

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.int64] | None:
        """(len,) the whole data set's own order, if it has one, without the frames that are not here."""
        order = self.reader.epoch_order(seed, epoch)
        if order is None:
            return None
        return np.searchsorted(self.indices, order[np.isin(order, self.indices)])

    def augment_of(self, index: int) -> dict[str, Any]:
        """As the whole data set says."""
        return self.reader.augment_of(int(self.indices[index]))
