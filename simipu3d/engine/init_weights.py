"""Which tensors of any checkpoint start a new run (`--init`)?

A checkpoint of ours is taken by its names. A foreign one is recognised by the names in it (`weights/namings.py`);
BatchNorm's eps and the input's normalisation are folded, so that the run starts from the function that was trained. A
table says how many tensors were used, renamed and left; `init.txt` in the run's folder names every one.

Known: torchvision, timm and MoCo for the image branch; mmdetection3d and SimIPU's release for both; OpenPCDet (spconv 1
and 2), PointContrast (MinkowskiEngine) for points; our own exports of all of these. Read without executing anything.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simipu3d.config import parse_block, parse_part
from simipu3d.encoders.image import ImageEncoder, ImageEncoderConfig, build_trunk
from simipu3d.engine.run import read_checkpoint
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights import foreign_names as names
from simipu3d.weights.files import read_torch_file, read_weights, some_names
from simipu3d.weights.folding import fold_bias, fold_eps, fold_input, norm_eps
from simipu3d.weights.namings import IMAGE_NAMINGS, LEAST, NAMINGS, Match, Naming, best_match, further_layers

log = logging.getLogger(__name__)

_RELEASED = re.compile(r"(^|\.)(pts_backbone\.SA_modules|mlp_cross_img|mlp_intro_points|img_conv1x1_1)\.")
"""Names that only pre-training by the released SimIPU leaves: BGR pictures, BatchNorm eps 1e-3."""


_MOST_WRONG = 2
"""Tensors of an image backbone that may have another shape: a first convolution for other channels, position codes."""


@dataclass(frozen=True)
class Branch:
    """An encoder of the method: its name there, the module that has the foreign names, the namings to try, and for an
    image branch the encoder round its trunk."""

    title: str
    module: nn.Module
    namings: tuple[Naming, ...]
    encoder: ImageEncoder | None = None


@dataclass(frozen=True)
class Source:
    """A foreign file: its tensors, what it says about itself (our exports do), and whether the released SimIPU wrote it."""

    path: Path
    state: dict[str, Tensor]
    meta: Mapping[str, Any]

    @property
    def released(self) -> bool:
        return any(_RELEASED.search(name) for name in self.state)


def load_weights(method: nn.Module, path: Path) -> list[str]:
    """Start from the weights of a checkpoint, ours or foreign.

    Args:
        method: with its weights as drawn; they are overwritten in place.
        path: the file; .safetensors, or any torch file of tensors and plain values.

    Returns:
        A line for every tensor: used (under which name), left as drawn, or not used.

    Raises:
        UserError: the file cannot be read, or nothing in it fits.
    """
    content = None
    if path.suffix != ".safetensors":
        content = read_torch_file(path, "--init")
        if isinstance(content, Mapping) and "simipu3d" in content:
            return _load_own(method, path)
    state = read_weights(path, "--init")
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return _load_foreign(method, Source(path, state, meta if isinstance(meta, Mapping) else {}))


def _load_own(method: nn.Module, path: Path) -> list[str]:
    prefix = "method."
    content = read_checkpoint(path)
    state = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    own = method.state_dict()
    used = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if not used:
        raise UserError(f"{path}: none of its {len(state)} tensors fits this configuration's {len(own)}")
    heads = set(used)
    failures = []
    for branch in _branches(method):
        heads -= {name for name in used if name.startswith(f"{branch.title}.")}
        used, failure = _own_branch(branch, used, state, content["simipu3d"], path)
        if failure:
            failures.append(f"{branch.title} {failure}")
            log.warning("--init %s: %s: %s; it stays as drawn", path, branch.title, failure)
    if failures and not used.keys() - heads:
        raise UserError(f"--init: {path}: no encoder in it fits; this configuration can use: {'; '.join(failures)}")
    _check_finite(used, path)
    method.load_state_dict(used, strict=False)
    log.info("--init %s: %d tensors used", path, len(used))
    lines = [f"used: {name}" for name in used]
    for what, skipped in (("not used", state.keys() - used.keys()), ("left as drawn", own.keys() - used.keys())):
        if skipped:
            log.info("--init %s: %d tensors %s: %s", path, len(skipped), what, ", ".join(sorted(skipped)))
        lines += [f"{what}: {name}" for name in sorted(skipped)]
    return lines


def _own_branch(
    branch: Branch, used: dict[str, Tensor], state: dict[str, Tensor], run: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor], str]:
    """`used` with an encoder's tensors folded where the run of ours that wrote them had other BatchNorms or pictures, or
    without them and why: it is another network."""
    prefix = f"{branch.title}." + ("" if branch.encoder is None else "trunk.")
    tensors, given = _below(prefix, used), _below(prefix, state)
    block = run["config"].get(branch.title) if isinstance(run.get("config"), Mapping) else None
    if not tensors or not isinstance(block, Mapping):
        return used, ""
    own = branch.module.state_dict()
    wrong = [name for name, value in given.items() if name in own and own[name].shape != value.shape]
    failure = _misfit(branch, list(own), list(given), wrong)
    if branch.encoder is None and block.get("name") != _registered().get(type(branch.module)):
        failure = f"none, it is another network there: {block.get('name')}"
    if failure:
        return {name: value for name, value in used.items() if not name.startswith(f"{branch.title}.")}, failure
    tensors = _own_folded(branch, _without_biases(branch, tensors, given), block, run, path)
    return used | {prefix + name: value for name, value in tensors.items()}, ""


def _own_folded(
    branch: Branch, tensors: dict[str, Tensor], block: Mapping[str, Any], run: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """An encoder's tensors for its own BatchNorms and pictures; `block` is that of the run which wrote them."""
    own_eps = {name: eps for name, eps in norm_eps(branch.module).items() if f"{name}.running_var" in tensors}
    if branch.encoder is None:
        there = parse_part("point_encoder", POINT_ENCODERS, {**block})
        with torch.device("meta"):
            columns = tuple(run.get("point_columns") or ("x", "y", "z", "intensity"))
            eps = norm_eps(POINT_ENCODERS[there.name].target(there, point_columns=columns))
    else:
        there = parse_block("image_encoder", ImageEncoderConfig, {**block, "pretrained": None})
        eps = dict.fromkeys(own_eps, there.bn_eps) if there.bn_eps else norm_eps(build_trunk(there)[0])
        first = (
            branch.encoder.trunk.pretrained_cfg.get("first_conv") if there.input != branch.encoder.config.input else ""
        )
        if f"{first}.weight" in tensors:
            log.info("--init: %s: %s folded from %s to %s", path, first, there.input, branch.encoder.config.input)
            tensors = fold_input(tensors, first, there.input, branch.encoder.config.input)
    return fold_eps(tensors, {name: eps.get(name, old) for name, old in own_eps.items()}, own_eps, rescale=True)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _misfit(branch: Branch, own: list[str], given: list[str], wrong: list[str]) -> str:
    """Why a file's network is another one than the branch's, though many names and shapes fit; "" if it is not.

    Args:
        branch: the encoder.
        own: names of its tensors, as the file calls them.
        given: names in the file, without prefix.
        wrong: our names of those that have another shape there.
    """
    absent = set() if branch.encoder is None else set(branch.encoder.untrained)
    further = further_layers(own, (name for name in given if name not in absent))
    if further:
        return f"none, it is another network there: deeper, by {some_names(further)}"
    if branch.encoder is not None and len(wrong) > _MOST_WRONG:
        return f"none, it is another network there: {len(wrong)} other shapes, as of {some_names(wrong, 2)}"
    return ""


def _without_biases(branch: Branch, tensors: dict[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases before a BatchNorm that this encoder does not have, taken into its running mean."""
    for norm in norm_eps(branch.module):
        head, _, last = norm.rpartition(".")
        conv = f"{head}.{last.replace('bn', 'conv')}"
        bias = f"{conv}.bias"
        lost = last.startswith("bn") and bias in given and bias not in branch.module.state_dict()
        if lost and f"{norm}.running_mean" in tensors:
            tensors = fold_bias({**tensors, bias: given[bias]}, conv, norm)
    return tensors


# ------------------------------------------------------------------------------------------------------ foreign files


def _load_foreign(method: nn.Module, source: Source) -> list[str]:
    rows: list[tuple[str, ...]] = []
    lines: list[str] = []
    failures: list[str] = []
    taken: set[str] = set()
    for branch in _branches(method):
        own = branch.module.state_dict()
        match = best_match(own, source.state, branch.namings, f"--init: {source.path}: {branch.title}")
        _check_layout(own, match, source)
        failure = ""
        if len(match.tensors) < LEAST * len(own):
            failure = f"{len(match.tensors)} of {len(own)}{_first_wrong(match)}"
        else:
            names_there = [foreign for foreign in map(match.naming.rename, own) if foreign is not None]
            given = list(_below(match.prefix, source.state))
            failure = _misfit(branch, names_there, given, list(match.wrong))
            if failure:
                log.warning("--init: %s: %s", branch.title, failure)
        if failure:
            failures.append(f"{branch.title} {failure}")
            rows.append((branch.title, "nothing used", "0", "0", str(len(own))))
            lines += [f"left as drawn: {branch.title}.{name}" for name in own]
            continue
        tensors = _folded(branch, match, source)
        _check_finite(tensors, source.path)
        branch.module.load_state_dict(tensors, strict=False)
        taken |= set(match.sources.values())
        left = [name for name in own if name not in tensors]
        where = match.naming.title + (f" under {match.prefix}" if match.prefix else "")
        rows.append((branch.title, where, str(len(match.tensors)), str(match.renamed), str(len(left))))
        lines += _name_lines(branch.title, match, tensors, left)
        if left:
            log.warning("--init: %s: %d tensors stay as drawn: %s", branch.title, len(left), some_names(left))
    if not taken:
        raise UserError(
            f"--init: {source.path}: nothing in it fits; of its {len(source.state)} tensors "
            f"({some_names(source.state, 2)}) this configuration can use: {'; '.join(failures) or 'none'}; check the "
            "names of the encoders"
        )
    unused = sorted(source.state.keys() - taken)
    lines += [f"not used: {name}" for name in unused]
    _log_table(source.path, rows, unused)
    for line in lines:
        log.debug("--init: %s", line)
    return lines


def _registered() -> dict[Any, str]:
    return {POINT_ENCODERS[name].target: name for name in POINT_ENCODERS.names()}


def _branches(method: nn.Module) -> list[Branch]:
    registered = _registered()
    found = []
    for name, module in method.named_modules():
        if isinstance(module, ImageEncoder):
            found.append(Branch(name, module.trunk, IMAGE_NAMINGS, module))
        elif type(module) in registered:
            own_names = (Naming("its own names", names.same_name, names.as_it_is),)
            found.append(Branch(name, module, NAMINGS.get(registered[type(module)], own_names)))
    return found


def _first_wrong(match: Match) -> str:
    for name, shapes in match.wrong.items():
        return f" ({len(match.wrong)} have another shape, first {name}: {shapes})"
    return ""


def _check_layout(own: Mapping[str, Tensor], match: Match, source: Source) -> None:
    """Refuse sparse weights (kz, ky, kx, out, in), which some spconv 2.0 have: where in = out they pass for spconv 1.x."""
    for name, shapes in match.wrong.items():
        given = source.state[f"{match.prefix}{match.naming.rename(name)}"]
        if given.dim() == 5 and given.permute(3, 0, 1, 2, 4).shape == own[name].shape:
            raise UserError(
                f"--init: {source.path}: {name} is {shapes}: its weights lie as (kz, ky, kx, out, in), and where in = out "
                "nobody could tell; save it again as spconv 1.x (kz, ky, kx, in, out) or 2.x (out, kz, ky, kx, in)"
            )


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"--init: {path}: {some_names(bad)} hold NaN or infinite values; take another file")


def _name_lines(title: str, match: Match, tensors: dict[str, Tensor], left: list[str]) -> list[str]:
    lines = []
    for name in tensors:
        source = match.sources.get(name)
        lines.append(f"used: {title}.{name} from {source}" if source else f"set to 0: {title}.{name}")
    lines += [f"left as drawn, another shape: {title}.{name}: {shapes}" for name, shapes in match.wrong.items()]
    return lines + [f"left as drawn: {title}.{name}" for name in left if name not in match.wrong]


def _log_table(path: Path, rows: list[tuple[str, ...]], unused: list[str]) -> None:
    head = ("branch", "found as", "used", "renamed", "left as drawn")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    log.info("--init %s:\n  %s", path, "\n  ".join(table))
    log.info("--init: not used: %d tensors of the file: %s", len(unused), some_names(unused))


# ---------------------------------------------------------------------------------------------------------- conversions


def _folded(branch: Branch, match: Match, source: Source) -> dict[str, Tensor]:
    """The tensors for the branch's own BatchNorms and normalisation; 0 for the biases that the source does without."""
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in match.tensors.items()}
    own_eps = {name: eps for name, eps in norm_eps(branch.module).items() if f"{name}.running_var" in tensors}
    if branch.encoder is not None:
        given = _trunk_eps(branch.encoder, own_eps, source)
        tensors = _fold_colours(branch.encoder, tensors, match, source)
    else:
        given = {name: match.naming.eps_of(name, eps) for name, eps in own_eps.items()}
        tensors = _without_biases(branch, tensors, _biases(match, source))
        tensors = _turn_kernels(tensors, match, source)
        _check_intensity(source)
    tensors = fold_eps(tensors, given, own_eps, rescale=True)
    for old, new in sorted({(given[name], own_eps[name]) for name in own_eps if given[name] != own_eps[name]}):
        log.info("--init: %s: BatchNorm eps %g -> %g, into running_var", branch.title, old, new)
    for name, value in branch.module.state_dict().items():
        if name not in tensors and match.naming.zeros and re.fullmatch(match.naming.zeros, name):
            tensors[name] = torch.zeros_like(value)
    return tensors


def _biases(match: Match, source: Source) -> dict[str, Tensor]:
    """The file's biases under our names."""
    given = {}
    for name, foreign in match.sources.items():
        bias = f"{foreign.removesuffix('weight')}bias"
        if foreign.endswith(".weight") and bias in source.state:
            given[f"{name.removesuffix('weight')}bias"] = source.state[bias].float()
    return given


def _trunk_eps(encoder: ImageEncoder, own: dict[str, float], source: Source) -> dict[str, float]:
    """The eps of the source's BatchNorms: 1e-3 in the released SimIPU, else the architecture's own."""
    if source.released:
        return dict.fromkeys(own, 1e-3)
    plain = norm_eps(build_trunk(encoder.config)[0])
    return {name: plain.get(name, eps) for name, eps in own.items()}


def _fold_colours(encoder: ImageEncoder, tensors: dict[str, Tensor], match: Match, source: Source) -> dict[str, Tensor]:
    """The first convolution for the pictures as this run feeds them."""
    wanted = encoder.config.input
    order = source.meta.get("input", {}).get("order") if isinstance(source.meta.get("input"), Mapping) else None
    given = "imagenet_rgb"
    if source.released or order == "BGR":
        given = "caffe_bgr"
    elif order is None and "img_backbone." in match.prefix:
        log.warning(
            "--init: %s does not say what its pictures were; taken as image_encoder.input: %s", source.path, wanted
        )
        given = wanted
    elif order is None and match.prefix == "backbone." and source.meta:
        log.warning(
            "--init: %s does not say what its pictures were; taken as RGB normalised by ImageNet's mean and std, which "
            "mmdetection's caffe models (FCOS3D, PGD) do not have",
            source.path,
        )
    first = encoder.trunk.pretrained_cfg.get("first_conv")
    if given == wanted or f"{first}.weight" not in tensors:
        return tensors
    log.info("--init: %s: %s folded from %s to %s", source.path, first, given, wanted)
    return fold_input(tensors, first, given, wanted)


def _turn_kernels(tensors: dict[str, Tensor], match: Match, source: Source) -> dict[str, Tensor]:
    """Sparse kernels with axes (z, y, x); BEVFusion of mmdetection3d has (x, y, z), which its last layer betrays."""
    last = source.state.get(f"{match.prefix}conv_out.0.weight")
    turned = source.meta.get("kind") == "BEVFusionSparseEncoder"
    if last is not None and last.dim() == 5:
        turned = tuple(last.shape[:3]) == (1, 1, 3) or tuple(last.shape[1:4]) == (1, 1, 3)
    if not turned:
        return tensors
    log.info("--init: %s: kernels turned from (x, y, z) to (z, y, x)", source.path)
    return {n: v.permute(0, 3, 2, 1, 4).contiguous() if v.dim() == 5 else v for n, v in tensors.items()}


def _check_intensity(source: Source) -> None:
    about = source.meta.get("input")
    scale = about.get("intensity_scale", 1) if isinstance(about, Mapping) else 1
    if scale != 1:
        raise UserError(
            f"--init: {source.path}: was exported for an intensity of {scale:g} times 0..1; export it again without "
            "--intensity-scale, or take the checkpoint of its run"
        )
