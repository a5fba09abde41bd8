"""nuScenes' mAP, errors and NDS: perfect, empty, by hand, against a slow loop and against nuscenes-devkit itself."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nuscenes_boxes import CLASSES, perfect, random_sets

from simipu3d.metrics.files.nuscenes import read_submission, read_tables, score, write_submission
from simipu3d.metrics.nuscenes import CLASS_RANGE, DISTANCES, ERRORS, SampleBoxes, nuscenes_score

DEVKIT_ERRORS = dict(zip(ERRORS, ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err"), strict=True))


def slow_class(name, truth, found, distance):
    """AP and the five errors of one class at one distance, box by box."""
    labels = [k for k in range(len(truth)) if truth.names[k] == name]
    order = sorted((found.score[k], k) for k in range(len(found)) if found.names[k] == name)[::-1]
    free, hits, rows = set(labels), [], []
    for _, k in order:
        own = [t for t in labels if t in free and truth.sample[t] == found.sample[k]]
        away = {t: np.hypot(*(truth.center[t] - found.center[k])[:2]) for t in own}
        nearest = min(away, key=away.get) if away else None
        hits.append(nearest is not None and away[nearest] < distance)
        if hits[-1]:
            free.remove(nearest)
            turn = abs((truth.yaw[nearest] - found.yaw[k] + 50 * np.pi) % (np.pi if name == "barrier" else 2 * np.pi))
            period = np.pi if name == "barrier" else 2 * np.pi
            common = np.prod(np.minimum(truth.size[nearest], found.size[k]))
            union = np.prod(truth.size[nearest]) + np.prod(found.size[k]) - common
            word = truth.attributes[nearest]
            wrong = np.nan if word == "" else float(word != found.attributes[k])
            speed = np.hypot(*(truth.velocity[nearest] - found.velocity[k]))
            rows.append([away[nearest], 1 - common / union, min(turn, period - turn), speed, wrong])
    if not rows:
        return 0.0, [1.0] * 5
    recall = np.cumsum(hits) / len(labels)
    precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    at = np.linspace(0, 1, 101)  # at a step of the curve the last bit decides
    sampled = np.array([np.interp(r, recall, precision) if r <= recall[-1] else 0.0 for r in at])
    sure = np.array([np.interp(r, recall, [s for s, _ in order]) if r <= recall[-1] else 0.0 for r in at])
    ap = np.mean([max(p - 0.1, 0) / 0.9 for p in sampled[11:]])
    last = max((k for k in range(101) if sure[k] > 0), default=0)
    if last < 11:
        return ap, [1.0] * 5
    scores = [s for (s, _), hit in zip(order, hits, strict=True) if hit]
    means = []
    for column in np.array(rows).T:
        running = []
        for k in range(len(column)):
            known = column[: k + 1][~np.isnan(column[: k + 1])]
            running.append(known.mean() if len(known) else 0.0)
        if np.isnan(column).all():
            running = [1.0] * len(column)
        means.append(np.mean([np.interp(s, scores[::-1], running[::-1]) for s in sure[11 : last + 1]]))
    return ap, means


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_slow_loop(seed):
    truth, found, ego_xy = random_sets(seed)
    result = nuscenes_score(truth, found, ego_xy)
    kept = []
    for boxes in (truth, found):
        away = np.hypot(*(boxes.center[:, :2] - ego_xy[boxes.sample]).T)
        kept.append(
            boxes.take([k for k in range(len(boxes)) if away[k] < CLASS_RANGE[boxes.names[k]] and boxes.num_points[k]])
        )
    for each in result.classes:
        for distance in DISTANCES:
            ap, errors = slow_class(each.name, *kept, distance)
            assert each.ap[distance] == pytest.approx(ap, abs=1e-9)
            if distance == 2.0:
                for error, value in zip(ERRORS, errors, strict=True):
                    assert np.isnan(each.errors[error]) or each.errors[error] == pytest.approx(value, abs=1e-9)
    assert 0.05 < result.mean_ap < 0.9
    assert result.classes[9].num_objects == 0
    assert np.isnan(result.classes[CLASSES.index("traffic_cone")].errors["orientation"])
    spared = sum(max(0, 1 - value) for value in result.errors.values())
    assert result.nds == pytest.approx((5 * result.mean_ap + spared) / 10)


def one(name="car", x=0.0, y=0.0, score=0.5, num=1, **changes) -> SampleBoxes:
    values = {
        "sample": np.zeros(num, dtype=np.int64),
        "center": np.tile([x, y, 0.0], (num, 1)),
        "size": np.ones((num, 3)),
        "yaw": np.zeros(num),
        "velocity": np.zeros((num, 2)),
        "names": np.array([name] * num, dtype=np.str_),
        "attributes": np.array([""] * num, dtype=np.str_),
        "score": np.full(num, score),
        "num_points": np.full(num, -1),
    }
    return SampleBoxes(**values | {key: np.array([value]) for key, value in changes.items()})


def together(*parts: SampleBoxes) -> SampleBoxes:
    return SampleBoxes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def test_by_hand():
    """One car found at 0.7 m and half a turn off: nothing at 0.5 m, all at 1, 2 and 4 m."""
    truth = one(attributes="vehicle.moving")
    found = one(x=0.7, yaw=np.pi, size=[1.0, 1.0, 2.0], velocity=[3.0, 4.0], attributes="vehicle.parked")
    car = nuscenes_score(truth, found).classes[0]
    assert car.ap == pytest.approx({0.5: 0, 1.0: 1, 2.0: 1, 4.0: 1})
    assert list(car.errors.values()) == pytest.approx([0.7, 0.5, np.pi, 5.0, 1.0])
    barriers = nuscenes_score(one("barrier"), one("barrier", yaw=np.pi)).classes[9]
    assert barriers.errors["orientation"] == pytest.approx(0)
    assert np.isnan(barriers.errors["velocity"])
    # A surer false detection: precision 0 at recall 0 and 1/2 at recall 1, and the line between them.
    car = nuscenes_score(truth, together(one(x=9.0, score=0.9), one())).classes[0]
    assert car.ap[2.0] == pytest.approx(np.mean([max(0, r / 200 - 0.1) / 0.9 for r in range(11, 101)]))
    # Of two equal scores the later row is tried first; at recall 1 the precision is that of the last row.
    later = nuscenes_score(one(), together(one(x=1.5), one(x=0.3))).classes[0]
    assert later.ap[2.0] == pytest.approx((89 + 0.4 / 0.9) / 90)
    assert later.errors["translation"] == pytest.approx(0.3)


def test_what_is_not_scored():
    ego = np.zeros((1, 2))
    far = together(one(), one(x=50.0), one("barrier", x=29.9), one("barrier", x=30.0), one(num_points=0))
    counts = {each.name: each.num_objects for each in nuscenes_score(far, one(), ego).classes}
    assert (counts["car"], counts["barrier"]) == (1, 1)
    assert nuscenes_score(far, one()).classes[0].num_objects == 2
    rack = one("static_object.bicycle_rack", x=5.0, y=5.0, size=[2.0, 6.0, 2.0], yaw=np.pi / 2)
    bikes = together(one("bicycle", x=5.5, y=7.5), one("bicycle", x=9.5, y=5.5), one("car", x=5.0, y=5.0))
    counts = {each.name: each.num_objects for each in nuscenes_score(bikes, one(), ego, rack).classes}
    assert (counts["bicycle"], counts["car"]) == (1, 1)


def test_perfect_empty_and_wrong_input():
    truth, _, ego_xy = random_sets(5)
    seen = truth.take((truth.num_points > 0) & ~np.isnan(truth.velocity[:, 0]))
    result = nuscenes_score(seen, perfect(seen), ego_xy)
    for each in result.classes[:9]:
        assert list(each.ap.values()) == pytest.approx([1] * 4)
        assert np.nansum(list(each.errors.values())) == pytest.approx(0, abs=1e-12)
    nothing = truth.take([])
    result = nuscenes_score(nothing, nothing, ego_xy)
    assert (result.mean_ap, result.nds) == (0, 0)
    assert nuscenes_score(truth, nothing).nds == 0
    for changes in ({"center": [np.nan, 0, 0]}, {"size": [0.0, 1, 1]}, {"score": np.inf}, {"names": "tram"}):
        with pytest.raises(ValueError, match=f"predictions: .*{next(iter(changes))}|unknown class"):
            nuscenes_score(one(), replace(one(), **{key: np.array([value]) for key, value in changes.items()}))
    with pytest.raises(ValueError, match="501 boxes"):
        nuscenes_score(one(), one(num=501))


def test_a_submission_survives_the_file(tmp_path):
    truth, found, ego_xy = random_sets(3)
    tokens = [f"sample-{number}" for number in range(len(ego_xy))]
    write_submission(tmp_path / "truth.json", tokens, truth, ego_xy=ego_xy)
    write_submission(tmp_path / "found.json", tokens, found, ["use_lidar"])
    back = read_submission(tmp_path / "found.json", tokens)
    assert back.names.tolist() == found.names.tolist()
    assert np.allclose(np.cos(back.yaw - found.yaw), 1)
    values = score(tmp_path / "truth.json", tmp_path / "found.json").values
    expected = nuscenes_score(truth, found, ego_xy)
    assert (values["nds"], values["mean_ap"]) == pytest.approx((expected.nds, expected.mean_ap))
    assert json.loads((tmp_path / "found.json").read_text())["meta"]["use_lidar"] is True


def test_real_truth_as_prediction(samples, tmp_path):
    """One keyframe has no neighbours, so no velocities: their error is 1 by definition, the other four are 0. Labels that
    hold no point are no truth, so they would be wrong predictions."""
    truth = read_tables(samples / "nuscenes" / "v1.0-mini", None)
    write_submission(tmp_path / "found.json", truth.tokens, perfect(truth.boxes.take(truth.boxes.num_points > 0)))
    values = score(samples / "nuscenes" / "v1.0-mini", tmp_path / "found.json", "mini_train").values
    present = [each for each in values["classes"] if each["num_objects"]]
    assert len(present) >= 3
    for each in present:
        assert list(each["ap"].values()) == pytest.approx([1] * 4)
        errors = [each["errors"][name] for name in ("translation", "scale", "orientation")]
        assert [value for value in errors if value is not None] == pytest.approx(
            [0] * (3 - (errors[2] is None)), abs=1e-9
        )


@pytest.fixture
def devkit_python() -> str:
    python = os.environ.get("SIMIPU3D_DEVKIT_PYTHON")
    if not python:
        pytest.skip("set SIMIPU3D_DEVKIT_PYTHON to a Python that has nuscenes-devkit; test_nuscenes_devkit.py says how")
    return python


def compare(values, expected) -> float:
    """Largest difference between our values and the devkit's."""
    pairs = [(values["nds"], expected["nd_score"]), (values["mean_ap"], expected["mean_ap"])]
    pairs += [(values["errors"][error], expected["tp_errors"][theirs]) for error, theirs in DEVKIT_ERRORS.items()]
    for each in values["classes"]:
        pairs += [(each["ap"][str(at)], expected["label_aps"][each["name"]][str(at)]) for at in DISTANCES]
        for error, theirs in DEVKIT_ERRORS.items():
            value = expected["label_tp_errors"][each["name"]][theirs]
            assert (each["errors"][error] is None) == np.isnan(value)
            if each["errors"][error] is not None:
                pairs.append((each["errors"][error], value))
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.slow  # needs an environment of its own
def test_numbers_are_the_devkits(devkit_python, samples, tmp_path):
    script, largest = Path(__file__).with_name("nuscenes_devkit_scores.py"), 0.0
    for seed in range(4):
        truth, found, ego_xy = random_sets(seed, num_samples=12, per_sample=60)
        tokens = [f"sample-{number}" for number in range(len(ego_xy))]
        paths = [tmp_path / name for name in ("truth.json", "found.json", "out.json")]
        write_submission(paths[0], tokens, truth, ego_xy=ego_xy)
        write_submission(paths[1], tokens, found)
        subprocess.run([devkit_python, str(script), *map(str, paths)], check=True)
        values = score(*paths[:2]).values
        assert 0.05 < values["mean_ap"] < 0.9
        largest = max(largest, compare(values, json.loads(paths[2].read_text())))
    root = samples / "nuscenes"
    truth = read_tables(root / "v1.0-mini", None)
    rng = np.random.default_rng(0)
    found = perfect(truth.boxes)
    moved = replace(found, center=found.center + rng.normal(0, 0.5, found.center.shape), yaw=found.yaw + 0.1)
    write_submission(paths[1], truth.tokens, moved)
    release = [str(root), "v1.0-mini", "mini_train", str(paths[1]), str(paths[2])]
    subprocess.run([devkit_python, str(script), *release], check=True)
    values = score(root / "v1.0-mini", paths[1], "mini_train").values
    largest = max(largest, compare(values, json.loads(paths[2].read_text())))
    print(f"at most {largest:.1e} off the devkit")
    assert largest < 1e-9
