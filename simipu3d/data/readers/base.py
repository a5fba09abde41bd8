"""What do all data sets share? The keys that cut a scan, lists of frames, and what is done about files that are absent.

A reader derives from `BaseReader`. It opens what `wants` names and nothing else, and lets `_cut` take from the scan what
measured nothing and what nobody asked for.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, model_validator
from torch.utils.data import get_worker_info

from simipu3d.contracts.frame import EVERYTHING, Camera, FrameReader, TruthKind, Wants, check_points
from simipu3d.data.config import DataConfig
from simipu3d.data.readers.files import plain_name, text_of
from simipu3d.data.readers.select_points import PointRange, check_point_range, in_frustum, in_range
from simipu3d.errors import BadFrameError, UserError

CAMERA_TRUTH: tuple[Literal["depth", "pixel_class", "pixel_instance"], ...] = ("depth", "pixel_class", "pixel_instance")
"""Ground truth that a `Camera` carries, by the names of its fields."""
POINT_TRUTH: tuple[Literal["point_class", "point_instance"], ...] = ("point_class", "point_instance")
"""Ground truth that a `Frame` carries beside its points, by the names of its fields."""
TRUTH_KINDS: tuple[TruthKind, ...] = get_args(TruthKind)
MOST_ZEROS = 0.02
"""With `no_return: refuse` a scan may hold this share of rows of (0, 0, 0): a driver that writes every ray, also those
without a return, has several times as many."""

log = logging.getLogger(__name__)


class ScanConfig(DataConfig):
    """The keys of the `data:` block that cut a scan."""

    point_range: PointRange | None = None
    """Only points strictly between x, y, z minimum and x, y, z maximum, metres. Default: all."""
    frustum: bool = False
    """Only points that fall into one of the images. Default: the whole scan."""
    no_return: Literal["refuse", "drop"] = "refuse"
    """Rows of a scan that measured nothing, as drivers write them: NaN or infinity, or x = y = z = 0. `refuse`: a frame with
    NaN or infinity, or with more than 2 % of zeros, is a bad frame; `drop`: such rows are left out, and their number is
    reported. Default: a damaged file must not pass for a sparse scan."""
    min_distance: NonNegativeFloat = 0.0
    """A point nearer to the origin of the lidar frame than this is dropped, metres: the car itself. Default: none."""

    @model_validator(mode="after")
    def _check_scan(self) -> "ScanConfig":
        check_point_range(self.point_range)
        return self


class ReaderConfig(ScanConfig):
    """The keys of the `data:` block that every reader of files has."""

    all_is_listed: ClassVar[bool] = False
    """Does `split: all` read `split_file` too?"""
    root: Path
    """The data set's top folder."""
    split_file: Path | None = None
    """Read this list, one name a line, instead of the split's own."""
    features: tuple[str, ...] = ("intensity",)
    """Columns of a point after x, y, z. [] takes none."""

    @model_validator(mode="after")
    def _check_lists(self) -> "ReaderConfig":
        if len(set(self.features)) < len(self.features) or {"x", "y", "z"} & set(self.features):
            raise ValueError(f"features names columns after x, y, z, each once, got {list(self.features)}")
        if self.split == "all" and self.split_file is not None and not self.all_is_listed:
            raise ValueError("split_file: split all reads no list; remove split_file, or set split to another name")
        return self


class IncompleteError(UserError):
    """A part of a download is absent.

    Attributes:
        complete: what `data.split_file` may list of what is there: names of sequences, or of frames.
    """

    def __init__(self, message: str, complete: tuple[str, ...]):
        super().__init__(message)
        self.complete = complete


class BaseReader(FrameReader):
    """A data set that keeps its configuration and what it was asked for."""

    complete: tuple[str, ...] | None = None
    """What `data.split_file` may list so that every file is there: names of sequences, or of frames; None where the reader does
    not look for files before it reads them."""

    config: Any
    """Each reader's own model; that of a reader which cuts scans derives from `ScanConfig`."""

    def __init__(self, config: DataConfig, wants: Wants = EVERYTHING):
        self.config, self.wants = config, wants
        self._has_reported = False

    @property
    def _needs_cameras(self) -> bool:
        """Are calibrations read? The frustum needs them also where nobody needs the images."""
        return self.wants.images or (self.wants.points and bool(getattr(self.config, "frustum", False)))

    def _wanted(self, kind: TruthKind) -> bool:
        """Is this kind of ground truth read? That of pixels and points goes with the images and points."""
        carrier: dict[TruthKind, bool] = {
            **dict.fromkeys(CAMERA_TRUTH, self.wants.images),
            **dict.fromkeys(POINT_TRUTH, self.wants.points),
        }
        return kind in self.wants.truth and carrier.get(kind, True)

    def _no_points(self) -> NDArray[np.float32]:
        """(0, 3 + F): what a frame holds where no points are wanted."""
        return np.zeros((0, len(self.point_columns)), dtype=np.float32)

    def _cut(self, points: NDArray[np.float32], cameras: Sequence[Camera], source: str) -> NDArray[np.bool_]:
        """(N,) bool: which rows of a scan are kept? Arguments and errors as of `_measured` and `_select`."""
        kept = self._measured(points, source)
        kept[kept] = self._select(points[kept], cameras, source)
        return kept

    def _measured(self, points: NDArray[np.float32], source: str) -> NDArray[np.bool_]:
        """(N,) bool: which rows are measurements, by `no_return` and `min_distance`?

        Args:
            points: (N, 3 + F) as the sensor gave them, metres.
            source: names the scan in messages.

        Raises:
            BadFrameError: a row must not be what it is, or none is left.
        """
        config = self.config
        invalid = ~np.isfinite(points).all(axis=1)
        if config.no_return == "refuse" or len(points) == 0:
            check_points(points, source)
        # A number whose square overflows is far away, not near.
        with np.errstate(over="ignore", invalid="ignore"):
            near = self._too_near(points[:, :3]) & ~invalid
        zero = ~points[:, :3].any(axis=1) & ~near & ~invalid
        if config.no_return == "refuse":
            if zero.sum() > MOST_ZEROS * len(points):
                raise BadFrameError(
                    f"{source}: {int(zero.sum())} of {len(points)} rows are (0, 0, 0), so they measured nothing; leave them "
                    "out with data.no_return=drop, or set data.on_bad_frame=skip"
                )
            zero[:] = False
        kept = ~(invalid | zero | near)
        self._report_dropped(source, len(points), (invalid.sum(), zero.sum(), near.sum()))
        if not kept.any():
            raise BadFrameError(
                f"{source}: none of its {len(points)} rows measured anything beyond data.min_distance ({invalid.sum()} are NaN "
                f"or infinite, {zero.sum()} (0, 0, 0), {near.sum()} too near); take the frame off the split, or set "
                "data.on_bad_frame=skip"
            )
        return kept

    def _too_near(self, xyz: NDArray[np.float32]) -> NDArray[np.bool_]:
        """(N,) bool: is the point of (N, 3) nearer than `min_distance`?"""
        return (xyz.astype(np.float64) ** 2).sum(axis=1) < self.config.min_distance**2

    def _report_dropped(self, source: str, number: int, dropped: tuple[int, int, int]) -> None:
        """Say once what is dropped, by the first scan of which something is; of several workers the first one does."""
        worker = get_worker_info()
        if self._has_reported or not any(dropped) or (worker is not None and worker.id):
            return
        self._has_reported = True
        log.info(
            "%s: of %d rows %d are dropped as NaN or infinite, %d as (0, 0, 0) (data.no_return), %d as nearer than "
            "data.min_distance; of further scans this is not said",
            source,
            number,
            *dropped,
        )

    def _select(
        self,
        points: NDArray[np.float32],
        cameras: Sequence[Camera],
        source: str,
        keys: str = "data.point_range and data.frustum",
    ) -> NDArray[np.bool_]:
        """(N,) bool: which points lie inside `point_range` and, with `frustum`, inside one of the images?

        Args:
            points: (N, 3 + F).
            cameras: of the frame; without any, `frustum` takes nothing away. Of an image only its size counts.
            source: names the scan in messages.
            keys: what may have taken points away, in words.

        Raises:
            BadFrameError: no point is left.
        """
        config = self.config
        kept = np.ones(len(points), dtype=np.bool_)
        if config.point_range is not None:
            kept &= in_range(points, config.point_range)
        if config.frustum and cameras:
            kept[kept] = in_frustum(points[kept], cameras)
        if kept.any():
            return kept
        way_out = "check the calibration, or set data.on_bad_frame=skip"
        if config.frustum and cameras and not in_frustum(points, cameras).any():
            raise BadFrameError(f"{source}: no camera sees any of its {len(points)} points; {way_out}")
        raise BadFrameError(f"{source}: none of its {len(points)} points is left after {keys}; widen them, {way_out}")

    def _check_present(
        self, needed: Iterable[Sequence[str]], labels: Sequence[str], named_by: str, way_out: str
    ) -> None:
        """Compare the frames with the folders once, so that a part of a download is reported before training starts.

        Args:
            needed: for every frame, the files that are read of it, relative to `data.root`.
            labels: for every frame, what the message calls it or its sequence.
            named_by: who says that there are such files, in words.
            way_out: what to do, in words.

        Raises:
            IncompleteError: more frames lack a file than may be bad. One that lacks a file is else a bad frame like any
                other.
        """
        present = _Folders(self.config.root)
        lacking, first = [], ""
        for label, names in zip(labels, needed, strict=True):
            absent = next((name for name in names if name not in present), None)
            if absent is not None:
                first = first or absent
                lacking.append(label)
        without = set(lacking)
        self.complete = tuple(label for label in dict.fromkeys(labels) if label not in without)
        if lacking and (len(lacking) == len(labels) or len(lacking) > self.config.max_bad_frames(len(labels))):
            whole = f"whole are {some(self.complete)} ({len(self.complete)})" if self.complete else "none is whole"
            raise IncompleteError(
                f"{self.config.root / first}: no such file, though {named_by} names it; {len(lacking)} of the "
                f"{len(labels)} frames of split {self.config.split} lack a file ({some(lacking)}; {whole}); {way_out}",
                self.complete,
            )


class _Folders:
    """Which files are there? Every folder is listed once."""

    def __init__(self, root: Path):
        self.root, self.names = root, dict[str, set[str]]()

    def __contains__(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in self.names:
            path = self.root / folder
            try:
                self.names[folder] = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
            except OSError as error:
                raise UserError(f"{path}: cannot be listed ({error.strerror}); make the folder readable") from error
        return file in self.names[folder]


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few of some names, each once, for a message."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def listed(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that a pattern fits, sorted; not those that begin with a dot (macOS puts `._name` beside `name`)."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def read_list(path: Path, what: str, example: str, way_out: str = "", *, with_blanks: bool = False) -> list[str]:
    """The words of a list of frames or sequences, one a line.

    Args:
        path: the file.
        what: what a word is, for messages: "frame id".
        example: such a word.
        way_out: what else to do about a list that is absent.
        with_blanks: a word is a whole line, for it may hold blanks; else blanks separate words too.

    Raises:
        UserError: it is absent, no text, empty, names something twice, or a word leads out of `data.root`.
    """
    form = f"write one {what} a line, like {example}"
    try:
        text = text_of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such list; {way_out or form}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a list ({error}); {form}") from error
    words = [line.strip() for line in text.splitlines() if line.strip()] if with_blanks else text.split()
    if outside := next((word for word in words if not plain_name(word)), None):
        raise UserError(f"{path}: {outside[:80]!r} leads out of data.root, or cannot be a file's name; {form}")
    if not words:
        raise UserError(f"{path}: the list is empty; {form}")
    if len(set(words)) < len(words):
        raise UserError(f"{path}: {next(word for word in words if words.count(word) > 1)} stands twice; remove one")
    return words


def check_listed(path: str, what: str, names: Sequence[str], present: Sequence[str], where: str, way_out: str) -> None:
    """Raise `UserError` when a list names sequences that are not there.

    Args:
        path: where the names come from, for the message.
        what: what the names are of, in the plural.
        names: those wanted.
        present: those there are.
        where: the place that lacks them, in words.
        way_out: what to do, in words.
    """
    known = set(present)
    absent = [name for name in names if name not in known]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of its {len(names)} {what} are not in {where} ({some(absent, 3)}), which has "
            f"{len(present)}; {way_out}"
        )
