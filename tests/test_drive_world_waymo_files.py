"""Waymo files that drive_world writes: the official columns, everything in them, and whole or not at all."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from simipu3d.benchmark.synthetic_waymo.drive import WaymoDrive
from simipu3d.benchmark.synthetic_waymo.files import SCHEMAS, write_waymo_v2
from simipu3d.benchmark.synthetic_waymo.rig import WaymoRigSettings
from simipu3d.data.readers.waymo_moment import CAMERA_NAMES, LASER_NAMES, OBJECT_NAMES

SMALL = WaymoRigSettings(image_width=48, top_size=(8, 60), side_size=(6, 20), num_moments=3)


@pytest.fixture(scope="module")
def drives():
    return [WaymoDrive(SMALL, sequence) for sequence in range(2)]


@pytest.fixture(scope="module")
def pairs(drives):
    return {drive.segment: [drive.moment(index) for index in range(3)] for drive in drives}


@pytest.fixture(scope="module")
def folder(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("waymo_v2")
    write_waymo_v2(folder, pairs)
    return folder


def rows_of(folder, tag, segment):
    """Rows by their keys, with the class taken off the columns' names."""
    table = pq.read_table(folder / tag / f"{segment}.parquet").to_pylist()
    return [{name.partition("].")[2] or name: value for name, value in row.items()} for row in table]


@pytest.mark.parametrize("tag", SCHEMAS)
def test_columns_are_those_of_the_official_files(folder, samples, tag):
    for path in sorted((folder / tag).iterdir()):
        written = pq.read_schema(path).remove_metadata()
        assert written.names == SCHEMAS[tag].names
        real = sorted((samples / "waymo_v2" / tag).glob("1024*.parquet"))
        assert real or tag in ("lidar", "lidar_pose", "lidar_camera_projection")
        for sample in real:
            assert written.equals(pq.read_schema(sample).remove_metadata())


def test_a_row_group_a_moment(folder, pairs):
    for tag, schema in SCHEMAS.items():
        for segment in pairs:
            file = pq.ParquetFile(folder / tag / f"{segment}.parquet")
            timed = "key.frame_timestamp_micros" in schema.names
            assert file.num_row_groups == (3 if timed else 1)
            names = set(file.read(["key.segment_context_name"]).column(0).to_pylist())
            assert names == {segment}


def test_range_images_poses_and_projections_come_back(folder, pairs):
    for segment, moments in pairs.items():
        images = {tag: rows_of(folder, tag, segment) for tag in ("lidar", "lidar_pose", "lidar_camera_projection")}

        def image(tag, moment, laser, number, images=images):
            keys = moment.timestamp_micros, {name: key for key, name in LASER_NAMES.items()}[laser.name]
            rows = [row for row in images[tag] if (row["key.frame_timestamp_micros"], row["key.laser_name"]) == keys]
            prefix = f"range_image_return{number}"
            return np.array(rows[0][f"{prefix}.values"]).reshape(rows[0][f"{prefix}.shape"]) if rows else None

        for moment, _ in moments:
            for laser in moment.lasers:
                for number, each in enumerate(laser.returns, 1):
                    assert np.array_equal(image("lidar", moment, laser, number), each.image)
                    assert np.array_equal(image("lidar_camera_projection", moment, laser, number), each.projection)
                stored = image("lidar_pose", moment, laser, 1)
                assert (stored is None) == (laser.pixel_pose is None)
                assert stored is None or np.array_equal(stored, laser.pixel_pose)


def test_calibrations_images_and_boxes_come_back(folder, pairs):
    for segment, moments in pairs.items():
        moment, truth = moments[-1]
        cameras, lasers = rows_of(folder, "camera_calibration", segment), rows_of(folder, "lidar_calibration", segment)
        for camera, row in zip(moment.cameras, cameras, strict=True):
            names = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
            assert CAMERA_NAMES[row["key.camera_name"]] == camera.name
            assert [row[f"intrinsic.{name}"] for name in names] == list(camera.intrinsic)
            assert (row["height"], row["width"]) == camera.size
            assert np.array_equal(np.reshape(row["extrinsic.transform"], (4, 4)), camera.vehicle_from_camera)
        for laser, row in zip(moment.lasers, lasers, strict=True):
            listed = row["beam_inclination.values"]
            assert (listed is None) == (laser.inclinations is None) == (laser.name != "TOP")
            assert listed is None or np.array_equal(listed, laser.inclinations)
            assert (row["beam_inclination.min"], row["beam_inclination.max"]) == laser.inclination_range
        last = [
            row
            for row in rows_of(folder, "camera_image", segment)
            if row["key.frame_timestamp_micros"] == moment.timestamp_micros
        ]
        assert [row["image"] for row in last] == [camera.jpeg for camera in moment.cameras]
        for camera, row in zip(moment.cameras, last, strict=True):
            assert np.array_equal(np.reshape(row["pose.transform"], (4, 4)), camera.world_from_vehicle)
            shutter = [row[f"rolling_shutter_params.camera_{name}_time"] for name in ("trigger", "readout_done")]
            assert shutter[0] < camera.pose_timestamp == row["pose_timestamp"] < shutter[1]
        boxes = [
            row
            for row in rows_of(folder, "lidar_box", segment)
            if row["key.frame_timestamp_micros"] == moment.timestamp_micros
        ]
        assert [row["key.laser_object_id"] for row in boxes] == list(truth.object_ids)
        assert [OBJECT_NAMES[row["type"]] for row in boxes] == list(moment.boxes.names)
        np.testing.assert_array_equal([row["box.heading"] for row in boxes], moment.boxes.yaw)
        speed = np.array([[row["speed.x"], row["speed.y"], row["speed.z"]] for row in boxes])
        level = (speed @ moment.world_from_vehicle[:3, :3])[:, :2]
        np.testing.assert_allclose(level, moment.boxes.velocity, atol=1e-9)
        labels = [
            row
            for row in rows_of(folder, "projected_lidar_box", segment)
            if row["key.frame_timestamp_micros"] == moment.timestamp_micros
        ]
        assert len(labels) == sum(len(camera.labels) for camera in moment.cameras)
        assert {row["key.laser_object_id"] for row in labels} <= set(truth.object_ids)


def test_velocity_is_that_of_the_way(drives, pairs):
    """Between two moments the vehicle goes where its images' velocities say."""
    drive = drives[0]
    (moment, truth), _, _ = pairs[drive.segment]
    picture = truth.pictures["FRONT"]
    before, after = (drive.ride.world_from_vehicle(picture.middle + step) for step in (-1e-3, 1e-3))
    np.testing.assert_allclose((after - before)[:3, 3] / 2e-3, picture.velocity[:3], atol=1e-3)
    assert np.linalg.norm(picture.velocity[:3]) == pytest.approx(SMALL.speed, rel=0.02)
    turned = (after - before)[:3, :3] / 2e-3 @ moment.cameras[0].world_from_vehicle[:3, :3].T
    world_turn = moment.cameras[0].world_from_vehicle[:3, :3] @ picture.velocity[3:]
    np.testing.assert_allclose([turned[2, 1], turned[0, 2], turned[1, 0]], world_turn, atol=1e-3)


def test_a_single_return_leaves_the_second_null(tmp_path):
    drive = WaymoDrive(WaymoRigSettings(image_width=48, top_size=(8, 60), side_size=(6, 20), returns=1), 0)
    write_waymo_v2(tmp_path, {drive.segment: [drive.moment(0)]})
    for tag in ("lidar", "lidar_camera_projection"):
        for row in rows_of(tmp_path, tag, drive.segment):
            assert row["range_image_return1.values"]
            assert row["range_image_return2.values"] is None
            assert row["range_image_return2.shape"] is None


def test_nothing_stays_of_a_segment_that_failed(drives, pairs, tmp_path):
    first, second = drives

    def broken():
        yield pairs[second.segment][0]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        write_waymo_v2(tmp_path, {first.segment: pairs[first.segment][:1], second.segment: broken()})
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [f"{first.segment}.parquet"] * len(SCHEMAS)


def test_moments_must_be_of_their_segment_and_there_must_be_some(drives, pairs, tmp_path):
    first, second = drives
    with pytest.raises(ValueError, match="among those of"):
        write_waymo_v2(tmp_path, {first.segment: pairs[second.segment]})
    with pytest.raises(ValueError, match="has no moments"):
        write_waymo_v2(tmp_path, {first.segment: []})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
