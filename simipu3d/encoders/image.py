"""What does the image branch see? A backbone whose feature maps carry their stride and offset as data.

The encoder holds exactly the layers that the matched map needs, so that every parameter gets a gradient: stages
behind the matched level are not built in, and named in `untrained`. `encoder.trunk` keeps timm's own names (for
ResNets also torchvision's), which is what export relies on. Shapes: I images, padded at the right and bottom to one
size H, W.
"""

import itertools
import logging
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simipu3d.contracts.tokens import FeatureMap, Level
from simipu3d.encoders.image_levels import find_level, find_pad_multiple, forward_levels, is_timm, measure_levels
from simipu3d.encoders.image_trunk import (
    BatchNorm,
    ImageEncoderConfig,
    build_trunk,
    checkpoint_gradients,
    count_batches_once,
    first_pass,
    image_side,
)
from simipu3d.errors import UserError
from simipu3d.weights.branch import WeightBranch
from simipu3d.weights.files import some_names
from simipu3d.weights.folding import IMAGENET_MEAN, IMAGENET_STD
from simipu3d.weights.load import LoadReport, load_pretrained
from simipu3d.weights.namings import IMAGE_NAMINGS, SWIN_NAMINGS

logger = logging.getLogger(__name__)

CAFFE_BGR_MEAN = (103.530, 116.280, 123.675)


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
    """A backbone up to the matched level, and the optional neck.

    Args:
        config: the `image_encoder:` block; its `map` says which level is matched.

    Attributes:
        maps: one `Level(stride, channels, offset)` for each map that `forward` returns; the last one is the matched
        one. trunk: the timm model with timm's names, without classifier and without the stages that do not run (or the
            registered backbone as it was built).
        untrained: names of the architecture's tensors that the matched map does not depend on: not in the trunk, or (in
            networks with parallel branches) in it without a gradient.
        load_report: what `config.pretrained` gave, or None.
        pad_multiple: images are padded at the right and bottom to multiples of this before the backbone sees them.
        num_levels: how many levels the architecture has.
        level_indices: which of them `forward` takes from the trunk, in timm's numbering.
        model_args: arguments that rebuild the trunk with `timm.create_model(config.name, num_classes=0, **model_args)`.

    Raises:
        UserError: unknown name, arguments timm refuses, no such map, weights that do not fit.
    """

    mean: Tensor
    std: Tensor
    trunk: Any  # its attributes are the architecture's, which timm chooses by name

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.config = config
        self.trunk, self.model_args = build_trunk(config)
        whole = list(self.trunk.state_dict())
        levels = measure_levels(self.trunk, config.name)
        matched = find_level(levels, config.map)
        self._check(levels, matched)
        deepest = len(levels) - 1 if config.neck else matched
        if is_timm(self.trunk):
            self.trunk.prune_intermediate_layers([deepest], prune_norm=False, prune_head=True)
        kept = set(self.trunk.state_dict())
        self.untrained = tuple(name for name in whole if name not in kept)
        # A plain transformer has one stride from its first block on: only the deepest block's map is of use.
        plain = len({level.stride for level in levels}) == 1
        self.num_levels = len(levels)
        self.level_indices = [deepest] if plain else list(range(deepest + 1))
        self._matched = matched
        self.trunk.eval()
        self.pad_multiple = find_pad_multiple(self.trunk, levels[: deepest + 1], config.name)
        self.maps = [levels[index] for index in self.level_indices]
        self.neck = TopDownNeck(levels[matched:], config.neck_channels) if config.neck else None
        if self.neck is not None:
            self.maps.append(levels[matched]._replace(channels=config.neck_channels))
        self._initialise()
        self._frozen = self._freeze()
        if config.gradient_checkpointing:
            checkpoint_gradients(self.trunk, self._pad(torch.zeros(1, 3, 64, 64)), config.name)
            count_batches_once(self.trunk)
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
            images: (I, 3, H, W) float, as `normalise` makes them, of any size. A map covers them up to the next
                multiple of `pad_multiple`.
        """
        images = self._pad(images)
        if len(images) == 0:
            maps = [
                images.new_zeros(0, m.channels, *(-(-size // m.stride) for size in images.shape[2:])) for m in self.maps
            ]
        else:
            with first_pass(self.trunk) if self.config.gradient_checkpointing else nullcontext():
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

    def _pad(self, images: Tensor) -> Tensor:
        height, width = (-size % self.pad_multiple for size in images.shape[2:])
        return F.pad(images, (0, width, 0, height)) if height or width else images

    def sync_norms(self, device_type: str) -> None:
        """With `norm: sync_bn`, let the backbone's BatchNorms share statistics; the engine calls this before training.

        Names of weights stay the same. SyncBatchNorm has no CPU kernel: on a CPU the layers stay as they are.
        """
        if self.config.norm != "sync_bn":
            return
        if device_type == "cuda":
            from timm.layers import convert_sync_batchnorm

            self.trunk = convert_sync_batchnorm(self.trunk)
            if self.config.gradient_checkpointing:
                count_batches_once(self.trunk)
        else:
            logger.info("image_encoder.norm: sync_bn is plain BatchNorm on %s", device_type)

    def weight_branch(self, title: str) -> WeightBranch:
        """What of this encoder weights from elsewhere fill: the trunk. `title` is the encoder's name in the method."""
        namings = SWIN_NAMINGS if type(self.trunk).__name__ == "SwinTransformer" else IMAGE_NAMINGS
        side = image_side(self.trunk, self.config, self.untrained)
        return WeightBranch(title, self.config.name, self.trunk, namings, "trunk.", image=side)

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
                raise UserError(f"image_encoder.{key}: {config.name} has no BatchNorm; leave the key out")
        if config.output_stride != 32 and levels[-1].stride != config.output_stride:
            raise UserError(
                f"image_encoder.output_stride: {config.name} ends at stride {levels[-1].stride}, not "
                f"{config.output_stride}; take another backbone or 32"
            )
        if config.neck and len({level.stride for level in levels}) == 1:
            raise UserError(f"image_encoder.neck: all maps of {config.name} have one stride; use neck: null")
        if config.neck and matched == len(levels) - 1:
            raise UserError(
                "image_encoder.neck: the matched map is the last stage, there is nothing to add to it; "
                f"set image_encoder.map to a finer stride than {levels[-1].stride}, or neck: null"
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
            self.load_report = load_pretrained(self.weight_branch("image_encoder"), config.pretrained, what)
            logger.info("%s: %s", what, self.load_report)

    def _freeze(self) -> frozenset[str]:
        """Take the gradient from all that is not trained; names of the trunk's parameters in `frozen_stages`.

        What a level hangs on is what its gradient reaches: no list of module names for every architecture.
        """
        self.trunk.eval()
        used = self._reached(self.level_indices if self.neck is not None else self.level_indices[-1:])
        stages = self.config.frozen_stages
        # The norm at a transformer's end acts on every level that is handed out; it belongs to the last one.
        frozen = self._reached([stages - 1], final_norm=stages > self._matched) if stages else frozenset()
        for name, parameter in self.trunk.named_parameters():
            if name in frozen or name not in used:
                parameter.requires_grad_(False)
        if self.config.norm == "frozen":
            for module in self.trunk.modules():
                if isinstance(module, BatchNorm):
                    module.requires_grad_(False)
        self.untrained += tuple(name for name, _ in self.trunk.named_parameters() if name not in used)
        return frozen

    def _reached(self, indices: list[int], *, final_norm: bool = True) -> frozenset[str]:
        """Names of the trunk's parameters that these levels depend on."""
        names, parameters = zip(*self.trunk.named_parameters(), strict=True)
        images = self._pad(torch.zeros(1, 3, 64, 64))
        levels = forward_levels(self.trunk, images, indices, final_norm=final_norm)
        total = sum((level.sum() for level in levels), torch.zeros(()))
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None)

    def _add_normalisation(self) -> None:
        if self.config.input == "caffe_bgr":
            mean, std = [*CAFFE_BGR_MEAN], [1.0, 1.0, 1.0]
        else:
            mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
