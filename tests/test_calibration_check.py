"""Depth edges against image edges: a right calibration agrees, a wrong one is found, and little evidence is no alarm."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import CAMERA_FROM_LIDAR, COLUMNS, street

from simipu3d.config import parse_part
from simipu3d.contracts.frame import Camera, Frame
from simipu3d.data.calibration_check import (
    FEWEST_FRAMES,
    OFFSETS,
    calibration_problem,
    edge_scores,
    judge,
    sharpness,
    turned,
    warn_if_calibration_seems_off,
)
from simipu3d.data.calibration_picture import draw_calibration
from simipu3d.data.loading.loader import build_reader
from simipu3d.geometry.depth_edges import depth_edges
from simipu3d.geometry.rigid import check_projection, check_rigid
from simipu3d.pictures.overlay import project
from simipu3d.registry import READERS

SIZE = (120, 400)
FOCAL = 200.0
NUM_FRAMES = 8


def poles(seed: int) -> Frame:
    """Bright boards before a dark wall, seen by a lidar at the camera: every depth edge is an image edge."""
    rng = np.random.default_rng(seed)
    azimuth, elevation = np.meshgrid(np.deg2rad(np.arange(-44, 44, 0.4)), np.deg2rad(np.arange(-16, 16, 0.7)))
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1)
    rays = rays.reshape(-1, 3)
    distance = 40 / rays[:, 0]
    image = np.full((*SIZE, 3), 60, np.uint8) + rng.integers(0, 12, (*SIZE, 1), dtype=np.uint8)
    centre = np.array([SIZE[1] / 2 - 0.5, SIZE[0] / 2 - 0.5])
    for _ in range(14):
        near, place, height = rng.uniform(8, 25), rng.uniform(-0.8, 0.8), rng.uniform(-0.25, 0.25)
        half = np.array([rng.uniform(0.02, 0.06), rng.uniform(0.03, 0.12)])
        y_over_x, z_over_x = rays[:, 1] / rays[:, 0], rays[:, 2] / rays[:, 0]
        inside = (np.abs(y_over_x - place) < half[0]) & (np.abs(z_over_x - height) < half[1])
        distance = np.where(inside, np.minimum(distance, near / rays[:, 0]), distance)
        low, high = (np.array([-place, -height]) + sign * half for sign in (-1, 1))
        (left, top), (right, bottom) = ((end * FOCAL + centre).round().astype(int) for end in (low, high))
        image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = rng.integers(120, 250)
    points = np.column_stack([rays * distance[:, None], np.full(len(rays), 0.5)]).astype(np.float32)
    matrix = np.array([[FOCAL, 0, centre[0], 0], [0, FOCAL, centre[1], 0], [0, 0, 1, 0]])
    return Frame(points, COLUMNS, (Camera("front", image, matrix, CAMERA_FROM_LIDAR),), f"{seed:06d}")


@cache
def sound() -> tuple[Frame, ...]:
    return tuple(poles(seed) for seed in range(NUM_FRAMES))


def verdict_of(cameras, frames=None):
    frames = sound() if frames is None else frames
    return judge("front", [edge_scores(camera, frame.points) for camera, frame in zip(cameras, frames, strict=True)])


def test_a_right_calibration_agrees():
    check = verdict_of([frame.cameras[0] for frame in sound()])
    assert (check.verdict, check.is_problem) == ("agrees", False)
    assert abs(check.sideways.offset) < 0.7
    assert abs(check.upwards.offset) < 1.0
    assert check.sideways.error < 0.5
    assert "8 frames agree" in check.message


@pytest.mark.parametrize("offset", [-5.0, 9.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_turned_camera_is_found_by_its_pixels(axis, offset):
    """The offset that is reported takes the points back."""
    check = verdict_of([turned(frame.cameras[0], axis, offset) for frame in sound()])
    found = (check.sideways, check.upwards)[axis]
    assert found.offset == pytest.approx(-offset, abs=1.0)
    assert abs(found.offset_deg - np.rad2deg(np.arctan(-offset / FOCAL))) < 0.3
    if axis == 0 or abs(offset) > 3:
        assert check.verdict == "seems off"
        assert (
            f"px {('right', 'left')[int(offset > 0)] if axis == 0 else ('down', 'up')[int(offset > 0)]}"
            in check.message
        )


def test_turned_moves_straight_ahead_by_pixels():
    """A point on the optical axis moves by the offset: right and down are positive."""
    camera = sound()[0].cameras[0]
    ahead = np.array([[20.0, 0, 0]])
    start = project(camera, ahead)[0][0]
    assert project(turned(camera, 0, 7.0), ahead)[0][0] == pytest.approx(start + np.array([7, 0]), abs=1e-6)
    assert project(turned(camera, 1, -4.0), ahead)[0][0] == pytest.approx(start + np.array([0, -4]), abs=1e-6)
    assert check_rigid(turned(camera, 0, 7.0).camera_from_lidar) == ""


def test_pictures_of_other_frames_do_not_fit():
    cameras = [frame.cameras[0] for frame in sound()]
    swapped = [replace(own, image=other.image) for own, other in zip(cameras, cameras[3:] + cameras[:3], strict=True)]
    check = verdict_of(swapped)
    assert check.verdict in ("does not fit", "not enough evidence")
    right = verdict_of(cameras)
    assert check.sideways.contrast < 0.3 * right.sideways.contrast


def test_little_evidence_is_no_alarm():
    """Few frames, few points, blank pictures, no frames at all: nothing is claimed."""
    frames = sound()[: FEWEST_FRAMES - 1]
    off = verdict_of([turned(frame.cameras[0], 0, 12.0) for frame in frames], frames)
    assert off.verdict == "not enough evidence"
    assert "7 frames with depth edges, 8 are needed" in off.message
    noise = [street(seed) for seed in range(NUM_FRAMES)]
    blank = [replace(frame.cameras[0], image=np.zeros_like(frame.cameras[0].image)) for frame in sound()]
    empty = [replace(frame, points=frame.points[:0]) for frame in sound()]
    cameras = [frame.cameras[0] for frame in sound()]
    for checked in (
        verdict_of([frame.cameras[0] for frame in noise], noise),
        verdict_of(blank),
        verdict_of(cameras, empty),
        judge("front", []),
    ):
        assert (checked.verdict, checked.is_problem) == ("not enough evidence", False)


def test_a_car_frame_far_from_the_lidar_changes_nothing():
    """Points in the frame of a car's rear axle: depth edges are still taken as seen from where the cameras are."""
    shift = np.array([1.5, 0.0, 2.0])
    frames, cameras = [], []
    for frame in sound():
        points = frame.points.copy()
        points[:, :3] += shift.astype(np.float32)
        back = np.eye(4)
        back[:3, 3] = -shift
        frames.append(replace(frame, points=points))
        cameras.append(replace(frame.cameras[0], camera_from_lidar=frame.cameras[0].camera_from_lidar @ back))
    assert verdict_of(cameras, frames).verdict == "agrees"


def test_depth_edges_of_a_board_worked_out_by_hand():
    """A board 10 m ahead before a wall at 20 m: upright edges half a beam beyond its sides, level ones above it only."""
    azimuth, elevation = np.meshgrid(np.deg2rad(np.arange(-10, 10.01, 0.4)), np.deg2rad(np.arange(-4, 4.01, 1.0)))
    azimuth, elevation = azimuth.ravel(), elevation.ravel()
    board = (np.abs(np.rad2deg(azimuth)) < 2.1) & (np.rad2deg(elevation) < 1.1)
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1)
    origin = np.array([3.0, -2, 1])
    order = np.random.default_rng(0).permutation(len(rays))  # the order of a scan is not known
    edges = depth_edges((rays * np.where(board, 10.0, 20.0)[:, None])[order] + origin, origin)
    seen = edges.xyz - origin
    assert np.linalg.norm(seen, axis=1) == pytest.approx(np.full(len(seen), 10.0))
    beside, above = seen[edges.upright], seen[~edges.upright]
    assert len(beside) == 2 * 6, "two sides in each of the rows -4 to 1 degrees"
    assert np.abs(np.rad2deg(np.arctan2(beside[:, 1], beside[:, 0]))) == pytest.approx(np.full(12, 2.2), abs=0.01)
    assert len(above) == 11
    assert np.rad2deg(np.arcsin(above[:, 2] / 10)) == pytest.approx(np.full(11, 1.5), abs=0.01)
    assert edges.weight == pytest.approx(np.full(23, np.sqrt(5.0))), "a step of 10 m counts as 5"
    assert len(depth_edges(np.zeros((0, 3)), origin).xyz) == 0


def test_a_slope_is_no_peak():
    """Whatever changes steadily over the offsets, like road below and sky above, adds nothing."""
    assert sharpness((2.0 + 0.01 * OFFSETS)[None]) == pytest.approx(np.zeros((1, 29)), abs=1e-9)
    peak = sharpness((OFFSETS == 0).astype(float)[None])
    assert peak.argmax() == peak.shape[1] // 2


@pytest.mark.slow
def test_real_drives(samples):
    """KITTI as it is agrees; 5 px sideways, 15 px in height, 0.5 degrees and pictures of other frames are found."""
    root = samples / "drives" / "pretrain"
    if not root.is_dir():
        pytest.skip("no drives among the samples")
    raw = {
        "name": "kitti",
        "root": str(root),
        "split": "all",
        "load_boxes": False,
        "frustum": False,
        "point_range": None,
    }
    reader = build_reader(parse_part("data", READERS, raw))
    frames = [reader[index] for index in np.linspace(0, len(reader) - 1, 24).round().astype(int).tolist()]
    cameras = [frame.cameras[0] for frame in frames]
    assert verdict_of(cameras, frames).verdict == "agrees"

    def moved(du, dv):
        shift = np.array([[1.0, 0, du], [0, 1, dv], [0, 0, 1]])
        return [replace(camera, image_from_camera=shift @ camera.image_from_camera) for camera in cameras]

    for change in (moved(5, 0), moved(-5, 0), moved(0, 15), moved(0, -15), [turned(own, 0, 6.3) for own in cameras]):
        assert verdict_of(change, frames).verdict == "seems off"
    size = np.array([camera.image.shape[:2] for camera in cameras]).min(axis=0)
    cut = [replace(camera, image=camera.image[: size[0], : size[1]]) for camera in cameras]
    swapped = [replace(own, image=other.image) for own, other in zip(cut, cut[12:] + cut[:12], strict=True)]
    assert verdict_of(swapped, frames).verdict == "does not fit"


def test_the_embedded_world_agrees():
    """Rendered streets at a size at which pixels can be told apart."""
    raw = {"name": "drive_world", "num_frames": 8, "frames_per_sequence": 1, "image_size": [96, 320]}
    reader = build_reader(parse_part("data", READERS, raw))
    frames = [reader[index] for index in range(8)]
    cameras = [frame.cameras[0] for frame in frames]
    check = verdict_of(cameras, frames)
    assert check.verdict == "agrees"
    assert abs(check.sideways.offset) < 0.6
    assert verdict_of([turned(camera, 0, 3.0) for camera in cameras], frames).verdict == "seems off"


class Frames:
    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return self.frames[index]


def test_the_warning_before_training(caplog):
    assert [check.verdict for check in warn_if_calibration_seems_off(Frames(sound()))] == ["agrees"]
    assert caplog.messages == []
    off = [replace(frame, cameras=(turned(frame.cameras[0], 0, 8.0),)) for frame in sound()]
    warn_if_calibration_seems_off(Frames(off))
    (message,) = caplog.messages
    assert message.startswith("camera front: the calibration seems off by the pictures of 8 frames")
    broken = [replace(frame, cameras=(replace(frame.cameras[0], camera_from_lidar=np.zeros((4, 4))),)) for frame in off]
    assert warn_if_calibration_seems_off(Frames(broken)) == []


def test_the_page(tmp_path):
    frames = [replace(frame, cameras=(turned(frame.cameras[0], 0, 8.0),)) for frame in sound()]
    check = verdict_of([frame.cameras[0] for frame in frames])
    picture = draw_calibration(check, frames[0])
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 1800
    assert draw_calibration(check, replace(frames[0], cameras=())) is None


RIGID = np.eye(4)
NOT_RIGID = {
    "zeros": (np.zeros((4, 4)), "last row"),
    "singular": (np.diag([1.0, 1, 0, 1]), "holds no rotation"),
    "scaled": (np.diag([100.0, 100, 100, 1]), "holds no rotation"),
    "mirror": (np.diag([1.0, -1, 1, 1]), "mirrors"),
    "transposed": (np.block([[np.eye(3), np.zeros((3, 1))], [np.ones((1, 4))]]), "is it transposed"),
    "NaN": (np.full((4, 4), np.nan), "no finite number"),
    "words": (np.full((4, 4), "1"), "no finite number"),
    "3 x 4": (np.eye(4)[:3], "is 3 x 4"),
    "huge": (np.full((4, 4), 1e300), "last row"),
    "huge rotation": (np.diag([1e300, 1, 1, 1]), "holds no rotation"),
}


@pytest.mark.parametrize("name", NOT_RIGID)
def test_what_is_no_rigid_motion(name):
    matrix, words = NOT_RIGID[name]
    assert words in check_rigid(matrix)


def test_what_is_rigid_up_to_rounding():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation * np.sign(np.linalg.det(rotation)), rng.normal(size=3)
        matrix[3] += rng.normal(size=4) * 1e-16
        assert check_rigid(matrix.round(4) if rng.random() < 0.5 else matrix) == ""


def test_what_is_a_projection():
    good = np.array([[700.0, 0, 600, 45], [0, 700, 180, 0], [1e-16, 0, 1, 0.003]])
    assert check_projection(good, (375, 1242)) == ""
    for change, words in (
        (np.diag([1 / 1242, 1 / 375, 1]) @ good, "are they normalised"),
        (np.diag([-1, 1, 1]) @ good, "focal lengths"),
        (good * 2, "last row"),
        (np.array([[700.0, 0, 6000, 45], [0, 700, 180, 0], [0, 0, 1, 0]]), "principal point"),
        (good[:, :3], "3 x 4"),
        (good * np.nan, "finite"),
    ):
        assert words in check_projection(change, (375, 1242))
    camera = sound()[0].cameras[0]
    assert calibration_problem(camera) == ""
    assert calibration_problem(replace(camera, camera_from_lidar=np.zeros((4, 4)))).startswith("camera_from_lidar has")
