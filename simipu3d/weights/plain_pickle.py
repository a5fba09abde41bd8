"""How is a torch file read without running anything in it?

torch's `weights_only` reader knows tensors and plain values. Real checkpoints also hold numpy's scalars (a best score) and
an `argparse.Namespace` (DINO, MAE). Those names are answered by the stand-ins below, which are plain Python and call
nothing: numpy's own `scalar` and `dtype` would take a description of memory from the file, which is not safe.
"""

import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

_FORMATS = {
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "i8": "q",
    "i4": "i",
    "i2": "h",
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
    "b1": "?",
}
"""numpy's codes of number types in Python's `struct`."""
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


class NumberType:
    """Stands for `numpy.dtype`: the type of one number.

    Raises:
        ValueError: it is of anything else (objects, records, text).
    """

    def __init__(self, code: str, *_: Any):
        code = code.decode() if isinstance(code, bytes) else code
        if code not in _FORMATS:
            raise ValueError(f"a numpy value of type {code!r} is no number")
        self.format = _FORMATS[code]
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.order = ">" if order == ">" else "<"


def number(kind: NumberType, content: bytes) -> float | int | bool:
    """Stands for numpy's `scalar`: the number as a plain one."""
    content = content.encode("latin1") if isinstance(content, str) else content
    return struct.unpack(kind.order + kind.format, content)[0]


class Options:
    """Stands for `argparse.Namespace`; what is in it is not kept."""

    def __setstate__(self, state: Any) -> None:
        """Nothing of the file's options is used."""


_STAND_INS: list[Any] = [
    (NumberType, "numpy.dtype"),
    (Options, "argparse.Namespace"),
    *((number, f"{module}.scalar") for module in _MODULES),
]


def load_plain(path: Path) -> Any:
    """Content of a torch file on the CPU: tensors and plain values.

    A damaged file raises whatever torch's reader stumbles over (`IndexError`, `AssertionError`, ...): see
    `files.read_torch_file`, which turns all of it into one line.
    """
    with warnings.catch_warnings(), safe_globals(_STAND_INS):
        warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, which a damaged file has at random
        return torch.load(path, map_location="cpu", weights_only=True)
