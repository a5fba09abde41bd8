"""How well do depth edges of a scan meet the edges of its picture, and where would they meet best?

Shapes: E depth edges, S offsets that were tried.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simipu3d.pictures.canvas import Picture, draw_dots, draw_lines, draw_text, enlarge, enlarged_pixels, fitting_scale

UPRIGHT_COLOUR = (60, 220, 255)
LEVEL_COLOUR = (255, 90, 200)
CURVE_COLOUR = (32, 92, 190)
SPREAD_COLOUR = (150, 180, 225)
GIVEN_COLOUR = (110, 110, 116)
BEST_COLOUR = (200, 60, 30)
PAPER = (255, 255, 255)
SIZE = (420, 860)
"""Height and width of a plot, pixels."""
FRAME = (56, 20, 40, 60)
"""Room left, right, above and below the curve of a plot, pixels."""


def draw_depth_edges(
    image: Picture, pixels: NDArray[np.floating], upright: NDArray[np.bool_], *, width: int = 1700
) -> Picture:
    """Depth edges on a darkened picture: upright ones cyan, level ones magenta.

    Args:
        image: (H, W, 3).
        pixels: (E, 2). E may be 0.
        upright: (E,) bool.
        width: about how wide the result should be, pixels.
    """
    scale = fitting_scale(image, width)
    dark = (enlarge(image, scale) * 0.6).astype(np.uint8)
    colours = np.where(upright[:, None], UPRIGHT_COLOUR, LEVEL_COLOUR).astype(np.uint8)
    return draw_dots(dark, enlarged_pixels(pixels, scale), colours, max(1.0, dark.shape[1] / 1200))


def plot_scores(
    offsets: NDArray[np.floating],
    scores: NDArray[np.floating],
    errors: NDArray[np.floating],
    best: float,
    words: tuple[str, str],
) -> Picture:
    """A curve of scores over offsets with its spread; grey: as given, red: best.

    Args:
        offsets: (S,) pixels, ascending.
        scores, errors: (S,).
        best: pixels.
        words: title, and what is to the left and right.
    """
    height, width = SIZE
    left, right, top, bottom = FRAME
    low, high = float((scores - errors).min()), float((scores + errors).max())
    room = max(high - low, 1e-6)

    def place(x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        across = left + (np.asarray(x) - offsets[0]) / (offsets[-1] - offsets[0]) * (width - left - right)
        return np.stack([across, height - bottom - (np.asarray(y) - low) / room * (height - top - bottom)], axis=-1)

    def lines(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([points[:-1], points[1:]], axis=1)

    picture = np.full((height, width, 3), PAPER, dtype=np.uint8)
    for x, colour in ((0.0, GIVEN_COLOUR), (best, BEST_COLOUR)):
        picture = draw_lines(picture, place([x, x], [low, high])[None], colour, 2)
    bars = np.stack([place(offsets, scores - errors), place(offsets, scores + errors)], axis=1)
    picture = draw_lines(picture, bars, SPREAD_COLOUR, 4)
    picture = draw_lines(picture, lines(place(offsets, scores)), CURVE_COLOUR, 2.5)
    picture = draw_lines(picture, place([offsets[0], offsets[-1]], [low, low])[None], GIVEN_COLOUR, 1)
    for tick in _ticks(offsets):
        picture = draw_text(
            picture,
            f"{tick:+g}" if tick else "0",
            (place(tick, low)[0] - 12, height - bottom + 8),
            rim=None,
            colour=GIVEN_COLOUR,
        )
    picture = draw_text(picture, words[0], (left, 10), size=18, colour=(30, 30, 34), rim=None)
    return draw_text(picture, words[1], (left, height - 26), size=14, colour=GIVEN_COLOUR, rim=None)


def _ticks(offsets: NDArray[np.floating]) -> Sequence[float]:
    """Round numbers, about nine of them."""
    step = (offsets[-1] - offsets[0]) / 8
    step = next((size for size in (0.5, 1, 2, 5, 10, 20, 50, 100) if size >= step), 200)
    first = int(np.ceil(offsets[0] / step))
    return [number * step for number in range(first, int(offsets[-1] // step) + 1)]
