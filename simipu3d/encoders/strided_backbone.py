"""What do the sparse backbones of detectors share? Four stages on a bounded grid, at strides 1, 2, 4, 8, tokens,
and a map seen from above.

Stages 2 to 4 begin with a strided convolution; tokens come from stage 4, conv4, the map from it or from the output
convolution behind it. The grid has D axes: (z, y, x) for voxels, (y, x) for pillars; what is said in metres is (x, y, z)
or (x, y).

Shapes: N points, S sites of conv4, M tokens of B scenes, C channels of a map of Y x X cells.
"""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from math import isclose

import torch
from torch import Tensor, nn

from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import BevMap, PointTokens
from simipu3d.encoders.sparse import (
    SiteBatchNorm,
    SparseBackend,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
)
from simipu3d.encoders.sparse.layers import SparseConvolution, SubMConv
from simipu3d.encoders.sparse.tensor import Cells, find_rows, linear_key
from simipu3d.encoders.voxel_tokens import tokens_at_sites

logger = logging.getLogger(__name__)

STAGE_STRIDE = 8
MOST_OUTSIDE = 0.2
"""Share of dropped points that is worth a warning. Augmentation moves about a twentieth out of the range of the data."""

PointRange = tuple[float, float, float, float, float, float]
"""x, y, z of the lowest corner, then of the highest, metres."""


def check_grid(point_range: PointRange, cell_size: Sequence[float], cell: str) -> None:
    """Raise `ValueError` unless the range holds a whole number of cells along x, y (and z), and at least one of conv4's.

    Args:
        point_range: the key of that name.
        cell_size: metres along x, y or along x, y, z.
        cell: what a cell is called, for the message.
    """
    low, high = point_range[:3], point_range[3:]
    counts: list[int] = []
    for axis, start, stop, size in zip("xyz", low, high, cell_size, strict=False):
        cells = (stop - start) / size
        if stop <= start or not isclose(cells, round(cells), abs_tol=1e-3):
            raise ValueError(
                f"point_range along {axis} must be a whole number of {cell}s; "
                f"[{start}, {stop}] holds {cells:.3f} of {size} m (it is data.point_range where it is not set)"
            )
        counts.insert(0, round(cells))
    if min(counts) < STAGE_STRIDE:
        axes = ", ".join("xyz"[: len(counts)][::-1])
        raise ValueError(
            f"the grid is {tuple(counts)} {cell}s ({axes}) and shrinks by {STAGE_STRIDE}; widen point_range"
        )


class SparseResidualBlock(SparseModule):
    """Two submanifold convolutions and a way round them.

    Args:
        channels: width.
        indice_key: of both convolutions.
        bias: build biases; a BatchNorm follows each convolution and takes its bias out again when training.
        backend: auto, spconv or torch.
        convolution: the class for the grid's number of axes.
    """

    def __init__(
        self,
        channels: int,
        indice_key: str,
        *,
        bias: bool,
        backend: SparseBackend,
        convolution: type[SubMConv] = SubMConv3d,
    ):
        super().__init__()
        self.conv1 = convolution(channels, channels, indice_key, bias=bias, backend=backend)
        self.bn1 = SiteBatchNorm(channels)
        self.conv2 = convolution(channels, channels, indice_key, bias=bias, backend=backend)
        self.bn2 = SiteBatchNorm(channels)
        self.relu = nn.ReLU()

    def forward(self, x: SparseTensor) -> SparseTensor:
        inner = self.conv1(x)
        inner = self.conv2(inner.with_features(self.relu(self.bn1(inner.features))))
        return inner.with_features(self.relu(self.bn2(inner.features) + x.features))


def with_norm(convolution: SparseConvolution) -> SparseSequential:
    """The convolution, BatchNorm and ReLU."""
    return SparseSequential(convolution, SiteBatchNorm(convolution.weight.shape[0]), nn.ReLU())


def _first(layers: nn.Module) -> SparseConvolution:
    """The convolution that `with_norm` put first."""
    convolution = next(layers.children())
    assert isinstance(convolution, SparseConvolution)
    return convolution


class StridedBackbone(nn.Module):
    """The way from a view to tokens, or to a map (`contracts.tokens.BevEncoder`).

    A subclass adds `conv1` to `conv4`, says how points become the first sites, and sets `bev_channels` where it is built
    with all that the map needs.

    Args:
        point_columns: columns of the points, x, y, z first.
        point_range: the grid's corners.
        cell_size: metres along x, y or along x, y, z.
        sparse_shape: cells along z, y, x or y, x.
        num_tokens: most tokens of a scene.
    """

    conv1: SparseSequential
    conv2: SparseSequential
    conv3: SparseSequential
    conv4: SparseSequential
    bev_channels: int

    def __init__(
        self,
        point_columns: Sequence[str],
        point_range: PointRange,
        cell_size: Sequence[float],
        sparse_shape: Cells,
        num_tokens: int,
    ):
        super().__init__()
        if tuple(point_columns[:3]) != ("x", "y", "z"):
            raise ValueError(f"point_columns must begin with x, y, z, got {', '.join(point_columns)}")
        self._low, self._cell_size = point_range[: len(cell_size)], tuple(cell_size)
        self._point_range, self._looked_at_range = point_range, False
        self.sparse_shape = sparse_shape
        self._num_tokens = num_tokens
        self.conv_out: SparseSequential | None = None

    @abstractmethod
    def voxelize(self, view: PointView) -> tuple[SparseTensor, Tensor]:
        """The view's first sites with their features, and which points (N,) lie in `point_range`."""

    def forward(self, view: PointView) -> PointTokens:
        """Tokens of a view: conv4's features at the mean of the raw points that a site owns.

        The rows are ascending by scene, then by the site's (z, y, x), also after thinning. A scene without a point in
        `point_range` gives none.
        """
        conv4, in_range = self._last_stage(view)
        point_site = self.owners(view, conv4).masked_fill(~in_range, -1)
        return tokens_at_sites(view, conv4, point_site, self._num_tokens)

    def bev(self, view: PointView) -> BevMap:
        """The view as a map (B, C, Y, X) over the whole `point_range`; 0 where no site is active, and in empty scenes.

        A cell's centre is the middle of what it sees, as for `owners`: of cell (0, 0) that is the centre of the first voxel
        or pillar, half of its edge (not half a cell of the map) from the corner of the range.

        Raises:
            ValueError: the encoder was built without the layer that makes the map.
        """
        features = self.bev_map(self._last_stage(view)[0])
        (*_, stride_y, stride_x), (*_, centre_y, centre_x) = self.receptive_grid(with_output=True)
        (low_x, low_y), (size_x, size_y) = self._low[:2], self._cell_size[:2]
        origin = (low_x + (centre_x + 0.5) * size_x, low_y + (centre_y + 0.5) * size_y)
        return BevMap(features, origin, (stride_x * size_x, stride_y * size_y))

    def bev_map(self, conv4: SparseTensor) -> Tensor:
        """(B, C, Y, X): the last sites as a dense map, heights stacked as channels (channel-major)."""
        sites = conv4 if self.conv_out is None else self.conv_out(conv4)
        return sites.dense().flatten(1, -3)

    def _last_stage(self, view: PointView) -> tuple[SparseTensor, Tensor]:
        """conv4's sites, and which points (N,) lie in `point_range`."""
        voxels, in_range = self.voxelize(view)
        if self.training and not self._looked_at_range and len(in_range):
            self._looked_at_range = True  # once: the answer has to come back from the device
            self._warn_of_dropped(1 - float(in_range.float().mean()))
        return self.stages(voxels)[-1], in_range

    def _warn_of_dropped(self, share: float) -> None:
        """Warn where `point_range` does not fit the data: the network would learn from the rest and nobody would know."""
        if share > MOST_OUTSIDE:
            logger.warning(
                "%.0f %% of the points of the first batch lie outside point_encoder.point_range %s and are dropped; set it "
                "to what the data reach (data.point_range is its default)",
                100 * share,
                list(self._point_range),
            )

    def stages(self, voxels: SparseTensor) -> tuple[SparseTensor, SparseTensor, SparseTensor, SparseTensor]:
        """Outputs of conv1 to conv4, strides 1, 2, 4, 8."""
        conv1 = self.conv1(voxels)
        conv2 = self.conv2(conv1)
        conv3 = self.conv3(conv2)
        return conv1, conv2, conv3, self.conv4(conv3)

    def owners(self, view: PointView, conv4: SparseTensor) -> Tensor:
        """(N,) row of the conv4 site whose receptive centre is nearest to a point, -1 where that cell is not active.

        The centres are a grid, so the nearest one is found axis by axis. Of a point inside `point_range` it is always
        active: the strided layers reach 7 voxels from a cell's centre, and the next centre is 8 away.
        """
        stride, centre = self.receptive_grid()
        low, size = (view.points.new_tensor(v, dtype=torch.float64) for v in (self._low, self._cell_size))
        # In voxels, z y x, 0 at the centre of voxel 0.
        position = ((view.points[:, : len(size)].double() - low) / size - 0.5).flip(1)
        # floor(. + 0.5), not round: halves must go one way everywhere, or a shift by whole cells would change owners.
        cell = torch.floor((position - position.new_tensor(centre)) / position.new_tensor(stride) + 0.5).long()
        last = cell.new_tensor(conv4.spatial_shape) - 1
        cell = torch.minimum(cell.clamp(min=0), last)
        keys = linear_key(conv4.voxel_bzyx, conv4.spatial_shape)
        rows, found = find_rows(keys, linear_key(torch.cat([view.batch_index[:, None], cell], 1), conv4.spatial_shape))
        return rows.masked_fill(~found, -1)

    def receptive_grid(self, *, with_output: bool = False) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Distance from one conv4 cell's receptive centre to the next, and the centre of cell 0, in voxels, (z, y, x).

        Output cell o of a layer sits over input index o * stride - padding + (kernel - 1) / 2; the layers are composed.
        `with_output` goes on through `conv_out`, where there is one.
        """
        num_axes = len(self._cell_size)
        stride, centre = [1] * num_axes, [0.0] * num_axes
        layers = [_first(stage[0]) for stage in (self.conv2, self.conv3, self.conv4)]
        if with_output and self.conv_out is not None:
            layers.append(_first(self.conv_out))
        for geometry in (layer.geometry for layer in layers):
            for axis in range(num_axes):
                centre[axis] += stride[axis] * ((geometry.kernel_size[axis] - 1) / 2 - geometry.padding[axis])
                stride[axis] *= geometry.stride[axis]
        return tuple(stride), tuple(centre)
