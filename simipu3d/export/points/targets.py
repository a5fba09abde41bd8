"""Which point networks of which project can an encoder become, and what does a user write in the configuration there?

A target has one file structure and several networks; a network says which of our encoders it takes, how their tensors
are converted, and which peer checks the file. The table is `POINT_TARGETS`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from simipu3d.encoders.strided_backbone import StridedBackbone
from simipu3d.errors import UserError
from simipu3d.export.peers import pointnet, unet, voxel
from simipu3d.export.points import convert as to
from simipu3d.export.points.convert import Converted, PointJob
from simipu3d.weights import foreign_names as names
from simipu3d.weights.files import some_names


@dataclass(frozen=True)
class PointNetwork:
    """One network of a target.

    Attributes:
        encoder: the registered name of ours that it is made from.
        prefix: where the target's detectors have it.
        layouts: of sparse weights that the target reads, the default first; empty where there are none.
        axes: order in which the target feeds its sites.
        convert: (job) to its tensors.
        peer: (job) the target's network, freshly written.
        usage: (job) lines for the configuration.
        has_bias: whether it can have biases in its residual blocks (--no-bias asks for the variant without).
    """

    encoder: str
    prefix: str
    layouts: tuple[str, ...]
    axes: str
    convert: Callable[[PointJob], Converted]
    peer: Callable[[PointJob], nn.Module]
    usage: Callable[[PointJob], list[str]]
    has_bias: bool = False


@dataclass(frozen=True)
class PointTarget:
    """One project.

    Attributes:
        checked_with: version that the rules were read from.
        key: below which the tensors stand in a file.
        networks: by name; the first that takes an encoder is the default.
        prefix_rule: what a prefix has to look like.
        prefix_help: the same in words.
    """

    checked_with: str
    key: str
    networks: dict[str, PointNetwork]
    prefix_rule: str
    prefix_help: str

    def network_for(self, encoder: str, asked: str | None, target: str) -> tuple[str, PointNetwork]:
        """The network that the user means.

        Raises:
            UserError: there is none of that name, or none that takes this encoder.
        """
        fitting = [name for name, network in self.networks.items() if network.encoder == encoder]
        if not fitting:
            known = "; ".join(f"{name} from {network.encoder}" for name, network in self.networks.items())
            raise UserError(f"--to {target}: has no network for the point encoder {encoder}; it has {known}")
        if asked is not None and asked not in fitting:
            raise UserError(f"--network {asked}: {target} takes {encoder} as {', '.join(fitting)}")
        name = asked or fitting[0]
        return name, self.networks[name]

    def check_prefix(self, prefix: str) -> None:
        """Raise UserError for a prefix that the target has no place for."""
        if not re.fullmatch(self.prefix_rule, prefix):
            raise UserError(f"--prefix {prefix}: expected {self.prefix_help}")


# ------------------------------------------------------------------------------------------------------- voxel networks


def _voxel_peer(job: PointJob, layer_names: list[str], *, bias: bool = False, axes: str = "zyx") -> voxel.PeerEncoder:
    residual = job.name == "voxel_res_backbone8x"
    style = voxel.Style(residual, job.layout, bias=bias, axes=axes, last_pad=job.config.last_pad)
    return voxel.PeerEncoder(layer_names, style, job.channels)


def _openpcdet_peer(job: PointJob) -> voxel.PeerEncoder:
    residual = job.name == "voxel_res_backbone8x"
    layer_names = voxel.OPENPCDET_RESIDUAL if residual else voxel.OPENPCDET_PLAIN
    return _voxel_peer(job, layer_names, bias=residual and job.bias)


def _unet_v2_peer(job: PointJob) -> voxel.PeerEncoder:
    return voxel.add_unet_decoder(_openpcdet_peer(job), job.layout)


def _unet_v2(job: PointJob) -> Converted:
    converted = to.convert_voxel(job, names.same_name)
    decoder = ("conv_up_", "inv_conv", "conv5.")
    return Converted(converted.tensors, converted.notes, [], (*converted.fresh, *decoder))


def _grid_lines(job: PointJob) -> list[str]:
    config = job.config
    return [f"# points {', '.join(job.columns)}; range {list(config.point_range)}, voxels {list(config.voxel_size)} m"]


def _use_openpcdet(job: PointJob, network: str) -> list[str]:
    bias = "" if job.bias or job.name != "voxel_res_backbone8x" else ", USE_BIAS: False"
    bias += f", last_pad: {job.config.last_pad}" if job.config.last_pad else ""
    return [
        f"MODEL.BACKBONE_3D: {{NAME: {network}{bias}}}",
        f"python tools/train.py --cfg_file CFG --pretrained_model {job.out}   # look for 'Done (loaded a/b)' in its log",
        *_grid_lines(job),
        f"# the detector has to feed {job.channels} columns; with another number its first layer stays random, silently",
    ]


def _use_openpcdet_pointnet(job: PointJob) -> list[str]:
    layers = job.config.abstractions
    return [
        "MODEL.BACKBONE_3D.NAME: PointNet2MSG",
        f"SA_CONFIG.NPOINTS: {[la.num_points for la in layers]}, RADIUS: {[list(la.radii) for la in layers]},",
        f"  NSAMPLE: {[list(la.num_samples) for la in layers]}, MLPS: {[[list(w) for w in la.mlps] for la in layers]}",
        f"python tools/train.py --cfg_file CFG --pretrained_model {job.out}   # look for 'Done (loaded a/b)' in its log",
        "# FP_MLPS as you like: feature propagation starts fresh",
    ]


def _mmdet3d_voxel(job: PointJob, rename: names.Rename, turned: bool = False) -> Converted:
    if job.config.last_pad:
        raise UserError(
            f"--to mmdet3d: the run has point_encoder.last_pad: {job.config.last_pad}; conv_out has no padding there, and "
            "its map would be another; --to openpcdet has it"
        )
    return to.convert_voxel(job, rename, turned=turned)


def _use_mmdet3d_voxel(job: PointJob, network: str) -> list[str]:
    residual = job.name == "voxel_res_backbone8x"
    assert isinstance(job.encoder, StridedBackbone)
    nz, ny, nx = job.encoder.sparse_shape
    shape = [nx, ny, nz] if network.startswith("BEVFusion") else [nz, ny, nx]
    part = job.prefix.split(".")[-2]
    lines = [f"{part}=dict(type='{network}', in_channels={job.channels}, sparse_shape={shape},"]
    if residual:
        last = "(1, 1, 0)" if network.startswith("BEVFusion") else "(0, 1, 1)"
        lines += [
            "  block_type='basicblock', encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),",
            f"  encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, {last}), (0, 0)), order=('conv', 'norm', 'act'),",
        ]
    else:
        lines.append("  order=('conv', 'norm', 'act'),")
    lines += [
        f"  init_cfg=dict(type='Pretrained', checkpoint='{job.out}', prefix='{job.prefix}'))",
        f"or, for the whole detector: load_from = '{job.out}'",
        *_grid_lines(job),
    ]
    return lines


# ----------------------------------------------------------------------------------------------------------- PointNet++


def _pointnet_peer(job: PointJob, project: str, eps: float) -> nn.Module:
    config, layers = job.config, []
    for layer in config.abstractions:
        inner = (0.0, *layer.radii[:-1]) if config.neighbourhood == "annulus" else (0.0,) * len(layer.radii)
        shells = tuple(zip(inner, layer.radii, layer.num_samples, strict=True))
        layers.append(pointnet.Layer(shells, layer.mlps, layer.aggregation))
    return pointnet.PeerPointNet(project, layers, job.channels - 3, config.use_xyz, eps)


def _openpcdet_pointnet(job: PointJob) -> Converted:
    to.check_plain_pointnet(job)
    return to.convert_pointnet(job, names.openpcdet_pointnet, 1e-5, bias=False)


def _mmdet3d_pointnet(job: PointJob, eps: float) -> Converted:
    converted = to.convert_pointnet(job, names.same_name, eps, bias=True)
    return Converted(converted.tensors, converted.notes)


_SAMPLERS = {"d_fps": "'D-FPS'", "f_fps": "'F-FPS'", "fs": "'FS'", "split": "('F-FPS', 'D-FPS')"}


def _use_mmdet3d_pointnet(job: PointJob, eps: float) -> list[str]:
    config = job.config
    layers, part = config.abstractions, job.prefix.split(".")[-2]
    ranges = ", ".join(f"({config.ffps_range}, -1)" if la.sampler == "split" else "-1" for la in layers)
    counts = [(la.num_points,) * 2 if la.sampler == "split" else la.num_points for la in layers]
    aggregation = tuple(la.aggregation for la in layers)
    dilated = tuple(config.neighbourhood == "annulus" for _ in layers)
    lines = [
        f"{part}=dict(type='PointNet2SAMSG', in_channels={job.channels}, num_points={tuple(counts)},",
        f"  radii={tuple(la.radii for la in layers)}, num_samples={tuple(la.num_samples for la in layers)},",
        f"  sa_channels={tuple(la.mlps for la in layers)},",
        f"  aggregation_channels={aggregation}, dilated_group={dilated},",
        f"  fps_mods=({', '.join(_SAMPLERS[la.sampler] for la in layers)},), fps_sample_range_lists=({ranges},),",
        f"  out_indices=({len(layers) - 1},), norm_cfg=dict(type='BN2d', eps={eps:g}, momentum=0.1),",
        f"  sa_cfg=dict(type='PointSAModuleMSG', pool_mod='max', use_xyz={config.use_xyz}, normalize_xyz=False),",
        f"  init_cfg=dict(type='Pretrained', checkpoint='{job.out}', prefix='{job.prefix}'))",
    ]
    return lines


# -------------------------------------------------------------------------------------------------------- sparse U-Nets


def _minkowski_peer(job: PointJob) -> nn.Module:
    config = job.config
    stem = (config.stem_channels, config.stem_kernel)
    return unet.MinkowskiUNet(job.channels, config.out_channels, stem, config.widths, config.depths)


def _use_minkowski(job: PointJob) -> list[str]:
    config = job.config
    return [
        f"net = Res16UNet34C(in_channels={job.channels}, out_channels={config.out_channels}, config, D=3)"
        f"  # PLANES {tuple(config.widths)}, LAYERS {tuple(config.depths)}, conv1_kernel_size {config.stem_kernel}",
        f"net.load_state_dict(torch.load('{job.out}', weights_only=True)['state_dict'])",
        "# PointContrast's downstream: pretraining=FILE; leave final.* out where the number of classes differs",
    ]


def _pointcept_peer(job: PointJob) -> nn.Module:
    config = job.config
    return unet.PointceptUNet(job.channels, config.out_channels, config.stem_channels, config.widths, config.depths)


def _use_pointcept(job: PointJob) -> list[str]:
    config = job.config
    return [
        f"backbone=dict(type='SpUNet-v1m1', in_channels={job.channels}, num_classes={config.out_channels},",
        f"  base_channels={config.stem_channels}, channels={tuple(config.widths)}, layers={tuple(config.depths)})",
        f"weight='{job.out}'  # names begin with {job.prefix or 'nothing'}; --prefix module.backbone. for a DefaultSegmentorV2",
    ]


# ------------------------------------------------------------------------------------------------------------ the table

_SPCONV = ("spconv2", "spconv1")
_MM = ("spconv1",)
_RESIDUAL_MM = partial(_voxel_peer, layer_names=voxel.MMDET3D_RESIDUAL, bias=False)
_TURNED_MM = partial(_voxel_peer, layer_names=voxel.MMDET3D_RESIDUAL, bias=False, axes="xyz")
_PLAIN = partial(to.convert_voxel, rename=names.same_name)
_TO_MM_RESIDUAL = partial(_mmdet3d_voxel, rename=names.mmdet3d_residual)


def _use(function: Callable[[PointJob, str], list[str]], network: str) -> Callable[[PointJob], list[str]]:
    return lambda job: function(job, network)


def _openpcdet_network(encoder: str, name: str, convert: Callable[[PointJob], Converted] = _PLAIN) -> PointNetwork:
    peer = _unet_v2_peer if name == "UNetV2" else _openpcdet_peer
    has_bias = encoder == "voxel_res_backbone8x"
    return PointNetwork(encoder, "backbone_3d.", _SPCONV, "zyx", convert, peer, _use(_use_openpcdet, name), has_bias)


def _mmdet3d_network(
    encoder: str, name: str, convert: Callable[[PointJob], Converted], peer: Callable[[PointJob], nn.Module], axes: str
) -> PointNetwork:
    use = _use(_use_mmdet3d_voxel, name)
    return PointNetwork(encoder, "pts_middle_encoder.", _MM, axes, convert, peer, use)


def _openpcdet_msg(encoder: str) -> PointNetwork:
    peer = partial(_pointnet_peer, project="openpcdet", eps=1e-5)
    return PointNetwork(encoder, "backbone_3d.", (), "", _openpcdet_pointnet, peer, _use_openpcdet_pointnet)


def _mmdet3d_msg(encoder: str, eps: float) -> PointNetwork:
    """`eps` is what the printed configuration says: 1e-3 as SimIPU and 3DSSD have, 1e-5 where the run has torch's."""
    convert, peer = partial(_mmdet3d_pointnet, eps=eps), partial(_pointnet_peer, project="mmdet3d", eps=eps)
    return PointNetwork(encoder, "backbone.", (), "", convert, peer, partial(_use_mmdet3d_pointnet, eps=eps))


POINT_TARGETS = {
    "openpcdet": PointTarget(
        "8cacccec (2024-04)",
        "model_state",
        {
            "VoxelBackBone8x": _openpcdet_network("voxel_backbone8x", "VoxelBackBone8x"),
            "UNetV2": _openpcdet_network("voxel_backbone8x", "UNetV2", _unet_v2),
            "VoxelResBackBone8x": _openpcdet_network("voxel_res_backbone8x", "VoxelResBackBone8x"),
            "PointNet2MSG": _openpcdet_msg("pointnet2_msg"),
            "PointNet2MSG-one-ball": _openpcdet_msg("pointnet2_ssg"),
        },
        r"backbone_3d\.",
        "backbone_3d., the place of every 3D backbone in OpenPCDet",
    ),
    "mmdet3d": PointTarget(
        "1.x fe25f7a, mmengine 0.10.7",
        "state_dict",
        {
            "SparseEncoder": _mmdet3d_network(
                "voxel_backbone8x",
                "SparseEncoder",
                partial(_mmdet3d_voxel, rename=names.mmdet3d_plain),
                partial(_voxel_peer, layer_names=voxel.MMDET3D_PLAIN),
                "zyx",
            ),
            "SparseEncoder-basicblock": _mmdet3d_network(
                "voxel_res_backbone8x", "SparseEncoder", _TO_MM_RESIDUAL, _RESIDUAL_MM, "zyx"
            ),
            "BEVFusionSparseEncoder": _mmdet3d_network(
                "voxel_res_backbone8x",
                "BEVFusionSparseEncoder",
                partial(_TO_MM_RESIDUAL, turned=True),
                _TURNED_MM,
                "xyz",
            ),
            "PointNet2SAMSG": _mmdet3d_msg("pointnet2_msg", 1e-3),
            "PointNet2SAMSG-one-ball": _mmdet3d_msg("pointnet2_ssg", 1e-5),
        },
        r"([A-Za-z_]\w*\.)+",
        "the detector's name of its encoder with a dot, as middle_encoder., pts_middle_encoder. or backbone.",
    ),
    "pointcept": PointTarget(
        "10b7490 (SpUNet-v1m1)",
        "state_dict",
        {
            "SpUNet-v1m1": PointNetwork(
                "sparse_unet34", "", ("spconv2",), "xyz", to.convert_pointcept, _pointcept_peer, _use_pointcept
            )
        },
        r"([A-Za-z_]\w*\.)*",
        "nothing, or names with a dot, as module.backbone.",
    ),
    "minkowski": PointTarget(
        "PointContrast's Res16UNet, MinkowskiEngine 0.4.3",
        "state_dict",
        {
            "Res16UNet": PointNetwork(
                "sparse_unet34", "", ("minkowski",), "xyz", to.convert_minkowski, _minkowski_peer, _use_minkowski
            )
        },
        r"([A-Za-z_]\w*\.)*",
        "nothing, or names with a dot, as module.",
    ),
}


def check_point_target(target: str) -> PointTarget:
    """The entry of `POINT_TARGETS`.

    Raises:
        UserError: there is none of that name.
    """
    if target not in POINT_TARGETS:
        raise UserError(f"--to {target}: no such target for points; there are {some_names(POINT_TARGETS, 10)}")
    return POINT_TARGETS[target]
