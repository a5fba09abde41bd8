"""Learning rates as a function of the step, or of the epoch, alone.

Nothing of it is stored: a resumed run follows the curve, the learning rates and the length of its own configuration from
its first step on.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Curve(LambdaLR):
    """Learning rates times `curve(count)`.

    Args:
        optimizer: whose groups hold the rates before the schedule.
        curve: the factor after so many steps or epochs.
        interval: what is counted, and how often Lightning moves it.
    """

    def __init__(self, optimizer: Optimizer, curve: Callable[[int], float], interval: Literal["step", "epoch"]):
        self.interval = interval
        super().__init__(optimizer, curve)

    def state_dict(self) -> dict[str, Any]:
        """The count; the rates follow from it."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the count of the state, or the one that `resume.schedule_states` says for this interval, with the rates
        of this configuration."""
        self.last_epoch = state_dict.get(f"{self.interval}s_done", state_dict["last_epoch"])
        self._step_count = self.last_epoch + 1
        self._last_lr = [
            base * curve(self.last_epoch) for base, curve in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
