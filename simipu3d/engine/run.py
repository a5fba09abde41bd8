"""What does a run leave on disk, and how is it taken up again?

config.yaml            resolved configuration
environment.json       versions, device, git commit, command line (one entry a start)
init.txt               with --init: every tensor that was used, kept at its random initialisation, or not used
metrics.csv            a row a logging step; on resume, later rows are cut
tensorboard/           the same, and pictures
checkpoints/last.ckpt  and the kept ones; written whole or not at all; read with weights_only
pictures/              projected points, matched pairs, feature maps as colours
.lock                  held by the process that writes the run
"""

import json
import logging
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

import simipu3d
from simipu3d.config import changed_keys, dump_yaml
from simipu3d.engine.disk import cannot_write, remove_parts, whole_file, write_whole
from simipu3d.engine.lock import RunLock
from simipu3d.engine.resume import SCHEDULED, check_checkpoint, newest_checkpoint
from simipu3d.engine.settings import parse_settings
from simipu3d.errors import UserError
from simipu3d.weights.files import read_checkpoint

log = logging.getLogger(__name__)

RESUMABLE_CHANGES = (
    "trainer.",
    "run.",
    "validate",
    "data.num_workers",
    "data.root",
    "image_encoder.gradient_checkpointing",
)
"""Keys that may differ between a run and its continuation, beside learning rates, weight decay and schedule."""


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints are written beside their place and renamed; a killed process leaves the old one. Reading runs no code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's writer hides the error of the file below one of its own.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain values only, whatever the caller asks for."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint that is no longer kept."""
        Path(path).unlink(missing_ok=True)


def default_out(cfg: str | Path) -> Path:
    """runs/<configuration>-<time>."""
    return Path("runs") / f"{Path(cfg).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


class RunDirectory:
    """The folder of one run, opened for a fresh start or for a continuation.

    Args:
        path: the folder.
        resolved: the whole configuration with every default.
        resume: None for a fresh start; "" for the newest checkpoint of the folder (or a fresh start where there is none);
            else a path.
        writes: whether this process is the one that writes; it locks the folder until `release`.

    Raises:
        UserError: the folder holds a run, is written by another process, is not writable, or the configuration differs
            from the run's.
    """

    def __init__(self, path: Path, resolved: dict[str, Any], resume: str | None, *, writes: bool = False):
        self.path = path
        self.lock = RunLock(path)
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.checkpoint: Path | None = None
        self.resumed_step: int | None = None
        self.fresh = resume is None
        if writes and path.is_dir():
            self._take_lock()
        try:
            self._open(resolved, resume)
        except BaseException:
            self.release()
            raise

    def _open(self, resolved: dict[str, Any], resume: str | None) -> None:
        """Find the checkpoint to go on from, and see that it belongs to this run."""
        if self.fresh:
            self._check_empty()
        if resume and self._holds_run() and Path(resume).resolve().parent != self.checkpoints.resolve():
            raise UserError(f"{self.path}: holds another run than {resume}; choose another --out")
        self.checkpoint = Path(resume) if resume else None if self.fresh else newest_checkpoint(self.checkpoints)
        if self.checkpoint is not None:
            self._check_same_run(self.checkpoint, resolved)
        elif not self.fresh:
            log.info("no checkpoint in %s: starting afresh", self.path)

    def _take_lock(self) -> None:
        try:
            self.lock.take()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def release(self) -> None:
        """Unlock the folder."""
        self.lock.release()

    def _holds_run(self) -> bool:
        # A run that died before its first row or checkpoint leaves nothing worth keeping.
        metrics = self.path / "metrics.csv"
        return any(self.checkpoints.glob("*.ckpt")) or (metrics.exists() and metrics.stat().st_size > 0)

    def _check_empty(self) -> None:
        if self._holds_run():
            raise UserError(f"{self.path}: holds a run already; continue it with --resume, or choose another --out")

    @property
    def last(self) -> Path:
        """Where the newest checkpoint is written."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """The checkpoint with the best held-out number."""
        return self.checkpoints / "best.ckpt"

    def _check_same_run(self, path: Path, resolved: dict[str, Any]) -> None:
        checkpoint = read_checkpoint(path)
        check_checkpoint(checkpoint, path)
        old = checkpoint["simipu3d"]
        self.resumed_step = old["global_step"]
        if old["config"]["method"] != resolved["method"]:
            raise UserError(
                f"{self.checkpoint}: a checkpoint of the method {old['config']['method']!r}, the configuration asks for "
                f"{resolved['method']!r}; --init starts a new run from its weights"
            )
        # Read once more, so that keys which are younger than the checkpoint have their defaults.
        before = parse_settings(old["config"], str(self.checkpoint)).to_plain()
        changes = changed_keys(before, resolved)
        for key, (value, new_value) in changes.items():
            log.info("changed since the checkpoint: %s: %s -> %s", key, value, new_value)
        refused = [key for key in changes if not (key.startswith(RESUMABLE_CHANGES) or SCHEDULED.match(key))]
        if refused:
            raise UserError(
                f"{self.checkpoint}: was made with another value of {', '.join(refused)}; only trainer.*, run.*, "
                "schedule.*, optim.*.lr, optim.*.weight_decay, data.num_workers, data.root and "
                "image_encoder.gradient_checkpointing may change on --resume; --init starts a new run from its weights"
            )

    def create(self, resolved: dict[str, Any]) -> None:
        """Make the folder, lock it, and write config.yaml and environment.json."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            if self.fresh:
                self._check_empty()  # another process may have made a run since this one looked
            for folder in (self.checkpoints, self.pictures):
                folder.mkdir(exist_ok=True)
            for folder in (self.path, self.checkpoints):
                remove_parts(folder)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        starts = self._starts()
        write_whole(self.path / "config.yaml", dump_yaml(resolved))
        write_whole(self.path / "environment.json", json.dumps([*starts, environment()], indent=1))

    def _starts(self) -> list[Any]:
        """The earlier entries of environment.json, for a run that goes on."""
        file = self.path / "environment.json"
        if self.checkpoint is None or not file.exists():
            return []
        try:
            starts = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(starts, list):
                raise ValueError("no list")
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(
                f"{file}: not the list of this run's starts ({' '.join(str(error).split())}); move it away: the run goes on "
                "and writes a new one"
            ) from error
        return starts


def git_commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that the package runs from, and whether files differ from it; None outside a checkout."""
    folder = Path(simipu3d.__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if commit.returncode or changes.returncode:
        return None, None
    return commit.stdout.strip(), bool(changes.stdout.strip())


def environment() -> dict[str, Any]:
    """Versions, device, commit and command line of this process."""
    names = ("torch", "torchvision", "timm", "lightning", "numpy", "scipy", "numba", "pydantic")
    cuda = torch.cuda.is_available()
    commit, dirty = git_commit()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "simipu3d": simipu3d.__version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
    }
