"""Laws of the probe: closed forms, slow loops, and features whose worth is known."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from simipu3d.contracts.frame import Camera, Frame
from simipu3d.contracts.tokens import FeatureMap
from simipu3d.errors import UserError
from simipu3d.probe import (
    AFTER,
    RANDOM,
    ROW_MEAN,
    ProbeData,
    chance_top1,
    gather_data,
    probe_table,
    recompute_batchnorm,
    retrieval_top1,
)
from simipu3d.probe.cells import cell_means, cell_of_pixel, upsample
from simipu3d.probe.linear import encode_all, fit_probe, score_probe
from simipu3d.probe.ridge import fit_ridge
from simipu3d.probe.table import ProbeTable

STRIDE = 4
NAMES = ("sky", "road", "building", "vehicle")


def make_data(seed, number=12, size=(16, 32)):
    """Frames of constant depth and class in every cell (stride 4, offset 1.5); the row tells the road's depth."""
    rng = np.random.default_rng(seed)
    cells = (number, size[0] // STRIDE, size[1] // STRIDE)
    depth = rng.uniform(5, 60, cells)
    classes = rng.integers(0, 4, cells)
    depth = np.where(classes == 1, 40 / (1 + np.arange(cells[1]))[None, :, None], depth)
    depth[classes == 0] = 0
    images = torch.from_numpy(rng.integers(0, 256, (number, 3, *size), dtype=np.uint8))
    full = [
        item.repeat(STRIDE, axis=1).repeat(STRIDE, axis=2)
        for item in (depth.astype(np.float32), classes.astype(np.uint8))
    ]
    data = ProbeData(images, full[0], full[1], NAMES, (1,))
    return data, depth, classes


def as_map(cells):
    """Feature map (I, C, Hf, Wf) whose cells stand on the blocks of `make_data`."""
    return FeatureMap(torch.tensor(np.asarray(cells), dtype=torch.float32), STRIDE, (STRIDE - 1) / 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 3.0])
def test_ridge_equals_least_squares_with_a_column_for_every_row(seed, strength):
    rng = np.random.default_rng(seed)
    n, rows = 60, 4
    features, targets = rng.normal(2, 3, (n, 5)), rng.normal(1, 2, (n, 2))
    row = rng.integers(0, rows, n)
    ridge = fit_ridge(features, targets, row, rows, [1.0, strength])[1]
    one_hot = np.eye(rows)[row]
    within = features - (one_hot @ (one_hot.T @ features / one_hot.sum(axis=0)[:, None]))
    scaled = features / np.sqrt((within**2).mean(axis=0))
    penalty = np.concatenate([np.zeros((5, rows)), np.sqrt(n * strength) * np.eye(5)], axis=1)
    design = np.concatenate([np.concatenate([one_hot, scaled], axis=1), penalty])
    solution = np.linalg.lstsq(design, np.concatenate([targets, np.zeros((5, 2))]), rcond=None)[0]
    expected = np.concatenate([one_hot, scaled], axis=1) @ solution
    np.testing.assert_allclose(ridge.predict(features, row), expected, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_ridge_does_not_depend_on_units_or_dead_channels(seed):
    rng = np.random.default_rng(seed)
    features, targets, row = rng.normal(size=(50, 3)), rng.normal(size=(50, 1)), rng.integers(0, 3, 50)
    (plain,) = fit_ridge(features, targets, row, 3, [0.1])
    other = np.concatenate(
        [features * [1e3, 1e-3, -1] + [5, 0, 1e4], 1e4 + rng.normal(size=(50, 1)) * 1e-10, np.eye(3)[row] * 7], axis=1
    )
    (moved,) = fit_ridge(other, targets, row, 3, [0.1])
    np.testing.assert_allclose(moved.predict(other, row), plain.predict(features, row), atol=1e-7)


def test_ridge_without_features_is_the_mean_of_each_row_and_of_the_nearest_for_an_empty_one():
    targets, row = np.array([[1.0], [3.0], [10.0]]), np.array([1, 1, 4])
    (ridge,) = fit_ridge(np.zeros((3, 0)), targets, row, 6, [1.0])
    np.testing.assert_allclose(ridge.predict(np.zeros((6, 0)), np.arange(6))[:, 0], [2, 2, 2, 10, 10, 10])
    with pytest.raises(ValueError, match="finite"):
        fit_ridge(np.full((3, 1), np.nan), targets, row, 6, [1.0])
    with pytest.raises(ValueError, match="none"):
        fit_ridge(np.zeros((0, 1)), np.zeros((0, 1)), np.zeros(0, np.int64), 6, [1.0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("stride", "offset"), [(4, 0.0), (4, 1.5), (3, 1.0), (8, 3.5)])
def test_cells_equal_a_slow_loop(seed, stride, offset):
    rng = np.random.default_rng(seed)
    size, cells = (13, 21), (-(-13 // stride), -(-21 // stride))
    values, known = rng.normal(size=(2, *size)), rng.random((2, *size)) < 0.3
    means, any_known = cell_means(values, known, cells, stride, offset)
    for image, i, j in np.ndindex(2, *cells):
        own = [
            (v, u)
            for v, u in np.ndindex(*size)
            if -stride / 2 <= v - (offset + stride * i) < stride / 2
            and -stride / 2 <= u - (offset + stride * j) < stride / 2
        ]
        kept = [values[image, v, u] for v, u in own if known[image, v, u]]
        assert any_known[image, i, j] == bool(kept)
        np.testing.assert_allclose(means[image, i, j], np.mean(kept) if kept else 0.0, atol=1e-12)


def test_pixels_outside_every_footprint_belong_to_no_cell():
    assert cell_of_pixel(10, 2, 4, 0.0).tolist() == [0, 0, 1, 1, 1, 1, -1, -1, -1, -1]


@pytest.mark.parametrize(("stride", "offset"), [(4, 0.0), (4, 1.5), (8, 3.5)])
def test_upsampling_gives_the_cells_back_and_keeps_straight_lines(stride, offset):
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(2, 4, 6))
    full = upsample(cells, (4 * stride, 6 * stride), stride, offset)
    assert full.shape == (2, 4 * stride, 6 * stride)
    if offset == int(offset):
        at = int(offset)
        np.testing.assert_allclose(full[:, at::stride, at::stride], cells)
    slope = upsample(np.arange(6)[None] * stride + np.zeros((4, 1)) + offset, (4 * stride, 6 * stride), stride, offset)
    inside = slice(int(np.ceil(offset)), int(offset + 5 * stride))
    np.testing.assert_allclose(slope[0, inside], np.arange(6 * stride)[inside])
    np.testing.assert_allclose(upsample(np.full((4, 6), 7.0), (4 * stride, 6 * stride), stride, offset), 7.0)


def coarse(data, depth, classes):
    """The same labels with one pixel a cell: interpolation between cells has nothing left to spoil."""
    return ProbeData(
        data.images[:, :, ::STRIDE, ::STRIDE], depth.astype(np.float32), classes.astype(np.uint8), NAMES, (1,)
    )


@pytest.mark.parametrize("seed", range(3))
def test_features_that_hold_the_answer_are_read_out(seed):
    data, depth, classes = make_data(seed)
    data = coarse(data, depth, classes)
    log_depth = np.log(np.where(depth > 0, depth, 1.0))
    cells = np.concatenate([log_depth[:, None], np.moveaxis(np.eye(4)[classes], -1, 1)], axis=1)
    mixed = np.einsum("dc,ichw->idhw", np.random.default_rng(seed).normal(size=(9, 5)), cells)
    features = FeatureMap(torch.from_numpy(mixed), 1, 0.0)
    scores = score_probe(fit_probe(features, data, np.random.default_rng(0)), features, data)
    assert scores["abs_rel"] < 1e-3
    assert scores["abs_rel_off_ground"] < 1e-3
    assert scores["delta_1.25"] == 1.0
    assert scores["vehicle_iou"] == 1.0
    assert scores["mean_iou"] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_features_that_say_nothing_give_the_row_mean(seed):
    """Constant features, and features that only know the row, change nothing of the baseline."""
    data, depth, _ = make_data(seed)
    shape = depth.shape
    rows = np.broadcast_to(np.eye(shape[1])[:, None, :, None], (shape[1], 1, shape[1], shape[2])).sum(axis=1)
    variants = [
        np.zeros((shape[0], 0, *shape[1:])),
        np.full((shape[0], 3, *shape[1:]), 2.5),
        np.broadcast_to(rows[None], (shape[0], *rows.shape)),
    ]
    train, test = data.subset(np.arange(8)), data.subset(np.arange(8, 12))
    scores = []
    for cells in variants:
        probe = fit_probe(as_map(cells[:8]), train, np.random.default_rng(0))
        scores.append(score_probe(probe, as_map(cells[8:]), test))
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    expected = [np.exp(np.mean(np.log(own[own > 0]))) for own in np.moveaxis(train.depth, 1, 0)]
    seen = test.depth > 0
    relative = np.abs(np.broadcast_to(np.array(expected)[:, None], test.depth.shape)[seen] / test.depth[seen] - 1)
    assert scores[0]["abs_rel"] == pytest.approx(relative.mean(), rel=1e-5)
    assert scores[0]["delta_1.25"] < 1
    off_ground = test.pixel_class[seen] != 1
    assert scores[0]["abs_rel_off_ground"] == pytest.approx(relative[off_ground].mean(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_only_depend_on_the_pixel_row_leave_nothing_for_features(seed):
    """Also where most pixels are unknown, so that a footprint's mean depends on which of its rows are seen."""
    data, cells, _ = make_data(seed)
    rng = np.random.default_rng(seed)
    seen = rng.random(data.depth.shape) < 0.2
    seen[0, :, 0] = True
    depth = np.where(seen, np.geomspace(60, 4, data.depth.shape[1])[None, :, None], 0).astype(np.float32)
    classes = np.where(seen, (np.arange(data.depth.shape[1]) % 4)[None, :, None], 255).astype(np.uint8)
    data = ProbeData(data.images, depth, classes, NAMES, (1,))
    features = as_map(rng.normal(size=(len(data), 20, *cells.shape[1:])))
    scores = score_probe(fit_probe(features, data, rng), features, data)
    assert scores["abs_rel"] < 1e-5
    assert scores["mean_iou"] == 1.0


def test_cells_without_labels_do_not_matter():
    data, depth, classes = make_data(0)
    features = np.random.default_rng(0).normal(size=(len(data), 5, *depth.shape[1:]))
    spoilt = np.where((classes == 0)[:, None], 1e6, features)
    probes = [fit_probe(as_map(cells), data, np.random.default_rng(0)) for cells in (features, spoilt)]
    assert np.array_equal(probes[0].depth.weight, probes[1].depth.weight)
    assert (probes[0].depth.weight != 0).any()


def test_the_table_ranks_useful_features_above_useless_ones():
    """Depth written into the image's first channel: an encoder that averages it is better than one of noise."""
    data, _depth, _classes = make_data(0, number=30)
    painted = torch.from_numpy((40 * np.log(np.maximum(data.depth, 1.0))).round().astype(np.uint8))
    images = data.images.clone()
    images[:, 0] = painted
    images[:, 1] = torch.from_numpy(data.pixel_class == 3) * 200
    data = ProbeData(images, data.depth, data.pixel_class, NAMES, (1,))

    def pretrained(images):
        return FeatureMap(nn.functional.avg_pool2d(images.float(), STRIDE), STRIDE, 1.5)

    def random(seed):
        generator = torch.Generator().manual_seed(seed)

        def encode(images):
            return FeatureMap(torch.randn(len(images), 3, 4, 8, generator=generator), STRIDE, 1.5)

        return encode

    labelled, held_out = data.subset(np.arange(20)), data.subset(np.arange(20, 30))
    table = probe_table(labelled, held_out, pretrained=pretrained, random=random, num_labels=12, seeds=(0, 1, 2))
    again = probe_table(labelled, held_out, pretrained=pretrained, random=random, num_labels=12, seeds=(0, 1, 2))
    assert table == again
    assert table.measured(AFTER, "abs_rel").mean < 0.8 * table.measured(RANDOM, "abs_rel").mean
    assert table.measured(RANDOM, "abs_rel").mean > 0.95 * table.measured(ROW_MEAN, "abs_rel").mean
    assert table.verdict("abs_rel") == table.verdict("vehicle_iou") == "better"
    assert len({len(row) for row in table.text_rows()}) == 1
    assert json.loads(json.dumps(table.as_dict()))["num_labels"] == 12
    same = probe_table(
        labelled, held_out, pretrained=pretrained, random=lambda _: pretrained, num_labels=12, seeds=(0, 1)
    )
    assert same.verdict("abs_rel") == "no difference measured"
    with pytest.raises(UserError, match="2 to 20"):
        probe_table(labelled, held_out, pretrained=pretrained, random=random, num_labels=21)


def test_verdicts_follow_the_direction_of_the_metric_and_the_spread():
    def table(before, after):
        values = {
            row: {"abs_rel": v, "mean_iou": v} for row, v in ((ROW_MEAN, before), (RANDOM, before), (AFTER, after))
        }
        return ProbeTable(tuple(range(len(before))), 4, 5, values)

    lower = table((0.35, 0.34, 0.36), (0.27, 0.27, 0.27))
    assert (lower.verdict("abs_rel"), lower.verdict("mean_iou")) == ("better", "worse")
    assert lower.difference("abs_rel").mean == pytest.approx(-0.08)
    assert lower.difference("abs_rel").std == pytest.approx(0.01)
    assert lower.threshold("abs_rel") == pytest.approx(0.01 * 4.303 * (4 / 3) ** 0.5, rel=1e-3)
    assert table((0.35, 0.34, 0.36), (0.31, 0.31, 0.31)).verdict("abs_rel") == "no difference measured"
    assert table((0.3,), (0.2,)).verdict("abs_rel") == "one seed: no spread known"
    assert table((float("nan"),) * 2, (0.2, 0.2)).verdict("abs_rel") == "not measured"


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_an_untrained_backbone_seldom_gets_a_verdict(num_seeds):
    """One more random backbone in place of the pre-trained one, under label noise that both share: 1 time in 20."""
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(1000):
        labels, own = rng.normal(0, 0.02, num_seeds), rng.normal(0, 0.01, num_seeds + 1)
        values = {RANDOM: 0.4 + labels + own[1:], AFTER: 0.4 + labels + own[0]}
        rows = {row: {"abs_rel": tuple(v)} for row, v in values.items()}
        verdicts.append(ProbeTable(tuple(range(num_seeds)), 4, 5, rows).verdict("abs_rel"))
    assert 0.03 < np.mean([verdict != "no difference measured" for verdict in verdicts]) < 0.07


def test_gathered_data_merges_vehicles_and_forgets_far_depth():
    rng = np.random.default_rng(0)
    names = ("sky", "road", "car", "van", "pole")
    depth = rng.uniform(1, 120, (6, 8)).astype(np.float32)
    classes = rng.integers(0, 5, (6, 8)).astype(np.uint8)
    image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    camera = Camera("front", image, np.eye(4)[:3], np.eye(4), depth=depth, pixel_class=classes)
    points = np.zeros((1, 4), np.float32)
    frame = Frame(points, ("x", "y", "z", "intensity"), (camera,), "a")
    data = gather_data([frame, frame], names, max_depth=80.0)
    assert data.class_names == ("sky", "road", "vehicle", "pole")
    assert data.ground == (1,)
    expected = np.array([0, 1, 2, 2, 3])[classes]
    assert np.array_equal(data.pixel_class[1], expected)
    assert np.array_equal(data.depth[0], np.where(depth <= 80, depth, 0))
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), image)
    bare = Frame(points, frame.point_columns, (Camera("front", image, np.eye(4)[:3], np.eye(4)),), "bare")
    small = Camera("front", image[:3], np.eye(4)[:3], np.eye(4), depth=depth[:3], pixel_class=classes[:3])
    for frames, words in (
        ([bare], "bare"),
        ([], "empty"),
        ([frame, Frame(points, frame.point_columns, (small,), "small")], "one size"),
    ):
        with pytest.raises(UserError, match=words):
            gather_data(frames, names)


def test_batchnorm_statistics_are_those_of_the_images():
    """Whatever they were before, they become the mean over chunks; modes, momenta and frozen layers stay."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.frozen = nn.BatchNorm2d(3, momentum=0.01), nn.Dropout(0.5), nn.BatchNorm2d(3)

        def train(self, mode=True):
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, images):
            return self.frozen(self.drop(self.first(images.float())))

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 3, 6, 6), dtype=np.uint8))
    results = []
    for start in (0.0, 50.0):
        model = Model().eval()
        model.first.running_mean.fill_(start)
        model.first.num_batches_tracked.fill_(10)
        model.frozen.running_mean.fill_(3.0)
        recompute_batchnorm(model, images, model, chunk=8)
        torch.testing.assert_close(model.first.running_mean, images.float().mean(dim=(0, 2, 3)))
        parts = torch.stack([part.float().var(dim=(0, 2, 3)) for part in images.split(8)]).mean(dim=0)
        torch.testing.assert_close(model.first.running_var, parts)
        assert (model.frozen.running_mean == 3.0).all()
        assert not any(module.training for module in model.modules())
        assert model.first.momentum == 0.01
        results.append(encode_all(lambda part, m=model: FeatureMap(m(part), 1, 0.0), images, chunk=5).features)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("seed", range(10))
def test_retrieval_equals_a_slow_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    number = 40
    keys = torch.randn(number, 6, generator=generator)
    queries = keys + 0.8 * torch.randn(number, 6, generator=generator)
    ids = torch.randint(0, 15, (number,), generator=generator)
    hits = 0
    for query, own in zip(queries, ids, strict=True):
        similarity = [float(query @ key / query.norm() / key.norm()) for key in keys]
        hits += int(ids[int(np.argmax(similarity))] == own)
    assert retrieval_top1(queries, keys, ids, chunk=7) == pytest.approx(hits / number)


def test_finding_a_copy_is_no_miss():
    keys = torch.eye(4)[[0, 0, 1, 2]]
    assert retrieval_top1(keys, keys, torch.tensor([5, 5, 6, 7])) == 1.0
    assert retrieval_top1(keys, keys, torch.tensor([5, 8, 6, 7])) == 0.75
    assert retrieval_top1(10 * keys, 0.1 * keys, torch.tensor([5, 5, 6, 7])) == 1.0


def test_chance_is_what_meaningless_features_give():
    assert chance_top1(torch.arange(50)) == pytest.approx(1 / 50)
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    generator = torch.Generator().manual_seed(0)
    tries = [
        retrieval_top1(torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator), ids)
        for _ in range(1500)
    ]
    assert np.mean(tries) == pytest.approx(chance_top1(ids), abs=0.02)


def test_retrieval_refuses_nothing_and_shapes_that_do_not_match():
    for call in (
        lambda: retrieval_top1(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0)),
        lambda: chance_top1(torch.zeros(0)),
    ):
        with pytest.raises(ValueError, match="at least one pair"):
            call()
    with pytest.raises(ValueError, match="alike"):
        retrieval_top1(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4))
