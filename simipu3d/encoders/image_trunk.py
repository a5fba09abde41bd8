"""Which network computes the image features? A timm architecture by name, or a backbone that a plugin registered."""

import difflib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from simipu3d.compat import import_timm
from simipu3d.config import PartConfig, parse_block
from simipu3d.encoders.image_levels import forward_levels, is_timm
from simipu3d.errors import UserError
from simipu3d.registry import IMAGE_BACKBONES
from simipu3d.weights.branch import ImageSide, WeightsConfig
from simipu3d.weights.folding import CONVENTIONS, Pictures, norm_eps

BatchNorm = nn.modules.batchnorm._BatchNorm
_OWN_ARGS = (
    "pretrained",
    "checkpoint_path",
    "num_classes",
    "in_chans",
    "features_only",
    "out_indices",
    "output_stride",
)


class ImageEncoderConfig(PartConfig):
    """The `image_encoder:` block."""

    name: str = "resnet50"
    """Any timm architecture, without a weights tag, or a backbone that a plugin registered. Default: SimIPU
    (arXiv:2112.04680)."""
    model_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Handed to timm as they are: `{channels: [32, 64, 128, 256]}` makes a ResNet-18 of half width. Of a registered
    backbone: its own keys."""
    map: int = -1
    """Which feature map is used (matched): its stride in pixels (2 to 32; the deepest map that has it), or an index from
    the end, -1 for the last one, as the paper does. Stages behind it are not built, so not trained; `output_stride` or
    `neck` train them too. Default: SimIPU (arXiv:2112.04680)."""
    pretrained: Path | None = None
    """Local weights to start from, any file that `--init` takes for an image branch, for double fine-tuning. Default:
    from scratch, as in the paper. Nothing is ever downloaded."""
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    """What a foreign file does not say about itself."""
    norm: Literal["batch", "sync_bn", "frozen"] = "batch"
    """BatchNorm of this process, over all processes (CUDA only; plain on a CPU), or with its statistics and weights
    fixed. Default: timm's."""
    bn_eps: PositiveFloat | None = None
    """Default: the backbone's own, 1e-5 for ResNets. The released SimIPU has 1e-3 (export folds the difference)."""
    bn_momentum: float | None = Field(None, gt=0, le=1)
    """Default: the backbone's own, 0.1 for ResNets. The released SimIPU has 0.01."""
    output_stride: Literal[8, 16, 32] = 32
    """Smaller values dilate the last stages instead of striding, where timm's architecture can. Default: no
    dilation."""
    neck: Literal["top_down"] | None = None
    """`top_down` adds the deeper stages to the matched one (arXiv:1612.03144); export drops it. Default: none."""
    neck_channels: PositiveInt = 256
    """Channels of the neck's map, read with `neck: top_down` only. Default from arXiv:1612.03144."""
    frozen_stages: NonNegativeInt = 0
    """How many of the backbone's levels, counted from the finest, keep their weights and statistics. For a ResNet 1
    is the stem, 2 the stem and layer1 (mmdetection's `frozen_stages` plus one); for a plain transformer (ViT) a level
    is a block, and the first one takes patches and positions along. Default: everything is trained."""
    gradient_checkpointing: bool = False
    """Keep only what lies between the backbone's blocks, and compute their insides again for the gradient
    (arXiv:1604.06174): less memory, about a third more time, the same gradients. Default: off, as in timm."""
    input: Literal["imagenet_rgb", "caffe_bgr"] = "imagenet_rgb"
    """RGB in 0..1 by ImageNet's mean and std, or (the released SimIPU) BGR in 0..255 minus (103.530, 116.280, 123.675).
    Default: what downstream users expect."""
    init: Literal["timm", "torch_default"] = "timm"
    """`torch_default` resets convolutions, linear and BatchNorm layers to torch's own initialisation, BatchNorm
    weights to 1 everywhere, as the released SimIPU has it. Default: the architecture's own recipe."""


def build_trunk(config: ImageEncoderConfig) -> tuple[nn.Module, dict[str, JsonValue]]:
    """The whole backbone without classifier, and (of a timm model) the arguments that build it again.

    Raises:
        UserError: unknown name, a name that timm and a plugin both have, or arguments that are refused.
    """
    timm = import_timm()
    if config.name in IMAGE_BACKBONES.names():
        if timm.is_model(config.name):
            raise UserError(
                f"image_encoder.name: {config.name} is a timm architecture and a registered backbone; rename the latter"
            )
        entry = IMAGE_BACKBONES[config.name]
        return entry.target(parse_block("image_encoder.model_args", entry.model, config.model_args)), {}
    if not timm.is_model(config.name) or "." in config.name:
        name = config.name.partition(".")[0]
        near = difflib.get_close_matches(name, [*timm.list_models(), *IMAGE_BACKBONES.names()], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(
            f"image_encoder.name: timm has no architecture called {config.name!r} (names go without tag), and no plugin "
            f"registered one; {hint}"
        )
    for key in _OWN_ARGS:
        if key in config.model_args:
            raise UserError(f"image_encoder.model_args.{key}: this is set by the encoder itself; leave it out")
    args = dict(config.model_args)
    if config.output_stride != 32:
        args["output_stride"] = config.output_stride

    def create(args: dict[str, JsonValue]) -> nn.Module:
        try:
            return timm.create_model(config.name, pretrained=False, num_classes=0, **args)
        except (
            AssertionError,
            AttributeError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(f"image_encoder: timm cannot build {config.name} with {args}: {error}") from error

    trunk = create(args)
    flexible = _any_size_args(trunk)
    if flexible.keys() - args.keys():
        args = {**flexible, **args}
        trunk = create(args)
    return trunk, args


def convert_names(trunk: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Tensors in the names of an architecture's authors as timm's, by timm's own function; None where it has none, or the
    file is not what it expects. Tables of positions come out in the trunk's size."""
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is None or not is_timm(trunk):
        return None
    try:
        converted = convert(tensors, trunk)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # written for its authors' files, it meets any
    return {name: value for name, value in converted.items() if isinstance(value, torch.Tensor)}


def image_side(trunk: nn.Module, config: ImageEncoderConfig, untrained: tuple[str, ...]) -> ImageSide:
    """What weights from elsewhere have to be fitted to; `untrained` are names that do not count."""
    first = getattr(trunk, "pretrained_cfg", {}).get("first_conv")
    conv = dict(trunk.named_modules()).get(first) if isinstance(first, str) else None
    pads = type(conv) is not nn.Conv2d or conv.padding != (0, 0)

    def of_run(block: Mapping[str, Any]) -> tuple[Pictures, dict[str, float]]:
        there = parse_block("image_encoder", ImageEncoderConfig, {**block, "pretrained": None})
        own = norm_eps(trunk)
        eps = dict.fromkeys(own, there.bn_eps) if there.bn_eps else norm_eps(build_trunk(there)[0])
        return CONVENTIONS[there.input], eps

    return ImageSide(
        first=first if isinstance(first, str) and isinstance(conv, nn.Conv2d) else "",
        pads=pads,
        pictures=CONVENTIONS[config.input],
        stated=config.weights,
        stock_eps=lambda: norm_eps(build_trunk(config)[0]),
        of_run=of_run,
        convert=lambda tensors: convert_names(trunk, tensors),
        untrained=untrained,
    )


def _any_size_args(trunk: nn.Module) -> dict[str, JsonValue]:
    """The argument that lets a transformer take images of any size, where its class has one."""
    known = inspect.signature(type(trunk).__init__).parameters
    for key, value in (("dynamic_img_size", True), ("strict_img_size", False)):
        if key in known:
            return {key: value}
    return {}


def checkpoint_gradients(trunk: Any, images: torch.Tensor, name: str) -> None:
    """Turn gradient checkpointing on, and see that it saves something: some models take the call and ignore it.

    Args:
        trunk: the backbone, in eval mode.
        images: (1, 3, H, W) to try it on.
        name: of the backbone, for errors.

    Raises:
        UserError: the backbone has no gradient checkpointing on the way to its maps.
    """
    kept = _kept_values(trunk, images)
    try:
        trunk.set_grad_checkpointing(True)
        saves = _kept_values(trunk, images) < kept
    except (AssertionError, AttributeError, NotImplementedError):
        saves = False
    if not saves:
        raise UserError(f"image_encoder.gradient_checkpointing: {name} has none; set it to false")


def _kept_values(trunk: nn.Module, images: torch.Tensor) -> int:
    """How many values a forward pass keeps for the gradient, those inside checkpointed blocks not counted."""
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_levels(trunk, images, None)
    return count


def count_batches_once(trunk: nn.Module) -> None:
    """Let BatchNorms keep their statistics when a checkpointed block is computed again; `first_pass` says when it is not.

    Their outputs need the batch's own statistics both times, so they stay in training mode.
    """
    for norm in _norms(trunk):
        norm.recomputed = False
        norm.register_forward_pre_hook(_hold_statistics)
        # Recomputation stops, by an exception, as soon as the last value that is needed is there.
        norm.register_forward_hook(_release_statistics, always_call=True)


@contextmanager
def first_pass(trunk: nn.Module) -> Iterator[None]:
    """Inside, the BatchNorms of `count_batches_once` count as usual."""
    norms = _norms(trunk)
    for norm in norms:
        norm.recomputed = False
    try:
        yield
    finally:
        for norm in norms:
            norm.recomputed = True


def _norms(trunk: nn.Module) -> list[Any]:
    return [module for module in trunk.modules() if isinstance(module, BatchNorm)]


def _hold_statistics(norm: Any, _inputs: tuple[torch.Tensor, ...]) -> None:
    if norm.training and norm.recomputed:
        norm.held = (norm.momentum, norm.num_batches_tracked.clone())
        norm.momentum = 0.0


def _release_statistics(norm: Any, _inputs: tuple[torch.Tensor, ...], _output: torch.Tensor | None) -> None:
    if norm.training and norm.recomputed:
        norm.momentum, count = norm.held
        norm.num_batches_tracked.copy_(count)
