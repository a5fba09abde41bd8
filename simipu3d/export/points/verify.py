"""Does the written file give a target's point network the features that were trained?

The file is read back, loaded into a peer (the target's network written anew, `peers/`), and the same input goes through
both. Voxel networks and U-Nets get a few thousand voxels in two scenes of odd sizes, PointNet++ two clouds.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from simipu3d.contracts.batch import PointView
from simipu3d.encoders.pointnet2 import PointNet2MSG
from simipu3d.encoders.sparse import SparseTensor
from simipu3d.encoders.sparse_unet import SparseUNet
from simipu3d.encoders.voxel_backbone import VoxelBackbone8x, VoxelResBackbone8x
from simipu3d.export.image.verify import TOLERANCE, ExportError, largest_difference
from simipu3d.export.peers.sparse import Grid, PeerTensor, triple
from simipu3d.export.points.convert import Converted, PointJob
from simipu3d.ops.backend import offsets_from_batch_index
from simipu3d.weights.files import some_names

SHAPE = (29, 47, 53)
"""Cells along z, y, x: odd at every level."""


def load_peer(peer: nn.Module, tensors: dict[str, Tensor], fresh: tuple[str, ...]) -> list[str]:
    """Load what was read back; returns the target's names that the file does not hold.

    Args:
        peer: the target's network.
        tensors: of the file, without prefix.
        fresh: beginnings of the names that may be missing.

    Raises:
        ExportError: a name or shape is unknown to the target, one is missing that may not be, or nothing arrived.
    """
    expected = peer.state_dict()
    if not tensors:
        raise ExportError("none of the file's tensors stands under the prefix that the target looks for")
    unknown = [name for name in tensors if name not in expected]
    missing = [name for name in expected if name not in tensors]
    lost = [name for name in missing if not name.startswith(fresh or ("\n",))]
    if unknown or lost:
        raise ExportError(
            f"the names do not fit the target; missing: {some_names(lost)}; unknown to it: {some_names(unknown)}"
        )
    wrong = [
        f"{name} {tuple(value.shape)} (the target has {tuple(expected[name].shape)})"
        for name, value in tensors.items()
        if value.shape != expected[name].shape
    ]
    if wrong:
        raise ExportError(f"shapes do not fit the target: {some_names(wrong)}")
    peer.load_state_dict(tensors, strict=False)
    return missing


def random_voxels() -> SparseTensor:
    """The same 3,400 voxels every time, in two scenes, without features."""
    generator = torch.Generator().manual_seed(21)
    num_cells = SHAPE[0] * SHAPE[1] * SHAPE[2]
    cells = []
    for scene, count in enumerate((2000, 1400)):
        near = torch.randperm(num_cells // 3, generator=generator)[:count].sort().values
        z, y, x = near // (SHAPE[1] * SHAPE[2]), near // SHAPE[2] % SHAPE[1], near % SHAPE[2]
        cells.append(torch.stack([torch.full_like(z, scene), z + SHAPE[0] // 2 * scene, y, x], dim=1))
    voxel_bzyx = torch.cat(cells)
    return SparseTensor(torch.zeros(len(voxel_bzyx), 0), voxel_bzyx, SHAPE, 2)


def voxel_columns(job: PointJob, x: SparseTensor) -> Tensor:
    """(V, C) what the voxels would hold in the middle of the run's range: x, y, z in metres, then 0..1."""
    low, high = torch.tensor(job.config.point_range).view(2, 3)
    size = torch.tensor(job.config.voxel_size)
    place = torch.rand(len(x), len(job.columns), generator=torch.Generator().manual_seed(25))
    cells = x.voxel_bzyx[:, 1:].flip(1)
    place[:, :3] = (low + high) / 2 + (cells + place[:, :3] - torch.tensor(SHAPE[::-1]) / 2) * size
    return place


def target_columns(job: PointJob, features: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(V, C) columns as the run gets them and as the target feeds them; `first` is the first one's place in the points.

    What the target has more is noise, what it lacks is 0 for the run.
    """
    own, num = features.clone(), job.channels - first
    if num < own.shape[1]:
        own[:, num:] = 0
    given = own.clone()
    if job.intensity_scale != 1:
        given[:, job.columns.index("intensity") - first] *= job.intensity_scale
    generator = torch.Generator().manual_seed(22)
    noise = torch.rand(len(own), max(num - own.shape[1], 0), generator=generator)
    return own, torch.cat([given[:, :num], noise], dim=1)


def to_peer(x: SparseTensor, features: Tensor, axes: str) -> PeerTensor:
    """Our voxels as the target feeds them."""
    cells, shape = x.voxel_bzyx, x.spatial_shape
    if axes == "xyz":
        cells, shape = cells[:, [0, 3, 2, 1]], shape[::-1]
    order = _rising(cells)
    return PeerTensor(features.index_select(0, order), Grid(cells.index_select(0, order), triple(shape), x.batch_size))


def _rising(cells: Tensor) -> Tensor:
    weights = torch.tensor([1 << 48, 1 << 32, 1 << 16, 1])
    return (cells * weights).sum(1).argsort()


def compare_sparse(wanted: Iterable[SparseTensor], given: Iterable[PeerTensor], axes: str) -> tuple[float, int]:
    """Largest relative difference over all outputs, and their number.

    Raises:
        ExportError: other sites, or features that differ by more than `TOLERANCE`.
    """
    worst, count = 0.0, 0
    for number, (own, other) in enumerate(zip(wanted, given, strict=True), start=1):
        cells = other.grid.cells if axes == "zyx" else other.grid.cells[:, [0, 3, 2, 1]]
        order = _rising(cells)
        if not torch.equal(cells.index_select(0, order), own.voxel_bzyx):
            raise ExportError(f"output {number} stands at other sites in the target")
        features = other.features.index_select(0, order)
        worst = max(worst, largest_difference(own.features, features, f"output {number}"))
        count = number
    return worst, count


def check_voxel(job: PointJob, converted: Converted, peer: nn.Module, axes: str) -> dict[str, Any]:
    """Every layer of a voxel encoder, and its bird's-eye-view map where the run has one."""
    encoder, x = job.encoder, random_voxels()
    assert isinstance(encoder, VoxelBackbone8x | VoxelResBackbone8x)
    own, given = target_columns(job, voxel_columns(job, x), 0)
    layers = [encoder.conv_input, *encoder.conv1, *encoder.conv2, *encoder.conv3, *encoder.conv4]
    layers += [] if encoder.conv_out is None else [encoder.conv_out]
    wanted, y = [], x.with_features(own)
    for layer in layers:
        y = layer(y)
        wanted.append(y)
    worst, count = compare_sparse(wanted, peer(to_peer(x, given, axes), len(layers)), axes)
    return _result(worst, f"{count} layers of {len(x)} voxels in two scenes on a {SHAPE} grid")


def check_unet(job: PointJob, converted: Converted, peer: nn.Module, axes: str) -> dict[str, Any]:
    """Stem, stages down, stages up and last layer of a sparse U-Net, as far as the file goes."""
    encoder, depth = job.encoder, converted.depth
    assert isinstance(encoder, SparseUNet)
    assert depth is not None
    x = random_voxels()
    # The grid of SR-UNet is a multiple of 16; cells in it lie where they lie.
    x = SparseTensor(x.features, x.voxel_bzyx, tuple(-(-size // 16) * 16 for size in SHAPE), 2)
    own = 0.5 + torch.rand(len(x), job.config.in_channels, generator=torch.Generator().manual_seed(25))
    own[:, job.channels :] = 0
    noise = torch.rand(len(x), max(job.channels - own.shape[1], 0), generator=torch.Generator().manual_seed(23))
    given = to_peer(x, torch.cat([own[:, : job.channels], noise], dim=1), axes)
    outputs = _unet_outputs(encoder, x.with_features(own), depth)
    worst, count = compare_sparse(outputs, peer(given, depth), axes)
    return _result(worst, f"{count} outputs of {len(x)} voxels in two scenes on a {SHAPE} grid")


def _unet_outputs(encoder: SparseUNet, x: SparseTensor, depth: int) -> list[SparseTensor]:
    levels = encoder.encode(x)
    if depth < 10:
        return levels[:depth]
    outputs: list[SparseTensor] = []
    stages = [getattr(encoder, f"dec{number}") for number in range(1, 5)]
    last: list[Tensor] = []
    hooks = [stage.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for stage in stages]
    hooks.append(encoder.final.register_forward_hook(lambda _m, _i, output: last.append(output)))
    try:
        encoder.decode(levels)
    finally:
        for hook in hooks:
            hook.remove()
    return [*levels, *outputs, outputs[-1].with_features(last[0])]


def check_pointnet(job: PointJob, converted: Converted, peer: nn.Module, axes: str) -> dict[str, Any]:
    """Every set abstraction layer, on two clouds; centres are those that the run's samplers choose."""
    encoder = job.encoder
    assert isinstance(encoder, PointNet2MSG)
    num = job.config.abstractions[0].num_points * 5 // 4 + 37
    generator = torch.Generator().manual_seed(24)
    # On a grid of 1/256 m squared distances are exact, so that both sides agree on who is inside a shell.
    xyz = (torch.rand(2 * num, 3, generator=generator) * torch.tensor([10.0, 8.0, 3.0]) * 256).floor() / 256
    own, given = target_columns(job, torch.rand(2 * num, len(job.columns) - 3, generator=generator), 3)
    batch = torch.arange(2).repeat_interleave(num)
    view = PointView(torch.cat([xyz, own], 1), batch, torch.arange(2 * num), torch.eye(4).expand(2, 4, 4))
    features, rows = _pointnet_outputs(encoder, view)
    theirs = peer(xyz.view(2, num, 3), given.view(2, num, -1), rows)
    worst = 0.0
    for number, (wanted, other) in enumerate(zip(features, theirs, strict=True), start=1):
        worst = max(worst, largest_difference(wanted, other.flatten(0, 1), f"layer {number}"))
    return _result(worst, f"{len(features)} layers on two clouds of {num} points, centres as the run chose them")


def _pointnet_outputs(encoder: PointNet2MSG, view: PointView) -> tuple[list[Tensor], list[Tensor]]:
    """Features of every layer, and its centres' rows (B, M) in their scene."""
    xyz, features = view.points[:, :3], view.points[:, 3:]
    offsets = offsets_from_batch_index(view.batch_index, view.num_frames).cpu()
    outputs, chosen = [], []
    for abstraction, aggregation in zip(encoder.SA_modules, encoder.aggregation_mlps, strict=True):
        rows, after, features = abstraction(xyz, features, offsets)
        features = aggregation(features)
        chosen.append(rows.view(view.num_frames, -1) - offsets[:-1, None])
        outputs.append(features)
        xyz, offsets = xyz.index_select(0, rows), after
    return outputs, chosen


def _result(worst: float, on: str) -> dict[str, Any]:
    return {
        "compared": "outputs of the pre-training network and of the file read back into the target's network, written "
        "anew",
        "on": on,
        "built_with": "simipu3d.export.peers",
        "largest_relative_difference": worst,
        "tolerance": TOLERANCE,
    }


CHECKS = {
    "voxel_backbone8x": check_voxel,
    "voxel_res_backbone8x": check_voxel,
    "pointnet2_msg": check_pointnet,
    "pointnet2_ssg": check_pointnet,
    "sparse_unet34": check_unet,
}
"""Which comparison an encoder gets."""
