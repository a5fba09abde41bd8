"""Farthest point sampling, and the thinning of rows into voxels and groups."""

import numpy as np
import pytest
import torch

from simipu3d.ops.farthest_point import farthest_point_sample, fused_sample, sampled_offsets, split_sample
from simipu3d.ops.scatter import scatter_reduce
from simipu3d.ops.voxelize import grid_size, voxelize

BOTH = pytest.mark.parametrize("backend", ["torch", "numba"])


def ragged(
    seed: int, num_columns: int = 3, sizes: tuple[int, ...] = (40, 0, 7, 1, 700)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes of different sizes; a quarter of the rows are copies of others and every tenth stands on a coarse grid."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(sizes), num_columns, generator=generator) * 10
    rows[::10] = rows[::10].round()
    copies = torch.rand(len(rows), generator=generator) < 0.25
    rows[copies] = rows[torch.randint(len(rows), (int(copies.sum()),), generator=generator)]
    return rows, torch.tensor([0, *np.cumsum(sizes)])


def greedy_farthest(rows: np.ndarray, num: int) -> list[int]:
    """The rule of the paper, literally."""
    taken = [0] if num and len(rows) else []
    while len(taken) < min(num, len(rows)):
        to_taken = [min(float(((row - rows[t]) ** 2).sum()) for t in taken) for row in rows]
        taken.append(int(np.argmax(to_taken)))
    return taken


@pytest.mark.parametrize("num_columns", [1, 3, 4, 16, 17, 35])
@pytest.mark.parametrize("num", [0, 1, 5, 50])
def test_fps_backends_agree(num_columns, num):
    """Bit for bit the same rows, with copies, ties and empty scenes, below and above the lanes' width."""
    rows, offsets = ragged(num_columns + num, num_columns)
    numba = farthest_point_sample(rows, offsets, num, backend="numba")
    assert torch.equal(numba, farthest_point_sample(rows, offsets, num, backend="torch"))
    ends = sampled_offsets(offsets, num)
    assert len(numba) == ends[-1]
    for scene in range(len(offsets) - 1):
        own = numba[ends[scene] : ends[scene + 1]]
        assert ((own >= offsets[scene]) & (own < offsets[scene + 1])).all()


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_fps_is_the_greedy_rule(seed, backend):
    """On a lattice, where float32 is exact and ties are many, equal to the literal loop, lowest row first."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-4, 5, (60, 3), generator=generator).float()
    taken = farthest_point_sample(rows, torch.tensor([0, 25, 60]), 20, backend=backend)
    expected = greedy_farthest(rows[:25].numpy(), 20) + [25 + row for row in greedy_farthest(rows[25:].numpy(), 20)]
    assert taken.tolist() == expected


@BOTH
def test_fps_by_hand(backend):
    """On a line 0, 1, 2, 10: from 0 the farthest is 10, then 2 is 2 from 0, then 1."""
    rows = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    assert farthest_point_sample(rows, torch.tensor([0, 4]), 9, backend=backend).tolist() == [0, 3, 2, 1]


def test_fps_of_a_moved_cloud_is_the_same():
    """Exact motions (lattice, quarter turn, mirror, shift, doubling) change no choice."""
    rows = torch.randint(-50, 50, (300, 3), generator=torch.Generator().manual_seed(0)).float()
    offsets = torch.tensor([0, 300])
    moved = 2 * torch.stack([-rows[:, 1], rows[:, 0], -rows[:, 2]], dim=1) + torch.tensor([100.0, -7.0, 3.0])
    assert torch.equal(farthest_point_sample(rows, offsets, 64), farthest_point_sample(moved, offsets, 64))


def test_fps_batch_equals_singles_and_takes_each_distinct_row_once():
    rows, offsets = ragged(3)
    together = farthest_point_sample(rows, offsets, 20, backend="torch")
    alone = [
        start + farthest_point_sample(rows[start:stop], torch.tensor([0, stop - start]), 20, backend="torch")
        for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    ]
    assert torch.equal(together, torch.cat(alone))
    distinct = torch.randn(100, 3)
    assert sorted(farthest_point_sample(distinct, torch.tensor([0, 100]), 100).tolist()) == list(range(100))


def test_fps_survives_diverged_features():
    """NaN and infinity give some rows of the scene, not a crash."""
    rows = torch.randn(100, 20)
    rows[0] = torch.nan
    rows[3, 4] = torch.inf
    taken = farthest_point_sample(rows, torch.tensor([0, 100]), 30, backend="numba")
    assert len(taken) == 30
    assert ((taken >= 0) & (taken < 100)).all()


def test_fps_refuses_wrong_input():
    rows = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="offsets"):
        farthest_point_sample(rows, torch.tensor([0, 3]), 2)
    with pytest.raises(ValueError, match="no backend"):
        farthest_point_sample(rows, torch.tensor([0, 4]), 2, backend="cuda")
    with pytest.raises(ValueError, match="must be"):
        farthest_point_sample(rows[0], torch.tensor([0, 3]), 2)


@BOTH
def test_fused_sample_joins_both_samplers_scene_by_scene(backend):
    xyz, offsets = ragged(0)
    features = torch.randn(len(xyz), 9)
    rows, ends = fused_sample(xyz, features, offsets, 12, backend=backend)
    both = torch.cat([xyz, features], dim=1)
    for scene, (start, stop) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        own = torch.tensor([0, stop - start])
        expected = [start + farthest_point_sample(part[start:stop], own, 12) for part in (both, xyz)]
        assert torch.equal(rows[ends[scene] : ends[scene + 1]], torch.cat(expected))


@pytest.mark.parametrize("split", [3, 20, 1000])
def test_split_sample_keeps_each_sampler_to_its_rows(split):
    xyz, offsets = ragged(1)
    features = torch.randn(len(xyz), 9)
    rows, ends = split_sample(xyz, features, offsets, 12, split)
    assert torch.equal(rows, split_sample(xyz, features, offsets, 12, split, backend="torch")[0])
    both = torch.cat([xyz, features], dim=1)
    for scene, (start, stop) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        middle = min(start + split, stop)
        head = start + farthest_point_sample(both[start:middle], torch.tensor([0, middle - start]), 12)
        tail = middle + farthest_point_sample(xyz[middle:stop], torch.tensor([0, stop - middle]), 12)
        assert torch.equal(rows[ends[scene] : ends[scene + 1]], torch.cat([head, tail]))


VOXEL, RANGE = (0.5, 0.25, 1.0), (-2.0, -1.0, -3.0, 2.0, 1.5, 1.0)


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_voxelize_is_the_mean_of_the_points_of_each_cell(seed, backend):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(500, 5, generator=generator) * 1.5
    points[:100, :3] = (points[:100, :3] * 4).round() / 4  # on the borders of cells
    scene = torch.randint(0, 3, (500,), generator=generator) * 2
    voxels, features, voxel_of_point = voxelize(points, scene, VOXEL, RANGE, backend=backend)
    cells: dict[tuple, list[int]] = {}
    for row, point in enumerate(points.numpy()):
        cell = np.floor((point[:3] - np.float32(RANGE[:3])) / np.float32(VOXEL)).astype(int)
        if (cell >= 0).all() and (cell < (8, 10, 4)).all():
            cells.setdefault((int(scene[row]), *cell[::-1].tolist()), []).append(row)
    assert [tuple(row) for row in voxels.tolist()] == sorted(cells)
    expected = torch.full((500,), -1)
    for number, cell in enumerate(sorted(cells)):
        expected[cells[cell]] = number
        torch.testing.assert_close(features[number], points[cells[cell]].double().mean(0).float())
    assert torch.equal(voxel_of_point, expected)


def test_voxelize_backends_agree_bit_for_bit():
    points, scene = torch.randn(3000, 4), torch.randint(0, 4, (3000,))
    results = [voxelize(points, scene, VOXEL, RANGE, backend=backend) for backend in ("torch", "numba")]
    for reference, kernel in zip(*results, strict=True):
        assert torch.equal(reference, kernel)


@BOTH
def test_voxelize_without_points_in_range(backend):
    for points in (torch.zeros(0, 4), torch.full((3, 4), 99.0)):
        voxels, features, index = voxelize(
            points, torch.zeros(len(points), dtype=torch.int64), VOXEL, RANGE, backend=backend
        )
        assert voxels.shape == (0, 4)
        assert features.shape == (0, 4)
        assert index.tolist() == [-1] * len(points)


def test_grid_size_of_kitti():
    assert grid_size((0.05, 0.05, 0.1), (0, -40, -3, 70.4, 40, 1)) == (1408, 1600, 40)
    with pytest.raises(ValueError, match="without a cell"):
        grid_size((1.0, 1.0, 9.0), (0, 0, 0, 4, 4, 4))


@BOTH
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("seed", range(3))
def test_scatter_reduce_and_its_gradient(seed, reduce, backend):
    """Against a loop over the groups and autograd through it; group 4 has no row, values have ties."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (50, 6), generator=generator).double().requires_grad_()
    index = torch.randint(0, 9, (50,), generator=generator)
    index[index == 4] = 5
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    loop = []
    for group in range(9):
        rows = values[index == group]
        zero = values.new_zeros(6)
        loop.append(
            {"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.max(0).values if len(rows) else zero}[reduce]
        )
    expected = torch.stack([row if (index == group).any() else torch.zeros(6) for group, row in enumerate(loop)])
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), values)
    result = scatter_reduce(values, index, 9, reduce, backend=backend)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad((result * weight).sum(), values)[0], expected_grad)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_scatter_backends_agree(reduce):
    values, index = torch.randn(2000, 33), torch.randint(0, 70, (2000,))
    values[::50] = -torch.inf if reduce == "max" else 0
    values[5] = torch.nan
    results = [scatter_reduce(values, index, 80, reduce, backend=backend) for backend in ("auto", "torch", "numba")]
    torch.testing.assert_close(results[2], results[1], equal_nan=True)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    assert (results[1][70:] == 0).all()
    assert results[1][index[5]].isnan().all()


def test_torch_scatter_is_an_option():
    values, index = torch.randn(100, 4), torch.randint(0, 9, (100,))
    try:
        import torch_scatter  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"simipu3d\[scatter\]"):
            scatter_reduce(values, index, 10, "sum", backend="torch_scatter")
        return
    for reduce in ("sum", "mean", "max"):
        result = scatter_reduce(values, index, 10, reduce, backend="torch_scatter")
        torch.testing.assert_close(result, scatter_reduce(values, index, 10, reduce, backend="torch"))


def test_scatter_refuses_an_index_out_of_range():
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="index must lie"):
            scatter_reduce(torch.zeros(2, 2), torch.tensor([0, bad]), 3, "sum")


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@BOTH
def test_scatter_of_no_rows(reduce, backend):
    values = torch.zeros(0, 3, requires_grad=True)
    result = scatter_reduce(values, torch.zeros(0, dtype=torch.int64), 2, reduce, backend=backend)
    assert torch.equal(result, torch.zeros(2, 3))
    result.sum().backward()
