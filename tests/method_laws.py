"""What every method keeps, as functions of a method and a way to make batches. `test_method_contract.py` asks all of it of
every registered method, and shows that each law catches a method that breaks it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from simipu3d.contracts.batch import Batch
from simipu3d.contracts.method import Method

Build = Callable[[int], Method]
"""A method with weights of a seed."""
Batches = Callable[[Sequence[int]], Batch]
"""A batch of the frames of the given seeds."""


def losses_are_finite_scalars(build: Build, batches: Batches) -> None:
    metrics = build(0)(batches([1, 2]))
    assert "loss" in metrics
    assert all(value.ndim == 0 and torch.isfinite(value) for value in metrics.values())


def every_trainable_parameter_gets_a_gradient(build: Build, batches: Batches) -> None:
    method = build(0)
    method(batches([1, 2]))["loss"].backward()
    assert any(parameter.requires_grad for parameter in method.parameters())
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = [name for name, p in method.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen


def branches_hold_every_parameter_once(build: Build, batches: Batches) -> None:
    method = build(0)
    held = [id(p) for module in method.branches().values() for p in module.parameters()]
    assert len(held) == len(set(held))
    assert {id(parameter) for parameter in method.parameters()} == set(held)


def a_batch_gives_what_its_frames_give(build: Build, batches: Batches) -> None:
    """Rows and predictions where a method has them, else a loss between those of its frames, as any mean is."""
    method = build(0).eval()
    whole = batches([1, 2, 3])
    singles = [batches([seed]) for seed in (1, 2, 3)]
    with torch.no_grad():
        rows, alone = method.rows(whole), [method.rows(single) for single in singles]
        for name, together in rows.items():
            for frame, own in enumerate(alone):
                mine = together.batch_index == frame
                torch.testing.assert_close(together.query[mine], own[name].query, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(together.key[mine], own[name].key, rtol=1e-3, atol=1e-4)
        records = method.predict(whole)
        assert_alike(records, [record for single in singles for record in method.predict(single)])
        if not rows and not records:
            losses = [float(method(single)["loss"]) for single in singles]
            slack = 1e-4 * (1 + max(map(abs, losses)))
            assert min(losses) - slack <= float(method(whole)["loss"]) <= max(losses) + slack


def an_empty_batch_is_legal(build: Build, batches: Batches) -> None:
    for training in (True, False):
        method = build(0).train(training)
        loss = method(batches([]))["loss"]
        assert float(loss) == 0
        if loss.requires_grad:
            loss.backward()
        assert method.predict(batches([])) == []


def a_state_dict_comes_back(build: Build, batches: Batches) -> None:
    one, other = build(0), build(1)
    for _ in range(2):
        one(batches([1, 2]))  # statistics, queues
        one.after_step()
    other.load_state_dict(one.state_dict())
    batch = batches([1, 2])
    with torch.no_grad():
        first, second = one.eval()(batch), other.eval()(batch)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def assert_alike(one: Any, two: Any) -> None:
    """Plain records are equal up to rounding."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_alike(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_alike(first, second)
    elif isinstance(one, str) or one is None:
        assert one == two
    else:
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-3, atol=1e-4)


LAWS = (
    losses_are_finite_scalars,
    every_trainable_parameter_gets_a_gradient,
    branches_hold_every_parameter_once,
    a_batch_gives_what_its_frames_give,
    an_empty_batch_is_legal,
    a_state_dict_comes_back,
)
