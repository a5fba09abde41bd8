"""Is a pre-trained backbone better than an untrained one? The probe's table, over several seeds, with a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from simipu3d.contracts.tokens import FeatureMap
from simipu3d.errors import UserError
from simipu3d.probe.linear import HIGHER_IS_BETTER, Encoder, ProbeData, encode_all, fit_probe, score_probe

ROW_MEAN, RANDOM, AFTER = "row mean", "random initialisation", "after pre-training"


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation (n - 1) over seeds; the latter is NaN for a single seed."""

    mean: float
    std: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "Measured":
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if np.isnan(self.std) else f"{self.mean:.3f} +- {self.std:.3f}"


@dataclass(frozen=True)
class ProbeTable:
    """Results of `probe_table`.

    Attributes:
        seeds: a seed draws the label subset and the untrained backbone; the pre-trained one is one for all.
        num_labels, num_held_out: labelled and scored frames.
        values: row -> metric -> the value of each seed.
    """

    seeds: tuple[int, ...]
    num_labels: int
    num_held_out: int
    values: dict[str, dict[str, tuple[float, ...]]]

    def measured(self, row: str, metric: str) -> Measured:
        """One cell of the table."""
        return Measured.over(self.values[row][metric])

    def difference(self, metric: str) -> Measured:
        """After pre-training minus random initialisation, paired by seed."""
        pairs = zip(self.values[AFTER][metric], self.values[RANDOM][metric], strict=True)
        return Measured.over([after - before for after, before in pairs])

    def threshold(self, metric: str) -> float:
        """How large the mean difference must be: an untrained backbone in place of the pre-trained one would stay
        below it 19 times out of 20.

        One backbone stands against n, so the difference of their means varies by sqrt(1 + 1 / n) spreads, and the
        spread itself is known from n seeds only (Student's t, n - 1 degrees of freedom): 5 spreads for 3 seeds, 3 for
        5.
        """
        num_seeds = len(self.seeds)
        return float(stats.t.ppf(0.975, num_seeds - 1) * self.difference(metric).std * np.sqrt(1 + 1 / num_seeds))

    def verdict(self, metric: str) -> str:
        """`better` or `worse` where the paired difference exceeds `threshold`, else `no difference measured`. A single
        seed has no spread, so nothing can be said; a metric may also have found nothing to count."""
        difference = self.difference(metric)
        if np.isnan(difference.mean):
            return "not measured"
        if np.isnan(difference.std):
            return "one seed: no spread known"
        if not abs(difference.mean) > self.threshold(metric):
            return "no difference measured"
        return "better" if (difference.mean > 0) == HIGHER_IS_BETTER[metric] else "worse"

    def text_rows(self) -> list[tuple[str, ...]]:
        """The table as words: a heading, the three rows, the paired difference, what it must exceed, the verdict."""
        metrics = list(HIGHER_IS_BETTER)
        return [
            ("frozen backbone, ridge probe", *metrics),
            *((row, *(str(self.measured(row, metric)) for metric in metrics)) for row in (ROW_MEAN, RANDOM, AFTER)),
            ("after - random, by seed", *(str(self.difference(metric)) for metric in metrics)),
            ("needed for a verdict", *(f"{self.threshold(metric):.3f}" for metric in metrics)),
            ("verdict", *(self.verdict(metric) for metric in metrics)),
        ]

    def as_dict(self) -> dict[str, object]:
        """Plain values for a JSON file."""
        return {
            "seeds": list(self.seeds),
            "num_labels": self.num_labels,
            "num_held_out": self.num_held_out,
            "values": {row: {metric: list(v) for metric, v in cells.items()} for row, cells in self.values.items()},
            "verdicts": {metric: self.verdict(metric) for metric in HIGHER_IS_BETTER},
        }


def probe_table(
    labelled: ProbeData,
    held_out: ProbeData,
    *,
    pretrained: Encoder,
    random: Callable[[int], Encoder],
    num_labels: int = 40,
    seeds: Sequence[int] = (0, 1, 2),
) -> ProbeTable:
    """Probe no backbone, untrained ones and a pre-trained one on the same label subsets.

    Args:
        labelled: frames that label subsets are drawn from; other scenes than those of `held_out`.
        held_out: frames that are scored.
        pretrained: the pre-trained backbone; its BatchNorm statistics made like those of the untrained ones.
        random: makes an untrained backbone of the same architecture from a seed.
        num_labels: frames with labels in a subset.
        seeds: runs.

    Raises:
        UserError: fewer labelled frames than `num_labels`, or fewer than 2 of those.
    """
    if not 2 <= num_labels <= len(labelled):
        raise UserError(f"the probe's {num_labels} labelled frames must be 2 to {len(labelled)}, the frames there are")
    if labelled.class_names != held_out.class_names or not len(held_out):
        raise ValueError("labelled and held-out frames must have the same classes, and there must be some of both")
    after_labelled, after_held_out = encode_all(pretrained, labelled.images), encode_all(pretrained, held_out.images)
    values: dict[str, dict[str, list[float]]] = {
        row: {metric: [] for metric in HIGHER_IS_BETTER} for row in (ROW_MEAN, RANDOM, AFTER)
    }
    for seed in seeds:
        chosen = np.random.default_rng(seed).permutation(len(labelled))[:num_labels]
        subset = labelled.subset(chosen)
        untrained = random(seed)
        after = _select(after_labelled, chosen)
        maps = {
            ROW_MEAN: (_without_channels(after), _without_channels(after_held_out)),
            RANDOM: (encode_all(untrained, subset.images), encode_all(untrained, held_out.images)),
            AFTER: (after, after_held_out),
        }
        for row, (train, test) in maps.items():
            # The same generator for every row: the same quarter of the labels chooses the strength.
            metrics = score_probe(fit_probe(train, subset, np.random.default_rng(seed)), test, held_out)
            for metric, value in metrics.items():
                values[row][metric].append(value)
    plain = {row: {metric: tuple(v) for metric, v in cells.items()} for row, cells in values.items()}
    return ProbeTable(tuple(seeds), num_labels, len(held_out), plain)


def _select(features: FeatureMap, index: np.ndarray) -> FeatureMap:
    rows = torch.from_numpy(np.asarray(index, dtype=np.int64))
    return FeatureMap(features.features.index_select(0, rows), features.stride, features.offset)


def _without_channels(features: FeatureMap) -> FeatureMap:
    """The same cells with no features: all that is left is the row."""
    return FeatureMap(features.features[:, :0], features.stride, features.offset)
