"""Where do generated frames stay, so that each is generated once?

A frame is one uncompressed .npz without pickle, `<folder>/<key>/<split>/<index>.npz`; the key is a hash of everything
that the frame depends on. A file appears whole or not at all. One that cannot be read is generated again.
"""

import hashlib
import json
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simipu3d.errors import UserError

log = logging.getLogger(__name__)

_DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


def default_folder() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/simipu3d`, or `~/.cache/simipu3d`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "simipu3d"


def content_key(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change when any of the settings does; their order does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_arrays(path: Path, names: list[str]) -> dict[str, NDArray] | None:
    """The arrays called `names` of a stored frame; None when there is no file, or a damaged one (which is logged)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        log.warning(
            "%s: the cached frame is damaged (%s: %s) and is generated again", path, type(error).__name__, error
        )
        return None


def write_arrays(path: Path, arrays: Mapping[str, NDArray]) -> None:
    """Store a frame, whole or not at all; several processes may store the same one.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: the frame cannot be stored ({error}); set data.root to a folder with space that you may write, "
            "or data.cache=false"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
