"""What does a voxel network say about a point cloud? OpenPCDet's two sparse backbones as point encoders.

Names and shapes of the state dict are those of OpenPCDet's VoxelBackBone8x (SECOND, doi 10.3390/s18103337) and
VoxelResBackBone8x (there below `backbone_3d.`), weights in spconv 2 layout (out, kz, ky, kx, in). A voxel's input is
the mean of its points' raw columns, absolute x, y, z in metres first. Tokens come from the last 3D stage, conv4, at
stride 8.

Shapes: N points, V voxels, S sites of conv4, M tokens of B scenes. Cells are (z, y, x); `voxel_size` and `point_range`
are (x, y, z), as OpenPCDet's configurations have them.
"""

from collections.abc import Callable, Sequence
from math import isclose

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import PointTokens
from simipu3d.encoders.sparse import (
    SiteBatchNorm,
    SparseBackend,
    SparseConv3d,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
)
from simipu3d.encoders.sparse.layers import SparseConvolution
from simipu3d.encoders.sparse.tensor import Triple, find_rows, linear_key
from simipu3d.encoders.voxel_tokens import tokens_at_sites
from simipu3d.ops.voxelize import grid_size, voxelize
from simipu3d.registry import POINT_ENCODERS

STAGE_STRIDE = 8


class VoxelBackboneConfig(PartConfig):
    """The `point_encoder:` block of a voxel backbone."""

    name: str
    sparse_backend: SparseBackend = "auto"
    """Who computes: `spconv`, `torch`, or `auto` (spconv on CUDA where it is installed, else torch)."""
    voxel_size: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.05, 0.05, 0.1)
    """Metres along x, y, z. Default: OpenPCDet's KITTI configuration."""
    point_range: tuple[float, float, float, float, float, float] = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
    """x, y, z of the lowest corner, then of the highest, metres; other points are dropped. Default: as voxel_size."""
    num_tokens: PositiveInt = 1024
    """Most tokens of a scene; more are thinned by farthest point sampling. Default: as SimIPU's PointNet++ has."""
    output_conv: bool = False
    """Build `conv_out` as well, which makes the bird's-eye-view map that detectors read. Tokens do not pass through it,
    so pre-training cannot train it and leaves it out; fine-tuning and whole OpenPCDet networks need it."""
    last_pad: NonNegativeInt = 0
    """Padding of `conv_out` along all axes, OpenPCDet's key of that name and its default. Only with `output_conv`."""

    @model_validator(mode="after")
    def _check(self) -> "VoxelBackboneConfig":
        low, high = self.point_range[:3], self.point_range[3:]
        for axis, start, stop, size in zip("xyz", low, high, self.voxel_size, strict=True):
            cells = (stop - start) / size
            if stop <= start or not isclose(cells, round(cells), abs_tol=1e-3):
                raise ValueError(
                    f"point_range along {axis} must be a whole number of voxels; "
                    f"[{start}, {stop}] holds {cells:.3f} of {size} m"
                )
        if min(self.grid_shape) < STAGE_STRIDE:
            raise ValueError(
                f"the grid is {self.grid_shape} voxels (z, y, x) and shrinks by {STAGE_STRIDE}; widen point_range"
            )
        if self.last_pad and not self.output_conv:
            raise ValueError("last_pad belongs to conv_out; set output_conv: true or leave it out")
        return self

    @property
    def grid_shape(self) -> Triple:
        """Voxels along z, y, x."""
        x, y, z = grid_size(self.voxel_size, self.point_range)
        return z, y, x


class VoxelResBackboneConfig(VoxelBackboneConfig):
    """The `point_encoder:` block of the residual one."""

    use_bias: bool = True
    """Biases in the residual blocks. Default: OpenPCDet's; CenterPoint, PV-RCNN++ and the CBGS models have them,
    TransFusion-L and BEVFusion set USE_BIAS: False. A BatchNorm follows each and takes it out again when training."""


class SparseResidualBlock(SparseModule):
    """Two submanifold convolutions and a way round them."""

    def __init__(self, channels: int, indice_key: str, *, bias: bool, backend: SparseBackend):
        super().__init__()
        self.conv1 = SubMConv3d(channels, channels, indice_key, bias=bias, backend=backend)
        self.bn1 = SiteBatchNorm(channels)
        self.conv2 = SubMConv3d(channels, channels, indice_key, bias=bias, backend=backend)
        self.bn2 = SiteBatchNorm(channels)
        self.relu = nn.ReLU()

    def forward(self, x: SparseTensor) -> SparseTensor:
        inner = self.conv1(x)
        inner = self.conv2(inner.with_features(self.relu(self.bn1(inner.features))))
        return inner.with_features(self.relu(self.bn2(inner.features) + x.features))


def _with_norm(convolution: SparseConvolution) -> SparseSequential:
    return SparseSequential(convolution, SiteBatchNorm(convolution.weight.shape[0]), nn.ReLU())


class _VoxelBackbone(nn.Module):
    """What both backbones share: everything but the blocks of a stage.

    Args:
        config: the `point_encoder:` block.
        point_columns: columns of the points, x, y, z first; their number is the width of the first layer.
        widths: channels of stages 1 to 4.
        blocks: (stage, channels) to the layers of a stage after the strided one; all use the key `subm<stage>`.

    Raises:
        UserError: `sparse_backend: spconv` and spconv is not installed.
    """

    def __init__(
        self,
        config: VoxelBackboneConfig,
        point_columns: Sequence[str],
        widths: tuple[int, int, int, int],
        blocks: Callable[[int, int], list[SparseModule]],
    ):
        super().__init__()
        if tuple(point_columns[:3]) != ("x", "y", "z"):
            raise ValueError(f"point_columns must begin with x, y, z, got {', '.join(point_columns)}")
        self.config = config
        backend = config.sparse_backend
        nz, ny, nx = config.grid_shape
        self.sparse_shape = (nz + 1, ny, nx)
        self.out_channels = widths[3]
        self.conv_input = _with_norm(SubMConv3d(len(point_columns), widths[0], "subm1", backend=backend))
        self.conv1 = SparseSequential(*blocks(1, widths[0]))
        for stage in (2, 3, 4):
            padding = (0, 1, 1) if stage == 4 else (1, 1, 1)
            down = SparseConv3d(*widths[stage - 2 : stage], f"spconv{stage}", padding=padding, backend=backend)
            setattr(self, f"conv{stage}", SparseSequential(_with_norm(down), *blocks(stage, widths[stage - 1])))
        self.conv_out = None
        if config.output_conv:
            options = {"kernel_size": (3, 1, 1), "stride": (2, 1, 1), "padding": (config.last_pad,) * 3}
            self.conv_out = _with_norm(SparseConv3d(widths[3], 128, "spconv_down2", **options, backend=backend))

    def forward(self, view: PointView) -> PointTokens:
        """Tokens of a view: conv4's features at the mean of the raw points that a site owns.

        The rows are ascending by scene, then by the site's (z, y, x), also after thinning. A scene without a point in
        `point_range` gives none.
        """
        voxels, in_range = self.voxelize(view)
        conv4 = self.stages(voxels)[-1]
        point_site = self.owners(view, conv4).masked_fill(~in_range, -1)
        return tokens_at_sites(view, conv4, point_site, self.config.num_tokens)

    def voxelize(self, view: PointView) -> tuple[SparseTensor, Tensor]:
        """The view's voxels with the mean of their points' columns, and which points (N,) lie in `point_range`."""
        config = self.config
        sites, features, point_to_voxel = voxelize(view.points, view.batch_index, config.voxel_size, config.point_range)
        return SparseTensor(features, sites, self.sparse_shape, view.num_frames), point_to_voxel >= 0

    def stages(self, voxels: SparseTensor) -> tuple[SparseTensor, SparseTensor, SparseTensor, SparseTensor]:
        """Outputs of conv1 to conv4 (OpenPCDet's `multi_scale_3d_features`), strides 1, 2, 4, 8."""
        conv1 = self.conv1(self.conv_input(voxels))
        conv2 = self.conv2(conv1)
        conv3 = self.conv3(conv2)
        return conv1, conv2, conv3, self.conv4(conv3)

    def bev_map(self, conv4: SparseTensor) -> Tensor:
        """(B, 128 * D, ny / 8, nx / 8): `conv_out` of the last stage, its heights stacked as channels (channel-major).

        Raises:
            ValueError: built without `output_conv`.
        """
        if self.conv_out is None:
            raise ValueError("this backbone was built without conv_out; set output_conv: true")
        return self.conv_out(conv4).dense().flatten(1, 2)

    def owners(self, view: PointView, conv4: SparseTensor) -> Tensor:
        """(N,) row of the conv4 site whose receptive centre is nearest to a point, -1 where that cell is not active.

        The centres are a grid, so the nearest one is found axis by axis. Of a point inside `point_range` it is always
        active: the strided layers reach 7 voxels from a cell's centre, and the next centre is 8 away.
        """
        stride, centre = self.receptive_grid()
        low, size = (
            view.points.new_tensor(v, dtype=torch.float64)
            for v in (self.config.point_range[:3], self.config.voxel_size)
        )
        position = ((view.points[:, :3].double() - low) / size - 0.5).flip(
            1
        )  # in voxels, z y x, 0 at the centre of voxel 0
        # floor(. + 0.5), not round: halves must go one way everywhere, or a shift by whole cells would change owners.
        cell = torch.floor((position - position.new_tensor(centre)) / position.new_tensor(stride) + 0.5).long()
        last = cell.new_tensor(conv4.spatial_shape) - 1
        cell = torch.minimum(cell.clamp(min=0), last)
        keys = linear_key(conv4.voxel_bzyx, conv4.spatial_shape)
        rows, found = find_rows(keys, linear_key(torch.cat([view.batch_index[:, None], cell], 1), conv4.spatial_shape))
        return rows.masked_fill(~found, -1)

    def receptive_grid(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Distance from one conv4 cell's receptive centre to the next, and the centre of cell 0, in voxels, (z, y, x).

        Output cell o of a layer sits over input index o * stride - padding + (kernel - 1) / 2; the layers are composed.
        """
        stride, centre = [1, 1, 1], [0.0, 0.0, 0.0]
        for stage in (self.conv2, self.conv3, self.conv4):
            geometry = stage[0][0].geometry
            for axis in range(3):
                centre[axis] += stride[axis] * ((geometry.kernel_size[axis] - 1) / 2 - geometry.padding[axis])
                stride[axis] *= geometry.stride[axis]
        return tuple(stride), tuple(centre)


@POINT_ENCODERS.register("voxel_backbone8x", config=VoxelBackboneConfig)
class VoxelBackbone8x(_VoxelBackbone):
    """OpenPCDet's VoxelBackBone8x: 66 tensors, with `output_conv` 72 (711,872 parameters at 4 columns); 64 channels."""

    def __init__(self, config: VoxelBackboneConfig, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        backend = config.sparse_backend

        def blocks(stage: int, channels: int) -> list[SparseModule]:
            count = 1 if stage == 1 else 2
            return [_with_norm(SubMConv3d(channels, channels, f"subm{stage}", backend=backend)) for _ in range(count)]

        super().__init__(config, point_columns, (16, 32, 64, 64), blocks)


@POINT_ENCODERS.register("voxel_res_backbone8x", config=VoxelResBackboneConfig)
class VoxelResBackbone8x(_VoxelBackbone):
    """OpenPCDet's VoxelResBackBone8x: 136 tensors, with `output_conv` 142 (2,694,880 parameters at 4 columns), without
    bias 16 tensors fewer; 128 channels."""

    def __init__(self, config: VoxelResBackboneConfig, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        options = {"bias": config.use_bias, "backend": config.sparse_backend}

        def blocks(stage: int, channels: int) -> list[SparseModule]:
            return [SparseResidualBlock(channels, f"subm{stage}", **options) for _ in range(2)]

        super().__init__(config, point_columns, (16, 32, 64, 128), blocks)
