"""Depth errors: by hand, against a slow loop, crops, and real maps."""

import numpy as np
import pytest

from simipu3d.metrics.depth import CROPS, ERRORS, depth_errors, kb_crop, mean_errors, valid_pixels
from simipu3d.metrics.files.depth import read_depth, score, write_depth


def random_maps(seed: int, shape=(37, 124)):
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(shape) < 0.3, rng.uniform(0, 100, shape), 0.0)
    return truth * rng.lognormal(0, 0.3, shape), truth


def test_by_hand():
    truth = np.array([[2.0, 4.0, 0.0, 90.0]])
    prediction = np.array([[1.0, 4.0, 7.0, 5.0]])
    errors = depth_errors(prediction, truth, valid_pixels(truth))
    log = np.log(2)
    expected = [0.25, 0.25, np.sqrt(0.5), log / np.sqrt(2), np.log10(2) / 2, 50 * log, 0.5, 0.5, 0.5]
    assert list(errors) == list(ERRORS)
    assert list(errors.values()) == pytest.approx(expected)


@pytest.mark.parametrize("crop", ["none", *CROPS])
def test_agrees_with_the_slow_loop(crop):
    prediction, truth = random_maps(1)
    rows = []
    for v in range(37):
        for u in range(124):
            top, bottom, left, right = CROPS.get(crop, (0, 1, 0, 1))
            inside = int(top * 37) <= v < int(bottom * 37) and int(left * 124) <= u < int(right * 124)
            if inside and 1e-3 < truth[v, u] < 80:
                rows.append((min(max(prediction[v, u], 1e-3), 80), truth[v, u]))
    e = [np.log(p / d) for p, d in rows]
    mean = lambda values: sum(values) / len(rows)  # noqa: E731
    expected = {
        "abs_rel": mean([abs(p - d) / d for p, d in rows]),
        "sq_rel": mean([(p - d) ** 2 / d for p, d in rows]),
        "rmse": mean([(p - d) ** 2 for p, d in rows]) ** 0.5,
        "rmse_log": mean([x * x for x in e]) ** 0.5,
        "log10": mean([abs(np.log10(p / d)) for p, d in rows]),
        "silog": 100 * (mean([x * x for x in e]) - mean(e) ** 2) ** 0.5,
        **{f"delta{k}": mean([max(p / d, d / p) < 1.25**k for p, d in rows]) for k in (1, 2, 3)},
    }
    valid = valid_pixels(truth, crop=crop)
    assert valid.sum() == len(rows)
    assert depth_errors(prediction, truth, valid) == pytest.approx(expected, abs=1e-9)


def test_crops():
    """Rows 143 to 349 and columns 43 to 1172 of 352 x 1216 after the KB crop; NYU's of 480 x 640."""
    kept = kb_crop(np.arange(375 * 1242).reshape(375, 1242))
    assert kept.shape == (352, 1216)
    assert kept[-1, 0] == 374 * 1242 + 13
    rows, columns = np.nonzero(valid_pixels(np.ones((352, 1216)), crop="garg"))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (143, 349, 43, 1172)
    assert valid_pixels(np.ones((480, 640)), crop="nyu").sum() == (471 - 45) * (601 - 41)
    with pytest.raises(ValueError, match="480 x 640"):
        valid_pixels(np.ones((352, 1216)), crop="nyu")
    with pytest.raises(ValueError, match="no crop is called 'Garg'"):
        valid_pixels(np.ones((2, 2)), crop="Garg")
    with pytest.raises(ValueError, match="holds no 352"):
        kb_crop(np.ones((351, 1216)))


def test_empty_and_wrong_input():
    truth = np.zeros((4, 5))
    nothing = depth_errors(truth, truth, valid_pixels(truth))
    assert np.isnan(list(nothing.values())).all()
    one = depth_errors(truth + 2, truth + 2, valid_pixels(truth + 2))
    assert mean_errors([nothing, one]) == one
    assert np.isnan(mean_errors([])["rmse"])
    with pytest.raises(ValueError, match="NaN at 20"):
        depth_errors(truth * np.nan, truth + 1, valid_pixels(truth + 1))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        depth_errors(truth[:, :4], truth, valid_pixels(truth))
    far = depth_errors(truth + np.inf, truth + 40, valid_pixels(truth + 40))
    assert far["abs_rel"] == pytest.approx(1), "a prediction without limit is at max_depth"


def test_real_maps(samples, tmp_path):
    """Truth as prediction has no error; a tenth too far is a tenth too far, whole or cut."""
    folder = samples / "kitti_depth" / "groundtruth_depth"
    for path in folder.glob("*.png"):
        depth = read_depth(path, 256.0)
        assert 0.1 < (depth > 0).mean() < 0.3
        write_depth(tmp_path / path.name, 1.1 * depth)
    perfect = score(folder, folder, crop="garg").values["mean"]
    assert [perfect[name] for name in ERRORS] == pytest.approx([0] * 6 + [1] * 3)
    whole = score(folder, tmp_path, crop="garg", kb=True, max_depth=60.0).values
    assert whole["mean"]["abs_rel"] == pytest.approx(0.1, abs=1e-3)
    assert whole["mean"]["silog"] < 0.5, "only the clip at 60 m varies"
    for path in folder.glob("*.png"):
        write_depth(tmp_path / path.name, kb_crop(1.1 * read_depth(path, 256.0)))
    assert score(folder, tmp_path, crop="garg", kb=True, max_depth=60.0).values == whole
