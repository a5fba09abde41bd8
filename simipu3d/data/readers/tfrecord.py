"""Where does each record of a .tfrecord file lie, and is what is read from it what was written?

A record is its length (uint64), the masked CRC-32C of these eight bytes, the data, and the masked CRC-32C of the data
(uint32 each, little-endian); a file is records one after the other, without header or table of contents. Source: the
TFRecord format as TensorFlow documents it; CRC-32C as in RFC 3720, appendix B.4.
"""

import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from simipu3d.errors import BadFrameError, UserError

WAY_OUT = "download the file again, or leave its segment out with data.split_file"
FRAME_WAY_OUT = "download the file again, leave its segment out with data.split_file, or set data.on_bad_frame=skip"

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _LENGTH.size + _CRC.size


def masked_crc(data: bytes) -> int:
    """The checksum that a record stores: CRC-32C turned right by 15 bits, plus a constant, modulo 2^32."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan_records(path: Path, num_head_bytes: int = 0) -> tuple[NDArray[np.int64], list[bytes]]:
    """Find the records by their lengths, jumping over the data: one short read a record.

    Args:
        path: the file.
        num_head_bytes: also return so many first bytes of each record's data, their checksum not compared; they come
            out of the same read, so that a few thousand cost next to nothing.

    Returns:
        offsets: (N,) where each record starts in the file, bytes. N is at least 1.
        heads: N times at most `num_head_bytes` bytes.

    Raises:
        UserError: the file cannot be read, is empty, ends within a record, or a length does not match its checksum.
    """
    offsets, heads, offset = [], [], 0
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while offset < size:
                file.seek(offset)
                start = file.read(_HEADER_BYTES + num_head_bytes)
                length = _record_length(start[:_HEADER_BYTES], size - offset)
                offsets.append(offset)
                heads.append(start[_HEADER_BYTES : _HEADER_BYTES + min(length, num_head_bytes)])
                offset += _HEADER_BYTES + length + _CRC.size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {WAY_OUT}") from error
    except _FramingError as error:
        raise UserError(f"{path}: record {len(offsets)} at byte {offset}: {error}; {WAY_OUT}") from None
    if not offsets:
        raise UserError(f"{path}: the file is empty; {WAY_OUT}")
    return np.array(offsets, dtype=np.int64), heads


def read_record(path: Path, offset: int, number: int) -> bytes:
    """The data of the record that starts at a byte offset, both its checksums compared.

    Args:
        path: the file; it is opened and closed here, so that no process inherits another's place in it.
        offset: from `scan_records`.
        number: of the record, for the message.

    Raises:
        BadFrameError: the file cannot be read, ends within the record, or a checksum does not match.
    """
    try:
        with path.open("rb") as file:
            return _read_at(file, offset)
    except OSError as error:
        raise BadFrameError(f"{path}: cannot be read ({error.strerror}); {FRAME_WAY_OUT}") from error
    except _FramingError as error:
        raise BadFrameError(f"{path}: record {number} at byte {offset}: {error}; {FRAME_WAY_OUT}") from None


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Write a file of records, whole or not at all; also when the records' own making fails half-way.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            for record in records:
                length = _LENGTH.pack(len(record))
                file.write(length + _CRC.pack(masked_crc(length)))
                file.write(record)
                file.write(_CRC.pack(masked_crc(record)))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose a folder with space that you may write"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


class _FramingError(Exception):
    """What is wrong with a record; its callers know the file."""


def _record_length(header: bytes, num_left: int) -> int:
    """Data bytes of a record, from its first 12 bytes and the number of bytes from its start to the file's end."""
    if len(header) < _HEADER_BYTES:
        raise _FramingError(f"the file ends {len(header)} bytes into it, so it is cut short")
    (length,) = _LENGTH.unpack_from(header)
    if _CRC.unpack_from(header, _LENGTH.size)[0] != masked_crc(header[: _LENGTH.size]):
        raise _FramingError(
            f"its length {length} does not match the checksum, so the file is damaged here or is no uncompressed TFRecord"
        )
    missing = _HEADER_BYTES + length + _CRC.size - num_left
    if missing > 0:
        raise _FramingError(f"the file ends {missing} bytes before its end, so it is cut short")
    return length


def _read_at(file: BinaryIO, offset: int) -> bytes:
    num_left = os.fstat(file.fileno()).st_size - offset
    file.seek(offset)
    length = _record_length(file.read(_HEADER_BYTES), num_left)
    data, crc = file.read(length), file.read(_CRC.size)
    if len(data) + len(crc) < length + _CRC.size:
        raise _FramingError("the file became shorter while it was read")
    if _CRC.unpack(crc)[0] != masked_crc(data):
        raise _FramingError(f"its {length} bytes do not match their checksum, so the file is damaged here")
    return data
