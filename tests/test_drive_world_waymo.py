"""Laws of drive_world's Waymo drives: their truth agrees with the sheet's formulae, with slow rays and with itself."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from slow_rays import slow_cast

from simipu3d.benchmark.synthetic_waymo.drive import WaymoDrive, make_moment
from simipu3d.benchmark.synthetic_waymo.projection import fold_radius, image_places, project_street
from simipu3d.benchmark.synthetic_waymo.rig import WaymoRigSettings
from simipu3d.benchmark.synthetic_waymo.sweep import sweep
from simipu3d.data.drive_world import raycast
from simipu3d.data.drive_world.render import scan_rays
from simipu3d.data.drive_world.scene import build_scene
from simipu3d.data.readers.waymo_moment import CAMERA_NAMES, LASER_NAMES
from simipu3d.geometry.camera import project_points
from simipu3d.ops.rotated_iou import points_in_boxes

SMALL = WaymoRigSettings(image_width=96, top_size=(16, 120), side_size=(12, 48))
FAST = replace(SMALL, speed=12.0, rolling_shutter_s=0.044)
"""A fast ride with Waymo's own read-out time: what is neglected shows."""


@pytest.fixture(scope="module")
def default():
    drive = WaymoDrive(WaymoRigSettings(), 3)
    return drive, *drive.moment(2)


@pytest.fixture(scope="module")
def fast():
    drive = WaymoDrive(FAST, 1)
    return drive, *drive.moment(4)


def turn(roll, pitch, yaw):
    """Rz(yaw) Ry(pitch) Rx(roll)."""
    cr, sr, cp, sp, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
    z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    return z @ y @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])


def slow_point(moment, laser, image, row, column, *, with_pose=True):
    """One pixel of a range image in the vehicle frame, by Waymo's formulae and with what the moment holds alone."""
    height, width = image.shape[:2]
    extrinsic = laser.vehicle_from_laser
    azimuth = ((width - column - 0.5) / width * 2 - 1) * np.pi - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    if laser.inclinations is not None:
        inclination = laser.inclinations[::-1][row]
    else:
        low, high = laser.inclination_range
        inclination = low + (height - 1 - row + 0.5) / height * (high - low)
    distance = float(image[row, column, 0])
    ray = np.array([np.cos(inclination) * np.cos(azimuth), np.cos(inclination) * np.sin(azimuth), np.sin(inclination)])
    point = extrinsic[:3, :3] @ (distance * ray) + extrinsic[:3, 3]
    if laser.pixel_pose is None or not with_pose:
        return point
    six = laser.pixel_pose[row, column].astype(np.float64)
    world = turn(*six[:3]) @ point + six[3:]
    return np.linalg.inv(moment.world_from_vehicle)[:3] @ np.append(world, 1)


def pixel_errors(moment, truth, laser, rng, **kwargs):
    """Metres between truth and `slow_point` at up to 40 pixels of each return."""
    errors = []
    for each, points in zip(laser.returns, truth.points[laser.name], strict=True):
        valid = each.image[..., 0] > 0
        assert valid.sum() == len(points.row)
        assert valid[points.row, points.column].all()
        for n in rng.permutation(len(points.row))[:40]:
            slow = slow_point(moment, laser, each.image, points.row[n], points.column[n], **kwargs)
            errors.append(np.linalg.norm(slow - points.vehicle_xyz[n]))
    return np.array(errors)


@pytest.mark.parametrize("name", LASER_NAMES.values())
def test_range_images_hold_the_points_that_the_beams_met(default, fast, name):
    for _, moment, truth in (default, fast):
        laser = next(laser for laser in moment.lasers if laser.name == name)
        assert pixel_errors(moment, truth, laser, np.random.default_rng(0)).max() < 1e-3


def test_without_the_pose_of_each_pixel_the_cloud_of_a_moving_vehicle_is_smeared(fast):
    _, moment, truth = fast
    top = moment.lasers[0]
    assert np.median(pixel_errors(moment, truth, top, np.random.default_rng(0), with_pose=False)) > 0.1
    moment, truth = make_moment(replace(SMALL, speed=0.0), 1, 0)
    assert pixel_errors(moment, truth, moment.lasers[0], np.random.default_rng(0), with_pose=False).max() < 1e-3


def test_top_turns_clockwise_from_behind_and_its_mounting_does_not_one_turnthe_picture(default):
    drive, moment, truth = default
    points, width = truth.points["TOP"][0], moment.lasers[0].returns[0].image.shape[1]
    level = points.vehicle_xyz - drive.lasers["TOP"].vehicle_from_laser[:3, 3]
    far = np.hypot(level[:, 0], level[:, 1]) > 20
    heading = np.arctan2(level[:, 1], level[:, 0]) - np.pi * (1 - 2 * (points.column + 0.5) / width)
    assert np.abs(np.angle(np.exp(1j * heading)))[far].max() < 0.06
    assert (np.diff(moment.lasers[0].inclinations) > 0).all()
    assert np.ptp(np.diff(moment.lasers[0].inclinations)) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_list_of_solids_with_slack_serves_every_origin_nearby(seed):
    rng = np.random.default_rng(seed)
    world = build_scene(rng, 1.0).at(0.3)
    middle, slack = np.array([0.0, -1.8, 1.5]), 0.8
    origins = rng.normal(size=(50, 3))
    origins = middle + slack * rng.uniform(0, 1, (50, 1)) * origins / np.linalg.norm(origins, axis=1)[:, None]
    rays = rng.normal(size=(50, 3)) * [1, 1, 0.25]
    rays /= np.linalg.norm(rays, axis=1)[:, None]
    distance, solid, _, _ = scan_rays(world, raycast.index_directions(world, middle, slack), rays, origins)
    for n in range(50):
        slow, item = slow_cast(world, origins[n], rays[n])
        assert item == solid[n]
        if item != raycast.NOTHING:
            assert abs(slow - distance[n]) < 1e-6 * slow


@pytest.mark.parametrize("name", LASER_NAMES.values())
def test_a_point_is_where_its_beam_first_meets_the_street(fast, name):
    """From where the vehicle stands at the pixel's own time; what the first return met is not met nearer."""
    drive, _, truth = fast
    world, mount = drive.scene.at(truth.time), drive.lasers[name]
    points, width = truth.points[name][0], (FAST.top_size if name == "TOP" else FAST.side_size)[1]
    for n in np.random.default_rng(0).permutation(len(points.row))[:12]:
        time = truth.time + (0.1 * (points.column[n] + 0.5) / width if name == "TOP" else 0.0)
        start = (drive.ride.street_from_vehicle(time) @ mount.vehicle_from_laser)[:3, 3]
        way = points.street_xyz[n] - start
        distance, solid = slow_cast(world, start, way / np.linalg.norm(way))
        assert abs(distance - np.linalg.norm(way)) < 1e-6 * distance
        assert points.instance[n] == (drive.scene.instances[solid] if solid >= 0 else 0)


def test_columns_that_share_a_list_of_solids_meet_what_each_would_meet_with_its_own(fast):
    drive, moment, truth = fast
    world, mount, image = drive.scene.at(truth.time), drive.lasers["TOP"], moment.lasers[0].returns[0].image
    one_turn = sweep(world, drive.ride, mount, FAST.top_size, truth.time, 1)
    for column in range(FAST.top_size[1]):
        origin = np.ascontiguousarray(one_turn.place[0, column])
        distance, _, _, _ = scan_rays(world, raycast.index_directions(world, origin), one_turn.beam[:, column])
        distance[distance > mount.max_range] = -1
        assert np.array_equal(distance.astype(np.float32), image[:, column, 0])


def slow_ray(mount, u, v):
    """The ray (x out of the lens, y left, z up) that edge-based (u, v) shows, by Newton's method on the lens model."""
    place = np.array([0.0, 0.0])

    def image(place):
        return image_places(mount.intrinsic, np.array([[1.0, -place[0], -place[1]]]))[0][0]

    for _ in range(12):
        moved = [(image(place + step) - image(place - step)) / 2e-6 for step in 1e-6 * np.eye(2)]
        place = place - np.linalg.solve(np.array(moved).T, image(place) - [u, v])
    return np.array([1.0, -place[0], -place[1]])


@pytest.mark.parametrize("number", range(5))
def test_a_pixel_shows_what_its_ray_meets_and_that_place_projects_onto_the_pixel(fast, number):
    drive, _, truth = fast
    name = CAMERA_NAMES[number + 1]
    mount, picture = drive.cameras[name], truth.pictures[name]
    rng, world = np.random.default_rng(number), drive.scene.at(truth.time)
    height, width = mount.size
    corners = [(0, 0), (height - 1, width - 1)]
    for i, j in [*corners, *zip(rng.integers(height, size=8), rng.integers(width, size=8), strict=True)]:
        time = picture.middle + ((j + 0.5) / width - 0.5) * picture.readout
        pose = drive.ride.street_from_vehicle(time) @ mount.vehicle_from_camera
        ray = slow_ray(mount, j + 0.5, i + 0.5)
        length = np.linalg.norm(ray)
        distance, solid = slow_cast(world, pose[:3, 3], pose[:3, :3] @ ray / length)
        expected = 0.0 if solid == raycast.NOTHING else distance / length
        np.testing.assert_allclose(picture.depth[i, j], expected, rtol=1e-5)
        assert picture.instance[i, j] == (drive.scene.instances[solid] if solid >= 0 else 0)
        place = pose[:3, :3] @ ray * 10 + pose[:3, 3]
        pixel = project_street(drive.ride, mount, picture.middle, picture.readout, place[None])
        np.testing.assert_allclose(pixel, [[j + 0.5, i + 0.5]], atol=1e-5)


def test_the_lens_changes_the_picture_and_the_jpeg_holds_it(fast):
    _, moment, _ = fast
    straight, _ = make_moment(replace(FAST, distortion=False), 1, 4)
    for camera, other in zip(moment.cameras, straight.cameras, strict=True):
        image, plain = (np.asarray(Image.open(io.BytesIO(each.jpeg))).astype(int) for each in (camera, other))
        assert image.shape == (*camera.size, 3)
        assert np.abs(image - plain).mean() > 1
        assert camera.intrinsic[4:].any()
        assert not other.intrinsic[4:].any()
    assert fold_radius(straight.cameras[0].intrinsic) == 2.0


def static_pixels(moment, camera, xyz):
    """Where a reader without rolling shutter puts points of the vehicle frame: edge-based pixels; NaN outside."""
    f_u, f_v, c_u, c_v = camera.intrinsic[:4]
    optical = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
    vehicle_then = np.linalg.inv(camera.world_from_vehicle) @ moment.world_from_vehicle
    pixels, _, visible = project_points(
        torch.from_numpy(xyz),
        torch.tensor([[f_u, 0, c_u - 0.5, 0], [0, f_v, c_v - 0.5, 0], [0, 0, 1, 0]], dtype=torch.float64),
        torch.from_numpy(optical @ np.linalg.inv(camera.vehicle_from_camera) @ vehicle_then),
        camera.size,
        distortion=torch.from_numpy(camera.intrinsic[4:]),
    )
    return np.where(visible[:, None].numpy(), pixels.numpy() + 0.5, np.nan)


def projection_errors(moment, truth):
    """Pixels between the exact projections and those that ignore the rolling shutter, and where only one of them sees
    the point: its distance from the image's border."""
    errors, border = [], []
    for index, camera in enumerate(moment.cameras):
        for returns in truth.points.values():
            for points in returns:
                exact = points.pixels[:, index]
                static = static_pixels(moment, camera, points.vehicle_xyz)
                both = ~np.isnan(exact[:, 0]) & ~np.isnan(static[:, 0])
                errors.append(np.linalg.norm(exact - static, axis=1)[both])
                one = np.where(np.isnan(exact), static, exact)[~both]
                one = one[~np.isnan(one[:, 0])]
                border.append(np.minimum(one, np.array(camera.size[::-1]) - one).min(axis=1))
    return np.concatenate(errors), np.concatenate(border)


def test_without_rolling_shutter_the_pinhole_with_its_lens_finds_the_same_pixels():
    for sequence in range(2):
        errors, border = projection_errors(*make_moment(replace(SMALL, speed=12.0, rolling_shutter_s=0.0), sequence, 5))
        assert len(errors) > 500
        assert errors.max() < 1e-6
        assert border.max(initial=0) < 1e-6


def test_the_default_rolling_shutter_moves_no_point_by_half_a_pixel(default, fast):
    errors, border = projection_errors(*default[1:])
    assert 0.05 < errors.max() < 0.5
    assert border.max(initial=0) < 0.5
    assert projection_errors(*fast[1:])[0].max() > 2


def test_a_point_is_in_the_image_when_its_column_is_read(fast):
    drive, _, truth = fast
    points = truth.points["TOP"][0]
    for index, (name, mount) in enumerate(drive.cameras.items()):
        picture = truth.pictures[name]
        for n in np.flatnonzero(~np.isnan(points.pixels[:, index, 0]))[::37]:
            time = picture.middle + (points.pixels[n, index, 0] / mount.size[1] - 0.5) * picture.readout
            pixel = project_street(drive.ride, mount, time, 0.0, points.street_xyz[[n]])
            np.testing.assert_allclose(pixel[0], points.pixels[n, index], atol=1e-6)


def test_the_stored_projection_is_the_pixel_of_the_first_two_cameras(default):
    _, moment, truth = default
    twice = 0
    for laser in moment.lasers:
        for each, points in zip(laser.returns, truth.points[laser.name], strict=True):
            assert not each.projection[each.image[..., 0] <= 0].any()
            assert each.projection.dtype == np.int32
            stored = each.projection[points.row, points.column]
            for n in range(0, len(points.row), 7):
                seen = np.flatnonzero(~np.isnan(points.pixels[n, :, 0]))[:2]
                expected = [value for k in seen for value in (k + 1, *np.floor(points.pixels[n, k]))]
                assert list(stored[n]) == expected + [0] * (6 - len(expected))
                twice += len(seen) == 2
    assert twice > 0


def test_boxes_and_labels_hold_the_points_of_their_object(default, fast):
    for _, moment, truth in (default, fast):
        boxes = moment.boxes
        assert len(boxes) > 3
        assert len(set(truth.object_ids)) == len(boxes)
        for k, instance in enumerate(truth.instance):
            box = boxes.center[[k]], boxes.size[[k]] + 1e-6, boxes.yaw[[k]]
            inside = 0
            for returns in truth.points.values():
                own = returns[0].vehicle_xyz[returns[0].instance == instance]
                assert points_in_boxes(own, *box).all()
                inside += sum(points_in_boxes(each.vehicle_xyz, *box).sum() for each in returns)
            assert inside == boxes.num_points[k] > 0
        for camera in moment.cameras:
            labelled = list(truth.pictures[camera.name].labelled)
            points = truth.points["TOP"][0]
            pixels = static_pixels(moment, camera, points.vehicle_xyz)
            for k, instance in enumerate(truth.instance):
                own = pixels[(points.instance == instance) & ~np.isnan(pixels[:, 0])]
                if len(own):
                    centre, size = np.split(camera.labels[labelled.index(k)], 2)
                    assert (np.abs(own - centre) <= size / 2 + 1e-6).all()
            half = camera.labels[:, 2:] / 2
            assert (camera.labels[:, :2] - half >= -1e-9).all()
            assert (camera.labels[:, :2] + half <= np.array(camera.size[::-1]) + 1e-9).all()


def test_a_camera_is_where_the_vehicle_is_at_its_time_when_top_looks_its_way(fast):
    drive, moment, truth = fast
    for camera in moment.cameras:
        since = camera.pose_timestamp - moment.timestamp_micros / 1e6
        assert truth.pictures[camera.name].middle == pytest.approx(truth.time + since, abs=1e-6)
        expected = drive.ride.world_from_vehicle(truth.time + since)
        np.testing.assert_allclose(camera.world_from_vehicle, expected, atol=1e-4)
        axis = camera.vehicle_from_camera[:2, 0]
        assert np.pi * (1 - 2 * since / 0.1) == pytest.approx(np.arctan2(axis[1], axis[0]), abs=1e-4)


def test_second_returns_are_few_and_lie_behind_the_first_on_the_same_beam(default):
    _, moment, truth = default
    for laser in moment.lasers:
        first, second = (each.image[..., 0] for each in laser.returns)
        both = second > 0
        assert both.mean() < 0.1
        assert (first[both] > 0).all()
        assert (second[both] > first[both] + 0.49).all()
    assert len(truth.points["TOP"][1].row) > 50


def test_intensity_is_unbounded_and_a_piece_of_the_street_is_not_labelled():
    flags, brightest = set(), 0.0
    for sequence in range(4):
        moment, _ = make_moment(replace(SMALL, top_size=(64, 400)), sequence, 0)
        for laser in moment.lasers:
            image = laser.returns[0].image
            valid = image[..., 0] > 0
            assert (image[~valid] == -1).all()
            assert (image[valid][:, 1:3] >= 0).all()
            assert np.isfinite(image).all()
            flags |= set(np.unique(image[valid][:, 3]))
            brightest = max(brightest, float(image[valid][:, 1].max()))
    assert flags == {-1.0, 1.0}
    assert brightest > 1e3


def flat(moment, truth):
    """Every array and file of a moment and its truth, by a name."""
    held = {"pose": moment.world_from_vehicle, "boxes": moment.boxes.center, "points": moment.boxes.num_points}
    for laser in moment.lasers:
        for number, each in enumerate(laser.returns):
            held[f"{laser.name}{number}"], held[f"{laser.name}{number}p"] = each.image, each.projection
            held[f"{laser.name}{number}t"] = truth.points[laser.name][number].pixels
    for camera in moment.cameras:
        held[camera.name] = np.frombuffer(camera.jpeg, dtype=np.uint8)
        held[f"{camera.name}l"], held[f"{camera.name}p"] = camera.labels, camera.world_from_vehicle
    return held


def test_a_moment_depends_on_its_numbers_alone():
    drive = WaymoDrive(SMALL, 2)
    later = flat(*drive.moment(5))
    first = flat(*drive.moment(0))
    again = flat(*make_moment(SMALL, 2, 5))
    assert later.keys() == again.keys()
    assert all(np.array_equal(later[name], again[name], equal_nan=True) for name in later)
    assert not np.array_equal(first["TOP0"], later["TOP0"])
    other, _ = make_moment(replace(SMALL, seed=1), 2, 5)
    assert other.segment != drive.segment
    assert not np.array_equal(other.lasers[0].returns[0].image, later["TOP0"])


@pytest.mark.parametrize(
    "changes", [{"returns": 3}, {"speed": 90.0}, {"top_size": (0, 5)}, {"rolling_shutter_s": 0.2}, {"jpeg_quality": 0}]
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match="got WaymoRigSettings"):
        replace(SMALL, **changes)


def test_there_is_no_moment_beyond_the_last():
    with pytest.raises(IndexError, match="moment 10 of 10"):
        WaymoDrive(SMALL, 0).moment(10)


@pytest.mark.slow
def test_waymos_own_sizes():
    moment, truth = make_moment(WaymoRigSettings.full_size(), 0, 0)
    sizes = [laser.returns[0].image.shape for laser in moment.lasers]
    assert sizes == [(64, 2650, 4)] + [(200, 600, 4)] * 4
    assert [camera.size for camera in moment.cameras] == [(1280, 1920)] * 3 + [(886, 1920)] * 2
    assert pixel_errors(moment, truth, moment.lasers[0], np.random.default_rng(0)).max() < 1e-3
