"""Laws of the nuScenes reader: a made-up drive past standing landmarks, and the real key frame where there is one."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nuscenes_drive import (
    INTRINSIC,
    NUM_FRAMES,
    OBJECT_SPEED,
    SCENES,
    SIZE,
    STEP,
    about,
    back,
    camera_time,
    ego_pose,
    forth,
    landmarks,
    object_at,
    sensor_pose,
    turn,
    write_release,
)
from PIL import Image

from simipu3d.config import parse_part
from simipu3d.contracts.frame import EVERYTHING, Wants
from simipu3d.data.readers import nuscenes_rows
from simipu3d.data.readers.nuscenes import CAMERAS, NuScenesReader
from simipu3d.data.readers.nuscenes_boxes import read_annotations
from simipu3d.data.readers.nuscenes_rows import read_rows
from simipu3d.data.readers.nuscenes_splits import SPLITS
from simipu3d.data.readers.nuscenes_tables import pose_matrix
from simipu3d.engine.pretrain import pretrain
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.boxes import box_corners
from simipu3d.geometry.camera import project_points
from simipu3d.ops.rotated_iou import points_in_boxes
from simipu3d.registry import READERS


def open_nuscenes(root: Path, wants: Wants = EVERYTHING, **keys):
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    defaults = {"name": "nuscenes", "root": str(root), "version": "v1.0-mini", "split": "all"}
    return NuScenesReader(parse_part("data", READERS, {**defaults, **keys}), wants)


@pytest.fixture(scope="module")
def drive(tmp_path_factory) -> Path:
    """A release that tests only read."""
    return write_release(tmp_path_factory.mktemp("drive"))


@pytest.fixture
def root(tmp_path) -> Path:
    """A release that a test may damage."""
    return write_release(tmp_path)


def times(scene: int) -> list[int]:
    start = 1_500_000_000_000_000 + scene * 100_000_000
    return [start + frame * STEP for frame in range(NUM_FRAMES)]


def moved(matrix, xyz):
    return np.asarray(xyz, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


# Geometry: what stands still in the world stays where it is


@pytest.mark.parametrize("seed", range(10))
def test_a_pose_matrix_is_hamiltons_product(seed):
    rng = np.random.default_rng(seed)
    pose = {"rotation": about(rng.normal(size=3), rng.uniform(-4, 4)), "translation": rng.normal(size=3) * 100}
    points = rng.normal(size=(5, 3)) * 10
    matrix = pose_matrix(pose["translation"], 1.0001 * pose["rotation"])
    np.testing.assert_allclose(moved(matrix, points), [forth(pose, point) for point in points], atol=1e-9)


@pytest.mark.parametrize("num_sweeps", [1, 2, 5, 100])
def test_landmarks_of_all_scans_coincide(drive, num_sweeps):
    """Through each scan's own ego pose; a scene's first key frame has none before it, and no scan is taken from another
    scene."""
    reader = open_nuscenes(drive, num_sweeps=num_sweeps, features=["intensity", "ring", "time"])
    assert reader.point_columns == ("x", "y", "z", "intensity", "ring", "time")
    for index in range(len(reader)):
        scene, number = divmod(index, NUM_FRAMES)
        frame, truth = reader[index], landmarks(scene)
        num_scans = min(num_sweeps, 3 * number + 1)
        assert frame.points.shape == (num_scans * len(truth), 6)
        assert frame.points.dtype == np.float32
        scans = frame.points.reshape(num_scans, len(truth), 6)
        for age, scan in enumerate(scans):
            np.testing.assert_allclose(moved(frame.world_from_lidar, scan[:, :3]), truth, atol=1e-4)
            np.testing.assert_allclose(scan[:, 5], age * STEP / 3e6, atol=1e-5)
            np.testing.assert_allclose(scan[:, 3], np.arange(1, 61) % 6 / 5, atol=1e-6)
            assert np.array_equal(scan[:, 4], np.arange(1, 61) % 32)
        assert not num_scans > 1 or np.abs(scans[0, :, :3] - scans[1, :, :3]).max() < 1e-4


def test_the_axes_are_ours_and_lead_back_to_the_sensors_own(drive):
    frame = open_nuscenes(drive, min_distance=0.0)[0]
    raw = np.fromfile(next((drive / "samples/LIDAR_TOP").glob(f"*{times(0)[0]}*")), dtype="<f4").reshape(-1, 5)
    assert np.array_equal(frame.points[:, :3], np.stack([raw[:, 1], -raw[:, 0], raw[:, 2]], axis=1))
    assert np.array_equal(moved(frame.native_from_lidar, frame.points[:, :3]), raw[:, :3])
    assert frame.intensity_scale == 255
    assert np.array_equal(frame.points[:, 3] * np.float32(255), raw[:, 3])
    ahead = forth(ego_pose(times(0)[0]), [30, 0, 1.8])
    np.testing.assert_allclose(
        moved(np.linalg.inv(frame.world_from_lidar), ahead), [30 - 0.9, 0, 0], atol=0.4, err_msg="x is not forward"
    )


def test_pixels_go_through_both_ego_poses(drive):
    """Against the chain of quaternions from the world; with the lidar's ego pose for the camera they would be pixels
    off."""
    reader = open_nuscenes(drive)
    compared, farthest = 0, 0.0
    for index in range(len(reader)):
        scene, number = divmod(index, NUM_FRAMES)
        frame, time = reader[index], times(scene)[number]
        assert [camera.name for camera in frame.cameras] == list(CAMERAS)
        for camera in frame.cameras:
            pixels, depth, visible = project_points(
                torch.from_numpy(frame.points[:, :3]),
                torch.from_numpy(camera.image_from_camera),
                torch.from_numpy(camera.camera_from_lidar),
                SIZE,
            )
            for row in torch.nonzero(visible).flatten().tolist():
                for at, is_right in ((camera_time(time, camera.name), True), (time, False)):
                    xyz = back(sensor_pose(camera.name), back(ego_pose(at), landmarks(scene)[row]))
                    expected = np.array(INTRINSIC) @ xyz
                    error = np.abs(pixels[row].numpy() - expected[:2] / expected[2]).max()
                    if is_right:
                        assert error < 1e-3
                        assert abs(depth[row] - xyz[2]) < 1e-4
                        compared += 1
                    else:
                        farthest = max(farthest, error)
    assert compared > 100
    assert farthest > 1


def test_names_times_and_the_choice_of_cameras(drive):
    reader = open_nuscenes(drive, cameras=["CAM_BACK", "CAM_FRONT"])
    frame = reader[NUM_FRAMES + 1]
    assert [camera.name for camera in frame.cameras] == ["CAM_BACK", "CAM_FRONT"]
    assert (frame.frame_id, frame.sequence_id) == ("scene-0916-1", "scene-0916")
    assert frame.timestamp == pytest.approx(times(1)[1] * 1e-6, abs=1e-6)
    whole = open_nuscenes(drive)[NUM_FRAMES + 1]
    by_name = {camera.name: camera for camera in whole.cameras}
    for camera in frame.cameras:
        assert np.array_equal(camera.image, by_name[camera.name].image)
        assert np.array_equal(camera.camera_from_lidar, by_name[camera.name].camera_from_lidar)


def test_filters_keep_what_the_definition_keeps(drive):
    everything = open_nuscenes(drive, min_distance=0.0)[0]
    assert len(everything.points) == 61, "the car's own point is kept only without the filter"
    assert np.array_equal(open_nuscenes(drive)[0].points, everything.points[1:])
    low, high = [0, -60, -1], [60, 30, 2]
    ranged = open_nuscenes(drive, point_range=[*low, *high])[0]
    expected = [row for row in everything.points[1:] if all(low[a] < row[a] < high[a] for a in range(3))]
    assert 5 < len(expected) < 55
    assert np.array_equal(ranged.points, expected)
    seen = open_nuscenes(drive, frustum=True, cameras=["CAM_FRONT"])[0]
    assert 2 < len(seen.points) < 30


# Boxes


def test_boxes_and_velocities(drive):
    """The object moves evenly, so every finite difference is its speed, turned into the lidar frame."""
    reader = open_nuscenes(drive)
    lidar = sensor_pose("LIDAR_TOP")

    def into_lidar(ego, vector):
        x, y, z = turn(np.array(lidar["rotation"]) * [1, -1, -1, -1], turn(np.array(ego) * [1, -1, -1, -1], vector))
        return np.array([y, -x, z])

    for index in range(len(reader)):
        scene, number = divmod(index, NUM_FRAMES)
        boxes, time = reader[index].boxes, times(scene)[number]
        assert (boxes.names, boxes.attributes) == (("car",), ("vehicle.moving",))
        assert boxes.num_points.tolist() == [7 + number]
        assert (boxes.visibility.tolist(), boxes.ids) == ([number + 1], (f"{SCENES[scene]}-i0",))
        x, y, z = back(lidar, back(ego_pose(time), object_at(time)))
        np.testing.assert_allclose(boxes.center, [[y, -x, z]], atol=1e-6)
        assert boxes.size.tolist() == [[4.5, 1.8, 1.5]]
        rotation = ego_pose(time)["rotation"]
        heading = into_lidar(rotation, turn(about((0, 0, 1), 0.3 + number), [1, 0, 0]))
        np.testing.assert_allclose(np.exp(1j * boxes.yaw), np.exp(1j * np.arctan2(heading[1], heading[0])), atol=1e-9)
        np.testing.assert_allclose(boxes.velocity, [into_lidar(rotation, OBJECT_SPEED)[:2]], atol=1e-6)
    others = open_nuscenes(drive, keep_other_boxes=True)[1].boxes
    assert (others.names, others.attributes) == (("car", "animal"), ("vehicle.moving", ""))
    assert (others.visibility.tolist(), others.ids[1]) == ([2, 0], f"{SCENES[0]}-i1")
    assert open_nuscenes(drive, Wants())[0].boxes is None


def edit(root: Path, table: str, change) -> None:
    """Rewrite a table; `change` gets its rows and may return others."""
    path = root / "v1.0-mini" / f"{table}.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows) or rows))


def test_a_velocity_needs_a_neighbour_that_is_near_in_time(root):
    """Alone: unknown. One side: 1.5 s at most, both sides: 3 s."""

    def space(gap: int):
        def change(rows):
            for row in rows:
                number = int(row["token"][-1])
                row["timestamp"] = times(SCENES.index(row["scene_token"]))[0] + number * gap

        return change

    def velocities(gap: int) -> list[bool]:
        tables = root / "v1.0-mini"
        edit(root, "sample", space(gap))
        timestamps = np.array([row[0] for row in read_rows(tables / "sample.json", ("timestamp", "token"))])
        tokens = [row[0] for row in read_rows(tables / "sample.json", ("token", "timestamp"))]
        annotations = read_annotations(tables, tokens, timestamps, keep_others=False)
        speed = np.linalg.norm(annotations.velocity[:NUM_FRAMES], axis=1)
        known = np.isfinite(speed)
        np.testing.assert_allclose(speed[known], np.linalg.norm(OBJECT_SPEED) * STEP / gap, rtol=1e-6)
        return known.tolist()

    assert velocities(STEP) == [True, True, True]
    assert velocities(1_490_000) == [True, True, True]
    assert velocities(1_510_000) == [False, False, False]

    def cut(rows):
        for row in rows:
            if row["token"].endswith("2-b0"):
                row["prev"] = ""
            if row["token"].endswith("1-b0"):
                row["next"] = ""

    edit(root, "sample_annotation", cut)
    assert velocities(1_490_000) == [True, True, False]


def test_a_release_without_annotations_has_no_boxes(root):
    edit(root, "sample_annotation", lambda rows: rows.clear())
    assert open_nuscenes(root)[0].boxes is None


def test_a_frame_without_objects_has_empty_boxes(root):
    edit(root, "sample_annotation", lambda rows: [row for row in rows if "scene-0103" not in row["sample_token"]])
    reader = open_nuscenes(root)
    assert [len(reader[index].boxes) for index in (0, 3)] == [0, 1]
    assert reader[0].boxes.velocity.shape == (0, 2)


# Which frames?


def test_official_splits_have_their_sizes_and_share_no_scene():
    assert {name: len(scenes) for name, scenes in SPLITS.items()} == {
        "train": 700,
        "val": 150,
        "test": 150,
        "mini_train": 8,
        "mini_val": 2,
    }
    assert len({*SPLITS["train"], *SPLITS["val"], *SPLITS["test"]}) == 1000
    mini = {*SPLITS["mini_train"], *SPLITS["mini_val"]}
    assert len(mini) == 10
    assert mini < {*SPLITS["train"], *SPLITS["val"]}, "the small release is a part of the large one"


def test_splits_and_lists(drive, tmp_path):
    ids = tuple(f"{name}-{frame}" for name in SCENES for frame in range(NUM_FRAMES))
    assert open_nuscenes(drive).frame_ids == open_nuscenes(drive, split="mini_val").frame_ids == ids
    mine = tmp_path / "mine.txt"
    mine.write_text("scene-0916\n")
    assert open_nuscenes(drive, split="train", split_file=mine).frame_ids == ids[NUM_FRAMES:]
    for keys, words in (
        ({"split": "mini_train"}, ("8 of its 8 scenes", "scene-0061", "data.split=all", "data.split_file")),
        ({"split": "train"}, ("700 of its 700", "data.version=v1.0-trainval")),
        ({"split": "all", "split_file": mine}, ("split_file",)),
        ({"split": "nonsense"}, ("data.split", "mini_val")),
        ({"split": "val", "split_file": tmp_path / "none.txt"}, ("none.txt", "no such list")),
        ({"cameras": ["CAM_TOP"]}, ("data.cameras", "CAM_FRONT", "CAM_TOP")),
        ({"cameras": ["CAM_BACK", "CAM_BACK"]}, ("data.cameras", "each once")),
        ({"version": "v1.0-test", "split": "test"}, ("v1.0-test/scene.json", "no such table")),
    ):
        with pytest.raises(UserError) as error:
            open_nuscenes(drive, **keys)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), error.value
    for content, words in (("", "empty"), ("scene-0916\nscene-0916\n", "twice"), ("scene-0001\n", "1 of its 1 scenes")):
        mine.write_text(content)
        with pytest.raises(UserError, match=words):
            open_nuscenes(drive, split="train", split_file=mine)


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_table_is_read_in_pieces_as_it_is_whole(tmp_path, monkeypatch, indent):
    monkeypatch.setattr(nuscenes_rows, "CHUNK", 400)
    rng = np.random.default_rng(0)
    rows = [
        {"token": f"{n}]{{,", "b": rng.normal(size=3).tolist(), "c": "é" * int(rng.integers(0, 20))} for n in range(50)
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(read_rows(path, ("c", "b", "token"))) == [(row["c"], row["b"], row["token"]) for row in rows]
    whole = path.read_text(encoding="utf-8")
    for count in range(0, len(whole.rstrip()) - 1, 37):
        path.write_text(whole[:count], encoding="utf-8")
        with pytest.raises(UserError, match=r"table\.json"):
            list(read_rows(path, ("c", "b", "token")))
    path.write_text("[]")
    assert list(read_rows(path, ("c", "b"))) == []


# Bad input: one clear line each


def one(table: str, column: str, value, row: int = -1):
    """Set one value of one row of a table."""

    def damage(root: Path) -> None:
        edit(root, table, lambda rows: rows[row].update({column: value}))

    return damage


def drop(table: str, word: str):
    """Take the rows away whose token holds a word."""

    def damage(root: Path) -> None:
        edit(root, table, lambda rows: [row for row in rows if word not in row["token"]])

    return damage


def cut_table(root: Path) -> None:
    path = root / "v1.0-mini/ego_pose.json"
    path.write_text(path.read_text()[:-300])


KEY = f"LIDAR_TOP-{times(0)[1]}"
TABLE_DAMAGES = {
    "missing table": (lambda root: (root / "v1.0-mini/ego_pose.json").unlink(), ("ego_pose.json", "no such table")),
    "table cut short": (cut_table, ("ego_pose.json", "ends too early")),
    "no table": (lambda root: (root / "v1.0-mini/sample.json").write_text("{}"), ("sample.json", "no nuScenes table")),
    "missing column": (
        lambda root: edit(root, "sample", lambda rows: [{"token": row["token"]} for row in rows]),
        ("sample.json", "row 0 lacks a column of token, timestamp"),
    ),
    "calibration that matches nothing": (
        drop("calibrated_sensor", "CAM_BACK_LEFT"),
        ("sample_data.json", "samples/CAM_BACK_LEFT", "its calibration c-CAM_BACK_LEFT is not in calibrated_sensor"),
    ),
    "calibration of no sensor": (
        one("calibrated_sensor", "sensor_token", "s-none"),
        ("calibrated_sensor.json", "its sensor s-none is not in sensor.json"),
    ),
    "no such camera in the release": (
        drop("sensor", "s-CAM_FRONT_LEFT"),
        ("sensor.json", "has no sensor CAM_FRONT_LEFT", "RADAR_FRONT", "data.cameras"),
    ),
    "pose that matches nothing": (drop("ego_pose", KEY), ("ego_pose.json", KEY, "samples/LIDAR_TOP")),
    "pose of NaN": (one("ego_pose", "translation", [1.0, float("nan"), 0.0], 0), ("ego_pose.json", "token p-LIDAR")),
    "no unit quaternion": (one("ego_pose", "rotation", [1.0, 1.0, 0.0, 0.0], 0), ("ego_pose.json", "unit quaternion")),
    "no intrinsics": (one("calibrated_sensor", "camera_intrinsic", []), ("calibrated_sensor.json", "no 3 x 3")),
    "samples out of order": (
        one("sample", "timestamp", times(0)[0] - 1, 1),
        ("sample.json", "scene-0103", "timestamps out of order", "scene-0103-1"),
    ),
    "a word for a time": (one("sample_data", "timestamp", "noon", 0), ("sample_data.json", "'noon' is no integer")),
    "no samples": (
        lambda root: edit(root, "scene", lambda rows: [{**row, "first_sample_token": ""} for row in rows]),
        ("sample.json", "holds no sample"),
    ),
    "sample that is not there": (one("sample", "next", "nowhere", 0), ("sample.json", "scene-0103", "nowhere")),
    "key frame far from its sample": (
        one("sample_data", "timestamp", times(0)[0] + 10_000_000, 0),
        ("sample_data.json", "10.0 s off", "scene-0103-0"),
    ),
    "no key frame of a camera": (
        drop("sample_data", f"CAM_BACK-{camera_time(times(1)[0], 'CAM_BACK')}"),
        ("sample_data.json", "scene-0916-0 has no key frame of CAM_BACK", "data.cameras"),
    ),
    "sweeps out of order": (
        one("sample_data", "timestamp", times(0)[0], 9),
        ("sample_data.json", "timestamps out of order", "data.num_sweeps=1"),
    ),
    "sweep that is not there": (
        drop("sample_data", f"LIDAR_TOP-{times(0)[1] - STEP // 3 - 1}"),
        ("sample_data.json", "the scan before it", "data.num_sweeps=1"),
    ),
    "unknown instance": (one("sample_annotation", "instance_token", "i-none"), ("i-none is not in instance.json",)),
    "unknown category": (one("instance", "category_token", "k-none"), ("instance.json", "k-none")),
    "unknown attribute": (one("sample_annotation", "attribute_tokens", ["a-none"]), ("a-none is not in attribute",)),
    "unknown neighbour": (one("sample_annotation", "prev", "b-none"), ("sample_annotation.json", "b-none")),
    "size of NaN": (
        one("sample_annotation", "size", [float("nan"), 1.0, 1.0]),
        ("sample_annotation.json", "size [nan"),
    ),
    "a number for a token": (one("sample", "token", [1], 0), ("sample.json: row 0: token is [1], must be text",)),
    "null for a name": (
        one("sample_data", "filename", None, 3),
        ("sample_data.json: row 3: filename is null, must be text",),
    ),
    "a word for a height": (one("sample_data", "height", "9", 0), ('height is "9", must be an integer or null',)),
    "null for attributes": (one("sample_annotation", "attribute_tokens", None), ("is null, must be a list",)),
    "null for a count": (one("sample_annotation", "num_lidar_pts", None), ("is null, must be an integer",)),
    "size of zero": (one("sample_annotation", "size", [1.0, 0.0, 1.0]), ("sample_annotation.json", "size [1.0, 0.0")),
}


@pytest.mark.parametrize("name", TABLE_DAMAGES)
def test_tables_that_do_not_fit_together_are_one_clear_line(root, name):
    damage, words = TABLE_DAMAGES[name]
    damage(root)
    with pytest.raises(UserError) as error:
        open_nuscenes(root, num_sweeps=3)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert any(way_out in message for way_out in ("unpack", "data.")), message


def rewrite_scan(change):
    def damage(path: Path) -> None:
        points = np.fromfile(path, dtype="<f4").reshape(-1, 5)
        change(points).tofile(path)

    return damage


def with_nan(points):
    points[3, 1] = np.nan
    return points


SCAN, SWEEP = f"samples/LIDAR_TOP/{KEY}.pcd.bin", f"sweeps/LIDAR_TOP/LIDAR_TOP-{times(0)[0] + STEP // 3}.pcd.bin"
PICTURE = f"samples/CAM_BACK/CAM_BACK-{camera_time(times(0)[1], 'CAM_BACK')}.jpg"


def shrink(path: Path) -> None:
    image = Image.open(path)
    image.resize((80, 45)).save(path)


FILE_DAMAGES = {
    "missing scan": (SCAN, Path.unlink, "no such file"),
    "missing sweep": (SWEEP, Path.unlink, "no such file"),
    "missing image": (PICTURE, Path.unlink, "no such file"),
    "empty scan": (SCAN, lambda path: path.write_bytes(b""), "empty"),
    "empty sweep": (SWEEP, lambda path: path.write_bytes(b""), "empty"),
    "wrong file size": (SCAN, lambda path: path.write_bytes(path.read_bytes()[:1001]), "1001 bytes"),
    "NaN": (SWEEP, rewrite_scan(with_nan), "1 of 61 points are NaN"),
    "image of another size": (PICTURE, shrink, "the image is 45 x 80"),
    "image cut short": (PICTURE, lambda path: path.write_bytes(path.read_bytes()[:900]), "cut short"),
    "nothing but the car itself": (SCAN, rewrite_scan(lambda points: points[:1]), "data.min_distance"),
}


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_a_damaged_file_is_one_clear_line(root, name):
    file, damage, words = FILE_DAMAGES[name]
    damage(root / file)
    reader = open_nuscenes(root, num_sweeps=1 if "car" in name else 3)
    assert len(reader[0].points)
    with pytest.raises(BadFrameError) as error:
        reader[1]
    message = str(error.value)
    assert str(root / file) in message
    assert words in message
    assert "data.on_bad_frame=skip" in message
    assert "\n" not in message


def test_a_half_unpacked_download_is_told_at_once(root):
    for path in sorted((root / "samples/CAM_FRONT").iterdir())[NUM_FRAMES:]:
        path.unlink()
    with pytest.raises(UserError, match=r"samples/CAM_FRONT/.*: no such file.* 3 of the 6 .*scene-0916.*split_file"):
        open_nuscenes(root)
    assert len(open_nuscenes(root, cameras=["CAM_BACK"])) == 6


# The real key frame


def open_real(samples: Path, **keys):
    return open_nuscenes(samples / "nuscenes", **keys)


def test_real_points_fall_where_they_are_known_to_fall(samples):
    """Counts of whoever made the excerpt, by the devkit's rule: at least 1 m deep and 1 px inside the border."""
    frame = open_real(samples)[0]
    known = {"LEFT": 3696, "": 3053, "RIGHT": 3076}, {"LEFT": 4089, "": 4820, "RIGHT": 3369}
    expected = {
        f"CAM_{side}_{end}".rstrip("_"): count
        for side, counts in zip(("FRONT", "BACK"), known, strict=True)
        for end, count in counts.items()
    }
    counted = {}
    for camera in frame.cameras:
        assert camera.image.shape == (900, 1600, 3)
        pixels, depth, _ = project_points(
            torch.from_numpy(frame.points[:, :3]),
            torch.from_numpy(camera.image_from_camera),
            torch.from_numpy(camera.camera_from_lidar),
            (900, 1600),
            min_depth=1.0,
        )
        u, v = pixels.unbind(dim=1)
        counted[camera.name] = int(((depth > 1) & (u > 1) & (u < 1599) & (v > 1) & (v < 899)).sum())
    assert counted == expected
    assert 0 <= frame.points[:, 3].min() < 0.01
    assert 0.9 < frame.points[:, 3].max() <= 1


def test_real_boxes_hold_their_points(samples):
    """All 68, exactly, in the world where boxes stand upright; in the lidar frame up to its two degrees of tilt."""
    frame = open_real(samples, min_distance=0.0)[0]
    boxes, world_from_lidar = frame.boxes, frame.world_from_lidar
    xyz = frame.points[:, :3].astype(np.float64)
    heading = np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw), 0 * boxes.yaw], axis=1) @ world_from_lidar[:3, :3].T
    yaw = np.arctan2(heading[:, 1], heading[:, 0])
    upright = points_in_boxes(moved(world_from_lidar, xyz), moved(world_from_lidar, boxes.center), boxes.size, yaw)
    assert len(boxes) == 68
    assert np.array_equal(upright.sum(axis=1), boxes.num_points)
    ours = points_in_boxes(xyz, boxes.center, boxes.size, boxes.yaw).sum(axis=1)
    np.testing.assert_allclose(ours, boxes.num_points, rtol=0.11, atol=2)
    assert (np.abs(ours - boxes.num_points) <= 1).sum() >= 60


def test_real_boxes_are_seen_where_they_stand(samples):
    """Every corner that projects into an image is in front of it, and each box near the car is in some image."""
    frame = open_real(samples)[0]
    corners = torch.from_numpy(box_corners(frame.boxes.center, frame.boxes.size, frame.boxes.yaw)).reshape(-1, 3)
    seen = torch.zeros(len(corners), dtype=torch.bool)
    for camera in frame.cameras:
        _, _, visible = project_points(
            corners,
            torch.from_numpy(camera.image_from_camera),
            torch.from_numpy(camera.camera_from_lidar),
            (900, 1600),
        )
        seen |= visible
    assert seen.reshape(-1, 8).any(dim=1).all()


def test_pre_training_runs_on_the_real_key_frame(samples, tmp_path):
    """Two steps with six cameras and the recipe of the shipped configuration, small."""
    layer = "{sampler: d_fps, num_points: 32, radii: [4.0], num_samples: [8], mlps: [[8, 16]], aggregation: null}"
    out = pretrain(
        "configs/simipu/nuscenes.yaml",
        [
            f"data.root={samples / 'nuscenes'}",
            "data.version=v1.0-mini",
            "data.split=all",
            "data.batch_size=1",
            "data.num_workers=0",
            "augment.points.num_points=1024",
            "augment.images.resize_factor=[0.1, 0.1]",
            f"point_encoder.layers=[{layer}]",
            "image_encoder.name=resnet18",
            "image_encoder.output_stride=8",
            "contrast.dim=16",
            "trainer.max_steps=2",
            "trainer.max_epochs=2",
            "trainer.log_every_n_steps=1",
            "trainer.accelerator=cpu",
            "run.pictures_every_steps=0",
        ],
        out=tmp_path / "run",
    )
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("intra_loss", "inter_loss"))
