"""How do the lidar and the cameras of the ego vehicle see a scene?

The rig rides at the lidar, 1.73 m above the road. Its body pitches and rolls; points are handed out levelled, as from
a scanner with an inertial unit: the lidar frame has its origin in the lidar, x along the vehicle's heading, z straight
up, so that boxes, which know only a yaw, fit exactly. The beams and the cameras do tilt with the body, and
`camera_from_lidar` therefore differs from frame to frame. Every ray of a frame leaves at the same instant.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from simipu3d.data.drive_world.raycast import World, index_directions, index_shadows
from simipu3d.data.drive_world.render import Light, develop, photograph, scan_rays

LIDAR_HEIGHT = 1.73
"""Metres above the road, as on the KITTI car."""

CAMERA_MOUNTS = {
    "front": (0.0, (0.45, 0.0, -0.12)),
    "front_left": (60.0, (0.35, 0.40, -0.14)),
    "front_right": (-60.0, (0.35, -0.40, -0.14)),
    "back": (180.0, (-0.55, 0.0, -0.10)),
    "back_left": (120.0, (-0.35, 0.40, -0.14)),
    "back_right": (-120.0, (-0.35, -0.40, -0.14)),
}
"""Name: yaw in degrees and place (x, y, z) in the body frame, metres from the lidar. A rig of n has the first n."""

_CAMERA_FROM_FORWARD = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])


@dataclass(frozen=True)
class LidarSettings:
    """The scanner: see the keys of the same names in `DriveWorldConfig`; angles in degrees here too."""

    beams: int
    azimuth_range_deg: float
    azimuth_step_deg: float
    elevation_range_deg: tuple[float, float]
    range_noise: float
    dropout: float
    max_range: float


@dataclass(frozen=True)
class Pose:
    """Where the rig is in the street: the lidar's x, y and heading, and the tilt of the body (radians)."""

    x: float
    y: float
    yaw: float
    pitch: float
    roll: float

    @property
    def street_from_lidar(self) -> NDArray[np.float64]:
        """(4, 4), level: a turn about the vertical and a shift."""
        matrix = np.eye(4)
        matrix[:2, :2] = [[math.cos(self.yaw), -math.sin(self.yaw)], [math.sin(self.yaw), math.cos(self.yaw)]]
        matrix[:3, 3] = self.x, self.y, LIDAR_HEIGHT
        return matrix

    @property
    def lidar_from_body(self) -> NDArray[np.float64]:
        """(3, 3): roll about x, then pitch about y (positive: nose down)."""
        cp, sp, cr, sr = math.cos(self.pitch), math.sin(self.pitch), math.cos(self.roll), math.sin(self.roll)
        pitch = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
        return pitch @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])


def camera_from_lidar(name: str, pose: Pose) -> NDArray[np.float64]:
    """(4, 4) for the camera called `name` while the body is tilted as in `pose`."""
    yaw_deg, place = CAMERA_MOUNTS[name]
    cos, sin = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    forward_from_body = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    body_from_lidar = pose.lidar_from_body.T
    matrix = np.eye(4)
    turn = _CAMERA_FROM_FORWARD @ forward_from_body
    matrix[:3, :3] = turn @ body_from_lidar
    matrix[:3, 3] = -turn @ np.array(place)
    return matrix


def pinhole(size: tuple[int, int], horizontal_fov_deg: float) -> NDArray[np.float64]:
    """(3, 4) pixels from metres; the optical axis passes through the middle of the image."""
    height, width = size
    focal = width / 2 / math.tan(math.radians(horizontal_fov_deg) / 2)
    return np.array([[focal, 0, (width - 1) / 2, 0], [0, focal, (height - 1) / 2, 0], [0, 0, 1, 0]])


def beam_directions(settings: LidarSettings) -> NDArray[np.float64]:
    """(N, 3) unit vectors in the body frame, one column of beams after the other, from right to left."""
    columns = max(1, round(settings.azimuth_range_deg / settings.azimuth_step_deg))
    azimuth = np.radians(
        (np.arange(columns) + 0.5) / columns * settings.azimuth_range_deg - settings.azimuth_range_deg / 2
    )
    elevation = np.radians(np.linspace(*settings.elevation_range_deg, settings.beams))
    flat = np.cos(elevation)
    rays = np.empty((columns, settings.beams, 3))
    rays[..., 0] = np.cos(azimuth)[:, None] * flat
    rays[..., 1] = np.sin(azimuth)[:, None] * flat
    rays[..., 2] = np.sin(elevation)
    return rays.reshape(-1, 3)


def scan(
    world: World, pose: Pose, settings: LidarSettings, rng: Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.int32]]:
    """One turn of the lidar.

    Returns:
        points (N, 4) x, y, z, intensity in the lidar frame; class (N,); solid (N,), or GROUND.
    """
    street_from_lidar = pose.street_from_lidar
    rays = beam_directions(settings) @ pose.lidar_from_body.T
    directions = index_directions(world, street_from_lidar[:3, 3])
    distance, solid, label, surface = scan_rays(world, directions, rays @ street_from_lidar[:3, :3].T)
    reflectivity, gloss, cosine = surface.T
    share = np.minimum(distance, settings.max_range) / settings.max_range
    lost = settings.dropout * (1.0 + 3.0 * share + 4.0 * gloss)
    kept = (distance <= settings.max_range) & (rng.random(len(rays)) >= np.minimum(lost, 0.97))
    # Every ray draws its noise, kept or not: what happens to one says nothing about another.
    range_noise, intensity_noise = rng.standard_normal((2, len(rays)), dtype=np.float32)[:, kept]
    points = np.empty((int(kept.sum()), 4), dtype=np.float32)
    points[:, :3] = rays[kept] * (distance[kept] + settings.range_noise * range_noise)[:, None]
    points[:, 3] = np.clip(reflectivity[kept] * (0.35 + 0.65 * cosine[kept]) + 0.01 * intensity_noise, 0.0, 1.0)
    return points, label[kept], solid[kept]


def take_pictures(
    world: World,
    light: Light,
    pose: Pose,
    names: tuple[str, ...],
    image_from_camera: NDArray[np.float64],
    size: tuple[int, int],
    samples: int,
    noise: float,
    rng: Generator,
) -> list[dict[str, NDArray]]:
    """One picture a camera: `image`, `depth`, `pixel_class`, `pixel_solid` and `camera_from_lidar` by name."""
    shadows = index_shadows(world, light.sun, pose.x, 220.0)
    exposure = math.exp(0.2 * rng.standard_normal())
    balance = np.exp(0.06 * rng.standard_normal(3))
    pictures: list[dict[str, NDArray]] = []
    for name in names:
        to_camera = camera_from_lidar(name, pose)
        street_from_camera = pose.street_from_lidar @ np.linalg.inv(to_camera)
        directions = index_directions(world, street_from_camera[:3, 3])
        colour, depth, label, solid = photograph(
            world, directions, shadows, light, street_from_camera[:3, :3], image_from_camera[:, :3], size, samples
        )
        image = develop(colour, exposure, balance, noise, rng)
        pictures.append(
            {"image": image, "depth": depth, "pixel_class": label, "pixel_solid": solid, "camera_from_lidar": to_camera}
        )
    return pictures
