"""Pre-training runs with every point encoder: two steps of each file in configs/encoders, on made streets and real KITTI."""

from pathlib import Path

import pytest
import torch

from simipu3d.data.module import build_reader, make_loader
from simipu3d.engine.optim import build_optimizer
from simipu3d.engine.pretrain import build_method
from simipu3d.engine.settings import load_pretrain_config
from simipu3d.registry import POINT_ENCODERS

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "encoders").glob("*.yaml"))
HIGH = "point_encoder.point_range=[0,-40,-3,70.4,40,9]"
"""What the files with a bounded grid name for made streets, which reach higher than KITTI's recipe."""


def take_two_steps(path: Path, sets: list[str]) -> None:
    """Finite losses, a finite gradient on every trainable parameter in both steps, and weights that move."""
    config = load_pretrain_config(path, [*sets, "data.batch_size=2", "data.num_workers=0", "trainer.max_steps=2"])
    reader = build_reader(config.data)
    method = build_method(config, reader.point_columns)
    optimizer = build_optimizer(method.branches(), config.optim)
    before = {name: p.detach().clone() for name, p in method.point_encoder.named_parameters()}
    batch = next(iter(make_loader(config.data, config.seed, reader=reader)))
    for _ in range(2):
        metrics = method(batch)
        optimizer.zero_grad()
        metrics["loss"].backward()
        assert all(torch.isfinite(value) for value in metrics.values())
        assert metrics["intra_rows"] > 20
        assert metrics["inter_rows"] > 20
        for name, parameter in method.named_parameters():
            assert parameter.requires_grad, name
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            # A bias before BatchNorm has zero gradient by nature, and so has a ResNet's branch that starts at zero.
            if name.startswith("point_encoder.") and not name.endswith("bias"):
                assert parameter.grad.abs().max() > 0, name
        optimizer.step()
    moved = [name for name, p in method.point_encoder.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)


def test_every_point_encoder_has_a_configuration():
    names = {load_pretrain_config(path).blocks.point_encoder.name for path in CONFIGS}
    assert names == {
        name for name in POINT_ENCODERS.names() if POINT_ENCODERS[name].target.__module__.startswith("simipu3d.")
    }


@pytest.fixture(scope="module")
def streets(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("streets")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_on_made_streets(path, streets):
    """Few points, a narrow ResNet-18 and few tokens: the point encoder's layers are as configured."""
    torch.use_deterministic_algorithms(False)  # its filling of fresh memory doubles the time at these sizes
    sets = ["data.name=drive_world", f"data.root={streets}", "data.num_frames=2", "data.beams=32"]
    sets += ["data.augment.images.resize=null", "data.augment.num_points=512"]
    sets += ["image_encoder.name=resnet18", "image_encoder.model_args={channels: [8, 12, 16, 20]}"]
    keys = set(POINT_ENCODERS[load_pretrain_config(path).blocks.point_encoder.name].config.model_fields)
    sets += [HIGH] if "point_range" in keys and "unet" not in path.stem else []
    sets += ["point_encoder.num_tokens=256"] if "num_tokens" in keys else []
    take_two_steps(path, sets)


@pytest.mark.slow  # half a minute each on 2 cores
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_on_real_kitti(path, samples):
    """The configuration as it stands, but for the size of the pictures."""
    torch.use_deterministic_algorithms(False)  # as above
    sets = [f"data.root={samples / 'kitti'}", "data.split=train"]
    sets += ["data.augment.images.long_edge=[640,640]", "data.augment.images.short_edge=[192,192]"]
    take_two_steps(path, sets)
