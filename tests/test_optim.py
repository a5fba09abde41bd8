"""One composite optimizer is its parts; schedules follow their formulae."""

import copy

import pytest
import torch
from helpers import small_method
from torch import nn

from simipu3d.config import parse_part
from simipu3d.engine.optim import CompositeOptimizer, build_optimizer, check_branches, parse_optim
from simipu3d.errors import UserError
from simipu3d.methods.simipu import SimIPU
from simipu3d.registry import SCHEDULES


def default(block=None):
    """SimIPU's optimizers, with a block of a configuration over them."""
    return parse_optim(block, SimIPU.OPTIM)


def branches():
    torch.manual_seed(0)
    layers = {name: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for name in ("points", "image", "heads")}
    return layers


def step(modules, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    rows = torch.randn(8, 4)
    for module in modules.values():
        rows = module(rows)
    rows.square().sum().backward()
    optimizer.step()


def test_the_composite_equals_separate_optimizers():
    together, apart = branches(), branches()
    composite = build_optimizer(together, default())
    own = [
        torch.optim.AdamW(apart["points"].parameters(), 1e-3, betas=(0.95, 0.99), weight_decay=0),
        torch.optim.SGD(apart["image"].parameters(), 0.03, momentum=0.9),
        torch.optim.SGD(apart["heads"].parameters(), 0.03, momentum=0.9),
    ]
    decay = {id(m[0].weight): wd for m, wd in zip(apart.values(), (0.01, 1e-4, 1e-4), strict=True)}
    for optimizer in own:
        params = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = [p for p in params if p.ndim > 1]
        optimizer.param_groups[0]["weight_decay"] = decay[id(optimizer.param_groups[0]["params"][0])]
        optimizer.add_param_group({"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0})
    separate = CompositeOptimizer(own)
    for seed in range(5):
        step(together, composite, seed)
        step(apart, separate, seed)
    for a, b in zip(together.values(), apart.values(), strict=True):
        assert torch.equal(a[0].weight, b[0].weight)
        assert torch.equal(a[1].bias, b[1].bias)


def test_state_survives_a_checkpoint():
    modules = branches()
    optimizer = build_optimizer(modules, default())
    for seed in range(3):
        step(modules, optimizer, seed)
    copies = branches()
    for a, b in zip(copies.values(), modules.values(), strict=True):
        a.load_state_dict(b.state_dict())
    other = build_optimizer(copies, default())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(modules, optimizer, seed)
        step(copies, other, seed)
    assert all(torch.equal(copies[name][0].weight, modules[name][0].weight) for name in modules)


def test_frozen_parameters_are_not_handed_over():
    modules = branches()
    modules["heads"].requires_grad_(False)
    optimizer = build_optimizer(modules, default())
    assert {group["branch"] for group in optimizer.param_groups} == {"points", "image"}


def test_norms_and_biases_are_decayed_only_when_asked():
    groups = build_optimizer(branches(), default()).param_groups
    assert sorted({g["weight_decay"] for g in groups if g["branch"] == "image"}) == [0.0, 1e-4]
    released = default({"image": {"name": "sgd", "decay_norm_and_bias": True}})
    groups = build_optimizer(branches(), released).param_groups
    assert {g["weight_decay"] for g in groups if g["branch"] == "image"} == {1e-4}


@pytest.mark.parametrize("name", ["constant", "exponential", "cosine", "onecycle", "milestones"])
def test_schedules_move_every_group(name):
    block = {"name": name, **({"milestones": [2, 4]} if name == "milestones" else {})}
    optimizer = build_optimizer(branches(), default())
    config = parse_part("schedule", SCHEDULES, block)
    scheduler, interval = SCHEDULES[name].target(optimizer, config, 10)
    assert interval in ("step", "epoch")
    first = [group["lr"] for group in optimizer.param_groups]
    history = []
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        history.append([group["lr"] for group in optimizer.param_groups])
    ratios = {round(last / start, 6) for last, start in zip(history[4], first, strict=True)}
    assert len(ratios) == 1, "all groups follow the same curve"
    if name == "exponential":
        assert ratios == {round(0.99**5, 6)}
    if name == "cosine":
        assert max(history[-1]) < 1e-9


def test_warm_up_rises():
    optimizer = build_optimizer(branches(), default())
    scheduler, _ = SCHEDULES["cosine"].target(
        optimizer, parse_part("schedule", SCHEDULES, {"name": "cosine", "warmup_steps": 4}), 10
    )
    rates = []
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_a_resumed_run_follows_the_curve_of_its_own_length(name):
    """A checkpoint of a 4-step run, taken up as one of 8 steps, goes on like a run that always had 8."""
    config = parse_part("schedule", SCHEDULES, {"name": name})

    def rates(num_steps, state, steps):
        optimizer = build_optimizer(branches(), default())
        scheduler, _ = SCHEDULES[name].target(optimizer, config, num_steps)
        if state is not None:
            scheduler.load_state_dict(state)
        seen = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen, scheduler.state_dict()

    whole, _ = rates(8, None, 8)
    _, state = rates(4, None, 4)
    resumed, _ = rates(8, state, 4)
    assert resumed == pytest.approx(whole[4:])


def test_a_short_run_warms_up_for_half_of_it_at_most():
    optimizer = build_optimizer(branches(), default())
    config = parse_part("schedule", SCHEDULES, {"name": "cosine", "warmup_steps": 20})
    scheduler, _ = SCHEDULES["cosine"].target(optimizer, config, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-5, 0.505e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"points": {"name": "adam"}}, "optim.points.name: no optimizer is called 'adam'"),
        ({"points": {"name": "sgd", "betas": [0.9, 0.9]}}, "optim.points.betas: no such key"),
        ({"scale_lr": "square"}, "optim.scale_lr"),
        ([1], "expected a block"),
    ],
)
def test_errors_name_the_key(block, words):
    with pytest.raises(UserError, match=words):
        default(block)


def test_an_unknown_branch_is_named_with_those_there_are():
    check_branches(small_method(), default({"image": {"lr": 0.1}}))
    with pytest.raises(
        UserError, match=r"optim\.point: the method has no such branch; there are points, heads, image$"
    ):
        check_branches(small_method(), default({"point": {"name": "sgd"}}))


def test_a_branch_that_the_method_left_out_keeps_its_block():
    """Without the inter-modal loss there is no image branch, and the same file still runs."""
    method = small_method(contrast={"inter_weight": 0.0})
    check_branches(method, default({"image": {"lr": 0.1}}))
    assert {g["branch"] for g in build_optimizer(method.branches(), default()).param_groups} == {"points", "heads"}


def test_a_branch_without_a_default_has_adamw():
    config = parse_optim({"model": {"lr": 0.5}}, {})
    (group,) = build_optimizer({"model": nn.Linear(2, 2, bias=False)}, config).param_groups
    assert (group["lr"], group["betas"], group["branch"]) == (0.5, (0.95, 0.99), "model")
    (group,) = build_optimizer({"model": nn.Linear(2, 2, bias=False)}, parse_optim(None, {})).param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.01)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_rates_follow_the_frames_of_a_step(rule, factor):
    config = default({"scale_lr": rule, "reference_batch": 8, "points": {"lr": 0.25}})
    assert config == default(config.to_plain())
    rates = {g["branch"]: g["lr"] for g in build_optimizer(branches(), config, frames=32).param_groups}
    assert rates == pytest.approx({"points": 0.25 * factor, "image": 0.03 * factor, "heads": 0.03 * factor})
    as_written = {g["branch"]: g["lr"] for g in build_optimizer(branches(), config).param_groups}
    assert as_written == {"points": 0.25, "image": 0.03, "heads": 0.03}


@pytest.mark.parametrize(
    ("block", "peer"),
    [
        ({"name": "exponential", "gamma": 0.97}, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97)),
        (
            {"name": "milestones", "milestones": [3, 7, 20], "gamma": 0.3},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 7, 20], 0.3),
        ),
    ],
    ids=["exponential", "milestones"],
)
def test_rates_an_epoch_are_torchs_to_the_last_bit(block, peer):
    """A function of the count that multiplies as torch's chained schedulers do, so that old runs repeat."""
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.03) for _ in range(2))
    config = parse_part("schedule", SCHEDULES, block)
    schedule, interval = SCHEDULES.of(config).target(ours, config, 1000)
    chained = peer(theirs)
    assert interval == "epoch"
    for _ in range(60):
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        for optimizer, each in ((ours, schedule), (theirs, chained)):
            optimizer.step()
            each.step()
