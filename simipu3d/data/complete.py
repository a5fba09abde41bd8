"""Which part of a download is whole? For a data set of which only some archives were unpacked."""

from pathlib import Path

from simipu3d.data.config import DataConfig
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.readers.base import IncompleteError
from simipu3d.errors import UserError


def write_complete(config: DataConfig, path: Path) -> int:
    """Write the sequences (or, where a data set has none, frames) of the configured split of which every file is there, one a
    line, for `data.split_file`; returns how many.

    Raises:
        UserError: none is whole, the data set does not say before reading which files it needs, or `path` cannot be written.
    """
    try:
        complete = getattr(build_reader(config), "complete", None)
    except IncompleteError as error:
        complete = error.complete
    if complete is None:
        raise UserError(f"data.name: {config.name} has no list of its files to compare with; --list-complete needs one")
    if not complete:
        raise UserError(f"data.root: {config.root}: nothing of split {config.split} is whole; {path} is not written")
    try:
        path.write_text("".join(f"{name}\n" for name in complete), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose a folder that you may write") from error
    return len(complete)
