"""Laws of reading shards: no damage goes unseen, and each frame comes once, from wherever the shards lie."""

import json
import os
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from helpers import BLOCKS
from shard_sets import SMALL, contents, difference, open_shards, parse

from simipu3d.contracts.frame import EVERYTHING, Wants
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, ImageAugmentConfig, PointAugmentConfig
from simipu3d.data.loading.loader import BadFrameLimit, build_reader, make_loader
from simipu3d.data.readers.base import TRUTH_KINDS
from simipu3d.data.shards import store as shard_store
from simipu3d.data.shards.format import FORMAT, check_format, sealed
from simipu3d.data.shards.frames import decode_frame, encode_frame
from simipu3d.data.shards.store import LocalStore, RemoteStore, StoreError, open_store
from simipu3d.data.shards.verify import verify_shards
from simipu3d.data.shards.writer import prepare_shards
from simipu3d.engine.pretrain import pretrain
from simipu3d.errors import BadFrameError, UserError
from simipu3d.tools.prepare_data import main
from simipu3d.weights.files import read_checkpoint

pytest_plugins = ["shard_fixtures"]


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


@pytest.mark.parametrize(
    "name", ["manifest.json", "prepare.json", "shard-000001.jsonl", "shard-000001.tar", "shard-000003.tar"]
)
def test_a_flipped_bit_is_found_wherever_it_is(name, copy, whole):
    """First and last bytes (of a tar: a header, the padding at its end) and drawn ones."""
    content = (whole / name).read_bytes()
    places = np.random.default_rng(len(name)).integers(0, len(content), 10).tolist()
    for place in [0, 1, *places, len(content) - 1]:
        flip(copy / name, place)
        try:
            found = verify_shards(str(copy))[1]
        except UserError as error:
            found = [str(error)]
        assert found, f"byte {place} of {len(content)}"
        assert any(name in line for line in found) or name == "prepare.json"
        (copy / name).write_bytes(content)
    assert verify_shards(str(copy))[1] == []


def test_files_that_the_manifest_does_not_know_are_told(copy, whole, world):
    (copy / "shard-000004.tar").write_bytes((whole / "shard-000000.tar").read_bytes())
    (copy / "notes.txt").write_text("a user's own")
    assert verify_shards(str(copy))[1] == [f"{copy}/shard-000004.tar: the manifest knows no such file; delete it"]
    (copy / "shard-000004.tar").unlink()
    other = copy.parent / "other"
    prepare_shards(world.model_copy(update={"seed": 1}), SMALL, str(other))
    (copy / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    lines = verify_shards(str(copy))[1]
    assert "prepare.json: holds another configuration than the manifest" in lines[0]
    assert all(any(f"shard-00000{n}.tar" in line for line in lines) for n in range(4)), "a manifest of other shards"


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


NEEDS = Needs(point_views=2, image_views=1)
FEW = AugmentConfig(points=PointAugmentConfig(num_points=60), images=ImageAugmentConfig(resize=None))


def loader_config(url, **keys):
    return parse(name="shards", root=str(url), **{"batch_size": 2, "num_workers": 0, **keys})


@pytest.mark.parametrize("workers", [0, 2])
def test_training_meets_a_flipped_bit_as_a_bad_frame(workers, copy):
    frame_id, offset, _ = member_place(copy, 1, 0, "points.npy")
    flip(copy / "shard-000001.tar", offset + 300)
    config = loader_config(copy, num_workers=workers)
    limit = BadFrameLimit(config, 11)
    messages = [
        line for seed in range(3) for batch in make_loader(config, FEW, NEEDS, seed) for line in batch.bad_frames
    ]
    with pytest.raises(BadFrameError, match=rf"shard-000001\.tar: frame {frame_id}: points\.npy differs"):
        limit.add(messages)
    config = loader_config(copy, num_workers=workers, on_bad_frame="skip")
    limit, names = BadFrameLimit(config, 11), []
    for seed in range(3):
        for batch in make_loader(config, FEW, NEEDS, seed):
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
    with pytest.raises(UserError, match="is of format 3, this simipu3d reads format 1 and 2"):
        open_shards(copy)
    evil = {**text["shards"][0], "name": "../../secret.tar"}
    (copy / "manifest.json").write_text(json.dumps({**text, "shards": [evil, *text["shards"][1:]]}))
    with pytest.raises(UserError, match=r"damaged: shards\.0\.name"):
        open_shards(copy)
    for broken in ("{", "[]", "", json.dumps({"format": 1}), json.dumps({**text, "frames": 12})):
        (copy / "manifest.json").write_text(broken)
        with pytest.raises(UserError, match="damaged"):
            open_shards(copy)


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
    bare = open_shards(whole, Wants())[4]
    assert (bare.boxes, bare.point_class, bare.point_instance) == (None, None, None)
    assert all(camera.depth is None and camera.pixel_class is None for camera in bare.cameras)
    assert np.array_equal(bare.points, everything.points)
    assert sum(place[2] for place in read) < 0.6 * total
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


def test_a_set_of_format_1_is_read(copy, world):
    """Its boxes stand in the frame's own JSON, with KITTI's 2D boxes, and its manifest does not say what it gives."""
    frame = build_reader(world)[0]
    box = np.arange(4.0 * len(frame.boxes)).reshape(-1, 4)
    members = dict(encode_frame(frame, SMALL))
    boxes = json.loads(members.pop("boxes.json")) | {"image_box": box.tolist(), "attributes": None}
    members["json"] = json.dumps(json.loads(members["json"]) | {"boxes": boxes}).encode()
    old = decode_frame(members, "here", None, EVERYTHING)
    expected = replace(frame, boxes=replace(frame.boxes, image_boxes={"image_2": box}))
    assert difference(expected, old) == []
    assert decode_frame(members, "here", None, Wants()).boxes is None
    text = json.loads((copy / "manifest.json").read_text()) | {"format": 1, "seal": ""}
    assert sorted(text.pop("gives")) == sorted(open_shards(copy).gives) == sorted(TRUTH_KINDS)
    (copy / "manifest.json").write_bytes(sealed(json.dumps(text).encode()))
    assert open_shards(copy).gives == set(TRUTH_KINDS) - {"boxes"}, "of which the first frame has none in its JSON"
    with pytest.raises(UserError, match="is of format 1, this simipu3d writes format 2"):
        check_format(b'{"format": 1}', "prepare.json", [FORMAT])


def test_range_and_frustum_cut_points_and_their_truth_alike(whole):
    everything = open_shards(whole)[4]
    cut = {"point_range": [5, -20, -5, 30, 20, 5], "frustum": True, "cameras": ["front"]}
    frame = open_shards(whole, **cut)[4]
    rows = {row.tobytes(): place for place, row in enumerate(everything.points)}
    kept = [rows[row.tobytes()] for row in frame.points]
    assert 0 < len(kept) < len(everything.points)
    assert np.array_equal(frame.point_class, everything.point_class[kept])
    assert np.array_equal(frame.point_instance, everything.point_instance[kept])
    blind = open_shards(whole, Wants(images=False), **cut)[4]
    assert np.array_equal(blind.points, frame.points)
    assert blind.cameras == ()


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
    loader = make_loader(config, FEW, NEEDS, seed, rank, world_size)
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
    monkeypatch.setattr(shard_store, "FIRST_PAUSE", 0.01)
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
    with pytest.raises(UserError, match=r"data\.root"):
        parse(name="shards", root="")


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/a", "simplecache::http://me:hunter2@127.0.0.1:9/a"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(StoreError, match="a password in a URL would be written") as error:
        open_shards(url)
    assert "hunter2" not in str(error.value)


def test_urls_may_be_chained(server):
    assert open_shards(f"simplecache::{server[0]}")[10].frame_id == open_shards(server[0])[10].frame_id


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
        },
        "augment": {"points": {"num_points": 200}, "images": {"resize": None}},
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
