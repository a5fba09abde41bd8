"""The custom layout: made frames written and read back, the manual's own example, and bad input as one line each."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from custom_rig import write_sequence
from PIL import Image

from simipu3d.config import parse_part
from simipu3d.contracts.frame import EVERYTHING, Wants
from simipu3d.data.check import check_frame, check_frames, collect
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.readers.custom import CustomReader
from simipu3d.errors import BadFrameError, UserError
from simipu3d.pictures.overlay import project
from simipu3d.registry import READERS
from simipu3d.tools import inspect_data

MANUAL = Path(__file__).parents[1] / "docs/custom_data.md"


def open_custom(root, wants: Wants = EVERYTHING, **keys):
    return CustomReader(parse_part("data", READERS, {"name": "custom", "root": str(root), **keys}), wants)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six frames of two streets, four cameras."""
    block = {
        "name": "drive_world",
        "root": str(tmp_path_factory.mktemp("cache")),
        "num_cameras": 4,
        "num_frames": 6,
        "frames_per_sequence": 3,
        "beams": 32,
        "azimuth_step_deg": 1.0,
        "image_size": [32, 64],
    }
    reader = build_reader(parse_part("data", READERS, block))
    return [reader[index] for index in range(6)]


@pytest.fixture(scope="module")
def untouched(made, tmp_path_factory):
    """Written with poses; for tests that only read."""
    root = tmp_path_factory.mktemp("rig")
    write_sequence(root / "first", made[:3])
    write_sequence(root / "second", made[3:], "npy")
    return root


@pytest.fixture
def rig(made, tmp_path):
    """One sequence with its calibration in the cameras, that a test may damage: still, so that it is the same in all."""
    cameras = tuple(replace(camera, timestamp=None) for camera in made[0].cameras)
    frames = [replace(made[0], frame_id=f"f{number}", timestamp=0.5 * number, cameras=cameras) for number in range(3)]
    write_sequence(tmp_path / "only", frames, posed=False)
    return tmp_path


def edit(rig: Path, change) -> None:
    path = rig / "only/sequence.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def same_frames(read, made):
    assert np.array_equal(read.points, made.points)
    assert read.points.dtype == np.float32
    assert read.point_columns == made.point_columns
    assert [camera.name for camera in read.cameras] == [camera.name for camera in made.cameras]
    for own, other in zip(read.cameras, made.cameras, strict=True):
        assert np.array_equal(own.image, other.image)
        assert np.array_equal(own.image_from_camera, other.image_from_camera)
        np.testing.assert_allclose(own.camera_from_lidar, other.camera_from_lidar, atol=1e-9)
    for name in ("center", "size", "yaw", "velocity", "num_points"):
        assert np.array_equal(getattr(read.boxes, name), getattr(made.boxes, name)), name
    assert tuple(read.boxes.names) == tuple(made.boxes.names)


def test_made_frames_come_back(made, untouched):
    reader = open_custom(untouched)
    assert len(reader) == 6
    for index, frame in enumerate(made):
        read = reader[index]
        same_frames(read, frame)
        assert np.array_equal(read.world_from_lidar, frame.world_from_lidar)
        assert (read.timestamp, read.cameras[0].timestamp) == (frame.timestamp, frame.cameras[0].timestamp)
        assert read.sequence_id == ("first", "second")[index // 3]
        assert read.frame_id == f"{read.sequence_id}/{frame.frame_id}"


def test_calibration_may_stand_in_the_cameras(rig):
    reader = open_custom(rig)
    expected = json.loads((rig / "only/sequence.json").read_text())["cameras"][2]["camera_from_lidar"]
    assert np.array_equal(reader[1].cameras[2].camera_from_lidar, expected)


def test_the_way_between_scan_and_exposure_is_inside(rig):
    """The lidar has driven 1 m on since the exposure: what it sees 10 m ahead was 11 m ahead of the camera's own place."""
    still = open_custom(rig)[0]

    def drive(raw):
        frame = raw["frames"][0]
        frame["world_from_lidar"] = [[1, 0, 0, 101.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        lidar_then = np.eye(4)
        lidar_then[0, 3] = 100.0
        front = np.array(raw["cameras"][0]["camera_from_lidar"])
        frame["images"][0]["world_from_camera"] = (lidar_then @ np.linalg.inv(front)).tolist()

    edit(rig, drive)
    moved = open_custom(rig)[0]
    ahead = np.array([[10.0, 0.5, -0.3]])
    pixels, depth, _ = project(moved.cameras[0], ahead)
    expected, expected_depth, _ = project(still.cameras[0], ahead + np.array([1.0, 0, 0]))
    np.testing.assert_allclose(pixels, expected, atol=1e-9)
    np.testing.assert_allclose(depth, expected_depth, atol=1e-9)
    assert np.array_equal(moved.cameras[1].camera_from_lidar, still.cameras[1].camera_from_lidar)


def test_units_types_and_columns(rig):
    """The same scan in millimetres, as float64, with another column and intensities of 255 steps."""
    before = open_custom(rig)[0]
    points = before.points.astype(np.float64)
    rows = np.column_stack([np.arange(len(points)) % 32, points[:, 3] * 255, points[:, :3] * 1000])
    columns = ["x", "y", "z", "ring", "intensity"]

    def change(raw):
        raw["points"] = {"columns": columns, "dtype": "float64", "metres_per_unit": 0.001, "intensity_scale": 255}

    edit(rig, change)
    scan = rig / "only/scans/f0.bin"
    np.column_stack([rows[:, 2:], rows[:, 0], rows[:, 1]]).astype("<f8").tofile(scan)
    frame = open_custom(rig, features=["intensity", "ring"])[0]
    assert frame.intensity_scale == 255
    assert frame.point_columns == ("x", "y", "z", "intensity", "ring")
    np.testing.assert_allclose(frame.points[:, :4], before.points, rtol=1e-6, atol=1e-6)
    assert np.array_equal(frame.points[:, 4], rows[:, 0])
    assert open_custom(rig, features=[])[0].points.shape == (len(points), 3)
    with pytest.raises(UserError, match=r"points.columns has no time, .*data.features=\[ring, intensity\]"):
        open_custom(rig, features=["time"])


def test_cameras_are_chosen_and_a_frame_may_lack_one(rig, caplog):
    edit(rig, lambda raw: raw["frames"][1]["images"].pop(0))
    everything = open_custom(rig)
    assert [len(everything[index].cameras) for index in range(3)] == [4, 3, 4]
    names = [camera.name for camera in everything[0].cameras]
    two = open_custom(rig, cameras=[names[2], names[0]])
    assert [[camera.name for camera in two[index].cameras] for index in range(3)] == [
        [names[2], names[0]],
        [names[2]],
        [names[2], names[0]],
    ]
    one = open_custom(rig, cameras=[names[0]])
    assert [one[index].frame_id for index in range(len(one))] == ["only/f0", "only/f2"]
    assert "1 of 3 frames have no image of data.cameras" in caplog.text
    with pytest.raises(UserError, match=r"data\.cameras: no sequence has roof; there are front"):
        open_custom(rig, cameras=["roof"])


def test_splits_are_lists_of_sequences(untouched, tmp_path):
    (untouched / "train.txt").write_text("second\n")
    assert [frame.sequence_id for frame in open_custom(untouched, split="train")] == ["second"] * 3
    mine = tmp_path / "mine.txt"
    mine.write_text("\ufefffirst\r\n second \n")
    assert len(open_custom(untouched, split="mine", split_file=str(mine))) == 6
    for text, words in (("", "empty"), ("first\nfirst", "twice"), ("third", "1 of its 1 sequences")):
        mine.write_text(text)
        with pytest.raises(UserError, match=words):
            open_custom(untouched, split="mine", split_file=str(mine))
    with pytest.raises(UserError, match=r"val\.txt: no such list"):
        open_custom(untouched, split="val")
    with pytest.raises(UserError, match="no folder in it has a sequence"):
        open_custom(tmp_path)


def camera_matrix(row, column, value):
    def change(raw):
        raw["cameras"][1]["camera_from_lidar"][row][column] = value

    return change


def mirror(raw):
    matrix = raw["cameras"][0]["camera_from_lidar"]
    matrix[1] = [-value for value in matrix[1]]


JSON_DAMAGES = {
    "another version": (lambda raw: raw.update(version=2), ("version: must be 1, is 2",)),
    "unknown key": (lambda raw: raw["cameras"][0].update(image_sizes=[1, 2]), ("cameras.0.image_sizes", "image_size")),
    "unknown frame key": (
        lambda raw: raw["frames"][2].update(timestmp=1),
        ("frames.2.timestmp: no such key", "timestamp"),
    ),
    "unknown image key": (
        lambda raw: raw["frames"][0]["images"][1].update(filename="x"),
        ("frames.0.images.1.filename: no such key", "did you mean file"),
    ),
    "unknown box key": (
        lambda raw: raw["frames"][0]["boxes"][0].update(centre=[0, 0, 0]),
        ("frames.0.boxes.0.centre: no such key", "did you mean center"),
    ),
    "no cameras": (lambda raw: raw.pop("cameras"), ("frames: f0: there is no camera", "cameras are none")),
    "no rotation": (camera_matrix(0, 0, 2.0), ("cameras.1.camera_from_lidar", "off the identity")),
    "three rows": (
        lambda raw: raw["cameras"][0]["camera_from_lidar"].pop(),
        ("cameras.0.camera_from_lidar: must be 4 x 4 numbers, is 3 x 4",),
    ),
    "ragged rows": (lambda raw: raw["cameras"][0]["camera_from_lidar"][0].pop(), ("must be 4 x 4 numbers, as a list",)),
    "last row": (camera_matrix(3, 3, 2.0), ("has the last row", "not [0, 0, 0, 1]")),
    "mirror": (mirror, ("cameras.0.camera_from_lidar", "determinant of its rotation is -1")),
    "NaN": (camera_matrix(0, 3, float("nan")), ("cameras.1.camera_from_lidar: must be finite",)),
    "focal length": (
        lambda raw: raw["cameras"][0].update(image_from_camera=[[0, 0, 1], [0, 1, 1], [0, 0, 1]]),
        ("focal lengths must be positive",),
    ),
    "transposed intrinsics": (
        lambda raw: raw["cameras"][0].update(image_from_camera=[[60, 0, 0], [0, 60, 0], [32, 16, 1]]),
        ("cameras.0.image_from_camera: its last row must begin with 0, 0, 1, is [32.0, 16.0, 1.0",),
    ),
    "words for numbers": (
        lambda raw: raw["cameras"][0].update(image_from_camera=[["60", "0", "32"], ["0", "60", "16"], ["0", "0", "1"]]),
        ("cameras.0.image_from_camera: must be 3 x 3 or 3 x 4 numbers, as a list of rows",),
    ),
    "zero byte": (lambda raw: raw["frames"][0].update(points="a\0.bin"), ("frames.0.points: a file's path",)),
    "version true": (lambda raw: raw.update(version=True), ("version: must be 1, is True",)),
    "distortion of four": (lambda raw: raw["cameras"][0].update(distortion=[1, 2, 3, 4]), ("must be 5 numbers",)),
    "two of one name": (lambda raw: raw["cameras"][1].update(name="front"), ("cameras: two have one name",)),
    "no such camera": (
        lambda raw: raw["frames"][1]["images"][0].update(camera="frnt"),
        ("frames: f1: there is no camera 'frnt'; cameras are front",),
    ),
    "camera twice": (
        lambda raw: raw["frames"][1]["images"].append(raw["frames"][1]["images"][0]),
        ("frames: f1: two images of one camera",),
    ),
    "nothing": (
        lambda raw: raw["frames"][1].update(images=[], points=None),
        ("frames: f1: has neither points nor images",),
    ),
    "labels of no points": (
        lambda raw: raw["frames"][1].update(points=None, point_instance="a.npy"),
        ("frames: f1: has point_instance and no points",),
    ),
    "classes without names": (
        lambda raw: raw["frames"][1].update(point_class="a.npy"),
        ("frames: f1: has classes, so class_names is needed",),
    ),
    "a box in no camera": (
        lambda raw: raw["frames"][1].update(
            boxes=[
                {"name": "a", "center": [1, 2, 3], "size": [1, 1, 1], "yaw": 0, "image_boxes": {"top": [0, 0, 1, 1]}}
            ]
        ),
        ("frames: f1: a box has image_boxes of 'top'",),
    ),
    "no way to the camera": (
        lambda raw: raw["cameras"][2].pop("camera_from_lidar"),
        ("frames: f0: front_right has neither",),
    ),
    "half a way": (
        lambda raw: (
            raw["frames"][0].pop("world_from_lidar"),
            raw["frames"][0]["images"][0].update(world_from_camera=np.eye(4).tolist()),
        ),
        ("front has world_from_camera, so world_from_lidar is needed",),
    ),
    "out of order": (lambda raw: raw["frames"][2].update(timestamp=0.5), ("timestamps out of order: f2", "follows f1")),
    "some timestamps": (lambda raw: raw["frames"][1].pop("timestamp"), ("f1: either every frame has a timestamp",)),
    "id twice": (lambda raw: raw["frames"][1].update(id="f0"), ("two have the id 'f0'",)),
    "no frames": (lambda raw: raw.update(frames=[]), ("frames: is empty",)),
    "outside": (lambda raw: raw["frames"][0].update(points="../x.bin"), ("frames.0.points", "stays inside it")),
    "absolute": (lambda raw: raw["frames"][0].update(points="/etc/passwd"), ("frames.0.points", "stays inside it")),
    "flat box": (lambda raw: raw["frames"][0]["boxes"][0].update(size=[1, 0, 1]), ("frames.0.boxes.0.size.1",)),
    "columns": (
        lambda raw: raw["points"].update(columns=["y", "x", "z"]),
        ("points: columns must begin with x, y, z",),
    ),
    "files that are not there": (
        lambda raw: [frame.update(points="no/such.bin") for frame in raw["frames"]],
        ("no/such.bin: no such file", "3 of the 3 frames"),
    ),
}


@pytest.mark.parametrize("name", JSON_DAMAGES)
def test_a_wrong_sequence_is_one_clear_line(rig, name):
    change, words = JSON_DAMAGES[name]
    edit(rig, change)
    with pytest.raises(UserError) as error:
        open_custom(rig)
    message = str(error.value)
    assert str(rig / "only") in message
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"version": 1', "\x00", "[" * 100_000, '{"version": %s}' % ("9" * 5000)]
)
def test_what_is_no_json_is_one_clear_line(rig, text):
    (rig / "only/sequence.json").write_text(text)
    with pytest.raises(UserError, match=r"only/sequence\.json: ") as error:
        open_custom(rig)
    assert "\n" not in str(error.value)


def test_all_wrong_sequences_are_named(rig):
    for name in ("second", "third"):
        (rig / name).mkdir()
        (rig / name / "sequence.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"second/sequence\.json: version: .*; 1 further sequences are wrong: third"
    ) as error:
        open_custom(rig)
    assert "\n" not in str(error.value)


FILE_DAMAGES = {
    "missing scan": ("scans/f1.bin", Path.unlink, "no such file"),
    "empty scan": ("scans/f1.bin", lambda path: path.write_bytes(b""), "empty"),
    "scan cut short": ("scans/f1.bin", lambda path: path.write_bytes(path.read_bytes()[:-3]), "points.dtype"),
    "NaN": ("scans/f1.bin", lambda path: np.full((3, 4), np.nan, "<f4").tofile(path), "3 of 3 points are NaN"),
    "missing image": ("back/f1.png", Path.unlink, "no such file"),
    "image cut short": ("back/f1.png", lambda path: path.write_bytes(path.read_bytes()[:300]), "cut short"),
    "image of another size": (
        "back/f1.png",
        lambda path: Image.new("RGB", (65, 32)).save(path),
        "32 x 65, and sequence.json says back is calibrated for 32 x 64",
    ),
}


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_a_damaged_file_is_a_bad_frame(rig, name):
    file, damage, words = FILE_DAMAGES[name]
    damage(rig / "only" / file)
    reader = open_custom(rig)
    assert len(reader[0].points)
    with pytest.raises(BadFrameError) as error:
        reader[1]
    message = str(error.value)
    assert str(rig / "only" / file) in message
    assert words in message
    assert "data.on_bad_frame=skip" in message
    assert "\n" not in message


def test_arrays_with_python_objects_are_refused(rig):
    edit(rig, lambda raw: raw["frames"][1].update(points="scans/f1.npy"))
    scan = rig / "only/scans/f1.npy"
    for rows, words in (
        (np.array([print], dtype=object), "plain numbers"),
        (np.zeros((5, 3)), "expected numbers of shape"),
        (np.array([["a"] * 4]), "no plain numbers"),
    ):
        np.save(scan, rows, allow_pickle=True)
        with pytest.raises(BadFrameError, match=words):
            open_custom(rig)[1]
    scan.write_bytes(b"\x93NUMPY\x01\x00v")
    with pytest.raises(BadFrameError, match="cut short"):
        open_custom(rig)[1]


def test_the_manuals_example_is_read_and_checked(tmp_path, monkeypatch, capsys):
    """Its program writes a rig that passes the check, and its JSON is a sequence."""
    text = MANUAL.read_text()
    program, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/custom_data.md", "exec"), {})
    config = MANUAL.parents[1] / "configs/simipu/custom.yaml"
    sets = ["--set", "data.root=rig", "data.num_workers=0"]
    assert inspect_data.main(["--cfg", str(config), *sets, "--check", "all"]) == 0
    assert "no problem in 4 frames" in capsys.readouterr().out
    (tmp_path / "rig/monday/sequence.json").write_text(example)
    with pytest.raises(UserError, match=r"front/000000\.jpg: no such file"):
        open_custom("rig")


def test_a_real_key_frame_comes_back_through_the_custom_layout(samples, tmp_path):
    """nuScenes: six cameras, each exposed at its own time, while the car drives."""
    block = {"name": "nuscenes", "root": str(samples / "nuscenes"), "version": "v1.0-mini", "split": "all"}
    frame = build_reader(parse_part("data", READERS, block))[0]
    write_sequence(tmp_path / "drive", [frame])
    read = open_custom(tmp_path)[0]
    np.testing.assert_allclose(read.points, frame.points, atol=1e-6)
    assert read.intensity_scale == 255
    for own, other in zip(read.cameras, frame.cameras, strict=True):
        assert (own.name, own.timestamp) == (other.name, other.timestamp)
        pixels, expected = (project(camera, frame.points[:2000, :3]) for camera in (own, other))
        assert np.array_equal(pixels[2], expected[2])
        np.testing.assert_allclose(pixels[0][pixels[2]], expected[0][pixels[2]], atol=1e-5)


def test_the_check_finds_nothing_wrong_with_made_frames(made, untouched):
    reader = open_custom(untouched)
    assert collect(list(check_frames(reader, range(6)))).problems == []
    first = check_frame(reader, 0)
    assert [camera.name for camera in first.cameras] == [camera.name for camera in made[0].cameras]
    assert all(camera.offset == 0 and 0 < camera.seen < 1 for camera in first.cameras)


# Ground truth


def write_labelled(root: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A rig of one frame with every kind of ground truth, and its arrays by kind."""
    rng = np.random.default_rng(0)
    drive = root / "drive"
    drive.mkdir(parents=True)
    points = rng.uniform([3, -4, -2, 0], [20, 4, 2, 1], (50, 4)).astype("<f4")
    truth = {
        "depth": rng.integers(0, 80 * 256, (12, 20)).astype(np.uint16),
        "pixel_class": rng.choice([0, 1, 255], (12, 20)).astype(np.uint8),
        "pixel_instance": rng.integers(0, 4000, (12, 20)).astype(np.uint16),
        "point_class": rng.choice([0, 1, 255], 50).astype(np.uint8),
        "point_instance": rng.integers(0, 70_000, 50).astype("<i4"),
    }
    points.tofile(drive / "scan.bin")
    Image.fromarray(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)).save(drive / "image.png")
    for kind, values in truth.items():
        if kind.startswith("point"):
            values.tofile(drive / f"{kind}.bin")
        else:
            Image.fromarray(values).save(drive / f"{kind}.png")
    box = {"name": "car", "center": [9, 0, 0], "size": [4, 2, 1.5], "yaw": 0.3}
    known = {"velocity": [1, 2], "attribute": "moving", "id": "a", "difficulty": 2, "num_points": 3}
    image = {"camera": "front", "file": "image.png"}
    frame = {"id": "0", "points": "scan.bin", "boxes": [box | known | {"image_boxes": {"front": [1, 2, 3, 4]}}, box]}
    frame |= {kind: f"{kind}.bin" for kind in truth if kind.startswith("point")}
    frame |= {"images": [image | {kind: f"{kind}.png" for kind in truth if not kind.startswith("point")}]}
    camera = {"name": "front", "image_size": [12, 20], "image_from_camera": [[15, 0, 9.5], [0, 15, 5.5], [0, 0, 1]]}
    camera["camera_from_lidar"] = [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    sequence = {"version": 1, "cameras": [camera], "frames": [frame], "class_names": ["car", "road"]}
    (drive / "sequence.json").write_text(json.dumps(sequence))
    return sequence, truth


def test_ground_truth_is_read_as_it_was_written(tmp_path):
    _, truth = write_labelled(tmp_path)
    reader = open_custom(tmp_path)
    frame, camera = reader[0], reader[0].cameras[0]
    assert reader.gives == EVERYTHING.truth
    assert reader.class_names == ("car", "road")
    assert np.array_equal(camera.depth, (truth["depth"] / 256).astype(np.float32))
    assert [camera.depth.dtype, camera.pixel_class.dtype, camera.pixel_instance.dtype] == [
        np.float32,
        np.uint8,
        np.int32,
    ]
    assert np.array_equal(camera.pixel_class, truth["pixel_class"])
    assert np.array_equal(camera.pixel_instance, truth["pixel_instance"])
    assert np.array_equal(frame.point_class, truth["point_class"])
    assert np.array_equal(frame.point_instance, truth["point_instance"])
    boxes = frame.boxes
    assert (boxes.attributes, boxes.ids, boxes.difficulty, boxes.num_points) == (("moving", ""), None, None, None)
    np.testing.assert_array_equal(boxes.velocity, [[1, 2], [np.nan, np.nan]])
    np.testing.assert_array_equal(boxes.image_boxes["front"], [[1, 2, 3, 4], [np.nan] * 4])
    cut = open_custom(tmp_path, point_range=[5, -3, -3, 15, 3, 3], frustum=True)[0]
    rows = [row for row, point in enumerate(frame.points) if point.tobytes() in {p.tobytes() for p in cut.points}]
    assert 0 < len(rows) < 50
    assert np.array_equal(cut.point_class, truth["point_class"][rows])
    assert np.array_equal(cut.point_instance, truth["point_instance"][rows])


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("point_class.bin", np.zeros(49, np.uint8), "holds 49 labels, and the scan 50 points"),
        ("point_class.bin", np.full(50, 2, np.uint8), r"holds the class 2, and class_names has 2 names \(0 to 1; 255"),
        ("point_instance.bin", np.full(50, -1, "<i4"), "point_instance holds numbers from -1 to 0"),
        ("pixel_class.png", np.full((12, 20), 9, np.uint8), "holds the class 9"),
        ("depth.png", np.zeros((12, 19), np.uint16), "is 12 x 19, and sequence.json says the image is 12 x 20"),
        ("depth.png", np.zeros((12, 20, 3), np.uint8), "must be a greyscale image"),
        ("depth.png", None, "is not an image"),
    ],
)
def test_wrong_ground_truth_is_one_clear_line(file, values, words, tmp_path):
    write_labelled(tmp_path)
    path = tmp_path / "drive" / file
    if values is None:
        path.write_bytes(b"nonsense")
    elif path.suffix == ".bin":
        values.tofile(path)
    else:
        Image.fromarray(values).save(path)
    with pytest.raises(BadFrameError, match=words) as error:
        open_custom(tmp_path)[0]
    assert file in str(error.value)
    assert "\n" not in str(error.value)
    assert open_custom(tmp_path, Wants())[0].point_class is None, "nobody looks at it in pre-training"


@pytest.mark.parametrize(("values", "words"), [(np.ones((12, 20), int), "floats"), (np.full((12, 20), np.nan), "NaN")])
def test_depth_as_an_array_is_metres(values, words, tmp_path):
    sequence, _ = write_labelled(tmp_path)
    sequence["frames"][0]["images"][0]["depth"] = "depth.npy"
    (tmp_path / "drive" / "sequence.json").write_text(json.dumps(sequence))
    metres = np.linspace(0, 80, 240).reshape(12, 20)
    np.save(tmp_path / "drive" / "depth.npy", metres)
    assert np.array_equal(open_custom(tmp_path)[0].cameras[0].depth, metres.astype(np.float32))
    np.save(tmp_path / "drive" / "depth.npy", values)
    with pytest.raises(BadFrameError, match=words):
        open_custom(tmp_path)[0]


def test_images_alone_and_points_alone_are_data_sets(tmp_path):
    """Without scan and boxes the calibration to the lidar is not needed; frames that lack what is wanted are left out."""
    sequence, _ = write_labelled(tmp_path)
    path = tmp_path / "drive" / "sequence.json"
    image_only = {"id": "1", "images": [{"camera": "front", "file": "image.png"}]}
    point_only = {"id": "2", "points": "scan.bin"}
    path.write_text(json.dumps({**sequence, "frames": [*sequence["frames"], image_only, point_only]}))
    assert open_custom(tmp_path).frame_ids == ("drive/0",)
    assert open_custom(tmp_path, Wants(points=False)).frame_ids == ("drive/0", "drive/1")
    assert open_custom(tmp_path, Wants(images=False)).frame_ids == ("drive/0", "drive/2")
    path.write_text(json.dumps({"version": 1, "frames": [point_only]}))
    assert open_custom(tmp_path, Wants(images=False))[0].cameras == ()
    with pytest.raises(UserError, match=r"data\.cameras: no frame has an image of any camera, which is needed"):
        open_custom(tmp_path, Wants())
    camera = {key: value for key, value in sequence["cameras"][0].items() if key != "camera_from_lidar"}
    path.write_text(json.dumps({"version": 1, "cameras": [camera], "frames": [image_only]}))
    (read,) = open_custom(tmp_path, Wants(points=False))[0].cameras
    assert read.camera_from_lidar[:3, :3].tolist() == [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    with pytest.raises(UserError, match="no frame has points, which are needed"):
        open_custom(tmp_path, Wants())
