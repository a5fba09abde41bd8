"""How does a file of a run reach the disk? Whole or not at all, and flushed before it takes its name.

A power cut after a rename may leave an empty file under the new name unless the content was flushed before it, and the old
file unless the folder was flushed after it. What cannot be written is one line that names the file and the way out.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from simipu3d.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write to a full disk, or beyond a quota, says."""


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one line about a file that cannot be written."""
    reason = error.strerror or type(error).__name__
    if error.errno in FULL:
        return UserError(f"{path}: cannot be written ({reason}); free some space, then continue with --resume")
    return UserError(f"{path}: cannot be written ({reason}); choose another --out, or mend the disk and use --resume")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing, which takes its name when the block ends well, and leaves nothing otherwise.

    Raises:
        UserError: it cannot be written; the old file of that name is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        # Gone after the rename. A folder that is no folder has been named above.
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk; not every file system lets a folder be flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def remove_parts(folder: Path) -> None:
    """Delete what a killed process had half written; for the process that holds the run's lock."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Everything that the block cannot write to the run's folder, one line; TensorBoard's own thread does not print its
    traceback before."""
    hook = threading.excepthook

    def silent_about_disks(args: threading.ExceptHookArgs) -> None:
        # TensorBoard raises the error of its writing thread again in the main one, where it is caught below.
        if not isinstance(args.exc_value, OSError):
            hook(args)

    threading.excepthook = silent_about_disks
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, errno.EIO, errno.EROFS, errno.ESTALE):
            raise
        raise cannot_write(Path(error.filename or folder), error) from error
    finally:
        threading.excepthook = hook
