"""How do feature maps become one map of depth logits?

Maps come finest first. Shapes: I images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simipu3d.contracts.tokens import FeatureMap, Level
from simipu3d.errors import UserError


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(I, C, *size), bilinear; the centres of the corner cells stay at the corners (align_corners), as in the published runs."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


class UpBlock(nn.Module):
    """A coarse map, enlarged, joined with the next finer one: two 3x3 convolutions with ReLU, and BatchNorm between if asked."""

    def __init__(self, coarse: int, fine: int, out: int, *, norm: bool = False):
        super().__init__()
        self.first = nn.Conv2d(coarse + fine, out, 3, padding=1, bias=not norm)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=not norm)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) if norm else nn.Identity() for _ in range(2))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(I, out, Hf, Wf) at the size of the finer map."""
        joined = torch.cat([enlarge(coarse, (fine.shape[-2], fine.shape[-1])), fine], dim=1)
        return self.norms[1](self.second(self.norms[0](self.first(joined)).relu())).relu()


class DenseDecoder(nn.Module):
    """DenseDepth's decoder on the levels of any encoder; the logits have the finest level's size.

    Args:
        levels: of the encoder, finest first.
        channels: of the decoder at each level; None: see `depth.channels`.
        norm: BatchNorm behind the convolutions of the way up.

    Source: Alhashim & Wonka, arXiv:1812.11941; layer by layer as DenseDepthHead of
    zhyever/Monocular-Depth-Estimation-Toolbox, with ReLU and, but for `norm`, without norms.
    Initialisation: Kaiming's (arXiv:1502.01852).
    """

    def __init__(self, levels: Sequence[Level], channels: tuple[int, ...] | None, *, norm: bool = False):
        super().__init__()
        own = default_channels(levels) if channels is None else channels
        if len(own) != len(levels):
            raise UserError(
                f"depth.channels: {len(own)} numbers for the {len(levels)} levels of the encoder, with "
                f"{', '.join(str(level.channels) for level in levels)} channels; give one for each, finest first"
            )
        self.bottom = nn.Conv2d(levels[-1].channels, own[-1], 1)
        steps = range(len(levels) - 2, -1, -1)
        self.up = nn.ModuleList(UpBlock(own[step + 1], levels[step].channels, own[step], norm=norm) for step in steps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Nine layers without a norm: torch's own initialisation would let the signal fade by 0.4 a layer.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    module.bias.data.zero_()
        self.logit = nn.Conv2d(own[0], 1, 3, padding=1)

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor:
        """(I, 1, Hf, Wf) at the finest level's size."""
        merged = self.bottom(maps[-1].features)
        for block, fine in zip(self.up, maps[-2::-1], strict=True):
            merged = block(merged, fine.features)
        return self.logit(merged)


def default_channels(levels: Sequence[Level]) -> tuple[int, ...]:
    """Those of the encoder's levels, the finest at least half of the next coarser one's."""
    own = [level.channels for level in levels]
    if len(own) > 1:
        own[0] = max(own[0], own[1] // 2)
    return tuple(own)


class LinearDecoder(nn.Module):
    """One 1x1 convolution on the last map; the logits have its size.

    Args:
        levels: of the encoder, finest first.
    """

    def __init__(self, levels: Sequence[Level]):
        super().__init__()
        self.logit = nn.Conv2d(levels[-1].channels, 1, 1)

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor:
        """(I, 1, Hf, Wf) at the last level's size."""
        return self.logit(maps[-1].features)
