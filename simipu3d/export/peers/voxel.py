"""OpenPCDet's and mmdetection3d's sparse encoders, layer by layer.

The layers are the same ones in the same order in every one of them; names, biases, layout and order of axes differ.
OpenPCDet: VoxelBackBone8x, VoxelResBackBone8x, UNetV2; mmdetection3d: SparseEncoder and, with the axes turned round,
BEVFusion's encoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from simipu3d.export.peers.sparse import ONES, PeerConv, PeerTensor, Residual, Triple, Unit, plant

EPS = 1e-3
"""BatchNorm's in all of them."""


@dataclass(frozen=True)
class Style:
    """How a project writes its encoder.

    Attributes:
        residual: residual blocks instead of plain layers.
        layout: of the weights.
        bias: biases in the residual blocks.
        axes: zyx, or xyz (kernels, strides and sites the other way round).
        last_pad: padding of `conv_out`.
    """

    residual: bool
    layout: str
    bias: bool = False
    axes: str = "zyx"
    last_pad: int = 0

    def turn(self, zyx: Triple) -> Triple:
        """A triple in the style's order of axes."""
        return zyx if self.axes == "zyx" else zyx[::-1]

    def unit(
        self,
        kind: str,
        widths: tuple[int, int],
        *,
        kernel: Triple = (3, 3, 3),
        stride: Triple = ONES,
        padding: Triple = ONES,
        key: str = "",
    ) -> Unit:
        """Convolution, BatchNorm, ReLU; the geometry is (z, y, x)."""
        turned = [self.turn(value) for value in (kernel, stride, padding)]
        conv = PeerConv(
            kind, widths, layout=self.layout, kernel=turned[0], stride=turned[1], padding=turned[2], key=key
        )
        return Unit(conv, nn.BatchNorm1d(widths[1], eps=EPS), nn.ReLU())


def layers(style: Style, in_channels: int) -> Iterator[nn.Module]:
    """conv_input, the blocks of stage 1, then strided layer and two blocks of stages 2 to 4, then conv_out."""
    widths = (16, 32, 64, 128 if style.residual else 64)
    yield style.unit("submanifold", (in_channels, 16))
    for stage, width in enumerate(widths, start=1):
        if stage > 1:
            padding = (0, 1, 1) if stage == 4 else (1, 1, 1)
            pair = (widths[stage - 2], width)
            yield style.unit("strided", pair, stride=(2, 2, 2), padding=padding, key=f"spconv{stage}")
        for _ in range(1 if stage == 1 and not style.residual else 2):
            if style.residual:
                yield Residual((width, width), EPS, style.layout, style.bias)
            else:
                yield style.unit("submanifold", (width, width))
    pads = (style.last_pad,) * 3
    yield style.unit("strided", (widths[3], 128), kernel=(3, 1, 1), stride=(2, 1, 1), padding=pads, key="down")


OPENPCDET_PLAIN = [
    "conv_input",
    "conv1.0",
    "conv2.0",
    "conv2.1",
    "conv2.2",
    "conv3.0",
    "conv3.1",
    "conv3.2",
    "conv4.0",
    "conv4.1",
    "conv4.2",
    "conv_out",
]
OPENPCDET_RESIDUAL = [*OPENPCDET_PLAIN[:2], "conv1.1", *OPENPCDET_PLAIN[2:]]
_LAYER = "encoder_layers.encoder_layer"
MMDET3D_PLAIN = [
    "conv_input",
    *(f"{_LAYER}{place}" for place in ["1.0", "2.0", "2.1", "2.2", "3.0", "3.1", "3.2", "4.0", "4.1", "4.2"]),
    "conv_out",
]
MMDET3D_RESIDUAL = [
    "conv_input",
    *(f"{_LAYER}{place}" for place in ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2", "3.0", "3.1", "3.2", "4.0", "4.1"]),
    "conv_out",
]


class PeerEncoder(nn.Module):
    """The layers under a project's names.

    Args:
        names: of the layers, in the order of `layers`.
        style: how they are written.
        in_channels: input columns.
    """

    def __init__(self, names: list[str], style: Style, in_channels: int):
        super().__init__()
        parts = zip(names, layers(style, in_channels), strict=True)
        self.sequence = [(name, plant(self, name, layer)) for name, layer in parts]

    def forward(self, x: PeerTensor, num_layers: int) -> list[PeerTensor]:
        """Output of each of the first layers."""
        outputs = []
        for _, layer in self.sequence[:num_layers]:
            x = layer(x)
            outputs.append(x)
        return outputs


def add_unet_decoder(encoder: PeerEncoder, layout: str) -> PeerEncoder:
    """What OpenPCDet's UNetV2 has beside its encoder; here for its names and shapes, it does not run."""
    style = Style(False, layout)
    for level, width, out in ((4, 64, 64), (3, 64, 32), (2, 32, 16), (1, 16, 16)):
        plant(encoder, f"conv_up_t{level}", Residual((width, width), EPS, layout))
        plant(encoder, f"conv_up_m{level}", style.unit("submanifold", (2 * width, width)))
        if level > 1:
            plant(encoder, f"inv_conv{level}", style.unit("inverse", (width, out), key=f"spconv{level}"))
    plant(encoder, "conv5.0", style.unit("submanifold", (16, 16)))
    return encoder
