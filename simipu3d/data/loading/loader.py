"""How do batches reach the training loop? Reader, augmentation and order behind one DataLoader.

Nothing in a batch depends on the number of workers. A frame that cannot be used travels as a message inside the batch,
for an exception would lose its words on the way out of a worker; `BadFrameLimit` decides in the main process what it
means.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import Frame, FrameReader
from simipu3d.data.config import AugmentConfig, DataConfig
from simipu3d.data.loading.augment import Sample, augment_frame
from simipu3d.data.loading.collate import NoSample, collate
from simipu3d.data.loading.order import EpochSampler, Key, reader_order, sample_seeds
from simipu3d.data.loading.workers import obey_only_the_parent
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.camera import project_points
from simipu3d.registry import READERS

log = logging.getLogger(__name__)


def build_reader(config: DataConfig) -> FrameReader:
    """The reader that `config.name` chooses."""
    return READERS[config.name].target(config)


def augment_of(reader: FrameReader, config: DataConfig, index: int) -> AugmentConfig:
    """How a frame is augmented: as its reader says where it has a say, else as `data.augment` does."""
    own = getattr(reader, "augment_of", None)
    return config.augment if own is None else own(index)


def check_seen(frame: Frame) -> None:
    """Raise `BadFrameError` when no camera of the frame sees any of its raw points; a frame without cameras passes."""
    xyz = torch.from_numpy(frame.points[:, :3])
    for camera in frame.cameras:
        _, _, visible = project_points(
            xyz,
            torch.from_numpy(camera.image_from_camera),
            torch.from_numpy(camera.camera_from_lidar),
            camera.image.shape[:2],
            distortion=None if camera.distortion is None else torch.from_numpy(camera.distortion),
        )
        if visible.any():
            return
    if frame.cameras:
        raise BadFrameError(
            f"frame {frame.frame_id}: no camera sees any of its {len(frame.points)} points; check its calibration, "
            "take it off the split, or set data.on_bad_frame=skip"
        )


def example_batch(reader: FrameReader, frame: Frame, config: DataConfig, index: int) -> Batch:
    """One frame as a training step would get it, for looking at; the draws depend on its index alone."""
    return collate([augment_frame(frame, augment_of(reader, config, index), sample_seeds(0, 0, index))])


class PairDataset(Dataset[Sample | NoSample]):
    """Keys of an `EpochSampler` to augmented samples.

    Args:
        reader: the frames.
        config: the `data:` block.
        seed: the run's seed.
        rank, world_size: as given to the sampler.
    """

    def __init__(self, reader: FrameReader, config: DataConfig, seed: int, rank: int = 0, world_size: int = 1):
        self.reader, self.config, self.seed = reader, config, seed
        self.rank, self.world_size = rank, world_size
        self._order = lru_cache(maxsize=2)(partial(reader_order, reader, seed))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: Key) -> Sample | NoSample:
        """The sample at a key; with `on_bad_frame: skip` a bad frame's place is taken by the rank's next one that is not
        in the same batch, as long as there is one: two equal samples would be each other's false negatives.

        Only `BadFrameError` counts as a bad frame; everything else a reader raises is its bug and goes through.
        """
        epoch, position = key
        messages: list[str] = []
        tries = 1 if self.config.on_bad_frame == "raise" else self.config.max_bad_frames(len(self)) + 1
        for candidate in islice(self._candidates(position), tries):
            try:
                return self._read(epoch, candidate, tuple(messages))
            except BadFrameError as error:
                messages.append(str(error))
        return NoSample(tuple(messages))

    def _candidates(self, position: int) -> Iterator[int]:
        """`position`, then the positions of this rank that may stand in for it, each once: those after its batch, those
        before it (each slot of the batch begins at another one), and at last the others of the batch itself."""
        share = range(self.rank, len(self), self.world_size)
        number, size = share.index(position), min(self.config.batch_size, len(share))
        slot = number % size
        first, outside = number - slot, len(share) - size
        yield position
        for step in range(outside):
            yield share[(first + size + (slot + step) % outside) % len(share)]
        for other in range(first, min(first + size, len(share))):
            if other != number:
                yield share[other]

    def _read(self, epoch: int, position: int, messages: tuple[str, ...]) -> Sample:
        index = int(self._order(epoch)[position])
        frame = self.reader[index]
        check_seen(frame)
        seeds = sample_seeds(self.seed, 0 if self.config.freeze_draws else epoch, index)
        return augment_frame(frame, augment_of(self.reader, self.config, index), seeds, messages)


class BadFrameLimit:
    """Counts the bad frames of a run and stops it; the loop calls `add(batch.bad_frames)` before it uses a batch.

    Args:
        config: the `data:` block.
        num_frames: length of the data set.
    """

    def __init__(self, config: DataConfig, num_frames: int):
        self.config, self.num_frames = config, num_frames
        self.limit = config.max_bad_frames(num_frames)
        self.messages: dict[str, None] = {}

    def add(self, bad_frames: Iterable[str]) -> None:
        """Log each bad frame once; the same frame in a later epoch is not counted again.

        Raises:
            BadFrameError: with `on_bad_frame: raise`, the first message as it is.
            UserError: more bad frames than max(1, max_bad_fraction x frames).
        """
        for message in bad_frames:
            if self.config.on_bad_frame == "raise":
                raise BadFrameError(message)
            if message in self.messages:
                continue
            self.messages[message] = None
            log.warning("skipped a bad frame (%d so far): %s", len(self.messages), message)
            if len(self.messages) > self.limit:
                raise UserError(
                    f"{len(self.messages)} of {self.num_frames} frames cannot be used, data.max_bad_fraction="
                    f"{self.config.max_bad_fraction} allows {self.limit}; the last one: {message}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"messages": list(self.messages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where `state_dict` was taken."""
        self.messages = dict.fromkeys(state["messages"])


def start_worker(worker: int) -> None:
    """What every worker process does first."""
    obey_only_the_parent()
    torch.set_num_threads(1)  # workers are the parallelism; threads of theirs would fight over the same cores


def check_enough_frames(config: DataConfig, num_frames: int, world_size: int) -> None:
    """Raise `UserError` when a data set holds less than one step of all processes takes."""
    if num_frames < config.batch_size * world_size:
        processes = f" x {world_size} processes" if world_size > 1 else ""
        raise UserError(
            f"data.batch_size: one step takes {config.batch_size}{processes} frames, and split {config.split} of "
            f"{config.root or config.name} has {num_frames}; lower data.batch_size to {num_frames // world_size} or "
            "less, or add frames"
        )


def make_loader(
    config: DataConfig, seed: int, rank: int = 0, world_size: int = 1, reader: FrameReader | None = None
) -> DataLoader[Batch]:
    """Batches of one rank. `loader.batch_sampler` is the `EpochSampler`: its `start` sets where the next iteration
    begins.

    Args:
        config: the `data:` block.
        seed: the run's seed.
        rank, world_size: which process of how many.
        reader: the frames, where they have been opened already.

    Raises:
        UserError: fewer frames than one step takes, or whatever opening the data set raises.
    """
    reader = build_reader(config) if reader is None else reader
    check_enough_frames(config, len(reader), world_size)
    parallel = config.num_workers > 0
    return DataLoader(
        PairDataset(reader, config, seed, rank, world_size),
        batch_sampler=EpochSampler(len(reader), config.batch_size, rank, world_size),
        collate_fn=collate,
        num_workers=config.num_workers,
        worker_init_fn=start_worker,
        persistent_workers=parallel,
        # fork: a worker starts in milliseconds and needs no importable __main__; it is safe here because workers use
        # one thread, so they never meet a thread pool that did not survive the fork, and never touch the GPU.
        multiprocessing_context="fork" if parallel else None,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed an iteration; from here it leaves the global random state alone.
        generator=torch.Generator().manual_seed(seed),
    )
