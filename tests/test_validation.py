"""Held-out frames during training: what is written about them, what they leave alone, and runs of the version before them."""

import csv
import logging
import re

import pytest
import torch
import yaml
from tiny_runs import STEPS, call, checkpoint, rows

from simipu3d.contracts.method import DataInfo
from simipu3d.data.loading.evaluation import make_evaluation_loader
from simipu3d.data.loading.loader import build_reader
from simipu3d.engine.pretrain import build_method, pretrain, warn_of_overlap
from simipu3d.engine.settings import load_settings

pytest_plugins = ["run_fixtures"]

HELD_OUT = ["validate.data.num_frames=3", "validate.metric=inter_loss"]
HELD_OUT += ["trainer.val_check_interval=2", "trainer.check_val_every_n_epoch=null"]
"""Every second step, three frames of other streets in batches of two."""


@pytest.fixture(autouse=True)
def exact(one_thread):
    """One thread, as in the runs that are compared with."""


@pytest.fixture(scope="module")
def validated(tiny, tiny_run, tmp_path_factory):
    """The same run with held-out frames, and the lines it logged."""
    torch.set_num_threads(1)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("simipu3d")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    out = pretrain(tiny, HELD_OUT, out=tmp_path_factory.mktemp("runs") / "validated")
    logger.removeHandler(handler)
    logger.setLevel(level)
    return out, lines


def held_out(out):
    """Rows of a validation: step -> the numbers with their prefix."""
    with open(out / "metrics.csv", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["val_loss"]]
    return {int(row["step"]): {k: float(v) for k, v in row.items() if k.startswith("val_") and v} for row in table}


def trained(out):
    return [{k: v for k, v in row.items() if not k.startswith("val_")} for row in rows(out) if row["loss"]]


def same_checkpoint(one, other):
    states = [content["optimizer_states"][0]["state"] for content in (one, other)]
    moments = all(torch.equal(states[0][i][name], v) for i, values in states[1].items() for name, v in values.items())
    weights = all(torch.equal(one["state_dict"][name], value) for name, value in other["state_dict"].items())
    return moments and weights and states[0].keys() == states[1].keys()


def test_every_number_of_the_method_is_measured_on_held_out_frames(validated, tiny_run):
    numbers = held_out(validated[0])
    assert list(numbers) == list(range(2, STEPS + 1, 2))
    of_method = set(rows(tiny_run)[0]) - {"epoch", "step"}
    of_method = {name for name in of_method if not name.startswith("lr_")}
    assert {"loss", "intra_loss", "inter_top1", "visible_tokens", "matched_distance_max"} <= of_method
    for own in numbers.values():
        assert set(own) == {f"val_{name}" for name in of_method}


def test_the_numbers_are_those_of_the_checkpoint_s_weights(validated, tiny):
    """Measured once more by hand: three frames in order, batches of two and one, means weighted by rows."""
    out, _ = validated
    settings = load_settings(tiny, HELD_OUT)
    reader = build_reader(settings.validate_data)
    method = build_method(settings, DataInfo(reader.point_columns, reader.class_names))
    state = checkpoint(out)["state_dict"]
    method.load_state_dict({name.removeprefix("method."): value for name, value in state.items()})
    parts = []
    with torch.no_grad():
        for batch in make_evaluation_loader(settings.validate_data, settings.augment, settings.needs, reader=reader):
            parts.append({name: float(value) for name, value in method.eval()(batch).items()})
    assert len(parts) == 2
    last = held_out(out)[STEPS]
    for task in ("intra", "inter"):
        weights = [part[f"{task}_rows"] for part in parts]
        for what in ("loss", "ceiling", "top1"):
            mean = sum(w * part[f"{task}_{what}"] for w, part in zip(weights, parts, strict=True)) / sum(weights)
            assert last[f"val_{task}_{what}"] == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert last["val_visible_tokens"] == pytest.approx(
        (2 * parts[0]["visible_tokens"] + parts[1]["visible_tokens"]) / 3
    )
    assert last["val_matched_distance_max"] == pytest.approx(max(part["matched_distance_max"] for part in parts))


def test_training_is_bit_for_bit_what_it_is_without(validated, tiny_run):
    assert same_checkpoint(checkpoint(tiny_run), checkpoint(validated[0]))
    assert trained(validated[0]) == trained(tiny_run)


def test_the_best_checkpoint_is_the_one_of_the_named_number(validated):
    out, lines = validated
    losses = {step: own["val_inter_loss"] for step, own in held_out(out).items()}
    step = min(losses, key=losses.get)
    best = torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)["simipu3d"]
    assert best["best"] == {"value": pytest.approx(losses[step], rel=1e-6), "step": step}
    assert best["global_step"] == step
    assert checkpoint(out)["simipu3d"]["best"] == best["best"], "the last one remembers it"
    said = [line for line in lines if "held out:" in line]
    assert len(said) == STEPS // 2
    number = r"\d+\.\d{3} of \d+\.\d\d \(top-1 \d+\.\d%\)"
    assert re.fullmatch(rf"step 2/{STEPS}  held out:  intra {number}  inter {number}", said[0])
    assert f"inter {losses[2]:.3f} of" in said[0]


@pytest.mark.parametrize(("stop", "sets"), [(4, ["data.num_workers=2"]), (6, [])])
def test_a_run_that_goes_on_keeps_the_best(validated, tiny, tmp_path, stop, sets):
    """Stopped at the end of an epoch and inside one, both times at a step that is validated."""
    out, (whole, _) = tmp_path / "parts", validated
    pretrain(tiny, [*HELD_OUT, f"trainer.max_steps={stop}"], out=out)
    before = checkpoint(out)["simipu3d"]["best"]
    assert before == torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)["simipu3d"]["best"]
    pretrain(tiny, [*HELD_OUT, *sets], out=out, resume="")
    assert same_checkpoint(checkpoint(whole), checkpoint(out))
    assert held_out(out) == held_out(whole)
    assert trained(out) == trained(whole)
    one, other = (torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (whole, out))
    assert same_checkpoint(one, other)
    assert one["simipu3d"]["best"] == other["simipu3d"]["best"]


def test_the_largest_may_be_the_best(tiny, tmp_path):
    sets = [*HELD_OUT, "validate.metric=inter_loss", "validate.mode=max", "trainer.max_steps=4"]
    out = pretrain(tiny, sets, out=tmp_path / "run")
    losses = {step: own["val_inter_loss"] for step, own in held_out(out).items()}
    assert checkpoint(out)["simipu3d"]["best"]["step"] == max(losses, key=losses.get)


def test_a_number_that_nobody_measures_is_one_line(tiny, tmp_path, capfd):
    sets = [*HELD_OUT, "validate.metric=mean_average", "trainer.max_steps=2"]
    status, lines = call(capfd, "--cfg", tiny, "--out", tmp_path / "run", "--set", *sets)
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == 2
    assert len(errors) == 1
    assert "validate.metric: no held-out number is called mean_average; there are" in errors[0]
    assert "intra_loss, " in errors[0]


def test_held_out_frames_that_are_trained_on_are_counted(tiny, caplog):
    settings = load_settings(tiny, HELD_OUT)
    training = build_reader(settings.data)
    warn_of_overlap(training, build_reader(settings.validate_data))
    assert not caplog.records
    with_some = load_settings(tiny, [*HELD_OUT, "validate.data.split=train"])
    warn_of_overlap(training, build_reader(with_some.validate_data))
    assert "validate: 3 of 3 held-out frames are in the training list too" in caplog.text


def test_rates_follow_the_frames_of_a_step(tiny, tmp_path):
    """Four frames a step are a sixteenth of the reference: a sixteenth of the rates, or a quarter."""
    for rule, factor in (("linear", 1 / 16), ("sqrt", 1 / 4)):
        sets = [f"optim.scale_lr={rule}", "optim.reference_batch=64", "trainer.accumulate_grad_batches=2"]
        out = pretrain(tiny, [*sets, "trainer.max_steps=1"], out=tmp_path / rule)
        assert float(rows(out)[0]["lr_image"]) == pytest.approx(0.03 * factor)
        assert float(rows(out)[0]["lr_points"]) == pytest.approx(1e-3 * factor)


# ------------------------------------------------------------------------------------------- runs of version 0.1

YOUNGER = {
    "data": ("frustum",),
    "image_encoder": ("weights",),
    "optim": ("scale_lr", "reference_batch"),
    "trainer": ("check_val_every_n_epoch", "val_check_interval", "limit_val_batches"),
}
"""Keys that version 0.1 did not have."""


def as_written_by_the_old_version(config):
    """A resolved configuration in the layout of version 0.1."""
    old = {name: dict(block) if isinstance(block, dict) else block for name, block in config.items()}
    for block, keys in YOUNGER.items():
        for key in keys:
            old[block].pop(key, None)
    augment = old.pop("augment")
    old["data"]["augment"] = {**augment["points"], "joint_flip": augment["joint_flip"], "images": augment["images"]}
    old["data"]["load_boxes"] = True
    old["matching"]["map"] = old["image_encoder"].pop("map")
    return old


def test_a_run_of_the_old_version_goes_on(tiny, tiny_run, tmp_path):
    out = pretrain(tiny, ["trainer.max_steps=5"], out=tmp_path / "old")
    last = out / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    own = content["simipu3d"]
    own["config"] = as_written_by_the_old_version(own["config"])
    for key in ("best", "held_out", "class_names"):
        del own[key]
    torch.save(content, last)
    with open(out / "config.yaml", "w") as file:
        yaml.safe_dump(own["config"], file)
    pretrain(tiny, out=out, resume="")
    assert same_checkpoint(checkpoint(tiny_run), checkpoint(out))
    assert rows(out) == rows(tiny_run)


def test_the_middle_that_the_old_version_wrote_out_is_no_change():
    """Its default, the middle of KITTI's range, is what null means for KITTI; for another range it is a choice."""
    from simipu3d.moved_keys import upgrade

    old = {"name": "kitti", "point_range": [0, -40.0, -3, 70.4, 40, 1]}
    flat = {"rotation_centre": [35.2, 0.0, -1.0], "scale_centre": [0.0, 0.0, 0.0], "num_points": 5}
    points = upgrade({"data": {**old, "augment": flat}})["augment"]["points"]
    assert points == {"rotation_centre": None, "scale_centre": [0.0, 0.0, 0.0], "num_points": 5}
    other = {"name": "drive_world", "point_range": None, "augment": flat}
    assert upgrade({"data": other})["augment"]["points"] == flat
