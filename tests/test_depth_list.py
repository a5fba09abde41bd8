"""Lists of image and depth pairs: the official text format, crops, and what is said about damage."""

import numpy as np
import pytest
from PIL import Image

from simipu3d.config import parse_part
from simipu3d.contracts.frame import Wants
from simipu3d.data.config import AugmentConfig
from simipu3d.data.loading.evaluation import make_evaluation_loader
from simipu3d.data.loading.loader import build_reader
from simipu3d.errors import BadFrameError, UserError
from simipu3d.heads.depth import Depth
from simipu3d.registry import READERS

DRIVE = "2011_09_26_drive_0002_sync"
DEPTH = Wants(points=False, images=True, truth=frozenset({"depth"}))


def write_pair(root, number: int, size=(375, 1242), known=0.2):
    """One pair in KITTI's official layout; returns its line and its arrays."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    values = (rng.integers(256, 256 * 80, size) * (rng.random(size) < known)).astype(np.uint16)
    name = f"2011_09_26/{DRIVE}/image_02/data/{number:010d}.png"
    truth = f"{DRIVE}/proj_depth/groundtruth/image_02/{number:010d}.png"
    for path, array in ((root / "raw" / name, image), (root / "depth" / truth, values)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return f"{name} {truth} 721.5377", image, values


def reader(root, text: str, wants: Wants = DEPTH, **keys):
    (root / "raw").mkdir(exist_ok=True)
    (root / "raw" / "kitti_eigen_train.txt").write_text(text)
    block = {
        "name": "depth_list",
        "root": str(root / "raw"),
        "depth_root": str(root / "depth"),
        "split": "kitti_eigen_train",
    }
    return build_reader(parse_part("data", READERS, {**block, **keys}), wants)


def test_a_kitti_pair_comes_back_cropped_with_its_calibration(tmp_path):
    line, image, values = write_pair(tmp_path, 5)
    for crop, window in ((None, (0, 375, 0, 1242)), ("kb", (23, 375, 13, 1229))):
        frame = reader(tmp_path, line + "\n", crop=crop)[0]
        top, bottom, left, right = window
        (camera,) = frame.cameras
        assert np.array_equal(camera.image, image[top:bottom, left:right])
        np.testing.assert_allclose(camera.depth, values[top:bottom, left:right] / 256, atol=1e-6)
        assert camera.depth.dtype == np.float32
        assert camera.image_from_camera[0].tolist() == [721.5377, 0, 620.5 - left, 0]
        assert camera.image_from_camera[1].tolist() == [0, 721.5377, 187.0 - top, 0]
        assert frame.sequence_id == f"2011_09_26/{DRIVE}"
        assert frame.frame_id == f"2011_09_26/{DRIVE}/image_02/data/0000000005"
        assert frame.points.shape == (0, 4)


def test_nyu_lines_begin_with_a_slash_and_are_cropped_for_training(tmp_path):
    scene = tmp_path / "raw" / "kitchen_0028b"
    scene.mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(scene / "rgb_00045.jpg")
    values = rng.integers(0, 9999, (480, 640)).astype(np.uint16)
    Image.fromarray(values).save(scene / "sync_depth_00045.png")
    line = "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579\n"
    keys = {"png_scale": 1000.0, "depth_root": None, "intrinsics": [518.8579, 519.46961, 325.58245, 253.73617]}
    frame = reader(tmp_path, line, crop="nyu", **keys)[0]
    assert frame.cameras[0].image.shape == (427, 565, 3)
    np.testing.assert_allclose(frame.cameras[0].depth, values[45:472, 43:608] / 1000, atol=1e-6)
    np.testing.assert_allclose(frame.cameras[0].image_from_camera[:2, 2], [325.58245 - 43, 253.73617 - 45])
    assert frame.sequence_id == "kitchen_0028b"


def test_lines_without_depth_are_dropped_or_kept_unknown(tmp_path):
    line, *_ = write_pair(tmp_path, 1)
    other, image, _ = write_pair(tmp_path, 2)
    unlabelled = f"{other.split()[0]} None 721.5377"
    text = f"{line}\n\n{unlabelled}\n"
    assert len(reader(tmp_path, text)) == 1
    kept = reader(tmp_path, text, missing="keep")
    assert len(kept) == 2
    assert np.array_equal(kept[1].cameras[0].image, image)
    assert (kept[1].cameras[0].depth == 0).all()


def test_only_what_is_wanted_is_opened(tmp_path):
    line, *_ = write_pair(tmp_path, 1)
    for path in (tmp_path / "depth").rglob("*.png"):
        path.unlink()
    frame = reader(tmp_path, line, Wants(points=False))[0]
    assert frame.cameras[0].depth is None
    assert reader(tmp_path, line, Wants(points=False, images=False))[0].cameras == ()


def test_the_evaluation_loader_takes_frames_without_points(tmp_path):
    lines = [write_pair(tmp_path, number)[0] for number in range(3)]
    own = reader(tmp_path, "\n".join(lines), crop="kb", batch_size=2, num_workers=0)
    batches = list(make_evaluation_loader(own.config, AugmentConfig(), Depth.NEEDS, reader=own))
    assert [batch.images[0].images.shape for batch in batches] == [(2, 3, 352, 1216), (1, 3, 352, 1216)]
    assert [batch.num_frames for batch in batches] == [2, 1]
    assert float(batches[1].truth.depth[0].max()) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: line.rsplit(" ", 1)[0], "line 1 is"),
        (lambda line: line.replace("721.5377", "near"), "line 1 is"),
        (lambda line: line.replace("721.5377", "-1"), "positive focal length"),
        (lambda line: line.replace("2011_09_26/", "../", 1), r"below data\.root"),
        (lambda line: line + "\n" + line, "twice"),
        (lambda line: "", "no image with a depth map"),
        (lambda line: line.replace("0000000001", "0000000009"), "lack a file"),
    ],
    ids=["columns", "focal", "negative", "outside", "twice", "empty", "absent"],
)
def test_a_wrong_list_is_one_line(tmp_path, change, words):
    line, *_ = write_pair(tmp_path, 1)
    with pytest.raises(UserError, match=words):
        reader(tmp_path, change(line))


def test_damaged_depth_maps_are_bad_frames(tmp_path):
    line, _, values = write_pair(tmp_path, 1)
    path = tmp_path / "depth" / line.split()[1]
    frames = reader(tmp_path, line)
    for damage, words in (
        (lambda: Image.fromarray(values[:100]).save(path), "100 x 1242 pixels, its image"),
        (lambda: Image.fromarray((values // 256).astype(np.uint8)).save(path), "8 bits"),
        (lambda: path.write_bytes(b"no picture"), "not an image"),
        (lambda: path.unlink(), "no such file"),
    ):
        damage()
        with pytest.raises(BadFrameError, match=words):
            frames[0]


def test_an_image_too_small_for_the_crop_is_a_bad_frame(tmp_path):
    line, *_ = write_pair(tmp_path, 1, size=(300, 1242))
    with pytest.raises(BadFrameError, match=r"too few for data\.crop=kb"):
        reader(tmp_path, line, crop="kb")[0]


def test_a_list_that_is_absent_names_itself(tmp_path):
    with pytest.raises(UserError, match=r"train\.txt: no such list"):
        build_reader(parse_part("data", READERS, {"name": "depth_list", "root": str(tmp_path)}))


def test_real_pairs(samples, tmp_path):
    """KITTI: 10 to 30 % of the pixels known, 3 to 90 m."""
    names = ("0000000005", "0000000050")
    (tmp_path / "list.txt").write_text("".join(f"image/{n}.png groundtruth_depth/{n}.png 707.0493\n" for n in names))
    block = {
        "name": "depth_list",
        "root": str(samples / "kitti_depth"),
        "split_file": str(tmp_path / "list.txt"),
        "crop": "kb",
    }
    pairs = build_reader(parse_part("data", READERS, block), DEPTH)
    assert len(pairs) == 2
    for index in range(2):
        depth = pairs[index].cameras[0].depth
        assert depth.shape == (352, 1216)
        assert 0.1 < (depth > 0).mean() < 0.3
        assert 3 < depth[depth > 0].min() < depth.max() < 90
