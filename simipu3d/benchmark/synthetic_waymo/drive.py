"""How does drive_world write itself as a Waymo drive whose truth is known?

`make_moment` gives what a Waymo download holds for a moment, and beside it the truth that a reader must arrive at. Both
are functions of (settings, sequence, index) alone. Lidars and cameras measure at their own times from the riding
vehicle; the street's traffic rests from the start of a sweep to its end. Frames of reference: see `waymo_rig`.
"""

import io
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray
from PIL import Image

from simipu3d.benchmark.synthetic_waymo.boxes import actor_boxes, picture_labels
from simipu3d.benchmark.synthetic_waymo.projection import column_times, project_street
from simipu3d.benchmark.synthetic_waymo.rig import (
    SWEEP,
    CameraMount,
    WaymoRigSettings,
    build_cameras,
    build_lasers,
    draw_ride,
)
from simipu3d.benchmark.synthetic_waymo.sweep import (
    ReturnTruth,
    Sweep,
    pixel_times,
    range_image,
    row_inclinations,
    sweep,
)
from simipu3d.contracts.frame import Boxes
from simipu3d.data.drive_world.raycast import Shadows, World, index_directions, index_shadows
from simipu3d.data.drive_world.render import develop, photograph
from simipu3d.data.drive_world.scene import build_scene
from simipu3d.data.readers.waymo_moment import WaymoCamera, WaymoLaser, WaymoMoment, WaymoReturn

START_MICROS = 1_553_735_853_000_000
SEGMENT_MICROS = 60_000_000
"""Time of the first moment of sequence 0, and from one sequence to the next."""

_STREET, _PICTURES = 11, 12
"""Purposes of random numbers."""

_CAMERA_FROM_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
"""Waymo's camera axes from x right, y down, z forward."""


@dataclass(frozen=True, eq=False)
class PictureTruth:
    """What one image shows, and how it was taken.

    Attributes:
        depth: (H, W) float32 metres along the optical axis, at pixel centres; 0 for sky.
        instance: (H, W) int32 actor, 0 = none.
        middle, readout: seconds: when the middle column was exposed (from the start of the drive), and how long all took.
        velocity: (6,) of the vehicle then: linear in the world's axes, m/s, and angular about the vehicle's, rad/s.
        labelled: (K,) int64, the row of the moment's boxes that each of the camera's labels belongs to.
    """

    depth: NDArray[np.float32]
    instance: NDArray[np.int32]
    middle: float
    readout: float
    velocity: NDArray[np.float64]
    labelled: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WaymoTruth:
    """What is so, beside what a moment holds.

    Attributes:
        time: seconds from the start of the drive.
        points: by lidar, one entry a return.
        pictures: by camera.
        object_ids: one a box: the same for the same actor all through a segment.
        instance: (K,) int32 actor of each box.
        num_top_points: (K,) int64 points of TOP in each box.
        world_velocity: (K, 3) of each box, in the world's axes, metres a second.
    """

    time: float
    points: dict[str, tuple[ReturnTruth, ...]]
    pictures: dict[str, PictureTruth]
    object_ids: tuple[str, ...]
    instance: NDArray[np.int32]
    num_top_points: NDArray[np.int64]
    world_velocity: NDArray[np.float64]


class WaymoDrive:
    """One segment: a street, a rig and a ride through it; `moment(index)` measures."""

    def __init__(self, settings: WaymoRigSettings, sequence: int):
        rng = default_rng([settings.seed, _STREET, sequence])
        self.settings = settings
        self.sequence = sequence
        self.scene = build_scene(rng, (settings.num_moments + 1) * SWEEP, settings.speed)
        self.ride = draw_ride(rng, self.scene.ego)
        self.lasers = build_lasers()
        self.cameras = build_cameras(settings)
        self.segment = f"{10**18 + 1_000_003 * settings.seed + sequence}_000_000_020_000"
        start, side = rng.uniform(-20, 30), rng.choice([-1.0, 1.0])
        # A yard and the walk before it: drawn last, so that the rest does not depend on it.
        self._unlabelled = np.array([start, start + 30.0, side * 5.0, side * 60.0])

    def moment(self, index: int) -> tuple[WaymoMoment, WaymoTruth]:
        """The moment at `index`, below `settings.num_moments`."""
        if not 0 <= index < self.settings.num_moments:
            raise IndexError(f"moment {index} of {self.settings.num_moments}")
        time = index * SWEEP
        world = self.scene.at(time)
        measured = {name: self._measure(world, name, time) for name in self.lasers}
        points = {name: truth for name, (_, truth) in measured.items()}
        boxes, actors, num_top = actor_boxes(self.scene, self.ride, time, points)
        boxes = replace(boxes, ids=tuple(f"{self.sequence:06d}-{actor.instance:04d}" for actor in actors))
        pictures = self._take_pictures(world, index, boxes)
        micros = START_MICROS + SEGMENT_MICROS * self.sequence
        moment = WaymoMoment(
            source="drive_world",
            segment=self.segment,
            timestamp_micros=micros + round(time * 1e6),
            world_from_vehicle=self.ride.world_from_vehicle(time),
            lasers=tuple(laser for laser, _ in measured.values()),
            cameras=tuple(camera for camera, _ in pictures),
            boxes=boxes,
        )
        velocities = np.array([actor.velocity for actor in actors]).reshape(-1, 3)
        truth = WaymoTruth(
            time=time,
            points=points,
            pictures={camera.name: picture for camera, picture in pictures},
            object_ids=tuple(boxes.ids),
            instance=np.array([actor.instance for actor in actors], dtype=np.int32),
            num_top_points=num_top,
            world_velocity=velocities @ self.ride.world_from_street[:3, :3].T,
        )
        return moment, truth

    def _measure(self, world: World, name: str, time: float) -> tuple[WaymoLaser, tuple[ReturnTruth, ...]]:
        """One lidar's range images, and their points."""
        mount = self.lasers[name]
        size = self.settings.top_size if mount.spins else self.settings.side_size
        turn = sweep(world, self.ride, mount, size, time, self.settings.returns)
        kinds = ((turn.first, turn.solid), (turn.second, turn.second_solid))[: self.settings.returns]
        made = [self._make_return(turn, distance, solid, time) for distance, solid in kinds]
        inclinations = row_inclinations(mount, size[0])[::-1].copy() if mount.spins else None
        pixel_pose = None
        if mount.spins:
            poses = self.ride.world_six(pixel_times(mount, size[1], time))
            pixel_pose = np.broadcast_to(poses, (*size, 6)).astype(np.float32)
        laser = WaymoLaser(
            name,
            mount.vehicle_from_laser,
            inclinations,
            mount.inclination_range,
            tuple(image for image, _ in made),
            pixel_pose,
        )
        return laser, tuple(truth for _, truth in made)

    def _make_return(
        self, turn: Sweep, distance: NDArray[np.float64], solid: NDArray[np.int32], time: float
    ) -> tuple[WaymoReturn, ReturnTruth]:
        """The range image and projection of one return, and its points."""
        row, column = np.nonzero(np.isfinite(distance))
        street = turn.place[row, column] + distance[row, column, None] * turn.beam[row, column]
        vehicle_from_street = np.linalg.inv(self.ride.street_from_vehicle(time))
        vehicle = street @ vehicle_from_street[:3, :3].T + vehicle_from_street[:3, 3]
        readout = self.settings.rolling_shutter_s
        pixels = np.stack(
            [project_street(self.ride, mount, time + mount.delay, readout, street) for mount in self.cameras.values()],
            axis=1,
        )
        x0, x1, near, far = self._unlabelled
        unlabelled = np.zeros(distance.shape, dtype=bool)
        between = (street[:, 1] > min(near, far)) & (street[:, 1] < max(near, far))
        unlabelled[row, column] = (street[:, 0] > x0) & (street[:, 0] < x1) & between
        projection = np.zeros((*distance.shape, 6), dtype=np.int32)
        projection[row, column] = stored_projection(pixels)
        image = range_image(distance, turn.surface, unlabelled)
        truth = ReturnTruth(row, column, vehicle, street, self._instances(solid[row, column]), pixels)
        return WaymoReturn(image, projection), truth

    def _instances(self, solid: NDArray[np.int32]) -> NDArray[np.int32]:
        """The actor that solids belong to; GROUND and NOTHING, -1 and -2, index the zeros at the end."""
        return np.append(self.scene.instances, [0, 0]).astype(np.int32)[solid]

    def _take_pictures(self, world: World, index: int, boxes: Boxes) -> list[tuple[WaymoCamera, PictureTruth]]:
        """All five images of a moment, one exposure and white balance for all."""
        time = index * SWEEP
        rng = default_rng([self.settings.seed, _PICTURES, self.sequence, index])
        shadows = index_shadows(world, self.scene.light.sun, float(self.ride.six(time)[3]), 220.0)
        exposure = math.exp(0.2 * rng.standard_normal())
        balance = np.exp(0.06 * rng.standard_normal(3))
        taken = []
        for name, mount in self.cameras.items():
            middle = time + mount.delay
            colour, depth, solid = self._photograph(world, shadows, mount, middle)
            image = develop(colour, exposure, balance, self.settings.image_noise, rng)
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=self.settings.jpeg_quality, subsampling=0)
            labels, labelled = picture_labels(self.ride, mount, middle, time, boxes)
            start = START_MICROS + SEGMENT_MICROS * self.sequence
            camera = WaymoCamera(
                name,
                file.getvalue(),
                mount.intrinsic,
                mount.vehicle_from_camera,
                mount.size,
                self.ride.world_from_vehicle(middle),
                start / 1e6 + middle,
                labels,
                tuple(boxes.ids[row] for row in labelled),
            )
            readout = self.settings.rolling_shutter_s
            picture = PictureTruth(depth, self._instances(solid), middle, readout, self._velocity(middle), labelled)
            taken.append((camera, picture))
        return taken

    def _photograph(
        self, world: World, shadows: Shadows, mount: CameraMount, middle: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        """Colour, depth and solid of one image, every column from where the vehicle stands when it is exposed."""
        width = mount.size[1]
        times = column_times(mount, middle, self.settings.rolling_shutter_s, np.arange(width) + 0.5)
        poses = self.ride.street_from_vehicle(times) @ mount.vehicle_from_camera
        origins = poses[:, :3, 3]
        centre = (origins.min(axis=0) + origins.max(axis=0)) / 2
        slack = float(np.linalg.norm(origins - centre, axis=1).max()) + 1e-9
        f_u, f_v, c_u, c_v = mount.intrinsic[:4]
        # The renderer's pixels have integer centres, Waymo's edges.
        matrix = np.array([[f_u, 0.0, c_u - 0.5], [0.0, f_v, c_v - 0.5], [0.0, 0.0, 1.0]])
        colour, depth, _, solid = photograph(
            world,
            index_directions(world, centre, slack),
            shadows,
            self.scene.light,
            poses[:, :3, :3] @ _CAMERA_FROM_OPTICAL,
            matrix,
            mount.size,
            self.settings.supersampling,
            origins=origins,
            distortion=mount.intrinsic[4:],
        )
        return colour, depth, solid

    def _velocity(self, time: float, step: float = 1e-4) -> NDArray[np.float64]:
        """(6,) see `PictureTruth.velocity`; by differences over 2 `step` seconds."""
        before, after = self.ride.world_from_vehicle(np.array([time - step, time + step]))
        linear = (after[:3, 3] - before[:3, 3]) / (2 * step)
        turn = before[:3, :3].T @ after[:3, :3]
        angular = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / (4 * step)
        return np.concatenate([linear, angular])


def stored_projection(pixels: NDArray[np.float64]) -> NDArray[np.int32]:
    """(N, 6) camera, x, y of the first and of the second camera that sees a point, 0 = none, in the order of their
    numbers; x and y are the pixel that holds the place `pixels` (N, 5, 2)."""
    stored = np.zeros((len(pixels), 6), dtype=np.int32)
    seen = ~np.isnan(pixels[..., 0])
    for slot in range(2):
        camera = np.where(seen.any(axis=1), seen.argmax(axis=1), -1)
        rows = np.flatnonzero(camera >= 0)
        stored[rows, 3 * slot] = camera[rows] + 1
        stored[rows, 3 * slot + 1 : 3 * slot + 3] = np.floor(pixels[rows, camera[rows]])
        seen[rows, camera[rows]] = False
    return stored


def make_moment(settings: WaymoRigSettings, sequence: int, index: int) -> tuple[WaymoMoment, WaymoTruth]:
    """One moment of one segment; `WaymoDrive` keeps the street where several are wanted."""
    return WaymoDrive(settings, sequence).moment(index)
