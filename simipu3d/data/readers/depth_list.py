"""Image and depth pairs from the lists that depth benchmarks use: KITTI's Eigen split, NYU.

A line is `<image> <depth PNG or None> <focal length>`, paths relative to two folders, as in the lists of BTS, AdaBins and the
depth toolbox of SimIPU's authors (a leading slash, as NYU's training list has it, is left out):

    <date>/<drive>_sync/image_02/data/<id>.png <drive>_sync/proj_depth/groundtruth/image_02/<id>.png 721.5377
    /<scene>/rgb_00045.jpg /<scene>/sync_depth_00045.png 518.8579

Frames have one camera, `image`, and no points: the camera's own frame is the only one there is.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat

from simipu3d.contracts.frame import EVERYTHING, Camera, Frame, Wants
from simipu3d.data.config import DataConfig
from simipu3d.data.readers.base import BaseReader
from simipu3d.data.readers.files import WAY_OUT, decode_image, decode_map, read_bytes
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

log = logging.getLogger(__name__)

CAMERA_FROM_LIDAR = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
"""There is no lidar: its frame stands where the camera stands, turned to x forward, y left, z up."""
KB_SIZE = (352, 1216)
"""Height and width of KITTI's depth benchmark (github BTS: `do_kb_crop`)."""
NYU_WINDOW = (45, 472, 43, 608)
"""Rows and columns without NYU's white frame, as trained on in BTS."""


class DepthListConfig(DataConfig):
    """The `data:` block for `name: depth_list`."""

    name: str = "depth_list"
    """Which reader (`READERS`)."""
    root: Path
    """The folder that the images' paths start from."""
    depth_root: Path | None = None
    """The folder that the depth maps' paths start from; null: root."""
    split: str = "train"
    """The list is <split>.txt in root, like kitti_eigen_train."""
    split_file: Path | None = None
    """Read this list instead."""
    missing: Literal["drop", "keep"] = "drop"
    """Lines whose depth is `None` (45 of the 697 of the Eigen test list): left out, as in SimIPU's depth runs, or frames whose
    depth is unknown everywhere, to predict what is not labelled."""
    png_scale: PositiveFloat = 256.0
    """Value of a depth PNG for one metre. Default: KITTI; NYU 1000."""
    intrinsics: tuple[PositiveFloat, PositiveFloat, float, float] | None = None
    """fx, fy, cx, cy of the uncut image, pixels. Default, null: the focal length of the line, and the image's middle."""
    crop: Literal["kb", "nyu"] | None = None
    """`kb`: the bottom 352 rows and the central 1216 columns (KITTI); `nyu`: rows 45 to 471 and columns 43 to 607 (training on
    NYU; it is tested on whole images). Default: none."""


class Line(NamedTuple):
    """One line of a list: paths as files have them, depth None where there is none."""

    image: str
    depth: str | None
    focal: float


@READERS.register("depth_list", config=DepthListConfig)
class DepthListReader(BaseReader):
    """Image and depth pairs of a list. Contract: `FrameReader`; frame ids are the images' paths without suffix, sequences their
    folders (KITTI: the drive).

    Args:
        config: the `data:` block.
        wants: what is read.

    Raises:
        UserError: the list is missing or not of that form, or more files are absent than may be bad.
    """

    gives = frozenset({"depth"})
    config: DepthListConfig

    def __init__(self, config: DepthListConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.depth_root = config.root if config.depth_root is None else config.depth_root
        self.lines = _read_lines(config)
        self.frame_ids = tuple(line.image.rpartition(".")[0] for line in self.lines)
        self.sequence_ids = tuple(_sequence(line.image) for line in self.lines)
        self._check_files()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Frame:
        return Frame(
            points=self._no_points(),
            point_columns=self.point_columns,
            cameras=(self._camera(self.lines[index]),) if self.wants.images else (),
            frame_id=self.frame_ids[index],
            sequence_id=self.sequence_ids[index],
        )

    def _camera(self, line: Line) -> Camera:
        path = self.config.root / line.image
        encoded = read_bytes(path)
        image = decode_image(encoded, str(path))
        height, width = image.shape[:2]
        top, bottom, left, right = _window((height, width), self.config.crop, str(path))
        fx, fy, cx, cy = self.config.intrinsics or (line.focal, line.focal, (width - 1) / 2, (height - 1) / 2)
        image_from_camera = np.array([[fx, 0, cx - left, 0], [0, fy, cy - top, 0], [0, 0, 1, 0]], dtype=np.float64)
        depth = None
        if self._wanted("depth"):
            depth = np.ascontiguousarray(self._depth(line, (height, width))[top:bottom, left:right])
        return Camera(
            name="image",
            image=np.ascontiguousarray(image[top:bottom, left:right]),
            image_from_camera=image_from_camera,
            camera_from_lidar=CAMERA_FROM_LIDAR.copy(),
            depth=depth,
            encoded=encoded if self.config.crop is None else None,
        )

    def _depth(self, line: Line, size: tuple[int, int]) -> NDArray[np.float32]:
        """(H, W) metres, 0 where unknown."""
        if line.depth is None:
            return np.zeros(size, dtype=np.float32)
        path = self.depth_root / line.depth
        values = _decode_depth(read_bytes(path), str(path))
        if values.shape != size:
            found, right = (" x ".join(map(str, one)) for one in (values.shape, size))
            raise BadFrameError(
                f"{path}: the depth map has {found} pixels, its image {line.image} has {right}; {WAY_OUT}"
            )
        return values.astype(np.float32) / np.float32(self.config.png_scale)

    def _check_files(self) -> None:
        absent = [line.image for line in self.lines if not self._is_there(line)]
        if absent and (len(absent) == len(self) or len(absent) > self.config.max_bad_frames(len(self))):
            raise UserError(
                f"{self.config.root}: {len(absent)} of the {len(self)} pairs of the list lack a file ({absent[0]}, ...); images "
                f"are looked for in data.root, depth maps in {self.depth_root} (data.depth_root); set both, or shorten the list"
            )

    def _is_there(self, line: Line) -> bool:
        depth = line.depth is None or not self._wanted("depth") or (self.depth_root / line.depth).is_file()
        return depth and (self.config.root / line.image).is_file()


def _decode_depth(content: bytes, source: str) -> NDArray[np.generic]:
    """(H, W) whole numbers of a 16-bit PNG."""
    values = decode_map(content, source)
    if values.dtype == np.uint8:
        raise BadFrameError(f"{source}: has 8 bits a pixel, a depth map has 16; {WAY_OUT}")
    return values


def _window(size: tuple[int, int], crop: str | None, source: str) -> tuple[int, int, int, int]:
    """First and last row and column of what is kept of an image of (height, width)."""
    height, width = size
    if crop is None:
        return 0, height, 0, width
    if crop == "nyu":
        window = NYU_WINDOW
    else:
        top, left = height - KB_SIZE[0], (width - KB_SIZE[1]) // 2
        window = (top, top + KB_SIZE[0], left, left + KB_SIZE[1])
    if window[0] < 0 or window[2] < 0 or window[1] > height or window[3] > width:
        raise BadFrameError(f"{source}: {height} x {width} pixels are too few for data.crop={crop}; {WAY_OUT}")
    return window


def _sequence(image: str) -> str:
    """The folder of an image; of KITTI's raw data the drive, whichever camera."""
    return re.sub(r"/image_0\d/data$", "", image.rpartition("/")[0])


def _read_lines(config: DepthListConfig) -> list[Line]:
    path = config.split_file or config.root / f"{config.split}.txt"
    form = "write <image> <depth PNG or None> <focal length> a line"
    try:
        rows = [row.split() for row in path.read_text(encoding="utf-8").splitlines() if row.strip()]
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such list; data.split names <split>.txt in data.root, or set data.split_file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list ({error}); {form}") from error
    lines = [_parse(row, path, number + 1, form) for number, row in enumerate(rows)]
    kept = [line for line in lines if line.depth is not None or config.missing == "keep"]
    if len(kept) < len(lines):
        log.info("%s: %d of %d lines have no depth map and are left out", path, len(lines) - len(kept), len(lines))
    if not kept:
        raise UserError(f"{path}: the list has no image with a depth map; {form}")
    twice = _repeated([line.image for line in kept])
    if twice is not None:
        raise UserError(f"{path}: {twice} stands in the list twice; remove one")
    return kept


def _parse(row: Sequence[str], path: Path, number: int, form: str) -> Line:
    try:
        image, depth, focal = row
        line = Line(image.lstrip("/"), None if depth == "None" else depth.lstrip("/"), float(focal))
    except ValueError:
        raise UserError(f"{path}: line {number} is {' '.join(row)!r}; {form}") from None
    if ".." in Path(line.image).parts or line.focal <= 0:
        raise UserError(
            f"{path}: line {number}: an image below data.root and a positive focal length are needed; {form}"
        )
    return line


def _repeated(names: Sequence[str]) -> str | None:
    """The first name that stands in a list twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
