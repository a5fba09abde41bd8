"""How is a Waymo-like vehicle built, and how does it ride through a street of drive_world?

The vehicle frame is x forward, y left, z up, metres; its origin is in the middle of the rear axle's track at the height of
the road. Lidar frames are x out of the housing (TOP: wherever it was mounted), z up; camera frames x out of the lens,
y left, z up. Angles are radians, R = Rz(yaw) Ry(pitch) Rx(roll). Seconds count from the start of the drive.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from simipu3d.data.drive_world.scene import Ego
from simipu3d.data.readers.waymo_moment import CAMERA_NAMES, LASER_NAMES

SWEEP = 0.1
"""Seconds that TOP takes for one turn, and between two moments: 10 Hz."""

VEHICLE_BEHIND_LIDAR = 1.2
"""Metres from the place that a scene gives its ego vehicle (drive_world's own lidar) back to the rear axle."""


@dataclass(frozen=True)
class WaymoRigSettings:
    """What the rig measures. The defaults are small, for tests; `full_size` has Waymo's own sizes.

    Attributes:
        seed: which streets.
        num_moments: moments in a segment, one every `SWEEP` seconds.
        image_width: of all cameras; the front three are 2/3 as high, the sides 886/1920.
        top_size, side_size: rows and columns of TOP's range image and of the other four's.
        returns: 1 or 2.
        speed: of the vehicle, metres a second; 0 stands quite still.
        rolling_shutter_s: seconds from an image's first column to its last; 0 exposes all at once. Waymo's is 0.044.
            Default: with the default speed and size, ignoring it moves no point by more than half a pixel.
        distortion: do the lenses distort?
        supersampling, image_noise: as in `DriveWorldConfig`.
        jpeg_quality: of the images.
    """

    seed: int = 0
    num_moments: int = 10
    image_width: int = 240
    top_size: tuple[int, int] = (64, 600)
    side_size: tuple[int, int] = (50, 150)
    returns: int = 2
    speed: float = 5.0
    rolling_shutter_s: float = 0.0015
    distortion: bool = True
    supersampling: int = 2
    image_noise: float = 2.0
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        sizes = (self.num_moments, *self.top_size, *self.side_size, self.supersampling)
        if min(sizes) < 1 or self.image_width < 16 or self.seed < 0 or self.returns not in (1, 2):
            raise ValueError(f"sizes and counts must be positive, image_width >= 16, returns 1 or 2; got {self}")
        if not (0 <= self.speed <= 30 and 0 <= self.rolling_shutter_s <= SWEEP / 2 and 1 <= self.jpeg_quality <= 100):
            raise ValueError(f"speed must lie in 0..30, rolling_shutter_s in 0..{SWEEP / 2}; got {self}")

    @classmethod
    def full_size(cls, **changes: Any) -> "WaymoRigSettings":
        """Waymo's resolution and read-out time; `changes` as to the class itself."""
        sizes = {"image_width": 1920, "top_size": (64, 2650), "side_size": (200, 600), "rolling_shutter_s": 0.044}
        return cls(**{**sizes, **changes})


@dataclass(frozen=True, eq=False)
class LaserMount:
    """A lidar of the rig.

    Attributes:
        vehicle_from_laser: (4, 4).
        inclination_range: lowest and highest, radians.
        max_range: metres.
        half_view: radians to both sides of its own x axis that the car's body leaves free.
        beam_edge: radians from a beam's middle to its upper edge, which may pass by what the middle meets.
        spins: is every column measured at a time, and from a place, of its own?
    """

    vehicle_from_laser: NDArray[np.float64]
    inclination_range: tuple[float, float]
    max_range: float
    half_view: float
    beam_edge: float
    spins: bool = False


@dataclass(frozen=True, eq=False)
class CameraMount:
    """A camera of the rig: see `WaymoCamera`; `delay` is from the start of a sweep to the middle of the exposure, when
    TOP looks the camera's way, seconds."""

    vehicle_from_camera: NDArray[np.float64]
    intrinsic: NDArray[np.float64]
    size: tuple[int, int]
    delay: float


def rotations(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3, 3) Rz(yaw) Ry(pitch) Rx(roll) of (..., 3) roll, pitch, yaw."""
    (cr, cp, cy), (sr, sp, sy) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def transforms(six: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 4, 4) of (..., 6) roll, pitch, yaw, x, y, z."""
    matrices = np.zeros((*six.shape[:-1], 4, 4))
    matrices[..., :3, :3] = rotations(six[..., :3])
    matrices[..., :3, 3] = six[..., 3:]
    matrices[..., 3, 3] = 1.0
    return matrices


def _mounted(place: tuple[float, float, float], yaw_deg: float, pitch_deg: float, roll_deg: float) -> NDArray:
    return transforms(np.array([*np.radians([roll_deg, pitch_deg, yaw_deg]), *place]))


def build_lasers() -> dict[str, LaserMount]:
    """The five lidars by name: TOP, mounted with an odd yaw, and four tilted ones that also see the ground nearby."""
    low, wide = (-np.pi / 2, np.pi / 6), np.radians(98)
    top_range = tuple(np.radians([-17.6, 2.4]).tolist())
    mounts = [
        LaserMount(_mounted((1.43, 0.0, 2.184), 148.3, -0.25, 0.35), top_range, 75.0, np.pi, 0.0015, spins=True),
        LaserMount(_mounted((4.07, 0.0, 0.691), 0.3, 1.25, -0.2), low, 20.0, wide, 0.006),
        LaserMount(_mounted((3.245, 1.025, 0.981), 91.7, 1.6, -1.1), low, 20.0, wide, 0.006),
        LaserMount(_mounted((3.245, -1.025, 0.981), -88.9, -0.8, 1.9), low, 20.0, wide, 0.006),
        LaserMount(_mounted((-1.154, 0.0, 0.466), 178.4, 1.5, 0.6), low, 20.0, wide, 0.006),
    ]
    return dict(zip(LASER_NAMES.values(), mounts, strict=True))


def top_inclinations(num_beams: int, inclination_range: tuple[float, float]) -> NDArray[np.float64]:
    """(num_beams,) lowest first; as on Waymo's TOP, beams lie the closer the nearer they are to the horizon."""
    low, high = inclination_range
    down = np.linspace(1.0, 0.0, num_beams) if num_beams > 1 else np.zeros(1)
    return high - (high - low) * down**1.5


def build_cameras(settings: WaymoRigSettings) -> dict[str, CameraMount]:
    """The five cameras by name; no two lenses are alike, and their axes are not quite level."""
    width = settings.image_width
    heights = [round(width * full / 1920) for full in (1280, 1280, 1280, 886, 886)]
    mounts = [
        _mounted((1.539, -0.024, 2.115), 0.2, -0.1, 0.5),
        _mounted((1.493, 0.091, 2.115), 44.2, 0.6, -0.4),
        _mounted((1.493, -0.094, 2.115), -45.6, 0.9, 0.3),
        _mounted((1.432, 0.110, 2.115), 90.4, 0.7, -0.6),
        _mounted((1.429, -0.112, 2.115), -89.1, 1.1, 0.8),
    ]
    focal = np.array([2044.5, 2056.4, 2050.7, 2062.0, 2039.8]) * width / 1920
    off_centre = np.array([[-10.4, -6.8], [-5.6, 6.0], [12.3, 4.9], [7.7, -5.1], [-14.2, 8.3]]) * width / 1920
    lenses = np.array(
        [
            [0.0404, -0.3300, 0.00104, -0.00157, 0.0],
            [0.0331, -0.3301, 0.00324, 0.00132, 0.0],
            [0.0412, -0.3420, -0.00151, 0.00210, 0.01],
            [0.0377, -0.3195, 0.00080, -0.00240, 0.0],
            [0.0289, -0.3344, -0.00213, 0.00095, -0.01],
        ]
    ) * float(settings.distortion)
    cameras = {}
    for index, name in enumerate(CAMERA_NAMES.values()):
        size = (heights[index], width)
        centre = np.array([width, heights[index]]) / 2 + off_centre[index]
        heading = np.arctan2(mounts[index][1, 0], mounts[index][0, 0])
        delay = float(0.5 - heading / (2 * np.pi)) * SWEEP
        intrinsic = np.array([focal[index], focal[index], *centre, *lenses[index]])
        cameras[name] = CameraMount(mounts[index], intrinsic, size, delay)
    return cameras


@dataclass(frozen=True)
class Ride:
    """The vehicle's way: along the street, swinging a little from side to side, with a body that pitches and rolls.

    Attributes:
        speed, y: of the vehicle, and the line that it swings about.
        phases: (3,) of the swing, the pitch and the roll.
        world_from_street: (4, 4) a turn about the vertical and a shift. The shift is some hundred metres: what is
            stored as float32 keeps a tenth of a millimetre.
    """

    speed: float
    y: float
    phases: NDArray[np.float64]
    world_from_street: NDArray[np.float64] = field(repr=False)

    PERIODS = np.array([3.0, 1.3, 1.7])
    """Seconds of a swing, a pitch and a roll."""

    def _swing(self) -> float:
        """Radians that the heading swings to both sides: the vehicle leaves its line by 0.35 m at most."""
        return min(0.12, 0.35 * 2 * np.pi / self.PERIODS[0] / max(self.speed, 1.0))

    def six(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 6) roll, pitch, yaw, x, y, z of the vehicle in the street at (...) times, seconds."""
        times = np.asarray(times, dtype=np.float64)
        turn, moving = 2 * np.pi / self.PERIODS, float(self.speed > 0)
        angles = turn * times[..., None] + self.phases
        swing = self._swing() * moving
        yaw, pitch, roll = np.moveaxis(np.cos(angles) * [swing, 0.012 * moving, 0.008 * moving], -1, 0)
        aside = swing * self.speed / turn[0] * np.sin(angles[..., 0])
        return np.stack(
            [roll, pitch, yaw, self.speed * times - VEHICLE_BEHIND_LIDAR, self.y + aside, np.zeros_like(yaw)], axis=-1
        )

    def street_from_vehicle(self, times: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """(..., 4, 4) at (...) times."""
        return transforms(self.six(np.asarray(times)))

    def world_six(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 6) like `six`, in the world."""
        six = self.six(times)
        six[..., 2] += np.arctan2(self.world_from_street[1, 0], self.world_from_street[0, 0])
        six[..., 3:] = six[..., 3:] @ self.world_from_street[:3, :3].T + self.world_from_street[:3, 3]
        return six

    def world_from_vehicle(self, times: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """(..., 4, 4) at (...) times."""
        return self.world_from_street @ self.street_from_vehicle(times)


def draw_ride(rng: Generator, ego: Ego) -> Ride:
    """A ride in the ego vehicle's lane, at its speed, in a street that lies somewhere in the world."""
    phases = rng.uniform(0, 2 * np.pi, 3)
    place = np.array([0.0, 0.0, rng.uniform(-np.pi, np.pi), *rng.uniform(-400, 400, 2), rng.uniform(-60, 20)])
    return Ride(ego.speed, ego.y, phases, transforms(place))
