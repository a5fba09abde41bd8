"""What happens when one of several processes of a run ends before the others?

The first process of a machine starts the others and watches them; each of them watches it. Whoever is left ends within
seconds, with one line and status 2: a collective operation would wait for the lost one for minutes, or for ever. Lightning's
own watch ends the first process by SIGKILL, even when all of them are just ending in order.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from simipu3d.errors import UserError

PARENT_VARIABLE = "SIMIPU3D_RUN_PARENT"
"""Tells the processes of a run which one started them."""
POLL_SECONDS = 0.5
GRACE_SECONDS = 4.0
"""How long a process may take to end in order after another one ended."""
END_SECONDS = 60.0
"""How long the others may take after the first one is through."""
LOST = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|gloo|nccl|tcpstore|process group|socket|timed out",
    re.IGNORECASE,
)
"""What torch.distributed says when the other side is gone."""
WORKER = re.compile(r"DataLoader worker.*(killed|exited)|Pin memory thread exited")
WAY_OUT = "continue with --resume"


class WatchedDDP(DDPStrategy):
    """Lightning's DDP, with processes that watch each other."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None  # Lightning sets it first
        self._launcher = WatchedLauncher(self.cluster_environment, self.num_processes, self.num_nodes)


class WatchedLauncher(_SubprocessScriptLauncher):
    """Starts the processes of this machine, unless srun or torchrun did, and ends them with the first one."""

    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run `function` in all processes.

        Raises:
            UserError: another process was lost.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        parent = os.environ.get(PARENT_VARIABLE)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT_VARIABLE] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT_VARIABLE]
        _set_num_threads_if_needed(num_processes=self.num_processes)
        over = threading.Event()
        if self.procs:
            threading.Thread(target=self._watch_children, args=(over,), daemon=True).start()
        elif parent is not None:
            threading.Thread(target=_watch_parent, args=(int(parent), over), daemon=True).start()
        try:
            result = function(*args, **kwargs)
        except RuntimeError as error:
            lost = self._lost(error, parent)
            if lost is None:
                raise
            raise UserError(lost) from error
        else:
            self._wait(END_SECONDS)
            if line := self._ended():
                raise UserError(line)
            return result
        finally:
            over.set()
            self._wait(GRACE_SECONDS)
            self.kill(signal.SIGKILL)

    def _lost(self, error: RuntimeError, parent: str | None) -> str | None:
        """The line about a lost process, when that is what the error means."""
        if WORKER.search(str(error)) or not (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
            return None
        deadline = time.monotonic() + (GRACE_SECONDS if self.procs else 2 * POLL_SECONDS)
        while time.monotonic() < deadline:  # the connection is closed a moment before the process is gone
            if parent is not None and os.getppid() != int(parent):
                _end(_parent_is_gone(), speaks=os.environ.get("LOCAL_RANK") == "1")
            if line := self._ended():
                return line
            time.sleep(POLL_SECONDS / 5)
        return f"another process of this run is gone, or the network failed; {WAY_OUT}"

    def _ended(self) -> str | None:
        for rank, process in enumerate(self.procs, 1):
            if process.poll():
                return (
                    f"process {rank} of {self.num_processes} (pid {process.pid}) {_how(process.returncode)}; {WAY_OUT}"
                )
        return None

    def _watch_children(self, over: threading.Event) -> None:
        while not over.wait(POLL_SECONDS):
            line = self._ended()
            if line and not over.wait(GRACE_SECONDS):
                self.kill(signal.SIGKILL)
                _end(line, speaks=True)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self.procs:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return


def _how(returncode: int) -> str:
    if returncode > 0:
        return f"ended with status {returncode}"
    return f"was killed by {signal.Signals(-returncode).name}"


def _parent_is_gone() -> str:
    return f"the first process of this run was killed; {WAY_OUT}"


def _watch_parent(parent: int, over: threading.Event) -> None:
    while not over.wait(POLL_SECONDS):
        if os.getppid() != parent and not over.wait(GRACE_SECONDS):
            _end(_parent_is_gone(), speaks=os.environ.get("LOCAL_RANK") == "1")


def _end(line: str, *, speaks: bool) -> None:
    """End this process from any thread: the main one may wait in a collective operation for ever."""
    if speaks:
        print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def lost_worker(error: Exception) -> UserError | None:
    """The line about a killed data worker, when that is what the error means: torch says so, or its batch cannot be
    fetched any more."""
    refused = isinstance(error, OSError | EOFError) and passed_through(error, "torch.multiprocessing.reductions")
    if not (refused or WORKER.search(str(error))):
        return None
    return UserError(
        "a data worker was killed, by a signal or for want of memory (shared memory, /dev/shm, included); continue with "
        "--resume, perhaps with another data.num_workers"
    )


def passed_through(error: BaseException, module: str) -> bool:
    """Was a function of the module at work when the error was raised?"""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == module:
            return True
        trace = trace.tb_next
    return False
