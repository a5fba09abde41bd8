"""Ball query against its definition, and the gathering of rows."""

import numpy as np
import pytest
import torch

from simipu3d.ops.ball_query import Shell, ball_query, group_rows, query_shells

SHELLS = [Shell(0.0, 1.0, 4), Shell(1.0, 2.5, 6), Shell(0.0, 3.0, 40), Shell(2.0, 4.0, 3)]


def scenes(seed: int, lattice: bool = False):
    """Ragged points with copies and an empty scene; centres are points, except in scene 3, which has none."""
    generator = torch.Generator().manual_seed(seed)
    sizes, num_centres = [150, 0, 9, 300], [30, 0, 9, 25]
    xyz = torch.randn(sum(sizes), 3, generator=generator) * 2
    if lattice:
        xyz = xyz.round()
    xyz[5:20] = xyz[:15].clone()
    offsets, centre_offsets = (torch.tensor([0, *np.cumsum(part)]) for part in (sizes, num_centres))
    centres = [
        xyz[start : start + size][torch.randperm(size, generator=generator)[:num]]
        for start, size, num in zip(offsets.tolist(), sizes, num_centres, strict=False)
    ]
    centres[3] = torch.randn(25, 3, generator=generator) * 4
    return xyz, offsets, torch.cat(centres), centre_offsets


def by_definition(xyz, offsets, centres, centre_offsets, shell: Shell) -> tuple[list[list[int]], list[int]]:
    points, places = xyz.numpy(), centres.numpy()
    low, high = np.float32(shell.min_radius) ** 2, np.float32(shell.radius) ** 2
    index, count = [], []
    for scene in range(len(offsets) - 1):
        for centre in places[centre_offsets[scene] : centre_offsets[scene + 1]]:
            hits = []
            for row in range(offsets[scene], offsets[scene + 1]):
                x, y, z = (centre - points[row]) ** 2
                squared = x + y + z
                if squared == 0 or low <= squared < high:
                    hits.append(int(row))
            hits = hits[: shell.num_samples]
            count.append(len(hits))
            index.append(hits + [hits[0] if hits else -1] * (shell.num_samples - len(hits)))
    return index, count


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("lattice", [False, True], ids=["anywhere", "lattice"])
@pytest.mark.parametrize("seed", range(3))
def test_shells_are_their_definition(seed, lattice, backend):
    """First hits in row order, rims, copies at distance 0, empty balls: all as the loop written from the definition."""
    ragged = scenes(seed, lattice)
    found = query_shells(*ragged, SHELLS, backend=backend)
    for shell, (index, count) in zip(SHELLS, found, strict=True):
        expected_index, expected_count = by_definition(*ragged, shell)
        assert index.tolist() == expected_index
        assert count.tolist() == expected_count
        single = ball_query(*ragged, shell.radius, shell.num_samples, min_radius=shell.min_radius, backend=backend)
        assert torch.equal(single, index)


def test_backends_agree_on_a_large_scene():
    xyz = torch.randn(5000, 3) * 5
    centres = xyz[::4]
    arguments = (xyz, torch.tensor([0, 5000]), centres, torch.tensor([0, len(centres)]), SHELLS)
    for kernel, reference in zip(
        query_shells(*arguments, backend="numba"), query_shells(*arguments, backend="torch"), strict=True
    ):
        assert torch.equal(kernel.index, reference.index)
        assert torch.equal(kernel.count, reference.count)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_rims_by_hand(backend):
    """Inner rim in, outer rim out, the centre's own copy always in."""
    xyz = torch.tensor([[2.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0.5, 0], [0, 0, 1.5]])
    arguments = (xyz, torch.tensor([0, 6]), torch.zeros(1, 3), torch.tensor([0, 1]))
    assert ball_query(*arguments, 2.0, 6, min_radius=1.0, backend=backend).tolist() == [[1, 2, 3, 5, 1, 1]]
    assert ball_query(*arguments, 1.0, 2, backend=backend).tolist() == [[2, 3]]
    assert ball_query(*arguments[:2], torch.full((1, 3), 50.0), arguments[3], 1.0, 2, backend=backend).tolist() == [
        [-1, -1]
    ]


def test_grouping_gathers_rows_and_zeros():
    values = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 0, 5], [-1, -1, -1]])
    grouped = group_rows(values, index)
    assert torch.equal(grouped[0], values[[0, 0, 5]])
    assert (grouped[1] == 0).all()
    assert torch.autograd.gradcheck(lambda v: group_rows(v, index), values)
    assert torch.equal(group_rows(values[:0], index[1:]), torch.zeros(1, 3, 4, dtype=torch.float64))


def test_wrong_input_is_refused():
    xyz, offsets, centres, centre_offsets = scenes(0)
    with pytest.raises(ValueError, match="min_radius"):
        ball_query(xyz, offsets, centres, centre_offsets, 1.0, 4, min_radius=1.0)
    with pytest.raises(ValueError, match="scenes"):
        ball_query(xyz, offsets[1:], centres, centre_offsets, 1.0, 4)
    with pytest.raises(ValueError, match="centre_offsets must rise"):
        ball_query(xyz, offsets, centres[1:], centre_offsets, 1.0, 4)
