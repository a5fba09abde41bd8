"""Laws of the made street world: its ground truth agrees with a slow ray caster, with its lidar and with itself."""

import hashlib
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from slow_rays import inside, slow_cast

from simipu3d.config import parse_block, parse_part
from simipu3d.data.drive_world import DriveWorld, DriveWorldConfig, raycast, sensors, shapes
from simipu3d.data.drive_world.materials import CLASS_NAMES, SKY
from simipu3d.data.drive_world.scene import build_scene
from simipu3d.errors import UserError
from simipu3d.geometry.camera import project_points
from simipu3d.ops.rotated_iou import points_in_boxes
from simipu3d.registry import READERS

EXACT = {"cache": False, "range_noise": 0.0, "dropout": 0.0}


def make(**keys) -> DriveWorld:
    keys = {key: str(value) if key == "root" else value for key, value in keys.items()}
    return DriveWorld(parse_block("data", DriveWorldConfig, {"name": "drive_world", **keys}))


def same(one, other) -> bool:
    """Do two frames hold the same, bit for bit?"""
    pairs = [
        (one.points, other.points),
        (one.point_class, other.point_class),
        (one.point_instance, other.point_instance),
    ]
    pairs += [(one.world_from_lidar, other.world_from_lidar), (one.boxes.num_points, other.boxes.num_points)]
    pairs += [(getattr(one.boxes, name), getattr(other.boxes, name)) for name in ("center", "size", "yaw", "velocity")]
    for a, b in zip(one.cameras, other.cameras, strict=True):
        names = ("image", "depth", "pixel_class", "pixel_instance", "camera_from_lidar", "image_from_camera")
        pairs += [(getattr(a, name), getattr(b, name)) for name in names]
    labels = (one.frame_id, one.sequence_id, one.timestamp, tuple(one.boxes.names))
    alike = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    return alike and labels == (other.frame_id, other.sequence_id, other.timestamp, tuple(other.boxes.names))


def project(frame, camera, xyz=None):
    """Pixels, depth and visibility of a frame's points (or of `xyz`, in its lidar frame) in one of its cameras."""
    pixels, depth, visible = project_points(
        torch.from_numpy(np.array(frame.points[:, :3] if xyz is None else xyz, dtype=np.float64)),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera.camera_from_lidar),
        camera.image.shape[:2],
    )
    return pixels.numpy(), depth.numpy(), visible.numpy()


@pytest.fixture(scope="module")
def six():
    return make(**EXACT, num_cameras=6, azimuth_range_deg=360.0, azimuth_step_deg=1.0, seed=5, num_frames=12)


@pytest.mark.parametrize("index", [0, 5, 10])
def test_depth_class_and_instance_of_a_pixel_are_those_of_the_ray_through_its_centre(six, index):
    frame, rng = six[index], np.random.default_rng(index)
    scene = six._scene(index // 4)
    world = scene.at(frame.timestamp)
    for camera in frame.cameras:
        street_from_camera = frame.world_from_lidar @ np.linalg.inv(camera.camera_from_lidar)
        height, width = camera.depth.shape
        for u, v in zip(rng.integers(width, size=6), rng.integers(height, size=6), strict=True):
            ray = np.linalg.inv(camera.image_from_camera[:, :3]) @ [u, v, 1]
            length = np.linalg.norm(ray)
            distance, solid = slow_cast(world, street_from_camera[:3, 3], street_from_camera[:3, :3] @ ray / length)
            expected = 0.0 if solid == raycast.NOTHING else distance / length
            np.testing.assert_allclose(camera.depth[v, u], expected, rtol=1e-5)
            assert camera.pixel_instance[v, u] == (scene.instances[solid] if solid >= 0 else 0)
            if solid == raycast.GROUND:
                assert CLASS_NAMES[camera.pixel_class[v, u]] in ("road", "terrain")
            elif solid >= 0 and CLASS_NAMES[world.label[solid]] == "sidewalk":
                assert CLASS_NAMES[camera.pixel_class[v, u]] in ("sidewalk", "terrain")
            else:
                assert camera.pixel_class[v, u] == (SKY if solid == raycast.NOTHING else world.label[solid])


def test_lidar_returns_are_those_of_the_slow_ray_caster(six):
    frame, rng = six[7], np.random.default_rng(0)
    scene = six._scene(1)
    world, origin = scene.at(frame.timestamp), frame.world_from_lidar[:3, 3]
    slipped = 0
    for n in rng.choice(len(frame.points), 60, replace=False):
        xyz = frame.points[n, :3].astype(np.float64)
        reach = np.linalg.norm(xyz)
        distance, solid = slow_cast(world, origin, frame.world_from_lidar[:3, :3] @ xyz / reach)
        if abs(distance - reach) < 1e-3 * reach:
            assert frame.point_instance[n] == (scene.instances[solid] if solid >= 0 else 0)
        else:
            slipped += 1
    # float32 points turn the ray a little: near an edge it may slip past.
    assert slipped <= 1


def test_shadows_do_not_depend_on_the_grid_that_finds_them(six):
    scene, rng = six._scene(0), np.random.default_rng(1)
    world = scene.at(0.0)
    shadows = raycast.index_shadows(world, scene.light.sun, 0.0, 220.0)
    found = []
    for _ in range(300):
        x, y, z = rng.uniform(-30, 60), rng.uniform(-15, 15), rng.uniform(0.0, 3.0)
        hits = [
            raycast.hit_solid(kind, shape, x, y, z, *scene.light.sun)[0]
            for kind, shape in zip(world.kind, world.shape, strict=True)
        ]
        found.append(raycast.in_shadow(world, shadows, x, y, z))
        assert found[-1] == (min(hits) < np.inf)
    assert 0 < sum(found) < len(found)


def test_lidar_points_lie_on_the_surface_that_the_depth_map_shows(six):
    """Inverse depth is linear over the image of a plane: between four pixels of a surface it interpolates exactly."""
    errors = []
    for index in range(4):
        frame = six[index]
        for camera in frame.cameras:
            pixels, depth, visible = project(frame, camera)
            height, width = camera.depth.shape
            whole = np.floor(pixels).astype(int)
            visible &= (whole >= 0).all(1) & (whole[:, 0] < width - 1) & (whole[:, 1] < height - 1)
            (u, v), (fu, fv) = whole[visible].T, (pixels - whole)[visible].T
            ring = [(v, u), (v, u + 1), (v + 1, u), (v + 1, u + 1)]
            weights = [(1 - fu) * (1 - fv), fu * (1 - fv), (1 - fu) * fv, fu * fv]
            flat = np.all([camera.pixel_class[at] == frame.point_class[visible] for at in ring], axis=0)
            near, far = np.min([camera.depth[at] for at in ring], 0), np.max([camera.depth[at] for at in ring], 0)
            flat &= far < 1.1 * near
            inverse = sum(w / np.maximum(camera.depth[at], 1e-3) for w, at in zip(weights, ring, strict=True))
            errors.append((np.abs(1 / inverse - depth[visible]) / depth[visible])[flat])
    errors = np.concatenate(errors)
    assert len(errors) > 3000
    assert np.median(errors) < 1e-4
    assert np.quantile(errors, 0.9) < 0.02


def test_noisy_lidar_agrees_with_the_nearest_pixel_to_a_few_centimetres():
    reader, differences = make(cache=False, seed=1), []
    for index in range(0, 24, 4):
        frame = reader[index]
        pixels, depth, visible = project(frame, frame.cameras[0])
        u, v = np.rint(pixels[visible]).astype(int).T
        differences.append(np.abs(frame.cameras[0].depth[v, u] - depth[visible]))
        assert 4000 < visible.sum() < 14000
    assert np.median(np.concatenate(differences)) < 0.12


@pytest.mark.parametrize("seed", range(4))
def test_points_of_an_instance_lie_in_its_box(seed):
    reader = make(**EXACT, seed=seed, azimuth_range_deg=360.0, azimuth_step_deg=0.8)
    for index in (0, 3):
        frame = reader[index]
        boxes = frame.boxes
        numbers = np.unique(frame.point_instance)
        numbers = numbers[numbers > 0]
        assert len(boxes) == len(numbers) > 0
        held = points_in_boxes(frame.points[:, :3], boxes.center, boxes.size + 2e-3, boxes.yaw)
        for row, number in enumerate(numbers):
            own = frame.point_instance == number
            assert held[row][own].all()
            assert boxes.num_points[row] == own.sum()
            (label,) = {CLASS_NAMES[c] for c in frame.point_class[own]}
            assert label == boxes.names[row].lower()


@pytest.mark.parametrize("model", [shapes.car, shapes.van, shapes.cyclist, lambda rng: shapes.pedestrian(rng, True)])
def test_boxes_are_tight(model):
    """Points drawn in a larger box and kept inside a solid reach, but never pass, the box's faces."""
    rng = np.random.default_rng(2)
    parts = model(rng)
    low, high = shapes.bounds(parts)
    kept = []
    for part in parts:
        shape = np.array([*part.centre, 1, 0, *part.half, *part.lean])
        reach = raycast.half_bounds(np.array([part.kind]), shape[None])[0]
        local = rng.uniform(-1.1, 1.1, (1500, 3)) * reach
        if part.kind == raycast.RING:
            local[:, 1] = 0.0
        kept.append(np.array([p for p in local if inside(part.kind, shape, p)]) + part.centre)
    kept = np.concatenate(kept)
    assert (kept >= low - 1e-6).all()
    assert (kept <= high + 1e-6).all()
    np.testing.assert_allclose(kept.min(0), low, atol=0.05)
    np.testing.assert_allclose(kept.max(0), high, atol=0.05)


def test_still_things_stay_where_they_are_in_the_world():
    """Still points of one frame, carried into a later one by world_from_lidar, are seen there unless hidden."""
    reader = make(**EXACT, seed=2, frames_per_sequence=5, image_size=[128, 448], pitch_std_deg=2.0)
    moved = 0.0
    for index in range(0, 15, 5):
        before, after = reader[index], reader[index + 2]
        after_from_before = np.linalg.inv(after.world_from_lidar) @ before.world_from_lidar
        moved = max(moved, np.linalg.norm(after_from_before[:3, 3]))
        still = (before.point_instance == 0) & (before.point_class != CLASS_NAMES.index("vegetation"))
        xyz = before.points[still, :3] @ after_from_before[:3, :3].T + after_from_before[:3, 3]
        pixels, depth, visible = project(after, after.cameras[0], xyz)
        u, v = np.rint(pixels[visible]).astype(int).T
        seen, depth = after.cameras[0].depth[v, u], depth[visible]
        beyond = (seen == 0) | (seen > 1.1 * depth + 0.2)
        assert beyond.mean() < 0.02
        assert np.median(np.abs(seen - depth)) < 0.12
        ground = before.point_class == CLASS_NAMES.index("road")
        world_z = (before.points[ground, :3] @ before.world_from_lidar[:3, :3].T + before.world_from_lidar[:3, 3])[:, 2]
        np.testing.assert_allclose(world_z, 0, atol=1e-5)
    assert moved > 3


def test_boxes_advance_by_their_velocity():
    reader = make(**EXACT, seed=3, azimuth_range_deg=360.0, azimuth_step_deg=0.8, frame_interval=0.4)
    moving = 0
    for index in range(0, 16, 4):
        centres, velocities = [], []
        for frame in (reader[index], reader[index + 2]):
            turn, shift = frame.world_from_lidar[:3, :3], frame.world_from_lidar[:3, 3]
            keys = [tuple(size) for size in frame.boxes.size]
            centres.append(dict(zip(keys, frame.boxes.center @ turn.T + shift, strict=True)))
            velocities.append(dict(zip(keys, frame.boxes.velocity @ turn[:2, :2].T, strict=True)))
        for key in centres[0].keys() & centres[1].keys():
            moving += bool(np.linalg.norm(velocities[0][key]) > 0.5)
            np.testing.assert_allclose(velocities[1][key], velocities[0][key], atol=1e-9)
            step = np.append(0.8 * velocities[0][key], 0.0)
            np.testing.assert_allclose(centres[1][key] - centres[0][key], step, atol=1e-6)
        times = [reader[i].timestamp for i in range(index, index + 4)]
        np.testing.assert_allclose(np.diff(times), 0.4)
    assert moving > 10


@pytest.mark.parametrize("seed", range(6))
def test_nobody_drives_into_anybody(seed):
    scene = build_scene(np.random.default_rng(seed), 2.0)
    grid = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, 9), np.linspace(-0.5, 0.5, 5)), -1).reshape(-1, 2)
    for time in np.arange(0, 2.01, 0.25):
        actors = scene.actors
        center = np.array([a.centre + time * a.velocity for a in actors]) * [1, 1, 0]
        size, yaw = np.array([a.size for a in actors]), np.array([a.yaw for a in actors])
        local = grid[None] * size[:, None, :2]
        cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
        places = np.stack([local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos], -1)
        places = np.concatenate([places + center[:, None, :2], np.zeros((*places.shape[:2], 1))], -1)
        held = points_in_boxes(places.reshape(-1, 3), center, size, yaw).reshape(len(actors), len(actors), -1).any(2)
        assert np.array_equal(held, np.eye(len(actors), dtype=bool))
        x, y, _ = scene.ego.pose(time)
        assert (np.hypot(*(center[:, :2] - [x, y]).T) > 1.0).all()


def test_a_rig_of_six_looks_all_round(six):
    frame = six[1]
    assert [camera.name for camera in frame.cameras] == list(sensors.CAMERA_MOUNTS)
    seen = np.zeros(len(frame.points), dtype=int)
    for camera in frame.cameras:
        _, _, visible = project(frame, camera)
        assert visible.sum() > 150
        seen += visible
    level = np.abs(frame.points[:, 2]) < 0.1 * np.linalg.norm(frame.points[:, :2], axis=1)
    assert (seen[level] > 0).mean() > 0.99
    tilt = frame.cameras[0].camera_from_lidar[:3, :3]
    np.testing.assert_allclose(tilt @ tilt.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(tilt) == pytest.approx(1)


def test_beams_and_cameras_tilt_together():
    """Seen along the axes of the front camera, every return lies on one of the beams."""
    reader = make(**EXACT, seed=9, pitch_std_deg=4.0, roll_std_deg=4.0, beams=16, elevation_range_deg=[-15.0, 0.0])
    for index in (0, 5):
        frame = reader[index]
        right, down, ahead = (frame.points[:, :3] @ frame.cameras[0].camera_from_lidar[:3, :3].T).T
        elevation = np.degrees(np.arctan2(-down, np.hypot(right, ahead)))
        np.testing.assert_allclose(elevation, np.rint(elevation), atol=1e-4)
        assert len(np.unique(np.rint(elevation))) > 10


def test_cameras_of_a_larger_rig_can_be_left_out(six):
    some = make(
        **EXACT, num_cameras=6, azimuth_range_deg=360.0, azimuth_step_deg=1.0, seed=5, cameras=["back", "front"]
    )
    frame, all_round = some[0], six[0]
    assert [camera.name for camera in frame.cameras] == ["back", "front"]
    assert np.array_equal(frame.cameras[0].image, all_round.cameras[3].image)
    assert np.array_equal(frame.points, all_round.points)


def test_the_frame_keeps_the_contract(six):
    config = parse_part("data", READERS, {"name": "drive_world", "cache": False, "num_frames": 3})
    reader = READERS["drive_world"].target(config)
    frames = list(reader)
    assert len(frames) == len(reader) == 3
    for frame in [*frames, six[2]]:
        count = len(frame.points)
        assert frame.points.dtype == np.float32 and frame.points.shape == (count, 4)  # noqa: PT018
        assert np.isfinite(frame.points).all()
        assert frame.point_columns == reader.point_columns == ("x", "y", "z", "intensity")
        assert frame.points[:, 3].min() >= 0 and frame.points[:, 3].max() <= 1  # noqa: PT018
        assert frame.point_class.shape == frame.point_instance.shape == (count,)
        assert frame.point_class.dtype == np.uint8 and frame.point_instance.dtype == np.int32  # noqa: PT018
        assert frame.point_class.max() < len(reader.class_names) and (frame.point_class != SKY).all()  # noqa: PT018
        for camera in frame.cameras:
            assert camera.image.dtype == camera.pixel_class.dtype == np.uint8
            assert camera.depth.dtype == np.float32 and camera.pixel_instance.dtype == np.int32  # noqa: PT018
            assert np.array_equal(camera.depth == 0, camera.pixel_class == SKY)
            assert camera.image.std() > 10
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            reader[wrong]


def test_a_frame_is_the_same_however_it_is_obtained(tmp_path):
    keys = {"num_frames": 7, "seed": 11, "frames_per_sequence": 3, "num_cameras": 2}
    fresh = list(make(**keys, cache=False))
    first = make(**keys, root=tmp_path / "a")
    assert first.prepare(3, progress=False) == 7
    assert first.prepare(1, progress=False) == 0
    second = make(**keys, root=tmp_path / "b")
    assert all(same(second[i], fresh[i]) for i in (6, 0, 3))
    assert second.prepare(1, progress=False) == 4
    for index, frame in enumerate(fresh):
        assert same(first[index], frame)
        assert same(second[index], frame)
    assert not list(tmp_path.rglob("*.part"))
    assert not same(fresh[0], fresh[1])


def test_another_process_makes_the_same_frame():
    code = (
        "import hashlib; from simipu3d.data.drive_world import DriveWorld, DriveWorldConfig;"
        "f = DriveWorld(DriveWorldConfig(cache=False, seed=4))[9];"
        "print(hashlib.sha256(f.points.tobytes() + f.cameras[0].image.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    frame = make(cache=False, seed=4)[9]
    assert other == hashlib.sha256(frame.points.tobytes() + frame.cameras[0].image.tobytes()).hexdigest()


def test_splits_and_seeds_are_other_streets():
    frames = [make(cache=False, seed=seed, split=split)[0] for seed in (0, 1) for split in ("train", "val", "test")]
    images = {frame.cameras[0].image.tobytes() for frame in frames}
    sizes = [tuple(size) for frame in frames for size in frame.boxes.size]
    assert len(images) == len(frames)
    assert len(set(sizes)) == len(sizes)


def test_the_cache_is_told_apart_by_what_a_frame_depends_on(tmp_path):
    base = make(root=tmp_path)
    for keys in ({"num_frames": 5}, {"batch_size": 2}, {"num_workers": 0}, {"cameras": ["front"]}):
        assert make(root=tmp_path, **keys)._path(0) == base._path(0)
    for keys in ({"seed": 1}, {"beams": 32}, {"image_size": [64, 225]}, {"dropout": 0.2}, {"split": "val"}):
        assert make(root=tmp_path, **keys)._path(0) != base._path(0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped"])
def test_a_damaged_cache_file_is_made_again(tmp_path, caplog, damage):
    reader = make(root=tmp_path, num_frames=2)
    expected = reader[1]
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "truncated": whole[:middle],
            "empty": b"",
            "garbage": bytes(range(256)) * 40,
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert same(reader[1], expected)
        assert same(reader[1], expected)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_a_cache_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data\.root") as told:
        make(root=tmp_path / "file", num_frames=1)[0]
    assert "\n" not in str(told.value)
    assert make(cache=False).prepare(progress=False) == 0, "without a cache there is nothing to prepare"


def test_the_default_cache_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make(num_frames=1)[0]
    (path,) = tmp_path.rglob("*.npz")
    assert path.is_relative_to(tmp_path / "simipu3d" / "drive_world")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"num_cameras": 7}, "num_cameras"),
        ({"cameras": ["front_left"]}, "front_left"),
        ({"split": "tain"}, "split"),
        ({"elevation_range_deg": [3.0, -3.0]}, "elevation_range_deg"),
        ({"image_size": [64]}, "image_size"),
        ({"dropout": 0.9}, "dropout"),
        ({"beam": 32}, "beams"),
        ({"frames_per_sequence": 1000}, "frames_per_sequence"),
    ],
)
def test_wrong_settings_are_told_by_their_key(keys, told):
    with pytest.raises(UserError, match=told):
        make(**keys)


def test_noise_and_dropout_do_what_they_say():
    keys = {"cache": False, "seed": 6, "azimuth_step_deg": 0.5}
    clean, noisy = make(**keys, dropout=0.1, range_noise=0.0)[0], make(**keys, dropout=0.1, range_noise=0.05)[0]
    assert len(clean.points) == len(noisy.points)
    offset = np.linalg.norm(noisy.points[:, :3], axis=1) - np.linalg.norm(clean.points[:, :3], axis=1)
    assert offset.std() == pytest.approx(0.05, rel=0.05)
    everything = make(**keys, dropout=0.0)[0]
    lost = 1 - len(clean.points) / len(everything.points)
    assert 0.1 < lost < 0.4
    exact = make(**keys, dropout=0.0, range_noise=0.0)[0]
    reach = np.linalg.norm(exact.points[:, :3], axis=1)
    kept = np.linalg.norm(clean.points[:, :3], axis=1)
    assert (kept > 40).mean() < (reach > 40).mean()
    near = make(**keys, dropout=0.0, range_noise=0.0, max_range=20.0)[0]
    np.testing.assert_array_equal(near.points, exact.points[reach <= 20])


def test_streets_hold_vehicles_at_many_distances():
    """What a probe of depth and vehicles needs: a share of the pixels that is neither none nor half, near and far."""
    reader = make(cache=False, frames_per_sequence=1, seed=8)
    shares, depths = [], []
    vehicles = [CLASS_NAMES.index("car"), CLASS_NAMES.index("van")]
    for index in range(30):
        camera = reader[index].cameras[0]
        mask = np.isin(camera.pixel_class, vehicles)
        shares.append(mask.mean())
        depths.append(camera.depth[mask])
    assert 0.05 < np.mean(shares) < 0.16
    assert np.quantile(np.concatenate(depths), [0.1, 0.9]) == pytest.approx([7, 25], rel=0.6)
