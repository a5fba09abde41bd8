"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture
def samples() -> Path:
    """Folder of real KITTI, nuScenes and Waymo excerpts; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SIMIPU3D_SAMPLES") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real samples at {folder}; set SIMIPU3D_SAMPLES to a folder that holds kitti/, nuscenes/, ...")
    return folder


@pytest.fixture(autouse=True)
def deterministic():
    """The package promises repeatable results: an operation that breaks the promise fails its test."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
