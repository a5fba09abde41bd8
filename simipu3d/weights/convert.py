"""What was a file trained with, and how does it compute the same here?

What names do not carry, in this order: what the file says (our runs and exports do), what the user states
(`image_encoder.weights`), what only the released SimIPU has, and else an assumption, which the log names.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simipu3d.config import parse_part
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.branch import WeightBranch
from simipu3d.weights.folding import CONVENTIONS, Pictures, fold_bias, fold_eps, fold_pictures, norm_eps
from simipu3d.weights.namings import Match

log = logging.getLogger(__name__)

_RELEASED = re.compile(r"(^|\.)(pts_backbone\.SA_modules|mlp_cross_img|mlp_intro_points|img_conv1x1_1)\.")
"""Names that only pre-training by the released SimIPU leaves: BGR pictures, BatchNorm eps 1e-3."""


@dataclass(frozen=True)
class Source:
    """A file: where it was named, its tensors, what it says about itself (our exports do), and the run that wrote it
    (checkpoints of ours)."""

    path: Path
    what: str
    state: dict[str, Tensor]
    meta: Mapping[str, Any]
    run: Mapping[str, Any] | None

    @property
    def released(self) -> bool:
        return any(_RELEASED.search(name) for name in self.state)

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns of the points that it was trained on, where it says so."""
        about = self.run if self.run is not None else self.meta.get("input")
        names = about.get("point_columns", about.get("columns")) if isinstance(about, Mapping) else None
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return tuple(names) if listed and names else None

    def own_prefix(self, branch: WeightBranch) -> str | None:
        """Where a run of ours keeps an encoder."""
        return None if self.run is None else f"method.{branch.full_prefix}"

    def block(self, branch: WeightBranch) -> Mapping[str, Any] | None:
        """The block of an encoder in the configuration of the run."""
        config = None if self.run is None else self.run.get("config")
        block = config.get("point_encoder" if branch.image is None else "image_encoder") if config else None
        return block if isinstance(block, Mapping) else None

    def other_encoder(self, branch: WeightBranch) -> str:
        """The run's point encoder, where it is another one; "" where it is not, or nothing is known."""
        block = self.block(branch)
        if block is None or branch.image is not None or block.get("name") in (branch.network, None):
            return ""
        return str(block.get("name"))


def fold_branch(branch: WeightBranch, match: Match, source: Source, what: str) -> dict[str, Tensor]:
    """The tensors for the branch's own BatchNorms and pictures; 0 for the biases that the source does without."""
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in match.tensors.items()}
    own = branch.module.state_dict()
    own_eps = {name: eps for name, eps in norm_eps(branch.module).items() if f"{name}.running_var" in tensors}
    if branch.image is not None:
        pictures, given, assumed = _image_facts(branch, match, source, own_eps)
        if assumed:
            log.warning("%s does not say %s; state image_encoder.weights where it is otherwise", what, assumed)
        tensors = _fold_colours(branch, tensors, pictures, what)
    else:
        given = _point_eps(branch, match, source, own_eps)
        tensors = _without_biases(branch, tensors, _biases(match, source), own)
        tensors = _turn_kernels(tensors, match, source, what)
        _check_intensity(source)
    tensors = fold_eps(tensors, given, own_eps, rescale=True)
    for old, new in sorted({(given[name], own_eps[name]) for name in own_eps if given[name] != own_eps[name]}):
        log.info("%s: BatchNorm eps %g -> %g, into running_var", what, old, new)
    for name, value in own.items():
        if name not in tensors and match.naming.zeros and re.fullmatch(match.naming.zeros, name):
            tensors[name] = torch.zeros_like(value)
    return tensors


# ---------------------------------------------------------------------------------------------------------- image branch


def _image_facts(
    branch: WeightBranch, match: Match, source: Source, own_eps: Mapping[str, float]
) -> tuple[Pictures, dict[str, float], str]:
    """Pictures and BatchNorm eps that the file was trained with, and what of it was assumed, in words."""
    image, block = branch.image, source.block(branch)
    assert image is not None
    stated = image.stated
    order, pictures, eps = _stated_in_file(source), None, None
    if block is not None:
        pictures, eps = image.of_run(block)
    elif source.released:
        pictures, eps = CONVENTIONS["caffe_bgr"], dict.fromkeys(own_eps, 1e-3)
    elif order is not None:
        pictures, eps = order, image.stock_eps()
    assumed = []
    said = (
        block is not None or order is not None
    )  # a run or an export of ours knows better than a statement about others
    if stated.input is not None and not said:
        pictures = stated.pictures()
    elif stated.input is not None and stated.pictures() != pictures:
        log.warning(
            "%s: says that its pictures were %s; image_encoder.weights.input is not read", source.path, pictures
        )
    if pictures is None:
        ours = "img_backbone." in match.prefix
        pictures = image.pictures if ours else CONVENTIONS["imagenet_rgb"]
        trap = "; mmdetection's caffe models (FCOS3D, PGD) and the released SimIPU have BGR" * (not ours)
        trap = trap if match.prefix.endswith("backbone.") else ""
        assumed.append(f"what its pictures were (taken as {pictures}{', as image_encoder.input' * ours}{trap})")
    if stated.norm_eps is not None and not said:
        if not norm_eps(branch.module):
            raise UserError(f"image_encoder.weights.norm_eps: {branch.network} has no BatchNorm; leave it out")
        eps = dict.fromkeys(own_eps, stated.norm_eps)
    if eps is None:
        eps = image.stock_eps()
        if own_eps:
            assumed.append(f"its BatchNorm eps (taken as {', '.join(f'{v:g}' for v in sorted(set(eps.values())))})")
    return pictures, {name: eps.get(name, own) for name, own in own_eps.items()}, " and ".join(assumed)


def _stated_in_file(source: Source) -> Pictures | None:
    """The pictures that an export of ours names."""
    about = source.meta.get("input")
    order = about.get("order") if isinstance(about, Mapping) else None
    return {"RGB": CONVENTIONS["imagenet_rgb"], "BGR": CONVENTIONS["caffe_bgr"]}.get(str(order))


def _fold_colours(branch: WeightBranch, tensors: dict[str, Tensor], given: Pictures, what: str) -> dict[str, Tensor]:
    """The first convolution for the pictures as this run feeds them."""
    image = branch.image
    assert image is not None
    if given == image.pictures:
        return tensors
    if f"{image.first}.weight" not in tensors or tensors[f"{image.first}.weight"].dim() != 4:
        raise UserError(
            f"{what}: was trained on pictures as {given}, this run feeds {image.pictures}, and {branch.network} has no "
            "single first convolution to fold that into; set image_encoder.input to the file's"
        )
    log.info("%s: %s folded from %s to %s", what, image.first, given, image.pictures)
    return fold_pictures(tensors, image.first, given, image.pictures, pads=image.pads)


# ---------------------------------------------------------------------------------------------------------- point branch


def _point_eps(branch: WeightBranch, match: Match, source: Source, own_eps: Mapping[str, float]) -> dict[str, float]:
    """The eps of the file's BatchNorms: the run's own, else its project's."""
    block = source.block(branch)
    if block is None:
        return {name: match.naming.eps_of(name, eps) for name, eps in own_eps.items()}
    there = parse_part("point_encoder", POINT_ENCODERS, {**block})
    with torch.device("meta"):
        columns = source.columns or ("x", "y", "z", "intensity")
        eps = norm_eps(POINT_ENCODERS.of(there).target(there, point_columns=columns))
    return {name: eps.get(name, own) for name, own in own_eps.items()}


def _biases(match: Match, source: Source) -> dict[str, Tensor]:
    """The file's biases under our names."""
    given = {}
    for name, foreign in match.sources.items():
        bias = f"{foreign.removesuffix('weight')}bias"
        if foreign.endswith(".weight") and bias in source.state:
            given[f"{name.removesuffix('weight')}bias"] = source.state[bias].float()
    return given


def _without_biases(
    branch: WeightBranch, tensors: dict[str, Tensor], given: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Biases before a BatchNorm that this encoder does not have, taken into its running mean."""
    for norm in norm_eps(branch.module):
        head, _, last = norm.rpartition(".")
        conv = f"{head}.{last.replace('bn', 'conv')}"
        bias = f"{conv}.bias"
        lost = last.startswith("bn") and bias in given and bias not in own
        if lost and f"{norm}.running_mean" in tensors:
            tensors = fold_bias({**tensors, bias: given[bias]}, conv, norm)
    return tensors


def _turn_kernels(tensors: dict[str, Tensor], match: Match, source: Source, what: str) -> dict[str, Tensor]:
    """Sparse kernels with axes (z, y, x); BEVFusion of mmdetection3d has (x, y, z), which its last layer betrays."""
    last = source.state.get(f"{match.prefix}conv_out.0.weight")
    turned = source.meta.get("kind") == "BEVFusionSparseEncoder"
    if last is not None and last.dim() == 5:
        turned = tuple(last.shape[:3]) == (1, 1, 3) or tuple(last.shape[1:4]) == (1, 1, 3)
    if not turned:
        return tensors
    log.info("%s: kernels turned from (x, y, z) to (z, y, x)", what)
    return {n: v.permute(0, 3, 2, 1, 4).contiguous() if v.dim() == 5 else v for n, v in tensors.items()}


def _check_intensity(source: Source) -> None:
    about = source.meta.get("input")
    scale = about.get("intensity_scale", 1) if isinstance(about, Mapping) else 1
    if scale != 1:
        raise UserError(
            f"{source.what}: {source.path}: was exported for an intensity of {scale:g} times 0..1; export it again without "
            "--intensity-scale, or take the checkpoint of its run"
        )
