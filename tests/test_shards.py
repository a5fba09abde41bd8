"""Laws of shards: what goes in comes out, the bytes depend on nothing else, and no damage goes unseen."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import fields, is_dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from helpers import BLOCKS, street
from PIL import Image

from simipu3d.config import parse_part
from simipu3d.contracts.frame import Boxes
from simipu3d.data import shard_store
from simipu3d.data.module import BadFrameLimit, build_reader, make_loader
from simipu3d.data.readers.shards import ShardsReader
from simipu3d.data.shard_format import FORMAT
from simipu3d.data.shard_frames import PrepareConfig, decode_frame, encode_frame
from simipu3d.data.shard_store import LocalStore, RemoteStore, StoreError, open_store
from simipu3d.data.shard_verify import verify_shards
from simipu3d.data.shard_writer import prepare_shards
from simipu3d.engine.pretrain import pretrain
from simipu3d.engine.run import read_checkpoint
from simipu3d.engine.settings import load_prepare_config, load_pretrain_config
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS
from simipu3d.tools.prepare_data import main

WORLD = {
    "name": "drive_world",
    "num_frames": 11,
    "frames_per_sequence": 2,
    "image_size": [24, 48],
    "beams": 16,
    "azimuth_step_deg": 2.0,
    "num_cameras": 2,
    "supersampling": 1,
}
SMALL = PrepareConfig(shard_frames=3)


def parse(**block):
    return parse_part("data", READERS, block)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A made data set of 11 frames with two cameras and every kind of ground truth, cached."""
    config = parse(**WORLD, root=str(tmp_path_factory.mktemp("world")))
    build_reader(config).prepare(progress=False)
    return config


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Its shards, which tests only read: 3 + 3 + 3 + 2 frames."""
    out = tmp_path_factory.mktemp("shards") / "set"
    prepare_shards(world, SMALL, str(out))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """The shards, for a test to damage."""
    out = tmp_path / "copy"
    out.mkdir()
    for path in whole.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def open_shards(url, **keys) -> ShardsReader:
    return build_reader(parse(name="shards", root=str(url), **keys))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def difference(first, second, path="frame") -> list[str]:
    """Where two records differ, bit for bit and type for type; `encoded` may be new."""
    if is_dataclass(first):
        names = [f.name for f in fields(first) if f.name != "encoded"]
        return [line for n in names for line in difference(getattr(first, n), getattr(second, n), f"{path}.{n}")]
    if isinstance(first, np.ndarray):
        same = isinstance(second, np.ndarray) and first.dtype == second.dtype
        same = same and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
        return [] if same else [path]
    if isinstance(first, tuple | list) and len(first) and is_dataclass(first[0]):
        pairs = zip(first, second, strict=True)
        return [line for i, (a, b) in enumerate(pairs) for line in difference(a, b, f"{path}.{i}")]
    if isinstance(first, tuple | list):
        return [] if list(first) == list(second) else [path]
    return [] if type(first) is type(second) and first == second else [path]


# There and back


def test_a_made_world_comes_back_as_it_was(world, whole):
    source, reader = build_reader(world), open_shards(whole)
    assert len(reader) == len(source) == 11
    assert (reader.class_names, reader.point_columns) == (source.class_names, source.point_columns)
    for index in range(11):
        frame = reader[index]
        assert difference(source[index], frame) == []
        assert frame.cameras[0].depth is not None
        assert all(camera.encoded.startswith(b"\x89PNG") for camera in frame.cameras)


@pytest.mark.parametrize("name", ["kitti", "nuscenes"])
def test_real_frames_come_back_as_they_were(name, samples, tmp_path):
    """Every field; the images are the files' own bytes."""
    own = {
        "kitti": {"split": "paper", "cameras": ["image_2"]},
        "nuscenes": {"split": "all", "version": "v1.0-mini", "features": ["intensity", "ring", "time"]},
    }[name]
    config = parse(name=name, root=str(samples / name), max_bad_fraction=1.0, **own)
    source = build_reader(config)
    prepare_shards(config, PrepareConfig(), str(tmp_path / "out"))
    reader = open_shards(tmp_path / "out")
    assert len(reader) == len(source) > 0
    for index in range(len(source)):
        before, after = source[index], reader[index]
        assert difference(before, after) == []
        assert [camera.encoded for camera in before.cameras] == [camera.encoded for camera in after.cameras]
        assert all(len(camera.encoded) > 50_000 for camera in after.cameras)


def full_frame(seed: int):
    """Every optional field is there, with what JSON finds hard."""
    rng = np.random.default_rng(seed)
    frame = street(seed)
    count = seed % 3
    boxes = Boxes(
        center=rng.normal(size=(count, 3)),
        size=rng.random((count, 3)),
        yaw=rng.normal(size=count),
        names=tuple("Fußgänger\u2028" for _ in range(count)),
        velocity=np.full((count, 2), np.nan),
        attributes=tuple("" for _ in range(count)),
        num_points=rng.integers(0, 9, count),
        difficulty=None,
        image_box=rng.normal(size=(count, 4)),
    )
    camera = replace(frame.cameras[0], name="Rück.Kamera/1", distortion=rng.normal(size=5) * 1e-3)
    return replace(
        frame,
        cameras=(camera, replace(camera, name="points", distortion=None)),
        boxes=boxes,
        world_from_lidar=rng.normal(size=(4, 4)) * 1e6,
        native_from_lidar=rng.normal(size=(4, 4)),
        timestamp=1533151603.5479123 + seed,
        intensity_scale=255.0,
        sequence_id="a/b.c",
        point_class=rng.integers(0, 9, len(frame.points)).astype(np.uint8),
    )


@pytest.mark.parametrize("seed", range(6))
def test_every_field_survives(seed):
    frame = full_frame(seed)
    members = encode_frame(frame, PrepareConfig())
    assert len({suffix for suffix, _ in members}) == len(members)
    assert all(suffix == suffix.lower() and "/" not in suffix for suffix, _ in members)
    assert difference(frame, decode_frame(dict(members), "here", None, True)) == []


@pytest.mark.parametrize("seed", range(4))
def test_millimetres_are_right_to_half_a_millimetre(seed):
    frame = street(seed)
    frame.points[:, :3] *= 3
    members = dict(encode_frame(frame, PrepareConfig(points="int32_mm")))
    back = decode_frame(members, "here", None, True).points
    assert back.dtype == np.float32
    assert np.abs(back[:, :3].astype(np.float64) - frame.points[:, :3]).max() <= 0.0005 + 1e-5
    assert np.array_equal(back[:, 3:], frame.points[:, 3:])
    assert not np.array_equal(back, frame.points), "something must be rounded, or nothing was tested"


def test_jpeg_has_the_stated_quality(world):
    frame = build_reader(world)[0]
    sizes, tables = [], []
    for quality in (50, 92):
        members = dict(encode_frame(frame, PrepareConfig(images="jpeg", jpeg_quality=quality)))
        back = decode_frame(members, "here", None, True)
        sizes.append(len(members["front.jpg"]))
        with Image.open(io.BytesIO(members["front.jpg"])) as image, io.BytesIO() as again:
            Image.fromarray(frame.cameras[0].image).save(again, "JPEG", quality=quality)
            tables.append((image.quantization, Image.open(again).quantization))
    assert sizes[0] < sizes[1]
    assert all(found == expected for found, expected in tables)
    error = back.cameras[0].image.astype(float) - frame.cameras[0].image
    assert 0 < np.abs(error).mean() < 8


def test_a_frame_that_cannot_be_written_is_bad():
    frame = street(0)
    camera = frame.cameras[0]
    with pytest.raises(BadFrameError, match="two cameras are called alike"):
        encode_frame(replace(frame, cameras=(camera, replace(camera, name="FRONT"))), PrepareConfig())
    with pytest.raises(BadFrameError, match="infinite"):
        encode_frame(replace(frame, world_from_lidar=np.full((4, 4), np.inf)), PrepareConfig())
    frame.points[3, 0] = 3e6
    with pytest.raises(BadFrameError, match="2,147 km"):
        encode_frame(frame, PrepareConfig(points="int32_mm"))


# Other readers of the same files


def test_any_tar_reader_finds_the_frames(whole, world):
    source = build_reader(world)
    with tarfile.open(whole / "shard-000001.tar") as tar:
        members = tar.getmembers()
        keys = [member.name.partition(".")[0] for member in members]
        assert list(dict.fromkeys(keys)) == ["00000003", "00000004", "00000005"]
        assert sorted(keys) == keys, "the members of a frame are neighbours"
        assert {member.mtime for member in members} == {0}
        index = [json.loads(line) for line in (whole / "shard-000001.jsonl").read_text().splitlines()[1:]]
        places = [(f"{key}.{suffix}", offset, size) for key, *_, own in index for suffix, offset, size, _ in own]
        assert places == [(member.name, member.offset_data, member.size) for member in members]
        points = np.load(io.BytesIO(tar.extractfile("00000004.points.npy").read()))
    assert np.array_equal(points, source[4].points)


def test_the_webdataset_package_reads_them(whole, world):
    webdataset = pytest.importorskip("webdataset")
    source = build_reader(world)
    url = str(whole / "shard-{000000..000003}.tar")
    found = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in found] == [f"{index:08d}" for index in range(11)]
    for index, sample in enumerate(found):
        frame = source[index]
        assert sample["json"]["frame_id"] == frame.frame_id
        assert np.array_equal(sample["points.npy"], frame.points)
        assert np.array_equal(sample["front_left.png"], frame.cameras[1].image)
        assert np.array_equal(sample["front_left.depth.npy"], frame.cameras[1].depth)


# The bytes depend on the configuration alone


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(workers, world, whole, tmp_path):
    prepare_shards(world, SMALL, str(tmp_path / "out"), workers)
    assert contents(tmp_path / "out") == contents(whole)


def test_shards_are_as_large_as_asked_for(world, tmp_path):
    manifest = prepare_shards(world, PrepareConfig(shard_megabytes=1), str(tmp_path / "out"))
    assert len(manifest.shards) == 1, "11 frames of 40 kB fill no megabyte"
    tall = parse(**{**WORLD, "image_size": [256, 512], "num_frames": 6}, root=str(tmp_path))
    manifest = prepare_shards(tall, PrepareConfig(shard_megabytes=3), str(tmp_path / "tall"))
    assert len(manifest.shards) > 2
    assert all(1e6 < shard.bytes < 4.5e6 for shard in manifest.shards[:-1])


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "simipu3d.tools.prepare_data", *map(str, arguments)]


def write_config(path: Path, world, **blocks) -> Path:
    data = {**WORLD, "root": str(world.root)}
    path.write_text(yaml.safe_dump({"data": data, "prepare": {"shard_frames": 3}, **blocks}))
    return path


SLOW_MAIN = """
import sys, time
from simipu3d.data.drive_world.dataset import DriveWorld
from simipu3d.tools.prepare_data import main
read = DriveWorld.__getitem__
def slowly(self, index):
    time.sleep(0.15)
    return read(self, index)
DriveWorld.__getitem__ = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", [2])
def test_a_killed_call_goes_on_to_the_same_bytes(workers, world, whole, tmp_path):
    config, out = write_config(tmp_path / "w.yaml", world), tmp_path / "out"
    arguments = ["--cfg", str(config), "--out", str(out), "--workers", str(workers)]
    process = subprocess.Popen([sys.executable, "-c", SLOW_MAIN, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("shard-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # in the middle of the next shard
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # workers notice
    left = contents(out)
    finished = [name for name in left if name.endswith(".jsonl")]
    assert 0 < len(finished) < 4
    assert "manifest.json" not in left
    assert any(name.endswith(".part") for name in left), "it was killed while it wrote"
    with pytest.raises(
        UserError, match=r"manifest\.json: no such file; run prepare_data again, its writing was cut short"
    ):
        open_shards(out)
    before = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert main(arguments) == 0
    assert contents(out) == contents(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before, "finished shards are kept"


def test_a_lost_or_cut_shard_is_written_again(copy, whole, world):
    (copy / "shard-000001.tar").unlink()
    (copy / "shard-000002.tar").write_bytes((copy / "shard-000002.tar").read_bytes()[:-512])
    (copy / "shard-000003.jsonl").write_bytes(b"{")
    prepare_shards(world, SMALL, str(copy))
    assert contents(copy) == contents(whole)


def test_shards_of_a_forgotten_configuration_do_not_count(copy, world, tmp_path):
    """Without the three files that tell, the other shards are recognised by what they were written from."""
    for name in ("prepare.json", "manifest.json", "shard-000000.tar"):
        (copy / name).unlink()
    prepare = PrepareConfig(shard_frames=3, points="int32_mm")
    prepare_shards(world, prepare, str(copy))
    prepare_shards(world, prepare, str(tmp_path / "fresh"))
    assert contents(copy) == contents(tmp_path / "fresh")


def test_another_configuration_is_refused(copy, world, tmp_path):
    with pytest.raises(UserError, match=r"another configuration \(prepare.points: 'float32' there, 'int32_mm' now"):
        prepare_shards(world, PrepareConfig(shard_frames=3, points="int32_mm"), str(copy))
    other = world.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=r"data.seed: 0 there, 1 now\); choose another --out"):
        prepare_shards(other, SMALL, str(copy))
    more = world.model_copy(update={"batch_size": 9, "on_bad_frame": "skip"})
    prepare_shards(more, SMALL, str(copy))
    (copy / "prepare.json").unlink()
    with pytest.raises(UserError, match="unknown origin"):
        prepare_shards(world, SMALL, str(copy))
    (copy / "prepare.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        prepare_shards(world, SMALL, str(copy))


def test_a_place_that_cannot_be_written_is_told_in_one_line(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path / "w.yaml", world)
    assert main(["--cfg", str(config), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [2])
def test_a_full_disk_leaves_nothing_half_written(workers, world, tmp_path):
    """A limit on the size of files stands for a full disk."""
    config, out = write_config(tmp_path / "w.yaml", world), tmp_path / "out"
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from simipu3d.tools.prepare_data import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--cfg", config, "--out", out, "--workers", workers]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "make room and run again" in lines[0]
    assert "Traceback" not in done.stderr
    assert set(contents(out)) == {"prepare.json"}


# Bad frames of the source


def broken_kitti(samples: Path, tmp_path: Path, **keys):
    import shutil

    root = tmp_path / "kitti"
    shutil.copytree(samples / "kitti", root)
    image = root / "training" / "image_2" / "000001.png"
    image.chmod(0o644)
    image.write_bytes(image.read_bytes()[:50_000])
    return parse(name="kitti", root=str(root), split="train", **keys)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_frames_of_the_source_follow_the_policy(workers, samples, tmp_path):
    prepare = PrepareConfig(shard_frames=1)
    config = broken_kitti(samples, tmp_path)
    with pytest.raises(BadFrameError, match=r"000001\.png"):
        prepare_shards(config, prepare, str(tmp_path / "out"), workers)
    skip = config.model_copy(update={"on_bad_frame": "skip"})
    manifest = prepare_shards(skip, prepare, str(tmp_path / "out"), workers)
    assert [shard.frames for shard in manifest.shards] == [1, 0, 1]
    assert len(manifest.skipped) == 1
    assert "000001.png" in manifest.skipped[0]
    reader = open_shards(tmp_path / "out")
    assert [reader[index].frame_id for index in range(2)] == ["training/000000", "training/000002"]
    assert sorted(reader.epoch_order(0, 0)) == [0, 1]
    assert verify_shards(str(tmp_path / "out"))[1] == []
    with pytest.raises(BadFrameError, match=r"000001\.png"):
        prepare_shards(config, prepare, str(tmp_path / "out"), workers)


# Damage


def member_place(folder: Path, shard: int, position: int, suffix: str) -> tuple[str, int, int]:
    """Frame id, offset and size of a member."""
    line = json.loads((folder / f"shard-{shard:06d}.jsonl").read_text().splitlines()[1 + position])
    return line[1], *next(member[1:3] for member in line[5] if member[0] == suffix)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["json", "points.npy", "front.png", "front_left.png", "front.depth.npy"])
def test_one_flipped_bit_is_found_by_verification_and_by_reading(suffix, copy, capsys):
    frame_id, offset, size = member_place(copy, 2, 1, suffix)
    flip(copy / "shard-000002.tar", offset + size // 2)
    assert main(["--out", str(copy), "--verify", "--workers", "1"]) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 2
    assert "shard-000002.tar: differs from its SHA-256" in lines[0]
    assert f"shard-000002.tar: frame {frame_id}: {suffix} differs from its check sum" in lines[1]
    assert "error: " in said.err
    assert "2 problems" in said.err
    reader = open_shards(copy)
    for index in range(11):
        if index == 7:
            with pytest.raises(BadFrameError, match=f"frame {frame_id}: {suffix} differs"):
                reader[index]
        else:
            reader[index]


def test_verification_passes_a_whole_set_and_names_every_damaged_shard(copy, capsys):
    assert main(["--out", str(copy), "--verify", "--workers", "2"]) == 0
    assert "whole: 11 frames in 4 shards" in capsys.readouterr().out
    (copy / "shard-000000.tar").unlink()
    (copy / "shard-000001.tar").write_bytes((copy / "shard-000001.tar").read_bytes()[:60_000])
    flip(copy / "shard-000002.jsonl", 700)
    before = contents(copy)
    assert main(["--out", str(copy), "--verify", "--workers", "2"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "shard-000000.tar: no such file; all of its 3 frames" in lines[0]
    assert "shard-000001.tar: has 60000 bytes" in lines[1]
    assert any("the shard is cut short" in line for line in lines[2:-2])
    assert "shard-000002.jsonl: differs from its SHA-256" in lines[-2]
    assert "shard-000002.jsonl: differs from its check sum" in lines[-1]
    assert not any("shard-000003" in line for line in lines)
    assert contents(copy) == before, "verification writes nothing"


def loader_config(url, **keys):
    augment = {"num_points": 60, "images": {"resize": None}}
    return parse(name="shards", root=str(url), **{"batch_size": 2, "num_workers": 0, "augment": augment, **keys})


@pytest.mark.parametrize("workers", [0, 2])
def test_training_meets_a_flipped_bit_as_a_bad_frame(workers, copy):
    frame_id, offset, _ = member_place(copy, 1, 0, "points.npy")
    flip(copy / "shard-000001.tar", offset + 300)
    config = loader_config(copy, num_workers=workers)
    limit = BadFrameLimit(config, 11)
    messages = [line for seed in range(3) for batch in make_loader(config, seed) for line in batch.bad_frames]
    with pytest.raises(BadFrameError, match=rf"shard-000001\.tar: frame {frame_id}: points\.npy differs"):
        limit.add(messages)
    config = loader_config(copy, num_workers=workers, on_bad_frame="skip")
    limit, names = BadFrameLimit(config, 11), []
    for seed in range(3):
        for batch in make_loader(config, seed):
            limit.add(batch.bad_frames)
            names += batch.frame_ids
    assert frame_id not in names
    assert len(limit.messages) == 1


@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_lost_shards_are_told_before_training_starts(damage, copy):
    path = copy / "shard-000002.tar"
    content = path.read_bytes()
    path.unlink() if damage == "absent" else path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"1 of 4 shards are absent or .* \(shard-000002\.tar\)"):
        open_shards(copy)
    reader = open_shards(copy, max_bad_fraction=0.5)
    with pytest.raises(BadFrameError, match="no such file" if damage == "absent" else "cut short"):
        reader[8]


def test_an_absent_set_and_a_newer_format_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file; is it a shard set\?"):
        open_shards(tmp_path / "nowhere")
    text = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**text, "format": FORMAT + 1}))
    with pytest.raises(UserError, match="is of format 2, this simipu3d reads format 1"):
        open_shards(copy)
    evil = {**text["shards"][0], "name": "../../secret.tar"}
    (copy / "manifest.json").write_text(json.dumps({**text, "shards": [evil, *text["shards"][1:]]}))
    with pytest.raises(UserError, match=r"damaged: shards\.0\.name"):
        open_shards(copy)
    for broken in ("{", "[]", "", json.dumps({"format": 1}), json.dumps({**text, "frames": 12})):
        (copy / "manifest.json").write_text(broken)
        with pytest.raises(UserError, match="damaged"):
            open_shards(copy)


def test_a_wrong_key_of_the_block_is_refused(tmp_path, world):
    path = write_config(tmp_path / "w.yaml", world, prepare={"points": "float16"})
    with pytest.raises(UserError, match=r"prepare\.points"):
        load_prepare_config(path)
    with pytest.raises(UserError, match=r"prepare\.jpg_quality: no such key; did you mean jpeg_quality"):
        load_pretrain_config("configs/simipu/kitti.yaml", ["prepare.jpg_quality=3"])
    plain = load_pretrain_config("configs/simipu/kitti.yaml", ["prepare.points=int32_mm"]).to_plain()
    assert "prepare" not in plain, "a run does not depend on it, so it may change on --resume"


# Cameras, ground truth, handles


def test_chosen_cameras_and_no_ground_truth_read_less(whole, world, monkeypatch):
    read = []
    real = LocalStore.read_range
    monkeypatch.setattr(
        LocalStore, "read_range", lambda self, *place: read.append(place) or real(self, *place), raising=True
    )
    everything = open_shards(whole)[4]
    assert len(read) == 1, "one range a frame"
    total, read[:] = read[0][2], []
    source = build_reader(world)[4]
    frame = open_shards(whole, cameras=["front_left"])[4]
    assert difference(replace(source, cameras=source.cameras[1:]), frame) == []
    turned = open_shards(whole, cameras=["front_left", "front"])[4]
    assert [camera.name for camera in turned.cameras] == ["front_left", "front"]
    read.clear()
    bare = open_shards(whole, load_ground_truth=False)[4]
    assert (bare.boxes, bare.point_class, bare.point_instance) == (None, None, None)
    assert all(camera.depth is None and camera.pixel_class is None for camera in bare.cameras)
    assert np.array_equal(bare.points, everything.points)
    assert sum(size for _, _, size in read) < 0.6 * total
    with pytest.raises(UserError, match="has no camera 'rear', it has front, front_left"):
        open_shards(whole, cameras=["rear"])


def test_handles_and_indexes_stay_few(whole, monkeypatch):
    monkeypatch.setattr(shard_store, "MAX_OPEN_FILES", 2)
    monkeypatch.setattr("simipu3d.data.readers.shards.MAX_INDEXES", 2)
    reader = open_shards(whole)
    before = len(os.listdir("/proc/self/fd"))
    for index in [0, 10, 4, 7, 1, 9, 3, 6]:
        reader[index]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(reader._indexes) == 2


# Order


def test_an_epoch_goes_through_few_shards_at_a_time(whole):
    reader = open_shards(whole, shuffle_shards=2)
    shard_of = np.searchsorted([3, 6, 9], np.arange(11), side="right")
    orders = {}
    for seed in range(3):
        for epoch in range(4):
            order = reader.epoch_order(seed, epoch)
            assert sorted(order) == list(range(11))
            assert np.array_equal(order, reader.epoch_order(seed, epoch))
            shards = shard_of[order]
            halves = next(
                n for n in range(1, 11) if len(set(shards[:n])) == 2 and not set(shards[:n]) & set(shards[n:])
            )
            assert halves in (5, 6)
            orders[seed, epoch] = tuple(order)
    assert len(set(orders.values())) == 12
    everywhere = open_shards(whole, shuffle_shards=None)
    assert sorted(everywhere.epoch_order(0, 0)) == list(range(11))


def frames_seen(config, *, rank=0, world_size=1, seed=3, start=(0, 0), epochs=2):
    loader = make_loader(config, seed, rank, world_size)
    loader.batch_sampler.start(*start)
    return [[batch.frame_ids for batch in loader] for _ in range(epochs)]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_see_every_frame_once_an_epoch(workers, whole):
    config = loader_config(whole, batch_size=1, num_workers=workers, shuffle_shards=2)
    ranks = [frames_seen(config, rank=rank, world_size=2) for rank in range(2)]
    epochs = []
    for epoch in range(2):
        names = [name for rank in ranks for batch in rank[epoch] for name in batch]
        assert len(names) == len(set(names)) == 10, "the eleventh frame makes no step of two processes"
        epochs.append(names)
    assert epochs[0] != epochs[1]
    alone = frames_seen(loader_config(whole, batch_size=1, shuffle_shards=2))
    assert [a + b for a, b in zip(*[rank[0] for rank in ranks], strict=True)] == [
        a + b for a, b in zip(alone[0][:10:2], alone[0][1:10:2], strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_goes_on_in_the_middle_of_an_epoch(workers, whole):
    config = loader_config(whole, num_workers=workers)
    first, second = frames_seen(config)
    rest = frames_seen(config, start=(0, 2))
    assert rest == [first[2:], second]


# Far away


def upload(folder: Path, url: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    for name, content in contents(folder).items():
        filesystem.pipe_file(f"{root}/{name}", content)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_remote_set_is_written_and_read_like_a_local_one(workers, world, whole, tmp_path, monkeypatch):
    """A `file` filesystem behind fsspec: what is uploaded from worker processes is seen by all."""
    monkeypatch.setattr(shard_store, "LocalStore", lambda folder: RemoteStore(f"file://{folder}"))
    out = tmp_path / "far"
    store = open_store(str(out))
    assert isinstance(store, RemoteStore)
    prepare_shards(world, SMALL, str(out), workers)
    assert contents(out) == contents(whole)
    assert verify_shards(str(out), workers)[1] == []


def test_memory_urls_work(world, whole):
    prepare_shards(world, SMALL, "memory://shards/set")
    reader = open_shards("memory://shards/set")
    assert difference(open_shards(whole)[5], reader[5]) == []
    assert verify_shards("memory://shards/set")[1] == []
    assert frames_seen(loader_config("memory://shards/set", num_workers=2)) == frames_seen(loader_config(whole))


class RangeHandler(BaseHTTPRequestHandler):
    """Serves a folder, ranges included; `failures` requests are answered with 500 first."""

    def __init__(self, *args, folder: Path, state: dict):
        self.folder, self.state = folder, state
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.folder / self.path.strip("/")
        if self.state["failures"] > 0:
            self.state["failures"] -= 1
            self.send_error(500)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        wanted = self.headers.get("Range")
        if wanted and self.state["ranges"]:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            content, status = content[int(start) : int(end) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def server(whole):
    pytest.importorskip("aiohttp")
    state = {"failures": 0, "ranges": True}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, folder=whole, state=state))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", state
    httpd.shutdown()
    httpd.server_close()


def test_shards_are_read_over_http_by_workers_too(server, whole, monkeypatch):
    url, state = server
    monkeypatch.setattr(shard_store, "RETRY_AFTER", (0.01, 0.01))
    local = open_shards(whole)
    reader = open_shards(url)
    assert all(difference(local[index], reader[index]) == [] for index in (0, 5, 10))
    assert frames_seen(loader_config(url, num_workers=2)) == frames_seen(loader_config(whole))
    state["failures"] = 2
    assert difference(local[3], reader[3]) == [], "two failures of the network pass"
    state["failures"] = 10
    with pytest.raises(BadFrameError, match=r"shard-000001\.tar: frame"):
        reader[4]
    state.update(failures=0, ranges=False)
    with pytest.raises(BadFrameError, match="not ranges of bytes"):
        reader[4]
    with pytest.raises(UserError, match=r"nowhere/manifest\.json: no such file"):
        open_shards(f"{url}/nowhere")


def test_urls_keep_their_slashes_and_unknown_ones_are_told(whole):
    assert parse(name="shards", root="s3://bucket/folder").root == "s3://bucket/folder"
    assert isinstance(open_store(f"file://{whole}"), LocalStore)
    with pytest.raises(StoreError, match="nonsense://a: cannot be opened"):
        open_shards("nonsense://a")


# Training


def test_pretraining_runs_on_shards_and_goes_on(whole, tmp_path):
    raw = {
        "method": "simipu",
        "data": {
            "name": "shards",
            "root": str(whole),
            "cameras": ["front"],
            "batch_size": 2,
            "num_workers": 2,
            "augment": {"num_points": 200, "images": {"resize": None}},
        },
        "prepare": {"points": "int32_mm"},
        **BLOCKS,
        "trainer": {"max_steps": 3, "accelerator": "cpu", "log_every_n_steps": 1},
        "run": {"pictures_every_steps": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    tables = []
    for out, stops in (("once", (5,)), ("twice", (2, 5))):
        for steps in stops:
            pretrain(tmp_path / "run.yaml", [f"trainer.max_steps={steps}"], out=tmp_path / out, resume="")
        tables.append(read_checkpoint(tmp_path / out / "checkpoints" / "last.ckpt")["state_dict"])
    assert all(bool((tables[0][name] == tables[1][name]).all()) for name in tables[0]), "the same weights, bit for bit"
