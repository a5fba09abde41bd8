"""How do a point encoder's tensors become a target's: renamed, laid out, and folded so that they compute the same?

Every conversion works on plain copies and says in words what it did. Shapes are those of the encoder's state dict,
sparse weights (out, kz, ky, kx, in).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simipu3d.errors import UserError
from simipu3d.export.image import convert
from simipu3d.export.peers.unet import POINTCEPT_EPS
from simipu3d.weights import foreign_names

NO_COUNTERPART = "OpenPCDet's PointNet2MSG has no counterpart for it; --to mmdet3d has"


@dataclass(frozen=True)
class PointJob:
    """One export of a point encoder: what all steps need to know.

    Attributes:
        out: the final file.
        prefix: what stands before the names.
        encoder: the pre-training side, in eval mode.
        config: its block of the run's configuration.
        name: its registered name.
        columns: names of the points' columns.
        layout: of sparse weights in the file, "" where there are none.
        channels: input columns that the target feeds; as many as `columns` unless the user asked for others.
        intensity_scale: the target's intensity is this many times ours.
        bias: whether the target's residual blocks have biases.
        partial: write what fits where not all of it does.
    """

    out: Path
    prefix: str
    encoder: nn.Module
    config: Any
    name: str
    columns: tuple[str, ...]
    layout: str
    channels: int
    intensity_scale: float = 1.0
    bias: bool = True
    partial: bool = False


@dataclass(frozen=True)
class Converted:
    """Tensors in the target's names and layout.

    Attributes:
        tensors: by name, without the prefix.
        notes: what was changed beside names and layout.
        dropped: the encoder's names that are not in the file.
        fresh: what the names of the target begin with that the file does not hold, on purpose.
        depth: how many leading outputs the target has from the file alone.
    """

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    fresh: tuple[str, ...] = ()
    depth: int | None = None


def _renamed(rename: foreign_names.Rename, name: str) -> str:
    """The target's name of a tensor that it has."""
    foreign = rename(name)
    assert foreign is not None, name
    return foreign


# ----------------------------------------------------------------------------------------------------- input columns


def fit_columns(job: PointJob, weight: Tensor, first: int, notes: list[str], name: str) -> Tensor:
    """A first layer's weight (..., in) for the target's columns.

    Args:
        weight: input channels last, from column `first` of the points on.
        first: which of the points' columns its first channel is.
        notes: gets a line for each change.
        name: of the weight, for the lines.
    """
    if job.intensity_scale != 1:
        weight = weight.clone()
        weight[..., job.columns.index("intensity") - first] /= job.intensity_scale
        notes.append(f"{name}: intensity divided by {job.intensity_scale:g}, the target's is that many times ours")
    missing = job.channels - len(job.columns)
    if missing > 0:
        weight = F.pad(weight, (0, missing))
        notes.append(f"{name}: {missing} further input columns with weight 0")
    elif missing:
        weight = weight[..., :missing].contiguous()
        notes.append(f"{name}: without the input columns {', '.join(job.columns[missing:])}")
    return weight


# ----------------------------------------------------------------------------------------------------- voxel encoders

_BLOCK_CONV = re.compile(r".+\.\d\.conv[12]\.weight")


def _settle_bias(job: PointJob, state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Give the residual blocks the biases that the target has, or fold theirs away."""
    convs = [name.removesuffix(".weight") for name in state if _BLOCK_CONV.fullmatch(name)]
    biased = any(f"{conv}.bias" in state for conv in convs)
    if convs and job.bias and not biased:
        state = state | {f"{conv}.bias": torch.zeros(len(state[f"{conv}.weight"])) for conv in convs}
        notes.append("biases of the residual blocks: zeros, the run had none")
    elif biased and not job.bias:
        for conv in convs:
            state = convert.fold_bias(state, conv, _norm_of(conv))
        notes.append("biases of the residual blocks: into the running means")
    return state


def _norm_of(conv: str) -> str:
    """The BatchNorm behind `...conv1` is `...bn1`."""
    head, _, last = conv.rpartition(".")
    return f"{head}.{last.replace('conv', 'bn')}"


def convert_voxel(job: PointJob, rename: foreign_names.Rename, *, turned: bool = False) -> Converted:
    """A voxel encoder; `turned` puts the kernels' axes in (x, y, z) order."""
    notes: list[str] = []
    state = convert.plain_copy(job.encoder.state_dict())
    first = "conv_input.0.weight"
    state[first] = fit_columns(job, state[first], 0, notes, first)
    state = _settle_bias(job, state, notes)
    tensors = {}
    for name, value in state.items():
        if value.dim() == 5:
            value = value.permute(0, 3, 2, 1, 4) if turned else value
            value = foreign_names.to_layout(value, job.layout)
        tensors[_renamed(rename, name)] = value
    if turned:
        notes.append("kernels: axes (z, y, x) -> (x, y, z)")
    return Converted(tensors, notes, [], () if job.encoder.conv_out is not None else ("conv_out.",))


# -------------------------------------------------------------------------------------------------------- PointNet++


def check_plain_pointnet(job: PointJob) -> None:
    """Refuse what OpenPCDet's PointNet2MSG cannot be configured to do.

    Raises:
        UserError: names the first key that does not fit.
    """
    config = job.config
    wrong = {
        "use_xyz: false": not config.use_xyz,
        "neighbourhood: annulus": config.neighbourhood != "ball"
        and any(len(la.radii) > 1 for la in config.abstractions),
        "layers: aggregation": any(layer.aggregation is not None for layer in config.abstractions),
        "layers: sampler": any(layer.sampler != "d_fps" for layer in config.abstractions),
    }
    for key, found in wrong.items():
        if found:
            raise UserError(f"--to openpcdet: the run has point_encoder.{key}; {NO_COUNTERPART}")


def convert_pointnet(job: PointJob, rename: foreign_names.Rename, eps: float, *, bias: bool) -> Converted:
    """PointNet++; `eps` is that of the target's shared MLPs, `bias` whether their convolutions have one."""
    notes: list[str] = []
    state = convert.plain_copy(job.encoder.state_dict())
    for name in [n for n in state if re.fullmatch(r"SA_modules\.0\.mlps\.\d+\.layer0\.conv\.weight", n)]:
        first = 0 if job.config.use_xyz else 3
        state[name] = fit_columns(job, state[name].flatten(1), first, notes, name)[..., None, None]
    trained = convert.norm_eps(job.encoder)
    wanted = {name: eps if name.startswith("SA_modules.") else 1e-5 for name in trained}
    state = convert.fold_eps(state, trained, wanted, rescale=True)
    moved = sorted({(trained[name], wanted[name]) for name in trained if trained[name] != wanted[name]})
    notes += [f"BatchNorm eps {old:g} -> {new:g} (into running_var)" for old, new in moved]
    if not bias:
        for name in trained:
            state = convert.fold_bias(state, name.removesuffix("bn") + "conv", name)
        notes.append("biases of the convolutions: into the running means")
    return Converted({_renamed(rename, name): value for name, value in state.items()}, notes, [], ("FP_modules.",))


# ------------------------------------------------------------------------------------------------------ sparse U-Nets


def convert_minkowski(job: PointJob) -> Converted:
    """SR-UNet for MinkowskiEngine; BatchNorm's eps is the same."""
    state = convert.plain_copy(job.encoder.state_dict())
    notes: list[str] = []
    state["stem.0.weight"] = _fit_input(job, state["stem.0.weight"], notes)
    tensors = {}
    for name, value in state.items():
        foreign = _renamed(foreign_names.minkowski, name)
        is_weight = value.dim() > 1 or name == "final.bias"
        tensors[foreign] = foreign_names.to_minkowski(value) if is_weight else value
    fresh = () if job.config.output == "full" else ("convtr", "bntr", "block5", "block6", "block7", "block8")
    return Converted(tensors, notes, [], (*fresh, "final.") if fresh else (), 10 if not fresh else 5)


def _fit_input(job: PointJob, weight: Tensor, notes: list[str]) -> Tensor:
    """The stem's input channels padded with zeros or cut to what was asked for."""
    difference = job.channels - weight.shape[-1]
    if difference > 0:
        notes.append(f"stem: {difference} further input channels with weight 0")
        return F.pad(weight, (0, difference))
    if difference:
        notes.append(f"stem: without the last {-difference} input channels")
        return weight[..., :difference].contiguous()
    return weight


def pointcept_depth(job: PointJob) -> tuple[int, str]:
    """How many leading outputs (stem, four stages down) SpUNet computes alike, and what the first misfit is ("" for none)."""
    config = job.config
    before = config.stem_channels
    for level, width in enumerate(config.widths[:4], start=1):
        if width != before:
            return level, (
                f"down.{level - 1}.0.weight is ({width}, 2, 2, 2, {before}) there and ({before}, 2, 2, 2, {before}) in the "
                f"run, and enc.{level - 1}.block0 has no shortcut layer there"
            )
    return 5, ""


def convert_pointcept(job: PointJob) -> Converted:
    """SR-UNet for Pointcept's SpUNet-v1m1, where the encoder keeps its width, or (`partial`) as far as it does.

    Raises:
        UserError: not all of it fits, and a part was not asked for.
    """
    depth, misfit = pointcept_depth(job)
    if misfit and not job.partial:
        raise UserError(
            f"--to pointcept: SpUNet widens in its strided layers, SR-UNet behind them: {misfit}; --partial writes the "
            f"{depth} outputs before that, or train with point_encoder.planes of one width down the encoder"
        )
    notes: list[str] = []
    state = convert.plain_copy(job.encoder.state_dict())
    stem = _fit_input(job, state["stem.0.weight"], notes)
    if job.config.stem_kernel == 3:
        stem = F.pad(stem, (0, 0, 1, 1, 1, 1, 1, 1))
        notes.append("stem: kernel 3 in the middle of SpUNet's 5, zeros round it")
    state["stem.0.weight"] = stem
    trained = convert.norm_eps(job.encoder)
    state = convert.fold_eps(state, trained, dict.fromkeys(trained, POINTCEPT_EPS), rescale=True)
    notes.append(f"BatchNorm eps 1e-05 -> {POINTCEPT_EPS:g} (into running_var, small ones into weight)")
    kept = ("stem.", *(f"{part}{level}." for level in range(1, depth) for part in ("down", "enc")))
    full = depth == 5 and job.config.output == "full"
    tensors, dropped = {}, []
    for name, value in state.items():
        if not (full or name.startswith(kept)):
            dropped.append(name)
            continue
        if value.dim() == 5:  # Pointcept's sites are (x, y, z)
            value = value.permute(0, 3, 2, 1, 4).contiguous()
        elif value.dim() == 2:  # spconv reads a 1x1 weight's buffer as (in, out)
            value = value.T.contiguous().reshape(value.shape[0], 1, 1, 1, value.shape[1])
        tensors[_renamed(foreign_names.pointcept, name)] = value
    notes.append("kernels: axes (z, y, x) -> (x, y, z)")
    fresh = (
        () if full else ("up.", "dec.", "final.", *(f"{p}.{s}." for s in range(depth - 1, 4) for p in ("down", "enc")))
    )
    return Converted(tensors, notes, dropped, fresh, 10 if full else depth)
