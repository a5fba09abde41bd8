"""Which tensors of a foreign checkpoint are an encoder's, under which naming and prefix?

For each naming that is known, every prefix that occurs is tried, and the one that fits most wins; tensors come out under
our names and in our layout. Nothing here knows BatchNorm's eps of a file or what its pictures looked like; that is folded
by who loads them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simipu3d.errors import UserError
from simipu3d.weights import foreign_names as names

_COPY = re.compile(r"(^|\.)(encoder_k|momentum\w*|ema\w*|\w+_ema|student|\w+_k)\.")
"""Prefixes of a slowly moving copy, which loses against the network it is a copy of; and DINO's student, because DINO
itself evaluates the teacher."""
LEAST = 0.5
"""A file that fills less of a network's trainable tensors than this does not hold that network."""
ENOUGH = 0.95
"""A file that holds a network fills at least this share of its trainable tensors, unless the user allows less."""


@dataclass(frozen=True)
class Naming:
    """How a project names and lays out one of our encoders.

    Attributes:
        title: for the table.
        rename: our name to theirs, None where they have no such tensor.
        to_own: their tensor in our layout for a tensor of that shape, None where it does not fit.
        bn_eps: of their BatchNorms whose name begins with a key, where it differs from the encoder's own default.
        zeros: our tensors that they do not have, because they are 0 there.
        special: names of ours (a pattern) whose tensors are laid otherwise, and their `to_own`.
        open_layout: their tensor with our order of axes, whatever its shape, None where that cannot be seen.
        others: names in the file (a pattern) that show another network, and which.
    """

    title: str
    rename: names.Rename
    to_own: Callable[[Tensor, torch.Size], Tensor | None]
    bn_eps: Mapping[str, float] = field(default_factory=dict)
    zeros: str | None = None
    special: tuple[str, Callable[[Tensor, torch.Size], Tensor | None]] | None = None
    open_layout: Callable[[Tensor, torch.Size], Tensor | None] = names.same_axes
    others: tuple[str, str] | None = None

    def convert(self, name: str, value: Tensor, shape: torch.Size) -> Tensor | None:
        """Their tensor for ours of that name and shape, None where it does not fit."""
        if self.special and re.search(self.special[0], name):
            return self.special[1](value, shape)
        return self.to_own(value, shape)

    def eps_of(self, norm: str, own: float) -> float:
        """The project's eps of a BatchNorm of ours, `own` where nothing is known."""
        return next((eps for begin, eps in self.bn_eps.items() if norm.startswith(begin)), own)


def _voxel(title: str, rename: names.Rename, zeros: str | None = None) -> Naming:
    return Naming(
        title, rename, names.from_layout, {"": 1e-3}, zeros, open_layout=names.open_sparse, others=_VOXEL_NEXT
    )


_VOXEL_NEXT = (
    r"^(conv6|shared_conv)\.",
    "VoxelNeXt's, whose stage 4 pads its height by 1 where this one does not, so that its features lie elsewhere",
)


_BLOCK_BIAS = r".*\.conv[12]\.bias"
_SHELL_BIAS = r"SA_modules\..*\.conv\.bias"
OWN_NAMES = (Naming("its own names", names.same_name, names.as_it_is),)
IMAGE_NAMINGS = (Naming("torchvision, timm", names.same_name, names.as_it_is),)
SWIN_NAMINGS = (
    *IMAGE_NAMINGS,
    Naming("Microsoft", names.swin_microsoft, names.as_it_is),
    Naming(
        "mmdetection",
        names.swin_mmdet,
        names.as_it_is,
        special=(r"\.downsample\.(reduction\.weight|norm\.)", names.from_unfold),
    ),
)
"""Of timm's class SwinTransformer."""
NAMINGS: dict[str, tuple[Naming, ...]] = {
    "voxel_backbone8x": (
        _voxel("OpenPCDet", names.same_name),
        _voxel("mmdetection3d", names.mmdet3d_plain),
    ),
    "voxel_res_backbone8x": (
        _voxel("OpenPCDet", names.same_name, _BLOCK_BIAS),
        _voxel("mmdetection3d", names.mmdet3d_residual, _BLOCK_BIAS),
    ),
    "pointnet2_msg": (
        Naming("SimIPU, mmdetection3d", names.same_name, names.as_it_is, {"SA_": 1e-3, "agg": 1e-5}, _SHELL_BIAS),
        Naming("OpenPCDet", names.openpcdet_pointnet, names.as_it_is, {"SA_": 1e-5, "agg": 1e-5}, _SHELL_BIAS),
    ),
    "pointnet2_ssg": (
        Naming("mmdetection3d", names.same_name, names.as_it_is, {"SA_": 1e-5}, _SHELL_BIAS),
        Naming("OpenPCDet", names.openpcdet_pointnet, names.as_it_is, {"SA_": 1e-5}, _SHELL_BIAS),
    ),
    "sparse_unet34": (
        Naming("MinkowskiEngine", names.minkowski, names.from_minkowski, {"": 1e-5}, open_layout=names.open_minkowski),
        Naming("ours", names.same_name, names.from_layout, {"": 1e-5}, open_layout=names.open_sparse),
    ),
}
"""Namings by registered encoder; encoders of others are looked for under their own names."""


@dataclass(frozen=True)
class Match:
    """What a file holds of one branch under one naming and prefix.

    Attributes:
        naming, prefix: where it was looked for.
        tensors: by our names, in our layout.
        sources: our names to the file's.
        wrong: our names whose tensor in the file has another shape, with both shapes in words.
    """

    naming: Naming
    prefix: str
    tensors: dict[str, Tensor]
    sources: dict[str, str]
    wrong: dict[str, str]

    @property
    def renamed(self) -> int:
        """How many of the tensors are called otherwise in the file, apart from the prefix."""
        return sum(self.prefix + own != theirs for own, theirs in self.sources.items())


_CHAINS = ("SA_modules", "aggregation_mlps")
"""Layers in a row whose later ones change nothing before them: a file may have more of these."""


def further_layers(own: Iterable[str], given: Iterable[str]) -> list[str]:
    """Layers that a file has in a row of ours beyond ours, as `layer1.2` where we end with `layer1.1`: then it is a deeper
    network, and those of its layers that fit compute something else without the others.

    Args:
        own: names of our tensors, as the file's project calls them.
        given: names in the file, without prefix.
    """
    known, rows = set(), set()
    for name in own:
        parts = name.split(".")
        for end, part in enumerate(parts):
            known.add(".".join(parts[: end + 1]))
            if part.isdecimal():
                rows.add(".".join(parts[:end]))
    found: dict[str, None] = {}
    for name in given:
        parts = name.split(".")
        for end, part in enumerate(parts):
            row, layer = ".".join(parts[:end]), ".".join(parts[: end + 1])
            if part.isdecimal() and row in rows and layer not in known and row not in _CHAINS:
                found[layer] = None
    return sorted(found)


def best_match(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    namings: tuple[Naming, ...],
    what: str,
    wanted: str | None = None,
) -> Match:
    """The naming and prefix under which a file holds most of a branch.

    Args:
        own: the branch's tensors.
        state: the file's.
        namings: to try.
        what: the file and the branch, for errors.
        wanted: a prefix that wins where it is among the best.

    Raises:
        UserError: the file holds the branch more than once, and none is the copy of another.
    """
    found = [
        match_names(own, state, naming, prefix)
        for naming in namings
        for prefix in _prefixes(own, state, naming) or [""]
    ]
    most = max(len(match.tensors) for match in found)
    best = [match for match in found if len(match.tensors) == most]
    best = [match for match in best if match.prefix == wanted] or best
    best = [match for match in best if not _COPY.search(match.prefix)] or best
    if len({match.prefix for match in best}) > 1 and most > LEAST * len(own):
        prefixes = ", ".join(sorted(repr(match.prefix) for match in best))
        raise UserError(f"{what}: is in it {len(best)} times, under {prefixes}; save the one that is meant to a file")
    return best[0]


def _prefixes(own: Mapping[str, Tensor], state: Mapping[str, Tensor], naming: Naming) -> list[str]:
    """What stands before the branch's names in the file, the commonest ones."""
    wanted = {naming.rename(name) for name in own} - {None}
    hits: Counter[str] = Counter()
    for name in state:
        start = 0
        while start >= 0:
            if name[start:] in wanted:
                hits[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    return [prefix for prefix, _ in hits.most_common(8)]


def match_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor], naming: Naming, prefix: str) -> Match:
    """What a file holds of a branch under one naming and prefix."""
    match = Match(naming, prefix, {}, {}, {})
    for name, value in own.items():
        foreign = naming.rename(name)
        given = state.get(f"{prefix}{foreign}") if foreign is not None else None
        if given is None:
            continue
        converted = naming.convert(name, given, value.shape)
        if converted is None:
            match.wrong[name] = f"{tuple(given.shape)} in the file, {tuple(value.shape)} here"
        else:
            match.tensors[name] = converted
            match.sources[name] = f"{prefix}{foreign}"
    return match
