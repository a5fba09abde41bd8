"""Laws of writing shards: what goes in comes out, and the bytes depend on nothing else."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from custom_rig import write_sequence
from helpers import street
from PIL import Image
from shard_sets import SMALL, WORLD, contents, difference, open_shards, parse

from simipu3d.benchmark.synthetic_waymo.drive import WaymoDrive
from simipu3d.benchmark.synthetic_waymo.files import write_waymo_v1, write_waymo_v2
from simipu3d.benchmark.synthetic_waymo.rig import WaymoRigSettings
from simipu3d.contracts.frame import EVERYTHING, Boxes
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.shards import store as shard_store
from simipu3d.data.shards.frames import PrepareConfig, decode_frame, encode_frame
from simipu3d.data.shards.store import open_store
from simipu3d.data.shards.verify import verify_shards
from simipu3d.data.shards.writer import prepare_shards
from simipu3d.engine.settings import load_data_settings, load_settings
from simipu3d.errors import BadFrameError, UserError
from simipu3d.tools.prepare_data import main

pytest_plugins = ["shard_fixtures"]


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


def assert_all_comes_back(config, out: Path):
    """Every field of every frame, the images' own bytes where there were some; returns the frames of the shards."""
    source = build_reader(config)
    prepare_shards(config, PrepareConfig(shard_frames=2), str(out))
    reader = open_shards(out)
    assert len(reader) == len(source) > 0
    for index in range(len(source)):
        before, after = source[index], reader[index]
        assert difference(before, after) == []
        for own, stored in zip(before.cameras, after.cameras, strict=True):
            assert own.encoded in (None, stored.encoded)
    return [reader[index] for index in range(len(reader))]


@pytest.mark.parametrize(("version", "write"), [("v1", write_waymo_v1), ("v2", write_waymo_v2)])
def test_a_waymo_drive_comes_back_as_it_was(version, write, tmp_path):
    """Five cameras that have times and distorted lenses, boxes that have velocities."""
    drive = WaymoDrive(WaymoRigSettings(num_moments=3), 0)
    moments = [drive.moment(index) for index in range(3)]
    write(tmp_path / "waymo", {moments[0][0].segment: moments})
    config = parse(name="waymo", version=version, root=str(tmp_path / "waymo"), split="all")
    frame = assert_all_comes_back(config, tmp_path / "out")[0]
    assert len({camera.timestamp for camera in frame.cameras}) == len(frame.cameras) == 5
    assert all(camera.distortion.any() and camera.encoded for camera in frame.cameras)
    assert np.isfinite(frame.boxes.velocity).any()


def test_a_custom_rig_comes_back_as_it_was(tmp_path):
    keys = {**WORLD, "num_frames": 3, "frames_per_sequence": 3}
    drive = build_reader(parse(**keys, root=str(tmp_path / "world")))
    drive.prepare(progress=False)
    write_sequence(tmp_path / "rig" / "drive", [drive[index] for index in range(3)])
    frames = assert_all_comes_back(parse(name="custom", root=str(tmp_path / "rig"), split="all"), tmp_path / "out")
    assert all(camera.encoded and camera.timestamp is not None for frame in frames for camera in frame.cameras)


def motion(rng: np.random.Generator, metres: float) -> np.ndarray:
    """A random rigid transform, about `metres` far."""
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix = np.eye(4)
    matrix[:3, :3] = turn * np.sign(np.linalg.det(turn))
    matrix[:3, 3] = rng.normal(size=3) * metres
    return matrix


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
        visibility=rng.integers(0, 5, count),
        ids=tuple(f"object {number}" for number in range(count)),
        truncation=rng.random(count),
        occlusion=rng.integers(0, 4, count),
        alpha=rng.normal(size=count),
        image_boxes={"Rück.Kamera/1": rng.normal(size=(count, 4)), "points": np.full((count, 4), np.nan)},
        ignored={"points": rng.normal(size=(3 - count, 4))},
    )
    camera = replace(frame.cameras[0], name="Rück.Kamera/1", distortion=rng.normal(size=5) * 1e-3)
    return replace(
        frame,
        cameras=(camera, replace(camera, name="points", distortion=None)),
        boxes=boxes,
        world_from_lidar=motion(rng, 1e6),
        native_from_lidar=motion(rng, 1.0),
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
    assert difference(frame, decode_frame(dict(members), "here", None, EVERYTHING)) == []


@pytest.mark.parametrize("seed", range(4))
def test_millimetres_are_right_to_half_a_millimetre(seed):
    frame = street(seed)
    frame.points[:, :3] *= 3
    members = dict(encode_frame(frame, PrepareConfig(points="int32_mm")))
    back = decode_frame(members, "here", None, EVERYTHING).points
    assert back.dtype == np.float32
    assert np.abs(back[:, :3].astype(np.float64) - frame.points[:, :3]).max() <= 0.0005 + 1e-5
    assert np.array_equal(back[:, 3:], frame.points[:, 3:])
    assert not np.array_equal(back, frame.points), "something must be rounded, or nothing was tested"


def test_jpeg_has_the_stated_quality(world):
    frame = build_reader(world)[0]
    sizes, tables = [], []
    for quality in (50, 92):
        members = dict(encode_frame(frame, PrepareConfig(images="jpeg", jpeg_quality=quality)))
        back = decode_frame(members, "here", None, EVERYTHING)
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


@pytest.mark.parametrize("line", [0, 2])
def test_a_damaged_index_is_not_gone_on_from(line, copy, whole, world):
    """A word in it changed, so that it could still be read; there is no manifest yet that tells."""
    (copy / "manifest.json").unlink()
    path = copy / "shard-000002.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b"front", b"frond", 1)
    path.write_bytes(b"".join(lines))
    assert path.read_bytes() != (whole / path.name).read_bytes()
    prepare_shards(world, SMALL, str(copy))
    assert contents(copy) == contents(whole)


def test_one_call_at_a_time_writes_into_a_folder(world, whole, tmp_path, monkeypatch, capsys):
    config, out = write_config(tmp_path / "w.yaml", world), tmp_path / "out"
    arguments = ["--cfg", str(config), "--out", str(out), "--workers", "1"]
    monkeypatch.setattr(shard_store, "LOCK_SECONDS", 0.2)
    with open_store(str(out)).lock():
        assert main(arguments) == 2
        assert f"error: {out}: another prepare_data writes there" in capsys.readouterr().err
        assert contents(out) == {}
    assert main(arguments) == 0
    assert contents(out) == contents(whole)


def test_shards_of_a_forgotten_configuration_do_not_count(copy, world, tmp_path):
    """Without the three files that tell, the other shards are recognised by what they were written from."""
    for name in ("prepare.json", "manifest.json", "shard-000000.tar"):
        (copy / name).unlink()
    prepare = PrepareConfig(shard_frames=3, points="int32_mm")
    prepare_shards(world, prepare, str(copy))
    prepare_shards(world, prepare, str(tmp_path / "fresh"))
    assert contents(copy) == contents(tmp_path / "fresh")


def test_another_configuration_is_refused(copy, whole, world):
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
    for damaged in (b"{", (whole / "prepare.json").read_bytes().replace(b'"frames"', b'"framez"')):
        (copy / "prepare.json").write_bytes(damaged)
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


def test_a_wrong_key_of_the_block_is_refused(tmp_path, world):
    path = write_config(tmp_path / "w.yaml", world, prepare={"points": "float16"})
    with pytest.raises(UserError, match=r"prepare\.points"):
        load_data_settings(path)
    with pytest.raises(UserError, match=r"prepare\.jpg_quality: no such key; did you mean jpeg_quality"):
        load_settings("configs/simipu/kitti.yaml", ["prepare.jpg_quality=3"])
    plain = load_settings("configs/simipu/kitti.yaml", ["prepare.points=int32_mm"]).to_plain()
    assert "prepare" not in plain, "a run does not depend on it, so it may change on --resume"
