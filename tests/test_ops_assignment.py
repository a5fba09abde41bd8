"""Assignment rules against exhaustive search, scipy and literal loops."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from simipu3d.ops.assignment import greedy, hungarian, mutual_nearest, nearest


def distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return np.linalg.norm(a.double().numpy()[:, None] - b.double().numpy()[None], axis=-1)


def cost(pairs: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    return float(distances(a, b)[pairs[:, 0], pairs[:, 1]].sum())


def check_one_to_one(pairs: torch.Tensor, n: int, m: int) -> None:
    assert pairs.dtype == torch.int64
    assert pairs.shape == (min(n, m), 2)
    assert len(set(pairs[:, 0].tolist())) == len(set(pairs[:, 1].tolist())) == min(n, m)
    assert pairs[:, 0].tolist() == sorted(pairs[:, 0].tolist())


def shared_scan(seed: int, n: int, m: int, size: int = 30):
    """Two draws, with repetition, from one scan; the second's coordinates differ in the last bits. Some have no
    source."""
    generator = torch.Generator().manual_seed(seed)
    scan = torch.randn(size, 3, generator=generator) * 5
    source_a, source_b = (torch.randint(0, size, (num,), generator=generator) for num in (n, m))
    a, b = scan[source_a], scan[source_b] * (1 + 1e-7)
    source_a[::7] = -1
    source_b[::5] = -1
    return a, b, source_a, source_b


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 6), (6, 3), (1, 1), (5, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_hungarian_is_the_best_of_all_permutations(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, 3, generator=generator), torch.randn(m, 3, generator=generator)
    pairs = hungarian(a, b)
    check_one_to_one(pairs, n, m)
    table = distances(a, b) if n <= m else distances(b, a)
    best = min(table[np.arange(len(table)), list(order)].sum() for order in permutations(range(max(n, m)), min(n, m)))
    assert cost(pairs, a, b) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (150, 200), (200, 90)])
@pytest.mark.parametrize("seed", range(5))
def test_taking_coincident_points_out_keeps_the_optimum(seed, n, m):
    """Sources, copies and points without a source: the cost is scipy's on the whole, and sources are really used."""
    a, b, source_a, source_b = shared_scan(seed, n, m)
    rows, columns = linear_sum_assignment(distances(a, b))
    best = distances(a, b)[rows, columns].sum()
    for pairs in (hungarian(a, b), hungarian(a, b, source_a, source_b)):
        check_one_to_one(pairs, n, m)
        assert cost(pairs, a, b) == pytest.approx(
            best, abs=1e-3
        )  # metres; coordinates differ by 1e-7 of 20 m in 200 pairs
    both = set(source_a[source_a >= 0].tolist()) & set(source_b[source_b >= 0].tolist())
    same = (source_a[pairs[:, 0]] == source_b[pairs[:, 1]]) & (source_a[pairs[:, 0]] >= 0)
    for source in both:
        expected = min(int((source_a == source).sum()), int((source_b == source).sum()))
        assert int((source_a[pairs[:, 0]][same] == source).sum()) == expected


def test_the_same_point_is_paired_though_another_way_costs_no_more():
    """On a line, 0-1 and 1-0 crossed or straight: with sources, the copies go together."""
    a, b = torch.tensor([[0.0, 0, 0], [1, 0, 0]]), torch.tensor([[1.0, 0, 0], [2, 0, 0]])
    pairs = hungarian(a, b, torch.tensor([4, 5]), torch.tensor([5, 6]))
    assert pairs.tolist() == [[0, 1], [1, 0]]
    assert cost(pairs, a, b) == 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "m"), [(20, 20), (12, 20), (20, 12), (0, 4), (4, 0)])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_simple_rules_are_their_loops(seed, n, m, backend):
    """On a lattice, where ties are many: the lowest row wins."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-3, 4, (num, 3), generator=generator).float() for num in (n, m))
    table = distances(a, b) ** 2
    free, taken = list(range(m)), []
    for row in range(min(n, m)):
        best = min(free, key=lambda column: (round(table[row, column]), column))
        free.remove(best)
        taken.append([row, best])
    assert greedy(a, b, backend=backend).tolist() == taken
    there = [[row, int(table[row].argmin())] for row in range(n)] if m else []
    assert nearest(a, b, backend=backend).tolist() == there
    mutual = [[row, column] for row, column in there if int(table[:, column].argmin()) == row]
    assert mutual_nearest(a, b, backend=backend).tolist() == mutual


def test_backends_agree():
    a, b = torch.randn(700, 3) * 20, torch.randn(650, 3) * 20
    for rule in (greedy, nearest, mutual_nearest):
        assert torch.equal(rule(a, b, backend="numba"), rule(a, b, backend="torch"))


@pytest.mark.parametrize("rule", [hungarian, greedy, nearest, mutual_nearest])
def test_every_rule_refuses_what_is_no_place(rule):
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"xyz_b holds NaN or infinity \(first in row 1\)"):
            rule(torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, bad, 0]]))
    with pytest.raises(ValueError, match="must be"):
        rule(torch.zeros(2, 2), torch.zeros(2, 3))


def test_no_other_rule_is_cheaper_than_hungarian():
    a, b = torch.randn(60, 3), torch.randn(60, 3)
    assert cost(hungarian(a, b), a, b) < cost(greedy(a, b), a, b)
    assert cost(nearest(a, b), a, b) < cost(hungarian(a, b), a, b)


def test_sources_must_fit():
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="both sets or of neither"):
        hungarian(a, a, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="as many sources"):
        hungarian(a, a, torch.tensor([0]), torch.tensor([0, 1]))
