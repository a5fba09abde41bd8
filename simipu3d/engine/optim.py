"""Which optimizer moves which branch, and how do learning rates change?

The branches that a method names may have different optimizers. They are one `torch.optim.Optimizer` to Lightning, so
that steps, clipping, accumulation, mixed precision and schedulers keep their meaning.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal

import torch
import torch.nn as nn
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.optim import Optimizer

from simipu3d.config import PartConfig, parse_block, parse_part, to_plain
from simipu3d.contracts.method import Method
from simipu3d.engine.curve import Curve
from simipu3d.engine.resume import keep_settings
from simipu3d.errors import UserError
from simipu3d.registry import OPTIMIZERS, SCHEDULES

log = logging.getLogger(__name__)

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(PartConfig):
    """What every optimizer's block has."""

    name: str
    """Which optimizer."""
    lr: PositiveFloat
    """Learning rate before the schedule."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay. Default: none."""
    decay_norm_and_bias: bool = False
    """Decay BatchNorm parameters and biases too (the released code does)."""


class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv:1711.05101)."""

    name: str = "adamw"
    """Which optimizer."""
    lr: PositiveFloat = 1e-3
    """Learning rate before the schedule (SimIPU's point encoder)."""
    betas: tuple[Beta, Beta] = (0.95, 0.99)
    """Decay of the running means (SimIPU's point encoder)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (SimIPU's point encoder)."""


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    name: str = "sgd"
    """Which optimizer."""
    lr: PositiveFloat = 0.03
    """Learning rate before the schedule (SimIPU's image encoder and heads; MoCo, arXiv:1911.05722)."""
    momentum: Beta = 0.9
    """Momentum (SimIPU)."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 decay (SimIPU)."""


@OPTIMIZERS.register("adamw", config=AdamWConfig)
def adamw(groups: list[dict], config: AdamWConfig) -> Optimizer:
    """torch's AdamW over groups that carry their own weight decay."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


@OPTIMIZERS.register("sgd", config=SGDConfig)
def sgd(groups: list[dict], config: SGDConfig) -> Optimizer:
    """torch's SGD over groups that carry their own weight decay."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


class ScaleConfig(PartConfig):
    """The keys of the `optim:` block that stand beside the branches."""

    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """How learning rates follow the frames of a step (batch_size x processes x accumulated batches): not at all, in
    proportion (arXiv:1706.02677), or by the square root (arXiv:1404.5997)."""
    reference_batch: PositiveInt = 32
    """Frames a step that the learning rates in the file are meant for, with scale_lr. Default: 8 processes x 4 (SimIPU)."""


@dataclass(frozen=True)
class OptimSettings:
    """The `optim:` block: a rule for batch sizes, and one optimizer a branch."""

    scale: ScaleConfig
    branches: dict[str, OptimizerConfig]

    def to_plain(self) -> dict[str, Any]:
        """Plain YAML values, every default filled in."""
        return {**to_plain(self.scale), **{branch: to_plain(own) for branch, own in self.branches.items()}}

    def lr_factor(self, frames: int) -> float:
        """What learning rates are multiplied by when a step sees so many frames."""
        ratio = frames / self.scale.reference_batch
        return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.scale.scale_lr]


def parse_optim(block: Any, defaults: Mapping[str, Mapping[str, Any]]) -> OptimSettings:
    """The `optim:` block.

    Args:
        block: what the file holds; a branch, or the `name` of one, that is left out keeps its default.
        defaults: `Method.OPTIM`, the default blocks by branch. Which branches a method has is known when it is built; see
            `check_branches`.
    """
    if block is not None and not isinstance(block, dict):
        raise UserError(f"optim: expected a block of keys, got {block!r}")
    block = dict(block or {})
    scale = parse_block("optim", ScaleConfig, {k: block.pop(k) for k in ScaleConfig.model_fields if k in block})
    parts: dict[str, Any] = {b: parse_part(f"optim.{b}", OPTIMIZERS, dict(own)) for b, own in defaults.items()}
    for branch, own in block.items():
        if isinstance(own, dict):
            own = {"name": default_optimizer(branch, defaults), **own}
        parts[branch] = parse_part(f"optim.{branch}", OPTIMIZERS, own)
    return OptimSettings(scale, parts)


def default_optimizer(branch: str, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a branch's optimizer where a configuration says none."""
    return str(defaults.get(branch, {}).get("name", AdamWConfig().name))


def check_branches(method: Method, settings: OptimSettings) -> None:
    """Raise `UserError` when `optim:` names a branch that the method has not."""
    known = [*dict.fromkeys([*method.branches(), *method.OPTIM])]
    for branch in settings.branches:
        if branch not in known:
            raise UserError(f"optim.{branch}: the method has no such branch; there are {', '.join(known)}")


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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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


def _groups(module: nn.Module, config: OptimizerConfig, lr_factor: float) -> list[dict]:
    """Trainable parameters in up to two groups: with the configured weight decay, and without any."""
    named = [pair for pair in module.named_parameters() if pair[1].requires_grad]
    # Norm weights and biases are the parameters with a single axis.
    exempt = [p for _, p in named if p.ndim <= 1 and not config.decay_norm_and_bias]
    exempt_ids = {id(parameter) for parameter in exempt}
    decayed = [parameter for _, parameter in named if id(parameter) not in exempt_ids]
    groups = [(decayed, config.weight_decay), (exempt, 0.0)]
    lr = config.lr * lr_factor
    return [{"params": params, "weight_decay": decay, "lr": lr} for params, decay in groups if params]


def build_optimizer(
    branches: Mapping[str, nn.Module], settings: OptimSettings, frames: int | None = None
) -> CompositeOptimizer:
    """One optimizer for all branches; parameters that do not require a gradient are not handed over.

    Args:
        branches: modules by the name of their block in `optim:`.
        settings: optimizers by branch; one that is not named has AdamW with its defaults.
        frames: of a step, for `optim.scale_lr`; None leaves the learning rates as they are.
    """
    optimizers = []
    factor = 1.0 if frames is None else settings.lr_factor(frames)
    for branch, module in branches.items():
        own = settings.branches.get(branch, AdamWConfig())
        groups = _groups(module, own, factor)
        for group in groups:
            group["branch"] = branch
        if groups:
            optimizers.append(OPTIMIZERS.of(own).target(groups, own))
    if not optimizers:
        raise UserError("nothing is left to train: every parameter of the method is frozen; look at its frozen_stages")
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
    return Curve(optimizer, lambda base, step: base * curve(step), "step"), "step"


def _multiplied(base: float, factor: float, times: int) -> float:
    """base * factor * factor ..., in this order, as torch's own schedulers come to it; a power would be off in the last
    bits."""
    return reduce(lambda rate, _: rate * factor, range(times), base)


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
    return Curve(optimizer, lambda base, epoch: _multiplied(base, config.gamma, epoch), "epoch"), "epoch"


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

    def rate(base: float, epoch: int) -> float:
        return _multiplied(base, config.gamma, bisect_right(milestones, epoch))

    return Curve(optimizer, rate, "epoch"), "epoch"
