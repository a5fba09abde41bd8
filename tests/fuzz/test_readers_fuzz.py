"""Whatever stands in the files of a data set, reading them raises nothing but the project's own error, in one line.

The inputs are a function of their number: a few files are damaged, the data set is opened, and a frame is read and projected.
`FUZZ=100000` tries so many inputs a reader. By default it is fewer than that by far, for `make test` has little time; the
readers that open many files get fewer still.
"""

import io
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from custom_rig import write_sequence
from damage import ODD, change_bytes, change_json, change_npy, change_value, change_words, dump
from helpers import street
from nuscenes_drive import write_release
from PIL import Image
from shard_sets import SMALL
from test_kitti import CALIB, LABELS
from test_waymo_v1 import full_moment, message_of, official
from waymo_drive import SEGMENTS, write_download

from simipu3d.config import apply_sets, load_yaml, parse_block, parse_part
from simipu3d.contracts.frame import EVERYTHING, Wants
from simipu3d.data.loading.loader import build_reader, check_seen
from simipu3d.data.readers.kitti import KittiConfig
from simipu3d.data.readers.tfrecord import write_records
from simipu3d.data.shards.format import digest, sealed
from simipu3d.data.shards.writer import prepare_shards
from simipu3d.errors import UserError
from simipu3d.registry import READERS

COUNT = int(os.environ.get("FUZZ", "200"))
SLOW = 4
"""By how much fewer inputs the readers get that open many or large files."""
COLUMNS = ("x", "y", "z", "intensity")
ONE_CAMERA = {"name": "nuscenes", "version": "v1.0-mini", "split": "all", "num_sweeps": 2, "cameras": ["CAM_FRONT"]}


def small_image(size=(16, 24), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def write_kitti(root: Path) -> dict:
    points = np.random.default_rng(0).uniform([5, -3, -1, 0], [30, 3, 1, 1], (60, 4)).astype("<f4")
    contents = {"velodyne/000000.bin": points.tobytes(), "image_2/000000.png": small_image((200, 600))}
    contents |= {"calib/000000.txt": CALIB.encode(), "label_2/000000.txt": LABELS.encode()}
    for name, content in contents.items():
        (root / "training" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "training" / name).write_bytes(content)
    (root / "ImageSets").mkdir()
    (root / "ImageSets/train.txt").write_text("000000\n")
    return {"name": "kitti", "split": "train"}


def write_custom(root: Path) -> dict:
    frames = [street(seed, 40, (16, 24)) for seed in range(2)]
    write_sequence(root / "one", frames[:1], "npy", posed=False)
    path = write_sequence(root / "two", frames[1:], "bin", posed=False)
    raw = json.loads(path.read_text())
    np.save(root / "two/depth.npy", frames[1].cameras[0].depth)
    np.save(root / "two/classes.npy", frames[1].point_class)
    raw["class_names"], raw["frames"][0]["point_class"] = ["road", "car", "tree"], "classes.npy"
    raw["frames"][0]["images"][0]["depth"] = "depth.npy"
    raw["cameras"][0]["distortion"] = [-0.3, 0.1, 0.001, 0, 0.01]
    path.write_text(json.dumps(raw))
    (root / "train.txt").write_text("one\ntwo\n")
    return {"name": "custom", "split": "train"}


def write_nuscenes(root: Path) -> dict:
    write_release(root)
    for folder in (root / "samples").iterdir():
        if folder.name not in ("LIDAR_TOP", "CAM_FRONT"):
            shutil.rmtree(folder)
    return ONE_CAMERA


def write_waymo_v2(root: Path) -> dict:
    write_download(root, SEGMENTS[:1], row_group_size=100)
    return {"name": "waymo", "split": "all"}


def write_waymo_v1(root: Path) -> dict:
    message = message_of(full_moment())
    for image in message.images:
        image.image = small_image((16, 24), "JPEG")
    for calibration in message.context.camera_calibrations:
        calibration.height, calibration.width = 16, 24
    write_records(official(root), [message.SerializeToString()])
    return {"name": "waymo", "split": "all", "version": "v1"}


def write_shards(root: Path) -> dict:
    write_custom(root / "source")
    config = parse_part("data", READERS, {"name": "custom", "root": str(root / "source")})
    prepare_shards(config, SMALL, str(root / "set"))
    shutil.rmtree(root / "source")
    for path in (root / "set").iterdir():
        path.rename(root / path.name)
    return {"name": "shards"}


def change_types(content: bytes, draw: random.Random) -> bytes:
    """A column of a parquet file with other values or of another type."""
    table = pq.read_table(io.BytesIO(content))
    place = draw.randrange(len(table.column_names))
    odd = [value for value in ODD if not isinstance(value, str) or value.isascii()]
    values = draw.choice(
        (
            lambda: [*table.column(place).to_pylist()[:-1], draw.choice(odd)],
            lambda: [draw.choice(odd)] * len(table),
            lambda: [change_value(value, draw) for value in table.column(place).to_pylist()],
            lambda: [b"\xff\xfe"] * len(table),
        )
    )()
    columns = []
    for chosen in (values, [draw.choice((1.5, 3, True, "word"))] * len(table)):
        with suppress(
            pa.ArrowException, OverflowError, UnicodeEncodeError
        ):  # not every value has a type, or can be written
            columns.append(pa.array(chosen))
    for column in columns:
        buffer = io.BytesIO()
        with suppress(pa.ArrowException):
            pq.write_table(table.set_column(place, table.column_names[place], column), buffer)
            break
    return buffer.getvalue()


def change_record(content: bytes, draw: random.Random, path: Path) -> None:
    """A field of the message of a Waymo record, or bytes of it, changed; check sums fit."""
    record = content[12:-4]
    if draw.random() < 0.4:
        write_records(path, [change_bytes(record, draw)])
        return
    message = node = message_of(full_moment())
    message.ParseFromString(record)
    while True:
        field, value = draw.choice(node.ListFields() or [(None, None)])
        if field is None:
            break
        many = not hasattr(value, "ListFields") and hasattr(value, "append")
        if field.message_type is not None:
            node = draw.choice(list(value)) if many or hasattr(value, "add") else value
            if draw.random() < 0.1:
                node.Clear()
                break
            continue
        numbers = (0, -1, 1e-320, 1e300, -1e300, float("nan"), float("inf"), 1 << 30, 1 << 62)
        odd = (b"", b"x", b"\xff\xfe", b"x" * 3000) if field.cpp_type == field.CPPTYPE_STRING else numbers
        chosen = draw.choice(odd)
        try:
            if many:
                value[draw.randrange(len(value))] = chosen
            else:
                setattr(node, field.name, chosen)
        except (TypeError, ValueError):
            node.ClearField(field.name)
        break
    write_records(path, [message.SerializeToString()])


def change_shards(root: Path, contents: dict[str, bytes], draw: random.Random) -> None:
    """The manifest, an index line or a member changed, with all check sums made to fit again."""
    manifest = json.loads(contents["manifest.json"])
    lines = contents["shard-000000.jsonl"].splitlines()
    kind = draw.randrange(3)
    if kind == 0:
        lines[1] = dump(change_value(json.loads(lines[1]), draw))
    elif kind == 1:
        tar = contents["shard-000000.tar"]
        entry, place = json.loads(lines[1]), draw.randrange(len(json.loads(lines[1])[5]))
        suffix, offset, size, _ = entry[5][place]
        change = change_json if suffix.endswith("json") else change_npy if suffix.endswith("npy") else change_bytes
        part = change(tar[offset : offset + size], draw)
        entry[5][place] = [suffix, len(tar), len(part), crc32(part)]
        tar += part
        (root / "shard-000000.tar").write_bytes(tar)
        lines[1] = json.dumps(entry).encode()
        manifest["shards"][0] |= {"bytes": len(tar), "sha256": digest(tar)}
    else:
        manifest = change_value(manifest, draw)
    index = b"\n".join(lines) + b"\n"
    (root / "shard-000000.jsonl").write_bytes(index)
    if kind != 2:
        manifest["shards"][0] |= {"index_sha256": digest(index), "index_bytes": len(index)}
    text = dump(manifest | {"seal": ""}) if isinstance(manifest, dict) else dump(manifest)
    (root / "manifest.json").write_bytes(sealed(text) if b'"seal": ""' in text else text)


def damage(name: str, root: Path, contents: dict[str, bytes], draw: random.Random) -> list[str]:
    """Damage a file or two; returns which files may be different now."""
    if name == "shards" and draw.random() < 0.8:
        change_shards(root, contents, draw)
        return list(contents)
    files = draw.sample(list(contents), min(len(contents), draw.choice((1, 1, 2))))
    for file in files:
        content, suffix = contents[file], file.rpartition(".")[2]
        if draw.random() < 0.02:
            (root / file).unlink()
            draw.choice((os.mkfifo, os.mkdir))(root / file)
        elif suffix == "tfrecord":
            change_record(content, draw, root / file)
        elif draw.random() < 0.4:
            (root / file).write_bytes(change_bytes(content, draw))
        else:
            changes = {"json": change_json, "txt": change_words, "npy": change_npy, "parquet": change_types}
            (root / file).write_bytes(changes.get(suffix, change_bytes)(content, draw))
    return files


def restore(root: Path, contents: dict[str, bytes], files: list[str]) -> None:
    for file in files:
        path = root / file
        if path.is_dir():
            path.rmdir()
        elif not path.is_file():
            path.unlink(missing_ok=True)
        path.write_bytes(contents[file])


def read(keys: dict, root: Path, draw: random.Random) -> None:
    """Open, read a frame, and project it."""
    wants = draw.choice((EVERYTHING, EVERYTHING, Wants(), Wants(images=False), Wants(points=False)))
    config = parse_part("data", READERS, {**keys, "root": str(root), "frustum": draw.random() < 0.5})
    reader = build_reader(config, wants)
    if len(reader):
        frame = reader[len(reader) - 1]
        assert frame.points.dtype == np.float32
        assert np.isfinite(frame.points).all()
        check_seen(frame)


@pytest.mark.parametrize(
    ("name", "write", "share"),
    [
        ("kitti", write_kitti, 1),
        ("custom", write_custom, 1),
        ("nuscenes", write_nuscenes, SLOW),
        ("waymo_v1", write_waymo_v1, SLOW),
        ("waymo_v2", write_waymo_v2, SLOW),
        ("shards", write_shards, 1),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_data_set_is_one_line(tmp_path, name, write, share):
    keys = write(tmp_path)
    contents = {str(p.relative_to(tmp_path)): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    read(keys, tmp_path, random.Random(0))
    refused, count = 0, max(COUNT // share, 20)
    for number in range(count):
        draw = random.Random(number)
        files = damage(name, tmp_path, contents, draw)
        try:
            read(keys, tmp_path, draw)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), (number, files)  # noqa: PT017
        except Exception as error:
            raise AssertionError(f"input {number}: {files}: {type(error).__name__}: {error}") from error
        restore(tmp_path, contents, files)
    assert refused > count / 8


def test_a_damaged_configuration_is_one_line(tmp_path):
    text = (
        "base: []\ndata: &d {name: kitti, root: /x, split: train, cameras: [image_2], point_range: [0, -40, -3, 70.4, 40, 1]}\n"
        "trainer: {max_steps: 1e3, on: off}\nagain: *d\n"
    )
    odd = (
        "!!int ",
        "!!timestamp ",
        "!!binary ",
        "!!set ",
        "!!float ",
        "!!python/name:os.system ",
        "&d [*d] ",
        "*d",
        "<<: *d",
    )
    path, refused = tmp_path / "x.yaml", 0
    for number in range(COUNT):
        draw = random.Random(number)
        changed = change_bytes(text.encode(), draw)
        if draw.random() < 0.7:
            place = draw.randrange(len(text))
            changed = (text[:place] + draw.choice(odd) + text[place + draw.randint(0, 3) :]).encode()
        path.write_bytes(changed)
        try:
            raw = apply_sets(
                load_yaml(path), [draw.choice(("data.batch-size=4", "data.root=!!int x", "data.0=[", "x=&a [*a]"))]
            )
            parse_block("data", KittiConfig, raw.get("data"))
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
    assert refused > COUNT / 8
