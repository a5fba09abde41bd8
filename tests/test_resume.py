"""What a resumed run takes from its folder, what may change, and what is refused."""

import copy
import json
import os
import random
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import call, checkpoint, rows, same

from simipu3d.engine.curve import Curve
from simipu3d.engine.metrics_file import MetricsFile, read_rows
from simipu3d.engine.pretrain import pretrain
from simipu3d.engine.resume import newest_checkpoint

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stopped_once(tiny, tmp_path_factory):
    return pretrain(tiny, ["trainer.max_steps=5"], out=tmp_path_factory.mktemp("resume") / "run")


@pytest.fixture
def stopped_copy(stopped_once, tmp_path):
    """A copy of a run of 5 of its 10 steps, for a test to change."""
    return shutil.copytree(stopped_once, tmp_path / "copy")


# Which checkpoint


def test_the_newest_checkpoint_is_taken(tiny, tiny_run, tmp_path):
    """Killed between an epoch's checkpoint (step 8) and the next last.ckpt: the older one stands beside it."""
    out = pretrain(tiny, ["trainer.max_steps=9"], out=tmp_path / "run")
    older = pretrain(tiny, ["trainer.max_steps=6", "run.keep_every_epochs=null"], out=tmp_path / "older")
    shutil.copy(older / "checkpoints" / "last.ckpt", out / "checkpoints")
    assert newest_checkpoint(out / "checkpoints").name == "epoch_0002.ckpt"
    (out / "checkpoints" / "epoch_0003.ckpt").write_bytes(b"PK cut")
    (out / "checkpoints" / "best.ckpt").write_bytes((out / "checkpoints" / "last.ckpt").read_bytes())
    assert newest_checkpoint(out / "checkpoints").name == "epoch_0002.ckpt", "damaged ones are left out"
    (out / "checkpoints" / "epoch_0003.ckpt").unlink()
    pretrain(tiny, ["run.keep_every_epochs=2"], out=out, resume="")
    assert same(tiny_run, out)


def test_a_damaged_last_checkpoint_is_named(tiny, stopped_copy, capfd):
    (stopped_copy / "checkpoints" / "last.ckpt").write_bytes(b"PK cut")
    status, lines = call(capfd, "--cfg", tiny, "--out", stopped_copy, "--resume")
    assert status == 2
    assert "last.ckpt: damaged" in lines[-1]
    assert newest_checkpoint(stopped_copy / "nowhere") is None


def test_dead_steps_of_a_run_without_checkpoint_are_purged(tiny, tmp_path, at_step, capfd):
    out = tmp_path / "run"

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    at_step(3, die)
    with pytest.raises(Killed):
        pretrain(tiny, ["optim.image.lr=1e-9"], out=out)
    call(capfd, "--cfg", tiny, "--out", out, "--resume", "--set", "trainer.max_steps=1")
    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("intra_loss")] == [1]
    assert [row["step"] for row in rows(out)] == ["1"]


# What may change


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
def test_the_first_step_after_a_resume_follows_the_curve_of_its_own_length(schedule, tiny, tmp_path):
    """A finished half cosine ends at 0; a longer run goes on where its own curve is."""
    sets = [f"schedule={{name: {schedule}}}"]
    whole = pretrain(tiny, [*sets, "trainer.max_steps=6"], out=tmp_path / "whole")
    out = pretrain(tiny, [*sets, "trainer.max_steps=3"], out=tmp_path / "run")
    pretrain(tiny, [*sets, "trainer.max_steps=6"], out=out, resume="")
    names = ("lr_points", "lr_image", "lr_heads")
    for row, expected in list(zip(rows(out), rows(whole), strict=True))[3:]:
        assert [row[name] for name in names] == [expected[name] for name in names]
        assert all(float(row[name]) > 0 for name in names)


def test_rates_decay_and_schedule_of_the_new_configuration_count(tiny, stopped_copy, capfd):
    sets = [
        "optim.image.lr=0.001",
        "optim.image.weight_decay=0.5",
        "schedule={name: milestones, milestones: [2], gamma: 0.1}",
    ]
    status, _ = call(capfd, "--cfg", tiny, "--out", stopped_copy, "--resume", "--set", *sets)
    assert status == 0
    table = rows(stopped_copy)
    assert [float(row["lr_image"]) for row in table] == pytest.approx([0.03] * 4 + [0.015] + [0.001] * 3 + [0.0001] * 2)
    assert [float(row["lr_points"]) for row in table[5:]] == pytest.approx([0.001] * 3 + [0.0001] * 2)
    groups = checkpoint(stopped_copy)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups if group["branch"] == "image"} == {0.5, 0.0}


def test_changes_are_listed_and_others_refused(tiny, stopped_copy, capfd, caplog):
    caplog.set_level("INFO", "simipu3d")
    sets = ["optim.image.lr=0.001", "optim.image.momentum=0.5"]
    status, lines = call(capfd, "--cfg", tiny, "--out", stopped_copy, "--resume", "--set", *sets)
    assert "changed since the checkpoint: optim.image.lr: 0.03 -> 0.001" in caplog.text
    assert status == 2
    assert "another value of optim.image.momentum; only" in lines[-1]
    assert "optim.*.lr, optim.*.weight_decay" in lines[-1]


def test_a_curve_is_a_function_of_the_count():
    """Loaded at any count, with any state of the optimizer, it gives what stepping there gives."""
    for interval in ("step", "epoch"):
        optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2)]
        one, other = (Curve(optimizer, lambda base, n: base * 0.5**n, interval) for optimizer in optimizers)
        for _ in range(3):
            optimizers[0].step()
            one.step()
        optimizers[1].param_groups[0]["lr"] = 7.0
        other.load_state_dict({"last_epoch": 99, "steps_done": 3, "epochs_done": 3})
        for _ in range(2):
            assert other.get_last_lr() == one.get_last_lr() == [optimizers[1].param_groups[0]["lr"]]
            for optimizer, curve in zip(optimizers, (one, other), strict=True):
                optimizer.step()
                curve.step()


# What is refused


def leaves(value, place=()):
    """Every place in a checkpoint."""
    yield place
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from leaves(child, (*place, key))


REPLACEMENTS = [None, "text", -1, 2**70, 1.5, [], {}, [[]], torch.zeros(3), True]


def damage(content, rng):
    """The same checkpoint with one value deleted or replaced, and where."""
    content = copy.deepcopy(content)
    blocks = [name for name in content if name not in ("pytorch-lightning_version", "epoch", "global_step")]
    block = rng.choice(blocks)
    place = rng.choice([place for place in leaves(content[block])])
    parent, key = content, block
    for step in place:
        parent, key = parent[key], step
    if rng.random() < 0.3 and isinstance(parent, dict):
        del parent[key]
        return content, (block, *place, "deleted")
    parent[key] = rng.choice(REPLACEMENTS)
    return content, (block, *place, parent[key])


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ", "2"))))
def test_an_edited_checkpoint_is_one_line_or_harmless(seed, tiny, stopped_once, tmp_path, capfd):
    content, rng = checkpoint(stopped_once), random.Random(seed)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    refused = 0
    for _ in range(6):
        edited, place = damage(content, rng)
        torch.save(edited, path)
        status, lines = call(
            capfd, "--cfg", tiny, "--out", path.parent.parent, "--resume", "--set", "trainer.max_steps=6"
        )
        assert status in (0, 2), (place, lines)
        assert not any("Traceback" in line for line in lines), place
        refused += status == 2
    assert refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["optimizer_states"].clear(), "optimizer_states: not one state"),
        (lambda c: c["optimizer_states"][0]["state"].clear(), "optimizer_states: empty after 5 steps"),
        (lambda c: c["optimizer_states"][0]["state"][0].clear(), "group 0: a parameter without state"),
        (lambda c: c["optimizer_states"][0]["state"][0].pop("exp_avg"), "different states"),
        (lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr="high"), "group 0: lr: 'high'"),
        (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "its optimizer has groups of"),
        (lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg does not fit"),
        (lambda c: c["simipu3d"].update(global_step=4), "step 4 at [1, 1] does not agree with Lightning's step 5"),
        (lambda c: c["simipu3d"].update(position=[0, -1]), "simipu3d.position.1"),
        (lambda c: c["simipu3d"].update(config=[]), "simipu3d.config"),
        (lambda c: c["simipu3d"]["bad_frames"].update(messages=3), "simipu3d.bad_frames.messages"),
        (lambda c: c["loops"]["fit_loop"].pop("epoch_progress"), "loops.fit_loop: not what this release"),
        (lambda c: c["lr_schedulers"].clear(), "lr_schedulers: not one state"),
        (
            lambda c: c["state_dict"].update(more=torch.zeros(1)),
            "1 tensors are missing, unknown or of another shape (more)",
        ),
    ],
)
def test_an_edited_value_is_named(change, words, tiny, stopped_once, tmp_path, capfd):
    content = checkpoint(stopped_once)
    change(content)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    status, lines = call(capfd, "--cfg", tiny, "--out", tmp_path / "run", "--resume")
    assert status == 2
    assert words in lines[-1]


@pytest.mark.parametrize("content", ["{", "{}", "\0", "[" * 100_000, b"\xff\xfe"])
def test_a_broken_environment_file_is_named(content, tiny, stopped_copy, capfd):
    file = stopped_copy / "environment.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes()
    status, lines = call(capfd, "--cfg", tiny, "--out", stopped_copy, "--resume")
    assert status == 2
    assert "environment.json: not the list of this run's starts" in lines[-1]
    assert file.read_bytes() == before
    file.write_text(json.dumps([{"time": "then"}]))
    assert call(capfd, "--cfg", tiny, "--out", stopped_copy, "--resume")[0] == 0
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize(
    "content", [b"a,b\r\n1,2\r\n", b"step,a\r\nfirst,2\r\n", b"\xff\xfe\r\n", b"step,a\r\n1,\0\r\nx,1\r\n"]
)
def test_a_broken_metrics_file_is_named(content, tiny, stopped_copy, capfd):
    (stopped_copy / "metrics.csv").write_bytes(content)
    status, lines = call(capfd, "--cfg", tiny, "--out", stopped_copy, "--resume")
    assert status == 2
    assert "metrics.csv: not the metrics.csv of a run" in lines[-1]


def test_a_row_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,a\r\n1,2\r\n2")
    assert read_rows(path) == [{"step": "1", "a": "2"}]
    MetricsFile(path, 5).append({"step": 3, "a": 4})
    assert path.read_bytes() == b"step,a\r\n1,2\r\n3,4\r\n"
    assert read_rows(tmp_path / "none") == []
