"""How does a data set become shards? In parallel, the same bytes whoever writes them, and on again after a kill.

A shard is a job: frames [n k, (n + 1) k) of the source, those left out that cannot be used. Its tar is made under a
temporary name and put in place whole, then its index, which makes it count; the manifest comes last.
"""

import hashlib
import json
import logging
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import numpy as np

import simipu3d
from simipu3d.config import changed_keys, to_plain
from simipu3d.contracts.frame import EVERYTHING, Frame, FrameReader
from simipu3d.data.config import DataConfig
from simipu3d.data.loading.loader import BadFrameLimit, check_seen
from simipu3d.data.shards.format import (
    FORMAT,
    MANIFEST,
    PREPARE,
    Digest,
    FrameEntry,
    IndexHeader,
    Manifest,
    Member,
    ShardInfo,
    check_format,
    digest,
    dump_index,
    dump_json,
    dump_manifest,
    is_sealed,
    parse_header,
    sealed,
    shard_stem,
)
from simipu3d.data.shards.frames import PrepareConfig, encode_frame
from simipu3d.data.shards.jobs import check_stopped, progress_bar, run_jobs
from simipu3d.data.shards.store import Store, open_store
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

log = logging.getLogger(__name__)

NOT_CONTENT = ("batch_size", "num_workers", "on_bad_frame", "max_bad_fraction", "freeze_draws", "augment")
"""Keys of `data:` that do not change what a shard holds."""
NUM_PROBES = 8
"""Frames whose size tells how many fill a shard."""


class Plan(NamedTuple):
    """What prepare.json holds, as far as jobs need it."""

    num_frames: int
    frames_per_shard: int
    written_from: Digest

    @property
    def num_shards(self) -> int:
        return -(-self.num_frames // self.frames_per_shard)

    def frames(self, number: int) -> range:
        """The source's frames that a shard is made of."""
        start = number * self.frames_per_shard
        return range(start, min(start + self.frames_per_shard, self.num_frames))


class Written(NamedTuple):
    """A finished shard."""

    number: int
    info: ShardInfo
    header: IndexHeader


def prepare_shards(config: DataConfig, prepare: PrepareConfig, url: str, workers: int = 1) -> Manifest:
    """Write a data set as shards; go on where an earlier call with the same configuration was stopped.

    Args:
        config: the `data:` block of the source.
        prepare: how to write.
        url: a folder, or a URL that fsspec can write to.
        workers: processes. The shards do not depend on it.

    Returns:
        what was written.

    Raises:
        UserError: another configuration's shards lie there, another call writes there, the place cannot be written, a
            frame is bad and `on_bad_frame` is `raise`, or too many are.
    """
    store = open_store(url)
    reader = READERS[config.name].target(config, EVERYTHING)
    reader.prepare()
    if len(reader) == 0:
        raise UserError(f"data.split: split {config.split} of {config.root or config.name} has no frames to write")
    with store.lock():
        return _write_set(store, reader, config, prepare, workers)


def _write_set(store: Store, reader: FrameReader, config: DataConfig, prepare: PrepareConfig, workers: int) -> Manifest:
    plan, plain = _plan(store, reader, config, prepare, workers)
    _remove_parts(store)
    limit = BadFrameLimit(config, plan.num_frames)
    written = _finished(store, plan)
    missing = [number for number in range(plan.num_shards) if number not in written]
    for shard in written.values():
        limit.add(shard.header.skipped)
    log.info("%s: %d of %d shards are there, %d to write", store.url, len(written), plan.num_shards, len(missing))
    job = ShardJob(reader, config, prepare, store, plan)
    with progress_bar() as bar:
        total = sum(len(plan.frames(number)) for number in missing)
        task = bar.add_task(f"writing {plan.num_shards} shards", total=total)
        for shard in run_jobs(job, missing, workers):
            written[shard.number] = shard
            limit.add(shard.header.skipped)
            bar.advance(task, len(plan.frames(shard.number)))
            bar.refresh()
    manifest = _manifest(plain, reader, [written[number] for number in range(plan.num_shards)])
    store.write(MANIFEST, dump_manifest(manifest))
    return manifest


def _plan(
    store: Store, reader: FrameReader, config: DataConfig, prepare: PrepareConfig, workers: int
) -> tuple[Plan, dict[str, Any]]:
    """The plan of an earlier call, if there was one, else a new one, which is written down."""
    block = to_plain(config)
    plain = {"data": {k: v for k, v in block.items() if k not in NOT_CONTENT}, "prepare": to_plain(prepare)}
    path = store.path(PREPARE)
    if store.size(PREPARE) is None:
        if store.size(MANIFEST) is not None or store.size(f"{shard_stem(0)}.tar") is not None:
            raise UserError(f"{store.url}: holds shards of unknown origin (no {PREPARE}); choose another --out")
        per_shard = prepare.shard_frames
        if per_shard is None:
            job = SizeJob(reader, prepare)
            probes = np.linspace(0, len(reader) - 1, min(NUM_PROBES, len(reader))).round().astype(int).tolist()
            sizes = [size for size in run_jobs(job, probes, workers) if size is not None]
            mean = sum(sizes) / len(sizes) if sizes else 1e6
            per_shard = max(1, int(prepare.shard_megabytes * 1e6 / mean))
        text = {"seal": "", "format": FORMAT, "config": plain, "frames": len(reader), "frames_per_shard": per_shard}
        store.write(PREPARE, sealed(dump_json(text)))
    content = store.read(PREPARE)
    check_format(content, path, [FORMAT])
    if not is_sealed(content):
        raise UserError(f"{path}: damaged: differs from its own check sum; delete {store.url} and begin again")
    found = json.loads(content)
    changes = changed_keys(found["config"], plain)
    if changes:
        key, (old, new) = next(iter(changes.items()))
        raise UserError(
            f"{store.url}: holds shards of another configuration ({key}: {old!r} there, {new!r} now"
            f"{f', and {len(changes) - 1} more keys' if len(changes) > 1 else ''}); choose another --out"
        )
    if found["frames"] != len(reader):
        raise UserError(
            f"{store.url}: was begun with {found['frames']} frames, the data set has {len(reader)} now; choose another --out"
        )
    return Plan(found["frames"], found["frames_per_shard"], digest(content)), plain


def _remove_parts(store: Store) -> None:
    """Delete what a killed call left half written."""
    folder = store.parts_folder()
    if folder is not None:
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)


def _finished(store: Store, plan: Plan) -> dict[int, Written]:
    """The shards that are there whole, as far as sizes and the index tell."""
    found = {}
    for number in range(plan.num_shards):
        stem = shard_stem(number)
        if store.size(f"{stem}.jsonl") is None:
            continue
        index = store.read(f"{stem}.jsonl")
        header = parse_header(index)
        if header is None or header.written_from != plan.written_from:
            continue
        if store.size(f"{stem}.tar") == header.bytes:
            found[number] = _written(number, index, header)
    return found


def _written(number: int, index: bytes, header: IndexHeader) -> Written:
    stem = shard_stem(number)
    info = ShardInfo(
        name=f"{stem}.tar",
        bytes=header.bytes,
        sha256=header.sha256,
        frames=header.frames,
        index=f"{stem}.jsonl",
        index_bytes=len(index),
        index_sha256=digest(index),
    )
    return Written(number, info, header)


def _manifest(plain: dict[str, Any], reader: FrameReader, shards: list[Written]) -> Manifest:
    return Manifest(
        format=FORMAT,
        simipu3d=simipu3d.__version__,
        config=plain,
        point_columns=tuple(reader.point_columns),
        class_names=tuple(reader.class_names),
        gives=tuple(sorted(reader.gives)),
        cameras=tuple(dict.fromkeys(camera for shard in shards for camera in shard.header.cameras)),
        frames=sum(shard.info.frames for shard in shards),
        skipped=tuple(message for shard in shards for message in shard.header.skipped),
        shards=tuple(shard.info for shard in shards),
    )


class SizeJob:
    """Bytes that a frame takes in a shard; None for one that cannot be used."""

    def __init__(self, reader: FrameReader, prepare: PrepareConfig):
        self.reader, self.prepare = reader, prepare

    def __call__(self, index: int) -> int | None:
        try:
            members = encode_frame(self.reader[index], self.prepare)
        except BadFrameError:
            return None
        return sum(tarfile.BLOCKSIZE + len(content) for _, content in members)


class ShardJob:
    """Writes one shard: `job(number)`."""

    def __init__(self, reader: FrameReader, config: DataConfig, prepare: PrepareConfig, store: Store, plan: Plan):
        self.reader, self.config, self.prepare, self.store, self.plan = reader, config, prepare, store, plan

    def __call__(self, number: int) -> Written:
        stem = shard_stem(number)
        folder = self.store.parts_folder() or Path(tempfile.gettempdir())
        part = folder / f".{stem}.{os.getpid()}.part"
        entries: list[FrameEntry] = []
        cameras: dict[str, None] = {}
        skipped: list[str] = []
        try:
            with open(part, "wb") as file:
                tar = TarWriter(file)
                for index in self.plan.frames(number):
                    check_stopped()
                    try:
                        frame, members = self._frame(index)
                    except BadFrameError as error:
                        if self.config.on_bad_frame == "raise":
                            raise
                        skipped.append(str(error))
                        continue
                    entries.append(tar.add(f"{index:08d}", frame, members))
                    cameras.update(dict.fromkeys(camera.name for camera in frame.cameras))
                tar.close()
                file.flush()
                os.fsync(file.fileno())
            self.store.put(f"{stem}.tar", part)
        except OSError as error:
            raise UserError(
                f"{part}: cannot be written ({error.strerror or error}); make room and run again, what is finished is kept"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        header = IndexHeader(
            format=FORMAT,
            written_from=self.plan.written_from,
            bytes=tar.offset,
            sha256=tar.sha256.hexdigest(),
            frames=len(entries),
            cameras=tuple(cameras),
            skipped=tuple(skipped),
        )
        index_text = dump_index(header, entries)
        self.store.write(f"{stem}.jsonl", index_text)
        return _written(number, index_text, header)

    def _frame(self, index: int) -> tuple[Frame, list[tuple[str, bytes]]]:
        frame = self.reader[index]
        check_seen(frame)
        return frame, encode_frame(frame, self.prepare)


class TarWriter:
    """A tar that says where everything lies in it; no time, user or host goes in.

    Attributes:
        offset: bytes so far.
        sha256: of them.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.offset, self.sha256 = file, 0, hashlib.sha256()

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.sha256.update(content)
        self.offset += len(content)

    def add(self, key: str, frame: Frame, members: list[tuple[str, bytes]]) -> FrameEntry:
        """Append a frame's members."""
        start, places = self.offset, []
        for suffix, content in members:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            places.append(Member(suffix, self.offset, len(content), crc32(content)))
            self._write(content)
            self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return FrameEntry(key, frame.frame_id, frame.sequence_id, start, self.offset - start, tuple(places))

    def close(self) -> None:
        """Append the end of the archive."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.offset % tarfile.RECORDSIZE))
