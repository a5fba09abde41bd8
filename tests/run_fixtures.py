"""A run of seconds that several test modules share: a pytest plugin."""

import pytest
import torch
import yaml
from helpers import BLOCKS
from tiny_runs import STEPS

from simipu3d.engine.module import TrainingModule
from simipu3d.engine.pretrain import pretrain


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A configuration on the embedded data set: 2.5 epochs of 4 batches."""
    folder = tmp_path_factory.mktemp("tiny")
    data = {
        "name": "drive_world",
        "root": str(folder / "frames"),
        "num_frames": 9,
        "image_size": [32, 64],
        "beams": 16,
        "azimuth_step_deg": 2.0,
        "batch_size": 2,
        "num_workers": 0,
    }
    raw = {
        "method": "simipu",
        "data": data,
        "augment": {"points": {"num_points": 64}, "images": {"brightness": 0.2}},
        **BLOCKS,
        "schedule": {"name": "exponential", "gamma": 0.5},
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1},
        "run": {"checkpoint_every_steps": 3, "pictures_every_steps": 0, "keep_every_epochs": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def one_thread():
    """Results are equal bit for bit at one number of threads, so both sides of a comparison use the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_run(tiny, tmp_path_factory):
    """The uninterrupted run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = pretrain(tiny, out=tmp_path_factory.mktemp("runs") / "whole")
    torch.set_num_threads(before)
    return out


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)` calls `action()` inside the n-th training step that is made from here on."""

    def schedule(number, action):
        calls = [0]
        original = TrainingModule.training_step

        def step(module, batch, batch_idx):
            calls[0] += 1
            if calls[0] == number:
                action()
            return original(module, batch, batch_idx)

        monkeypatch.setattr(TrainingModule, "training_step", step)

    return schedule
