"""How is work on shards, one job each, spread over processes? The results do not depend on how many there are."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simipu3d.errors import UserError

Result = TypeVar("Result")
_worker: dict[str, Any] = {}
"""What a worker process was started with."""


def run_jobs(job: Callable[[int], Result], numbers: Sequence[int], workers: int) -> Iterator[Result]:
    """Results of `job(number)` as they come; one worker is this process itself.

    An error, an interruption or a closed iterator stops the jobs that have not begun, and the others at their next
    `check_stopped`.

    Raises:
        UserError: a process was killed; or whatever a job raises.
    """
    if workers == 1 or len(numbers) < 2:
        yield from map(job, numbers)
        return
    context = get_context("fork")  # a reader may be large, and need not be picklable; a worker has one thread
    stopped = context.Event()
    start = (job, stopped, os.getpid())
    with ProcessPoolExecutor(
        min(workers, len(numbers)), mp_context=context, initializer=_start, initargs=start
    ) as pool:
        futures = [pool.submit(_run, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, by a signal or for want of memory; run again, perhaps with fewer --workers: what is "
                "finished is kept"
            ) from error
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def check_stopped() -> None:
    """Raise `UserError` in a worker whose work nobody waits for any more."""
    if _worker and _worker["stopped"].is_set():
        raise UserError("stopped")


def _start(job: Callable[[int], Any], stopped: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    _worker.update(job=job, stopped=stopped)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker does not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run(number: int) -> Any:
    return _worker["job"](number)


def progress_bar() -> Progress:
    """A bar on stderr that counts frames. It has no thread of its own: processes are forked under it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False, disable=not sys.stderr.isatty())
