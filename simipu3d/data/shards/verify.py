"""Is a shard set whole? Sizes, SHA-256 of every file, and every frame decoded."""

import hashlib
import json

from simipu3d.data.readers.shards import ShardsConfig, ShardsReader
from simipu3d.data.shards.format import PREPARE, ShardInfo, digest, is_sealed, parse_header
from simipu3d.data.shards.jobs import check_stopped, progress_bar, run_jobs
from simipu3d.data.shards.store import Store, StoreError
from simipu3d.errors import BadFrameError

CHUNK = 16 * 2**20


def verify_shards(url: str, workers: int = 1) -> tuple[ShardsReader, list[str]]:
    """Hold a shard set against its manifest, and decode every frame.

    Args:
        url: where its manifest.json lies.
        workers: processes.

    Returns:
        the reader of the set, and a line for each damaged shard, index and frame, none for a whole set.

    Raises:
        UserError: there is no manifest that can be read.
    """
    # A set with lost shards must open, so that each of them is named.
    reader = ShardsReader(ShardsConfig(root=url, max_bad_fraction=1.0))
    shards = reader.manifest.shards
    problems = {-1: _check_origin(reader), len(shards): _check_strangers(reader)}
    with progress_bar() as bar:
        task = bar.add_task(f"verifying {len(shards)} shards", total=len(reader))
        for number, found in run_jobs(VerifyJob(reader), range(len(shards)), workers):
            problems[number] = found
            bar.advance(task, shards[number].frames)
            bar.refresh()
    return reader, [line for number in sorted(problems) for line in problems[number]]


def _check_origin(reader: ShardsReader) -> list[str]:
    path = reader.store.path(PREPARE)
    try:
        content = reader.store.read(PREPARE)
    except StoreError as error:
        return [str(error)]
    if not is_sealed(content):
        return [f"{path}: damaged: differs from its own check sum"]
    if json.loads(content)["config"] != reader.manifest.config:
        return [f"{path}: holds another configuration than the manifest"]
    return []


def _check_strangers(reader: ShardsReader) -> list[str]:
    """Shards that the manifest does not know; other programs would read them with the rest."""
    known = {name for shard in reader.manifest.shards for name in (shard.name, shard.index)}
    found = [name for name in reader.store.names() or () if name.endswith((".tar", ".jsonl")) and name not in known]
    return [f"{reader.store.path(name)}: the manifest knows no such file; delete it" for name in found]


class VerifyJob:
    """The problems of one shard: `job(number)` -> (number, lines)."""

    def __init__(self, reader: ShardsReader):
        self.reader = reader

    def __call__(self, number: int) -> tuple[int, list[str]]:
        reader, store = self.reader, self.reader.store
        shard = reader.manifest.shards[number]
        try:
            lines = _check_files(store, shard)
        except StoreError as error:
            return number, [str(error)]
        for index in reader.frames_of(number):
            check_stopped()
            try:
                reader[index]
            except BadFrameError as error:
                lines.append(str(error))
                if len(lines) > 1 and lines[-1] == lines[-2]:  # a damaged index says the same of every frame
                    lines.pop()
        return number, lines


def _check_files(store: Store, shard: ShardInfo) -> list[str]:
    lines = []
    path = store.path(shard.name)
    size = store.size(shard.name)
    if size is None:
        raise StoreError(f"{path}: no such file; all of its {shard.frames} frames are lost")
    if size != shard.bytes:
        lines.append(f"{path}: has {size} bytes, the manifest says {shard.bytes}")
    elif _sha256(store, shard) != shard.sha256:
        lines.append(f"{path}: differs from its SHA-256 in the manifest")
    index = store.read(shard.index)
    header = parse_header(index)
    if digest(index) != shard.index_sha256:
        lines.append(f"{store.path(shard.index)}: differs from its SHA-256 in the manifest")
    elif header is None or header.written_from != digest(store.read(PREPARE)):
        lines.append(f"{store.path(shard.index)}: was not written from {PREPARE}")
    return lines


def _sha256(store: Store, shard: ShardInfo) -> str:
    total = hashlib.sha256()
    for start in range(0, shard.bytes, CHUNK):
        check_stopped()
        total.update(store.read_range(shard.name, start, min(CHUNK, shard.bytes - start)))
    return total.hexdigest()
