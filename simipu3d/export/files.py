"""How does an exported file come into being? Under a temporary name, checked, then renamed; or not at all.

Beside every file stand `<file>.json` (what it is) and `<file>.txt` (how to load it); a folder holds both.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simipu3d.errors import UserError
from simipu3d.export.image import verify
from simipu3d.weights.files import some_names

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ExportReport:
    """What was written: the path, its metadata, the lines for the target's configuration, and what a user has to know."""

    path: Path
    sidecar: Path
    meta: dict[str, Any]
    usage: list[str]
    facts: list[str]

    def summary(self) -> str:
        """What a user has to know, one fact a line."""
        meta = self.meta
        lines = [
            f"{meta['target']} {meta['kind']}: {self.path} (metadata: {self.sidecar})",
            f"tensors: {meta['tensors']}, names {meta['names']}",
            *self.facts,
        ]
        return "\n".join([*lines, "use it with:", *(f"  {line}" for line in self.usage)])


def load_text(meta: Mapping[str, Any], usage: list[str]) -> str:
    """The short text beside a file: what it is, where it comes from, how to load it."""
    source, data = meta["source_checkpoint"], ", ".join(str(entry["name"]) for entry in meta["datasets"])
    largest = meta["verification"]["largest_relative_difference"]
    lines = [
        f"{meta['target']} {meta['kind']}, {meta['tensors']} tensors, names {meta['names']}",
        f"pre-trained by simipu3d {source['simipu3d_version']} ({meta['method']}) on {data}; {meta['licence']}",
        f"from {source['file']}, epoch {source['epoch']}, step {source['step']}, commit {meta['git_commit']}",
        f"converted: {'; '.join(meta['conversions']) or 'nothing'}",
        f"features differ from the pre-training network's by at most {largest:.1e} of their largest value",
        "",
        "How to load it:",
        *(f"  {line}" for line in usage),
    ]
    return "\n".join(lines) + "\n"


def write_torch(path: Path, content: Any) -> None:
    """torch.save, through memory: a full disk is then an OSError, not a RuntimeError from deep inside torch."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


def entry(content: Any, key: str) -> Mapping[str, Tensor]:
    """The state dict below a key of a file that was read back.

    Raises:
        UserError: there is none.
    """
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        raise UserError(f"the file that was read back has no {key}")
    return content[key]


def check_out(out: Path, suffixes: tuple[str, ...], target: str, overwrite: bool) -> None:
    """Refuse an output that would be lost, or that the target would not read.

    Args:
        out: what the user asked for.
        suffixes: that the target reads; empty for a folder.
        target: its name, for errors.
        overwrite: whether an earlier export may be replaced.

    Raises:
        UserError: the name does not fit, or there is something that is not replaced.
    """
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: {target} reads {' or '.join(suffixes)} files; give the file such a name")
    if not suffixes and out.suffix in (".pth", ".pt", ".safetensors"):
        raise UserError(f"--out {out}: {target} gets a folder, not a file; give a name without {out.suffix}")
    try:
        found = out.exists()
    except OSError as error:  # older Pythons raise where a name is too long or a folder may not be read
        raise UserError(f"--out {out}: cannot be written ({error})") from error
    if not found:
        return
    if not overwrite:
        raise UserError(f"--out {out}: exists already; choose another name, or replace it with --overwrite")
    if suffixes and out.is_dir():
        raise UserError(f"--out {out}: is a folder; {target} gets a file")
    if not suffixes and not (out / "metadata.json").is_file():
        raise UserError(f"--out {out}: is no earlier export, so --overwrite does not replace it; choose another name")


def write_checked(
    out: Path,
    tensors: Tensors,
    meta: dict[str, Any],
    usage: list[str],
    *,
    write: Callable[[Path], None],
    read: Callable[[Path], Tensors],
    check: Callable[[Tensors, Path], dict[str, Any]],
    folder: bool = False,
) -> Path:
    """Write under a temporary name, check, write again with the result in it, read back once more, rename.

    Args:
        out: the final file or folder.
        tensors: what `read` has to give back.
        meta: of the file; `verification` is added.
        usage: how to load it.
        write: the file with `tensors` and `meta` as it is now.
        read: the file's tensors, as the target finds them.
        check: (tensors, path) of a file that was read back to the result of its comparison.
        folder: `out` is a folder, which holds its own metadata and text.

    Returns:
        The sidecar's path.

    Raises:
        ExportError: the file failed its check; nothing is left at `out`.
        UserError: `out` cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    sidecars = {} if folder else {suffix: out.with_name(f"{out.name}{suffix}") for suffix in (".json", ".txt")}
    partials = {suffix: path.with_name(f".{path.name}.partial") for suffix, path in sidecars.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        write(partial)
        meta["verification"] = check(read(partial), partial)
        write(partial)
        verify.same_tensors(read(partial), tensors)
        if folder:
            remove(out)
        else:
            partials[".json"].write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            partials[".txt"].write_text(load_text(meta, usage), encoding="utf-8")
        os.replace(partial, out)
        for suffix, path in sidecars.items():
            os.replace(partials[suffix], path)
    except verify.ExportError as error:
        raise verify.ExportError(f"the export failed its check, no file was written: {error}") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            words in str(error) for words in ("cannot be opened", "Parent directory")
        ):
            raise
        raise UserError(f"--out {out}: cannot be written ({error})") from error
    finally:
        for path in (partial, *partials.values()):
            with contextlib.suppress(OSError):  # a name that is too long, a disk that went away: reported above
                remove(path)
    return sidecars.get(".json", out / "metadata.json")


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def common_facts(meta: Mapping[str, Any]) -> list[str]:
    """Lines of the summary that every branch has."""
    return [
        f"folded: {'; '.join(meta['conversions']) or 'nothing to fold'}",
        f"left out: {some_names(meta['dropped'])}",
    ]
