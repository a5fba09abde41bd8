"""What is the largest, or the mean, of the active sites in a window, or in a whole grid?

Cells that are not active take no part (a dense pooling would count them as zero, or as minus infinity). There is nothing
to multiply, so both backends share this code and its rulebooks. spconv's own layers are no substitute: without a GPU its
maximum (2.3.8) starts from 0, so that negative values are lost, and its global mean hands out the first channel alone.
Shapes: V sites, C channels, B grids.
"""

from typing import Literal

from torch import Tensor, cat, nn

from simipu3d.encoders.sparse.layers import SparseModule
from simipu3d.encoders.sparse.rulebook import ConvGeometry, torch_rulebook
from simipu3d.encoders.sparse.tensor import Cells, SparseTensor
from simipu3d.encoders.sparse.torch_backend import NAME
from simipu3d.ops.scatter import scatter_reduce


class SparseMaxPool(SparseModule):
    """The largest value of the active sites that a window covers, a channel; its gradient goes to the first that has it.

    Args:
        indice_key: names the rulebook; a strided convolution with the same window shares it.
        kernel_size, stride, padding: a number for each axis of the grid; no stride is that of the window itself.
    """

    def __init__(
        self,
        indice_key: str,
        *,
        kernel_size: Cells = (2, 2, 2),
        stride: Cells | None = None,
        padding: Cells | None = None,
    ):
        super().__init__()
        padding = (0,) * len(kernel_size) if padding is None else padding
        self.geometry = ConvGeometry("strided", kernel_size, stride or kernel_size, padding, indice_key)

    def forward(self, x: SparseTensor) -> SparseTensor:
        book = torch_rulebook(x, self.geometry, NAME)
        source, target = (cat(rows) for rows in zip(*book.pairs, strict=True))
        features = scatter_reduce(x.features.index_select(0, source), target, len(book.target_bzyx), "max")
        return SparseTensor(features, book.target_bzyx, book.target_shape, x.batch_size, x.rulebooks)


class SparseGlobalPool(nn.Module):
    """(B, C): the largest value, or the mean, of all active sites of a grid; 0 for a grid without any."""

    def __init__(self, reduce: Literal["max", "mean"]):
        super().__init__()
        self.reduce = reduce

    def forward(self, x: SparseTensor) -> Tensor:
        return scatter_reduce(x.features, x.voxel_bzyx[:, 0], x.batch_size, self.reduce)
