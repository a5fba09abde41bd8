"""The wheel, in a fresh environment outside the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.num_frames=8",
    "data.image_size=[32,64]",
    "data.beams=16",
    "data.azimuth_step_deg=2.0",
    "data.batch_size=4",
]
SMALL += ["augment.points.num_points=128", "trainer.max_steps=2", "validate=null", "trainer.val_check_interval=null"]


def run(*command: str, cwd: Path) -> str:
    """The output of a command that must work; nothing of the checkout is on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "dist"), str(ROOT), cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("simipu3d-*.whl")
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    constraints = ROOT / "constraints.txt"
    torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    run(python, "-m", "pip", "install", "-q", torch, cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", "-c", str(constraints), f"{wheel}[cpu]", cwd=tmp_path)
    simipu3d = str(tmp_path / "venv" / "bin" / "simipu3d")
    place = run(
        python, "-c", "import simipu3d, simipu3d.ops; print(simipu3d.__file__, simipu3d.ops.__file__)", cwd=tmp_path
    )
    assert all(str(tmp_path) in word for word in place.split())
    said = run(simipu3d, "demo", "--set", *SMALL, "--out", "demo", cwd=tmp_path)
    assert "exported backbone" in said
    run(simipu3d, "pretrain", "--cfg", "simipu/demo.yaml", "--set", *SMALL, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert "contrast" in run(simipu3d, "keys", "contrast", cwd=tmp_path)
