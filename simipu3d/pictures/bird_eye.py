"""What does a scan look like from above?

x points up in the picture and y to the left, as a driver's map. Lidar frame, metres. Shapes: N points, K boxes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes
from simipu3d.geometry.boxes import box_corners
from simipu3d.pictures.canvas import Picture, draw_dots, draw_lines, draw_text
from simipu3d.pictures.colours import UNKNOWN, colour_scale

GRID_COLOUR = (52, 56, 66)
BOX_COLOUR = (255, 170, 60)
SENSOR_COLOUR = (240, 240, 240)


class Extent(NamedTuple):
    """The part of the ground that a picture shows, metres."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float


def fit_extent(
    xyz: NDArray[np.floating], sensor: NDArray[np.floating] | None = None, *, limit: float = 50.0, margin: float = 2.0
) -> Extent:
    """The part of the ground that holds the sensor and nearly all points.

    Args:
        xyz: (N, 3 + F) metres. N may be 0.
        sensor: (2,) place of the sensor; None: the origin.
        limit: no further than this from the sensor, metres.
        margin: metres round what is left: the 1st to 99th percentile of each axis.
    """
    place = np.zeros(2) if sensor is None else np.asarray(sensor, dtype=np.float64)
    near = np.clip(np.asarray(xyz[:, :2], dtype=np.float64), place - limit, place + limit)
    low, high = np.percentile(near, [1, 99], axis=0) if len(near) else (place, place)
    low, high = np.minimum(low, place) - margin, np.maximum(high, place) + margin
    return Extent(float(low[0]), float(high[0]), float(low[1]), float(high[1]))


def inside_extent(xyz: NDArray[np.floating], extent: Extent) -> NDArray[np.bool_]:
    """(N,) bool: does a place lie in the picture?"""
    x, y = xyz[:, 0], xyz[:, 1]
    return (x >= extent.x_min) & (x <= extent.x_max) & (y >= extent.y_min) & (y <= extent.y_max)


def ground_pixels(xy: NDArray, extent: Extent, pixels_per_metre: float) -> NDArray[np.float64]:
    """(N, 2) pixels (u, v) of places (N, 2) metres."""
    xy = np.asarray(xy, dtype=np.float64)
    u = (extent.y_max - xy[..., 1]) * pixels_per_metre - 0.5
    v = (extent.x_max - xy[..., 0]) * pixels_per_metre - 0.5
    return np.stack([u, v], axis=-1)


def bird_eye(
    points: NDArray[np.floating],
    boxes: Boxes | None = None,
    *,
    extent: Extent | None = None,
    pixels_per_metre: float | None = None,
    colours: NDArray[np.uint8] | None = None,
    radius: float | None = None,
    augmented_from_lidar: NDArray[np.float64] | None = None,
) -> Picture:
    """A scan from above, coloured by height, with a grid of 10 m, the sensor as an arrow, and boxes.

    Args:
        points: (N, 3 + F), metres. N may be 0.
        boxes: drawn with a line from the middle through the front.
        extent: what to show; None: `fit_extent`, and the boxes that are no further away than it may reach.
        pixels_per_metre: None: the longer edge gets 800 pixels.
        colours: (N, 3) instead of the height's colours.
        radius: of a dot, pixels; None: 1 where points are many, 1.5 where they are few.
        augmented_from_lidar: (4, 4) where augmentation took the sensor; None: it is at the origin.

    Returns:
        (H, W, 3).
    """
    if extent is None:
        extent = fit_extent(points)
        extent = extent if boxes is None or len(boxes) == 0 else _with_boxes(extent, boxes)
    depth, breadth = extent.x_max - extent.x_min, extent.y_max - extent.y_min
    scale = 800 / max(depth, breadth) if pixels_per_metre is None else pixels_per_metre
    picture = np.full((max(1, round(depth * scale)), max(1, round(breadth * scale)), 3), UNKNOWN, dtype=np.uint8)
    picture = _draw_grid(picture, extent, scale)
    height = np.asarray(points[:, 2], dtype=np.float64)
    if colours is None:
        low, high = np.percentile(height, [2, 98]) if len(height) else (0.0, 1.0)
        colours = colour_scale(height, low - 0.25 * (high - low), high, "viridis")  # the darkest end would drown
    order = np.argsort(height, kind="stable")
    radius = (1.0 if len(points) > 30000 else 1.5) if radius is None else radius
    picture = draw_dots(picture, ground_pixels(points[order, :2], extent, scale), colours[order], radius)
    if boxes is not None:
        segments = ground_pixels(_box_outlines(boxes), extent, scale)
        picture = draw_lines(picture, segments, BOX_COLOUR, 2.0)
    arrow = np.array([[-0.8, 0.7], [1.2, 0.0], [-0.8, -0.7]])
    if augmented_from_lidar is not None:
        arrow = arrow @ augmented_from_lidar[:2, :2].T + augmented_from_lidar[:2, 3]
    segments = ground_pixels(np.stack([arrow, np.roll(arrow, -1, axis=0)], axis=1), extent, scale)
    return draw_lines(picture, segments, SENSOR_COLOUR, 2.0)


def _with_boxes(extent: Extent, boxes: Boxes, limit: float = 52.0) -> Extent:
    corners = np.clip(box_corners(boxes.center, boxes.size, boxes.yaw).reshape(-1, 3), -limit, limit)
    low, high = corners.min(axis=0) - 1, corners.max(axis=0) + 1
    return Extent(
        min(extent.x_min, low[0]), max(extent.x_max, high[0]), min(extent.y_min, low[1]), max(extent.y_max, high[1])
    )


def _draw_grid(picture: Picture, extent: Extent, scale: float) -> Picture:
    """Lines every 10 m, with their x and y at the edge."""
    rows = np.arange(np.ceil(extent.x_min / 10), np.floor(extent.x_max / 10) + 1) * 10
    columns = np.arange(np.ceil(extent.y_min / 10), np.floor(extent.y_max / 10) + 1) * 10
    across = [[[x, extent.y_min], [x, extent.y_max]] for x in rows]
    along = [[[extent.x_min, y], [extent.x_max, y]] for y in columns]
    lines = np.array(across + along, dtype=np.float64).reshape(-1, 2, 2)
    picture = draw_lines(picture, ground_pixels(lines, extent, scale), GRID_COLOUR, 1.0)
    if picture.shape[1] < 200:
        return picture
    for x in rows:
        v = ground_pixels(np.array([x, 0.0]), extent, scale)[1]
        picture = draw_text(picture, f"{x + 0:.0f} m", (4, v + 1), size=12, colour=(150, 155, 165))
    return picture


def _box_outlines(boxes: Boxes) -> NDArray[np.float64]:
    """(5 K, 2, 2) metres: the four edges of every box from above, and a line from its middle through its front."""
    corners = box_corners(boxes.center, boxes.size, boxes.yaw)[:, :4, :2]
    edges = np.stack([corners, np.roll(corners, -1, axis=1)], axis=2)
    middle = corners.mean(axis=1)
    front = corners[:, :2].mean(axis=1)
    heading = np.stack([middle, front + 0.4 * (front - middle)], axis=1)
    return np.concatenate([edges, heading[:, None]], axis=1).reshape(-1, 2, 2)
