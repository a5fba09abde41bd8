"""Which feature maps does an image backbone have, and where in the image is a cell of each?

A registered backbone (`contracts.tokens.ImageBackbone`) says so itself, and is checked on a small image. Of a timm
backbone a level is one of the maps that `forward_intermediates` gives. Channels and strides are measured on a small
image. The offset, the input pixel (integer-centre) of the centre of cell 0, is composed from the operators that ran: a window of k
taps, d apart, with p padded cells on its left is centred (k - 1) d / 2 - p cells right of its first cell's place. A
padded 3x3 convolution with stride 2 therefore leaves the offset at 0, a 4x4 patch with stride 4 moves it to 1.5
pixels. Of parallel branches the one that runs first counts. A level that is coarser than its operators explain merged
its cells by reshaping (Swin) and is centred on the merged block.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simipu3d.contracts.tokens import Level
from simipu3d.errors import UserError

PROBE_CELLS = (2, 4)
"""Height and width of the image that levels are measured on, in the coarsest cells."""
_REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError)
"""What timm models raise for a size that they do not take."""


class _Step(NamedTuple):
    """One operator that moves or thins the grid: its stride before and after, and the move in input pixels."""

    stride_in: int
    stride_out: int
    shift: float


def is_timm(trunk: nn.Module) -> bool:
    """Whether a backbone is a timm model, or one that a plugin registered in `IMAGE_BACKBONES`."""
    return hasattr(trunk, "pretrained_cfg") or not hasattr(trunk, "levels")  # timm's NesT has `levels` of its own


def forward_levels(trunk: Any, images: Tensor, indices: list[int] | None, *, final_norm: bool = True) -> list[Tensor]:
    """(I, C, Hf, Wf) of the asked levels (None: all); what lies behind the last of them does not run.

    Args:
        trunk: the backbone.
        images: (I, 3, H, W) of a size that the backbone takes.
        indices: rising numbers of levels.
        final_norm: let the norm that stands at a transformer's end act on what it hands out.
    """
    if not is_timm(trunk):
        indices = list(range(len(trunk.levels))) if indices is None else indices
        maps = trunk(images, indices[-1])
        return [maps[index] for index in indices]
    return trunk.forward_intermediates(
        images, indices=indices, norm=final_norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


def measure_levels(trunk: nn.Module, name: str) -> list[Level]:
    """Every level of a backbone, finest first.

    Args:
        trunk: a backbone with all its stages; its state and mode stay as they are.
        name: its name, for errors.

    Raises:
        UserError: a timm model gives no feature maps, or none for an image of any size; a registered backbone's maps are
            not as it says.
    """
    if not is_timm(trunk):
        return _stated_levels(trunk, name)
    if not hasattr(trunk, "forward_intermediates"):
        raise UserError(
            f"image_encoder.name: timm's {name} gives no feature maps (no forward_intermediates); take another"
        )
    was_training = trunk.training
    trunk.eval()
    try:
        images, maps, steps = _try_sizes(trunk)
    except _REFUSALS as error:
        raise UserError(
            f"image_encoder.name: timm's {name} does not take images of any size ({_why_not(trunk)}); take another"
        ) from error
    trunk.train(was_training)
    for features in maps:
        rows, columns = (given / cells for given, cells in zip(images.shape[2:], features.shape[2:], strict=True))
        if rows != columns or rows % 1:
            raise UserError(
                f"image_encoder.name: timm's {name} has a map of {features.shape[2]} x {features.shape[3]} cells for an "
                f"image of {images.shape[2]} x {images.shape[3]} (it resizes images, or its windows have no padding), so "
                "that no stride says where a cell lies; take another"
            )
    strides = [images.shape[3] // features.shape[-1] for features in maps]
    offsets = _compose(strides, steps)
    return [Level(s, features.shape[1], o) for s, features, o in zip(strides, maps, offsets, strict=True)]


def _why_not(trunk: nn.Module) -> str:
    """Why a timm model does not take a small image, in words."""
    edge = getattr(trunk, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
    for size, reason in ((edge, "it does not run without its classifier"), (edge + 64, f"only {edge} x {edge} pixels")):
        try:
            with torch.no_grad():
                forward_levels(trunk, torch.zeros(1, 3, size, size), None)
        except _REFUSALS:
            return reason
    return "its windows have no padding, so that small ones vanish and no map has size / stride cells"


def find_pad_multiple(trunk: Any, levels: list[Level], name: str) -> int:
    """What heights and widths have to be multiples of, so that a map has size / stride cells, rounded up, at its offset.

    1 where every level is made by windows with padding (ResNets). Patches need whole ones; convolutions whose windows lie
    side by side (ConvNeXt) would drop the rest; TensorFlow's padding moves the offset with the size; branches that meet
    again (HRNet) or windows of cells (MobileViT) need twice the stride. Found by trying odd sizes.

    Args:
        trunk: the backbone, in eval mode.
        levels: those that are used.
        name: of the backbone, for errors.

    Raises:
        UserError: no such number is found.
    """
    if not is_timm(trunk):
        return trunk.pad_multiple
    coarsest = max(level.stride for level in levels)
    by_size = any(_pads_by_size(module) for module in trunk.modules())
    if not by_size and _has_whole_maps(trunk, levels, (2 * coarsest + 1, 3 * coarsest - 1)):
        return 1
    for multiple in (coarsest, 2 * coarsest):
        if _has_whole_maps(trunk, levels, (3 * multiple, 5 * multiple)):
            return multiple
    raise UserError(
        f"image_encoder.name: the maps of timm's {name} do not have size / stride cells for images of any size, not even "
        f"padded to {2 * coarsest}, so that no stride says where a cell lies; take another"
    )


def _has_whole_maps(trunk: nn.Module, levels: list[Level], size: tuple[int, int]) -> bool:
    """Whether an image of that height and width gives maps of size / stride cells, rounded up."""
    try:
        with torch.no_grad():
            maps = forward_levels(trunk, torch.zeros(1, 3, *size), list(range(len(levels))))
    except _REFUSALS:
        return False
    wanted = [tuple(-(-edge // level.stride) for edge in size) for level in levels]
    return all(tuple(m.shape[2:]) == cells for m, cells in zip(maps, wanted, strict=True))


def _try_sizes(trunk: nn.Module) -> tuple[Tensor, list[Tensor], list[list[_Step]]]:
    """A small image that a timm model takes, the maps of it, and the steps to each of them."""
    images = _probe(32)
    with torch.no_grad():
        try:
            maps = forward_levels(trunk, images, None)
        except _REFUSALS:
            patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", 32)
            patch = patch if isinstance(patch, int) else patch[-1]
            if 32 % patch == 0:
                raise
            images = _probe(patch)  # patches of 14 pixels, say
            maps = forward_levels(trunk, images, None)
        return images, maps, [_record_steps(trunk, images, index) for index in range(len(maps))]


def _probe(cell: int) -> Tensor:
    """(1, 3, H, W) without two equal values, so that nothing in a network is constant."""
    size = (PROBE_CELLS[0] * cell, PROBE_CELLS[1] * cell)
    return torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)


def _stated_levels(trunk: Any, name: str) -> list[Level]:
    """What a registered backbone says about its maps, after a look at them."""
    who = f"image_encoder.name: the registered backbone {name}"
    levels, multiple = list(trunk.levels), getattr(trunk, "pad_multiple", None)
    if not levels or not all(isinstance(level, Level) for level in levels):
        raise UserError(f"{who} must have levels, a tuple of contracts.tokens.Level, finest first; mend the plugin")
    if not isinstance(multiple, int) or multiple < 1:
        raise UserError(f"{who} must have pad_multiple, a whole number from 1, got {multiple!r}; mend the plugin")
    was_training = trunk.training
    trunk.eval()
    images = _probe(math.lcm(multiple, max(level.stride for level in levels)))
    with torch.no_grad():
        maps = forward_levels(trunk, images, None)
    trunk.train(was_training)
    for number, (level, features) in enumerate(zip(levels, maps, strict=True)):
        wanted = (1, level.channels, images.shape[2] // level.stride, images.shape[3] // level.stride)
        if tuple(features.shape) != wanted:
            raise UserError(
                f"{who} says that level {number} is {wanted} for images {tuple(images.shape)}, and gives "
                f"{tuple(features.shape)}; mend the plugin"
            )
    return levels


def find_level(levels: list[Level], map: int) -> int:
    """Index of the level that `image_encoder.map` means: a stride (the deepest level that has it), or a negative index.

    Raises:
        UserError: there is no such level.
    """
    if map < 0 and -map <= len(levels):
        return len(levels) + map
    at_stride = [index for index, level in enumerate(levels) if level.stride == map]
    if not at_stride:
        strides = ", ".join(str(stride) for stride in dict.fromkeys(level.stride for level in levels))
        raise UserError(
            f"image_encoder.map: the backbone has no map {map}; give one of its strides ({strides}), "
            f"or an index from the end (-1 to -{len(levels)})"
        )
    return at_stride[-1]


def _record_steps(trunk: nn.Module, images: Tensor, index: int) -> list[_Step]:
    """Steps of a forward pass up to one level, in the order in which they ran."""
    steps: list[_Step] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        width_in, width_out = inputs[0].shape[-1], output.shape[-1]
        if inputs[0].dim() != 4 or images.shape[-1] % width_in or width_in % width_out:
            return
        stride_in = images.shape[-1] // width_in
        shift = _window_shift(module, width_in)
        if width_in != width_out or shift:
            steps.append(_Step(stride_in, images.shape[-1] // width_out, shift * stride_in))

    hooks = [
        module.register_forward_hook(record)
        for module in trunk.modules()
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
    ]
    try:
        forward_levels(trunk, images, [index])
    finally:
        for hook in hooks:
            hook.remove()
    return steps


def _window_shift(module: Any, width_in: int) -> float:
    """How far right of its cell's place the first window is centred, in input cells."""

    def last(value: int | tuple[int, ...]) -> int:
        return value if isinstance(value, int) else value[-1]

    kernel, stride = last(module.kernel_size), last(module.stride)
    dilation = last(getattr(module, "dilation", 1))
    span = dilation * (kernel - 1)
    if _pads_by_size(module):  # the odd cell goes right
        left = max((-(-width_in // stride) - 1) * stride + span + 1 - width_in, 0) // 2
    else:
        left = 0 if module.padding == "valid" else last(module.padding)
    return span / 2 - left


def _pads_by_size(module: nn.Module) -> bool:
    """Whether a window's padding follows TensorFlow's rule, by which it depends on the size of the input."""
    return type(module).__name__.endswith("Same") or getattr(module, "padding", None) == "same"


def _compose(strides: list[int], steps: list[list[_Step]]) -> list[float]:
    """Offset of every level from its steps; one beyond the level's stride is a side branch (pooled keys)."""
    offsets, seen, stride, offset = [], 0, 1, 0.0
    for level_stride, level_steps in zip(strides, steps, strict=True):
        # First what ran since the last level; then everything, because a run may go a step too far (the pool behind a
        # ResNet's stem) or runs all branches at once (HRNet).
        for step in [*level_steps[seen:], *level_steps]:
            if step.stride_in == stride and step.stride_out <= level_stride and step.stride_out > stride:
                stride, offset = step.stride_out, offset + step.shift
        offset += sum(s.shift for s in level_steps[seen:] if s.stride_in == s.stride_out == level_stride)
        seen = len(level_steps)
        if stride < level_stride:  # merged by reshaping
            stride, offset = level_stride, offset + (level_stride - stride) / 2
        offsets.append(offset)
    return offsets
