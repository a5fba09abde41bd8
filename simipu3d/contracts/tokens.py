"""What do encoders return? Point tokens and feature maps.

Shapes: M tokens of a view in the whole batch, C channels, I images.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

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
class BevMap:
    """What a point encoder makes of a view as a map seen from above.

    Attributes:
        features: (B, C, Y, X), rows along y, columns along x.
        origin: (x, y) of the centre of cell (0, 0), metres, in the (augmented) frame of the view: the middle of what the
            cell sees. The centre of cell (row, column) is origin + (column, row) * cell.
        cell: distance from one centre to the next along (x, y), metres.
    """

    features: Tensor
    origin: tuple[float, float]
    cell: tuple[float, float]


@runtime_checkable
class BevEncoder(Protocol):
    """A point encoder that can also make a map: pillars, and voxel backbones with `output_conv: true`.

    An encoder that is built without what the map needs has no `bev_channels`, so that `isinstance` answers for it.
    """

    bev_channels: int

    def bev(self, view: PointView) -> BevMap: ...


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


class Level(NamedTuple):
    """One feature map of an image backbone, as data."""

    stride: int
    """Input pixels from cell to cell."""
    channels: int
    offset: float
    """Input pixel (integer-centre) of the centre of cell 0; feature coordinate = (u - offset) / stride."""


class ImageBackbone(Protocol):
    """An image backbone that is no timm model. Registered in `IMAGE_BACKBONES`, built as `cls(config)`; an `nn.Module`.

    `set_grad_checkpointing(enable)`, timm's method of that name, is needed for `gradient_checkpointing: true` only.
    """

    levels: tuple[Level, ...]
    """Its maps, finest first."""
    pad_multiple: int
    """Heights and widths that it is called with are multiples of this; a map then has H / stride x W / stride cells, rounded
    up."""

    def __call__(self, images: Tensor, last: int) -> list[Tensor]:
        """Maps (I, channels, Hf, Wf) of levels 0 to `last` from (I, 3, H, W); what lies behind `last` need not run."""
        ...
