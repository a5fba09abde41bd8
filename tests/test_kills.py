"""Runs that are ended at random, in every way: each goes on bit for bit, or says one line.

`KILLS=50` for the long run. Runs start from a server process that has imported everything, so that one takes a second.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import same, start

pytest_plugins = ["run_fixtures"]

KILLS = int(os.environ.get("KILLS", "6"))
WAYS = ["SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT", "worker", "checkpoint", "full disk"]
STATUS = {"SIGKILL": -9, "SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130, "worker": 2, "checkpoint": -9, "full disk": 2}


def die_while_saving(count):
    """Half of the count-th checkpoint is written, then the process is killed."""
    import torch

    original, calls = torch.save, [0]

    def save(content, file):
        calls[0] += 1
        if calls[0] < count:
            return original(content, file)
        file.write(b"PK half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def run(arguments, errors, dies_at_save):
    """In a process of its own: the command line, with its standard error in a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    from simipu3d.tools.pretrain import main

    if dies_at_save:
        die_while_saving(dies_at_save)
    os.environ.pop("SLURM_JOB_ID", None)
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything and used no thread yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simipu3d.tools.pretrain", "lightning.pytorch", "timm"])
    return context


def rows_of(out):
    path = out / "metrics.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else -1


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def interfere(way, process, out, rng, ballast):
    """Wait for a random moment of the run, then do it; returns whether it was in time."""
    at, deadline = rng.randrange(-1, 10), time.monotonic() + 100
    while rows_of(out) < at and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.1)
    if way == "full disk":
        free = shutil.disk_usage(ballast.parent).free
        ballast.write_bytes(bytes(max(0, free - rng.choice([0, 4096, 30_000, 300_000]))))
    elif way == "worker":
        for worker in workers_of(process.pid)[:1]:
            os.kill(worker, signal.SIGKILL)
    elif way != "checkpoint" and process.is_alive():
        os.kill(process.pid, getattr(signal, way))
    process.join(60)
    assert not process.is_alive(), f"{way} at {at}: does not end"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_that_is_ended_at_random_goes_on(number, server, tiny, tiny_run, tmp_path):
    rng, way = random.Random(number), WAYS[number % len(WAYS)]
    disk, ballast = tmp_path / "disk", tmp_path / "disk" / "ballast"
    disk.mkdir()
    mounted = (
        way == "full disk"
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", disk], capture_output=True
        ).returncode
    )
    if way == "full disk" and not mounted:
        pytest.skip("mounting a tmpfs needs root")
    try:
        out, errors = disk / "run", tmp_path / "errors"
        workers = 2 if way == "worker" else rng.choice([0, 2])
        arguments = ["--cfg", str(tiny), "--out", str(out), "--resume", "--set", f"data.num_workers={workers}"]
        dies = rng.randrange(1, 6) if way == "checkpoint" else 0
        errors.touch()  # the process may be ended before it opens it
        process = server.Process(target=run, args=(arguments, str(errors), dies))
        process.start()
        interfere(way, process, out, rng, ballast)
        lines = [line for line in errors.read_text().splitlines() if line and "Ctrl-C again" not in line]
        said = [line for line in lines if line.startswith(("error: ", "stopped by "))]
        # Too late, for a run that was through, or just before it looked at its signals.
        assert process.exitcode in (STATUS[way], 0, *((-signal.Signals[way],) if way.startswith("SIG") else ())), lines
        assert len(said) == (process.exitcode > 0), lines
        # Workers that lose their parent in the middle of a hand-over may say so.
        assert process.exitcode == -9 or not any("Traceback" in line for line in lines), lines
        assert not list(out.rglob("*.part")) or process.exitcode == -9
        print(f"{number} {way}, status {process.exitcode}, {rows_of(out)} rows, {workers} workers: {said}")
        ballast.unlink(missing_ok=True)
        process = server.Process(target=run, args=(arguments, str(errors), 0))
        process.start()
        process.join(100)
        assert process.exitcode == 0, errors.read_text()
        assert same(tiny_run, out)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(max(1, KILLS // 12)))
def test_a_process_of_two_that_is_killed_at_random(number, tiny, tmp_path):
    rng = random.Random(1000 + number)
    sets = ["--set", "trainer.devices=2", "trainer.max_steps=30"]
    out = tmp_path / "run"
    process = start("--cfg", tiny, "--out", out, "--resume", *sets)
    at = rng.randrange(0, 30)
    while rows_of(out) < at and process.poll() is None:
        time.sleep(0.01)
    victim = rng.choice([process.pid, *workers_of(process.pid)])
    os.kill(victim, signal.SIGKILL)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == (-9 if victim == process.pid else 2), lines
    assert len([line for line in lines if line.startswith("error: ")]) == 1, lines
    assert not any("Traceback" in line for line in lines)
    for place in (out, tmp_path / "whole"):
        process = start("--cfg", tiny, "--out", place, "--resume", *sets)
        lines = process.communicate(timeout=200)[1].splitlines()
        assert process.returncode == 0, lines
    assert same(tmp_path / "whole", out)
