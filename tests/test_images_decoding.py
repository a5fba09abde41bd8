"""Images as they come: formats, bit depths, orientations, sizes and damage."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from simipu3d.data.readers import files
from simipu3d.data.readers.files import decode_image, image_names
from simipu3d.errors import BadFrameError

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 1 << 16, (6, 9)).astype(np.uint16)
GREY16[0, :2] = 0, 65535


def encode(image, form="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def png(values, colour_type, bits):
    """A PNG written by hand: (H, W, C) integers of `bits` bits; Pillow writes no colour of 16 bits."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = values.shape[:2]
    rows = values.astype(">u2" if bits == 16 else "u1").reshape(height, -1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_lossless_formats_give_the_pixels(form):
    assert np.array_equal(decode_image(encode(PICTURE, form, lossless=True), "a"), PICTURE)


def test_grey_palette_alpha_and_jpeg():
    grey = PICTURE[..., 0]
    assert np.array_equal(decode_image(encode(grey), "a"), np.repeat(grey[..., None], 3, axis=2))
    alpha = np.concatenate([PICTURE, np.full((6, 9, 1), 7, np.uint8)], axis=2)
    assert np.array_equal(decode_image(encode(alpha), "a"), PICTURE)
    flat = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    palette = Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(decode_image(encode(palette), "a"), flat)
    assert np.abs(decode_image(encode(flat, "JPEG"), "a").astype(int) - flat).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    """255 x / 65535, rounded: 0 is black, 65535 white, 32768 is 128."""
    expected = np.round(GREY16 / 257.0).astype(np.uint8)
    assert np.array_equal(decode_image(encode(GREY16, form), "a"), np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bits_of_colour_are_scaled():
    colour = RNG.integers(0, 1 << 16, (6, 9, 3))
    decoded = decode_image(png(colour, 2, 16), "a")
    assert np.abs(decoded - colour / 257.0).max() <= 1
    with_alpha = np.concatenate([colour, np.full((6, 9, 1), 9)], axis=2)
    assert np.array_equal(decode_image(png(with_alpha, 6, 16), "a"), decoded)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_stored_in_sixteen_are_refused(bits):
    """12 bits in 16 would decode to 16 levels of black."""
    values = RNG.integers(0, 1 << bits, (6, 9, 3))
    values[0, 0] = (1 << bits) - 1
    for content in (
        png(values, 2, 16),
        encode(values[..., 0].astype(np.uint16)),
        encode(values[..., 0].astype(np.uint16), "TIFF"),
    ):
        with pytest.raises(BadFrameError, match="never uses the highest two") as caught:
            decode_image(content, "dark.png")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_bit_depth_are_refused(dtype):
    values = (RNG.random((6, 9)) * 1000).astype(dtype)
    with pytest.raises(BadFrameError, match="say nothing about where white is"):
        decode_image(encode(values, "TIFF"), "a")


def test_an_inverted_tiff_of_sixteen_bits_is_refused():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    content = encode(GREY16, "TIFF", tiffinfo=tags)
    assert Image.open(io.BytesIO(content)).tag_v2[262] == 0, "the tag has been written"
    with pytest.raises(BadFrameError):
        decode_image(content, "a")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed(form, orientation):
    """Written as a camera in that position stores it, every picture decodes to the upright one."""
    upright = np.kron(PICTURE[:2, :3], np.ones((16, 16, 1), np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),  # to be turned clockwise by 90 degrees
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    decoded = decode_image(encode(np.ascontiguousarray(stored), form, exif=exif, **options), "a")
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= 4


def test_other_formats_start_nothing(monkeypatch):
    """EPS under another name would start Ghostscript; AVIF's plug-in raises RuntimeError."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n%%EOF\n"
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("an external program was started"))
    avif = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0" * 64
    for content in (eps, avif, encode(PICTURE, "GIF"), encode(PICTURE, "ICO"), b"", b"P"):
        with pytest.raises(BadFrameError, match="is not an image of PNG, JPEG"):
            decode_image(content, "front.png")


@pytest.mark.parametrize("size", [(6400, 6300), (12000, 12000), (60000, 60000)])
def test_the_size_is_known_before_decoding(size, monkeypatch):
    head = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    content = png(PICTURE, 2, 8)
    content = content[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + content[33:]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(BadFrameError, match="at most 40 million"):
        decode_image(content, "bomb.png")
    assert files.MAX_PIXELS > 7680 * 4320


def decoded_or_refused(content):
    """The picture, or None where it was refused in one line that names the file."""
    try:
        return decode_image(content, "hurt")
    except BadFrameError as error:
        return None if str(error).startswith("hurt: ") and "\n" not in str(error) else str(error)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM"])
def test_damage_is_a_bad_frame(form):
    """Cut at every length and with bytes changed at random: a picture or the project's own error, nothing else."""
    picture = RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    content = encode(picture, form)
    cut = [decoded_or_refused(content[:length]) for length in np.linspace(0, len(content) - 1, 60).astype(int)]
    assert sum(each is None for each in cut) >= 50
    assert not any(isinstance(each, str) for each in cut)
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 300), 4):
            damaged[place] = rng.integers(256)
        assert not isinstance(decoded_or_refused(bytes(damaged)), str)


def test_an_image_is_found_under_any_suffix(tmp_path):
    for name in ("a.jpg", "b.png", "b.jpg", "c.tiff", "._a.png", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    names = image_names(tmp_path)
    assert set(names) == {"a", "b", "c"}
    assert names["a"] == "a.jpg"
    assert names["b"] == "b.png", "the official one first"
    assert image_names(tmp_path / "missing") == {}
