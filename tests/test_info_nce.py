"""Laws of the contrastive loss, and a slow loop written from the formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from simipu3d.contrast.heads import ProjectionHead
from simipu3d.contrast.info_nce import chance, info_nce


def slow_info_nce(query, key, temperature, ids, scene):
    """A loop over rows, from arXiv:1807.03748 Eq. 4."""
    total, hits = 0.0, 0
    for i in range(len(query)):
        similar = []
        for j in range(len(key)):
            copy = any(int(values[i]) == int(values[j]) and int(values[i]) >= 0 for values in ids)
            elsewhere = scene is not None and scene[i] != scene[j]
            if i == j or not (copy or elsewhere):
                cosine = float(query[i] @ key[j] / query[i].norm() / key[j].norm())
                similar.append((cosine / temperature, j == i))
        total -= next(s for s, own in similar if own) - math.log(sum(math.exp(s) for s, _ in similar))
        hits += max(similar)[1]
    return total / len(query), hits / len(query)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_scene", [False, True])
def test_agrees_with_a_slow_loop(seed, with_scene):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 24, 6, generator=generator)
    ids = (torch.randint(-1, 12, (24,), generator=generator), torch.randint(-1, 30, (24,), generator=generator))
    scene = torch.randint(0, 3, (24,), generator=generator) if with_scene else None
    result = info_nce(query, key, 0.2, ids=ids, scene=scene)
    loss, accuracy = slow_info_nce(query, key, 0.2, ids, scene)
    assert float(result.loss) == pytest.approx(loss, abs=1e-5)
    assert float(result.accuracy) == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_the_pairs_keeps_the_loss(seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 50, 8, generator=generator)
    ids = torch.randint(0, 20, (50,), generator=generator)
    order = torch.randperm(50, generator=generator)
    one, other = info_nce(query, key, 0.07, ids=(ids,)), info_nce(query[order], key[order], 0.07, ids=(ids[order],))
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.accuracy, other.accuracy)


def test_equal_features_cost_the_ceiling():
    rows = torch.ones(37, 5)
    result = info_nce(rows, rows, 0.07)
    assert float(result.loss) == pytest.approx(math.log(37), abs=1e-5)
    assert float(result.ceiling) == pytest.approx(math.log(37), abs=1e-5)
    assert float(result.accuracy) == pytest.approx(1 / 37)
    assert chance(float(result.ceiling)) == pytest.approx(1 / 37, rel=1e-4)


def test_orthogonal_pairs_worked_out_by_hand():
    """Two orthogonal pairs at temperature 1: loss = ln(1 + e^-1)."""
    result = info_nce(torch.eye(2), torch.eye(2), 1.0)
    assert float(result.loss) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert float(result.accuracy) == 1


def test_copies_are_no_negatives():
    """With every row a copy of every other, nothing is left to confuse a query with."""
    rows = torch.ones(6, 4)
    assert float(info_nce(rows, rows, 0.07, ids=(torch.zeros(6).long(),)).loss) == pytest.approx(0, abs=1e-6)
    assert float(info_nce(rows, rows, 0.07, ids=(torch.full((6,), -1),)).loss) == pytest.approx(math.log(6), abs=1e-5)


def test_scenes_decide_on_their_own():
    """With negatives of the own scene only, a batch is the mean of its scenes, weighted by their rows."""
    query, key = torch.randn(2, 30, 8)
    scene = torch.tensor([0] * 10 + [1] * 20)
    both = info_nce(query, key, 0.1, scene=scene)
    first, second = info_nce(query[:10], key[:10], 0.1), info_nce(query[10:], key[10:], 0.1)
    torch.testing.assert_close(both.loss, (first.loss * 10 + second.loss * 20) / 30)
    torch.testing.assert_close(both.ceiling, (first.ceiling * 10 + second.ceiling * 20) / 30)


def test_no_rows_cost_nothing_and_keep_the_graph():
    query = torch.zeros(0, 4, requires_grad=True)
    result = info_nce(query, query, 0.07)
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert query.grad is not None


def test_half_precision_does_not_blur_the_similarities():
    query, key = torch.randn(2, 64, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = info_nce(query, key, 0.07).loss
    torch.testing.assert_close(mixed, info_nce(query, key, 0.07).loss)


@pytest.mark.parametrize(("channels", "count"), [(1024, 2_234_752), (2048, 8_663_424)])
def test_heads_have_the_released_size(channels, count):
    head = ProjectionHead(channels, 128)
    assert sum(parameter.numel() for parameter in head.parameters()) == count
    assert {name.split(".")[0] for name in head.state_dict()} == {"layer1", "layer2", "layer3"}


def test_every_head_parameter_gets_a_gradient():
    head = ProjectionHead(8, 4)
    (head(torch.randn(16, 8)) * torch.randn(16, 4)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.layer1.parameters())


@pytest.mark.parametrize("seed", range(5))
def test_a_key_on_the_querys_own_point_is_no_negative_of_it(seed):
    """Against a slow loop, with points that several rows share across the two sides."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 12, 6, generator=generator, dtype=torch.float64).float()
    own, others = torch.randint(-1, 5, (2, 12), generator=generator)
    result = info_nce(query, key, 0.2, cross_ids=(own, others))
    similarity = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.2
    losses = []
    for row in range(12):
        kept = [j for j in range(12) if j == row or own[row] < 0 or own[row] != others[j]]
        losses.append(torch.logsumexp(similarity[row, kept], 0) - similarity[row, row])
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    assert float(result.loss) != pytest.approx(float(info_nce(query, key, 0.2).loss))
