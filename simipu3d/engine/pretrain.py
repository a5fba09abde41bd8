"""How does a configuration become a pre-training run?

The way: `tools/pretrain.py` -> here -> `methods/simipu.py` -> `contrast/info_nce.py`.
"""

import logging
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import simipu3d
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import FrameReader
from simipu3d.data.loading.loader import BadFrameLimit, build_reader, check_enough_frames, make_loader
from simipu3d.engine.callbacks import Checkpoints, FiniteLoss, Metrics, Pictures, Progress
from simipu3d.engine.disk import disk_errors, write_whole
from simipu3d.engine.init_weights import load_weights
from simipu3d.engine.limits import allow_open_files
from simipu3d.engine.optim import build_optimizer
from simipu3d.engine.processes import WatchedDDP, lost_worker
from simipu3d.engine.resume import check_fits, check_progress, not_restored, schedule_states
from simipu3d.engine.run import AtomicCheckpointIO, RunDirectory, default_out, git_commit, read_checkpoint
from simipu3d.engine.settings import PretrainConfig, TrainerConfig, load_pretrain_config
from simipu3d.engine.signals import StopAtStep, StopSignals, leave_signals
from simipu3d.engine.slurm import processes_of_job
from simipu3d.errors import UserError
from simipu3d.registry import METHODS, SCHEDULES

log = logging.getLogger(__name__)

OUT_VARIABLE = "SIMIPU3D_RUN_OUT"
"""Tells the processes that Lightning starts for DDP which folder the first one chose."""


class PretrainModule(pl.LightningModule):
    """A method inside Lightning: steps, optimizers, seeds, and what a checkpoint remembers.

    Args:
        config: of the run.
        method: the module to train.
        reader: the data set.
        limit: counts bad frames.
    """

    def __init__(self, config: PretrainConfig, method: torch.nn.Module, reader: FrameReader, limit: BadFrameLimit):
        super().__init__()
        self.config = config
        self.method = method
        self.reader = reader
        self.bad_frames = limit
        self.start = (0, 0)
        self.init_lines: list[str] | None = None
        self.commit = git_commit()

    def configure_model(self) -> None:
        self.method.sync_norms(self.trainer.strategy.root_device.type)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._agree_on_bad_frames(batch)
        seed_step(self.config.seed, self.global_step, batch_idx, self.global_rank)

    def _agree_on_bad_frames(self, batch: Batch) -> None:
        """Count the bad frames of all processes in every process, so that all stop with the same line, or none."""
        found = [(list(batch.bad_frames), batch.num_frames)]
        if self.trainer.world_size > 1:
            anything = torch.tensor([float(bool(batch.bad_frames))], device=self.device)
            if self.trainer.strategy.reduce(anything, reduce_op="sum").item():
                found = [None] * self.trainer.world_size
                torch.distributed.all_gather_object(found, (list(batch.bad_frames), batch.num_frames))
        self.bad_frames.add([message for messages, _ in found for message in messages])
        if any(num_frames < self.config.data.batch_size for _, num_frames in found):
            raise UserError(
                f"data.on_bad_frame: too few usable frames are left for batches of {self.config.data.batch_size} in one "
                "process; lower data.batch_size, use fewer processes, or mend the frames"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        metrics = self.method(batch)
        for name in ("intra_loss", "inter_loss"):
            if name in metrics:
                self.log(name, metrics[name].detach(), prog_bar=True, logger=False, batch_size=batch.num_frames)
        return {"loss": metrics["loss"], "metrics": metrics}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.method.branches(), self.config.optim)
        num_steps = int(self.trainer.estimated_stepping_batches)
        entry = SCHEDULES[self.config.schedule.name]
        scheduler, interval = entry.target(optimizer, self.config.schedule, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        loader = make_loader(self.config.data, self.config.seed, rank, world_size, self.reader)
        loader.batch_sampler.start(*self.start)
        return loader

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        epoch = self.trainer.current_epoch
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        commit, dirty = self.commit
        checkpoint["simipu3d"] = {
            "version": simipu3d.__version__,
            "git_commit": commit,
            "git_dirty": dirty,
            "num_samples": len(self.reader),
            "point_columns": list(self.reader.point_columns),
            "world_size": self.trainer.world_size,
            "method": self.config.method,
            "config": self.config.to_plain(),
            "epoch": self.trainer.current_epoch,
            "global_step": self.global_step,
            "position": [epoch, batches],
            "bad_frames": self.bad_frames.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["simipu3d"]
        check_progress(checkpoint, self.trainer.fit_loop.state_dict(), Path(self.trainer.ckpt_path))
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

    def _place_for_other_processes(self, own: dict[str, Any], loop: dict[str, Any]) -> tuple[int, int]:
        """Where a run of another number of processes goes on: behind the frames that were used, on a whole batch."""
        epoch, batches = own["position"]
        each = self.config.data.batch_size
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


def build_method(config: PretrainConfig, point_columns: tuple[str, ...]) -> torch.nn.Module:
    """The method with weights drawn from the configuration's seed."""
    torch.manual_seed(config.seed)
    return METHODS[config.method].target(config.blocks, point_columns=point_columns)


def _check_devices(config: TrainerConfig) -> None:
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = config.accelerator in ("gpu", "cuda")
    if asked and not present:
        raise UserError(
            f"trainer.accelerator: {config.accelerator} was asked for and torch {torch.__version__} sees no GPU; "
            "use trainer.accelerator=auto, or install a CUDA build of torch"
        )
    uses_gpu = asked or (config.accelerator == "auto" and present)
    if uses_gpu and config.devices != "auto" and config.devices > present:
        raise UserError(
            f"trainer.devices: {config.devices} GPUs were asked for, there are {present}; lower it, or set "
            "trainer.accelerator=cpu"
        )


def _quiet_lightning(first_process: bool) -> None:
    """Lightning's advertisements and its warnings about what this package does in its own way stay unsaid; of several
    processes one speaks."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not first_process:
        logging.getLogger("simipu3d").setLevel(logging.WARNING)
    for message in (
        ".*your dataloader is not resumable.*",  # the sampler's position is in the checkpoint
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def build_trainer(config: PretrainConfig, run: RunDirectory, stop: StopSignals) -> pl.Trainer:
    """Lightning's Trainer for a run."""
    own = config.trainer
    callbacks: list[pl.Callback] = [
        FiniteLoss(),
        Metrics(run, resumed=run.checkpoint is not None),
        Pictures(run, every_steps=config.run.pictures_every_steps),
        Checkpoints(run, every_steps=config.run.checkpoint_every_steps, keep_every_epochs=config.run.keep_every_epochs),
        StopAtStep(stop, run),
    ]
    if sys.stderr.isatty():
        callbacks.append(Progress())
    many = own.devices != 1 or own.num_nodes != 1
    processes = processes_of_job(own.devices, own.num_nodes)
    trainer = pl.Trainer(
        max_steps=own.max_steps,
        max_epochs=own.max_epochs,
        accelerator=own.accelerator,
        devices=own.devices,
        num_nodes=own.num_nodes,
        strategy=WatchedDDP(find_unused_parameters=False) if many else "auto",
        precision=own.precision,
        accumulate_grad_batches=own.accumulate_grad_batches,
        gradient_clip_val=own.gradient_clip_val,
        limit_train_batches=own.limit_train_batches,
        log_every_n_steps=own.log_every_n_steps,
        deterministic=own.deterministic,
        logger=TensorBoardLogger(
            run.path,
            name="tensorboard",
            version="",
            default_hp_metric=False,
            purge_step=0 if run.resumed_step is None else run.resumed_step + 1,
        ),
        plugins=[AtomicCheckpointIO(), *([processes] if processes else [])],
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        default_root_dir=run.path,
    )
    leave_signals(trainer)
    return trainer


def build_module(config: PretrainConfig, run: RunDirectory, init: Path | None = None) -> PretrainModule:
    """Data set and method of a run, with the weights it starts from; `init` counts for a fresh run only."""
    reader = build_reader(config.data)
    processes = (1 if config.trainer.devices == "auto" else config.trainer.devices) * config.trainer.num_nodes
    check_enough_frames(config.data, len(reader), processes)
    method = build_method(config, reader.point_columns)
    init_lines = None
    if run.checkpoint is not None:
        check_fits(read_checkpoint(run.checkpoint), method, run.checkpoint)
    elif init is not None:
        init_lines = load_weights(method, init)
    module = PretrainModule(config, method, reader, BadFrameLimit(config.data, len(reader)))
    module.init_lines = init_lines
    return module


def pretrain(
    cfg: str | Path,
    sets: list[str] | None = None,
    *,
    out: Path | None = None,
    resume: str | None = None,
    init: Path | None = None,
) -> Path:
    """Pre-train as a configuration file says.

    Args:
        cfg: the configuration file.
        sets: `key=value` pairs over it.
        out: the run's folder; None: runs/<configuration>-<time>.
        resume: None for a fresh run; "" for the last checkpoint of `out`, if there is one; else a checkpoint's path.
        init: a checkpoint whose weights a fresh run starts from.

    Returns:
        The run's folder.

    Raises:
        UserError: what the user can mend, in one line.
        Stopped: a signal ended the run; its checkpoint is written.
    """
    if resume and init is not None:
        raise UserError("--init: a resumed run has its weights already; leave out --init or --resume")
    first_process = pl.utilities.rank_zero_only.rank in (0, None)
    _quiet_lightning(first_process)
    config = load_pretrain_config(cfg, sets)
    _check_devices(config.trainer)
    allow_open_files(config.data.num_workers)
    if resume == "" and out is None:
        raise UserError("--resume: say which run with --out DIR, or which checkpoint with --resume FILE")
    if resume and out is None:
        out = Path(resume).resolve().parent.parent
    out = Path(os.environ.get(OUT_VARIABLE) or out or default_out(cfg))
    with StopSignals(first_process, out) as stop:
        _train(config, out, resume if first_process else resume or "", init, stop)
    return out


def _train(config: PretrainConfig, out: Path, resume: str | None, init: Path | None, stop: StopSignals) -> None:
    """The work of `pretrain` in its folder, which is locked meanwhile."""
    run = RunDirectory(out, config.to_plain(), resume, writes=stop.first_process)
    try:
        module = build_module(config, run, init)
        if stop.first_process:
            module.reader.prepare()
            run.create(config.to_plain())
            if module.init_lines is not None:
                write_whole(out / "init.txt", "\n".join(module.init_lines) + "\n")
            os.environ[OUT_VARIABLE] = str(out)
        if run.checkpoint is not None:
            log.info("resuming from step %d: %s", run.resumed_step, run.checkpoint)
        with disk_errors(out):
            build_trainer(config, run, stop).fit(module, ckpt_path=run.checkpoint, weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        known = None if isinstance(error, UserError) else lost_worker(error) or not_restored(error, run.checkpoint)
        if known is None:
            raise
        raise known from error
    finally:
        run.release()
        if stop.first_process:
            os.environ.pop(OUT_VARIABLE, None)
