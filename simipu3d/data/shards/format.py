"""What lies in a shard set, and how is it known to be whole?

    manifest.json        written last: what was written from which configuration, and every shard with its check sums
    prepare.json         written first: what a run that goes on compares its configuration with
    shard-000000.tar     frames, one after the other; the members of one are neighbours (`shard_frames` says which)
    shard-000000.jsonl   its index: a line about the shard, then a line a frame

The tars are plain WebDataset shards. An index is written when its tar is complete, so a tar without one does not count.
Manifest and indexes are sealed: each holds a check sum of itself, so that neither a reader nor a call that goes on takes a
damaged one for the truth.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import Field, NonNegativeInt, ValidationError

from simipu3d.config import PartConfig
from simipu3d.contracts.frame import TruthKind
from simipu3d.data.readers.files import parse_json
from simipu3d.data.shards.store import Store, StoreError
from simipu3d.errors import UserError

FORMAT = 2
"""Raise it with every change that a reader of the old files would trip over. 2: boxes in a file of their own, with all that
readers know of them; the manifest says which ground truth there is."""
READABLE = (1, FORMAT)
"""Formats that this package reads; it writes the newest."""
MANIFEST, PREPARE = "manifest.json", "prepare.json"

Digest = str
FileName = Field(pattern=r"^[A-Za-z0-9_-]+\.(tar|jsonl)$")


class ShardInfo(PartConfig):
    """One shard as the manifest has it."""

    name: str = FileName
    """File name of the tar."""
    bytes: NonNegativeInt
    """Its size."""
    sha256: Digest
    """Of the tar."""
    frames: NonNegativeInt
    """How many it holds."""
    index: str = FileName
    """File name of the index."""
    index_bytes: NonNegativeInt
    """Its size."""
    index_sha256: Digest
    """Of the index."""


class IndexHeader(PartConfig):
    """The first line of an index."""

    seal: Digest = ""
    """See `sealed`."""
    format: int
    """`FORMAT` of the writer."""
    written_from: Digest
    """SHA-256 of prepare.json."""
    bytes: NonNegativeInt
    """Size of the tar."""
    sha256: Digest
    """Of the tar."""
    frames: NonNegativeInt
    """How many it holds."""
    cameras: tuple[str, ...]
    """The cameras that occur in it."""
    skipped: tuple[str, ...]
    """A message for each frame that could not be used."""


class Member(NamedTuple):
    """One file of a frame."""

    suffix: str
    """Its name behind the frame's key and a dot."""
    offset: int
    """Where its content begins in the tar."""
    size: int
    crc32: int


class FrameEntry(NamedTuple):
    """One frame as its line in the index has it; `offset` and `size` enclose all members with their tar headers."""

    key: str
    frame_id: str
    sequence_id: str
    offset: int
    size: int
    members: tuple[Member, ...]


class Manifest(PartConfig):
    """manifest.json: written last, whole."""

    seal: Digest = ""
    """See `sealed`."""
    format: int
    """`FORMAT` of the writer."""
    simipu3d: str
    """Version of the writer."""
    config: dict[str, Any]
    """The blocks `data` and `prepare` that it was written from."""
    point_columns: tuple[str, ...]
    """Columns of every frame's points."""
    class_names: tuple[str, ...]
    """What the ground truth's classes index."""
    gives: tuple[TruthKind, ...] | None = None
    """The kinds of ground truth of the source; None in sets of format 1."""
    cameras: tuple[str, ...]
    """The cameras that occur."""
    frames: NonNegativeInt
    """How many there are in all shards."""
    skipped: tuple[str, ...]
    """A message for each frame of the source that could not be used."""
    shards: tuple[ShardInfo, ...]
    """In the order of the frames."""


def shard_stem(number: int) -> str:
    """File name of a shard without its suffix."""
    return f"shard-{number:06d}"


def dump_json(value: Any) -> bytes:
    """Text that is the same for the same values; refuses NaN, which is no JSON."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_manifest(store: Store) -> Manifest:
    """The manifest of a shard set.

    Raises:
        UserError: there is none, it is damaged, or of a newer format.
    """
    path = store.path(MANIFEST)
    try:
        content = store.read(MANIFEST)
    except StoreError as error:
        way_out = "run prepare_data again, its writing was cut short" if store.size(PREPARE) else "is it a shard set?"
        raise UserError(f"{error}; {way_out}") from error
    check_format(content, path)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: damaged: {where}: {first['msg']}; run prepare_data again") from error
    if not is_sealed(content):
        raise UserError(f"{path}: damaged: differs from its own check sum; run prepare_data again")
    for shard in manifest.shards:
        # A frame has a line in the index and a header of 512 bytes in the tar.
        if shard.frames > min(shard.index_bytes, shard.bytes // 512):
            raise UserError(
                f"{path}: damaged: {shard.name} of {shard.bytes} bytes cannot hold {shard.frames} frames; run prepare_data again"
            )
    if manifest.frames != sum(shard.frames for shard in manifest.shards):
        raise UserError(
            f"{path}: damaged: its shards do not hold {manifest.frames} frames together; run prepare_data again"
        )
    return manifest


def dump_manifest(manifest: Manifest) -> bytes:
    """The text of manifest.json, sealed."""
    return sealed(dump_json(json.loads(manifest.model_dump_json())))


def check_format(content: bytes, path: str, formats: Sequence[int] = READABLE) -> None:
    """Raise `UserError` when a JSON text is damaged, or says a `format` that is not among those."""
    try:
        found = parse_json(content)["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged, or not of a shard set; run prepare_data again") from None
    if type(found) is not int or found not in formats:
        does = "reads" if len(formats) > 1 else "writes"
        raise UserError(
            f"{path}: is of format {found}, this simipu3d {does} format {' and '.join(map(str, formats))}; install the release "
            "that wrote it, or run prepare_data again with another --out"
        )


def dump_index(header: IndexHeader, frames: list[FrameEntry]) -> bytes:
    """The text of an index, sealed."""
    lines = [header.model_dump_json(), *(json.dumps(entry, ensure_ascii=False) for entry in frames)]
    return sealed(("\n".join(lines) + "\n").encode())


def parse_header(content: bytes) -> IndexHeader | None:
    """The first line of an index; None where the index is damaged."""
    if not is_sealed(content):
        return None
    try:
        return IndexHeader.model_validate_json(content.partition(b"\n")[0])
    except ValidationError:
        return None


def parse_entry(line: bytes) -> FrameEntry:
    """One frame's line of an index.

    Raises:
        ValueError: it is no such line.
    """
    try:
        *values, members = parse_json(line)
        entry = FrameEntry(*values, tuple(Member(*member) for member in members))
    except TypeError as error:
        raise ValueError(f"no line of an index: {error}") from error
    words = (entry.key, entry.frame_id, entry.sequence_id, *(member.suffix for member in entry.members))
    numbers = (entry.offset, entry.size, *(number for member in entry.members for number in member[1:]))
    if not all(type(word) is str for word in words) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("no line of an index: it holds a value of another type, or a negative one")
    return entry


def digest(content: bytes) -> Digest:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


_SEAL = re.compile(rb'"seal": ?"([0-9a-f]*)"')


def sealed(content: bytes) -> bytes:
    """A text whose first `seal` is empty, with its own SHA-256 in that place."""
    place = _SEAL.search(content).end(1)
    return content[:place] + digest(content).encode() + content[place:]


def is_sealed(content: bytes) -> bool:
    """Is a text as `sealed` gave it?"""
    found = _SEAL.search(content)
    return found is not None and digest(content[: found.start(1)] + content[found.end(1) :]).encode() == found[1]
