"""How good is a depth map?

Numbers of one image on its scored pixels; of a data set the mean over images, without any scaling to the truth's median.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "d1", "d2", "d3")


def depth_errors(prediction: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """The customary numbers of one image; NaN where no pixel is given.

    Args:
        prediction: (N,) metres, positive.
        truth: (N,) metres, positive.

    Returns:
        abs_rel, sq_rel (metres), rmse (metres), rmse_log, log10, silog (hundredfold), and d1, d2, d3: the shares of pixels
        within a factor of 1.25, 1.25^2, 1.25^3.

    Source: Eigen et al., arXiv:1406.2283, section 4.2; silog: KITTI's depth benchmark.
    """
    prediction, truth = (np.asarray(values, dtype=np.float64) for values in (prediction, truth))
    if prediction.size == 0:
        return dict.fromkeys(NAMES, float("nan"))
    error, log_error = prediction - truth, np.log(prediction) - np.log(truth)
    factor = np.maximum(prediction / truth, truth / prediction)
    numbers = {
        "abs_rel": np.mean(np.abs(error) / truth),
        "sq_rel": np.mean(error**2 / truth),
        "rmse": np.sqrt(np.mean(error**2)),
        "rmse_log": np.sqrt(np.mean(log_error**2)),
        "log10": np.mean(np.abs(log_error)) / np.log(10),
        "silog": 100 * np.sqrt(max(0.0, np.mean(log_error**2) - np.mean(log_error) ** 2)),
        **{f"d{power}": np.mean(factor < 1.25**power) for power in (1, 2, 3)},
    }
    return {name: float(value) for name, value in numbers.items()}


def mean_errors(images: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over images of what `depth_errors` gave; images without a scored pixel (NaN) do not count. {} where no image
    counts."""
    scored = [errors for errors in images if not np.isnan(errors["abs_rel"])]
    return {name: float(np.mean([errors[name] for errors in scored])) for name in NAMES} if scored else {}
