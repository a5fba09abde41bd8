"""What does a frame hold, and what does augmentation make of it? Pages and a table row for one frame.

Works on what readers and collate return (`Frame`, `Batch`), whatever the data set.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from simipu3d.contracts.batch import Batch, ImageView, PointView
from simipu3d.contracts.frame import Camera, Frame
from simipu3d.geometry.camera import inside_image, move_pixels, project_points
from simipu3d.geometry.transforms import transform_points
from simipu3d.pictures.bird_eye import bird_eye
from simipu3d.pictures.canvas import Picture, draw_dots, enlarge, enlarged_pixels, fitting_scale
from simipu3d.pictures.colours import colour_scale, depth_as_colours, depth_colours
from simipu3d.pictures.features import class_as_colours
from simipu3d.pictures.matches import draw_matches
from simipu3d.pictures.overlay import draw_boxes, overlay_points, project
from simipu3d.pictures.page import page

NUM_TOKENS = 256
"""Places of the first view that get a partner in the second: as many as the paper's point encoder has tokens."""

SMALL = 600
"""Images no wider than this, pixels, share a row of the page."""


class FrameFacts(NamedTuple):
    """A row of the table: numbers that show at a glance when a reader or a calibration is wrong."""

    frame: str
    points: str
    in_image: str
    intensity: str
    boxes: str
    image_size: str


def frame_facts(frame: Frame) -> FrameFacts:
    """Name, number of points, share of them that each camera sees, range of the intensity, boxes, image sizes."""
    column = frame.point_columns.index("intensity") if "intensity" in frame.point_columns else None
    values = frame.points[:, column] if column is not None else None
    seen = [project(camera, frame.points[:, :3])[2].mean() for camera in frame.cameras]
    sizes = dict.fromkeys(f"{camera.image.shape[0]} x {camera.image.shape[1]}" for camera in frame.cameras)
    return FrameFacts(
        frame.frame_id,
        f"{len(frame.points)}",
        ", ".join(f"{share:.1%}" for share in seen) or "no camera",
        "none" if values is None else f"{values.min():.2f} to {values.max():.2f}",
        "none" if frame.boxes is None else f"{len(frame.boxes)}",
        ", ".join(sizes) or "-",
    )


def frame_page(frame: Frame, max_depth: float = 60.0) -> Picture:
    """A page for a frame as it was read: projected points and boxes for every camera, ground truth maps, and the scan
    from above."""
    facts = frame_facts(frame)
    rows: list[tuple[str, list[tuple[str, Picture]]]] = []
    per_row = 3 if len(frame.cameras) > 2 else 1
    for start in range(0, len(frame.cameras), per_row):
        shown = frame.cameras[start : start + per_row]
        kinds = [_camera_pictures(camera, frame, max_depth, 1750 // per_row) for camera in shown]
        groups = [
            [pictures[kind] for pictures in kinds if kind in pictures]
            for kind in ("points", "boxes", "depth", "classes")
        ]
        if max(camera.image.shape[1] for camera in shown) * per_row <= SMALL:
            groups = [groups[0] + groups[1], groups[2] + groups[3]]
        rows.extend(("", group) for group in groups if group)
    above = [("from above, coloured by height; grid 10 m, x up, y to the left", bird_eye(frame.points, frame.boxes))]
    if "intensity" in frame.point_columns:
        values = frame.points[:, frame.point_columns.index("intensity")].clip(0, 1)
        colours = colour_scale(np.sqrt(values), -0.25, 1, "inferno")
        above.append(("coloured by intensity (square root)", bird_eye(frame.points, frame.boxes, colours=colours)))
    rows.append(("", above))
    title = f"Frame {facts.frame}: {facts.points} points; share of them in the image: {facts.in_image}"
    return page([(title, rows[0][1]), *rows[1:]])


def _camera_pictures(camera: Camera, frame: Frame, max_depth: float, width: int) -> dict[str, tuple[str, Picture]]:
    """Kind of picture -> (caption, picture), for what the frame has."""
    scale = fitting_scale(camera.image, width)
    points = overlay_points(camera, frame.points, max_depth=max_depth, scale=scale)
    pictures = {"points": (f"{camera.name}: points, red near, blue at {max_depth:.0f} m and beyond", points)}
    if frame.boxes is not None:
        pictures["boxes"] = (f"{camera.name}: boxes, front crossed", draw_boxes(camera, frame.boxes, scale=scale))
    if camera.depth is not None:
        pictures["depth"] = (
            f"{camera.name}: depth, same colours",
            enlarge(depth_as_colours(camera.depth, max_depth), scale),
        )
    if camera.pixel_class is not None:
        pictures["classes"] = (f"{camera.name}: classes", enlarge(class_as_colours(camera.pixel_class), scale))
    return pictures


def match_nearest(
    view_a: PointView, view_b: PointView, number: int = NUM_TOKENS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Partners between two views of a frame (batch position 0), nearest in the lidar frame.

    A raw point that both views hold is its own partner, at distance 0 up to rounding.

    Args:
        view_a, view_b: the views.
        number: this many points of the first view, evenly spread over its rows.

    Returns:
        xyz_a: (number, 3) the points of the first view, in its own frame.
        xyz_b: (N, 3) all points of the second view, in its own frame.
        pairs: (number, 2) rows of both.
        distance: (number,) metres in the lidar frame.
    """
    own_a, own_b = (view.points[view.batch_index == 0, :3].double() for view in (view_a, view_b))
    chosen = torch.linspace(0, max(0, len(own_a) - 1), min(number, len(own_a))).round().long()
    own_a = own_a[chosen]
    lidar_a = transform_points(torch.linalg.inv(view_a.augmented_from_lidar[0]), own_a).numpy()
    lidar_b = transform_points(torch.linalg.inv(view_b.augmented_from_lidar[0]), own_b).numpy()
    distance, partner = cKDTree(lidar_b).query(lidar_a) if len(lidar_a) and len(lidar_b) else (np.zeros(0), np.zeros(0))
    pairs = np.stack([np.arange(len(partner)), partner], axis=1).astype(np.int64)
    return own_a.numpy(), own_b.numpy(), pairs, distance


def overlay_view(view: PointView, images: ImageView, image: int, *, max_depth: float = 60.0, scale: int = 1) -> Picture:
    """A view's points on an augmented image: taken back to the lidar frame, projected, moved with the image.

    Args:
        view: point view; the points of the image's own frame are drawn.
        images: the images of the batch.
        image: which of them.
        max_depth: metres that the coldest colour stands for.
        scale: the image is enlarged this many times first.

    Returns:
        (scale * H, scale * W, 3), without the padding.
    """
    frame = int(images.batch_index[image])
    augmented = view.points[view.batch_index == frame, :3].double()
    xyz = transform_points(torch.linalg.inv(view.augmented_from_lidar[frame]), augmented)
    pixels, depth, visible = project_points(
        xyz,
        images.image_from_camera[image],
        images.camera_from_lidar[image],
        images.raw_size[image],
        distortion=images.distortion[image],
    )
    moved = move_pixels(images.augmented_from_image[image], pixels)
    height, width = images.image_size[image].tolist()
    visible &= inside_image(moved, (height, width))
    order = torch.argsort(depth[visible], descending=True, stable=True)
    picture = enlarge(
        np.ascontiguousarray(images.images[image, :, :height, :width].permute(1, 2, 0).cpu().numpy()), scale
    )
    places = enlarged_pixels(moved[visible][order].numpy(), scale)
    colours = depth_colours(depth[visible][order].numpy(), max_depth)
    return draw_dots(picture, places, colours, max(1.5, picture.shape[1] / 500))


def views_page(batch: Batch) -> Picture:
    """A page for the first frame of a batch: both point views with matches, and its images with both views' points."""
    first, second = batch.views
    xyz_a, xyz_b, pairs, distance = match_nearest(first, second)
    own = [view.points[view.batch_index == 0].numpy() for view in (first, second)]
    shared = np.isin(first.source_index[first.batch_index == 0], second.source_index[second.batch_index == 0]).mean()
    poses = (first.augmented_from_lidar[0].numpy(), second.augmented_from_lidar[0].numpy())
    matches = draw_matches(xyz_a, xyz_b, pairs, distance, points_a=own[0], points_b=own[1], poses=poses)
    caption = (
        f"first view left ({len(own[0])} points), second right ({len(own[1])}); nearest partner in the lidar frame"
    )
    rows = [(f"Frame {batch.frame_ids[0]}: two views, {shared:.0%} of the points in both", [(caption, matches)])]
    for image in torch.nonzero(batch.images.batch_index == 0).flatten().tolist():
        width = int(batch.images.image_size[image, 1])
        scale = max(1, 850 // width)
        pictures = [
            (
                f"augmented image {image}, points of the {name} view",
                overlay_view(view, batch.images, image, scale=scale),
            )
            for name, view in (("first", first), ("second", second))
        ]
        rows.append(("", pictures))
    return page(rows)
