"""Laws of ground truth: boxes are moved as points are, maps as pixels are, and a point keeps its labels."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from simipu3d.contracts.frame import Boxes, Camera, Frame
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, ImageAugmentConfig, PointAugmentConfig
from simipu3d.data.drive_world.dataset import DriveWorldConfig
from simipu3d.data.loading.augment import augment_frame
from simipu3d.data.loading.augment_images import ImageMove, draw_move
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.loading.truth import render_depth
from simipu3d.data.readers.kitti import KittiConfig
from simipu3d.data.readers.nuscenes import NuScenesConfig
from simipu3d.errors import BadFrameError
from simipu3d.geometry.boxes import box_corners, move_boxes
from simipu3d.geometry.camera import move_pixels, project_points
from simipu3d.geometry.transforms import about, rotation_z, scaling, transform_points, translation
from simipu3d.ops.rotated_iou import points_in_boxes

CAMERA_FROM_LIDAR = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.1], [1, 0, 0, -0.3], [0, 0, 0, 1]], dtype=np.float64)
STRONG = AugmentConfig(
    points=PointAugmentConfig(num_points=3000, augment_first_view=True, translation_std=(1.0, 2.0, 0.3)),
    images=ImageAugmentConfig(resize="factor", resize_factor=(0.4, 1.8), crop=(90, 200)),
)
ALL = Needs(2, 2, truth=("boxes", "depth", "pixel_class", "pixel_instance", "point_class", "point_instance"))


def labelled_frame(seed: int, size: tuple[int, int] = (70, 160), distortion: list[float] | None = None) -> Frame:
    """Random points, boxes and labels, and a camera whose depth map is that of the points."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([2, -15, -3, 0], [40, 15, 3, 1], (900, 4)).astype(np.float32)
    image_from_camera = np.array([[90, 0, 80, 2], [0, 90, 35, 0.2], [0, 0, 1, 0.003]], dtype=np.float64)
    camera = Camera(
        "front",
        rng.integers(0, 255, (*size, 3), dtype=np.uint8),
        image_from_camera,
        CAMERA_FROM_LIDAR,
        distortion=None if distortion is None else np.array(distortion),
        pixel_class=rng.integers(0, 20, size, dtype=np.uint8),
        pixel_instance=rng.integers(0, 9000, size, dtype=np.int32),
    )
    center, boxsize, yaw = (
        rng.normal(size=(5, 3)) * [9, 9, 1] + [20, 0, 0],
        rng.uniform(4, 8, (5, 3)),
        rng.normal(size=5) * 3,
    )
    boxes = Boxes(center, boxsize, yaw, ["Car", "Van"] * 2 + ["Car"], velocity=rng.normal(size=(5, 2)))
    return Frame(
        points,
        ("x", "y", "z", "intensity"),
        (camera,),
        f"frame {seed}",
        boxes=boxes,
        point_class=rng.integers(0, 20, len(points), dtype=np.uint8),
        point_instance=rng.integers(0, 9000, len(points), dtype=np.int32),
    )


def unmoved(camera: Camera) -> ImageMove:
    size = camera.image.shape[:2]
    return ImageMove(size, size, 0, 0, size, mirrored=False)


# Boxes

MOVES = {
    "rotation": rotation_z(0.9),
    "scale": scaling((1.3, 1.3, 1.3)),
    "mirror y": scaling((1.0, -1.0, 1.0)),
    "mirror x": scaling((-1.0, 1.0, 1.0)),
    "shift": translation((3.0, -2.0, 0.5)),
    "turn about a point": about((35.0, 1.0, -1.0), rotation_z(-2.1)),
}


@pytest.mark.parametrize("names", list(itertools.permutations(MOVES, 3)), ids=" after ".join)
def test_corners_of_moved_boxes_are_moved_corners(names):
    rng = np.random.default_rng(0)
    center, size, yaw = rng.normal(size=(20, 3)) * 9, rng.uniform(0.5, 6, (20, 3)), rng.uniform(-7, 7, 20)
    matrix = MOVES[names[0]] @ MOVES[names[1]] @ MOVES[names[2]]
    moved = move_boxes(center, size, yaw, None, matrix.numpy())
    corners = transform_points(matrix, torch.from_numpy(box_corners(center, size, yaw).reshape(-1, 3)))
    distance = torch.cdist(corners.reshape(20, 8, 3), torch.from_numpy(box_corners(*moved[:3])))
    assert distance.amin(dim=2).max() < 1e-6, "every moved corner is one of the moved box"
    assert distance.amin(dim=1).max() < 1e-6, "and no two share one"
    assert (moved[2] >= -np.pi).all()
    assert (moved[2] < np.pi).all()


@pytest.mark.parametrize("names", list(itertools.permutations(MOVES, 2)), ids=" after ".join)
def test_a_moving_box_moves_on_in_its_new_frame(names):
    """Move, then drive for a second: the same place, front and velocity as drive, then move."""
    rng = np.random.default_rng(1)
    center, size, yaw = rng.normal(size=(9, 3)) * 9, rng.uniform(0.5, 6, (9, 3)), rng.uniform(-3, 3, 9)
    velocity = rng.normal(size=(9, 2)) * 8
    matrix = MOVES[names[0]] @ MOVES[names[1]]
    moved = move_boxes(center, size, yaw, velocity, matrix.numpy())
    later = move_boxes(center + np.pad(velocity, ((0, 0), (0, 1))), size, yaw, velocity, matrix.numpy())
    np.testing.assert_allclose(moved[0] + np.pad(moved[3], ((0, 0), (0, 1))), later[0], atol=1e-9)
    front = center + np.column_stack([np.cos(yaw), np.sin(yaw), np.zeros(9)])
    moved_front = transform_points(matrix, torch.from_numpy(front)).numpy() - moved[0]
    np.testing.assert_allclose(np.arctan2(moved_front[:, 1], moved_front[:, 0]), moved[2], atol=1e-9)


def test_boxes_there_and_back():
    rng = np.random.default_rng(2)
    boxes = (rng.normal(size=(9, 3)), rng.uniform(0.5, 6, (9, 3)), rng.uniform(-3.1, 3.1, 9), rng.normal(size=(9, 2)))
    boxes[3][4] = np.nan
    matrix = MOVES["mirror y"] @ MOVES["scale"] @ MOVES["turn about a point"]
    there = move_boxes(*boxes, matrix.numpy())
    back = move_boxes(*there, torch.linalg.inv(matrix).numpy())
    for one, other in zip(boxes, back, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-9)
    assert np.isnan(there[3][4]).all(), "unknown stays unknown"
    assert not np.isnan(there[3][[0, 1, 2, 3, 5, 6, 7, 8]]).any()


def test_a_car_that_drives_ahead_by_hand():
    """A quarter turn to the left, twice the size: it stands at the left, looks and drives left, twice as fast."""
    matrix = scaling((2.0, 2.0, 2.0)) @ rotation_z(np.pi / 2)
    moved = move_boxes([[10.0, 0, 1]], [[4.0, 2, 1.5]], [0.0], [[5.0, 0]], matrix.numpy())
    expected = [[0.0, 20, 2]], [[8.0, 4, 3]], [np.pi / 2], [[0.0, 10]]
    for one, other in zip(moved, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert move_boxes([[0.0, 0, 0]], [[1.0, 1, 1]], [np.pi], None, np.eye(4))[2][0] == -np.pi


def test_no_boxes_move_to_no_boxes():
    moved = move_boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros((0, 2)), np.eye(4))
    assert [part.shape for part in moved] == [(0, 3), (0, 3), (0,), (0, 2)]


@pytest.mark.parametrize(
    "matrix",
    [
        scaling((1.0, 1.2, 1.0)).numpy(),
        scaling((1.0, 1.0, 0.5)).numpy(),
        scaling((0.0, 0.0, 0.0)).numpy(),
        np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
        np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]]),
    ],
)
def test_a_move_that_leaves_no_upright_box_is_refused(matrix):
    with pytest.raises(ValueError, match="boxes can be rotated about z"):
        move_boxes(np.zeros((1, 3)), np.ones((1, 3)), np.zeros(1), None, matrix)


# Maps


@pytest.mark.parametrize("seed", range(20))
def test_a_moved_map_holds_at_every_pixel_what_its_matrix_points_at(seed):
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(1, 60)), int(rng.integers(1, 90)))
    config = ImageAugmentConfig(resize="factor", resize_factor=(0.2, 3.0), crop=(40, 50))
    move = draw_move(size, config, rng)
    numbers = np.arange(size[0] * size[1]).reshape(size)
    moved = move.move_map(numbers)
    assert moved.shape == move.size
    rows, columns = np.mgrid[: move.size[0], : move.size[1]]
    grid = torch.from_numpy(np.stack([columns.ravel(), rows.ravel()], axis=1)).double()
    source = move_pixels(torch.linalg.inv(move.matrix()), grid).numpy()
    found = np.stack([moved.ravel() % size[1], moved.ravel() // size[1]], axis=1)
    assert np.abs(found - source).max() <= 0.5 + 1e-9, "the nearest pixel"


@pytest.mark.parametrize("seed", range(5))
def test_one_move_takes_the_picture_and_its_maps(seed):
    """A picture of large flat patches, and a map of the same: away from the patches' borders they still agree."""
    patches = np.random.default_rng(seed).integers(0, 250, (6, 8), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
    frame = labelled_frame(0)
    camera = replace(
        frame.cameras[0], image=np.repeat(patches[..., None], 3, 2), pixel_class=patches, pixel_instance=None
    )
    needs = Needs(0, 2, truth=("pixel_class",))
    sample = augment_frame(replace(frame, cameras=(camera,)), STRONG, needs, np.random.SeedSequence(seed))
    for (image,) in sample.images:
        agree = (image.image[0].int() - image.pixel_class.int()).abs() <= 1
        assert agree.float().mean() > 0.75
        mirrored = (image.image[0].flip(1).int() - image.pixel_class.int()).abs() <= 1
        assert mirrored.float().mean() < 0.5


def rendered_agreement(xyz, camera, moved, move) -> int:
    """Check a moved depth map against the points themselves; at how many pixels both are known.

    The moved map knows a depth at pixel q'. It took it from the raw pixel q nearest to q' (half a raw pixel at most), where a
    point had been rounded to (half a raw pixel again). So a point of that depth is moved to within one raw pixel of q'.
    """
    rerendered = render_depth(xyz, camera, move)
    both = (moved > 0) & (rerendered > 0)
    pixels, depth, visible = project_points(
        torch.from_numpy(xyz),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera.camera_from_lidar),
        move.raw_size,
        distortion=None if camera.distortion is None else torch.from_numpy(camera.distortion),
    )
    pixels = move_pixels(move.matrix(), pixels[visible]).numpy()
    depth = depth[visible].numpy().astype(np.float32)
    order = np.argsort(depth)
    step = np.array([move.resized[1] / move.raw_size[1], move.resized[0] / move.raw_size[0]])
    rows, columns = np.nonzero(both)
    for row, column in zip(rows, columns, strict=True):
        for value, reach in ((moved[row, column], 1.0), (rerendered[row, column], 0.5 / step)):
            first, last = np.searchsorted(depth[order], value, "left"), np.searchsorted(depth[order], value, "right")
            offsets = np.abs(pixels[order[first:last]] - (column, row)) / step
            assert (offsets <= reach + 1e-6).all(axis=1).any(), f"no point of {value} m near ({column}, {row})"
    return int(both.sum())


@pytest.mark.parametrize("distortion", [None, [-0.2, 0.05, 0.001, -0.002, 0.0]])
@pytest.mark.parametrize("seed", range(8))
def test_moved_depth_is_that_of_the_moved_points(seed, distortion):
    frame = labelled_frame(seed, distortion=distortion)
    xyz, camera = frame.points[:, :3], frame.cameras[0]
    whole = render_depth(xyz, camera, unmoved(camera))
    camera = replace(camera, depth=whole)
    sample = augment_frame(
        replace(frame, cameras=(camera,)), STRONG, Needs(0, 2, truth=("depth",)), np.random.SeedSequence(seed)
    )
    found = 0
    for (image,) in sample.images:
        assert image.depth.dtype == torch.float32
        found += rendered_agreement(xyz, camera, image.depth.numpy(), image.move)
    assert found > 5


@pytest.mark.parametrize("seed", range(4))
def test_rendered_depth_against_a_loop_over_the_points(seed):
    frame = labelled_frame(seed)
    camera, rng = frame.cameras[0], np.random.default_rng(seed)
    move = draw_move((70, 160), STRONG.images, rng)
    rendered = render_depth(frame.points[:, :3], camera, move)
    expected, written = np.zeros(move.size, np.float32), 0
    for point in frame.points[:, :3].astype(np.float64):
        x, y, z = CAMERA_FROM_LIDAR[:3, :3] @ point + CAMERA_FROM_LIDAR[:3, 3]
        u, v, depth = camera.image_from_camera @ (x, y, z, 1)
        u, v = u / depth, v / depth
        if depth <= 0.5 or not (-0.5 <= u < 159.5 and -0.5 <= v < 69.5):
            continue
        u, v, _ = move.matrix().numpy() @ (u, v, 1)
        column, row = int(np.floor(u + 0.5)), int(np.floor(v + 0.5))
        if 0 <= row < move.size[0] and 0 <= column < move.size[1]:
            written += 1
            if expected[row, column] == 0 or depth < expected[row, column]:
                expected[row, column] = depth
    assert written > 50
    np.testing.assert_allclose(rendered, expected, rtol=1e-5)
    nothing = render_depth(np.zeros((0, 3), np.float32), camera, move)
    assert nothing.shape == move.size
    assert not nothing.any()


def test_depth_comes_from_the_points_where_the_camera_has_no_map():
    frame, needs = labelled_frame(0), Needs(1, 1, truth=("depth",))
    image = augment_frame(frame, STRONG, needs, np.random.SeedSequence(0)).images[0][0]
    assert np.array_equal(image.depth.numpy(), render_depth(frame.points[:, :3], frame.cameras[0], image.move))
    own = replace(frame.cameras[0], depth=np.full((70, 160), 7, np.float32))
    image = augment_frame(replace(frame, cameras=(own,)), STRONG, needs, np.random.SeedSequence(0)).images[0][0]
    assert (image.depth == 7).all()


# Points


def check_point_labels(sample, frame) -> None:
    """Class and instance of every kept point are those of its source, and it lies where its source was moved to."""
    for view in sample.views:
        source = view.source_index.numpy()
        raw = torch.from_numpy(frame.points[source, :3])
        assert (transform_points(view.augmented_from_lidar, raw) - view.points[:, :3]).abs().max() < 1e-4
        assert np.array_equal(view.point_class.numpy(), frame.point_class[source])
        assert np.array_equal(view.point_instance.numpy(), frame.point_instance[source])
        assert (view.point_class.dtype, view.point_instance.dtype) == (torch.uint8, torch.int32)


def check_boxes_hold_their_points(sample, frame) -> int:
    """Points of the first view lie in moved boxes as their sources do in the raw ones; how many do."""
    view, boxes = sample.views[0], sample.boxes
    moved = (boxes.center.numpy(), boxes.size.numpy(), boxes.yaw.numpy())
    scale = float(torch.linalg.det(view.augmented_from_lidar[:3, :3]).abs()) ** (1 / 3)
    raw = (frame.boxes.center, frame.boxes.size, frame.boxes.yaw)
    before = points_in_boxes(frame.points[view.source_index.numpy(), :3], *raw)
    points = view.points[:, :3].numpy()
    # float32 moves a point by some micrometres.
    inner, outer = (points_in_boxes(points, moved[0], moved[1] + slack * scale, moved[2]) for slack in (-1e-3, 1e-3))
    assert not (inner & ~before).any()
    assert not (before & ~outer).any()
    return int(before.sum())


@pytest.mark.parametrize("seed", range(5))
def test_labels_and_boxes_go_with_the_points(seed):
    frame = labelled_frame(seed)
    sample = augment_frame(frame, STRONG, ALL, np.random.SeedSequence(seed))
    check_point_labels(sample, frame)
    assert check_boxes_hold_their_points(sample, frame) > 0
    assert sample.boxes.names == ("Car", "Van", "Car", "Van", "Car")
    assert sample.boxes.num_points.tolist() == [-1] * 5
    assert sample.boxes.attributes == ("",) * 5


@pytest.mark.parametrize("needs", [Needs(0, 1, truth=("boxes",)), Needs(2, 1, truth=("boxes",))])
def test_boxes_without_a_moved_view_stay_in_the_lidar_frame(needs):
    frame = labelled_frame(0)
    sample = augment_frame(frame, AugmentConfig(), needs, np.random.SeedSequence(0))
    np.testing.assert_allclose(sample.boxes.center, frame.boxes.center)
    np.testing.assert_allclose(sample.boxes.size, frame.boxes.size)
    np.testing.assert_allclose(np.exp(1j * (sample.boxes.yaw.numpy() - frame.boxes.yaw)), 1)
    np.testing.assert_allclose(sample.boxes.velocity, frame.boxes.velocity)


def test_a_single_view_moves_its_boxes():
    frame = labelled_frame(0)
    sample = augment_frame(frame, AugmentConfig(), Needs(1, truth=("boxes",)), np.random.SeedSequence(0))
    assert check_boxes_hold_their_points(sample, frame) > 0
    assert np.abs(sample.boxes.center.numpy() - frame.boxes.center).max() > 1


@pytest.mark.parametrize("kind", [kind for kind in ALL.truth if kind != "depth"])
def test_a_frame_without_what_is_needed_is_bad_and_says_so(kind):
    frame = labelled_frame(3)
    if kind.startswith("pixel"):
        frame = replace(frame, cameras=(replace(frame.cameras[0], **{kind: None}),))
    else:
        frame = replace(frame, **{kind: None})
    with pytest.raises(BadFrameError, match=rf"^frame frame 3(, camera front)?: has no {kind}, which the method needs"):
        augment_frame(frame, STRONG, ALL, np.random.SeedSequence(0))
    fine = Needs(2, 2, truth=tuple(other for other in ALL.truth if other != kind))
    augment_frame(frame, STRONG, fine, np.random.SeedSequence(0))


@pytest.mark.parametrize("kind", ["depth", "pixel_class", "point_class"])
def test_truth_of_another_size_makes_a_bad_frame(kind):
    frame = labelled_frame(3)
    if kind == "point_class":
        frame = replace(frame, point_class=frame.point_class[:-1])
    else:
        small = replace(frame.cameras[0], **{kind: np.zeros((70, 150), np.float32)})
        frame = replace(frame, cameras=(small,))
    with pytest.raises(BadFrameError, match=rf"{kind} has (70 x 150|899) values, expected (70 x 160|900)"):
        augment_frame(frame, STRONG, ALL, np.random.SeedSequence(0))


# Whole data sets


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return build_reader(DriveWorldConfig(root=root, num_frames=3, frames_per_sequence=3, frame_interval=2.0))


@pytest.mark.parametrize("index", range(3))
def test_truth_of_drive_world_fits_its_views(world, index):
    """Points in boxes, labels with points, and the exact depth map against the points: most agree (a point that a camera
    sees past something else does not)."""
    frame = world[index]
    sample = augment_frame(frame, STRONG, ALL, np.random.SeedSequence(index))
    check_point_labels(sample, frame)
    assert check_boxes_hold_their_points(sample, frame) > 5
    for view in sample.images:
        for camera, image in zip(frame.cameras, view, strict=True):
            rendered = torch.from_numpy(render_depth(frame.points[:, :3], camera, image.move))
            both = (rendered > 0) & (image.depth > 0)
            assert both.sum() > 100
            close = (rendered - image.depth).abs() < 0.1 + 0.03 * image.depth
            assert close[both].float().mean() > 0.75
            check_pixel_classes(frame, camera, image)


def check_pixel_classes(frame, camera, image) -> None:
    """A point's class is mostly that of the pixel it is moved to."""
    pixels, _, visible = project_points(
        torch.from_numpy(frame.points[:, :3]),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera.camera_from_lidar),
        image.move.raw_size,
    )
    moved = move_pixels(image.augmented_from_image, pixels).round().long()
    inside = visible & (moved >= 0).all(1) & (moved[:, 1] < image.move.size[0]) & (moved[:, 0] < image.move.size[1])
    seen = image.pixel_class[moved[inside, 1], moved[inside, 0]]
    own = torch.from_numpy(frame.point_class)[inside]
    assert (seen == own).float().mean() > 0.75


REAL = {
    "kitti": lambda samples: KittiConfig(root=samples / "kitti", split="train"),
    "nuscenes": lambda samples: NuScenesConfig(root=samples / "nuscenes", version="v1.0-mini", split="all"),
}


@pytest.mark.parametrize("name", list(REAL))
def test_truth_of_a_real_frame_fits_its_views(samples, name):
    """Boxes hold their points in the augmented view; depth that was moved is that of the moved points."""
    frame = build_reader(REAL[name](samples))[0]
    config = AugmentConfig(
        points=PointAugmentConfig(rotation_centre=(20.0, 0.0, 0.0), augment_first_view=True),
        images=ImageAugmentConfig(resize="factor", resize_factor=(0.4, 0.9), crop=(300, 500)),
    )
    needs = Needs(2, 1, truth=("boxes", "depth"))
    xyz = frame.points[:, :3]
    mapped = tuple(replace(camera, depth=render_depth(xyz, camera, unmoved(camera))) for camera in frame.cameras)
    sample = augment_frame(replace(frame, cameras=mapped), config, needs, np.random.SeedSequence(1))
    assert check_boxes_hold_their_points(sample, frame) > 20
    first, image = mapped[0], sample.images[0][0]
    assert rendered_agreement(xyz, first, image.depth.numpy(), image.move) > 100
