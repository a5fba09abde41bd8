"""What does the image branch see? A timm backbone whose feature maps carry their stride and offset as data.

The encoder holds exactly the layers that the matched map needs, so that every parameter gets a gradient: stages
behind the matched level are not built in, and named in `untrained`. `encoder.trunk` keeps timm's own names (for
ResNets also torchvision's), which is what export relies on. Shapes: I images, padded at the right and bottom to one
size H, W.
"""

import difflib
import inspect
import itertools
import logging
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from simipu3d.compat import import_timm
from simipu3d.config import PartConfig
from simipu3d.contracts.tokens import FeatureMap
from simipu3d.encoders.image_levels import Level, find_level, forward_levels, measure_levels
from simipu3d.encoders.image_weights import LoadReport, load_pretrained, some_names
from simipu3d.encoders.weight_folding import IMAGENET_MEAN, IMAGENET_STD
from simipu3d.errors import UserError

logger = logging.getLogger(__name__)

CAFFE_BGR_MEAN = (103.530, 116.280, 123.675)

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
    """Any timm architecture, without a weights tag. Default: SimIPU (arXiv:2112.04680)."""
    model_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Handed to timm as they are: `{channels: [32, 64, 128, 256]}` makes a ResNet-18 of half width."""
    pretrained: Path | None = None
    """Local weights to start from (.safetensors, or a torch file with a state dict), for double fine-tuning. Default:
    from scratch, as in the paper. Nothing is ever downloaded."""
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
    is the stem, 2 the stem and layer1 (mmdetection's `frozen_stages` plus one). Default: everything is trained."""
    input: Literal["imagenet_rgb", "caffe_bgr"] = "imagenet_rgb"
    """RGB in 0..1 by ImageNet's mean and std, or (the released SimIPU) BGR in 0..255 minus (103.530, 116.280, 123.675).
    Default: what downstream users expect."""
    init: Literal["timm", "torch_default"] = "timm"
    """`torch_default` resets convolutions, linear and BatchNorm layers to torch's own initialisation, BatchNorm
    weights to 1 everywhere, as the released SimIPU has it. Default: the architecture's own recipe."""


class TopDownNeck(nn.Module):
    """One map at the finest of several levels: every deeper level, enlarged by repetition, is added to it.

    Source: Lin et al., Feature Pyramid Networks, arXiv:1612.03144, section 3 (only the finest output is built).
    """

    def __init__(self, levels: list[Level], out_channels: int):
        super().__init__()
        self.ratios = tuple(coarse.stride // fine.stride for fine, coarse in itertools.pairwise(levels))
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, out_channels, 1) for level in levels)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """(I, out_channels, Hf, Wf) at the finest map's size, from maps ordered from fine to coarse."""
        merged = self.lateral[-1](maps[-1])
        for lateral, finer, ratio in zip(self.lateral[-2::-1], maps[-2::-1], self.ratios[::-1], strict=True):
            own = lateral(finer)
            # Not F.interpolate: its backward has no deterministic CUDA kernel, that of repetition is a sum.
            large = merged[:, :, :, None, :, None].expand(-1, -1, -1, ratio, -1, ratio)
            large = large.reshape(*merged.shape[:2], merged.shape[2] * ratio, merged.shape[3] * ratio)
            merged = own + large[:, :, : own.shape[2], : own.shape[3]]
        return self.smooth(merged)


class ImageEncoder(nn.Module):
    """A timm backbone up to the matched level, and the optional neck.

    Args:
        config: the `image_encoder:` block.
        map: `matching.map`, the level that is matched: its stride, or a negative index (-1 is the last stage).

    Attributes:
        maps: one `Level(stride, channels, offset)` for each map that `forward` returns; the last one is the matched
        one. trunk: the timm model with timm's names, without classifier and without the stages that do not run.
        untrained: names of the architecture's tensors that the matched map does not depend on: not in the trunk, or (in
            networks with parallel branches) in it without a gradient.
        load_report: what `config.pretrained` gave, or None.
        num_levels: how many levels the architecture has.
        level_indices: which of them `forward` takes from the trunk, in timm's numbering.
        model_args: arguments that rebuild the trunk with `timm.create_model(config.name, num_classes=0, **model_args)`.

    Raises:
        UserError: unknown name, arguments timm refuses, no such map, weights that do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig, map: int = -1):
        super().__init__()
        self.config = config
        self.trunk, self.model_args = build_trunk(config)
        whole = list(self.trunk.state_dict())
        levels = measure_levels(self.trunk, config.name)
        matched = find_level(levels, map)
        self._check(levels, matched)
        deepest = len(levels) - 1 if config.neck else matched
        self.trunk.prune_intermediate_layers([deepest], prune_norm=False, prune_head=True)
        kept = set(self.trunk.state_dict())
        self.untrained = tuple(name for name in whole if name not in kept)
        # A plain transformer has one stride from its first block on: only the deepest block's map is of use.
        plain = len({level.stride for level in levels}) == 1
        self.num_levels = len(levels)
        self.level_indices = [deepest] if plain else list(range(deepest + 1))
        self._matched = matched
        self.maps = [levels[index] for index in self.level_indices]
        self.neck = TopDownNeck(levels[matched:], config.neck_channels) if config.neck else None
        if self.neck is not None:
            self.maps.append(levels[matched]._replace(channels=config.neck_channels))
        self._initialise()
        self._frozen = self._freeze()
        self.train()
        self._add_normalisation()
        logger.info(
            "image encoder %s: matched map of stride %d, %d channels; tensors that do not run: %s",
            config.name,
            self.maps[-1].stride,
            self.maps[-1].channels,
            some_names(self.untrained),
        )

    def forward(self, images: Tensor) -> list[FeatureMap]:
        """Feature maps, finest first, the matched one last.

        Args:
            images: (I, 3, H, W) float, as `normalise` makes them.
        """
        if len(images) == 0:
            maps = [
                images.new_zeros(0, m.channels, *(-(-size // m.stride) for size in images.shape[2:])) for m in self.maps
            ]
        else:
            maps = forward_levels(self.trunk, images, self.level_indices)
            if self.neck is not None:
                maps.append(self.neck(maps[self._matched :]))
        return [FeatureMap(m, level.stride, level.offset) for m, level in zip(maps, self.maps, strict=True)]

    def normalise(self, images: Tensor, image_size: Tensor) -> Tensor:
        """Images as the backbone wants them, exactly 0 in the padding.

        Args:
            images: (I, 3, H, W) uint8 RGB.
            image_size: (I, 2) height and width before padding.

        Returns:
            (I, 3, H, W) float32.
        """
        if self.config.input == "caffe_bgr":
            images = images.flip(1)
        normal = (images.float() - self.mean) / self.std
        rows = torch.arange(images.shape[2], device=images.device)
        columns = torch.arange(images.shape[3], device=images.device)
        inside = (rows < image_size[:, :1])[:, None, :, None] & (columns < image_size[:, 1:])[:, None, None, :]
        return torch.where(inside, normal, 0.0)

    def sync_norms(self, device_type: str) -> None:
        """With `norm: sync_bn`, let the backbone's BatchNorms share statistics; the engine calls this before training.

        Names of weights stay the same. SyncBatchNorm has no CPU kernel: on a CPU the layers stay as they are.
        """
        if self.config.norm != "sync_bn":
            return
        if device_type == "cuda":
            from timm.layers import convert_sync_batchnorm

            self.trunk = convert_sync_batchnorm(self.trunk)
        else:
            logger.info("image_encoder.norm: sync_bn is plain BatchNorm on %s", device_type)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Training mode for all but the frozen parts."""
        super().train(mode)
        for name, module in self.trunk.named_modules():
            own = [f"{name}.{inner}" if name else inner for inner, _ in module.named_parameters()]
            stays = own and self._frozen.issuperset(own)
            if stays or (self.config.norm == "frozen" and isinstance(module, BatchNorm)):
                module.eval()
        return self

    def _check(self, levels: list[Level], matched: int) -> None:
        """Refuse settings that this backbone would not follow."""
        config = self.config
        norms = any(isinstance(module, BatchNorm) for module in self.trunk.modules())
        if not norms:
            asked = {"norm": config.norm != "batch", "bn_eps": config.bn_eps, "bn_momentum": config.bn_momentum}
            for key in (key for key, value in asked.items() if value):
                raise UserError(f"image_encoder.{key}: timm's {config.name} has no BatchNorm; leave the key out")
        if config.output_stride != 32 and levels[-1].stride != config.output_stride:
            raise UserError(
                f"image_encoder.output_stride: timm's {config.name} ends at stride {levels[-1].stride}, not "
                f"{config.output_stride}; take another backbone or 32"
            )
        if config.neck and len({level.stride for level in levels}) == 1:
            raise UserError(f"image_encoder.neck: all maps of timm's {config.name} have one stride; use neck: null")
        if config.neck and matched == len(levels) - 1:
            raise UserError(
                "image_encoder.neck: the matched map is the last stage, there is nothing to add to it; "
                f"set matching.map to a finer stride than {levels[-1].stride}, or neck: null"
            )
        if config.frozen_stages > matched + 1:
            raise UserError(
                f"image_encoder.frozen_stages: only {matched + 1} levels of {config.name} run up to the matched one"
            )

    def _initialise(self) -> None:
        config = self.config
        if config.init == "torch_default":
            for module in self.trunk.modules():
                if isinstance(module, nn.Conv2d | nn.Linear | BatchNorm):
                    module.reset_parameters()
        for module in self.trunk.modules():
            if isinstance(module, BatchNorm):
                module.eps = module.eps if config.bn_eps is None else config.bn_eps
                module.momentum = module.momentum if config.bn_momentum is None else config.bn_momentum
        self.load_report: LoadReport | None = None
        if config.pretrained is not None:
            what = "image_encoder.pretrained"
            self.load_report = load_pretrained(self.trunk, config.pretrained, what, not_run=self.untrained)
            logger.info("%s: %s", what, self.load_report)

    def _freeze(self) -> frozenset[str]:
        """Take the gradient from all that is not trained; names of the trunk's parameters in `frozen_stages`.

        What a level hangs on is what its gradient reaches: no list of module names for every architecture.
        """
        self.trunk.eval()
        used = self._reached(self.level_indices if self.neck is not None else self.level_indices[-1:])
        frozen = self._reached([self.config.frozen_stages - 1]) if self.config.frozen_stages else frozenset()
        for name, parameter in self.trunk.named_parameters():
            if name in frozen or name not in used:
                parameter.requires_grad_(False)
        if self.config.norm == "frozen":
            for module in self.trunk.modules():
                if isinstance(module, BatchNorm):
                    module.requires_grad_(False)
        self.untrained += tuple(name for name, _ in self.trunk.named_parameters() if name not in used)
        return frozen

    def _reached(self, indices: list[int]) -> frozenset[str]:
        """Names of the trunk's parameters that these levels depend on."""
        names, parameters = zip(*self.trunk.named_parameters(), strict=True)
        total = sum(level.sum() for level in forward_levels(self.trunk, torch.zeros(1, 3, 64, 64), indices))
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None)

    def _add_normalisation(self) -> None:
        if self.config.input == "caffe_bgr":
            mean, std = CAFFE_BGR_MEAN, (1.0, 1.0, 1.0)
        else:
            mean, std = (tuple(255 * value for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)


def build_trunk(config: ImageEncoderConfig) -> tuple[nn.Module, dict[str, JsonValue]]:
    """The whole timm model without classifier, and the arguments that build it again.

    Raises:
        UserError: unknown name, or arguments that timm refuses.
    """
    timm = import_timm()
    if not timm.is_model(config.name) or "." in config.name:
        name = config.name.partition(".")[0]
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(
            f"image_encoder.name: timm has no architecture called {config.name!r} (names go without tag); {hint}"
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


def _any_size_args(trunk: nn.Module) -> dict[str, JsonValue]:
    """The argument that lets a transformer take images of any size, where its class has one."""
    known = inspect.signature(type(trunk).__init__).parameters
    for key, value in (("dynamic_img_size", True), ("strict_img_size", False)):
        if key in known:
            return {key: value}
    return {}
