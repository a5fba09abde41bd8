"""Shards: what `tools/prepare_data.py` wrote, from a folder or from any URL that fsspec knows, to Frames.

The index says where every member of a frame lies, so a frame is one read of one range (of several, where cameras or
ground truth are left out), and every member is held against its check sum. An epoch goes through the shards in a drawn
order, `shuffle_shards` at a time, and their frames are mixed: neighbouring reads then stay near each other.
"""

from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from simipu3d.contracts.frame import EVERYTHING, Frame, TruthKind, Wants
from simipu3d.data.loading.order import epoch_order, order_rng
from simipu3d.data.readers.base import POINT_TRUTH, TRUTH_KINDS, BaseReader, ScanConfig
from simipu3d.data.readers.files import WAY_OUT, parse_json
from simipu3d.data.shards.format import FrameEntry, Member, ShardInfo, digest, parse_entry, read_manifest
from simipu3d.data.shards.frames import camera_stem, decode_frame, wanted
from simipu3d.data.shards.store import RETRIES, TIMEOUT, LocalStore, StoreError, open_store
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

MAX_INDEXES = 64
"""Indexes a process keeps, a few hundred bytes a frame; the least recently used one is dropped."""
BRIDGED_GAP = 16 * 1024
"""Members that lie nearer than this are read together, bytes."""


class ShardsConfig(ScanConfig):
    """The `data:` block for `name: shards`."""

    name: str = "shards"
    """Which reader (`READERS`)."""
    root: Annotated[str, Field(min_length=1)]
    """Where manifest.json lies: a folder, or a URL like s3://bucket/folder (which needs that filesystem's package)."""
    split: Literal["all"] = "all"
    """A shard set holds one split."""
    shuffle_shards: PositiveInt | None = 8
    """So many shards are mixed at a time; null: the frames of all. Default: a working set that a disk cache holds."""
    timeout: PositiveFloat = TIMEOUT
    """Seconds that one try of reading from a URL may take. Default: some MB over a slow line."""
    retries: NonNegativeInt = RETRIES
    """How often a read from a URL that failed is tried again, after pauses of 0.5, 1, 2, ... 8 seconds."""


@READERS.register("shards", config=ShardsConfig)
class ShardsReader(BaseReader):
    """Frames of a shard set. Contract: `FrameReader`, with an order of its own; frame ids are those of the source.

    Raises:
        UserError: no finished shard set, one of a newer format, a camera that it has not, or absent shards.
    """

    config: ShardsConfig

    def __init__(self, config: ShardsConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.store = open_store(config.root, config.timeout, config.retries)
        self.manifest = read_manifest(self.store)
        self.class_names, self.point_columns = self.manifest.class_names, self.manifest.point_columns
        for camera in config.cameras or ():
            if camera not in self.manifest.cameras:
                raise UserError(
                    f"data.cameras: {config.root} has no camera {camera!r}, it has {', '.join(self.manifest.cameras)}"
                )
        self._stems = None if config.cameras is None else {camera_stem(name) for name in config.cameras}
        self._first = np.cumsum([0, *(shard.frames for shard in self.manifest.shards)])
        self._indexes: OrderedDict[int, list[bytes]] = OrderedDict()
        if isinstance(self.store, LocalStore):
            self._check_shards()
        self.gives = frozenset(self._old_truth() if self.manifest.gives is None else self.manifest.gives)

    def __len__(self) -> int:
        return self.manifest.frames

    @property
    def sequence_ids(self) -> tuple[str, ...]:  # type: ignore[override]  # few runs ask for it
        """The drive of every frame; reads the index of every shard."""
        indexes = (self._load_index(shard) for shard in self.manifest.shards)
        return tuple(parse_entry(line).sequence_id for lines in indexes for line in lines)

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """(len,) shards in a drawn order, `shuffle_shards` at a time, their frames mixed."""
        group = self.config.shuffle_shards
        if group is None:
            return epoch_order(seed, epoch, len(self))
        rng = order_rng(seed, epoch)
        shards = rng.permutation(len(self.manifest.shards))
        parts = []
        for start in range(0, len(shards), group):
            ranges = [np.array(self.frames_of(shard), dtype=np.int64) for shard in shards[start : start + group]]
            parts.append(rng.permutation(np.concatenate(ranges)))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def __getitem__(self, index: int) -> Frame:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        shard = self.manifest.shards[number]
        entry = self._entry(number, index - int(self._first[number]))
        source = f"{self.store.path(shard.name)}: frame {entry.frame_id}"
        chosen = [member for member in entry.members if wanted(member.suffix, self._stems, self.wants)]
        members = self._read(shard, chosen, source)
        frame = decode_frame(members, source, self.config.cameras, self.wants, with_sizes=self._needs_cameras)
        return self._wanted_part(frame, source)

    def _wanted_part(self, frame: Frame, source: str) -> Frame:
        """The frame without the points that the configuration takes away, and without images that are not wanted."""
        changes: dict[str, Any] = {} if self.wants.images else {"cameras": ()}
        if self.wants.points:
            kept = self._cut(frame.points, frame.cameras, source)
            truth = {kind: getattr(frame, kind) for kind in POINT_TRUTH}
            changes |= {"points": frame.points[kept]}
            changes |= {kind: labels[kept] for kind, labels in truth.items() if labels is not None}
        return replace(frame, **changes) if changes else frame

    def _old_truth(self) -> list[TruthKind]:
        """The kinds of ground truth of a set of format 1, which says it in its first frame only."""
        if not len(self):
            return []
        try:
            entry = self._entry(0, 0)
            about = self._read(
                self.manifest.shards[0], [m for m in entry.members if m.suffix == "json"], entry.frame_id
            )
            has_boxes = parse_json(about["json"]).get("boxes") is not None
        except (BadFrameError, KeyError, ValueError, AttributeError):  # which is reported when the frame is read
            return list(TRUTH_KINDS)
        stems = {member.suffix.removesuffix(".npy").rpartition(".")[2] for member in entry.members}
        return [kind for kind in TRUTH_KINDS if kind in stems or (kind == "boxes" and has_boxes)]

    def _entry(self, number: int, position: int) -> FrameEntry:
        if number not in self._indexes:
            self._indexes[number] = self._load_index(self.manifest.shards[number])
            if len(self._indexes) > MAX_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(number)
        shard = self.manifest.shards[number]
        try:
            entry = parse_entry(self._indexes[number][position])
            if any(member.offset + member.size > shard.bytes for member in entry.members):
                raise ValueError(f"a member lies beyond the {shard.bytes} bytes of {shard.name}")
            return entry
        except ValueError as error:
            raise BadFrameError(f"{self.store.path(shard.index)}: line {position + 2}: {error}; {WAY_OUT}") from error

    def frames_of(self, number: int) -> range:
        """The indices of a shard's frames."""
        return range(int(self._first[number]), int(self._first[number + 1]))

    def _load_index(self, shard: ShardInfo) -> list[bytes]:
        """The lines of a shard's index, one a frame, not parsed yet: they take a tenth of the memory so."""
        path = self.store.path(shard.index)
        try:
            content = self.store.read(shard.index, lambda content: digest(content) == shard.index_sha256)
        except StoreError as error:
            raise BadFrameError(f"{error}: the index of {shard.name}; {WAY_OUT}") from error
        if digest(content) != shard.index_sha256:
            raise BadFrameError(f"{path}: differs from its check sum in the manifest: it is damaged; {WAY_OUT}")
        lines = content.splitlines()[1:]
        if len(lines) != shard.frames:
            raise BadFrameError(f"{path}: speaks of {len(lines)} frames, the manifest of {shard.frames}; {WAY_OUT}")
        return lines

    def _read(self, shard: ShardInfo, chosen: list[Member], source: str) -> dict[str, bytes]:
        """The content of the chosen members, checked, by suffix."""
        members = {}
        for run in _runs(chosen):
            start = run[0].offset
            size = run[-1].offset + run[-1].size - start
            try:
                content = self.store.read_range(shard.name, start, size, partial(_is_intact, run))
            except StoreError as error:
                raise BadFrameError(f"{source}: {error}; {WAY_OUT}") from error
            for member in run:
                part = content[member.offset - start : member.offset - start + member.size]
                if len(part) < member.size:
                    raise BadFrameError(f"{source}: {member.suffix}: the shard is cut short; {WAY_OUT}")
                if crc32(part) != member.crc32:
                    raise BadFrameError(f"{source}: {member.suffix} differs from its check sum: damaged; {WAY_OUT}")
                members[member.suffix] = part
        return members

    def _check_shards(self) -> None:
        """Compare the folder with the manifest once, so that a half-copied set is reported before training starts."""
        wrong = [shard for shard in self.manifest.shards if self.store.size(shard.name) != shard.bytes]
        # The frames of a lost shard are bad frames like any other, unless they are more than a run would tolerate.
        if sum(shard.frames for shard in wrong) > self.config.max_bad_frames(len(self)):
            names = ", ".join(shard.name for shard in wrong[:4]) + (", ..." if len(wrong) > 4 else "")
            raise UserError(
                f"{self.config.root}: {len(wrong)} of {len(self.manifest.shards)} shards are absent or not of the size "
                f"that the manifest says ({names}); copy them again, or let tools/prepare_data.py write them again"
            )


def _is_intact(run: list[Member], content: bytes) -> bool:
    """Do the members of a run, read together, have their check sums?"""
    view, start = memoryview(content), run[0].offset
    return all(crc32(view[m.offset - start : m.offset - start + m.size]) == m.crc32 for m in run)


def _runs(members: list[Member]) -> list[list[Member]]:
    """Members that lie near each other, put together."""
    runs: list[list[Member]] = []
    end = -BRIDGED_GAP - 1
    for member in sorted(members, key=lambda member: member.offset):
        if member.offset - end > BRIDGED_GAP:
            runs.append([])
        runs[-1].append(member)
        end = member.offset + member.size
    return runs
