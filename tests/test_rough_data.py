"""Unusual and damaged data sets: what a reader makes of them, or which line it says."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import waymo_drive
from custom_rig import write_sequence
from helpers import street
from nuscenes_drive import write_release
from shard_sets import open_shards
from test_kitti import CALIB, LABELS, open_kitti, write_frame, write_list

from simipu3d.config import apply_sets, load_yaml, parse_block, parse_part
from simipu3d.contracts.frame import EVERYTHING, Wants
from simipu3d.data.complete import write_complete
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.readers.custom import CustomConfig
from simipu3d.data.readers.files import parse_json, plain_name, read_bytes, text_of, unread_image
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.camera import distort
from simipu3d.registry import READERS

pytest_plugins = ("shard_fixtures",)
BOM = b"\xef\xbb\xbf"


def open_set(name: str, root: Path, wants: Wants = EVERYTHING, **keys):
    return build_reader(parse_part("data", READERS, {"name": name, "root": str(root), **keys}), wants)


def rewrite(path: Path, change) -> None:
    raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    change(raw)
    path.write_text(json.dumps(raw))


# Rows without a return


@pytest.fixture
def organised(tmp_path):
    """A custom drive whose scan has NaN, infinity, (0, 0, 0) and near rows among 100 measurements; classes number the rows."""
    frame = street(0)
    write_sequence(tmp_path / "drive", [frame], posed=False)
    rows = frame.points.copy()
    rows[:10, 1], rows[10:14, 3], rows[14:30, :3], rows[30:33, :3] = np.nan, np.inf, 0, (0.5, -0.5, 0.2)
    rows.tofile(tmp_path / "drive/scans/000000.bin")
    np.save(tmp_path / "drive/classes.npy", np.arange(100, dtype=np.uint8))
    names = [str(number) for number in range(100)]
    rewrite(tmp_path / "drive/sequence.json", lambda raw: raw["frames"][0].update(point_class="classes.npy"))
    rewrite(tmp_path / "drive/sequence.json", lambda raw: raw.update(class_names=names))
    return tmp_path, rows


def test_rows_without_a_return_are_dropped_with_their_truth_and_counted_once(organised, caplog):
    root, rows = organised
    with pytest.raises(BadFrameError, match=r"14 of 100 points are NaN or infinite .*data\.no_return=drop"):
        open_set("custom", root)[0]
    caplog.set_level(logging.INFO)
    reader = open_set("custom", root, no_return="drop", min_distance=0.74)
    for _ in range(2):
        frame = reader[0]
    kept = [
        n
        for n, (x, y, z, i) in enumerate(rows.tolist())
        if np.isfinite([x, y, z, i]).all() and x * x + y * y + z * z >= 0.74**2
    ]
    assert frame.point_class.tolist() == kept
    assert np.array_equal(frame.points, rows[kept])
    assert [n for n in kept if n < 33] == []
    (line,) = [record.getMessage() for record in caplog.records if "no_return" in record.getMessage()]
    assert "of 100 rows 14 are dropped as NaN or infinite, 0 as (0, 0, 0)" in line
    assert "19 as nearer" in line
    assert open_set("custom", root, no_return="drop")[0].point_class.tolist() == list(range(30, 100))


def test_many_zeros_are_refused_and_few_pass(organised):
    root, _ = organised
    for number, passes in ((2, True), (3, False)):
        sound = street(0).points
        sound[:number, :3] = 0
        sound.tofile(root / "drive/scans/000000.bin")
        if passes:
            assert len(open_set("custom", root)[0].points) == 100
            continue
        with pytest.raises(BadFrameError, match=r"3 of 100 rows are \(0, 0, 0\).*data\.no_return=drop"):
            open_set("custom", root)[0]
    np.zeros((5, 4), np.float32).tofile(root / "drive/scans/000000.bin")
    with pytest.raises(BadFrameError, match=r"none of its 5 rows measured anything.*5 \(0, 0, 0\)"):
        open_set("custom", root, wants=Wants(), no_return="drop")[0]


def test_every_reader_has_min_distance(tmp_path, whole):
    everything, cut = open_shards(whole)[3], open_shards(whole, min_distance=12.0)[3]
    kept = np.linalg.norm(everything.points[:, :3], axis=1) >= 12
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(cut.points, everything.points[kept])
    assert np.array_equal(cut.point_instance, everything.point_instance[kept])
    write_frame(tmp_path / "kitti", "training/000000")
    frames = [open_kitti(tmp_path / "kitti", split="all", min_distance=d, point_range=None)[0] for d in (0.0, 20.0)]
    assert np.array_equal(frames[1].points, frames[0].points[np.linalg.norm(frames[0].points[:, :3], axis=1) >= 20])
    waymo_drive.write_download(tmp_path / "waymo", waymo_drive.SEGMENTS[:1])
    keys = {"split": "all", "returns": 1, "no_label_zone": "keep"}
    near = len(open_set("waymo", tmp_path / "waymo", **keys)[1].points)
    far = len(open_set("waymo", tmp_path / "waymo", **keys, min_distance=30.0)[1].points)
    segment = waymo_drive.SEGMENTS[0]
    ranges = [
        waymo_drive.range_image(segment, waymo_drive.times(segment)[1], laser, 1)[..., 0] for laser in range(1, 6)
    ]
    assert near == sum((image > 0).sum() for image in ranges)
    assert far == sum((image >= 30).sum() for image in ranges)  # of each lidar's own ranges


# KITTI


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            CALIB.replace("R0_rect:", "R1:").replace("Tr_velo_to_cam:", "Tr:"),
            r"KITTI odometry: .*R0_rect: 1 0 0 0 1 0 0 0 1",
        ),
        (CALIB.replace("R0_rect:", "R_rect").replace("Tr_velo_to_cam:", "Tr_velo_cam"), "KITTI tracking: rename"),
        ("calib_time: 1\nS_02: 1 2\nP_rect_02: 1 2 3\n", r"raw data .*docs/custom_data\.md"),
        ("calib_time: 1\nR: 1 0 0\nT: 1 2 3\n", r"raw data \(calib_velo_to_cam"),
        (CALIB.replace("0.0075 -0.99997 -0.0006", "0 0 0"), r"R0_rect Tr_velo_to_cam holds no rotation"),
        (CALIB.replace("-0.99989 -0.076", "0.99989 -0.076"), "holds no rotation"),
    ],
    ids=["odometry", "tracking", "raw cameras", "raw lidar", "zeros", "flipped sign"],
)
def test_other_calibrations_of_kitti_are_named(tmp_path, text, words):
    write_frame(tmp_path, "training/000000")
    (tmp_path / "training/calib/000000.txt").write_text(text)
    with pytest.raises(BadFrameError, match=words) as error:
        open_kitti(tmp_path, split="all")[0]
    assert "\n" not in str(error.value)


def test_an_odometry_calibration_reads_after_its_way_out(tmp_path):
    """Tr holds the rectification, so that R0_rect is the identity: the projection stays."""
    for number in range(2):
        write_frame(tmp_path, f"training/{number:06d}")
    first = open_kitti(tmp_path, split="all")[0].cameras[0].camera_from_lidar
    transform = " ".join(f"{value:.12f}" for value in first[:3].ravel())
    lines = [line for line in CALIB.splitlines() if line.startswith("P")]
    lines += ["R0_rect: 1 0 0 0 1 0 0 0 1", f"Tr_velo_to_cam: {transform}"]
    (tmp_path / "training/calib/000001.txt").write_bytes(BOM + "\r\n".join(lines).encode())
    second = open_kitti(tmp_path, split="all")[1].cameras[0].camera_from_lidar
    np.testing.assert_allclose(second, first, atol=1e-9)


def test_tracking_labels_are_named(tmp_path):
    write_frame(tmp_path, "training/000000")
    (tmp_path / "training/label_2/000000.txt").write_text("0 1 " + LABELS.splitlines()[0])
    with pytest.raises(BadFrameError, match=r"line 1 .*\(0 1 Car\).*KITTI tracking.*without these two columns"):
        open_kitti(tmp_path, split="all")[0]


def test_frames_may_have_other_names_and_hidden_files_are_none(tmp_path):
    write_frame(tmp_path, "training/000000")
    for path in sorted(tmp_path.rglob("000000.*")):
        shutil.copy(path, path.with_name("left_7" + path.suffix))
        path.with_name("._" + path.name).write_bytes(b"macOS")
    assert open_kitti(tmp_path, split="all").frame_ids == ("training/000000", "training/left_7")
    write_list(tmp_path, "train", "left_7")
    assert open_kitti(tmp_path)[0].frame_id == "training/left_7"
    write_list(tmp_path, "train", "../../etc/passwd")
    with pytest.raises(UserError, match=r"leads out of data\.root"):
        open_kitti(tmp_path)


# nuScenes


def test_whole_scenes_are_named_and_listed(tmp_path):
    write_release(tmp_path / "set")
    (root, keys) = tmp_path / "set", {"version": "v1.0-mini", "split": "all"}
    config = parse_part("data", READERS, {"name": "nuscenes", "root": str(root), **keys})
    assert write_complete(config, tmp_path / "both.txt") == 2
    tables = json.loads((root / "v1.0-mini/sample_data.json").read_text())
    for row in tables:
        if row["sample_token"].startswith("scene-0103") and "CAM_BACK" in row["filename"]:
            (root / row["filename"]).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"whole are scene-0916 \(1\).*--list-complete"):
        build_reader(config)
    assert write_complete(config, tmp_path / "list.txt") == 1
    listed = open_set("nuscenes", root, version="v1.0-mini", split="val", split_file=str(tmp_path / "list.txt"))
    assert {listed[index].sequence_id for index in range(len(listed))} == {"scene-0916"}


@pytest.mark.parametrize(
    ("table", "column", "value", "words"),
    [
        ("sample_data", "filename", "/etc/passwd", "leads out of data.root"),
        ("sample_data", "filename", "samples/../../x", "leads out of data.root"),
        ("sample_data", "filename", "samples/" + "x" * 300, "cannot be a file's name"),
        ("sample_data", "filename", "a\0b", "cannot be a file's name"),
        ("sample_data", "filename", "\ud800", "half of a surrogate pair"),
        ("sample_data", "timestamp", 2**70, "no integer of microseconds"),
        ("sample_data", "height", 2**70, "height is 1.18"),
        ("sample", "timestamp", 2**70, "no integer of microseconds"),
        ("sample_annotation", "num_lidar_pts", 2**70, "must be an integer"),
        ("sample_annotation", "attribute_tokens", "@DEEP@", "nested too deep"),
    ],
)
def test_odd_values_in_tables_are_one_line(tmp_path, table, column, value, words):
    write_release(tmp_path)
    path = tmp_path / f"v1.0-mini/{table}.json"
    rewrite(path, lambda rows: rows[0].update({column: value}))
    path.write_text(path.read_text().replace('"@DEEP@"', "[" * 50_000 + "]" * 50_000))
    with pytest.raises(UserError, match=words) as error:
        open_set("nuscenes", tmp_path, version="v1.0-mini", split="all")
    assert "\n" not in str(error.value)


def test_tables_may_begin_with_a_byte_order_mark(tmp_path):
    write_release(tmp_path)
    for path in (tmp_path / "v1.0-mini").glob("*.json"):
        path.write_bytes(BOM + path.read_bytes())
    assert len(open_set("nuscenes", tmp_path, version="v1.0-mini", split="all")) == 6


# The custom layout


def test_names_with_blanks_marks_and_hidden_folders(tmp_path):
    path = write_sequence(tmp_path / "monday morning", [street(0)], posed=False)
    path.write_bytes(BOM + path.read_bytes())
    shutil.copytree(path.parent, tmp_path / "._monday morning")
    (tmp_path / "train.txt").write_bytes(BOM + b"monday morning\r\n\r\n")
    assert open_set("custom", tmp_path, split="train")[0].sequence_id == "monday morning"
    assert len(open_set("custom", tmp_path)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["frames"][0]["boxes"][0].update(num_points=2**70), "num_points"),
        (lambda raw: raw["cameras"][0].update(image_size=[100_000, 100_000]), "million pixels"),
        (lambda raw: raw["cameras"][0].update(distortion=[1e300, 0, 0, 0, 0]), "absurd"),
        (lambda raw: raw["frames"][0].update(id="\ud800"), "surrogate|not valid JSON"),
        (lambda raw: raw["frames"][0].update(points="/etc/passwd"), "stays inside"),
    ],
)
def test_odd_values_in_a_sequence_are_one_line(tmp_path, change, words):
    rewrite(write_sequence(tmp_path / "drive", [street(0)], posed=False), change)
    with pytest.raises(UserError, match=words) as error:
        open_set("custom", tmp_path)
    assert "\n" not in str(error.value)


def test_a_projection_may_be_off_by_a_rounding_error(tmp_path):
    path = write_sequence(tmp_path / "drive", [street(0)], posed=False)
    rewrite(path, lambda raw: raw["cameras"][0]["image_from_camera"][2].__setitem__(0, 1e-16))
    assert len(open_set("custom", tmp_path)[0].cameras) == 1


# Shared reading


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFrameError, match="pipe or a device"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe or a device"):
        text_of(tmp_path / "pipe")


def test_numbers_and_texts_of_json():
    digits = "9" * 5000
    assert parse_json(f"[{2**59}, {2**70}, {digits}]") == [2**59, float(2**70), float("inf")]
    assert parse_json(BOM + b'"\\ud83d\\ude00"') == "\U0001f600"
    for text in ('"\\ud800"', "[" * 50_000 + "]" * 50_000, "[1"):
        with pytest.raises(ValueError, match=r"surrogate|too deep|delimiter"):
            parse_json(text)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/../b", "..", "a//b", "a/", "./a", "a\0", "\ud800", "x" * 256, "a/" * 600 + "a"]
)
def test_names_that_leave_their_folder(name):
    assert not plain_name(name)
    assert plain_name("samples/a b.é")


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (10**9, 10**9), (2.0, 3.0), (3,)])
def test_no_image_has_this_size(size):
    with pytest.raises(BadFrameError, match=r"it\.json: an image of"):
        unread_image(size, "it.json")


@pytest.mark.parametrize(
    "k", [(-0.3, 0.1, 0.01), (0.2, -0.4, 0.0), (-0.5, 0.0, 0.0), (1e-320, 1e5, -1e6), (0.1, 0.2, 0.3)]
)
def test_the_radius_at_which_a_distortion_folds(k):
    """Just inside it the radial function grows, beyond it nothing is visible; a dense walk along the radius finds the same."""
    distortion = torch.tensor([k[0], k[1], 0, 0, k[2]], dtype=torch.float64)
    r = torch.linspace(1e-4, 3, 30_001, dtype=torch.float64)
    slope = 1 + 3 * k[0] * r**2 + 5 * k[1] * r**4 + 7 * k[2] * r**6
    grows = (slope > 0).to(torch.int64).cumprod(0).bool()
    seen = distort(torch.stack([r, torch.zeros_like(r)], 1), distortion)[:, 0].isfinite()
    assert (seen != grows).sum() <= 1


# Configurations


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: !!int x", "does not fit its tag"),
        ("data: !!timestamp x", "does not fit its tag"),
        ("data: !!set {a, b}", "is a set"),
        ("data: !!python/name:os.system", "could not determine a constructor"),
        ("data: &a {root: *a}", "nested deeper than"),
        ("data: &a [*a]", "nested deeper than"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{y}: &{y} [{f'*{x},' * 9}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
            "more than 100000",
        ),
        ("data: " + "[" * 5000 + "]" * 5000, "nested deeper"),
        (f"data: {2**70}", "too large"),
    ],
    ids=["int", "timestamp", "set", "python", "alias of a block", "alias of a list", "laughs", "deep", "large"],
)
def test_odd_configurations_are_one_line(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)
    assert load_yaml_of(tmp_path, "\ufeffdata: {x: 1}") == {"data": {"x": 1}}


def load_yaml_of(folder: Path, text: str):
    (folder / "y.yaml").write_text(text, encoding="utf-8")
    return load_yaml(folder / "y.yaml")


def test_a_key_with_a_hyphen_is_named():
    raw = apply_sets({"data": {"name": "custom", "root": "x"}}, ["data.batch-size=4"])
    with pytest.raises(UserError, match=r"data\.batch-size: no such key; did you mean batch_size\?"):
        parse_block("data", CustomConfig, raw["data"])


# Waymo without lidars


def test_a_download_without_lidars_is_looked_at_and_not_trained_on(tmp_path):
    waymo_drive.write_download(tmp_path, waymo_drive.SEGMENTS[:1])
    for name in ("lidar", "lidar_pose", "lidar_calibration"):
        shutil.rmtree(tmp_path / name)
    frame = open_set("waymo", tmp_path, split="all", lasers=[])[1]
    assert (len(frame.points), len(frame.cameras), len(frame.boxes)) == (0, 5, 1)
    assert len(open_set("waymo", tmp_path, Wants(points=False), split="all", lasers=[])[1].cameras) == 5
    with pytest.raises(UserError, match=r"data\.lasers: \[\] reads no lidar.*null reads all"):
        open_set("waymo", tmp_path, Wants(), split="all", lasers=[])


# KITTI raw


def test_the_script_for_kitti_raw_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    day = Path("raw/2011_09_26")
    drive = day / "2011_09_26_drive_0001_sync"
    frame = street(0)
    write_sequence(drive, [frame], posed=False)
    (drive / "image_02/data").mkdir(parents=True)
    (drive / "velodyne_points/data").mkdir(parents=True)
    (drive / "front/000000.png").rename(drive / "image_02/data/0000000000.png")
    (drive / "scans/000000.bin").rename(drive / "velodyne_points/data/0000000000.bin")
    (drive / "sequence.json").unlink()
    camera = frame.cameras[0]
    rectify = np.linalg.qr(np.eye(3) + 0.01 * np.arange(9).reshape(3, 3) % 0.05)[0]
    rectify *= np.sign(np.diag(rectify))
    own = rectify.T @ camera.camera_from_lidar[:3, :3]

    def row(values):
        return " ".join(f"{value:.9e}" for value in np.ravel(values))

    (day / "calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\ncorner_dist: 9.95e-02\nS_rect_02: 9.6e+01 6.4e+01\n"
        f"R_rect_00: {row(rectify)}\nP_rect_02: {row(camera.image_from_camera)}\n"
    )
    (day / "calib_velo_to_cam.txt").write_text(
        f"calib_time: 15-Mar-2012 11:37:16\nR: {row(own)}\nT: 0 0 0\ndelta_f: 0 0\n"
    )
    manual = (Path(__file__).parents[1] / "docs/custom_data.md").read_text()
    code = manual.partition("## From KITTI raw")[2].partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "docs/custom_data.md", "exec"), {})
    read = open_set("custom", day)[0]
    assert np.array_equal(read.points, frame.points)
    assert np.array_equal(read.cameras[0].image, camera.image)
    np.testing.assert_allclose(read.cameras[0].camera_from_lidar, camera.camera_from_lidar, atol=1e-8)
