"""What does Lightning see of a method? Steps, validation, optimizers, seeds, and what a checkpoint remembers."""

import logging
import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

import simipu3d
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import FrameReader
from simipu3d.contracts.method import Method
from simipu3d.data.loading.evaluation import make_evaluation_loader
from simipu3d.data.loading.loader import BadFrameLimit, make_loader
from simipu3d.data.loading.order import EpochSampler
from simipu3d.engine.metrics import average
from simipu3d.engine.optim import build_optimizer
from simipu3d.engine.resume import check_progress, schedule_states
from simipu3d.engine.run import git_commit
from simipu3d.engine.settings import Settings
from simipu3d.errors import UserError
from simipu3d.registry import SCHEDULES

log = logging.getLogger(__name__)

Measured = tuple[int, int, dict[str, float], list[dict[str, Any]]]
"""A held-out batch: its number, its frames, the method's numbers, the method's records."""


class TrainingModule(pl.LightningModule):
    """A method inside Lightning: steps, validation, optimizers, seeds, and what a checkpoint remembers.

    Args:
        settings: of the run.
        method: what is trained.
        reader: the data set.
        held_out_reader: the frames of `validate:`, if there are any.

    Attributes:
        held_out: the numbers of the last validation.
        best: the best held-out number so far and its step, or None.
    """

    def __init__(
        self, settings: Settings, method: Method, reader: FrameReader, held_out_reader: FrameReader | None = None
    ):
        super().__init__()
        self.settings = settings
        self.method = method
        self.reader, self.held_out_reader = reader, held_out_reader
        self.bad_frames = BadFrameLimit(settings.data, len(reader))
        self.start = (0, 0)
        self.init_lines: list[str] | None = None
        self.commit = git_commit()
        self.held_out: dict[str, float] = {}
        self.best: dict[str, float] | None = None
        self._measured: list[Measured] = []

    def configure_model(self) -> None:
        self.method.sync_norms(self.trainer.strategy.root_device.type)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._agree_on_bad_frames(batch)
        seed_step(self.settings.seed, self.global_step, batch_idx, self.global_rank)
        self.method.before_step(self.global_step, int(self.trainer.estimated_stepping_batches))

    def _agree_on_bad_frames(self, batch: Batch) -> None:
        """Count the bad frames of all processes in every process, so that all stop with the same line, or none."""
        found = self._all_found(batch)
        self.bad_frames.add([message for messages, _ in found for message in messages])
        if any(num_frames < self.settings.data.batch_size for _, num_frames in found):
            raise UserError(
                f"data.on_bad_frame: too few usable frames are left for batches of {self.settings.data.batch_size} in one "
                "process; lower data.batch_size, use fewer processes, or mend the frames"
            )

    def _all_found(self, batch: Batch) -> list[tuple[list[str], int]]:
        """Messages and frames of every process's batch; of this process alone where no process has a message."""
        found: list[Any] = [(list(batch.bad_frames), batch.num_frames)]
        if self.trainer.world_size > 1:
            anything = torch.tensor([float(bool(batch.bad_frames))], device=self.device)
            if self.trainer.strategy.reduce(anything, reduce_op="sum").item():
                found = [None] * self.trainer.world_size
                torch.distributed.all_gather_object(found, (list(batch.bad_frames), batch.num_frames))
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        metrics = self.method(batch)
        if "loss" not in metrics:
            name = self.settings.method
            raise UserError(f"method {name}: its forward returns {', '.join(metrics) or 'nothing'} and no loss")
        for name, value in metrics.items():
            if name.endswith("_loss"):
                self.log(name, value.detach(), prog_bar=True, logger=False, batch_size=batch.num_frames)
        return {"loss": metrics["loss"], "metrics": metrics}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.method.after_step()

    def configure_optimizers(self) -> Any:  # Lightning's own type names a class of its own for this dictionary
        own = self.settings
        frames = own.data.batch_size * self.trainer.world_size * own.trainer.accumulate_grad_batches
        optimizer = build_optimizer(self.method.branches(), own.optim, frames)
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler, interval = SCHEDULES.of(own.schedule).target(optimizer, own.schedule, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        rank, world_size, own = self.trainer.global_rank, self.trainer.world_size, self.settings
        loader = make_loader(own.data, own.augment, self.settings.needs, own.seed, rank, world_size, self.reader)
        assert isinstance(loader.batch_sampler, EpochSampler)
        loader.batch_sampler.start(*self.start)
        return loader

    def val_dataloader(self) -> torch.utils.data.DataLoader | list:
        if self.settings.validate_data is None or self.held_out_reader is None:
            return []
        return make_evaluation_loader(
            self.settings.validate_data,
            self.settings.augment,
            self.settings.needs,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.held_out_reader,
        )

    def on_validation_epoch_start(self) -> None:
        self._measured = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        number = batch_idx * self.trainer.world_size + self.global_rank  # of the batch, as one process counts them
        seed_step(self.settings.seed, 0, number, 0)
        metrics = {name: float(value) for name, value in self.method(batch).items()}
        if batch.num_frames:
            records = self.method.condense(self.method.predict(batch))
            self._measured.append((number, batch.num_frames, metrics, records))

    def on_validation_epoch_end(self) -> None:
        gathered: list[Any] = [self._measured]
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self._measured)
        measured = sorted((part for own in gathered for part in own), key=lambda part: part[0])
        self.held_out = average([(metrics, frames) for _, frames, metrics, _ in measured])
        score = self.method.score([record for *_, records in measured for record in records])
        self.held_out |= {f"score_{name}": value for name, value in score.items()}

    def improves(self) -> bool:
        """Is the last validation the best so far? Remembers it if so."""
        own = self.settings.validate
        if own is None:
            return False
        name = own.metric if own.metric in self.held_out else f"score_{own.metric}"
        if name not in self.held_out:
            known = ", ".join(key.removeprefix("score_") for key in self.held_out)
            raise UserError(f"validate.metric: no held-out number is called {own.metric}; there are {known}")
        value, sign = self.held_out[name], 1 if own.mode == "max" else -1
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best["value"]):
            return False
        self.best = {"value": value, "step": self.global_step}
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        epoch = self.trainer.current_epoch
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        # Lightning takes a run up in one way when a checkpoint was written before a validation and in another when after it;
        # the former reads the data from the right place.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["completed"] = counts["processed"] - 1
        commit, dirty = self.commit
        checkpoint["simipu3d"] = {
            "version": simipu3d.__version__,
            "git_commit": commit,
            "git_dirty": dirty,
            "num_samples": len(self.reader),
            "point_columns": list(self.reader.point_columns),
            "class_names": list(self.reader.class_names),
            "world_size": self.trainer.world_size,
            "method": self.settings.method,
            "config": self.settings.to_plain(),
            "epoch": self.trainer.current_epoch,
            "global_step": self.global_step,
            "position": [epoch, batches],
            "bad_frames": self.bad_frames.state_dict(),
            "best": self.best,
            "held_out": self.held_out,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["simipu3d"]
        check_progress(checkpoint, self.trainer.fit_loop.state_dict(), Path(str(self.trainer.ckpt_path)))
        if own["num_samples"] != len(self.reader):
            raise UserError(
                f"data.root: holds {len(self.reader)} frames of the split, the run was made with {own['num_samples']}; its place "
                "in the data cannot be found again; --init starts a new run from its weights"
            )
        self.start = (own["position"][0], own["position"][1])
        if own["world_size"] != self.trainer.world_size and self.start[1]:
            self.start = self._place_for_other_processes(own, checkpoint["loops"]["fit_loop"])
        schedule_states(checkpoint["lr_schedulers"], own["global_step"], self.start[0])
        self.bad_frames.load_state_dict(own["bad_frames"])
        self.best = own.get("best")

    def _place_for_other_processes(self, own: dict[str, Any], loop: dict[str, Any]) -> tuple[int, int]:
        """Where a run of another number of processes goes on: behind the frames that were used, on a whole batch."""
        epoch, batches = own["position"]
        each = self.settings.data.batch_size
        full = own["num_samples"] // (each * self.trainer.world_size)
        batches = min(full, -(-batches * own["world_size"] // self.trainer.world_size))
        progress = loop["epoch_loop.batch_progress"]
        progress["current"] = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
        progress["is_last_batch"] = batches == full
        log.info(
            "%d processes instead of %d: at batch %d of epoch %d",
            self.trainer.world_size,
            own["world_size"],
            batches,
            epoch,
        )
        return (epoch + 1, 0) if batches == full else (epoch, batches)


def seed_step(seed: int, step: int, batch: int, rank: int) -> None:
    """Make every draw of a step a function of (seed, step), its batch and the process; nothing before it matters."""
    state = np.random.SeedSequence([seed, step, batch, rank]).generate_state(3)
    torch.manual_seed(int(state[0]))
    random.seed(int(state[1]))
    np.random.seed(int(state[2]))  # noqa: NPY002  (third parties may draw from numpy's global state)
