"""What does PointNet++ say about a point? Set abstraction at several radii, as SimIPU configures it.

A layer takes some of its points as centres, looks round each one in several shells, runs a small shared MLP over every
neighbour, keeps the maximum, and mixes the shells (PointNet++, arXiv:1706.02413; shells, F-FPS and FS from 3DSSD,
arXiv:2002.10187). The tokens are the centres of the last layer.

The MLPs are 1x1 convolutions in their parameters, so that a released checkpoint fits, and matrix products over rows in
their computation. The part of the first one that reads the previous features runs before the neighbours are gathered: a
point has many neighbours but only one product with the weights. Shapes: N points, M centres, K neighbours, B scenes,
concatenated.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import PointTokens
from simipu3d.encoders.row_norm import norm_relu
from simipu3d.errors import UserError
from simipu3d.ops.backend import batch_index_from_offsets, offsets_from_batch_index
from simipu3d.ops.ball_query import Neighbours, Shell, query_shells
from simipu3d.ops.farthest_point import farthest_point_sample, fused_sample, sampled_offsets, split_sample
from simipu3d.ops.scatter import scatter_reduce
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.branch import InputLayer


class SetAbstractionConfig(PartConfig):
    """One entry of `point_encoder.layers`."""

    sampler: Literal["d_fps", "f_fps", "fs", "split"]
    """How centres are chosen. d_fps: farthest in metres; f_fps: farthest in metres and features; fs: both, one after
    the other; split: f_fps among the first `ffps_range` rows of a scene, d_fps among the others."""
    num_points: PositiveInt
    """Centres a sampler takes in each scene; fs and split have two samplers and take twice as many."""
    radii: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Outer radius of every shell, metres, rising."""
    num_samples: tuple[PositiveInt, ...]
    """Neighbours a shell takes at most."""
    mlps: tuple[tuple[PositiveInt, ...], ...]
    """Output widths of each shell's shared MLP."""
    aggregation: PositiveInt | None
    """Width of the layer that mixes the shells; null hands on the shells' features side by side."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> "SetAbstractionConfig":
        lengths = len(self.radii), len(self.num_samples), len(self.mlps)
        if len(set(lengths)) > 1:
            raise ValueError(
                "radii, num_samples and mlps have one entry a shell each; they have {}, {} and {}".format(*lengths)
            )
        if any(inner >= outer for inner, outer in pairwise(self.radii)):
            raise ValueError(f"radii must rise, they are {list(self.radii)}")
        if not all(self.mlps):
            raise ValueError("every entry of mlps needs at least one width")
        return self

    @property
    def out_channels(self) -> int:
        """Width of the features the layer returns."""
        return self.aggregation or sum(widths[-1] for widths in self.mlps)


RELEASED_LAYERS = (
    SetAbstractionConfig(
        sampler="d_fps",
        num_points=4096,
        radii=(0.2, 0.4, 0.8),
        num_samples=(32, 32, 64),
        mlps=((32, 32, 64), (32, 32, 64), (64, 64, 128)),
        aggregation=128,
    ),
    SetAbstractionConfig(
        sampler="fs",
        num_points=1024,
        radii=(0.4, 0.8, 1.6),
        num_samples=(32, 32, 64),
        mlps=((64, 64, 128), (64, 64, 128), (128, 128, 256)),
        aggregation=256,
    ),
    SetAbstractionConfig(
        sampler="split",
        num_points=512,
        radii=(1.6, 3.2, 4.8),
        num_samples=(16, 16, 16),
        mlps=((128, 128, 256), (128, 128, 256), (256, 256, 512)),
        aggregation=1024,
    ),
)
"""The network of the released SimIPU configuration: 16384 points -> 4096 -> 2048 -> 1024 tokens of 1024 channels."""

LIGHT_LAYERS = (
    SetAbstractionConfig(
        sampler="d_fps",
        num_points=2048,
        radii=(0.4, 0.8),
        num_samples=(16, 32),
        mlps=((16, 16, 32), (32, 32, 64)),
        aggregation=64,
    ),
    SetAbstractionConfig(
        sampler="d_fps",
        num_points=1024,
        radii=(0.8, 1.6),
        num_samples=(16, 32),
        mlps=((32, 32, 64), (64, 64, 128)),
        aggregation=128,
    ),
    SetAbstractionConfig(
        sampler="d_fps",
        num_points=1024,
        radii=(1.6, 4.8),
        num_samples=(16, 16),
        mlps=((64, 64, 128), (128, 128, 256)),
        aggregation=256,
    ),
)
"""A network of our own for small machines, the released one's reach with a seventh of its parameters: 16384 points -> 2048 ->
1024 -> 1024 tokens of 256 channels."""

_SIZES = {"released": RELEASED_LAYERS, "light": LIGHT_LAYERS}


class PointNet2Config(PartConfig):
    """The `point_encoder:` block of `pointnet2_msg`. Defaults: the released SimIPU network, its two slips mended."""

    name: str = "pointnet2_msg"
    """Chooses this encoder."""
    use_xyz: bool = True
    """Feed each neighbour's offset from its centre, metres, to the MLPs. The released network does not (false)."""
    ffps_range: PositiveInt = 1024
    """First rows of a scene that a `split` sampler gives to F-FPS. 1024 is the F-FPS half of the layer before; the
    released 512 cuts that half in two."""
    neighbourhood: Literal["annulus", "ball"] = "annulus"
    """A shell reaches from the radius before it to its own (released, 3DSSD's dilated groups), or from the centre
    (PointNet++)."""
    size: Literal["released", "light"] = "released"
    """Which layers: SimIPU's, or (`light`) our own with a seventh of the parameters. Default: released."""
    layers: tuple[SetAbstractionConfig, ...] | None = Field(default=None, min_length=1)
    """The set abstraction layers, in order, in place of the size's."""
    bn_eps: PositiveFloat = 1e-3
    """BatchNorm epsilon in the shells' MLPs. Default: released."""
    aggregation_bn_eps: PositiveFloat = 1e-5
    """BatchNorm epsilon in the layers that mix the shells. Default: released."""
    bn_momentum: float = Field(default=0.1, gt=0, le=1)
    """Share of a new batch in all BatchNorms' running statistics. Default: released."""

    @model_validator(mode="after")
    def _check(self) -> "PointNet2Config":
        if self.layers is not None and self.size != "released":
            raise ValueError(
                f"size: {self.size} and layers (perhaps a base file's) exclude each other; set layers: null, or leave size "
                "out"
            )
        return self

    @property
    def abstractions(self) -> tuple[SetAbstractionConfig, ...]:
        """The layers that are built."""
        return self.layers or _SIZES[self.size]


class ConvNormReLU(nn.Module):
    """1x1 convolution with bias, BatchNorm and ReLU over rows (R, C); named and shaped as in the released file.

    A row may stand for several equal ones, see `row_norm`. Statistics are of the process's own rows, as released.
    Weights start after He et al. (arXiv:1502.01852, fan out), biases at 0.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, bn: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        assert conv.bias is not None
        self.conv, self.bn = conv, bn
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)

    def forward(self, rows: Tensor, copies: Tensor | None = None) -> Tensor:
        return norm_relu(F.linear(rows, self.conv.weight.flatten(1), self.conv.bias), self.bn, copies)


def _stages(mlp: nn.Module) -> list[ConvNormReLU]:
    """The layers of a shell's shared MLP."""
    return [stage for stage in mlp.children() if isinstance(stage, ConvNormReLU)]


class SetAbstraction(nn.Module):
    """One layer: choose centres, gather shells, shared MLPs, maximum; the mixing of the shells stands beside it."""

    def __init__(self, layer: SetAbstractionConfig, config: PointNet2Config, in_channels: int):
        super().__init__()
        self.sampler, self.num_points = layer.sampler, layer.num_points
        self.ffps_range, self.use_xyz = config.ffps_range, config.use_xyz
        inner = (0.0, *layer.radii[:-1]) if config.neighbourhood == "annulus" else (0.0,) * len(layer.radii)
        self.shells = [Shell(*shell) for shell in zip(inner, layer.radii, layer.num_samples, strict=True)]
        self.mlps = nn.ModuleList()
        for widths in layer.mlps:
            sizes = (in_channels + 3 * config.use_xyz, *widths)
            stages = (
                ConvNormReLU(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b, eps=config.bn_eps, momentum=config.bn_momentum))
                for a, b in pairwise(sizes)
            )
            self.mlps.append(nn.Sequential(OrderedDict((f"layer{j}", stage) for j, stage in enumerate(stages))))

    def choose(self, xyz: Tensor, features: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (M,) of the centres, grouped by scene, and their offsets (B + 1,). No gradient."""
        if self.sampler == "fs":
            return fused_sample(xyz, features, offsets, self.num_points)
        if self.sampler == "split":
            return split_sample(xyz, features, offsets, self.num_points, self.ffps_range)
        places = xyz if self.sampler == "d_fps" else torch.cat([xyz, features.detach().to(xyz.dtype)], dim=1)
        return farthest_point_sample(places, offsets, self.num_points), sampled_offsets(offsets, self.num_points)

    def forward(self, xyz: Tensor, features: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From (N, 3), (N, C) and offsets to the centres' rows (M,), offsets and features (M, C') of all shells."""
        rows, centre_offsets = self.choose(xyz, features, offsets)
        centres = xyz.index_select(0, rows)
        shells = query_shells(xyz, offsets, centres, centre_offsets, self.shells)
        pooled = [self._shell(mlp, shell, xyz, features, centres) for mlp, shell in zip(self.mlps, shells, strict=True)]
        return rows, centre_offsets, torch.cat(pooled, dim=1)

    def _shell(self, mlp: nn.Module, shell: Neighbours, xyz: Tensor, features: Tensor, centres: Tensor) -> Tensor:
        """Features (M, C') of one shell. Slots that repeat the first neighbour are computed once, and counted."""
        num_slots = shell.index.shape[1]
        different = torch.arange(num_slots, device=xyz.device) < shell.count[:, None]
        neighbour = shell.index[different]
        centre = torch.arange(len(centres), device=xyz.device).repeat_interleave(shell.count)
        copies = torch.ones_like(shell.index)
        copies[:, 0] += num_slots - shell.count
        copies = copies[different]
        first, *others = _stages(mlp)
        weight = first.conv.weight.flatten(1)
        hidden = F.linear(features, weight[:, 3 * self.use_xyz :], first.conv.bias).index_select(0, neighbour)
        if self.use_xyz:
            offset = xyz.index_select(0, neighbour) - centres.index_select(0, centre)
            hidden = hidden + F.linear(offset, weight[:, :3])
        hidden = norm_relu(hidden, first.bn, copies)
        for stage in others:
            hidden = stage(hidden, copies)
        backend = "numba" if hidden.device.type == "cpu" else "torch"
        return scatter_reduce(hidden, centre, len(centres), "max", backend=backend)


@POINT_ENCODERS.register("pointnet2_msg", config=PointNet2Config)
class PointNet2MSG(nn.Module):
    """PointNet++ with several shells a layer. Contract: `contracts.tokens.PointEncoder`.

    The columns after x, y, z are the input features. Tokens come in the order the last sampler took them. A sampler
    takes all rows of a scene that has fewer than it wants: such a scene gives fewer tokens, and an empty one none. With
    the released settings and one feature column there are 1,778,432 parameters.

    Args:
        config: the validated block.
        point_columns: names of the columns of the points, x, y, z first.

    Raises:
        UserError: the columns do not begin with x, y, z, or leave the first layer without any input.
    """

    def __init__(self, config: PointNet2Config, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        super().__init__()
        if tuple(point_columns[:3]) != ("x", "y", "z"):
            raise UserError(
                f"{config.name}: points must begin with the columns x, y, z, they are {', '.join(point_columns)}"
            )
        if len(point_columns) == 3 and not config.use_xyz:
            raise UserError(
                "point_encoder.use_xyz: points without any column after x, y, z leave no input; set it to true"
            )
        self._columns = tuple(point_columns)
        self.num_columns = len(point_columns)
        self.SA_modules = nn.ModuleList()
        self.aggregation_mlps = nn.ModuleList()
        channels = len(point_columns) - 3
        for layer in config.abstractions:
            self.SA_modules.append(SetAbstraction(layer, config, channels))
            self.aggregation_mlps.append(_aggregation(layer, config))
            channels = layer.out_channels
        self.out_channels = channels

    def input_layers(self) -> dict[str, InputLayer]:
        """Layers that read offsets or columns, by the name of their weight; weights from elsewhere are fitted there."""
        found = {}
        for level, layer in enumerate(self.SA_modules):
            assert isinstance(layer, SetAbstraction)
            for shell, mlp in enumerate(layer.mlps):
                features = _stages(mlp)[0].conv.in_channels - 3 * layer.use_xyz
                columns, others = ((), features) if level else (self._columns[3:], 0)
                name = f"SA_modules.{level}.mlps.{shell}.layer0.conv.weight"
                found[name] = InputLayer(1, columns, others, layer.use_xyz)
        return found

    def forward(self, view: PointView) -> PointTokens:
        if view.points.shape[1] != self.num_columns:
            raise ValueError(
                f"the encoder was built for {self.num_columns} columns, the points have {view.points.shape[1]}"
            )
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        xyz, features = view.points.to(dtype).tensor_split([3], dim=1)
        offsets = offsets_from_batch_index(view.batch_index, view.num_frames).cpu()
        source_index = view.source_index
        for abstraction, aggregation in zip(self.SA_modules, self.aggregation_mlps, strict=True):
            rows, offsets, features = abstraction(xyz, features, offsets)
            features = aggregation(features)
            xyz, source_index = xyz.index_select(0, rows), source_index.index_select(0, rows)
        return PointTokens(xyz, features, batch_index_from_offsets(offsets).to(xyz.device), source_index)


class PointNet2SSGConfig(PartConfig):
    """The `point_encoder:` block of `pointnet2_ssg`. The four lists have one entry a layer."""

    name: str = "pointnet2_ssg"
    """Chooses this encoder."""
    use_xyz: bool = True
    """Feed each neighbour's offset from its centre, metres, to the MLPs. Default: PointNet++'s."""
    num_points: tuple[PositiveInt, ...] = Field(default=(4096, 2048, 1024), min_length=1)
    """Centres of every scene, taken farthest first; those of the last layer are the tokens. Default: as many as the
    layers of `pointnet2_msg` take."""
    radii: tuple[PositiveFloat, ...] = (0.8, 1.6, 4.8)
    """Radius of the ball round a centre, metres. Default: the widest of each layer of `pointnet2_msg`."""
    num_samples: tuple[PositiveInt, ...] = (32, 32, 32)
    """Neighbours taken at most. Default: as the authors' code has it for scenes."""
    mlps: tuple[tuple[PositiveInt, ...], ...] = ((64, 64, 128), (128, 128, 256), (256, 512, 1024))
    """Output widths of the shared MLP. Default: PointNet++'s SSG network (arXiv:1706.02413, appendix B)."""
    bn_eps: PositiveFloat = 1e-5
    """BatchNorm epsilon. Default: torch's, which OpenPCDet and mmdetection3d keep."""
    bn_momentum: float = Field(default=0.1, gt=0, le=1)
    """Share of a new batch in the running statistics. Default: torch's."""

    @model_validator(mode="after")
    def _check(self) -> "PointNet2SSGConfig":
        lists = {"num_points": self.num_points, "radii": self.radii, "num_samples": self.num_samples, "mlps": self.mlps}
        lengths = {key: len(values) for key, values in lists.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise ValueError(f"num_points, radii, num_samples and mlps have one entry a layer each; they have {found}")
        if not all(self.mlps):
            raise ValueError("every entry of mlps needs at least one width")
        return self

    def as_msg(self) -> PointNet2Config:
        """The same network as one with several shells a layer, of which it has one."""
        layers = tuple(
            SetAbstractionConfig(
                sampler="d_fps", num_points=num, radii=(radius,), num_samples=(samples,), mlps=(mlp,), aggregation=None
            )
            for num, radius, samples, mlp in zip(self.num_points, self.radii, self.num_samples, self.mlps, strict=True)
        )
        return PointNet2Config(
            name=self.name,
            use_xyz=self.use_xyz,
            neighbourhood="ball",
            layers=layers,
            bn_eps=self.bn_eps,
            bn_momentum=self.bn_momentum,
        )


@POINT_ENCODERS.register("pointnet2_ssg", config=PointNet2SSGConfig)
class PointNet2SSG(PointNet2MSG):
    """PointNet++ with one ball a layer (arXiv:1706.02413). Names in the state dict as of `pointnet2_msg`, which are
    mmdetection3d's; everything else as there."""

    def __init__(self, config: PointNet2SSGConfig, point_columns: Sequence[str] = ("x", "y", "z", "intensity")):
        super().__init__(config.as_msg(), point_columns)


def _aggregation(layer: SetAbstractionConfig, config: PointNet2Config) -> nn.Module:
    if layer.aggregation is None:
        return nn.Identity()
    norm = nn.BatchNorm1d(layer.aggregation, eps=config.aggregation_bn_eps, momentum=config.bn_momentum)
    return ConvNormReLU(nn.Conv1d(sum(widths[-1] for widths in layer.mlps), layer.aggregation, 1), norm)
