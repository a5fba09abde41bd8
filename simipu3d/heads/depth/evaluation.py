"""Which pixels of a depth map are scored?

Shapes: one image of H x W pixels. What is measured on them stands in `metrics.depth`.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Crop = Literal["none", "garg", "eigen", "nyu"]
SHARES = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.03594771, 0.96405229),
}
"""First and last row and column as shares of height and width (Garg et al., arXiv:1603.04992; Eigen et al., arXiv:1406.2283)."""
NYU_SIZE, NYU_WINDOW = (480, 640), (45, 471, 41, 601)
"""Rows and columns that are scored in a full NYU image (arXiv:1406.2283)."""


def crop_mask(size: tuple[int, int], crop: Crop) -> NDArray[np.bool_]:
    """(H, W): is a pixel inside the scored window? Shares are of the image that is given: on KITTI the one that is cropped to
    352 x 1216 already, as AdaBins and NeWCRFs have it; NYU's window is scaled with the image."""
    height, width = size
    mask = np.zeros(size, dtype=np.bool_)
    if crop in SHARES:
        shares = SHARES[crop]
        top, bottom, left, right = (
            int(s * length) for s, length in zip(shares, (height, height, width, width), strict=True)
        )
    elif crop == "nyu":
        scale = (height / NYU_SIZE[0], height / NYU_SIZE[0], width / NYU_SIZE[1], width / NYU_SIZE[1])
        top, bottom, left, right = (round(edge * s) for edge, s in zip(NYU_WINDOW, scale, strict=True))
    else:
        top, bottom, left, right = 0, height, 0, width
    mask[top:bottom, left:right] = True
    return mask


def scored_pixels(truth: NDArray[np.float32], crop: Crop, scored_range: tuple[float, float]) -> NDArray[np.bool_]:
    """(H, W): pixels inside the window whose truth lies strictly inside the range, metres."""
    return crop_mask(truth.shape, crop) & (truth > scored_range[0]) & (truth < scored_range[1])
