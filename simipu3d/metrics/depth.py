"""How far is a predicted depth map from the measured one?

Definition: Eigen et al., "Depth map prediction from a single image using a multi-scale deep network", NIPS 2014, as in the
Monocular-Depth-Estimation-Toolbox (depth/core/evaluation/metrics.py) and AdaBins: every error is the mean over the pixels
that count of one image, then the mean over the images; no scaling to the median. Depth is in metres along the optical axis,
0 where it is not measured. Shapes: H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ERRORS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")
"""Silog is 100 x the deviation of the logarithm's error; delta k is the share of pixels off by less than 1.25^k."""

CROPS = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.03594771, 0.96405229),
}
"""Top, bottom, left, right as shares of height and width (Garg et al., arXiv:1603.04992; Eigen et al. on KITTI)."""
NYU_CROP = (45, 471, 41, 601)
"""Rows and columns that count in NYU's 480 x 640 pixels."""
KB_CROP = (352, 1216)
"""KITTI's depth benchmark: the lowest rows and the middle columns."""


def valid_pixels(
    truth: NDArray, *, min_depth: float = 1e-3, max_depth: float = 80.0, crop: str = "none"
) -> NDArray[np.bool_]:
    """(H, W): the pixels that count.

    Args:
        truth: (H, W) metres.
        min_depth, max_depth: only truth between the two counts, both excluded.
        crop: none, garg, eigen (both cut the rows and columns of this very map: of one after `kb_crop` they keep other
            pixels than of the whole one, as AdaBins does), or nyu.

    Raises:
        ValueError: an unknown crop, or nyu for a map of another size than 480 x 640.
    """
    height, width = truth.shape
    valid = (truth > min_depth) & (truth < max_depth)
    if crop == "none":
        return valid
    if crop == "nyu":
        if truth.shape != (480, 640):
            raise ValueError(f"crop nyu is for maps of 480 x 640 pixels, got {height} x {width}")
        top, bottom, left, right = NYU_CROP
    elif crop in CROPS:
        shares = CROPS[crop]
        top, bottom, left, right = (
            int(share * side) for share, side in zip(shares, [height] * 2 + [width] * 2, strict=True)
        )
    else:
        raise ValueError(f"no crop is called {crop!r}; there are none, {', '.join(CROPS)}, nyu")
    inside = np.zeros(truth.shape, dtype=bool)
    inside[top:bottom, left:right] = True
    return valid & inside


def kb_crop(depth: NDArray) -> NDArray:
    """(352, 1216): the lowest rows and the middle columns of a KITTI map.

    Raises:
        ValueError: the map is smaller.
    """
    height, width = depth.shape
    rows, columns = KB_CROP
    if height < rows or width < columns:
        raise ValueError(f"a map of {height} x {width} pixels holds no {rows} x {columns}")
    left = (width - columns) // 2
    return depth[height - rows :, left : left + columns]


def depth_errors(
    prediction: NDArray, truth: NDArray, valid: NDArray[np.bool_], *, min_depth: float = 1e-3, max_depth: float = 80.0
) -> dict[str, float]:
    """The errors of one image, by `ERRORS`; NaN where no pixel counts.

    Args:
        prediction: (H, W) metres; brought into [min_depth, max_depth] first.
        truth: (H, W) metres.
        valid: (H, W) which pixels count, from `valid_pixels`.

    Raises:
        ValueError: sizes differ, or a prediction that counts is NaN.
    """
    if not prediction.shape == truth.shape == valid.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth {truth.shape}, valid {valid.shape}")
    d = np.asarray(truth, dtype=np.float64)[valid]
    p = np.asarray(prediction, dtype=np.float64)[valid]
    if np.isnan(p).any():
        raise ValueError(f"prediction is NaN at {int(np.isnan(p).sum())} of {len(p)} pixels that count")
    if not len(d):
        return dict.fromkeys(ERRORS, np.nan)
    p = np.clip(p, min_depth, max_depth)
    log = np.log(p) - np.log(d)
    ratio = np.maximum(p / d, d / p)
    values = (
        (np.abs(p - d) / d).mean(),
        ((p - d) ** 2 / d).mean(),
        np.sqrt(((p - d) ** 2).mean()),
        np.sqrt((log**2).mean()),
        np.abs(log).mean() / np.log(10),
        100 * np.sqrt(max(0.0, (log**2).mean() - log.mean() ** 2)),
        *((ratio < 1.25**power).mean() for power in (1, 2, 3)),
    )
    return dict(zip(ERRORS, map(float, values), strict=True))


def mean_errors(images: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over the images that have a pixel that counts; NaN where none has."""
    known = [own for own in images if not np.isnan(own["abs_rel"])]
    return {name: float(np.mean([own[name] for own in known])) if known else np.nan for name in ERRORS}
