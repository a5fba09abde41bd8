"""Which data sets does the data benchmark read? Waymo drives of our own making, drive_world, the real samples, and shards
of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simipu3d.benchmark.synthetic_waymo.drive import WaymoDrive, WaymoTruth
from simipu3d.benchmark.synthetic_waymo.files import write_waymo_v1, write_waymo_v2
from simipu3d.benchmark.synthetic_waymo.rig import WaymoRigSettings
from simipu3d.config import parse_part
from simipu3d.data.config import DataConfig
from simipu3d.data.readers.waymo_moment import WaymoMoment
from simipu3d.data.shards.frames import PrepareConfig
from simipu3d.data.shards.writer import prepare_shards
from simipu3d.registry import READERS


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: of the row.
        data: the `data:` block.
        against: the row that its speed is compared with, or None.
        augment: the `augment:` block.
    """

    name: str
    data: dict[str, Any]
    against: str | None = None
    augment: dict[str, Any] = field(default_factory=dict)


def write_made_data(folder: Path, samples: Path | None, quick: bool) -> list[Case]:
    """Write what is read below `folder`, and say how to read it.

    Args:
        folder: an empty one.
        samples: holds kitti/ and nuscenes/ in their official layouts, or None.
        quick: small Waymo images and few frames.
    """
    settings = WaymoRigSettings(num_moments=2) if quick else WaymoRigSettings.full_size(num_moments=4)
    moments = list(_moments(settings))
    segments = {moments[0][0].segment: moments}
    write_waymo_v2(folder / "waymo_v2", segments)
    write_waymo_v1(folder / "waymo_v1", segments)
    small = {"lasers": ["TOP"], "cameras": ["FRONT"], "returns": 1}
    cases = []
    for version in ("v2", "v1"):
        block = {"name": "waymo", "version": version, "root": str(folder / f"waymo_{version}"), "split": "all"}
        cases += [
            Case(f"waymo {version}, top lidar, 1 camera", block | small),
            Case(f"waymo {version}, 5 lidars, 5 cameras", block),
        ]
    made = {"name": "drive_world", "root": str(folder / "cache"), "num_frames": 8}
    cases += _with_shards("drive_world", made, folder, {"images": {"resize": None}})
    if samples is not None:
        kitti = {"name": "kitti", "root": str(samples / "kitti"), "split": "all"}
        nuscenes = {"name": "nuscenes", "root": str(samples / "nuscenes"), "version": "v1.0-mini", "split": "all"}
        cases += _with_shards("kitti", kitti, folder)
        cases += _with_shards("nuscenes", nuscenes, folder)
    return cases


def _moments(settings: WaymoRigSettings) -> Iterator[tuple[WaymoMoment, WaymoTruth]]:
    drive = WaymoDrive(settings, 0)
    return (drive.moment(index) for index in range(settings.num_moments))


def _with_shards(name: str, data: dict[str, Any], folder: Path, augment: dict[str, Any] | None = None) -> list[Case]:
    """A data set, and its shards with images as they were and as JPEG; both are compared with the files."""
    augment = augment or {}
    cases = [Case(name, data, augment=augment)]
    for images in ("keep", "jpeg"):
        out = folder / f"{name}_{images}"
        config = parse_part("data", READERS, data)
        assert isinstance(config, DataConfig)
        prepare_shards(config, PrepareConfig(images=images), str(out))
        shards = {"name": "shards", "root": str(out)}
        cases.append(Case(f"shards of {name}, images {images}", shards, against=name, augment=augment))
    return cases
