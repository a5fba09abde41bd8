"""How does a configuration become a run?

The way: `tools/pretrain.py` -> here -> `methods/simipu.py` -> `contrast/info_nce.py`.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from simipu3d.contracts.frame import FrameReader
from simipu3d.contracts.method import DataInfo, Method
from simipu3d.data.calibration_check import warn_if_calibration_seems_off
from simipu3d.data.loading.loader import (
    build_reader,
    check_enough_frames,
    check_gives,
    wants_of,
)
from simipu3d.engine.callbacks import Checkpoints, FiniteLoss, Metrics, Pictures, Progress
from simipu3d.engine.disk import disk_errors, write_whole
from simipu3d.engine.limits import allow_open_files
from simipu3d.engine.module import TrainingModule
from simipu3d.engine.optim import check_branches
from simipu3d.engine.processes import WatchedDDP, lost_worker
from simipu3d.engine.resume import check_fits, not_restored
from simipu3d.engine.run import AtomicCheckpointIO, RunDirectory, default_out
from simipu3d.engine.settings import Settings, TrainerConfig, load_settings
from simipu3d.engine.signals import StopAtStep, StopSignals, leave_signals
from simipu3d.engine.slurm import processes_of_job
from simipu3d.errors import UserError
from simipu3d.registry import METHODS
from simipu3d.weights.files import read_checkpoint
from simipu3d.weights.load import load_weights

log = logging.getLogger(__name__)

OUT_VARIABLE = "SIMIPU3D_RUN_OUT"
"""Tells the processes that Lightning starts for DDP which folder the first one chose."""


def build_method(settings: Settings, data: DataInfo) -> Method:
    """The method with weights drawn from the configuration's seed.

    Raises:
        UserError: a part cannot be built, or `optim:` names a branch that the method has not.
    """
    torch.manual_seed(settings.seed)
    method = METHODS[settings.method].target(settings.blocks, data)
    check_branches(method, settings.optim)
    return method


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


def build_trainer(settings: Settings, run: RunDirectory, stop: StopSignals) -> pl.Trainer:
    """Lightning's Trainer for a run."""
    own = settings.trainer
    callbacks: list[pl.Callback] = [
        FiniteLoss(),
        Metrics(run, resumed=run.checkpoint is not None),
        Pictures(run, every_steps=settings.run.pictures_every_steps),
        Checkpoints(
            run, every_steps=settings.run.checkpoint_every_steps, keep_every_epochs=settings.run.keep_every_epochs
        ),
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
        limit_val_batches=own.limit_val_batches if settings.validate is not None else 0,
        check_val_every_n_epoch=own.check_val_every_n_epoch,
        val_check_interval=own.val_check_interval,
        num_sanity_val_steps=0,
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


def build_module(
    settings: Settings, run: RunDirectory, init: Path | None = None, *, partial: bool = False
) -> TrainingModule:
    """Data sets and method of a run, with the weights it starts from; `init` and `partial` count for a fresh run only."""
    needs = settings.needs
    reader = build_reader(settings.data, wants_of(needs))
    check_gives(reader, needs, settings.data)
    processes = (1 if settings.trainer.devices == "auto" else settings.trainer.devices) * settings.trainer.num_nodes
    check_enough_frames(settings.data, len(reader), processes)
    method = build_method(settings, DataInfo(tuple(reader.point_columns), tuple(reader.class_names)))
    held_out = None
    if settings.validate_data is not None:
        held_out = build_reader(settings.validate_data, wants_of(needs))
        check_gives(held_out, needs, settings.validate_data)
        if (settings.data.name, settings.data.root) == (settings.validate_data.name, settings.validate_data.root):
            warn_of_overlap(reader, held_out)
    init_lines = None
    if run.checkpoint is not None:
        check_fits(read_checkpoint(run.checkpoint), method, run.checkpoint)
    elif init is not None:
        init_lines = load_weights(method, init, partial=partial)
    module = TrainingModule(settings, method, reader, held_out)
    module.init_lines = init_lines
    return module


def warn_of_overlap(reader: FrameReader, held_out: FrameReader) -> None:
    """Say how many held-out frames are trained on, where the data sets name their frames."""
    both = set(reader.frame_ids) & set(held_out.frame_ids)
    if both:
        log.warning(
            "validate: %d of %d held-out frames are in the training list too (%s, ...), so the held-out numbers are too good; "
            "choose another validate.data.split",
            len(both),
            len(held_out),
            min(both),
        )


def pretrain(
    cfg: str | Path,
    sets: list[str] | None = None,
    *,
    out: Path | None = None,
    resume: str | None = None,
    init: Path | None = None,
    partial: bool = False,
) -> Path:
    """Pre-train as a configuration file says.

    Args:
        cfg: the configuration file.
        sets: `key=value` pairs over it.
        out: the run's folder; None: runs/<configuration>-<time>.
        resume: None for a fresh run; "" for the last checkpoint of `out`, if there is one; else a checkpoint's path.
        init: a checkpoint whose weights a fresh run starts from.
        partial: take `init` also where it fills less than 95 % of a network's trainable tensors.

    Returns:
        The run's folder.

    Raises:
        UserError: what the user can mend, in one line.
        Stopped: a signal ended the run; its checkpoint is written.
    """
    if resume and init is not None:
        raise UserError("--init: a resumed run has its weights already; leave out --init or --resume")
    first_process = getattr(pl.utilities.rank_zero_only, "rank", None) in (0, None)
    _quiet_lightning(first_process)
    settings = load_settings(cfg, sets)
    _check_devices(settings.trainer)
    allow_open_files(settings.data.num_workers)
    if resume == "" and out is None:
        raise UserError("--resume: say which run with --out DIR, or which checkpoint with --resume FILE")
    if resume and out is None:
        out = Path(resume).resolve().parent.parent
    out = Path(os.environ.get(OUT_VARIABLE) or out or default_out(cfg))
    with StopSignals(first_process, out) as stop:
        _train(settings, out, resume if first_process else resume or "", stop, init=init, partial=partial)
    return out


def _train(
    settings: Settings, out: Path, resume: str | None, stop: StopSignals, *, init: Path | None, partial: bool
) -> None:
    """The work of `pretrain` in its folder, which is locked meanwhile."""
    run = RunDirectory(out, settings.to_plain(), resume, writes=stop.first_process)
    try:
        module = build_module(settings, run, init, partial=partial)
        if stop.first_process:
            module.reader.prepare()
            if module.held_out_reader is not None:
                module.held_out_reader.prepare()
            run.create(settings.to_plain())
            if module.init_lines is not None:
                write_whole(out / "init.txt", "\n".join(module.init_lines) + "\n")
            os.environ[OUT_VARIABLE] = str(out)
            if run.checkpoint is None and settings.needs.point_views and settings.needs.image_views:
                warn_if_calibration_seems_off(module.reader, settings.run.calibration_frames)
        if run.checkpoint is not None:
            log.info("resuming from step %d: %s", run.resumed_step, run.checkpoint)
        with disk_errors(out):
            build_trainer(settings, run, stop).fit(module, ckpt_path=run.checkpoint, weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        known = None if isinstance(error, UserError) else lost_worker(error) or not_restored(error, run.checkpoint)
        if known is None:
            raise
        raise known from error
    finally:
        run.release()
        if stop.first_process:
            os.environ.pop(OUT_VARIABLE, None)
