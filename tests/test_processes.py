"""Two processes over gloo: negatives of all ranks, bad frames, and runs that go on with another number of processes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from helpers import BLOCKS

from simipu3d.contrast.info_nce import info_nce
from simipu3d.weights.files import read_checkpoint

SIZES = [(5, 3), (4, 4), (5, 0)]


def rows_of(rank, size):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, size, 6, generator=generator)


def contrast_in_process(rank, port, sizes, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    query, key = (rows.clone().requires_grad_(len(rows) > 0) for rows in rows_of(rank, sizes[rank]))
    ids = torch.arange(len(query)) // 2
    result = info_nce(query, key, 0.2, ids=(ids,), all_ranks=True)
    if result.loss.requires_grad:
        result.loss.backward()
    torch.save({"loss": result.loss.detach(), "key": key.grad, "query": query.grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("sizes", SIZES)
def test_negatives_of_all_ranks_equal_one_large_batch(sizes, tmp_path):
    """Losses and gradients of two processes, one of them perhaps without rows, against one process that holds all rows."""
    mp.start_processes(contrast_in_process, (free_port(), sizes, str(tmp_path)), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    parts = [rows_of(rank, size) for rank, size in enumerate(sizes)]
    query, key = (torch.cat([part[side] for part in parts]).requires_grad_() for side in (0, 1))
    ids = torch.cat([torch.arange(size) // 2 + 100 * rank for rank, size in enumerate(sizes)])
    logits = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(key, dim=1).T / 0.2
    copies = (ids[:, None] == ids[None]) & ~torch.eye(len(ids), dtype=torch.bool)
    each = torch.nn.functional.cross_entropy(
        logits.masked_fill(copies, -torch.inf), torch.arange(len(ids)), reduction="none"
    )
    means = [part.mean() if len(part) else part.sum() for part in each.split(list(sizes))]
    sum(means).backward()
    for rank, size in enumerate(sizes):
        torch.testing.assert_close(found[rank]["loss"], means[rank].detach())
        if size:
            torch.testing.assert_close(found[rank]["key"], key.grad.split(list(sizes))[rank])
            torch.testing.assert_close(found[rank]["query"], query.grad.split(list(sizes))[rank])


def run_tool(cfg, out, *sets, resume=False):
    command = [sys.executable, "-m", "simipu3d.tools.pretrain", "--cfg", str(cfg), "--out", str(out), "--set", *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--resume"] if resume else []
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


HELD_OUT = """
import json, sys, warnings
from pathlib import Path
import torch
from simipu3d.engine.pretrain import build_module
import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from simipu3d.engine.run import RunDirectory
from simipu3d.engine.settings import load_settings

torch.set_num_threads(1)
cfg, processes, out = sys.argv[1:]
settings = load_settings(cfg)
module = build_module(settings, RunDirectory(Path(out), settings.to_plain(), None))
trainer = pl.Trainer(
    accelerator="cpu", devices=int(processes), strategy=DDPStrategy() if int(processes) > 1 else "auto", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
)
trainer.validate(module, verbose=False)
Path(out + f".{trainer.global_rank}.json").write_text(json.dumps(module.held_out))
"""


def test_two_processes_validate_like_one(tmp_path):
    """Five frames in batches of two are three batches: one process has two, the other one and an empty one. Every process
    ends with the same numbers, so that all agree on which checkpoint is the best."""
    data = {"name": "drive_world", "root": str(tmp_path / "world"), "image_size": [32, 64], "beams": 16}
    data |= {"num_frames": 4, "azimuth_step_deg": 2.0, "batch_size": 2, "num_workers": 0}
    raw = {"method": "simipu", "data": data, "augment": {"points": {"num_points": 64}}, **BLOCKS}
    raw |= {"contrast": {"dim": 8, "negatives": "all_ranks"}, "validate": {"data": {"num_frames": 5}}}
    raw |= {"trainer": {"max_steps": 1, "accelerator": "cpu"}}
    (tmp_path / "held_out.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "measure.py").write_text(HELD_OUT)
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [
            sys.executable,
            str(tmp_path / "measure.py"),
            str(tmp_path / "held_out.yaml"),
            str(processes),
            str(out),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        found += [json.loads((tmp_path / f"{processes}.{rank}.json").read_text()) for rank in range(processes)]
    one, first, second = found
    assert first == second
    assert {"loss", "intra_loss", "inter_top1", "matched_distance_max", "num_tokens"} <= set(one)
    assert first == pytest.approx(one, rel=1e-6, abs=1e-6)


@pytest.fixture
def kitti(samples, tmp_path):
    """Three real frames, the second one with a PNG cut short, and a configuration of seconds."""
    root = tmp_path / "kitti"
    shutil.copytree(samples / "kitti", root)
    image = root / "training" / "image_2" / "000001.png"
    image.chmod(0o644)
    image.write_bytes(image.read_bytes()[:50_000])
    raw = {
        "method": "simipu",
        "data": {
            "name": "kitti",
            "root": str(root),
            "batch_size": 1,
            "num_workers": 0,
        },
        "augment": {"points": {"num_points": 256}, "images": {"resize": "factor", "resize_factor": [0.1, 0.1]}},
        **BLOCKS,
        "trainer": {"max_steps": 3, "accelerator": "cpu", "devices": 2, "log_every_n_steps": 1},
        "run": {"pictures_every_steps": 0},
    }
    (tmp_path / "kitti.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "kitti.yaml"


def test_a_bad_frame_of_any_process_stops_all_with_one_line(kitti, tmp_path):
    done = run_tool(kitti, tmp_path / "run", "seed=0")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert "000001.png" in lines[0]
    assert "Traceback" not in done.stderr


def test_skipped_frames_of_all_processes_are_counted(kitti, tmp_path):
    """With one frame a step and rank, the bad one is met within three epochs; the other process's share is fine."""
    done = run_tool(kitti, tmp_path / "run", "data.on_bad_frame=skip", "trainer.devices=1", "trainer.max_steps=6")
    assert done.returncode == 0, done.stderr
    messages = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["simipu3d"]["bad_frames"]["messages"]
    assert len(messages) == 1
    assert "000001.png" in messages[0]
    assert done.stderr.count("skipped a bad frame") == 1


def test_a_run_goes_on_with_another_number_of_processes(samples, kitti, tmp_path):
    """Two steps of one process used two of three frames; two processes go on behind them, with the next epoch."""
    sets = [f"data.root={samples / 'kitti'}"]
    first = run_tool(kitti, tmp_path / "run", *sets, "trainer.devices=1", "trainer.max_steps=2")
    assert first.returncode == 0, first.stderr
    second = run_tool(kitti, tmp_path / "run", *sets, "trainer.max_steps=5", resume=True)
    assert second.returncode == 0, second.stderr
    own = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["simipu3d"]
    assert own["global_step"] == 5
    assert own["world_size"] == 2
