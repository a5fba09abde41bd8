"""What happens beside training: numbers, pictures and checkpoints of a run."""

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from simipu3d.contracts.batch import Batch
from simipu3d.contracts.method import Method, Picture
from simipu3d.engine.metrics import average, readable
from simipu3d.engine.metrics_file import MetricsFile
from simipu3d.engine.module import TrainingModule
from simipu3d.engine.run import RunDirectory
from simipu3d.errors import UserError
from simipu3d.pictures import save_png

log = logging.getLogger(__name__)


def peak_memory_gb() -> float:
    """Highest memory use of this process so far, GB: of the GPU where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def training_module(pl_module: LightningModule) -> TrainingModule:
    """Lightning's word for it is wider."""
    assert isinstance(pl_module, TrainingModule)
    return pl_module


def log_every(trainer: Trainer) -> int:
    """`trainer.log_every_n_steps`."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]


def _logger(trainer: Trainer) -> TensorBoardLogger:
    assert isinstance(trainer.logger, TensorBoardLogger)
    return trainer.logger


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
        if step == self._last_step or (step % log_every(trainer) and step != trainer.estimated_stepping_batches):
            return
        names, logger = list(outputs["metrics"]), _logger(trainer)
        frames = torch.tensor([float(batch.num_frames)], device=pl_module.device)
        values = torch.cat([torch.stack([outputs["metrics"][name].detach().float() for name in names]), frames])
        each = trainer.strategy.all_gather(values).reshape(-1, len(names) + 1).tolist()
        averaged = average([(dict(zip(names, own, strict=False)), int(own[-1])) for own in each])
        elapsed = time.perf_counter() - self._since
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": step}
        row |= averaged
        row |= {"samples_per_second": self._frames / elapsed, "peak_memory_gb": peak_memory_gb()}
        row |= self._rates
        self._last_step, self._frames, self._since = step, 0, time.perf_counter()
        if self.file is not None:
            self.file.append(row)
            logger.log_metrics({k: v for k, v in row.items() if k not in ("epoch", "step")}, step=step)
            if not sys.stderr.isatty():
                log.info("%s", self._line(row, trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.file is None:
            return
        numbers = training_module(pl_module).held_out
        held_out = {f"val_{name}": value for name, value in numbers.items()}
        self.file.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **held_out})
        _logger(trainer).log_metrics(held_out, step=trainer.global_step)
        where = f"step {trainer.global_step}/{trainer.estimated_stepping_batches}"
        log.info("%s", "  ".join([where, "held out:", *readable(numbers)]))

    @staticmethod
    def _line(row: dict[str, Any], trainer: Trainer) -> str:
        """One readable line where there is no progress bar."""
        where = f"step {row['step']}/{trainer.estimated_stepping_batches}"
        return "  ".join([where, *readable(row), f"{row['samples_per_second']:.1f} frames/s"])


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
        if trainer.global_step % log_every(trainer) == 0:
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
    """checkpoints/last.ckpt every few steps and at the end; one of every few epochs is kept, and the best one by a held-out
    number.

    Args:
        run: the run's folder.
        every_steps: steps from one last.ckpt to the next.
        keep_every_epochs: epoch_0010.ckpt and so on stay; None keeps none.
    """

    def __init__(self, run: RunDirectory, *, every_steps: int, keep_every_epochs: int | None):
        self.run = run
        self.every_steps = every_steps
        self.keep_every_epochs = keep_every_epochs
        self._due: list[Path] = []

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
            self._due.append(self.run.checkpoints / f"epoch_{epoch:04d}.ckpt")
        if step % self.every_steps == 0 or step >= trainer.estimated_stepping_batches:
            self._due.append(self.run.last)
        if not validates_now(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if training_module(pl_module).improves():
            trainer.save_checkpoint(self.run.best)
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Write what is due. Where a validation follows the step this comes after it: a run that goes on from there neither
        forgets the best number nor leaves the validation out."""
        for path in self._due:
            trainer.save_checkpoint(path)
            if path == self.run.last:
                self._saved = trainer.global_step
        self._due = []


def validates_now(trainer: Trainer) -> bool:
    """Does a validation follow the batch that was just trained on?"""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))  # type: ignore[arg-type]


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
        for name, picture in pictures_of(training_module(pl_module).method, batch).items():
            save_png(self.run.pictures / f"step_{step:06d}_{name}.png", picture)
            _logger(trainer).experiment.add_image(name, picture, step, dataformats="HWC")


@torch.no_grad()
def pictures_of(method: Method, batch: Batch) -> dict[str, Picture]:
    """A method's pictures of a batch; leaves its mode, weights and statistics as they are."""
    was_training = method.training
    method.eval()
    try:
        return method.pictures(batch)
    finally:
        method.train(was_training)
