"""`simipu3d score`: every bad input is one line and status 2, the rest ends with tables and numbers."""

import json

import numpy as np
import pytest
from nuscenes_boxes import random_sets
from PIL import Image
from test_metrics_kitti import random_frames
from test_metrics_waymo import random_sets as random_waymo

from simipu3d.metrics.files import kitti, nuscenes, waymo
from simipu3d.metrics.files.depth import write_depth
from simipu3d.tools.main import main

NAMES = [f"{number:06d}" for number in range(6)]


@pytest.fixture
def benchmark(tmp_path):
    """Sound truth and predictions of every benchmark; returns the command line of one."""
    truth, found = random_frames(0, len(NAMES))
    kitti.write_folder(tmp_path / "kitti_gt", dict(zip(NAMES, truth, strict=True)), with_score=False)
    kitti.write_folder(tmp_path / "kitti_pred", dict(zip(NAMES, found, strict=True)))
    truth, found, ego_xy = random_sets(0)
    tokens = [f"t{number}" for number in range(len(ego_xy))]
    nuscenes.write_submission(tmp_path / "nuscenes_gt", tokens, truth, ego_xy=ego_xy)
    nuscenes.write_submission(tmp_path / "nuscenes_pred", tokens, found)
    truth, found = random_waymo(0)
    frames = [waymo.FrameName("s", number) for number in range(22)]
    waymo.write_objects(tmp_path / "waymo_gt", frames, truth, with_score=False)
    waymo.write_objects(tmp_path / "waymo_pred", frames, found)
    for side in ("gt", "pred"):
        (tmp_path / f"depth_{side}").mkdir()
        for name in NAMES[:2]:
            write_depth(tmp_path / f"depth_{side}" / f"{name}.png", np.full((20, 30), 7.0))

    def command(name: str, *more: str) -> list[str]:
        paths = ["--gt", str(tmp_path / f"{name}_gt"), "--pred", str(tmp_path / f"{name}_pred")]
        return ["score", "--benchmark", name, *paths, *more]

    return command


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kitti", ["Car 3D box", "R40 moderate", "overall"]),
        ("nuscenes", ["NDS", "mAAE", "traffic_cone"]),
        ("waymo", ["L2 mAPH", "VEHICLE 50 m to inf m", "mean of vehicle"]),
        ("depth", ["abs rel", "delta3"]),
    ],
)
def test_tables_and_numbers(benchmark, tmp_path, capsys, name, words):
    assert main(benchmark(name, "--json", str(tmp_path / "out.json"))) == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["benchmark"] == name
    assert len(content) > 3


def error_of(capsys, arguments: list[str]) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


CAR = "Car 0 0 0.1 10 10 90 90 1.5 1.6 4 0 1.7 20 0.1"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (CAR.rsplit(" ", 1)[0], "line 1 has 14 columns"),
        (CAR, "line 1 has no score"),
        (f"{CAR} 0.5\nBus{CAR[3:]} 0.5", "line 2: unknown class 'Bus'"),
        (CAR.replace("20", "nan") + " 0.5", "line 1 holds NaN"),
        (CAR.replace("20", "x") + " 0.5", "is no number"),
    ],
)
def test_kitti_files(benchmark, tmp_path, capsys, lines, message):
    path = tmp_path / "kitti_pred" / "000003.txt"
    path.write_text(lines + "\n")
    found = error_of(capsys, benchmark("kitti"))
    assert found.startswith(f"error: {path}: line")
    assert message in found


def test_absent_frames(benchmark, tmp_path, capsys):
    (tmp_path / "kitti_pred" / "000003.txt").unlink()
    found = error_of(capsys, benchmark("kitti"))
    assert "1 of 6 frames are absent from --pred (first: 000003.txt)" in found
    frames = tmp_path / "val.txt"
    frames.write_text("000001\n000002\n")
    assert main(benchmark("kitti", "--frames", str(frames))) == 0
    capsys.readouterr()
    frames.write_text("000001\n000001\n")
    assert "names 000001 twice" in error_of(capsys, benchmark("kitti", "--frames", str(frames)))
    frames.write_text("000009\n")
    assert "absent from --pred" in error_of(capsys, benchmark("kitti", "--frames", str(frames)))
    assert "no such folder" in error_of(
        capsys, ["score", "--benchmark", "kitti", "--gt", "nowhere", "--pred", "nowhere"]
    )
    frames.unlink()
    parent = ["score", "--benchmark", "kitti", "--gt", str(tmp_path), "--pred", str(tmp_path)]
    assert "did you mean" in error_of(capsys, parent)
    assert "--split means nothing" in error_of(capsys, benchmark("kitti", "--split", "val"))
    assert "no such folder" in error_of(capsys, benchmark("kitti", "--json", str(tmp_path / "no" / "x.json")))


def edit(box, name, value):
    if value is None:
        del box[name]
    else:
        box[name] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("translation", [1.0, float("nan"), 0.0], "holds NaN"),
        ("translation", [1.0, 2.0], "translation must be 3 numbers"),
        ("size", [1.0, 0.0, 1.0], "size must be above 0"),
        ("size", [1.0, 10**400, 1.0], "size must be 3 numbers"),
        ("rotation", [0, 0, 0, 0], "no quaternion"),
        ("detection_score", None, "needs a detection_score"),
        ("detection_name", "tram", 'detection_name is "tram"; there are car, truck'),
        ("attribute_name", None, "attribute_name is null"),
        ("num_pts", 0.5, "num_pts must be an integer"),
    ],
)
def test_nuscenes_boxes(benchmark, tmp_path, capsys, name, value, message):
    path = tmp_path / "nuscenes_pred"
    content = json.loads(path.read_text())
    edit(content["results"]["t2"][1], name, value)
    path.write_text(json.dumps(content))
    found = error_of(capsys, benchmark("nuscenes"))
    assert f"{path}: sample t2, box 1" in found
    assert message in found


def test_nuscenes_samples(benchmark, tmp_path, capsys):
    path, whole = tmp_path / "nuscenes_pred", json.loads((tmp_path / "nuscenes_pred").read_text())

    def said(change) -> str:
        content = json.loads(json.dumps(whole))
        change(content["results"])
        path.write_text(json.dumps(content))
        return error_of(capsys, benchmark("nuscenes"))

    assert "1 of 6 samples are missing (first: t3)" in said(lambda results: results.pop("t3"))
    assert "1 samples are not among the 6" in said(lambda results: results.update(t9=[]))
    assert "has 501 boxes" in said(lambda results: results.update(t0=[results["t0"][0]] * 501))
    assert "must be a list of boxes" in said(lambda results: results.update(t0={}))
    path.write_text(json.dumps(whole)[:-100])
    assert "is cut short" in error_of(capsys, benchmark("nuscenes"))
    path.write_text("[]")
    assert "no mapping `results`" in error_of(capsys, benchmark("nuscenes"))
    tables = ["score", "--benchmark", "nuscenes", "--gt", str(tmp_path), "--pred", str(path)]
    assert "holds no table scene.json" in error_of(capsys, tables)


def test_waymo_files(benchmark, tmp_path, capsys):
    path, whole = tmp_path / "waymo_pred", (tmp_path / "waymo_pred").read_bytes()
    kind = waymo.message_class("Objects")

    def said(change) -> str:
        message = kind.FromString(whole)
        change(message.objects[4])
        path.write_bytes(message.SerializeToString())
        return error_of(capsys, benchmark("waymo"))

    assert "has no score" in said(lambda each: each.ClearField("score"))
    assert "has no box" in said(lambda each: each.object.ClearField("box"))
    assert "unknown type 9" in said(lambda each: setattr(each.object, "type", 9))
    assert "object 4 of frame s/" in said(lambda each: setattr(each.object.box, "center_x", float("nan")))
    assert "size below 0" in said(lambda each: setattr(each.object.box, "width", -1.0))
    path.write_bytes(whole[: len(whole) // 2 + 5])
    assert "cut in the middle" in error_of(capsys, benchmark("waymo"))
    message = kind.FromString(whole)
    for each in message.objects:
        each.context_name = b"other"
    path.write_bytes(message.SerializeToString())
    assert "is among the" in error_of(capsys, benchmark("waymo"))
    path.write_bytes(b"")
    assert main(benchmark("waymo")) == 0, "no prediction is a score of 0"


def test_depth_files(benchmark, tmp_path, capsys):
    path = tmp_path / "depth_pred" / "000001.png"
    write_depth(path, np.full((10, 30), 7.0))
    assert "is 30 x 10 pixels, and its truth 30 x 20" in error_of(capsys, benchmark("depth"))
    assert "holds no 352 x 1216" in error_of(capsys, benchmark("depth", "--kb-crop"))
    Image.fromarray(np.zeros((20, 30), dtype=np.uint8)).save(path)
    assert "is a picture of mode L" in error_of(capsys, benchmark("depth"))
    write_depth(path, np.random.default_rng(0).uniform(1, 80, (20, 30)))
    path.write_bytes(path.read_bytes()[:-500])
    assert "cut short" in error_of(capsys, benchmark("depth"))
    path.write_bytes(b"nothing")
    assert "is not an image" in error_of(capsys, benchmark("depth"))
    path.unlink()
    assert "absent from --pred (first: 000001.png)" in error_of(capsys, benchmark("depth"))
