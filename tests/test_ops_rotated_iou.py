"""Overlaps of turned boxes against shapely and Monte Carlo, suppression against a slow loop, points against corners."""

import math

import numpy as np
import pytest
import torch

from simipu3d.ops.rotated_iou import bev_iou, iou_3d, points_in_boxes, rotated_nms

BACKENDS = ("torch", "numba")


def random_boxes(seed: int, num: int, spread: float = 4.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    place = rng.uniform(-spread, spread, (num, 3)) * (1, 1, 0.3)
    return torch.from_numpy(
        np.column_stack([place, rng.uniform(0.2, 5, (num, 3)), rng.uniform(-3 * np.pi, 3 * np.pi, num)])
    )


def polygon(box):
    """The rectangle from above, by shapely's own rotation and translation."""
    from shapely import affinity
    from shapely.geometry import box as rectangle

    x, y, _, length, width, _, yaw = (float(value) for value in box)
    flat = rectangle(-length / 2, -width / 2, length / 2, width / 2)
    return affinity.translate(affinity.rotate(flat, yaw, origin=(0, 0), use_radians=True), x, y)


def box(x=0.0, y=0.0, z=0.0, length=4.0, width=2.0, height=1.5, yaw=0.0):
    return torch.tensor([[x, y, z, length, width, height, yaw]], dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_overlap_is_shapelys(seed, backend):
    pytest.importorskip("shapely")
    a, b = random_boxes(seed, 25), random_boxes(seed + 100, 30)
    flat, solid = bev_iou(a, b, backend=backend), iou_3d(a, b, backend=backend)
    for i, j in np.ndindex(len(a), len(b)):
        one, other = polygon(a[i]), polygon(b[j])
        common = one.intersection(other).area
        assert flat[i, j] == pytest.approx(common / (one.area + other.area - common), abs=1e-9)
        assert flat[i, j] == 0 or not one.disjoint(other)
        low, high = float(a[i, 2] - a[i, 5] / 2), float(a[i, 2] + a[i, 5] / 2)
        rise = max(0.0, min(high, float(b[j, 2] + b[j, 5] / 2)) - max(low, float(b[j, 2] - b[j, 5] / 2)))
        volumes = one.area * float(a[i, 5]) + other.area * float(b[j, 5])
        assert solid[i, j] == pytest.approx(common * rise / (volumes - common * rise), abs=1e-9)
    assert (flat > 0.05).sum() > 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlap_is_the_share_of_random_points(backend):
    a, b = random_boxes(7, 6, spread=1.0), random_boxes(8, 6, spread=1.0)
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-6, 6, (200_000, 3)) * (1, 1, 0.6)
    inside_a, inside_b = (points_in_boxes(xyz, *np.split(each.numpy(), [3, 6], axis=1)) for each in (a, b))
    flat = xyz * (1, 1, 0)
    above_a, above_b = (
        points_in_boxes(flat, each.numpy()[:, :3] * (1, 1, 0), each.numpy()[:, 3:6], each.numpy()[:, 6])
        for each in (a, b)
    )
    solid = (inside_a & inside_b).sum(axis=1) / np.maximum(1, (inside_a | inside_b).sum(axis=1))
    seen = (above_a & above_b).sum(axis=1) / np.maximum(1, (above_a | above_b).sum(axis=1))
    assert np.allclose(iou_3d(a, b, aligned=True, backend=backend).numpy(), solid, atol=0.03)
    assert np.allclose(bev_iou(a, b, aligned=True, backend=backend).numpy(), seen, atol=0.02)
    assert solid.max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [bev_iou, iou_3d])
def test_aligned_is_the_diagonal_and_order_does_not_matter(function, backend):
    a, b = random_boxes(1, 40), random_boxes(2, 40)
    full = function(a, b, backend=backend)
    torch.testing.assert_close(function(a, b, aligned=True, backend=backend), full.diagonal())
    torch.testing.assert_close(function(b, a, backend=backend).T, full, atol=1e-12, rtol=0)
    shift, turn = torch.tensor([3e6, -7e6, 50, 0, 0, 0, 0], dtype=torch.float64), 2 * math.pi * 5
    torch.testing.assert_close(function(a + shift, b + shift, backend=backend), full, atol=1e-7, rtol=0)
    turned = a.clone()
    turned[:, 6] += turn
    torch.testing.assert_close(function(turned, b, backend=backend), full, atol=1e-10, rtol=0)
    assert function(a.float(), b.float(), backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand_and_at_the_limits(backend):
    def iou(a, b):
        return float(bev_iou(a, b, backend=backend)), float(iou_3d(a, b, backend=backend))

    assert iou(box(), box(x=2)) == pytest.approx((1 / 3, 1 / 3))
    assert iou(box(), box(x=2, z=0.75)) == pytest.approx((1 / 3, 3 / (24 - 3)))
    assert iou(box(length=2), box(length=2, yaw=math.pi / 4))[0] == pytest.approx(1 / math.sqrt(2))
    assert iou(box(yaw=0.3), box(yaw=0.3)) == pytest.approx((1, 1), abs=1e-12)
    assert iou(box(yaw=0.3), box(yaw=0.3 + math.pi)) == pytest.approx((1, 1), abs=1e-12)
    contained = box(x=0.1, length=1, width=0.5, height=0.5, yaw=1.0)
    assert iou(box(), contained) == pytest.approx((0.5 / 8, 0.25 / 12))
    assert iou(contained, box()) == pytest.approx((0.5 / 8, 0.25 / 12))
    for apart in (box(x=4), box(y=2), box(x=4, y=2), box(x=3, y=3, yaw=math.pi / 4, length=2, width=0.1), box(x=100)):
        assert iou(box(), apart)[0] == pytest.approx(0, abs=1e-12)
    assert iou(box(), box(z=1.5))[1] == 0
    assert iou(box(), box(length=0)) == (0, 0)
    assert iou(box(length=0, width=0), box(length=0, width=0)) == (0, 0)
    assert bev_iou(box()[:0], box(), backend=backend).shape == (0, 1)
    assert iou_3d(box(), box()[:0], backend=backend).shape == (1, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [bev_iou, iou_3d])
def test_what_is_no_box_is_refused(function, backend):
    for wrong in (box(x=math.nan), box(yaw=math.inf), box(width=-1), box()[:, :6], box()[0]):
        with pytest.raises(ValueError, match=r"boxes_b"):
            function(box(), wrong, backend=backend)
    with pytest.raises(ValueError, match="equally many"):
        function(box(), box()[:0], aligned=True, backend=backend)
    with pytest.raises(ValueError, match="row 1"):
        rotated_nms(torch.cat([box(), box(z=math.nan)]), torch.ones(2), 0.5, backend=backend)
    with pytest.raises(ValueError, match="scores"):
        rotated_nms(box(), torch.tensor([math.nan]), 0.5, backend=backend)
    with pytest.raises(ValueError, match="row 0"):
        points_in_boxes(
            np.zeros((1, 3)), *(part.numpy() for part in box(y=math.nan).split([3, 3, 1], 1)), backend=backend
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_suppression_is_the_slow_loops(seed, backend):
    boxes = random_boxes(seed, 60, spread=6)
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 12, 60) / 12)
    overlap = bev_iou(boxes, boxes)
    kept = []
    for row in sorted(range(60), key=lambda i: (-scores[i], i)):
        if all(overlap[row, other] <= 0.2 for other in kept):
            kept.append(row)
    found = rotated_nms(boxes, scores, 0.2, backend=backend)
    assert found.tolist() == kept
    assert 1 < len(kept) < 60
    assert rotated_nms(boxes[:0], scores[:0], 0.2, backend=backend).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_backends_find_the_same_points(seed):
    boxes = random_boxes(seed, 12)
    parts = boxes[:, :3], boxes[:, 3:6], boxes[:, 6]
    xyz = torch.from_numpy(np.random.default_rng(seed).uniform(-5, 5, (500, 3)))
    xyz[0] = math.nan
    found = [points_in_boxes(xyz, *parts, backend=backend) for backend in BACKENDS]
    assert isinstance(found[0], torch.Tensor)
    assert torch.equal(*found)
    assert found[0].any(dim=1).sum() > 6
    assert not found[0][:, 0].any()
    as_array = points_in_boxes(xyz.numpy(), *(part.numpy() for part in parts))
    assert isinstance(as_array, np.ndarray)
    assert np.array_equal(as_array, found[0].numpy())
    assert points_in_boxes(xyz[:0], *parts, backend="torch").shape == (12, 0)
