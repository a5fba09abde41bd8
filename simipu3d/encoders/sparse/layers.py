"""Layers on a `SparseTensor`. One state dict (weights as spconv 2 has them: out, kz, ky, kx, in), whoever computes.

On grids of two axes a weight is (out, ky, kx, in). Every layer is one piece of code for any number of axes.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simipu3d.encoders.sparse.backends import SparseBackend, check_backend, choose_backend
from simipu3d.encoders.sparse.rulebook import ConvGeometry
from simipu3d.encoders.sparse.tensor import Cells, SparseTensor


class SparseModule(nn.Module):
    """A layer that takes and gives a `SparseTensor`; any other layer in a `SparseSequential` works on the features."""


class SparseConvolution(SparseModule):
    """What the three kinds of convolution share.

    Args:
        in_channels, out_channels: widths.
        geometry: kernel, stride, padding, key.
        bias: add a learned constant a channel.
        backend: auto, spconv or torch.

    Raises:
        UserError: spconv is asked for and not installed.
    """

    def __init__(self, in_channels: int, out_channels: int, geometry: ConvGeometry, bias: bool, backend: SparseBackend):
        super().__init__()
        check_backend(backend)
        self.geometry = geometry
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(out_channels, *geometry.kernel_size, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(fan in), the start of torch's and spconv's convolutions."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: SparseTensor) -> SparseTensor:
        device = x.features.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.weight.dtype
        convolve = choose_backend(self.backend, device)
        x = convolve(x.with_features(x.features.to(dtype)), self.weight.to(dtype), self.geometry)
        # Not by the backend: spconv refuses a bias on a CPU in eval mode.
        return x if self.bias is None else x.with_features(x.features + self.bias.to(dtype))

    def extra_repr(self) -> str:
        g = self.geometry
        channels = f"{self.weight.shape[-1]}, {self.weight.shape[0]}"
        return f"{channels}, kernel_size={g.kernel_size}, stride={g.stride}, padding={g.padding}, key={g.indice_key}"


def _per_axis(number: int | Cells, num_axes: int) -> Cells:
    """One number for all axes, or one each."""
    if isinstance(number, int):
        return (number,) * num_axes
    if len(number) != num_axes:
        raise ValueError(f"a layer of {num_axes} axes takes {num_axes} numbers, or one for all, got {number}")
    return tuple(number)


class SubMConv(SparseConvolution):
    """Submanifold convolution: the sites stay what they are (arXiv:1711.10275). The kernel is odd and centred."""

    num_axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        indice_key: str,
        *,
        kernel_size: int | Cells = 3,
        bias: bool = False,
        backend: SparseBackend = "auto",
    ):
        kernel = _per_axis(kernel_size, self.num_axes)
        padding = tuple(size // 2 for size in kernel)
        geometry = ConvGeometry("submanifold", kernel, _per_axis(1, self.num_axes), padding, indice_key)
        super().__init__(in_channels, out_channels, geometry, bias, backend)


class SparseConv(SparseConvolution):
    """Convolution whose output is active wherever its kernel reaches an active site."""

    num_axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        indice_key: str,
        *,
        kernel_size: int | Cells = 3,
        stride: int | Cells = 2,
        padding: int | Cells = 1,
        bias: bool = False,
        backend: SparseBackend = "auto",
    ):
        kernel, stride, padding = (_per_axis(number, self.num_axes) for number in (kernel_size, stride, padding))
        geometry = ConvGeometry("strided", kernel, stride, padding, indice_key)
        super().__init__(in_channels, out_channels, geometry, bias, backend)


class SparseInverseConv(SparseConvolution):
    """Transposed convolution back onto the very sites that the strided one with the same key came from."""

    num_axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        indice_key: str,
        *,
        kernel_size: int | Cells = 3,
        bias: bool = False,
        backend: SparseBackend = "auto",
    ):
        kernel, one, zero = (_per_axis(number, self.num_axes) for number in (kernel_size, 1, 0))
        super().__init__(
            in_channels, out_channels, ConvGeometry("inverse", kernel, one, zero, indice_key), bias, backend
        )


class SubMConv2d(SubMConv):
    """`SubMConv` on grids (y, x)."""

    num_axes = 2


class SubMConv3d(SubMConv):
    """`SubMConv` on grids (z, y, x)."""

    num_axes = 3


class SparseConv2d(SparseConv):
    """`SparseConv` on grids (y, x)."""

    num_axes = 2


class SparseConv3d(SparseConv):
    """`SparseConv` on grids (z, y, x)."""

    num_axes = 3


class SparseInverseConv2d(SparseInverseConv):
    """`SparseInverseConv` on grids (y, x)."""

    num_axes = 2


class SparseInverseConv3d(SparseInverseConv):
    """`SparseInverseConv` on grids (z, y, x)."""

    num_axes = 3


class SparseSequential(nn.Sequential, SparseModule):
    """Layers in a row; those that are not sparse (BatchNorm, ReLU, Linear) work on the features."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        for layer in self:
            x = layer(x) if isinstance(layer, SparseModule) else x.with_features(layer(x.features))
        return x


class SiteBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the active sites of the batch; the defaults are those of OpenPCDet's sparse backbones.

    A nearly empty scene may leave one site or none in a deep level, which has no variance: BatchNorm would raise, or
    fill its running statistics with NaN. With fewer than two sites the running statistics are used and left alone.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-3, momentum: float = 0.01):
        super().__init__(num_features, eps=eps, momentum=momentum)

    def forward(self, features: Tensor) -> Tensor:
        if self.training and len(features) < 2:
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(features, mean, variance, self.weight, self.bias, training=False, eps=self.eps)
        return super().forward(features)
