"""Do points and boxes land where the camera sees them?

Drawn from a camera's own calibration, lens distortion included. Shapes: N points, K boxes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from simipu3d.contracts.frame import Boxes, Camera
from simipu3d.geometry.boxes import BOX_EDGES, box_corners
from simipu3d.geometry.camera import MIN_DEPTH, project_points
from simipu3d.pictures.canvas import Picture, draw_dots, draw_lines, enlarge, enlarged_pixels
from simipu3d.pictures.colours import depth_colours

BOX_COLOUR = (80, 255, 120)
FRONT_COLOUR = (255, 90, 200)
FRONT_CROSS = [(0, 5), (1, 4)]
"""Diagonals of the face that a box drives with: corners 0, 1, 4, 5 have +x."""
PIECES = 12
"""A box edge is drawn in this many straight pieces: under lens distortion it is a curve."""


def project(camera: Camera, xyz: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """`geometry.camera.project_points` for a Camera: pixels (N, 2), depth (N,) metres, visible (N,)."""
    distortion = (
        None if camera.distortion is None else torch.from_numpy(np.asarray(camera.distortion, dtype=np.float64))
    )
    pixels, depth, visible = project_points(
        torch.from_numpy(np.asarray(xyz, dtype=np.float64)),
        torch.from_numpy(np.asarray(camera.image_from_camera, dtype=np.float64)),
        torch.from_numpy(np.asarray(camera.camera_from_lidar, dtype=np.float64)),
        camera.image.shape[:2],
        distortion=distortion,
    )
    return pixels.numpy(), depth.numpy(), visible.numpy()


def overlay_points(
    camera: Camera,
    points: NDArray[np.floating],
    *,
    image: Picture | None = None,
    max_depth: float = 60.0,
    scale: int = 1,
    radius: float | None = None,
) -> Picture:
    """Lidar points on a camera's image, coloured by depth: near is warm, and near points lie over far ones.

    Args:
        camera: image and calibration.
        points: (N, 3 + F) in the lidar frame, metres. N may be 0.
        image: (H, W, 3) to draw on instead of the camera's own image, of the same size.
        max_depth: metres that the coldest colour stands for.
        scale: the image is enlarged this many times first, and the points keep their sub-pixel place in it.
        radius: of a dot, pixels; None: 1 / 700 of the picture's width.

    Returns:
        (scale * H, scale * W, 3).
    """
    pixels, depth, visible = project(camera, points[:, :3])
    order = np.argsort(-depth[visible], kind="stable")
    picture = enlarge(camera.image if image is None else image, scale)
    radius = max(1.0, picture.shape[1] / 700) if radius is None else radius
    colours = depth_colours(depth[visible][order], max_depth)
    return draw_dots(picture, enlarged_pixels(pixels[visible][order], scale), colours, radius)


def draw_boxes(
    camera: Camera,
    boxes: Boxes,
    *,
    image: Picture | None = None,
    colours: NDArray[np.uint8] | None = None,
    scale: int = 1,
    width: float = 2.0,
) -> Picture:
    """Labelled boxes on a camera's image; the face a box drives with is crossed.

    Args:
        camera: image and calibration.
        boxes: K boxes in the lidar frame. K may be 0.
        image: (H, W, 3) to draw on instead of the camera's own image, of the same size.
        colours: (K, 3) colours of the edges; None: one colour for all, another for the front's cross.
        scale: the image is enlarged this many times first.
        width: of the lines, pixels.

    Returns:
        (scale * H, scale * W, 3).
    """
    picture = enlarge(camera.image if image is None else image, scale)
    corners = box_corners(boxes.center, boxes.size, boxes.yaw)
    own = np.broadcast_to(np.array(BOX_COLOUR, dtype=np.uint8), (len(boxes), 3)) if colours is None else colours
    cross = np.broadcast_to(np.array(FRONT_COLOUR, dtype=np.uint8), (len(boxes), 3)) if colours is None else colours
    for lines, colour, thickness in ((FRONT_CROSS, cross, 0.6 * width), (BOX_EDGES, own, width)):
        edges = corners[:, np.array(lines)].reshape(-1, 2, 3)
        segments, edge = project_edges(camera, edges)
        edge_colours = np.repeat(colour, len(lines), axis=0)
        picture = draw_lines(picture, enlarged_pixels(segments, scale), edge_colours[edge], thickness)
    return picture


def project_edges(
    camera: Camera, edges: NDArray[np.float64], near: float = MIN_DEPTH
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Straight edges in space as short straight pieces in the image.

    Args:
        camera: image and calibration.
        edges: (E, 2, 3) both ends in the lidar frame, metres.
        near: metres along the optical axis; what is nearer is cut away in space, where the cut is exact.

    Returns:
        segments: (S, 2, 2) pixels; may lie outside the image.
        edge: (S,) which edge a piece belongs to.
    """
    # Depth is affine in xyz, and lens distortion does not change it: the cut is a share of the edge's way.
    depth_from_lidar = camera.image_from_camera[2] @ camera.camera_from_lidar
    depth = edges @ depth_from_lidar[:3] + depth_from_lidar[3]
    limit = near * (1 + 1e-6)  # a hair behind the plane
    step = depth[:, 1] - depth[:, 0]
    share = (limit - depth[:, 0]) / np.where(step == 0, 1.0, step)
    first = np.where(depth[:, 0] < limit, share, 0.0)
    last = np.where(depth[:, 1] < limit, share, 1.0)
    kept = np.flatnonzero((depth >= limit).any(axis=1))
    along = first[kept, None] + (last - first)[kept, None] * np.linspace(0, 1, PIECES + 1)
    places = edges[kept, :1] + along[..., None] * (edges[kept, 1:] - edges[kept, :1])
    pixels = project(camera, places.reshape(-1, 3))[0].reshape(len(kept), PIECES + 1, 2)
    segments = np.stack([pixels[:, :-1], pixels[:, 1:]], axis=2).reshape(-1, 2, 2)
    return segments, kept.repeat(PIECES)
