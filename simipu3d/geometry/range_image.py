"""Where in space are the pixels of a lidar's range image?

A range image is what a spinning lidar measured, laid out as beams by directions: row 0 is the highest beam, columns run
clockwise seen from above (the azimuth falls from pi to -pi). Frames: the laser frame is the lidar's own, turned about
the vertical and shifted against the vehicle frame (x forward, y left, z up); metres and radians. Shapes: H beams, W
columns, N pixels with a return.

Formulae: the Waymo Open Dataset's range image layout (Sun et al., arXiv:1912.04838, section 3.2 and the data set's
format description).
"""

import numpy as np
from numpy.typing import NDArray


def beam_inclinations(
    inclinations: NDArray[np.floating] | None, inclination_range: tuple[float, float], num_beams: int
) -> NDArray[np.float64]:
    """(H,) inclination of every row, radians above the horizon, highest beam first.

    Args:
        inclinations: (H,) lowest beam first, or None: then the centres of H equal cells of the range.
        inclination_range: smallest and largest inclination, radians.
        num_beams: H.

    Raises:
        ValueError: the list has another length than the image has rows.
    """
    if inclinations is None:
        low, high = inclination_range
        rising = low + (np.arange(num_beams) + 0.5) / num_beams * (high - low)
    else:
        rising = np.asarray(inclinations, dtype=np.float64)
        if rising.shape != (num_beams,):
            raise ValueError(f"{rising.size} beam inclinations for a range image of {num_beams} rows")
    return rising[::-1]


def column_azimuths(num_columns: int, vehicle_from_laser: NDArray[np.floating]) -> NDArray[np.float64]:
    """(W,) azimuth of every column in the laser frame, radians counter-clockwise from +x.

    Column centres are evenly spaced in the vehicle's directions; the laser's own yaw is taken off.
    """
    centres = (num_columns - np.arange(num_columns) - 0.5) / num_columns
    return (2 * centres - 1) * np.pi - np.arctan2(vehicle_from_laser[1, 0], vehicle_from_laser[0, 0])


def range_image_points(
    ranges: NDArray[np.floating],
    inclinations: NDArray[np.floating] | None,
    inclination_range: tuple[float, float],
    vehicle_from_laser: NDArray[np.floating],
    *,
    pixel_pose: NDArray[np.floating] | None = None,
    vehicle_from_world: NDArray[np.floating] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The points of one return of one lidar.

    Args:
        ranges: (H, W) metres; 0 or less means no return. NaN gives a point of NaN, so that the damage shows.
        inclinations, inclination_range: as for `beam_inclinations`.
        vehicle_from_laser: (4, 4).
        pixel_pose: (H, W, 6) roll, pitch, yaw (radians), x, y, z (metres): world from vehicle at the time each pixel was
            measured. None: the lidar's points count as measured at the frame's time.
        vehicle_from_world: (4, 4) at the frame's time; goes with `pixel_pose`.

    Returns:
        xyz: (N, 3) in the vehicle frame at the frame's time, row after row of the image.
        pixels: (N, 2) row and column of each.

    Raises:
        ValueError: shapes do not fit together, or one of pixel_pose and vehicle_from_world is missing.
    """
    if (pixel_pose is None) != (vehicle_from_world is None):
        raise ValueError("pixel_pose and vehicle_from_world go together")
    height, width = ranges.shape
    if pixel_pose is not None and pixel_pose.shape != (height, width, 6):
        raise ValueError(f"pixel poses of shape {pixel_pose.shape} for a range image of {height} x {width}")
    inclination = beam_inclinations(inclinations, inclination_range, height)
    azimuth = column_azimuths(width, vehicle_from_laser)
    row, column = np.nonzero(~(ranges <= 0))
    distance = ranges[row, column].astype(np.float64)
    level = distance * np.cos(inclination)[row]
    local = np.stack(
        [level * np.cos(azimuth)[column], level * np.sin(azimuth)[column], distance * np.sin(inclination)[row]], axis=1
    )
    xyz = _moved(vehicle_from_laser, local)
    if pixel_pose is not None and vehicle_from_world is not None:
        xyz = _moved(vehicle_from_world, _posed(pixel_pose[row, column].astype(np.float64), xyz))
    return xyz, np.stack([row, column], axis=1)


def _moved(matrix: NDArray[np.floating], xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.asarray(matrix, dtype=np.float64)
    return xyz @ matrix[:3, :3].T + matrix[:3, 3]


def _posed(pose: NDArray[np.float64], xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3) Rz(yaw) Ry(pitch) Rx(roll) xyz + shift, each row by its own pose (N, 6); one axis after the other."""
    cos, sin = np.cos(pose[:, :3]).T, np.sin(pose[:, :3]).T
    x, y, z = xyz.T
    y, z = cos[0] * y - sin[0] * z, sin[0] * y + cos[0] * z
    x, z = cos[1] * x + sin[1] * z, cos[1] * z - sin[1] * x
    x, y = cos[2] * x - sin[2] * y, sin[2] * x + cos[2] * y
    return np.stack([x, y, z], axis=1) + pose[:, 3:]
