"""What does a weights file hold? Named tensors, and what it says about itself.

Files are never trusted: safetensors, or torch files read without running anything in them. Whatever a damaged file makes a
reader stumble over becomes one line; a file that is something else (a web page, a Git LFS pointer) is named for what it is.
"""

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simipu3d.errors import UserError
from simipu3d.moved_keys import upgrade
from simipu3d.weights.plain_pickle import load_plain

WRAPPERS = (
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "net",
    "network",
    "weights",
)
"""Entries of a file that only wrap its tensors; others become a part of the names, as `teacher.`."""
RUN_KEYS = frozenset({"config", "method", "global_step"})
"""What the `simipu3d` block of a checkpoint of ours holds at least."""
_MOST_VALUES = 1 << 28
"""A tensor that claims more values than this must also store them."""


class WeightsFile(NamedTuple):
    """A file that was read.

    Attributes:
        tensors: by name; a wrapper of the whole is cut off.
        meta: what the file says about itself (our exports do), else empty.
        run: of a checkpoint of ours, its `simipu3d` block; else None.
    """

    tensors: dict[str, Tensor]
    meta: Mapping[str, Any]
    run: Mapping[str, Any] | None


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


def _begin(path: Path, what: str) -> bytes:
    """The file's first bytes."""
    _check_is_file(path, what)
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError as error:
        raise UserError(f"{what}: {path}: cannot be read ({error.strerror})") from error


def _is_safetensors(begin: bytes) -> bool:
    """Eight bytes of length, then JSON."""
    return len(begin) > 8 and begin[8:9] == b"{" and struct.unpack("<Q", begin[:8])[0] < 1 << 32


def _check_kind(begin: bytes, path: Path, what: str) -> None:
    """Refuse what is no weights file at all, by its name."""
    text = begin[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = ""
    if text.startswith(b"version https://git-lfs"):
        kind = "is a Git LFS pointer, not the file itself; fetch it with git lfs pull"
    elif text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<script")):
        kind = "is a web page, not a weights file; download it again, perhaps after a login"
    elif text.startswith((b'{"', b"{\n", b"{\r", b"[{")):
        kind = "is a JSON text, not a weights file"
    elif begin.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ")):
        kind = "is a compressed archive; unpack it and give the weights file in it"
    elif begin.startswith(b"\x89HDF"):
        kind = "is an HDF5 file (Keras); save the tensors with torch.save or safetensors"
    elif begin.startswith(b"\x93NUMPY"):
        kind = "is a numpy array; save named tensors with torch.save or safetensors"
    elif not begin:
        kind = "is empty, so damaged; fetch it again"
    if kind:
        raise UserError(f"{what}: {path}: {kind}")


def read_torch_file(path: Path, what: str) -> Any:
    """Content of a torch file, on the CPU, without executing anything in it.

    Args:
        path: the file.
        what: the key or option that named it, for errors.

    Raises:
        UserError: it is missing, damaged, something else, or holds more than tensors and plain values.
    """
    begin = _begin(path, what)
    _check_kind(begin, path, what)
    if _is_safetensors(begin):
        raise UserError(f"{what}: {path}: is a safetensors file; name it {path.with_suffix('.safetensors').name}")
    try:
        return load_plain(path)
    except pickle.UnpicklingError as error:
        if any(words in str(error) for words in ("GLOBAL", "Can only", "Unsupported operand")):
            doubt = " (or is damaged)" if "Unsupported operand" in str(error) else ""
            raise UserError(
                f"{what}: {path}: holds pickled Python objects, which are never executed{doubt}; save tensors and plain "
                "values only, where it comes from, as torch.save(model.state_dict(), FILE) does"
            ) from error
        raise UserError(f"{what}: {path}: is no torch file, or damaged") from error
    except Exception as error:  # torch's reader raises every kind, whatever a damaged file makes it stumble over
        raise UserError(
            f"{what}: {path}: cannot be read as a torch file ({type(error).__name__}); it may be damaged"
        ) from error


def _read_safetensors(path: Path, what: str) -> WeightsFile:
    from safetensors import safe_open

    begin = _begin(path, what)
    _check_kind(begin, path, what)
    if not _is_safetensors(begin) and zipfile.is_zipfile(path):
        raise UserError(f"{what}: {path}: is a torch file, no safetensors; name it {path.with_suffix('.pth').name}")
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("simipu3d")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        meta = json.loads(about) if about else {}
    except Exception as error:  # as above: its own error, and those of what it calls
        raise UserError(f"{what}: {path}: cannot be read as safetensors ({error}); it may be damaged") from error
    return WeightsFile(tensors, meta if isinstance(meta, Mapping) else {}, None)


def _named_tensors(content: Mapping[Any, Any], before: str, depth: int, found: dict[str, Tensor]) -> None:
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            found.setdefault(before + name, value)
    wrapped = False  # of several wrappers only the first is bare
    inner = [name for name, value in content.items() if isinstance(name, str) and isinstance(value, Mapping)]
    for name in sorted(inner, key=lambda name: WRAPPERS.index(name) if name in WRAPPERS else len(WRAPPERS)):
        if depth and name not in ("simipu3d", "meta"):
            bare = name in WRAPPERS and not wrapped
            count = len(found)
            _named_tensors(content[name], before if bare else f"{before}{name}.", depth - 1, found)
            wrapped |= bare and len(found) > count


def _check_tensors(tensors: Mapping[str, Tensor], path: Path, what: str) -> None:
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            raise UserError(
                f"{what}: {path}: {name} is sparse, quantized, complex or without values; save it as float32"
            )
        if value.numel() > _MOST_VALUES and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            size = math.prod(value.shape)
            raise UserError(f"{what}: {path}: {name} claims {size} values and does not hold them; the file is damaged")


def read_file(path: Path, what: str) -> WeightsFile:
    """Named tensors of a safetensors or torch file, and what it says about itself.

    Entries that only wrap the tensors (`WRAPPERS`) are looked through; those of another entry get its name in front, as
    `teacher.backbone.conv1.weight`.

    Args:
        path: the file.
        what: the key or option that named it, for errors.

    Raises:
        UserError: it is missing, damaged, something else, or holds no named tensors.
    """
    if path.suffix == ".safetensors":
        file = _read_safetensors(path, what)
    else:
        content = read_torch_file(path, what)
        tensors: dict[str, Tensor] = {}
        meta = run = None
        if isinstance(content, Mapping):
            _named_tensors(content, "", 2, tensors)
            meta, run = content.get("meta"), content.get("simipu3d")
        own = isinstance(run, Mapping) and "state_dict" in content
        file = WeightsFile(tensors, meta if isinstance(meta, Mapping) else {}, run if own else None)
    if not file.tensors:
        raise UserError(f"{what}: {path}: holds no named tensors, neither at its top nor under {', '.join(WRAPPERS)}")
    _check_tensors(file.tensors, path, what)
    return file


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of `read_file` alone."""
    return read_file(path, what).tensors


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this project as tensors and plain values.

    Raises:
        UserError: it is missing, damaged, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    way_out = f"use another of {path.resolve().parent}"
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes check sums and does not look at them
            broken = archive.testzip()
        if broken:
            raise UserError(f"{path}: damaged: {broken} in it fails its check sum; {way_out}")
        checkpoint = load_plain(path)
    except UserError:
        raise
    except Exception as error:  # zip and torch raise every kind, whatever a damaged file makes them stumble over
        objects = isinstance(error, pickle.UnpicklingError)
        what = "holds more than tensors and plain values" if objects else f"cut or foreign, {type(error).__name__}"
        raise UserError(f"{path}: damaged, or not a checkpoint ({what}); {way_out}") from error
    own = checkpoint.get("simipu3d") if isinstance(checkpoint, dict) else None
    if not isinstance(own, dict) or RUN_KEYS - own.keys() or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(
            f"{path}: not a checkpoint of simipu3d pretrain; weights of other origin go to --init or image_encoder.pretrained"
        )
    if not isinstance(own["config"], dict):
        raise UserError(f"{path}: simipu3d.config: no block of keys; the file was changed; {way_out}")
    own["config"] = upgrade(own["config"])
    return checkpoint
