"""What do the lidars of a Waymo-like rig measure, and where are those points in truth?

A point is found by following its beam: from the laser to the vehicle, as it stands when the beam leaves, to the street,
to what it meets, and back into the vehicle as it stands at the moment's own time. What a reader computes from the range
image must come to the same. The street's traffic rests during a sweep. Shapes: H rows, W columns, N hits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simipu3d.benchmark.synthetic_waymo.rig import SWEEP, LaserMount, Ride, top_inclinations
from simipu3d.data.drive_world.raycast import World, index_directions
from simipu3d.data.drive_world.render import scan_rays

COLUMNS_AT_ONCE = 128
"""So many columns of a spinning lidar share one list of solids."""

RETURNS_APART = 0.5
"""Metres by which two returns of a beam differ, or they are one."""


@dataclass(frozen=True, eq=False)
class ReturnTruth:
    """The points of one return of one lidar, row by row of its range image.

    Attributes:
        row, column: (N,) int64 pixel of the range image.
        vehicle_xyz: (N, 3) float64 in the vehicle frame of the moment's time, metres.
        street_xyz: (N, 3) float64 the same places in the street.
        instance: (N,) int32 the actor that was met, 0 = none.
        pixels: (N, 5, 2) float64 where the five cameras see it, edge-based and exact; NaN where one does not.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    vehicle_xyz: NDArray[np.float64]
    street_xyz: NDArray[np.float64]
    instance: NDArray[np.int32]
    pixels: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sweep:
    """One turn of one lidar: `solid` and `surface` as from `scan_rays`; all (H, W), distances infinite where nothing.

    `second` is the distance of the second return, along the same beam. `place` and `beam` are (H, W, 3) in the street.
    """

    place: NDArray[np.float64]
    beam: NDArray[np.float64]
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    solid: NDArray[np.int32]
    second_solid: NDArray[np.int32]
    surface: NDArray[np.float64]


def pixel_times(mount: LaserMount, width: int, time: float) -> NDArray[np.float64]:
    """(W,) when the columns are measured: TOP turns clockwise once in `SWEEP`, beginning straight behind."""
    return time + (np.arange(width) + 0.5) / width * SWEEP if mount.spins else np.full(width, time)


def row_inclinations(mount: LaserMount, height: int) -> NDArray[np.float64]:
    """(H,) radians, highest first."""
    if mount.spins:
        return top_inclinations(height, mount.inclination_range)[::-1]
    low, high = mount.inclination_range
    return high - (np.arange(height) + 0.5) * (high - low) / height


def laser_beams(mount: LaserMount, size: tuple[int, int], raised: float = 0.0) -> NDArray[np.float64]:
    """(H, W, 3) unit vectors in the laser's frame.

    Column j looks (j + 0.5) / W of a turn clockwise from straight behind the vehicle, as seen in a laser that is mounted
    with a yaw and nothing else. `raised` tilts all beams upwards, radians.
    """
    height, width = size
    yaw = np.arctan2(mount.vehicle_from_laser[1, 0], mount.vehicle_from_laser[0, 0])
    azimuth = np.pi - 2 * np.pi * (np.arange(width) + 0.5) / width - yaw
    inclination = row_inclinations(mount, height) + raised
    flat = np.cos(inclination)[:, None]
    up = np.broadcast_to(np.sin(inclination)[:, None], size)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), up], axis=-1)


def sweep(world: World, ride: Ride, mount: LaserMount, size: tuple[int, int], time: float, returns: int) -> Sweep:
    """Follow all beams of one lidar through a world at rest, while the vehicle rides on."""
    poses = ride.street_from_vehicle(pixel_times(mount, size[1], time)) @ mount.vehicle_from_laser
    middle, edge = laser_beams(mount, size), laser_beams(mount, size, mount.beam_edge)
    free = np.abs(np.arctan2(middle[..., 1], middle[..., 0])) <= mount.half_view
    place = np.broadcast_to(poses[:, :3, 3], middle.shape)
    first, solid, surface, beam = _follow(world, poses, middle)
    first = np.where(free & (first <= mount.max_range), first, np.inf)
    second, second_solid = np.full(size, np.inf), np.zeros(size, dtype=np.int32)
    if returns > 1:
        behind, second_solid, _, _ = _follow(world, poses, edge)
        apart = (second_solid != solid) & (behind > first + RETURNS_APART)
        second = np.where(apart & np.isfinite(first) & (behind <= mount.max_range), behind, np.inf)
    return Sweep(place, beam, first, second, solid, second_solid, surface)


def _follow(
    world: World, poses: NDArray[np.float64], beams: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Distance, solid, surface (see `scan_rays`) and direction in the street of (H, W, 3) beams from (W, 4, 4) poses."""
    beam = np.einsum("wij,hwj->hwi", poses[:, :3, :3], beams)
    distance, solid = np.empty(beams.shape[:2]), np.empty(beams.shape[:2], dtype=np.int32)
    surface = np.empty(beams.shape)
    for start in range(0, len(poses), COLUMNS_AT_ONCE):
        block = slice(start, start + COLUMNS_AT_ONCE)
        origins = poses[block, :3, 3]
        middle = (origins.min(axis=0) + origins.max(axis=0)) / 2
        slack = float(np.linalg.norm(origins - middle, axis=1).max()) + 1e-9
        rays = beam[:, block]
        shape = rays.shape[:2]
        met = scan_rays(
            world,
            index_directions(world, middle, slack),
            rays.reshape(-1, 3),
            np.broadcast_to(origins, rays.shape).reshape(-1, 3),
        )
        distance[:, block], solid[:, block] = met[0].reshape(shape), met[1].reshape(shape)
        surface[:, block] = met[3].reshape(*shape, 3)
    return distance, solid, surface, beam


def range_image(
    distance: NDArray[np.float64], surface: NDArray[np.float64], unlabelled: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(H, W, 4) range, intensity, elongation, no-label-zone flag (1 or -1); -1 throughout where nothing was met.

    Intensity follows the reflectivity, up to tens of thousands for the foil of traffic signs; a pulse grows longer on
    far surfaces that are met at a flat angle.
    """
    reflectivity, _, cosine = np.moveaxis(surface, -1, 0)
    met = np.isfinite(distance)
    far = np.where(met, distance, 0.0)
    intensity = reflectivity * (0.35 + 0.65 * cosine) * 10 ** (11 * np.maximum(reflectivity - 0.55, 0.0))
    elongation = 0.02 + 1.2 * (1 - cosine) * far / (far + 30.0)
    image = np.stack([far, intensity, elongation, np.where(unlabelled, 1.0, -1.0)], axis=-1)
    return np.where(met[..., None], image, -1.0).astype(np.float32)
