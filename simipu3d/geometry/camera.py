"""Where does each lidar point land in an image, and how do pixels move under image augmentation?

Frames are in metres (camera: x right, y down, z forward); pixels are (u, v) with integer centres: (0, 0) is the centre of
the top-left pixel, the image covers [-0.5, W - 0.5). Shapes: N points.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_DEPTH = 0.5
"""Nearer than this, metres, nothing counts as visible: it keeps the division away from zero and the car's own hood out."""
MAX_DISTORTION = 1e6
"""Coefficients beyond this are no lens; their powers would soon leave the numbers."""


def distort(xy: Tensor, distortion: Tensor) -> Tensor:
    """Lens distortion of normalised camera coordinates.

    Args:
        xy: (N, 2) x / z and y / z, undistorted.
        distortion: (5,) k1, k2, p1, p2, k3.

    Returns:
        (N, 2). Beyond the radius where the radial polynomial stops growing the model is meaningless (it folds back into
        the image); such rows are infinite, so that no caller takes them for visible.

    Source: OpenCV's pinhole model, modules/calib3d, "Detailed description".
    """
    k1, k2, p1, p2, k3 = distortion.unbind()
    r2 = xy.square().sum(dim=1)
    radial = 1 + k1 * r2 + k2 * r2.square() + k3 * r2**3
    x, y = xy.unbind(dim=1)
    distorted = torch.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x.square()),
            y * radial + p1 * (r2 + 2 * y.square()) + 2 * p2 * x * y,
        ],
        dim=1,
    )
    grows = r2 < _fold_radius_squared(distortion)
    return torch.where(grows[:, None], distorted, torch.inf)


def _fold_radius_squared(distortion: Tensor) -> Tensor:
    """The smallest r^2 at which d/dr [r (1 + k1 r^2 + k2 r^4 + k3 r^6)] is no longer positive; infinity where never."""
    k1, k2, _, _, k3 = (float(value) for value in distortion)
    # In 1 / r^2 the leading coefficient is 1, so that nothing is divided by a tiny one.
    roots = np.roots([1.0, 3 * k1, 5 * k2, 7 * k3])
    real = roots[np.abs(roots.imag) < 1e-9].real
    largest = real.max(initial=0.0)
    return distortion.new_tensor(1 / largest if largest > 0 else np.inf)


def check_distortion(distortion: NDArray[np.floating]) -> str:
    """Why five numbers are no distortion, in words that follow their name; empty where they are one."""
    if distortion.shape != (5,) or not np.isfinite(distortion).all():
        return f"must be 5 finite numbers, is {distortion.tolist()}"
    if np.abs(distortion).max() > MAX_DISTORTION:
        return f"is absurd: {distortion.tolist()}; a real lens has numbers of a few units"
    return ""


def project_points(
    xyz: Tensor,
    image_from_camera: Tensor,
    camera_from_lidar: Tensor,
    image_size: tuple[int, int] | Tensor,
    *,
    distortion: Tensor | None = None,
    min_depth: float = MIN_DEPTH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project lidar points into one image.

    Args:
        xyz: (N, 3) points in the lidar frame, metres. N may be 0.
        image_from_camera: (3, 4) pixels from metres; the fourth column need not be zero (KITTI's P2).
        camera_from_lidar: (4, 4).
        image_size: (height, width) of the image the calibration was made for, pixels.
        distortion: (5,) k1, k2, p1, p2, k3, or None for an undistorted image.
        min_depth: nearer than this, metres along the optical axis, a point is not visible.

    Returns:
        pixels: (N, 2) as (u, v), in the calibration's dtype. Meaningless where not visible.
        depth: (N,) metres along the optical axis (the projective one: with KITTI's P2 it is z + 0.003).
        visible: (N,) bool, in front of the camera and inside the image.

    Raises:
        ValueError: a matrix has another shape.

    Source: Hartley & Zisserman, Multiple View Geometry, 2nd ed., section 6.1.
    """
    if image_from_camera.shape != (3, 4) or camera_from_lidar.shape != (4, 4):
        raise ValueError(
            f"image_from_camera must be (3, 4) and camera_from_lidar (4, 4), got {tuple(image_from_camera.shape)} and "
            f"{tuple(camera_from_lidar.shape)}"
        )
    dtype = image_from_camera.dtype
    camera_xyz = xyz.to(dtype) @ camera_from_lidar[:3, :3].to(dtype).mT + camera_from_lidar[:3, 3].to(dtype)
    if distortion is not None and bool(distortion.any()):
        front = camera_xyz[:, 2:].clamp(min=1e-6)
        camera_xyz = torch.cat(
            [distort(camera_xyz[:, :2] / front, distortion.to(dtype)) * front, camera_xyz[:, 2:]], dim=1
        )
    homogeneous = camera_xyz @ image_from_camera[:, :3].mT + image_from_camera[:, 3]
    depth = homogeneous[:, 2]
    in_front = depth > min_depth
    pixels = homogeneous[:, :2] / torch.where(in_front, depth, 1.0)[:, None]
    return pixels, depth, in_front & inside_image(pixels, image_size)


def inside_image(pixels: Tensor, image_size: tuple[int, int] | Tensor) -> Tensor:
    """(N,) bool: is (u, v) in [-0.5, W - 0.5) x [-0.5, H - 0.5)? `image_size` is (height, width)."""
    height, width = image_size
    u, v = pixels.unbind(dim=1)
    return (u >= -0.5) & (u < width - 0.5) & (v >= -0.5) & (v < height - 0.5)


def move_pixels(augmented_from_image: Tensor, pixels: Tensor) -> Tensor:
    """Move (N, 2) pixels by a (3, 3) affine image transform."""
    matrix = augmented_from_image.to(pixels.dtype)
    return pixels @ matrix[:2, :2].mT + matrix[:2, 2]


def resize_matrix(size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """(3, 3) float64 move of pixels when an image of `size` (height, width) is resized to `new_size`.

    Integer-centre pixels scale about the image's corner at -0.5: u' = (u + 0.5) s - 0.5 with the realised factor s.
    """
    scale_v, scale_u = new_size[0] / size[0], new_size[1] / size[1]
    return torch.tensor(
        [[scale_u, 0, 0.5 * scale_u - 0.5], [0, scale_v, 0.5 * scale_v - 0.5], [0, 0, 1]], dtype=torch.float64
    )


def turn_matrix(size: tuple[int, int], angle: float) -> Tensor:
    """(3, 3) float64 move of pixels when an image of `size` (height, width) is turned about its middle by `angle` radians, from u
    towards v."""
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = (size[1] - 1) / 2, (size[0] - 1) / 2
    rows = [[cos, -sin, u - cos * u + sin * v], [sin, cos, v - sin * u - cos * v], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


def crop_matrix(top: int, left: int) -> Tensor:
    """(3, 3) float64 move of pixels when `top` rows and `left` columns are cut away."""
    return torch.tensor([[1, 0, -left], [0, 1, -top], [0, 0, 1]], dtype=torch.float64)


def mirror_matrix(width: int) -> Tensor:
    """(3, 3) float64 move of pixels when an image is mirrored left-right: u' = W - 1 - u."""
    return torch.tensor([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
