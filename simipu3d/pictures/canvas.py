"""How are dots, lines and words put on an image, and how does it reach the disk?

Images are (H, W, 3) uint8 RGB and are never changed in place. Pixels are (u, v) with integer centres.
"""

import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
SMOOTHING = 3
"""Lines are drawn this many times larger and reduced, which makes their edges smooth."""


def enlarge(image: Picture, scale: int) -> Picture:
    """(scale * H, scale * W, 3): every pixel becomes a square of `scale` x `scale`."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def fitting_scale(image: Picture, width: int = 900) -> int:
    """The largest whole enlargement at which the image is no wider than `width`; at least 1."""
    return max(1, width // image.shape[1])


def enlarged_pixels(pixels: NDArray[np.floating], scale: int) -> NDArray[np.float64]:
    """Where (N, 2) pixels of an image lie after `enlarge`: u' = (u + 0.5) scale - 0.5."""
    return (np.asarray(pixels, dtype=np.float64) + 0.5) * scale - 0.5


def draw_dots(image: Picture, pixels: NDArray[np.floating], colours: ArrayLike, radius: float = 1.0) -> Picture:
    """Filled discs, each over the ones before it.

    Args:
        image: (H, W, 3).
        pixels: (N, 2); discs outside the image are cut or left out. N may be 0.
        colours: (N, 3) or (3,).
        radius: pixels; below 1 a single pixel.

    Returns:
        (H, W, 3), a copy.
    """
    image = image.copy()
    near = np.isfinite(pixels).all(axis=1) & (np.abs(pixels) < 1e6).all(axis=1)
    centres = np.floor(pixels[near] + 0.5).astype(np.int64)
    own_colours = np.broadcast_to(np.asarray(colours, dtype=np.uint8), (len(pixels), 3))[near]
    reach = int(radius)
    steps = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    steps = steps[(steps**2).sum(axis=1) <= max(radius, 0.5) ** 2]
    covered = (centres[:, None] + steps[None]).reshape(-1, 2)
    own = np.arange(len(centres)).repeat(len(steps))
    inside = (covered >= 0).all(axis=1) & (covered < (image.shape[1], image.shape[0])).all(axis=1)
    flat = covered[inside, 1] * image.shape[1] + covered[inside, 0]
    # Of the discs over one pixel the last counts; an assignment with repeated indices would not promise that.
    last = np.full(image.shape[0] * image.shape[1], -1)
    np.maximum.at(last, flat, own[inside])
    image.reshape(-1, 3)[last >= 0] = own_colours[last[last >= 0]]
    return image


def draw_lines(image: Picture, segments: NDArray[np.floating], colours: ArrayLike, width: float = 2.0) -> Picture:
    """Smooth straight lines, each over the ones before it.

    Args:
        image: (H, W, 3).
        segments: (S, 2, 2) pixels of both ends; what lies outside the image is cut. S may be 0.
        colours: (S, 3) or (3,).
        width: pixels.

    Returns:
        (H, W, 3), a copy.
    """
    height, total = image.shape[:2]
    colours = np.broadcast_to(np.asarray(colours, dtype=np.uint8), (len(segments), 3))
    layer = Image.new("RGBA", (total * SMOOTHING, height * SMOOTHING), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for segment, colour in zip(segments, colours, strict=True):
        cut = _cut(segment, -10.0, -10.0, total + 10.0, height + 10.0)
        if cut is not None:
            ends = (cut + 0.5) * SMOOTHING - 0.5
            draw.line([tuple(end) for end in ends.tolist()], tuple(colour.tolist()), max(1, round(width * SMOOTHING)))
    smooth = layer.resize((total, height), Image.Resampling.BOX)
    return np.array(Image.alpha_composite(Image.fromarray(image).convert("RGBA"), smooth).convert("RGB"))


def _cut(segment: NDArray, left: float, top: float, right: float, bottom: float) -> NDArray | None:
    """The part of a (2, 2) segment inside a rectangle, None where there is none (Liang & Barsky 1984)."""
    if not np.isfinite(segment).all():
        return None
    start, step = segment[0], segment[1] - segment[0]
    first, last = 0.0, 1.0
    for axis, low, high in ((0, left, right), (1, top, bottom)):
        if step[axis] == 0:
            if not low <= start[axis] <= high:
                return None
            continue
        enter, leave = sorted(((low - start[axis]) / step[axis], (high - start[axis]) / step[axis]))
        first, last = max(first, enter), min(last, leave)
    return np.stack([start + first * step, start + last * step]) if first <= last else None


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that no machine lacks it."""
    return ImageFont.load_default(size)


def draw_text(
    image: Picture,
    text: str,
    place: tuple[float, float],
    *,
    size: int = 14,
    colour: tuple[int, int, int] = (235, 235, 235),
    rim: tuple[int, int, int] | None = (16, 16, 20),
) -> Picture:
    """Words at `place`, the (u, v) of their top-left corner; a rim in another colour keeps them legible on pictures."""
    canvas = Image.fromarray(image)
    stroke = 0 if rim is None else max(1, size // 9)
    draw = ImageDraw.Draw(canvas)
    draw.text(place, text, fill=colour, font=font(size), stroke_width=stroke, stroke_fill=rim)
    return np.array(canvas)


def side_by_side(images: list[Picture], gap: int = 12, background: tuple[int, int, int] = (255, 255, 255)) -> Picture:
    """Images in one row, top edges level, `gap` pixels between them."""
    height = max(image.shape[0] for image in images)
    width = sum(image.shape[1] for image in images) + gap * (len(images) - 1)
    row = np.full((height, width, 3), background, dtype=np.uint8)
    left = 0
    for image in images:
        row[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1] + gap
    return row


def images_a_row(number: int) -> int:
    """How many of `number` cameras' images stand in a row: one or two are wide, four make a square, others rows of 3."""
    return {1: 1, 2: 1, 4: 2}.get(number, 3)


def mosaic(
    images: Sequence[Picture], names: Sequence[str], *, scale: int = 1, background: tuple[int, int, int] = (20, 21, 26)
) -> tuple[Picture, NDArray[np.int64]]:
    """The images of a frame's cameras as one picture, each under its name where there are several.

    Args:
        images: I pictures, at least one; sizes may differ.
        names: I names.
        scale: the images are enlarged this many times first.
        background: where no image is.

    Returns:
        picture: (H, W, 3).
        places: (I, 2) the pixel (u, v) of the picture on which the first pixel of each enlarged image lies.
    """
    columns, several = images_a_row(len(images)), len(images) > 1
    height, width = (max(image.shape[axis] for image in images) * scale for axis in (0, 1))
    size = int(np.clip(width / 28, 11, 36))
    strip, gap = (round(1.4 * size), 6) if several else (0, 0)
    rows = -(-len(images) // columns)
    picture = np.full(
        (rows * (strip + height + gap) - gap, columns * (width + gap) - gap, 3), background, dtype=np.uint8
    )
    places = np.zeros((len(images), 2), dtype=np.int64)
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(number, columns)
        left, top = column * (width + gap), row * (strip + height + gap) + strip
        places[number] = left, top
        picture[top : top + image.shape[0] * scale, left : left + image.shape[1] * scale] = enlarge(image, scale)
        if several:
            picture = draw_text(picture, name, (left + 2, top - strip), size=size, rim=None)
    return picture, places


def save_png(path: str | Path, image: Picture) -> Path:
    """Write a PNG whole or not at all (a temporary file beside it, then a rename); missing folders are made.

    Raises:
        ValueError: the image is not (H, W, 3) uint8.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3) uint8, got {image.shape} {image.dtype}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".png", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(image).save(file, format="PNG")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
