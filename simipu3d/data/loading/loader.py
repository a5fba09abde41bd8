"""How do batches reach the training loop? Reader, augmentation and order behind one DataLoader.

What is read, drawn and carried is what the method needs (`Needs`), and nothing else.

Nothing in a batch depends on the number of workers. A frame that cannot be used travels as a message inside the batch,
for an exception would lose its words on the way out of a worker; `BadFrameLimit` decides in the main process what it
means.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from simipu3d.config import merge, parse_block, to_plain
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import EVERYTHING, Frame, FrameReader, Wants
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, DataConfig
from simipu3d.data.loading.augment import Sample, augment_frame
from simipu3d.data.loading.collate import Collate, NoSample
from simipu3d.data.loading.few_labels import few_labels
from simipu3d.data.loading.order import EpochSampler, Key, reader_order, sample_seeds
from simipu3d.data.loading.workers import obey_only_the_parent
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.camera import project_points
from simipu3d.registry import READERS

log = logging.getLogger(__name__)


def wants_of(needs: Needs) -> Wants:
    """What a reader is asked for, so that a method gets what it needs. For `depth` points come along: where a camera has no
    depth map, they make one."""
    return Wants(
        points=needs.point_views > 0 or "depth" in needs.truth,
        images=needs.image_views > 0,
        truth=frozenset(needs.truth),
    )


def build_reader(data: DataConfig, wants: Wants = EVERYTHING) -> FrameReader:
    """The reader that `data.name` chooses, asked for `wants`, with the frames that `data.label_fraction` leaves."""
    return few_labels(READERS[data.name].target(data, wants), data)


def check_gives(reader: FrameReader, needs: Needs, data: DataConfig) -> None:
    """Raise `UserError` when no frame of a data set can have what a method needs. `depth` can be made of points."""
    missing = [kind for kind in needs.truth if kind != "depth" and kind not in reader.gives]
    if needs.frames > 1:
        missing.append(f"samples of {needs.frames} scans")
    if missing:
        given = ", ".join(sorted(reader.gives)) or "no ground truth"
        raise UserError(
            f"data.name: {data.name}, split {data.split}, has no {' and no '.join(missing)}, which the method needs; it has "
            f"{given}; choose another data set or split, or another method"
        )


class Augments:
    """How each frame is augmented: as the `augment:` block says, with what its reader says of this frame over it, and
    with the middle of the data set's range where a centre is left open.

    Args:
        reader: the frames.
        data: the `data:` block.
        augment: the `augment:` block.
    """

    def __init__(self, reader: FrameReader, data: DataConfig, augment: AugmentConfig):
        self.reader, self._augment = reader, augment
        self._point_range = getattr(data, "point_range", None)  # only data sets that have a range have the key
        self._known: dict[str, AugmentConfig] = {}

    def of(self, index: int) -> AugmentConfig:
        """The settings of one frame.

        Raises:
            UserError: the reader's changes are no valid settings.
        """
        changes = self.reader.augment_of(index)
        key = json.dumps(changes, sort_keys=True)
        if key not in self._known:
            merged = self._augment
            if changes:
                merged = parse_block("augment", AugmentConfig, merge(to_plain(merged), changes))
            points = merged.points.centred(self._point_range)
            self._known[key] = merged.model_copy(update={"points": points})
        return self._known[key]


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


def check_usable(frame: Frame, needs: Needs) -> None:
    """Raise `BadFrameError` when a frame has no camera and images are needed, or when no camera sees any of its points and
    points are to be brought together with images: as views of both, or for a depth map."""
    if needs.image_views == 0:
        return
    if not frame.cameras:
        raise BadFrameError(
            f"frame {frame.frame_id}: has no image, which the method needs; take it off the split, or set "
            "data.on_bad_frame=skip"
        )
    depth_of_points = "depth" in needs.truth and any(camera.depth is None for camera in frame.cameras)
    if needs.point_views or depth_of_points:
        check_seen(frame)


def example_batch(
    reader: FrameReader, frame: Frame, data: DataConfig, augment: AugmentConfig, needs: Needs, index: int
) -> Batch:
    """One frame as a training step would get it, for looking at; the draws depend on its index alone."""
    settings = Augments(reader, data, augment).of(index)
    sample = augment_frame(frame, settings, needs, sample_seeds(0, 0, index))
    return Collate(needs, frame.points.shape[1])([sample])


class SampleDataset(Dataset[Sample | NoSample]):
    """Keys of an `EpochSampler` to augmented samples.

    Args:
        reader: the frames.
        data: the `data:` block.
        augment: the `augment:` block.
        needs: what the method reads of a sample.
        seed: the run's seed.
        rank, world_size: as given to the sampler.
    """

    def __init__(
        self,
        reader: FrameReader,
        data: DataConfig,
        augment: AugmentConfig,
        needs: Needs,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.reader, self.config, self.needs, self.seed = reader, data, needs, seed
        self.rank, self.world_size = rank, world_size
        self._augments = Augments(reader, data, augment)
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
        check_usable(frame, self.needs)
        seeds = sample_seeds(self.seed, 0 if self.config.freeze_draws else epoch, index)
        return augment_frame(frame, self._augments.of(index), self.needs, seeds, messages)


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
    data: DataConfig,
    augment: AugmentConfig,
    needs: Needs,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    reader: FrameReader | None = None,
) -> DataLoader[Batch]:
    """Batches of one rank. `loader.batch_sampler` is the `EpochSampler`: its `start` sets where the next iteration
    begins.

    Args:
        data: the `data:` block.
        augment: the `augment:` block.
        needs: what the method reads of a sample.
        seed: the run's seed.
        rank, world_size: which process of how many.
        reader: the frames, where they have been opened already.

    Raises:
        UserError: fewer frames than one step takes, a data set without what is needed, or whatever opening it raises.
    """
    reader = build_reader(data, wants_of(needs)) if reader is None else reader
    check_gives(reader, needs, data)
    check_enough_frames(data, len(reader), world_size)
    return DataLoader(
        SampleDataset(reader, data, augment, needs, seed, rank, world_size),
        batch_sampler=EpochSampler(len(reader), data.batch_size, rank, world_size),
        collate_fn=Collate(needs, len(reader.point_columns)),
        persistent_workers=data.num_workers > 0,
        **worker_settings(data.num_workers),
        # DataLoader draws a seed an iteration; from here it leaves the global random state alone.
        generator=torch.Generator().manual_seed(seed),
    )


def worker_settings(num_workers: int) -> dict[str, Any]:
    """DataLoader's arguments for reading ahead."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
        # fork: a worker starts in milliseconds and needs no importable __main__; it is safe here because workers use
        # one thread, so they never meet a thread pool that did not survive the fork, and never touch the GPU.
        "multiprocessing_context": "fork" if num_workers > 0 else None,
        "pin_memory": torch.cuda.is_available(),
    }
