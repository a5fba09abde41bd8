"""Is a matrix what a calibration needs: a rigid motion, or a projection in pixels?

The answer is empty where it is, else words that follow the matrix' name. Nothing is raised, whatever a matrix holds.
"""

import numpy as np
from numpy.typing import NDArray

SKEW = 1e-3
"""How far R R^T of a rotation R may be from the identity; calibrations are printed with few digits."""
LAST_ROW = 1e-6
"""How far a last row may be from its exact value; products and inverses round."""
FOCAL = (0.1, 50.0)
"""Smallest and largest focal length as a share of the image's longer edge: fields of view of 157 and 1.1 degrees."""


def check_rigid(matrix: NDArray[np.floating]) -> str:
    """Why a matrix is no rigid motion, in words that follow its name ("holds no rotation: ..."); empty where it is one.

    A rigid motion can always be inverted.

    Args:
        matrix: should be (4, 4) homogeneous, metres.
    """
    matrix = np.asarray(matrix)
    if matrix.shape != (4, 4):
        return f"must be a 4 x 4 matrix, is {' x '.join(map(str, matrix.shape)) or 'a number'}"
    if matrix.dtype.kind not in "fiu" or not np.isfinite(matrix).all():
        return "holds a value that is no finite number"
    matrix = matrix.astype(np.float64)
    if np.abs(matrix[3] - (0, 0, 0, 1)).max() > LAST_ROW:
        return f"has the last row {matrix[3].tolist()}, not [0, 0, 0, 1]; is it transposed?"
    rotation = matrix[:3, :3]
    largest = np.abs(rotation).max()
    skew = np.inf if largest > 1e6 else np.abs(rotation @ rotation.T - np.eye(3)).max()
    if skew > SKEW:
        return f"holds no rotation: R R^T is {skew:.2g} off the identity (at most {SKEW})"
    if np.linalg.det(rotation) < 0:
        return "mirrors: the determinant of its rotation is -1"
    return ""


def check_projection(matrix: NDArray[np.floating], image_size: tuple[int, int]) -> str:
    """Why a matrix is no projection of a pinhole camera into an image; empty where it is one.

    Args:
        matrix: should be (3, 4), pixels from metres.
        image_size: (height, width), pixels.
    """
    matrix = np.asarray(matrix)
    if matrix.shape != (3, 4) or matrix.dtype.kind not in "fiu" or not np.isfinite(matrix).all():
        return f"must be a finite 3 x 4 matrix, is {' x '.join(map(str, matrix.shape)) or 'a number'}"
    if not (matrix[0, 0] > 0 and matrix[1, 1] > 0):
        return f"has focal lengths {matrix[0, 0]:.4g} and {matrix[1, 1]:.4g}"
    if np.abs(matrix[2, :3] - (0, 0, 1)).max() > LAST_ROW:
        return f"has the last row {matrix[2].tolist()}, which must begin with 0, 0, 1"
    longer = max(image_size)
    if not all(FOCAL[0] < focal / longer < FOCAL[1] for focal in (matrix[0, 0], matrix[1, 1])):
        return (
            f"has focal lengths {matrix[0, 0]:.4g} and {matrix[1, 1]:.4g} pixels for an image of {image_size[0]} x "
            f"{image_size[1]}; are they normalised, or of another image size?"
        )
    centre = matrix[:2, 2] / (image_size[1], image_size[0])
    if not ((centre > -1) & (centre < 2)).all():
        return (
            f"has its principal point at ({matrix[0, 2]:.4g}, {matrix[1, 2]:.4g}), far outside an image of "
            f"{image_size[0]} x {image_size[1]}; is it of another image size?"
        )
    return ""
