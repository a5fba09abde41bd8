"""mmdetection's SwinTransformer, which OpenPCDet's BEVFusion has too, with its names.

Blocks with odd numbers always shift their windows, also where one window covers the map; patches are merged by an
unfolding whose channels run slowest. Shapes: I images, (I, H, W, C) inside.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -100.0


def microsoft_to_mmdet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What OpenPCDet and mmdetection do to Microsoft's names (CONVERT_WEIGHTS: True, convert_weights=True)."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("layers"):
            if "attn." in name:
                name = name.replace("attn.", "attn.w_msa.")
            elif "mlp.fc1." in name:
                name = name.replace("mlp.fc1.", "ffn.layers.0.0.")
            elif "mlp.fc2." in name:
                name = name.replace("mlp.fc2.", "ffn.layers.1.")
            elif "downsample" in name:
                # its four groups are (top left, bottom left, top right, bottom right), an unfolding's go along the rows
                groups = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
                value = groups.transpose(-1, -2).flatten(-2)
            name = name.replace("layers", "stages", 1)
        elif name.startswith("patch_embed"):
            name = name.replace("proj", "projection")
        renamed[name] = value
    return renamed


class _Attention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        rows = torch.arange(window)
        steps = rows[:, None] - rows[None] + window - 1  # of query minus key
        index = steps[:, None, :, None] * (2 * window - 1) + steps[None, :, None, :]
        self.register_buffer("relative_position_index", index.reshape(window**2, window**2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(I * windows, window^2, C)."""
        num, area, width = x.shape
        q, k, v = self.qkv(x).view(num, area, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-1, -2)
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.view(-1, len(mask), *scores.shape[1:]) + mask[:, None]).flatten(0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(num, area, width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: bool, ratio: float):
        super().__init__()
        self.window, self.shift = window, window // 2 if shift else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"w_msa": _Attention(width, heads, window)})
        hidden = int(width * ratio)
        layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.GELU()), nn.Linear(hidden, width))
        self.ffn = nn.ModuleDict({"layers": layers})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.ffn["layers"](self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        images, height, width, channels = x.shape
        w, s = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        rows, columns = x.shape[1:3]
        mask = None
        if s:
            x = x.roll((-s, -s), (1, 2))
            regions = [
                torch.bucketize(torch.arange(n), torch.tensor([n - w, n - s]), right=True) for n in (rows, columns)
            ]
            part = self._windows((regions[0][:, None] * 3 + regions[1])[None, ..., None])[..., 0]
            mask = (part[:, None] != part[:, :, None]).float() * MASKED
        windows = self.attn["w_msa"](self._windows(x), mask)
        x = windows.view(images, rows // w, columns // w, w, w, channels).transpose(2, 3)
        x = x.reshape(images, rows, columns, channels)
        return (x.roll((s, s), (1, 2)) if s else x)[:, :height, :width]

    def _windows(self, x: Tensor) -> Tensor:
        w = self.window
        images, rows, columns, channels = x.shape
        return x.view(images, rows // w, w, columns // w, w, channels).transpose(2, 3).reshape(-1, w * w, channels)


class _Merging(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        height, width = x.shape[2:]
        x = F.pad(x, (0, width % 2, 0, height % 2))
        merged = F.unfold(x, 2, stride=2).transpose(1, 2)
        merged = merged.view(len(x), x.shape[2] // 2, x.shape[3] // 2, -1)
        return self.reduction(self.norm(merged))


class _Stage(nn.Module):
    """Blocks, and (not in the last stage) the merging of patches behind them."""

    downsample: _Merging

    def __init__(self, blocks: Iterable[_Block], merging: _Merging | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        if merging is not None:
            self.downsample = merging


class PeerSwin(nn.Module):
    """The backbone with its output norms.

    Args:
        width: channels of the first stage.
        depths, heads: of the four stages.
        window: edge of a window, cells.
        ratio: width of the MLPs by that of their block.
    """

    def __init__(self, width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, ratio: float):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"projection": nn.Conv2d(3, width, 4, 4), "norm": nn.LayerNorm(width)})
        self.stages = nn.ModuleList()
        for number, (depth, head) in enumerate(zip(depths, heads, strict=True)):
            blocks = [_Block(width, head, window, bool(i % 2), ratio) for i in range(depth)]
            self.stages.append(_Stage(blocks, _Merging(width) if number < len(depths) - 1 else None))
            self.add_module(f"norm{number}", nn.LayerNorm(width))
            width *= 2

    def forward(self, images: Tensor, num_levels: int) -> list[Tensor]:
        """(I, C, H, W) maps of the first stages, before their output norms, except the last stage's."""
        x = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
        x = self.patch_embed["norm"](self.patch_embed["projection"](x).permute(0, 2, 3, 1))
        maps = []
        for number, stage in enumerate(self.stages[:num_levels]):
            assert isinstance(stage, _Stage)
            x = stage.blocks(x)
            last = number == len(self.stages) - 1
            maps.append((getattr(self, f"norm{number}")(x) if last else x).permute(0, 3, 1, 2))
            x = x if last else stage.downsample(x) if number + 1 < num_levels else x
        return maps
