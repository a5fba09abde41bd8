"""Which boxes does a Waymo drive label, in space and in its images?

Boxes stand in the vehicle frame, upright in it, although the vehicle rolls and pitches against the street: they are
the smallest upright ones, with the actor's heading, that hold the actor's own box.
"""

import numpy as np
from numpy.typing import NDArray

from simipu3d.benchmark.synthetic_waymo.projection import image_places
from simipu3d.benchmark.synthetic_waymo.rig import CameraMount, Ride
from simipu3d.benchmark.synthetic_waymo.sweep import ReturnTruth
from simipu3d.contracts.frame import Boxes
from simipu3d.data.drive_world.layout import Actor
from simipu3d.data.drive_world.scene import Scene
from simipu3d.geometry.boxes import BOX_EDGES, box_corners
from simipu3d.ops.rotated_iou import points_in_boxes

_NAMES = {"Car": "VEHICLE", "Van": "VEHICLE", "Pedestrian": "PEDESTRIAN", "Cyclist": "CYCLIST"}


def actor_boxes(
    scene: Scene, ride: Ride, time: float, points: dict[str, tuple[ReturnTruth, ...]]
) -> tuple[Boxes, list[Actor], NDArray[np.int64]]:
    """The boxes of the actors that a first return met, those actors, and how many points of TOP lie in each box."""
    met = np.unique(np.concatenate([returns[0].instance for returns in points.values()]))
    actors = [actor for actor in scene.actors if actor.instance in met]
    vehicle_from_street = np.linalg.inv(ride.street_from_vehicle(time))
    turn, shift = vehicle_from_street[:3, :3], vehicle_from_street[:3, 3]
    centre = np.array([actor.centre + time * actor.velocity for actor in actors]).reshape(-1, 3)
    size = np.array([actor.size for actor in actors]).reshape(-1, 3)
    street_yaw = np.array([actor.yaw for actor in actors]).reshape(-1)
    ahead = np.stack([np.cos(street_yaw), np.sin(street_yaw), np.zeros_like(street_yaw)], axis=-1) @ turn.T
    yaw = np.arctan2(ahead[:, 1], ahead[:, 0])
    corners = box_corners(centre, size, street_yaw) @ turn.T + shift
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    along, across = (
        corners[..., 0] * cos + corners[..., 1] * sin,
        -corners[..., 0] * sin + corners[..., 1] * cos,
    )
    level = np.stack([along, across, corners[..., 2]], axis=-1)
    low, high = level.min(axis=1), level.max(axis=1)
    middle = (low + high) / 2
    tight = np.stack(
        [
            middle[:, 0] * cos[:, 0] - middle[:, 1] * sin[:, 0],
            middle[:, 0] * sin[:, 0] + middle[:, 1] * cos[:, 0],
            middle[:, 2],
        ],
        axis=-1,
    )
    velocity = np.array([actor.velocity for actor in actors]).reshape(-1, 3) @ turn.T
    counts = {
        name: sum(points_in_boxes(each.vehicle_xyz, tight, high - low, yaw).sum(axis=1) for each in returns)
        for name, returns in points.items()
    }
    boxes = Boxes(
        center=tight,
        size=high - low,
        yaw=yaw,
        names=tuple(_NAMES[actor.name] for actor in actors),
        velocity=velocity[:, :2],
        num_points=np.asarray(sum(counts.values()), dtype=np.int64),
    )
    return boxes, actors, np.asarray(counts["TOP"], dtype=np.int64)


def picture_labels(
    ride: Ride, mount: CameraMount, middle: float, time: float, boxes: Boxes
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The boxes as rectangles in an image: loose, and blind to what stands in front, as Waymo's are.

    Returns:
        (K', 4) centre x, y, size x, y, edge-based pixels, inside the image; and (K',) the rows of `boxes`.
    """
    corners = box_corners(boxes.center, boxes.size, boxes.yaw)
    ends = corners[:, np.array(BOX_EDGES)]
    share = np.linspace(0.0, 1.0, 17)[:, None]
    places = (ends[:, :, None, 0] * (1 - share) + ends[:, :, None, 1] * share).reshape(len(boxes), -1, 3)
    camera_from_vehicle = np.linalg.inv(ride.street_from_vehicle(middle) @ mount.vehicle_from_camera)
    camera_from_vehicle = camera_from_vehicle @ ride.street_from_vehicle(time)
    camera_xyz = places.reshape(-1, 3) @ camera_from_vehicle[:3, :3].T + camera_from_vehicle[:3, 3]
    pixels, holds = image_places(mount.intrinsic, camera_xyz)
    pixels, holds = pixels.reshape(*places.shape[:2], 2), holds.reshape(places.shape[:2])
    limit = np.array([mount.size[1], mount.size[0]], dtype=np.float64)
    low = np.clip(np.where(holds[..., None], pixels, np.inf).min(axis=1, initial=np.inf), 0, limit)
    high = np.clip(np.where(holds[..., None], pixels, -np.inf).max(axis=1, initial=-np.inf), 0, limit)
    rows = np.flatnonzero((high > low).all(axis=1))
    return np.concatenate([(low + high) / 2, high - low], axis=1)[rows], rows
