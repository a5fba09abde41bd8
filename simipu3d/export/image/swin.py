"""How does a Swin trained here become one for mmdetection and for OpenPCDet's BEVFusion?

mmdetection renames the layers, moves each merging of patches to the end of the stage before, and orders its channels as an
unfolding does. BEVFusion in OpenPCDet reads `INIT_CFG.checkpoint` either so (CONVERT_WEIGHTS: False) or with
Microsoft's names (True), which it converts itself.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import simipu3d
from simipu3d.encoders.image import ImageEncoder
from simipu3d.errors import UserError
from simipu3d.export.files import entry, write_torch
from simipu3d.export.image import verify
from simipu3d.export.image.convert import add_prefix
from simipu3d.export.image.targets import ImageTarget, Job, check_mmdet3d_prefix, mmdet3d_input
from simipu3d.export.peers.swin import PeerSwin, microsoft_to_mmdet
from simipu3d.weights.files import read_torch_file, some_names
from simipu3d.weights.foreign_names import swin_microsoft, swin_mmdet, unfold_order

BEVFUSION = "image_backbone."


def is_swin(encoder: ImageEncoder) -> bool:
    """Whether this is a Swin of the first version, the only one that the targets have."""
    return type(encoder.trunk).__name__ == "SwinTransformer"


def prepare_swin(encoder: ImageEncoder, target: str) -> ImageEncoder:
    """The encoder, if mmdetection's class can be configured to be it.

    Raises:
        UserError: it has options that mmdetection's has not.
    """
    known = PeerSwin(*_settings(encoder)).state_dict()
    odd = [name for name in encoder.trunk.state_dict() if swin_mmdet(name) not in known]
    if odd or encoder.neck is not None:
        raise UserError(
            f"--to {target}: this {encoder.config.name} with model_args {dict(encoder.config.model_args)} is not "
            f"mmdetection's SwinTransformer ({some_names(odd) if odd else 'neck'}); export it with --to timm"
        )
    return encoder


def convert_swin(job: Job, tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Tensor]:
    """timm's names to the target's."""
    if job.microsoft:
        meta["conversions"].append("names: Microsoft's")
        return {swin_microsoft(name): value for name, value in tensors.items()}
    meta["conversions"].append("names: mmdetection's, channels of merged patches in the order of an unfolding")
    renamed = {}
    for name, value in tensors.items():
        merged = ".downsample.reduction.weight" in name or ".downsample.norm." in name
        renamed[swin_mmdet(name)] = unfold_order(value).contiguous() if merged else value
    return renamed


def check_swin(tensors: dict[str, Tensor], path: Path, kind: ImageTarget, job: Job) -> dict[str, Any]:
    """Load what was read back into mmdetection's network, compare every stage that computes alike."""
    encoder, settings = job.encoder, _settings(job.encoder)
    peer = PeerSwin(*settings).eval()
    state = microsoft_to_mmdet(tensors) if job.microsoft else tensors
    if job.microsoft:  # its loader leaves the last norm under a name that nothing has
        state = {name: value for name, value in state.items() if not name.startswith("norm.")}
        state |= {f"norm3.{name.removeprefix('norm.')}": v for name, v in tensors.items() if name.startswith("norm.")}
    untrained = {swin_mmdet(name) for name in encoder.untrained}
    fresh = {name for name in peer.state_dict() if re.match(r"norm\d\.", name) or name.endswith("position_index")}
    verify.load_every_tensor(peer, state, untrained | fresh)
    count = num_alike(encoder)
    window = settings.window
    size = (32 * window, 64 * window)
    result = verify.compare_features(encoder, lambda images: peer(images, count), job.convention, count, size)
    note = (
        f"compared {count} stages on pictures of whole windows ({window} cells): elsewhere timm shifts before it pads "
    )
    note += "and mmdetection after, so that features differ where a window reaches beyond the picture"
    if count < len(encoder.level_indices):
        note += "; a window covers the last stage of timm's, which does not shift, mmdetection's shifts there too"
    return result | {"built_with": "simipu3d.export.peers", "note": note}


def num_alike(encoder: ImageEncoder) -> int:
    """Stages before the first whose odd blocks do not shift their windows; mmdetection's always do."""
    levels = len(encoder.level_indices)
    for number, stage in enumerate(list(encoder.trunk.layers)[:levels]):
        if any(not any(block.shift_size) for block in list(stage.blocks)[1::2]):
            return number
    return levels


class _Settings(NamedTuple):
    """The arguments of `PeerSwin`."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    ratio: float


def _settings(encoder: ImageEncoder) -> _Settings:
    trunk = encoder.trunk
    blocks = [stage.blocks for stage in trunk.layers]
    first = blocks[0][0]
    depths = [len(stage) for stage in blocks]
    heads = [stage[0].attn.num_heads for stage in blocks]
    while len(depths) < 4:  # stages that did not run
        absent = re.compile(rf"layers\.{len(depths)}\.blocks\.(\d+)\.")
        depths.append(1 + max(int(match[1]) for match in map(absent.match, encoder.untrained) if match))
        heads.append(2 * heads[-1])
    ratio = first.mlp.fc1.out_features / first.mlp.fc1.in_features
    return _Settings(trunk.embed_dim, tuple(depths), tuple(heads), first.attn.window_size[0], ratio)


def _usage_note(job: Job) -> list[str]:
    alike = num_alike(job.encoder)
    if alike == len(job.encoder.level_indices):
        return []
    return [
        f"# stage {alike + 1} there shifts windows in odd blocks, the run did not (train with model_args.always_partition: "
        "true for equality)"
    ]


def _dims(job: Job) -> str:
    width, depths, heads, window, _ = _settings(job.encoder)
    return f"embed_dims={width}, depths={list(depths)}, num_heads={list(heads)}, window_size={window}"


# -------------------------------------------------------------------------------------------------------- the targets


def _check_bevfusion_prefix(prefix: str) -> None:
    if prefix not in ("backbone.", BEVFUSION):
        raise UserError(
            f"--prefix {prefix}: a Swin goes into BEVFusion's INIT_CFG.checkpoint as backbone. (default) or, for "
            f"--pretrained_model, as {BEVFUSION}"
        )


def _write_bevfusion(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], job: Job) -> None:
    if job.microsoft:
        write_torch(path, {"model": tensors, "meta": meta})
    elif job.prefix == BEVFUSION:
        version = f"simipu3d {simipu3d.__version__}"
        write_torch(path, {"model_state": add_prefix(tensors, job.prefix), "version": version, "meta": meta})
    else:
        write_torch(path, {"state_dict": add_prefix(tensors, job.prefix), "meta": meta})


def _read(path: Path, job: Job) -> dict[str, Tensor]:
    content = read_torch_file(path, "--out")
    if job.microsoft:
        return dict(entry(content, "model"))
    state = entry(content, "model_state" if "model_state" in content else "state_dict")
    return {name[len(job.prefix) :]: value for name, value in state.items() if name.startswith(job.prefix)}


def _use_bevfusion(job: Job) -> list[str]:
    if job.prefix == BEVFUSION and not job.microsoft:
        return [f"python tools/train.py ... --pretrained_model {job.out}", *_usage_note(job)]
    names = f"INIT_CFG: {{type: Pretrained, checkpoint: {job.out}}}, CONVERT_WEIGHTS: {job.microsoft}"
    return [f"MODEL.IMAGE_BACKBONE: {{NAME: SwinTransformer, OUT_INDICES: [1, 2, 3], {names}}}", *_usage_note(job)]


def _write_mmdet3d(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], job: Job) -> None:
    if job.microsoft:
        write_torch(path, {"model": tensors, "meta": meta})
    else:
        write_torch(path, {"meta": meta, "state_dict": add_prefix(tensors, job.prefix)})


def _use_mmdet3d(job: Job) -> list[str]:
    lines = [
        f"dict(type='mmdet.SwinTransformer', {_dims(job)}, convert_weights={job.microsoft}, ...,",
        f"  init_cfg=dict(type='Pretrained', checkpoint='{job.out}'))",
        f"data_preprocessor=dict(..., {mmdet3d_input(job)})",
    ]
    if not job.microsoft and job.prefix != "backbone.":  # its init_cfg knows this one prefix, whatever the detector's
        lines[:2] = [f"load_from = '{job.out}'  # with {lines[0].removesuffix(',')})"]
    return [*lines, *_usage_note(job)]


SWIN_TARGETS = {
    "openpcdet": ImageTarget(
        "02ac3e1 (BEVFusion)",
        (".pth", ".pt"),
        "backbone.",
        _check_bevfusion_prefix,
        ("imagenet_rgb",),
        _write_bevfusion,
        _read,
        _use_bevfusion,
    ),
    "mmdet3d": ImageTarget(
        "1.x fe25f7a, mmdet 3.3.0, mmengine 0.10.7",
        (".pth", ".pt"),
        "backbone.",
        check_mmdet3d_prefix,
        ("imagenet_rgb", "caffe_bgr"),
        _write_mmdet3d,
        _read,
        _use_mmdet3d,
    ),
}
