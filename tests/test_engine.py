"""A run from the command line to its files: resume after a kill, bad input, two processes."""

import csv
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import yaml
from helpers import BLOCKS

from simipu3d.engine.metrics import average
from simipu3d.engine.metrics_file import MetricsFile
from simipu3d.engine.pretrain import pretrain
from simipu3d.errors import UserError
from simipu3d.tools.pretrain import main
from simipu3d.weights.files import read_checkpoint

STEPS = 10
DRIVER = """
import os, signal, sys, torch
torch.set_num_threads(1)
import simipu3d.engine.run as run
from simipu3d.engine.module import TrainingModule
from simipu3d.engine.pretrain import pretrain

how, count, cfg, out, *sets = sys.argv[1:]
calls = 0

def die_at_step(module, batch, batch_index, original=TrainingModule.training_step):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(module, batch, batch_index)

def die_while_saving(checkpoint, file, original=torch.save):
    global calls
    calls += 1
    if calls < int(count):
        return original(checkpoint, file)
    file.write(b"PK half a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

if how == "step":
    TrainingModule.training_step = die_at_step
else:
    run.torch.save = die_while_saving
pretrain(cfg, sets, out=run.Path(out), resume="")
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Results are equal bit for bit at one number of threads, so both sides of a comparison use the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A run of seconds on the embedded data set: 2.5 epochs of 4 batches."""
    folder = tmp_path_factory.mktemp("cfg")
    data = {
        "name": "drive_world",
        "root": str(tmp_path_factory.mktemp("frames")),
        "num_frames": 9,
        "image_size": [32, 64],
        "beams": 16,
        "azimuth_step_deg": 2.0,
        "batch_size": 2,
        "num_workers": 0,
    }
    raw = {
        "method": "simipu",
        "data": data,
        "augment": {"points": {"num_points": 64}, "images": {"brightness": 0.2}},
        **BLOCKS,
        "schedule": {"name": "exponential", "gamma": 0.5},
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1},
        "run": {"checkpoint_every_steps": 3, "pictures_every_steps": 0, "keep_every_epochs": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory):
    """The uninterrupted run."""
    torch.set_num_threads(1)
    return pretrain(cfg, out=tmp_path_factory.mktemp("runs") / "whole")


def weights(out):
    return read_checkpoint(out / "checkpoints" / "last.ckpt")["state_dict"]


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_the_readme_says(whole, cfg):
    assert {path.name for path in whole.iterdir()} >= {"config.yaml", "environment.json", "metrics.csv", "tensorboard"}
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"last.ckpt", "epoch_0002.ckpt"}
    table = rows(whole)
    assert [int(row["step"]) for row in table] == list(range(1, STEPS + 1))
    assert [int(row["epoch"]) for row in table] == [0] * 4 + [1] * 4 + [2] * 2
    for name in (
        "intra_loss",
        "intra_ceiling",
        "intra_top1",
        "inter_loss",
        "inter_ceiling",
        "inter_top1",
        "visible_tokens",
        "unique_tokens",
        "matched_distance_p50",
        "samples_per_second",
        "peak_memory_gb",
        "lr_points",
    ):
        assert all(np.isfinite(float(row[name])) for row in table), name
    assert json.loads((whole / "environment.json").read_text())[0]["versions"]["torch"] == torch.__version__
    assert read_checkpoint(whole / "checkpoints" / "last.ckpt")["simipu3d"]["global_step"] == STEPS


def test_the_learning_rate_falls_once_an_epoch(whole):
    rates = [float(row["lr_image"]) for row in rows(whole)]
    assert rates == pytest.approx([0.03] * 4 + [0.015] * 4 + [0.0075] * 2)


def test_the_resolved_configuration_gives_the_same_run(whole, tmp_path):
    again = pretrain(whole / "config.yaml", out=tmp_path / "again")
    assert same_weights(weights(whole), weights(again))


@pytest.mark.parametrize(
    ("how", "count", "workers"),
    [("step", 2, 0), ("step", 6, 0), ("step", 9, 2), ("save", 1, 0), ("save", 2, 2), ("save", 4, 0)],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(whole, cfg, tmp_path, how, count, workers):
    out = tmp_path / "killed"
    sets = [f"data.num_workers={workers}"]
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), how, str(count), str(cfg), str(out), *sets]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    resumed = pretrain(cfg, sets, out=out, resume="")
    assert same_weights(weights(whole), weights(resumed))
    told = [
        {k: v for k, v in row.items() if k not in ("samples_per_second", "peak_memory_gb")} for row in rows(resumed)
    ]
    expected = [{k: v for k, v in row.items() if k in told[0]} for row in rows(whole)]
    assert told == expected


def test_a_finished_run_has_nothing_to_resume(whole, cfg):
    before = (whole / "checkpoints" / "last.ckpt").read_bytes()
    pretrain(cfg, out=whole, resume="")
    assert (whole / "checkpoints" / "last.ckpt").read_bytes() == before
    assert len(rows(whole)) == STEPS


def test_a_longer_run_goes_on_where_the_shorter_one_ended(whole, cfg, tmp_path):
    short = pretrain(cfg, ["trainer.max_steps=5"], out=tmp_path / "short")
    longer = pretrain(cfg, out=short, resume="")
    assert same_weights(weights(whole), weights(longer))


def test_accumulation_clipping_and_mixed_precision_keep_their_meaning(cfg, tmp_path):
    sets = ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1.0", "trainer.precision=bf16-mixed"]
    whole = pretrain(cfg, [*sets, "trainer.max_steps=5"], out=tmp_path / "whole")
    table = rows(whole)
    assert [int(row["step"]) for row in table] == [1, 2, 3, 4, 5]
    assert [int(row["epoch"]) for row in table] == [0, 0, 1, 1, 2], "4 batches an epoch make 2 steps"
    parts = pretrain(cfg, [*sets, "trainer.max_steps=3"], out=tmp_path / "parts")
    pretrain(cfg, [*sets, "trainer.max_steps=5"], out=parts, resume="")
    assert same_weights(weights(whole), weights(parts))


def test_init_starts_from_another_runs_weights(whole, cfg, tmp_path):
    sets = ["trainer.max_steps=1", "optim.points.lr=1e-30", "optim.image.lr=1e-30", "optim.heads.lr=1e-30"]
    started = pretrain(cfg, sets, out=tmp_path / "started", init=whole / "checkpoints" / "last.ckpt")
    name = "method.image_encoder.trunk.conv1.weight"
    torch.testing.assert_close(weights(started)[name], weights(whole)[name])


def errors(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr().err.strip().splitlines()
    assert status == 2, printed
    lines = [line for line in printed if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in "\n".join(printed)
    return lines[0]


def test_a_folder_that_holds_a_run_is_refused(whole, cfg, capsys):
    assert "holds a run already; continue it with --resume" in errors(capsys, "--cfg", cfg, "--out", whole)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("trainer.max_stepz=3", "trainer.max_stepz: no such key; did you mean max_steps?"),
        ("contrast.temperature=0", "contrast.temperature"),
        ("trainer.max_steps='3'", "trainer.max_steps"),
        ("point_encoder.name=pointnet", "point_encoder.name: no point encoder is called 'pointnet'"),
        ("matching.assignment=hungry", "matching.assignment: no assignment is called 'hungry'"),
        ("image_encoder.name=resnet51", "resnet51"),
        ("method=simsiam", "no method is called 'simsiam'; there are depth, simipu"),
        ("data.batch_size=10", "data.batch_size"),
        ("trainer.accelerator=gpu", "no GPU"),
        ("nonsense", "expected key=value"),
        ("trainer.max_steps=-1", "trainer.max_steps: set it, or trainer.max_epochs"),
        ("trainer.max_steps=0 trainer.max_epochs=1", "trainer.max_steps: 1 or more, or -1"),
        ("datum.name=kitti", "datum: no such key; did you mean data?"),
        ("optim.points.name=sgd optim.points.betas=[0.9,0.9]", "optim.points.betas: no such key"),
        ("optim.point.lr=1.0", "optim.point: the method has no such branch; there are points, heads, image"),
        ("optim.scale_lr=cubic", "optim.scale_lr"),
        ("data.augment.num_points=3", "tiny.yaml: data.augment: this block is now augment: at the top level"),
        ("matching.map=8", "tiny.yaml: matching.map: this key is now image_encoder.map"),
        ("data.load_boxes=true", "tiny.yaml: data.load_boxes: this key is gone"),
        ("validate.data.split=vale", "validate.data.split"),
        ("validate.data.num_frame=3", "validate.data.num_frame: no such key; did you mean num_frames?"),
        ("validate.metrik=loss", "validate.metrik: no such key; did you mean metric?"),
    ],
)
def test_a_wrong_setting_is_one_line(cfg, tmp_path, capsys, setting, words):
    if "gpu" in setting and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "run"
    assert words in errors(capsys, "--cfg", cfg, "--out", out, "--set", *setting.split())
    assert not out.exists(), "nothing is left behind"


def test_only_some_keys_may_change_on_resume(whole, cfg, capsys):
    line = errors(capsys, "--cfg", cfg, "--out", whole, "--resume", "--set", "contrast.temperature=0.1")
    assert "contrast.temperature" in line
    assert "--init" in line


def test_a_damaged_or_foreign_checkpoint_is_named(whole, cfg, tmp_path, capsys):
    broken = tmp_path / "broken.ckpt"
    content = (whole / "checkpoints" / "last.ckpt").read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    assert "damaged" in errors(capsys, "--cfg", cfg, "--out", tmp_path / "a", "--resume", broken)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    broken.write_bytes(flipped)
    assert "check sum" in errors(capsys, "--cfg", cfg, "--out", tmp_path / "a", "--resume", broken)
    torch.save({"state_dict": {}}, broken)
    assert "not a checkpoint of simipu3d" in errors(capsys, "--cfg", cfg, "--out", tmp_path / "b", "--resume", broken)
    other = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    other["simipu3d"]["config"]["method"] = "moco"
    torch.save(other, broken)
    assert "of the method 'moco'" in errors(capsys, "--cfg", cfg, "--out", tmp_path / "c", "--resume", broken)
    assert "no such checkpoint" in errors(capsys, "--cfg", cfg, "--out", tmp_path / "d", "--resume", tmp_path / "no")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_checkpoint_runs_no_code(cfg, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb(), "simipu3d": {}}, "bomb.ckpt")
    errors(capsys, "--cfg", cfg, "--out", "run", "--resume", "bomb.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_cannot_be_written_is_named(cfg, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in errors(capsys, "--cfg", cfg, "--out", tmp_path / "file" / "run")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(cfg, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="not finite"):
        pretrain(cfg, ["optim.image={name: sgd, lr: 1e30}", "trainer.log_every_n_steps=1"], out=out)
    assert not (out / "checkpoints" / "last.ckpt").exists()


def test_two_processes_run_and_log_once(cfg, tmp_path):
    """DDP over gloo: every step is logged by one process, and both hold the same weights (asserted inside Lightning)."""
    out = tmp_path / "two"
    arguments = ["--cfg", cfg, "--out", out, "--set", "trainer.devices=2", "contrast.negatives=all_ranks"]
    command = [sys.executable, "-m", "simipu3d.tools.pretrain", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    table = rows(out)
    assert [int(row["step"]) for row in table] == list(range(1, STEPS + 1))
    assert all(float(row["intra_ceiling"]) == pytest.approx(np.log(2 * 2 * 24), abs=1e-3) for row in table)
    assert done.stderr.count(f"step {STEPS}/{STEPS}") == 1
    assert done.stderr.count("done: ") == 1


def test_processes_are_averaged_by_their_rows():
    """A process without rows has a loss of 0 that means nothing; a maximum is one over all."""
    names = ["intra_loss", "intra_rows", "matched_distance_max", "num_tokens"]
    values = [[2.0, 30.0, 1.0, 10.0], [5.0, 10.0, 7.0, 20.0], [0.0, 0.0, 0.0, 0.0]]
    found = average([(dict(zip(names, own, strict=True)), 4) for own in values])
    assert found == pytest.approx(
        dict(zip(names, [(2.0 * 30 + 5.0 * 10) / 40, 40 / 3, 7.0, 10.0], strict=True)), rel=1e-6
    )


def test_batches_of_other_sizes_count_by_their_frames():
    """What is no mean over rows is one over frames; a number that only some batches have is one over those."""
    parts = [({"loss": 1.0, "angle": 3.0, "rows": 6.0}, 3), ({"loss": 5.0}, 1), ({"loss": 9.0, "angle": 7.0}, 0)]
    assert average(parts) == pytest.approx({"loss": 2.0, "angle": 3.0, "rows": 6.0})
    assert average([({"a_loss": 0.0, "a_rows": 0.0}, 2)]) == {"a_loss": 0.0, "a_rows": 0.0}
    assert average([]) == {}


def test_metrics_file_cuts_later_rows_and_takes_new_columns(tmp_path):
    file = MetricsFile(tmp_path / "m.csv", None)
    for step in range(1, 5):
        file.append({"step": step, "a": step})
    file = MetricsFile(tmp_path / "m.csv", 2)
    file.append({"step": 3, "a": 30, "b": 1})
    with open(tmp_path / "m.csv", newline="") as opened:
        assert [tuple(row.values()) for row in csv.DictReader(opened)] == [
            ("1", "1", ""),
            ("2", "2", ""),
            ("3", "30", "1"),
        ]
