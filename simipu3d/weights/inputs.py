"""How does a first layer that was trained on other columns, another kernel or another picture size fit here?

Exactly, or not at all: a random first layer under trained ones is worth nothing. A column that the file does not know gets
weight 0, one that this run does not have is cut off, a smaller kernel is put into the middle of a larger one, a larger one
is cut only where its rim is 0. Position tables are interpolated as timm does it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simipu3d.compat import import_timm
from simipu3d.errors import UserError
from simipu3d.weights.branch import InputLayer, WeightBranch
from simipu3d.weights.namings import Match

_COMMON = ("x", "y", "z", "intensity")
"""What the first columns are in every project; further ones differ (time, elongation, ring)."""


def fit_inputs(
    branch: WeightBranch, match: Match, given: dict[str, Tensor], columns: Sequence[str] | None, what: str
) -> list[str]:
    """Fit what has another shape in the file, in `match`.

    Args:
        branch: the encoder.
        match: what the file holds of it; tensors are added, and what is `wrong` is shortened.
        given: the file's tensors of `match.wrong` and of the layers that read the columns, by our names.
        columns: of the points that the file was trained on, where it says so.
        what: the file and the branch, for errors.

    Returns:
        What was done, in words.

    Raises:
        UserError: a layer that reads the input cannot be fitted.
    """
    own = branch.module.state_dict()
    notes: list[str] = []
    has_offsets = _has_offsets(branch, own, given, match)
    for name, layer in branch.inputs.items():
        value = match.naming.open_layout(given[name], own[name].shape) if name in given else None
        if name in match.tensors:
            value = match.tensors[name]  # where a layout cannot be seen from the shape, the naming knew it
        if value is None or value.shape[0] != own[name].shape[0]:
            continue
        value = _fit_kernel(name, layer, own[name], value, what, notes)
        stated = columns if layer.columns and columns else None
        stated = stated[3:] if stated and layer.offsets is not None else stated
        fitted, done = _fit_layer(name, layer, own[name], value, stated, has_offsets, what)
        if fitted is not None:
            match.tensors[name] = fitted
            match.wrong.pop(name, None)
            notes += done
    for name in list(match.wrong):
        resized = resize_positions(branch.module, name, own[name], given[name]) if branch.image else None
        if resized is not None:
            notes.append(f"{name}: {match.wrong.pop(name)}; interpolated")
            match.tensors[name] = resized
    first = {*branch.inputs, *([f"{branch.image.first}.weight"] if branch.image and branch.image.first else [])}
    for name in first & match.wrong.keys():
        raise UserError(
            f"{what}: the first layer {name} is {match.wrong[name]}; it would stay random under trained layers; take a file "
            "for the same input"
        )
    for name in match.tensors.keys() & given.keys():
        foreign = match.naming.rename(name)
        match.sources.setdefault(name, f"{match.prefix}{foreign}")
    return notes


def _has_offsets(branch: WeightBranch, own: dict[str, Tensor], given: dict[str, Tensor], match: Match) -> bool:
    """Whether the file's network reads offsets; a layer behind the first tells, whose other input is known."""
    for name, layer in branch.inputs.items():
        if layer.offsets is not None and not layer.columns and name in given:
            value = match.naming.open_layout(given[name], own[name].shape)
            return value is None or value.shape[layer.axis] != layer.others
    return True


def _fit_layer(
    name: str, layer: InputLayer, own: Tensor, value: Tensor, stated: Sequence[str] | None, has_offsets: bool, what: str
) -> tuple[Tensor | None, list[str]]:
    """The weight for our columns, None where it fits in no way; and what was done.

    Args:
        name, layer, own: of ours.
        value: of the file, our order of axes and kernel.
        stated: columns that the file says it reads, in the layer's terms.
        has_offsets: whether the file's network reads offsets.
        what: for errors.
    """
    ours = 3 * bool(layer.offsets)
    theirs = 3 * (has_offsets and layer.offsets is not None)
    if layer.offsets and not stated and value.shape == own.shape:
        theirs = 3  # one level only: nothing tells, and it fits
    width = value.shape[layer.axis] - theirs - layer.others
    if width < 0 or (width and not layer.columns) or own.shape[layer.axis] != ours + len(layer.columns) + layer.others:
        return None, []
    if theirs > ours:
        raise UserError(
            f"{what}: {name} reads the offsets of the points, which this encoder does not; set point_encoder.use_xyz: true, "
            "or take another file"
        )
    common = layer.columns if width == len(layer.columns) else _COMMON[3 * (layer.offsets is not None) :]
    named = tuple(stated or (*common, *(f"a further column ({n})" for n in range(len(common) + 1, width + 1)))[:width])
    if len(named) != width:
        return None, []
    fitted = torch.zeros_like(own, dtype=value.dtype)
    if theirs:
        fitted.narrow(layer.axis, 0, 3).copy_(value.narrow(layer.axis, 0, 3))
    for place, column in enumerate(layer.columns):
        if column in named:
            fitted.select(layer.axis, ours + place).copy_(value.select(layer.axis, theirs + named.index(column)))
    if layer.others:
        behind = value.narrow(layer.axis, value.shape[layer.axis] - layer.others, layer.others)
        fitted.narrow(layer.axis, own.shape[layer.axis] - layer.others, layer.others).copy_(behind)
    missing = ["offsets x, y, z"] * (ours > theirs) + [column for column in layer.columns if column not in named]
    lost = [column for column in named if column not in layer.columns]
    notes = [f"{name}: trained without {', '.join(missing)}: weight 0 there"] if missing else []
    if lost:
        notes.append(f"{name}: without the file's {', '.join(lost)}, which these points do not have")
    return fitted, notes


def _fit_kernel(name: str, layer: InputLayer, own: Tensor, value: Tensor, what: str, notes: list[str]) -> Tensor:
    """A submanifold kernel (out, k, k, k, in) of our size."""
    if own.dim() != 5 or value.shape[1] == own.shape[1]:
        return value
    given, wanted = value.shape[1], own.shape[1]
    rim = abs(wanted - given) // 2
    if given < wanted:
        larger = value.new_zeros(value.shape[0], wanted, wanted, wanted, value.shape[4])
        larger[:, rim : rim + given, rim : rim + given, rim : rim + given] = value
        notes.append(f"{name}: kernel {given}^3 put into the middle of {wanted}^3")
        return larger
    inner = value[:, rim : rim + wanted, rim : rim + wanted, rim : rim + wanted]
    if inner.count_nonzero() != value.count_nonzero():
        way_out = f"set {layer.kernel_key}: {given}" if layer.kernel_key else "take a file for this encoder"
        raise UserError(f"{what}: {name} has a {given}^3 kernel, this encoder a {wanted}^3 one; {way_out}")
    notes.append(f"{name}: kernel {given}^3 cut to {wanted}^3, its rim is 0")
    return inner.contiguous()


def resize_positions(module: nn.Module, name: str, own: Tensor, given: Tensor) -> Tensor | None:
    """A transformer's table of positions for another size of pictures or windows, as timm resizes it; None where it is none.

    Args:
        module: the backbone.
        name: of the table.
        own: this run's table.
        given: the file's.
    """
    layers = import_timm().layers
    try:
        if name.endswith("relative_position_bias_table") and own.shape[-1] == given.shape[-1]:
            window = module.get_submodule(name.rpartition(".")[0]).window_size
            return layers.resize_rel_pos_bias_table(given, new_window_size=window, new_bias_shape=own.shape)
        if (
            name.rpartition(".")[2] == "pos_embed"
            and own.dim() == given.dim() == 3
            and own.shape[-1] == given.shape[-1]
        ):
            embed: Any = module.get_submodule("patch_embed")
            grid = embed.grid_size
            extra = own.shape[1] - grid[0] * grid[1]
            return layers.resample_abs_pos_embed(given.float(), new_size=list(grid), num_prefix_tokens=extra)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # a table of another kind: it is then one of another shape
    return None
