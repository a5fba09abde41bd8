"""How do batches reach an evaluation? In order, every frame once, with no draws.

The samples are a function of the data set and the settings alone: no seed, number of workers or number of processes
changes them. Where a method compares two views, the second one's draw is fixed by the frame's index.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import FrameReader
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, DataConfig
from simipu3d.data.loading.augment import Sample, augment_frame
from simipu3d.data.loading.collate import Collate, NoSample
from simipu3d.data.loading.loader import Augments, build_reader, check_gives, check_usable, wants_of, worker_settings
from simipu3d.data.loading.order import EvaluationSampler, sample_seeds
from simipu3d.errors import BadFrameError, UserError


class EvaluationDataset(Dataset[Sample | NoSample]):
    """Indices to samples. A bad frame is a `NoSample`: an exception would lose its words on the way out of a worker.

    Args:
        reader: the frames.
        data: the `data:` block.
        augment: the `augment:` block.
        needs: what the method reads of a sample.
    """

    def __init__(self, reader: FrameReader, data: DataConfig, augment: AugmentConfig, needs: Needs):
        self.reader, self.needs = reader, needs
        self._augments = Augments(reader, data, augment)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample | NoSample:
        try:
            frame = self.reader[index]
            check_usable(frame, self.needs)
            seeds = sample_seeds(0, 0, index)
            return augment_frame(frame, self._augments.of(index), self.needs, seeds, evaluation=True)
        except BadFrameError as error:
            return NoSample((str(error),))


class EvaluationLoader(DataLoader[Batch]):
    """A DataLoader that raises `BadFrameError` where a batch lacks a frame: a mean over fewer frames is another number."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.bad_frames:
                raise BadFrameError(batch.bad_frames[0])
            yield batch


def make_evaluation_loader(
    data: DataConfig,
    augment: AugmentConfig,
    needs: Needs,
    rank: int = 0,
    world_size: int = 1,
    reader: FrameReader | None = None,
) -> EvaluationLoader:
    """Batches of one rank, see `EvaluationSampler`; every iteration gives the same ones.

    Args:
        data: the `data:` block. `on_bad_frame` is not asked: a bad frame raises.
        augment: the `augment:` block; what is left of it is in `augment_frame`.
        needs: what the method reads of a sample.
        rank, world_size: which process of how many; those beyond the last batch get empty batches.
        reader: the frames, where they have been opened already.

    Raises:
        UserError: no frames, a data set without what is needed, or whatever opening it raises.
    """
    reader = build_reader(data, wants_of(needs)) if reader is None else reader
    check_gives(reader, needs, data)
    if len(reader) == 0:
        raise UserError(f"data.split: split {data.split} of {data.root or data.name} has no frames to evaluate on")
    return EvaluationLoader(
        EvaluationDataset(reader, data, augment, needs),
        batch_sampler=EvaluationSampler(len(reader), data.batch_size, rank, world_size),
        collate_fn=Collate(needs, len(reader.point_columns)),
        **worker_settings(data.num_workers),
        # DataLoader draws a seed an iteration; from here it leaves the global random state alone.
        generator=torch.Generator().manual_seed(0),
    )
