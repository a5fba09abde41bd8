"""What does a pillar network say about a point cloud? PointPillars' features under a sparse backbone in two dimensions.

A pillar is a cell of the ground grid over the whole height. Each of its points is described by its raw columns and by its
offsets from the pillar's mean point and from its centre; a linear layer, BatchNorm and ReLU, and the maximum over the
points (PointPillars, arXiv:1812.05784). What follows is PillarNet's encoder (arXiv:2205.07403): four stages of sparse
convolutions on (y, x) at strides 1, 2, 4, 8. Tokens and the bird's-eye-view map come from the last one, conv4; the dense
stages after it belong to a detector.

Names and shapes of the state dict are OpenPCDet's: `vfe.*` as in its DynamicPillarVFE with one layer, `conv1` to `conv4`
as in its PillarRes18BackBone8x and PillarBackBone8x (there below `backbone_3d.`), weights in spconv 2 layout
(out, ky, kx, in).

Shapes: N points, P pillars, C channels, B scenes. Cells are (y, x), `pillar_size` is (x, y), `point_range` (x, y, z).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import PointView
from simipu3d.encoders.sparse import (
    SiteBatchNorm,
    SparseBackend,
    SparseConv2d,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv2d,
)
from simipu3d.encoders.strided_backbone import PointRange, SparseResidualBlock, StridedBackbone, check_grid, with_norm
from simipu3d.ops.scatter import scatter_reduce
from simipu3d.ops.voxelize import grid_size, voxelize
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.branch import InputLayer


class PillarConfig(PartConfig):
    """The `point_encoder:` block of `pillar`."""

    name: str = "pillar"
    """Chooses this encoder."""
    sparse_backend: SparseBackend = "auto"
    """Who computes: `spconv`, `torch`, or `auto` (spconv on CUDA where it is installed, else torch)."""
    pillar_size: tuple[PositiveFloat, PositiveFloat] = (0.05, 0.05)
    """Metres along x, y. Default: with it KITTI's range is the 1600 x 1408 grid that OpenPCDet notes beside its layers;
    PillarNet has 0.075 on nuScenes and 0.1 on Waymo."""
    point_range: PointRange = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
    """x, y, z of the lowest corner, then of the highest, metres; other points are dropped. Default in a run:
    `data.point_range` (of mixed sets, the box round all of theirs); where the data have none, OpenPCDet's KITTI range."""
    blocks: Literal["residual", "plain"] = "residual"
    """What a stage is made of: two residual blocks (PillarRes18BackBone8x), or two single convolutions
    (PillarBackBone8x). Default: PillarNet's choice, its ResNet-18."""
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (32, 64, 128, 256)
    """Channels of conv1 to conv4; the first is also that of the pillar features. Default: OpenPCDet's, into which no
    others fit."""
    num_tokens: PositiveInt = 1024
    """Most tokens of a scene; more are thinned by farthest point sampling. Default: as SimIPU's PointNet++ has."""

    @model_validator(mode="after")
    def _check(self) -> "PillarConfig":
        check_grid(self.point_range, self.pillar_size, "pillar")
        if self.point_range[2] >= self.point_range[5]:
            raise ValueError(f"point_range along z must rise, it is [{self.point_range[2]}, {self.point_range[5]}]")
        return self

    @property
    def cell_size(self) -> tuple[float, float, float]:
        """Edges of a pillar along x, y, z, metres."""
        return *self.pillar_size, self.point_range[5] - self.point_range[2]


class PillarLayer(nn.Module):
    """Linear layer, BatchNorm and ReLU a point, then the maximum over the points of a pillar."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = SiteBatchNorm(out_channels)

    def forward(self, features: Tensor, pillar: Tensor, num_pillars: int) -> Tensor:
        """From (N, in_channels) and the points' pillars (N,) to (P, out_channels)."""
        features = torch.relu(self.norm(self.linear(features.to(self.linear.weight.dtype))))
        return scatter_reduce(features, pillar, num_pillars, "max")


class PillarFeatures(nn.Module):
    """Points to pillars and their features; the input of its layer is 3 + F raw columns, 3 offsets from the mean of the
    pillar's points, 3 from its centre, metres."""

    def __init__(self, config: PillarConfig, num_columns: int):
        super().__init__()
        self.config = config
        self.pfn_layers = nn.ModuleList([PillarLayer(num_columns + 6, config.widths[0])])

    def forward(self, view: PointView) -> tuple[Tensor, Tensor, Tensor]:
        """Pillars (P, 3) as (scene, y, x), their features (P, C), and which points (N,) lie in `point_range`."""
        config = self.config
        sites, means, point_to_pillar = voxelize(view.points, view.batch_index, config.cell_size, config.point_range)
        in_range = point_to_pillar >= 0
        rows = in_range.nonzero().flatten()
        pillar, points = point_to_pillar.index_select(0, rows), view.points.index_select(0, rows)
        xyz, size = points[:, :3], points.new_tensor(config.cell_size)
        centres = points.new_tensor(config.point_range[:3]) + (sites[:, 1:].flip(1) + 0.5) * size
        from_mean = xyz - means[:, :3].index_select(0, pillar)
        from_centre = xyz - centres.index_select(0, pillar)
        features = torch.cat([points, from_mean, from_centre], dim=1)
        for layer in self.pfn_layers:
            features = layer(features, pillar, len(sites))
        return sites.index_select(1, sites.new_tensor([0, 2, 3])), features, in_range


@POINT_ENCODERS.register("pillar", config=PillarConfig)
class PillarEncoder(StridedBackbone):
    """Pillar features and a sparse 2D backbone. Contracts: `contracts.tokens.PointEncoder`, `BevEncoder`.

    Args:
        config: the validated block.
        point_columns: names of the columns of the points, x, y, z first; their number is part of the first layer's width.

    Raises:
        UserError: `sparse_backend: spconv` and spconv is not installed.
    """

    def __init__(self, config: PillarConfig, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        nx, ny, _ = grid_size(config.cell_size, config.point_range)
        super().__init__(point_columns, config.point_range, config.pillar_size, (ny, nx), config.num_tokens)
        self.config = config
        self._columns = tuple(point_columns)
        self.out_channels = self.bev_channels = config.widths[3]
        self.vfe = PillarFeatures(config, len(point_columns))
        self.conv1 = SparseSequential(*self._blocks(1))
        for stage in (2, 3, 4):
            width_in, width = config.widths[stage - 2 : stage]
            down = SparseConv2d(width_in, width, f"spconv{stage}", backend=config.sparse_backend)
            setattr(self, f"conv{stage}", SparseSequential(with_norm(down), *self._blocks(stage)))

    def _blocks(self, stage: int) -> list[SparseModule]:
        width, backend, key = self.config.widths[stage - 1], self.config.sparse_backend, f"subm{stage}"
        if self.config.blocks == "residual":
            return [
                SparseResidualBlock(width, key, bias=True, backend=backend, convolution=SubMConv2d) for _ in range(2)
            ]
        return [with_norm(SubMConv2d(width, width, key, backend=backend)) for _ in range(2)]

    def input_layers(self) -> dict[str, InputLayer]:
        """Layers that read the points' columns, by the name of their weight; weights from elsewhere are fitted there."""
        return {"vfe.pfn_layers.0.linear.weight": InputLayer(1, self._columns, others=6)}

    def voxelize(self, view: PointView) -> tuple[SparseTensor, Tensor]:
        """The view's pillars with their features, and which points (N,) lie in `point_range`."""
        sites, features, in_range = self.vfe(view)
        return SparseTensor(features, sites, self.sparse_shape, view.num_frames), in_range
