"""The comparison of point encoders measures what it says, on the points it says; how long they take is nobody's test."""

import json
import math

import numpy as np
import pytest

from simipu3d.benchmark import encoders
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS
from tools.benchmark import main

COLUMNS = ["encoder", "points", "parameters", "tokens", "step_ms", "memory_mib", "device", "ratio"]


def sweep(seed: int, num: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-60, 60, (num, 4)).astype(np.float32)


def test_every_registered_encoder_has_a_row():
    names = [block["name"] for block in encoders.blocks()]
    assert set(names) == set(POINT_ENCODERS.names())
    assert len({encoders.label(block) for block in encoders.blocks()}) == len(names)
    assert "pointnet2_msg light" in [encoders.label(block) for block in encoders.blocks()]


@pytest.mark.parametrize("size", [10, 300, 1000, 1500])
def test_a_thinned_cloud_reaches_as_far_and_has_every_point_once(size):
    sweeps = [sweep(0, 1000), sweep(1, 1000) * np.float32(0.9)]
    cloud = encoders.thin(sweeps, size)
    assert len(np.unique(cloud, axis=0)) == size
    assert np.array_equal(cloud[:, :3].min(0), sweeps[0][:, :3].min(0))
    assert np.array_equal(cloud[:, :3].max(0), sweeps[0][:, :3].max(0))
    of_first = (cloud[:, None] == sweeps[0][None]).all(2).any(1)
    assert of_first.all() == (size <= 1000)
    with pytest.raises(UserError, match="2000 points, 2001"):
        encoders.thin(sweeps, 2001)


def test_the_command_prints_and_writes_the_table(monkeypatch, tmp_path, capsys):
    """Two encoders, each in a process of its own, on a made street."""
    monkeypatch.setattr(encoders, "blocks", lambda: [{"name": "voxel_backbone8x"}, {"name": "pillar"}])
    file = tmp_path / "encoders.json"
    assert main(["--suite", "encoders", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert [row["points"] for row in rows] == [1024] * 2
    assert rows[0]["ratio"] == 1
    assert rows[1]["ratio"] == pytest.approx(rows[1]["step_ms"] / rows[0]["step_ms"])
    for row in rows:
        assert row["parameters"] > 5e5
        assert 0 < row["tokens"] <= 1024
        assert row["step_ms"] > 0
        assert 1 < row["memory_mib"] < 2000
    assert "voxel_backbone8x"[:6] in capsys.readouterr().out


def test_a_folder_without_sweeps_is_one_line(tmp_path, capsys):
    assert main(["--suite", "encoders", "--quick", "--samples", str(tmp_path)]) == 2
    assert "holds no sweeps" in capsys.readouterr().err


def test_made_sweeps_are_as_large_as_asked():
    assert len(encoders.made_sweeps(30000)[0]) >= 30000


@pytest.mark.slow  # 2 minutes on 2 cores
def test_all_encoders_on_a_real_frame(samples, capsys):
    """The table of one KITTI frame: everything is finite and every parameter gets a gradient, or measuring fails."""
    frame = encoders.kitti_sweeps(samples)[0]
    rows = encoders.measure_size(encoders.thin([frame], 16384), 1)
    with capsys.disabled():
        print("\n" + " ".join(f"{name:>23}" if name == "encoder" else f"{name:>11}" for name in COLUMNS))
        for row in rows:
            values = (f"{v:11.4g}" if isinstance(v, float) else f"{v:>11}" for v in list(row.values())[1:])
            print(f"{row['encoder']:>23}", *values)
    assert len(rows) == len(encoders.blocks())
    assert all(math.isfinite(row["step_ms"]) and row["memory_mib"] > 0 and row["tokens"] > 0 for row in rows)
