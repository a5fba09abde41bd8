"""Downstream runs: from a checkpoint or, said so, from scratch; scored as in their validation; and real data is learned."""

import csv
import json
import logging

import numpy as np
import pytest

from simipu3d.config import load_yaml
from simipu3d.data.loading.evaluation import make_evaluation_loader
from simipu3d.data.loading.loader import build_reader, wants_of
from simipu3d.engine.evaluate import evaluate
from simipu3d.engine.finetune import finetune, followed_input
from simipu3d.engine.pretrain import pretrain
from simipu3d.engine.settings import load_settings
from simipu3d.errors import UserError
from simipu3d.metrics.files.depth import score
from simipu3d.tools import evaluate as evaluate_tool

CFG = "configs/depth/drive_world.yaml"
TINY = [
    "data.num_frames=8",
    "data.batch_size=4",
    "data.image_size=[32,64]",
    "data.beams=16",
    "data.azimuth_step_deg=2.0",
    "validate.data.num_frames=6",
    "image_encoder.model_args.channels=[4,4,8,8]",
    "depth.channels=[4,4,4,8,8]",
    "trainer.max_epochs=4",
    "trainer.check_val_every_n_epoch=1",
    "run.keep_every_epochs=1",
]

PAIRS = """
method: depth
data: {{name: depth_list, root: {root}, split_file: {split_file}, crop: kb, batch_size: 2, num_workers: 0}}
augment: {{images: {{resize: factor, resize_factor: [0.25, 0.25], flip_probability: 0.0}}}}
image_encoder: {{name: resnet18, model_args: {{channels: [32, 64, 128, 256]}}}}
depth: {{channels: [32, 32, 64, 96, 128], mean_weight: 1.0, flip_test: false}}
optim: {{image: {{lr: 2e-3}}, head: {{lr: 2e-3}}}}
schedule: {{name: cosine, warmup_steps: 10}}
validate: {{data: {{batch_size: 2}}, metric: abs_rel}}
trainer: {{max_epochs: 500, check_val_every_n_epoch: 100, gradient_clip_val: 35.0}}
run: {{keep_every_epochs: null}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of eight steps, and its keys."""
    folder = tmp_path_factory.mktemp("finetune")
    sets = [*TINY, f"data.root={folder / 'frames'}"]
    return finetune(CFG, sets, out=folder / "run", init="scratch"), sets


def test_where_the_weights_come_from_must_be_said(tmp_path):
    with pytest.raises(UserError, match="--init scratch"):
        finetune(CFG, TINY, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_has_rows_for_last_best_and_kept_epochs_and_their_mean(run, tmp_path):
    out, sets = run
    rows = dict(evaluate(CFG, [out], sets, last=3, out=tmp_path))
    assert [name.split("/")[1] for name in rows][:3] == ["last", "best", "epoch_0001"]
    assert len(rows) == 2 + 4 + 1
    kept = [numbers for name, numbers in rows.items() if "/epoch_" in name][-3:]
    mean = rows["run/mean of 3 epochs"]
    for name, value in mean.items():
        assert value == pytest.approx(np.mean([numbers[name] for numbers in kept]))
    assert rows["run/last"] == rows["run/epoch_0004"]
    best = min(numbers["abs_rel"] for numbers in rows.values())
    assert rows["run/best"]["abs_rel"] == pytest.approx(best, rel=1e-5)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {row.pop("checkpoint"): row for row in written} == rows


def test_evaluate_gives_what_validation_gave(run):
    out, sets = run
    with open(out / "metrics.csv", newline="") as file:
        validated = [row for row in csv.DictReader(file) if row["val_score_abs_rel"]]
    ((_, numbers),) = evaluate(CFG, [out / "checkpoints" / "last.ckpt"], sets)
    for name, value in numbers.items():
        column = "val_loss" if name == "loss" else f"val_score_{name}"
        assert value == pytest.approx(float(validated[-1][column]), rel=1e-4)


def test_predictions_are_drawn_and_written_for_every_held_out_frame(run, tmp_path, capsys):
    out, sets = run
    arguments = ["--cfg", CFG, "--ckpt", str(out / "checkpoints/last.ckpt"), "--predict", str(tmp_path), "--set", *sets]
    assert evaluate_tool.main(arguments) == 0
    assert "abs rel" in capsys.readouterr().out
    for kind in ("depth", "truth", "pictures"):
        assert len(list((tmp_path / kind).glob("*.png"))) == 6
    ((_, numbers),) = evaluate(CFG, [out / "checkpoints" / "last.ckpt"], sets)
    from_files = score(tmp_path / "truth", tmp_path / "depth").values["mean"]
    assert from_files["abs_rel"] == pytest.approx(numbers["abs_rel"], rel=1e-2)  # a PNG knows 4 mm


def test_another_network_or_method_is_refused_in_one_line(run, tmp_path):
    out, sets = run
    with pytest.raises(UserError, match="tensors are missing or have another shape"):
        evaluate(CFG, [out / "checkpoints" / "last.ckpt"], [*sets, "depth.channels=[8,4,4,8,8]"])
    with pytest.raises(UserError, match="a checkpoint of the method 'depth'"):
        evaluate("configs/simipu/demo.yaml", [out / "checkpoints" / "last.ckpt"], [])
    with pytest.raises(UserError, match="holds no checkpoints"):
        evaluate(CFG, [tmp_path], sets)


def test_the_input_of_a_checkpoint_is_followed_unless_the_file_says_one(run, tmp_path, caplog):
    out, sets = run
    other = pretrain(CFG, [*sets, "image_encoder.input=caffe_bgr", "trainer.max_epochs=1"], out=tmp_path / "bgr")
    checkpoint = other / "checkpoints" / "last.ckpt"
    assert followed_input(CFG, sets, checkpoint) == ["image_encoder.input=caffe_bgr"]
    assert followed_input(CFG, [*sets, "image_encoder.input=imagenet_rgb"], checkpoint) == []
    assert followed_input(CFG, sets, out / "checkpoints" / "last.ckpt") == []
    with caplog.at_level(logging.INFO, logger="simipu3d"):
        tuned = finetune(CFG, [*sets, "trainer.max_epochs=1"], out=tmp_path / "tuned", init=str(checkpoint))
        finetune(CFG, [*sets, "trainer.max_epochs=2"], out=tuned, resume="", init=str(checkpoint))
    assert load_yaml(tuned / "config.yaml")["image_encoder"]["input"] == "caffe_bgr"
    assert "image_encoder.input: caffe_bgr follows" in caplog.text
    assert dict(evaluate(CFG, [tuned], sets))["tuned/last"]["abs_rel"] > 0


# -------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_two_real_kitti_pairs_are_overfitted(samples, tmp_path):
    """At a quarter of their size, AbsRel under 0.02 (0.017 when it was written)."""
    names = ("0000000005", "0000000050")
    (tmp_path / "list.txt").write_text("".join(f"image/{n}.png groundtruth_depth/{n}.png 707.0493\n" for n in names))
    (tmp_path / "pairs.yaml").write_text(
        PAIRS.format(root=samples / "kitti_depth", split_file=tmp_path / "list.txt"), encoding="utf-8"
    )
    out = finetune(tmp_path / "pairs.yaml", out=tmp_path / "run", init="scratch")
    ((_, numbers),) = evaluate(tmp_path / "pairs.yaml", [out / "checkpoints" / "last.ckpt"])
    assert numbers["abs_rel"] < 0.02


def row_only_abs_rel(settings) -> float:
    """Held-out AbsRel of the best constant for each image row: the weighted median that minimises it on the training frames."""
    low, high = settings.blocks.depth.scored_range
    truth = {}
    for data in (settings.data, settings.validate_data):
        reader = build_reader(data, wants_of(settings.needs))
        batches = make_evaluation_loader(data, settings.augment, settings.needs, reader=reader)
        truth[data.split] = np.concatenate([batch.truth.depth[0].numpy() for batch in batches])
    rows = []
    for values in truth["train"].transpose(1, 0, 2).reshape(truth["train"].shape[1], -1):
        known = np.sort(values[(values > low) & (values < high)])
        weights = np.cumsum(1 / known)
        rows.append(known[np.searchsorted(weights, weights[-1] / 2)] if len(known) else 1.0)
    errors = []
    for image in truth["val"]:
        known = (image > low) & (image < high)
        errors.append((np.abs(np.array(rows)[:, None] - image) / np.maximum(image, low))[known].mean())
    return float(np.mean(errors))


@pytest.mark.slow
def test_drive_world_is_learned_from_scratch(tmp_path):
    """Held-out AbsRel at least 30 % better than that of the best predictor that knows the row alone."""
    out = finetune(CFG, out=tmp_path / "run", init="scratch")
    ((_, numbers),) = evaluate(CFG, [out / "checkpoints" / "last.ckpt"])
    row_only = row_only_abs_rel(load_settings(CFG))
    assert numbers["abs_rel"] < 0.7 * row_only
