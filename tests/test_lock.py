"""One process writes a run: its lock ends with it, whatever ends it."""

import os
import signal
import subprocess
import sys

import pytest
from tiny_runs import call

from simipu3d.engine.lock import RunLock
from simipu3d.errors import UserError

pytest_plugins = ["run_fixtures"]
HOLDER = """
import sys, time
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])  # the module alone: torch takes seconds to import
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
lock.RunLock(Path(sys.argv[2])).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, sys.modules[RunLock.__module__].__file__, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()


def test_a_lock_keeps_others_out_until_its_process_is_killed(holder):
    folder, process = holder
    with pytest.raises(UserError, match=rf"process {process.pid} on \S+, since .* writes this run"):
        RunLock(folder).take()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lock = RunLock(folder)
    lock.take()
    lock.take()
    assert f"process {os.getpid()} on" in (folder / ".lock").read_text()


def test_release_lets_others_in_and_a_fork_does_not_end_the_lock(tmp_path):
    """A POSIX lock is lost with any closed handle of its own process; those of forked workers do not count."""
    lock = RunLock(tmp_path)
    lock.take()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

    def tries():
        code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / ".lock")], stderr=subprocess.DEVNULL
        ).returncode

    assert tries() == 1
    lock.release()
    lock.release()
    assert tries() == 0


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    RunLock(tmp_path).take()
    assert "has no locks" in caplog.text


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_living_run_is_refused(resume, holder, tiny, capfd):
    folder, process = holder
    status, lines = call(capfd, "--cfg", tiny, "--out", folder, *resume)
    assert status == 2
    assert f"error: {folder}: process {process.pid} on" in lines[-1]
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_run_that_another_one_finished_meanwhile_is_not_overwritten(tiny, tmp_path, capfd, monkeypatch):
    """Both looked at an empty place; the second gets the lock when the first is through."""
    from simipu3d.data.drive_world.dataset import DriveWorld

    def other_run(_):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "last.ckpt").write_text("of the other")

    monkeypatch.setattr(DriveWorld, "prepare", other_run)
    status, lines = call(capfd, "--cfg", tiny, "--out", tmp_path / "run")
    assert status == 2
    assert "holds a run already" in lines[-1]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_text() == "of the other"
