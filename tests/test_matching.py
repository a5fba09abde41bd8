"""Tokens to tokens and tokens to pixels: laws of matching, projection and sampling."""

import pytest
import torch
import torch.nn.functional as F

from simipu3d.contracts.batch import ImageView, PointView
from simipu3d.contracts.tokens import FeatureMap, PointTokens
from simipu3d.geometry.camera import crop_matrix, mirror_matrix, resize_matrix
from simipu3d.geometry.transforms import about, rotation_z, scaling, transform_points_each
from simipu3d.matching.assignment import lidar_xyz, match_tokens
from simipu3d.matching.projection import (
    PixelPairs,
    exact_coordinates,
    project_tokens,
    sample_bilinear,
)
from simipu3d.matching.released import released_coordinates

FOCAL = 100.0


def tokens_of(sizes, seed=0, source=None):
    generator = torch.Generator().manual_seed(seed)
    batch_index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    xyz = torch.rand(len(batch_index), 3, generator=generator, dtype=torch.float64) * 20
    source = torch.full_like(batch_index, -1) if source is None else source
    return PointTokens(xyz, torch.randn(len(xyz), 4, generator=generator), batch_index, source)


def view_of(augmented_from_lidar):
    empty = torch.zeros(0, dtype=torch.int64)
    return PointView(torch.zeros(0, 4), empty, empty, augmented_from_lidar)


def images_of(sizes, matrices, raw_size=(48, 80), padded=(64, 96)):
    count = len(sizes)
    camera = torch.tensor([[FOCAL, 0, 39.5, 0], [0, FOCAL, 23.5, 0], [0, 0, 1, 0]], dtype=torch.float64)
    camera_from_lidar = torch.tensor([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    return ImageView(
        images=torch.zeros(count, 3, *padded, dtype=torch.uint8),
        image_size=torch.tensor(sizes),
        own_padded_size=(torch.tensor(sizes) + 31) // 32 * 32,
        batch_index=torch.arange(count),
        camera_index=torch.zeros(count, dtype=torch.int64),
        camera_names=("front",) * count,
        augmented_from_image=torch.stack(matrices),
        image_from_camera=camera.expand(count, 3, 4),
        camera_from_lidar=camera_from_lidar.expand(count, 4, 4),
        distortion=torch.zeros(count, 5, dtype=torch.float64),
        raw_size=torch.tensor([raw_size] * count),
    )


@pytest.mark.parametrize("seed", range(5))
def test_augmentation_is_undone(seed):
    tokens = tokens_of([5, 7], seed)
    moves = torch.stack([about((10.0, 0.0, -1.0), rotation_z(0.3 + seed)), scaling((1.2, -1.2, 1.2))])
    moved = PointTokens(
        transform_points_each(moves, tokens.xyz, tokens.batch_index),
        tokens.features,
        tokens.batch_index,
        tokens.source_index,
    )
    torch.testing.assert_close(lidar_xyz(moved, view_of(moves)), tokens.xyz)


@pytest.mark.parametrize("assignment", ["hungarian", "greedy", "nearest", "mutual_nearest"])
def test_a_batch_matches_like_its_frames(assignment):
    one, two = tokens_of([6, 0, 9], 1), tokens_of([8, 3, 4], 2)
    pairs = match_tokens((one, two), (one.xyz, two.xyz), 3, assignment=assignment)
    found = []
    for frame in range(3):
        rows = [each.batch_index == frame for each in (one, two)]
        singles = [
            PointTokens(each.xyz[row], each.features[row], each.batch_index[row] * 0, each.source_index[row])
            for each, row in zip((one, two), rows, strict=True)
        ]
        own = match_tokens(singles, [each.xyz for each in singles], 1, assignment=assignment)
        shift = [int((each.batch_index < frame).sum()) for each in (one, two)]
        found.append(torch.stack([own.first + shift[0], own.second + shift[1]], 1))
    assert torch.equal(torch.stack([pairs.first, pairs.second], 1), torch.cat(found))
    assert (one.batch_index[pairs.first] == two.batch_index[pairs.second]).all()


def test_the_gate_drops_far_pairs_only():
    one, two = tokens_of([12], 3), tokens_of([12], 4)
    everything = match_tokens((one, two), (one.xyz, two.xyz), 1, assignment="hungarian")
    gated = match_tokens((one, two), (one.xyz, two.xyz), 1, assignment="hungarian", max_distance=5.0)
    near = everything.distance <= 5.0
    assert 0 < near.sum() < 12
    assert torch.equal(gated.first, everything.first[near])
    assert torch.equal(gated.second, everything.second[near])


def test_tokens_land_where_the_camera_formula_says():
    """A point 10 m ahead, 1 m left and 0.5 m up: u = 39.5 - 100 / 10, v = 23.5 - 50 / 10; then resized by 2, mirrored."""
    size = (96, 160)
    matrix = mirror_matrix(160) @ resize_matrix((48, 80), size)
    pairs = project_tokens(torch.tensor([[10.0, 1.0, 0.5]]), torch.tensor([0]), images_of([size], [matrix]))
    u, v = (29.5 + 0.5) * 2 - 0.5, (18.5 + 0.5) * 2 - 0.5
    torch.testing.assert_close(pairs.pixels, torch.tensor([[159 - u, v]], dtype=torch.float64))
    assert pairs.visible.all()


def test_what_is_not_visible():
    """Behind the camera, too near, outside the image, and cut away by the crop."""
    matrix = crop_matrix(0, 40)
    xyz = torch.tensor([[-10.0, 0, 0], [0.3, 0, 0], [10.0, 8.0, 0], [10.0, 1.0, 0], [10.0, -1.0, 0]])
    pairs = project_tokens(xyz, torch.zeros(5, dtype=torch.int64), images_of([(48, 40)], [matrix]))
    assert pairs.visible.tolist() == [False, False, False, False, True]
    assert pairs.where_visible().token.tolist() == [4]


def test_a_token_of_two_cameras_makes_two_pairs():
    images = images_of([(48, 80), (48, 80)], [torch.eye(3, dtype=torch.float64)] * 2)
    both = ImageView(**{**vars(images), "batch_index": torch.tensor([0, 0])})
    pairs = project_tokens(torch.tensor([[10.0, 0, 0]]), torch.tensor([0]), both)
    assert pairs.token.tolist() == [0, 0]
    assert pairs.image.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_bilinear_sampling_equals_grid_sample(seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 5, 6, 9, generator=generator, dtype=torch.float64)
    image = torch.randint(0, 3, (40,), generator=generator)
    coordinates = torch.rand(40, 2, generator=generator, dtype=torch.float64) * torch.tensor([14.0, 11.0]) - 3
    grid = 2 * coordinates / torch.tensor([8.0, 5.0]) - 1
    for outside in ("border", "zeros"):
        expected = torch.stack(
            [
                F.grid_sample(
                    maps[i : i + 1], g[None, None, None], align_corners=True, padding_mode=outside, mode="bilinear"
                ).flatten()
                for i, g in zip(image.tolist(), grid, strict=True)
            ]
        )
        torch.testing.assert_close(sample_bilinear(maps, image, coordinates, outside=outside), expected)


def test_sampling_a_ramp_gives_the_pixel_back():
    """A map that holds its own pixel coordinates, cell i at offset + stride i, reads u and v anywhere between cells."""
    stride, offset = 8, 3.5
    u = offset + stride * torch.arange(12, dtype=torch.float64)
    v = offset + stride * torch.arange(8, dtype=torch.float64)
    ramp = torch.stack([u[None].expand(8, 12), v[:, None].expand(8, 12)])[None]
    pixels = torch.rand(50, 2, dtype=torch.float64) * 50 + 5
    index = torch.zeros(50, dtype=torch.int64)
    pairs = PixelPairs(index, index, pixels, pixels, index.bool())
    coordinates = exact_coordinates(pairs, FeatureMap(ramp, stride, offset))
    torch.testing.assert_close(sample_bilinear(ramp, index, coordinates), pixels)


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_released_grid_is_its_formula(mirrored):
    """u s - cut, mirrored as w - u, divided by the own padded width, times (cells - 1): worked out from the raw pixel."""
    size, cut = (60, 100), (4, 7)
    matrix = crop_matrix(*cut) @ resize_matrix((48, 80), (72, 120))
    matrix = mirror_matrix(size[1]) @ matrix if mirrored else matrix
    images = images_of([size], [matrix], padded=(96, 160))
    raw = torch.rand(20, 2, dtype=torch.float64) * 40 + 8
    index = torch.zeros(20, dtype=torch.int64)
    pairs = PixelPairs(index, index, raw, raw, index.bool())
    feature_map = FeatureMap(torch.zeros(1, 2, 3, 5), 32, 0.0)
    u, v = raw[:, 0] * 1.5 - cut[1], raw[:, 1] * 1.5 - cut[0]
    u = size[1] - u if mirrored else u
    expected = torch.stack([u / 128 * 4, v / 64 * 2], 1)
    torch.testing.assert_close(released_coordinates(pairs, images, feature_map), expected)


def test_the_gradient_of_sampling_is_repeatable():
    maps = torch.randn(2, 64, 12, 40, requires_grad=True)
    image = torch.randint(0, 2, (4000,))
    coordinates = torch.rand(4000, 2) * 11
    weights = torch.randn(4000, 64)
    gradients = []
    for _ in range(5):
        (gradient,) = torch.autograd.grad((sample_bilinear(maps, image, coordinates) * weights).sum(), maps)
        gradients.append(gradient)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
