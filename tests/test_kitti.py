"""Laws of the KITTI reader: real frames where there are some, made-up folders for what can go wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simipu3d.config import parse_part
from simipu3d.contracts.frame import EVERYTHING, Boxes, Wants
from simipu3d.data.readers.files import read_float_rows
from simipu3d.data.readers.kitti import KittiReader
from simipu3d.data.readers.kitti_labels import CameraBoxes, difficulty, read_labels, to_camera, to_lidar, wrap_angle
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.boxes import box_corners
from simipu3d.geometry.camera import project_points
from simipu3d.ops.rotated_iou import points_in_boxes
from simipu3d.registry import READERS

CALIB = """P0: 700 0 300 0 0 700 100 0 0 0 1 0
P1: 700 0 300 -380 0 700 100 0 0 0 1 0
P2: 700 0 300 45 0 700 100 0.2 0 0 1 0.003
P3: 700 0 300 -340 0 700 100 2 0 0 1 0.003
R0_rect: 0.99998 0.0050 -0.0040 -0.0050 0.99998 0.0030 0.0040 -0.0030 0.99998
Tr_velo_to_cam: 0.0075 -0.99997 -0.0006 -0.004 0.0148 0.0007 -0.99989 -0.076 0.99986 0.0075 0.0148 -0.27
Tr_imu_to_velo: 1 0 0 0 0 1 0 0 0 0 1 0
"""
LABELS = """Car 0.00 0 1.85 300.00 80.00 340.00 125.00 1.67 1.87 3.69 1.20 1.60 12.00 1.57
DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10
"""


def open_kitti(root: Path, wants: Wants = EVERYTHING, **keys):
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    return KittiReader(parse_part("data", READERS, {"name": "kitti", "root": str(root), **keys}), wants)


def write_frame(root: Path, frame_id: str) -> None:
    """One small frame: 200 points ahead, 200 behind, an image of 600 x 200."""
    part, number = frame_id.split("/")
    rng = np.random.default_rng(int(number) + 1)
    for folder in ("velodyne", "image_2", "image_3", "calib", "label_2"):
        (root / part / folder).mkdir(parents=True, exist_ok=True)
    points = rng.normal(size=(400, 4)) * [5, 3, 0.5, 0.1] + [20, 0, -1, 0.5]
    points[200:, 0] *= -1
    points.astype("<f4").tofile(root / part / "velodyne" / f"{number}.bin")
    image = Image.fromarray(rng.integers(0, 255, (200, 600, 3), dtype=np.uint8))
    for camera in ("image_2", "image_3"):
        image.save(root / part / camera / f"{number}.png")
    (root / part / "calib" / f"{number}.txt").write_text(CALIB)
    if part == "training":
        (root / part / "label_2" / f"{number}.txt").write_text(LABELS)


@pytest.fixture
def root(tmp_path) -> Path:
    """Training frames 000000 to 000003, testing frames 000000 and 000001, no lists."""
    for number in range(4):
        write_frame(tmp_path, f"training/{number:06d}")
    for number in range(2):
        write_frame(tmp_path, f"testing/{number:06d}")
    return tmp_path


def write_list(root: Path, name: str, *ids: str) -> Path:
    (root / "ImageSets").mkdir(exist_ok=True)
    path = root / "ImageSets" / f"{name}.txt"
    path.write_text("\n".join(ids) + "\n")
    return path


# Which frames?


def test_all_needs_no_list_and_train_says_where_lists_are_found(root):
    assert open_kitti(root, split="all").frame_ids == tuple(f"training/{n:06d}" for n in range(4))
    assert open_kitti(root, split="test").frame_ids == ("testing/000000", "testing/000001")
    with pytest.raises(UserError) as error:
        open_kitti(root)
    assert "\n" not in str(error.value)
    for word in (
        "ImageSets/train.txt",
        "3712",
        "3769",
        "OpenPCDet",
        "mmdetection3d",
        "data.split_file",
        "data.split=all",
    ):
        assert word in str(error.value)


def test_paper_is_train_and_every_testing_frame_without_val(root):
    write_list(root, "train", "000002", "000000")
    write_list(root, "val", "000001", "000003")
    assert open_kitti(root, split="val").frame_ids == ("training/000001", "training/000003")
    paper = open_kitti(root, split="paper").frame_ids
    assert paper == ("training/000002", "training/000000", "testing/000000", "testing/000001")
    write_list(root, "test", "000001")
    assert open_kitti(root, split="paper").frame_ids[2:] == ("testing/000001",)


def test_lists_of_the_user(root, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("000001\r\ntesting/000001\n\n")
    assert open_kitti(root, split_file=mine).frame_ids == ("training/000001", "testing/000001")
    mine.write_text("000001\n")
    assert open_kitti(root, split_file=mine, split="test").frame_ids == ("testing/000001",)
    write_list(root, "tiny", "000003")
    assert open_kitti(root, split="tiny").frame_ids == ("training/000003",)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "empty"), ("000001\n000001\n", "twice"), ("car.png\n", "no frame id"), ("other/000001\n", "no frame id")],
)
def test_a_list_that_makes_no_sense_is_refused(root, content, words):
    path = write_list(root, "train")
    path.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        open_kitti(root)
    assert str(path) in str(error.value)


def test_listed_frames_that_are_absent_are_counted_and_named(root):
    write_list(root, "train", "000000", "000123", "000124", "000125", "000126", "000127")
    with pytest.raises(UserError, match=r"5 of the 6 frames .*training/000123, .*\.\.\.") as error:
        open_kitti(root)
    missing, _, whole = str(error.value).partition("; whole are ")
    assert "000000" not in missing.replace("000000,", "")
    assert whole.startswith("training/000000 (1)")
    assert "\n" not in str(error.value)


def test_a_half_unpacked_download_is_told_at_once_and_a_single_gap_when_it_is_read(root):
    (root / "training/image_2/000001.png").unlink()
    reader = open_kitti(root, split="all")
    with pytest.raises(BadFrameError, match=r"image_2/000001\.png: no such file"):
        reader[1]
    (root / "training/calib/000002.txt").unlink()
    with pytest.raises(UserError, match="2 of the 4 frames"):
        open_kitti(root, split="all")


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_kitti(tmp_path / "nowhere")
    shutil.rmtree(root / "training/velodyne")
    with pytest.raises(UserError, match="training/velodyne: no such folder"):
        open_kitti(root, split="all")
    with pytest.raises(UserError, match=r"data\.root: this key is needed"):
        parse_part("data", READERS, {"name": "kitti"})
    with pytest.raises(UserError, match="split_file: split all reads no list"):
        open_kitti(root, split="all", split_file=tmp_path / "x.txt")


# What a frame holds


def test_filters_keep_what_the_definition_keeps(root):
    raw = read_float_rows(root / "training/velodyne/000000.bin", 4)
    everything = open_kitti(root, split="all", point_range=None, frustum=False)[0]
    assert np.array_equal(everything.points, raw)
    low, high = np.array([10, -2, -2]), np.array([22, 3, -0.5])
    ranged = open_kitti(root, split="all", point_range=[*low.tolist(), *high.tolist()], frustum=False)[0]
    expected = [row for row in raw if all(low[a] < row[a] < high[a] for a in range(3))]
    assert np.array_equal(ranged.points, expected)
    seen = open_kitti(root, split="all", point_range=None)[0]
    camera = seen.cameras[0]
    matrix = camera.image_from_camera @ camera.camera_from_lidar
    expected = []
    for row in raw:
        u, v, depth = matrix @ [*row[:3].astype(float), 1]
        if 0.001 < depth < 100 and 0 <= u / depth < 600 and 0 <= v / depth < 200:
            expected.append(row)
    assert 50 < len(expected) < 300
    assert np.array_equal(seen.points, expected)
    assert seen.points.dtype == np.float32


def test_each_camera_has_its_own_projection(root):
    frame = open_kitti(root, split="all", cameras=None)[0]
    assert [camera.name for camera in frame.cameras] == ["image_2", "image_3"]
    assert [camera.image_from_camera[0, 3] for camera in frame.cameras] == [45, -340]
    left, right = (
        project_points(
            torch.from_numpy(frame.points[:, :3]),
            torch.from_numpy(camera.image_from_camera),
            torch.from_numpy(camera.camera_from_lidar),
            camera.image.shape[:2],
        )[0]
        for camera in frame.cameras
    )
    assert (left[:, 0] > right[:, 0]).all(), "the left camera sees everything farther to the right"


def test_labels_are_optional_and_an_empty_file_means_no_objects(root):
    (root / "training/label_2/000001.txt").unlink()
    (root / "training/label_2/000002.txt").write_text("")
    reader = open_kitti(root, split="all")
    assert reader[0].boxes.names == ("Car",)
    assert reader[1].boxes is None
    assert len(reader[2].boxes) == 0
    assert open_kitti(root, split="all", wants=Wants())[0].boxes is None
    assert open_kitti(root, split="test")[0].boxes is None


# Boxes


def random_camera_boxes(seed: int, count: int = 50) -> CameraBoxes:
    rng = np.random.default_rng(seed)
    return CameraBoxes(
        bottom_center=rng.normal(size=(count, 3)) * [20, 1, 30],
        size=rng.uniform(0.5, 5, (count, 3)),
        rotation_y=rng.uniform(-np.pi, np.pi, count),
    )


def mounted_camera(seed: int, tilt: float = 0.02) -> np.ndarray:
    """camera_from_lidar of a camera that looks forward, tilted a little about every axis."""
    matrix = np.eye(4)
    axes = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]], dtype=float)
    rotation, upper = np.linalg.qr(np.eye(3) + tilt * np.random.default_rng(seed).normal(size=(3, 3)))
    matrix[:3, :3] = rotation * np.sign(np.diag(upper)) @ axes
    matrix[:3, 3] = [0.1, -0.07, -0.3]
    return matrix


@pytest.mark.parametrize("seed", range(10))
def test_boxes_survive_the_way_into_the_lidar_frame_and_back(seed):
    boxes, camera_from_lidar = random_camera_boxes(seed), mounted_camera(seed)
    back = to_camera(to_lidar(boxes, camera_from_lidar), camera_from_lidar)
    np.testing.assert_allclose(back.bottom_center, boxes.bottom_center, atol=1e-9)
    np.testing.assert_allclose(back.size, boxes.size)
    np.testing.assert_allclose(wrap_angle(back.rotation_y - boxes.rotation_y), 0, atol=1e-9)


def test_an_ideally_mounted_camera_gives_the_textbook_yaw():
    boxes, camera_from_lidar = random_camera_boxes(0), mounted_camera(0, tilt=0)
    placed = to_lidar(boxes, camera_from_lidar)
    np.testing.assert_allclose(wrap_angle(placed.yaw - (-boxes.rotation_y - np.pi / 2)), 0, atol=1e-9)
    np.testing.assert_allclose(placed.size, boxes.size[:, [2, 1, 0]])
    height = (placed.center - to_lidar(boxes._replace(size=0 * boxes.size), camera_from_lidar).center)[:, 2]
    np.testing.assert_allclose(height, boxes.size[:, 0] / 2)


def test_an_empty_set_of_boxes_passes_both_ways():
    none = Boxes(center=np.zeros((0, 3)), size=np.zeros((0, 3)), yaw=np.zeros(0), names=())
    assert len(to_lidar(to_camera(none, mounted_camera(0)), mounted_camera(0))) == 0


def test_difficulty_takes_the_easiest_level_whose_limits_hold():
    image_box = np.array([[0, 0, 50, height] for height in (40, 39.9, 60, 60, 60, 60, 60, 24.9)], dtype=float)
    occlusion = np.array([0, 0, 1, 2, 3, 0, 0, 0], dtype=float)
    truncation = np.array([0.15, 0, 0, 0, 0, 0.3, 0.51, 0])
    assert difficulty(image_box, occlusion, truncation).tolist() == [0, 1, 1, 2, -1, 1, -1, -1]


# Bad input: one clear line each


def damage_points(change):
    def damage(root: Path) -> None:
        path = root / "training/velodyne/000001.bin"
        points = np.fromfile(path, dtype="<f4").reshape(-1, 4)
        change(points).tofile(path)

    return damage


def with_value(value: float):
    def change(points):
        points[17, 1] = value
        return points

    return damage_points(change)


def cut_bytes(name: str, count: int):
    def damage(root: Path) -> None:
        path = root / "training" / name
        path.write_bytes(path.read_bytes()[:count])

    return damage


def rewrite(name: str, old: str, new: str):
    def damage(root: Path) -> None:
        path = root / "training" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return damage


CALIB_FILE, LABEL_FILE, SCAN, PICTURE = (
    "calib/000001.txt",
    "label_2/000001.txt",
    "velodyne/000001.bin",
    "image_2/000001.png",
)
DAMAGES = {
    "missing scan": (lambda root: (root / "training" / SCAN).unlink(), SCAN, "no such file"),
    "empty scan": (cut_bytes(SCAN, 0), SCAN, "empty"),
    "scan cut short": (cut_bytes(SCAN, 1001), SCAN, "1001 bytes"),
    "NaN": (with_value(np.nan), SCAN, "1 of 400 points are NaN or infinite"),
    "infinity": (with_value(np.inf), SCAN, "1 of 400 points are NaN or infinite"),
    "nothing in view": (damage_points(lambda points: points[200:]), SCAN, "no camera sees any of its 200 points"),
    "nothing in range": (damage_points(lambda points: points * np.float32(8)), SCAN, "data.point_range"),
    "missing image": (lambda root: (root / "training" / PICTURE).unlink(), PICTURE, "no such file"),
    "image cut short": (cut_bytes(PICTURE, 9000), PICTURE, "cut short"),
    "empty image": (cut_bytes(PICTURE, 0), PICTURE, "the file is empty"),
    "missing calib": (lambda root: (root / "training" / CALIB_FILE).unlink(), CALIB_FILE, "no such file"),
    "no P2": (rewrite(CALIB_FILE, "P2:", "P9:"), CALIB_FILE, "has no line P2"),
    "eleven numbers": (rewrite(CALIB_FILE, "45 0 700", "45 700"), CALIB_FILE, "P2 has 11 numbers, expected 12"),
    "a word": (rewrite(CALIB_FILE, "-0.99997", "abc"), CALIB_FILE, "Tr_velo_to_cam holds a word"),
    "NaN in calib": (rewrite(CALIB_FILE, "0.99998 0.0050", "nan 0.0050"), CALIB_FILE, "R0_rect has 9 numbers"),
    "calib is no text": (lambda root: (root / "training" / CALIB_FILE).write_bytes(b"\xff\xfe"), CALIB_FILE, "text"),
    "short label": (rewrite(LABEL_FILE, " 1.57", ""), LABEL_FILE, "line 1 has 14 values"),
    "a word in a label": (rewrite(LABEL_FILE, "1.57", "left"), LABEL_FILE, "line 1 holds a value that is no number"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_frame_is_one_clear_line(root, name):
    damage, file, words = DAMAGES[name]
    write_list(root, "train", "000000", "000001", "000002")
    damage(root)
    reader = open_kitti(root)
    assert len(reader[0].points)
    with pytest.raises(BadFrameError) as error:
        reader[1]
    message = str(error.value)
    assert str(root / "training" / file) in message
    assert words in message
    assert "data.on_bad_frame=skip" in message
    assert "\n" not in message


def test_a_picture_cut_anywhere_is_a_bad_frame(root):
    """The last 20 bytes hold no pixel: checksums and the end mark."""
    path = root / "training/image_2/000001.png"
    whole = path.read_bytes()
    reader = open_kitti(root, split="all")
    for count in [*range(1, 60, 3), *range(100, len(whole) - 30, len(whole) // 20), len(whole) - 30]:
        path.write_bytes(whole[:count])
        with pytest.raises(BadFrameError):
            reader[1]


# Real frames


def test_real_frames_hold_what_they_are_known_to_hold(samples):
    """Points in the image, counted by whoever made the excerpt, and image sizes."""
    reader = open_kitti(samples / "kitti", split="paper", point_range=None)
    known = [(20285, 370, 1224), (18630, 375, 1242), (20210, 375, 1242), (20537, 375, 1242), (19337, 375, 1242)]
    assert [
        (len(frame.points), *frame.cameras[0].image.shape[:2]) for frame in map(reader.__getitem__, range(5))
    ] == known
    with pytest.raises(UserError, match=r"val\.txt: no such list"):
        open_kitti(samples / "kitti", split="val")


def test_reduced_clouds_lose_nothing_to_the_frustum(samples):
    reader = open_kitti(samples / "kitti_fov", split="all", point_range=None)
    assert [len(reader[index].points) for index in range(len(reader))] == [19473, 19423, 17238, 19411]


def points_inside_camera_boxes(xyz, boxes: CameraBoxes, camera_from_lidar) -> list[int]:
    """Counted in the rectified camera frame, where KITTI's boxes stand upright."""
    camera_xyz = xyz @ camera_from_lidar[:3, :3].T + camera_from_lidar[:3, 3]
    counts = []
    for bottom, (height, width, length), turn in zip(*boxes, strict=True):
        offset = camera_xyz - bottom
        along = offset[:, 0] * np.cos(turn) - offset[:, 2] * np.sin(turn)
        across = offset[:, 0] * np.sin(turn) + offset[:, 2] * np.cos(turn)
        inside = (
            (abs(along) <= length / 2) & (abs(across) <= width / 2) & (offset[:, 1] <= 0) & (offset[:, 1] >= -height)
        )
        counts.append(int(inside.sum()))
    return counts


def test_real_boxes_hold_the_points_they_are_known_to_hold(samples):
    """Exactly, in KITTI's own frame after the way there and back; in ours up to the degree of tilt between them."""
    reader = open_kitti(samples / "kitti", split="train", point_range=None, frustum=False)
    known = [[376], [70, 9, 18], [1351, 67]]
    for index, counts in enumerate(known):
        frame = reader[index]
        camera_from_lidar = frame.cameras[0].camera_from_lidar
        xyz = frame.points[:, :3].astype(np.float64)
        assert points_inside_camera_boxes(xyz, to_camera(frame.boxes, camera_from_lidar), camera_from_lidar) == counts
        ours = points_in_boxes(xyz, frame.boxes.center, frame.boxes.size, frame.boxes.yaw).sum(axis=1)
        np.testing.assert_allclose(ours, counts, rtol=0.01, atol=2)


@pytest.mark.parametrize("root_name", ["kitti", "kitti_fov"])
def test_real_labels_fit_their_2d_boxes(samples, root_name):
    """The hull of the projected corners covers the labelled 2D box: IoU above 0.9 for whole cars."""
    reader = open_kitti(samples / root_name, split="all")
    checked = 0
    for index in range(len(reader)):
        frame = reader[index]
        camera, boxes = frame.cameras[0], frame.boxes
        height, width = camera.image.shape[:2]
        corners = torch.from_numpy(box_corners(boxes.center, boxes.size, boxes.yaw))
        for box, name, corner in zip(boxes.image_boxes["image_2"], boxes.names, corners, strict=True):
            cut = box[0] < 1 or box[1] < 1 or box[2] > width - 2 or box[3] > height - 2
            if name != "Car" or cut:
                continue
            pixels, _, _ = project_points(
                corner,
                torch.from_numpy(camera.image_from_camera),
                torch.from_numpy(camera.camera_from_lidar),
                (height, width),
            )
            hull = np.concatenate([pixels.amin(dim=0).numpy(), pixels.amax(dim=0).numpy()])
            assert box_iou(hull, box) > 0.9, (frame.frame_id, name, hull, box)
            checked += 1
    assert checked >= 2


def box_iou(first, second) -> float:
    overlap = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    both = np.prod(np.maximum(overlap, 0))
    return both / (np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - both)


def test_200_real_label_files_survive_there_and_back(samples):
    """File -> internal -> file to 1e-4, with a real calibration."""
    camera_from_lidar = open_kitti(samples / "kitti_fov", split="all")[0].cameras[0].camera_from_lidar
    counts: dict[str, int] = {}
    for path in sorted((samples / "kitti_labels/training/label_2").glob("*.txt")):
        boxes = read_labels(path, camera_from_lidar)
        back = to_camera(boxes, camera_from_lidar)
        rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("DontCare")]
        values = np.array([row[8:15] for row in rows], dtype=float).reshape(-1, 7)
        np.testing.assert_allclose(back.size, values[:, :3], atol=1e-4)
        np.testing.assert_allclose(back.bottom_center, values[:, 3:6], atol=1e-4)
        np.testing.assert_allclose(wrap_angle(back.rotation_y - values[:, 6]), 0, atol=1e-4)
        for name in boxes.names:
            counts[name] = counts.get(name, 0) + 1
    assert (counts["Car"], counts["Pedestrian"], counts["Cyclist"]) == (758, 119, 56)
    assert "DontCare" not in counts
