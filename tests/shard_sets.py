"""What several test modules know of shards: a made world, how sets are opened and frames compared."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np

from simipu3d.config import parse_part
from simipu3d.contracts.frame import EVERYTHING, Wants
from simipu3d.data.readers.shards import ShardsReader
from simipu3d.data.shards.frames import PrepareConfig
from simipu3d.registry import READERS

WORLD = {
    "name": "drive_world",
    "num_frames": 11,
    "frames_per_sequence": 2,
    "image_size": [24, 48],
    "beams": 16,
    "azimuth_step_deg": 2.0,
    "num_cameras": 2,
    "supersampling": 1,
}
SMALL = PrepareConfig(shard_frames=3)


def parse(**block):
    return parse_part("data", READERS, block)


def open_shards(url, wants: Wants = EVERYTHING, **keys) -> ShardsReader:
    return ShardsReader(parse(name="shards", root=str(url), **keys), wants)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def difference(first, second, path="frame") -> list[str]:
    """Where two records differ, bit for bit and type for type; `encoded` may be new."""
    if is_dataclass(first):
        names = [f.name for f in fields(first) if f.name != "encoded"]
        return [line for n in names for line in difference(getattr(first, n), getattr(second, n), f"{path}.{n}")]
    if isinstance(first, np.ndarray):
        same = isinstance(second, np.ndarray) and first.dtype == second.dtype
        same = same and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
        return [] if same else [path]
    if isinstance(first, dict) and isinstance(second, dict):
        same = list(first) == list(second)
        return (
            [line for key in first for line in difference(first[key], second[key], f"{path}.{key}")] if same else [path]
        )
    if isinstance(first, tuple | list) and len(first) and is_dataclass(first[0]):
        pairs = zip(first, second, strict=True)
        return [line for i, (a, b) in enumerate(pairs) for line in difference(a, b, f"{path}.{i}")]
    if isinstance(first, tuple | list):
        return [] if list(first) == list(second) else [path]
    return [] if type(first) is type(second) and first == second else [path]
