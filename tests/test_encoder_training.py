"""Pre-training runs with every point encoder: two steps of each file in configs/encoders, on made streets and real KITTI."""

from pathlib import Path

import pytest
import torch
from helpers import make_view

from simipu3d.config import parse_part
from simipu3d.contracts.method import DataInfo
from simipu3d.data.loading.loader import build_reader, make_loader, wants_of
from simipu3d.engine.optim import build_optimizer
from simipu3d.engine.pretrain import build_method
from simipu3d.engine.settings import load_settings
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "encoders").glob("*.yaml"))
HIGH = "point_encoder.point_range=[0,-40,-3,70.4,40,9]"
"""What the files with a bounded grid name for made streets, which reach higher than KITTI's recipe."""


def take_two_steps(path: Path, sets: list[str]) -> None:
    """Finite losses, a finite gradient on every trainable parameter in both steps, and weights that move."""
    config = load_settings(path, [*sets, "data.batch_size=2", "data.num_workers=0", "trainer.max_steps=2"])
    reader = build_reader(config.data, wants_of(config.needs))
    method = build_method(config, DataInfo(reader.point_columns, reader.class_names))
    optimizer = build_optimizer(method.branches(), config.optim)
    before = {name: p.detach().clone() for name, p in method.point_encoder.named_parameters()}
    batch = next(iter(make_loader(config.data, config.augment, config.needs, config.seed, reader=reader)))
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
    names = {load_settings(path).blocks.point_encoder.name for path in CONFIGS}
    assert names == {
        name for name in POINT_ENCODERS.names() if POINT_ENCODERS[name].target.__module__.startswith("simipu3d.")
    }


BOUNDED = ("pillar", "voxel_backbone8x", "voxel_res_backbone8x")
SIMIPU = CONFIGS[0].parents[1] / "simipu"
BOXES = {
    "kitti": (0, -40, -3, 70.4, 40, 1),
    "nuscenes": (-51.2, -51.2, -5, 51.2, 51.2, 3),
    "waymo": (0, -40, -2, 75.2, 40, 4),
}
BOXES["mixed"] = (-51.2, -51.2, -5, 75.2, 51.2, 4)
"""Metres that the recipes read; of the mixture, the box round all three."""


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("recipe", BOXES)
def test_an_encoder_named_in_a_recipe_has_the_bounds_of_its_data(recipe, name):
    """One word swaps the encoder; with another data set's bounds it would see four in ten points of nuScenes."""
    encoder = load_settings(SIMIPU / f"{recipe}.yaml", [f"point_encoder.name={name}"])
    assert encoder.blocks.point_encoder.point_range == BOXES[recipe]
    assert tuple(encoder.to_plain()["point_encoder"]["point_range"]) == BOXES[recipe]
    said = [f"point_encoder={{name: {name}, point_range: [0, 0, 0, 16, 16, 8]}}"]
    own = load_settings(SIMIPU / f"{recipe}.yaml", said)
    assert own.blocks.point_encoder.point_range == (0, 0, 0, 16, 16, 8)


def test_encoders_without_bounds_and_data_without_range_stay_as_they_are():
    own = load_settings(SIMIPU / "nuscenes.yaml", ["point_encoder.name=sparse_unet34"])
    assert own.blocks.point_encoder.point_range is None
    for recipe, sets in (("nuscenes", ["data.point_range=null"]), ("demo", [])):
        config = load_settings(SIMIPU / f"{recipe}.yaml", ["point_encoder.name=pillar", *sets])
        assert config.blocks.point_encoder.point_range == BOXES["kitti"]
    with pytest.raises(UserError, match=r"whole number of pillars.*data\.point_range") as error:
        load_settings(
            SIMIPU / "nuscenes.yaml", ["point_encoder.name=pillar", "data.point_range=[-50.01,-50,-5,50,50,3]"]
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_range_that_does_not_fit_the_points_is_told_once(name, caplog):
    config = parse_part("point_encoder", POINT_ENCODERS, {"name": name, "point_range": [0, 0, -2, 8, 8, 6]})
    torch.manual_seed(0)
    inside = torch.rand(200, 4) * 8 - torch.tensor([0.0, 0.0, 2.0, 0.0])
    for shift, told in ((0.0, 0), (8.0, 1)):
        caplog.clear()
        encoder = POINT_ENCODERS[name].target(config)
        moved = inside + torch.tensor([0.0, shift, 0.0, 0.0]) * (torch.arange(200) % 10 < 9)[:, None]
        encoder.eval()(make_view(moved))
        assert not caplog.records
        for _ in range(2):
            encoder.train()(make_view(moved))
        assert len(caplog.records) == told
        assert not told or "90 % of the points" in caplog.text


@pytest.fixture(scope="module")
def streets(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("streets")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_on_made_streets(path, streets):
    """Few points, a narrow ResNet-18 and few tokens: the point encoder's layers are as wide and deep as configured."""
    torch.use_deterministic_algorithms(False)  # its filling of fresh memory doubles the time at these sizes
    sets = ["data.name=drive_world", f"data.root={streets}", "data.num_frames=2", "data.beams=32"]
    sets += ["augment.images.resize=null", "augment.points.num_points=512"]
    sets += ["image_encoder.name=resnet18", "image_encoder.model_args={channels: [8, 12, 16, 20]}"]
    keys = set(POINT_ENCODERS[load_settings(path).blocks.point_encoder.name].config.model_fields)
    sets += [HIGH] if "point_range" in keys and "unet" not in path.stem else []
    sets += ["point_encoder.num_tokens=256"] if "num_tokens" in keys else []
    sets += ["point_encoder.num_points=[256,128,64]"] if "num_points" in keys else []
    take_two_steps(path, sets)


@pytest.mark.slow  # half a minute each on 2 cores
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_on_real_kitti(path, samples):
    """The configuration as it stands, but for the size of the pictures."""
    torch.use_deterministic_algorithms(False)  # as above
    sets = [f"data.root={samples / 'kitti'}", "data.split=train"]
    sets += ["augment.images.long_edge=[640,640]", "augment.images.short_edge=[192,192]"]
    take_two_steps(path, sets)
