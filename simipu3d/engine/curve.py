"""Learning rates as a function of the step, or of the epoch, alone.

Nothing of it is stored: a resumed run follows the curve, the learning rates and the length of its own configuration from
its first step on.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Curve(LRScheduler):
    """Learning rates `rate(base, count)`.

    Args:
        optimizer: whose groups hold the rates before the schedule, `base`.
        rate: the rate after so many steps or epochs.
        interval: what is counted, and how often Lightning moves it.
    """

    def __init__(self, optimizer: Optimizer, rate: Callable[[float, int], float], interval: Literal["step", "epoch"]):
        self.rate, self.interval = rate, interval
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of every group at the present count."""
        return [self.rate(float(base), self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The count; the rates follow from it."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the count of the state, or the one that `resume.schedule_states` says for this interval, with the rates
        of this configuration."""
        self.last_epoch = state_dict.get(f"{self.interval}s_done", state_dict["last_epoch"])
        self._step_count = self.last_epoch + 1
        rates = self.get_lr()
        self._last_lr = list(rates)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
