"""The shipped KITTI recipes on real frames: full sizes (slow), and frames that are overfitted."""

import csv

import pytest
import torch

from simipu3d.contracts.method import DataInfo
from simipu3d.data.loading.loader import build_reader, make_loader, wants_of
from simipu3d.engine.pretrain import build_method, pretrain
from simipu3d.engine.settings import load_settings


@pytest.mark.slow  # 20 s and 9 GB each on 2 cores
@pytest.mark.parametrize("recipe", ["kitti", "kitti_released"])
@pytest.mark.parametrize("encoder", ["pointnet2_msg", "voxel_backbone8x", "voxel_res_backbone8x"])
def test_the_full_recipe_gives_every_trainable_parameter_a_finite_gradient(samples, recipe, encoder):
    """16384 points, 1024 tokens, ResNet-50, multi-scale images, batch 2."""
    torch.use_deterministic_algorithms(False)  # its filling of fresh memory doubles the time at these sizes
    sets = [f"data.root={samples / 'kitti'}", "data.split=train", "data.batch_size=2", "data.num_workers=0"]
    sets += [f"point_encoder.name={encoder}"] if encoder != "pointnet2_msg" else []
    config = load_settings(f"configs/simipu/{recipe}.yaml", sets)
    reader = build_reader(config.data, wants_of(config.needs))
    method = build_method(config, DataInfo(reader.point_columns, reader.class_names))
    metrics = method(next(iter(make_loader(config.data, config.augment, config.needs, 0, reader=reader))))
    metrics["loss"].backward()
    assert all(torch.isfinite(value) for value in metrics.values())
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.slow  # 2 minutes on 2 cores
def test_real_frames_are_overfitted(samples, tmp_path):
    sets = [f"data.root={samples / 'kitti'}", "trainer.max_steps=60"]
    out = pretrain("configs/simipu/kitti_overfit.yaml", sets, out=tmp_path / "run")
    with open(out / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["intra_top1"]) > 0.9
    assert float(last["inter_top1"]) > 0.9
