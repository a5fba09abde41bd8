"""Laws of transforms, cameras and boxes."""

import math

import numpy as np
import pytest
import torch

from simipu3d.geometry.boxes import BOX_EDGES, box_corners
from simipu3d.geometry.camera import (
    crop_matrix,
    distort,
    inside_image,
    mirror_matrix,
    move_pixels,
    project_points,
    resize_matrix,
)
from simipu3d.geometry.transforms import (
    about,
    rotation_z,
    scaling,
    transform_points,
    transform_points_each,
    translation,
)
from simipu3d.ops.rotated_iou import points_in_boxes

IMAGE_SIZE = (370, 1224)
CAMERA_AXES = torch.tensor([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
"""From x forward, y left, z up to x right, y down, z forward."""
FOCAL = torch.tensor([[700, 0, 600, 45], [0, 700, 180, 0.2], [0, 0, 1, 0.003]], dtype=torch.float64)


def random_points(seed: int, count: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([60.0, 30.0, 4.0], dtype=torch.float64)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64) * spread


def random_rigid(seed: int) -> torch.Tensor:
    """A rotation about a random axis and a shift."""
    generator = torch.Generator().manual_seed(seed)
    rotation, upper = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    rotation = rotation * torch.sign(torch.diagonal(upper))
    rotation = rotation * torch.sign(torch.linalg.det(rotation))
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = torch.randn(3, generator=generator, dtype=torch.float64) * 5
    return matrix


def test_a_quarter_turn_takes_forward_to_left():
    turned = transform_points(rotation_z(math.pi / 2), torch.tensor([[1.0, 0, 0], [0, 1, 2]], dtype=torch.float64))
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1, 0], [-1, 0, 2]], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_composition_is_one_after_the_other_and_the_inverse_undoes(seed):
    xyz, first, second = random_points(seed), random_rigid(seed), random_rigid(seed + 100)
    torch.testing.assert_close(
        transform_points(second @ first, xyz), transform_points(second, transform_points(first, xyz))
    )
    torch.testing.assert_close(transform_points(torch.linalg.inv(first), transform_points(first, xyz)), xyz)


@pytest.mark.parametrize("seed", range(5))
def test_about_keeps_its_centre_and_distances_to_it_scale(seed):
    xyz = random_points(seed)
    centre = tuple(xyz[0].tolist())
    moved = transform_points(about(centre, rotation_z(0.7) @ scaling((1.3, 1.3, 1.3))), xyz)
    torch.testing.assert_close(moved[0], xyz[0])
    torch.testing.assert_close((moved - moved[0]).norm(dim=1), 1.3 * (xyz - xyz[0]).norm(dim=1))


def test_every_point_moves_with_its_own_frame():
    xyz = random_points(0, 40)
    batch_index = torch.arange(40) // 14
    matrices = torch.stack([random_rigid(seed) for seed in range(3)])
    together = transform_points_each(matrices, xyz, batch_index)
    for frame in range(3):
        mask = batch_index == frame
        torch.testing.assert_close(together[mask], transform_points(matrices[frame], xyz[mask]))
    assert transform_points_each(matrices, xyz[:0], batch_index[:0]).shape == (0, 3)
    assert transform_points(matrices[0], xyz[:0]).shape == (0, 3)


def test_transforms_keep_the_points_own_precision():
    assert transform_points(rotation_z(0.1), random_points(0).float()).dtype == torch.float32


def test_a_point_straight_ahead_lands_where_the_matrix_says():
    pixels, depth, visible = project_points(torch.tensor([[10.0, 0, 0]]), FOCAL, CAMERA_AXES, IMAGE_SIZE)
    expected = torch.tensor([[(6000 + 45) / 10.003, (1800 + 0.2) / 10.003]], dtype=torch.float64)
    torch.testing.assert_close(pixels, expected)
    assert visible.all()
    assert depth.item() == pytest.approx(10.003)


@pytest.mark.parametrize("seed", range(5))
def test_pixels_do_not_depend_on_where_the_lidar_origin_is(seed):
    xyz, other_from_lidar = random_points(seed), random_rigid(seed)
    pixels, _, visible = project_points(xyz, FOCAL, CAMERA_AXES, IMAGE_SIZE)
    other_xyz = transform_points(other_from_lidar, xyz)
    camera_from_other = CAMERA_AXES @ torch.linalg.inv(other_from_lidar)
    other_pixels, _, other_visible = project_points(other_xyz, FOCAL, camera_from_other, IMAGE_SIZE)
    assert visible.any()
    assert torch.equal(visible, other_visible)
    torch.testing.assert_close(other_pixels[visible], pixels[visible])


@pytest.mark.parametrize("seed", range(5))
def test_scaling_the_world_with_the_cameras_offset_moves_no_pixel(seed):
    """The fourth column of a projection is an offset of the camera in metres: it counts."""
    xyz = random_points(seed)
    bigger = FOCAL.clone()
    bigger[:, 3] *= 2
    pixels, _, visible = project_points(xyz, FOCAL, CAMERA_AXES, IMAGE_SIZE)
    doubled, _, _ = project_points(2 * xyz, bigger, CAMERA_AXES, IMAGE_SIZE)
    torch.testing.assert_close(doubled[visible], pixels[visible])
    unmoved, _, _ = project_points(2 * xyz, FOCAL, CAMERA_AXES, IMAGE_SIZE)
    assert (unmoved[visible] - pixels[visible]).abs().max() > 0.1


def test_visible_means_in_front_and_inside():
    xyz = random_points(3, 5000)
    pixels, depth, visible = project_points(xyz, FOCAL, CAMERA_AXES, IMAGE_SIZE, min_depth=2.0)
    for row in range(len(xyz)):
        u, v = pixels[row].tolist()
        inside = -0.5 <= u < IMAGE_SIZE[1] - 0.5 and -0.5 <= v < IMAGE_SIZE[0] - 0.5
        assert bool(visible[row]) == (depth[row].item() > 2.0 and inside)
    assert visible.any()
    assert not visible[xyz[:, 0] < 1.9].any()
    assert [len(part) for part in project_points(xyz[:0], FOCAL, CAMERA_AXES, IMAGE_SIZE)] == [0, 0, 0]


def test_the_image_begins_half_a_pixel_before_the_first_centre():
    pixels = torch.tensor([[-0.5, -0.5], [-0.51, 0], [9.49, 4.49], [9.5, 4], [3, 4.5]])
    assert inside_image(pixels, (5, 10)).tolist() == [True, False, True, False, False]


def test_matrices_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \(3, 4\)"):
        project_points(random_points(0), CAMERA_AXES, CAMERA_AXES, IMAGE_SIZE)


def test_distortion_follows_the_formula_and_no_distortion_changes_nothing():
    xyz = random_points(4)
    plain = project_points(xyz, FOCAL, CAMERA_AXES, IMAGE_SIZE)
    zero = project_points(xyz, FOCAL, CAMERA_AXES, IMAGE_SIZE, distortion=torch.zeros(5))
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    coefficients = torch.tensor([0.1, 0.02, 0.003, -0.002, 0.01], dtype=torch.float64)
    xy = torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    k1, k2, p1, p2, k3 = coefficients.tolist()
    for (x, y), (dx, dy) in zip(xy.tolist(), distort(xy, coefficients).tolist(), strict=True):
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
        assert dx == pytest.approx(x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x))
        assert dy == pytest.approx(y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y)


def test_points_beyond_the_fold_of_a_lens_are_not_visible():
    """With k1 = -0.3 the radius stops growing at sqrt(1 / 0.9); a far-off point would fold back into the image."""
    coefficients = torch.tensor([-0.3, 0, 0, 0, 0], dtype=torch.float64)
    radius = torch.linspace(0, 4, 400, dtype=torch.float64)
    moved = distort(torch.stack([radius, torch.zeros_like(radius)], dim=1), coefficients)
    fold = math.sqrt(1 / 0.9)
    assert torch.isfinite(moved[radius < fold]).all()
    assert torch.isinf(moved[radius > fold]).all()
    aside = torch.tensor([[1.0, -1.8, 0]])
    pixels, _, visible = project_points(aside, FOCAL, CAMERA_AXES, (4000, 4000), distortion=coefficients)
    assert not visible.any()
    assert not torch.isfinite(pixels).all()


@pytest.mark.parametrize(
    ("size", "new_size"), [((370, 1224), (185, 612)), ((375, 1242), (713, 2361)), ((5, 7), (5, 3))]
)
def test_a_resize_takes_the_corners_of_the_image_to_its_corners(size, new_size):
    corners = torch.tensor([[-0.5, -0.5], [size[1] - 0.5, size[0] - 0.5]], dtype=torch.float64)
    moved = move_pixels(resize_matrix(size, new_size), corners)
    expected = torch.tensor([[-0.5, -0.5], [new_size[1] - 0.5, new_size[0] - 0.5]], dtype=torch.float64)
    torch.testing.assert_close(moved, expected)


def test_crop_and_mirror_move_pixels_as_they_move_array_cells():
    image = np.arange(6 * 9).reshape(6, 9)
    grid = torch.tensor([[u, v] for v in range(6) for u in range(9)], dtype=torch.float64)
    moved = move_pixels(mirror_matrix(7) @ crop_matrix(top=1, left=2), grid)
    changed = image[1:, 2:][:, ::-1]
    inside = inside_image(moved, changed.shape)
    assert int(inside.sum()) == changed.size
    for (u, v), (new_u, new_v) in zip(grid[inside].int().tolist(), moved[inside].int().tolist(), strict=True):
        assert image[v, u] == changed[new_v, new_u]


def random_boxes(seed: int, count: int = 12):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 3)) * 10, rng.uniform(0.5, 6, (count, 3)), rng.uniform(-np.pi, np.pi, count)


@pytest.mark.parametrize("seed", range(5))
def test_corners_are_half_a_diagonal_away_and_edges_have_the_boxes_lengths(seed):
    center, size, yaw = random_boxes(seed)
    corners = box_corners(center, size, yaw)
    np.testing.assert_allclose(corners.mean(axis=1), center)
    distance = np.linalg.norm(corners - center[:, None], axis=2)
    np.testing.assert_allclose(distance, np.linalg.norm(size, axis=1)[:, None].repeat(8, 1) / 2)
    for corner, box_size in zip(corners, size, strict=True):
        lengths = sorted(np.linalg.norm(corner[a] - corner[b]) for a, b in BOX_EDGES)
        np.testing.assert_allclose(lengths, np.repeat(np.sort(box_size), 4))


@pytest.mark.parametrize("seed", range(5))
def test_points_in_boxes_agrees_with_the_corners(seed):
    """A blend of a box's corners is inside; the same blend stretched past the faces is not."""
    center, size, yaw = random_boxes(seed)
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(8), 50)
    inside = np.einsum("nc,kcd->knd", weights, box_corners(center, size, yaw))
    face = center + np.stack([np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)], 1) * (size[:, :1] / 2)
    for k in range(len(yaw)):
        own = (center[k : k + 1], size[k : k + 1], yaw[k : k + 1])
        assert points_in_boxes(inside[k], *own).all()
        beyond = np.stack([center[k] + 0.999 * (face[k] - center[k]), center[k] + 1.001 * (face[k] - center[k])])
        assert points_in_boxes(beyond, *own)[0].tolist() == [True, False]
    assert points_in_boxes(inside[0], center[:0], size[:0], yaw[:0]).shape == (0, 50)


def test_yaw_turns_the_length_towards_the_left():
    corners = box_corners(np.zeros((1, 3)), np.array([[4.0, 2.0, 1.0]]), np.array([np.pi / 2]))[0]
    np.testing.assert_allclose(corners[0], [-1, 2, -0.5], atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_turning_the_scene_turns_the_boxes(seed):
    center, size, yaw = random_boxes(seed)
    xyz = np.random.default_rng(seed).normal(size=(3000, 3)) * 10
    turn = rotation_z(0.4).numpy()
    moved = transform_points(torch.from_numpy(turn), torch.from_numpy(xyz)).numpy()
    moved_center = center @ turn[:3, :3].T
    before = points_in_boxes(xyz, center, size, yaw)
    assert before.any()
    assert np.array_equal(before, points_in_boxes(moved, moved_center, size, yaw + 0.4))


def test_translation_shifts():
    torch.testing.assert_close(
        transform_points(translation((1.0, 2.0, 3.0)), torch.zeros(1, 3, dtype=torch.float64)),
        torch.tensor([[1.0, 2, 3]], dtype=torch.float64),
    )
