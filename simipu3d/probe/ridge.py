"""Ridge regression on features, with the row of the image given for free.

In a driving image the row alone says much about depth and class. Every row has an intercept of its own that is not
penalised, so a probe without features is exactly the mean of each row, and features have to add to that. Shapes: n
samples, C features, T targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ridge:
    """A solution: target = row_targets[row] + (x - row_features[row]) @ weight.

    Attributes:
        row_features: (R, C) mean features of every row.
        row_targets: (R, T) mean targets of every row.
        weight: (C, T).
    """

    row_features: NDArray[np.float64]
    row_targets: NDArray[np.float64]
    weight: NDArray[np.float64]

    def deviation(self, features: NDArray, row: NDArray[np.integer]) -> NDArray[np.float64]:
        """(..., T) what (..., C) features in rows (...) say beyond their row's mean target."""
        return (features - self.row_features[row]) @ self.weight

    def predict(self, features: NDArray, row: NDArray[np.integer]) -> NDArray[np.float64]:
        """(..., T) targets of (..., C) features in rows (...)."""
        return self.row_targets[row] + self.deviation(features, row)


def fit_ridge(
    features: NDArray, targets: NDArray, row: NDArray[np.integer], num_rows: int, strengths: Sequence[float]
) -> list[Ridge]:
    """Solve ridge regression for several strengths.

    Minimises mean |y - a[row] - z w|^2 + strength |w|^2 over the intercepts a of the rows and the weights w, where z
    are the features divided by their standard deviation within rows. Free intercepts are the same as removing each
    row's mean from both sides first (Frisch & Waugh 1933, Lovell 1963).

    Args:
        features: (n, C). C may be 0.
        targets: (n, T).
        row: (n,) row of each sample, below `num_rows`.
        num_rows: a row without samples borrows the means of the nearest one that has some.
        strengths: positive numbers.

    Returns:
        One solution for each strength.

    Raises:
        ValueError: no samples, or features or targets that are not finite.
    """
    features, targets = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if len(features) == 0:
        raise ValueError("a ridge regression needs samples, got none")
    if not (np.isfinite(features).all() and np.isfinite(targets).all()):
        raise ValueError(
            "features and targets of a probe must be finite numbers; has the backbone's training diverged?"
        )
    row_features, row_targets = row_means(features, row, num_rows), row_means(targets, row, num_rows)
    within, wanted = features - row_features[row], targets - row_targets[row]
    spread = np.sqrt((within**2).mean(axis=0))
    # A channel that never leaves its row's mean but for rounding carries nothing; dividing by it would make it noise.
    alive = spread > 1e-9 * (1 + np.abs(features).max(axis=0, initial=0.0))
    per_spread = np.where(alive, 1 / np.where(alive, spread, 1.0), 0.0)
    within = within * per_spread
    values, vectors = np.linalg.eigh(within.T @ within / len(features))
    moment = vectors.T @ (within.T @ wanted / len(features))
    values = np.maximum(values, 0.0)
    weights = [vectors @ (moment / (values + strength)[:, None]) for strength in strengths]
    return [Ridge(row_features, row_targets, per_spread[:, None] * weight) for weight in weights]


def row_means(values: NDArray[np.float64], row: NDArray[np.integer], num_rows: int) -> NDArray[np.float64]:
    """(R, T) mean of (n, T) values in every row; a row without samples takes the nearest row's."""
    counts = np.bincount(row, minlength=num_rows)
    sums = np.zeros((num_rows, values.shape[1]))
    np.add.at(sums, row, values)
    filled = np.flatnonzero(counts)
    nearest = filled[np.abs(np.arange(num_rows)[:, None] - filled[None]).argmin(axis=1)]
    return sums[nearest] / counts[nearest, None]
