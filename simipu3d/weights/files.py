"""Which tensors of a weights file belong to this backbone?

Files are never trusted: safetensors, or torch files read with `weights_only`. A load is all or nothing: every tensor of
the backbone must come from the file with its shape, and the report names what was used and what was left.
"""

import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simipu3d.errors import UserError

_NESTED = ("state_dict", "model", "model_state")
_CLASSIFIERS = ("fc.", "head.", "classifier.")


@dataclass(frozen=True)
class LoadReport:
    """What a weights file gave.

    Attributes:
        source: the file.
        prefix: what stood before the backbone's names in it.
        loaded: names of the backbone's tensors that came from the file.
        not_in_file: names that did not (only BatchNorm's step counters may be missing).
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


def some_names(names: Iterable[str], count: int = 4) -> str:
    """The first few names and how many more there are, or "none"."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "none"


def _check_is_file(path: Path, what: str) -> None:
    if path.is_dir():
        raise UserError(f"{what}: {path}: is a folder; give the file in it, as {path / 'model.safetensors'}")
    if not path.is_file():
        raise UserError(f"{what}: {path}: no such file")


def read_torch_file(path: Path, what: str) -> Any:
    """Content of a torch file, on the CPU, without executing anything in it.

    Args:
        path: the file.
        what: the key or option that named it, for errors.

    Raises:
        UserError: it is missing, damaged, or holds more than tensors and plain values.
    """
    _check_is_file(path, what)
    try:
        with warnings.catch_warnings():  # about pickle protocols, which a damaged file has at random
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(words in str(error) for words in ("GLOBAL", "Can only", "Unsupported operand")):
            doubt = " (or is damaged)" if "Unsupported operand" in str(error) else ""
            raise UserError(
                f"{what}: {path}: holds pickled Python objects, which are never executed{doubt}; save tensors and plain "
                "values only, where it comes from, as torch.save(model.state_dict(), FILE) does"
            ) from error
        raise UserError(f"{what}: {path}: is no torch file, or damaged") from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{what}: {path}: cannot be read as a torch file ({type(error).__name__}); it may be damaged"
        ) from error


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """Named tensors of a safetensors or torch file; a `state_dict`, `model` or `model_state` entry is looked into.

    Raises:
        UserError: it is missing, damaged, or holds no named tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        _check_is_file(path, what)
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{what}: {path}: cannot be read as safetensors ({error}); it may be damaged") from error
    content = read_torch_file(path, what)
    nested = [content[key] for key in _NESTED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
    entries = nested[0] if nested else content
    tensors = {}
    if isinstance(entries, Mapping):
        tensors = {
            name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)
        }
    if not tensors:
        raise UserError(f"{what}: {path}: holds no named tensors, neither at its top nor under {', '.join(_NESTED)}")
    return tensors


def load_pretrained(trunk: nn.Module, path: Path, what: str, *, not_run: Iterable[str] = ()) -> LoadReport:
    """Load a weights file into a backbone, completely or not at all.

    Args:
        trunk: the backbone; its tensors are overwritten in place.
        path: .safetensors, or a torch file with a state dict in timm's (for ResNets: torchvision's) names. One prefix
            before the names is cut off when only one prefix completes the backbone.
        what: the key that named the file, for errors.
        not_run: names of the architecture that this backbone was built without; they may be in the file.

    Raises:
        UserError: the file cannot be read; no prefix, or more than one, fits; a tensor is missing, has another shape
            or is not finite; or the file holds more of this network than this backbone has (another depth).
    """
    tensors = read_weights(path, what)
    own = trunk.state_dict()
    prefix = _find_prefix(tensors, own, f"{what}: {path}")
    found = {name: tensors[prefix + name] for name in own if prefix + name in tensors}
    wrong = [name for name, value in found.items() if value.shape != own[name].shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{what}: {path}: {len(wrong)} tensors have another shape than the backbone's, first {name}: "
            f"{tuple(found[name].shape)} in the file, {tuple(own[name].shape)} wanted; "
            "check image_encoder.name and model_args"
        )
    bad = [name for name, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{what}: {path}: {some_names(bad)} hold NaN or infinite values; take another file")
    others = {name for name in tensors if name not in {prefix + name for name in own}}
    inner = {name: name.removeprefix(prefix) for name in others if name.startswith(prefix)}
    classifier = {full for full, name in inner.items() if name.startswith(_CLASSIFIERS)}
    parts = {name.partition(".")[0] for name in own}
    not_run = set(not_run)
    surplus = [
        n for full, n in inner.items() if full not in classifier and n not in not_run and n.partition(".")[0] in parts
    ]
    if surplus:
        raise UserError(
            f"{what}: {path}: holds {len(surplus)} tensors that this backbone does not have "
            f"({some_names(sorted(surplus))}): it is another architecture or depth; check image_encoder.name"
        )
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    return LoadReport(
        str(path),
        prefix,
        tuple(found),
        tuple(name for name in own if name not in found),
        tuple(sorted(classifier)),
        tuple(sorted(others - classifier)),
    )


def _find_prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> str:
    """The one prefix under which the file has every tensor of the backbone (step counters may be missing)."""
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    hits: Counter[str] = Counter()
    for name in tensors:
        start = 0
        while start >= 0:
            if name[start:] in needed:
                hits[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    complete = [prefix for prefix, count in hits.items() if count == len(needed)]
    if len(complete) > 1:
        raise UserError(
            f"{source}: holds this backbone {len(complete)} times, under {', '.join(map(repr, sorted(complete)))}; "
            "save the one that is meant to a file of its own"
        )
    if complete:
        return complete[0]
    if not hits:
        raise UserError(
            f"{source}: none of its {len(tensors)} tensors ({some_names(tensors)}) belongs to this backbone"
        )
    prefix, count = hits.most_common(1)[0]
    missing = sorted(name for name in needed if prefix + name not in tensors)
    raise UserError(
        f"{source}: holds only {count} of the {len(needed)} tensors of this backbone (under {prefix!r}); "
        f"missing: {some_names(missing)}; check image_encoder.name and model_args"
    )
