"""Laws of the Waymo reader (format v2) and of range images: a made-up drive, and the real frame where there is one."""

import math
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from waymo_drive import (
    NUM_FRAMES,
    SEGMENTS,
    SIZES,
    SPEED,
    beams,
    camera_pose,
    laser_pose,
    objects,
    pixel_states,
    pose,
    range_image,
    range_shape,
    slow_pixel,
    slow_point,
    slow_points,
    stored_projection,
    times,
    vehicle_state,
    write_download,
)

from simipu3d.config import parse_part
from simipu3d.contracts.frame import EVERYTHING, Wants
from simipu3d.data.readers import parquet_rows, waymo_v2
from simipu3d.data.readers.parquet_rows import ParquetRows, Recent
from simipu3d.data.readers.waymo import WaymoReader
from simipu3d.data.readers.waymo_moment import CAMERA_NAMES, LASER_NAMES, WaymoRequest
from simipu3d.engine.pretrain import pretrain
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.boxes import BOX_EDGES, box_corners
from simipu3d.geometry.camera import project_points
from simipu3d.geometry.range_image import column_azimuths, range_image_points
from simipu3d.registry import READERS

LASERS = {name: number for number, name in LASER_NAMES.items()}
CAMERAS = {name: number for number, name in CAMERA_NAMES.items()}


def open_waymo(root: Path, wants: Wants = EVERYTHING, **keys):
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    block = {"name": "waymo", "root": str(root), "split": "all", **keys}
    return WaymoReader(parse_part("data", READERS, block), wants)


@pytest.fixture(scope="module")
def drive(tmp_path_factory) -> Path:
    """A download that tests only read."""
    return write_download(tmp_path_factory.mktemp("drive"))


@pytest.fixture
def root(drive, tmp_path) -> Path:
    """A download that a test may damage."""
    return Path(shutil.copytree(drive, tmp_path / "copy"))


def place(index: int) -> tuple[str, int]:
    """Segment and time of a frame of the made-up download."""
    segment, frame = divmod(index, NUM_FRAMES)
    return SEGMENTS[segment], times(SEGMENTS[segment])[frame]


def moved(matrix, xyz):
    return np.asarray(xyz, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def pixels_of(camera, xyz):
    """Pixels and which are visible, by the package's own projection."""
    pixels, _, visible = project_points(
        torch.from_numpy(np.asarray(xyz)),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera.camera_from_lidar),
        camera.image.shape[:2],
        distortion=torch.from_numpy(camera.distortion),
    )
    return pixels.numpy(), visible.numpy()


# Range images


def random_lidar(seed: int):
    """Ranges, keyword arguments of `range_image_points`, and the poses as `slow_point` wants them."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 7), rng.integers(1, 12)
    ranges = rng.uniform(-5, 70, (height, width)).astype(np.float32)
    inclinations = None if seed % 2 else np.sort(rng.uniform(-0.6, 0.3, height))
    limits = (-0.7, 0.4)
    vehicle_from_laser = pose(rng.uniform(-1, 1, 6) * [0.1, 0.1, 3.1, 2, 2, 2])
    states = rng.uniform(-1, 1, (height, width, 6)) * [0.1, 0.1, 3.1, 900, 900, 20]
    world_from_vehicle = pose(rng.uniform(-1, 1, 6) * [0.1, 0.1, 3.1, 900, 900, 20])
    return ranges, inclinations, limits, vehicle_from_laser, states, world_from_vehicle


@pytest.mark.parametrize("posed", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_points_of_a_range_image_agree_with_a_slow_loop(seed, posed):
    ranges, inclinations, limits, extrinsic, states, world = random_lidar(seed)
    extra = {"pixel_pose": states, "vehicle_from_world": np.linalg.inv(world)} if posed else {}
    xyz, pixels = range_image_points(ranges, inclinations, limits, extrinsic, **extra)
    assert pixels.tolist() == np.argwhere(ranges > 0).tolist()
    for point, (row, column) in zip(xyz, pixels.tolist(), strict=True):
        more = (states[row, column], world) if posed else ()
        expected = slow_point(ranges, row, column, inclinations, limits, extrinsic.tolist(), *more)
        np.testing.assert_allclose(point, expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_a_point_leads_back_to_its_pixel_and_range(seed):
    ranges, inclinations, limits, extrinsic, *_ = random_lidar(2 * seed)
    xyz, pixels = range_image_points(ranges, inclinations, limits, extrinsic)
    local = moved(np.linalg.inv(extrinsic), xyz)
    distance = np.linalg.norm(local, axis=1)
    np.testing.assert_allclose(distance, ranges[ranges > 0], rtol=1e-6)
    row = [
        len(inclinations) - 1 - np.abs(inclinations - math.asin(z / d)).argmin()
        for (_, _, z), d in zip(local, distance, strict=True)
    ]
    turn = np.exp(1j * column_azimuths(ranges.shape[1], extrinsic))
    column = [np.abs(turn - complex(x, y) / abs(complex(x, y))).argmin() for x, y, _ in local]
    assert np.array_equal(pixels, np.stack([row, column], axis=1).reshape(-1, 2))


def test_the_first_row_is_the_highest_beam_and_columns_run_clockwise():
    """By hand: four columns look back-right... of a lidar that is not turned: 135, 45, -45, -135 degrees."""
    xyz, _ = range_image_points(np.ones((2, 4)), np.array([-0.5, 0.5]), (0, 0), np.eye(4))
    level, half = math.cos(0.5), math.sqrt(0.5)
    expected = [[-half, half], [half, half], [half, -half], [-half, -half]]
    np.testing.assert_allclose(xyz[:4, :2] / level, expected, atol=1e-12)
    assert (xyz[:4, 2] > 0).all()
    assert (xyz[4:, 2] < 0).all()


def test_ranges_that_are_no_number_show():
    xyz, _ = range_image_points(np.array([[np.nan, 0.0, -1.0]]), None, (0, 0.1), np.eye(4))
    assert len(xyz) == 1
    assert np.isnan(xyz).all()


def test_a_wall_stays_flat_when_the_car_drives_past():
    """Ranges to a plane that stands in the world, each measured from where the car was at the pixel's time. Without the
    pixels' poses the wall would be bent."""
    time, normal = times(SEGMENTS[1])[2], np.array([0.6, 0.8, 0.0])
    inclinations, *limits = beams(1)
    height, width = range_shape(1)
    world = pose(vehicle_state(time))
    distance = normal @ world[:3, 3] + 12.0
    states = pixel_states(1, time).astype(np.float64)
    ranges = np.zeros((height, width))
    for row, column in np.ndindex(height, width):
        ends = []
        for length in (0.001, 1.0):
            one = np.full((height, width), length)
            ends.append(
                slow_point(
                    one, row, column, inclinations, limits, laser_pose(1).tolist(), states[row, column], np.eye(4)
                )
            )
        along = normal @ (ends[1] - ends[0]) / 0.999
        length = (distance - normal @ ends[0]) / along + 0.001 if abs(along) > 1e-6 else 0.0
        ranges[row, column] = length if 0 < length < 70 else 0.0
    posed = {"pixel_pose": states, "vehicle_from_world": np.linalg.inv(world)}
    with_motion, _ = range_image_points(ranges, np.array(inclinations), tuple(limits), laser_pose(1), **posed)
    without, _ = range_image_points(ranges, np.array(inclinations), tuple(limits), laser_pose(1))
    assert len(with_motion) > 20
    assert np.abs(moved(world, with_motion) @ normal - distance).max() < 1e-6
    assert np.abs(moved(world, without) @ normal - distance).max() > 0.2


# Frames


@pytest.mark.parametrize("returns", [1, 2])
def test_points_are_those_that_were_written(drive, returns):
    reader = open_waymo(drive, returns=returns, no_label_zone="keep", features=["intensity", "elongation"])
    assert reader.point_columns == ("x", "y", "z", "intensity", "elongation")
    assert len(reader) == len(SEGMENTS) * NUM_FRAMES
    for index in range(len(reader)):
        segment, time = place(index)
        frame = reader[index]
        expected = []
        for laser in LASER_NAMES:
            for number in range(1, returns + 1):
                image, points = range_image(segment, time, laser, number), slow_points(segment, time, laser, number)
                for row, column in np.argwhere(image[..., 0] > 0).tolist():
                    intensity, elongation = image[row, column, 1:3].tolist()
                    expected.append([*points[row, column], math.tanh(intensity), elongation])
        np.testing.assert_allclose(frame.points, expected, atol=5e-4)
        assert frame.points.dtype == np.float32
        assert frame.frame_id == f"{segment}/{time}"
        assert frame.sequence_id == segment
        assert frame.timestamp == pytest.approx(time * 1e-6, abs=1e-6)
        np.testing.assert_allclose(frame.world_from_lidar, pose(vehicle_state(time)))
        assert 0 <= frame.points[:, 3].min() <= frame.points[:, 3].max() <= 1


def test_no_label_zones(drive):
    flags = [range_image(*place(5), laser, number) for laser in LASER_NAMES for number in (1, 2)]
    inside = sum(int(((image[..., 0] > 0) & (image[..., 3] == 1)).sum()) for image in flags)
    kept, dropped = (open_waymo(drive, no_label_zone=word)[5].points for word in ("keep", "drop"))
    assert inside > 5
    assert len(kept) - len(dropped) == inside
    assert {row.tobytes() for row in dropped} < {row.tobytes() for row in kept}


def test_a_choice_of_lidars_and_cameras_is_a_part_of_the_whole(drive):
    whole = open_waymo(drive)[6]
    assert [camera.name for camera in whole.cameras] == list(CAMERAS)
    frame = open_waymo(drive, lasers=["REAR", "TOP"], cameras=["SIDE_LEFT", "FRONT"])[6]
    by_name = {camera.name: camera for camera in whole.cameras}
    assert [camera.name for camera in frame.cameras] == ["SIDE_LEFT", "FRONT"]
    for camera in frame.cameras:
        assert np.array_equal(camera.image, by_name[camera.name].image)
        assert np.array_equal(camera.camera_from_lidar, by_name[camera.name].camera_from_lidar)
        assert camera.image.shape == (*SIZES[CAMERAS[camera.name]], 3)
    single = {name: open_waymo(drive, lasers=[name])[6].points for name in LASERS}
    assert np.array_equal(frame.points, np.concatenate([single["REAR"], single["TOP"]]))
    assert np.array_equal(whole.points, np.concatenate(list(single.values())))


def test_pixels_go_through_the_exposures_own_pose(drive):
    """Every point, in every camera, against the formulae one by one; half a pixel lies between the conventions."""
    reader, seen = open_waymo(drive), 0
    for index in (1, 7, 10):
        _, time = place(index)
        frame = reader[index]
        for camera in frame.cameras:
            pixels, visible = pixels_of(camera, frame.points[:, :3])
            for row, point in enumerate(frame.points[:, :3].astype(np.float64)):
                expected = slow_pixel(CAMERAS[camera.name], time, point)
                if expected is None:
                    assert not visible[row] or np.linalg.norm(point[:2]) < 4 or _wide(camera, point)
                else:
                    np.testing.assert_allclose(pixels[row], np.array(expected) - 0.5, atol=1e-4)
                    assert visible[row]
                    seen += 1
    assert seen > 200


def _wide(camera, point) -> bool:
    """Beyond the angle at which the slow loop stops."""
    x, y, z = moved(camera.camera_from_lidar, point)
    return (x / z) ** 2 + (y / z) ** 2 > 0.99


def test_stored_projections_are_ours_to_half_a_pixel(drive):
    """The files hold whole numbers; through the frame's own pose instead of the exposure's they would not agree."""
    reader = open_waymo(drive, no_label_zone="keep", point_range=[0, -1, -1, 1, 1, 1])
    compared, farthest = 0, 0.0
    for index in range(0, len(reader), 3):
        stored = reader.stored_projections(index)
        frame = open_waymo(drive, no_label_zone="keep")[index]
        held = {row.tobytes() for row in frame.points[:, :3]}
        written = [stored_projection(*place(index), laser, number) for laser in LASER_NAMES for number in (1, 2)]
        named = np.concatenate([image[..., ::3].ravel() for image in written])
        assert list(stored) == list(CAMERAS)
        for camera in frame.cameras:
            points, pixels = stored[camera.name]
            ours, visible = pixels_of(camera, points)
            assert visible.all()
            assert len(points) == (named == CAMERAS[camera.name]).sum()
            assert {row.tobytes() for row in points} <= held
            assert np.abs(ours - pixels).max() < 0.5 + 1e-3
            compared += len(points)
            still = replace(camera, camera_from_lidar=without_motion(CAMERAS[camera.name]))
            other, visible = pixels_of(still, points)
            farthest = max(farthest, np.abs(other - pixels)[visible].max())
    assert compared > 300
    assert farthest > 1.5


def without_motion(camera: int) -> np.ndarray:
    """Camera from lidar as if all were measured at once; a row each for right, down and out of the lens."""
    return np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]) @ np.linalg.inv(camera_pose(camera))


def test_filters_keep_what_the_definition_keeps(drive):
    everything = open_waymo(drive)[3].points
    low, high = [0, -30, -2], [40, 10, 3]
    ranged = open_waymo(drive, point_range=[*low, *high])[3].points
    expected = [row for row in everything if all(low[a] < row[a] < high[a] for a in range(3))]
    assert 5 < len(expected) < len(everything) - 5
    assert np.array_equal(ranged, expected)
    seen = open_waymo(drive, frustum=True, cameras=["FRONT"])[3]
    assert 2 < len(seen.points) < len(everything) / 3
    with pytest.raises(BadFrameError, match=r"none of its \d+ points is left after data.point_range"):
        open_waymo(drive, point_range=[-0.1, -0.1, -0.1, 0.1, 0.1, 0.1])[3]


def test_boxes(drive):
    """Their speed is given along the world's axes, their place in the vehicle frame."""
    reader = open_waymo(drive)
    for index in range(NUM_FRAMES):
        boxes, labels = reader[index].boxes, objects(index)
        assert len(boxes) == index
        assert boxes.names == ("VEHICLE", "PEDESTRIAN", "CYCLIST", "SIGN")[:index]
        assert boxes.center.tolist() == [list(label["box.center"]) for label in labels]
        assert boxes.size.tolist() == [list(label["box.size"]) for label in labels]
        assert boxes.yaw.tolist() == [label["box.heading"] for label in labels]
        assert boxes.num_points.tolist() == [5, 6, 300, 2][:index]
        assert boxes.ids == tuple(f"object-{number}" for number in range(index))
        assert boxes.image_boxes is None, "this download has no projected boxes"
        assert boxes.difficulty.tolist() == [2, 1, 2, 1][:index]
        world = pose(vehicle_state(place(index)[1]))
        ahead = np.linalg.inv(world) @ (world @ [0, 0, 0, 1] + [*SPEED, 0])
        np.testing.assert_allclose(boxes.velocity, np.tile(ahead[:2], (index, 1)), atol=1e-9)
    assert open_waymo(drive, Wants())[2].boxes is None


def test_a_download_without_labels_has_no_boxes(root):
    shutil.rmtree(root / "lidar_box")
    assert open_waymo(root)[2].boxes is None


def test_without_lidars_images_and_boxes_can_still_be_looked_at(root):
    for component in ("lidar", "lidar_pose", "lidar_calibration"):
        shutil.rmtree(root / component)
    with pytest.raises(UserError, match=r"data\.lasers=\[\]"):
        open_waymo(root)
    frame = open_waymo(root, lasers=[], features=["elongation"])[2]
    assert frame.points.shape == (0, 4)
    assert frame.points.dtype == np.float32
    assert len(frame.cameras) == 5
    assert len(frame.boxes) == 2


# Which frames?


def ids(reader) -> list[str]:
    return [reader[index].frame_id for index in range(len(reader))]


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"split": "train"}, "data.version=v2 and data.split=all"),
        ({"version": "v1"}, "data.version=v2 and data.split=all"),
        ({"version": "v1", "split": "val"}, "data.version=v2 and data.split=all"),
    ],
)
def test_files_that_lie_elsewhere_are_told(drive, keys, hint):
    with pytest.raises(UserError, match=f"{re.escape(str(drive))} has .*{hint}"):
        open_waymo(drive, **keys)


def test_records_that_lie_elsewhere_are_told(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "a.tfrecord").touch()
    for keys in ({"split": "train"}, {"split": "val"}, {"version": "v1", "split": "test"}):
        with pytest.raises(UserError, match=r"data\.version=v1 and data\.split=val"):
            open_waymo(tmp_path, **keys)


def test_fractions_and_intervals(drive):
    quick = {"lasers": [], "cameras": ["FRONT"], "wants": Wants(points=False)}
    whole = ids(open_waymo(drive, **quick))
    assert whole == [f"{segment}/{time}" for segment in SEGMENTS for time in times(segment)]
    for cut in (0.2, 1 / 3, 0.5, 2 / 3, 0.8):
        first, second = (open_waymo(drive, fraction=part, **quick) for part in ([0.0, cut], [cut, 1.0]))
        assert ids(first) + ids(second) == whole
        assert not set(first.segments) & set(second.segments)
    for interval in (1, 2, 3, 5, 100):
        assert ids(open_waymo(drive, load_interval=interval, **quick)) == whole[::interval]
    both = open_waymo(drive, fraction=[1 / 3, 1.0], load_interval=3, **quick)
    assert ids(both) == whole[NUM_FRAMES:][::3]
    with pytest.raises(UserError, match=r"data.fraction: .* of 3 segments is none"):
        open_waymo(drive, fraction=[0.0, 0.1], **quick)


def test_splits_and_lists(drive, tmp_path):
    (tmp_path / "training").symlink_to(drive)
    assert open_waymo(tmp_path, split="train").segments == SEGMENTS
    mine = tmp_path / "mine.txt"
    mine.write_text(f"segment-{SEGMENTS[2]}_with_camera_labels.tfrecord\n{SEGMENTS[0]}\n")
    assert open_waymo(drive, split_file=mine).segments == (SEGMENTS[0], SEGMENTS[2])
    for content, words in (
        ("", "empty"),
        (f"{SEGMENTS[0]}\n{SEGMENTS[0]}.parquet\n", "twice"),
        ("12_0_1_2\n", "1 of its 1 segments are not in"),
    ):
        mine.write_text(content)
        with pytest.raises(UserError, match=words):
            open_waymo(drive, split_file=mine)
    for keys, words in (
        ({"split": "train"}, ("training: holds no vehicle_pose", "data.split=all")),
        ({"split": "nonsense"}, ("data.split", "train")),
        ({"version": "v7"}, ("data.version", "v2")),
        ({"cameras": ["REAR"]}, ("data.cameras", "FRONT_LEFT")),
        ({"lasers": ["TOP", "TOP"]}, ("lasers", "twice")),
        ({"lasers": ["LEFT"]}, ("data.lasers", "SIDE_LEFT")),
        ({"returns": 3}, ("data.returns",)),
        ({"fraction": [0.5, 0.2]}, ("fraction",)),
        ({"load_interval": 0}, ("data.load_interval",)),
        ({"split_file": tmp_path / "none.txt"}, ("none.txt", "no such list")),
    ):
        with pytest.raises(UserError) as error:
            open_waymo(drive, **keys)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), error.value


# What is read, and by whom


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[str, int, tuple[str, ...]]]:
    """Component, row group and columns of everything that is decoded beside key columns."""
    log = []
    original = ParquetRows._read_group

    def spy(self, group, wanted, columns):
        log.append((self.path.parent.name, group, tuple(columns)))
        return original(self, group, wanted, columns)

    monkeypatch.setattr(ParquetRows, "_read_group", spy)
    return log


def test_only_what_is_asked_for_is_decoded(drive, decoded):
    reader = open_waymo(drive, returns=1, cameras=["SIDE_RIGHT"], lasers=["REAR"], wants=Wants())
    decoded.clear()
    reader[0]
    assert {component for component, _, _ in decoded} == {"vehicle_pose", "camera_image", "lidar"}
    assert not any("return2" in column for _, _, columns in decoded for column in columns)
    decoded.clear()
    reader[3]
    groups = {component: group for component, group, _ in decoded}
    assert len(decoded) == len(groups)
    assert groups == {"vehicle_pose": 0, "camera_image": 19 // 7, "lidar": 19 // 7}
    decoded.clear()
    reader.stored_projections(3)
    assert "lidar_camera_projection" in {component for component, _, _ in decoded}
    decoded.clear()
    open_waymo(drive)[3]
    assert {"lidar_pose", "lidar_box"} < {component for component, _, _ in decoded}
    assert "lidar_camera_projection" not in {component for component, _, _ in decoded}


@pytest.mark.parametrize("row_group_size", [1, 3, 1000])
@pytest.mark.parametrize("batch_bytes", [1, 3000, 1 << 25])
def test_rows_do_not_depend_on_row_groups_and_batches(tmp_path, monkeypatch, row_group_size, batch_bytes):
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", batch_bytes)
    rng = np.random.default_rng(row_group_size)
    table = pa.table(
        {
            "owner": rng.choice(["a", "b"], 50).tolist(),
            "key": rng.integers(0, 9, 50),
            "x": [rng.normal(size=n % 7).tolist() for n in range(50)],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=row_group_size)
    file = ParquetRows(tmp_path / "t.parquet", ("owner", "a"), ("key",))
    mine = [row for row in table.to_pylist() if row["owner"] == "a"]
    assert file.keys["key"].tolist() == [row["key"] for row in mine]
    for key in range(10):
        found = file.read(file.rows[file.keys["key"] == key], ("x", "key"))
        assert found.to_pylist() == [{"x": row["x"], "key": key} for row in mine if row["key"] == key]


def test_a_large_row_group_is_decoded_once_when_it_is_read_in_order(tmp_path, monkeypatch):
    """And any other order gives the same rows."""
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 400)
    table = pa.table(
        {"owner": ["a"] * 60, "key": [n // 2 for n in range(60)], "x": [[float(n)] * 5 for n in range(60)]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    file = ParquetRows(tmp_path / "t.parquet", ("owner", "a"), ("key",), Recent(2))
    begun, real = [], file.file
    fake = SimpleNamespace(metadata=real.metadata, schema_arrow=real.schema_arrow)
    fake.iter_batches = lambda *args, **keys: begun.append(args) or real.iter_batches(*args, **keys)
    monkeypatch.setattr(file, "file", fake)

    def check(key: int, columns: tuple[str, ...] = ("x",)) -> None:
        found = file.read(file.rows[file.keys["key"] == key], columns)
        assert found["x"].to_pylist() == table["x"].to_pylist()[2 * key : 2 * key + 2]

    for key in range(30):
        check(key)
    assert len(begun) == 1
    assert len(file.streams) == 0, "nothing is kept of a row group that was read to its end"
    rng = np.random.default_rng(0)
    for key in rng.integers(0, 30, 100).tolist():
        check(key, ("x",) if rng.random() < 0.5 else ("key", "x"))
        assert len(file.streams) <= 2
    assert len(begun) < 101


def test_batches_are_bounded_by_what_they_decode_to(tmp_path, monkeypatch):
    """Repeated numbers take next to no place in the file."""
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 40_000)
    table = pa.table({"owner": ["a"] * 30, "key": list(range(30)), "x": [[0.5] * 1000] * 30, "y": [b"z" * 4000] * 30})
    pq.write_table(table, tmp_path / "t.parquet")
    file = ParquetRows(tmp_path / "t.parquet", ("owner", "a"), ("key",))
    asked, original = [], file.file.iter_batches
    monkeypatch.setattr(file, "file", SimpleNamespace(metadata=file.file.metadata, schema_arrow=file.file.schema_arrow))
    file.file.iter_batches = lambda rows, *rest, **keys: asked.append(rows) or original(rows, *rest, **keys)
    assert file.read(np.array([7, 29]), ("x",))["x"].to_pylist() == [[0.5] * 1000] * 2
    assert asked[0] * 8 * 1000 <= 40_000
    assert file.read(np.array([29]), ("key",))["key"].to_pylist() == [29]
    assert asked[1] >= 30, "a column that is not wanted does not count"


def same_frame(one, other) -> bool:
    return (
        one.frame_id == other.frame_id
        and np.array_equal(one.points, other.points)
        and all(np.array_equal(a.image, b.image) for a, b in zip(one.cameras, other.cameras, strict=True))
    )


def test_forked_workers_and_copies_read_the_same(drive):
    reader = open_waymo(drive)
    alone = [reader[index] for index in range(len(reader))]
    assert len(reader.source._tables) > 0, "the parent has open files, which a worker must not share"
    for workers in (1, 2):
        loader = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=workers)
        assert all(same_frame(a, b) for a, b in zip(alone, loader, strict=True))
    copy = pickle.loads(pickle.dumps(reader))
    assert same_frame(copy[5], alone[5])
    assert same_frame(reader[5], alone[5])


def test_open_files_and_memory_are_bounded(drive, monkeypatch):
    monkeypatch.setattr(waymo_v2, "NUM_OPEN", 5)
    reader = open_waymo(drive)
    held = []
    for _ in range(6):
        for index in (0, 5, 10):
            reader[index]
        assert len(reader.source._tables) == 5
        held.append(pa.total_allocated_bytes())
    assert held[-1] <= held[1] + 100_000


# Bad input: one clear line each


def edit(root: Path, component: str, change) -> None:
    """Rewrite the first segment's file; `change` gets a table and returns another."""
    path = root / component / f"{SEGMENTS[0]}.parquet"
    pq.write_table(change(pq.read_table(path)), path, row_group_size=7)


def without_rows(component: str, **keys: int):
    def change(table: pa.Table) -> pa.Table:
        match = np.logical_and.reduce([table[f"key.{key}"].to_numpy() == value for key, value in keys.items()])
        return table.filter(pa.array(~match))

    return lambda root: edit(root, component, change)


def with_column(component: str, name: str, make):
    """Another column in the place of one; `make` gets its values and type."""

    def change(table: pa.Table) -> pa.Table:
        column = table[name]
        values, kind = make(column.to_pylist()), column.type
        return table.set_column(table.schema.names.index(name), name, pa.array(values, kind))

    return lambda root: edit(root, component, change)


def cut(component: str, keep: float):
    def damage(root: Path) -> None:
        path = root / component / f"{SEGMENTS[0]}.parquet"
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])

    return damage


def scribble(component: str, column: str):
    """Damage a column of the first row group, with keys and footer whole."""

    def damage(root: Path) -> None:
        path = root / component / f"{SEGMENTS[0]}.parquet"
        group = pq.ParquetFile(path).metadata.row_group(0)
        chunk = next(part for part in map(group.column, range(group.num_columns)) if part.path_in_schema == column)
        content = bytearray(path.read_bytes())
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        path.write_bytes(content)

    return damage


def unlink(component: str):
    return lambda root: (root / component / f"{SEGMENTS[0]}.parquet").unlink()


def text_keys(root: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.names.index("key.camera_name")
        return table.set_column(index, "key.camera_name", pa.array([CAMERA_NAMES[n] for n in table[index].to_pylist()]))

    edit(root, "camera_image", change)


def other_segments_file(root: Path) -> None:
    shutil.copy(root / f"lidar_calibration/{SEGMENTS[1]}.parquet", root / f"lidar_calibration/{SEGMENTS[0]}.parquet")


T0, T1 = times(SEGMENTS[0])[:2]
VALUES = "[LiDARComponent].range_image_return1.values"
OPENING = {
    "component absent": (lambda root: shutil.rmtree(root / "camera_image"), ("camera_image", "3 of 3", "component")),
    "segment absent": (unlink("lidar_pose"), ("lidar_pose", "1 of 3", "data.split_file")),
    "boxes of one segment absent": (unlink("lidar_box"), ("lidar_box", "1 of 3", "data.split_file")),
    "lidar absent": (lambda root: shutil.rmtree(root / "lidar"), ("lidar", "data.lasers=[]")),
    "poses cut short": (cut("vehicle_pose", 0.6), ("vehicle_pose", "cut short")),
    "an empty file": (cut("lidar", 0), ("lidar/", "cut short")),
    "images cut short": (cut("camera_image", 0.9), ("camera_image", "cut short")),
    "column absent": (
        lambda root: edit(root, "lidar", lambda table: table.drop_columns([VALUES])),
        ("lidar/", "no column [LiDARComponent].range_image_return1.values"),
    ),
    "key column absent": (
        lambda root: edit(root, "vehicle_pose", lambda table: table.drop_columns(["key.frame_timestamp_micros"])),
        ("vehicle_pose", "no column key.frame_timestamp_micros"),
    ),
    "camera names as words": (text_keys, ("camera_image", "key.camera_name is of type string")),
    "no calibration of a camera": (
        without_rows("camera_calibration", camera_name=4),
        ("camera_calibration", "no row of SIDE_LEFT, but FRONT, FRONT_LEFT, FRONT_RIGHT, SIDE_RIGHT"),
    ),
    "no calibration of a lidar": (without_rows("lidar_calibration", laser_name=5), ("lidar_calibration", "of REAR")),
    "calibrations of another segment": (other_segments_file, ("lidar_calibration", "no row of this segment")),
    "an intrinsic that is missing": (
        with_column("camera_calibration", "[CameraCalibrationComponent].intrinsic.k1", lambda v: [None, *v[1:]]),
        ("camera_calibration", "intrinsic"),
    ),
    "timestamps out of order": (
        lambda root: edit(root, "vehicle_pose", lambda table: table.take([1, 0, 2, 3])),
        ("vehicle_pose", "timestamps out of order", f"{T0} after {T1}", "data.split_file"),
    ),
    "a frame twice": (
        lambda root: edit(root, "vehicle_pose", lambda table: table.take([0, 1, 1, 2])),
        ("vehicle_pose", "timestamps out of order", f"{T1} after {T1}"),
    ),
    "no frame": (lambda root: edit(root, "vehicle_pose", lambda table: table.slice(0, 0)), ("vehicle_pose", "no row")),
}


def nothing_measured(values):
    return [[0.0] * len(row) for row in values]


def with_nan(values):
    values[5][0] = np.nan
    return values


READING = {
    "no image of a camera": (
        without_rows("camera_image", camera_name=2, frame_timestamp_micros=T1),
        ("camera_image/", "has nothing of FRONT_LEFT", "data.cameras"),
    ),
    "no scan of a lidar": (
        without_rows("lidar", laser_name=4, frame_timestamp_micros=T1),
        ("lidar/", "has nothing of SIDE_RIGHT", "data.lasers"),
    ),
    "no pixel poses": (without_rows("lidar_pose", frame_timestamp_micros=T1), ("lidar_pose", "no row of laser TOP")),
    "two images": (
        lambda root: edit(root, "camera_image", lambda table: pa.concat_tables([table, table.slice(6, 1)])),
        ("camera_image", "two rows of FRONT_LEFT"),
    ),
    "image cut short": (
        with_column("camera_image", "[CameraImageComponent].image", lambda v: [row[:-300] for row in v]),
        ("camera_image/", "camera FRONT", "the image is cut short"),
    ),
    "no image": (
        with_column("camera_image", "[CameraImageComponent].image", lambda v: [None] * len(v)),
        ("camera_image", "the image of FRONT is empty"),
    ),
    "image of another size": (
        with_column("camera_calibration", "[CameraCalibrationComponent].width", lambda v: [61] * 5),
        ("camera FRONT", "the image is 40 x 60", "40 x 61"),
    ),
    "nothing measured": (with_column("lidar", VALUES, nothing_measured), ("holds no points",)),
    "NaN": (with_column("lidar", VALUES, with_nan), ("1 of", "points are NaN")),
    "a range image that is empty": (
        with_column("lidar", VALUES, lambda v: [None] * len(v)),
        ("lidar/", "return 1 of a lidar is empty"),
    ),
    "a shape that does not fit": (
        with_column("lidar", "[LiDARComponent].range_image_return1.shape", lambda v: [[3, 3, 4]] * len(v)),
        ("lidar/", "return 1", "[3, 3, 4]"),
    ),
    "other poses than pixels": (
        with_column("lidar_pose", "[LiDARPoseComponent].range_image_return1.shape", lambda v: [[24, 8, 6]] * len(v)),
        ("lidar TOP", "(24, 8, 6)", "8 x 24"),
    ),
    "too few inclinations": (
        with_column(
            "lidar_calibration", "[LiDARCalibrationComponent].beam_inclination.values", lambda v: [[0.1, 0.2]] * 5
        ),
        ("lidar TOP", "2 beam inclinations", "8 rows"),
    ),
    "a transform of NaN": (
        with_column("camera_image", "[CameraImageComponent].pose.transform", lambda v: [[np.nan] * 16] * len(v)),
        ("camera_image", "16 finite"),
    ),
    "a transform that shears": (
        with_column(
            "camera_image",
            "[CameraImageComponent].pose.transform",
            lambda v: [[1.0, 0.5, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]] * len(v),
        ),
        ("camera_image", "no rigid motion"),
    ),
    "a transform of zeros": (
        with_column("camera_image", "[CameraImageComponent].pose.transform", lambda v: [[0.0] * 16] * len(v)),
        ("camera_image", "no rigid motion"),
    ),
    "damage inside": (scribble("camera_image", "[CameraImageComponent].image"), ("camera_image", "damaged")),
}


@pytest.mark.parametrize("name", OPENING)
def test_a_damaged_download_is_told_at_once(root, name):
    damage, words = OPENING[name]
    damage(root)
    with pytest.raises(UserError) as error:
        open_waymo(root)
    check_message(str(error.value), root, words)


@pytest.mark.parametrize("name", READING)
def test_a_damaged_frame_is_one_clear_line(root, name):
    damage, words = READING[name]
    damage(root)
    reader = open_waymo(root, returns=1 if "measured" in name else 2)
    with pytest.raises(BadFrameError) as error:
        reader[1]
    check_message(str(error.value), root, words)


def check_message(message: str, root: Path, words: tuple[str, ...]) -> None:
    assert "\n" not in message
    assert str(root) in message
    assert "*" not in message, "a file has a name"
    assert all(word in message for word in words), message
    assert "download" in message or "data." in message, message


def test_images_without_a_pose_of_their_own_use_the_frames(root):
    with_column("camera_image", "[CameraImageComponent].pose.transform", lambda v: [None] * len(v))(root)
    camera = open_waymo(root)[0].cameras[0]
    np.testing.assert_allclose(camera.camera_from_lidar, without_motion(1), atol=1e-12)


# Training, and the real frame


def test_pre_training_runs(drive, tmp_path):
    """Two steps with five cameras of two sizes and the recipe of the shipped configuration, small."""
    layer = "{sampler: d_fps, num_points: 32, radii: [4.0], num_samples: [8], mlps: [[8, 16]], aggregation: null}"
    out = pretrain(
        "configs/simipu/waymo.yaml",
        [
            f"data.root={drive}",
            "data.split=all",
            "data.cameras=null",
            "data.batch_size=2",
            "data.num_workers=0",
            "augment.images.resize_factor=[1.0, 1.0]",
            f"point_encoder.layers=[{layer}]",
            "image_encoder.name=resnet18",
            "image_encoder.output_stride=8",
            "contrast.dim=16",
            "trainer.max_steps=1",
            "trainer.log_every_n_steps=1",
            "trainer.accelerator=cpu",
        ],
        out=tmp_path / "run",
    )
    assert (out / "checkpoints" / "last.ckpt").is_file()


REAL = "1024360143612057520_3580_000_3600_000"


@pytest.fixture
def real(samples, tmp_path):
    """The reader of the real frame, which has no range images, and its root."""
    names = tmp_path / "mine.txt"
    names.write_text(REAL)
    return open_waymo(samples / "waymo_v2", lasers=[], split_file=names), samples / "waymo_v2"


def overlap(one, other) -> float:
    """Intersection over union of two boxes u, v minimum, u, v maximum."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    common = np.prod(np.maximum(high - low, 0))
    return common / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - common)


def test_real_boxes_project_onto_their_boxes_in_the_images(real):
    """The hull of the edges, through lens distortion, against projected_lidar_box: Waymo's own projection."""
    reader, root = real
    frame = reader[0]
    boxes = frame.boxes
    request = WaymoRequest(tuple(CAMERAS), (), projected_boxes=True)
    labelled = {camera.name: camera.labels for camera in reader.source.read(0, request).cameras}
    names = {
        name: pq.read_table(root / name / f"{REAL}.parquet").to_pydict()
        for name in ("lidar_box", "projected_lidar_box")
    }
    place_of = {name: row for row, name in enumerate(names["lidar_box"]["key.laser_object_id"])}
    corners = box_corners(boxes.center, boxes.size, boxes.yaw)
    share = np.linspace(0, 1, 21)[:, None]
    ious = []
    for camera in frame.cameras:
        height, width = camera.image.shape[:2]
        mine = [
            row
            for row, number in enumerate(names["projected_lidar_box"]["key.camera_name"])
            if number == CAMERAS[camera.name]
        ]
        assert len(labelled[camera.name]) == len(mine)
        for row, (u, v, size_u, size_v) in zip(mine, labelled[camera.name].tolist(), strict=True):
            box = corners[place_of[names["projected_lidar_box"]["key.laser_object_id"][row]]]
            edges = np.concatenate([box[a] + share * (box[b] - box[a]) for a, b in BOX_EDGES])
            pixels, _ = pixels_of(camera, edges)
            depth = moved(camera.camera_from_lidar, edges)[:, 2]
            pixels = pixels[(depth > 0.5) & np.isfinite(pixels).all(axis=1)] + 0.5
            hull = np.concatenate([pixels.min(axis=0), pixels.max(axis=0)]).clip(0, [width, height, width, height])
            ious.append(overlap(hull, np.array([u - size_u / 2, v - size_v / 2, u + size_u / 2, v + size_v / 2])))
        # The frame has them by 3D box, in pixels with integer centres.
        own = [place_of[names["projected_lidar_box"]["key.laser_object_id"][row]] for row in mine]
        stored, centre = boxes.image_boxes[camera.name], labelled[camera.name]
        assert np.isfinite(stored).all(axis=1).nonzero()[0].tolist() == sorted(own)
        np.testing.assert_allclose((stored[own, :2] + stored[own, 2:]) / 2 + 0.5, centre[:, :2])
        np.testing.assert_allclose(stored[own, 2:] - stored[own, :2], centre[:, 2:])
    assert len(ious) == 62
    assert min(ious) > 0.95
    assert np.median(ious) > 0.99


def test_the_real_frame_is_what_is_known_of_it(real):
    reader, _ = real
    frame = reader[0]
    assert frame.frame_id == f"{REAL}/1553735853462203"
    assert [camera.image.shape for camera in frame.cameras] == [(1280, 1920, 3)] * 3 + [(886, 1920, 3)] * 2
    boxes = frame.boxes
    assert len(boxes) == 75
    assert set(boxes.names) == {"VEHICLE", "PEDESTRIAN", "SIGN", "CYCLIST"}
    speed = np.linalg.norm(boxes.velocity, axis=1)
    heading = np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw)], axis=1)
    along = (boxes.velocity * heading).sum(axis=1)[speed > 1] / speed[speed > 1]
    assert len(along) > 8
    assert along.min() > 0.99, "objects move where they head"
    with pytest.raises(UserError, match="no such file; 1 of 2 segments"):
        open_waymo(reader.config.root, lasers=[])


def test_a_download_without_range_images_can_be_looked_at(samples, tmp_path, capsys):
    """The real sample has none: boxes in five images, no points, and no page of views."""
    from simipu3d.tools import inspect_data

    (tmp_path / "list.txt").write_text("1024360143612057520_3580_000_3600_000\n")
    (tmp_path / "look.yaml").write_text(
        f"data: {{name: waymo, root: {samples / 'waymo_v2'}, split: all, split_file: {tmp_path / 'list.txt'}, lasers: []}}"
    )
    assert inspect_data.main(["--cfg", str(tmp_path / "look.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert [path.name.rpartition("-")[2] for path in (tmp_path / "out").iterdir()] == ["frame.png"]
    assert "75" in capsys.readouterr().out
