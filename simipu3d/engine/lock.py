"""Who writes into a run's folder? One process: the one that holds its lock.

A POSIX lock on `.lock` in the folder: it ends with its process, whatever ends that, and the network file systems of
clusters (NFS version 4, or 3 with lockd) pass it on to other machines. The file stays; what it says is for the message only.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from simipu3d.errors import UserError

log = logging.getLogger(__name__)

HELD = (errno.EACCES, errno.EAGAIN)
"""What a lock that another process holds says."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system without locks says."""


class RunLock:
    """The lock of a run's folder. Forked processes do not have it, and closing their copy does not end it.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._handle: int | None = None

    def take(self) -> None:
        """Lock the folder, which exists; nothing where this object has it locked already.

        Raises:
            UserError: another process writes there; the line names it.
            OSError: no lock file can be made there.
        """
        if self._handle is not None:
            return
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            if error.errno in HELD:
                raise UserError(
                    f"{self.folder}: {holder or 'another process'} writes this run; wait for it, end it, or choose another --out"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks: a second process there would not be noticed", self.folder)
            return
        self._handle = handle
        content = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, content.encode(), 0)
        except OSError as error:  # a full disk: the lock holds without the words
            log.warning("%s: %s", self.folder / ".lock", error.strerror)

    def release(self) -> None:
        """Let others in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
