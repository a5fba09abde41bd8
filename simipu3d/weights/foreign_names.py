"""What are our encoders' tensors called elsewhere, and how do sparse weights lie there?

One table serves both ways: export writes the foreign names, `--init` looks for them. A name that has no counterpart is
None. Sparse weights are (out, kz, ky, kx, in) here, the layout of spconv 2. Facts: OpenPCDet, mmdetection3d, Pointcept
and PointContrast, from their checkpoints' names.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

Rename = Callable[[str], "str | None"]

LAYOUTS = {
    "spconv2": (0, 1, 2, 3, 4),
    "spconv1": (1, 2, 3, 4, 0),
}
"""Which of our axes (out, kz, ky, kx, in) stands where: spconv 2.x, and (kz, ky, kx, in, out) of spconv 1.x."""


def to_layout(weight: Tensor, layout: str) -> Tensor:
    """(out, kz, ky, kx, in) in another order of axes."""
    return weight.permute(LAYOUTS[layout]).contiguous()


def from_layout(weight: Tensor, shape: torch.Size) -> Tensor | None:
    """A sparse weight of either layout as (out, kz, ky, kx, in), None where it fits in neither.

    The layouts cannot be mistaken: the number of output channels is never a kernel's size here.
    """
    if weight.shape == shape:
        return weight
    if weight.dim() == 5 and weight.permute(4, 0, 1, 2, 3).shape == shape:
        return weight.permute(4, 0, 1, 2, 3).contiguous()
    return None


def as_it_is(value: Tensor, shape: torch.Size) -> Tensor | None:
    """A tensor whose layout is ours, None where its shape is not."""
    return value if value.shape == shape else None


def same_name(name: str) -> str:
    """OpenPCDet's VoxelBackBone8x, VoxelResBackBone8x, and mmdetection3d's PointNet2SAMSG have our names."""
    return name


def mmdet3d_plain(name: str) -> str:
    """mmdetection3d's SparseEncoder of plain layers."""
    return re.sub(r"^conv(\d)\.", r"encoder_layers.encoder_layer\1.", name)


def mmdet3d_residual(name: str) -> str:
    """mmdetection3d's SparseEncoder of residual blocks: the strided layer ends a stage instead of starting the next."""
    match = re.fullmatch(r"conv(\d)\.(\d)\.(.*)", name)
    if match is None:
        return name
    stage, place, rest = int(match[1]), int(match[2]), match[3]
    if stage > 1:
        stage, place = (stage - 1, 2) if place == 0 else (stage, place - 1)
    return f"encoder_layers.encoder_layer{stage}.{place}.{rest}"


def openpcdet_pointnet(name: str) -> str | None:
    """OpenPCDet's PointNet2MSG: no bias before a BatchNorm, and no layer that mixes the shells."""
    match = re.fullmatch(r"(SA_modules\.\d+\.mlps\.\d+)\.layer(\d+)\.(conv|bn)\.(\w+)", name)
    if match is None or (match[3] == "conv" and match[4] == "bias"):
        return None
    return f"{match[1]}.{3 * int(match[2]) + (match[3] == 'bn')}.{match[4]}"


_BLOCK = {"conv1.weight": "conv1.kernel", "conv2.weight": "conv2.kernel", "shortcut.0.weight": "downsample.0.kernel"}
_BLOCK_NORMS = {"bn1": "norm1.bn", "bn2": "norm2.bn", "shortcut.1": "downsample.1.bn"}


def _split_number(part: str) -> tuple[str, str]:
    """Letters, and the number behind them ("" for none)."""
    match = re.fullmatch(r"([a-z]+)(\d*)", part)
    assert match is not None, part
    return match[1], match[2]


def minkowski(name: str) -> str | None:
    """Res16UNet of MinkowskiEngine's examples, as PointContrast's checkpoints name it."""
    part, _, rest = name.partition(".")
    if part == "final":
        return f"final.{'kernel' if rest == 'weight' else rest}"
    kind, number = _split_number(part)
    if kind in ("enc", "dec"):
        place, _, rest = rest.partition(".")
        block = f"block{int(number) + 4 * (kind == 'dec')}.{place}"
        if rest in _BLOCK:
            return f"{block}.{_BLOCK[rest]}"
        norm, _, tensor = rest.rpartition(".")
        return f"{block}.{_BLOCK_NORMS[norm]}.{tensor}"
    layer, _, tensor = rest.partition(".")
    level = int(number or 0)
    if kind == "up":
        conv, norm = f"convtr{level + 3}p{2 ** (5 - level)}s2", f"bntr{level + 3}"
    else:
        conv = f"conv{level}p{2 ** max(level - 1, 0)}s{1 if kind == 'stem' else 2}"
        norm = f"bn{level}"
    return f"{conv}.kernel" if layer == "0" else f"{norm}.bn.{tensor}"


def pointcept(name: str) -> str | None:
    """Pointcept's SpUNet-v1m1. Its encoder's blocks have no shortcut layer: those names have no counterpart."""
    part, _, rest = name.partition(".")
    if part == "final":
        return name
    kind, number = _split_number(part)
    if kind == "stem":
        return f"conv_input.{rest}"
    index = int(number) - 1 if kind in ("down", "enc") else 4 - int(number)
    if kind in ("down", "up"):
        return f"{kind}.{index}.{rest}"
    place, _, rest = rest.partition(".")
    if rest.startswith("shortcut."):
        return None if kind == "enc" else f"dec.{index}.block{place}.proj.{rest.removeprefix('shortcut.')}"
    return f"{kind}.{index}.block{place}.{rest}"


def to_minkowski(weight: Tensor) -> Tensor:
    """A sparse weight (out, kz, ky, kx, in) as (kx + K ky + K^2 kz, in, out); a linear one (out, in) as (in, out); a bias
    (out,) as (1, out)."""
    if weight.dim() == 5:
        return weight.permute(1, 2, 3, 4, 0).flatten(0, 2).contiguous()
    return weight.T.contiguous() if weight.dim() == 2 else weight[None]


def from_minkowski(weight: Tensor, shape: torch.Size) -> Tensor | None:
    """Undo `to_minkowski` for a tensor of that shape, None where it does not fit."""
    if len(shape) == 5:
        out_channels, *kernel, in_channels = shape
        wanted = (kernel[0] * kernel[1] * kernel[2], in_channels, out_channels)
        if weight.shape != wanted:
            return None
        return weight.unflatten(0, kernel).permute(4, 0, 1, 2, 3).contiguous()
    if len(shape) == 2 and weight.dim() == 2:  # also where in = out: the shape does not tell
        return weight.T.contiguous() if weight.T.shape == shape else None
    if len(shape) == 1 and weight.shape == (1, *shape):
        return weight[0]
    return weight if weight.shape == shape else None


def swin_mmdet(name: str) -> str:
    """mmdetection's name of a tensor of timm's Swin."""
    match = re.fullmatch(r"layers\.(\d)\.(.*)", name)
    if match is None:
        name = name.replace("patch_embed.proj.", "patch_embed.projection.")
        return re.sub(r"^norm\.", "norm3.", name)
    stage, rest = int(match[1]), match[2]
    if rest.startswith("downsample."):
        stage -= 1
    for old, new in (("attn.", "attn.w_msa."), ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1.")):
        rest = re.sub(rf"^(blocks\.\d+\.){re.escape(old)}", rf"\g<1>{new}", rest)
    return f"stages.{stage}.{rest}"


def swin_microsoft(name: str) -> str:
    """Microsoft's: the merging of patches ends a stage."""
    return re.sub(r"^layers\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)


def unfold_order(value: Tensor) -> Tensor:
    """Merged channels (..., column, row, C) of timm in the order (..., C, row, column) of an unfolding."""
    channels = value.shape[-1] // 4
    return value.unflatten(-1, (2, 2, channels)).transpose(-1, -3).flatten(-3)


def from_unfold(value: Tensor, shape: torch.Size) -> Tensor | None:
    """A tensor of merged channels in mmdetection's order as timm's, None where it does not fit."""
    if value.shape != shape or shape[-1] % 4:
        return None
    return value.unflatten(-1, (shape[-1] // 4, 2, 2)).transpose(-1, -3).flatten(-3).contiguous()


def same_axes(value: Tensor, shape: torch.Size) -> Tensor | None:
    """A tensor whose order of axes is ours, whatever its shape; None where it has another number of axes."""
    return value if value.dim() == len(shape) else None


def open_sparse(value: Tensor, shape: torch.Size) -> Tensor | None:
    """A sparse weight of either layout as (out, kz, ky, kx, in), whatever its kernel and `in`; None where `out` fits in
    neither."""
    if value.dim() != 5 or len(shape) != 5:
        return same_axes(value, shape)
    if value.shape[0] == shape[0] and len(set(value.shape[1:4])) == 1:
        return value
    if value.shape[4] == shape[0] and len(set(value.shape[:3])) == 1:
        return value.permute(4, 0, 1, 2, 3).contiguous()
    return None


def open_minkowski(value: Tensor, shape: torch.Size) -> Tensor | None:
    """The same of MinkowskiEngine's (kx + K ky + K^2 kz, in, out)."""
    if value.dim() != 3 or len(shape) != 5 or value.shape[2] != shape[0]:
        return None
    edge = round(value.shape[0] ** (1 / 3))
    if edge**3 != value.shape[0]:
        return None
    return value.unflatten(0, (edge, edge, edge)).permute(4, 0, 1, 2, 3).contiguous()
