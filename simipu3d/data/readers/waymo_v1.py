"""Waymo v1: from the .tfrecord files, without TensorFlow, to the moments that `waymo.py` makes Frames of.

    root/segment-<context>_with_camera_labels.tfrecord      one file a segment, one record a frame

Files of other names are read too: then the context's name comes out of their first record. Only the record that is
asked for is read, and of it only what the request names is inflated.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simipu3d.data.readers.base import listed
from simipu3d.data.readers.tfrecord import WAY_OUT, read_record, scan_records
from simipu3d.data.readers.waymo_moment import WaymoMoment, WaymoRequest
from simipu3d.data.readers.waymo_v1_frame import V1Frame
from simipu3d.errors import BadFrameError, UserError

_OFFICIAL_NAME = re.compile(r"(?:^|_)segment-(.+?)(?:_with_camera_labels)?\.tfrecord$")
_HEAD_BYTES = 8000
"""Of a frame: its context (2.7 kB in the public ones) and its time stamp; about what a disk hands over anyway."""
_SCAN_THREADS = 4
"""Finding the records waits for the disk, once a record: a few files wait at the same time. With many more, the threads
wait for each other where the disk does not (16 were three times slower than one on files in memory)."""


@dataclass(frozen=True, eq=False)
class _SegmentFile:
    """Where the frames of a segment lie: `numbers` are the records in the order of time, `offsets` their first bytes."""

    path: Path
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]


class WaymoV1:
    """The frames of some segments. Contract: `WaymoSource`. No file stays open, so that workers may fork.

    Args:
        root: the folder of the .tfrecord files.
        segments: context names, in the order wanted, or None for all of them, sorted.
        request: what `read` reads when nothing else is asked for.

    Raises:
        UserError: there is no file, a segment has none or two, or a file's records cannot be found.
    """

    def __init__(self, root: Path, segments: tuple[str, ...] | None, request: WaymoRequest):
        self.request = request
        paths = _segment_paths(root)
        chosen = tuple(sorted(paths)) if segments is None else segments
        missing = [name for name in chosen if name not in paths]
        if missing:
            raise UserError(
                f"{root}: no .tfrecord file holds segment {missing[0]} ({len(missing)} of {len(chosen)} segments are "
                "missing); download it, or take it off the list"
            )
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            self._files = dict(zip(chosen, pool.map(_scan_segment, (paths[name] for name in chosen)), strict=True))
        self.moments = tuple((name, position) for name in chosen for position in range(len(self._files[name].offsets)))

    @classmethod
    def list_segments(cls, root: Path) -> tuple[str, ...]:
        """The segments whose files lie in a folder, sorted; one that is not official by name has a record read."""
        return tuple(sorted(_segment_paths(root)))

    @classmethod
    def has_boxes(cls, root: Path) -> bool:
        """A record says it itself; those of training and validation have boxes."""
        return True

    def read(self, index: int, request: WaymoRequest | None = None) -> WaymoMoment:
        """The moment at a position of `moments`; its lasers and cameras in the order of the request.

        Raises:
            BadFrameError: the record is damaged, or does not hold a whole frame of this segment.
        """
        request = self.request if request is None else request
        segment, position = self.moments[index]
        file = self._files[segment]
        number = int(file.numbers[position])
        source = f"{file.path}: record {number}"
        frame = V1Frame(read_record(file.path, int(file.offsets[position]), number), source)
        if frame.segment != segment:
            raise BadFrameError(
                f"{source}: is a frame of segment {frame.segment}, and the file's name or its first record say "
                f"{segment}; rename the file, or keep one segment a file"
            )
        return frame.moment(request)


def _segment_paths(root: Path) -> dict[str, Path]:
    """Segment -> its file."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set data.root to the folder that holds it")
    files = [path for path in listed(root, "*.tfrecord") if path.is_file()]
    if not files:
        below = next(iter(sorted(root.glob("*/*.tfrecord"))), None)
        hint = f"set data.root={below.parent}" if below else "set data.root to the folder that holds them,"
        raise UserError(f"{root}: holds no .tfrecord file of Waymo v1; {hint} and data.split=all")
    paths: dict[str, Path] = {}
    for path in files:
        official = _OFFICIAL_NAME.search(path.name)
        segment = official.group(1) if official else _first_context_name(path)
        if segment in paths:
            raise UserError(
                f"{path}: holds segment {segment}, and so does {paths[segment].name}; move one of them away"
            )
        paths[segment] = path
    return paths


def _first_context_name(path: Path) -> str:
    """From the first record, when the file's name does not say it."""
    try:
        return V1Frame(read_record(path, 0, 0), f"{path}: record 0").segment
    except BadFrameError as error:
        raise UserError(f"{error} (move the file away if it is none of Waymo's)") from None


def _scan_segment(path: Path) -> _SegmentFile:
    """Find the records of a file; where it does not hold them in the order of time, sort them."""
    offsets, heads = scan_records(path, _HEAD_BYTES)
    numbers = np.arange(len(offsets))
    times = [_head_timestamp(head) for head in heads]
    # A head without a time is a frame that is damaged or written in an uncommon order; then the file's order stands.
    if None not in times:
        numbers = np.argsort(times, kind="stable")
        in_order = np.array(times)[numbers]
        same = np.flatnonzero(np.diff(in_order) == 0)
        if len(same):
            first, second = numbers[same[0]], numbers[same[0] + 1]
            raise UserError(
                f"{path}: records {first} and {second} have the same time stamp {in_order[same[0]]}, so the file holds "
                f"frames twice; {WAY_OUT}"
            )
    return _SegmentFile(path, numbers, offsets[numbers])


def _head_timestamp(head: bytes) -> int | None:
    """timestamp_micros (field 2, varint) out of the first bytes of a frame, or None where they do not reach it."""
    position = 0
    while (key := _varint(head, position)) is not None:
        number, wire_type = key.value >> 3, key.value & 7
        if wire_type not in (0, 2) or (value := _varint(head, key.end)) is None:
            return None
        if (number, wire_type) == (2, 0):
            return value.value
        position = value.end + (value.value if wire_type == 2 else 0)
    return None


class _Varint(NamedTuple):
    value: int
    end: int


def _varint(content: bytes, position: int) -> _Varint | None:
    """The variable-length integer at a place, and where it ends; None where the bytes end first."""
    value = 0
    for place, octet in enumerate(content[position : position + 10]):
        value |= (octet & 0x7F) << 7 * place
        if octet < 0x80:
            return _Varint(value, position + place + 1)
    return None
