"""May this process open as many files as the run needs?

Batches come from worker processes as file descriptors, a tensor each. Where there are too few of them a worker's sending
thread dies with its batch, and the training process waits for that batch for ever.
"""

import resource

from simipu3d.errors import UserError

BASE, PER_WORKER = 128, 192
"""Descriptors that a run needs itself (libraries, logs, shards, sockets), and for the batches that a worker prefetches."""


def allow_open_files(num_workers: int) -> None:
    """Raise the soft limit of open files to what a run needs.

    Raises:
        UserError: the hard limit is lower.
    """
    needed = BASE + PER_WORKER * num_workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        fits = max(0, (hard - BASE) // PER_WORKER)
        raise UserError(
            f"data.num_workers: {num_workers} need about {needed} open files and this shell allows {hard}; raise it "
            f"(ulimit -Hn, ulimit -n), or set data.num_workers={fits}" + (" or less" if fits else "")
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(needed, 65536), hard))
