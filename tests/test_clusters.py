"""The SLURM file of docs/clusters.md, with stand-ins for srun and scontrol."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import checkpoint, rows, same, start

pytest_plugins = ["run_fixtures"]

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit ${status:-0}
"""
STEPS = 40


def batch_file(cfg):
    """The file as it stands, with a small configuration on the embedded data."""
    text = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text()
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)[1]
    for old, new in (
        ("configs/simipu/kitti.yaml", str(cfg)),
        ("data.root=/path/to/kitti", f"data.num_workers=1 trainer.max_steps={STEPS} run.keep_every_epochs=null"),
    ):
        assert old in script
        script = script.replace(old, new)
    return script


def tasks_of(session):
    """All processes of the job's tasks: `python -m simipu3d...`, workers included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if b"simipu3d.tools.main" in command and os.getsid(int(folder.name)) == session:
                found.append(int(folder.name))
        except (OSError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
def test_the_batch_file_survives_its_wall_time(tiny, tmp_path):
    """Two tasks with a worker each; SLURM's warning goes to all processes, the job is queued again once, and goes on."""
    tools, asked = tmp_path / "bin", tmp_path / "asked"
    tools.mkdir()
    for name, content in (
        ("srun", SRUN),
        ("scontrol", f'#!/bin/sh\necho "$@" >> {asked}\n'),
        ("simipu3d", f'#!/bin/sh\nexec {sys.executable} -m simipu3d.tools.main "$@"\n'),
    ):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(batch_file(tiny))
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "simipu", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "runs" / "simipu-4711"

    def submit():
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=tmp_path,
            env={**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    process = submit()
    while not (out / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    for pid in tasks_of(process.pid):
        os.kill(pid, signal.SIGUSR1)
    lines = process.communicate(timeout=100)[1].splitlines()
    assert process.returncode == 143, lines
    assert asked.read_text() == "requeue 4711\n"
    said = [line for line in lines if line.startswith("stopped by SIGUSR1 after step")]
    assert len(said) == 1, lines
    assert said[0].endswith("SLURM job 4711 is queued again")
    step = checkpoint(out)["simipu3d"]["global_step"]
    assert step < STEPS
    assert len(rows(out)) == step
    process = submit()
    lines = process.communicate(timeout=200)[1].splitlines()
    assert process.returncode == 0, lines
    assert f"resuming from step {step}: {out.relative_to(tmp_path)}/checkpoints/last.ckpt" in "\n".join(lines)
    sets = ["trainer.devices=2", f"trainer.max_steps={STEPS}", "run.keep_every_epochs=null"]
    process = start("--cfg", tiny, "--out", tmp_path / "whole", "--set", *sets)
    lines = process.communicate(timeout=200)[1].splitlines()
    assert process.returncode == 0, lines
    assert same(tmp_path / "whole", out)
