"""On which pixel of a Waymo-like camera does a place in the street land, exactly?

With a rolling shutter a column is exposed at its own time, so that the answer depends on itself: it is found by
repetition. Pixels are edge-based (u, v): (0, 0) is the corner of the top-left pixel. Written for arrays and apart from
`geometry.camera`, which it is there to prove. Shapes: N places.
"""

import numpy as np
from numpy.typing import NDArray

from simipu3d.benchmark.synthetic_waymo.rig import CameraMount, Ride


def fold_radius(intrinsic: NDArray[np.float64]) -> float:
    """Distance from the axis, in normalised coordinates, up to which a lens' picture grows; 2 where it grows farther."""
    k1, k2, _, _, k3 = intrinsic[4:]
    radius = np.linspace(0.0, 2.0, 2001)
    grows = np.diff(radius * (1 + k1 * radius**2 + k2 * radius**4 + k3 * radius**6)) > 0
    return 2.0 if grows.all() else float(radius[grows.argmin()])


def image_places(
    intrinsic: NDArray[np.float64], camera_xyz: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Pixels of places in a camera's own frame (x out of the lens, y left, z up).

    Returns:
        pixels (N, 2), and (N,) bool: does the lens model hold there (in front, and within `fold_radius`)? Where it does
        not, pixels are meaningless.
    """
    f_u, f_v, c_u, c_v, k1, k2, p1, p2, k3 = intrinsic
    ahead = camera_xyz[:, 0] > 1e-3
    front = np.where(ahead, camera_xyz[:, 0], 1.0)
    right, down = -camera_xyz[:, 1] / front, -camera_xyz[:, 2] / front
    r2 = right**2 + down**2
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = f_u * (right * radial + 2 * p1 * right * down + p2 * (r2 + 2 * right**2)) + c_u
    v = f_v * (down * radial + p1 * (r2 + 2 * down**2) + 2 * p2 * right * down) + c_v
    return np.stack([u, v], axis=1), ahead & (r2 < fold_radius(intrinsic) ** 2)


def column_times(mount: CameraMount, middle: float, readout: float, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """When the columns at `u` (edge-based) are exposed: left to right, the image's middle at `middle`; seconds."""
    return middle + (u / mount.size[1] - 0.5) * readout


def project_street(
    ride: Ride, mount: CameraMount, middle: float, readout: float, street_xyz: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where places of the street land in an image whose middle column is exposed at `middle`.

    Args:
        street_xyz: (N, 3) metres.
        middle, readout: seconds; `readout` is what the columns take together.

    Returns:
        (N, 2) edge-based pixels; NaN outside the image. What stands in front of a place is not asked.
    """
    pixels = np.full((len(street_xyz), 2), np.nan)
    seen, found = _at_times(ride, mount, np.array(middle), street_xyz)
    width = mount.size[1]
    rows = (
        np.flatnonzero(found & (seen[:, 0] > -width) & (seen[:, 0] < 2 * width)) if readout else np.flatnonzero(found)
    )
    seen = seen[rows]
    for _ in range(30 if readout else 0):
        times = column_times(mount, middle, readout, np.clip(seen[:, 0], 0, width))
        again, found = _at_times(ride, mount, times, street_xyz[rows])
        step = np.abs(again - seen)[found].max(initial=0.0)
        rows, seen = rows[found], again[found]
        if step < 1e-9:
            break
    pixels[rows] = seen
    inside = (pixels >= 0).all(axis=1) & (pixels[:, 0] < width) & (pixels[:, 1] < mount.size[0])
    pixels[~inside] = np.nan
    return pixels


def _at_times(
    ride: Ride, mount: CameraMount, times: NDArray[np.float64], street_xyz: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`image_places` at one time for all places () or at one for each (N,)."""
    poses = ride.street_from_vehicle(times) @ mount.vehicle_from_camera
    offset = street_xyz - poses[..., :3, 3]
    return image_places(mount.intrinsic, np.einsum("...ji,...j->...i", poses[..., :3, :3], offset))
