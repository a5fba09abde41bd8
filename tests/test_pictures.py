"""Laws of pictures: what is drawn stands where geometry says, and what is equal looks equal."""

import numpy as np
import pytest
import torch
from PIL import Image

from simipu3d import pictures
from simipu3d.contracts.batch import Batch, ImageView, PointView
from simipu3d.contracts.frame import Boxes, Camera, Frame
from simipu3d.geometry.boxes import BOX_EDGES, box_corners
from simipu3d.geometry.camera import mirror_matrix, resize_matrix
from simipu3d.geometry.transforms import rotation_z, scaling, transform_points
from simipu3d.pictures.bird_eye import ground_pixels
from simipu3d.pictures.canvas import enlarged_pixels
from simipu3d.pictures.colours import depth_colours
from simipu3d.pictures.frames import frame_facts, frame_page, match_nearest, overlay_view, views_page
from simipu3d.pictures.overlay import BOX_COLOUR, project, project_edges

SIZE = (60, 100)
CAMERA_FROM_LIDAR = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]], dtype=np.float64)


def make_camera(distortion=None, size=SIZE, focal=70.0, value=128):
    projection = np.array([[focal, 0, size[1] / 2 - 0.5, 4.0], [0, focal, size[0] / 2 - 0.5, 1.0], [0, 0, 1, 0.003]])
    image = np.full((*size, 3), value, dtype=np.uint8)
    return Camera("front", image, projection, CAMERA_FROM_LIDAR, distortion=distortion)


def random_points(seed, number=200):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform([-20, -15, -2], [60, 15, 3], (number, 3))
    return np.concatenate([xyz, rng.uniform(0, 1, (number, 1))], axis=1).astype(np.float32)


def random_boxes(seed, number=4):
    rng = np.random.default_rng(seed)
    center = rng.uniform([5, -8, -1], [40, 8, 0], (number, 3))
    return Boxes(center, rng.uniform(1, 4, (number, 3)), rng.uniform(-3, 3, number), ["car"] * number)


def random_batch(seed):
    points = torch.from_numpy(random_points(seed, 400))
    generator = torch.Generator().manual_seed(seed)
    views = []
    for matrix in (torch.eye(4, dtype=torch.float64), scaling((1, -1, 1)) @ rotation_z(0.7) @ scaling((1.2, 1.2, 1.2))):
        own = torch.randperm(len(points), generator=generator)[:250]
        moved = torch.cat([transform_points(matrix, points[own, :3]), points[own, 3:]], dim=1)
        views.append(PointView(moved, torch.zeros(250, dtype=torch.int64), own, matrix[None]))
    camera = make_camera()
    small = (30, 50)
    images = ImageView(
        images=torch.full((1, 3, 32, 64), 90, dtype=torch.uint8),
        image_size=torch.tensor([small]),
        own_padded_size=torch.tensor([[32, 64]]),
        batch_index=torch.zeros(1, dtype=torch.int64),
        camera_index=torch.zeros(1, dtype=torch.int64),
        camera_names=("front",),
        augmented_from_image=(mirror_matrix(small[1]) @ resize_matrix(SIZE, small))[None],
        image_from_camera=torch.from_numpy(camera.image_from_camera)[None],
        camera_from_lidar=torch.from_numpy(camera.camera_from_lidar)[None],
        distortion=torch.zeros(1, 5, dtype=torch.float64),
        raw_size=torch.tensor([SIZE]),
    )
    return Batch((views[0], views[1]), (images,), ("a frame",)), points


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1, 3])
def test_the_nearest_point_of_a_pixel_gives_its_colour(seed, scale):
    """A slow loop over the points, nearest first, knows every pixel; all others keep the image."""
    camera, points = make_camera(), random_points(seed, 3000)
    picture = pictures.overlay_points(camera, points, scale=scale, radius=0)
    pixels, depth, visible = project(camera, points[:, :3])
    expected = pictures.enlarge(camera.image, scale)
    taken = set()
    for index in np.argsort(depth, kind="stable"):
        if not visible[index]:
            continue
        # A pixel becomes the squares from scale * u on; its centre is theirs.
        u, v = (int(np.floor(scale * x + (scale - 1) / 2 + 0.5)) for x in pixels[index])
        if (u, v) not in taken and 0 <= u < expected.shape[1] and 0 <= v < expected.shape[0]:
            taken.add((u, v))
            expected[v, u] = depth_colours(depth[index], 60.0)
    assert len(taken) > 50
    assert np.array_equal(picture, expected)
    assert (camera.image == 128).all(), "the camera's own image was drawn on"


def test_near_is_warm_and_far_is_cold():
    red, _, blue = depth_colours(np.array([3.0, 60.0]), 60.0).astype(int).T
    assert red[0] > blue[0] + 80
    assert blue[1] > red[1]
    order = depth_colours(np.geomspace(3, 60, 40), 60.0)
    assert len(np.unique(order, axis=0)) == 40


def test_large_dots_of_near_points_lie_over_those_of_far_ones():
    camera = make_camera()
    points = np.array([[40.0, 0, 0, 0], [5.0, 0, 0, 0], [20.0, 0, 0, 0]], dtype=np.float32)
    picture = pictures.overlay_points(camera, points, radius=4)
    pixels, depth, _ = project(camera, points[:, :3])
    u, v = np.floor(pixels[1] + 0.5).astype(int)
    assert np.array_equal(picture[v, u], depth_colours(depth[1], 60.0))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distortion", [None, np.array([-0.2, 0.05, 0.001, -0.002, 0.0])])
def test_box_edges_run_from_corner_to_corner(seed, distortion):
    camera, boxes = make_camera(distortion), random_boxes(seed)
    corners = box_corners(boxes.center, boxes.size, boxes.yaw)
    edges = corners[:, np.array(BOX_EDGES)].reshape(-1, 2, 3)
    segments, edge = project_edges(camera, edges)
    expected, depth, _ = project(camera, edges.reshape(-1, 3))
    expected, depth = expected.reshape(-1, 2, 2), depth.reshape(-1, 2)
    whole = np.flatnonzero((depth > 1.0).all(axis=1) & np.isfinite(expected).all(axis=(1, 2)))
    assert len(whole) > 20
    for index in whole:
        own = segments[edge == index]
        np.testing.assert_allclose(own[0, 0], expected[index, 0], atol=1e-6)
        np.testing.assert_allclose(own[-1, 1], expected[index, 1], atol=1e-6)
        np.testing.assert_allclose(own[1:, 0], own[:-1, 1], atol=1e-6)


@pytest.mark.parametrize("backwards", [False, True])
def test_an_edge_through_the_camera_is_cut_at_the_near_plane(backwards):
    """The part in front keeps its direction in the image; nothing is drawn of what lies behind."""
    camera = make_camera()
    behind, front = np.array([-6.0, 1.0, 0.0]), np.array([10.0, 1.0, 0.0])
    through = np.stack([front, behind] if backwards else [behind, front])
    segments, edge = project_edges(camera, np.stack([through, np.stack([behind, behind - 1])]))
    assert set(edge) == {0}
    line, _, _ = project(camera, np.linspace([1.5, 1, 0], front, 7))
    direction = line[-1] - line[0]
    for end in segments.reshape(-1, 2):
        offset = end - line[-1]
        assert abs(offset[0] * direction[1] - offset[1] * direction[0]) < 1e-4 * np.linalg.norm(direction)
        assert offset @ direction <= 1e-6, "an end lies beyond the edge's far end"
    ends = segments.reshape(-1, 2)[:: -1 if backwards else 1]
    np.testing.assert_allclose(ends[-1], line[-1], atol=1e-6)
    # By hand: y = 1 lies at x = 0.1 - 1 in the camera, and the depth of the plane is z + 0.003.
    z = 0.5 - 0.003
    np.testing.assert_allclose(ends[0, 0], (70 * -0.9 + 49.5 * z + 4) / 0.5, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_are_drawn_at_their_corners(seed):
    camera, boxes = make_camera(size=(240, 400), focal=280.0, value=0), random_boxes(seed, 1)
    picture = pictures.draw_boxes(camera, boxes)
    pixels, _, visible = project(camera, box_corners(boxes.center, boxes.size, boxes.yaw)[0])
    assert visible.any()
    for u, v in np.round(pixels[visible]).astype(int):
        around = picture[max(0, v - 1) : v + 2, max(0, u - 1) : u + 2].reshape(-1, 3).astype(int)
        assert np.abs(around - BOX_COLOUR).sum(axis=1).min() < 150
    assert (picture == 0).all(axis=2).mean() > 0.5
    front = pictures.draw_boxes(camera, Boxes(boxes.center, boxes.size, boxes.yaw + np.pi, boxes.names))
    assert not np.array_equal(picture, front), "a box that drives the other way looks the same"


def test_nothing_to_draw_leaves_the_image():
    camera = make_camera()
    none = Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), [])
    assert np.array_equal(pictures.overlay_points(camera, np.zeros((0, 4), np.float32)), camera.image)
    assert np.array_equal(pictures.draw_boxes(camera, none), camera.image)
    behind = np.array([[-10.0, 0, 0, 0]], dtype=np.float32)
    assert np.array_equal(pictures.overlay_points(camera, behind), camera.image)
    empty = np.zeros((0, 3))
    assert pictures.bird_eye(empty, none).dtype == np.uint8
    assert pictures.draw_matches(empty, empty, np.zeros((0, 2), np.int64), np.zeros(0)).ndim == 3
    assert pictures.draw_image_matches(camera.image, np.zeros((0, 2)), empty).ndim == 3


def test_a_view_from_above_has_x_up_and_y_to_the_left():
    points = np.array([[10.0, 4.0, 0.0]])
    extent = pictures.Extent(-20, 20, -10, 10)
    colours = np.array([[255, 0, 0]], dtype=np.uint8)
    picture = pictures.bird_eye(points, extent=extent, pixels_per_metre=10, colours=colours, radius=0)
    assert picture.shape == (400, 200, 3)
    v, u = np.argwhere((picture == (255, 0, 0)).all(axis=2))[0]
    assert abs(v - 100) <= 1
    assert abs(u - 60) <= 1
    np.testing.assert_allclose(ground_pixels(np.array([[20.0, 10.0]]), extent, 10)[0], [-0.5, -0.5])


@pytest.mark.parametrize("seed", range(10))
def test_cut_lines_equal_whole_lines(seed):
    """A line that leaves the image looks like the same line on a larger canvas."""
    rng = np.random.default_rng(seed)
    segments = rng.uniform(-150, 250, (6, 2, 2))
    large = pictures.draw_lines(np.zeros((400, 400, 3), np.uint8), segments + 150, (255, 255, 255), 2)
    small = pictures.draw_lines(np.zeros((100, 100, 3), np.uint8), segments, (255, 255, 255), 2)
    difference = np.abs(large[150:250, 150:250].astype(int) - small)
    assert (difference > 130).mean() < 0.01
    assert np.isclose(large[150:250, 150:250].sum(), small.sum(), rtol=0.15, atol=3000)


@pytest.mark.parametrize("seed", range(5))
def test_colours_of_features_do_not_depend_on_the_basis(seed):
    """Turning or mirroring the feature space, moving its origin, or resizing it changes no colour."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(12, 5, 7, generator=generator).exp(), torch.randn(2, 12, 4, 6, generator=generator).exp()]
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    moved = [torch.einsum("dc,...chw->...dhw", turn, item.double()) for item in maps]
    other = [3.0 * moved[0] + 7.0, 0.2 * moved[1] - 1.0]
    for before, after in zip(pictures.features_as_colours(maps), pictures.features_as_colours(other), strict=True):
        assert np.abs(before.astype(int) - after).max() <= 1
    first, second = pictures.features_as_colours(maps)
    assert first.shape == (5, 7, 3)
    assert second.shape == (2, 4, 6, 3)
    assert first.std() > 20


def test_equal_features_have_equal_colours_in_all_maps():
    features = torch.randn(8, 6, 6)
    one, two = pictures.features_as_colours([features, features.flip(2)])
    assert np.array_equal(one, two[:, ::-1])


def test_features_without_variance_are_grey_and_other_widths_refused():
    (grey,) = pictures.features_as_colours([torch.ones(2, 4, 4)])
    assert (grey == grey[0, 0]).all()
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        pictures.features_as_colours([torch.ones(3, 4, 4), torch.ones(4, 4, 4)])


def test_a_page_contains_its_pictures():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 90, 3), dtype=np.uint8) for _ in range(5)]
    sheet = pictures.page(
        [("two", [("a", images[0]), ("b", images[1])]), ("", [("", image) for image in images[2:]])], width=800
    )
    assert sheet.shape[1] == 800
    for image, scale in zip(images, (4, 4, 2, 2, 2), strict=True):
        large = pictures.enlarge(image, scale)
        corner = np.argwhere((sheet == large[0, 0]).all(axis=2))
        fits = [
            (v, u) for v, u in corner if np.array_equal(sheet[v : v + large.shape[0], u : u + large.shape[1]], large)
        ]
        assert len(fits) == 1
    for row in ([], [("empty", [])]):
        with pytest.raises(ValueError, match="at least one row"):
            pictures.page(row)


def test_large_pictures_are_fitted_to_the_page():
    sheet = pictures.page(
        [("wide and high", [("w", np.zeros((30, 5000, 3), np.uint8)), ("h", np.zeros((4000, 30, 3), np.uint8))])]
    )
    assert sheet.shape[1] == 1800
    assert sheet.shape[0] < 1100


def test_png_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "picture.png"
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    pictures.save_png(path, image)
    assert np.array_equal(np.array(Image.open(path)), image)
    for wrong in (image.astype(np.float32), image[..., 0]):
        with pytest.raises(ValueError, match="uint8"):
            pictures.save_png(path, wrong)
    assert [item.name for item in path.parent.iterdir()] == ["picture.png"]


def test_unknown_depth_stays_dark():
    image = pictures.depth_as_colours(np.array([[0.0, np.nan, 10.0, -1.0]]))
    assert image[0, [0, 1, 3]].max() < 40
    assert image[0, 2].max() > 100


@pytest.mark.parametrize("seed", range(5))
def test_partners_of_views_are_the_nearest_in_the_lidar_frame(seed):
    batch, points = random_batch(seed)
    first, second = batch.views
    _, xyz_b, pairs, distance = match_nearest(first, second, number=60)
    raw_b = points[second.source_index, :3].double()
    chosen = torch.linspace(0, 249, 60).round().long()
    raw_a = points[first.source_index[chosen], :3].double()
    slow = torch.cdist(raw_a, raw_b)
    np.testing.assert_allclose(distance, slow.min(dim=1).values, atol=1e-5)
    assert np.array_equal(xyz_b, second.points[:, :3].double())
    shared = torch.isin(first.source_index[chosen], second.source_index).numpy()
    assert shared.any()
    assert (distance[shared] < 1e-5).all()
    assert (distance[~shared] > 1e-3).all()
    assert np.array_equal(pairs[:, 0], np.arange(60))


def test_a_view_on_its_augmented_image_is_the_raw_overlay_moved():
    """Half the size and mirrored: dots stand at the mirrored half of the raw pixels, for the moved view too."""
    batch, points = random_batch(3)
    camera = make_camera()
    for view in batch.views:
        drawn = (overlay_view(view, batch.images[0], 0, scale=10) != 90).any(axis=2)
        raw = points[view.source_index].numpy()
        pixels, _, visible = project(camera, raw[:, :3])
        u, v = ((pixels[visible] + 0.5) / 2 - 0.5).T
        mirrored = enlarged_pixels(np.stack([49 - u, v], axis=1), 10)
        inside = (mirrored > -0.5).all(axis=1) & (mirrored < (499.5, 299.5)).all(axis=1)
        columns, rows = np.floor(mirrored[inside] + 0.5).astype(int).T
        assert inside.sum() > 20
        assert drawn[rows, columns].all()
        assert drawn.sum() <= 14 * inside.sum()


def test_pages_of_a_frame_and_its_views_show_every_part():
    batch, points = random_batch(0)
    boxes = random_boxes(0)
    truth = Camera(
        "front",
        make_camera().image,
        make_camera().image_from_camera,
        CAMERA_FROM_LIDAR,
        depth=np.full(SIZE, 9.0, np.float32),
        pixel_class=np.ones(SIZE, np.uint8),
    )
    frame = Frame(points.numpy(), ("x", "y", "z", "intensity"), (truth,), "0001", boxes=boxes)
    assert frame_page(frame).shape[1] == 1800
    assert views_page(batch).shape[1] == 1800
    facts = frame_facts(frame)
    seen = project(truth, points[:, :3].numpy())[2].mean()
    assert facts.frame == "0001"
    assert facts.points == "400"
    assert facts.boxes == "4"
    assert facts.in_image == f"{seen:.1%}"
    bare = Frame(points[:, :3].numpy(), ("x", "y", "z"), (), "0002")
    assert frame_facts(bare).intensity == "none"
    assert frame_page(bare).ndim == 3
