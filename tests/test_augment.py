"""Laws of augmentation: a view's matrix says exactly where points and pixels went; all draws come from the seed."""

import colorsys
import math

import numpy as np
import pytest
import torch

from simipu3d.contracts.frame import Camera, Frame
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, ImageAugmentConfig, PointAugmentConfig
from simipu3d.data.loading.augment import augment_frame
from simipu3d.data.loading.augment_images import augment_image, change_colours, draw_size
from simipu3d.data.loading.augment_points import draw_indices, draw_point_views, draw_transform
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.readers.kitti import KittiConfig
from simipu3d.geometry.boxes import move_boxes
from simipu3d.geometry.camera import move_pixels, project_points
from simipu3d.geometry.transforms import transform_points
from simipu3d.ops.rotated_iou import points_in_boxes

TWO_AND_ONE = Needs(point_views=2, image_views=1)
STRONG = AugmentConfig(
    points=PointAugmentConfig(
        num_points=300,
        augment_first_view=True,
        translation_std=(1.0, 2.0, 0.3),
        rotation_centre=(20.0, 0.0, 0.0),
        scale_centre=(15.0, 1.0, 0.0),
    ),
    images=ImageAugmentConfig(crop=(150, 300)),
)
MOVED_FIRST = AugmentConfig(points=PointAugmentConfig(augment_first_view=True))
RELEASED = ImageAugmentConfig(resize="long_short", long_edge=(640, 2400), short_edge=(192, 720))
PLAIN = ImageAugmentConfig(resize=None, flip_probability=0.0)
IMAGE_FROM_CAMERA = np.array([[300, 0, 200, 20], [0, 300, 80, 0.2], [0, 0, 1, 0.003]], dtype=np.float64)
CAMERA_FROM_LIDAR = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.1], [1, 0, 0, -0.3], [0, 0, 0, 1]], dtype=np.float64)


def random_frame(seed: int, num_points: int = 500, size: tuple[int, int] = (160, 400)) -> Frame:
    """Points within 40 m ahead, one camera with a smooth image."""
    rng = np.random.default_rng(seed)
    points = np.column_stack(
        [
            rng.uniform(3, 40, num_points),
            rng.normal(0, 5, num_points),
            rng.normal(0, 1, num_points),
            rng.random(num_points),
        ]
    )
    image = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    camera = Camera("front", image, IMAGE_FROM_CAMERA, CAMERA_FROM_LIDAR)
    return Frame(points.astype(np.float32), ("x", "y", "z", "intensity"), (camera,), frame_id=f"frame {seed}")


def project(xyz: torch.Tensor, size: tuple[int, int] = (160, 400)):
    pixels, _, visible = project_points(
        xyz, torch.from_numpy(IMAGE_FROM_CAMERA), torch.from_numpy(CAMERA_FROM_LIDAR), size
    )
    return pixels, visible


# Points


@pytest.mark.parametrize("seed", range(10))
def test_both_views_undo_to_the_raw_points(seed):
    frame = random_frame(seed)
    for view in draw_point_views(frame.points, STRONG.points, np.random.default_rng(seed)):
        raw = torch.from_numpy(frame.points)[view.source_index]
        undone = transform_points(torch.linalg.inv(view.augmented_from_lidar), view.points[:, :3])
        assert (undone - raw[:, :3]).abs().max() < 1e-4
        assert (view.points[:, :3] - raw[:, :3]).abs().max() > 0.1
        assert torch.equal(view.points[:, 3], raw[:, 3]), "only coordinates move"
        assert view.points.dtype == torch.float32
        assert view.augmented_from_lidar.dtype == torch.float64


@pytest.mark.parametrize("seed", range(10))
def test_pixels_of_an_undone_view_are_those_of_the_raw_points(seed):
    frame = random_frame(seed)
    sample = augment_frame(frame, STRONG, TWO_AND_ONE, np.random.SeedSequence(seed))
    for view in sample.views:
        raw_pixels, visible = project(torch.from_numpy(frame.points[:, :3])[view.source_index].double())
        lidar_from_augmented = torch.linalg.inv(view.augmented_from_lidar)
        pixels, _ = project(transform_points(lidar_from_augmented, view.points[:, :3].double()))
        matrix = sample.images[0][0].augmented_from_image
        assert visible.any()
        assert (move_pixels(matrix, pixels) - move_pixels(matrix, raw_pixels))[visible].abs().max() < 1e-3


@pytest.mark.parametrize("seed", range(10))
def test_the_transform_is_the_recipes_formula(seed):
    """Against the recipe written out by hand, with one fixed angle and scale: rotate about one centre, scale about the
    other, mirror."""
    centre, scale_centre = (35.2, 0.0, -1.0), (1.0, 2.0, 3.0)
    config = PointAugmentConfig(
        rotation_deg=(30.0, 30.0),
        rotation_centre=centre,
        scale=(1.2, 1.2),
        scale_centre=scale_centre,
        flip_probability=float(seed % 2),
    )
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    xyz = np.random.default_rng(seed).normal(size=(20, 3)) * 20
    moved = transform_points(draw_transform(config, np.random.default_rng(seed)), torch.from_numpy(xyz)).numpy()
    for point, result in zip(xyz, moved, strict=True):
        x, y, z = point - centre
        rotated = np.array([cos * x - sin * y, sin * x + cos * y, z]) + centre
        expected = (rotated - scale_centre) * 1.2 + scale_centre
        np.testing.assert_allclose(result, expected * [1, -1 if seed % 2 else 1, 1])


def test_boxes_keep_their_points_when_both_are_moved():
    """A rotation by +a adds a to the yaw; the mirror y -> -y turns yaw into -yaw."""
    rng = np.random.default_rng(0)
    xyz, center = rng.normal(size=(4000, 3)) * 8, rng.normal(size=(10, 3)) * 8
    size, yaw = rng.uniform(2, 6, (10, 3)), rng.uniform(-np.pi, np.pi, 10)
    before = points_in_boxes(xyz, center, size, yaw)
    assert before.any()
    config = PointAugmentConfig(rotation_deg=(40.0, 40.0), scale=(1.1, 1.1), flip_probability=1.0)
    matrix = draw_transform(config, rng)
    moved = transform_points(matrix, torch.from_numpy(xyz)).numpy()
    boxes = move_boxes(center, size, yaw, None, matrix.numpy())
    assert np.array_equal(before, points_in_boxes(moved, *boxes[:3]))
    np.testing.assert_allclose(boxes[1], 1.1 * size)
    turned = boxes[2] + yaw + math.radians(40)
    np.testing.assert_allclose(np.exp(1j * turned), 1, atol=1e-12)


def test_draws_stay_in_their_ranges_and_fill_them():
    config = PointAugmentConfig(rotation_deg=(-30.0, 60.0), scale=(0.9, 1.3), flip_probability=0.25)
    rng = np.random.default_rng(0)
    angles, scales, mirrored = [], [], 0
    for _ in range(2000):
        matrix = draw_transform(config, rng)[:3, :3]
        scales.append(matrix[2, 2].item())
        flipped = bool(torch.linalg.det(matrix) < 0)
        mirrored += flipped
        sign = -1 if flipped else 1
        angles.append(math.degrees(math.atan2(sign * matrix[1, 0].item(), matrix[0, 0].item())))
    assert -30 <= min(angles) < -29
    assert 59 < max(angles) <= 60
    assert 0.9 <= min(scales) < 0.91
    assert 1.29 < max(scales) <= 1.3
    assert mirrored / 2000 == pytest.approx(0.25, abs=0.04)


def test_by_default_the_first_view_stays_and_the_second_moves():
    frame = random_frame(0)
    first, second = draw_point_views(frame.points, PointAugmentConfig(), np.random.default_rng(0))
    assert torch.equal(first.augmented_from_lidar, torch.eye(4, dtype=torch.float64))
    assert torch.equal(first.points, torch.from_numpy(frame.points)[first.source_index])
    assert not torch.equal(second.augmented_from_lidar, torch.eye(4, dtype=torch.float64))


def test_a_draw_of_its_own_or_one_for_both():
    rng = np.random.default_rng(0)
    first, second = draw_indices(10_000, PointAugmentConfig(num_points=2000), rng)
    assert len(set(first)) == len(set(second)) == 2000, "no point twice"
    assert len(set(first) & set(second)) == pytest.approx(400, abs=80), "independent draws share a fifth of a fifth"
    first, second = draw_indices(10_000, PointAugmentConfig(num_points=2000, point_draw="shared"), rng)
    assert set(first) == set(second)
    assert not np.array_equal(first, second), "each view has its own order"
    first, second = draw_indices(10_000, PointAugmentConfig(num_points=2000, point_draw="shared", shuffle=False), rng)
    assert np.array_equal(first, second)
    assert (np.diff(first) > 0).all()


@pytest.mark.parametrize("num_points", [None, 500, 600])
@pytest.mark.parametrize("point_draw", ["shared", "per_view"])
def test_all_points_come_where_there_are_not_enough(num_points, point_draw):
    config = PointAugmentConfig(num_points=num_points, point_draw=point_draw)
    for index in draw_indices(500, config, np.random.default_rng(0)):
        assert sorted(index) == list(range(500))
    for index in draw_indices(0, config, np.random.default_rng(0)):
        assert len(index) == 0


# Images


def gaussian_dot(u: float, v: float, size: tuple[int, int], sigma: float = 4.0) -> np.ndarray:
    """A bright dot at a sub-pixel place, 0 elsewhere."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    bright = 250 * np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * sigma**2))
    return np.repeat(np.rint(bright).astype(np.uint8)[..., None], 3, axis=2)


def centroid(image: torch.Tensor) -> tuple[float, float]:
    weight = image.double().sum(dim=0)
    rows = torch.arange(weight.shape[0], dtype=torch.float64)
    columns = torch.arange(weight.shape[1], dtype=torch.float64)
    return (
        float((weight.sum(dim=0) * columns).sum() / weight.sum()),
        float((weight.sum(dim=1) * rows).sum() / weight.sum()),
    )


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("resize", ["long_short", "factor", None])
def test_a_dot_is_found_where_the_matrix_says(resize, flip):
    """A dot drawn where a point projects to is found, in the augmented image, at the pixel that the point of the
    augmented view gets: undone, projected, moved by the image's matrix."""
    size, sigma, found = (160, 400), 4.0, 0
    config = AugmentConfig(
        images=ImageAugmentConfig(resize=resize, resize_factor=(0.4, 2.5), crop=(400, 900), flip_probability=flip)
    )
    for seed in range(8):
        point = np.array([[20.0, 1.3 - 0.5 * seed, 0.2 * seed, 0.5]], dtype=np.float32)
        u, v = project(torch.from_numpy(point[:, :3]))[0][0].tolist()
        camera = Camera("front", gaussian_dot(u, v, size, sigma), IMAGE_FROM_CAMERA, CAMERA_FROM_LIDAR)
        frame = Frame(point, ("x", "y", "z", "intensity"), (camera,), frame_id="dot")
        sample = augment_frame(frame, config, TWO_AND_ONE, np.random.SeedSequence(seed))
        view, image = sample.views[1], sample.images[0][0]
        undone = transform_points(torch.linalg.inv(view.augmented_from_lidar), view.points[:, :3].double())
        expected = move_pixels(image.augmented_from_image, project(undone)[0])[0]
        height, width = image.image.shape[1:]
        room = torch.cat([expected, torch.tensor([width - 1, height - 1]) - expected]).amin()
        if room < 4 * sigma * image.augmented_from_image[1, 1]:
            continue  # the window cut the dot
        assert centroid(image.image) == pytest.approx(expected.tolist(), abs=0.1)
        found += 1
    assert found >= 4


@pytest.mark.parametrize("seed", range(10))
def test_a_crop_is_a_window_of_the_image(seed):
    image = np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    camera = Camera("front", image, IMAGE_FROM_CAMERA, CAMERA_FROM_LIDAR)
    config = ImageAugmentConfig(resize=None, crop=(40, 200), flip_probability=0.5)
    sample = augment_image(camera, config, np.random.default_rng(seed))
    assert sample.image.shape == (3, 40, 90), "a window larger than the image keeps the image's edge"
    rows, columns = np.mgrid[:60, :90]
    grid = torch.from_numpy(np.stack([columns.ravel(), rows.ravel()], axis=1)).double()
    moved = move_pixels(sample.augmented_from_image, grid).round().long()
    inside = (moved[:, 1] >= 0) & (moved[:, 1] < 40)
    assert int(inside.sum()) == 40 * 90
    there = sample.image[:, moved[inside, 1], moved[inside, 0]].T
    assert torch.equal(there, torch.from_numpy(image.reshape(-1, 3))[inside])


def test_long_and_short_edge_give_the_released_sizes():
    """factor = min(long / longer edge, short / shorter edge); new size = int(size x factor + 0.5)."""
    config = ImageAugmentConfig(resize="long_short", long_edge=(1000, 1000), short_edge=(400, 400))
    rng = np.random.default_rng(0)
    assert draw_size((375, 1242), config, rng) == (int(375 * 1000 / 1242 + 0.5), 1000)
    assert draw_size((800, 600), config, rng) == (int(800 * 400 / 600 + 0.5), 400)
    drawn = [draw_size((375, 1242), RELEASED, rng) for _ in range(2000)]
    factors = np.array([height / 375 for height, _ in drawn])
    assert 0.5 < factors.min() < 0.53
    assert 1.88 < factors.max() <= 1.925
    assert np.median(factors) == pytest.approx(0.93, abs=0.05), "as measured on the released pipeline"
    assert draw_size((375, 1242), PLAIN, rng) == (375, 1242)
    assert draw_size((4, 4), ImageAugmentConfig(resize="factor", resize_factor=(0.01, 0.01)), rng) == (1, 1)


def test_nothing_asked_for_changes_no_pixel():
    frame = random_frame(0)
    sample = augment_image(frame.cameras[0], PLAIN, np.random.default_rng(0))
    assert torch.equal(sample.image, torch.from_numpy(frame.cameras[0].image).permute(2, 0, 1))
    assert torch.equal(sample.augmented_from_image, torch.eye(3, dtype=torch.float64))
    assert sample.padded_size == (160, 416)
    assert sample.move.raw_size == (160, 400)
    assert torch.equal(sample.distortion, torch.zeros(5, dtype=torch.float64))


def test_colours_follow_their_definitions():
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(colours)

    def changed(seed, **keys):
        config = ImageAugmentConfig(colour_probability=1.0, **keys)
        return np.asarray(change_colours(picture, config, np.random.default_rng(seed))).astype(int)

    dark_or_bright = {round(float(changed(seed, brightness=0.5).mean() / colours.mean()), 1) for seed in range(20)}
    assert min(dark_or_bright) < 0.75
    assert max(dark_or_bright) > 1.05
    spread = [changed(seed, contrast=0.5).std() / colours.std() for seed in range(20)]
    assert min(spread) < 0.75
    assert max(spread) > 1.05
    colourful = [
        np.ptp(changed(seed, saturation=0.5), axis=2).mean() / np.ptp(colours, axis=2).mean() for seed in range(20)
    ]
    assert min(colourful) < 0.75
    assert max(colourful) > 1.05
    grey = changed(0, grayscale_probability=1.0)
    assert (np.ptp(grey, axis=2) == 0).all()
    turned = changed(3, hue=0.5).reshape(-1, 3)
    hue = [
        (colorsys.rgb_to_hsv(*(new / 255))[0] - colorsys.rgb_to_hsv(*(old / 255))[0]) % 1
        for new, old in zip(turned, colours.reshape(-1, 3), strict=True)
        if np.ptp(old) > 100
    ]
    assert np.std(hue) < 0.02, "every colour turns by the same angle"
    assert 0.02 < np.median(hue) < 0.98
    never = ImageAugmentConfig(colour_probability=0.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5)
    assert np.array_equal(np.asarray(change_colours(picture, never, np.random.default_rng(0))), colours)


# One seed


FIELDS = ("points", "source_index", "augmented_from_lidar")


def same(first, second) -> bool:
    pairs = zip(first.views, second.views, strict=True)
    points = all(torch.equal(getattr(a, f), getattr(b, f)) for a, b in pairs for f in FIELDS)
    images = zip(sum(first.images, ()), sum(second.images, ()), strict=True)
    return points and all(torch.equal(a.image, b.image) for a, b in images)


def test_a_sample_is_a_function_of_its_seed():
    frame = random_frame(0)
    first, again, other = (
        augment_frame(frame, STRONG, TWO_AND_ONE, np.random.SeedSequence(seed)) for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)


def test_points_and_images_draw_from_streams_of_their_own():
    frame = random_frame(0)
    first = augment_frame(frame, AugmentConfig(images=RELEASED), TWO_AND_ONE, np.random.SeedSequence(0))
    other_images = augment_frame(frame, AugmentConfig(images=PLAIN), TWO_AND_ONE, np.random.SeedSequence(0))
    moved_first = MOVED_FIRST.model_copy(update={"images": RELEASED})
    other_points = augment_frame(frame, moved_first, TWO_AND_ONE, np.random.SeedSequence(0))
    assert torch.equal(first.views[1].points, other_images.views[1].points)
    assert not torch.equal(first.images[0][0].image, other_images.images[0][0].image)
    assert torch.equal(first.images[0][0].image, other_points.images[0][0].image)
    assert not torch.equal(first.views[1].points, other_points.views[1].points)


@pytest.mark.parametrize("seed", range(3))
def test_pixels_of_a_real_augmented_frame_are_exact(samples, seed):
    """Full default recipe on real frames: an undone view projects to the raw points' pixels, within 1e-3 px."""
    reader = build_reader(KittiConfig(root=samples / "kitti", split="train"))
    frame = reader[seed]
    config = MOVED_FIRST.model_copy(update={"images": RELEASED})
    sample = augment_frame(frame, config, TWO_AND_ONE, np.random.SeedSequence(seed))
    image = sample.images[0][0]
    for view in sample.views:
        raw = torch.from_numpy(frame.points[:, :3])[view.source_index]
        undone = transform_points(torch.linalg.inv(view.augmented_from_lidar), view.points[:, :3].double())
        calibration = (image.image_from_camera, image.camera_from_lidar, image.move.raw_size)
        raw_pixels, _, visible = project_points(raw, *calibration)
        pixels, _, _ = project_points(undone, *calibration)
        assert visible.float().mean() > 0.99
        worst = move_pixels(image.augmented_from_image, pixels) - move_pixels(image.augmented_from_image, raw_pixels)
        assert worst[visible].abs().max() < 1e-3
        assert len(view.points) == 16384


@pytest.mark.parametrize("image_views", [0, 1, 2])
@pytest.mark.parametrize("point_views", [0, 1, 2])
def test_only_what_is_needed_is_drawn(point_views, image_views):
    needs = Needs(point_views=point_views, image_views=image_views)
    frame = random_frame(0)
    sample = augment_frame(frame, STRONG, needs, np.random.SeedSequence(5))
    assert (len(sample.views), len(sample.images)) == (point_views, image_views)
    whole = augment_frame(frame, STRONG, TWO_AND_ONE, np.random.SeedSequence(5))
    if image_views:
        assert torch.equal(sample.images[0][0].image, whole.images[0][0].image), "an own stream for each view"
    if image_views == 2:
        first, second = (view[0].augmented_from_image for view in sample.images)
        assert not torch.equal(first, second)
    if point_views == 2:
        assert torch.equal(sample.views[1].points, whole.views[1].points)


def test_a_single_point_view_is_moved_whatever_the_first_of_two_does():
    frame, needs = random_frame(0), Needs(point_views=1)
    for augment_first_view in (False, True):
        points = STRONG.points.model_copy(update={"augment_first_view": augment_first_view})
        config = STRONG.model_copy(update={"points": points})
        view = augment_frame(frame, config, needs, np.random.SeedSequence(0)).views[0]
        assert len(view.points) == 300
        assert (view.augmented_from_lidar - torch.eye(4, dtype=torch.float64)).abs().max() > 0.01


def test_images_alone_need_no_points():
    frame = random_frame(0, num_points=0)
    sample = augment_frame(frame, STRONG, Needs(image_views=2), np.random.SeedSequence(0))
    assert sample.views == ()
    assert len(sample.images[0]) == len(sample.images[1]) == 1


@pytest.mark.parametrize("seed", range(6))
def test_one_coin_mirrors_the_moved_view_and_every_image_view(seed):
    config = STRONG.model_copy(update={"joint_flip": True})
    sample = augment_frame(
        random_frame(seed), config, Needs(point_views=1, image_views=2), np.random.SeedSequence(seed)
    )
    mirrored = bool(torch.linalg.det(sample.views[0].augmented_from_lidar[:3, :3]) < 0)
    assert [view[0].move.mirrored for view in sample.images] == [mirrored, mirrored]


def test_centres_that_are_left_open_are_the_middle_of_the_range():
    config = PointAugmentConfig(scale_centre=(1.0, 2.0, 3.0))
    centred = config.centred((0.0, -40.0, -3.0, 70.4, 40.0, 1.0))
    assert centred.rotation_centre == (35.2, 0.0, -1.0)
    assert centred.scale_centre == (1.0, 2.0, 3.0)
    assert config.centred(None).rotation_centre == (0.0, 0.0, 0.0)


# Evaluation


def test_evaluation_draws_nothing_where_nothing_is_compared():
    frame = random_frame(0)
    sample = augment_frame(frame, STRONG, Needs(1, 1), np.random.SeedSequence(0), evaluation=True)
    assert torch.equal(sample.views[0].points, torch.from_numpy(frame.points))
    assert sample.views[0].source_index.tolist() == list(range(500))
    assert torch.equal(sample.views[0].augmented_from_lidar, torch.eye(4, dtype=torch.float64))
    assert torch.equal(sample.images[0][0].image, torch.from_numpy(frame.cameras[0].image).permute(2, 0, 1))
    colourful = {"colour_probability": 1.0, "hue": 0.5, "grayscale_probability": 1.0, "flip_probability": 1.0}
    config = AugmentConfig(images=ImageAugmentConfig(resize=None, **colourful), joint_flip=True)
    again = augment_frame(frame, config, Needs(1, 1), np.random.SeedSequence(1), evaluation=True)
    assert same(again, sample)


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({"resize": "factor", "resize_factor": (0.5, 0.5)}, (80, 200)),
        ({"resize": "factor", "resize_factor": (0.5, 0.6)}, (160, 400)),
        ({"resize": "long_short", "long_edge": (200, 200), "short_edge": (100, 100)}, (80, 200)),
        ({"resize": "long_short", "long_edge": (200, 200), "short_edge": (90, 100)}, (160, 400)),
        ({"resize": None, "crop": (50, 50)}, (160, 400)),
    ],
)
def test_a_resize_to_one_size_stays_in_evaluation(keys, size):
    config = AugmentConfig(images=ImageAugmentConfig(**keys))
    sample = augment_frame(random_frame(0), config, Needs(0, 1), np.random.SeedSequence(0), evaluation=True)
    assert sample.images[0][0].move.size == size


def test_of_two_views_the_second_is_drawn_in_evaluation_too():
    frame, needs = random_frame(0), Needs(2, 2)
    sample = augment_frame(frame, STRONG, needs, np.random.SeedSequence(3), evaluation=True)
    trained = augment_frame(frame, STRONG, needs, np.random.SeedSequence(3))
    identity = torch.eye(4, dtype=torch.float64)
    assert torch.equal(sample.views[0].augmented_from_lidar, identity)
    assert not torch.equal(sample.views[1].augmented_from_lidar, identity)
    assert [len(view.points) for view in sample.views] == [300, 300]
    assert torch.equal(sample.images[0][0].image, torch.from_numpy(frame.cameras[0].image).permute(2, 0, 1))
    assert torch.equal(sample.images[1][0].image, trained.images[1][0].image)
