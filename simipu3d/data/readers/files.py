"""How are the files of a data set read, so that a damaged one becomes one clear line?

Every function raises `BadFrameError` that names the file, what was found in it and the way out.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from simipu3d.errors import BadFrameError

WAY_OUT = "restore the file, take the frame off the split, or set data.on_bad_frame=skip"


def read_bytes(path: Path) -> bytes:
    """The whole file; a missing, unreadable or empty one is a bad frame."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadFrameError(f"{path}: no such file; {WAY_OUT}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one of a file, with a zero byte in it
        raise BadFrameError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); {WAY_OUT}") from error
    if not content:
        raise BadFrameError(f"{path}: the file is empty; {WAY_OUT}")
    return content


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise BadFrameError(f"{path}: is not a text file; {WAY_OUT}") from None


def read_float_rows(path: Path, num_columns: int) -> NDArray[np.float32]:
    """(N, num_columns) float32 of a file of little-endian floats, row after row."""
    content = read_bytes(path)
    row_bytes = 4 * num_columns
    if len(content) % row_bytes:
        raise BadFrameError(
            f"{path}: {len(content)} bytes are no whole number of points ({row_bytes} bytes each), so the file is cut "
            f"short or of another kind; {WAY_OUT}"
        )
    return np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(-1, num_columns)


def read_npy(path: Path) -> NDArray:
    """The array of a .npy file; one that holds Python objects is refused, for reading it could run code."""
    try:
        return np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError, MemoryError) as error:
        raise BadFrameError(
            f"{path}: is no .npy file of plain numbers, or is cut short ({' '.join(str(error).split())}); {WAY_OUT}"
        ) from error


def decode_image(content: bytes, source: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of an image file's bytes; `source` names the file."""
    with _image_damage(source), Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def decode_map(content: bytes, source: str) -> NDArray:
    """(H, W) of a greyscale image file's bytes, as its numbers are: 8 or 16 bits; `source` names the file."""
    with _image_damage(source), Image.open(io.BytesIO(content)) as image:
        values = np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise BadFrameError(f"{source}: must be a greyscale image of whole numbers, is of mode {image.mode}; {WAY_OUT}")
    return values


def read_image_size(path: Path) -> tuple[int, int]:
    """Height and width from an image file's header alone."""
    try:
        with _image_damage(str(path)), path.open("rb") as file, Image.open(file) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise BadFrameError(f"{path}: no such file; {WAY_OUT}") from None


def unread_image(size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3), black, without memory of its own: stands for an image of which only the size is needed."""
    return np.broadcast_to(np.uint8(0), (*size, 3))


@contextmanager
def _image_damage(source: str) -> Iterator[None]:
    """What Pillow raises becomes a `BadFrameError`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise BadFrameError(f"{source}: is not an image, or its first bytes are damaged; {WAY_OUT}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadFrameError(
            f"{source}: the image is cut short or damaged ({' '.join(str(error).split())}); {WAY_OUT}"
        ) from error
