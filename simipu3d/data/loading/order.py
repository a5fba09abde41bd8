"""Which frames does a rank see, in which order, and where does it go on after an interruption?

The order of an epoch is a function of (seed, epoch), the draws of a sample one of (seed, epoch, index). Rank r of w
takes the positions r, r + w, r + 2w, ... of the epoch's order. Neither workers nor prefetching count: a position is a
batch that was consumed, and whoever consumes sets it. Evaluation reads in the order of the indices, each frame once.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from simipu3d.contracts.frame import FrameReader

Key = tuple[int, int]
"""(epoch, position in the epoch's order)."""

ORDER_STREAM, SAMPLE_STREAM = 0, 1
"""First word of a spawn key: keeps the order of an epoch and the draws of its samples apart."""


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_frames: int) -> NDArray[np.int64]:
    """(num_frames,) a permutation of the frame indices, read-only."""
    order = order_rng(seed, epoch).permutation(num_frames)
    order.flags.writeable = False
    return order


def order_rng(seed: int, epoch: int) -> np.random.Generator:
    """Where every draw of an epoch's order comes from."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(ORDER_STREAM, epoch)))


def reader_order(reader: FrameReader, seed: int, epoch: int) -> NDArray[np.int64]:
    """(len(reader),) the indices of an epoch: in the reader's own order where it has one, else a permutation."""
    order = reader.epoch_order(seed, epoch)
    if order is None:
        order = epoch_order(seed, epoch, len(reader))
    assert len(order) == len(reader), f"an order of {len(order)} for {len(reader)} frames"
    return order


def sample_seeds(seed: int, epoch: int, index: int) -> np.random.SeedSequence:
    """Where every draw of one sample comes from."""
    return np.random.SeedSequence(seed, spawn_key=(SAMPLE_STREAM, epoch, index))


class EpochSampler(Sampler[list[Key]]):
    """Yields one rank's batches of keys, epoch after epoch; frames beyond the last full batch are left out.

    Every iteration goes on with the next epoch. `start` sets where the next one begins; `len` is always that of a full
    epoch.

    Args:
        num_frames: length of the data set.
        batch_size: frames a rank and batch.
        rank, world_size: which process of how many.

    Raises:
        ValueError: fewer frames than one batch of every rank.
    """

    def __init__(self, num_frames: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if num_frames < batch_size * world_size:
            raise ValueError(f"{num_frames} frames are fewer than {world_size} processes x batch_size {batch_size}")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._num_batches = num_frames // (batch_size * world_size)
        self._epoch, self._batch = 0, 0

    def start(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration be that of `epoch`, without its first `batch` batches (0 .. len, the consumed
        ones)."""
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"epoch {epoch}, batch {batch}: an epoch has the batches 0 to {len(self)}")
        self._epoch, self._batch = epoch, batch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        # A generator's first lines run at its first `next`: DataLoader makes an iterator that it never uses, which
        # must not cost an epoch.
        epoch, first = self._epoch, self._batch
        self._epoch, self._batch = epoch + 1, 0
        for batch in range(first, len(self)):
            steps = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [(epoch, step * self.world_size + self.rank) for step in steps]


class EvaluationSampler(Sampler[list[int]]):
    """Yields one rank's batches of indices, in order; over all ranks every frame comes once.

    The batches are those of one process, dealt out whole: rank r of w takes the batches r, r + w, r + 2w, ... So a batch and
    its losses do not depend on the number of processes. Where the deal is uneven, the last ranks get an empty batch at the
    end, so that all take the same number of steps.

    Args:
        num_frames: length of the data set.
        batch_size: frames a batch; the last one may hold fewer.
        rank, world_size: which process of how many.
    """

    def __init__(self, num_frames: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.num_frames, self.batch_size, self.rank, self.world_size = num_frames, batch_size, rank, world_size

    def __len__(self) -> int:
        num_batches = -(-self.num_frames // self.batch_size)
        return -(-num_batches // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.num_frames)))
