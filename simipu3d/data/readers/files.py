"""How are the files of a data set read, so that a damaged one becomes one clear line?

Every function that takes a file of a frame raises `BadFrameError` that names it, what was found in it and the way out.
"""

import errno
import io
import json
import os
import stat
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from simipu3d.errors import BadFrameError

WAY_OUT = "restore the file, take the frame off the split, or set data.on_bad_frame=skip"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM")
"""Formats that are decoded, by content whatever the file is called. No other plug-in of Pillow is tried: some of them
start an interpreter (EPS), others raise whatever they like."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm")
"""What an image file may be called, in the order in which one is preferred to another of the same stem."""
MAX_PIXELS = 40_000_000
"""An image with more pixels than this is refused by its header (8K has 33 million): a small file can decode to gigabytes."""
EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
"""Pillow's modes of images with at most 8 bits a channel; alpha is dropped."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> how the stored rows become the picture (EXIF 2.32, tag 274)."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262
"""Tags of EXIF and TIFF."""


MAX_DIGITS = 18
"""An integer of a JSON text with more digits does not fit into int64, and is taken for the float it is nearest to."""


def check_plain_file(path: Path) -> None:
    """Raise `OSError` unless a path leads to a plain file: a pipe would be waited for, a device never ends."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device, no plain file"
        raise OSError(errno.EINVAL, what)


def plain_name(name: str) -> bool:
    """Does a file's name, as a table or a list has it, stay below the folder that it is relative to?

    By the name alone: a link that a user put there may lead elsewhere.
    """
    try:
        parts = name.encode().split(b"/")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    short = len(name) < 1024 and all(len(part) <= 255 for part in parts)
    return short and "\0" not in name and not {b"", b"..", b"."} & set(parts)


def text_of(path: Path) -> str:
    """The whole file as UTF-8 text, a byte order mark taken off: the one way in which texts are read.

    Raises:
        OSError: it cannot be read, or is no plain file.
        ValueError: its name cannot be one of a file; UnicodeDecodeError: it is no UTF-8.
    """
    check_plain_file(path)
    return path.read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Integers beyond int64 become floats, so that whoever needs an integer sees that there is none.

    Raises:
        ValueError: it is no JSON, nested too deep, or holds half of a surrogate pair, which is no text.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text.removeprefix("\ufeff"), parse_int=bounded_int)
        if has_surrogate_escapes(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def bounded_int(digits: str) -> int | float:
    """An integer of a JSON text, see `MAX_DIGITS`."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def has_surrogate_escapes(text: str) -> bool:
    """May a JSON text hold halves of surrogate pairs? Whole pairs are possible too."""
    return "\\ud" in text or "\\uD" in text


def read_bytes(path: Path) -> bytes:
    """The whole file; a missing, unreadable or empty one is a bad frame."""
    try:
        check_plain_file(path)
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadFrameError(f"{path}: no such file; {WAY_OUT}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one of a file, with a zero byte in it
        raise BadFrameError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); {WAY_OUT}") from error
    if not content:
        raise BadFrameError(f"{path}: the file is empty; {WAY_OUT}")
    return content


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text, a byte order mark taken off."""
    try:
        return read_bytes(path).decode("utf-8-sig")
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
    """The array of a .npy file."""
    return decode_npy(read_bytes(path), str(path))


def decode_npy(content: bytes, source: str) -> NDArray:
    """The array of a .npy file's bytes; one that holds Python objects is refused, for reading it could run code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd words in a header before numpy refuses them
            array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (
        *(ValueError, EOFError, SyntaxError, TypeError, MemoryError, OverflowError, RecursionError, KeyError),
        *(AttributeError, IndexError, tokenize.TokenError),
    ) as error:
        raise BadFrameError(
            f"{source}: is no .npy file of plain numbers, or is cut short ({' '.join(str(error).split())}); {WAY_OUT}"
        ) from error
    if array.dtype.kind not in "biuf":
        raise BadFrameError(f"{source}: holds {array.dtype}, which are no plain numbers; {WAY_OUT}")
    return array


def image_names(folder: Path) -> dict[str, str]:
    """Stem -> file name of the images in a folder (none where there is no such folder); of two with one stem, that whose
    suffix comes first in `IMAGE_SUFFIXES`. Files that begin with a dot are none."""
    if not folder.is_dir():
        return {}
    paths = [p for p in folder.iterdir() if p.suffix in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return {p.stem: p.name for p in sorted(paths, key=lambda p: -IMAGE_SUFFIXES.index(p.suffix))}


def decode_image(content: bytes, source: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of an image file's bytes.

    Grey becomes three equal channels. 16 bits a channel are scaled to 8, never clipped. EXIF's orientation is followed, as
    OpenCV and viewers do: a calibration belongs to the upright picture.

    Args:
        content: the file.
        source: names the file in messages.

    Raises:
        BadFrameError: no image of `IMAGE_FORMATS`, damaged, more than `MAX_PIXELS` pixels, numbers without a bit depth
            (float, 32 bits), or 16 bits whose highest two are never used: such a file holds fewer bits than it says.
    """
    with _opened(content, source) as image:
        bits = _bits_per_channel(image, content)
        image.load()
        pixels = _eight_bits(image, bits, source)
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
        return np.asarray(pixels if turn is None else pixels.transpose(turn))


def decode_map(content: bytes, source: str) -> NDArray:
    """(H, W) of a greyscale image file's bytes, as its numbers are: 8 or 16 bits; `source` names the file."""
    with _opened(content, source) as image:
        values, mode = np.asarray(image), image.mode
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise BadFrameError(f"{source}: must be a greyscale image of whole numbers, is of mode {mode}; {WAY_OUT}")
    return values


def read_image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright picture, from an image file's header alone."""
    try:
        check_plain_file(path)
        with path.open("rb") as file, _opened(file, str(path)) as image:
            # Pillow's PNG decodes the whole picture to look for the tag behind it; the header has it before.
            turned = Image.Image.getexif(image).get(ORIENTATION) in SIDEWAYS
            return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError:
        raise BadFrameError(f"{path}: no such file; {WAY_OUT}") from None
    except OSError as error:
        raise BadFrameError(f"{path}: cannot be read ({error.strerror}); {WAY_OUT}") from error


def unread_image(size: tuple[int, int], source: str) -> NDArray[np.uint8]:
    """(H, W, 3), black, without memory of its own: stands for an image of which only the size is needed.

    Raises:
        BadFrameError: no image that is read has this size; `source` says where it stands.
    """
    if len(size) != 2 or not all(isinstance(edge, int) and edge > 0 for edge in size) or size[0] * size[1] > MAX_PIXELS:
        raise BadFrameError(
            f"{source}: an image of {' x '.join(map(str, size))[:80]} pixels is none; it needs height and width above 0, at "
            f"most {MAX_PIXELS / 1e6:.0f} million pixels; {WAY_OUT}"
        )
    return np.broadcast_to(np.uint8(0), (*size, 3))


@contextmanager
def _opened(content: bytes | BinaryIO, source: str) -> Iterator[Image.Image]:
    """An image file of `IMAGE_FORMATS`, its header read; what Pillow raises while it is open becomes a `BadFrameError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged tags that do not matter for the pixels
            # Pillow warns, and later fails, at sizes far beyond MAX_PIXELS; both become the same line.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(content) if isinstance(content, bytes) else content
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadFrameError(_too_large(source, f"{image.width} x {image.height} pixels"))
                yield image
    except BadFrameError:
        raise
    except UnidentifiedImageError:
        raise BadFrameError(
            f"{source}: is not an image of {', '.join(IMAGE_FORMATS)}, or its first bytes are damaged; {WAY_OUT}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadFrameError(_too_large(source, "far more pixels")) from None
    except Exception as error:  # Pillow's decoders raise what they like on damaged bytes, and nobody lists it
        raise BadFrameError(
            f"{source}: the image is cut short or damaged ({' '.join(str(error).split())}); {WAY_OUT}"
        ) from error


def _too_large(source: str, size: str) -> str:
    return f"{source}: the image says it has {size}, at most {MAX_PIXELS / 1e6:.0f} million are read; make it smaller"


def _bits_per_channel(image: Image.Image, content: bytes) -> int:
    """As the header says; 8 for formats that have no more."""
    if image.format == "PNG":
        return content[24]  # IHDR comes first in every PNG: signature 8, length 4, name 4, width 4, height 4
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    return 16 if image.mode.startswith("I") else 8


def _eight_bits(image: Image.Image, bits: int, source: str) -> Image.Image:
    """The RGB image with 8 bits a channel."""
    name = f"{source}: the {image.format} has"
    if image.mode in EIGHT_BIT_MODES:
        scaled = image.convert("RGB")
        highest = max(high for _, high in scaled.getextrema()) << 8  # of 16 bits, Pillow has dropped the lower 8
    elif image.mode.startswith("I") and 8 < bits <= 16 and not _inverted(image):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0:
            raise BadFrameError(f"{name} signed numbers, which are no picture; save it with 8 bits a channel")
        highest = int(values.max())
        scaled = Image.fromarray((values * (255 / (2**bits - 1))).round().astype(np.uint8)).convert("RGB")
    else:
        raise BadFrameError(
            f"{name} {bits} bits a channel (mode {image.mode}), which say nothing about where white is; save it with 8 "
            "bits a channel"
        )
    if bits == 16 and highest < 1 << 14:
        raise BadFrameError(
            f"{name} 16 bits a channel and never uses the highest two: fewer bits were stored in 16, and the picture "
            "would be nearly black; scale its values to 16 bits, or save it with 8"
        )
    return scaled


def _inverted(image: Image.Image) -> bool:
    """Is 0 white? Pillow inverts such TIFFs up to 8 bits only."""
    return image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0
