"""A network that fails for a moment costs no frame; one that fails for long ends in a bounded time, with one line."""

import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from shard_sets import difference, open_shards

from simipu3d.data.shards import store as shard_store
from simipu3d.data.shards.store import StoreError, open_store
from simipu3d.errors import BadFrameError

pytest.importorskip("aiohttp")
pytest_plugins = ["shard_fixtures"]
TIMEOUT = 0.4


class Misbehaving(BaseHTTPRequestHandler):
    """Serves ranges of files; while `state["times"]` is above zero it answers in the way that `state["how"]` names."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, folder, state):
        self.folder, self.state = folder, state
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.state["asked"] += 1
        bad = self.state["times"] > 0
        self.state["times"] -= bad
        self.close_connection = bad
        how = self.state["how"] if bad else "well"
        path = self.folder / self.path.strip("/")
        if how.isdigit() or not path.is_file():
            self.send_error(int(how) if how.isdigit() else 404)
            return
        if how == "silent":
            self.state["over"].wait(30)
            return
        if how == "reset":
            self.connection.close()
            return
        content = path.read_bytes()
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            content = content[int(start) : int(end) + 1]
        if how == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        if how == "short_and_says_so":
            content = content[: len(content) // 2]
            self._headers_buffer[-1] = f"Content-Length: {len(content)}\r\n".encode()
        self.end_headers()
        if not body:
            return
        if how == "dripping":
            for place in range(len(content)):
                if self.state["over"].wait(0.05):
                    return
                self.wfile.write(content[place : place + 1])
        self.wfile.write(content[: len(content) // 2] if how == "short" else content)


@pytest.fixture
def server(whole, monkeypatch):
    monkeypatch.setattr(shard_store, "FIRST_PAUSE", 0.01)
    state = {"how": "well", "times": 0, "asked": 0, "over": threading.Event()}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Misbehaving, folder=whole, state=state))
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", state
    state["over"].set()
    httpd.shutdown()
    httpd.server_close()


HOW = ["silent", "dripping", "short", "short_and_says_so", "404", "500", "503", "429", "reset", "flipped"]


@pytest.mark.parametrize("how", HOW)
def test_one_fault_costs_no_frame(how, server, whole):
    """Of the manifest, an index or a shard."""
    url, state = server
    local = open_shards(whole)
    if how not in ("short_and_says_so", "flipped"):  # the manifest has nothing that it could be compared with
        state.update(how=how, times=1)
    reader = open_shards(url, timeout=TIMEOUT)
    for index in (0, 5, 5):
        state.update(how=how, times=1)
        assert difference(local[index], reader[index]) == []
        assert state["times"] == 0


@pytest.mark.parametrize("how", HOW)
def test_a_lasting_fault_is_one_line_in_bounded_time(how, server, whole):
    url, state = server
    reader = open_shards(url, timeout=TIMEOUT, retries=2)
    reader[0]
    state.update(how=how, times=1000, asked=0)
    began = time.monotonic()
    with pytest.raises(BadFrameError, match=r"shard-000000\.tar: frame .*(no answer within 0.4 s|[a-z])") as caught:
        reader[1]
    assert time.monotonic() - began < 3 * TIMEOUT + 2
    assert "\n" not in str(caught.value)
    assert state["asked"] <= 6, "aiohttp asks once more where a connection was closed"
    if how in ("silent", "dripping"):
        assert "no answer within 0.4 s" in str(caught.value)
    state["times"] = 0
    assert difference(open_shards(whole)[1], reader[1]) == [], "and it recovers"


@pytest.mark.parametrize(("how", "tries"), [("403", 1), ("401", 1), ("404", 2), ("503", 4)])
def test_what_will_not_pass_is_not_tried_again(how, tries, server):
    url, state = server
    state.update(how=how, times=1000)
    with pytest.raises(StoreError):
        open_store(url, TIMEOUT).read("manifest.json")
    assert state["asked"] == tries


def test_retries_0_tries_once(server):
    url, state = server
    state.update(how="503", times=1)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        open_store(url, TIMEOUT, 0).read("manifest.json")
    assert state["asked"] == 1
