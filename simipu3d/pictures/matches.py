"""Which token of one view belongs to which token of the other, and to which pixel?

Lidar frames of reference are those of the views, metres. Shapes: N points, P pairs, M tokens.
"""

import numpy as np
from numpy.typing import NDArray

from simipu3d.pictures.bird_eye import bird_eye, fit_extent, ground_pixels, inside_extent
from simipu3d.pictures.canvas import (
    Picture,
    draw_dots,
    draw_lines,
    draw_text,
    enlarge,
    enlarged_pixels,
    font,
    side_by_side,
)
from simipu3d.pictures.colours import UNKNOWN, colour_scale, id_colours

GAP = 16
WIDTH = 1750
HEIGHT = 850
"""Two views together are no wider and no higher than this, pixels."""
POINT_COLOUR = (112, 118, 130)


def draw_matches(
    xyz_a: NDArray[np.floating],
    xyz_b: NDArray[np.floating],
    pairs: NDArray[np.integer],
    distance: NDArray[np.floating],
    *,
    points_a: NDArray[np.floating] | None = None,
    points_b: NDArray[np.floating] | None = None,
    max_lines: int = 48,
    max_distance: float | None = None,
    poses: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> Picture:
    """Two point views from above, side by side, with lines between matched tokens: near matches green, far ones red.

    Args:
        xyz_a, xyz_b: (M, 3) and (M', 3) tokens, each in the frame of its view.
        pairs: (P, 2) rows of `xyz_a` and `xyz_b`. P may be 0.
        distance: (P,) metres between the partners where the matching measured it (the lidar frame).
        points_a, points_b: (N, 3 + F) all points of the views, drawn grey beneath the tokens; None: the tokens.
        max_lines: this many pairs are drawn, evenly spread over the bearing of the first view's tokens; pairs with an
            end outside the part of the ground that is shown are left out.
        max_distance: metres that full red stands for; None: the largest drawn one, at least 0.5.
        poses: (4, 4) augmented_from_lidar of each view, to show where the sensor is in it; None: at both origins.

    Returns:
        (H, W, 3).
    """
    pairs, distance = np.asarray(pairs, dtype=np.int64).reshape(-1, 2), np.asarray(distance, dtype=np.float64)
    poses = (np.eye(4), np.eye(4)) if poses is None else poses
    beneath = [xyz if points is None else points for points, xyz in ((points_a, xyz_a), (points_b, xyz_b))]
    extents = [fit_extent(points, pose[:2, 3]) for points, pose in zip(beneath, poses, strict=True)]
    scale = min(
        (WIDTH - GAP) / sum(extent.y_max - extent.y_min for extent in extents),
        HEIGHT / max(extent.x_max - extent.x_min for extent in extents),
    )
    panels = [
        bird_eye(points, extent=extent, pixels_per_metre=scale, colours=_grey(points), augmented_from_lidar=pose)
        for points, extent, pose in zip(beneath, extents, poses, strict=True)
    ]
    picture = side_by_side(panels, gap=GAP, background=(0, 0, 0))
    in_sight = inside_extent(xyz_a[pairs[:, 0]], extents[0]) & inside_extent(xyz_b[pairs[:, 1]], extents[1])
    pairs, distance = pairs[in_sight], distance[in_sight]
    shown = _spread(xyz_a[pairs[:, 0]], max_lines)
    pairs, distance = pairs[shown], distance[shown]
    largest = max(0.5, distance.max(initial=0.0)) if max_distance is None else max_distance
    colours = colour_scale(distance, largest, 0.0, "RdYlGn")
    start = ground_pixels(xyz_a[pairs[:, 0], :2], extents[0], scale)
    end = ground_pixels(xyz_b[pairs[:, 1], :2], extents[1], scale) + np.array([panels[0].shape[1] + GAP, 0])
    picture = draw_lines(picture, np.stack([start, end], axis=1), colours, 1.2)
    picture = _ringed(_ringed(picture, start, colours), end, colours)
    return _with_scale(picture, f"{len(pairs)} pairs shown, match distance", largest)


def _grey(points: NDArray) -> NDArray[np.uint8]:
    return np.full((len(points), 3), POINT_COLOUR, dtype=np.uint8)


def _ringed(picture: Picture, pixels: NDArray, colours: NDArray[np.uint8], radius: float = 5) -> Picture:
    """Dots with a dark rim."""
    return draw_dots(draw_dots(picture, pixels, (16, 16, 20), radius + 1), pixels, colours, radius)


def _spread(xyz: NDArray, number: int) -> NDArray[np.int64]:
    """Rows of `number` tokens, evenly spread over their bearing; all where there are fewer."""
    if len(xyz) <= number:
        return np.arange(len(xyz))
    by_bearing = np.argsort(np.arctan2(xyz[:, 1], xyz[:, 0]), kind="stable")
    return by_bearing[np.linspace(0, len(xyz) - 1, number).round().astype(np.int64)]


def _with_scale(picture: Picture, label: str, largest: float) -> Picture:
    """The picture over a strip that says what the colours of its lines stand for, metres."""
    strip = np.full((30, picture.shape[1], 3), UNKNOWN, dtype=np.uint8)
    strip = draw_text(strip, f"{label}  0 m", (8, 5))
    left = 8 + int(font(14).getlength(f"{label}  0 m")) + 10
    bar = colour_scale(np.arange(140), 139, 0, "RdYlGn")
    room = max(0, min(140, strip.shape[1] - left))
    strip[9:21, left : left + room] = bar[None, :room]
    return np.concatenate([picture, draw_text(strip, f"{largest:.1f} m", (left + 150, 5))])


def draw_tokens(
    image: Picture, pixels: NDArray[np.floating], ids: NDArray[np.integer], *, scale: int = 1, radius: float = 5
) -> Picture:
    """Tokens on an image, each number in its own colour.

    Args:
        image: (H, W, 3).
        pixels: (M, 2) of the tokens. M may be 0.
        ids: (M,) whole numbers; equal ones get the same colour, here and in other pictures.
        scale: the image is enlarged this many times first.
        radius: of a dot, pixels of the result.

    Returns:
        (scale * H, scale * W, 3).
    """
    return _ringed(enlarge(image, scale), enlarged_pixels(pixels, scale), id_colours(ids), radius)


def draw_image_matches(
    image: Picture,
    pixels: NDArray[np.floating],
    xyz: NDArray[np.floating],
    *,
    ids: NDArray[np.integer] | None = None,
    points: NDArray[np.floating] | None = None,
    scale: int = 1,
    max_tokens: int = 48,
    pose: NDArray[np.float64] | None = None,
) -> Picture:
    """Tokens on an image, and above it the same tokens from above, partners in the same colour and joined by a line.

    Args:
        image: (H, W, 3), the (augmented) image, or several of them in one (`mosaic`).
        pixels: (M, 2) of every token in it; only visible tokens may be given. M may be 0.
        xyz: (M, 3) of the same tokens in the frame of their view, metres.
        ids: (M,) whole numbers, equal for one token in several images, which then has one colour; None: all differ.
        points: (N, 3 + F) all points of the view, drawn grey; None: the tokens only.
        scale: the image is enlarged this many times first.
        max_tokens: this many tokens are drawn, evenly spread over the image from left to right; those outside the part
            of the ground that is shown are left out.
        pose: (4, 4) augmented_from_lidar of the view, to show where the sensor is in it; None: at the origin.

    Returns:
        (H', W', 3).
    """
    ground = xyz if points is None else points
    extent = fit_extent(ground, None if pose is None else pose[:2, 3])
    front = enlarge(image, scale)
    zoom = min(front.shape[1] / (extent.y_max - extent.y_min), 0.8 * HEIGHT / (extent.x_max - extent.x_min))
    above = bird_eye(ground, extent=extent, pixels_per_metre=zoom, colours=_grey(ground), augmented_from_lidar=pose)[
        :, : front.shape[1]
    ]
    left = (front.shape[1] - above.shape[1]) // 2
    picture = np.full((above.shape[0] + GAP + front.shape[0], front.shape[1], 3), UNKNOWN, dtype=np.uint8)
    picture[: above.shape[0], left : left + above.shape[1]] = above
    picture[above.shape[0] + GAP :] = front
    shown = np.flatnonzero(inside_extent(xyz, extent))
    shown = shown[np.argsort(pixels[shown, 0], kind="stable")]
    shown = shown[np.linspace(0, len(shown) - 1, min(max_tokens, len(shown))).round().astype(np.int64)]
    colours = id_colours(np.arange(len(shown)) if ids is None else np.unique(ids[shown], return_inverse=True)[1])
    start = ground_pixels(xyz[shown, :2], extent, zoom) + np.array([left, 0])
    end = enlarged_pixels(pixels[shown], scale) + np.array([0, above.shape[0] + GAP])
    picture = draw_lines(picture, np.stack([start, end], axis=1), colours // 2 + 40, 1.0)
    return _ringed(_ringed(picture, start, colours), end, colours)
