"""A run that is asked to stop leaves a checkpoint, says one line, ends with a status of its own, and goes on."""

import logging
import multiprocessing
import multiprocessing.resource_sharer
import os
import signal
import sys

import pytest
from tiny_runs import STEPS, call, checkpoint, rows, same

from simipu3d.engine.signals import requeue
from simipu3d.errors import UserError

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def to_self(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGTERM, 143, 2), (signal.SIGUSR1, 143, 4), (signal.SIGINT, 130, 7)],
)
def test_a_signal_ends_the_run_after_its_step(
    number, status, step, tiny, tiny_run, tmp_path, at_step, capfd, monkeypatch
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    logging.getLogger("simipu3d").setLevel(logging.WARNING)
    out = tmp_path / "run"
    at_step(step, to_self(number))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    found, lines = call(capfd, "--cfg", tiny, "--out", out)
    assert found == status
    assert f"after step {step}, which last.ckpt holds; continue with --resume --out {out}" in lines[-1]
    assert len([line for line in lines if "Ctrl-C again" not in line]) == 1
    assert checkpoint(out)["simipu3d"]["global_step"] == step
    assert [int(row["step"]) for row in rows(out)] == list(range(1, step + 1))
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert call(capfd, "--cfg", tiny, "--out", out, "--resume")[0] == 0
    assert same(tiny_run, out)


def test_a_second_ctrl_c_ends_at_once(tiny, tmp_path, at_step, capfd):
    at_step(2, lambda: [to_self(signal.SIGINT)(), to_self(signal.SIGINT)()])
    status, lines = call(capfd, "--cfg", tiny, "--out", tmp_path / "run")
    assert status == 130
    assert "stopped by Ctrl-C; continue with --resume" in lines[-1]
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_signal_before_the_first_step_ends_at_once(tiny, tmp_path, capfd, monkeypatch):
    from simipu3d.data.drive_world.dataset import DriveWorld

    monkeypatch.setattr(DriveWorld, "prepare", lambda reader: to_self(signal.SIGTERM)())
    status, lines = call(capfd, "--cfg", tiny, "--out", tmp_path / "run")
    assert status == 143
    assert lines[-1].startswith("stopped by SIGTERM; continue with --resume")


def test_a_signal_during_the_last_step_is_too_late(tiny, tiny_run, tmp_path, at_step, capfd):
    at_step(STEPS, to_self(signal.SIGTERM))
    assert call(capfd, "--cfg", tiny, "--out", tmp_path / "run")[0] == 0
    assert same(tiny_run, tmp_path / "run")


def test_half_a_step_is_not_stored(tiny, tmp_path, at_step, capfd):
    """With two batches a step, a signal in the first of them waits for the second."""
    at_step(3, to_self(signal.SIGTERM))
    sets = ["--set", "trainer.accumulate_grad_batches=2"]
    assert call(capfd, "--cfg", tiny, "--out", tmp_path / "run", *sets)[0] == 143
    assert checkpoint(tmp_path / "run")["simipu3d"]["position"] == [1, 0]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))]
)
def test_workers_do_not_die_of_a_signal_to_all_processes(number, tiny, tiny_run, tmp_path, at_step, capfd, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    out, sets = tmp_path / "run", ["--set", "data.num_workers=2"]

    def to_all():
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, number)
        os.kill(os.getpid(), number)

    at_step(5, to_all)
    status, lines = call(capfd, "--cfg", tiny, "--out", out, *sets)
    assert status == (130 if number == signal.SIGINT else 143), lines
    assert checkpoint(out)["simipu3d"]["global_step"] == 5
    assert not multiprocessing.active_children(), "the parent still ends its workers"
    assert call(capfd, "--cfg", tiny, "--out", out, "--resume", *sets)[0] == 0
    assert same(tiny_run, out)


def test_a_killed_worker_is_one_line(tiny, tmp_path, at_step, capfd):
    at_step(2, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
    status, lines = call(capfd, "--cfg", tiny, "--out", tmp_path / "run", "--set", "data.num_workers=2")
    assert status == 2
    assert "error: a data worker was killed" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_a_batch_of_a_worker_that_is_gone_is_one_line(tiny, tmp_path, at_step, capfd, monkeypatch):
    """Killed between its announcement of a batch and the hand-over: the connection is refused."""

    def refuse(_):
        raise ConnectionRefusedError(111, "Connection refused")

    sharer = multiprocessing.resource_sharer._ResourceSharer
    at_step(2, lambda: monkeypatch.setattr(sharer, "get_connection", staticmethod(refuse)))
    status, lines = call(capfd, "--cfg", tiny, "--out", tmp_path / "run", "--set", "data.num_workers=2")
    assert status == 2
    assert "error: a data worker was killed" in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that notes what it was asked, and ends as the test says."""
    tool, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"

    def install(status):
        tool.parent.mkdir(exist_ok=True)
        ckpt = tmp_path / "run" / "checkpoints" / "last.ckpt"
        tool.write_text(
            f'#!/bin/sh\necho "$@" $(test -f {ckpt} && echo saved) >> {asked}\necho no such job >&2\nexit {status}\n'
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        return asked

    return install


SLURM = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}


def test_slurms_warning_queues_the_job_again_after_the_checkpoint(
    tiny, tiny_run, tmp_path, at_step, capfd, monkeypatch, scontrol
):
    asked, out = scontrol(0), tmp_path / "run"
    for name, value in {**SLURM, "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"}.items():
        monkeypatch.setenv(name, value)
    at_step(4, to_self(signal.SIGUSR1))
    status, lines = call(capfd, "--cfg", tiny, "--out", out, "--resume")
    assert status == 143
    assert lines[-1].endswith("; SLURM job 4711 is queued again")
    assert asked.read_text() == "requeue 4711 saved\n"
    assert {path.name for path in out.rglob("*.ckpt")} == {"last.ckpt"}, "one kind of checkpoint"
    assert call(capfd, "--cfg", tiny, "--out", out, "--resume", "--set", "contrast.temperature=0.2")[0] == 2
    assert call(capfd, "--cfg", tiny, "--out", out, "--resume")[0] == 0
    assert same(tiny_run, out)


def test_sigterm_queues_nothing(tiny, tmp_path, at_step, capfd, scontrol):
    """`scancel` sends it too; after a preemption SLURM queues the job itself."""
    asked = scontrol(0)
    at_step(1, to_self(signal.SIGTERM))
    assert call(capfd, "--cfg", tiny, "--out", tmp_path / "run")[0] == 143
    assert not asked.exists()


def test_a_job_that_cannot_be_queued_again_is_said(scontrol, monkeypatch):
    scontrol(1)
    assert requeue() == "; SLURM job 4711 could not be queued again (no such job): submit it again"
    monkeypatch.setenv("PATH", "/nowhere")
    assert "could not be queued again" in requeue()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue() == ""


@pytest.mark.parametrize(
    ("variables", "devices", "num_nodes", "words"),
    [
        ({"SLURM_NTASKS": "4"}, 1, 1, "this job has 4 tasks, trainer.devices=1 x trainer.num_nodes=1 asks for 1"),
        ({"SLURM_NTASKS": "2"}, 2, 1, "was not started by srun"),
        ({**SLURM, "SLURM_NTASKS": "2"}, 2, 1, "SLURM_NTASKS_PER_NODE: a number was expected"),
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, 2, 2, "SLURM_NTASKS_PER_NODE: 4 in this job"),
        (
            {**SLURM, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"},
            *(2, 2, "trainer.num_nodes is 2"),
        ),
        ({"SLURM_NTASKS": "many"}, 1, 1, "SLURM_NTASKS: a number was expected, it is 'many'"),
        ({**SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "x"}, 2, 1, "SLURM_PROCID: a number was expected"),
    ],
)
def test_a_misused_slurm_environment_is_one_line(variables, devices, num_nodes, words, monkeypatch):
    from simipu3d.engine.slurm import processes_of_job

    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as caught:
        processes_of_job(devices, num_nodes)
    assert "srun" in str(caught.value)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes_of_job(devices, 1).__class__.__name__ == "LightningEnvironment"
    assert sys.modules["simipu3d.engine.slurm"].processes_of_job("auto", 1) is not None
