"""Checkpoints of point encoders as a run writes them, with random weights and statistics; several tests share them."""

from pathlib import Path

import torch
from torch import nn

from simipu3d.config import parse_part, to_plain
from simipu3d.registry import POINT_ENCODERS

VOXEL, RES = {"name": "voxel_backbone8x"}, {"name": "voxel_res_backbone8x"}
_DEPTHS = [1, 1, 1, 1, 1, 1, 1, 1]
UNET = {
    "name": "sparse_unet34",
    "planes": [8, 8, 12, 16, 12, 8, 8, 6],
    "layers": _DEPTHS,
    "stem_channels": 8,
    "out_channels": 5,
}
FLAT_UNET = UNET | {"planes": [8, 8, 8, 8, 12, 8, 8, 6], "layers": [2, *_DEPTHS[1:]], "stem_kernel": 5}


def _layer(**changes):
    layer = {"sampler": "d_fps", "num_points": 96, "radii": [0.7, 1.4], "num_samples": [6, 12]}
    return layer | {"mlps": [[8, 12], [8, 16]], "aggregation": None} | changes


BALLS = {"name": "pointnet2_msg", "neighbourhood": "ball", "layers": [_layer(), _layer(num_points=32)]}
SINGLE = {"name": "pointnet2_ssg", "num_points": [96, 32], "radii": [0.8, 2.0], "num_samples": [8, 8]}
SINGLE |= {"mlps": [[8, 12], [8, 16]]}
SHELLS = {
    "name": "pointnet2_msg",
    "use_xyz": False,
    "ffps_range": 48,
    "layers": [_layer(aggregation=20), _layer(num_points=48, sampler="fs"), _layer(num_points=16, sampler="split")],
}


def random_encoder(block, columns=("x", "y", "z", "intensity"), seed=0):
    """A registered encoder in eval mode; every tensor is random, some variances are small."""
    torch.manual_seed(seed)
    config = parse_part("point_encoder", POINT_ENCODERS, block)
    encoder = POINT_ENCODERS[config.name].target(config, point_columns=columns)
    return randomise(encoder).eval(), config


def randomise(network):
    """Random BatchNorms and biases, in place."""
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.002, 1.0)
            module.num_batches_tracked.fill_(7)
    return network


def write_point_checkpoint(path: Path, block, columns=("x", "y", "z", "intensity"), seed=0):
    """The checkpoint of a run with this point encoder; returns the encoder."""
    encoder, config = random_encoder(block, columns, seed)
    state = {f"method.point_encoder.{name}": value for name, value in encoder.state_dict().items()}
    state["method.image_encoder.trunk.conv1.weight"] = torch.zeros(3)
    resolved = {"method": "simipu", "point_encoder": to_plain(config), "data": {"name": "kitti", "split": "train"}}
    run = {"config": resolved, "version": "0.1.0", "git_commit": "abc", "epoch": 3, "global_step": 30}
    run |= {"method": "simipu", "point_columns": list(columns)}
    torch.save({"state_dict": state, "simipu3d": run}, path)
    return encoder
