"""Waymo readers on drives whose truth is known: the points that were met, and the pixels where cameras see them."""

import dataclasses

import numpy as np
import pytest
import torch

from simipu3d.config import parse_part
from simipu3d.data.drive_world.waymo_drive import WaymoDrive
from simipu3d.data.drive_world.waymo_files import write_waymo_v1, write_waymo_v2
from simipu3d.data.drive_world.waymo_rig import WaymoRigSettings
from simipu3d.data.module import build_reader
from simipu3d.data.readers.waymo import WaymoReader
from simipu3d.data.readers.waymo_moment import CAMERA_NAMES
from simipu3d.geometry.camera import project_points
from simipu3d.registry import READERS

ROLLING = WaymoRigSettings(num_moments=2, top_size=(64, 300), side_size=(20, 60))
STILL_SHUTTER = dataclasses.replace(ROLLING, rolling_shutter_s=0.0, seed=1)
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])


@pytest.fixture(scope="module", params=[ROLLING, STILL_SHUTTER], ids=["rolling", "still"])
def drive(request, tmp_path_factory):
    """The settings, both formats' folder, and each moment with its truth."""
    settings, folder = request.param, tmp_path_factory.mktemp("waymo")
    own = WaymoDrive(settings, 0)
    pairs = [own.moment(index) for index in range(settings.num_moments)]
    write_waymo_v2(folder / "v2", {own.segment: pairs})
    write_waymo_v1(folder / "v1", {own.segment: pairs})
    return settings, folder, pairs


def reader_of(folder, version, **keys) -> WaymoReader:
    block = {"name": "waymo", "root": str(folder / version), "version": version, "split": "all", **keys}
    return build_reader(parse_part("data", READERS, block))


def truth_points(truth):
    return np.concatenate([own.vehicle_xyz for returns in truth.points.values() for own in returns])


@VERSIONS
def test_the_points_are_those_that_the_beams_met(drive, version):
    """Five lidars, both returns, the top one from a moving and turning vehicle."""
    _, folder, pairs = drive
    reader = reader_of(folder, version, no_label_zone="keep")
    assert len(reader) == len(pairs)
    for index, (moment, truth) in enumerate(pairs):
        frame, met = reader[index], truth_points(truth)
        assert len(frame.points) == len(met) > 5000
        assert np.abs(frame.points[:, :3] - met).max() < 1e-3
        assert frame.timestamp == pytest.approx(moment.timestamp_micros * 1e-6)
        np.testing.assert_array_equal(frame.world_from_lidar, moment.world_from_vehicle)


@VERSIONS
def test_points_land_where_the_cameras_see_them(drive, version):
    """Exactly with a still shutter; the small rig's rolling one moves no point by more than half a pixel."""
    settings, folder, pairs = drive
    reader = reader_of(folder, version, no_label_zone="keep")
    limit = 0.5 if settings.rolling_shutter_s else 1e-3
    for index, (_, truth) in enumerate(pairs):
        frame = reader[index]
        exact = np.concatenate([own.pixels for returns in truth.points.values() for own in returns]) - 0.5
        for number, camera in enumerate(frame.cameras):
            pixels, _, visible = project_points(
                torch.from_numpy(frame.points[:, :3]).double(),
                torch.from_numpy(camera.image_from_camera),
                torch.from_numpy(camera.camera_from_lidar),
                camera.image.shape[:2],
                distortion=torch.from_numpy(camera.distortion),
            )
            seen = np.isfinite(exact[:, number]).all(axis=1)
            assert seen.sum() > 100
            both = seen & visible.numpy()
            assert both.sum() > 0.98 * seen.sum()
            assert np.abs(pixels.numpy()[both] - exact[both, number]).max() < limit


@VERSIONS
def test_the_stored_projection_names_the_pixel_that_holds_the_point(drive, version):
    settings, folder, pairs = drive
    reader = reader_of(folder, version, no_label_zone="keep")
    slack = 0.5 if settings.rolling_shutter_s else 0.0
    for index in range(len(pairs)):
        cameras = {camera.name: camera for camera in reader[index].cameras}
        assert set(cameras) == set(CAMERA_NAMES.values())
        for name, (xyz, stored) in reader.stored_projections(index).items():
            camera = cameras[name]
            pixels, _, _ = project_points(
                torch.from_numpy(xyz).double(),
                torch.from_numpy(camera.image_from_camera),
                torch.from_numpy(camera.camera_from_lidar),
                camera.image.shape[:2],
                distortion=torch.from_numpy(camera.distortion),
            )
            assert len(xyz) > 100
            assert np.abs(pixels.numpy() - stored).max() < 0.5 + slack + 1e-3


@VERSIONS
def test_both_formats_and_any_part_of_them_agree(drive, version):
    _, folder, _ = drive
    whole = reader_of(folder, "v2")[1]
    part = reader_of(folder, version, lasers=["REAR", "TOP"], cameras=["SIDE_LEFT"], returns=1)[1]
    rows = {row.tobytes() for row in whole.points}
    assert 0 < len(part.points) < len(whole.points)
    assert all(row.tobytes() in rows for row in part.points)
    camera = next(camera for camera in whole.cameras if camera.name == "SIDE_LEFT")
    np.testing.assert_array_equal(part.cameras[0].image, camera.image)
    np.testing.assert_array_equal(part.cameras[0].camera_from_lidar, camera.camera_from_lidar)
    np.testing.assert_allclose(part.boxes.center, whole.boxes.center)
    np.testing.assert_allclose(part.boxes.velocity, whole.boxes.velocity, atol=1e-6)


@VERSIONS
def test_the_no_label_zone_is_dropped_by_default(drive, version):
    _, folder, pairs = drive
    for index, (moment, _) in enumerate(pairs):
        flags = [own.image[..., 3][own.image[..., 0] > 0] for laser in moment.lasers for own in laser.returns]
        outside = sum(int((flag != 1).sum()) for flag in flags)
        assert len(reader_of(folder, version)[index].points) == outside
