"""What a machine withholds: disk space, open files, a process of several."""

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny_runs import call, checkpoint, rows, same, start

from simipu3d.engine import disk, limits
from simipu3d.engine.disk import whole_file, write_whole
from simipu3d.engine.limits import allow_open_files
from simipu3d.engine.metrics_file import MetricsFile
from simipu3d.errors import UserError

pytest_plugins = ["run_fixtures"]


# Files


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1.5 MB: `fill(n)` leaves n kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    ballast = folder / "ballast"

    def fill(kilobytes):
        ballast.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        ballast.write_bytes(bytes(max(0, free - 1024 * kilobytes)))

    yield folder, fill
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_file_is_written_whole_or_not_at_all(small_disk):
    folder, fill = small_disk
    write_whole(folder / "a.txt", "old")
    fill(20)
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(No space left on device\); free some space"):
        write_whole(folder / "a.txt", "new" * 10_000)
    assert (folder / "a.txt").read_text() == "old"
    assert {path.name for path in folder.iterdir()} == {"a.txt", "ballast"}
    with pytest.raises(ZeroDivisionError), whole_file(folder / "a.txt"):
        raise ZeroDivisionError
    assert {path.name for path in folder.iterdir()} == {"a.txt", "ballast"}


def test_content_and_name_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        disk.os, "fsync", lambda handle: done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
    )
    original = os.replace
    monkeypatch.setattr(disk.os, "replace", lambda *names: [done.append("rename"), original(*names)])
    write_whole(tmp_path / "a.txt", "content")
    assert done == ["file", "rename", "folder"]


def test_no_half_row_is_left(small_disk):
    folder, fill = small_disk
    file = MetricsFile(folder / "metrics.csv", None)
    file.append({"step": 1, "a": 0.5})
    before = (folder / "metrics.csv").read_bytes()
    fill(0)

    def go_on():
        for step in range(2, 2000):
            file.append({"step": step, "a": "x" * 100})

    with pytest.raises(UserError, match="No space left"):
        go_on()
    content = (folder / "metrics.csv").read_bytes()
    assert content.startswith(before)
    assert content.endswith(b"\r\n")


@pytest.mark.parametrize("kilobytes", [0, 30, 150])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    kilobytes, tiny, tiny_run, small_disk, at_step, capfd, one_thread
):
    """Full for the checkpoint of step 6 (about 0.5 MB), for the row before it, or for TensorBoard."""
    folder, fill = small_disk
    out = folder / "run"
    at_step(5, lambda: fill(kilobytes))
    status, lines = call(capfd, "--cfg", tiny, "--out", out, "--set", "run.keep_every_epochs=null")
    assert status == 2
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "cannot be written (No space left on device); free some space, then continue with --resume" in lines[-1]
    assert not any("Traceback" in line for line in lines), lines
    assert not list(out.rglob("*.part"))
    assert checkpoint(out)["simipu3d"]["global_step"] == 3
    (folder / "ballast").unlink()
    assert call(capfd, "--cfg", tiny, "--out", out, "--resume", "--set", "run.keep_every_epochs=null")[0] == 0
    assert same(tiny_run, out)


# Open files


@pytest.mark.parametrize(
    ("soft", "hard", "workers", "expected"),
    [
        (64, 64, 2, "data.num_workers: 2 need about 512 open files and this shell allows 64"),
        (64, 400, 2, "data.num_workers=1 or less"),
        (64, 4096, 2, (4096, 4096)),
        (64, 4096, 0, (4096, 4096)),
        (1024, 4096, 2, None),
        (64, resource.RLIM_INFINITY, 2, (65536, resource.RLIM_INFINITY)),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2, None),
    ],
)
def test_the_limit_of_open_files_is_raised_or_refused(soft, hard, workers, expected, monkeypatch):
    changed = []
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, pair: changed.append(pair))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected)):
            allow_open_files(workers)
        return
    allow_open_files(workers)
    assert changed == ([expected] if expected else [])


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "workers", "status"), [(64, 2, 2), (64, 0, 2), (130, 0, 0)])
def test_few_open_files_end_with_one_line(limit, workers, status, tiny, tmp_path):
    prefix = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]
    process = start("--cfg", tiny, "--out", tmp_path / "run", "--set", f"data.num_workers={workers}", prefix=prefix)
    lines = process.communicate(timeout=200)[1].splitlines()
    assert process.returncode == status, lines
    assert not any("Traceback" in line for line in lines)
    assert status == 0 or "open files" in lines[-1]


# Several processes


def ranks(process, deadline=120):
    """Process ids of a run of two processes, the first one first, once the second one is there."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in map(int, children):
            if b"simipu3d.tools.pretrain" in Path(f"/proc/{child}/cmdline").read_bytes():
                return process.pid, child
        time.sleep(0.1)
    raise AssertionError("the second process did not start")


def wait_for(path, process, deadline=200):
    end = time.monotonic() + deadline
    while not path.exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


TWO = ("trainer.devices=2", "trainer.max_steps=100000", "run.checkpoint_every_steps=1", "run.keep_every_epochs=null")


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_ends_the_others_within_seconds(who, tiny, tmp_path):
    out = tmp_path / "run"
    process = start("--cfg", tiny, "--out", out, "--set", *TWO)
    wait_for(out / "checkpoints" / "last.ckpt", process)
    pids = ranks(process)
    os.kill(pids[who], signal.SIGKILL)
    began = time.monotonic()
    lines = [line for line in process.communicate(timeout=60)[1].splitlines() if not line.startswith("step ")]
    took = time.monotonic() - began
    assert took < 10
    assert process.returncode == (-9 if who == 0 else 2)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert ("first process of this run was killed" if who == 0 else "was killed by SIGKILL; continue with") in errors[0]
    assert not any("Traceback" in line for line in lines), lines
    stat = Path(f"/proc/{pids[1]}/stat")  # an orphan stays as a zombie where nobody collects it
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    assert checkpoint(out)["simipu3d"]["global_step"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_all_processes_stop_at_the_same_step(who, tiny, tmp_path, capfd, one_thread):
    """Whichever was asked; what they leave goes on to the result of an uninterrupted run."""
    out, sets = tmp_path / "run", ["trainer.devices=2", "trainer.max_steps=60", "run.keep_every_epochs=null"]
    process = start("--cfg", tiny, "--out", out, "--set", *sets)
    wait_for(out / "checkpoints" / "last.ckpt", process)
    os.kill(ranks(process)[who], signal.SIGTERM)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 143, lines
    assert "stopped by SIGTERM after step" in lines[-1]
    assert len([line for line in lines if line.startswith(("stopped", "error"))]) == 1, lines
    assert not any("Traceback" in line for line in lines), lines
    step = checkpoint(out)["simipu3d"]["global_step"]
    assert [int(row["step"]) for row in rows(out)] == list(range(1, step + 1))
    for place, arguments in ((out, ["--resume"]), (tmp_path / "whole", [])):
        process = start("--cfg", tiny, "--out", place, *arguments, "--set", *sets)
        lines = process.communicate(timeout=200)[1].splitlines()
        assert process.returncode == 0, lines
    assert same(tmp_path / "whole", out)
