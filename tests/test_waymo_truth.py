"""Waymo readers on drives whose truth is known: the points that were met, and the pixels where cameras see them."""

import csv
import dataclasses

import numpy as np
import pytest
import torch

from simipu3d.benchmark.synthetic_waymo.drive import WaymoDrive
from simipu3d.benchmark.synthetic_waymo.files import write_waymo_v1, write_waymo_v2
from simipu3d.benchmark.synthetic_waymo.rig import WaymoRigSettings
from simipu3d.config import parse_part
from simipu3d.data.config import PointAugmentConfig
from simipu3d.data.loading.augment_points import draw_transform
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.readers.waymo import WaymoReader
from simipu3d.data.readers.waymo_moment import CAMERA_NAMES
from simipu3d.engine.pretrain import pretrain
from simipu3d.geometry.boxes import BOX_EDGES, box_corners
from simipu3d.geometry.camera import project_points
from simipu3d.geometry.transforms import transform_points
from simipu3d.ops.rotated_iou import points_in_boxes
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


@VERSIONS
def test_points_in_boxes_stay_there_under_augmentation(drive, version):
    """The reader's points and boxes agree with what the beams met, and move together."""
    _, folder, pairs = drive
    reader = reader_of(folder, version, no_label_zone="keep")
    config = PointAugmentConfig(rotation_deg=(40.0, 40.0), scale=(1.1, 1.1), flip_probability=1.0)
    for index, (moment, _) in enumerate(pairs):
        frame = reader[index]
        xyz, boxes = frame.points[:, :3].astype(np.float64), frame.boxes
        assert boxes.names == moment.boxes.names
        # float32 moves a point by some micrometres.
        inner, outer = (points_in_boxes(xyz, boxes.center, boxes.size + slack, boxes.yaw) for slack in (-1e-3, 1e-3))
        assert (inner.sum(axis=1) <= boxes.num_points).all()
        assert (outer.sum(axis=1) >= boxes.num_points).all()
        assert inner.sum() > 100
        matrix = draw_transform(config, np.random.default_rng(index))
        moved, center = (transform_points(matrix, torch.from_numpy(rows)).numpy() for rows in (xyz, boxes.center))
        yaw = -(boxes.yaw + np.radians(40))
        assert points_in_boxes(moved, center, 1.1 * boxes.size, yaw)[inner].all()
        assert not points_in_boxes(moved, center, 1.1 * boxes.size, yaw)[~outer].any()


@VERSIONS
def test_corners_project_into_the_labels_of_the_images(drive, version):
    """Edges of a box, through the lens, fill its label in every camera: the reader's own pose, axes and pixels."""
    settings, folder, pairs = drive
    reader = reader_of(folder, version)
    slack = 0.5 if settings.rolling_shutter_s else 0.05
    share = torch.linspace(0, 1, 41, dtype=torch.float64)[:, None]
    seen = 0
    for index, (moment, truth) in enumerate(pairs):
        frame = reader[index]
        corners = torch.from_numpy(box_corners(frame.boxes.center, frame.boxes.size, frame.boxes.yaw)).double()
        for camera, stored in zip(frame.cameras, moment.cameras, strict=True):
            for box, label in zip(truth.pictures[camera.name].labelled, stored.labels, strict=True):
                edges = torch.cat([corners[box, a] + share * (corners[box, b] - corners[box, a]) for a, b in BOX_EDGES])
                pixels, depth, visible = project_points(
                    edges,
                    torch.from_numpy(camera.image_from_camera),
                    torch.from_numpy(camera.camera_from_lidar),
                    camera.image.shape[:2],
                    distortion=torch.from_numpy(camera.distortion),
                )
                inside = pixels[visible].numpy() + 0.5
                low, high = label[:2] - label[2:] / 2 - slack, label[:2] + label[2:] / 2 + slack
                assert ((inside >= low) & (inside <= high)).all()
                if bool((depth > 0.5).all()) and bool(visible.all()):
                    np.testing.assert_allclose(inside.min(axis=0), low + slack, atol=2 * slack)
                    np.testing.assert_allclose(inside.max(axis=0), high - slack, atol=2 * slack)
                    seen += 1
    assert seen > 5


@VERSIONS
def test_pre_training_runs_and_goes_on(drive, version, tmp_path):
    """Five cameras of two sizes; a second call takes the run up where the first one stopped."""
    _, folder, _ = drive
    layer = "{sampler: d_fps, num_points: 32, radii: [4.0], num_samples: [8], mlps: [[8, 16]], aggregation: null}"
    keys = [
        f"data.root={folder / version}",
        f"data.version={version}",
        "data.split=all",
        "data.load_interval=1",
        "data.cameras=null",
        "data.batch_size=2",
        "data.num_workers=1",
        "augment.points.num_points=2000",
        "augment.images.resize_factor=[0.5, 0.5]",
        f"point_encoder.layers=[{layer}]",
        "image_encoder.name=resnet18",
        "image_encoder.model_args={channels: [8, 12, 16, 20]}",
        "image_encoder.output_stride=8",
        "contrast.dim=16",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
    ]
    for steps, resume in ((1, None), (3, "")):
        out = pretrain(
            "configs/simipu/waymo.yaml", [*keys, f"trainer.max_steps={steps}"], out=tmp_path / "run", resume=resume
        )
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert np.isfinite([float(row["loss"]) for row in rows]).all()
    assert all(float(row["visible_tokens"]) > 0 for row in rows)
