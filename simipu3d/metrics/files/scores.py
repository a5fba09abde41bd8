"""What does scoring a benchmark's files give: tables to print and values to keep."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from simipu3d.errors import UserError


class Table(NamedTuple):
    """Cells are text already."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Scores(NamedTuple):
    """What to print, and the same numbers and more for JSON (None where a number does not exist)."""

    tables: list[Table]
    values: dict[str, Any]


def shown(value: float, digits: int = 2) -> str:
    """A number of a table; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def kept(value: float) -> float | None:
    """A number of the JSON file, which knows no NaN."""
    return None if math.isnan(value) else float(value)


def read_names(path: Path) -> list[str]:
    """The names in a list of frames, one a line, as in KITTI's ImageSets."""
    names = read_text(path).split()
    if not names:
        raise UserError(f"{path}: the list names no frame")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names {next(name for name in names if names.count(name) > 1)} twice")
    return names


def read_text(path: Path) -> str:
    """A text file; an empty one is no error."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_bytes(path: Path) -> bytes:
    """A whole file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def same_frames(truth: Path, predictions: Path, suffix: str, frames: Path | None) -> list[str]:
    """The names of the files, without suffix, that both folders hold.

    Args:
        truth, predictions: the folders.
        suffix: of the files.
        frames: a list of the names to score; None takes all files, and then neither folder may lack one of the other's.

    Raises:
        UserError: a folder is missing or holds no such file, or a frame is absent from one of them.
    """
    held = [_stems(folder, suffix) for folder in (truth, predictions)]
    names = sorted(held[0] | held[1]) if frames is None else read_names(frames)
    for folder, own, option in ((predictions, held[1], "--pred"), (truth, held[0], "--gt")):
        absent = [name for name in names if name not in own]
        if absent:
            raise UserError(
                f"{folder}: {len(absent)} of {len(names)} frames are absent from {option} (first: {absent[0]}{suffix}); "
                "a frame without objects has an empty label file; --frames FILE names the frames to score"
            )
    return names


def _stems(folder: Path, suffix: str) -> set[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    stems = {path.name.removesuffix(suffix) for path in folder.iterdir() if path.name.endswith(suffix)}
    if not stems:
        inner = [path for path in folder.rglob(f"*{suffix}")][:1]
        hint = f"; did you mean {inner[0].parent}?" if inner else ""
        raise UserError(f"{folder}: holds no {suffix} file{hint}")
    return stems
