"""Turned images: the matrix says where picture, maps and projected points went; colours by gamma and channel."""

import numpy as np
import pytest
import torch
from helpers import AUGMENT, street
from PIL import Image

from simipu3d.contracts.truth import UNLABELLED
from simipu3d.data.config import ImageAugmentConfig
from simipu3d.data.loading.augment_images import ImageMove, augment_image, change_colours, draw_move
from simipu3d.data.loading.truth import render_depth, with_image_truth
from simipu3d.geometry.camera import move_pixels

RAW = (60, 90)
TURNING = ImageAugmentConfig(
    rotation_deg=20, rotation_probability=1, resize="factor", resize_factor=(0.8, 1.3), crop=(40, 50), pad_multiple=1
)


@pytest.mark.parametrize("seed", range(12))
def test_picture_and_map_of_a_turned_image_show_each_pixel_where_the_matrix_says(seed):
    """A smooth picture of two ramps knows where each of its pixels came from."""
    rng = np.random.default_rng(seed)
    move = draw_move(RAW, TURNING, rng)
    assert move.turn != 0
    v, u = np.mgrid[: RAW[0], : RAW[1]]
    ramps = np.stack([2 * u, 2 * v, np.full_like(u, 100)], axis=-1).astype(np.uint8)
    picture = np.asarray(move.move_picture(Image.fromarray(ramps))).astype(float)
    codes = (v * RAW[1] + u + 1).astype(np.int32)
    moved = move.move_map(codes)
    assert picture.shape[:2] == moved.shape == move.size
    rows, columns = np.mgrid[: move.size[0], : move.size[1]]
    places = torch.from_numpy(np.stack([columns, rows], axis=-1).reshape(-1, 2).astype(np.float64))
    raw = move_pixels(torch.linalg.inv(move.matrix()), places).numpy().reshape(*move.size, 2)
    well_inside = ((raw > 2) & (raw < np.array([RAW[1] - 3, RAW[0] - 3]))).all(axis=-1)
    assert well_inside.sum() > 200
    assert np.abs(picture[..., :2] / 2 - raw)[well_inside].max() < 0.8
    from_map = np.stack([(moved - 1) % RAW[1], (moved - 1) // RAW[1]], axis=-1)
    assert np.abs(from_map - raw)[well_inside].max() <= 0.5 + 1e-6
    outside = ((raw < -0.6) | (raw > np.array([RAW[1] - 0.4, RAW[0] - 0.4]))).any(axis=-1)
    assert (moved[outside] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_truth_of_a_turned_image_is_unknown_where_nothing_came_in(seed):
    frame = street(seed)
    camera = frame.cameras[0]
    sample = augment_image(camera, TURNING.model_copy(update={"crop": None}), np.random.default_rng(seed))
    full = with_image_truth(sample, frame, camera, ("depth", "pixel_class", "pixel_instance"))
    unknown = full.depth == 0
    assert 0 < unknown.float().mean() < 0.5
    assert torch.equal(full.pixel_class == UNLABELLED, unknown)
    assert (full.pixel_instance[unknown] == 0).all()


def test_rendered_depth_lies_where_the_depth_of_a_turned_map_lies():
    """Few points, so that hardly two share a pixel: the rendered map and the moved map of its rendering agree to one pixel."""
    frame = street(0, num_points=600)
    camera = frame.cameras[0]
    still = ImageMove((64, 96), (64, 96), 0, 0, (64, 96), False)
    turned = ImageMove((64, 96), (64, 96), 5, 7, (50, 80), True, turn=0.2)
    xyz = frame.points[:, :3]
    rendered, moved = render_depth(xyz, camera, turned), turned.move_map(render_depth(xyz, camera, still))
    rows, columns = np.nonzero(rendered)
    found = 0
    for row, column in zip(rows, columns, strict=True):
        near = moved[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        found += bool((np.abs(near - rendered[row, column]) < 1e-4).any())
    assert found > 0.75 * len(rows) > 150  # a turned grid passes some pixels over


def test_no_draw_of_another_key_moves_when_a_turn_is_not_asked_for():
    """Present recipes keep their draws: with rotation_deg 0 no number is drawn for it."""
    frame = street(1)
    one, two = (
        augment_image(frame.cameras[0], AUGMENT.images.model_copy(update=change), np.random.default_rng(3))
        for change in ({}, {"rotation_probability": 1.0})
    )
    assert torch.equal(one.image, two.image)


def test_gamma_and_channels_of_one_pixel_by_hand():
    config = ImageAugmentConfig(gamma=0.1, channels=0.1, colour_probability=1)
    grey = Image.fromarray(np.full((2, 2, 3), 128, dtype=np.uint8))
    powers, seen = [], []
    for seed in range(50):
        red, green, blue = np.asarray(change_colours(grey, config, np.random.default_rng(seed)))[0, 0] / 255
        powers.append((red, green, blue))
        seen.append(len({red, green, blue}))
    low, high = 0.9 * (128 / 255) ** 1.1, 1.1 * (128 / 255) ** 0.9
    assert low - 2e-3 <= np.min(powers) < 0.95 * 128 / 255
    assert 1.05 * 128 / 255 < np.max(powers) <= high + 2e-3
    assert np.median(seen) == 3
