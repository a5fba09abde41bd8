"""Every point encoder in one run: time and memory of a step by number of points.

A row is one encoder on one number of points, measured in a process of its own: forward and backward in training mode, the
median of several after a first one that is not counted, on one thread of a CPU, or on a GPU where there is one. The
smaller clouds are drawn from the same scan as the larger ones, and reach as far.

Shapes: N points.
"""

import logging
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

import simipu3d.encoders  # noqa: F401  (fills POINT_ENCODERS)
from simipu3d.config import parse_part
from simipu3d.contracts.batch import PointView
from simipu3d.data.drive_world.dataset import DriveWorld, DriveWorldConfig
from simipu3d.data.readers.files import read_float_rows
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS

log = logging.getLogger(__name__)

SIZES = (4096, 16384, 32768, 65536, 131072)
QUICK_SIZES = (1024,)
REPEATS = 3

SCENE = (-70.4, -72.0, -4.0, 70.4, 72.0, 4.0)
"""x, y, z of the lowest and highest corner, metres: what of a sweep takes part. All encoders read all of it: those whose
grid is bounded get these bounds."""

VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "pointnet2_msg": ({}, {"size": "light"}),
    "sparse_unet34": ({}, {"output": "encoder"}),
}
"""Keys that make a row of their own, by the encoder's name; an encoder that is not here has one row, by its defaults."""


def measure(samples: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Rows of the table, by number of points, then by encoder.

    Args:
        samples: folder with kitti/training/velodyne; None: a synthetic street.
        quick: one small size, one repeat.

    Raises:
        UserError: the folder holds no sweeps, or too few points.
    """
    sizes, repeats = (QUICK_SIZES, 1) if quick else (SIZES, REPEATS)
    sweeps = made_sweeps(max(sizes)) if samples is None else kitti_sweeps(samples)
    return [row for size in sizes for row in measure_size(thin(sweeps, size), repeats)]


def measure_size(points: NDArray[np.float32], repeats: int) -> list[dict[str, Any]]:
    """One row an encoder, on one cloud (N, 4). `ratio` is the time by that of the first one."""
    rows: list[dict[str, Any]] = []
    for block in blocks():
        log.info("%s on %d points", label(block), len(points))
        # A fresh process a row: the peak of a process never falls again, and spawn inherits none.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(measure_encoder, block, points, repeats).result()
        rows.append({**row, "ratio": row["step_ms"] / (rows[0] if rows else row)["step_ms"]})
    return rows


def blocks() -> list[dict[str, Any]]:
    """A `point_encoder:` block for every row, over all registered names."""
    return [{"name": name, **keys} for name in POINT_ENCODERS.names() for keys in VARIANTS.get(name, ({},))]


def label(block: dict[str, Any]) -> str:
    """The encoder's name, and what differs from its defaults."""
    return " ".join([block["name"], *(str(value) for key, value in block.items() if key != "name")])


def measure_encoder(block: dict[str, Any], points: NDArray[np.float32], repeats: int) -> dict[str, Any]:
    """Build an encoder and run it on one cloud (N, 4), in this process.

    Memory, MiB, is what the steps add: the peak of the process, or of what torch holds on the GPU, less what was held
    before the first.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = _build(block).to(device)
    view = _view(points, device)
    before = _memory_mib(device, "VmRSS")
    times = []
    for _ in range(1 + repeats):
        encoder.zero_grad()
        start = _now(device)
        tokens = encoder(view)
        # Fixed weights: behind BatchNorm a plain sum would have next to no gradient.
        readout = torch.linspace(-1, 1, tokens.features.numel(), device=device).view_as(tokens.features)
        (tokens.features * readout).sum().backward()
        times.append((_now(device) - start) * 1e3)
    assert bool(tokens.features.isfinite().all()), "features are not finite"
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite"
    return {
        "encoder": label(block),
        "points": len(points),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "tokens": len(tokens.xyz),
        "step_ms": median(times[1:]),
        "memory_mib": _memory_mib(device, "VmHWM") - before,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(),
    }


def _build(block: dict[str, Any]) -> torch.nn.Module:
    entry = POINT_ENCODERS[block["name"]]
    bounds = {"point_range": list(SCENE)} if "point_range" in entry.model.model_fields else {}
    config = parse_part("point_encoder", POINT_ENCODERS, {**block, **bounds})
    return entry.target(config, point_columns=("x", "y", "z", "intensity")).train()


def _view(points: NDArray[np.float32], device: torch.device) -> PointView:
    """One scene that nothing has augmented."""
    count = len(points)
    return PointView(
        torch.from_numpy(points).to(device),
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.arange(count, device=device),
        torch.eye(4, dtype=torch.float64, device=device)[None],
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory_mib(device: torch.device, kind: Literal["VmRSS", "VmHWM"]) -> float:
    """What is held now (VmRSS) or was at most (VmHWM). By /proc, because getrusage counts the parent's peak in."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated() if kind == "VmRSS" else torch.cuda.max_memory_allocated()
        return held / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**10


def kitti_sweeps(samples: Path) -> list[NDArray[np.float32]]:
    """Full sweeps (N, 4) of the KITTI excerpt, within `SCENE`."""
    folder = samples / "kitti" / "training" / "velodyne"
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        raise UserError(f"{folder}: holds no sweeps (*.bin); name a folder with kitti/, or leave --samples out")
    return [_inside(read_float_rows(path, 4)) for path in paths]


def made_sweeps(num_points: int) -> list[NDArray[np.float32]]:
    """A street seen by a lidar with as many beams as that takes."""
    beams = 32 * math.ceil(num_points / 12000)  # a beam gives about 600 points of 1000 all round
    config = DriveWorldConfig(
        num_frames=1,
        frames_per_sequence=1,
        cache=False,
        image_size=(8, 8),
        beams=beams,
        azimuth_range_deg=360.0,
        elevation_range_deg=(-24.8, 2.0),
    )
    return [_inside(DriveWorld(config)[0].points)]


def _inside(points: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = np.array(SCENE, dtype=np.float32).reshape(2, 3)
    return points[((points[:, :3] >= low) & (points[:, :3] < high)).all(axis=1)]


def thin(sweeps: list[NDArray[np.float32]], size: int) -> NDArray[np.float32]:
    """`size` points of the first sweep, or of as many as that takes one over the other, in random order. The outermost
    points along every axis of the first sweep are among them: the smaller cloud reaches as far.

    Raises:
        UserError: there are not so many points in all.
    """
    pool = sweeps[0]
    for sweep in sweeps[1:]:
        if len(pool) >= size:
            break
        pool = np.concatenate([pool, sweep])
    if len(pool) < size:
        raise UserError(f"--samples: the sweeps hold {len(pool)} points, {size} are asked for; leave --samples out")
    first = sweeps[0][:, :3]
    outermost = np.unique([first.argmin(axis=0), first.argmax(axis=0)])
    rng = np.random.default_rng(0)
    others = np.setdiff1d(np.arange(len(pool)), outermost)
    rows = np.concatenate([outermost, rng.choice(others, size - len(outermost), replace=False)])
    return pool[rng.permutation(rows)]
