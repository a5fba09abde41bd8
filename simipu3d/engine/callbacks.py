"""What happens beside training: numbers, pictures and checkpoints of a run."""

import logging
import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from torch import Tensor

from simipu3d.contracts.batch import Batch
from simipu3d.engine.metrics_file import MetricsFile
from simipu3d.engine.run import RunDirectory
from simipu3d.errors import UserError
from simipu3d.pictures import save_png

log = logging.getLogger(__name__)


def peak_memory_gb() -> float:
    """Highest memory use of this process so far, GB: of the GPU where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def average_over_processes(names: list[str], values: Tensor) -> Tensor:
    """(n,) from (processes, n): what is a mean over rows is weighted by each process's rows, a maximum stays one."""
    column = {name: index for index, name in enumerate(names)}
    result = values.mean(dim=0)
    for name, index in column.items():
        task, _, what = name.partition("_")
        rows = column.get(f"{task}_rows")
        if what in ("loss", "ceiling", "top1") and rows is not None:
            weights = values[:, rows]
            result[index] = (values[:, index] * weights).sum() / weights.sum().clamp(min=1)
        if name.endswith("_max"):
            result[index] = values[:, index].max()
    return result


class Metrics(Callback):
    """Every `log_every_n_steps`: losses and metrics (mean over processes), speed, memory, learning rates.

    Args:
        run: the run's folder.
        resumed: whether its metrics.csv is continued.
    """

    def __init__(self, run: RunDirectory, *, resumed: bool):
        self.run = run
        self.resumed = resumed
        self.file: MetricsFile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.file = MetricsFile(self.run.path / "metrics.csv", trainer.global_step if self.resumed else None)
        self._last_step, self._frames, self._since = trainer.global_step, 0, time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        # After the step the schedule has moved on: these are the rates that the step is made with.
        self._rates = {f"lr_{group['branch']}": group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._frames += batch.num_frames * trainer.world_size
        step = trainer.global_step
        if step == self._last_step or (step % trainer.log_every_n_steps and step != trainer.estimated_stepping_batches):
            return
        names = list(outputs["metrics"])
        values = torch.stack([outputs["metrics"][name].detach().float() for name in names])
        values = average_over_processes(names, trainer.strategy.all_gather(values).reshape(-1, len(names)))
        elapsed = time.perf_counter() - self._since
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": step}
        row |= dict(zip(names, values.tolist(), strict=True))
        row |= {"samples_per_second": self._frames / elapsed, "peak_memory_gb": peak_memory_gb()}
        row |= self._rates
        self._last_step, self._frames, self._since = step, 0, time.perf_counter()
        if self.file is not None:
            self.file.append(row)
            trainer.logger.log_metrics({k: v for k, v in row.items() if k not in ("epoch", "step")}, step=step)
            if not sys.stderr.isatty():
                log.info("%s", self._line(row, trainer))

    @staticmethod
    def _line(row: dict[str, Any], trainer: Trainer) -> str:
        """One readable line where there is no progress bar."""
        parts = [f"step {row['step']}/{trainer.estimated_stepping_batches}"]
        for name in ("intra", "inter"):
            if f"{name}_loss" in row:
                loss, ceiling, top1 = (row[f"{name}_{what}"] for what in ("loss", "ceiling", "top1"))
                parts.append(f"{name} {loss:.3f} of {ceiling:.2f} (top-1 {top1:.1%})")
        parts.append(f"{row['samples_per_second']:.1f} frames/s")
        return "  ".join(parts)


class FiniteLoss(Callback):
    """Stops a run whose loss is no number, before a checkpoint could keep the broken weights."""

    def __init__(self) -> None:
        self._broken: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        # Summed up on the device, so that a GPU is not waited for at every step.
        broken = (~torch.isfinite(outputs["loss"].detach())).float()
        self._broken = broken if self._broken is None else self._broken + broken
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if self._broken is not None and trainer.strategy.reduce(self._broken, reduce_op="sum") > 0:
            raise UserError(
                f"the loss is not finite (seen by step {trainer.global_step}); lower optim.*.lr, set "
                "trainer.gradient_clip_val, or use trainer.precision=32-true; the last checkpoint is from before"
            )


class Checkpoints(Checkpoint):
    """checkpoints/last.ckpt every few steps and at the end; one of every few epochs is kept.

    Args:
        run: the run's folder.
        every_steps: steps from one last.ckpt to the next.
        keep_every_epochs: epoch_0010.ckpt and so on stay; None keeps none.
    """

    def __init__(self, run: RunDirectory, *, every_steps: int, keep_every_epochs: int | None):
        self.run = run
        self.every_steps = every_steps
        self.keep_every_epochs = keep_every_epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        if step == self._saved:
            return
        ends_epoch = batch_idx + 1 == trainer.num_training_batches
        if ends_epoch and self.keep_every_epochs and epoch % self.keep_every_epochs == 0:
            trainer.save_checkpoint(self.run.checkpoints / f"epoch_{epoch:04d}.ckpt")
        if step % self.every_steps == 0 or step >= trainer.estimated_stepping_batches:
            trainer.save_checkpoint(self.run.last)
            self._saved = step


class Progress(RichProgressBar):
    """Lightning's bar of an epoch, beside the step of the whole run."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {"step": f"{trainer.global_step}/{trainer.estimated_stepping_batches}", **metrics}


class Pictures(Callback):
    """Every few steps, and at the first: what the method sees in its batch, into pictures/ and TensorBoard.

    Args:
        run: the run's folder.
        every_steps: 0 draws none.
    """

    def __init__(self, run: RunDirectory, *, every_steps: int):
        self.run = run
        self.every_steps = every_steps
        self._drawn = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every_steps and (step == 1 or step % self.every_steps == 0)
        if not due or step == self._drawn or not trainer.is_global_zero:
            return
        self._drawn = step
        for name, picture in pl_module.method.pictures(batch).items():
            save_png(self.run.pictures / f"step_{step:06d}_{name}.png", picture)
            trainer.logger.experiment.add_image(name, picture, step, dataformats="HWC")
