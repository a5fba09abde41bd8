"""MinkowskiEngine's Res16UNet and Pointcept's SpUNet-v1m1, layer by layer.

MinkowskiEngine works on absolute coordinates: at tensor stride s a site's coordinates are multiples of s, an odd kernel is
centred, an even one reaches from the site upwards, and kernel offset (a, b, c) of the axes (x, y, z) is slice
a + K b + K^2 c. Both projects feed sites as (batch, x, y, z). Widths are those of stem, four stages down and four up.
"""

import itertools

import torch
from torch import Tensor, nn

from simipu3d.export.peers.sparse import Grid, OneByOne, PeerConv, PeerTensor, Residual, Unit, gather_add, triple

# ------------------------------------------------------------------------------------------------ MinkowskiEngine


class _MinkowskiConv(nn.Module):
    """A convolution (or, where the stride falls, a transposed one) on absolute coordinates."""

    def __init__(self, widths: tuple[int, int], size: int, stride: int = 1, transposed: bool = False):
        super().__init__()
        self.size, self.stride, self.transposed = size, stride, transposed
        self.kernel = nn.Parameter(torch.zeros(size**3, *widths) if size > 1 else torch.zeros(widths))

    def forward(self, x: "_Cloud") -> "_Cloud":
        if self.size == 1:
            return _Cloud(x.features @ self.kernel, x.grid, x.stride, x.coarser)
        reach = range(-(self.size // 2), self.size // 2 + 1) if self.size % 2 else range(self.size)
        # z is the slowest of the product's axes, so that x runs fastest in the kernel's slices
        steps = torch.tensor([(0, a, b, c) for c, b, a in itertools.product(reach, reach, reach)])[:, None]
        if self.transposed:
            fine_stride = x.stride // self.stride
            fine = x.coarser.pop(fine_stride)
            rows = x.grid.rows(fine.cells - steps * fine_stride)
            return _Cloud(gather_add(x.features, rows, self.kernel), fine, fine_stride, x.coarser)
        grid, stride = x.grid, x.stride * self.stride
        if self.stride > 1:
            x.coarser[x.stride] = grid
            parents = torch.cat([grid.cells[:, :1], grid.cells[:, 1:] // stride * stride], dim=1)
            grid = Grid(torch.unique(parents, dim=0), grid.shape, grid.batch_size)
        rows = x.grid.rows(grid.cells + steps * x.stride)
        return _Cloud(gather_add(x.features, rows, self.kernel), grid, stride, x.coarser)


class _Cloud:
    """Features at absolute coordinates of one tensor stride; `coarser` keeps finer grids by their stride."""

    def __init__(self, features: Tensor, grid: Grid, stride: int, coarser: dict[int, Grid]):
        self.features, self.grid, self.stride, self.coarser = features, grid, stride, coarser


class _MinkowskiNorm(nn.Module):
    """BatchNorm below the name `bn`, eps 1e-5."""

    def __init__(self, width: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x: _Cloud) -> _Cloud:
        return _Cloud(self.bn(x.features), x.grid, x.stride, x.coarser)


def _relu(x: _Cloud) -> _Cloud:
    return _Cloud(x.features.relu(), x.grid, x.stride, x.coarser)


class _MinkowskiBlock(nn.Module):
    def __init__(self, widths: tuple[int, int]):
        super().__init__()
        self.conv1, self.norm1 = _MinkowskiConv(widths, 3), _MinkowskiNorm(widths[1])
        self.conv2, self.norm2 = _MinkowskiConv((widths[1], widths[1]), 3), _MinkowskiNorm(widths[1])
        self.downsample = None
        if widths[0] != widths[1]:
            self.downsample = nn.Sequential(_MinkowskiConv(widths, 1), _MinkowskiNorm(widths[1]))

    def forward(self, x: _Cloud) -> _Cloud:
        inner = self.norm2(self.conv2(_relu(self.norm1(self.conv1(x)))))
        way_round = x if self.downsample is None else self.downsample(x)
        return _relu(_Cloud(inner.features + way_round.features, inner.grid, inner.stride, inner.coarser))


class MinkowskiUNet(nn.Module):
    """Res16UNet with its names.

    Args:
        in_channels, out_channels: of the whole network.
        stem: width and kernel size of the first layer.
        widths, depths: of the eight stages.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stem: tuple[int, int],
        widths: tuple[int, ...],
        depths: tuple[int, ...],
    ):
        super().__init__()
        self.conv0p1s1, self.bn0 = _MinkowskiConv((in_channels, stem[0]), stem[1]), _MinkowskiNorm(stem[0])
        skips = [stem[0], *widths[:3]]
        for level in range(1, 5):
            width = skips[level - 1]
            setattr(self, f"conv{level}p{2 ** (level - 1)}s2", _MinkowskiConv((width, width), 2, 2))
            setattr(self, f"bn{level}", _MinkowskiNorm(width))
            setattr(self, f"block{level}", self._stage(width, widths[level - 1], depths[level - 1]))
        for number in range(4, 8):
            pair = (widths[number - 1], widths[number])
            setattr(self, f"convtr{number}p{2 ** (8 - number)}s2", _MinkowskiConv(pair, 2, 2, transposed=True))
            setattr(self, f"bntr{number}", _MinkowskiNorm(widths[number]))
            joined = widths[number] + skips[7 - number]
            setattr(self, f"block{number + 1}", self._stage(joined, widths[number], depths[number]))
        self.final = _MinkowskiConv((widths[7], out_channels), 1)
        self.final.bias = nn.Parameter(torch.zeros(1, out_channels))

    @staticmethod
    def _stage(in_channels: int, width: int, depth: int) -> nn.Sequential:
        pairs = [(in_channels, width), *[(width, width)] * (depth - 1)]
        return nn.Sequential(*(_MinkowskiBlock(pair) for pair in pairs))

    def forward(self, x: PeerTensor, num_outputs: int) -> list[PeerTensor]:
        """The first outputs (5 or 10) of: stem, four stages down, four stages up, last layer."""
        cloud = _relu(self.bn0(self.conv0p1s1(_Cloud(x.features, x.grid, 1, {}))))
        outputs, skips = [cloud], [cloud]
        for level in range(1, 5):
            conv = getattr(self, f"conv{level}p{2 ** (level - 1)}s2")
            cloud = getattr(self, f"block{level}")(_relu(getattr(self, f"bn{level}")(conv(cloud))))
            outputs.append(cloud)
            skips.append(cloud)
        if num_outputs > 5:
            skips.pop()
            for number in range(4, 8):
                conv = getattr(self, f"convtr{number}p{2 ** (8 - number)}s2")
                cloud = _relu(getattr(self, f"bntr{number}")(conv(cloud)))
                cloud.features = torch.cat([cloud.features, skips.pop().features], dim=1)
                cloud = getattr(self, f"block{number + 1}")(cloud)
                outputs.append(cloud)
            last = self.final(cloud)
            last.features = last.features + self.final.bias
            outputs.append(last)
        return [PeerTensor(out.features, _shrink(out.grid, out.stride)) for out in outputs]


def _shrink(grid: Grid, stride: int) -> Grid:
    """Absolute coordinates as cells of their own level."""
    cells = torch.cat([grid.cells[:, :1], grid.cells[:, 1:] // stride], dim=1)
    return Grid(cells, triple(-(-size // stride) for size in grid.shape), grid.batch_size)


# ------------------------------------------------------------------------------------------------------ Pointcept

POINTCEPT_EPS = 1e-3


class PointceptUNet(nn.Module):
    """SpUNet-v1m1 with its names: stem of size 5, the strided layers widen, the encoder's blocks have no projection.

    Args:
        in_channels, num_classes: of the whole network.
        base_channels: width of the stem.
        widths, depths: of the eight stages (`channels`, `layers`).
    """

    def __init__(
        self, in_channels: int, num_classes: int, base_channels: int, widths: tuple[int, ...], depths: tuple[int, ...]
    ):
        super().__init__()
        stem = PeerConv("submanifold", (in_channels, base_channels), kernel=(5, 5, 5))
        self.conv_input = Unit(stem, nn.BatchNorm1d(base_channels, eps=POINTCEPT_EPS), nn.ReLU())
        self.down, self.enc, self.up, self.dec = (nn.ModuleList() for _ in range(4))
        finer = [base_channels, *widths[:3]]
        for s in range(4):
            self.down.append(self._pair("strided", (finer[s], widths[s]), s))
            self.enc.append(self._stage(widths[s], widths[s], depths[s]))
            self.up.append(self._pair("inverse", (widths[6 - s], widths[7 - s]), s))
            self.dec.append(self._stage(widths[7 - s] + finer[s], widths[7 - s], depths[7 - s]))
        self.final = OneByOne((widths[7], num_classes), bias=True)

    @staticmethod
    def _pair(kind: str, widths: tuple[int, int], s: int) -> Unit:
        conv = PeerConv(kind, widths, kernel=(2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0), key=f"spconv{s + 1}")
        return Unit(conv, nn.BatchNorm1d(widths[1], eps=POINTCEPT_EPS), nn.ReLU())

    @staticmethod
    def _stage(in_channels: int, width: int, depth: int) -> Unit:
        stage = Unit()
        for number, pair in enumerate([(in_channels, width), *[(width, width)] * (depth - 1)]):
            proj = Unit(nn.Identity())
            if pair[0] != pair[1]:
                proj = Unit(OneByOne(pair), nn.BatchNorm1d(width, eps=POINTCEPT_EPS))
            stage.add_module(f"block{number}", Residual(pair, POINTCEPT_EPS, "spconv2", proj=proj))
        return stage

    def forward(self, x: PeerTensor, num_outputs: int) -> list[PeerTensor]:
        """The first outputs of: stem, four stages down, four stages up, last layer."""
        outputs = [self.conv_input(x)]
        for s in range(4):
            if len(outputs) < num_outputs:
                outputs.append(self.enc[s](self.down[s](outputs[-1])))
        if num_outputs > 5:
            skips = outputs[:4]
            for s in (3, 2, 1, 0):
                x = self.up[s](outputs[-1])
                x = x.with_features(torch.cat([x.features, skips[s].features], dim=1))
                outputs.append(self.dec[s](x))
            outputs.append(self.final(outputs[-1]))
        return outputs
