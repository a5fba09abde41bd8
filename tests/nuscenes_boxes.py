"""Random nuScenes labels and detections, shared by the tests of the metric and of its files."""

import numpy as np

from simipu3d.metrics.nuscenes import ATTRIBUTES, CLASS_RANGE, SampleBoxes

CLASSES = tuple(CLASS_RANGE)


def random_sets(seed: int, num_samples: int = 6, per_sample: int = 25):
    """Labels; shifted, turned, resized labels with doubles and chance as detections; where the ego vehicle is."""
    rng = np.random.default_rng(seed)
    ego_xy = rng.uniform(300, 2000, (num_samples, 2))
    sample = np.sort(rng.integers(0, num_samples, num_samples * per_sample))
    num = len(sample)
    names = rng.choice(CLASSES[:9], num)  # the last class has no truth
    attributes = rng.choice(("", *ATTRIBUTES), num)
    truth = SampleBoxes(
        sample=sample,
        center=np.column_stack([ego_xy[sample] + rng.normal(0, 22, (num, 2)), rng.uniform(0, 2, num)]),
        size=rng.uniform(0.5, 6, (num, 3)),
        yaw=rng.uniform(-np.pi, np.pi, num),
        velocity=np.where(rng.random((num, 1)) < 0.1, np.nan, rng.normal(0, 4, (num, 2))),
        names=names,
        attributes=attributes,
        score=np.zeros(num),
        num_points=rng.integers(0, 30, num),
    )
    rows = np.sort(rng.choice(num, int(1.3 * num)))
    extra = len(rows)
    guess = truth.take(rows)
    is_other = rng.random(extra) < 0.15
    found = SampleBoxes(
        sample=guess.sample,
        center=guess.center + rng.normal(0, 0.8, (extra, 3)),
        size=guess.size * rng.uniform(0.8, 1.25, (extra, 3)),
        yaw=guess.yaw + rng.normal(0, 0.4, extra) + np.pi * (rng.random(extra) < 0.1),
        velocity=rng.normal(0, 1, (extra, 2)) + np.nan_to_num(guess.velocity),
        names=np.where(is_other, rng.choice(CLASSES, extra), guess.names),
        attributes=np.where(rng.random(extra) < 0.3, rng.choice(ATTRIBUTES, extra), guess.attributes),
        score=rng.integers(1, 200, extra) / 200,
        num_points=np.full(extra, -1),
    )
    return truth, found, ego_xy


def perfect(truth: SampleBoxes) -> SampleBoxes:
    """The labels as detections; rising scores, so that none are equal."""
    num = len(truth)
    values = {"score": np.linspace(0.1, 1, num), "num_points": np.full(num, -1)}
    columns = ("sample", "center", "size", "yaw", "velocity", "names", "attributes")
    return SampleBoxes(**{name: getattr(truth, name) for name in columns}, **values)
