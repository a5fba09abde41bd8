"""How does a pre-trained image backbone become a file that another project loads?

Convert on a copy, write under a temporary name, read back from disk, load into the target's own network, compare
features, and only then give the file its name. If any of it fails nothing is left behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simipu3d.compat import import_timm, import_torchvision
from simipu3d.encoders.image import ImageEncoder, build_trunk
from simipu3d.encoders.image_levels import is_timm
from simipu3d.errors import UserError
from simipu3d.export.checkpoint import load_run_checkpoint, rebuild_image_encoder, without_dilation
from simipu3d.export.files import ExportReport, check_out, common_facts, write_checked
from simipu3d.export.image import convert, verify
from simipu3d.export.image.calibrate import bare_pictures, calibrate
from simipu3d.export.image.swin import SWIN_TARGETS, check_swin, convert_swin, is_swin, prepare_swin
from simipu3d.export.image.targets import (
    DEEPLAB_NAMES,
    TARGETS,
    TORCHVISION_NAMES,
    ImageTarget,
    Job,
    is_deeplab_place,
    timm_extra_args,
)
from simipu3d.export.metadata import describe_image_export, tensor_hash
from simipu3d.weights.files import some_names


def export_image(
    ckpt: Path,
    target: str,
    out: Path,
    *,
    prefix: str | None = None,
    input: str = "imagenet_rgb",
    convert_weights: bool = False,
    calibrate_on: Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the image backbone of a pre-training run for another project, proven to load there.

    Args:
        ckpt: a checkpoint of the run.
        target: a key of `TARGETS`.
        out: the file to write, for timm the folder.
        prefix: what goes before the names (mmdet3d, openpcdet); None takes the target's default.
        input: normalisation that the file shall expect.
        convert_weights: for a Swin: Microsoft's names, which mmdetection and OpenPCDet convert themselves.
        calibrate_on: a data configuration; the BatchNorms' statistics are measured again on its bare pictures.
        overwrite: replace what is at `out`.

    Raises:
        UserError: an option does not fit the target, the checkpoint cannot be used, `out` exists or cannot be written.
        ExportError: the written file failed its check; nothing is left at `out`.
    """
    if target not in TARGETS:
        raise UserError(f"--to {target}: no such target for images; there are {', '.join(TARGETS)}")
    check_out(out, TARGETS[target].suffixes, target, overwrite)
    state, run = load_run_checkpoint(ckpt)
    encoder = rebuild_image_encoder(ckpt, state, run)
    if not is_timm(encoder.trunk):
        raise UserError(
            f"--to {target}: {encoder.config.name} is a plugin's own backbone, which no target builds, so a file could not "
            f"be checked; its weights stand in {ckpt} below method.image_encoder.trunk."
        )
    family = _family(encoder, target)
    kind = family.kind
    prefix = kind.default_prefix if prefix is None else prefix
    kind.check_prefix(prefix)
    if input not in kind.inputs:
        raise UserError(f"--input {input}: {target} takes {', '.join(kind.inputs)}")
    if convert_weights and kind is not SWIN_TARGETS.get(target):
        raise UserError("--convert-weights: is for a Swin to mmdet3d or openpcdet; leave it out")

    meta = describe_image_export(ckpt, run, encoder, input, [n for n in encoder.state_dict() if n.startswith("neck.")])
    meta["dropped"] += sorted({name.partition(".")[0] + ".*" for name in _outside_image(state)})
    job = Job(out, prefix, family.prepare(encoder, target, prefix), input, convert_weights)
    meta["norm_statistics"] = _norm_statistics(job.encoder, calibrate_on)
    tensors = family.convert(job, target, meta)
    meta |= _describe_file(job, target, kind, tensors)
    usage = kind.usage(job)
    sidecar = write_checked(
        out,
        tensors,
        meta,
        usage,
        write=lambda path: kind.write(path, tensors, meta, job),
        read=lambda path: kind.read(path, job),
        check=lambda given, path: family.check(given, path, kind, job),
        folder=not kind.suffixes,
    )
    return ExportReport(out, sidecar, meta, usage, _facts(meta))


def _norm_statistics(encoder: ImageEncoder, calibrate_on: Path | None) -> str:
    """Which statistics the file's BatchNorms hold, in words; measured again where that is asked for."""
    if calibrate_on is not None:
        count = calibrate(encoder, bare_pictures(calibrate_on))
        return f"measured again on {count} whole pictures of {calibrate_on.name}, without padding"
    if not convert.norm_eps(encoder.trunk):
        return "none, the network has no BatchNorm"
    return "of pre-training, its padding and augmentation included; --calibrate CFG measures them on bare pictures"


def _describe_file(job: Job, target: str, kind: ImageTarget, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the sidecar says of the file itself."""
    form = "whole detector" if target == "openpcdet" and job.prefix not in ("", "backbone.") else "weights"
    return {
        "target": target,
        "kind": form if kind.suffixes else "folder",
        "target_version_checked": kind.checked_with,
        "names": "*" if job.microsoft else _name_pattern(target, job.prefix),
        "weight_layout": "out, in, ky, kx",
        "tensors": len(tensors),
        "tensors_sha256": tensor_hash(tensors),
    }


@dataclass(frozen=True)
class _Family:
    """How one sort of backbone reaches a target: its entry, and the three steps."""

    kind: ImageTarget
    prepare: Callable[[ImageEncoder, str, str], ImageEncoder]
    convert: Callable[[Job, str, dict[str, Any]], dict[str, Tensor]]
    check: Callable[[dict[str, Tensor], Path, ImageTarget, Job], dict[str, Any]]


def _family(encoder: ImageEncoder, target: str) -> _Family:
    if target == "timm":
        return _Family(TARGETS[target], lambda encoder, *_: encoder, _convert, _check_timm)
    if target in SWIN_TARGETS and is_swin(encoder):
        return _Family(SWIN_TARGETS[target], lambda e, target, _: prepare_swin(e, target), _convert_swin, check_swin)
    return _Family(TARGETS[target], _plain_resnet, _convert, _check_resnet)


def _convert_swin(job: Job, target: str, meta: dict[str, Any]) -> dict[str, Tensor]:
    tensors = _fold_input(job, convert.plain_copy(job.encoder.trunk.state_dict()), meta)
    meta["untrained_in_file"] = "not in the file"
    return convert_swin(job, tensors, meta)


def _facts(meta: dict[str, Any]) -> list[str]:
    """Lines of the summary."""
    verification = meta["verification"]
    note = f" ({meta['untrained_in_file']})" if meta["untrained"] else ""
    facts = [
        "input: {order} in {range}, mean {mean}, std {std}".format(**meta["input"]),
        *common_facts(meta),
        f"BatchNorm statistics: {meta['norm_statistics']}",
        f"untrained: {some_names(meta['untrained'])}{note}",
        f"largest relative difference of features {verification['largest_relative_difference']:.1e} at strides "
        f"{', '.join(map(str, verification['strides']))} (allowed {verification['tolerance']:g})",
    ]
    trained = meta["architecture"]["output_stride_trained"]
    if "note" in verification:
        facts.append(verification["note"])
    if trained != 32 and "dilation" in verification:
        facts.append(f"trained with output_stride {trained}; {verification['dilation']}")
    return facts


def _outside_image(state: dict[str, Tensor]) -> list[str]:
    own = [name.removeprefix("method.") for name in state]
    return [name for name in own if not name.startswith("image_encoder.")]


def _name_pattern(target: str, prefix: str) -> str:
    return f"{prefix or ('backbone.' if target == 'openpcdet' else '')}*"


def _plain_resnet(encoder: ImageEncoder, target: str, prefix: str) -> ImageEncoder:
    """The encoder at its own strides, if it is a ResNet that torchvision has too."""
    name = encoder.config.name
    known = DEEPLAB_NAMES if target == "openpcdet" and prefix != "image_backbone." else TORCHVISION_NAMES
    if name not in known:
        raise UserError(f"--to {target}: takes {', '.join(known)}; this run has {name}; export it with --to timm")
    with torch.device("meta"):
        wanted = getattr(import_torchvision().models, name)(weights=None).state_dict()
    own = encoder.trunk.state_dict()
    differs = [n for n, value in own.items() if n not in wanted or wanted[n].shape != value.shape]
    lost = [n for n in wanted if n not in own and n not in encoder.untrained and not n.startswith("fc.")]
    if differs or lost:
        raise UserError(
            f"--to {target}: this {name} with model_args {dict(encoder.config.model_args)} is not the standard one "
            f"({some_names(differs + lost)}); export it with --to timm"
        )
    return without_dilation(encoder)


def _fold_input(job: Job, tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Tensor]:
    """The first convolution for the normalisation that the file shall expect."""
    config = job.encoder.config
    if config.input == job.convention:
        return tensors
    first_conv = job.encoder.trunk.pretrained_cfg.get("first_conv")
    if not isinstance(first_conv, str) or f"{first_conv}.weight" not in tensors:
        raise UserError(
            f"the normalisation {config.input} cannot be folded: {config.name} has no single first convolution"
        )
    meta["conversions"].append(f"{first_conv}: input {config.input} -> {job.convention}")
    return convert.fold_input(tensors, first_conv, config.input, job.convention)


def _convert(job: Job, target: str, meta: dict[str, Any]) -> dict[str, Tensor]:
    """The trunk's tensors as the target wants them, in plain names; what was done goes into `meta`."""
    encoder, config = job.encoder, job.encoder.config
    tensors = _fold_input(job, convert.plain_copy(encoder.trunk.state_dict()), meta)
    if target == "timm":
        plain = config.model_copy(update={"output_stride": 32})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reference, _ = build_trunk(plain)
        meta["architecture"]["num_features"] = reference.num_features
    else:
        with torch.device("meta"):
            reference = getattr(import_torchvision().models, config.name)(weights=None)
    trained, wanted = convert.norm_eps(encoder.trunk), convert.norm_eps(reference)
    tensors = convert.fold_eps(tensors, trained, wanted)
    moved = sorted({(trained[name], wanted[name]) for name in trained if trained[name] != wanted[name]})
    meta["conversions"] += [f"BatchNorm eps {old:g} -> {new:g} (into running_var)" for old, new in moved]
    meta["architecture"]["bn_eps"] = sorted(set(wanted.values()))
    meta["untrained_in_file"] = "not in the file"
    if target == "timm":
        never_ran = set(encoder.untrained) - set(encoder.trunk.state_dict())
        tensors |= {name: value for name, value in reference.state_dict().items() if name in never_ran}
        meta["untrained_in_file"] = "timm loads whole networks only: filled with its initialisation, seed 0"
    return tensors


def _check_resnet(tensors: dict[str, Tensor], path: Path, kind: ImageTarget, job: Job) -> dict[str, Any]:
    """Load what was read back into torchvision's ResNet, compare."""
    network = verify.torchvision_resnet(job.name)
    verify.load_every_tensor(network, tensors, {"fc.weight", "fc.bias", *job.encoder.untrained})
    if kind is TARGETS["openpcdet"] and is_deeplab_place(job):
        verify.check_deeplab_names(job.name, {f"backbone.{n}": v for n, v in tensors.items()}, job.encoder.untrained)
    result = verify.compare_features(job.encoder, lambda images: verify.resnet_levels(network, images), job.convention)
    version = import_torchvision().__version__
    return result | {
        "built_with": f"torchvision {version}",
        "dilation": "compared without dilation, as the target builds it",
    }


def _check_timm(tensors: dict[str, Tensor], path: Path, kind: ImageTarget, job: Job) -> dict[str, Any]:
    """Let timm load the folder, compare."""
    target = verify.timm_levels(path, timm_extra_args(job), job.encoder, tensors)
    result = verify.compare_features(job.encoder, target, job.convention)
    return result | {"built_with": f"timm {import_timm().__version__}", "dilation": "compared with the same dilation"}
