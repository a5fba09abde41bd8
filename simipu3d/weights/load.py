"""Which tensors of any checkpoint start a run? One way for `--init` and `image_encoder.pretrained`.

The file is recognised by the names in it (`weights/namings.py`), ours or foreign. BatchNorm's eps and the input's
normalisation are folded (`weights/convert.py`), so that the run starts from the function that was trained. A table says how
many tensors were used, renamed and left; `init.txt` in the run's folder names every one.

Known: torchvision, timm and its original authors, MoCo, DINO for the image branch; mmdetection3d and SimIPU's release for
both; OpenPCDet (spconv 1 and 2), PointContrast (MinkowskiEngine) for points; our own checkpoints, and our exports of all of
these. Read without executing anything.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from simipu3d.errors import UserError
from simipu3d.weights.branch import WeightBranch, find_branches
from simipu3d.weights.convert import Source, fold_branch
from simipu3d.weights.files import read_file, some_names
from simipu3d.weights.foreign_names import as_it_is, same_name
from simipu3d.weights.inputs import fit_inputs
from simipu3d.weights.namings import ENOUGH, LEAST, Match, Naming, best_match, further_layers, match_names

log = logging.getLogger(__name__)

_MOST_WRONG = 2
"""Tensors of an image backbone that may have another shape before it is another network."""
_CLASSIFIERS = ("fc.", "head.", "classifier.")
_NEEDLESS = re.compile(r"(relative_position_index|attn_mask|num_batches_tracked|mask_token|\.periods)$")
"""Tensors of a file that change nothing when they are left out."""


@dataclass(frozen=True)
class LoadReport:
    """What a weights file gave.

    Attributes:
        source: the file.
        prefix: what stood before the backbone's names in it.
        loaded: names of the backbone's tensors that came from the file.
        not_in_file: names that did not.
        classifier: names of classifier tensors in the file; ignored.
        left_over: all other names in the file that were not used.
    """

    source: str
    prefix: str
    loaded: tuple[str, ...]
    not_in_file: tuple[str, ...]
    classifier: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        under = f" under {self.prefix!r}" if self.prefix else ""
        return (
            f"{self.source}: {len(self.loaded)} tensors loaded{under}; "
            f"not in the file: {some_names(self.not_in_file)}; "
            f"ignored classifier: {some_names(self.classifier)}; left over: {some_names(self.left_over)}"
        )


@dataclass
class _Filled:
    """One encoder and what the file gives it; `failure` says why it is nothing."""

    branch: WeightBranch
    match: Match
    tensors: dict[str, Tensor] = field(default_factory=dict)
    share: float = 0.0
    failure: str = ""

    @property
    def left(self) -> list[str]:
        return [name for name in self.branch.module.state_dict() if name not in self.tensors]


def load_weights(method: nn.Module, path: Path, *, partial: bool = False) -> list[str]:
    """Start a method from the weights of a checkpoint, ours or foreign (`--init`).

    Args:
        method: freshly initialised; overwritten in place, or untouched where an error is raised.
        path: the file; .safetensors, or any torch file of tensors and plain values.
        partial: accept a file that fills less than 95 % of an encoder.

    Returns:
        A line for every tensor: used (under which name), keeping its random initialisation, or not used.

    Raises:
        UserError: the file cannot be read, nothing in it fits, or an encoder would start half random.
    """
    source = Source(path, "--init", *read_file(path, "--init"))
    filled = [_fill(branch, source, partial=partial) for branch in find_branches(method)]
    used = [one for one in filled if not one.failure]
    failures = [f"{one.branch.title} {one.failure}" for one in filled if one.failure]
    if not used:
        raise UserError(
            f"--init: {path}: nothing in it fits; of its {len(source.state)} tensors ({some_names(source.state, 2)}) this "
            f"configuration can use: {'; '.join(failures) or 'none'}; check the names of the encoders"
        )
    rest = _rest(method, source, filled)
    taken = {foreign for one in used for foreign in one.match.sources.values()} | {f"method.{name}" for name in rest}
    lines, rows = [], []
    for one in filled:
        one.branch.module.load_state_dict(one.tensors, strict=False)
        lines += _name_lines(one)
        rows.append(_row(one))
        if one.failure.startswith("none"):
            log.warning("--init %s: %s: %s; it keeps its random initialisation", path, one.branch.title, one.failure)
    method.load_state_dict(rest, strict=False)
    inside = tuple(one.branch.full_prefix for one in filled)
    lines += [f"used: {name} from method.{name}" for name in rest]
    others = [name for name in method.state_dict() if name not in rest and not name.startswith(inside)]
    lines += [f"keeps its random initialisation: {name}" for name in others]
    unused = sorted(source.state.keys() - taken)
    lines += [f"not used: {name}" for name in unused]
    _log_table(path, rows, unused)
    for line in lines:
        log.debug("--init: %s", line)
    return lines


def load_pretrained(branch: WeightBranch, path: Path, what: str) -> LoadReport:
    """Start one encoder from a file (`image_encoder.pretrained`).

    Args:
        branch: the encoder; overwritten in place, or untouched where an error is raised.
        path: as in `load_weights`.
        what: the key that named the file, for errors.

    Raises:
        UserError: the file cannot be read, or is not of this network.
    """
    source = Source(path, what, *read_file(path, what))
    filled = _fill(branch, source, partial=False)
    if filled.failure:
        raise UserError(
            f"{what}: {path}: this network finds {filled.failure} in its {len(source.state)} tensors "
            f"({some_names(source.state)}); check {branch.title}.name and model_args"
        )
    branch.module.load_state_dict(filled.tensors, strict=False)
    prefix, taken = filled.match.prefix, set(filled.match.sources.values())
    others = [name for name in source.state if name not in taken]
    classifier = [n for n in others if n.startswith(prefix) and n.removeprefix(prefix).startswith(_CLASSIFIERS)]
    left_over = sorted(set(others) - set(classifier))
    loaded = tuple(filled.tensors)
    return LoadReport(str(path), prefix, loaded, tuple(filled.left), tuple(sorted(classifier)), tuple(left_over))


def _fill(branch: WeightBranch, source: Source, *, partial: bool) -> _Filled:
    """What the file holds of one encoder, for its own layers, BatchNorms and pictures; nothing is changed yet.

    Raises:
        UserError: the file holds this encoder, and it cannot be used as it is.
    """
    what = f"{source.what}: {source.path}: {branch.title}"
    partial = partial or bool(branch.image and branch.image.stated.partial)
    match = _find(branch, source, what)
    filled = _Filled(branch, match)
    _check_layout(branch, match, source)
    share = _share(branch, {*match.tensors, *match.wrong})
    if other := source.other_encoder(branch):
        filled.failure = f"none, it is another network there: {other}"
        return filled
    if share < LEAST:
        filled.failure = _counted(branch, match)
        return filled
    filled.failure = _other_network(branch, match, source, partial)
    if filled.failure:
        return filled
    places = _foreign_names(branch, match)
    given = {name: source.state[foreign] for name, foreign in places.items() if foreign in source.state}
    for note in fit_inputs(branch, match, given, source.columns, what):
        log.warning("%s: %s", what, note)
    if branch.image and len(match.wrong) > _MOST_WRONG:
        filled.failure = (
            f"none, it is another network there: {len(match.wrong)} other shapes, as of {some_names(match.wrong, 2)}"
        )
        return filled
    filled.tensors = fold_branch(branch, match, source, what)
    filled.share = _share(branch, filled.tensors)
    _check_whole(filled, what, partial)
    _check_finite(filled.tensors, what)
    return filled


def _find(branch: WeightBranch, source: Source, what: str) -> Match:
    """Where the file holds an encoder; an image backbone also in the names of its authors, which timm can convert."""
    own = branch.module.state_dict()
    match = best_match(own, source.state, branch.namings, what, source.own_prefix(branch))
    if branch.image is None or _share(branch, match.tensors) == 1:
        return match
    for prefix in dict.fromkeys((match.prefix, "")):
        given = {n.removeprefix(prefix): value for n, value in source.state.items() if n.startswith(prefix)}
        converted = branch.image.convert(dict(given)) or {}
        other = match_names(own, converted, Naming("its authors, by timm", same_name, as_it_is), "")
        if len(other.tensors) > len(match.tensors):
            places = {value.data_ptr(): name for name, value in given.items() if value.numel()}
            sources = {n: prefix + places.get(v.data_ptr(), n) for n, v in other.tensors.items()}
            match = Match(other.naming, prefix, other.tensors, sources, other.wrong)
            made = [name for name, value in other.tensors.items() if value.data_ptr() not in places]
            log.info("%s: names converted by timm; of another size or layout, and resized: %s", what, some_names(made))
    return match


def _foreign_names(branch: WeightBranch, match: Match) -> dict[str, str]:
    """Names in the file of the tensors whose shape differs and of the layers that read the input."""
    found = {}
    for name in (*match.wrong, *branch.inputs):
        foreign = match.naming.rename(name)
        if name in match.wrong or name in match.tensors:
            found[name] = match.sources.get(name, f"{match.prefix}{foreign}")
    return found


# ------------------------------------------------------------------------------------------------------------- refusals


def _trainable(branch: WeightBranch) -> list[str]:
    never = set() if branch.image is None else set(branch.image.untrained)
    return [name for name, _ in branch.module.named_parameters() if name not in never]


def _share(branch: WeightBranch, names: set[str] | Mapping[str, Tensor]) -> float:
    """How much of a network's trainable tensors these are."""
    wanted = _trainable(branch)
    return sum(name in names for name in wanted) / max(len(wanted), 1)


def _counted(branch: WeightBranch, match: Match) -> str:
    wanted = _trainable(branch)
    found = sum(name in match.tensors for name in wanted)
    first = ""
    for name, shapes in match.wrong.items():
        first = f" ({len(match.wrong)} have another shape, first {name}: {shapes})"
        break
    return f"{found} of {len(wanted)} trainable tensors{first}"


def _other_network(branch: WeightBranch, match: Match, source: Source, partial: bool) -> str:
    """Why a file's network is another one than the branch's, though many names and shapes fit; "" if it is not."""
    given = [name.removeprefix(match.prefix) for name in source.state if name.startswith(match.prefix)]
    if match.naming.others and any(re.search(match.naming.others[0], name) for name in given):
        return f"none, it is another network there: {match.naming.others[1]}"
    never = () if branch.image is None else branch.image.untrained
    known = [
        foreign for foreign in map(match.naming.rename, (*branch.module.state_dict(), *never)) if foreign is not None
    ]
    if further := further_layers(known, given):
        return f"none, it is another network there: deeper, by {some_names(further)}"
    if branch.image is None or partial or match.naming.title.startswith("its authors"):
        return ""
    parts = {name.partition(".")[0] for name in known}
    unknown = {name for name in given if name.partition(".")[0] in parts} - set(known)
    more = sorted(name for name in unknown if not _NEEDLESS.search(name) and not name.startswith(_CLASSIFIERS))
    return f"none, it is another network there: it also has {some_names(more)}" if more else ""


def _check_layout(branch: WeightBranch, match: Match, source: Source) -> None:
    """Refuse sparse weights (kz, ky, kx, out, in), which some spconv 2.0 have: where in = out they pass for spconv 1.x."""
    own = branch.module.state_dict()
    for name, shapes in match.wrong.items():
        given = source.state.get(f"{match.prefix}{match.naming.rename(name)}")
        if given is not None and given.dim() == 5 and given.permute(3, 0, 1, 2, 4).shape == own[name].shape:
            raise UserError(
                f"{source.what}: {source.path}: {name} is {shapes}: its weights lie as (kz, ky, kx, out, in), and where in = "
                "out nobody could tell; save it again as spconv 1.x (kz, ky, kx, in, out) or 2.x (out, kz, ky, kx, in)"
            )


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{what}: {some_names(bad)} hold NaN or infinite values; take another file")


def _check_whole(filled: _Filled, what: str, partial: bool) -> None:
    """Refuse an encoder that would start half random, unless that is allowed."""
    branch, match = filled.branch, filled.match
    whole = {name for name in branch.module.state_dict() if not name.endswith("num_batches_tracked")}
    missing = sorted(whole - filled.tensors.keys())
    if partial or not missing:
        if missing:
            log.warning("%s: %d tensors keep their random initialisation: %s", what, len(missing), some_names(missing))
        return
    way_out = "take another file, or accept it as it is with --partial (image_encoder.weights.partial: true)"
    if match.wrong:
        name = next(iter(match.wrong))
        raise UserError(
            f"{what}: {len(match.wrong)} tensors have another shape, first {name}: {match.wrong[name]}; {way_out}"
        )
    half = [name for name in missing if name not in dict(branch.module.named_parameters())]
    if filled.share < ENOUGH or half:
        wanted = _trainable(branch)
        found = sum(name in filled.tensors for name in wanted)
        raise UserError(
            f"{what}: the file fills {found} of {len(wanted)} trainable tensors ({100 * filled.share:.0f} %); missing: "
            f"{some_names(half or missing)}; {way_out}"
        )
    log.warning("%s: %d tensors keep their random initialisation: %s", what, len(missing), some_names(missing))


# ---------------------------------------------------------------------------------------------------------- what it says


def _rest(method: nn.Module, source: Source, filled: list[_Filled]) -> dict[str, Tensor]:
    """Heads and necks from a run of our own, by their names, but none of an encoder that takes nothing."""
    if source.run is None:
        return {}
    inside = tuple(one.branch.full_prefix for one in filled)
    failed = tuple(f"{one.branch.title}." for one in filled if one.failure)
    found = {}
    for name, value in method.state_dict().items():
        given = source.state.get(f"method.{name}")
        if given is not None and given.shape == value.shape and not name.startswith((*inside, *failed)):
            found[name] = given
    _check_finite(found, f"{source.what}: {source.path}")
    return found


def _name_lines(one: _Filled) -> list[str]:
    lines, title = [], one.branch.title
    for name in one.tensors:
        foreign = one.match.sources.get(name)
        lines.append(f"used: {title}.{name} from {foreign}" if foreign else f"set to 0: {title}.{name}")
    wrong = {} if one.failure else one.match.wrong
    lines += [f"keeps its random initialisation, another shape: {title}.{n}: {shapes}" for n, shapes in wrong.items()]
    return lines + [f"keeps its random initialisation: {title}.{name}" for name in one.left if name not in wrong]


def _row(one: _Filled) -> tuple[str, ...]:
    if one.failure:
        return one.branch.title, "nothing used", "0%", "0", "0", str(len(one.left))
    where = one.match.naming.title + (f" under {one.match.prefix}" if one.match.prefix else "")
    used = sum(name in one.match.sources for name in one.tensors)
    return one.branch.title, where, f"{100 * one.share:.0f}%", str(used), str(one.match.renamed), str(len(one.left))


def _log_table(path: Path, rows: list[tuple[str, ...]], unused: list[str]) -> None:
    head = ("encoder", "found as", "trainable", "used", "renamed", "random")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    log.info("--init %s:\n  %s", path, "\n  ".join(table))
    log.info("--init: not used: %d tensors of the file: %s", len(unused), some_names(unused))
