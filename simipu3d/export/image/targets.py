"""How does each project want an image backbone: which structure, which names, which line in its configuration?

A target wraps converted tensors (in torchvision's or timm's names) for one loader, and unwraps a file that was read
back by that loader's own rule. The table is `TARGETS`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import simipu3d
from simipu3d.encoders.image import ImageEncoder
from simipu3d.errors import UserError
from simipu3d.export.files import entry, write_torch
from simipu3d.export.image.convert import add_prefix
from simipu3d.export.metadata import model_card
from simipu3d.weights.files import read_torch_file, read_weights

TORCHVISION_NAMES = ("resnet18", "resnet34", "resnet50", "resnet101")
DEEPLAB_NAMES = ("resnet50", "resnet101")
OPENPCDET_PLACES = {
    "vfe.ffn.ddn.model.backbone.": "CaDDN",
    "backbone_3d.semseg.ifn.model.backbone.": "Focals Conv",
    "image_backbone.": "BEVFusion with a ResNet registered in backbones_image",
}
OPENPCDET_NOTE = (
    "OpenPCDet normalises the pictures only where its own image pretrain path is set: keep CaDDN's "
    "pretrained_path or Focals' IMG_PRETRAIN set as well"
)


@dataclass(frozen=True)
class Job:
    """One export: what all steps need to know.

    Attributes:
        out: the final file or folder.
        prefix: what stands before the names, "" for none.
        encoder: the pre-training side.
        convention: the normalisation that the file expects.
        microsoft: Microsoft's names for a Swin, which the target converts itself.
    """

    out: Path
    prefix: str
    encoder: ImageEncoder
    convention: str
    microsoft: bool = False

    @property
    def name(self) -> str:
        return self.encoder.config.name


@dataclass(frozen=True)
class ImageTarget:
    """One kind of file.

    Attributes:
        checked_with: version of the target that the rules were read from.
        suffixes: of the output file; empty for a folder.
        default_prefix: used when the user gives none.
        check_prefix: raises UserError for a prefix that the target has no place for.
        inputs: normalisations that can be asked for, the default first.
        write: (path, tensors, meta, job) to disk.
        read: (path, job) from disk to tensors in plain names.
        usage: (job) lines for the target's configuration.
    """

    checked_with: str
    suffixes: tuple[str, ...]
    default_prefix: str
    check_prefix: Callable[[str], None]
    inputs: tuple[str, ...]
    write: Callable[[Path, dict[str, Tensor], dict[str, Any], Job], None]
    read: Callable[[Path, Job], dict[str, Tensor]]
    usage: Callable[[Job], list[str]]


def is_deeplab_place(job: Job) -> bool:
    """Whether OpenPCDet puts these weights into torchvision's DeepLabV3."""
    return job.prefix != "image_backbone."


def _no_prefix(prefix: str) -> None:
    if prefix:
        raise UserError(f"--prefix {prefix}: this target knows no prefixes; leave it out")


# ---------------------------------------------------------------------------------------------------- torchvision


def _write_torchvision(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], job: Job) -> None:
    if job.out.suffix == ".safetensors":
        path.write_bytes(safetensors.torch.save(tensors, metadata={"simipu3d": json.dumps(meta)}))
    else:
        write_torch(path, tensors)


def _read_torchvision(path: Path, job: Job) -> dict[str, Tensor]:
    if job.out.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return dict(read_torch_file(path, "--out"))


def _use_torchvision(job: Job) -> list[str]:
    if job.out.suffix == ".safetensors":
        load = f"safetensors.torch.load_file('{job.out}')"
    else:
        load = f"torch.load('{job.out}', weights_only=True)"
    missing = "only fc.* is missing" if not job.encoder.untrained else "fc.* and what was not trained are missing"
    return [
        f"net = torchvision.models.{job.name}()",
        f"net.load_state_dict({load}, strict=False)  # {missing}",
    ]


# ----------------------------------------------------------------------------------------------------------- timm


def _write_timm(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], job: Job) -> None:
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    default = job.encoder.trunk.pretrained_cfg
    facts = {
        key: default.get(key) for key in ("input_size", "pool_size", "first_conv", "classifier", "fixed_input_size")
    }
    config: dict[str, Any] = {
        "architecture": job.name,
        "num_classes": 0,
        "num_features": meta["architecture"]["num_features"],
        "pretrained_cfg": {
            **{key: value for key, value in facts.items() if value is not None},
            "tag": "simipu3d",
            "custom_load": False,
            "mean": meta["input"]["mean"],
            "std": meta["input"]["std"],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            "license": meta["licence"],
        },
    }
    if job.encoder.config.model_args:
        config["model_args"] = dict(job.encoder.config.model_args)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if "verification" in meta:
        (path / "README.md").write_text(
            model_card(meta, _use_timm(replace(job, out=Path(job.out.name)))), encoding="utf-8"
        )
        (path / "metadata.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _read_timm(path: Path, job: Job) -> dict[str, Tensor]:
    return read_weights(path / "model.safetensors", "--out")


def timm_extra_args(job: Job) -> dict[str, Any]:
    """What a user has to say beside the folder to get the network as it was trained (dilation, images of any size)."""
    return {key: value for key, value in job.encoder.model_args.items() if key not in job.encoder.config.model_args}


def _use_timm(job: Job) -> list[str]:
    extra = "".join(f", {key}={value!r}" for key, value in timm_extra_args(job).items())
    line = f"net = timm.create_model('local-dir:{job.out}', pretrained=True, num_classes=0{extra})"
    lines = [line, f"# {', '.join(timm_extra_args(job))}: as it was trained"] if extra else [line]
    multiple = job.encoder.pad_multiple
    return [*lines, f"# pad images at the right and bottom to multiples of {multiple}"] if multiple > 1 else lines


# -------------------------------------------------------------------------------------------------------- mmdet3d


def check_mmdet3d_prefix(prefix: str) -> None:
    """Raise UserError for what cannot stand before mmdetection's names."""
    if not re.fullmatch(r"([A-Za-z_]\w*\.)+", prefix):
        raise UserError(
            f"--prefix {prefix}: expected the detector's name of its backbone with a dot, as img_backbone. or backbone."
        )


def _write_mmdet3d(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], job: Job) -> None:
    write_torch(path, {"meta": meta, "state_dict": add_prefix(tensors, job.prefix)})


def _read_mmdet3d(path: Path, job: Job) -> dict[str, Tensor]:
    state = entry(read_torch_file(path, "--out"), "state_dict")
    return {name[len(job.prefix) :]: value for name, value in state.items() if name.startswith(job.prefix)}


def mmdet3d_input(job: Job) -> str:
    """The keys of mmdetection3d's data preprocessor that feed what the file expects."""
    if job.convention == "caffe_bgr":
        return "mean=[103.53, 116.28, 123.675], std=[1, 1, 1], bgr_to_rgb=False"
    return "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True"


def _use_mmdet3d(job: Job) -> list[str]:
    init = f"init_cfg=dict(type='Pretrained', checkpoint='{job.out}', prefix='{job.prefix}')"
    part, depth = job.prefix.split(".")[-2], job.name.removeprefix("resnet")
    return [
        f"{part}=dict(type='mmdet.ResNet', depth={depth}, style='pytorch', frozen_stages=-1, ..., {init})",
        f"data_preprocessor=dict(..., {mmdet3d_input(job)})",
        f"or, for the whole detector: load_from = '{job.out}'",
    ]


# ------------------------------------------------------------------------------------------------------ openpcdet


def _check_openpcdet_prefix(prefix: str) -> None:
    if prefix and prefix not in OPENPCDET_PLACES:
        places = "; ".join(f"{place} ({what})" for place, what in OPENPCDET_PLACES.items())
        raise UserError(f"--prefix {prefix}: OpenPCDet has no image ResNet there; it has {places}")


def _write_openpcdet(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], job: Job) -> None:
    if job.prefix:
        version = f"simipu3d {simipu3d.__version__}"
        write_torch(path, {"model_state": add_prefix(tensors, job.prefix), "version": version, "meta": meta})
        return
    # CaDDN reads a classifier without asking whether there is one, and drops it; Focals loads it and never runs it.
    classifier = {"classifier.4.weight": torch.zeros(21, 256, 1, 1), "classifier.4.bias": torch.zeros(21)}
    write_torch(path, {**add_prefix(tensors, "backbone."), **classifier})


def _read_openpcdet(path: Path, job: Job) -> dict[str, Tensor]:
    content = read_torch_file(path, "--out")
    prefix = job.prefix or "backbone."
    if job.prefix:
        content = entry(content, "model_state")
    elif content["classifier.4.weight"].shape[0] != 21:
        raise UserError("the classifier that Focals Conv expects must have 21 classes")
    return {name[len(prefix) :]: value for name, value in content.items() if name.startswith(prefix)}


def _use_openpcdet(job: Job) -> list[str]:
    if job.prefix:
        return [f"python tools/train.py ... --pretrained_model {job.out}", f"# {OPENPCDET_NOTE}"]
    backbone = job.name.replace("resnet", "ResNet")
    lines = [f"CaDDN: MODEL.VFE.FFN.DDN.ARGS.pretrained_path: {job.out}  (BACKBONE_NAME: {backbone})"]
    if job.name == "resnet50":
        lines.append(f"Focals Conv: MODEL.BACKBONE_3D.IMG_PRETRAIN: {job.out}")
    return lines


_RGB, _BOTH = ("imagenet_rgb",), ("imagenet_rgb", "caffe_bgr")
TARGETS = {
    "openpcdet": ImageTarget(
        "8cacccec (2024-04)",
        (".pth", ".pt"),
        "",
        _check_openpcdet_prefix,
        _RGB,
        _write_openpcdet,
        _read_openpcdet,
        _use_openpcdet,
    ),
    "mmdet3d": ImageTarget(
        "1.x fe25f7a, mmdet 3.3.0, mmengine 0.10.7",
        (".pth", ".pt"),
        "img_backbone.",
        check_mmdet3d_prefix,
        _BOTH,
        _write_mmdet3d,
        _read_mmdet3d,
        _use_mmdet3d,
    ),
    "torchvision": ImageTarget(
        "0.28.0",
        (".pth", ".pt", ".safetensors"),
        "",
        _no_prefix,
        _RGB,
        _write_torchvision,
        _read_torchvision,
        _use_torchvision,
    ),
    "timm": ImageTarget("1.0.31", (), "", _no_prefix, _RGB, _write_timm, _read_timm, _use_timm),
}
