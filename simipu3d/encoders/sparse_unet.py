"""What does a sparse U-Net say about a point cloud? PointContrast's SR-UNet (Res16UNet34C) and its smaller sisters.

Five levels, strides 1 to 16. Going down, a 2x2x2 convolution halves the grid and keeps the width, and the first residual
block widens; going up, a transposed one returns to the very voxels of that level, whose features join behind its own.
Networks: MinkowskiNet (arXiv:1904.08755), PointContrast (arXiv:2007.10985). Modules have the names of the table in the
class below.

Voxels are cells floor(xyz / voxel_size) of one grid without bounds. Every scene is moved by whole multiples of 16 voxels
until no index is negative, and the grid's shape is a multiple of 16: parents lie at floor(index / 2) of the unmoved
grid, as in MinkowskiEngine, and every voxel has one.

Shapes: N points, V voxels, M tokens of B scenes, C channels. Cells are (z, y, x), `voxel_size` and `point_range` (x, y, z).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import PointTokens
from simipu3d.encoders.sparse import (
    SiteBatchNorm,
    SparseBackend,
    SparseConv3d,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
)
from simipu3d.encoders.sparse.layers import SparseConvolution
from simipu3d.encoders.sparse.tensor import find_rows, linear_key, split_key
from simipu3d.encoders.voxel_tokens import tokens_at_sites
from simipu3d.errors import UserError
from simipu3d.ops.scatter import scatter_reduce
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.branch import InputLayer

Eight = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt]

LAST_STRIDE = 16
"""Voxels along an edge of the coarsest level's cells."""
_MOST_CELLS = float(1 << 60)
"""A cell's number, with the rim that neighbour search adds, stays within int64."""
_VARIANTS: dict[str, tuple[Eight, Eight]] = {
    "14A": ((32, 64, 128, 256, 128, 128, 96, 96), (1, 1, 1, 1, 1, 1, 1, 1)),
    "18A": ((32, 64, 128, 256, 128, 128, 96, 96), (2, 2, 2, 2, 2, 2, 2, 2)),
    "34A": ((32, 64, 128, 256, 256, 128, 64, 64), (2, 3, 4, 6, 2, 2, 2, 2)),
    "34C": ((32, 64, 128, 256, 256, 128, 96, 96), (2, 3, 4, 6, 2, 2, 2, 2)),
}
"""Widths and numbers of residual blocks of enc1 to enc4 and dec1 to dec4, by the names of MinkowskiEngine's zoo."""


class SparseUNetConfig(PartConfig):
    """The `point_encoder:` block of `sparse_unet34`."""

    name: str = "sparse_unet34"
    """Chooses this encoder."""
    sparse_backend: SparseBackend = "auto"
    """Who computes: `spconv`, `torch`, or `auto` (spconv on CUDA where it is installed, else torch)."""
    variant: Literal["14A", "18A", "34A", "34C"] = "34C"
    """Widths and depths. Default: PointContrast's."""
    planes: Eight | None = None
    """Widths of enc1 to enc4, dec1 to dec4 in place of the variant's; the decoder's are read by `output: full` only."""
    layers: Eight | None = None
    """Residual blocks of the same stages in place of the variant's."""
    stem_channels: PositiveInt = 32
    """Width of the first layer. Default: as in all variants."""
    stem_kernel: Literal[3, 5] = 3
    """Edge of the first layer's kernel. Default: PointContrast's; MinkowskiEngine's examples and SLidR have 5."""
    in_channels: PositiveInt = 3
    """Input features of a voxel. Default: PointContrast's, so that colours fit in later."""
    point_feature: Literal["ones", "intensity", "offset"] = "ones"
    """The input of a voxel: `ones`, a constant; `intensity`, the mean of its points' (both the same in all
    `in_channels`); `offset`, its points' mean offset from its centre along x, y, z, in voxels (3 channels). Default:
    PointContrast's."""
    voxel_size: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.1, 0.1, 0.1)
    """Metres along x, y, z. Default: SLidR's (arXiv:2203.16258) for outdoor scans; indoors PointContrast takes 0.025."""
    point_range: tuple[float, float, float, float, float, float] | None = None
    """x, y, z of the lowest corner, then of the highest, metres; other points are dropped. null: there are no bounds."""
    output: Literal["encoder", "full"] = "full"
    """Where tokens come from: `full`, every voxel, after decoder and final layer; `encoder`, the cells of stride 16
    (1.6 m by default) after enc4; the decoder is then not built. Default: PointContrast's."""
    out_channels: PositiveInt = 32
    """Width of the final layer, with `output: full`. Default: PointContrast's."""
    normalize_feature: bool = False
    """Divide each voxel's output by its Euclidean length, with `output: full`. PointContrast does in pre-training; here
    a projection head follows, which normalises."""
    num_tokens: PositiveInt = 1024
    """Most tokens of a scene; more are thinned by farthest point sampling. Default: as SimIPU's PointNet++ has."""
    bn_momentum: float = Field(default=0.05, gt=0, le=1)
    """Share of a new batch in the running statistics of stem, down, up and shortcuts. Default: PointContrast's in
    pre-training (0.02 in its segmentation)."""
    block_bn_momentum: float = Field(default=0.1, gt=0, le=1)
    """The same inside the residual blocks. Default: PointContrast's, which never sets it there."""

    @model_validator(mode="after")
    def _check(self) -> "SparseUNetConfig":
        if self.point_range is not None:
            for axis, start, stop in zip("xyz", self.point_range[:3], self.point_range[3:], strict=True):
                if not start < stop:
                    raise ValueError(f"point_range along {axis} must rise, it is [{start}, {stop}]")
        if self.point_feature == "offset" and self.in_channels != 3:
            raise ValueError(f"point_feature: offset has 3 channels; in_channels is {self.in_channels}")
        if self.output == "encoder" and (self.normalize_feature or self.out_channels != 32):
            raise ValueError("out_channels and normalize_feature belong to output: full; leave them out")
        return self

    @property
    def widths(self) -> Eight:
        """Channels of enc1 to enc4, dec1 to dec4."""
        return self.planes or _VARIANTS[self.variant][0]

    @property
    def depths(self) -> Eight:
        """Residual blocks of the same stages."""
        return self.layers or _VARIANTS[self.variant][1]


def _with_norm(convolution: SparseConvolution, momentum: float) -> SparseSequential:
    norm = SiteBatchNorm(convolution.weight.shape[0], eps=1e-5, momentum=momentum)
    return SparseSequential(convolution, norm, nn.ReLU())


class ShortcutBlock(SparseModule):
    """Two 3^3 submanifold convolutions and a way round them, a 1x1 layer where the width changes.

    The 1x1 layer is a `Linear`: spconv reads the weight of a 1x1 convolution in another layout than of any other.
    """

    def __init__(self, in_channels: int, out_channels: int, indice_key: str, config: SparseUNetConfig):
        super().__init__()
        backend, momentum = config.sparse_backend, config.block_bn_momentum
        self.conv1 = SubMConv3d(in_channels, out_channels, indice_key, backend=backend)
        self.bn1 = SiteBatchNorm(out_channels, eps=1e-5, momentum=momentum)
        self.conv2 = SubMConv3d(out_channels, out_channels, indice_key, backend=backend)
        self.bn2 = SiteBatchNorm(out_channels, eps=1e-5, momentum=momentum)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            norm = SiteBatchNorm(out_channels, eps=1e-5, momentum=config.bn_momentum)
            self.shortcut = nn.Sequential(nn.Linear(in_channels, out_channels, bias=False), norm)

    def forward(self, x: SparseTensor) -> SparseTensor:
        inner = self.conv1(x)
        inner = self.conv2(inner.with_features(self.relu(self.bn1(inner.features))))
        return inner.with_features(self.relu(self.bn2(inner.features) + self.shortcut(x.features)))


@POINT_ENCODERS.register("sparse_unet34", config=SparseUNetConfig)
class SparseUNet(nn.Module):
    """SR-UNet. Contract: `contracts.tokens.PointEncoder`.

    With the defaults 37,847,808 parameters; `stride` is that of a module's output:

        stem                      3 -> 32            stride 1, skip
        down1 enc1 (2 blocks)    32 -> 32            stride 2, skip
        down2 enc2 (3 blocks)    32 -> 64            stride 4, skip
        down3 enc3 (4 blocks)    64 -> 128           stride 8, skip
        down4 enc4 (6 blocks)   128 -> 256           stride 16
        up1 dec1 (2 blocks)     256 -> 256 + 128 -> 256    stride 8
        up2 dec2 (2 blocks)     256 -> 128 + 64 -> 128     stride 4
        up3 dec3 (2 blocks)     128 -> 96 + 32 -> 96       stride 2
        up4 dec4 (2 blocks)      96 -> 96 + 32 -> 96       stride 1
        final                    96 -> 32, with bias       stride 1

    Args:
        config: the validated block.
        point_columns: names of the columns of the points, x, y, z first.

    Raises:
        UserError: `sparse_backend: spconv` and spconv is not installed; the points have no intensity and it is asked for.
    """

    def __init__(self, config: SparseUNetConfig, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        super().__init__()
        if tuple(point_columns[:3]) != ("x", "y", "z"):
            raise ValueError(f"point_columns must begin with x, y, z, got {', '.join(point_columns)}")
        if config.point_feature == "intensity" and "intensity" not in point_columns:
            raise UserError(
                f"point_encoder.point_feature: the points have no intensity, only {', '.join(point_columns)}; "
                "take ones or offset"
            )
        self.config = config
        self.intensity_column = list(point_columns).index("intensity") if config.point_feature == "intensity" else None
        backend, momentum, widths = config.sparse_backend, config.bn_momentum, config.widths
        # Two kernel sizes need two rulebooks: a 5^3 stem has its own key.
        key = "subm0" if config.stem_kernel == 3 else "stem"
        stem = (config.stem_kernel,) * 3
        stem_layer = SubMConv3d(config.in_channels, config.stem_channels, key, kernel_size=stem, backend=backend)
        self.stem = _with_norm(stem_layer, momentum)
        pair = (2, 2, 2)
        skips = [config.stem_channels, *widths[:3]]
        for level in range(1, 5):
            width = skips[level - 1]
            down = SparseConv3d(
                width, width, f"down{level}", kernel_size=pair, stride=pair, padding=(0, 0, 0), backend=backend
            )
            setattr(self, f"down{level}", _with_norm(down, momentum))
            setattr(self, f"enc{level}", self._stage(width, level - 1, level))
        self.out_channels = widths[3]
        if config.output == "encoder":
            return
        for number in range(1, 5):
            level, width = 4 - number, widths[3 + number]
            up = SparseInverseConv3d(widths[2 + number], width, f"down{level + 1}", kernel_size=pair, backend=backend)
            _reset_by_outputs(up)
            setattr(self, f"up{number}", _with_norm(up, momentum))
            setattr(self, f"dec{number}", self._stage(width + skips[level], 3 + number, level))
        self.final = nn.Linear(widths[7], config.out_channels)
        self.out_channels = config.out_channels

    def _stage(self, in_channels: int, stage: int, level: int) -> SparseSequential:
        width, depth = self.config.widths[stage], self.config.depths[stage]
        key = f"subm{level}"
        first = ShortcutBlock(in_channels, width, key, self.config)
        return SparseSequential(first, *(ShortcutBlock(width, width, key, self.config) for _ in range(depth - 1)))

    def input_layers(self) -> dict[str, InputLayer]:
        """Layers that read the points, by the name of their weight; weights from elsewhere are fitted there."""
        return {"stem.0.weight": InputLayer(4, others=self.config.in_channels, kernel_key="point_encoder.stem_kernel")}

    def forward(self, view: PointView) -> PointTokens:
        """Tokens of a view: features of a voxel (of a stride-16 cell) at the mean of the raw points in it.

        The rows are ascending by scene, then by (z, y, x), also after thinning. A scene without a point in
        `point_range` gives none.
        """
        voxels, point_site = self.voxelize(view)
        levels = self.encode(voxels)
        if self.config.output == "full":
            sites = self.decode(levels)
        else:
            sites = levels[-1]
            parents = _parents(voxels, sites, LAST_STRIDE)
            point_site = torch.cat([parents, parents.new_full((1,), -1)])[point_site]  # -1 finds the -1 at the end
        return tokens_at_sites(view, sites, point_site, self.config.num_tokens)

    def encode(self, voxels: SparseTensor) -> list[SparseTensor]:
        """Outputs of stem and enc1 to enc4, strides 1, 2, 4, 8, 16."""
        levels = [self.stem(voxels)]
        for level in range(1, 5):
            levels.append(getattr(self, f"enc{level}")(getattr(self, f"down{level}")(levels[-1])))
        return levels

    def decode(self, levels: Sequence[SparseTensor]) -> SparseTensor:
        """From the levels of `encode` to `out_channels` features of every voxel, in the rows of the stem.

        Raises:
            ValueError: built without decoder.
        """
        if self.config.output != "full":
            raise ValueError("this network was built without decoder; set output: full")
        x = levels[-1]
        for number, skip in enumerate(reversed(levels[:-1]), start=1):
            x = getattr(self, f"up{number}")(x)
            x = x.with_features(torch.cat([x.features, skip.features], dim=1))
            x = getattr(self, f"dec{number}")(x)
        features = self.final(x.features)
        return x.with_features(F.normalize(features) if self.config.normalize_feature else features)

    def voxelize(self, view: PointView) -> tuple[SparseTensor, Tensor]:
        """The view's voxels with their input features, and each point's row among them (N,), -1 outside `point_range`.

        Raises:
            UserError: the points span more cells than can be numbered.
        """
        xyz = view.points[:, :3].detach()
        inside = torch.ones_like(view.batch_index, dtype=torch.bool)
        if self.config.point_range is not None:
            low, high = xyz.new_tensor(self.config.point_range).view(2, 3)
            inside = ((xyz >= low) & (xyz < high)).all(dim=1)
        rows = inside.nonzero().flatten()
        scene = view.batch_index.index_select(0, rows)
        position = xyz.index_select(0, rows).double() / xyz.new_tensor(self.config.voxel_size, dtype=torch.float64)
        cell = torch.floor(position)
        # By multiples of 16 alone: any other shift would give the voxels other parents.
        corner = cell.new_full((view.num_frames, 3), torch.inf)
        corner = corner.scatter_reduce(0, scene[:, None].expand(-1, 3), cell, "amin")
        moved = cell - (torch.floor(corner / LAST_STRIDE) * LAST_STRIDE).index_select(0, scene)
        largest = moved.flip(1).amax(0).tolist() if len(rows) else [0.0, 0.0, 0.0]
        nz, ny, nx = (LAST_STRIDE * (size // LAST_STRIDE + 1) for size in largest)
        if not view.num_frames * (nz + 4) * (ny + 4) * (nx + 4) < _MOST_CELLS:
            raise UserError(
                f"point_encoder.voxel_size: a scene spans {nx:.3g} x {ny:.3g} x {nz:.3g} voxels, more than can be "
                "numbered; take larger ones, or cut far points off by point_encoder.point_range"
            )
        shape = (int(nz), int(ny), int(nx))
        keys = linear_key(torch.cat([scene[:, None], moved.flip(1).long()], dim=1), shape)
        sites, voxel = torch.unique(keys, return_inverse=True)
        features = self._features(view.points.index_select(0, rows), position - cell, voxel, len(sites))
        point_voxel = torch.full_like(view.batch_index, -1).index_copy(0, rows, voxel)
        return SparseTensor(features, split_key(sites, shape), shape, view.num_frames), point_voxel

    def _features(self, points: Tensor, place: Tensor, voxel: Tensor, num_voxels: int) -> Tensor:
        """(V, in_channels) of the (N, 3 + F) points at their `place` (N, 3), [0, 1), in voxel (N,)."""
        if self.config.point_feature == "offset":
            return scatter_reduce(place - 0.5, voxel, num_voxels, "mean").to(points.dtype)
        if self.intensity_column is None:
            return points.new_ones(num_voxels, self.config.in_channels)
        mean = scatter_reduce(points[:, self.intensity_column, None], voxel, num_voxels, "mean")
        return mean.expand(-1, self.config.in_channels)


def _parents(voxels: SparseTensor, cells: SparseTensor, stride: int) -> Tensor:
    """(V,) row of the coarser cell that holds a voxel."""
    batch, zyx = voxels.voxel_bzyx[:, :1], voxels.voxel_bzyx[:, 1:]
    keys = linear_key(torch.cat([batch, zyx // stride], dim=1), cells.spatial_shape)
    rows, found = find_rows(linear_key(cells.voxel_bzyx, cells.spatial_shape), keys)
    assert bool(found.all()), "every voxel has a parent, because the grid's shape is a multiple of the stride"
    return rows


def _reset_by_outputs(up: SparseInverseConv3d) -> None:
    """Uniform within 1 / sqrt(out * 8): MinkowskiEngine takes the outputs of a transposed convolution for its inputs."""
    out_channels, *kernel, _ = up.weight.shape
    bound = 1 / math.sqrt(out_channels * math.prod(kernel))
    nn.init.uniform_(up.weight, -bound, bound)
