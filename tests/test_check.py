"""`inspect_data --check`: every problem put into a data set is reported, and sound data has none."""

from dataclasses import replace

import numpy as np
import pytest
from custom_rig import write_sequence
from helpers import CAMERA_FROM_LIDAR, COLUMNS, street

from simipu3d.config import parse_part
from simipu3d.contracts.frame import Boxes, Frame
from simipu3d.data.check import as_on_disk, check_frame, check_frames, collect, frame_count, spread_indices, summary
from simipu3d.errors import BadFrameError
from simipu3d.geometry.transforms import rotation_z
from simipu3d.registry import READERS
from simipu3d.tools import inspect_data


class Frames:
    """A reader of the frames it is given; an error in their place is raised."""

    class_names = ()
    point_columns = COLUMNS

    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        if isinstance(self.frames[index], Exception):
            raise self.frames[index]
        return self.frames[index]


def sound(seed: int = 0, **changes) -> Frame:
    frame = street(seed)
    box = Boxes(frame.points[:1, :3].astype(np.float64), np.ones((1, 3)), np.zeros(1), ("car",))
    return replace(frame, **{"sequence_id": "drive", "timestamp": 0.1 * seed, "boxes": box, **changes})


def with_camera(**changes):
    frame = sound()
    return replace(frame, cameras=(replace(frame.cameras[0], **changes),))


def with_points(change):
    points = sound().points.copy()
    change(points)
    return sound(points=points)


def moved_box(**changes):
    return sound(boxes=replace(sound().boxes, **changes))


def put(column, value, rows=slice(3, 6)):
    def change(points):
        points[rows, column] = value

    return change


def placed(*shift):
    matrix = CAMERA_FROM_LIDAR.copy()
    matrix[:3, 3] = shift
    return matrix


def saturated(value, share=0.8):
    image = sound().cameras[0].image.copy()
    image.reshape(-1, 3)[: round(share * 64 * 96)] = value
    return image


BEHIND = np.diag([1.0, 1, -1, 1]) @ np.diag([-1.0, 1, 1, 1]) @ CAMERA_FROM_LIDAR
EMPTY_PLACE = np.array([[15.0, 0.0, 0.0]])
PROBLEMS = {
    "bad frame": (BadFrameError("scan.bin: the file is empty; way out"), ["scan.bin: the file is empty; way out"]),
    "no points": (sound(points=np.zeros((0, 4), np.float32), boxes=None), ["no points", "no camera sees any of its 0"]),
    "NaN": (with_points(put(1, np.nan)), ["3 of 100 points are NaN"]),
    "far points": (with_points(put(0, 2000.0)), ["3 of 100 points are farther than 500 m, up to 2000 m"]),
    "kilometres": (
        sound(points=sound().points * np.array([1e-3, 1e-3, 1e-3, 1], np.float32), boxes=None),
        ["nearer than 1 m", "no camera sees any"],
    ),
    "intensity in bytes": (with_points(put(3, 200.0)), ["intensity of 3 of 100 points lies outside"]),
    "columns": (sound(point_columns=("x", "y", "z", "time")), ["columns x, y, z, time"]),
    "one colour": (
        with_camera(image=np.full((64, 96, 3), 7, np.uint8)),
        ["front: the image is all one colour, (7, 7, 7)"],
    ),
    "sees nothing": (with_camera(camera_from_lidar=BEHIND), ["no camera sees any of its 100 points"]),
    "no rotation": (
        with_camera(camera_from_lidar=CAMERA_FROM_LIDAR * 2),
        ["front: camera_from_lidar has the last row"],
    ),
    "skew": (
        with_camera(camera_from_lidar=CAMERA_FROM_LIDAR @ np.diag([1.01, 1, 1, 1])),
        ["front: camera_from_lidar holds no rotation"],
    ),
    "mirror": (with_camera(camera_from_lidar=np.diag([-1.0, 1, 1, 1]) @ CAMERA_FROM_LIDAR), ["mirrors"]),
    "projection": (with_camera(image_from_camera=np.zeros((3, 4))), ["focal lengths 0 and 0"]),
    "inverted pose": (
        with_camera(camera_from_lidar=np.block([[CAMERA_FROM_LIDAR[:3, :3], np.full((3, 1), 600.0)], [0, 0, 0, 1]])),
        ["front: is 1039 m from the lidar by camera_from_lidar"],
    ),
    "transposed": (
        with_camera(image_from_camera=np.column_stack([sound().cameras[0].image_from_camera[:, :3].T, np.zeros(3)])),
        ["front: image_from_camera has the last row [47.5, 31.5, 1.0, 0.0], which must begin with 0, 0, 1"],
    ),
    "inverted extrinsics": (
        with_camera(camera_from_lidar=np.linalg.inv(CAMERA_FROM_LIDAR)),
        ["front: camera_from_lidar turns the picture on its side and its inverse does not"],
    ),
    "transposed extrinsics": (with_camera(camera_from_lidar=placed(0.1, 0.2, 0.3).T), ["is it transposed?"]),
    "centimetres": (with_camera(camera_from_lidar=placed(-0.4, -7.6, -27.0)), ["front: is 28 m from the lidar"]),
    "singular": (with_camera(camera_from_lidar=np.zeros((4, 4))), ["front: camera_from_lidar has the last row"]),
    "normalised intrinsics": (
        with_camera(image_from_camera=np.diag([1 / 96, 1 / 64, 1]) @ sound().cameras[0].image_from_camera),
        [
            "front: image_from_camera has focal lengths 0.625 and 0.9375 pixels for an image of 64 x 96; are they normalised"
        ],
    ),
    "looks elsewhere": (
        with_camera(camera_from_lidar=CAMERA_FROM_LIDAR @ rotation_z(1.35).numpy()),
        ["no camera sees more than 3.0% of its 100 points, next to nothing"],
    ),
    "white": (with_camera(image=saturated(255)), ["front: 80% of the image is pure white"]),
    "black": (with_camera(image=saturated(0, 0.97)), ["front: 97% of the image is pure black"]),
    "one point": (sound(points=sound().points[:1], boxes=None), ["holds only 1 points"]),
    "a bug of a reader": (ZeroDivisionError("oh\nno"), ["frame with index 0: cannot be read, and its reader does not"]),
    "degrees": (moved_box(yaw=np.array([90.0])), ["the yaw of 1 of 1 boxes is beyond a full turn, up to 90"]),
    "late": (with_camera(timestamp=3.0), ["front: was exposed +3.00 s from"]),
    "world": (sound(world_from_lidar=np.ones((4, 4))), ["world_from_lidar has the last row"]),
    "empty box": (
        moved_box(center=EMPTY_PLACE, size=np.full((1, 3), 0.01)),
        ["1 of 1 boxes that should hold points hold none (first: car"],
    ),
    "flat box": (moved_box(size=np.array([[1.0, 0, 1]])), ["1 of 1 boxes are not finite or have no size"]),
    "NaN box": (moved_box(center=np.full((1, 3), np.nan)), ["1 of 1 boxes are not finite"]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_is_told(name):
    frame, words = PROBLEMS[name]
    report = collect(list(check_frames(Frames([frame, sound(1), sound(2)]), range(3))))
    assert len(report.problems) == len(words), report.problems
    for problem, expected in zip(report.problems, words, strict=True):
        assert expected in problem
        assert name in ("bad frame", "a bug of a reader") or problem.startswith("frame 000000: ")
        assert "\n" not in problem


def test_all_problems_of_a_frame_are_told():
    frame = with_camera(image=np.zeros((64, 96, 3), np.uint8), camera_from_lidar=BEHIND)
    frame = replace(frame, points=frame.points * np.array([1, 1, 1, 9], np.float32))
    assert len(check_frame(Frames([frame]), 0).problems) == 3


def test_a_camera_of_several_that_sees_nothing_is_named():
    frame = sound()
    back = replace(frame.cameras[0], name="back", camera_from_lidar=BEHIND)
    (problem,) = check_frame(Frames([replace(frame, cameras=(*frame.cameras, back))]), 0).problems
    assert "not one of back sees any" in problem
    twice = replace(frame, cameras=frame.cameras * 2)
    assert "two cameras have one name: front, front" in check_frame(Frames([twice]), 0).problems[0]


def test_boxes_that_may_be_empty_are_no_problem():
    """Outside of what the points span, and where the labels say that hardly a point is inside."""
    far = moved_box(center=np.array([[200.0, 0, 0]]))
    few = moved_box(center=EMPTY_PLACE, size=np.full((1, 3), 0.01), num_points=np.array([4]))
    none = sound(boxes=Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), ()))
    assert [check_frame(Frames([frame]), 0).problems for frame in (far, few, none)] == [(), (), ()]
    many = moved_box(center=EMPTY_PLACE, size=np.full((1, 3), 0.01), num_points=np.array([5]))
    assert check_frame(Frames([many]), 0).problems


def test_boxes_of_kitti_that_hide_are_no_problem():
    """Without counts: far, occluded and truncated cars may hold nothing, and so may a few of many."""
    at = np.array([[15.0, 0, 0], [10.0, 0, 0], [45.0, 0, 0]])
    frame = sound(points=np.concatenate([sound().points, np.float32([[60, 0, 0, 0], [60, 0, 5, 0]])]))
    nothing = {"size": np.full((3, 3), 0.01), "yaw": np.zeros(3), "names": ("car",) * 3}
    for known in ({"occlusion": np.array([1, 2, 0])}, {"truncation": np.array([0.9, 0.6, 0])}):
        assert check_frame(Frames([replace(frame, boxes=Boxes(at, **nothing, **known))]), 0).problems == ()
    hidden = Boxes(at, **nothing, occlusion=np.array([0, 0, 0]))
    (problem,) = check_frame(Frames([replace(frame, boxes=hidden)]), 0).problems
    assert "2 of 2 boxes that should hold points hold none" in problem
    mostly = np.concatenate([frame.points[:4, :3].astype(np.float64), at[:1]])
    few = Boxes(mostly, np.full((5, 3), 0.1), np.zeros(5), ("car",) * 5)
    assert check_frame(Frames([replace(frame, boxes=few)]), 0).problems == ()


def test_rounding_in_a_last_row_is_no_problem():
    matrix = sound().cameras[0].image_from_camera.copy()
    matrix[2, 0] = 1e-16
    extrinsics = CAMERA_FROM_LIDAR.copy()
    extrinsics[3, :3] = 1e-17
    assert check_frame(Frames([with_camera(image_from_camera=matrix, camera_from_lidar=extrinsics)]), 0).problems == ()


def drive(times, ids=None):
    ids = [f"{number:03d}" for number in range(len(times))] if ids is None else ids
    return Frames([sound(3, timestamp=time, frame_id=name) for time, name in zip(times, ids, strict=True)])


def problems(reader, indices=None):
    indices = range(len(reader)) if indices is None else indices
    return collect(list(check_frames(reader, indices))).problems


def test_time_goes_on_within_a_sequence():
    even = [0.1 * number for number in range(12)]
    assert problems(drive(even)) == []
    assert problems(drive([None] * 4)) == []
    back = even.copy()
    back[5] = 0.35
    assert problems(drive(back)) == ["sequence drive: frame 005 at 0.350 s follows 004 at 0.400 s"]
    gap = [time + (time > 0.55) for time in even]
    assert problems(drive(gap)) == ["sequence drive: frame 006 comes 1.100 s after 005; 0.100 s are usual"]
    # Of a sound drive only some frames are read, at uneven distances: that is no gap.
    assert problems(drive(even), [0, 1, 7, 11]) == []
    frames = drive(even).frames
    other = [replace(frame, sequence_id="other", frame_id=f"b{frame.frame_id}") for frame in frames]
    assert problems(Frames([*frames, *other])) == [], "another sequence starts anew"


def test_one_id_for_two_frames():
    assert problems(drive([0.1, 0.2, 0.3], ["a", "b", "a"])) == ["frame a: index 0 and 2 have this one id"]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers):
    reader = Frames([sound(seed) for seed in range(5)] + [BadFrameError("gone")])
    report = collect(list(check_frames(reader, range(6), workers)))
    assert report.problems == ["gone"]
    assert report == collect([check_frame(reader, index) for index in range(6)])
    rows = dict(summary(report))
    assert rows["frames read"] == "5 of 6"
    assert rows["points a frame"] == "100"
    assert rows["front"].startswith("5 images 64 x 96; sees ")
    assert summary(collect([])) == [("frames read", "0 of 0")]


@pytest.mark.parametrize(("number", "total"), [(0, 7), (1, 7), (3, 7), (7, 7), (50, 7), (5, 1000)])
def test_spread_indices(number, total):
    indices = spread_indices(number, total)
    assert len(indices) == (min(number, total) or total)
    assert sorted(set(indices)) == indices
    assert number < 2 or (indices[0], indices[-1]) == (0, total - 1)
    assert (frame_count("all"), frame_count("12")) == (0, 12)


def test_what_filters_or_the_first_missing_file_hide_is_told(tmp_path, capsys):
    """Far points that the frustum takes away, and every file that is not there, though a run would not start."""
    frames = [replace(sound(number, frame_id=f"{number}"), boxes=None) for number in range(5)]
    points = frames[0].points.copy()
    points[4, 0] = 2000.0
    write_sequence(tmp_path / "drive", [replace(frames[0], points=points), *frames[1:]], posed=False)
    for number in (2, 3):
        (tmp_path / f"drive/front/{number}.png").unlink()
    config = "configs/simipu/custom.yaml"
    parts = [f"{{name: custom, root: {tmp_path}, features: [intensity], frustum: true}}"]
    for sets in ([f"data.root={tmp_path}"], ["data.name=mixed", f"data.sets=[{parts[0]}]"]):
        assert inspect_data.main(["--cfg", config, "--set", *sets, "data.num_workers=0", "--check", "all"]) == 2
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert "1 of 100 points are farther than 500 m, up to 2000 m" in lines[0]
        assert "front/2.png: no such file" in lines[1]
        assert "front/3.png: no such file" in lines[2]
        assert captured.err.splitlines() == ["error: 3 problems in 5 frames, listed above"], "no progress bar in a log"


def test_the_tool_says_how_it_went(tmp_path, capsys, monkeypatch):
    config = tmp_path / "made.yaml"
    config.write_text(
        f"data:\n  name: drive_world\n  root: {tmp_path}\n  num_frames: 3\n  num_cameras: 2\n"
        "  image_size: [16, 32]\n  beams: 16\n  azimuth_step_deg: 2.0\n  num_workers: 0\n"
    )
    assert inspect_data.main(["--cfg", str(config), "--check", "2"]) == 0
    captured = capsys.readouterr()
    assert "no problem in 2 frames" in captured.out
    assert "front_left" in captured.out
    kind = READERS["drive_world"].target
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: sound(index, frame_id="same"))
    assert inspect_data.main(["--cfg", str(config), "--check", "all"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("frame same: index 0 and 1 have this one id\n")
    assert captured.err.strip().splitlines()[-1] == "error: 2 problems in 3 frames, listed above"
    for word in ("-1", "some"):
        with pytest.raises(SystemExit):
            inspect_data.main(["--cfg", str(config), "--check", word])


def test_a_check_reads_every_frame_of_a_configuration_that_leaves_some_out():
    config = parse_part("data", READERS, {"name": "waymo", "root": "anywhere", "load_interval": 5, "frustum": True})
    whole = as_on_disk(config)
    assert (whole.load_interval, whole.frustum, whole.point_range) == (1, False, None)
