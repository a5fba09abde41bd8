"""What do encoders return? Point tokens and feature maps.

Shapes: M tokens of a view in the whole batch, C channels.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from simipu3d.contracts.batch import PointView


@dataclass(frozen=True, eq=False)
class PointTokens:
    """Learned features at places of a point view.

    Attributes:
        xyz: (M, 3) float32, metres, in the (augmented) frame of the view.
        features: (M, C).
        batch_index: (M,) int64, ascending. The number of tokens may differ from frame to frame, and may be 0.
        source_index: (M,) int64, the raw point of its frame that a token sits on, or -1 where on none (a voxel).
            Two tokens of one frame with the same non-negative source are copies of each other.
    """

    xyz: Tensor
    features: Tensor
    batch_index: Tensor
    source_index: Tensor


class PointEncoder(Protocol):
    """Ragged points in, tokens out. Registered in `POINT_ENCODERS`, built as `cls(config, point_columns=...)`."""

    out_channels: int

    def __call__(self, view: PointView) -> PointTokens: ...


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """One map of an image encoder.

    Attributes:
        features: (I, C, Hf, Wf).
        stride: input pixels from cell to cell.
        offset: input pixel (integer-centre) of the centre of cell 0; feature coordinate = (u - offset) / stride.
    """

    features: Tensor
    stride: int
    offset: float
