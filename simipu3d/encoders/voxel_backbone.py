"""What does a voxel network say about a point cloud? OpenPCDet's two sparse backbones as point encoders.

Names and shapes of the state dict are those of OpenPCDet's VoxelBackBone8x (SECOND, doi 10.3390/s18103337) and
VoxelResBackBone8x (there below `backbone_3d.`), weights in spconv 2 layout (out, kz, ky, kx, in). A voxel's input is
the mean of its points' raw columns, absolute x, y, z in metres first. Tokens come from the last 3D stage, conv4, at
stride 8; the bird's-eye-view map of detectors from `conv_out` behind it.

Shapes: N points, V voxels, S sites of conv4, M tokens of B scenes. Cells are (z, y, x); `voxel_size` and `point_range`
are (x, y, z), as OpenPCDet's configurations have them.
"""

from collections.abc import Callable, Sequence

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import PointView
from simipu3d.encoders.sparse import (
    SparseBackend,
    SparseConv3d,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
)
from simipu3d.encoders.sparse.tensor import Triple
from simipu3d.encoders.strided_backbone import PointRange, SparseResidualBlock, StridedBackbone, check_grid, with_norm
from simipu3d.ops.voxelize import grid_size, voxelize
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.branch import InputLayer

OUTPUT_WIDTH = 128
"""Channels of `conv_out`, of either backbone."""


class VoxelBackboneConfig(PartConfig):
    """The `point_encoder:` block of a voxel backbone."""

    name: str
    sparse_backend: SparseBackend = "auto"
    """Who computes: `spconv`, `torch`, or `auto` (spconv on CUDA where it is installed, else torch)."""
    voxel_size: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.05, 0.05, 0.1)
    """Metres along x, y, z. Default: OpenPCDet's KITTI configuration."""
    point_range: PointRange = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
    """x, y, z of the lowest corner, then of the highest, metres; other points are dropped. Default in a run:
    `data.point_range` (of mixed sets, the box round all of theirs); where the data have none, OpenPCDet's KITTI range."""
    num_tokens: PositiveInt = 1024
    """Most tokens of a scene; more are thinned by farthest point sampling. Default: as SimIPU's PointNet++ has."""
    output_conv: bool = False
    """Build `conv_out` as well, which makes the bird's-eye-view map that detectors read (`bev`). Tokens do not pass through
    it, so pre-training cannot train it and leaves it out; heads that read the map, and whole OpenPCDet networks, need it.
    Default: as pre-training needs it."""
    last_pad: NonNegativeInt = 0
    """Padding of `conv_out` along all axes, OpenPCDet's key of that name and its default. Only with `output_conv`."""

    @model_validator(mode="after")
    def _check(self) -> "VoxelBackboneConfig":
        check_grid(self.point_range, self.voxel_size, "voxel")
        if self.last_pad and not self.output_conv:
            raise ValueError("last_pad belongs to conv_out; set output_conv: true or leave it out")
        if self.output_conv and self.map_height < 1:
            raise ValueError(
                f"output_conv: of {self.grid_shape[0]} voxels along z nothing is left behind conv_out; widen point_range "
                "to 24 or more"
            )
        return self

    @property
    def grid_shape(self) -> Triple:
        """Voxels along z, y, x."""
        x, y, z = grid_size(self.voxel_size, self.point_range)
        return z, y, x

    @property
    def map_height(self) -> int:
        """Cells along z behind `conv_out`; the map has that many times its channels."""
        height = self.grid_shape[0] + 1
        for padding in (1, 1, 0, self.last_pad):  # conv2, conv3, conv4, conv_out: kernel 3, stride 2
            height = (height + 2 * padding - 3) // 2 + 1
        return height


class VoxelResBackboneConfig(VoxelBackboneConfig):
    """The `point_encoder:` block of the residual one."""

    use_bias: bool = True
    """Biases in the residual blocks. Default: OpenPCDet's; CenterPoint, PV-RCNN++ and the CBGS models have them,
    TransFusion-L and BEVFusion set USE_BIAS: False. A BatchNorm follows each and takes it out again when training."""


class _VoxelBackbone(StridedBackbone):
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
        nz, ny, nx = config.grid_shape
        super().__init__(point_columns, config.point_range, config.voxel_size, (nz + 1, ny, nx), config.num_tokens)
        self.config = config
        self._columns = tuple(point_columns)
        backend = config.sparse_backend
        self.out_channels = widths[3]
        self.conv_input = with_norm(SubMConv3d(len(point_columns), widths[0], "subm1", backend=backend))
        self.conv1 = SparseSequential(*blocks(1, widths[0]))
        for stage in (2, 3, 4):
            padding = (0, 1, 1) if stage == 4 else (1, 1, 1)
            width_in, width = widths[stage - 2 : stage]
            down = SparseConv3d(width_in, width, f"spconv{stage}", padding=padding, backend=backend)
            setattr(self, f"conv{stage}", SparseSequential(with_norm(down), *blocks(stage, width)))
        if config.output_conv:
            last = SparseConv3d(
                widths[3],
                OUTPUT_WIDTH,
                "spconv_down2",
                kernel_size=(3, 1, 1),
                stride=(2, 1, 1),
                padding=config.last_pad,
                backend=backend,
            )
            self.conv_out = with_norm(last)
            self.bev_channels = OUTPUT_WIDTH * config.map_height

    def input_layers(self) -> dict[str, InputLayer]:
        """Layers that read the points' columns, by the name of their weight; weights from elsewhere are fitted there."""
        return {"conv_input.0.weight": InputLayer(4, self._columns)}

    def voxelize(self, view: PointView) -> tuple[SparseTensor, Tensor]:
        """The view's voxels with the mean of their points' columns, and which points (N,) lie in `point_range`."""
        config = self.config
        sites, features, point_to_voxel = voxelize(view.points, view.batch_index, config.voxel_size, config.point_range)
        return SparseTensor(features, sites, self.sparse_shape, view.num_frames), point_to_voxel >= 0

    def stages(self, voxels: SparseTensor) -> tuple[SparseTensor, SparseTensor, SparseTensor, SparseTensor]:
        """Outputs of conv1 to conv4 (OpenPCDet's `multi_scale_3d_features`), strides 1, 2, 4, 8."""
        return super().stages(self.conv_input(voxels))

    def bev_map(self, conv4: SparseTensor) -> Tensor:
        """(B, 128 * D, ny / 8, nx / 8): `conv_out` of the last stage, its D heights stacked as channels (channel-major).

        Raises:
            ValueError: built without `output_conv`.
        """
        if self.conv_out is None:
            raise ValueError("this backbone was built without conv_out; set output_conv: true")
        return super().bev_map(conv4)


@POINT_ENCODERS.register("voxel_backbone8x", config=VoxelBackboneConfig)
class VoxelBackbone8x(_VoxelBackbone):
    """OpenPCDet's VoxelBackBone8x: 66 tensors, with `output_conv` 72 (711,872 parameters at 4 columns); 64 channels."""

    def __init__(self, config: VoxelBackboneConfig, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        backend = config.sparse_backend

        def blocks(stage: int, channels: int) -> list[SparseModule]:
            count = 1 if stage == 1 else 2
            return [with_norm(SubMConv3d(channels, channels, f"subm{stage}", backend=backend)) for _ in range(count)]

        super().__init__(config, point_columns, (16, 32, 64, 64), blocks)


@POINT_ENCODERS.register("voxel_res_backbone8x", config=VoxelResBackboneConfig)
class VoxelResBackbone8x(_VoxelBackbone):
    """OpenPCDet's VoxelResBackBone8x: 136 tensors, with `output_conv` 142 (2,694,880 parameters at 4 columns), without
    bias 16 tensors fewer; 128 channels."""

    def __init__(self, config: VoxelResBackboneConfig, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        bias, backend = config.use_bias, config.sparse_backend

        def blocks(stage: int, channels: int) -> list[SparseModule]:
            return [SparseResidualBlock(channels, f"subm{stage}", bias=bias, backend=backend) for _ in range(2)]

        super().__init__(config, point_columns, (16, 32, 64, 128), blocks)
