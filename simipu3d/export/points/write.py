"""How does a pre-trained point encoder become a file that another project loads?

As for images: convert on a copy, write under a temporary name, read back from disk, load into the target's own network
(`peers/`), compare every layer, and only then give the file its name.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import simipu3d
from simipu3d.config import PartConfig
from simipu3d.encoders.pointnet2 import PointNet2SSGConfig
from simipu3d.errors import UserError
from simipu3d.export.checkpoint import load_run_checkpoint, rebuild_point_encoder
from simipu3d.export.files import ExportReport, check_out, common_facts, entry, write_checked, write_torch
from simipu3d.export.image import convert
from simipu3d.export.metadata import describe_run, tensor_hash
from simipu3d.export.points import verify as verify_points
from simipu3d.export.points.convert import Converted, PointJob
from simipu3d.export.points.targets import PointNetwork, PointTarget, check_point_target
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.files import read_torch_file, some_names

_MOST_CHANNELS = 64


def export_points(
    ckpt: Path,
    target: str,
    out: Path,
    *,
    network: str | None = None,
    prefix: str | None = None,
    layout: str | None = None,
    channels: int | None = None,
    intensity_scale: float = 1.0,
    bias: bool = True,
    partial: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write the point encoder of a pre-training run for another project, proven to compute the same there.

    Args:
        ckpt: a checkpoint of the run.
        target: a key of `POINT_TARGETS`.
        out: the file to write.
        network: which of the target's networks; None takes the first that fits the encoder.
        prefix: what goes before the names; None takes the network's default.
        layout: of sparse weights, spconv1 or spconv2; None takes the target's.
        channels: input columns that the target feeds; None: as many as the run had. More get weight 0, fewer are cut.
        intensity_scale: the target's intensity is this many times ours (0..1), 255 in OpenPCDet's nuScenes.
        bias: False for a VoxelResBackBone8x with USE_BIAS: False.
        partial: write what fits where not all of the encoder does (pointcept).
        overwrite: replace what is at `out`.

    Raises:
        UserError: an option does not fit the target, the checkpoint cannot be used, `out` exists or cannot be written.
        ExportError: the written file failed its check; nothing is left at `out`.
    """
    kind = check_point_target(target)
    check_out(out, (".pth", ".pt"), target, overwrite)
    state, run = load_run_checkpoint(ckpt)
    encoder, config, columns = rebuild_point_encoder(ckpt, state, run)
    name = POINT_ENCODERS.name_of(config)
    config = config.as_msg() if isinstance(config, PointNet2SSGConfig) else config
    title, chosen = kind.network_for(name, network, target)
    prefix = chosen.prefix if prefix is None else prefix
    kind.check_prefix(prefix)
    job = PointJob(
        out,
        prefix,
        encoder,
        config,
        name,
        columns,
        layout=_layout(chosen, layout, title),
        channels=_channels(config, columns, channels),
        intensity_scale=_intensity_scale(name, columns, intensity_scale),
        bias=_bias(chosen, bias, title),
        partial=partial,
    )
    if partial and target != "pointcept":
        raise UserError(f"--partial: {target} takes the whole encoder; leave it out")
    with torch.no_grad():
        return _export(job, target, kind, (title, chosen), (ckpt, state, run))


def _layout(network: PointNetwork, asked: str | None, title: str) -> str:
    if asked is None:
        return network.layouts[0] if network.layouts else ""
    if asked not in network.layouts:
        reads = " or ".join(network.layouts) or "no sparse weights"
        raise UserError(f"--layout {asked}: {title} reads {reads}; another one would load scrambled or not at all")
    return asked


def _channels(config: PartConfig, columns: tuple[str, ...], asked: int | None) -> int:
    own = getattr(config, "in_channels", len(columns))
    least = 1 if hasattr(config, "in_channels") else 3 if getattr(config, "use_xyz", True) else 4
    if asked is not None and not least <= asked <= _MOST_CHANNELS:
        raise UserError(f"--channels {asked}: expected {least} to {_MOST_CHANNELS}; the run had {own}")
    return own if asked is None else asked


def _intensity_scale(name: str, columns: tuple[str, ...], asked: float) -> float:
    if not (math.isfinite(asked) and asked > 0):
        raise UserError(f"--intensity-scale {asked}: expected a positive number, as 255")
    if asked != 1 and ("intensity" not in columns or name == "sparse_unet34"):
        raise UserError(
            f"--intensity-scale {asked:g}: this run's {name} does not read the points' intensity as a column"
        )
    return asked


def _bias(network: PointNetwork, asked: bool, title: str) -> bool:
    if not asked and not network.has_bias:
        raise UserError(f"--no-bias: {title} has no biases to leave out; this is for VoxelResBackBone8x")
    return asked and network.has_bias


def _export(
    job: PointJob,
    target: str,
    kind: PointTarget,
    network: tuple[str, PointNetwork],
    source: tuple[Path, dict[str, Tensor], dict[str, Any]],
) -> ExportReport:
    (title, chosen), (ckpt, state, run) = network, source
    converted = chosen.convert(job)
    peer = chosen.peer(job).eval()
    fresh = verify_points.load_peer(peer, converted.tensors, converted.fresh)
    meta = describe_run(ckpt, run, "points") | _describe(job, converted, fresh, state)
    meta |= {
        "target": target,
        "kind": title,
        "target_version_checked": kind.checked_with,
        "names": f"{job.prefix}*",
        "tensors": len(converted.tensors),
        "tensors_sha256": tensor_hash(converted.tensors),
    }
    usage = chosen.usage(job)

    def write(path: Path) -> None:
        named = convert.add_prefix(converted.tensors, job.prefix)
        write_torch(path, {kind.key: named, "version": f"simipu3d {simipu3d.__version__}", "meta": meta})

    def read(path: Path) -> dict[str, Tensor]:
        found = entry(read_torch_file(path, "--out"), kind.key)
        return {n.removeprefix(job.prefix): value for n, value in found.items() if n.startswith(job.prefix)}

    def check(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
        other = chosen.peer(job).eval()
        verify_points.load_peer(other, tensors, converted.fresh)
        return verify_points.CHECKS[job.name](job, converted, other, chosen.axes)

    sidecar = write_checked(job.out, converted.tensors, meta, usage, write=write, read=read, check=check)
    return ExportReport(job.out, sidecar, meta, usage, _facts(meta))


def _describe(job: PointJob, converted: Converted, fresh: list[str], state: dict[str, Tensor]) -> dict[str, Any]:
    """What only point files have in their metadata."""
    config = job.config
    block = config.model_dump(mode="json")
    grid = {key: block[key] for key in ("point_range", "voxel_size") if block.get(key) is not None}
    outside = {n.removeprefix("method.").partition(".")[0] for n in state} - {"point_encoder"}
    return {
        "architecture": {"name": job.name, "config": block, "bias": job.bias, "bn_eps": sorted({*_eps(job)})},
        "input": {
            "columns": _input_names(job),
            "channels": job.channels,
            "intensity_scale": job.intensity_scale,
            "sweeps": 1,
            **grid,
            "max_points_per_voxel": None,
        },
        "conversions": list(converted.notes),
        "weight_layout": job.layout or "out, in, 1, 1",
        "dropped": [*converted.dropped, *sorted(f"{name}.*" for name in outside)],
        "fresh_in_target": fresh,
    }


def _input_names(job: PointJob) -> list[str]:
    """What the first layer reads: columns of the points, or SR-UNet's constant or derived channels."""
    feature = getattr(job.config, "point_feature", None)
    return list(job.columns) if feature is None else [feature] * job.config.in_channels


def _eps(job: PointJob) -> list[float]:
    return list(convert.norm_eps(job.encoder).values())


def _facts(meta: dict[str, Any]) -> list[str]:
    """Lines of the summary."""
    given, check = meta["input"], meta["verification"]
    grid = f", voxels of {given['voxel_size']} m" if "voxel_size" in given else ""
    grid += f" in {given['point_range']}" if "point_range" in given else ""
    return [
        f"input: {given['channels']} columns from {', '.join(given['columns'])}{grid}",
        f"layout of sparse weights: {meta['weight_layout']}",
        *common_facts(meta),
        f"fresh in the target: {len(meta['fresh_in_target'])} tensors: {some_names(meta['fresh_in_target'])}",
        f"largest relative difference {check['largest_relative_difference']:.1e} over {check['on']} "
        f"(allowed {check['tolerance']:g})",
    ]
