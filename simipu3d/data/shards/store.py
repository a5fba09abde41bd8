"""Where do the files of a shard set lie? A folder of this machine, or whatever fsspec has a name for.

Both are used through the same few methods. What cannot be read or written raises `StoreError`, one line; a file appears
whole or not at all (a local one is renamed into its place, a remote one is uploaded in one piece).
"""

import errno
import fcntl
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import fsspec

from simipu3d.errors import UserError

Result = TypeVar("Result")
Intact = Callable[[bytes], bool]

MAX_OPEN_FILES = 32
"""Handles a process keeps; the least recently used one is closed."""
TIMEOUT, RETRIES = 30.0, 3
"""Seconds that one try of a remote read may take, and how often it is tried again: networks fail for moments."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds before the second try; doubled before each further one, up to the longest."""
MAY_PASS = (404, 408, 425, 429)
"""Answers of a web server about the request that another moment may change; the rest of 4xx stays."""


LOCK_SECONDS = 5.0
"""How long a call waits for the worker processes of a killed one, which hold its lock until they notice."""


class StoreError(UserError):
    """A file of the store is absent, or cannot be read or written."""


class Store(Protocol):
    """Files in one place; names are plain file names."""

    url: str

    def path(self, name: str) -> str:
        """What messages call a file."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def read(self, name: str, intact: Intact | None = None) -> bytes:
        """A whole file. `intact` says whether the content is right; a remote one that is not is fetched again, and what
        came last is returned."""

    def read_range(self, name: str, offset: int, size: int, intact: Intact | None = None) -> bytes:
        """`size` bytes of a file; fewer where it ends before. `intact` as for `read`."""

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""

    def put(self, name: str, source: Path) -> None:
        """Take over a local file, whole or not at all; `source` is gone afterwards."""

    def parts_folder(self) -> Path | None:
        """Where a file is best made that `put` will take over; None: anywhere."""

    def names(self) -> list[str] | None:
        """All files, sorted; None where the place cannot tell."""

    def lock(self) -> AbstractContextManager[None]:
        """Keep other writers out, as far as the place can. It ends with the process, whatever ends that."""


def open_store(url: str, timeout: float = TIMEOUT, retries: int = RETRIES) -> "Store":
    """The store at a local path or a URL that fsspec knows (s3://bucket/folder, https://...).

    Args:
        url: where.
        timeout: of one try of a remote read, seconds.
        retries: how often a remote read that failed is tried again.
    """
    if hidden := re.search(r"//[^/@]*:[^/@]*@", url):
        raise StoreError(
            f"{url.replace(hidden[0], '//...@')}: a password in a URL would be written into configurations and logs; give it "
            "to fsspec in its own way (environment variables, or a file in ~/.config/fsspec)"
        )
    protocol, found, rest = url.partition("://")
    if not found:
        return LocalStore(Path(url))
    if protocol in ("file", "local"):
        return LocalStore(Path(rest))
    return RemoteStore(url, timeout, retries)


class LocalStore:
    """A folder. Reads go by position on open handles, so that forked processes may share them; a second look at a
    damaged file would see the same."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, str(folder)
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except OSError:
            return None

    def read(self, name: str, intact: Intact | None = None) -> bytes:
        try:
            with self._plain(name) as file:
                return file.read()
        except OSError as error:
            raise StoreError(f"{self.path(name)}: {_reason(error)}") from error

    def read_range(self, name: str, offset: int, size: int, intact: Intact | None = None) -> bytes:
        try:
            handle = self._handle(name).fileno()
            size = min(size, os.fstat(handle).st_size - offset)  # whatever an index says, no more than there is
            return os.pread(handle, size, offset) if size > 0 else b""
        except OSError as error:
            raise StoreError(f"{self.path(name)}: {_reason(error)}") from error

    def _handle(self, name: str) -> BinaryIO:
        if name not in self._open:
            self._open[name] = self._plain(name)
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]

    def _plain(self, name: str) -> BinaryIO:
        """An open file, which is no pipe: opening one would wait for whoever writes into it."""
        if stat.S_ISFIFO(os.stat(self.folder / name).st_mode):
            raise OSError(errno.EINVAL, "is a pipe, no plain file")
        return open(self.folder / name, "rb", buffering=0)

    def write(self, name: str, content: bytes) -> None:
        part = self.folder / f".{name}.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(part, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, self.folder / name)
                _flush(self.folder)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path(name)}: cannot be written ({_reason(error)})") from error

    def put(self, name: str, source: Path) -> None:
        try:
            _flush(source)
            os.replace(source, self.folder / name)
            _flush(self.folder)
        except OSError as error:
            raise StoreError(f"{self.path(name)}: cannot be written ({_reason(error)})") from error

    def parts_folder(self) -> Path | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be made ({_reason(error)})") from error
        return self.folder

    def names(self) -> list[str] | None:
        try:
            return sorted(os.listdir(self.folder))
        except OSError as error:
            raise StoreError(f"{self.folder}: {_reason(error)}") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        handle = os.open(self.parts_folder(), os.O_RDONLY)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _locked(handle):
                if time.monotonic() > deadline:
                    raise StoreError(f"{self.folder}: another prepare_data writes there; wait for it, or end it")
                time.sleep(0.1)
            yield
        finally:
            os.close(handle)


class _Damaged(Exception):
    """What came is too short, or not what its check sum says."""

    def __init__(self, content: bytes):
        super().__init__("what came is damaged")
        self.content = content


class RemoteStore:
    """Files behind a URL; a forked process opens its own connection. Arguments: see `open_store`."""

    def __init__(self, url: str, timeout: float = TIMEOUT, retries: int = RETRIES):
        self.url = url.rstrip("/")
        self.timeout, self.retries = timeout, retries
        self._connection: tuple[int, Any, str] | None = None
        self._connect()

    def _connect(self) -> tuple[Any, str]:
        """The filesystem and the folder's path in it; connections do not survive a fork."""
        if self._connection is None or self._connection[0] != os.getpid():
            try:
                filesystem, root = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError, OSError) as error:
                raise StoreError(f"{self.url}: cannot be opened: {_reason(error)}") from error
            self._connection = (os.getpid(), filesystem, root.rstrip("/"))
        return self._connection[1:]

    def _fetch(self, name: str, work: Callable[[Any, str], Result]) -> Result:
        """Read something of a file, again where that may help; every filesystem has errors of its own.

        Raises:
            StoreError: it cannot be read, at the latest after (retries + 1) x timeout and the pauses.
        """
        absent = 0
        for again in range(self.retries + 1):
            filesystem, root = self._connect()
            try:
                return _within(self.timeout, lambda: work(filesystem, f"{root}/{name}"))  # noqa: B023  (called at once)
            except StoreError:
                raise
            except Exception as error:
                absent += isinstance(error, FileNotFoundError)
                if again == self.retries or absent > 1 or not _may_pass(error):
                    if isinstance(error, _Damaged):
                        return error.content
                    raise StoreError(f"{self.path(name)}: {_reason(error)}") from error
                if isinstance(error, TimeoutError):  # its connection is still waiting
                    filesystem.clear_instance_cache()
                    self._connection = None
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**again))
        raise AssertionError("the last try returns or raises")

    def _upload(self, name: str, work: Callable[[Any, str], None]) -> None:
        """Write a file, once and without a time limit: its size decides how long that takes."""
        filesystem, root = self._connect()
        try:
            work(filesystem, f"{root}/{name}")
        except Exception as error:
            raise StoreError(f"{self.path(name)}: {_reason(error)}") from error

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def size(self, name: str) -> int | None:
        def look(filesystem: Any, path: str) -> int | None:
            filesystem.invalidate_cache()
            return filesystem.size(path) if filesystem.exists(path) else None

        return self._fetch(name, look)

    def read(self, name: str, intact: Intact | None = None) -> bytes:
        def whole(filesystem: Any, path: str) -> bytes:
            content = filesystem.cat_file(path)
            if intact is not None and not intact(content):
                raise _Damaged(content)
            return content

        return self._fetch(name, whole)

    def read_range(self, name: str, offset: int, size: int, intact: Intact | None = None) -> bytes:
        def part(filesystem: Any, path: str) -> bytes:
            content = filesystem.cat_file(path, start=offset, end=offset + size)
            if len(content) > size:
                raise StoreError(
                    f"{self.path(name)}: the server sends whole files, not ranges of bytes; copy the set first"
                )
            if len(content) < size or (intact is not None and not intact(content)):
                raise _Damaged(content)
            return content

        return self._fetch(name, part)

    def write(self, name: str, content: bytes) -> None:
        self._upload(name, lambda filesystem, path: _make_and_pipe(filesystem, path, content))

    def put(self, name: str, source: Path) -> None:
        def upload(filesystem: Any, path: str) -> None:
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(source), path)

        self._upload(name, upload)
        source.unlink()

    def parts_folder(self) -> Path | None:
        return None

    def names(self) -> list[str] | None:
        filesystem, root = self._connect()
        try:
            found = _within(self.timeout, lambda: filesystem.ls(root, detail=False))
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)
        except Exception:  # a web server, say, knows files and no folders
            return None

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext()  # two writers upload the same bytes, each file in one piece


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of a call that may take so long; few filesystems have limits of their own, and none of them all.

    Raises:
        TimeoutError: it took longer. Its thread is left behind, and ends with the process at the latest.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _may_pass(error: Exception) -> bool:
    """Could the same call succeed a moment later?"""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in MAY_PASS
    return not isinstance(error, PermissionError | NotImplementedError)


def _flush(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system lets a folder be flushed
            raise
    finally:
        os.close(handle)


def _make_and_pipe(filesystem: Any, path: str, content: bytes) -> None:
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    filesystem.pipe_file(path, content)


def _locked(handle: int) -> bool:
    """Take the lock of an open folder, without waiting; true too where the disk knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
