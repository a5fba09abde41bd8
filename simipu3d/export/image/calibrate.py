"""Which statistics do an exported backbone's BatchNorms hold? Those of pre-training, or of bare pictures.

In pre-training a batch is padded to one size and the padding counts: a network whose statistics are used as they are
(`norm_eval=True`, frozen stages, a linear probe) then divides by too small a variance. Here they are measured again on
pictures as a detector feeds them, whole and without padding.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simipu3d.config import load_yaml, parse_part
from simipu3d.contracts.frame import Wants
from simipu3d.encoders.image import BatchNorm, ImageEncoder
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

NUM_PICTURES = 64
"""Pictures that a configuration gives: with 8 in a batch, means over 8 batches."""
_MOST_IN_BATCH = 8


class _Moments:
    """Means of a BatchNorm's input and of its square, over all pictures, each pixel once."""

    def __init__(self, norm: BatchNorm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.norm, self.count = norm, 0
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.sum = torch.zeros_like(norm.running_mean, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sum)
        self.hook = norm.register_forward_pre_hook(self._add)

    def _add(self, _norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        self.count += x.numel() // x.shape[1]
        self.sum += x.sum((0, 2, 3))
        self.squares += x.square().sum((0, 2, 3))

    def write(self) -> None:
        mean = self.sum / self.count
        self.running_mean.copy_(mean)
        self.running_var.copy_((self.squares / self.count - mean.square()).clamp(min=0))


def calibrate(encoder: ImageEncoder, batches: Iterable[Tensor]) -> int:
    """Measure the running statistics of an encoder's trained BatchNorms again, in place.

    While measuring, every BatchNorm normalises by its own batch, as in training; its statistics then are those of all pixels
    of all pictures. Frozen BatchNorms keep theirs.

    Args:
        encoder: in any mode; it is left in eval mode.
        batches: (I, 3, H, W) uint8 RGB each, without padding.

    Returns:
        The number of pictures.

    Raises:
        UserError: there is no picture, or nothing to measure.

    Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3 ("precise BN").
    """
    encoder.train()
    moments = [_Moments(m) for m in encoder.trunk.modules() if isinstance(m, BatchNorm) and m.training]
    measured = {moment.norm for moment in moments}
    if not moments:
        encoder.eval()
        raise UserError(f"--calibrate: {encoder.config.name} has no BatchNorm that was trained; leave it out")
    for module in encoder.modules():  # no path is dropped while measuring
        module.training = module in measured
    momenta = {moment.norm: moment.norm.momentum for moment in moments}
    count = 0
    try:
        for norm in momenta:
            norm.momentum = 0.0
        with torch.no_grad():
            for images in batches:
                size = torch.tensor([images.shape[2:]] * len(images))
                encoder(encoder.normalise(images, size))
                count += len(images)
    finally:
        for moment in moments:
            moment.hook.remove()
            moment.norm.momentum = momenta[moment.norm]
        encoder.eval()
    if not count:
        raise UserError("--calibrate: no picture to measure the statistics on; check the data of the configuration")
    for moment in moments:
        moment.write()
    return count


def bare_pictures(cfg: Path, count: int = NUM_PICTURES) -> Iterator[Tensor]:
    """Pictures of a data configuration, evenly over its split, as (I, 3, H, W) uint8 of one size each.

    Args:
        cfg: a configuration file with a `data:` block.
        count: how many pictures at most.

    Raises:
        UserError: the configuration has no data, or none of its frames can be read.
    """
    raw = load_yaml(cfg)
    config: Any = parse_part("data", READERS, raw.get("data"))
    reader = READERS[config.name].target(config, Wants(points=False))
    batch: list[np.ndarray] = []
    given = 0
    for index in np.unique(np.linspace(0, len(reader) - 1, min(count, len(reader))).astype(int)) if len(reader) else ():
        try:
            frame = reader[int(index)]
        except BadFrameError as error:
            raise UserError(f"--calibrate: {cfg}: {error}") from error
        for camera in frame.cameras:
            if given == count:
                break
            given += 1
            if batch and (batch[0].shape != camera.image.shape or len(batch) == _MOST_IN_BATCH):
                yield _stack(batch)
                batch = []
            batch.append(camera.image)
    if batch:
        yield _stack(batch)


def _stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
