"""PointNet++ as OpenPCDet's PointNet2MSG and mmdetection3d's PointNet2SAMSG build it, layer by layer.

Neighbours are found among all pairs, gathered, and put through 2D convolutions as (B, C, centres, neighbours), which is
how both projects read the weights. Shapes: B scenes of N points each, M centres, K neighbours.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One set abstraction layer: shells (inner radius, outer radius, neighbours), the widths of their MLPs, and the
    width of the layer that mixes them (None: side by side)."""

    shells: tuple[tuple[float, float, int], ...]
    mlps: tuple[tuple[int, ...], ...]
    aggregation: int | None


def neighbours(xyz: Tensor, centres: Tensor, shell: tuple[float, float, int]) -> Tensor:
    """(M, K) the first K rows inside the shell, in their order; empty slots repeat the first."""
    inner, outer, count = shell
    square = (centres[:, None] - xyz[None]).square().sum(-1)
    inside = (square == 0) | ((square >= inner**2) & (square < outer**2))
    order = torch.where(inside, torch.arange(len(xyz)), len(xyz)).topk(count, dim=1, largest=False, sorted=True).values
    return torch.where(order < len(xyz), order, order[:, :1])


def _openpcdet_mlp(widths: tuple[int, ...], eps: float = 1e-5) -> nn.Module:
    mlp = nn.Sequential()
    for a, b in pairwise(widths):
        mlp.extend([nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b, eps=eps), nn.ReLU()])
    return mlp


class _ConvModule(nn.Module):
    def __init__(self, conv: nn.Module, bn: nn.Module):
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def _mmdet3d_mlp(widths: tuple[int, ...], eps: float) -> nn.Module:
    mlp = nn.Sequential()
    for j, (a, b) in enumerate(pairwise(widths)):
        mlp.add_module(f"layer{j}", _ConvModule(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b, eps=eps)))
    return mlp


class _SetAbstraction(nn.Module):
    def __init__(self, mlps: list[nn.Module]):
        super().__init__()
        self.mlps = nn.ModuleList(mlps)


class PeerPointNet(nn.Module):
    """The set abstraction layers under a project's names; feature propagation, which is fresh, for its names only.

    Args:
        project: openpcdet or mmdet3d.
        layers: the settings.
        num_features: columns after x, y, z.
        use_xyz: whether the MLPs read the neighbours' offsets, before the features.
        eps: of the MLPs' BatchNorms.
    """

    def __init__(self, project: str, layers: list[Layer], num_features: int, use_xyz: bool, eps: float):
        super().__init__()
        self.layers, self.use_xyz = layers, use_xyz
        build = _openpcdet_mlp if project == "openpcdet" else _mmdet3d_mlp
        self.SA_modules, self.aggregation_mlps = nn.ModuleList(), nn.ModuleList()
        channels = num_features
        skips = [channels]
        for layer in layers:
            mlps = [build((channels + 3 * use_xyz, *widths), eps) for widths in layer.mlps]
            self.SA_modules.append(_SetAbstraction(mlps))
            channels = sum(widths[-1] for widths in layer.mlps)
            mix: nn.Module = nn.Identity()
            if layer.aggregation is not None:
                mix = _ConvModule(nn.Conv1d(channels, layer.aggregation, 1), nn.BatchNorm1d(layer.aggregation))
                channels = layer.aggregation
            self.aggregation_mlps.append(mix)
            skips.append(channels)
        if project == "openpcdet":
            self.FP_modules = nn.ModuleList()
            for level, skip in enumerate(skips[:-1]):  # widths of a decoder are the user's; these are placeholders
                module = nn.Module()
                module.mlp = _openpcdet_mlp((skip + skips[level + 1], skips[level + 1]))
                self.FP_modules.append(module)

    def forward(self, xyz: Tensor, features: Tensor, rows: list[Tensor]) -> list[Tensor]:
        """Features (B, M, C) of every layer.

        Args:
            xyz, features: (B, N, 3) and (B, N, F).
            rows: for every layer the centres' rows (B, M) among the points of the layer before.
        """
        outputs = []
        for layer, module, mix, chosen in zip(self.layers, self.SA_modules, self.aggregation_mlps, rows, strict=True):
            centres = torch.stack([points[index] for points, index in zip(xyz, chosen, strict=True)])
            shells = []
            assert isinstance(module, _SetAbstraction)
            for shell, mlp in zip(layer.shells, module.mlps, strict=True):
                scenes = (self._group(*scene, shell) for scene in zip(xyz, features, centres, strict=True))
                grouped = torch.stack(list(scenes)).permute(0, 3, 1, 2)  # (B, C, M, K)
                shells.append(mlp(grouped).amax(-1))
            features = mix(torch.cat(shells, dim=1)).transpose(1, 2)
            xyz = centres
            outputs.append(features)
        return outputs

    def _group(self, xyz: Tensor, features: Tensor, centres: Tensor, shell: tuple[float, float, int]) -> Tensor:
        """(M, K, 3 + C): offsets from the centre in metres, then features."""
        index = neighbours(xyz, centres, shell)
        grouped = features[index]
        return torch.cat([xyz[index] - centres[:, None], grouped], dim=-1) if self.use_xyz else grouped
