"""How do several pictures become one page that a person reads?"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from simipu3d.pictures.canvas import Picture, draw_text, enlarge, font

PAPER = (250, 250, 248)
INK = (30, 30, 34)
FAINT = (96, 98, 104)
MARGIN = 24
GAP = 12
TITLE_SIZE = 24
CAPTION_SIZE = 17
MAX_HEIGHT = 900
"""No picture of a page is higher than this, pixels."""


def page(rows: Sequence[tuple[str, Sequence[tuple[str, Picture]]]], *, width: int = 1800) -> Picture:
    """Rows of pictures under their titles, each picture over its caption.

    The pictures of a row share its width in proportion to their own. Small ones are enlarged by a whole number, so that
    every pixel stays a square; the others are fitted smoothly.

    Args:
        rows: (title, pictures) for each row; pictures are (caption, (H, W, 3)). Titles and captions may be empty.
        width: of the page, pixels.

    Returns:
        (height, width, 3).

    Raises:
        ValueError: no rows, or a row without a picture.
    """
    if not rows or any(not pictures for _, pictures in rows):
        raise ValueError("a page needs at least one row, and every row a picture")
    bands = [_blank(MARGIN, width)]
    for title, pictures in rows:
        if title:
            bands.append(_words(title, width, TITLE_SIZE, INK))
        bands.extend([_row(pictures, width), _blank(MARGIN, width)])
    return np.concatenate(bands)


def _blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), PAPER, dtype=np.uint8)


def _row(pictures: Sequence[tuple[str, Picture]], width: int) -> Picture:
    """One row: the fitted pictures side by side, captions beneath."""
    room = width - 2 * MARGIN - GAP * (len(pictures) - 1)
    factor = room / sum(image.shape[1] for _, image in pictures)
    fitted = [_resize(image, factor) for _, image in pictures]
    captions = [_wrap(caption, max(image.shape[1], 60)) for (caption, _), image in zip(pictures, fitted, strict=True)]
    lines = max(len(caption) for caption in captions)
    top = max(image.shape[0] for image in fitted)
    row = _blank(top + 6 + round(lines * CAPTION_SIZE * 1.35), width)
    left = MARGIN
    for caption, image in zip(captions, fitted, strict=True):
        row[: image.shape[0], left : left + image.shape[1]] = image
        for number, line in enumerate(caption):
            row = _write(row, line, (left, image.shape[0] + 4 + number * CAPTION_SIZE * 1.35), CAPTION_SIZE, FAINT)
        left += image.shape[1] + GAP
    return row


def _resize(image: Picture, factor: float) -> Picture:
    """Enlarged by the whole part of `factor` where that is 2 or more, else smoothly by `factor` itself."""
    factor = min(factor, MAX_HEIGHT / image.shape[0])
    if factor >= 2:
        return enlarge(image, int(factor))
    size = (max(1, int(image.shape[1] * factor)), max(1, int(image.shape[0] * factor)))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _words(text: str, width: int, size: int, colour: tuple[int, int, int]) -> Picture:
    lines = _wrap(text, width - 2 * MARGIN, size)
    band = _blank(round(len(lines) * size * 1.35) + 6, width)
    for number, line in enumerate(lines):
        band = _write(band, line, (MARGIN, number * size * 1.35), size, colour)
    return band


def _write(image: Picture, text: str, place: tuple[float, float], size: int, colour: tuple[int, int, int]) -> Picture:
    return draw_text(image, text, place, size=size, colour=colour, rim=None)


def _wrap(text: str, width: int, size: int = CAPTION_SIZE) -> list[str]:
    """The text in lines no wider than `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
