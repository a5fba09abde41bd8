"""Which colour does a depth, a height, a distance or a number get?

Colours are (..., 3) uint8 RGB.
"""

import numpy as np
from matplotlib import colormaps
from numpy.typing import ArrayLike, NDArray

NEAREST = 3.0
"""Depths below this, metres, share the warmest colour: little that is nearer lies in a driving camera's image."""

UNKNOWN = (24, 26, 32)
"""Where nothing is known, and the background of views from above."""


def colour_scale(values: ArrayLike, low: float, high: float, name: str = "turbo") -> NDArray[np.uint8]:
    """Values as colours of one of matplotlib's maps.

    Args:
        values: (...) numbers; beyond the ends they get the end's colour.
        low, high: what the first and the last colour stand for; low > high turns the map round.
        name: matplotlib's name. `turbo`'s first and last 5 %, nearly black, are left out of every map.

    Returns:
        (..., 3).
    """
    span = high - low if high != low else 1.0
    share = np.clip((np.asarray(values, dtype=np.float64) - low) / span, 0, 1)
    return (np.asarray(colormaps[name](0.05 + 0.9 * share))[..., :3] * 255).round().astype(np.uint8)


def depth_colours(depth: ArrayLike, max_depth: float) -> NDArray[np.uint8]:
    """(..., 3): near is warm (red), `max_depth` metres and beyond cold (blue); logarithmic, as depth errors are."""
    log_depth = np.log(np.clip(np.asarray(depth, dtype=np.float64), NEAREST, None))
    return colour_scale(log_depth, np.log(max(max_depth, NEAREST * 1.01)), np.log(NEAREST))


def depth_as_colours(depth: NDArray[np.floating], max_depth: float = 60.0) -> NDArray[np.uint8]:
    """A depth map as an image.

    Args:
        depth: (H, W) metres; 0, or anything that is no positive number, counts as unknown and stays dark.
        max_depth: metres that the coldest colour stands for.

    Returns:
        (H, W, 3).
    """
    known = np.isfinite(depth) & (depth > 0)
    image = depth_colours(np.where(known, depth, max_depth), max_depth)
    image[~known] = UNKNOWN
    return image


def id_colours(ids: ArrayLike) -> NDArray[np.uint8]:
    """(..., 3): a bright colour for every whole number, neighbours far apart on the colour circle (golden angle)."""
    hue = np.asarray(ids, dtype=np.float64)[..., None] * 0.6180339887498949 + np.array([0.0, 2 / 3, 1 / 3])
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * hue)
    return (60 + 195 * wave).round().astype(np.uint8)
