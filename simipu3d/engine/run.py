"""What does a run leave on disk, and how is it taken up again?

config.yaml            resolved configuration
environment.json       versions, device, git commit, command line (one entry a start)
init.txt               with --init: every tensor that was used, left as drawn, or not used
metrics.csv            a row a logging step; on resume, later rows are cut
tensorboard/           the same, and pictures
checkpoints/last.ckpt  and the kept ones; written whole or not at all; read with weights_only
pictures/              projected points, matched pairs, feature maps as colours
"""

import json
import logging
import os
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
from simipu3d.errors import UserError
from simipu3d.weights.files import RUN_KEYS, read_checkpoint

log = logging.getLogger(__name__)

RESUMABLE_CHANGES = ("trainer.", "run.", "data.num_workers", "data.root", "image_encoder.gradient_checkpointing")
"""Keys that may differ between a run and its continuation."""


RESUME_KEYS = {*RUN_KEYS, "position", "bad_frames", "num_samples", "world_size"}
"""What the `simipu3d` block of a checkpoint holds at least, to go on with the run."""


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints are written beside their place and renamed; a killed process leaves the old one. Reading runs no code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

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
        resume: None for a fresh start; "" for last.ckpt of the folder (or a fresh start where there is none); else a path.

    Raises:
        UserError: the folder holds a run, is not writable, or the configuration differs from the run's.
    """

    def __init__(self, path: Path, resolved: dict[str, Any], resume: str | None):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.checkpoint: Path | None = None
        self.resumed_step: int | None = None
        # A run that died before its first row or checkpoint leaves nothing worth keeping.
        metrics = path / "metrics.csv"
        holds_run = any(self.checkpoints.glob("*.ckpt")) or (metrics.exists() and metrics.stat().st_size > 0)
        if resume is None and holds_run:
            raise UserError(f"{path}: holds a run already; continue it with --resume, or choose another --out")
        if resume and holds_run and Path(resume).resolve().parent != self.checkpoints.resolve():
            raise UserError(f"{path}: holds another run than {resume}; choose another --out")
        if resume:
            self.checkpoint = Path(resume)
        elif resume is not None and self.last.exists():
            self.checkpoint = self.last
        if self.checkpoint is not None:
            self._check_same_run(resolved)
        elif resume is not None:
            log.info("no checkpoint in %s: starting afresh", path)

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    def _check_same_run(self, resolved: dict[str, Any]) -> None:
        checkpoint = read_checkpoint(self.checkpoint)
        old = checkpoint["simipu3d"]
        if {"optimizer_states", "lr_schedulers", "loops"} - checkpoint.keys() or RESUME_KEYS - old.keys():
            raise UserError(f"{self.checkpoint}: holds weights but no state of a run; start from it with --init")
        self.resumed_step = old["global_step"]
        if old["config"]["method"] != resolved["method"]:
            raise UserError(
                f"{self.checkpoint}: a checkpoint of the method {old['config']['method']!r}, the configuration asks for "
                f"{resolved['method']!r}; --init starts a new run from its weights"
            )
        changes = changed_keys(old["config"], resolved)
        for key, (before, after) in changes.items():
            log.info("changed since the checkpoint: %s: %s -> %s", key, before, after)
        refused = [key for key in changes if not key.startswith(RESUMABLE_CHANGES)]
        if refused:
            raise UserError(
                f"{self.checkpoint}: was made with another value of {', '.join(refused)}; only trainer.*, run.*, "
                "data.num_workers, data.root and image_encoder.gradient_checkpointing may change on --resume; --init "
                "starts a new run from its weights"
            )

    def create(self, resolved: dict[str, Any]) -> None:
        """Make the folder and write config.yaml and environment.json."""
        try:
            for folder in (self.path, self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "config.yaml", dump_yaml(resolved))
            file = self.path / "environment.json"
            starts = json.loads(file.read_text()) if file.exists() and self.checkpoint else []
            write_whole(file, json.dumps([*starts, environment()], indent=1))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        if not os.access(self.path, os.W_OK):
            raise UserError(f"{self.path}: cannot be written; choose another --out")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


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
