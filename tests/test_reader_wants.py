"""Readers open what they are asked for and nothing else: every other file of the data set holds nonsense."""

import io
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from custom_rig import write_sequence
from nuscenes_drive import write_release
from shard_sets import SMALL, WORLD, parse
from test_kitti import write_frame

from simipu3d.benchmark.synthetic_waymo.drive import WaymoDrive
from simipu3d.benchmark.synthetic_waymo.files import write_waymo_v2
from simipu3d.benchmark.synthetic_waymo.rig import WaymoRigSettings
from simipu3d.contracts.frame import EVERYTHING, FrameReader, Wants
from simipu3d.data.shards.writer import prepare_shards
from simipu3d.registry import READERS

NONSENSE = b"nonsense \xff\x00"


def opened(block: dict, wants: Wants) -> FrameReader:
    return READERS[block["name"]].target(parse(**block), wants)


def write_kitti(root: Path) -> dict:
    for number in range(2):
        write_frame(root, f"training/{number:06d}")
    return {"name": "kitti", "root": str(root), "split": "all", "cameras": None}


def write_nuscenes(root: Path) -> dict:
    write_release(root)
    return {"name": "nuscenes", "root": str(root), "version": "v1.0-mini", "split": "all"}


def write_waymo(root: Path) -> dict:
    drive = WaymoDrive(WaymoRigSettings(num_moments=1), 0)
    moments = [drive.moment(0)]
    write_waymo_v2(root, {moments[0][0].segment: moments})
    return {"name": "waymo", "root": str(root), "split": "all"}


def world_frames(root: Path, number: int = 2) -> FrameReader:
    return opened({**WORLD, "num_frames": number, "root": str(root)}, EVERYTHING)


def write_custom(root: Path) -> dict:
    world = world_frames(root.parent / "world")
    frames = [world[index] for index in range(2)]
    path = write_sequence(root / "drive", frames)
    text = json.loads(path.read_text()) | {"class_names": list(world.class_names)}
    for entry, frame in zip(text["frames"], frames, strict=True):
        for kind in ("point_class", "point_instance"):
            entry[kind] = f"{kind}-{entry['id']}.npy"
            np.save(root / "drive" / entry[kind], getattr(frame, kind))
        for image, camera in zip(entry["images"], frame.cameras, strict=True):
            for kind in ("depth", "pixel_class", "pixel_instance"):
                image[kind] = f"{kind}-{camera.name}-{entry['id']}.npy"
                np.save(root / "drive" / image[kind], getattr(camera, kind))
    path.write_text(json.dumps(text))
    return {"name": "custom", "root": str(root)}


WRITERS = {"kitti": write_kitti, "nuscenes": write_nuscenes, "waymo": write_waymo, "custom": write_custom}
CARRIER = {
    "kitti": {"velodyne": "points", "image_2": "images", "image_3": "images", "label_2": "boxes"},
    "nuscenes": {
        "LIDAR_TOP": "points",
        "sample_annotation.json": "boxes",
        "instance.json": "boxes",
        "category.json": "boxes",
        "attribute.json": "boxes",
        "CAM_": "images",
    },
    "waymo": {
        "/lidar/": "points",
        "/lidar_pose/": "points",
        "/lidar_calibration/": "points",
        "/lidar_camera_projection/": "points",
        "/lidar_box/": "boxes",
        "/projected_lidar_box/": "boxes",
        "/camera_image/": "images",
        "/camera_calibration/": "images",
    },
    "custom": {
        "scans/": "points",
        "/front": "images",
        **{kind: kind for kind in ("depth", "pixel_class", "pixel_instance", "point_class", "point_instance")},
    },
}
"""Part of a file's path -> what it is for."""
WANTED = [
    Wants(points=points, images=images, truth=truth)
    for points, images in product((True, False), (True, False))
    for truth in (frozenset(), EVERYTHING.truth)
]


def is_wanted(kind: str, wants: Wants, frustum: bool) -> bool:
    if kind in ("points", "images"):
        return getattr(wants, kind) or (kind == "images" and frustum and wants.points)
    carrier = {"depth": wants.images, "pixel_class": wants.images, "pixel_instance": wants.images}
    carrier |= {"point_class": wants.points, "point_instance": wants.points}
    return kind in wants.truth and carrier.get(kind, True)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Name of the reader -> folder of its data set, and the block that opens it; written once."""
    made = {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in made:
            root = tmp_path_factory.mktemp(name) / "data"
            root.mkdir()
            made[name] = (root, WRITERS[name](root))
        return made[name]

    return get


def in_words(wants: Wants) -> str:
    """The same in every process, which the order of a set is not."""
    return "-".join([f"points={wants.points}", f"images={wants.images}", *sorted(wants.truth)])


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("wants", WANTED, ids=in_words)
def test_what_is_not_wanted_may_hold_nonsense(name, wants, originals, tmp_path):
    original, block = originals(name)
    whole = opened({**block, "frustum": False}, EVERYTHING)[0]
    root = shutil.copytree(original, tmp_path / "data")
    spoiled = 0
    for path in (path for path in root.rglob("*") if path.is_file()):
        place = f"/{path.relative_to(root)}"
        kind = next((kind for part, kind in CARRIER[name].items() if part in place), None)
        if kind is not None and not is_wanted(kind, wants, frustum=False):
            path.write_bytes(NONSENSE)
            spoiled += 1
    assert spoiled or wants == EVERYTHING
    reader = opened({**block, "root": str(root), "frustum": False}, wants)
    frame = reader[0]
    assert reader.wants is wants
    assert frame.points.shape == (len(whole.points) if wants.points else 0, len(reader.point_columns))
    assert len(frame.cameras) == (len(whole.cameras) if wants.images else 0)
    assert all(camera.image.any() for camera in frame.cameras)
    assert (frame.boxes is not None) == ("boxes" in wants.truth)
    for kind in ("point_class", "point_instance"):
        assert (getattr(frame, kind) is not None) == (kind in reader.gives and is_wanted(kind, wants, False))
    for kind in ("depth", "pixel_class", "pixel_instance"):
        given = kind in reader.gives and is_wanted(kind, wants, False)
        assert all((getattr(camera, kind) is not None) == given for camera in frame.cameras)
    assert reader.gives == opened(block, EVERYTHING).gives


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_not_wanted_may_be_absent(name, originals, tmp_path):
    """Images alone and points alone are data sets too."""
    original, block = originals(name)
    root = shutil.copytree(original, tmp_path / "data")
    for gone, wants in (("points", Wants(points=False)), ("images", Wants(images=False))):
        root = shutil.copytree(original, tmp_path / gone)
        for path in [path for path in root.rglob("*") if path.is_file()]:
            place = f"/{path.relative_to(root)}"
            if gone == next((kind for part, kind in CARRIER[name].items() if part in place), None):
                path.unlink()
        frame = opened({**block, "root": str(root), "frustum": False}, wants)[0]
        assert bool(len(frame.points)) == wants.points
        assert bool(frame.cameras) == wants.images


@pytest.mark.parametrize("name", WRITERS)
def test_the_frustum_needs_the_size_of_an_image_and_not_its_pixels(name, originals, tmp_path):
    """The same points, from images of which all but the header is cut off, or that nobody opens."""
    original, block = originals(name)
    expected = opened({**block, "frustum": True}, EVERYTHING)[0]
    root = shutil.copytree(original, tmp_path / "data")
    for path in (path for path in root.rglob("*") if path.suffix in (".png", ".jpg")):
        path.write_bytes(path.read_bytes()[:100] if name == "kitti" else NONSENSE)
    frame = opened({**block, "root": str(root), "frustum": True}, Wants(images=False))[0]
    assert len(frame.points) > 0
    assert np.array_equal(frame.points, expected.points)
    assert frame.cameras == ()


def read_suffixes(reader: FrameReader, monkeypatch) -> tuple[set[str], object]:
    """The members of a shard's frame that are read, and the frame."""
    suffixes: set[str] = set()
    real = type(reader)._read

    def spy(self, shard, chosen, source):
        suffixes.update(member.suffix for member in chosen)
        return real(self, shard, chosen, source)

    monkeypatch.setattr(type(reader), "_read", spy)
    return suffixes, reader[0]


def test_shards_read_the_members_that_are_wanted(tmp_path, monkeypatch):
    world_frames(tmp_path / "world")
    prepare_shards(parse(**{**WORLD, "num_frames": 2}, root=str(tmp_path / "world")), SMALL, str(tmp_path / "set"))
    block = {"name": "shards", "root": str(tmp_path / "set"), "cameras": ["front"]}
    images = {"front.png"}
    pixels = {f"front.{kind}.npy" for kind in ("depth", "pixel_class", "pixel_instance")}
    points, labels = {"points.npy"}, {"point_class.npy", "point_instance.npy"}
    for wants, members in (
        (EVERYTHING, {"boxes.json", *images, *pixels, *points, *labels}),
        (Wants(), images | points),
        (Wants(points=False), images),
        (Wants(images=False, truth=frozenset({"boxes"})), points | {"boxes.json"}),
        (Wants(images=False, truth=EVERYTHING.truth), points | labels | {"boxes.json"}),
        (Wants(points=False, truth=frozenset({"depth"})), images | {"front.depth.npy"}),
    ):
        with monkeypatch.context() as patch:
            found, frame = read_suffixes(opened(block, wants), patch)
        assert found == members | {"json"}
        assert bool(len(frame.points)) == wants.points
        assert bool(frame.cameras) == wants.images


def test_the_street_world_loads_the_arrays_that_are_wanted(tmp_path, monkeypatch):
    whole = world_frames(tmp_path)[0]
    loaded = []
    real = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: loaded.append(key) or real(self, key))
    for wants in WANTED:
        loaded.clear()
        frame = opened({**WORLD, "num_frames": 2, "root": str(tmp_path)}, wants)[0]
        kinds = {name.rpartition(".")[2] for name in loaded}
        assert ("points" in kinds, "image" in kinds) == (wants.points, wants.images)
        assert any(name.startswith("box_") for name in kinds) == bool(wants.truth)
        assert (
            {"depth", "pixel_class"} <= kinds if wants.images and wants.truth else not {"depth", "pixel_class"} & kinds
        )
        assert (frame.boxes is not None) == bool(wants.truth)
        assert len(frame.cameras) == (len(whole.cameras) if wants.images else 0)
        if wants.points:
            assert np.array_equal(frame.points, whole.points)


def test_a_mixture_hands_its_wants_on(originals):
    _, kitti = originals("kitti")
    block = {"name": "mixed", "sets": [kitti | {"split": "all"}, {**WORLD, "num_frames": 2, "cache": False}]}
    reader = opened(block, Wants(points=False))
    assert [own.wants for own in reader.readers] == [reader.wants] * 2
    assert reader.gives == EVERYTHING.truth
    assert reader[0].points.shape == (0, 4)
    assert reader[0].boxes is None
    assert io.BytesIO(reader[0].cameras[0].encoded).read(4) == b"\x89PNG"
