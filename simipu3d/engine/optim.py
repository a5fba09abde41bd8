"""Which optimizer moves which branch, and how do learning rates change?

The branches (points, image, heads) may have different optimizers. They are one `torch.optim.Optimizer` to Lightning, so
that steps, clipping, accumulation, mixed precision and schedulers keep their meaning.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
import torch.nn as nn
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny
from torch.optim import Optimizer

from simipu3d.config import PartConfig, parse_part
from simipu3d.engine.curve import Curve
from simipu3d.engine.resume import keep_settings
from simipu3d.errors import UserError
from simipu3d.registry import OPTIMIZERS, SCHEDULES

log = logging.getLogger(__name__)

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(PartConfig):
    """AdamW (arXiv:1711.05101)."""

    name: str = "adamw"
    """Which optimizer."""
    lr: PositiveFloat = 1e-3
    """Learning rate before the schedule (SimIPU's point encoder)."""
    betas: tuple[Beta, Beta] = (0.95, 0.99)
    """Decay of the running means (SimIPU's point encoder)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (SimIPU's point encoder)."""
    decay_norm_and_bias: bool = False
    """Decay BatchNorm parameters and biases too (the released code does)."""


class SGDConfig(PartConfig):
    """Stochastic gradient descent with momentum."""

    name: str = "sgd"
    """Which optimizer."""
    lr: PositiveFloat = 0.03
    """Learning rate before the schedule (SimIPU's image encoder and heads; MoCo, arXiv:1911.05722)."""
    momentum: Beta = 0.9
    """Momentum (SimIPU)."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 decay (SimIPU)."""
    decay_norm_and_bias: bool = False
    """Decay BatchNorm parameters and biases too (the released code does)."""


@OPTIMIZERS.register("adamw", config=AdamWConfig)
def adamw(groups: list[dict], config: AdamWConfig) -> Optimizer:
    """torch's AdamW over groups that carry their own weight decay."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


@OPTIMIZERS.register("sgd", config=SGDConfig)
def sgd(groups: list[dict], config: SGDConfig) -> Optimizer:
    """torch's SGD over groups that carry their own weight decay."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


class OptimConfig(PartConfig):
    """The `optim:` block: one optimizer a branch."""

    points: SerializeAsAny[PartConfig] = AdamWConfig()
    """The point encoder's."""
    image: SerializeAsAny[PartConfig] = SGDConfig()
    """The image encoder's."""
    heads: SerializeAsAny[PartConfig] = SGDConfig()
    """The projection heads'."""


def parse_optim(block: Any) -> OptimConfig:
    """The `optim:` block; a branch, or the `name` of one, that is left out keeps its default."""
    if block is not None and not isinstance(block, dict):
        raise UserError(f"optim: expected a block of keys, got {block!r}")
    for branch in block or {}:
        if branch not in OptimConfig.model_fields:
            raise UserError(f"optim.{branch}: no such key; there are {', '.join(OptimConfig.model_fields)}")
    parts = {}
    for branch, own in (block or {}).items():
        if isinstance(own, dict):
            own = {"name": OptimConfig.model_fields[branch].default.name, **own}
        parts[branch] = parse_part(f"optim.{branch}", OPTIMIZERS, own)
    return OptimConfig(**parts)


class CompositeOptimizer(Optimizer):
    """Several optimizers that step together and look like one.

    Their parameter groups and their state are this optimizer's own, so that learning-rate schedulers, gradient scalers and
    checkpoints reach them.

    Args:
        optimizers: over disjoint parameters.
    """

    def __init__(self, optimizers: list[Optimizer]):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for optimizer in self.optimizers:
            last = first + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[first:last]
            optimizer.state = self.state
            first = last

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Evaluate the closure once, then let every optimizer step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all optimizers from what `state_dict()` gave, with the settings that they were built with."""
        super().load_state_dict(keep_settings(state_dict, self))
        self._share()


def _groups(modules: Iterable[nn.Module], config: PartConfig) -> list[dict]:
    """Trainable parameters in up to two groups: with the configured weight decay, and without any."""
    named = [pair for module in modules for pair in module.named_parameters() if pair[1].requires_grad]
    # Norm weights and biases are the parameters with a single axis.
    exempt = [p for _, p in named if p.ndim <= 1 and not config.decay_norm_and_bias]
    exempt_ids = {id(parameter) for parameter in exempt}
    decayed = [parameter for _, parameter in named if id(parameter) not in exempt_ids]
    groups = [(decayed, config.weight_decay), (exempt, 0.0)]
    return [{"params": params, "weight_decay": decay, "lr": config.lr} for params, decay in groups if params]


def build_optimizer(branches: dict[str, nn.Module], config: OptimConfig) -> CompositeOptimizer:
    """One optimizer for all branches; parameters that do not require a gradient are not handed over.

    Args:
        branches: modules by the name of their block in `optim:`.
        config: the validated block.
    """
    optimizers = []
    for branch, module in branches.items():
        own = getattr(config, branch)
        groups = _groups([module], own)
        for group in groups:
            group["branch"] = branch
        if groups:
            optimizers.append(OPTIMIZERS[own.name].target(groups, own))
    if not optimizers:
        raise UserError("nothing is left to train: every parameter is frozen; lower image_encoder.frozen_stages")
    return CompositeOptimizer(optimizers)


class ConstantConfig(PartConfig):
    """The learning rates stay, after a linear warm-up."""

    name: str = "constant"
    """Which schedule."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rates rise from a hundredth. Default: none (SimIPU)."""


class ExponentialConfig(PartConfig):
    """lr = lr0 * gamma^epoch."""

    name: str = "exponential"
    """Which schedule."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Factor an epoch (SimIPU's released code)."""


class CosineConfig(PartConfig):
    """Half a cosine from the learning rate to zero over all steps, after a linear warm-up (arXiv:1608.03983)."""

    name: str = "cosine"
    """Which schedule."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rates rise from a hundredth, half of the run at most. Default: none."""


class OneCycleConfig(PartConfig):
    """Up to the learning rate and down again (arXiv:1708.07120)."""

    name: str = "onecycle"
    """Which schedule."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the steps that rise (OpenPCDet's PCT_START)."""
    start_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """First learning rate as a share of the highest (OpenPCDet's DIV_FACTOR 10)."""


class StepsConfig(PartConfig):
    """The learning rates are multiplied by `gamma` at every milestone."""

    name: str = "milestones"
    """Which schedule."""
    milestones: tuple[PositiveInt, ...]
    """Epochs, ascending."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor at each (mmdetection's default)."""


def _follow(optimizer: Optimizer, curve: Callable[[int], float]) -> tuple[Curve, str]:
    """Learning rates times `curve(step)`."""
    return Curve(optimizer, curve, "step"), "step"


def _rise(step: int, warmup_steps: int) -> float:
    """Linear from a hundredth to 1 over `warmup_steps`."""
    return 1.0 if step >= warmup_steps else 0.01 + 0.99 * step / warmup_steps


def _half_cosine(share: float) -> float:
    """1 at share 0, 0 at share 1 and beyond."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@SCHEDULES.register("constant", config=ConstantConfig)
def constant(optimizer: Optimizer, config: ConstantConfig, num_steps: int) -> tuple[Any, str]:
    """A scheduler and how often Lightning moves it ("step" or "epoch")."""
    return _follow(optimizer, lambda step: _rise(step, config.warmup_steps))


@SCHEDULES.register("exponential", config=ExponentialConfig)
def exponential(optimizer: Optimizer, config: ExponentialConfig, num_steps: int) -> tuple[Any, str]:
    """Moved once an epoch."""
    return Curve(optimizer, lambda epoch: config.gamma**epoch, "epoch"), "epoch"


@SCHEDULES.register("cosine", config=CosineConfig)
def cosine(optimizer: Optimizer, config: CosineConfig, num_steps: int) -> tuple[Any, str]:
    """Moved every step; reaches zero with the last one."""
    warmup = min(config.warmup_steps, num_steps // 2)
    if warmup < config.warmup_steps:
        log.info("schedule.warmup_steps: %d instead of %d in a run of %d steps", warmup, config.warmup_steps, num_steps)

    def curve(step: int) -> float:
        return _rise(step, warmup) if step < warmup else _half_cosine((step - warmup) / (num_steps - warmup))

    return _follow(optimizer, curve)


@SCHEDULES.register("onecycle", config=OneCycleConfig)
def onecycle(optimizer: Optimizer, config: OneCycleConfig, num_steps: int) -> tuple[Any, str]:
    """Moved every step: half a cosine up, half a cosine down to zero. Momentum stays."""
    top = max(1.0, config.rise * num_steps)

    def curve(step: int) -> float:
        if step < top:
            return 1 - (1 - config.start_factor) * _half_cosine(step / top)
        return _half_cosine((step - top) / max(1.0, num_steps - top))

    return _follow(optimizer, curve)


@SCHEDULES.register("milestones", config=StepsConfig)
def milestones(optimizer: Optimizer, config: StepsConfig, num_steps: int) -> tuple[Any, str]:
    """Moved once an epoch."""
    milestones = sorted(config.milestones)
    return Curve(optimizer, lambda epoch: config.gamma ** bisect_right(milestones, epoch), "epoch"), "epoch"
