"""What does a run do when it is asked to stop?

SIGTERM (a scheduler, `kill`), SIGUSR1 (SLURM's warning) and the first Ctrl-C: it ends the step in hand in all processes,
writes checkpoints/last.ckpt, says one line, and ends with 143 (Ctrl-C: 130), so that nobody takes it for finished. After
SIGUSR1 a SLURM job is queued again. A second Ctrl-C ends it at once. Before the first step there is nothing to write.
"""

import logging
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from simipu3d.contracts.batch import Batch
from simipu3d.engine.run import RunDirectory
from simipu3d.errors import Stopped

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE_SECONDS = 60
"""How long `scontrol` may take; SLURM's controller may be busy."""


class StopSignals:
    """Notices the signals while it is entered, in place of whatever handled them before.

    Args:
        first_process: whether this one speaks, and asks for the job to be queued again.
        out: the run's folder, for what is said.
    """

    def __init__(self, first_process: bool, out: Path):
        self.first_process, self.out = first_process, out
        self.number = 0
        """The signal that asked for the stop; 0: none has."""
        self.patient = False
        """Whether steps are made, so that the end of the one in hand is awaited."""
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python has it so
            self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Stopped) and self.number == signal.SIGUSR1 and self.first_process:
            error.message += requeue()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader's worker that has not begun yet
            return
        again, self.number = self.number, self.number or number
        if again and number != signal.SIGINT:
            return
        if again or not self.patient:
            raise self.stopped(None)
        if number == signal.SIGINT and self.first_process:
            os.write(
                2, b"\nending after this step; Ctrl-C again ends at once\n"
            )  # print may be in the middle of a line

    def stopped(self, step: int | None) -> Stopped:
        """What ends the run; `step` is the one just saved, None: none was."""
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        status = 128 + (signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM)
        what = f"stopped by {name}" if step is None else f"stopped by {name} after step {step}, which last.ckpt holds"
        return Stopped(f"{what}; continue with --resume --out {self.out}", status)


class StopAtStep(Checkpoint):
    """Ends the run after a step when any process was asked to. A `Checkpoint`, so that Lightning calls it after all
    others: what the step leaves has been left.

    Args:
        signals: what this process was asked.
        run: the run's folder.
    """

    def __init__(self, signals: StopSignals, run: RunDirectory):
        self.signals = signals
        self.run = run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step
        self.signals.patient = True
        if self._agree(trainer):
            raise self.signals.stopped(None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen:  # gradients are being accumulated: half a step cannot be stored
            return
        self._seen = step
        if self._agree(trainer) and step < trainer.estimated_stepping_batches:
            trainer.save_checkpoint(self.run.last)
            raise self.signals.stopped(step)

    def _agree(self, trainer: Trainer) -> bool:
        """Whether any process was asked to stop; all get the same answer at the same step."""
        if trainer.world_size > 1:
            number = torch.tensor([self.signals.number], dtype=torch.int32, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.signals.number = int(number)
        return self.signals.number != 0


def requeue() -> str:
    """Put the SLURM job of this process into the queue again.

    Returns:
        What to say about it; nothing outside a job.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+", job):
        return ""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=REQUEUE_SECONDS, check=False
        )
        reason = "" if done.returncode == 0 else done.stderr or f"status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if not reason:
        return f"; SLURM job {job} is queued again"
    return f"; SLURM job {job} could not be queued again ({' '.join(reason.split())}): submit it again"


def leave_signals(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: its SIGTERM ends with status 0 and saves nothing, and its SIGUSR1 writes a
    second kind of checkpoint."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
