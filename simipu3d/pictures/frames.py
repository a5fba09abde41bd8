"""What does a frame hold, and what does augmentation make of it? Pages and a table row for one frame.

Works on what readers and collate return (`Frame`, `Batch`), whatever the data set.
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from simipu3d.contracts.batch import Batch, ImageView, PointView
from simipu3d.contracts.frame import Boxes, Camera, Frame
from simipu3d.errors import UserError
from simipu3d.geometry.boxes import BOX_EDGES, box_corners, move_boxes
from simipu3d.geometry.camera import inside_image, move_pixels, project_points, resize_matrix
from simipu3d.geometry.transforms import transform_points
from simipu3d.pictures.bird_eye import BOX_COLOUR, bird_eye
from simipu3d.pictures.canvas import (
    Picture,
    draw_dots,
    draw_lines,
    enlarge,
    enlarged_pixels,
    fitting_scale,
    mosaic,
    save_png,
)
from simipu3d.pictures.colours import colour_scale, depth_as_colours, depth_colours
from simipu3d.pictures.features import class_as_colours
from simipu3d.pictures.matches import draw_matches
from simipu3d.pictures.overlay import draw_boxes, overlay_points, project, project_edges
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
    camera_time: str


def frame_facts(frame: Frame) -> FrameFacts:
    """Name, number of points, share of them that each camera sees, range of the intensity, boxes, image sizes, and when
    the cameras fired, counted from the scan's time stamp."""
    column = frame.point_columns.index("intensity") if "intensity" in frame.point_columns else None
    values = frame.points[:, column] if column is not None and len(frame.points) else None
    sizes = dict.fromkeys(f"{camera.image.shape[0]} x {camera.image.shape[1]}" for camera in frame.cameras)
    shares = [f"{_share_seen(camera, frame):.1%}" for camera in frame.cameras]
    if len(shares) > 1:
        shares = [f"{camera.name} {share}" for camera, share in zip(frame.cameras, shares, strict=True)]
    offsets = [offset for camera in frame.cameras if (offset := _time_offset(camera, frame)) is not None]
    return FrameFacts(
        frame.frame_id,
        f"{len(frame.points)}",
        "\n".join(shares) or "no camera",
        "none" if values is None else f"{values.min():.2f} to {values.max():.2f}",
        "none" if frame.boxes is None else f"{len(frame.boxes)}",
        ", ".join(sizes) or "-",
        f"{min(offsets) * 1e3:+.0f} to {max(offsets) * 1e3:+.0f} ms" if offsets else "unknown",
    )


def _share_seen(camera: Camera, frame: Frame) -> float:
    return float(project(camera, frame.points[:, :3])[2].sum()) / max(1, len(frame.points))


def _time_offset(camera: Camera, frame: Frame) -> float | None:
    """Seconds from the scan's time stamp to the exposure, None where one of them is unknown."""
    return None if camera.timestamp is None or frame.timestamp is None else camera.timestamp - frame.timestamp


def frame_page(frame: Frame, max_depth: float = 60.0) -> Picture:
    """A page for a frame as it was read: projected points and boxes for every camera, ground truth maps, and the scan
    from above. Three cameras and more stand together in one picture, points and boxes in the same images."""
    facts = frame_facts(frame)
    rows = _rig_rows(frame, max_depth) if len(frame.cameras) > 2 else _camera_rows(frame, max_depth)
    above = [("from above, coloured by height; grid 10 m, x up, y to the left", bird_eye(frame.points, frame.boxes))]
    if "intensity" in frame.point_columns:
        values = frame.points[:, frame.point_columns.index("intensity")].clip(0, 1)
        colours = colour_scale(np.sqrt(values), -0.25, 1, "inferno")
        above.append(("coloured by intensity (square root)", bird_eye(frame.points, frame.boxes, colours=colours)))
    rows.append(above)
    title = f"Frame {facts.frame}: {facts.points} points"
    if len(frame.cameras) < 3:  # more cameras say it over their own images
        title += f"; share of them in the image: {', '.join(facts.in_image.splitlines())}"
    if facts.camera_time != "unknown":
        title += f"; cameras at {facts.camera_time} of the scan's time stamp"
    return page([(title, rows[0]), *(("", row) for row in rows[1:])])


def _camera_rows(frame: Frame, max_depth: float) -> list[list[tuple[str, Picture]]]:
    """Rows of a page for one or two cameras: each kind of picture as large as it gets."""
    rows: list[list[tuple[str, Picture]]] = []
    for camera in frame.cameras:
        pictures = _camera_pictures(camera, frame, max_depth, 1750)
        groups = [[picture] for picture in pictures.values()]
        if camera.image.shape[1] <= SMALL and len(groups) > 1:
            groups = [[*chain.from_iterable(groups[:2])], [*chain.from_iterable(groups[2:])]]
        rows.extend(group for group in groups if group)
    return rows


def _rig_rows(frame: Frame, max_depth: float) -> list[list[tuple[str, Picture]]]:
    """Rows of a page for many cameras: one picture of all of them for points and boxes, one for each ground truth map."""
    names = []
    for camera in frame.cameras:
        offset = _time_offset(camera, frame)
        when = "" if offset is None else f", {offset * 1e3:+.0f} ms"
        names.append(f"{camera.name}: {_share_seen(camera, frame):.1%} of the points{when}")
    caption = f"points, red near, blue at {max_depth:.0f} m and beyond"
    caption += "" if frame.boxes is None else "; boxes, front crossed"
    widest = max(580, *(camera.image.shape[1] for camera in frame.cameras))
    kinds = [(caption, [_points_and_boxes(camera, frame, max_depth, widest) for camera in frame.cameras])]
    depth = [camera.depth for camera in frame.cameras if camera.depth is not None]
    if len(depth) == len(frame.cameras):
        kinds.append(("depth, same colours", [depth_as_colours(one, max_depth) for one in depth]))
    classes = [camera.pixel_class for camera in frame.cameras if camera.pixel_class is not None]
    if len(classes) == len(frame.cameras):
        kinds.append(("classes", [class_as_colours(one) for one in classes]))
    return [[(caption, mosaic(pictures, names)[0])] for caption, pictures in kinds]


def _points_and_boxes(camera: Camera, frame: Frame, max_depth: float, widest: int) -> Picture:
    """Both on one image, which is enlarged if it is small beside the `widest` of its frame, pixels."""
    image = enlarge(camera.image, fitting_scale(camera.image, widest))
    matrix = resize_matrix(camera.image.shape[:2], image.shape[:2]).numpy() @ camera.image_from_camera
    large = replace(camera, image=image, image_from_camera=matrix)
    width = image.shape[1] / 400  # the page shows a third of it or less
    picture = overlay_points(large, frame.points, max_depth=max_depth, radius=max(1.0, width))
    return picture if frame.boxes is None else draw_boxes(large, frame.boxes, image=picture, width=max(1.5, width))


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


def view_boxes(batch: Batch, view: int | None) -> Boxes:
    """The boxes of a batch's first frame in the frame of one of its point views, or (None) in the lidar frame."""
    boxes = batch.truth.boxes if batch.truth is not None else None
    if boxes is None:
        return Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), ())
    own = (boxes.batch_index == 0).numpy()
    matrix = np.eye(4) if view is None else batch.views[view].augmented_from_lidar[0].numpy()
    if batch.views:
        matrix = matrix @ np.linalg.inv(batch.views[0].augmented_from_lidar[0].numpy())
    center, size, yaw, _ = move_boxes(
        boxes.center.numpy()[own], boxes.size.numpy()[own], boxes.yaw.numpy()[own], None, matrix
    )
    return Boxes(center, size, yaw, tuple(name for name, mine in zip(boxes.names, own, strict=True) if mine))


def draw_view_boxes(picture: Picture, batch: Batch, image: int, scale: int) -> Picture:
    """A batch's boxes on an augmented image of its first frame, which was enlarged `scale` times: projected through the
    calibration of the original image, then moved with it."""
    images, boxes = batch.images[0], view_boxes(batch, None)
    height, width = images.raw_size[image].tolist()
    camera = Camera(
        images.camera_names[image],
        np.broadcast_to(np.uint8(0), (height, width, 3)),
        images.image_from_camera[image].numpy(),
        images.camera_from_lidar[image].numpy(),
        images.distortion[image].numpy(),
    )
    edges = box_corners(boxes.center, boxes.size, boxes.yaw)[:, np.array(BOX_EDGES)].reshape(-1, 2, 3)
    segments, _ = project_edges(camera, edges)
    moved = move_pixels(images.augmented_from_image[image], torch.from_numpy(segments.reshape(-1, 2))).numpy()
    return draw_lines(picture, enlarged_pixels(moved, scale).reshape(-1, 2, 2), BOX_COLOUR, 2.0)


def views_page(batch: Batch) -> Picture:
    """A page for the first frame of a batch: both point views with matches, and its images with both views' points."""
    first, second = batch.views
    xyz_a, xyz_b, pairs, distance = match_nearest(first, second)
    points = [view.points[view.batch_index == 0].numpy() for view in (first, second)]
    shared = np.isin(first.source_index[first.batch_index == 0], second.source_index[second.batch_index == 0]).mean()
    poses = (first.augmented_from_lidar[0].numpy(), second.augmented_from_lidar[0].numpy())
    matches = draw_matches(xyz_a, xyz_b, pairs, distance, points_a=points[0], points_b=points[1], poses=poses)
    caption = f"first view left ({len(points[0])} points), second right ({len(points[1])}); nearest partner in the lidar frame"
    rows = [(f"Frame {batch.frame_ids[0]}: two views, {shared:.0%} of the points in both", [(caption, matches)])]
    if batch.truth is not None and batch.truth.boxes is not None:
        drawn = [
            (
                f"{name} view with the boxes that moved along",
                bird_eye(own, view_boxes(batch, number), augmented_from_lidar=pose),
            )
            for number, (name, own, pose) in enumerate(zip(("first", "second"), points, poses, strict=True))
        ]
        rows.append(("", drawn))
    if not batch.images:
        return page(rows)
    images = batch.images[0]
    own = torch.nonzero(images.batch_index == 0).flatten().tolist()
    for group in [own] if len(own) > 2 else [[image] for image in own]:
        names = [images.camera_names[image] for image in group]
        pictures = []
        for name, view in (("first", first), ("second", second)):
            widths = images.image_size[group, 1].tolist()
            scales = [max(850, *widths) // width for width in widths]
            boxed = [
                draw_view_boxes(overlay_view(view, images, image, scale=scale), batch, image, scale)
                for image, scale in zip(group, scales, strict=True)
            ]
            pictures.append((f"augmented {', '.join(names)}: points of the {name} view", mosaic(boxed, names)[0]))
        rows.extend([("", [picture]) for picture in pictures] if len(group) > 1 else [("", pictures)])
    return page(rows)


def write_pages(folder: Path, frame: Frame, batch: Batch | None) -> FrameFacts:
    """Write `<frame id>-frame.png` and, where there is a batch, `<frame id>-views.png`; returns the frame's row of the
    table.

    Raises:
        UserError: the folder cannot be written.
    """
    name = frame.frame_id.replace("/", "_")
    try:
        save_png(folder / f"{name}-frame.png", frame_page(frame))
        if batch is not None:
            save_png(folder / f"{name}-views.png", views_page(batch))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}; name another folder with --out") from error
    return frame_facts(frame)
