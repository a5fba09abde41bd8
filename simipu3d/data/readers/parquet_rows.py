"""How are some rows of a large parquet file read, without holding more of it than they need?

A file is a set of rows under key columns. The key columns are read once, and say which row group holds a wanted row; of
that row group only the wanted columns are decoded, in batches of bounded size, up to the last wanted row; the next read
goes on from there, so that a file of one large row group is decoded once when it is read in order. Nothing here starts
threads, so it is safe in a forked worker.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simipu3d.errors import BadFrameError

WAY_OUT = "download the file again, or leave its segment out with data.split_file"

BATCH_BYTES = 16 << 20
"""Of a row group whose wanted columns are larger than this, decoded, only so much is held at a time."""

NUMBER_BYTES = {"INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8}
"""Of a decoded value, by parquet's own types."""

READ_BYTES = 1 << 20
"""A column is read from the disk in pieces of this size."""

Kind = Literal["number", "numbers", "integers", "bytes", "text"]
"""What a column must hold: a number a row, a list of numbers or of whole numbers, bytes, or a text."""


@dataclass
class Stream:
    """How far some columns of a row group have been decoded.

    Attributes:
        group: the row group.
        batches: those that are still to come.
        batch: the last one, or None at the beginning.
        start: place of its first row in the row group.
    """

    group: int
    batches: Iterator[pa.RecordBatch]
    batch: pa.RecordBatch | None = None
    start: int = 0


class ParquetRows:
    """The rows of one file that belong to one segment.

    Args:
        path: the file.
        owner: name of a text column and the value that the rows must have in it; others are passed over.
        keys: integer columns to find rows by.
        streams: where row groups that were read in part wait for the next read; files may share it.
        kind_of: what each column must hold; None: anything.

    Attributes:
        keys: (R,) int64 by name, of the rows that belong to the owner.
        rows: (R,) their places in the file, rising.

    Raises:
        BadFrameError: the file is missing, damaged, or lacks a key column.
    """

    def __init__(
        self,
        path: Path,
        owner: tuple[str, str],
        keys: Sequence[str],
        streams: "Recent | None" = None,
        kind_of: Callable[[str], Kind] | None = None,
    ):
        self.path, self.kind_of, self.streams = path, kind_of, Recent(1) if streams is None else streams
        if not path.is_file():
            raise BadFrameError(f"{path}: no such file; {WAY_OUT}")
        with self._damage_told():
            # Without these two settings a whole column of a row group is read ahead, and by threads.
            self.file = pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
            self.starts = np.cumsum(
                [0, *(self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups))]
            )
        column, value = owner
        self.check_columns((column, *keys))
        with self._damage_told():
            table = self.file.read(columns=[column, *keys], use_threads=False)
            mine = pc.equal(table[column], value).fill_null(False).to_numpy(zero_copy_only=False)
        self.rows = np.flatnonzero(mine)
        self.keys = {name: self._integers(name, table[name])[self.rows] for name in keys}

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise `BadFrameError` when the file lacks one of the columns, or one is of another kind."""
        with self._damage_told():
            schema = self.file.schema_arrow
        present = set(schema.names)
        absent = [name for name in columns if name not in present]
        if absent:
            raise BadFrameError(
                f"{self.path}: has no column {', '.join(absent)}; is it a component of Waymo's format v2? {WAY_OUT}"
            )
        if self.kind_of is None:
            return
        for name in columns:
            found, kind = schema.types[schema.get_field_index(name)], self.kind_of(name)
            if schema.get_field_index(name) < 0 or not _is_of(kind, found):
                raise BadFrameError(f"{self.path}: column {name} is of type {found}, expected {kind}; {WAY_OUT}")

    def read(self, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Some rows of the file, in its own order.

        Args:
            rows: (K,) places in the file, rising. K may be 0.
            columns: their names.
        """
        self.check_columns(columns)
        group_of = np.searchsorted(self.starts, rows, side="right") - 1
        batches: list[pa.RecordBatch] = []
        with self._damage_told():
            for group in np.unique(group_of).tolist():
                batches += self._read_group(group, rows[group_of == group] - self.starts[group], columns)
            schema = pa.schema([self.file.schema_arrow.field(name) for name in columns])
            table = pa.Table.from_batches(batches, batches[0].schema if batches else schema)
        if len(table) != len(rows):
            raise BadFrameError(f"{self.path}: holds {len(table)} of the {len(rows)} rows it lists; {WAY_OUT}")
        return table

    def _read_group(self, group: int, wanted: NDArray[np.int64], columns: Sequence[str]) -> list[pa.RecordBatch]:
        num_rows = self.file.metadata.row_group(group).num_rows
        key = (self.path, tuple(columns))
        stream = self.streams.pop(key)
        if stream is None or stream.group != group or stream.start > wanted[0]:
            batch_rows = max(1, BATCH_BYTES * num_rows // max(1, self._decoded_bytes(group, columns)))
            stream = Stream(group, self.file.iter_batches(batch_rows, [group], list(columns), use_threads=False))
        found, end = [], 0
        while True:
            if stream.batch is not None:
                end = stream.start + len(stream.batch)
                inside = wanted[(wanted >= stream.start) & (wanted < end)] - stream.start
                if len(inside):
                    found.append(stream.batch.take(pa.array(inside)))
            if end > wanted[-1]:
                break
            stream.batch, stream.start = next(stream.batches, None), end
            if stream.batch is None:
                break
        if wanted[-1] < num_rows - 1 and stream.batch is not None:
            self.streams.get(key, lambda: stream)
        return found

    def _decoded_bytes(self, group: int, columns: Sequence[str]) -> int:
        """About how large some columns of a row group are in memory; on disk, numbers may be encoded much smaller."""
        metadata = self.file.metadata.row_group(group)
        chunks = [metadata.column(place) for place in range(metadata.num_columns)]
        # A list's numbers lie in a column below the list's own: name.list.element.
        wanted = [chunk for chunk in chunks if any(_belongs(chunk.path_in_schema, name) for name in columns)]
        return sum(
            max(chunk.total_uncompressed_size, chunk.num_values * NUMBER_BYTES.get(chunk.physical_type, 0))
            for chunk in wanted
        )

    def _integers(self, name: str, column: pa.ChunkedArray) -> NDArray[np.int64]:
        if not pa.types.is_integer(column.type) or column.null_count:
            raise BadFrameError(
                f"{self.path}: {name} is of type {column.type} with {column.null_count} empty rows, expected whole "
                f"numbers; {WAY_OUT}"
            )
        return column.to_numpy().astype(np.int64)

    @contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            raise BadFrameError(
                f"{self.path}: is cut short, damaged, or no parquet file ({' '.join(str(error).split())}); {WAY_OUT}"
            ) from error


def _is_of(kind: Kind, found: pa.DataType) -> bool:
    """Does a column's type hold what it must? A column in which every row is empty has no type."""
    if kind in ("numbers", "integers"):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        if not is_list:
            return pa.types.is_null(found)
        found = found.value_type
    if pa.types.is_dictionary(found):
        found = found.value_type
    whole = pa.types.is_null(found) or pa.types.is_integer(found)
    return {
        "number": whole or pa.types.is_floating(found),
        "numbers": whole or pa.types.is_floating(found),
        "integers": whole,
        "bytes": pa.types.is_null(found) or pa.types.is_binary(found) or pa.types.is_large_binary(found),
        "text": pa.types.is_null(found) or pa.types.is_string(found) or pa.types.is_large_string(found),
    }[kind]


def _belongs(path: str, column: str) -> bool:
    return path == column or path.startswith(f"{column}.list.")


class Recent:
    """The last few things that were made, by key: open files, for one.

    A forked process and a pickled copy begin with none, for a file handle must not be shared between processes.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int):
        self.size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "_kept": OrderedDict(), "_process": None}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What stands under a key, made now if it is not there."""
        if self._process != os.getpid():
            self._kept, self._process = OrderedDict(), os.getpid()
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def pop(self, key: Hashable) -> Any:
        """What stands under a key, which stands there no more; None where nothing does."""
        return self._kept.pop(key, None) if self._process == os.getpid() else None
