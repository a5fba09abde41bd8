"""Which feature maps does a timm backbone have, and where in the image is a cell of each?

A level is one of the maps that `forward_intermediates` gives. Channels and strides are measured on a small image. The
offset, the input pixel (integer-centre) of the centre of cell 0, is composed from the operators that ran: a window of k
taps, d apart, with p padded cells on its left is centred (k - 1) d / 2 - p cells right of its first cell's place. A
padded 3x3 convolution with stride 2 therefore leaves the offset at 0, a 4x4 patch with stride 4 moves it to 1.5
pixels. Of parallel branches the one that runs first counts. A level that is coarser than its operators explain merged
its cells by reshaping (Swin) and is centred on the merged block.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simipu3d.errors import UserError

PROBE_SIZE = (64, 128)
"""Height and width of the image that levels are measured on."""


class Level(NamedTuple):
    """One feature map, as data."""

    stride: int
    """Input pixels from cell to cell."""
    channels: int
    offset: float
    """Input pixel of the centre of cell 0; feature coordinate = (u - offset) / stride."""


class _Step(NamedTuple):
    """One operator that moves or thins the grid: its stride before and after, and the move in input pixels."""

    stride_in: int
    stride_out: int
    shift: float


def forward_levels(trunk: nn.Module, images: Tensor, indices: list[int] | None) -> list[Tensor]:
    """(I, C, Hf, Wf) of the asked levels (None: all); what lies behind the last of them does not run."""
    return trunk.forward_intermediates(
        images, indices=indices, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


def measure_levels(trunk: nn.Module, name: str) -> list[Level]:
    """Every level of a timm backbone, finest first.

    Args:
        trunk: a timm model with all its stages; its state and mode stay as they are.
        name: its timm name, for errors.

    Raises:
        UserError: the model gives no feature maps, or none for an image of any size.
    """
    if not hasattr(trunk, "forward_intermediates"):
        raise UserError(
            f"image_encoder.name: timm's {name} gives no feature maps (no forward_intermediates); take another"
        )
    was_training = trunk.training
    trunk.eval()
    images = torch.linspace(-1, 1, 3 * PROBE_SIZE[0] * PROBE_SIZE[1]).view(1, 3, *PROBE_SIZE)
    with torch.no_grad():
        try:
            maps = forward_levels(trunk, images, None)
            steps = [_record_steps(trunk, images, index) for index in range(len(maps))]
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"image_encoder.name: timm's {name} does not take images of any size that is a multiple of 32 "
                f"(on {PROBE_SIZE[0]}x{PROBE_SIZE[1]}: {error}); take another"
            ) from error
    trunk.train(was_training)
    strides = [PROBE_SIZE[1] // features.shape[-1] for features in maps]
    offsets = _compose(strides, steps)
    return [Level(s, features.shape[1], o) for s, features, o in zip(strides, maps, offsets, strict=True)]


def find_level(levels: list[Level], map: int) -> int:
    """Index of the level that `matching.map` means: a stride (the deepest level that has it), or a negative index.

    Raises:
        UserError: there is no such level.
    """
    if map < 0 and -map <= len(levels):
        return len(levels) + map
    at_stride = [index for index, level in enumerate(levels) if level.stride == map]
    if not at_stride:
        strides = ", ".join(str(stride) for stride in dict.fromkeys(level.stride for level in levels))
        raise UserError(
            f"matching.map: the image encoder has no map {map}; give one of its strides ({strides}), "
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


def _window_shift(module: nn.Module, width_in: int) -> float:
    """How far right of its cell's place the first window is centred, in input cells."""

    def last(value: int | tuple[int, ...]) -> int:
        return value if isinstance(value, int) else value[-1]

    kernel, stride = last(module.kernel_size), last(module.stride)
    dilation = last(getattr(module, "dilation", 1))
    span = dilation * (kernel - 1)
    if type(module).__name__.endswith("Same") or module.padding == "same":  # TensorFlow's rule: the odd cell goes right
        left = max((-(-width_in // stride) - 1) * stride + span + 1 - width_in, 0) // 2
    else:
        left = 0 if module.padding == "valid" else last(module.padding)
    return span / 2 - left


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
